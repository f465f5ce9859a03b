"""Addresses of object stores in the place of paths: nothing here reads or writes them, which is told before anything starts.

Understood by older Pythons, as :mod:`megatron_rmipo.entry` is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from megatron_rmipo.errors import ConfigError

# Scheme -> what copies from there; {} is the address, {name} that of a repository without the scheme.
_COPIED_BY = {
    **dict.fromkeys(("s3", "s3a", "s3n"), "aws s3 cp --recursive {} DIR"),
    **dict.fromkeys(("gs", "gcs"), "gcloud storage cp --recursive {} DIR"),
    **dict.fromkeys(("az", "abfs", "abfss", "adl", "wasb", "wasbs"), "azcopy copy --recursive {} DIR"),
    "hf": "hf download {name} --local-dir DIR, with --repo-type dataset for data",
    **dict.fromkeys(("http", "https", "ftp"), "curl -LO {}"),
    **dict.fromkeys(("hdfs", "oci", "oss", "cos", "obs", "r2", "swift"), "by the store's own command"),
}
# In what is named FLAG VALUE, FLAG=VALUE, or NAME=VALUE.
_ADDRESS = re.compile(r"(?:[\w-]+=)?(?P<address>(?P<scheme>[a-z][a-z0-9]*)://(?P<rest>.*))", re.DOTALL)


def remote_path_problem(flag: str, value: str) -> str | None:
    """What is wrong with a value in the place of a path, and the remedy; None where it is no address of an object store."""
    found = _ADDRESS.fullmatch(value)
    if found is None or found["scheme"] not in _COPIED_BY:
        return None
    address = found["address"]
    name = found["rest"].removeprefix("models/").removeprefix("datasets/")
    command = _COPIED_BY[found["scheme"]].format(address, name=name)
    return (
        f"{flag} {value}".lstrip() + ": object stores are neither read nor written. "
        f"Copy it to a file system that all nodes see ({command}), or mount the bucket there, and name that path; "
        "results can be copied back the same way."
    )


def refuse_remote_paths(arguments: Iterable[tuple[str, str]]) -> None:
    """Refuse addresses of object stores.

    Args:
        arguments: (flag, value).

    Raises:
        ConfigError: naming the first flag with such a value, and the remedy.
    """
    for flag, value in arguments:
        problem = remote_path_problem(flag, value)
        if problem is not None:
            raise ConfigError(problem)


def flags_and_values(argv: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(flag, value) of every value on a command line, of a flag that takes several, too; the flag is "" before the first."""
    flag = ""
    for token in argv:
        if token.startswith("--"):
            flag, equals, value = token.partition("=")
            if equals:
                yield flag, value
        else:
            yield flag, token
