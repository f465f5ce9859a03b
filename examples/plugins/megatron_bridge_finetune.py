"""Preference optimization by Megatron-Bridge's ``finetune``, from a Hugging Face model and prepared pairs.

torchrun --nproc-per-node 8 examples/plugins/megatron_bridge_finetune.py --load-hf MODEL_DIR --data-path data/pairs \
    --save runs/bridge --objective rmipo --train-iters 400 --tensor-model-parallel-size 4 --sequence-parallel

Needs Megatron-Bridge 0.6.2 (Python 3.12, CUDA). Pairs are prepared by tools/preprocess_preferences.py. Started again with the
same flags it goes on from the latest checkpoint in --save.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megatron_rmipo.errors import ConfigError, RmipoError


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """What the example lets one choose; everything else is a field of the configuration that ``configure`` returns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load-hf", required=True, metavar="MODEL_DIR", help="Hugging Face model, with its tokenizer.")
    parser.add_argument("--data-path", required=True, nargs="+", metavar="PREFIX", help="Prepared pairs.")
    parser.add_argument("--valid-data-path", nargs="+", default=[], metavar="PREFIX", help="Held-out pairs.")
    parser.add_argument("--save", required=True, metavar="DIR", help="Where checkpoints go.")
    parser.add_argument("--objective", default="rmipo", help="As python -m megatron_rmipo.objectives lists them.")
    parser.add_argument("--train-iters", type=int, required=True, help="Optimizer steps.")
    parser.add_argument("--global-batch-size", type=int, default=128, help="Pairs of a step.")
    parser.add_argument("--micro-batch-size", type=int, default=1, help="Pairs of a row on average.")
    parser.add_argument("--lr", type=float, help="Peak learning rate; unset: the objective's own.")
    parser.add_argument("--eval-iters", type=int, default=0, help="Batches of --valid-data-path that are evaluated.")
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1, help="Tensor parallel size.")
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1, help="Pipeline parallel size.")
    parser.add_argument("--sequence-parallel", action="store_true", help="Shard norms and residuals along the row.")
    parser.add_argument("--lora-rank", type=int, help="Train an adapter of this rank; unset: all weights.")
    return parser.parse_args(arguments)


def train(arguments: argparse.Namespace) -> None:
    """Train. Called by every rank.

    Raises:
        RmipoError: Megatron-Bridge is not there, or what does not go together, by name.
    """
    # This looks for the package first.
    from megatron_rmipo.plugin.adapters.megatron_bridge import PreferenceData, PreferenceFinetune

    # isort: split
    from megatron.bridge.peft.lora import LoRA
    from megatron.bridge.training.finetune import finetune

    from megatron_rmipo.plugin.adapters.megatron_bridge_recipe import rmipo_finetune_config

    config = rmipo_finetune_config(
        arguments.load_hf,
        PreferenceData(objective=arguments.objective, data_path=arguments.data_path, valid_data_path=arguments.valid_data_path),
        save=arguments.save,
        train_iters=arguments.train_iters,
        global_batch_size=arguments.global_batch_size,
        micro_batch_size=arguments.micro_batch_size,
        lr=arguments.lr,
        tensor_model_parallel_size=arguments.tensor_model_parallel_size,
        pipeline_model_parallel_size=arguments.pipeline_model_parallel_size,
        sequence_parallel=arguments.sequence_parallel,
        eval_iters=arguments.eval_iters,
        peft=LoRA(dim=arguments.lora_rank, alpha=arguments.lora_rank) if arguments.lora_rank else None,
    )
    step = PreferenceFinetune()
    finetune(config, step, callbacks=[step])


def main(arguments: Sequence[str]) -> int:
    """Train, or say what is missing; the exit code."""
    try:
        train(parse(arguments))
    except RmipoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
