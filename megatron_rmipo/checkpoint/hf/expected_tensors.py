"""Whether a Hugging Face checkpoint holds the tensors of a model, by the rules of its family."""

from __future__ import annotations

import re
from collections.abc import Iterable

from megatron_rmipo.errors import ConversionError
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.families.registry import FAMILIES
from megatron_rmipo.families.tensors import tensors_of


def check_keys(found: Iterable[str], arch: ModelArchitecture, where: str) -> None:
    """Check that a Hugging Face checkpoint holds exactly the tensors of the model.

    A head stored beside a tied embedding is left to the caller, who can compare the two.

    Raises:
        ConversionError: naming the tensors that are missing and those that nothing would use.
    """
    family = FAMILIES[arch.family]
    expected = {name for rule, place in tensors_of(arch) for name in rule.source_names(place)}
    names = set(found)
    if arch.tied_embeddings:
        names -= set(family.head_sources)
    unused = {name for name in names - expected if not any(re.fullmatch(pattern, name) for pattern in family.ignored)}
    missing = expected - names
    if not unused and not missing:
        return
    lines = [f"{where}: its tensors are not those of a {arch.family} model with {arch.num_layers} layers."]
    lines += [f"  missing ({len(missing)}): {_sample(missing)}"] if missing else []
    lines += [f"  not used ({len(unused)}): {_sample(unused)}"] if unused else []
    fields = "architectures, num_hidden_layers, tie_word_embeddings" + (", the number of experts" if arch.experts else "")
    lines.append(f"Check that config.json belongs to these weights ({fields}).")
    raise ConversionError("\n".join(lines))


def _sample(names: set[str], limit: int = 8) -> str:
    shown = sorted(names)[:limit]
    return ", ".join(shown) + (f", and {len(names) - limit} more" if len(names) > limit else "")
