"""Tables of typed columns: parquet and Arrow files, and the data sets that ``datasets`` loads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_rmipo.data.reading.text_files import REMEDY
from megatron_rmipo.errors import DataError

TABLE_SUFFIXES = (".parquet", ".arrow")
_ROWS_PER_READ = 1024
# What `datasets` leaves in the folder of a saved data set.
_MARKERS_OF_SAVED = ("state.json", "dataset_dict.json")


def count_parquet_rows(path: Path, name: str) -> int:
    """Rows of a parquet file, from its metadata.

    Raises:
        DataError: it is not readable.
    """
    import pyarrow.parquet

    with _damage_named(name, "parquet file"):
        return int(pyarrow.parquet.read_metadata(path).num_rows)


def parquet_rows(path: Path, name: str) -> Iterator[Any]:
    """Rows of a parquet file."""
    import pyarrow.parquet

    with _damage_named(name, "parquet file"), pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=_ROWS_PER_READ):
            yield from batch.to_pylist()


def arrow_rows(path: Path, name: str) -> Iterator[Any]:
    """Rows of an Arrow file, in the streaming form that ``datasets`` writes or the random-access form."""
    import pyarrow

    with _damage_named(name, "Arrow file"), pyarrow.memory_map(str(path)) as mapped:
        try:
            batches: Any = pyarrow.ipc.open_stream(mapped)
        except pyarrow.ArrowInvalid:
            file = pyarrow.ipc.open_file(mapped)
            batches = (file.get_batch(index) for index in range(file.num_record_batches))
        for batch in batches:
            yield from batch.to_pylist()


def data_set_rows(data: Any, name: str) -> Iterator[Any]:
    """Rows of a loaded data set."""
    with _damage_named(name, "data set"):
        for batch in data.iter(batch_size=_ROWS_PER_READ):
            yield from (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))


def is_saved_data_set(folder: Path) -> bool:
    """Whether ``save_to_disk`` wrote a folder."""
    return any((folder / marker).is_file() for marker in _MARKERS_OF_SAVED)


def load_data_set(name: str, *, is_saved: bool) -> Mapping[str | None, Any]:
    """The splits of a data set by name; one without splits has None for its name.

    Args:
        name: of the Hugging Face hub, or a folder.
        is_saved: ``save_to_disk`` wrote that folder.

    Raises:
        DataError: it cannot be loaded.
    """
    import datasets

    try:
        found = datasets.load_from_disk(name) if is_saved else datasets.load_dataset(name)
    except (OSError, ValueError, KeyError, ImportError, datasets.exceptions.DatasetsError) as error:
        first_line = (str(error).splitlines() or [repr(error)])[0]
        raise DataError(
            f"--input {name}: neither a file nor a data set that `datasets` can load ({first_line}).\n"
            "Check the name and the connection, or download it and give its files."
        ) from None
    return found if isinstance(found, dict) else {None: found}


@contextlib.contextmanager
def _damage_named(name: str, kind: str) -> Iterator[None]:
    """Turn what pyarrow raises for a damaged file into an error that names it."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        problem = (str(error).splitlines() or [repr(error)])[0]
        raise DataError(f"{name}: not a readable {kind} ({problem}). {REMEDY}") from None
