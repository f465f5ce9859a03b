"""Command line of ``tools/plan_layout.py``: which layout of a model on some machines is best."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from megatron_rmipo.command import add_debug_flag, run_command
from megatron_rmipo.config.flags.lora import LoraConfig, lora_problems
from megatron_rmipo.config.flags.planning import PlanningConfig
from megatron_rmipo.config.schema import Config, DataConfig, ModelConfig, TrainingConfig
from megatron_rmipo.config.values import field_types
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.model.lora.numbers import describe_trained
from megatron_rmipo.objectives.arguments import add_objective_arguments, objective_of_arguments
from megatron_rmipo.planning.hardware import GPUS, read_cluster
from megatron_rmipo.planning.lengths import PairLengths, equal_lengths, read_lengths
from megatron_rmipo.planning.plan import Plan, Planner, make_plan
from megatron_rmipo.planning.report import describe_plan
from megatron_rmipo.planning.shapes import read_shape, shape_names
from megatron_rmipo.planning.workload import Workloads

# Pairs of an epoch where lengths are given as numbers: those of UltraFeedback's binarized training set.
DEFAULT_PAIRS = 61135


def build_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The flags; those of the objective depend on which it is."""
    parser = argparse.ArgumentParser(
        prog="plan_layout.py",
        # All flags of objectives would fill the screen above the word on what is wrong.
        usage="plan_layout.py --hf-model DIR|FILE|NAME (--data PREFIX|FILE | --lengths P,C,R) --gpus N [flags, see --help]",
        allow_abbrev=False,
        description="Find the layout with which a model trains fastest on some machines, by estimate; none of them is needed.",
    )
    parser.add_argument(
        "--hf-model",
        required=True,
        metavar="DIR|FILE|NAME",
        help=f"model directory, its config.json, or one of {', '.join(shape_names())}",
    )
    lengths = parser.add_mutually_exclusive_group(required=True)
    lengths.add_argument(
        "--data", metavar="PREFIX|FILE", help="prepared pairs, or a .csv of their lengths with columns prompt,chosen,rejected"
    )
    lengths.add_argument("--lengths", metavar="P,C,R", help="all pairs have so many tokens: prompt,chosen,rejected")
    parser.add_argument(
        "--num-pairs", type=int, help=f"pairs of an epoch (default: those of --data; {DEFAULT_PAIRS} with --lengths)"
    )
    parser.add_argument("--gpus", type=int, required=True, help="GPUs of all nodes")
    parser.add_argument("--nodes", type=int, help="nodes that they are in (default: 8 GPUs a node)")
    parser.add_argument("--gpu", type=str.lower, choices=sorted(GPUS), help="kind of GPU (default: h100)")
    parser.add_argument("--gpu-memory-gb", type=float, help="GB of memory of a GPU (default: what its kind has)")
    parser.add_argument(
        "--interconnect",
        metavar="LINKS",
        help="links within a node and between nodes, the latter's Gbit/s for each GPU (default: nvlink,ib400)",
    )
    for section, name in ((TrainingConfig, "global_batch_size"), (DataConfig, "seq_length")):
        field = next(field for field in dataclasses.fields(section) if field.name == name)
        text = f"{field.metadata['help']} (default: {field.default})"
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=field.default, help=text)
    _add_adapter_flags(parser)
    parser.add_argument("--show", type=int, default=5, metavar="N", help="other layouts that are told of (default: %(default)s)")
    add_debug_flag(parser)
    add_objective_arguments(parser, argv)
    return parser


# Of an adapter what says how large it is and what a run with it does; the others need files, or change neither memory nor time.
_ADAPTER_FLAGS = (
    *("lora_rank", "lora_target_modules", "lora_target_regex", "use_dora", "lora_modules_to_save", "lora_experts"),
    "quantize_base",
)


def _add_adapter_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group((LoraConfig.__doc__ or "").splitlines()[0].rstrip("."))
    kinds = field_types(LoraConfig)
    for field in dataclasses.fields(LoraConfig):
        if field.name not in _ADAPTER_FLAGS:
            continue
        kind, settings = kinds[field.name], dict[str, Any]()
        if kind.base is bool:
            settings["action"] = "store_true"
        else:
            settings |= {"type": kind.base, "choices": kind.choices or None, "metavar": field.metadata["metavar"]}
            settings |= {"nargs": "+"} if kind.is_list else {}
        text = field.metadata["help"].replace("%", "%%")
        group.add_argument(f"--{field.name.replace('_', '-')}", default=field.default, help=text, **settings)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: print(describe_plan(*find_plan(arguments))), debug="--debug" in arguments)


def find_plan(arguments: Sequence[str]) -> tuple[Plan, str, int]:
    """The plan that a command line asks for, what it is for in words, and the pairs of an epoch.

    Raises:
        RmipoError: a flag has a value that it cannot have, the model or the data cannot be read, or nothing fits.
    """
    values = vars(build_parser(arguments).parse_args(arguments))
    for name in ("gpus", "nodes", "num_pairs", "global_batch_size", "show", "gpu_memory_gb"):
        if values[name] is not None and values[name] <= 0:
            raise ConfigError(f"--{name.replace('_', '-')} {values[name]}: must be greater than 0.")
    if values["seq_length"] < 2:
        raise ConfigError(f"--seq-length {values['seq_length']}: must be at least 2.")
    names = [field.name for field in dataclasses.fields(PlanningConfig) if field.name in values]
    planning = PlanningConfig(**{name: values[name] for name in names})
    cluster = read_cluster(planning, values["gpus"])
    arch, objective = read_shape(values["hf_model"]), objective_of_arguments(values)
    base = Config(
        model=ModelConfig(bf16=True),
        data=DataConfig(seq_length=values["seq_length"]),
        training=TrainingConfig(global_batch_size=values["global_batch_size"]),
        lora=LoraConfig(**{name: values[name] for name in _ADAPTER_FLAGS}),
    )
    if problems := list(lora_problems(base.lora)):
        raise ConfigError("\n".join(problems))
    lengths = _lengths(values).shortened(values["seq_length"])
    plan = make_plan(Planner(arch, base, Workloads(arch, objective.needs, lengths)), cluster, num_others=values["show"])
    trained = f"\n{describe_trained(arch, base.lora)}" if base.lora.is_on else ""
    return plan, f"{values['hf_model']}, {values['objective']}, {lengths}{trained}", lengths.num_pairs


def _lengths(values: dict[str, Any]) -> PairLengths:
    if values["lengths"] is not None:
        return equal_lengths(values["lengths"], values["num_pairs"] or DEFAULT_PAIRS)
    return read_lengths(values["data"], values["num_pairs"])
