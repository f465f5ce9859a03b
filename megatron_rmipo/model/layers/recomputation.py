"""Which of the modules that selective recomputation may compute anew a model has."""

from __future__ import annotations

import typing
from collections.abc import Iterator

from megatron_rmipo.config.flags.memory import RecomputeModule
from megatron_rmipo.config.schema import Config
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.model.transformer_engine import transformer_engine_layers


def recompute_module_problems(config: Config, arch: ModelArchitecture) -> Iterator[str]:
    """Modules of --recompute-modules that this model does not have, of which Megatron would say nothing."""
    absent = dict(_absent(config, arch))
    works = [name for name in typing.get_args(RecomputeModule) if name not in absent]
    for name in config.memory.recompute_modules or []:
        if name in absent:
            yield f"--recompute-modules {name}: {absent[name]}; would work: {' '.join(works)}"
    if config.model.recompute_granularity == "selective" and not config.memory.recompute_modules and "core_attn" in absent:
        yield (
            f"--recompute-granularity selective alone is that of core_attn: {absent['core_attn']}; leave it out, or add "
            f"--recompute-modules, of which would work: {' '.join(works)}"
        )


def _absent(config: Config, arch: ModelArchitecture) -> Iterator[tuple[str, str]]:
    """Modules that nothing is computed by, or that cannot be computed anew, and why."""
    experts, model = arch.experts, config.model
    if config.parallel.context_parallel_size > 1 and config.parallel.cp_comm_type == "all_gather":
        yield "core_attn", "where keys and values are gathered (--cp-comm-type all_gather) attention is computed anew without it"
    if not arch.pre_norm:
        yield "layernorm", "this model has no norms before attention and MLP"
    elif transformer_engine_layers(model) and experts is None and arch.latent is None:
        yield "layernorm", "Transformer Engine's layers have norms inside their linear layers (--transformer-impl local: apart)"
    if all(arch.has("expert_layers", layer) for layer in range(arch.num_layers)):
        yield "mlp", "this model has experts in every layer"
    if experts is None:
        yield from ((name, "this model has no experts") for name in ("moe", "moe_act", "shared_experts"))
    else:
        if not config.experts.moe_grouped_gemm:
            yield "moe_act", "needs --moe-grouped-gemm"
        if not experts.shared_ffn_hidden_size:
            yield "shared_experts", "this model has no shared experts"
    if arch.latent is None:
        yield "mla_up_proj", "this model's attention has no latents"
    if model.fp8_format and (model.fp8_recipe or "delayed") == "delayed":
        yield from ((name, "not with fp8 of the recipe delayed, whose scales it would move") for name in ("layernorm", "moe_act"))
