"""What a low-rank adapter is, beside its numbers: rank, scale, form, and which modules of a Hugging Face model it changes.

Names are those that transformers gives a model's modules and parameters, ``model.layers.0.self_attn.q_proj`` or, of all experts
of a layer, ``model.layers.0.mlp.experts.gate_up_proj``. Source: the fields of PEFT's ``LoraConfig``.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

# The parameters of all experts of a layer that may have an adapter, in the order in which transformers registers them.
EXPERT_PARAMETERS = ("gate_up_proj", "down_proj")
# Fields by their names in PEFT's config, where those are others.
_NAMES_IN_CONFIG = {"rank": "r", "alpha": "lora_alpha"}
_Value = TypeVar("_Value")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterForm:
    """An adapter without its numbers.

    Attributes:
        rank: r, where no pattern says another.
        alpha: what is added is ``alpha / r`` times B A, or ``alpha / sqrt(r)`` times.
        rank_pattern: ends of names, as regular expressions -> rank; the first that matches counts.
        alpha_pattern: the same of alpha.
        use_rslora: whether the root of r divides.
        use_dora: whether the lengths of a weight's rows are trained beside it.
        target_modules: ends of names of modules that have an adapter, or one regular expression of whole names.
        exclude_modules: ends of names of modules that have none, or such an expression; None: all targets have one.
        layers_to_transform: numbers of the layers that have adapters; None: all.
        layers_pattern: what layers are called in names; None: any name before a number.
        target_parameters: ends of names of parameters that have an adapter.
        modules_to_save: ends of names of modules that are trained and stored whole.
        ensure_weight_tying: whether what is tied in the model stays tied where one of it is stored whole.
        bias: ``none``, or which biases are trained: ``all``, ``lora_only``.
        base_model_name_or_path: the model that it belongs to.
    """

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    target_modules: tuple[str, ...] | str = ()
    exclude_modules: tuple[str, ...] | str | None = None
    layers_to_transform: tuple[int, ...] | int | None = None
    layers_pattern: tuple[str, ...] | str | None = None
    target_parameters: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    ensure_weight_tying: bool = False
    bias: str = "none"
    base_model_name_or_path: str | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> AdapterForm:
        """The form that an ``adapter_config.json`` describes; what it does not say is as PEFT assumes.

        Raises:
            ValueError: rank or alpha are no numbers above 0; it names the field.
        """
        values: dict[str, Any] = {"rank": 8, "alpha": 8}
        for field in dataclasses.fields(cls):
            said = config.get(_NAMES_IN_CONFIG.get(field.name, field.name))
            if said is not None:
                values[field.name] = tuple(said) if isinstance(said, list) else said
        for name, kinds in (("rank", int), ("alpha", int | float)):
            found = values.get(name)
            if not isinstance(found, kinds) or isinstance(found, bool) or found <= 0:
                raise ValueError(f"{_NAMES_IN_CONFIG[name]} is {found!r}, no number above 0")
        return cls(**values)

    def to_config(self) -> dict[str, Any]:
        """The fields of ``adapter_config.json``. What is as PEFT assumes is left out: older versions do not know all fields."""
        config: dict[str, Any] = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, tuple):
                value = list(value)
            elif isinstance(value, Mapping):
                value = dict(value)
            if value is not None and value is not False and value != [] and value != {}:
                config[_NAMES_IN_CONFIG.get(field.name, field.name)] = value
        config["target_modules"] = list(self.target_modules) if isinstance(self.target_modules, tuple) else self.target_modules
        return config

    def targets(self, module: str) -> bool:
        """Whether a module has an adapter, of itself or of its weight as a parameter."""
        if self.targets_parameter(f"{module}.weight"):
            return True
        if _stands_for(self.exclude_modules, module):
            return False
        if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in self.modules_to_save):
            return False
        if isinstance(self.target_modules, str) or self.layers_to_transform is None:
            return _stands_for(self.target_modules, module)
        return _stands_for(self.target_modules, module) and self._is_in_layers(module)

    def _is_in_layers(self, module: str) -> bool:
        patterns = (self.layers_pattern,) if isinstance(self.layers_pattern, str) else self.layers_pattern
        starts = [rf"(?:^|.*?\.){pattern}" for pattern in patterns] if patterns else [r".*?\.[^.]*"]
        found = next(filter(None, (re.match(rf"{start}\.(\d+)\.", module) for start in starts)), None)
        layers = self.layers_to_transform
        return found is not None and int(found[1]) in (layers if isinstance(layers, tuple) else (layers,))

    def targets_parameter(self, name: str) -> bool:
        """Whether a parameter has an adapter."""
        return _is_end_of(self.target_parameters, name)

    def expert_parameters_of(self, experts: str) -> tuple[str, ...]:
        """The names of the parameters of all experts of a layer that have an adapter, in transformers' order.

        Args:
            experts: the name of their module, such as ``model.layers.0.mlp.experts``.
        """
        names = (f"{experts}.{parameter}" for parameter in EXPERT_PARAMETERS)
        return tuple(filter(self.targets_parameter, names))

    def rank_of(self, name: str) -> int:
        """The rank of the adapter of a module or parameter."""
        return _first_match(self.rank_pattern, self._said(name), self.rank)

    def alpha_of(self, name: str) -> float:
        """The alpha of the adapter of a module or parameter."""
        return _first_match(self.alpha_pattern, self._said(name), self.alpha)

    def _said(self, name: str) -> str:
        """What patterns are compared with: where a module's weight is what is targeted, its name."""
        return f"{name}.weight" if self.targets_parameter(f"{name}.weight") else name

    def scale_of(self, name: str, rank: int | None = None) -> float:
        """What B A is multiplied by, of a module or parameter whose rank is given or follows from the form."""
        rank = self.rank_of(name) if rank is None else rank
        return self.alpha_of(name) / (math.sqrt(rank) if self.use_rslora else rank)


def _first_match(patterns: Mapping[str, _Value], name: str, default: _Value) -> _Value:
    return next((value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", name)), default)


def _stands_for(targets: tuple[str, ...] | str | None, name: str) -> bool:
    return bool(re.fullmatch(targets, name)) if isinstance(targets, str) else _is_end_of(targets or (), name)


def _is_end_of(ends: Iterable[str], name: str) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)
