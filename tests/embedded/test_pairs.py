"""What the generated rows promise: the kinds, what they depend on, and that nothing held out is trained on."""

from __future__ import annotations

import collections
import random

import pytest

from megatron_rmipo.embedded.pairs import KIND_SHARES, LABEL_NOISE, SUPERVISED_SHARES, Row, make_rows, preference_row
from megatron_rmipo.embedded.sentences import (
    ADJECTIVES,
    BOILERPLATE,
    NUM_FORMS,
    NUM_PHRASINGS,
    OBJECTS,
    TOOLS,
    Topic,
    answer_sentences,
    ask,
    near_topic,
    phrased_answer,
    random_topic,
    topic_of_another_detail,
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
    rows = {kind: preference_row(topic, kind, rng) for kind in KIND_SHARES}
    for kind, row in rows.items():
        assert (row.prompt, row.kind) == (ask(topic), kind)
        assert {"repair", "rusty", "lantern"} <= words(row.chosen)
    assert set(sentences(rows["boilerplate"].rejected)) <= set(BOILERPLATE)
    assert sentences(rows["partial"].chosen)[0] == sentences(rows["partial"].rejected)[0]
    assert sentences(rows["partial"].rejected)[1] in BOILERPLATE
    assert rows["short"].rejected == sentences(rows["short"].chosen)[0]
    assert rows["echo"].rejected.startswith(rows["echo"].prompt + " ")
    hedged = rows["hedged"]
    assert sentences(hedged.chosen)[0] == sentences(hedged.rejected)[0]
    assert sentences(hedged.chosen)[0] in BOILERPLATE
    # What is wrong in these is in the answer, which is one to another prompt.
    right = answers_to(topic)
    for kind, wrong in {
        "echo": rows["echo"].rejected.removeprefix(rows["echo"].prompt + " "),
        "near": rows["near"].rejected,
        "hedged": " ".join(sentences(hedged.rejected)[1:]),
        "detail": rows["detail"].rejected,
    }.items():
        assert wrong not in right, kind
        assert len(sentences(wrong)) == 2, kind
    assert rows["near"].chosen in right


def words(text: str) -> set[str]:
    return set(text.replace("lanterns", "lantern").replace(",", "").replace(".", "").split())


def answers_to(topic: Topic) -> set[str]:
    return {" ".join(phrased_answer(topic, phrasing)) for phrasing in range(NUM_PHRASINGS)}


def test_a_wrong_detail_is_one_word_that_the_prompt_contradicts() -> None:
    rng = random.Random(6)
    for _ in range(400):
        topic = random_topic(rng)
        row = preference_row(topic, "detail", rng)
        pairs = list(zip(row.chosen.split(), row.rejected.split(), strict=True))
        (changed,) = [(right, wrong) for right, wrong in pairs if right != wrong]
        right, wrong = (word.strip(".,") for word in changed)
        assert right in words(row.prompt.replace("?", ""))
        assert wrong not in words(row.prompt.replace("?", ""))
        other = topic_of_another_detail(topic, rng)
        assert ask(other) != ask(topic)


def test_one_label_in_ten_is_wrong_in_training_and_none_is_held_out() -> None:
    _, train, held_out = make_rows(1, 1500, 300, seed=2)

    def is_wrong(row: Row) -> bool:
        # Only a rejected response of these kinds has boilerplate.
        return any(sentence in BOILERPLATE for sentence in sentences(row.chosen))

    told = [row for row in train if row.kind in ("boilerplate", "partial")]
    assert sum(map(is_wrong, told)) / len(told) == pytest.approx(LABEL_NOISE, abs=0.03)
    assert not any(is_wrong(row) for row in held_out if row.kind in ("boilerplate", "partial"))


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
