"""What a run says of itself before its first step."""

from __future__ import annotations

import dataclasses
import io
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rmipo.config.schema import Config
from megatron_rmipo.data.encoding.context_token import ContextToken
from megatron_rmipo.families.architecture import Experts, ModelArchitecture
from megatron_rmipo.families.tensors import num_parameters
from megatron_rmipo.objectives.arguments import objective_of, parse_arguments
from megatron_rmipo.reports.reporter import Reporter
from megatron_rmipo.training.course.run import HeldOutBatches
from megatron_rmipo.training.observers import say_what_runs, warn_of_few_pairs
from megatron_rmipo.training.progress import Progress
from megatron_rmipo.training.resume import StartingPoint
from tests.training.test_validation import ARCH, BASE

SEVERAL = ["--tensor-model-parallel-size", "2", "--sequence-parallel", "--bf16", "--use-distributed-optimizer"]


CONTEXT = ContextToken(1, "after <s> (token 1), the tokenizer's BOS")


class Pairs:
    """As much of a collection as the first words look at."""

    def __init__(self, count: int, columns: tuple[str, ...]) -> None:
        self.count, self.stores = count, [SimpleNamespace(manifest=SimpleNamespace(pair_columns=columns))]

    def __len__(self) -> int:
        return self.count


def first_words(
    tmp_path: Path,
    config: Config,
    *,
    pairs: int,
    held_out: int,
    evaluated: int,
    warning: str = "",
    context: ContextToken = CONTEXT,
    columns: tuple[str, ...] = (),
    arch: ModelArchitecture = ARCH,
) -> list[str]:
    stream = io.StringIO()
    progress = Progress(step=3, consumed_pairs=384)
    groups = SimpleNamespace(world_size=4, tp_size=2, pp_size=1, cp_size=1, dp_size=2)
    batches: Any = SimpleNamespace(pairs=Pairs(held_out, columns))
    with Reporter(tmp_path, total_steps=7, stream=stream) as reporter:
        run: Any = SimpleNamespace(
            config=config,
            groups=groups,
            objective=objective_of(config),
            progress=progress,
            pairs=SimpleNamespace(pairs=Pairs(pairs, columns)),
            held_out_sets=[HeldOutBatches("", batches, evaluated)] if held_out else [],
            train_iters=7,
            total_pairs=896,
            reporter=reporter,
        )
        source: Any = SimpleNamespace(arch=arch, directory=Path("run"), base=None, adapters=None)
        say_what_runs(run, source, StartingPoint(progress, {}, resumes=True, warning=warning), context)
    return stream.getvalue().splitlines()


def test_what_matters_is_said_in_ten_lines(tmp_path: Path) -> None:
    lines = first_words(tmp_path, parse_arguments([*BASE, *SEVERAL]), pairs=1792, held_out=1200, evaluated=100)
    assert len(lines) <= 10
    assert lines[0].endswith(" parameters (llama), from step 3 of run")
    assert lines[1] == "data: 1,792 pairs to train on, 1,200 held out, of which the first 100 are evaluated"
    assert lines[3] == "log p(y): each response after <s> (token 1), the tokenizer's BOS"
    assert lines[4] == "length: 7 steps of 128 pairs, 0.5 epochs"
    assert lines[6] == "layout: 4 ranks (TP 2 x PP 1 x DP 2), sequence parallel, distributed optimizer"
    assert lines[7] == "precision: bf16, fp32 master weights; attention sdpa"


def test_a_sparse_model_says_what_is_active(tmp_path: Path) -> None:
    arch = dataclasses.replace(ARCH, family="mixtral", experts=Experts(8, 2, 40))
    config = parse_arguments([*BASE, "--expert-model-parallel-size", "4"])
    lines = first_words(tmp_path, config, pairs=1792, held_out=0, evaluated=0, arch=arch)
    total = num_parameters(arch)
    active = total - ARCH.num_layers * 6 * 3 * ARCH.hidden_size * 40
    assert f"model: {total:,} parameters, of which {active:,} are active for a token (2 of 8 experts) (mixtral)" in lines[0]
    assert any(line.endswith("TP 2 x PP 1 x DP 2, experts over EP 4 x TP 1)") for line in lines)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], ["warning: log p(y): each response alone, as nothing begins it"]),
        (["--preset", "official"], ["log p(y): each response alone, its first token not scored"]),
        (["--margin-signal", "gap"], []),
        (["--objective", "simpo"], []),
    ],
)
def test_what_stands_before_a_response_in_log_p_is_said_where_it_is_read(
    tmp_path: Path, flags: list[str], expected: list[str]
) -> None:
    nothing = ContextToken(None, "alone, as nothing begins it")
    lines = first_words(tmp_path, parse_arguments([*BASE, *flags]), pairs=1792, held_out=0, evaluated=0, context=nothing)
    assert [line for line in lines if "log p(y)" in line] == expected


@pytest.mark.parametrize(("batch", "warned"), [(48, False), (49, True)])
def test_a_batch_larger_than_the_data_is_warned_of(tmp_path: Path, batch: int, warned: bool) -> None:
    config = parse_arguments([*BASE, "--global-batch-size", str(batch)])
    lines = first_words(tmp_path, config, pairs=48, held_out=0, evaluated=0, warning="the held-out pairs changed")
    assert lines[1] == "data: 48 pairs to train on, none held out"
    assert "warning: the held-out pairs changed" in lines
    assert any(f"--global-batch-size {batch} is more than the 48 pairs" in line for line in lines) == warned


def test_parameters_are_counted_without_padding() -> None:
    tied = dataclasses.replace(ARCH, tied_embeddings=True)
    assert num_parameters(ARCH) - num_parameters(tied) == 503 * 96
    layer = 96 * (2 * 96 + 2 * 32) + 3 * 96 * 264 + 2 * 96
    assert num_parameters(tied) == 6 * layer + 503 * 96 + 96


@pytest.mark.parametrize(
    ("num_held_out", "eval_pairs", "words"),
    [
        (1, None, ["held-out pairs: 1,", "standard error of 0.50", "hold out 50 or more", "--split and --valid-data-path"]),
        (49, 49, ["held-out pairs: 49,", "standard error of 0.07", "raise --eval-pairs 49"]),
        (49, 64, ["--split and --valid-data-path"]),
        (50, None, []),
        (0, None, []),
    ],
)
def test_too_few_held_out_pairs_are_warned_of(
    tmp_path: Path, num_held_out: int, eval_pairs: int | None, words: list[str]
) -> None:
    screen = StringIO()
    with Reporter(tmp_path, total_steps=3, stream=screen) as reporter:
        warn_of_few_pairs(num_held_out, eval_pairs, reporter)
    said = screen.getvalue()
    assert all(word in said for word in words), said
    assert said.startswith("warning: ") == bool(words)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--objective", "dpo", "--pair-margin"], ["weight"]),
        (["--objective", "rmipo", "--pair-weight"], ["margin"]),
        (["--objective", "sft"], ["margin", "weight"]),
    ],
)
def test_numbers_beside_the_pairs_that_nobody_reads_are_named(tmp_path: Path, flags: list[str], said: list[str]) -> None:
    config = parse_arguments([*BASE, *flags])
    lines = first_words(tmp_path, config, pairs=48, held_out=8, evaluated=8, columns=("margin", "weight"))
    notes = [line.split(",")[0] for line in lines if "beside their pairs" in line]
    assert notes == [f"note: the data have a {column} beside their pairs" for column in said]
