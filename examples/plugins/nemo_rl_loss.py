r"""Train with one of our objectives in NeMo-RL's DPO.

In a checkout of NeMo-RL, with this package in the driver's and the workers' environments:

    python nemo_rl_loss.py --objective rmipo --context-token-id 128000 \
        --run examples/run_dpo.py --config examples/configs/dpo.yaml +policy.logprob_batch_size=4

Without ``--run`` it calls the loss on a batch made up here.
"""

from __future__ import annotations

import argparse
import enum
import importlib
import runpy
import sys
import types
from typing import Any

import torch

from megatron_rmipo.objectives.base import Objective
from megatron_rmipo.objectives.registry import build_objective
from megatron_rmipo.plugin.adapters.nemo_rl import ObjectiveBatches, ObjectiveLoss


def put_in(dpo: Any, objective: Objective, context_token_id: int | None) -> None:
    """Put the objective into NeMo-RL's module ``nemo_rl.algorithms.dpo``, where its loss and its batches are made."""
    dpo.DPOLossFn = lambda config, **options: ObjectiveLoss(objective, **options)
    dpo.add_ref_logprobs_to_data = ObjectiveBatches(objective, dpo.add_ref_logprobs_to_data, context_token_id=context_token_id)


def call_once(objective: Objective) -> None:
    """The loss on two pairs of random log-probs, with a stand-in for what NeMo-RL defines."""
    interfaces: Any = types.ModuleType("nemo_rl.algorithms.loss.interfaces")
    interfaces.LossType = enum.Enum("LossType", "TOKEN_LEVEL SEQUENCE_LEVEL")
    interfaces.LossInputType = enum.Enum("LossInputType", "LOGIT LOGPROB")
    sys.modules[interfaces.__name__] = interfaces
    generator = torch.Generator().manual_seed(0)
    logprobs = (-3 * torch.rand(4, 9, generator=generator)).requires_grad_()
    rows = {
        "input_ids": torch.randint(3, 99, (4, 10), generator=generator),
        "input_lengths": torch.full((4,), 10),
        "token_mask": (torch.arange(10) >= 4).long().expand(4, 10),
        "sample_mask": torch.ones(4),
    }
    policy: Any = types.SimpleNamespace(
        sharding_annotations=None, get_logprobs=lambda data: {"logprobs": -4 * torch.ones(data["input_ids"].shape)}
    )
    policy.get_reference_policy_logprobs = lambda data: {"reference_logprobs": policy.get_logprobs(data)["logprobs"]}

    def add_reference(batches: Any, policy: Any, config: Any, is_val: bool = False) -> Any:
        for batch in batches:
            batch["reference_policy_logprobs"] = policy.get_reference_policy_logprobs(batch)["reference_logprobs"]
            yield batch

    config = types.SimpleNamespace(policy={"logprob_batch_size": 4})
    (batch,) = ObjectiveBatches(objective, add_reference, context_token_id=1)([rows], policy, config)
    loss, metrics = ObjectiveLoss(objective)(logprobs, batch, torch.tensor(4), torch.tensor(24))
    loss.backward()
    print(f"{objective.name}: loss {loss.item():.4f}, " + ", ".join(f"{name} {value:.3f}" for name, value in metrics.items()))


def main() -> None:
    """Call the loss once, or run NeMo-RL's script with it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objective", default="rmipo", help="a name, as --objective of megatron_rmipo.train takes it")
    parser.add_argument("--context-token-id", type=int, help="the tokenizer's BOS, or what begins every prompt")
    parser.add_argument("--run", help="NeMo-RL's script, which gets all other arguments")
    arguments, further = parser.parse_known_args()
    objective = build_objective(arguments.objective, {})
    if arguments.run is None:
        call_once(objective)
        return
    put_in(importlib.import_module("nemo_rl.algorithms.dpo"), objective, arguments.context_token_id)
    sys.argv = [arguments.run, *further]
    runpy.run_path(arguments.run, run_name="__main__")


if __name__ == "__main__":
    main()
