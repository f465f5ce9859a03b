"""Command line of ``tools/verify_conversion.py``. Starts its own ranks, unless torchrun did."""

from __future__ import annotations

import argparse
import dataclasses
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rmipo.checkpoint.facts import told_facts
from megatron_rmipo.checkpoint.flag_types import iteration_argument
from megatron_rmipo.checkpoint.hf.weights import load_hf_weights
from megatron_rmipo.checkpoint.megatron.directory import find_checkpoint
from megatron_rmipo.checkpoint.megatron.loading import load_checkpoint
from megatron_rmipo.checkpoint.megatron.record import AskedIteration, Iteration, read_record
from megatron_rmipo.checkpoint.source import adapter_record, source_at
from megatron_rmipo.checkpoint.verify import Agreement, compare_with_transformers
from megatron_rmipo.command import add_debug_flag, run_command
from megatron_rmipo.config.flags.parallel import ParallelConfig
from megatron_rmipo.config.pipeline_split import split_flag_problems, split_flags, split_problems
from megatron_rmipo.config.unknown_flags import flag_of
from megatron_rmipo.data.encoding.tokenize import load_tokenizer
from megatron_rmipo.errors import ConversionError, RmipoError
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.families.hf_config import read_architecture
from megatron_rmipo.model.build import build_chunks
from megatron_rmipo.model.megatron_config import transformer_config
from megatron_rmipo.model.packed_model import Chunks
from megatron_rmipo.model.problems.layout import latent_problems, tensor_sizes
from megatron_rmipo.runtime.groups import ProcessGroups, initialize_runtime, shutdown_runtime
from megatron_rmipo.runtime.rendezvous import Rendezvous
from megatron_rmipo.torchrun import Launch, read_launch

_DESCRIPTION = """\
Compare the logits of a Megatron model with those transformers computes from the Hugging Face model, on text, at a tensor,
pipeline and expert parallel size. A checkpoint that holds an adapter alone is compared with its base beneath it. Exit code
1 where they differ by more than --tolerance."""
_TEXTS = (
    "The capital of France is Paris, and the capital of Italy is Rome. What is the capital of Portugal?",
    "def add(a, b):\n    return a + b\n\nprint(add(2, 3))",
    "A preference pair holds a prompt, a response that was preferred and one that was not.",
)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_TOLERANCES = {"float32": 1e-4, "bfloat16": 0.5}
_RANDOM_TEXTS = 3
# Of the trainer's, those of the split of layers over stages.
_SPLIT_FLAGS = (
    "num_virtual_stages_per_pipeline_rank",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(prog="verify_conversion.py", description=_DESCRIPTION)
    parser.add_argument(
        "--hf-model",
        required=True,
        type=Path,
        metavar="DIR",
        help="what transformers loads; of an adapter's checkpoint the merged model",
    )
    parser.add_argument(
        "--load",
        type=Path,
        metavar="DIR",
        help="directory of Megatron checkpoints to compare (default: read --hf-model directly)",
    )
    parser.add_argument("--iteration", type=iteration_argument, metavar="N|best|release", help="which checkpoint of --load")
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1, metavar="TP")
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1, metavar="PP")
    for name in _SPLIT_FLAGS:
        field = ParallelConfig.__dataclass_fields__[name]
        kind: dict[str, Any] = {"action": "store_true"} if field.default is False else {"type": int, "metavar": "N"}
        parser.add_argument(flag_of(name), help=field.metadata["help"], **kind)
    parser.add_argument("--expert-model-parallel-size", type=int, default=1, metavar="EP")
    parser.add_argument("--text", type=Path, metavar="FILE", help="a text a line (default: three built-in sentences)")
    parser.add_argument(
        "--seq-length", type=int, default=512, help="longer texts are cut to this many tokens (default: %(default)s)"
    )
    parser.add_argument("--dtype", choices=tuple(_DTYPES), default="float32", help="dtype to compute in (default: %(default)s)")
    parser.add_argument(
        "--tolerance", type=float, help="largest difference of two logits (default: 1e-4 in float32, 0.5 in bfloat16)"
    )
    add_debug_flag(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    flags = build_parser().parse_args(argv)
    return run_command(lambda: _start(flags), debug=flags.debug)


def _start(flags: argparse.Namespace) -> None:
    launch = read_launch()
    arch = read_architecture(flags.hf_model)
    world_size = _check_layout(arch, flags, launch)
    texts = _read_texts(flags, arch)
    if world_size == 1 or launch.address:
        agreement = _verify(flags, arch, texts)
    else:
        agreement = _verify_on_ranks(flags, arch, texts, world_size)
    tolerance = _TOLERANCES[flags.dtype] if flags.tolerance is None else flags.tolerance
    if launch.rank == 0:
        _show(agreement, flags)
    if not agreement.max_difference <= tolerance:
        raise ConversionError(f"the logits differ by {agreement.max_difference:.3g}, more than --tolerance {tolerance:g}.")


def _verify(flags: argparse.Namespace, arch: ModelArchitecture, texts: list[Tensor]) -> Agreement:
    with Rendezvous() as rendezvous:
        rendezvous.compare(told_facts(vars(flags), rendezvous.launch.local_rank) | dataclasses.asdict(arch))
        groups = initialize_runtime(
            flags.tensor_model_parallel_size,
            flags.pipeline_model_parallel_size,
            expert_model_parallel_size=flags.expert_model_parallel_size,
            rendezvous=rendezvous,
        )
    try:
        dtype = _DTYPES[flags.dtype]
        config = transformer_config(arch, groups, dtype=dtype, parallel=_parallel(flags))
        policy = build_chunks(arch, config, groups)
        if flags.load is None:
            load_hf_weights(policy, flags.hf_model, arch, groups=groups)
        else:
            _load_checkpoint(policy, flags.load, flags.iteration, arch, groups)
        return compare_with_transformers(policy, flags.hf_model, texts, groups, dtype)
    finally:
        shutdown_runtime()


def _load_checkpoint(
    policy: Chunks, directory: Path, iteration: AskedIteration | None, arch: ModelArchitecture, groups: ProcessGroups
) -> None:
    """Load a checkpoint; where it holds an adapter alone, its base model before."""
    path, found = find_checkpoint(directory, iteration)
    record = read_record(path)
    if record is not None and record.adapter is not None:
        source = source_at(directory, found)
        assert source.base is not None
        assert source.adapters is not None
        # Refuses another base than the adapter was trained on.
        adapter_record(source, groups)
        base = source.base
        if base.hf_weights is not None:
            load_hf_weights(policy, base.hf_weights, arch, groups=groups)
        else:
            assert base.checkpoint is not None
            _load_weights(policy, base.checkpoint, base.iteration, groups)
        source.adapters.add_to(policy, arch, groups, seed=0)
    _load_weights(policy, directory, found, groups)


def _load_weights(policy: Chunks, directory: Path, iteration: Iteration | None, groups: ProcessGroups) -> None:
    load_checkpoint(directory, model=policy, optimizer=None, scheduler=None, load_rng=False, groups=groups, iteration=iteration)


def _verify_on_ranks(flags: argparse.Namespace, arch: ModelArchitecture, texts: list[Tensor], world_size: int) -> Agreement:
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    multiprocessing: Any = torch.multiprocessing
    ranks = multiprocessing.start_processes(
        _rank, (world_size, port, flags, arch, texts, results), nprocs=world_size, join=False, start_method="spawn"
    )
    while not ranks.join():
        pass
    outcome: Agreement | RmipoError = results.get()
    if isinstance(outcome, RmipoError):
        raise outcome
    return outcome


def _rank(
    rank: int,
    world_size: int,
    port: int,
    flags: argparse.Namespace,
    arch: ModelArchitecture,
    texts: list[Tensor],
    results: object,
) -> None:
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), **address)
    outcome: Agreement | RmipoError
    try:
        outcome = _verify(flags, arch, texts)
    except RmipoError as error:
        # The faults of a user, in the checkpoint or the files, are the same on every rank.
        outcome = error
    if rank == 0:
        results.put(outcome)  # type: ignore[attr-defined]


def _check_layout(arch: ModelArchitecture, flags: argparse.Namespace, launch: Launch) -> int:
    """The number of ranks, TP x PP x EP."""
    tp, pp, ep = flags.tensor_model_parallel_size, flags.pipeline_model_parallel_size, flags.expert_model_parallel_size
    widths = arch.mlp_widths + ((arch.experts.ffn_hidden_size,) if arch.experts else ())
    works = [size for size in tensor_sizes(arch) if not any(width % size for width in widths)]
    if tp not in works:
        raise ConversionError(
            f"--tensor-model-parallel-size {tp} does not divide the model's {arch.num_query_groups} key/value heads and "
            f"{' and '.join(map(str, dict.fromkeys(widths)))} feed-forward channels. Use one of {', '.join(map(str, works))}."
        )
    if pp < 1:
        raise ConversionError(f"--pipeline-model-parallel-size {pp}: must be at least 1.")
    parallel = _parallel(flags)
    for problem in (
        *latent_problems(arch, tp),
        *split_flag_problems(parallel),
        *split_problems(arch.num_layers, parallel),
    ):
        raise ConversionError(f"{problem}.")
    if arch.experts is None and ep != 1:
        raise ConversionError(f"--expert-model-parallel-size is {ep}, but the model has no experts. Leave it out.")
    num_experts = arch.experts.num_experts if arch.experts else 1
    if ep < 1 or num_experts % ep:
        raise ConversionError(
            f"--expert-model-parallel-size {ep} does not divide the model's {num_experts} experts. "
            f"Use one of {_divisors(num_experts)}."
        )
    world_size: int = tp * pp * ep
    if launch.address and launch.world_size != world_size:
        raise ConversionError(
            f"torchrun started {launch.world_size} ranks, but TP {tp} x PP {pp} x EP {ep} is {world_size}. Start it alone."
        )
    return world_size


def _parallel(flags: argparse.Namespace) -> ParallelConfig:
    names = ("tensor_model_parallel_size", "pipeline_model_parallel_size", *_SPLIT_FLAGS)
    return ParallelConfig(**{name: getattr(flags, name) for name in names})


def _divisors(number: int) -> str:
    return ", ".join(str(divisor) for divisor in range(1, number + 1) if number % divisor == 0)


def _read_texts(flags: argparse.Namespace, arch: ModelArchitecture) -> list[Tensor]:
    length = min(flags.seq_length, arch.longest_sequence)
    if length < 2:
        raise ConversionError(f"--seq-length {flags.seq_length} leaves nothing to compare. Use at least 2.")
    lines: Sequence[str] = _TEXTS
    if flags.text is not None:
        try:
            lines = [line for line in flags.text.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise ConversionError(f"--text {flags.text} cannot be read: {error}.") from error
        if not lines:
            raise ConversionError(f"--text {flags.text} is empty.")
    elif not any((flags.hf_model / name).exists() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        print(f"{flags.hf_model} holds no tokenizer: random token ids instead of text.")
        generator = torch.Generator().manual_seed(1234)
        return [torch.randint(arch.vocab_size, (min(length, 64),), generator=generator) for _ in range(_RANDOM_TEXTS)]
    tokenizer = load_tokenizer(str(flags.hf_model))
    texts = [torch.tensor(tokenizer.encode(line)[:length], dtype=torch.int64) for line in lines]
    for line, ids in zip(lines, texts, strict=True):
        if ids.numel() == 0 or int(ids.max()) >= arch.vocab_size:
            raise ConversionError(
                f"{flags.hf_model}: its tokenizer turns {line[:40]!r} into ids beyond a vocabulary of {arch.vocab_size}."
            )
    return texts


def _show(agreement: Agreement, flags: argparse.Namespace) -> None:
    source = "weights of --hf-model" if flags.load is None else f"{flags.load}"
    sizes = [f"TP {flags.tensor_model_parallel_size}", f"PP {flags.pipeline_model_parallel_size}"]
    layout = ", ".join([*sizes, *split_flags(_parallel(flags))])
    experts = f", EP {flags.expert_model_parallel_size}" if flags.expert_model_parallel_size > 1 else ""
    print(f"{source} against transformers on {flags.hf_model} ({layout}{experts}, {flags.dtype}), {agreement.num_tokens} tokens")
    print(f"  max |logit difference|  {agreement.max_difference:.3g}")
    print(f"  mean KL                 {agreement.mean_kl:.3g} nats")
    print(f"  top-1 agreement         {100 * agreement.top1:.2f} %")
