"""TRL's step, where TRL is installed: its losses against SimPO written out, its gradients against the padded baseline."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from benchmarks.padded_baseline import PaddedBaseline
from benchmarks.trl_baseline import TrlBaseline
from tests.benchmarks.test_padded_baseline import alone, make_pairs, random_model


def test_losses_and_gradient_norms_of_two_steps(tmp_path: Path) -> None:
    pytest.importorskip("trl.experimental.cpo")
    model, pairs = random_model(), make_pairs() * 2
    expected = []
    for prompt, chosen, rejected in pairs:
        means = [alone(model, prompt, response) / len(response) for response in (chosen, rejected)]
        expected.append(-torch.nn.functional.logsigmoid(torch.tensor(2.0 * (means[0] - means[1]) - 0.5)))
    padded = PaddedBaseline(copy_of(model), objective="simpo", bos_token_id=1, pairs_per_microbatch=3)
    trl = TrlBaseline(copy_of(model), pairs, pairs_per_microbatch=2, output_dir=tmp_path)
    first = trl.step()
    torch.testing.assert_close(first.losses, torch.stack(expected).float(), rtol=1e-5, atol=1e-5)
    for theirs, ours in ((first, padded.step(pairs)), (trl.step(), padded.step(pairs))):
        torch.testing.assert_close(theirs.losses, ours.losses, rtol=1e-4, atol=1e-4)
        assert theirs.grad_norm == pytest.approx(ours.grad_norm, rel=1e-4)
    # The second step saw other weights.
    assert not torch.allclose(first.losses, ours.losses, rtol=1e-3)


def copy_of(model: Any) -> Any:
    copy = transformers.LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    return copy


def test_without_trl_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.setitem(sys.modules, "trl.experimental.cpo", None)
    with pytest.raises(SystemExit, match=r"pip install 'megatron-rmipo\[bench\]'"):
        TrlBaseline(random_model(), make_pairs(), pairs_per_microbatch=3, output_dir=tmp_path)


def test_microbatches_must_be_full(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="3 pairs do not fill micro-batches of 2"):
        TrlBaseline(random_model(), make_pairs(), pairs_per_microbatch=2, output_dir=tmp_path)
