"""Models through Megatron-Bridge, of which a small stand-in has the interface: the package itself needs CUDA."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_rmipo.checkpoint.bridge import build_bridged_policy
from megatron_rmipo.config.schema import Config
from megatron_rmipo.errors import ConfigError, ConversionError
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.model.policy import Policy
from megatron_rmipo.objectives.registry import build_objective
from megatron_rmipo.runtime.groups import ProcessGroups, initialize_runtime, shutdown_runtime
from tests.checkpoint.stand_in_bridge import install_stand_in
from tests.harness import run_distributed
from tests.integration import worlds
from tests.integration.data import MODEL
from tests.integration.problem import VOCAB, DenseProblem, collection, make_hf_model, make_pairs
from tests.integration.worlds import Case
from tests.plugin.adapters.bridge_on_cpu import WITHOUT_KERNELS, bridge_is_installed, import_bridge


def score_and_export(cases: list[Case], folder: str, pairs: Any) -> list[Any]:
    """Each case with the policy built through the bridge: by the passes, the optimizer's wrapping and the export."""
    install_stand_in()

    def build(arch: ModelArchitecture, config: Config, groups: ProcessGroups) -> Policy:
        parallel = config.parallel
        hf_dir = Path(folder) / "llama" / "model"
        bridged = build_bridged_policy(hf_dir, groups, max_length=256, sequence_parallel=parallel.sequence_parallel, chunk_size=7)
        bridged.export(Path(folder) / f"exported-{parallel.tensor_model_parallel_size}")
        with pytest.raises(ConversionError, match=r"exists and holds config\.json"):
            bridged.export(Path(folder) / f"exported-{parallel.tensor_model_parallel_size}")
        # The tests' own tools ask for it.
        bridged.policy.architecture = arch
        return Policy([bridged.policy])

    worlds.build_model = build
    worlds.load_hf_weights = lambda *args, **kwargs: None
    return worlds.run_cases(cases, folder, pairs)


@pytest.mark.dist
def test_a_bridged_model_scores_trains_and_exports(tmp_path: Path) -> None:
    hf_dir = make_hf_model(tmp_path / "llama" / "model", vocab_size=VOCAB + 1)
    pairs = make_pairs(9)
    problem = DenseProblem(hf_dir, hf_dir, pairs)
    cases = [
        Case("TP 2, sequence parallel", tp=2, sequence_parallel=True, objective="simpo", tokens_per_microbatch=120),
        Case("PP 2", pp=2, objective="simpo", tokens_per_microbatch=120),
    ]
    loss, gradients, _ = problem.answer(build_objective("simpo", {}))
    for result in run_distributed(score_and_export, 2, cases, str(tmp_path), collection(pairs))[0]:
        assert result["loss"] == pytest.approx(loss, rel=1e-5)
        for name, gradient in gradients.items():
            error = (result["gradients"][name].double() - gradient).norm() / gradient.norm()
            assert error < 1e-4, (name, float(error))
    expected = load_file(hf_dir / "model.safetensors")
    for size in (1, 2):
        # One a stage.
        files = list((tmp_path / f"exported-{size}").glob("*.safetensors"))
        written = {name: tensor for file in files for name, tensor in load_file(file).items()}
        assert len(files) == 3 - size
        assert written.keys() == expected.keys()
        assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())


@pytest.mark.dist
def test_what_the_bridge_cannot_do_is_told(tmp_path: Path) -> None:
    hf_dir = make_hf_model(tmp_path / "model")
    run_distributed(refusals, 1, hf_dir)


def refusals(hf_dir: Path) -> None:
    groups = initialize_runtime()
    sys.modules["megatron.bridge"] = None  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"Megatron-Bridge is not installed\. .* pip install megatron-bridge"):
        build_bridged_policy(hf_dir, groups, max_length=64)
    install_stand_in()
    with pytest.raises(ConversionError, match=r"holds no config\.json"):
        build_bridged_policy(hf_dir.parent, groups, max_length=64)
    other = hf_dir.parent / "gpt2"
    hf_dir.rename(other)
    with pytest.raises(ConversionError, match="does not take this model: no bridge for GPT2LMHeadModel") as caught:
        build_bridged_policy(other, groups, max_length=64)
    assert len(str(caught.value)) < 1000
    other.rename(hf_dir)
    with pytest.raises(ConfigError, match="Provider has no field made_up, to be 3"):
        build_bridged_policy(hf_dir, groups, max_length=64, made_up=3)
    with pytest.raises(ConfigError, match=r"attention_dropout: dropout of 0\.2"):
        build_bridged_policy(hf_dir, groups, max_length=64, attention_dropout=0.2)
    two: Any = dataclasses.replace(groups, tp=SimpleNamespace(size=lambda: 2))
    with pytest.raises(ConfigError, match="--tensor-model-parallel-size 2 does not divide the vocabulary of 83 tokens"):
        build_bridged_policy(hf_dir, two, max_length=64)
    shutdown_runtime()


def export_by_the_package(layouts: list[dict[str, int]], folder: str) -> None:
    """The model of the tests through Megatron-Bridge itself: its kernels missed by name, built without, exported."""
    import_bridge()
    for number, layout in enumerate(layouts):
        groups = initialize_runtime(**layout)
        with pytest.raises(ConversionError, match=r"cannot build this model here: apply_rope_fusion is not available"):
            build_bridged_policy(MODEL, groups, max_length=256)
        bridged = build_bridged_policy(MODEL, groups, max_length=256, sequence_parallel=groups.tp_size > 1, **WITHOUT_KERNELS)
        bridged.export(Path(folder) / str(number))
        worlds.end_case()


@pytest.mark.skipif(not bridge_is_installed(), reason="needs Megatron-Bridge itself (0.6.2, Python 3.12), which is not installed")
@pytest.mark.slow
@pytest.mark.dist
def test_the_package_itself_loads_and_exports_every_bit(tmp_path: Path) -> None:
    layouts = [{"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}]
    run_distributed(export_by_the_package, 2, layouts, str(tmp_path))
    given = load_file(MODEL / "model.safetensors")
    for number in range(len(layouts)):
        written = load_file(tmp_path / str(number) / "model.safetensors")
        assert given.keys() == written.keys()
        assert all(torch.equal(tensor, written[key]) for key, tensor in given.items())
