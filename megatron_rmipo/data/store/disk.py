"""Failed writes as errors that say what to do about them."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from megatron_rmipo.errors import DataError

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextlib.contextmanager
def write_errors_named(path: str | Path, elsewhere: str = "choose another --output-prefix") -> Iterator[None]:
    """Turn a failed write into an error that names what was written and the remedy.

    Args:
        path: what is written.
        elsewhere: how to have it written somewhere else.

    Raises:
        DataError: instead of the OSError.
    """
    try:
        yield
    except OSError as error:
        folder = os.path.dirname(path) or "."
        if error.errno in _NO_SPACE:
            remedy = f"Free some space, or {elsewhere}."
        elif error.errno in _NO_PERMISSION:
            remedy = f"Make {folder} writable for this user, or {elsewhere}."
        else:
            remedy = f"{elsewhere[0].upper()}{elsewhere[1:]}."
        raise DataError(f"{path}: could not be written ({error.strerror or error}). {remedy}") from error
