"""The reference through the command line: computed once, found again, gone on with after a kill, never taken for another."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_rmipo.command import STOPPED
from megatron_rmipo.config.schema import TrainingConfig
from megatron_rmipo.data.batches.order import PairOrder
from megatron_rmipo.data.store.collection import PairCollection
from megatron_rmipo.data.store.pair_store import PairStore
from megatron_rmipo.data.store.reference_scores import SCORES_FILE
from megatron_rmipo.scoring import score_cli
from tests.harness import run_distributed
from tests.integration.data import MODEL, write_pairs
from tests.integration.test_training import STEPS, flags, losses, output_of, records, run, weights


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    return write_pairs(tmp_path / "data" / "pairs")


def score_files(prefix: Path) -> list[Path]:
    return sorted(prefix.with_name(prefix.name + ".reference").glob(f"*/{SCORES_FILE}"))


def scored_rows(path: Path) -> list[int]:
    """Rows of a file of scores that are there: not the zeros of a hole."""
    rows: list[int] = np.flatnonzero(np.load(path).view(np.uint64)[:, 0]).tolist()
    return rows


def other_model(directory: Path) -> Path:
    """The fixture's model with other weights."""
    directory.mkdir()
    for path in MODEL.iterdir():
        if path.suffix != ".safetensors":
            (directory / path.name).write_bytes(path.read_bytes())
    generator = torch.Generator().manual_seed(3)
    tensors = load_file(MODEL / "model.safetensors")
    changed = {name: tensor + 0.02 * torch.randn(tensor.shape, generator=generator) for name, tensor in tensors.items()}
    save_file(changed, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.dist
@pytest.mark.parametrize("layout", [{}, {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}])
def test_the_first_loss_of_dpo_is_ln_2(prefix: Path, tmp_path: Path, layout: dict[str, int]) -> None:
    arguments = flags(prefix, tmp_path / "run", objective="dpo", train_iters=2, lr_warmup_iters=None, **layout)
    ranks = 2 if layout else 1
    assert set(run_distributed(run, ranks, arguments)) == {0}
    by_step = losses(tmp_path / "run")
    assert by_step[1] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(by_step[2] - math.log(2)) > 1e-3
    assert len(score_files(prefix)) == 1


@pytest.mark.dist
def test_scores_are_found_again_and_others_are_never_taken_for_them(prefix: Path, tmp_path: Path) -> None:
    def train(name: str, **changes: Any) -> float:
        arguments = flags(prefix, tmp_path / name, objective="dpo", train_iters=1, lr_warmup_iters=None, split=None, **changes)
        code, output = run_distributed(output_of, 1, run, arguments)[0]
        assert code == 0, output
        return losses(tmp_path / name)[1]

    first = train("first")
    (scores,) = score_files(prefix)
    written = scores.stat().st_mtime_ns
    assert train("again") == first
    assert scores.stat().st_mtime_ns == written
    other = other_model(tmp_path / "other")
    changed = train("changed", reference_hf=other)
    assert abs(changed - math.log(2)) > 1e-3, "the other reference was not looked at"
    assert len(score_files(prefix)) == 2
    # At the same layout bf16 is exact, too; 0.01 nats on one pair in six would show.
    assert train("bf16", bf16=True) == pytest.approx(math.log(2), abs=1e-6)
    assert len(score_files(prefix)) == 3
    # The same data with one pair changed.
    write_pairs(prefix, swap_first=True)
    assert train("data") == pytest.approx(math.log(2), abs=1e-6)
    assert len(score_files(prefix)) == 4


@pytest.mark.dist
def test_scoring_goes_on_after_a_signal_and_a_kill_at_another_layout(prefix: Path, tmp_path: Path) -> None:
    arguments = ["--load-hf", str(MODEL), "--pairs", str(prefix), "--tokens-per-microbatch", "700"]
    program = (
        "import sys, time\n"
        "from megatron_rmipo.scoring import score, score_cli\n"
        "score.ROWS_PER_WRITE = 5\n"
        "original = score._Keeper.write\n"
        "def slowly(*given):\n"
        "    original(*given)\n"
        "    time.sleep(1)\n"
        "score._Keeper.write = slowly\n"
        "sys.exit(score_cli.main(sys.argv[1:]))\n"
    )
    for sent, least, code in ((signal.SIGTERM, 5, STOPPED), (signal.SIGKILL, 15, -signal.SIGKILL)):
        command, variables = [sys.executable, "-c", program, *arguments], {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, env=variables, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 100
        while not (score_files(prefix) and len(scored_rows(score_files(prefix)[0])) >= least):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(sent)
        _, said = process.communicate(timeout=60)
        assert process.returncode == code, said
        (scores,) = score_files(prefix)
        num_done = len(scored_rows(scores))
        assert least <= num_done < 48
        if sent is signal.SIGTERM:
            assert f"{num_done} of 48 rows are kept" in said.splitlines()[-1]
    before = np.load(scores)
    assert scored_rows(scores) == list(range(num_done))
    assert set(run_distributed(score_cli.main, 2, [*arguments, "--tensor-model-parallel-size", "2"])) == {0}
    after = np.load(scores)
    assert after[:num_done].tolist() == before[:num_done].tolist(), "what was done is not done again"
    assert run_distributed(score_cli.main, 1, [*arguments, "--reference-cache", str(tmp_path / "whole")]) == [0]
    whole = np.load(next((tmp_path / "whole").glob(f"*/{SCORES_FILE}")))
    np.testing.assert_allclose(after, whole, rtol=1e-5)
    # Training finds what the tool computed, and takes what was computed at its own layout.
    cache = {"reference_cache": tmp_path / "whole"}
    first_step = flags(prefix, tmp_path / "run", objective="dpo", train_iters=1, lr_warmup_iters=None, **cache)
    assert run_distributed(run, 1, first_step) == [0]
    assert score_files(prefix) == [scores]
    assert len(list((tmp_path / "whole").glob(f"*/{SCORES_FILE}"))) == 1
    assert losses(tmp_path / "run")[1] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("objective", "options"),
    [
        ("dpo", {}),
        ("kto", {}),
        ("alpha_dpo:2,beta_dpo:0.5,bco_pair,sft", {"preset": "official"}),
        ("epsilon_dpo", {"epsilon": 0.05}),
    ],
)
def test_a_resumed_run_is_the_run_that_was_not_stopped(
    prefix: Path, tmp_path: Path, objective: str, options: dict[str, Any]
) -> None:
    settings = {"objective": objective, "eval_interval": 2, **options}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run_distributed(run, 1, flags(prefix, whole, save_hf=tmp_path / "whole-hf", **settings)) == [0]
    assert run_distributed(run, 1, flags(prefix, parts, exit_interval=3, **settings)) == [STOPPED]
    # Another number of evaluations must change nothing; where the reference's log-probs are kept, the run knows which it is.
    settings.update(load_hf=MODEL if objective == "epsilon_dpo" else None, eval_interval=1)
    resumed = flags(prefix, parts, load=parts, save_hf=tmp_path / "parts-hf", **settings)
    code, output = run_distributed(output_of, 1, run, resumed)[0]
    assert code == 0, output
    assert losses(parts) == losses(whole)
    assert records(parts, "eval")[-1]["loss"] == records(whole, "eval")[-1]["loss"]
    before, after = weights(tmp_path / "whole-hf"), weights(tmp_path / "parts-hf")
    assert all(torch.equal(before[name], after[name]) for name in before)
    state = json.loads((whole / f"iter_{STEPS:07d}" / "rmipo.json").read_text())["train_state"]["objective_state"]
    if objective == "epsilon_dpo":
        assert state["beta"] != 0.01, "no step moved beta"
    else:
        counted = {name: value for name, value in state.items() if name.endswith("num_batches")}
        stateful = [member for member in ("alpha_dpo", "beta_dpo", "bco_pair") if member in objective]
        assert counted == {f"{member}/num_batches": STEPS for member in stateful}


@pytest.mark.dist
def test_a_resume_with_another_reference_or_none_is_refused(prefix: Path, tmp_path: Path) -> None:
    save = tmp_path / "run"
    assert run_distributed(run, 1, flags(prefix, save, objective="dpo", exit_interval=1)) == [STOPPED]
    other = other_model(tmp_path / "other")

    def refusal(**changes: Any) -> str:
        arguments = flags(prefix, save, load=save, **{"objective": "dpo", **changes})
        code, output = run_distributed(output_of, 1, run, arguments)[0]
        assert code == 1
        assert "Traceback" not in output
        return str(output)

    assert "holds other weights" in refusal(reference_hf=other)
    assert "--objective was dpo, is simpo" in refusal(objective="simpo")
    (scores,) = score_files(prefix)
    for path in scores.parent.iterdir():
        path.unlink()
    scores.parent.rmdir()
    assert "--beta was 0.1, is 0.2" in refusal(beta=0.2)
    assert not scores.parent.exists(), "nothing is computed for a run that is refused"
    assert "have to be computed again" in refusal(load_hf=None)


@pytest.mark.dist
def test_mistakes_are_told_before_anything_is_computed(prefix: Path, tmp_path: Path) -> None:
    def refusal(**changes: Any) -> str:
        settings = {"objective": "dpo", "train_iters": 1, "lr_warmup_iters": None, **changes}
        code, output = run_distributed(output_of, 1, run, flags(prefix, tmp_path / "run", **settings))[0]
        assert code == 1, output
        assert "Traceback" not in output
        return str(output)

    assert "--reference-hf does nothing: --objective simpo has no reference" in refusal(objective="simpo", reference_hf=MODEL)
    assert "--reference-adapter: nowhere/adapter_config.json cannot be read" in refusal(lora_rank=2, reference_adapter="nowhere")
    told = refusal(objective="epsilon_dpo", reference_cache=tmp_path)
    assert "--reference-cache does nothing: --objective epsilon_dpo keeps no log-probs" in told
    assert "both name the reference" in refusal(reference_hf=MODEL, reference_load=tmp_path)
    assert "--reference-hf /nowhere: " in refusal(reference_hf="/nowhere")
    (tmp_path / "file").write_text("")
    assert "Name another directory with --reference-cache" in refusal(reference_cache=tmp_path / "file" / "cache")
    other = other_model(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 300}))
    assert f"the reference in {other}: " in refusal(reference_hf=other)
    assert not prefix.with_name("pairs.reference").exists()


@pytest.mark.dist
def test_every_data_set_of_a_blend_has_its_own_scores(prefix: Path, tmp_path: Path) -> None:
    second = write_pairs(tmp_path / "data" / "second", swap_first=True)
    third = write_pairs(tmp_path / "data" / "third", first=7)
    arguments = flags(prefix, tmp_path / "run", objective="dpo", train_iters=1, lr_warmup_iters=None, split=None, data_path=None)
    arguments += ["--data-path", "0.3", str(prefix), "0.7", str(second), "--valid-data-path", str(third)]
    assert run_distributed(run, 1, arguments) == [0]
    assert losses(tmp_path / "run")[1] == pytest.approx(math.log(2), abs=1e-6)
    assert records(tmp_path / "run", "eval")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert [len(score_files(one)) for one in (prefix, second, third)] == [1, 1, 1]


@pytest.mark.dist
def test_a_run_scores_what_it_sees_and_a_longer_one_the_rest(tmp_path: Path) -> None:
    prefixes = [write_pairs(tmp_path / "data" / name, first=first) for name, first in (("one", 0), ("two", 9), ("three", 7))]
    train = PairCollection.combine([PairCollection([PairStore(prefix)]) for prefix in prefixes[:2]], [0.5, 0.5])
    order, batch_size = PairOrder(len(train), TrainingConfig().seed), 5

    def arguments(name: str, train_iters: int, **changes: Any) -> list[str]:
        settings = {"objective": "kto", "split": None, "data_path": None, "eval_pairs": 4, "train_iters": train_iters, **changes}
        constant = {"lr_decay_style": "constant", "lr_warmup_iters": None}
        given = flags(prefixes[0], tmp_path / name, global_batch_size=batch_size, **constant, **settings)
        return [*given, "--data-path", "1", *map(str, (prefixes[0], "1", prefixes[1])), "--valid-data-path", str(prefixes[2])]

    def expect(num_pairs: int) -> None:
        which, rows = train.rows_of(order.batch(0, num_pairs, num_pairs))
        expected = [sorted(set(rows[which == number].tolist())) for number in (0, 1)] + [[0, 1, 2, 3]]
        for one, seen in zip(prefixes, expected, strict=True):
            files = score_files(one)
            assert [path.parent.name.partition("-")[0] for path in files] == ["matched", "mismatched"]
            assert [scored_rows(path) for path in files] == [seen, seen]

    assert run_distributed(run, 1, arguments("run", 2)) == [0]
    expect(10)
    before = [np.load(path) for one in prefixes for path in score_files(one)]
    assert run_distributed(run, 1, arguments("run", 4, load=tmp_path / "run")) == [0]
    expect(20)
    for old, path in zip(before, [path for one in prefixes for path in score_files(one)], strict=True):
        assert np.load(path)[old[:, 0] != 0].tolist() == old[old[:, 0] != 0].tolist(), "what was done is done again"
    cache = tmp_path / "cache"
    score = ["--load-hf", str(MODEL), "--mismatched", "--tokens-per-microbatch", "700", "--reference-cache", str(cache)]
    assert run_distributed(score_cli.main, 1, [*score, "--pairs", *map(str, prefixes)]) == [0]
    assert run_distributed(run, 1, arguments("whole", 4, reference_cache=cache)) == [0]
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert records(tmp_path / "run", "eval")[-1]["loss"] == records(tmp_path / "whole", "eval")[-1]["loss"]


@pytest.mark.dist
def test_numbers_beside_the_pairs_reach_the_loss(tmp_path: Path) -> None:
    # While policy and reference are one, a pair's loss is its weight times log(1 + exp(its margin)).
    number = np.arange(48)
    values = {"beta": [0.1] * 48, "margin": (0.5 * (number % 5) - 1.0).tolist(), "weight": (0.5 * (number % 4)).tolist()}
    prefix = write_pairs(tmp_path / "pairs", values=values)
    objective = {"objective": "dpo", "pair_margin": True, "pair_weight": True}
    arguments = flags(prefix, tmp_path / "run", train_iters=1, lr_warmup_iters=None, **objective)
    code, output = run_distributed(output_of, 2, run, arguments)[0]
    assert code == 0, output
    assert "losses times each pair's weight" in output
    assert "note: the data have a beta beside their pairs, which is not read; --pair-beta of --objective dpo or simpo" in output
    margins, weights = (np.array(values[name][40:]) for name in ("margin", "weight"))
    losses_of_pairs = weights * np.log1p(np.exp(margins))
    first = records(tmp_path / "run", "eval")[0]
    assert first["loss"] == pytest.approx(losses_of_pairs.mean(), abs=1e-6)
    pairs = (tmp_path / "run" / "logs" / "held_out_pairs.first.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in pairs] == pytest.approx(losses_of_pairs.tolist(), abs=1e-6)


@pytest.mark.dist
def test_z_of_kto_is_that_of_the_mismatched_scores(prefix: Path, tmp_path: Path) -> None:
    # The whole data set as one batch, so that the numbers of policy and reference can be read from their files.
    settings = {"train_iters": 1, "lr_warmup_iters": None, "split": None, "global_batch_size": 48}
    other = other_model(tmp_path / "other")
    arguments = flags(prefix, tmp_path / "run", objective="kto", reference_hf=other, beta=1.0, **settings)
    assert run_distributed(run, 1, arguments) == [0]
    (reference,) = (np.load(path).astype(np.float64) for path in score_files(prefix) if "mismatched" in str(path))
    cache = tmp_path / "cache"
    score = ["--load-hf", str(MODEL), "--pairs", str(prefix), "--mismatched", "--reference-cache", str(cache)]
    assert run_distributed(score_cli.main, 1, score) == [0]
    (policy,) = (np.load(path).astype(np.float64) for path in cache.glob(f"mismatched-*/{SCORES_FILE}"))
    z = max(0.0, float((policy - reference).mean()))
    assert z > 0.1
    assert records(tmp_path / "run")[0]["kto/z"] == pytest.approx(z, rel=1e-5)
