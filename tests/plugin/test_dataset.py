"""A DataLoader of one's own and a model of one's own class, trained by PreferenceStep on dicts and on padded micro-batches."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_rmipo.data.store.collection import PairCollection
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.objectives.base import PairLogps
from megatron_rmipo.objectives.registry import OBJECTIVES, build_objective
from megatron_rmipo.plugin.batches import preference_batches
from megatron_rmipo.plugin.dataset import PreferenceCollator, PreferenceDataset, given_rows
from megatron_rmipo.plugin.step import PreferenceStep
from megatron_rmipo.runtime.groups import initialize_runtime, shutdown_runtime
from tests.harness import run_distributed
from tests.integration.problem import BOS, VOCAB, collection, make_pairs, values_beside

NAMES = ("rmipo", "simpo", "dpo", "sft")
PADDED_VOCAB, HIDDEN, PAIRS_EACH, NUM_MICROBATCHES = 88, 24, 5, 5


class Recurrent(MegatronModule):
    """Somebody's own model: tokens pass a state on to the next, as no attention does, and logits come out whole."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.model_type = ModelType.encoder_or_decoder
        torch.manual_seed(4)
        self.embedding = torch.nn.Embedding(PADDED_VOCAB, HIDDEN)
        self.cell = torch.nn.GRU(HIDDEN, HIDDEN, batch_first=True)
        self.head = torch.nn.Linear(HIDDEN, PADDED_VOCAB)

    def forward(self, tokens: Tensor, position_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        assert attention_mask is None
        hidden, _ = self.cell(self.embedding(tokens) + torch.sin(position_ids.to(self.head.weight.dtype))[..., None])
        logits: Tensor = self.head(hidden)
        return logits

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Of one stage, there is nothing to set."""


def build() -> DistributedDataParallel:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=1,
        use_cpu_initialization=True,
        calculate_per_token_loss=True,
        finalize_model_grads_func=finalize_model_grads,
    )
    return DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), Recurrent(config))


def pairs_with_reference() -> PairCollection:
    pairs = collection(make_pairs())
    pairs.reference_scores = [np.random.default_rng(3).normal(-20, 4, (len(pairs), 2)).astype(np.float32)]
    return pairs


def dense(name: str) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients in float64, a sequence at a time."""
    model = build().module.double()
    pairs, objective = pairs_with_reference(), build_objective(name, {})

    def score(context: np.ndarray, response: np.ndarray) -> Tensor:
        ids = torch.from_numpy(np.concatenate([context, response]))[None]
        logits = model(ids[:, :-1], torch.arange(ids.shape[1] - 1)[None], None)[0, :, :VOCAB]
        return torch.log_softmax(logits, -1).gather(-1, ids[0, 1:, None])[len(context) - 1 :].sum()

    bos, lengths = np.array([BOS]), torch.from_numpy(pairs.lengths_of(np.arange(len(pairs)))[:, 1:]).double()
    table = torch.stack([torch.stack([score(p.prompt, y) for y in (p.chosen, p.rejected)]) for p in pairs])
    alone = torch.stack([torch.stack([score(bos, y) for y in (p.chosen, p.rejected)]) for p in pairs]).detach()
    reference = torch.from_numpy(pairs.scores_of(np.arange(len(pairs)))).double()
    fields = {}
    for prefix, sums in (("", table), ("uncond_", alone), ("ref_", reference)):
        fields.update({f"{prefix}chosen_logps": sums[:, 0], f"{prefix}rejected_logps": sums[:, 1]})
    for prefix in ("", "uncond_"):
        fields.update({f"{prefix}chosen_lengths": lengths[:, 0], f"{prefix}rejected_lengths": lengths[:, 1]})
    loss = objective(PairLogps(**fields, mean_chosen_length=lengths[:, 0].mean())).losses.mean()
    loss.backward()
    return float(loss.detach()), {key: parameter.grad for key, parameter in model.named_parameters()}


def train(name: str, kind: str) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a step over all pairs, on dicts of a DataLoader or on padded micro-batches."""
    pairs, objective, model = pairs_with_reference(), build_objective(name, {}), build()
    if kind == "dicts":
        dataset = PreferenceDataset(pairs, objective)
        collate = PreferenceCollator(dataset, vocab_size=VOCAB, context_token_id=BOS)
        batches: Iterator[Any] = iter(torch.utils.data.DataLoader(dataset, PAIRS_EACH, collate_fn=collate))
    else:
        batches = preference_batches(
            pairs, objective, global_batch_size=len(pairs), num_microbatches=NUM_MICROBATCHES, layout="padded", vocab_size=VOCAB,
            context_token_id=BOS,
        )  # fmt: skip
    model.zero_grad_buffer()
    step = PreferenceStep(objective)
    reports = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=batches,
        model=[model],
        num_microbatches=NUM_MICROBATCHES,
        seq_length=1,
        micro_batch_size=1,
        forward_only=False,
    )
    total, count = torch.stack([report["loss"] for report in reports]).sum(0).tolist()
    assert count == len(pairs)
    if kind == "dicts":
        with pytest.raises(ConfigError, match="dicts belong to no batch"):
            step.after_step()
    return total / count, {key: parameter.main_grad for key, parameter in model.module.named_parameters()}


def train_all() -> dict[tuple[str, str], Any]:
    initialize_runtime()
    found = {(name, kind): train(name, kind) for name in NAMES for kind in ("dicts", "padded")}
    found |= {(name, "dense"): dense(name) for name in NAMES}
    shutdown_runtime()
    return found


@pytest.mark.dist
def test_a_model_of_ones_own_class_gives_the_dense_answer() -> None:
    found = run_distributed(train_all, 1)[0]
    for name in NAMES:
        loss, gradients = found[name, "dense"]
        for kind in ("dicts", "padded"):
            own_loss, own_gradients = found[name, kind]
            assert own_loss == pytest.approx(loss, rel=1e-5), (name, kind)
            for key, gradient in gradients.items():
                error = (own_gradients[key].double() - gradient).norm() / gradient.norm()
                assert error < 1e-4, (name, kind, key)


def test_items_and_micro_batches() -> None:
    pairs = pairs_with_reference()
    objective = build_objective("dpo", {"pair_beta": True})
    dataset = PreferenceDataset(pairs, objective)
    item = dataset[5]
    assert item["prompt"].tolist() == make_pairs()[5].prompt.tolist()
    assert item["reference_logps"].tolist() == pairs.scores_of(np.array([5]))[0].tolist()  # type: ignore[index]
    assert item["columns/beta"] == pytest.approx(values_beside(24)[5, 0])
    collate = PreferenceCollator(dataset, vocab_size=VOCAB, multiple_of=4)
    given = collate([dataset[number] for number in (5, 2, 9)])
    assert sorted(given) == sorted(
        ["tokens", "labels", "loss_mask", "position_ids", "vocab_size", "mean_chosen_length", "reference_logps", "columns/beta"]
    )
    assert given["tokens"].shape[0] == 6
    assert given["tokens"].shape[1] % 4 == 0
    rows, known = given_rows(given, objective)
    assert rows.lengths.view(-1, 2).tolist() == dataset.lengths[[5, 2, 9], 1:].tolist()
    assert known.columns["beta"].tolist() == values_beside(24)[[5, 2, 9], 0].tolist()
    assert float(known.mean_chosen_length) == pytest.approx(dataset.mean_chosen_length)
    sft = PreferenceDataset(pairs, build_objective("sft", {}))
    assert PreferenceCollator(sft, vocab_size=VOCAB)([sft[0], sft[1]])["tokens"].shape[0] == 2
    rmipo = PreferenceDataset(pairs, build_objective("rmipo", {}))
    assert PreferenceCollator(rmipo, vocab_size=VOCAB)([rmipo[0], rmipo[1]])["tokens"].shape[0] == 8


def test_what_dicts_do_not_tell_is_refused_by_name() -> None:
    whole = {"kto", "alpha_dpo", "beta_dpo", "bco_pair", "aot_pair", "epsilon_dpo", "amapo", "gamma_po"}
    for name in OBJECTIVES:
        objective = build_objective(name, {})
        if name in whole:
            with pytest.raises(ConfigError, match=f"objective {name} reads .*preference_batches"):
                PreferenceDataset(pairs_with_reference(), objective)
        else:
            PreferenceDataset(pairs_with_reference(), objective)
    dataset = PreferenceDataset(pairs_with_reference(), build_objective("dpo", {}))
    given = PreferenceCollator(dataset, vocab_size=VOCAB)([dataset[0]])
    for name in ("labels", "vocab_size", "reference_logps"):
        lacking = {key: value for key, value in given.items() if key != name}
        with pytest.raises(ConfigError, match=f"lacks {name}, which objective dpo reads"):
            given_rows(lacking, dataset.objective)
    with pytest.raises(ConfigError, match="pad_to 20: pair"):
        PreferenceCollator(dataset, vocab_size=VOCAB, pad_to=20)


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({"labels": VOCAB}, {}, f"token {VOCAB} is none of the model's vocabulary"),
        (
            {},
            {"sequence_parallel": True, "tensor_model_parallel_size": 2},
            "one of 9 tokens. Have rows laid out with multiple_of=2",
        ),
        ({}, {"context_parallel_size": 2}, "context_parallel_size 2: rows are not cut over ranks"),
    ],
)
def test_rows_that_a_model_cannot_take_are_refused(changes: dict[str, int], settings: dict[str, Any], message: str) -> None:
    objective = build_objective("simpo", {})
    dataset = PreferenceDataset(pairs_with_reference(), objective)
    given = PreferenceCollator(dataset, vocab_size=VOCAB, pad_to=35)([dataset[0]])
    given = {name: value[:, -9:] if isinstance(value, Tensor) else value for name, value in given.items()}
    given["loss_mask"] = torch.ones_like(given["loss_mask"])
    given.update({name: torch.full_like(given[name], value) for name, value in changes.items()})
    model = torch.nn.Identity()
    config = {
        "calculate_per_token_loss": True,
        "finalize_model_grads_func": print,
        "sequence_parallel": False,
        "context_parallel_size": 1,
        **settings,
    }
    model.config = types.SimpleNamespace(**config)  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=message):
        PreferenceStep(objective, groups=types.SimpleNamespace())(iter([given]), model)  # type: ignore[arg-type]
