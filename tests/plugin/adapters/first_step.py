"""What the first step of a ``finetune`` gave, as the dense answer has it; the same for the package and for its stand-in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_rmipo.data.store.manifest import Manifest, TokenizerInfo
from megatron_rmipo.data.store.pair_store import PairStore, PairStoreWriter
from megatron_rmipo.data.store.reference_scores import ScoreKey, ScoreWriter, data_fingerprint, score_directory
from megatron_rmipo.families.hf_config import read_architecture
from megatron_rmipo.model.packed_model import unwrapped
from megatron_rmipo.objectives.registry import build_objective
from megatron_rmipo.passes.rows import from_last_stage
from tests.integration.problem import BOS, VOCAB, DenseProblem, make_hf_model, make_pairs
from tests.integration.worlds import gather_gradients

OBJECTIVES = ("rmipo", "simpo", "dpo", "kto")
# Megatron-Bridge takes a vocabulary as it is: TP 2 must divide it.
EVEN_VOCAB = VOCAB + 1
TOKENIZER = TokenizerInfo(fingerprint="random ids", vocab_size=VOCAB, bos_token_id=BOS, eos_token_id=2)


def write_problem(folder: Path) -> dict[str, Any]:
    """Model, reference, prepared pairs and the log-probs of the reference under ``folder``; the dense answer by objective."""
    model = make_hf_model(folder / "model", vocab_size=EVEN_VOCAB)
    pairs = make_pairs()
    problem = DenseProblem(model, make_hf_model(folder / "reference", seed=1, vocab_size=EVEN_VOCAB), pairs)
    with PairStoreWriter(folder / "pairs", vocab_size=EVEN_VOCAB) as writer:
        for pair in pairs:
            writer.add(pair)
        writer.finalize(Manifest(tokenizer=TOKENIZER))
    with torch.no_grad():
        write_scores(folder / "pairs", "matched", problem._table(problem.reference, pairs))
        write_scores(folder / "pairs", "mismatched", problem._table(problem.reference, problem._mismatched()))
    return {name: problem.answer(build_objective(name, {})) for name in OBJECTIVES}


def write_scores(prefix: Path, kind: Any, scores: torch.Tensor, reference: str = "reference") -> Path:
    """As ``tools/score_pairs.py`` leaves them beside the data; their directory."""
    key = ScoreKey(data_fingerprint(str(prefix)), TOKENIZER.fingerprint, reference, "float32", kind)
    directory = score_directory(str(prefix), None, key)
    with ScoreWriter(directory, key, len(PairStore(str(prefix)))) as writer:
        writer.write(np.arange(len(scores)), scores.numpy().astype(np.float32))
    return directory


class FirstStep:
    """A callback behind :class:`PreferenceFinetune`, which has the gradients of the step before they are set to zero.

    Args:
        finetune: the adapter's.
        hf_dir: the model.

    Attributes:
        result: as :func:`tests.integration.test_invariance.check` wants it; None except on the rank that has all gradients.
    """

    def __init__(self, finetune: Any, hf_dir: Path) -> None:
        self._finetune, self._hf_dir = finetune, hf_dir
        self.result: dict[str, Any] | None = None

    def on_train_step_end(self, context: Any) -> None:
        step = self._finetune.step
        order = step._current.pair_indices.argsort()
        metrics = step.after_step()
        (model,) = context.model
        gradients = gather_gradients(unwrapped(model), read_architecture(self._hf_dir), self._hf_dir, step.groups)
        # The last stage has it.
        loss = from_last_stage(torch.as_tensor(context.loss_dict.get("loss", 0.0)).reshape(1).float(), step.groups).item()
        if gradients is None:
            return
        assert loss == pytest.approx(metrics.values["loss"].double().mean().item(), rel=1e-6)
        norm = torch.stack([gradient.double().norm() for gradient in gradients.values()]).norm().item()
        if context.grad_norm is not None:
            assert context.grad_norm == pytest.approx(norm, rel=1e-5)
        in_order = {name: values[order] for name, values in metrics.values.items()}
        self.result = {"loss": loss, "metrics": in_order, "gradients": gradients, "norm": norm}
