"""Train with one of our objectives in TRL's DPOTrainer.

``pip install -e '.[trl]'``, then ``python examples/plugins/trl_trainer.py``, which makes a small model and pairs of its own;
``--model DIR --data FILE.jsonl`` takes yours (prompt, chosen, rejected).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from megatron_rmipo.embedded.generate import make_inputs
from megatron_rmipo.objectives.registry import build_objective
from megatron_rmipo.plugin.adapters.trl import ObjectiveTrainer


class RmipoTrainer(ObjectiveTrainer, DPOTrainer):
    """DPOTrainer with the loss of an objective."""


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--objective", default="rmipo", help="a name, as --objective of megatron_rmipo.train takes it")
    parser.add_argument("--model", help="a checkpoint of transformers")
    parser.add_argument("--data", help="jsonl with prompt, chosen, rejected")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--output", default="runs/trl")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.model is None or arguments.data is None:
            make_inputs(Path(folder) / "inputs", seed=1, num_supervised=1, num_train=96, num_held_out=1)
        model_path = arguments.model or f"{folder}/inputs/model"
        tokenizer = AutoTokenizer.from_pretrained(model_path)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        trainer = RmipoTrainer(
            model=AutoModelForCausalLM.from_pretrained(model_path, dtype="float32"),
            objective=build_objective(arguments.objective, {}),
            processing_class=tokenizer,
            train_dataset=load_dataset("json", data_files=arguments.data or f"{folder}/inputs/train.jsonl", split="train"),
            args=DPOConfig(
                output_dir=arguments.output,
                max_steps=arguments.steps,
                per_device_train_batch_size=4,
                gradient_accumulation_steps=2,
                learning_rate=1e-4,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                bf16=False,
            ),
        )
        trainer.train()


if __name__ == "__main__":
    main()
