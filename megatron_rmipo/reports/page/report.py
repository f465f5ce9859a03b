"""The report: what runs were, how they went, and what their model says of held-out pairs, as one file of HTML."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

import megatron_rmipo
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.evaluation_file import Cell
from megatron_rmipo.reports.page import tables
from megatron_rmipo.reports.page.curves import build_charts
from megatron_rmipo.reports.page.findings import find
from megatron_rmipo.reports.page.headline import cards, overview, verdict
from megatron_rmipo.reports.page.next_commands import next_commands
from megatron_rmipo.reports.page.numbers import MISSING, short_number
from megatron_rmipo.reports.page.run_files import PageRun, read_page_run
from megatron_rmipo.reports.page.samples import shown_samples
from megatron_rmipo.reports.page.svg import chart_data, draw_chart, draw_histogram, legend_line
from megatron_rmipo.reports.page.tokens import find_tokenizer, shown_pairs
from megatron_rmipo.whole_files import replace_file

TEMPLATES = Path(__file__).parent / "templates"
# Rows of a table of a curve's values.
_VALUES_SHOWN = 12


def write_report(runs: Sequence[Path], output: Path, evaluations: Sequence[Path] = ()) -> None:
    """Write the report of one run, or of several side by side.

    Args:
        runs: their directories, or log directories.
        output: the file to write, in place of one that is there.
        evaluations: results of evaluations to show, beside those in the runs' own folders.

    Raises:
        ConfigError: a run cannot be read, or the file cannot be written.
        DataError: an evaluation cannot be read.
    """
    text = render_report([read_page_run(run) for run in runs], evaluations)
    try:
        replace_file(output, [text])
    except OSError as error:
        raise ConfigError(f"--output {output}: cannot be written: {error.strerror}. Name another file.") from error


def render_report(runs: Sequence[PageRun], evaluations: Sequence[Path] = ()) -> str:
    """The page.

    Args:
        runs: at least one.
        evaluations: further results of evaluations.
    """
    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["short"] = short_number
    environment.globals["missing"] = MISSING
    charts = build_charts(runs)
    files = [path for run in runs for path in tables.evaluation_files(run)] + list(evaluations)
    sets = list(dict.fromkeys(name for run in runs for name in run.held_out))
    names = list(dict.fromkeys(path.resolve() for path in files))
    return environment.get_template("report.html").render(
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        made=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=megatron_rmipo.__version__,
        several=len(runs) > 1,
        runs=[_shown_run(run) for run in runs],
        overview=overview(runs) if len(runs) > 1 else None,
        differences=tables.different_settings(runs) if len(runs) > 1 else None,
        charts=[
            {
                "chart": chart,
                "svg": Markup(draw_chart(chart)),
                "data": chart_data(chart),
                "legend": [(Markup(legend_line(series)), series.label) for series in chart.series if not series.faint],
                "values": _values(chart_data(chart)),
            }
            for chart in charts
        ],
        comparisons=[tables.side_by_side(name, runs) for name in sets] if len(runs) > 1 else [],
        evaluations=[tables.evaluation_tables(path) for path in names],
    )


def _shown_run(run: PageRun) -> dict[str, Any]:
    """What the template shows of one run."""
    evaluated = run.held_out.get(run.tokens[0].get("set", "")) if run.tokens else None
    tokenizer = find_tokenizer(_tokenizers(run)) if run.tokens else None
    tokens_step = run.tokens[0]["step"] if run.tokens else None
    # A run that has gone on since has evaluated its pairs anew.
    same = evaluated is not None and evaluated.records[-1].get("step") == tokens_step
    starts = run.facts.get("starts") or []
    return {
        "run": run,
        "status": run.early_stop or ("complete" if run.is_complete else "not complete"),
        "cards": cards(run),
        "verdict": verdict(run),
        "findings": find(run),
        "held_out": [tables.held_out_table(name, one) for name, one in run.held_out.items()],
        "kinds": tables.kinds_table(run),
        "pairs": shown_pairs(run.tokens, evaluated.last if evaluated is not None and same else [], tokenizer),
        "tokens_step": tokens_step,
        "decoded": tokenizer is not None,
        "samples": shown_samples(run.samples),
        "changed": tables.changed_settings(run),
        "settings": tables.all_settings(run),
        "facts": _fact_rows(run),
        "data": _data(run),
        "starts": starts,
        "commands": next_commands(run),
    }


def _tokenizers(run: PageRun) -> list[str | None]:
    sets = [one for _, facts in _pairs_of(run) for one in facts.get("sets", [])]
    return [run.facts.get("tokenizer"), run.config.get("save_hf"), *(one.get("tokenizer_name") for one in sets)]


def _pairs_of(run: PageRun) -> list[tuple[str, Mapping[str, Any]]]:
    """What ``run.json`` says of each set of pairs, and what the set is called."""
    data = run.facts.get("data") or {}
    sets = [("pairs to train on", data.get("train")), ("pairs held out", data.get("held_out"))]
    sets += [(f"pairs held out as {name}", facts) for name, facts in (data.get("eval_data") or {}).items()]
    return [(title, facts) for title, facts in sets if facts]


def _fact_rows(run: PageRun) -> list[tuple[str, str]]:
    """Model, machine and software, as far as the run has recorded them."""
    facts, model = run.facts, run.facts.get("model") or {}
    rows = []
    if model:
        active = model.get("active_parameters")
        beside = f", {active:,} active for a token" if active and active != model["parameters"] else ""
        rows.append(("model", f"{model['family']}, {model['parameters']:,} parameters{beside}"))
        rows.append(("started from", model["from"]))
    rows += [(name, str(facts[name])) for name in ("layout", "precision", "device", "host", "commit") if facts.get(name)]
    rows += [(name, str(version)) for name, version in (facts.get("versions") or {}).items() if version]
    return rows


def _data(run: PageRun) -> list[dict[str, Any]]:
    """Of the pairs to train on and of those held out what the template shows."""
    shown = []
    for title, facts in _pairs_of(run):
        histograms = facts.get("histograms") or {}
        pictures = [
            (part, Markup(draw_histogram(histograms[part], histograms["step"], f"tokens of {part}, {title}")))
            for part in ("prompt", "chosen", "rejected")
            if histograms.get(part)
        ]
        evaluated = facts.get("evaluated")
        cut = f", of which the first {evaluated:,} are evaluated" if evaluated and evaluated < facts["pairs"] else ""
        shown.append(
            {
                "title": f"{facts['pairs']:,} {title}{cut}",
                "sets": [_data_set(one) for one in facts.get("sets", [])],
                "lengths": [_lengths(one) for one in facts.get("sets", [])[:1]],
                "histograms": pictures,
                "counted": histograms.get("counted"),
            }
        )
    return shown


def _data_set(one: Mapping[str, Any]) -> list[tuple[str, str]]:
    counts = one.get("counts") or {}
    sources = [f"{source.get('name', '?')}{source.get('rows', '')}" for source in one.get("sources", [])]
    more = f" and {len(sources) - 5} more" if len(sources) > 5 else ""
    rows = [
        ("data set", str(one.get("prefix"))),
        ("made from", ", ".join(sources[:5]) + more),
        ("holds", f"{one.get('num_pairs', 0):,} {one.get('kind', 'pairs')}, {one.get('num_tokens', 0):,} tokens"),
        ("rows", ", ".join(f"{name} {count:,}" for name, count in counts.items())),
        ("template", f"{one.get('template_name', '')} {one.get('template_date', '')}".strip()),
        ("length", f"at most {one.get('seq_length', 0):,} tokens; longer pairs: {one.get('overlong', '')}"),
    ]
    unread = one.get("unread_columns") or []
    return rows + ([("columns not read", ", ".join(unread))] if unread else [])


def _lengths(one: Mapping[str, Any]) -> tables.Table:
    lengths = one.get("lengths") or {}
    columns = ("mean", "p5", "p50", "p95", "p99", "max")
    rows = [[part, *(summary.get(column) for column in columns)] for part, summary in lengths.items()]
    return tables.Table("Tokens", ["", "mean", "5 %", "median", "95 %", "99 %", "max"], rows)


def _values(data: Mapping[str, Any]) -> tables.Table:
    """Some of a chart's values, for who does not see it."""
    steps = sorted({step for series in data["series"] for step, _ in series["points"]})
    if len(steps) > _VALUES_SHOWN:
        steps = [steps[number * (len(steps) - 1) // (_VALUES_SHOWN - 1)] for number in range(_VALUES_SHOWN)]
    rows: list[list[Cell]] = []
    for step in steps:
        rows.append([f"{step:,.0f}", *(_nearest(series["points"], step) for series in data["series"])])
    return tables.Table("", ["step", *(series["label"] or "value" for series in data["series"])], rows)


def _nearest(points: Sequence[Sequence[float]], step: float) -> float | None:
    """The last value at a step or before; none before the first."""
    earlier = [value for at, value in points if at <= step]
    return earlier[-1] if earlier else None
