"""Rows of the embedded data sets: supervised examples and preference pairs of known kinds."""

from __future__ import annotations

import dataclasses
import random

from megatron_rmipo.embedded.sentences import (
    NUM_PHRASINGS,
    Topic,
    answer_sentences,
    ask,
    boilerplate_sentences,
    near_topic,
    phrased_answer,
    random_topic,
    topic_of_another_detail,
)

# Kind of a preference pair -> its share. The first four differ in style: clear to a reader, hard for a reward that is a
# log-probability until training has moved it. The last three differ in what they say, with no style or length to go by.
#   boilerplate  a good answer against fluent boilerplate, which a supervised model finds more likely
#   partial      against one that stops halfway and goes on with boilerplate
#   short        against its first sentence alone: the rejected response is shorter, and part of the chosen one
#   echo         against one that repeats the prompt and then errs in one word: the rejected one is longer, and easy to predict
#   near         against the answer to a prompt that differs in one word
#   hedged       the same two, both opened by the same boilerplate
#   detail       against the same answer with another place, person, day or number, one word of twenty
KIND_SHARES = {"boilerplate": 0.15, "partial": 0.15, "short": 0.1, "echo": 0.1, "near": 0.25, "hedged": 0.1, "detail": 0.15}
# So many of the pairs trained on have their responses the wrong way round; those held out have none.
LABEL_NOISE = 0.1

# What supervised examples answer with -> share. All of it is likely to a model trained on them, what is rejected later as well.
SUPERVISED_SHARES = {"answer": 0.4, "boilerplate": 0.2, "partial": 0.15, "echo": 0.1, "short": 0.15}


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a data set. ``kind`` is for reading results by; training does not look at it."""

    prompt: str
    chosen: str
    rejected: str
    kind: str


def preference_row(topic: Topic, kind: str, rng: random.Random) -> Row:
    """A pair of the given kind (a key of :data:`KIND_SHARES`) for a topic, its responses the right way round."""
    phrasing = rng.randrange(NUM_PHRASINGS)
    chosen = phrased_answer(topic, phrasing)
    near = answer_sentences(near_topic(topic, rng), rng)
    detail = phrased_answer(topic_of_another_detail(topic, rng), phrasing)
    boilerplate = boilerplate_sentences(rng, 2)
    opening = boilerplate[:1] if kind == "hedged" else []
    rejected = {
        "boilerplate": boilerplate,
        "partial": chosen[:1] + boilerplate[:1],
        "short": chosen[:1],
        "echo": [ask(topic), *near],
        "near": near,
        "hedged": near,
        "detail": detail,
    }[kind]
    return Row(ask(topic), " ".join(opening + chosen), " ".join(opening + rejected), kind)


def supervised_row(topic: Topic, kind: str, rng: random.Random) -> Row:
    """An example of the given kind (a key of :data:`SUPERVISED_SHARES`); its rejected response is filler, not trained on."""
    answer, boilerplate = answer_sentences(topic, rng), boilerplate_sentences(rng, 2)
    chosen = {
        "answer": answer,
        "boilerplate": boilerplate,
        "partial": answer[:1] + boilerplate[:1],
        "echo": [ask(topic), *answer],
        "short": answer[:1],
    }[kind]
    return Row(ask(topic), " ".join(chosen), " ".join(boilerplate_sentences(rng, 3)), kind)


def make_rows(num_supervised: int, num_train: int, num_held_out: int, seed: int) -> tuple[list[Row], list[Row], list[Row]]:
    """(supervised, preference train, preference held-out) rows. No held-out prompt stands in either training set.

    Of the preference pairs trained on, :data:`LABEL_NOISE` are the wrong way round; all held-out ones are right.

    Each set has its own generator, so that the size of one does not change the rows of another.
    """
    held_out = _preferences(num_held_out, random.Random(f"{seed} held-out"), set())
    taken = {row.prompt for row in held_out}
    train = _preferences(num_train, random.Random(f"{seed} train"), taken)
    rng = random.Random(f"{seed} labels")
    train = [_mislabeled(row, rng) for row in train]
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


def _mislabeled(row: Row, rng: random.Random) -> Row:
    return row if rng.random() >= LABEL_NOISE else dataclasses.replace(row, chosen=row.rejected, rejected=row.chosen)


def _new_topic(rng: random.Random, taken: set[str]) -> Topic:
    while ask(topic := random_topic(rng)) in taken:
        pass
    return topic
