"""What the generated rows promise: the kinds, what they depend on, and that nothing held out is trained on."""

from __future__ import annotations

import collections
import random

import pytest

from megatron_rmipo.embedded.pairs import KIND_SHARES, SUPERVISED_SHARES, Row, make_rows, preference_row
from megatron_rmipo.embedded.sentences import (
    ADJECTIVES,
    BOILERPLATE,
    NUM_FORMS,
    OBJECTS,
    TOOLS,
    Topic,
    answer_sentences,
    ask,
    near_topic,
    random_topic,
)


@pytest.fixture(scope="module")
def rows() -> tuple[list[Row], list[Row], list[Row]]:
    return make_rows(1501, 1003, 207, seed=3)


def sentences(text: str) -> list[str]:
    return [part.rstrip(".") + "." for part in text.split(". ")]


def test_sizes_kinds_and_shares(rows: tuple[list[Row], list[Row], list[Row]]) -> None:
    assert [len(part) for part in rows] == [1501, 1003, 207]
    for part, shares in ((rows[0], SUPERVISED_SHARES), (rows[1], KIND_SHARES)):
        assert sum(shares.values()) == pytest.approx(1.0)
        counts = collections.Counter(row.kind for row in part)
        assert all(counts[kind] / len(part) == pytest.approx(share, abs=0.04) for kind, share in shares.items())


def test_nothing_held_out_is_trained_on(rows: tuple[list[Row], list[Row], list[Row]]) -> None:
    held_out = {row.prompt for row in rows[2]}
    assert not held_out & {row.prompt for row in rows[0] + rows[1]}


def test_the_two_responses_always_differ(rows: tuple[list[Row], list[Row], list[Row]]) -> None:
    assert all(row.chosen != row.rejected and row.prompt for part in rows for row in part)


def test_the_same_seed_gives_the_same_rows_and_sizes_do_not_leak_between_sets() -> None:
    assert make_rows(50, 40, 30, seed=3) == make_rows(50, 40, 30, seed=3)
    assert make_rows(50, 40, 30, seed=3)[2] == make_rows(9, 7, 30, seed=3)[2]
    assert make_rows(50, 40, 30, seed=3)[1] != make_rows(50, 40, 30, seed=4)[1]


def test_an_answer_takes_up_the_prompt_and_adds_the_verbs_tool() -> None:
    rng = random.Random(0)
    for _ in range(300):
        topic = random_topic(rng)
        answer = " ".join(answer_sentences(topic, rng))
        prompt = ask(topic)
        assert all(word in answer for word in (topic.verb, topic.object, topic.adjective, TOOLS[topic.verb]))
        assert TOOLS[topic.verb] not in prompt
        # What an answer says of place, person, day or number stands in the prompt too.
        for word in (topic.place, topic.name, topic.day, topic.number):
            assert word not in answer.split() or word in prompt


@pytest.mark.parametrize("form", range(NUM_FORMS))
def test_kinds_are_what_they_are_called(form: int) -> None:
    rng = random.Random(form)
    topic = Topic(form, "repair", "rusty", "lantern", "garage", "Clara", "Friday", "three")
    content = {"repair", "rusty", "lantern"}
    boilerplate = preference_row(topic, "boilerplate", rng)
    assert set(sentences(boilerplate.rejected)) <= set(BOILERPLATE)
    assert content <= set(boilerplate.chosen.replace("lanterns", "lantern").replace(",", "").replace(".", "").split())
    other = preference_row(topic, "other_prompt", rng)
    assert not any(word in other.rejected for word in ("repair", "lantern"))
    hedged = preference_row(topic, "hedged", rng)
    assert sentences(hedged.chosen)[0] == sentences(hedged.rejected)[0]
    assert sentences(hedged.chosen)[0] in BOILERPLATE
    partial = preference_row(topic, "partial", rng)
    assert sentences(partial.chosen)[0] == sentences(partial.rejected)[0]
    assert sentences(partial.rejected)[1] in BOILERPLATE


def test_an_answer_to_another_prompt_has_another_verb_and_another_object() -> None:
    rng = random.Random(6)
    for _ in range(400):
        topic = random_topic(rng)
        other = preference_row(topic, "other_prompt", rng).rejected
        words = set(other.replace(",", "").replace(".", "").split())
        assert TOOLS[topic.verb] not in other
        assert not words & {topic.object, f"{topic.object}s"}


def test_a_near_topic_differs_in_one_word_and_its_answer_is_wrong_for_the_prompt() -> None:
    rng = random.Random(5)
    for _ in range(200):
        topic = random_topic(rng)
        near = near_topic(topic, rng)
        changed = [
            name
            for name in ("form", "verb", "adjective", "object", "place", "name", "day", "number")
            if getattr(topic, name) != getattr(near, name)
        ]
        assert len(changed) == 1
        assert changed[0] in ("verb", "adjective", "object")
        assert ask(near) != ask(topic)


def test_words_of_the_world_are_not_ambiguous() -> None:
    words = [*TOOLS, *OBJECTS, *ADJECTIVES]
    assert len(words) == len(set(words))
    assert not any(word in " ".join(BOILERPLATE).lower().replace(".", "").replace(",", "").split() for word in [*OBJECTS, *TOOLS])
