"""Adapters in checkpoints of runs here become those that the runs write themselves, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_rmipo.checkpoint.adapter_source import AdapterSource, save_adapter
from megatron_rmipo.checkpoint.convert import convert_megatron_to_hf
from megatron_rmipo.checkpoint.megatron.store import save_checkpoint
from megatron_rmipo.checkpoint.peft.reading import CONFIG_NAME, WEIGHTS_NAME
from megatron_rmipo.errors import ConversionError
from megatron_rmipo.model.lora.plan import plan_of_flags
from megatron_rmipo.model.named_tensors import ADAPTER
from megatron_rmipo.runtime.groups import initialize_runtime
from tests.harness import run_distributed
from tests.integration.adapters.test_checkpoints import prepare
from tests.integration.adapters.worlds import adapted_config, build_adapted, fill
from tests.integration.worlds import Case, end_case

CASES = [
    Case("TP 2 SP", model="llama", tp=2, sequence_parallel=True),
    Case("PP 2", model="dora", pp=2),
    Case("TP 2", model="whole modules", tp=2),
    Case("EP 2", model="experts", ep=2),
    Case("EP 2 of one", model="shared", ep=2),
]


def save_both(folder: str) -> None:
    """Of each form a checkpoint and what ``--save-adapter`` writes."""
    where = Path(folder)
    for case in CASES:
        groups = initialize_runtime(**case.layout())
        state = build_adapted(case, where, groups)
        fill(state, case, where, torch.load(where / case.model / "factors.pt", weights_only=False), groups)
        arch, base = state.policy.architecture, where / case.model / "model"
        plan = plan_of_flags(arch, adapted_config(case).lora)
        save_checkpoint(
            where / case.model / "run",
            1,
            model=state.model,
            optimizer=None,
            scheduler=None,
            groups=groups,
            train_state={},
            config={},
            assets_dir=base,
            adapter={"plan": plan.as_record(), "base": str(base), "base_iteration": None, "base_fingerprint": ""},
        )
        save_adapter(
            state.policy, AdapterSource({ADAPTER: plan}), arch, base, where / case.model / "by itself", groups, lambda: None
        )
        end_case()


@pytest.mark.dist
def test_a_checkpoint_gives_the_adapter_that_the_run_would_write(tmp_path: Path) -> None:
    for case in CASES:
        prepare(tmp_path, case.model)
    run_distributed(save_both, 2, str(tmp_path))
    for case in CASES:
        where = tmp_path / case.model
        assert convert_megatron_to_hf(where / "run", where / "converted").name == "iter_0000001"
        expected, found = (load_file(where / name / WEIGHTS_NAME) for name in ("by itself", "converted"))
        assert found.keys() == expected.keys(), case.name
        assert [name for name in found if not torch.equal(found[name], expected[name])] == [], case.name
        assert (where / "converted" / CONFIG_NAME).read_text() == (where / "by itself" / CONFIG_NAME).read_text()
    with pytest.raises(ConversionError, match="--dtype does nothing"):
        convert_megatron_to_hf(tmp_path / "llama" / "run", tmp_path / "other", dtype="bfloat16")
    with pytest.raises(ConversionError, match=r"--save-hf .* is not empty|--save-hf .* holds"):
        convert_megatron_to_hf(tmp_path / "llama" / "run", tmp_path / "llama" / "converted")
    with pytest.raises(ConversionError, match=r"does not hold the adapter .* --hf-assets"):
        convert_megatron_to_hf(tmp_path / "llama" / "run", tmp_path / "other", assets_dir=tmp_path / "experts" / "model")
