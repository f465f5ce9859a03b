"""Writes the inputs of the embedded default to a directory."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from megatron_rmipo.command import run_command
from megatron_rmipo.embedded.model import SHAPES, save_model
from megatron_rmipo.embedded.pairs import Row, make_rows, tokenizer_texts
from megatron_rmipo.embedded.tokenizer import save_tokenizer, train_sentencepiece
from megatron_rmipo.errors import ConfigError

VOCAB_SIZE = 1024
TOKENIZER_TEXTS = 1500


def make_inputs(
    directory: Path, *, seed: int, num_supervised: int, num_train: int, num_held_out: int, shape: str = "llama3"
) -> None:
    """Write ``model/`` (config, safetensors, tokenizer) and ``sft.jsonl``, ``train.jsonl``, ``heldout.jsonl``.

    The directory appears whole or not at all; the same arguments write the same bytes.

    Raises:
        ConfigError: the directory exists and holds something, or cannot be written.
    """
    if directory.exists() and any(directory.iterdir()):
        raise ConfigError(f"--output {directory}: exists and is not empty. Remove it, or name another directory.")
    unfinished = directory.with_name(directory.name + ".incomplete")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        supervised, train, held_out = make_rows(num_supervised, num_train, num_held_out, seed)
        for name, rows in (("sft", supervised), ("train", train), ("heldout", held_out)):
            _write_rows(unfinished / f"{name}.jsonl", rows)
        texts = [*tokenizer_texts(TOKENIZER_TEXTS, seed), "system", "user", "assistant"]
        tokenizer = save_tokenizer(train_sentencepiece(texts, VOCAB_SIZE), unfinished / "model")
        save_model(unfinished / "model", tokenizer, seed, shape)
        if directory.exists():
            directory.rmdir()
        os.replace(unfinished, directory)
    except OSError as error:
        raise ConfigError(f"--output {directory}: cannot be written: {error.strerror}.") from error


def _write_rows(path: Path, rows: Sequence[Row]) -> None:
    path.write_text("".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="directory to make; must not hold anything yet")
    parser.add_argument("--seed", type=int, default=1, help="of the text and the weights (default: %(default)s)")
    parser.add_argument(
        "--shape", choices=SHAPES, default="llama3", help="the model whose architecture the small one has (default: %(default)s)"
    )
    parser.add_argument("--sft-rows", type=int, default=8192, help="supervised examples (default: %(default)s)")
    parser.add_argument("--train-pairs", type=int, default=2048, help="preference pairs to train on (default: %(default)s)")
    parser.add_argument("--heldout-pairs", type=int, default=512, help="preference pairs held out (default: %(default)s)")
    arguments = parser.parse_args(argv)
    for name in ("sft_rows", "train_pairs", "heldout_pairs"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, not {getattr(arguments, name)}")

    def generate() -> None:
        make_inputs(
            arguments.output,
            seed=arguments.seed,
            num_supervised=arguments.sft_rows,
            num_train=arguments.train_pairs,
            num_held_out=arguments.heldout_pairs,
            shape=arguments.shape,
        )
        print(f"wrote {arguments.output}: model/, sft.jsonl, train.jsonl, heldout.jsonl")

    return run_command(generate)
