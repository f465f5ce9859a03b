"""What a stage of the example scripts was made from: its settings, the contents of its inputs, the stages before it.

python -m megatron_rmipo.stage_record RECORD --name STAGE [--made RESULT --remedy COMMAND] [--setting LINE ...]
    [--input NAME=PATH ...] [--tokenizer NAME=PATH ...] [--upstream STAGE=RECORD ...] [--read-only]

A file counts as the same where size and time are those noted, or else the digest is.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import glob
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_rmipo.command import add_debug_flag, run_command
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.whole_files import replace_file

# Files of a Hugging Face model directory that hold weights; a tokenizer does not depend on them.
_WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json")
# What lies beside them and is read by nobody here.
_IGNORED_SUFFIXES = (".md", ".bin", ".pt", ".pth", ".gguf")
_THREADS = 4
_SHOWN = 8


def describe_input(path: Path, known: dict[str, Any], *, weights: bool = True) -> dict[str, Any]:
    """Size, time and digest of a file, or of each file of a directory or pattern; the name alone where there is no such file.

    Args:
        path: a file, a directory, a pattern for files, or the name of a data set that is elsewhere.
        known: what was noted of it before. A file whose size and time are those noted is not read.
        weights: whether files of weights count.
    """
    files = _files_of(path)
    if not files:
        return {"name": str(path)}
    if not weights:
        files = {name: file for name, file in files.items() if not name.endswith(_WEIGHT_SUFFIXES)}
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda name: _describe_file(files[name], known.get("files", {}).get(name)), files)
        return {"name": str(path), "files": dict(zip(files, found, strict=True))}


def _files_of(path: Path) -> dict[str, Path]:
    if path.is_file():
        return {"": path}
    if path.is_dir():
        return dict(_files(path))
    matches = map(Path, sorted(glob.glob(str(path), recursive=True)))
    return {str(match / name): file for match in matches for name, file in _files_of(match).items()}


def _files(directory: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory)
        if path.is_file() and not any(part.startswith(".") for part in name.parts) and path.suffix not in _IGNORED_SUFFIXES:
            yield str(name), path


def _describe_file(path: Path, known: dict[str, Any] | None) -> dict[str, Any]:
    status = path.stat()
    stamp = {"bytes": status.st_size, "time_ns": status.st_mtime_ns}
    if known is not None and stamp.items() <= known.items():
        return known
    with path.open("rb") as stream:
        return {**stamp, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, str]]:
    """(then, now) of each thing that differs between two records, in words; "" where there was or is none."""
    settings = [(setting, "") for setting in then["settings"] if setting not in now["settings"]]
    settings += [("", setting) for setting in now["settings"] if setting not in then["settings"]]
    for name in sorted(then["inputs"].keys() | now["inputs"].keys()):
        settings += _input_differences(name, then["inputs"].get(name), now["inputs"].get(name))
    for stage in sorted(then["from"].keys() | now["from"].keys()):
        before, after = then["from"].get(stage), now["from"].get(stage)
        if before is None or after is None:
            settings.append((f"from {stage}" if before else "", f"from {stage}" if after else ""))
        else:
            settings += [
                (f"from {stage}: {one}" if one else "", f"from {stage}: {other}" if other else "")
                for one, other in differences(before, after)
            ]
    return settings


def _input_differences(name: str, then: dict[str, Any] | None, now: dict[str, Any] | None) -> list[tuple[str, str]]:
    if then is None or now is None or "files" not in then or "files" not in now:
        return [] if then == now else [(_named(name, then), _named(name, now))]
    before, after = then["files"], now["files"]
    return [
        (_in_words(name, then, file), _in_words(name, now, file))
        for file in sorted(before.keys() | after.keys())
        if before.get(file, {}).get("sha256") != after.get(file, {}).get("sha256")
    ]


def _named(name: str, record: dict[str, Any] | None) -> str:
    return "" if record is None else f"{name} {record['name']}" + ("" if "files" in record else " (no file there)")


def _in_words(name: str, record: dict[str, Any], file: str) -> str:
    path = os.path.join(record["name"], file) if file else record["name"]
    known = record["files"].get(file)
    return f"{name} {path}: " + (f"{known['bytes']} bytes, sha256 {known['sha256'][:12]}" if known else "no such file")


def check(record: Path, now: dict[str, Any], *, name: str, made: str, remedy: str, writes: bool) -> None:
    """Note what a stage is made from, or compare with what was noted when its result was made.

    Args:
        record: where it is noted.
        now: settings, inputs and the records of the stages before it.
        name: of the stage.
        made: its result, where there is one; "" before it is made.
        remedy: the command that removes it.
        writes: whether this node writes; the nodes share the directory.

    Raises:
        ConfigError: the result was made from something else.
    """
    if made and record.is_file():
        found = differences(json.loads(record.read_text(encoding="utf-8")), now)
        if found:
            pairs = [zip(("then:", "now: "), pair, strict=True) for pair in found[:_SHOWN]]
            lines = [f"  {when} {text}" for pair in pairs for when, text in pair if text]
            more = [f"  and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
            raise ConfigError(
                "\n".join([f"{name}: {made} was made with other settings, or from something else:", *lines, *more])
                + f"\nSet WORK_DIR to another directory, or make it again: {remedy}"
            )
    if writes and (record.is_file() or not made):
        # Never half a record. Times may have changed where contents have not.
        replace_file(record, [json.dumps(now, indent=1)])


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m megatron_rmipo.stage_record", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("record", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--made", default="")
    parser.add_argument("--remedy", default="")
    parser.add_argument("--setting", action="append", default=[])
    parser.add_argument("--input", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--tokenizer", action="append", default=[], metavar="NAME=PATH", help="without weights")
    parser.add_argument("--upstream", action="append", default=[], metavar="STAGE=RECORD")
    parser.add_argument("--read-only", action="store_true", help="compare alone, as nodes beside the first do")
    add_debug_flag(parser)
    flags = parser.parse_args(argv)

    def run() -> None:
        try:
            compare()
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{flags.name}: {error}. It cannot be known what the stage is made from; mend that file."
            ) from error

    def compare() -> None:
        known = json.loads(flags.record.read_text(encoding="utf-8"))["inputs"] if flags.record.is_file() else {}
        inputs = {}
        for given, weights in ((flags.input, True), (flags.tokenizer, False)):
            for name, _, path in (text.partition("=") for text in given):
                inputs[name] = describe_input(Path(path).expanduser(), known.get(name, {}), weights=weights)
        upstream = {
            stage: json.loads(Path(path).read_text(encoding="utf-8"))
            for stage, _, path in (text.partition("=") for text in flags.upstream)
            if Path(path).is_file()
        }
        now = {"settings": flags.setting, "inputs": inputs, "from": upstream}
        check(flags.record, now, name=flags.name, made=flags.made, remedy=flags.remedy, writes=not flags.read_only)

    return run_command(run, debug=flags.debug)


if __name__ == "__main__":
    from megatron_rmipo.entry import stage_record

    raise SystemExit(stage_record())
