"""Every pair of answers before the judge, in both orders, several at once; each verdict is kept as soon as it is there."""

from __future__ import annotations

import dataclasses
import itertools
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from megatron_rmipo.command import progress_bar
from megatron_rmipo.errors import ConfigError, JudgeError
from megatron_rmipo.generation.kept_records import KeptRecords
from megatron_rmipo.judging.endpoint import Endpoint, Reply
from megatron_rmipo.judging.verdicts import fill_template, parse_verdict

_CHARACTERS_A_TOKEN = 4  # of English, about


@dataclasses.dataclass(frozen=True)
class Matter:
    """Two answers to a question.

    Attributes:
        key: names the question.
        question: as the judge reads it.
        answer, baseline: the model's and the other's.
        category: of the question; may be empty.
    """

    key: str
    question: str
    answer: str
    baseline: str
    category: str = ""

    def prompt(self, template: str, *, swapped: bool) -> str:
        """What the judge is asked, with the model's answer as A, or as B."""
        answers = (self.baseline, self.answer) if swapped else (self.answer, self.baseline)
        return fill_template(template, self.question, *answers)

    def name(self, *, swapped: bool) -> str:
        """Names one of its judgments among what is kept."""
        return f"{'B' if swapped else 'A'} {self.key}"


@dataclasses.dataclass(frozen=True)
class Prices:
    """What a million tokens cost; None where it is not known."""

    input: float | None
    output: float | None

    def cost(self, input_tokens: int, output_tokens: int) -> float | None:
        """Of so many tokens."""
        if self.input is None or self.output is None:
            return None
        return (input_tokens * self.input + output_tokens * self.output) / 1e6


def estimate_tokens(text: str) -> int:
    """About how many tokens a text has; the judge's tokenizer is not known here."""
    return -(-len(text) // _CHARACTERS_A_TOKEN)


def missing_prompts(matters: Sequence[Matter], template: str, kept: KeptRecords) -> dict[str, str]:
    """Name -> what the judge is asked, of judgments that are not kept."""
    prompts = {
        matter.name(swapped=swapped): matter.prompt(template, swapped=swapped) for matter in matters for swapped in (False, True)
    }
    return {name: prompt for name, prompt in prompts.items() if name not in kept.records}


def spent(records: Iterable[dict[str, Any]], prices: Prices) -> float:
    """What judgments have cost, by the tokens that the endpoint counted."""
    return sum(prices.cost(record["input_tokens"], record["output_tokens"]) or 0.0 for record in records)


def judge_all(
    prompts: dict[str, str],
    endpoint: Endpoint,
    kept: KeptRecords,
    *,
    concurrency: int,
    prices: Prices,
    max_cost: float | None,
) -> None:
    """Ask for every judgment and keep it.

    Args:
        prompts: see :func:`missing_prompts`.
        endpoint: the judge.
        kept: name -> ``verdict``, ``text``, ``input_tokens``, ``output_tokens``.
        concurrency: questions asked at once.
        prices: for ``max_cost``.
        max_cost: nothing more is asked once so much has been spent, on what was kept before, too.

    Raises:
        ConfigError: the endpoint refuses, or the cost is reached; what was answered is kept.
        JudgeError: some were not answered; all others are kept.
    """
    failures: list[JudgeError] = []
    in_a_row = 0
    total = len(kept.records) + len(prompts)
    _check_cost(kept, total, prices, max_cost)
    with progress_bar("judgments", total, " judgments", shown=True, num_done=len(kept.records)) as bar:
        for name, reply in _replies(prompts, endpoint, concurrency):
            if isinstance(reply, JudgeError):
                failures.append(reply)
                in_a_row += 1
                # Each of those at work has failed: the endpoint is down, and the others would wait for nothing.
                if in_a_row > concurrency:
                    break
                continue
            in_a_row = 0
            kept.add(name, _record(reply, prompts[name]))
            bar.update()
            _check_cost(kept, total, prices, max_cost)
    if failures:
        num_missing = total - len(kept.records)
        raise JudgeError(f"{num_missing} of {total} judgments were not made; start again to go on with them. {failures[-1]}.")


def _check_cost(kept: KeptRecords, total: int, prices: Prices, max_cost: float | None) -> None:
    cost = spent(kept.records.values(), prices)
    if max_cost is not None and cost >= max_cost and len(kept.records) < total:
        raise ConfigError(
            f"--max-cost {max_cost:g}: {cost:.4g} is spent, after {len(kept.records)} of {total} judgments. They are kept: start "
            "again with a higher --max-cost to go on."
        )


def _replies(prompts: dict[str, str], endpoint: Endpoint, concurrency: int) -> Iterator[tuple[str, Reply | JudgeError]]:
    """What the judge says to each, as it comes; the next is asked when the one before was taken note of."""
    waiting: queue.SimpleQueue[tuple[str, str] | None] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[str, Reply | Exception]] = queue.SimpleQueue()
    # Daemons: a command that was interrupted does not wait for answers under way.
    for _ in range(concurrency):
        threading.Thread(target=_work, args=(endpoint, waiting, done), daemon=True).start()
    # No more are handed out than are asked at once, so that a limit on the cost is passed by those alone.
    tasks = iter(prompts.items())
    for task in itertools.islice(tasks, concurrency):
        waiting.put(task)
    try:
        for _ in prompts:
            name, reply = done.get()
            if isinstance(reply, Exception) and not isinstance(reply, JudgeError):
                raise reply
            yield name, reply
            waiting.put(next(tasks, None))
    finally:
        for _ in range(concurrency):
            waiting.put(None)


def _work(
    endpoint: Endpoint,
    waiting: queue.SimpleQueue[tuple[str, str] | None],
    done: queue.SimpleQueue[tuple[str, Reply | Exception]],
) -> None:
    while (task := waiting.get()) is not None:
        name, prompt = task
        try:
            done.put((name, endpoint.ask(prompt)))
        except Exception as error:  # raised where the answers are counted
            done.put((name, error))


def _record(reply: Reply, prompt: str) -> dict[str, Any]:
    # Where the endpoint does not count, our estimate stands.
    input_tokens = estimate_tokens(prompt) if reply.input_tokens is None else reply.input_tokens
    output_tokens = estimate_tokens(reply.text) if reply.output_tokens is None else reply.output_tokens
    tokens = {"input_tokens": input_tokens, "output_tokens": output_tokens}
    return {"verdict": parse_verdict(reply.text), "text": reply.text, **tokens}
