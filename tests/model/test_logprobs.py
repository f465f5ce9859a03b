"""Vocabulary-parallel log-probs against dense float64, values and every gradient, at odd sizes and on every shard boundary."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from megatron_rmipo.errors import ConfigError
from megatron_rmipo.model.logprobs import (
    ReferenceHead,
    head_logprobs,
    linear_logprobs,
    perturbed_linear_logprobs,
    vocab_parallel_logprobs,
)
from megatron_rmipo.model.vocabulary_shard import PLAIN_LOGITS, LogitRules, VocabularyShard
from tests.harness import run_distributed

NUM_TOKENS, HIDDEN, VOCAB = 13, 11, 37


def dense_problem(padded_rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """float64 hidden ``[N, H]``, weight ``[padded, H]``, target ``[N]``, upstream gradient ``[N]``."""
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(NUM_TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(padded_rows, HIDDEN, generator=generator, dtype=torch.float64)
    # Both sides of every shard boundary (shard-local id 0 among them) for two ranks and for four, first and last id.
    edges = {edge + side for edge in (padded_rows // 4, padded_rows // 2) for side in (-1, 0, 1)}
    special = torch.tensor(sorted(edge for edge in {0, VOCAB - 1} | edges if edge < VOCAB))
    target = torch.cat([special, torch.randint(VOCAB, (NUM_TOKENS - special.numel(),), generator=generator)])
    return hidden, weight, target, torch.randn(NUM_TOKENS, generator=generator, dtype=torch.float64)


def dense_logits(hidden: Tensor, weight: Tensor, rules: LogitRules) -> Tensor:
    logits = rules.multiplier * (hidden @ weight.t())
    return logits if rules.softcap is None else rules.softcap * (logits / rules.softcap).tanh()


def dense_reference(
    hidden: Tensor, weight: Tensor, target: Tensor, grad: Tensor, rules: LogitRules = PLAIN_LOGITS
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log-probs, hidden gradient, weight gradient, logits gradient) by plain torch in float64, padding columns left out."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logits = dense_logits(hidden, weight[:VOCAB], rules)
    logits.retain_grad()
    logprobs = torch.log_softmax(logits, -1).gather(-1, target[:, None])[:, 0]
    logprobs.backward(grad)
    assert hidden.grad is not None
    assert weight.grad is not None
    assert logits.grad is not None
    return logprobs.detach(), hidden.grad, weight.grad, logits.grad


# What logits are, of each case below: of a model that scales them, of one that caps them, of one that does both, of others.
RULES = [LogitRules(0.3), LogitRules(softcap=3.0), PLAIN_LOGITS, LogitRules(1.7, 5.0), PLAIN_LOGITS]
# (rows of the padded weight, vocabulary entries of a chunk, whether the hidden gradient is reduced). With 80 rows on four ranks
# the last rank and a part of the one before it hold padding alone.
CASES = [(40, 5, True), (40, 100, False), (48, 3, True), (80, 3, True), (80, 13, False)]


def all_cases_on_this_rank() -> list[dict[str, Tensor]]:
    """This rank's part of every case: the fused form, and the plain one on the same problem."""
    torch.distributed.init_process_group("gloo")
    group = torch.distributed.group.WORLD
    assert group is not None
    results = []
    for (padded_rows, chunk_size, reduce_hidden_grad), rules in zip(CASES, RULES, strict=True):
        rows = padded_rows // group.size()
        shard = slice(group.rank() * rows, (group.rank() + 1) * rows)
        hidden, weight, target, grad = dense_problem(padded_rows)
        leaves = (hidden.clone().requires_grad_(), weight[shard].clone().requires_grad_())
        logprobs = linear_logprobs(
            *leaves,
            target,
            group,
            vocab_size=VOCAB,
            chunk_size=chunk_size,
            reduce_hidden_grad=reduce_hidden_grad,
            rules=rules,
        )
        logprobs.backward(grad)
        logits = dense_logits(hidden, weight, rules)[:, shard].clone().requires_grad_()
        before = logits.detach().clone()
        plain = vocab_parallel_logprobs(logits, target, group, vocab_size=VOCAB)
        plain.backward(grad)
        assert torch.equal(logits, before), "the caller's logits were changed"
        gradients = {"hidden": leaves[0].grad, "weight": leaves[1].grad, "logits": logits.grad}
        results.append({"logprobs": logprobs.detach(), "plain": plain.detach(), **gradients})
    return results


@pytest.mark.dist
@pytest.mark.parametrize("world_size", [2, 4])
def test_both_forms_match_dense_float64_at_every_shard(world_size: int) -> None:
    by_rank = run_distributed(all_cases_on_this_rank, world_size)
    exact = {"rtol": 1e-12, "atol": 1e-12}
    for number, (padded_rows, _, reduce_hidden_grad) in enumerate(CASES):
        logprobs, hidden_grad, weight_grad, logits_grad = dense_reference(*dense_problem(padded_rows), RULES[number])
        results = [result[number] for result in by_rank]
        for result in results:
            torch.testing.assert_close(result["logprobs"], logprobs, **exact)
            torch.testing.assert_close(result["plain"], logprobs, **exact)
        hidden_grads = torch.stack([result["hidden"] for result in results])
        whole = hidden_grads if reduce_hidden_grad else hidden_grads.sum(0, keepdim=True)
        torch.testing.assert_close(whole, hidden_grad.expand_as(whole), **exact)
        torch.testing.assert_close(torch.cat([result["weight"] for result in results]), weight_grad, **exact)
        logits_grads = torch.cat([result["logits"] for result in results], dim=1)
        torch.testing.assert_close(logits_grads[:, :VOCAB], logits_grad, **exact)
        assert not logits_grads[:, VOCAB:].any(), "padding columns must get no gradient"


def test_fp32_error_against_float64() -> None:
    hidden, weight, target, grad = dense_problem(VOCAB)
    logprobs, hidden_grad, weight_grad, _ = dense_reference(hidden, weight, target, grad)
    hidden32, weight32 = hidden.float().requires_grad_(), weight.float().requires_grad_()
    ours = linear_logprobs(hidden32, weight32, target, chunk_size=4)
    ours.backward(grad.float())
    assert ours.dtype == torch.float32
    assert hidden32.grad is not None
    assert weight32.grad is not None
    torch.testing.assert_close(ours.detach().double(), logprobs, rtol=0, atol=1e-5)
    for gradient, reference in ((hidden32.grad, hidden_grad), (weight32.grad, weight_grad)):
        assert (gradient.double() - reference).norm() / reference.norm() < 2e-6


def test_bf16_weights_give_fp32_logprobs_and_fp32_summed_gradients() -> None:
    hidden, weight, target, grad = dense_problem(VOCAB)
    rounded = (hidden.bfloat16(), weight.bfloat16())
    logprobs, _, weight_grad, _ = dense_reference(rounded[0].double(), rounded[1].double(), target, grad)
    leaves = [tensor.clone().requires_grad_() for tensor in rounded]
    ours = linear_logprobs(leaves[0], leaves[1], target, chunk_size=1)
    ours.backward(grad.float())
    assert ours.dtype == torch.float32
    assert leaves[1].grad is not None
    assert leaves[1].grad.dtype == torch.bfloat16
    torch.testing.assert_close(ours.detach().double(), logprobs, rtol=0, atol=0.1)
    assert (leaves[1].grad.double() - weight_grad).norm() / weight_grad.norm() < 2e-2


def ddp_weight(weight: Tensor) -> Any:
    """A parameter with the marks and the hook that Megatron's DDP gives it."""
    parameter: Any = torch.nn.Parameter(weight)
    parameter.main_grad, parameter.grad_added_to_main_grad = torch.zeros(weight.shape), False
    accumulator = parameter.expand_as(parameter).grad_fn.next_functions[0][0]

    def hook(*_: Any) -> None:
        if not parameter.grad_added_to_main_grad:
            parameter.main_grad.add_(parameter.grad.data)
        parameter.grad = None

    accumulator.register_hook(hook)
    parameter.accumulator = accumulator
    return parameter


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_a_weight_of_ddp_gets_its_gradient_in_the_main_buffer(dtype: torch.dtype, tolerance: float) -> None:
    hidden, weight, target, grad = dense_problem(40)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    _, hidden_grad, weight_grad, _ = dense_reference(hidden.double(), weight.double(), target, grad)
    parameter = ddp_weight(weight)
    ordinary = torch.randn(40, HIDDEN, generator=torch.Generator().manual_seed(9)).to(dtype)
    for _ in range(2):
        leaf = hidden.clone().requires_grad_()
        linear_logprobs(leaf, parameter, target, vocab_size=VOCAB, chunk_size=5).backward(grad.float())
        # Another use of the weight, in the same step.
        (parameter * ordinary).sum().backward()
    total = parameter.main_grad.double() - 2 * ordinary.double()
    assert (total[:VOCAB] / 2 - weight_grad[:VOCAB]).norm() / weight_grad.norm() < tolerance
    assert total[VOCAB:].abs().max() < 1e-6
    assert leaf.grad is not None
    assert (leaf.grad.double() - hidden_grad).norm() / hidden_grad.norm() < tolerance


def test_a_gradient_that_is_asked_for_as_a_tensor_is_one_under_ddp_too() -> None:
    hidden, weight, target, grad = (tensor if tensor.dtype == torch.int64 else tensor.float() for tensor in dense_problem(VOCAB))
    _, hidden_grad, weight_grad, _ = dense_reference(hidden, weight, target, grad)
    parameter, leaf = ddp_weight(weight), hidden.clone().requires_grad_()
    for inputs, expected in (((leaf, parameter), (hidden_grad, weight_grad)), ((leaf,), (hidden_grad,))):
        logprobs = linear_logprobs(leaf, parameter, target, chunk_size=5)
        for ours, reference in zip(torch.autograd.grad(logprobs, inputs, grad), expected, strict=True):
            torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)
    assert not parameter.main_grad.any()


def test_a_module_is_called_and_one_without_a_weight_is_refused() -> None:
    hidden, weight, target, _ = dense_problem(VOCAB)
    layer = torch.nn.Linear(HIDDEN, VOCAB, bias=False, dtype=torch.float64)
    seen: list[Tensor] = []

    def gather(module: torch.nn.Module, inputs: tuple[Tensor]) -> None:
        seen.append(inputs[0])
        layer.weight.data.copy_(weight)

    layer.register_forward_pre_hook(gather)
    ours = linear_logprobs(hidden, layer, target)
    assert torch.equal(ours, linear_logprobs(hidden, weight, target))
    assert seen[0] is hidden
    # It computes what it did before.
    assert torch.equal(layer(hidden), hidden @ weight.t())
    with pytest.raises(ConfigError, match=r"LayerNorm holds no weight: .*model\.embedding\.word_embeddings"):
        linear_logprobs(hidden, torch.nn.LayerNorm(HIDDEN, elementwise_affine=False), target)


@pytest.mark.parametrize(("chunk_size", "rules"), [(1, PLAIN_LOGITS), (4, LogitRules(0.7, 4.0)), (100, PLAIN_LOGITS)])
def test_gradcheck(chunk_size: int, rules: LogitRules) -> None:
    hidden, weight, target, _ = dense_problem(VOCAB + 3)
    leaves = (hidden.requires_grad_(), weight.requires_grad_())
    options: dict[str, Any] = {"vocab_size": VOCAB, "chunk_size": chunk_size, "rules": rules}
    assert torch.autograd.gradcheck(lambda h, w: linear_logprobs(h, w, target, **options), leaves)


def test_gradcheck_of_the_plain_form() -> None:
    hidden, weight, target, _ = dense_problem(VOCAB + 3)
    logits = (hidden @ weight.t()).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: vocab_parallel_logprobs(z, target, vocab_size=VOCAB), (logits,))


def test_large_logits_stay_finite() -> None:
    hidden, weight, target, _ = dense_problem(VOCAB)
    ours = linear_logprobs(1e4 * hidden.float(), weight.float(), target)
    assert torch.isfinite(ours).all()


def test_nothing_scored_gives_an_empty_result_and_zero_gradients() -> None:
    hidden = torch.zeros(0, HIDDEN, requires_grad=True)
    weight = torch.randn(VOCAB, HIDDEN, requires_grad=True)
    result = linear_logprobs(hidden, weight, torch.zeros(0, dtype=torch.int64))
    assert result.shape == (0,)
    result.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()


EPSILON = 0.25


def reference_problem(padded_rows: int) -> tuple[Tensor, Tensor]:
    """float64 hidden states and weight of a reference model."""
    generator = torch.Generator().manual_seed(8)
    hidden = torch.randn(NUM_TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    return hidden, torch.randn(padded_rows, HIDDEN, generator=generator, dtype=torch.float64)


def dense_perturbed(padded_rows: int, rules: LogitRules, reference_rules: LogitRules) -> Tensor:
    """``[4, N]`` log-probs under f, r and both mixtures, by plain torch in float64."""
    hidden, weight, target, _ = dense_problem(padded_rows)
    reference_hidden, reference_weight = reference_problem(padded_rows)
    policy = dense_logits(hidden, weight[:VOCAB], rules)
    reference = dense_logits(reference_hidden, reference_weight[:VOCAB], reference_rules)
    mixtures = [policy, reference, (1 + EPSILON) * policy - EPSILON * reference, (1 - EPSILON) * policy + EPSILON * reference]
    return torch.stack([torch.log_softmax(logits, -1).gather(-1, target[:, None])[:, 0] for logits in mixtures])


def perturbed_on_this_rank() -> list[tuple[Tensor, Tensor, Tensor, int]]:
    """By case: log-probs, gradients of hidden and weight, number of collectives of the forward pass."""
    torch.distributed.init_process_group("gloo")
    group = torch.distributed.group.WORLD
    assert group is not None
    results = []
    original, calls = torch.distributed.all_reduce, []
    torch.distributed.all_reduce = lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
    for number, (padded_rows, chunk_size, _) in enumerate(CASES):
        rows = padded_rows // group.size()
        shard = slice(group.rank() * rows, (group.rank() + 1) * rows)
        hidden, weight, target, grad = dense_problem(padded_rows)
        reference_hidden, reference_weight = reference_problem(padded_rows)
        leaves = (hidden.clone().requires_grad_(), weight[shard].clone().requires_grad_())
        reference = ReferenceHead(reference_hidden, reference_weight[shard], EPSILON, RULES[number - 1])
        calls.clear()
        options: dict[str, Any] = {"vocab_size": VOCAB, "chunk_size": chunk_size, "rules": RULES[number]}
        logprobs = perturbed_linear_logprobs(*leaves, target, reference, group, **options)
        num_collectives = len(calls)
        logprobs[0].backward(grad)
        assert leaves[0].grad is not None
        assert leaves[1].grad is not None
        results.append((logprobs.detach(), leaves[0].grad, leaves[1].grad, num_collectives))
    return results


@pytest.mark.dist
@pytest.mark.parametrize("world_size", [2, 4])
def test_perturbed_logprobs_match_dense_float64_in_two_collectives(world_size: int) -> None:
    by_rank = run_distributed(perturbed_on_this_rank, world_size)
    exact = {"rtol": 1e-12, "atol": 1e-12}
    for number, (padded_rows, _, _) in enumerate(CASES):
        _, hidden_grad, weight_grad, _ = dense_reference(*dense_problem(padded_rows), RULES[number])
        for result in by_rank:
            logprobs, ours_hidden_grad, _, num_collectives = result[number]
            torch.testing.assert_close(logprobs, dense_perturbed(padded_rows, RULES[number], RULES[number - 1]), **exact)
            torch.testing.assert_close(ours_hidden_grad, hidden_grad, **exact)
            assert num_collectives == 2
        torch.testing.assert_close(torch.cat([result[number][2] for result in by_rank]), weight_grad, **exact)


def test_mixtures_of_equal_models_are_the_model_to_the_bit() -> None:
    hidden, weight, target, _ = dense_problem(VOCAB)
    hidden, weight = hidden.float(), weight.float()
    logprobs = perturbed_linear_logprobs(hidden, weight, target, ReferenceHead(hidden, weight, 0.01), chunk_size=4)
    assert torch.equal(logprobs, linear_logprobs(hidden, weight, target, chunk_size=4).expand(4, -1))


@pytest.mark.parametrize("num_ungraded", [0, 4, NUM_TOKENS])
def test_the_last_ones_carry_no_gradient_and_cost_no_backward(num_ungraded: int) -> None:
    hidden, weight, target, grad = dense_problem(40)
    graded = NUM_TOKENS - num_ungraded
    expected = dense_reference(hidden, weight, target, torch.cat([grad[:graded], torch.zeros(num_ungraded)]))
    leaves = (hidden.float().requires_grad_(), weight.float().requires_grad_())
    shard = VocabularyShard(40, VOCAB, None)
    settings: dict[str, Any] = {"chunk_size": 7, "reduce_hidden_grad": True, "num_ungraded": num_ungraded}
    logprobs = head_logprobs(*leaves, target, shard, **settings)[0]
    with FlopCounterMode(display=False) as counter:
        logprobs.backward(grad.float())
    for found, dense in zip((logprobs.detach(), leaves[0].grad, leaves[1].grad), expected[:3], strict=True):
        torch.testing.assert_close(found.double(), dense, rtol=1e-5, atol=1e-5)  # type: ignore[union-attr]
    # Logits anew, and the products of both gradients, some of which are added in place, uncounted.
    assert counter.get_total_flops() % max(graded, 1) == 0
    assert (counter.get_total_flops() == 0) == (graded == 0)
