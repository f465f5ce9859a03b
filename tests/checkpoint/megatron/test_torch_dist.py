"""Pieces of a torch_dist checkpoint, written by several threads and read again, against torch's own view of the files."""

from __future__ import annotations

import io
import itertools
import time
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_rmipo.checkpoint.megatron import torch_dist
from megatron_rmipo.checkpoint.megatron.directory import COMMON_KEY, read_metadata
from megatron_rmipo.checkpoint.megatron.torch_dist import Entry, Piece, TorchDistReader, write_torch_dist
from megatron_rmipo.errors import CheckpointError

LAYERS, ROWS, COLUMNS = 5, 12, 7


def random_tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def cut(key: str, tensor: Tensor, *cuts: tuple[int, ...]) -> Entry:
    """Cut along every dimension at these indices."""
    pieces = []
    bounds = [list(itertools.pairwise((0, *at, size))) for at, size in zip(cuts, tensor.shape, strict=True)]
    for box in itertools.product(*bounds):
        part = tensor[tuple(slice(*bound) for bound in box)]
        pieces.append(Piece(tuple(low for low, _ in box), tuple(part.shape), lambda out, part=part: out.copy_(part)))
    return Entry(key, tuple(tensor.shape), tensor.dtype, tuple(pieces))


def write(directory: Path, *entries: Entry) -> TorchDistReader:
    directory.mkdir()
    write_torch_dist(directory, entries, ["decoder.layers.extra/shard_0_1"], {"iteration": 0})
    return TorchDistReader(directory)


def test_every_piece_is_a_whole_archive_of_its_part_alone(tmp_path: Path) -> None:
    layers, embedding = random_tensor(LAYERS, ROWS, COLUMNS, dtype=torch.bfloat16), random_tensor(11, 3)
    entries = (
        cut("decoder.layers.weight", layers, (1, 2, 3, 4), (5,), ()),
        cut("embedding.weight", embedding, (4, 9), ()),
    )
    write(tmp_path / "checkpoint", *entries)
    assert len(list((tmp_path / "checkpoint").glob("*.distcp"))) == LAYERS + 1
    stored = {"decoder.layers.weight": layers, "embedding.weight": embedding}
    found = 0
    for index, info in read_metadata(tmp_path / "checkpoint").storage_data.items():
        data = (tmp_path / "checkpoint" / info.relative_path).read_bytes()[info.offset :][: info.length]
        assert zipfile.ZipFile(io.BytesIO(data)).testzip() is None
        value = torch.load(io.BytesIO(data), weights_only=True)
        if index.fqn in stored:
            box = tuple(slice(low, low + size) for low, size in zip(index.offset, value.shape, strict=True))
            assert torch.equal(value, stored[index.fqn][box])
            assert value.untyped_storage().nbytes() == value.numel() * value.element_size()
            found += value.numel()
        else:
            assert value == [{"iteration": 0} if index.fqn == COMMON_KEY else None]
    assert found == layers.numel() + embedding.numel()


@pytest.mark.parametrize(
    "cuts",
    [
        ((), (), ()),
        ((1, 2, 3, 4), (5,), ()),
        ((2,), (), (3, 4)),  # layers in one piece, as pipeline stages write them, and columns of tensor parallelism
        ((2, 3), (5, 6), (1,)),
    ],
)
def test_rows_are_read_whatever_the_pieces(tmp_path: Path, cuts: tuple[tuple[int, ...], ...]) -> None:
    tensor = random_tensor(LAYERS, ROWS, COLUMNS)
    reader = write(tmp_path / "checkpoint", cut("decoder.layers.weight", tensor, *cuts), cut("other", tensor[0], *cuts[1:]))
    for layer, (start, stop) in itertools.product(range(LAYERS), ((0, ROWS), (4, 7), (5, 6))):
        assert torch.equal(reader.read_rows("decoder.layers.weight", (layer,), start, stop), tensor[layer, start:stop])
        assert torch.equal(reader.read_rows("other", (), start, stop), tensor[0, start:stop])


def test_gap_is_named(tmp_path: Path) -> None:
    whole = cut("decoder.layers.weight", random_tensor(LAYERS, ROWS, COLUMNS), (2, 4), (5,), ())
    pieces = tuple(piece for piece in whole.pieces if piece.offset != (2, 5, 0))
    reader = write(tmp_path / "checkpoint", Entry(whole.key, whole.shape, whole.dtype, pieces))
    assert reader.read_rows(whole.key, (4,), 0, ROWS).shape == (ROWS, COLUMNS)
    with pytest.raises(CheckpointError, match=r"hold 35 of 84 values of its rows 0 to 12"):
        reader.read_rows(whole.key, (3,), 0, ROWS)


def test_damaged_piece_is_named(tmp_path: Path) -> None:
    entry = cut("decoder.layers.weight", random_tensor(1, ROWS, COLUMNS), (), (), ())
    reader = write(tmp_path / "checkpoint", entry)
    path = tmp_path / "checkpoint" / "__0_0.distcp"
    path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp cannot be read where decoder\.layers\.weight lies"):
        reader.read_rows(entry.key, (0,), 0, ROWS)


def test_fault_of_one_thread_stops_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_dist, "_NUM_THREADS", 2)
    asked = []

    def refuse(layer: int) -> None:
        asked.append(layer)
        # As long as a write takes, so that those that were not begun can be called off.
        time.sleep(0.01)
        raise OSError("no space left")

    pieces = tuple(Piece((layer, 0), (1, 3), lambda out, layer=layer: refuse(layer)) for layer in range(50))
    with pytest.raises(OSError, match="no space left"):
        write(tmp_path / "checkpoint", Entry("decoder.layers.weight", (50, 3), torch.float32, pieces))
    assert len(asked) < 50
