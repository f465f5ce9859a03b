"""What one rank does in tests of Megatron-LM's loop: ``pretrain`` as the example calls it, watched, several times over."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch.distributed as dist
from torch import Tensor

from megatron_rmipo.families.hf_config import read_architecture
from megatron_rmipo.passes.rows import from_last_stage
from megatron_rmipo.plugin.adapters import megatron_lm
from megatron_rmipo.runtime.groups import ProcessGroups
from megatron_rmipo.runtime.megatron_training import install_cpu_training
from tests.integration.worlds import gather_gradients

# Of the machine and not of the model.
WITHOUT_CUDA = [
    *("--transformer-impl", "local", "--distributed-backend", "gloo", "--use-cpu-initialization", "--no-rope-fusion"),
    *("--no-masked-softmax-fusion", "--no-gradient-accumulation-fusion", "--no-persist-layer-norm"),
    *("--no-bias-dropout-fusion", "--no-bias-swiglu-fusion", "--num-workers", "0", "--no-check-for-nan-in-loss-and-grad"),
]


def model_arguments(hf_dir: Path) -> list[str]:
    """Megatron-LM's flags of a Hugging Face Llama, as a user writes them down."""
    config = json.loads((hf_dir / "config.json").read_text())
    rope = config.get("rope_parameters") or config
    return [
        *("--num-layers", str(config["num_hidden_layers"]), "--hidden-size", str(config["hidden_size"])),
        *("--ffn-hidden-size", str(config["intermediate_size"]), "--num-attention-heads", str(config["num_attention_heads"])),
        *("--group-query-attention", "--num-query-groups", str(config["num_key_value_heads"]), "--swiglu"),
        *("--normalization", "RMSNorm", "--norm-epsilon", str(config["rms_norm_eps"]), "--disable-bias-linear"),
        *("--position-embedding-type", "rope", "--rotary-base", str(int(rope["rope_theta"]))),
        *("--untie-embeddings-and-output-weights", "--vocab-size", str(config["vocab_size"])),
        *("--max-position-embeddings", "256", "--seq-length", "256", "--make-vocab-size-divisible-by", "8"),
        *WITHOUT_CUDA,
    ]


@dataclasses.dataclass
class Watched:
    """What a run of ``pretrain`` did.

    Attributes:
        losses: the global batch's loss of each step, on every rank.
        norms: of the gradient of each step.
        evaluations: each evaluation's losses by name, on every rank.
        preference: what the script made; its model is as the run left it.
    """

    losses: list[float]
    norms: list[float]
    evaluations: list[dict[str, float]]
    preference: megatron_lm.PreferenceTraining


@contextmanager
def pretraining(arguments: Sequence[str]) -> Iterator[Watched]:
    """A run with a command line, over when the block begins; Megatron's globals are gone when it ends."""
    install_cpu_training()
    loop: Any = importlib.import_module("megatron.training.training")
    found = Watched([], [], [], None)  # type: ignore[arg-type]
    with contextmanager(_restored)(loop), mock.patch.object(sys, "argv", ["pretrain.py", *map(str, arguments)]):
        _watch(loop, found)
        found.preference = _pretrain()
        groups = ProcessGroups.of_megatron()
        found.losses, found.evaluations = from_last_stage((found.losses, found.evaluations), groups)
        yield found
        dist.barrier()
        loop.destroy_global_state()


def _restored(loop: Any) -> Iterator[None]:
    names = ("train_step", "get_forward_backward_func", "evaluate")
    before = {name: getattr(loop, name) for name in names}
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(loop, name, function)


def _watch(loop: Any, found: Watched) -> None:
    train_step, evaluate = loop.train_step, loop.evaluate

    def watched_step(*args: Any, **kwargs: Any) -> Any:
        result = train_step(*args, **kwargs)
        found.losses += [float(result[0]["loss"])] if result[0] else []
        found.norms.append(float(result[5]))
        return result

    def watched_evaluation(*args: Any, **kwargs: Any) -> Any:
        result = evaluate(*args, **kwargs)
        found.evaluations.append({name: float(value) for name, value in result[0].items()})
        return result

    loop.train_step, loop.evaluate = watched_step, watched_evaluation


def _pretrain() -> megatron_lm.PreferenceTraining:
    """The main of examples/plugins/megatron_lm_pretrain.py."""
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    args = parse_and_validate_args(extra_args_provider=megatron_lm.add_arguments)
    preference = megatron_lm.PreferenceTraining(args)
    model_config = gpt_config_from_args(args)
    model_config.post_wrap_hooks.append(preference.attach)
    container = pretrain_cfg_container_from_args(args, model_config)
    pretrain(container, preference.datasets, ModelType.encoder_or_decoder, preference.forward_step)
    return preference


class Trained(NamedTuple):
    """What a run left: as of :class:`Watched`, and fp32 ``[T, V]`` logits of a text by an ordinary call of its model."""

    losses: list[float]
    norms: list[float]
    evaluations: list[dict[str, float]]
    logits: Tensor | None


def run_pretraining(commands: Sequence[Sequence[str]], token_ids: Tensor | None = None) -> list[Trained]:
    """Several runs, one after the other; at one rank with logits of a text, int64 ``[T]``."""
    results = []
    for arguments in commands:
        with pretraining(arguments) as found:
            logits = None
            if token_ids is not None:
                from tests.checkpoint.megatron_lm import logits_of

                logits = logits_of(found.preference._model, token_ids)
            results.append(Trained(found.losses, found.norms, found.evaluations, logits))
    return results


def first_gradients(commands: Sequence[Sequence[str]], hf_dir: str) -> list[dict[str, Any] | None]:
    """Loss, metrics and gradients of runs of one step, by Hugging Face name; None except on the rank that has them all."""
    results: list[dict[str, Any] | None] = []
    for arguments in commands:
        with pretraining(arguments) as found:
            groups, step = ProcessGroups.of_megatron(), found.preference._step
            assert step is not None
            assert step._current is not None
            in_order = step._current.pair_indices.argsort()
            metrics = {name: values[in_order] for name, values in step.after_step().values.items()}
            assert found.preference._model is not None
            gradients = gather_gradients(found.preference._model, read_architecture(Path(hf_dir)), Path(hf_dir), groups)
            (loss,), (norm,) = found.losses, found.norms
            if gradients is None:
                results.append(None)
                continue
            results.append({"loss": loss, "metrics": metrics, "gradients": gradients, "norm": norm})
    return results


def train_with_trainer(arguments: Sequence[str], log_dir: str) -> tuple[list[float], list[float], float]:
    """(losses, gradient norms, held-out loss at the end) of our own trainer."""
    from megatron_rmipo.training.main import main

    assert main([*arguments, "--log-dir", log_dir]) == 0
    records = [json.loads(line) for line in (Path(log_dir) / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["kind"] == "train"]
    held_out = [record for record in records if record["kind"] == "eval"][-1]
    return [step["loss"] for step in steps], [step["grad_norm"] for step in steps], held_out["loss"]
