"""A line for each checkpoint of a directory, and an exit code."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from megatron_rmipo.checkpoint.megatron.directory import TRACKER_NAME
from megatron_rmipo.checkpoint.verify_checkpoint_cli import main as verify
from tests.checkpoint.models import flip_bit, write_checkpoint, write_hf_model


@pytest.mark.parametrize(("spoil", "words"), [(None, "no digests"), ("flip", "does not have its checksum")])
def test_verify_tells_of_every_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: str | None, words: str
) -> None:
    hf = write_hf_model(tmp_path / "hf", "llama32_tied")
    for iteration in (4, 8):
        path = write_checkpoint(tmp_path / "run", iteration, hf)
    assert verify([str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.count("digests right") == 2
    flip_bit(path / "hf" / "config.json")
    assert verify([str(tmp_path / "run")]) == 1
    assert verify([str(tmp_path / "run"), "--iteration", "4"]) == 0
    said = capsys.readouterr()
    assert re.search(r"iter_0000004: complete, readable, \d+ files of 0.0 MiB, digests right", said.out)
    assert "iter_0000008: NOT WHOLE:" in said.out
    assert "hf/config.json does not hold what was written" in said.out
    assert "1 of 2 checkpoints" in said.err
    # Without digests the archives have checksums of their own.
    record = json.loads((path / "rmipo.json").read_text())
    for name in ("digest", "digests", "written_by"):
        del record[name]
    (path / "rmipo.json").write_text(json.dumps({**record, "format_version": 1}))
    if spoil:
        data = bytearray((path / "__0_0.distcp").read_bytes())
        at = data.index(torch.randn((3, 5, 7), generator=torch.Generator().manual_seed(8))[0, 1].numpy().tobytes())
        data[at] ^= 1
        (path / "__0_0.distcp").write_bytes(data)
    assert verify([str(tmp_path / "run"), "--iteration", "8"]) == (1 if spoil else 0)
    assert words in capsys.readouterr().out
    (tmp_path / "run" / TRACKER_NAME).write_text("5")
    assert verify([str(tmp_path / "run")]) == 1
    assert "names 5, which is not there" in capsys.readouterr().err
