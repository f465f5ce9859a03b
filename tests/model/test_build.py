"""What the flags of layers and kernels make of Megatron's TransformerConfig, as far as it shows without a GPU."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rmipo.errors import ConfigError
from megatron_rmipo.families.architecture import ModelArchitecture, Rope
from megatron_rmipo.model import megatron_config
from megatron_rmipo.model.build import build_policy
from megatron_rmipo.model.megatron_config import transformer_config
from megatron_rmipo.runtime.groups import initialize_runtime, shutdown_runtime
from tests.harness import run_distributed

ARCH = ModelArchitecture(
    family="llama",
    num_layers=3,
    hidden_size=48,
    ffn_hidden_size=88,
    num_attention_heads=6,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=53,
    max_position_embeddings=64,
    ropes=(Rope(1e4),),
    layernorm_epsilon=1e-5,
)
ROPE = "megatron.core.models.common.embeddings.rope_utils.fused_apply_rotary_pos_emb"
GROUPS: Any = SimpleNamespace(tp_size=1, pp_size=1, cp_size=1)


@pytest.fixture
def transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it were installed, and there were a GPU for it."""
    monkeypatch.setattr(megatron_config, "transformer_engine_available", lambda: True)
    monkeypatch.setattr(ROPE, lambda *args, **kwargs: args[0])


@pytest.mark.usefixtures("transformer_engine")
def test_fp8_reaches_megatron_by_its_names() -> None:
    config = transformer_config(ARCH, GROUPS, dtype=torch.bfloat16, fp8_format="hybrid", fp8_recipe="tensorwise")
    assert (config.fp8, config.fp8_recipe, config.transformer_impl) == ("hybrid", "tensorwise", "transformer_engine")
    # Data-parallel ranks run different numbers of packs: an agreement over them all would wait for ever.
    assert config.tp_only_amax_red
    assert transformer_config(ARCH, GROUPS, fp8_format="e4m3").fp8_recipe == "delayed"
    assert transformer_config(ARCH, GROUPS).fp8 is None


@pytest.mark.usefixtures("transformer_engine")
@pytest.mark.parametrize(("impl", "layers"), [("auto", "transformer_engine"), ("local", "local")])
def test_rope_is_fused_in_transformer_engines_layers(impl: str, layers: str) -> None:
    config = transformer_config(ARCH, GROUPS, transformer_impl=impl)
    assert (config.transformer_impl, config.apply_rope_fusion) == (layers, layers == "transformer_engine")


def test_without_transformer_engine_layers_are_megatrons_own() -> None:
    config = transformer_config(ARCH, GROUPS)
    assert (config.transformer_impl, config.apply_rope_fusion) == ("local", False)


@pytest.mark.parametrize(
    ("settings", "flag"),
    [({"fp8_format": "hybrid"}, "--fp8-format hybrid"), ({"transformer_impl": "transformer_engine"}, "--transformer-impl")],
)
def test_what_needs_transformer_engine_is_refused_without(settings: dict[str, str], flag: str) -> None:
    with pytest.raises(ConfigError, match=r"pip install 'megatron_rmipo\[te\]'") as caught:
        transformer_config(ARCH, GROUPS, **settings)
    assert str(caught.value).startswith(flag)


def test_attention_by_transformer_engine_is_refused_without() -> None:
    with pytest.raises(ConfigError, match=r"--attention-backend te: .*pip install 'megatron_rmipo\[te\]'"):
        build_policy(ARCH, transformer_config(ARCH, GROUPS), GROUPS, attention_backend="te")


@pytest.mark.dist
def test_a_fused_rope_that_goes_row_by_row_gives_the_same_log_probs() -> None:
    """Positions restart within a row; a kernel that reads one row of angles for each token turns each by its own."""
    ((plain, fused, shapes),) = run_distributed(plain_and_fused, 1)
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)
    # Queries and keys of each layer.
    assert shapes == [((12, 1, heads, 8), (12, 1, 1, 8)) for _ in range(3) for heads in (6, 2)]


def plain_and_fused() -> tuple[Tensor, Tensor, list[Any]]:
    from megatron.core.models.common.embeddings import rope_utils

    shapes = []

    def turn(tokens: Tensor, angles: Tensor, interleaved: bool) -> Tensor:
        assert not interleaved
        shapes.append((tuple(tokens.shape), tuple(angles.shape)))
        numbers = torch.complex(*tokens.chunk(2, dim=-1))
        turned = numbers * torch.polar(torch.ones(()), angles[..., :4].contiguous())
        return torch.cat([turned.real, turned.imag], dim=-1)

    groups = initialize_runtime()
    rope_utils.fused_apply_rotary_pos_emb = turn
    config = transformer_config(ARCH, groups)
    model = build_policy(ARCH, config, groups)
    row = {
        "token_ids": torch.arange(12) % 7,
        "position_ids": torch.tensor([0, 1, 2, 3, 4, 5, 3, 4, 5, 0, 1, 2]),
        "segments": torch.tensor([[0, 6, 0, 0], [6, 3, 0, 3], [9, 3, 0, 0]]),
        "source": torch.arange(12),
        "target": torch.arange(12),
    }
    with torch.no_grad():
        plain = model(**row)
        fused_config = dataclasses.replace(config, apply_rope_fusion=True)
        for layer in model.decoder.layers:
            layer.self_attention.config = fused_config
        fused = model(**row)
    shutdown_runtime()
    return plain, fused, shapes


@pytest.mark.gpu
def test_the_fused_rope_of_transformer_engine_goes_row_by_row() -> None:
    from megatron.core.models.common.embeddings import rope_utils

    if rope_utils.fused_apply_rotary_pos_emb is None:
        pytest.skip("needs Transformer Engine")
    positions = torch.tensor([0, 1, 2, 3, 4, 5, 3, 4, 5, 0, 1, 2], dtype=torch.float32)
    angles = torch.outer(positions, torch.tensor([1.0, 0.1, 0.01, 0.001])).repeat(1, 2)[:, None, None].cuda()
    tokens = torch.randn(12, 1, 3, 8, generator=torch.Generator().manual_seed(3)).cuda()
    fused = rope_utils.fused_apply_rotary_pos_emb(tokens, angles, interleaved=False)
    torch.testing.assert_close(fused, rope_utils._apply_rotary_pos_emb_bshd(tokens, angles), rtol=1e-5, atol=1e-5)
