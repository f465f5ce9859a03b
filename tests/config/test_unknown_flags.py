"""What people who come from other trainers are told of the flags they bring along."""

from __future__ import annotations

import re

import pytest

from megatron_rmipo.config.schema import Config
from megatron_rmipo.config.unknown_flags import _ANSWERS, _INSTEAD
from megatron_rmipo.config.values import field_types
from megatron_rmipo.data.preparing.preprocess_cli import build_parser
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.objectives.arguments import parse_arguments
from megatron_rmipo.objectives.registry import OBJECTIVES

OURS = set(Config().to_flat_dict()) | {name for objective in OBJECTIVES.values() for name in field_types(objective.Config)}


def refusal(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_arguments(argv)
    return str(caught.value)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--learning_rate 5e-7", ["--learning-rate: ", "use --lr"]),
        ("--per_device_train_batch_size 2", ["--global-batch-size", "--tokens-per-microbatch"]),
        ("--gradient_accumulation_steps 16", ["--global-batch-size"]),
        ("--num_train_epochs 1", ["use --epochs"]),
        ("--model_name_or_path meta-llama/Meta-Llama-3-8B", ["use --load-hf DIR"]),
        ("--output_dir out", ["--save DIR", "--save-hf DIR"]),
        ("--warmup_ratio 0.1", ["use --lr-warmup-fraction"]),
        ("--max_length 2048", ["use --seq-length"]),
        ("--deepspeed ds.json", ["--tensor-model-parallel-size", "--use-distributed-optimizer"]),
        ("--loss_type simpo", ["use --objective NAME"]),
        ("--use-megatron-fsdp", ["checkpoints and exports do not know its shards", "--use-distributed-optimizer"]),
        ("--max-restarts 3", ["of torchrun", "before -m megatron_rmipo.train"]),
        ("--micro-batch-size 1", ["--tokens-per-microbatch"]),
        ("--num-layers 32", ["the architecture comes with the model"]),
        ("--tokenizer-type HuggingFaceTokenizer", ["the tokenizer comes with the model"]),
        ("--no-masked-softmax-fusion", ["--transformer-impl"]),
    ],
)
def test_flags_of_other_trainers_are_answered_with_ours(argv: str, words: list[str]) -> None:
    message = refusal(*argv.split())
    assert all(word in message for word in ["not a flag here", *words]), message


def test_a_whole_command_line_of_another_trainer_is_answered_at_once() -> None:
    message = refusal("--model_name_or_path", "M", "--learning_rate=5e-7", "--bf16", "True", "--max_steps", "9", "--lr", "fast")
    # What is no flag is told first, all of it; what is wrong with values then.
    assert message.count("\n  - ") == 4


def test_the_table_names_no_flag_that_exists_and_recommends_none_that_does_not() -> None:
    names = [name for names in _ANSWERS.values() for name in names.split()]
    assert len(names) == len(_INSTEAD), sorted(name for name in names if names.count(name) > 1)
    assert not OURS & _INSTEAD.keys()
    tools = {option for action in build_parser()._actions for option in action.option_strings}
    recommended = {flag for answer in _ANSWERS for flag in re.findall(r"--[a-z0-9-]+", answer)}
    assert not {flag for flag in recommended if flag[2:].replace("-", "_") not in OURS and flag not in tools}
