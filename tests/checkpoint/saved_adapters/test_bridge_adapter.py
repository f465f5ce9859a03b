"""Adapter checkpoints of Megatron-Bridge to PEFT: what PEFT makes of them on the base model; its own export where it is there."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from megatron_rmipo.checkpoint.convert import convert_megatron_to_hf
from megatron_rmipo.checkpoint.megatron.torch_dist import Entry, Piece, write_torch_dist
from megatron_rmipo.errors import CheckpointError, ConversionError
from megatron_rmipo.families.hf_config import read_architecture
from tests.integration.problem import make_hf_model
from tests.plugin.bridge_adapters import ALPHA, DIM, KINDS, factor, write_adapted

EXPERTS, PER_TOKEN, EXPERT_FFN = 4, 2, 20
SPARSE: dict[str, Any] = {"num_experts": EXPERTS, "num_experts_per_tok": PER_TOKEN, "moe_intermediate_size": EXPERT_FFN}
CLASSES = {"LoRA": "lora.LoRA", "CanonicalLoRA": "canonical_lora.CanonicalLoRA", "DoRA": "dora.DoRA"}


def dense_tensors(hf_dir: Path, kind: str) -> dict[str, Tensor]:
    """By key the adapters of :func:`tests.plugin.bridge_adapters.write_adapted`, as a checkpoint of one rank has them."""
    arch, found = read_architecture(hf_dir), {}
    hidden, ffn, queries, keys = arch.hidden_size, arch.ffn_hidden_size, arch.query_size, arch.key_size
    sizes = {
        "self_attention.linear_qkv": ({"q": queries, "k": keys, "v": keys}, hidden),
        "self_attention.linear_proj": ({"": hidden}, arch.context_size),
        "mlp.linear_fc1": ({"gate": ffn, "up": ffn}, hidden),
        "mlp.linear_fc2": ({"": hidden}, ffn),
    }
    for module, (parts, columns) in sizes.items():
        split = parts if kind == "CanonicalLoRA" and len(parts) > 1 else {"": sum(parts.values())}
        for part, rows in split.items():
            base = f"decoder.layers.{module}.adapter." + (f"adapter_{part}." if part else "")
            shapes: dict[str, tuple[int, ...]] = {"linear_in.weight": (DIM, columns), "linear_out.weight": (rows, DIM)}
            if kind == "DoRA":
                shapes["weight_magnitude"] = (rows,)
            for name, shape in shapes.items():
                layers = [factor(f"{layer}.{module}.{part or None}.{name}", *shape) for layer in range(arch.num_layers)]
                found[base + name] = torch.stack(layers) + (1 if name == "weight_magnitude" else 0)
    return found


def as_two_ranks_save(b: Tensor) -> Tensor:
    """``[L, R, r]``: the rows of an ``adapter_gate`` or ``adapter_up`` as two ranks' checkpoint has them."""
    first, second = (half.chunk(2, dim=1) for half in b.chunk(2, dim=1))
    return torch.cat([first[0], second[0], first[1], second[1]], dim=1)


def write_checkpoint(directory: Path, tensors: dict[str, Tensor], kind: str, tp: int = 1, **further: Any) -> Path:
    """A directory of one checkpoint with such adapters."""
    path = directory / "iter_0000003"
    path.mkdir(parents=True)
    fill = lambda source, target: target.copy_(source)  # noqa: E731
    entries = [
        Entry(key, tuple(one.shape), one.dtype, (Piece((0,) * one.dim(), tuple(one.shape), functools.partial(fill, one)),))
        for key, one in tensors.items()
    ]
    write_torch_dist(path, entries, [], {"iteration": 3})
    peft = {"_target_": f"megatron.bridge.peft.{CLASSES[kind]}", "dim": DIM, "alpha": int(ALPHA), **further}
    model = {"tensor_model_parallel_size": tp, "expert_tensor_parallel_size": None}
    (path / "run_config.yaml").write_text(yaml.safe_dump({"peft": peft, "model": model}))
    (directory / "latest_checkpointed_iteration.txt").write_text("3")
    return directory


def merged_by_peft(hf_dir: Path, adapter: Path) -> dict[str, Tensor]:
    """The base model's weights after PEFT merged the adapter into them, in float64."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float64)
    merged: Any = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    return dict(merged.state_dict())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf_model(tmp_path_factory.mktemp("base") / "model", layers=2)


@pytest.mark.parametrize(("kind", "tp"), [*((kind, 1) for kind in KINDS), ("LoRA", 2), ("CanonicalLoRA", 2)])
def test_peft_makes_the_same_model_of_it(kind: str, tp: int, base: Path, tmp_path: Path) -> None:
    expected = load_file(write_adapted(base, tmp_path / "adapted", kind) / "model.safetensors")
    tensors = dense_tensors(base, kind)
    if tp == 2:
        split = {key for key in tensors if "adapter_gate.linear_out" in key or "adapter_up.linear_out" in key}
        assert bool(split) == (kind == "CanonicalLoRA")
        tensors |= {key: as_two_ranks_save(tensors[key]) for key in split}
    written = write_checkpoint(tmp_path / "run", tensors, kind, tp)
    assert convert_megatron_to_hf(written, tmp_path / "peft", assets_dir=base).name == "iter_0000003"
    found, original = merged_by_peft(base, tmp_path / "peft"), load_file(base / "model.safetensors")
    changed = {name for name, one in expected.items() if not torch.equal(one, original[name])}
    assert len(changed) == 2 * 7
    for name, one in expected.items():
        torch.testing.assert_close(found[name].float(), one, rtol=1e-5, atol=1e-6, msg=name)


def sparse_tensors(num_layers: int, hidden: int, kind: str) -> dict[str, Tensor]:
    """Adapters of experts: of gate and up together, or of each."""
    found, base = {}, "decoder.layers.mlp.experts.experts"
    parts = {"adapter_gate.": EXPERT_FFN, "adapter_up.": EXPERT_FFN} if kind == "CanonicalLoRA" else {"": 2 * EXPERT_FFN}
    for part, rows in parts.items():
        found[f"{base}.linear_fc1.adapter.{part}linear_in.weight"] = (num_layers, EXPERTS, DIM, hidden)
        found[f"{base}.linear_fc1.adapter.{part}linear_out.weight"] = (num_layers, EXPERTS, rows, DIM)
    found[f"{base}.linear_fc2.adapter.linear_in.weight"] = (num_layers, EXPERTS, DIM, EXPERT_FFN)
    found[f"{base}.linear_fc2.adapter.linear_out.weight"] = (num_layers, EXPERTS, hidden, DIM)
    return {key: factor(key, *shape) for key, shape in found.items()}


@pytest.mark.parametrize("form", ["LoRA", "CanonicalLoRA", "one side shared"])
def test_adapters_of_experts_become_those_of_their_parameters(form: str, tmp_path: Path) -> None:
    base = make_hf_model(tmp_path / "model", model_type="qwen3_moe", layers=2, head_dim=12, norm_topk_prob=True, **SPARSE)
    arch = read_architecture(base)
    kind = "LoRA" if form == "one side shared" else form
    tensors = sparse_tensors(arch.num_layers, arch.hidden_size, kind)
    key = "decoder.layers.mlp.experts.experts.linear_fc1.adapter."
    if form == "one side shared":
        tensors[key + "linear_in.weight"] = tensors[key + "linear_in.weight"][:, 0].clone()
    convert_megatron_to_hf(write_checkpoint(tmp_path / "run", tensors, kind), tmp_path / "peft", assets_dir=base)
    found = merged_by_peft(base, tmp_path / "peft")
    original, scale = weights_of(base), ALPHA / DIM
    wide = {name: one.double() for name, one in tensors.items()}
    for layer in range(arch.num_layers):
        for expert in range(EXPERTS):
            get = lambda name, at=(layer, expert): wide[name][at if wide[name].dim() == 4 else at[0]]  # noqa: E731
            parts = ("adapter_gate.", "adapter_up.") if kind == "CanonicalLoRA" else ("",)
            gate_up = torch.cat([get(f"{key}{p}linear_out.weight") @ get(f"{key}{p}linear_in.weight") for p in parts])
            fc2 = key.replace("fc1", "fc2")
            down = get(f"{fc2}linear_out.weight") @ get(f"{fc2}linear_in.weight")
            for name, delta in (("gate_up_proj", gate_up), ("down_proj", down)):
                full = f"model.layers.{layer}.mlp.experts.{name}"
                expected = original[full][expert] + scale * delta
                torch.testing.assert_close(found[full][expert], expected, rtol=1e-6, atol=1e-6, msg=f"{full} {expert}")


def weights_of(hf_dir: Path) -> dict[str, Tensor]:
    """The base model's own weights, as transformers computes with them, in float64."""
    from transformers import AutoModelForCausalLM

    return dict(AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float64).state_dict())


def test_what_cannot_be_converted_is_refused(base: Path, tmp_path: Path) -> None:
    good = dense_tensors(base, "LoRA")
    convert = lambda run, **how: convert_megatron_to_hf(run, tmp_path / "out", assets_dir=base, **how)  # noqa: E731
    for name, tensors, kind, tp, message in (
        (
            "router",
            good | {"decoder.layers.mlp.router.adapter.linear_in.weight": torch.ones(2, 4, 48)},
            "LoRA",
            1,
            r"router\.adapter",
        ),
        (
            "half",
            {key: one for key, one in good.items() if "qkv.adapter.linear_in" not in key},
            "LoRA",
            1,
            "linear_in.weight is missing",
        ),
        (
            "rank",
            good | {key: one[:, :3] for key, one in good.items() if "proj.adapter.linear_in" in key},
            "LoRA",
            1,
            r"\[3, 48\] and",
        ),
        ("lengths", dense_tensors(base, "DoRA"), "DoRA", 2, "a DoRA that was trained at tensor-parallel size 2"),
    ):
        with pytest.raises(ConversionError, match=message):
            convert(write_checkpoint(tmp_path / name, tensors, kind, tp))
    run = write_checkpoint(tmp_path / "good", good, "LoRA")
    for how, flag in (({"dtype": "float16"}, "--dtype"), ({"max_shard_bytes": 1e6}, "--max-shard-size")):
        with pytest.raises(ConversionError, match=f"holds an adapter, .*: {flag} does nothing"):
            convert(run, **how)
    other = json.loads((base / "config.json").read_text()) | {"num_hidden_layers": 3}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps(other))
    with pytest.raises(ConversionError, match="or of another model than config"):
        convert_megatron_to_hf(run, tmp_path / "out", assets_dir=tmp_path / "other")
    biased = make_hf_model(tmp_path / "qwen2", model_type="qwen2", layers=2)
    with pytest.raises(ConversionError, match=r"linear_qkv\.bias, too, as no Hugging Face adapter does"):
        convert_megatron_to_hf(
            write_checkpoint(tmp_path / "bias", dense_tensors(biased, "DoRA"), "DoRA"), tmp_path / "out", assets_dir=biased
        )
    (run / "iter_0000003" / "run_config.yaml").unlink()
    with pytest.raises(CheckpointError, match=r"run_config\.yaml cannot be read for the adapter's alpha"):
        convert(run)
    assert not (tmp_path / "out").exists()
