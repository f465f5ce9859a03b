"""The flags of low-rank adapters (LoRA): which weights get one, of what form, and where adapters are read and written."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, Literal

from megatron_rmipo.config.options import described, option

# What an adapter that is loaded says of itself.
_SAID_BY_ADAPTER = (
    *("lora_rank", "lora_alpha", "lora_target_modules", "lora_target_regex", "use_rslora", "use_dora", "lora_modules_to_save"),
    "lora_experts",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """LoRA: trains small matrices beside frozen weights. On where --lora-rank or --load-adapter is given."""

    lora_rank: int | None = option(
        None, "Train a LoRA adapter of this rank, and freeze the model; unset: that of --load-adapter, or train the whole model."
    )
    lora_alpha: float | None = option(None, "What the adapter adds is scaled by this over its rank; unset: the rank.")
    lora_dropout: float = option(
        0.0,
        "Only 0: what dropout leaves out would depend on how a batch is cut, and so would the loss. There for settings of other "
        "trainers, which are answered.",
    )
    lora_target_modules: list[str] | None = dataclasses.field(
        default=None,
        metadata=described(
            "Whose weights get an adapter: all-linear, Megatron's linear_qkv, linear_proj, linear_fc1, linear_fc2, or Hugging "
            "Face's names, such as q_proj v_proj; unset: all-linear, which is every linear layer but the output layer and "
            "routers.",
            "NAME",
        ),
    )
    lora_target_regex: str | None = option(
        None, "Of those only modules whose whole Hugging Face name matches, such as '.*layers\\.(8|9)\\..*'.", "REGEX"
    )
    use_rslora: bool = option(False, "Scale by alpha over the root of the rank (rank-stabilized LoRA).")
    use_dora: bool = option(False, "Also train the length of each row of a weight (DoRA); not for experts.")
    lora_plus_ratio: float | None = option(None, "Learning rate of B over that of A (LoRA+); unset: 1.")
    lora_modules_to_save: list[str] | None = dataclasses.field(
        default=None,
        metadata=described(
            "Modules that are trained whole beside the adapter and saved with it, by Hugging Face's names: embed_tokens, "
            "lm_head, norm and other modules of one weight.",
            "NAME",
        ),
    )
    lora_experts: Literal["each", "shared"] = option(
        "each", "Adapters of experts: each has its own, or all of a layer share one."
    )
    load_adapter: str | None = option(
        None, "PEFT adapter to start from; its adapter_config.json says rank, alpha, form and modules.", "DIR"
    )
    save_adapter: str | None = option(None, "Directory to write the trained adapter to, as PEFT has it; all hosts see it.", "DIR")
    reference_adapter: str | None = option(
        None, "PEFT adapter that makes the model the reference; unset: the reference is the model without an adapter.", "DIR"
    )
    pretrained_checkpoint: str | None = option(
        None, "Megatron checkpoint of the frozen model, in the place of --load-hf; --load holds checkpoints of adapters.", "DIR"
    )
    quantize_base: Literal["nf4", "int8"] | None = option(
        None,
        "Keep the frozen linear layers' weights in 4 bits (nf4) or 8 (int8), by bitsandbytes; products are computed in the "
        "model's dtype.",
    )

    # The fields of _SAID_BY_ADAPTER are filled in from the adapter in --load-adapter; they were not given.
    is_filled_in: bool = dataclasses.field(default=False, metadata={"flag": False})

    @property
    def is_on(self) -> bool:
        """Whether an adapter is trained."""
        return self.lora_rank is not None or self.load_adapter is not None

    def filled_in(self, **said: Any) -> LoraConfig:
        """With what the adapter in ``--load-adapter`` says of itself, for whatever goes by the flags."""
        assert set(said) <= set(_SAID_BY_ADAPTER)
        return dataclasses.replace(self, **said, is_filled_in=True)

    def as_given(self) -> dict[str, Any]:
        """The flags by name, as they were given."""
        flags = dataclasses.asdict(self)
        if flags.pop("is_filled_in"):
            flags.update({name: getattr(LoraConfig, name, None) for name in _SAID_BY_ADAPTER})
        return flags


def lora_problems(lora: LoraConfig) -> Iterator[str]:
    """Faults of the flags of adapters among themselves."""
    if not lora.is_on:
        for field in dataclasses.fields(LoraConfig):
            # A checkpoint may hold the adapter of which --pretrained-checkpoint is the base; that is seen when it is found.
            if field.name != "pretrained_checkpoint" and getattr(lora, field.name) != field.default:
                yield f"--{field.name.replace('_', '-')} does nothing without --lora-rank N or --load-adapter DIR"
        return
    if lora.load_adapter is not None and not lora.is_filled_in:
        for name in _SAID_BY_ADAPTER:
            if getattr(lora, name) != getattr(LoraConfig, name, None):
                yield f"--{name.replace('_', '-')} is what the adapter in --load-adapter says; leave it out"
    if lora.lora_rank is not None and lora.lora_rank < 1:
        yield f"--lora-rank {lora.lora_rank}: must be 1 or more"
    if lora.lora_alpha is not None and not (math.isfinite(lora.lora_alpha) and lora.lora_alpha > 0):
        yield f"--lora-alpha {lora.lora_alpha}: must be greater than 0"
    if lora.lora_dropout:
        yield (
            f"--lora-dropout {lora.lora_dropout}: dropout would make the loss of a pair depend on how its batch is cut over "
            "ranks and packs; leave it out"
        )
    if lora.lora_plus_ratio is not None and not (math.isfinite(lora.lora_plus_ratio) and lora.lora_plus_ratio > 0):
        yield f"--lora-plus-ratio {lora.lora_plus_ratio}: must be greater than 0, e.g. 16"
    for name in ("lora_target_modules", "lora_modules_to_save"):
        flag, named = f"--{name.replace('_', '-')}", getattr(lora, name)
        if named == []:
            yield f"{flag} names none; leave it out"
        for text in named or []:
            if "," in text:
                yield f"{flag} {text}: names stand apart, without commas: {flag} {' '.join(filter(None, text.split(',')))}"
