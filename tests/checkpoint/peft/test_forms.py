"""What PEFT makes of the adapters of every linear layer of sparse models: each stands where it was trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_rmipo.checkpoint.peft.factors import stack_experts
from megatron_rmipo.checkpoint.peft.forms import form_of_plan
from megatron_rmipo.checkpoint.peft.reading import WEIGHTS_NAME, read_adapter
from megatron_rmipo.checkpoint.peft.writing import write_adapter
from megatron_rmipo.config.flags.lora import LoraConfig
from megatron_rmipo.families.hf_config import read_architecture
from megatron_rmipo.families.targets import targeted
from megatron_rmipo.families.tensors import source_shapes
from megatron_rmipo.model.lora.plan import plan_of_flags
from megatron_rmipo.model.lora.projections import projection_names
from tests.checkpoint.models import write_hf_model

RANK = 2


@pytest.mark.parametrize("kind", ["qwen3_moe", "qwen2_moe", "mixtral", "deepseek_v3", "glm4_moe", "olmoe"])
def test_peft_loads_adapters_of_dense_and_shared_and_all_experts(tmp_path: Path, kind: str) -> None:
    peft = pytest.importorskip("peft")
    hf = write_hf_model(tmp_path / "hf", kind)
    arch, lora = read_architecture(hf), LoraConfig(lora_rank=RANK)
    plan, generator = plan_of_flags(arch, lora), torch.Generator().manual_seed(1)
    factors: dict[str, dict[str, Tensor]] = {}
    for rule, place, _ in targeted(arch, lora):
        shapes = source_shapes(rule, arch)
        for name, sources in projection_names(rule, place):
            num_rows, num_experts = sum(shapes[source][0] for source in sources), 1
            if rule.per_expert and arch.experts is not None:
                num_experts = arch.experts.num_experts
            pairs = [
                (torch.randn(RANK, shapes[0][1], generator=generator), torch.randn(num_rows, RANK, generator=generator))
                for _ in range(num_experts)
            ]
            a, b = stack_experts(pairs)
            factors[name] = {"lora_A": a, "lora_B": b}
    write_adapter(tmp_path / "adapter", form_of_plan(plan, arch, str(hf)), factors, {})
    assert read_adapter(tmp_path / "adapter").factors.keys() == factors.keys()
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32), tmp_path / "adapter")
    found, written = peft.get_peft_model_state_dict(model), load_file(tmp_path / "adapter" / WEIGHTS_NAME)
    assert found.keys() == written.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in written.items())
