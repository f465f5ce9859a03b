"""An adapter on a GPTModel that others built: what it computes and learns, and that their own checkpoints hold it whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_rmipo.checkpoint.hf.weights import load_hf_weights
from megatron_rmipo.config.flags.lora import LoraConfig
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.families.hf_config import read_architecture
from megatron_rmipo.model.adopt import attach_model, detach_model
from megatron_rmipo.model.lora.foreign import add_adapter
from megatron_rmipo.model.lora.held import HeldFactor, held_factors
from megatron_rmipo.plugin import adapters_off
from megatron_rmipo.runtime.groups import ProcessGroups, initialize_runtime, shutdown_runtime
from tests.checkpoint.models import write_hf_model
from tests.harness import run_distributed
from tests.plugin.foreign import build_llama

LORA = LoraConfig(lora_rank=3, lora_alpha=5.0, lora_target_modules=["q_proj", "v_proj", "linear_proj", "linear_fc1", "down_proj"])
SMALL = {"num_hidden_layers": 2, "tie_word_embeddings": False}
IDS = [5, 9, 31, 7, 7, 12, 40, 3]


def whole_of(held: HeldFactor) -> Tensor:
    """Values of a factor by its name alone."""
    generator = torch.Generator().manual_seed(sum(map(ord, held.projection.name + held.kind)))
    return 0.2 * torch.randn(held.shape, generator=generator, dtype=torch.float64)


def built(hf: Path, groups: ProcessGroups) -> Any:
    arch = read_architecture(hf)
    model = build_llama(arch, groups, sequence_parallel=groups.tp_size > 1)
    load_hf_weights(model, hf, arch, groups=groups)
    return model.double()


def fill(model: Any) -> None:
    for held in held_factors(model):
        for (offsets, sizes), stretch in held.stretches:
            box = tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))
            stretch.copy_(whole_of(held)[box])


def logps(model: Any) -> Tensor:
    ids = torch.tensor(IDS)
    count = len(IDS)
    segments = torch.tensor([[0, count, 0, 0]])
    source = torch.arange(count - 1)
    found: Tensor = model(token_ids=ids, position_ids=torch.arange(count), segments=segments, source=source, target=ids[1:])
    return found


def learn(hf: str, tp_size: int, save: str) -> dict[str, Any]:
    """Log-probs with the adapter and without, gradients by name and boxes, and a checkpoint of the whole model."""
    groups = initialize_runtime(tensor_model_parallel_size=tp_size, seed=1)
    model = built(Path(hf), groups)
    before = model.state_dict().keys()
    add_adapter(model, hf, LORA)
    attach_model(model, vocab_size=read_architecture(Path(hf)).vocab_size)
    fill(model)
    found = logps(model)
    found.sum().backward()
    gradients = []
    for held in held_factors(model):
        gradient = held.parameter.grad
        assert gradient is not None
        if getattr(held.parameter, "sequence_parallel", False):
            dist.all_reduce(gradient, group=groups.tp)
        first = 0
        for offsets, sizes in held.boxes:
            gradients.append((held.projection.name, held.kind, held.shape, offsets, gradient[first : first + sizes[0]].clone()))
            first += sizes[0]
    with torch.no_grad(), adapters_off(model):
        off = logps(model)
    state = model.sharded_state_dict()
    Path(save).mkdir(exist_ok=True)
    dist.barrier()
    dist_checkpointing.save(state, save)
    detach_model(model)
    extra = sorted(name for name in model.state_dict().keys() - before if "adapter" not in name)
    shutdown_runtime()
    return {"on": found.detach(), "off": off, "gradients": gradients, "extra": extra}


def put_together(ranks: list[dict[str, Any]]) -> dict[tuple[str, str], Tensor]:
    whole: dict[tuple[str, str], Tensor] = {}
    for rank in ranks:
        for name, kind, shape, offsets, piece in rank["gradients"]:
            own = whole.setdefault((name, kind), torch.full(shape, torch.nan, dtype=torch.float64))
            own[tuple(slice(start, start + size) for start, size in zip(offsets, piece.shape, strict=True))] = piece
    return whole


def dense(hf: Path) -> tuple[Tensor, Tensor, dict[tuple[str, str], Tensor]]:
    """The same of PEFT's model in float64."""
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float64).eval()
    ids = torch.tensor([IDS])

    def scores(one: Any) -> Tensor:
        return torch.log_softmax(one(ids).logits[0, :-1], -1).gather(1, ids[0, 1:, None])[:, 0]

    off = scores(model).detach()
    names = ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted: Any = get_peft_model(model, PeftConfig(r=3, lora_alpha=5, target_modules=names)).double()
    factors = {}
    for name, parameter in adapted.named_parameters():
        if ".lora_" in name:
            module, _, rest = name.removeprefix("base_model.model.").partition(".lora_")
            generator = torch.Generator().manual_seed(sum(map(ord, module + rest[0])))
            with torch.no_grad():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
            factors[module, rest[0]] = parameter
    on = scores(adapted)
    on.sum().backward()
    return on.detach(), off, {key: parameter.grad for key, parameter in factors.items()}


def load(hf: str, saved: str) -> dict[str, Tensor]:
    """What a checkpoint holds of the adapter, loaded by one rank."""
    groups = initialize_runtime(seed=1)
    model = built(Path(hf), groups)
    add_adapter(model, hf, LORA, seed=77)
    loaded = dist_checkpointing.load(model.sharded_state_dict(), saved)
    model.load_state_dict(loaded, strict=False)
    found = {held.full_name: held.parameter.detach() - whole_of(held) for held in held_factors(model)}
    shutdown_runtime()
    return found


@pytest.mark.dist
def test_adapters_of_models_that_others_built_are_pefts_at_any_layout(tmp_path: Path) -> None:
    hf = write_hf_model(tmp_path / "hf", "llama2", **SMALL)
    on, off, gradients = dense(hf)
    for tp_size in (1, 2):
        saved = tmp_path / f"checkpoint{tp_size}"
        ranks = run_distributed(learn, tp_size, str(hf), tp_size, str(saved))
        found = put_together(ranks)
        assert found.keys() == gradients.keys()
        for rank in ranks:
            # Log-probs are fp32.
            torch.testing.assert_close(rank["on"].double(), on, rtol=0, atol=2e-6)
            torch.testing.assert_close(rank["off"].double(), off, rtol=0, atol=2e-6)
            assert not rank["extra"]
        for key, gradient in gradients.items():
            torch.testing.assert_close(found[key], gradient, rtol=2e-5, atol=2e-6)
        (differences,) = run_distributed(load, 1, str(hf), str(saved))
        assert all(not difference.any() for difference in differences.values())


@pytest.mark.dist
def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    hf = write_hf_model(tmp_path / "hf", "llama2", **SMALL)
    other = write_hf_model(tmp_path / "other", "llama2", **SMALL, intermediate_size=48)
    run_distributed(misfits, 1, str(hf), str(other))


def misfits(hf: str, other: str) -> None:
    groups = initialize_runtime(seed=1)
    model = built(Path(hf), groups)
    with pytest.raises(ConfigError, match=r"linear_fc1.weight is .* on this rank, and should be"):
        add_adapter(model, other, LORA)
    with pytest.raises(ConfigError, match="load_adapter is the trainer's"):
        add_adapter(model, hf, LoraConfig(load_adapter="somewhere"))
    assert all(parameter.requires_grad for parameter in model.parameters())
    add_adapter(model, hf, LORA)
    with pytest.raises(ConfigError, match="has adapters already"):
        add_adapter(model, hf, LORA)
    shutdown_runtime()
