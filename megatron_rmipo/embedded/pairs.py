"""Rows of the embedded data sets: supervised examples and preference pairs of known kinds."""

from __future__ import annotations

import dataclasses
import random

from megatron_rmipo.embedded.sentences import Topic, answer_sentences, ask, boilerplate_sentences, near_topic, random_topic

# Kind of a preference pair -> its share.
#   boilerplate   a good answer against fluent boilerplate: clear to a reader, hard for a reward that is a log-probability
#   other_prompt  a good answer against a good answer to another prompt: clear
#   hedged        the same two, both opened by the same boilerplate
#   partial       a good answer against one that stops halfway and goes on with boilerplate: ambiguous
#   near          a good answer against the answer to a prompt that differs in one word: ambiguous
KIND_SHARES = {"boilerplate": 0.4, "other_prompt": 0.15, "hedged": 0.1, "partial": 0.15, "near": 0.2}

# What supervised examples answer with -> share. Boilerplate is frequent, so a model trained on them finds it likely.
SUPERVISED_SHARES = {"answer": 0.4, "boilerplate": 0.35, "hedged": 0.1, "partial": 0.15}


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a data set. ``kind`` is for reading results by; training does not look at it."""

    prompt: str
    chosen: str
    rejected: str
    kind: str


def preference_row(topic: Topic, kind: str, rng: random.Random) -> Row:
    """A pair of the given kind (a key of :data:`KIND_SHARES`) for a topic."""
    chosen = answer_sentences(topic, rng)
    other = answer_sentences(_other_topic(topic, rng), rng)
    if kind == "boilerplate":
        rejected = boilerplate_sentences(rng, 2)
    elif kind == "other_prompt":
        rejected = other
    elif kind == "hedged":
        opening = boilerplate_sentences(rng, 1)
        chosen, rejected = opening + chosen, opening + other
    elif kind == "partial":
        rejected = chosen[:1] + boilerplate_sentences(rng, 1)
    else:
        rejected = answer_sentences(near_topic(topic, rng), rng)
    return Row(ask(topic), " ".join(chosen), " ".join(rejected), kind)


def supervised_row(topic: Topic, kind: str, rng: random.Random) -> Row:
    """An example of the given kind (a key of :data:`SUPERVISED_SHARES`); its rejected response is filler, not trained on."""
    if kind == "boilerplate":
        chosen, rejected = boilerplate_sentences(rng, 2), boilerplate_sentences(rng, 3)
    else:
        chosen, rejected = answer_sentences(topic, rng), boilerplate_sentences(rng, 2)
        if kind == "hedged":
            chosen = boilerplate_sentences(rng, 1) + chosen
        elif kind == "partial":
            chosen = chosen[:1] + boilerplate_sentences(rng, 1)
    return Row(ask(topic), " ".join(chosen), " ".join(rejected), kind)


def make_rows(num_supervised: int, num_train: int, num_held_out: int, seed: int) -> tuple[list[Row], list[Row], list[Row]]:
    """(supervised, preference train, preference held-out) rows. No held-out prompt stands in either training set.

    Each set has its own generator, so that the size of one does not change the rows of another.
    """
    held_out = _preferences(num_held_out, random.Random(f"{seed} held-out"), set())
    taken = {row.prompt for row in held_out}
    train = _preferences(num_train, random.Random(f"{seed} train"), taken)
    rng = random.Random(f"{seed} supervised")
    kinds = rng.choices(list(SUPERVISED_SHARES), list(SUPERVISED_SHARES.values()), k=num_supervised)
    supervised = [supervised_row(_new_topic(rng, taken), kind, rng) for kind in kinds]
    return supervised, train, held_out


def tokenizer_texts(count: int, seed: int) -> list[str]:
    """Text to train a tokenizer on; apart from the data sets, so that their sizes do not change the vocabulary."""
    rng = random.Random(f"{seed} tokenizer")
    topics = [random_topic(rng) for _ in range(count)]
    answers = [" ".join(answer_sentences(topic, rng)) for topic in topics]
    return [ask(topic) for topic in topics] + answers + [" ".join(boilerplate_sentences(rng, 2)) for _ in topics]


def _preferences(count: int, rng: random.Random, taken: set[str]) -> list[Row]:
    kinds = rng.choices(list(KIND_SHARES), list(KIND_SHARES.values()), k=count)
    return [preference_row(_new_topic(rng, taken), kind, rng) for kind in kinds]


def _new_topic(rng: random.Random, taken: set[str]) -> Topic:
    while ask(topic := random_topic(rng)) in taken:
        pass
    return topic


def _other_topic(topic: Topic, rng: random.Random) -> Topic:
    """A topic with another verb and another object."""
    while (other := random_topic(rng)).verb == topic.verb or other.object == topic.object:
        pass
    return other
