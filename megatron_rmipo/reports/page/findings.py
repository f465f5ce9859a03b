"""What a reader of a run should look at twice."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator

from megatron_rmipo.config.schema import Config
from megatron_rmipo.errors import RmipoError
from megatron_rmipo.objectives.arguments import parse_arguments
from megatron_rmipo.reports.comparison import held_out_lengths
from megatron_rmipo.reports.held_out import FEWEST_PAIRS, NUM_PAIRS, difference, mean_change, mean_of, recorded
from megatron_rmipo.reports.page.numbers import figure_text
from megatron_rmipo.reports.page.run_files import PageRun

# Beyond these a share is worth a word.
_BUBBLE, _STRAGGLER, _AT_BOUND, _REJECTED, _LENGTH_GAP = 0.15, 0.1, 0.5, 0.1, 0.1
# A fall per token, in nats.
_FALL = 0.05


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something to look at.

    Attributes:
        title: what was found.
        text: by which numbers, and what helps.
        anchor: the part of the page that shows it.
    """

    title: str
    text: str
    anchor: str


def find(run: PageRun) -> list[Finding]:
    """The findings of a run, in the order in which they matter."""
    return [finding for look in _LOOKS for finding in look(run)]


def _unfinished(run: PageRun) -> Iterator[Finding]:
    if not run.is_complete:
        yield Finding(
            "The run is not complete",
            f"It has come to step {run.step:,} of {run.train_iters:,}. What follows is what it has left so far.",
            "next",
        )


def _too_few(run: PageRun) -> Iterator[Finding]:
    if not run.held_out:
        yield Finding(
            "No held-out pairs",
            "Nothing says how the model does on pairs that it was not trained on. Hold some out with --split 99,1, or name them "
            "with --valid-data-path.",
            "held-out",
        )
    for name, held_out in run.held_out.items():
        count = held_out.records[-1].get(NUM_PAIRS)
        if count is not None and count < FEWEST_PAIRS:
            yield Finding(
                "Too few held-out pairs",
                f"{count} pairs{f' of {name}' if name else ''}: an accuracy near one half has a standard error of "
                f"{0.5 / count**0.5:.2f}. {FEWEST_PAIRS} or more would do.",
                "held-out",
            )


def _skipped(run: PageRun) -> Iterator[Finding]:
    count = int(run.last_step.get("skipped_steps") or 0)
    if count:
        yield Finding(
            "Steps were skipped",
            f"In {count} step{'s' * (count > 1)} the loss or the gradient was not finite, and the weights stayed. A lower --lr "
            "helps, or other pairs than the damaged ones: tools/inspect_pairs.py shows them.",
            "curve-loss",
        )


def _falling(run: PageRun) -> Iterator[Finding]:
    held_out = run.main_held_out
    if held_out is None or len(held_out.records) < 2:
        return
    paired = mean_change(held_out.first, held_out.last, "logps/chosen")
    first, last = (recorded(record, "logps/chosen") for record in (held_out.records[0], held_out.records[-1]))
    if first is None or last is None:
        return
    change = last.value - first.value
    if change < -_FALL and (paired is None or paired.is_beyond_its_error):
        rejected = [recorded(record, "logps/rejected") for record in (held_out.records[0], held_out.records[-1])]
        other = f"; of rejected ones by {rejected[1].value - rejected[0].value:+.3f}" if rejected[0] and rejected[1] else ""
        yield Finding(
            "Chosen responses have become less likely",
            f"Their log-probability per token changed by {change:+.3f} nats{other}. The margin grew by making rejected responses "
            "unlikely, and chosen ones with them. A term of supervised loss (--sft-weight, or an objective mixed with sft), a "
            "lower --lr or fewer steps hold them.",
            "curve-logps",
        )


def _at_bound(run: PageRun) -> Iterator[Finding]:
    held_out = run.main_held_out
    if held_out is None:
        return
    for bound in ("min", "max"):
        share = recorded(held_out.records[-1], f"gamma/at_{bound}")
        if share is not None and share.value > _AT_BOUND:
            yield Finding(
                f"Most target margins are at gamma_{bound}",
                f"Of {share.value:.0%} of the held-out pairs. There the margin no longer tells pairs apart: look at --preset, "
                f"--margin-scale and --gamma-{bound}.",
                "curve-gamma",
            )


def _length(run: PageRun) -> Iterator[Finding]:
    held_out = run.held_out.get("")
    lengths = None
    if held_out is not None and held_out.last:
        lengths = _lengths(run)
    if held_out is None or lengths is None or len(lengths) != len(held_out.last):
        return
    groups = [
        [pair for pair, (chosen, rejected) in zip(held_out.last, lengths, strict=True) if (chosen - rejected) * sign > 0]
        for sign in (1, -1)
    ]
    longer, shorter = (mean_of(group, "rewards/accuracies") for group in groups)
    if longer is None or shorter is None or min(map(len, groups)) < FEWEST_PAIRS // 2:
        return
    gap = difference(longer, shorter)
    if gap.value > _LENGTH_GAP and gap.is_beyond_its_error:
        yield Finding(
            "Longer responses are preferred",
            f"Accuracy is {figure_text(longer)} where the chosen response is the longer one (n = {longer.num_pairs}) and "
            f"{figure_text(shorter)} where it is the shorter one (n = {shorter.num_pairs}): the model may have learned length. "
            "Look at the lengths of the data, and at an objective with length normalization.",
            "data",
        )


def _lengths(run: PageRun) -> list[tuple[int, int]] | None:
    try:
        config: Config = parse_arguments(["--config", str(run.log_dir / "config.yaml")])
        found = held_out_lengths(config)
    except (RmipoError, OSError, ImportError):
        return None
    return None if found is None else [(int(chosen), int(rejected)) for chosen, rejected in found]


def _overfit(run: PageRun) -> Iterator[Finding]:
    for name, held_out in run.held_out.items():
        losses = [(record["loss"], record["step"]) for record in held_out.records if record.get("loss") is not None]
        if len(losses) < 3:
            continue
        (best, step), last = min(losses), recorded(held_out.records[-1], "loss")
        if last is not None and last.value - best > 2.0 * (last.error or 0.0) and last.value > best * 1.02:
            yield Finding(
                "The held-out loss has turned",
                f"{f'Of {name} it' if name else 'It'} was {best:.4f} at step {step:,} and is {figure_text(last, '.4f')} at the "
                "last: what was learned since then is of the training pairs alone. Fewer steps, or a lower --lr.",
                "curve-loss",
            )


def _rejected_rows(run: PageRun) -> Iterator[Finding]:
    for one in ((run.facts.get("data") or {}).get("train") or {}).get("sets", []):
        counts = one.get("counts", {})
        rows, kept = counts.get("rows", 0), counts.get("kept", 0)
        if rows and 1.0 - kept / rows > _REJECTED:
            yield Finding(
                "Many rows of the data were left out",
                f"{rows - kept:,} of the {rows:,} rows of {one['prefix']}. The table of the data says why.",
                "data",
            )


def _bubble(run: PageRun) -> Iterator[Finding]:
    share = _median(run, "pipeline_bubble")
    if share is not None and share > _BUBBLE:
        yield Finding(
            "Pipeline stages stand still",
            f"For {share:.0%} of a step, by the cost of packs. More micro-batches (a lower --tokens-per-microbatch, a larger "
            "batch), virtual stages, or fewer stages.",
            "curve-bubble",
        )


def _straggler(run: PageRun) -> Iterator[Finding]:
    share = _median(run, "straggler_share")
    if share is not None and share > _STRAGGLER:
        host = run.last_step.get("straggler_host")
        where = f", at the last step rank {run.last_step.get('straggler_rank', 0):.0f} on {host}" if host else ""
        yield Finding(
            "One rank holds up the others",
            f"The slowest is behind the median of its stage by {share:.0%} of a step{where}. Uneven packs, or a slow host.",
            "curve-straggler",
        )


def _median(run: PageRun, name: str) -> float | None:
    column = run.columns.get(name)
    return statistics.median(column.values) if column is not None and column.values else None


_LOOKS: tuple[Callable[[PageRun], Iterator[Finding]], ...] = (
    *(_unfinished, _too_few, _skipped, _falling, _overfit, _at_bound, _length, _rejected_rows, _bubble, _straggler),
)
