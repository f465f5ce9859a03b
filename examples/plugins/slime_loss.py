r"""Train with one of our objectives in slime, on pairs that tools/preprocess_preferences.py has written.

With this file on PYTHONPATH, beside slime's flags for model and checkpoints:

    RMIPO_PAIRS=data/pairs python train.py ... --debug-train-only --rollout-function-path slime_loss.generate_rollout \
        --loss-type custom_loss --custom-loss-function-path slime_loss.loss --disable-compute-advantages-and-returns \
        --rollout-batch-size 32 --n-samples-per-prompt 1 --global-batch-size 32 --micro-batch-size 4

Batch sizes count pairs, but --micro-batch-size, which counts samples, four a pair (two for objectives without log p(y)). An
objective with a reference takes --ref-load and --use-kl-loss in the place of --disable-compute-advantages-and-returns.
``python slime_loss.py`` calls the loss on a batch made up here.
"""

from __future__ import annotations

import importlib
import os
import types
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state

from megatron_rmipo.data.store.pair_store import PairStore, TokenizedPair
from megatron_rmipo.objectives.registry import build_objective
from megatron_rmipo.plugin.adapters.slime import ObjectiveLoss, samples_of_pair

OBJECTIVE = build_objective("rmipo", {})
# The tokenizer's BOS, or what begins every prompt.
CONTEXT_TOKEN_ID = 1

# What --custom-loss-function-path names.
loss = ObjectiveLoss(OBJECTIVE, tensor_parallel_group=parallel_state.get_tensor_model_parallel_group)


def generate_rollout(args: Any, rollout_id: int, data_buffer: Any, evaluation: bool = False) -> list[list[Any]]:
    """What --rollout-function-path names: the next pairs of the data set, each as the samples of one rollout id."""
    sample_type = importlib.import_module("slime.utils.types").Sample
    pairs = PairStore(os.environ["RMIPO_PAIRS"])
    first = rollout_id * args.rollout_batch_size
    groups = []
    for number in range(first, first + args.rollout_batch_size):
        samples = samples_of_pair(pairs[number % len(pairs)], OBJECTIVE, context_token_id=CONTEXT_TOKEN_ID)
        groups.append(
            [
                sample_type(
                    tokens=one.tokens,
                    response_length=one.response_length,
                    loss_mask=one.loss_mask,
                    rollout_id=number,
                    index=number * len(samples) + place,
                    reward=0.0,
                    status=sample_type.Status.COMPLETED,
                )
                for place, one in enumerate(samples)
            ]
        )
    return groups


def main() -> None:
    """Call the loss once on two pairs and random logits."""
    pair = TokenizedPair(np.array([1, 5, 6]), np.array([7, 8, 9]), np.array([7, 4]))
    samples = 2 * samples_of_pair(pair, OBJECTIVE, context_token_id=CONTEXT_TOKEN_ID)
    batch = {
        "unconcat_tokens": [torch.tensor(one.tokens) for one in samples],
        "total_lengths": [len(one.tokens) for one in samples],
        "response_lengths": [one.response_length for one in samples],
        "loss_masks": [torch.tensor(one.loss_mask) for one in samples],
        "ref_log_probs": [-3 * torch.ones(one.response_length) for one in samples],
    }
    logits = torch.randn(1, sum(batch["total_lengths"]), 11, generator=torch.Generator().manual_seed(0)).requires_grad_()
    one_rank = ObjectiveLoss(OBJECTIVE, tensor_parallel_group=lambda: None)
    value, metrics = one_rank(types.SimpleNamespace(), batch, logits, lambda values: values.sum())
    value.backward()
    print(f"{OBJECTIVE.name}: sums of 2 pairs: " + ", ".join(f"{name} {float(sum_):.3f}" for name, sum_ in metrics.items()))


if __name__ == "__main__":
    main()
