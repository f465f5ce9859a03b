"""The common state of a checkpoint: all that is neither tensor nor sharded object, the same on every rank.

Megatron-Core up to 0.18 writes it to a file of its own, ``common.pt``; from 0.19 on it is one more object of the ``.distcp``
files. Both are read here, whichever version is installed; what is written is what the installed one writes.
"""

from __future__ import annotations

import importlib.metadata
import io
from pathlib import Path
from typing import Any

import torch

from megatron_rmipo.checkpoint.megatron.directory import COMMON_KEY, COMMON_NAME, read_metadata
from megatron_rmipo.checkpoint.megatron.unpickling import restricted_unpickling
from megatron_rmipo.errors import CheckpointError

# The forms of what lies in a checkpoint; that of the distributed optimizer's state is the one that another TP, PP or DP can load.
CONTENT = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
# The first version of Megatron-Core that writes an object.
_FIRST_WITH_OBJECT = (0, 19)


def is_written_as_object() -> bool:
    """Whether the installed Megatron-Core writes the common state as an object; without one, the file that all versions read."""
    try:
        version = importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        return False
    major, minor = version.split(".")[:2]
    return (int(major), int(minor)) >= _FIRST_WITH_OBJECT


def read_common(path: Path) -> dict[str, Any]:
    """The common state of a checkpoint in either form. It is small.

    Raises:
        CheckpointError: it is missing or damaged, or names what no checkpoint may hold.
    """
    where = path / COMMON_NAME
    try:
        with restricted_unpickling():
            # As Megatron-Core does: the file, where there is one, counts.
            if where.exists():
                found = torch.load(where, weights_only=False, map_location="cpu")
            else:
                where = path / ".metadata"
                info = next(item for index, item in read_metadata(path).storage_data.items() if index.fqn == COMMON_KEY)
                where = path / info.relative_path
                # Megatron-Core stores the list of a rank's objects under a key.
                (found,) = torch.load(_part(where, info.offset, info.length), weights_only=False, map_location="cpu")
    except StopIteration:
        raise CheckpointError(
            f"{path} has no common state: neither {COMMON_NAME} nor {COMMON_KEY} in its .metadata is there."
        ) from None
    except CheckpointError:
        raise
    except Exception as error:
        # A truncated pickle raises whatever its bytes happen to say.
        raise CheckpointError(f"{where} is damaged where the common state lies ({error!r})") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{where} holds a {type(found).__name__} where the common state, a dict, is expected.")
    return found


def _part(path: Path, offset: int, length: int) -> io.BytesIO:
    with path.open("rb") as stream:
        stream.seek(offset)
        return io.BytesIO(stream.read(length))
