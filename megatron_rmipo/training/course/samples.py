"""Answers of the policy to the user's prompts as it trains. All ranks call each function together."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from megatron_rmipo.checkpoint.source import ModelSource
from megatron_rmipo.config.schema import Config
from megatron_rmipo.data.encoding.tokenize import PreferenceTokenizer, load_tokenizer
from megatron_rmipo.data.store.chat_form import ChatForm
from megatron_rmipo.model.vocabulary_shard import TokenChoice
from megatron_rmipo.passes.answers import Answer, answer_prompts
from megatron_rmipo.runtime.agreement import on_first_rank
from megatron_rmipo.runtime.groups import ProcessGroups
from megatron_rmipo.training.course.prompts import Prompt, Prompts, read_prompts
from megatron_rmipo.training.course.run import Run


def find_prompts(config: Config, source: ModelSource, chat: ChatForm | None, groups: ProcessGroups) -> Prompts | None:
    """The prompts of ``--sample-prompts``, read by the first rank; None without the flag.

    Args:
        config: the run's configuration.
        source: the model.
        chat: the form of conversations that the data carry.
        groups: the process groups of this rank.

    Raises:
        DataError: as :func:`megatron_rmipo.training.course.prompts.read_prompts`.
    """
    flags = config.evaluation
    if flags.sample_prompts is None:
        return None
    longest = min(config.data.tokens_per_microbatch, source.arch.longest_sequence)
    path, tokenizer = Path(flags.sample_prompts), load_tokenizer(str(source.assets))
    read = partial(read_prompts, path, tokenizer, chat, most_tokens=longest - flags.sample_length)
    return on_first_rank(groups.world, read)


def owes_samples(run: Run, *, at_end: bool = False) -> bool:
    """Whether answers are due where the run stands, and not there yet."""
    interval, step = run.config.evaluation.sample_interval, run.progress.step
    if run.prompts is None:
        return False
    if not (step == 0 or at_end or (interval and step % interval == 0)):
        return False
    return not on_first_rank(run.groups.world, partial(run.reporter.has_samples, step))


def sample(run: Run, *, at_end: bool = False) -> bool:
    """Let the policy answer where that is owed, and write the answers down.

    Args:
        run: the run.
        at_end: whether it has come to its end.

    Returns:
        False where a signal cut it short, and nothing is written.
    """
    if not owes_samples(run, at_end=at_end):
        return True
    assert run.prompts is not None
    run.heartbeat.doing("samples")
    run.state.model.eval()
    flags, prompts = run.config.evaluation, run.prompts
    answers = answer_prompts(
        run.state.model,
        [prompt.token_ids for prompt in prompts.prompts],
        most_tokens=flags.sample_length,
        ends=prompts.ends,
        choice=TokenChoice(flags.sample_temperature, run.config.training.seed, run.state.policy.architecture.vocab_size),
        layout=run.pairs.layout,
        groups=run.groups,
        goes_on=partial(_goes_on, run),
    )
    if answers is None:
        return False
    on_first_rank(run.groups.world, partial(_write, run, prompts.prompts, answers))
    return True


def _goes_on(run: Run) -> bool:
    # It may take long, and a checkpoint counts once it is looked after.
    run.checkpoints.look_after()
    return not run.stop.requested()


def _write(run: Run, prompts: list[Prompt], answers: list[Answer]) -> None:
    tokenizer = load_tokenizer(str(run.assets))
    found = enumerate(zip(prompts, answers, strict=True))
    run.reporter.log_samples(
        run.progress.step, [_as_record(number, prompt, answer, tokenizer) for number, (prompt, answer) in found]
    )
    ended = sum(answer.ended for answer in answers)
    run.reporter.say(f"samples at step {run.progress.step}: {len(answers)} answers, {ended} of them ended")


def _as_record(number: int, prompt: Prompt, answer: Answer, tokenizer: PreferenceTokenizer) -> dict[str, Any]:
    return {
        "prompt": number,
        "text": prompt.text,
        "answer": tokenizer.decode_continuation(prompt.token_ids, answer.token_ids),
        "num_tokens": len(answer.token_ids),
        "ended": answer.ended,
    }
