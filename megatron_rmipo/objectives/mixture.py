"""Several objectives at once: the weighted sum of their losses, each of its members as it is alone.

Shape letter: P pairs.
"""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from megatron_rmipo.config.values import field_types
from megatron_rmipo.objectives.base import BatchLogps, LogpNeeds, LossOutput, Objective, PairLogps, State
from megatron_rmipo.objectives.contract import check_output

_WEIGHT = re.compile(r"[-+]?[\d.].*")
_FORM = "NAME:WEIGHT,NAME:WEIGHT, as in dpo:0.8,sft:0.2; a weight left out is 1"


def split_members(text: str) -> list[tuple[str, float]] | None:
    """``dpo:0.8,sft:0.2`` as names and weights; None where it is one name.

    What stands behind a name's last colon is a weight where it begins as a number does, which no class can.

    Raises:
        ValueError: a name is missing, a weight is not a number above 0, or a single objective has one.
    """
    if "," not in text and not _WEIGHT.fullmatch(text.rpartition(":")[2]):
        return None
    members = [_member(text, part.strip()) for part in text.split(",")]
    if len(members) == 1:
        raise ValueError(f"objective {text!r}: a weight is one among several objectives; leave it out, or name another: {_FORM}")
    return members


def _member(text: str, part: str) -> tuple[str, float]:
    name, colon, weight = part.rpartition(":")
    if not (colon and _WEIGHT.fullmatch(weight)):
        name, weight = part, "1"
    if not name:
        raise ValueError(f"objective {text!r}: a name is missing; expected {_FORM}")
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0.0):
        raise ValueError(f"objective {text!r}: the weight of {name} is {weight}, which is no number above 0; expected {_FORM}")
    return name, value


def mixture_of(name: str, members: Sequence[tuple[type[Objective], float]]) -> type[Objective]:
    """The class of a mixture.

    Args:
        name: of the mixture.
        members: classes and the weights of their losses.

    Raises:
        ValueError: two members have one name, or options that cannot be told apart by theirs.
    """
    classes = [member for member, _ in members]
    for member, count in Counter(member.name for member in classes).items():
        if count > 1:
            is_one = len({one for one in classes if one.name == member}) == 1
            remedy = "name it once, with the sum of its weights" if is_one else "give each class a name of its own"
            raise ValueError(f"objective {name!r}: {member} is named {count} times; {remedy}")
    try:
        options = _options(classes)
    except TypeError as error:
        raise ValueError(
            f"objective {name!r}: the options of its members cannot stand side by side, each after its class's name: {error}; "
            "change the name of a class, or of an option"
        ) from error
    attributes = {
        "__doc__": Mixture.__doc__,
        "__module__": __name__,
        "name": name,
        "Config": options,
        "members": tuple(members),
        "default_lr": min(member.default_lr for member in classes),
    }
    return type("Mixture", (Mixture,), attributes)


@dataclasses.dataclass(frozen=True)
class _MixtureOptions:
    """The options of all members: an option of one member alone by its name, one of several as ``MEMBER_OPTION``.

    Attributes:
        places: for each member its class of options, its name, and its option -> name here.
    """

    places: ClassVar[tuple[tuple[type, str, Mapping[str, str]], ...]]

    def __post_init__(self) -> None:
        for config, (_, _, names) in zip(self.of_members(), self.places, strict=True):
            for option, here in names.items():
                object.__setattr__(self, here, getattr(config, option))

    def of_members(self) -> list[Any]:
        """Each member's options.

        Raises:
            ValueError: naming the member and the option that is outside its range.
        """
        configs = []
        for options, member, names in self.places:
            try:
                configs.append(options(**{option: getattr(self, here) for option, here in names.items()}))
            except ValueError as error:
                raise ValueError(f"{member}: {error}") from error
        return configs


def _options(classes: Sequence[type[Objective]]) -> type:
    """The class of their options; TypeError: a name is given twice, or is none that a flag can have."""
    shared = Counter(option for member in classes for option in field_types(member.Config))
    fields, places = [], []
    for member in classes:
        hints = typing.get_type_hints(member.Config)
        known = field_types(member.Config)
        names = {option: option if shared[option] == 1 else f"{member.name}_{option}" for option in known}
        places.append((member.Config, member.name, names))
        for field in dataclasses.fields(member.Config):
            if field.name in names:
                fields.append((names[field.name], hints[field.name], _with_default_of(field)))
    return dataclasses.make_dataclass(
        "MixtureOptions", fields, bases=(_MixtureOptions,), namespace={"places": tuple(places)}, frozen=True, kw_only=True
    )


def _with_default_of(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=field.default_factory, metadata=field.metadata)
    return dataclasses.field(default=field.default, metadata=field.metadata)


class Mixture(Objective):
    """``L = sum over the members of weight * L_member``. The weights are not scaled to sum to 1.

    Passes are those that any member needs, each made once; metrics and state are the members' own. The first member that reads
    rejected responses leads: its metrics keep their names, by which runs are judged and compared. Those of the others, and the
    loss of each member before its weight, are called ``MEMBER/metric``.

    Source: lists of losses as in TRL (``loss_type``, ``loss_weights``), after MPO (Wang et al. 2024).
    """

    members: ClassVar[tuple[tuple[type[Objective], float], ...]]

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        options = self.config.of_members()
        self._weighted = [(member(one), weight) for (member, weight), one in zip(self.members, options, strict=True)]

    @property
    def parts(self) -> tuple[Objective, ...]:
        """The members."""
        return tuple(member for member, _ in self._weighted)

    @property
    def needs(self) -> LogpNeeds:
        """What any member needs.

        Raises:
            ValueError: two members need different things of one kind.
        """
        needs = {member.name: member.needs for member in self.parts}
        batch, perturbation = any(one.batch for one in needs.values()), _the_one(needs, "perturbation")
        return LogpNeeds(
            unconditional=_the_one(needs, "unconditional"),
            rejected=any(one.rejected for one in needs.values()),
            # A reference in memory says of a pack's pairs what was kept of it; of the whole batch before, it says nothing.
            reference=any(one.reference for one in needs.values()) and (perturbation is None or batch),
            mismatched=any(one.mismatched for one in needs.values()),
            batch=batch,
            perturbation=perturbation,
            unpaired=all(one.unpaired for one in needs.values()),
            columns=tuple(dict.fromkeys(column for one in needs.values() for column in one.columns)),
        )

    def initial_state(self) -> State:
        """The members' states, each name as ``MEMBER/name``."""
        return _joined({member.name: member.initial_state() for member in self.parts})

    def prepare(self, batch: BatchLogps, state: State) -> dict[str, Tensor]:
        """What the members prepare, each name as ``MEMBER/name``."""
        return _joined({member.name: member.prepare(batch, _own(member, state)) for member in self.parts})

    def advance(self, state: State, prepared: Mapping[str, Tensor], metrics: Mapping[str, Tensor]) -> State:
        """The members' states after the step."""
        after = {}
        for member in self.parts:
            found = _as_the_member_named_them(member, metrics)
            after[member.name] = member.advance(_own(member, state), _own(member, prepared), found)
        return _joined(after)

    def remark(self, metrics: Mapping[str, Tensor]) -> str | None:
        """What the members have to say, one line each."""
        found = (member.remark(_as_the_member_named_them(member, metrics)) for member in self.parts)
        return "\n".join(remark for remark in found if remark is not None) or None

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Loss and metrics per pair.

        Raises:
            ConfigError: a member's losses or metrics are not one value per pair.
        """
        losses: Tensor | None = None
        metrics: dict[str, Tensor] = {}
        distributions: list[str] = []
        leader = next((member for member in self.parts if member.needs.rejected), self.parts[0])
        for member, weight in sorted(self._weighted, key=lambda one: one[0] is not leader):
            output = member(dataclasses.replace(logps, batch=_own(member, logps.batch)))
            # A loss of another shape would be spread over the others' pairs.
            check_output(member, output, logps.chosen_logps.shape[0])
            losses = weight * output.losses if losses is None else losses + weight * output.losses
            named = {name: name if member is leader else f"{member.name}/{name}" for name in output.metrics}
            metrics = {**{named[name]: values for name, values in output.metrics.items()}, **metrics}
            metrics[f"{member.name}/loss"] = output.losses.detach()
            distributions += [named[name] for name in output.distributions]
        assert losses is not None
        return LossOutput(losses, metrics, tuple(dict.fromkeys(distributions)))


def _the_one(needs: Mapping[str, LogpNeeds], kind: str) -> Any:
    """What the members that need something of a kind agree on."""
    found = {member: getattr(one, kind) for member, one in needs.items() if getattr(one, kind) is not None}
    if len(set(found.values())) > 1:
        told = ", ".join(f"{member} {value}" for member, value in found.items())
        raise ValueError(f"one run has one {kind} for all its objectives, and these differ: {told}; set their options alike")
    return next(iter(found.values()), None)


def _joined(values: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{member}/{name}": value for member, own in values.items() for name, value in own.items()}


def _as_the_member_named_them(member: Objective, metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Metrics under the names that the member gave them, whether or not they stand under those alone."""
    return {**metrics, **_own(member, metrics)}


def _own(member: Objective, values: Mapping[str, Any]) -> dict[str, Any]:
    prefix = f"{member.name}/"
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
