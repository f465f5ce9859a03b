"""Models with adapters by PEFT on transformers, in float64: factors, the loss of a batch, its gradients, optimizer steps."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from peft.utils import ModulesToSaveWrapper
from torch import Tensor

from megatron_rmipo.data.store.pair_store import TokenizedPair
from megatron_rmipo.model.lora.held import FactorKind
from megatron_rmipo.objectives.base import Objective
from tests.checkpoint.models import write_hf_model
from tests.integration.problem import VOCAB, DenseProblem, dense_model


class FactorName(NamedTuple):
    """Module of a projection, of experts their parameter; number of the expert, None where there are none; which factor."""

    projection: str
    expert: int | None
    kind: FactorKind


Factors = dict[FactorName, Tensor]


@dataclasses.dataclass(frozen=True)
class Form:
    """A kind of model and of adapter, as our flags say it and as PEFT's configuration does."""

    kind: str
    flags: Mapping[str, Any]
    peft: Mapping[str, Any]
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def shares_experts(self) -> bool:
        return self.flags.get("lora_experts") == "shared"


_EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
_EVERY = r".*_proj(_with_mqa)?"
_TWO, _EIGHT_HEADS = {"num_hidden_layers": 2}, {"num_attention_heads": 8, "head_dim": 6}
FORMS = {
    # Ranks of four share a key/value head.
    "llama": Form(
        "llama31",
        {"lora_rank": 3, "lora_alpha": 5.0},
        {"r": 3, "lora_alpha": 5.0, "target_modules": "all-linear"},
        _EIGHT_HEADS,
    ),
    "whole modules": Form(
        "llama31",
        {
            "lora_rank": 5,
            "lora_alpha": 7.0,
            "use_rslora": True,
            "lora_target_modules": ["q_proj", "v_proj"],
            "lora_modules_to_save": ["lm_head", "model.norm", "embed_tokens"],
        },
        {
            "r": 5,
            "lora_alpha": 7.0,
            "use_rslora": True,
            "target_modules": ["q_proj", "v_proj"],
            "modules_to_save": ["lm_head", "model.norm", "embed_tokens"],
        },
        _TWO,
    ),
    "dora": Form(
        "qwen2",
        {"lora_rank": 4, "lora_alpha": 6.0, "use_rslora": True, "use_dora": True},
        {"r": 4, "lora_alpha": 6.0, "use_rslora": True, "use_dora": True, "target_modules": "all-linear"},
        {**_EIGHT_HEADS, **_TWO},
    ),
    "phi3": Form("phi3", {"lora_rank": 3}, {"r": 3, "lora_alpha": 3, "target_modules": "all-linear"}, _TWO),
    "latent": Form(
        "deepseek_v3",
        {"lora_rank": 3, "lora_alpha": 5.0},
        {"r": 3, "lora_alpha": 5.0, "target_modules": _EVERY, "target_parameters": _EXPERTS},
        {**_TWO, "first_k_dense_replace": 1},
    ),
    "experts": Form(
        "qwen3_moe",
        {"lora_rank": 2, "lora_alpha": 3.0},
        {"r": 2, "lora_alpha": 3.0, "target_modules": _EVERY, "target_parameters": _EXPERTS},
        _TWO,
    ),
    "shared": Form(
        "mixtral",
        {"lora_rank": 2, "lora_alpha": 3.0, "lora_experts": "shared"},
        {"r": 2, "lora_alpha": 3.0, "target_modules": _EVERY, "target_parameters": _EXPERTS},
        _TWO,
    ),
}


def write_model(directory: Path, form: Form) -> Path:
    """A small model of a form's kind."""
    return write_hf_model(directory, form.kind, vocab_size=VOCAB, **{"initializer_range": 0.08, **form.model})


class _Without:
    """A model with its adapter off."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, ids: Tensor) -> Any:
        with self.model.disable_adapter():
            return self.model(ids)


class PeftModel:
    """A model with an adapter, in float64.

    Args:
        hf_dir: the model.
        form: of it.
    """

    def __init__(self, hf_dir: Path, form: Form) -> None:
        self.form = form
        model, config = dense_model(hf_dir), PeftConfig(task_type="CAUSAL_LM", **form.peft)
        # Of models that it knows to be sparse PEFT takes any name of an MLP's module for one of experts.
        with mock.patch.object(model.config, "model_type", "any"):
            self.model = get_peft_model(model, config)
        self.reference = _Without(self.model)
        # PEFT's own are fp32.
        self.model.double()

    def parameters(self) -> Iterator[tuple[FactorName, Tensor]]:
        """Factors: of experts, all in one, under the name of expert 0."""
        for name, module in self.model.base_model.model.named_modules():
            if not hasattr(module, "lora_A") or not module.lora_A:
                continue
            expert = None
            if isinstance(module, ParamWrapper):
                # Wrappers of the parameters of one module stand in one another.
                name, expert = f"{name.replace('.base_layer', '')}.{module.parameter_name}", 0
            yield FactorName(name, expert, "A"), module.lora_A["default"].weight
            yield FactorName(name, expert, "B"), module.lora_B["default"].weight
            if self.form.flags.get("use_dora"):
                yield FactorName(name, expert, "magnitude"), module.lora_magnitude_vector["default"].weight

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        """Weights that are trained whole, by name."""
        for name, module in self.model.base_model.model.named_modules():
            if isinstance(module, ModulesToSaveWrapper):
                yield f"{name}.weight", module.modules_to_save["default"].weight

    def each(self, name: FactorName, tensor: Tensor) -> Iterator[tuple[FactorName, Tensor]]:
        """Of a tensor that holds a factor of all experts, those of each of them; views."""
        if name.expert is None:
            yield name, tensor
            return
        rank = self.form.flags["lora_rank"]
        count = tensor.shape[0 if name.kind == "A" else 1] // rank
        for expert in range(count):
            # As PEFT lays them: whole blocks of A, columns of B in turns.
            own = tensor[expert * rank : (expert + 1) * rank] if name.kind == "A" else tensor[:, expert::count]
            yield name._replace(expert=expert), own

    def factors(self, gradients: bool = False) -> Factors:
        """Each factor, or its gradient; of experts that share one, a sum of gradients."""
        found: Factors = {}
        for name, parameter in self.parameters():
            tensor = parameter.grad if gradients else parameter.detach()
            assert tensor is not None
            own = dict(self.each(name, tensor))
            if name.expert is not None and self.form.shares_experts:
                tensors = list(own.values())
                own = {name._replace(expert=None): torch.stack(tensors).sum(0) if gradients else tensors[0]}
            found.update({one: value.clone() for one, value in own.items()})
        return found

    def modules(self, gradients: bool = False) -> dict[str, Tensor]:
        """Each weight that is trained whole, or its gradient."""
        return {name: (one.grad if gradients else one.detach()).clone() for name, one in self.whole()}  # type: ignore[union-attr]

    @torch.no_grad()
    def draw(self) -> None:
        """Factors of an adapter that has learned, exact in fp32, by their names alone."""
        for name, parameter in self.parameters():
            for one, own in self.each(name, parameter):
                key = one._replace(expert=None) if self.form.shares_experts else one
                noise = _noise(str(tuple(key)), own)
                own.copy_((own * (1 + 0.2 * noise) if name.kind == "magnitude" else 0.15 * noise).float())
        for whole, parameter in self.whole():
            parameter.copy_((parameter + 0.05 * _noise(whole, parameter)).float())


def _noise(name: str, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(like.shape, generator=generator, dtype=torch.float64)


class _Problem(DenseProblem):
    """The same in few calls: rows side by side, filled up behind their end, where nothing of them looks."""

    def _table(self, model: Any, pairs: Sequence[TokenizedPair], share: float = 0.0) -> Tensor:
        rows = [(p.prompt, response) for p in pairs for response in (p.chosen, p.rejected)]
        ids = [torch.tensor(np.concatenate(row)) for row in rows]
        tokens = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        logits = model(tokens).logits
        if share:
            logits = (1 - share) * logits + share * self.reference(tokens).logits
        logps = torch.log_softmax(logits[:, :-1], -1).gather(-1, tokens[:, 1:, None])[..., 0]
        sums = [
            one[max(len(context) - 1, 0) : len(context) + len(response) - 1].sum()
            for one, (context, response) in zip(logps, rows, strict=True)
        ]
        return torch.stack(sums).view(len(pairs), 2)


def dense_loss(dense: PeftModel, pairs: Sequence[TokenizedPair], objective: Objective) -> Tensor:
    """The mean loss of pairs, whose reference is the model with its adapter off."""
    return _Problem(dense.model, dense.reference, pairs).loss(objective)[0]


@dataclasses.dataclass(frozen=True)
class Answer:
    """Loss of a batch, gradients, and the norm of all of them."""

    loss: float
    factors: Factors
    modules: dict[str, Tensor]

    @property
    def norm(self) -> float:
        return float(torch.cat([one.flatten() for one in (*self.factors.values(), *self.modules.values())]).norm())


def answers(dense: PeftModel, pairs: Sequence[TokenizedPair], objectives: Mapping[str, Objective]) -> dict[str, Answer]:
    """What PEFT gives for each objective, whose reference is the model with its adapter off."""
    problem, found = _Problem(dense.model, dense.reference, pairs), {}
    for name, objective in objectives.items():
        loss, _ = problem.loss(objective)
        dense.model.zero_grad()
        loss.backward(retain_graph=True)
        found[name] = Answer(float(loss.detach()), dense.factors(gradients=True), dense.modules(gradients=True))
    return found


def write_changed(hf_dir: Path, directory: Path, changes: Mapping[str, Tensor]) -> Path:
    """A copy of a model with some of its weights changed."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32)
    tensors = {name: changes.get(name, tensor).float().contiguous() for name, tensor in model.state_dict().items()}
    model.save_pretrained(directory, state_dict=tensors)
    return directory
