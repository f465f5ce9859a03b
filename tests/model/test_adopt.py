"""Models built by Megatron's own specs, scored over packed rows, against their own forward pass before they were adopted."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.extensions import transformer_engine
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_rmipo.errors import ConfigError
from megatron_rmipo.model import adopt
from megatron_rmipo.model.adopt import attach_model, detach_model
from megatron_rmipo.model.layers.norms import RMSNorm
from megatron_rmipo.runtime.groups import ProcessGroups, initialize_runtime, shutdown_runtime
from tests.harness import run_distributed
from tests.model.built import KINDS, PAIRS, VOCAB, Built, add_adapters, build


def make_tokens(multiple_of: int) -> list[list[Tensor]]:
    """The pairs' prompts and responses; the last response is drawn out so that the packed row divides."""
    generator = torch.Generator().manual_seed(9)
    lengths = [list(pair) for pair in PAIRS]
    lengths[-1][2] += -sum(map(sum, lengths)) % multiple_of
    return [[torch.randint(VOCAB, (length,), generator=generator) for length in pair] for pair in lengths]


def apart(model: Any, pairs: list[list[Tensor]], multiple_of: int) -> Tensor:
    """Log-probs of every response token, each response in a row of its own through the model's own forward pass."""
    scores = []
    for prompt, *responses in pairs:
        for response in responses:
            tokens = torch.cat([prompt, response])
            # Causal, so that what stands behind changes nothing.
            filled = torch.nn.functional.pad(tokens, (0, -len(tokens) % multiple_of))
            logits = model(filled[None], torch.arange(len(filled))[None], None)[0, :, :VOCAB]
            picked = logits.log_softmax(-1)[: len(tokens) - 1].gather(1, tokens[1:, None])[:, 0]
            scores.append(picked[len(prompt) - 1 :])
    return torch.cat(scores)


def packed(model: Any, pairs: list[list[Tensor]]) -> Tensor:
    """The same in one row, each prompt once."""
    tokens, positions, segments, source, target = [], [], [], [], []
    start = 0
    for prompt, chosen, rejected in pairs:
        first, second = len(prompt), len(prompt) + len(chosen)
        segments += [[start, second, 0, 0], [start + second, len(rejected), start, first]]
        tokens += [prompt, chosen, rejected]
        positions += [torch.arange(second), torch.arange(first, first + len(rejected))]
        for place, response in ((first, chosen), (second, rejected)):
            source += [start + first - 1, *range(start + place, start + place + len(response) - 1)]
            target.append(response)
        start += second + len(rejected)
    row = {
        "token_ids": torch.cat(tokens),
        "position_ids": torch.cat(positions),
        "segments": torch.tensor(segments),
        "source": torch.tensor(source),
        "target": torch.cat(target),
    }
    # The last tokens of a row, whose outputs nothing reads but their own.
    uncounted = torch.arange(start) >= start - 3
    before = counts(model)
    scores = model(**row, uncounted=uncounted)
    assert counts(model) == [count + model.config.moe_router_topk * (start - 3) for count in before]
    return scores


def counts(model: Any) -> list[float]:
    """What the routers with score biases have counted, over all experts."""
    return [float(module.local_tokens_per_expert.sum()) for module in model.modules() if isinstance(module, TopKRouter)]


def scores_and_gradients(model: Any, scores: Tensor, groups: ProcessGroups) -> tuple[Tensor, dict[str, Tensor]]:
    weights = torch.randn(len(scores), generator=torch.Generator().manual_seed(2))
    (scores * weights).sum().backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None, name
            continue
        assert parameter.grad is not None, name
        if getattr(parameter, "sequence_parallel", False):
            dist.all_reduce(parameter.grad, group=groups.tp)
        gradients[name] = parameter.grad
        parameter.grad = None
    return scores.detach(), gradients


def everything(model: Any) -> dict[str, Any]:
    """What detaching must leave as it was; but for ``attributes`` attaching, too."""
    sharded = model.sharded_state_dict()
    return {
        "attributes": [{key: id(value) for key, value in vars(module).items()} for module in model.modules()],
        "modules": [(name, type(module)) for name, module in model.named_modules()],
        "parameters": [(name, id(parameter)) for name, parameter in model.named_parameters()],
        "state": [(name, getattr(value, "shape", None)) for name, value in model.state_dict().items()],
        "sharded": [(name, value.key, getattr(value, "global_shape", None)) for name, value in sharded.items()],
    }


def recompute_attention(model: Any, asked: bool) -> None:
    for module in model.modules():
        if isinstance(module, SelfAttention):
            module.checkpoint_core_attention = asked


def before_and_after(names: list[str], tp: int) -> dict[str, Any]:
    """Of each model its scores and gradients apart, and packed once it is adopted."""
    groups = initialize_runtime(tp)
    # Megatron's router compiles what counts for score biases, which wants a GPU.
    torch.compiler.set_stance("force_eager")
    found: dict[str, Any] = {}
    pairs = make_tokens(tp)
    for name in names:
        model = build(KINDS[name], groups, RMSNorm if tp > 1 else None)
        first = scores_and_gradients(model, apart(model, pairs, tp), groups)
        kept = everything(model)
        for _ in range(2):
            attach_model(model, vocab_size=VOCAB, chunk_size=7)
            assert kept | {"attributes": None} == everything(model) | {"attributes": None}, name
            found[name] = first, scores_and_gradients(model, packed(model, pairs), groups)
            torch.testing.assert_close(apart(model, pairs, tp).detach(), first[0], rtol=0, atol=0)
            # What recomputation of attention asks for; the second time.
            recompute_attention(model, tp == 1)
            detach_model(model)
        recompute_attention(model, False)
        assert kept == everything(model), name
    shutdown_runtime()
    return found


@pytest.mark.dist
@pytest.mark.parametrize("tp", [1, 2])
def test_packed_rows_score_as_the_model_itself_does(tp: int) -> None:
    names = list(KINDS) if tp == 1 else ["rope, tied", "yarn", "learned positions", "sinks, windows in every second layer"]
    for found in run_distributed(before_and_after, tp, names, tp):
        for name, ((scores, gradients), (packed_scores, packed_gradients)) in found.items():
            torch.testing.assert_close(packed_scores, scores, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
            assert packed_gradients.keys() == gradients.keys()
            # A bias of keys that nothing turns has none but rounding.
            least = 1e-3 * max(gradient.norm() for gradient in gradients.values())
            for parameter, gradient in gradients.items():
                error = (packed_gradients[parameter] - gradient).norm() / gradient.norm().clamp(min=least)
                assert error < 1e-4, (name, parameter, float(error))


@pytest.mark.dist
def test_adapters_experts_copies_and_transformer_engine() -> None:
    run_distributed(in_one_world, 1)


def in_one_world() -> None:
    groups = initialize_runtime()
    adapters(groups)
    uncounted_tokens(groups)
    transformer_engine_core(groups)
    shutdown_runtime()


def transformer_engine_core(groups: ProcessGroups) -> None:
    """A stand-in for Transformer Engine's core attention is replaced as Megatron's is; it needs a GPU itself."""

    class TEDotProductAttention(DotProductAttention):
        """Of the real one's name and parameters, which are none but the sinks."""

    pairs, model = make_tokens(1), build(KINDS["sinks, windows in every second layer"], groups)
    for layer in model.decoder.layers:
        layer.self_attention.core_attention.__class__ = TEDotProductAttention
    first = apart(model, pairs, 1).detach()
    with pytest.raises(ConfigError, match="what TEDotProductAttention does with scores is not known"):
        attach_model(model, vocab_size=VOCAB)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer_engine, "TEDotProductAttention", TEDotProductAttention, raising=False)
        patch.setattr(adopt, "transformer_engine_available", lambda: True)
        attach_model(model, vocab_size=VOCAB)
    torch.testing.assert_close(packed(model, pairs).detach(), first, rtol=1e-5, atol=1e-5)


def adapters(groups: ProcessGroups) -> None:
    """Of a model with LoRA the adapters alone get gradients, the same as apart; its copy is a model of its own."""
    pairs = make_tokens(1)
    model = build(Built(config={"add_bias_linear": False}), groups)
    add_adapters(model)
    kept = everything(model)
    first, gradients = scores_and_gradients(model, apart(model, pairs, 1), groups)
    assert gradients.keys() == {name for name, _ in model.named_parameters() if ".adapter." in name}
    attach_model(model, vocab_size=VOCAB, chunk_size=7)
    # Process groups are nothing that Python can copy.
    handed_over = {id(group): group for group in (groups.tp, groups.pp, groups.dp, groups.ep, groups.expert_tp, groups.world)}
    for module in model.modules():
        handed_over |= {id(value): value for value in vars(module).values() if isinstance(value, dist.ProcessGroup)}
        handed_over |= {id(value): value for name, value in vars(module).items() if name == "pg_collection"}
    copied = copy.deepcopy(model, handed_over)
    for one in (model, copied):
        scores, found = scores_and_gradients(one, packed(one, pairs), groups)
        torch.testing.assert_close(scores, first, rtol=1e-5, atol=1e-5)
        assert found.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert (found[name] - gradient).norm() < 1e-4 * gradient.norm(), name
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    # Its own table, attention and head.
    assert packed(copied, pairs).allclose(torch.tensor(1 / VOCAB).log())
    torch.testing.assert_close(packed(model, pairs), first, rtol=1e-5, atol=1e-5)
    detach_model(copied)
    detach_model(model)
    assert kept == everything(model)
    build(Built(config={"add_bias_linear": False}), groups).load_state_dict(
        {name: value for name, value in model.state_dict().items() if ".adapter." not in name}
    )


def uncounted_tokens(groups: ProcessGroups) -> None:
    """Auxiliary losses that a model's owner asked for are those of the tokens that count, whatever else is in the row."""
    torch.compiler.set_stance("force_eager")
    experts = {
        name: value for name, value in KINDS["experts, score biases"].config.items() if "bias" not in name or "linear" in name
    }
    experts |= {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.5, "moe_z_loss_coeff": 0.1}
    found = []
    for further in (0, 5):
        model = build(Built(config=experts), groups).train()
        attach_model(model, vocab_size=VOCAB)
        tokens = torch.randint(VOCAB, (9 + further,), generator=torch.Generator().manual_seed(3))
        row = {
            "token_ids": tokens,
            "position_ids": torch.cat([torch.arange(9), torch.arange(further)]),
            "segments": torch.tensor([[0, 9, 0, 0], [9, further, 0, 0]][: 1 + bool(further)]),
            "source": torch.arange(4, 8),
            "target": tokens[5:9],
        }
        # The head's gradient is zero: what is left comes from the auxiliary losses alone.
        (0.0 * model(**row, uncounted=torch.arange(9 + further) >= 9).sum()).backward()
        found.append([layer.mlp.router.weight.grad for layer in model.decoder.layers])
    for alone, among_others in zip(*found, strict=True):
        assert alone.norm() > 0
        torch.testing.assert_close(among_others, alone, rtol=1e-5, atol=1e-7)
