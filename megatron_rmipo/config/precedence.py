"""Flags that exclude each other, and what of a file gives way to the command line."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping

from megatron_rmipo.config.schema import Config
from megatron_rmipo.config.unknown_flags import flag_of
from megatron_rmipo.config.values import ValueType, convert
from megatron_rmipo.config.yaml_file import Given

# Two flags, and what both of them say. Together they are refused; one on the command line puts the other out of a file.
_EXCLUSIVE = (
    ("train_iters", "epochs", "set the length"),
    ("split", "valid_data_path", "name held-out data"),
    ("lr_warmup_fraction", "lr_warmup_iters", "set the warm-up"),
    ("reference_hf", "reference_load", "name the reference"),
    ("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank", "cut pipeline stages into chunks"),
)


def exclusive_problems(config: Config) -> Iterator[str]:
    """Pairs of flags that exclude each other and are both set."""
    values, unset = config.to_flat_dict(), Config().to_flat_dict()
    for first, second, meaning in _EXCLUSIVE:
        if values[first] != unset[first] and values[second] != unset[second]:
            shown = " and ".join(f"{flag_of(key)} {_in_words(values[key])}" for key in (first, second))
            yield f"{shown} both {meaning}; give one of them"


def without_what_gives_way(
    file: Mapping[str, Given],
    line: Mapping[str, Given],
    options_of: Callable[[str], Collection[str]],
    defaults_of: Callable[[str], Mapping[str, object]],
    tell: Callable[[str], None],
) -> dict[str, Given]:
    """The entries of a file that hold beside a command line, which wins.

    A flag on the command line puts out the one of the file that excludes it. An objective other than the file's puts out the
    options of the file's, those of the same name too: ``beta`` is of another scale in another objective. So it does with flags of
    the trainer that stand in the file as the file's objective has them by default.

    Args:
        file: the entries of the file.
        line: the flags on the command line.
        options_of: name of an objective -> names of its options; ConfigError: there is no such objective.
        defaults_of: name of an objective -> flags of the trainer with the values that it gives them by default.
        tell: is told what gives way, where it was set.
    """
    kept = dict(file)
    for first, second, _ in _EXCLUSIVE:
        for given, other in ((first, second), (second, first)):
            if given in line and other not in line and other in kept and kept.pop(other).raw:
                tell(f"{file[other].source} gives way to {flag_of(given)}")
    if "objective" in file and "objective" in line and file["objective"].raw != line["objective"].raw:
        before, now = (str(given["objective"].raw) for given in (file, line))
        options = [key for key in options_of(before) if kept.pop(key, None) is not None]
        for key, value in defaults_of(before).items():
            if key in kept and _says(kept[key].raw, value) and defaults_of(now).get(key) != value:
                options.append(key)
                del kept[key]
        with_options = f", and with it {', '.join(options)}" if options else ""
        tell(f"{file['objective'].source} {file['objective'].raw} gives way to --objective {line['objective'].raw}{with_options}")
    return kept


def _says(raw: object, value: object) -> bool:
    """Whether an entry of a file means the value."""
    try:
        return bool(convert(raw, ValueType(type(value))) == value)
    except ValueError:
        return False


def _in_words(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
