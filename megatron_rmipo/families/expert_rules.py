"""Tensors of mixtures of experts, which families of sparse models share. Source of the Megatron names: ``MoELayer``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from megatron_rmipo.families.base import Layout, Rule
from megatron_rmipo.families.llama import HF_LAYER, MEGATRON_LAYER

_NORM = "pre_mlp_layernorm.weight"
_MLP = MEGATRON_LAYER + "mlp."


def sparse_rules(dense: Sequence[Rule], experts: Sequence[Rule]) -> tuple[Rule, ...]:
    """Rules of a sparse model out of those of its dense kind: an ordinary MLP in dense layers, experts in the others.

    Args:
        dense: those of a family whose layers all have an ordinary MLP.
        experts: those of what stands in its place, without the norm before it.
    """
    rules: list[Rule] = []
    for rule in dense:
        if rule.megatron == _MLP + "linear_fc1.layer_norm_weight":
            # The norm is the linear layer's own where one layer takes its output, and a module of its own before experts.
            rules += [
                dataclasses.replace(rule, only_with="dense_layers"),
                dataclasses.replace(rule, megatron=MEGATRON_LAYER + _NORM, only_with="expert_layers"),
                *experts,
            ]
        elif rule.megatron.startswith(_MLP):
            if rule.only_with is None:
                rules.append(dataclasses.replace(rule, only_with="dense_layers"))
        else:
            rules.append(rule)
    return tuple(rules)


def router_rules(router: str) -> tuple[Rule, ...]:
    """The router.

    Args:
        router: its Hugging Face name within the layer, such as ``mlp.gate``.
    """
    return (
        Rule(_MLP + "router.weight", (f"{HF_LAYER}{router}.weight",), Layout.EXPERTS, only_with="expert_layers"),
        Rule(
            _MLP + "router.expert_bias",
            (f"{HF_LAYER}{router}.e_score_correction_bias",),
            Layout.EXPERTS,
            only_with="score_bias_layers",
        ),
    )


def expert_rules(expert: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> tuple[Rule, ...]:
    """The experts of a layer, each with tensors of its own in Hugging Face files.

    Args:
        expert: name of an expert within the layer, such as ``mlp.experts.{expert}``.
        gate, up, down: names of its matrices.
    """
    gate, up, down = (f"{HF_LAYER}{expert}.{name}.weight" for name in (gate, up, down))
    return (
        Rule(_MLP + "experts.experts.linear_fc1.weight", (gate, up), Layout.GATE_UP, only_with="expert_layers"),
        Rule(_MLP + "experts.experts.linear_fc2.weight", (down,), Layout.FFN_COLUMNS, only_with="expert_layers"),
    )


def shared_expert_rules(shared: str) -> tuple[Rule, ...]:
    """The experts that every token goes through, which are one MLP.

    Args:
        shared: its Hugging Face name within the layer, such as ``mlp.shared_experts``.
    """
    gate, up, down = (f"{HF_LAYER}{shared}.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj"))
    return (
        Rule(_MLP + "shared_experts.linear_fc1.weight", (gate, up), Layout.GATE_UP, only_with="shared_expert_layers"),
        Rule(_MLP + "shared_experts.linear_fc2.weight", (down,), Layout.FFN_COLUMNS, only_with="shared_expert_layers"),
    )


def shared_gate_rule(gate: str) -> Rule:
    """What makes the number that weights the shared experts' output.

    Args:
        gate: its Hugging Face name within the layer.
    """
    return Rule(_MLP + "shared_experts.gate_weight", (f"{HF_LAYER}{gate}.weight",), Layout.GATE, only_with="shared_expert_layers")
