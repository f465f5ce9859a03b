"""A small world of prompts and answers in which what is right depends on the prompt.

A prompt asks how to do something (a verb) to a thing (an adjective and an object), with a place, a person, a day or a number.
A good answer takes these words up and adds the verb's own tool, which the prompt does not name. Boilerplate fits every prompt and
says nothing: fluent, frequent, with a high log p(y).
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping
from typing import Any


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


TOOLS = {
    "repair": "a small wrench",
    "paint": "a soft brush",
    "clean": "warm water and soap",
    "polish": "a cotton cloth",
    "sharpen": "a flat stone",
    "move": "a low cart",
    "store": "a dry box",
    "decorate": "a roll of ribbon",
    "measure": "a steel ruler",
    "photograph": "a bright lamp",
    "wrap": "thick brown paper",
    "label": "a black marker",
    "hang": "a strong hook",
    "glue": "a drop of resin",
    "dry": "a warm towel",
    "inspect": "a magnifying glass",
    "sell": "an honest sign",
    "draw": "a sharp pencil",
    "weigh": "a brass balance",
    "oil": "a thin can of oil",
}
OBJECTS = _words(
    "lantern kettle bicycle violin drawer mirror ladder basket bottle candle carpet chair clock cradle curtain drum fiddle flute "
    "garden gate guitar hammer helmet jacket jar kite lamp locket map mast mattress mug napkin oven paddle pillow plate pot "
    "quilt radio rudder saddle sail shovel sled spoon stool suitcase tent trumpet umbrella vase wagon wallet wheel window"
)
ADJECTIVES = _words(
    "rusty broken heavy fragile wooden silver dusty muddy narrow crooked antique painted hollow yellow purple crimson striped "
    "tiny round square stiff gentle noisy sturdy"
)
PLACES = _words(
    "kitchen garage attic cellar meadow harbor school library station market chapel barn office studio bakery workshop"
)
NAMES = _words(
    "Clara Omar Nina Pavel Ingrid Mateo Yuki Amara Leo Sofia Tariq Elena Hugo Priya Jonas Mina Felix Rosa Ivan Zoe Anton Bea "
    "Cyrus Dora"
)
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
NUMBERS = _words("two three four five six seven eight nine")

BOILERPLATE = (
    "That is a great question, and there are many things to consider.",
    "It really depends on your situation and on what you want to achieve.",
    "There is no single answer that works for everyone.",
    "In general, it is important to plan ahead and to stay patient.",
    "Many people have asked this before, and opinions differ.",
    "You may want to do some research and talk to an expert.",
    "Please let me know if you have any other questions.",
    "I hope this helps, and I wish you the best of luck.",
    "As always, take your time and keep an open mind.",
    "Every case is different, so think about your needs first.",
)


@dataclasses.dataclass(frozen=True)
class Topic:
    """What a prompt is about, and in which of the forms of :func:`ask` it is asked."""

    form: int
    verb: str
    adjective: str
    object: str
    place: str
    name: str
    day: str
    number: str


# Field of a topic -> the words it may have.
_WORDS: Mapping[str, tuple[str, ...]] = {
    **{"verb": tuple(TOOLS), "adjective": ADJECTIVES, "object": OBJECTS},
    **{"place": PLACES, "name": NAMES, "day": DAYS, "number": NUMBERS},
}
# Form -> the fields that the second sentence of its answers takes up.
_DETAILS = (("place",), ("day",), ("name", "day"), ("name", "place"), ("number", "place"), ("number", "day"))
NUM_FORMS = len(_DETAILS)
NUM_PHRASINGS = 3


def random_topic(rng: random.Random) -> Topic:
    """A topic drawn uniformly."""
    return Topic(rng.randrange(NUM_FORMS), **{field: rng.choice(words) for field, words in _WORDS.items()})


def near_topic(topic: Topic, rng: random.Random) -> Topic:
    """A topic asked in the same form that differs in one thing: the verb, the object or the adjective."""
    return _with_another(topic, rng.choice(("verb", "object", "adjective")), rng)


def topic_of_another_detail(topic: Topic, rng: random.Random) -> Topic:
    """A topic that differs in a place, a person, a day or a number, one that its prompt and its answer name."""
    return _with_another(topic, rng.choice(_DETAILS[topic.form]), rng)


def _with_another(topic: Topic, field: str, rng: random.Random) -> Topic:
    changed: dict[str, Any] = {field: rng.choice([word for word in _WORDS[field] if word != getattr(topic, field)])}
    return dataclasses.replace(topic, **changed)


def ask(topic: Topic) -> str:
    """The prompt."""
    t = topic
    return (
        f"How do I {t.verb} the {t.adjective} {t.object} in the {t.place}?",
        f"My {t.object} is {t.adjective}. How can I {t.verb} it before {t.day}?",
        f"{t.name} wants to {t.verb} the {t.adjective} {t.object} before {t.day}. What should {t.name} know?",
        f"Give {t.name} some tips. The {t.adjective} {t.object} in the {t.place} is hard to {t.verb}.",
        f"Is it a good idea to {t.verb} {t.number} {t.adjective} {t.object}s in the {t.place}?",
        f"I have {t.number} {t.adjective} {t.object}s. How do I {t.verb} them before {t.day}?",
    )[topic.form]


def answer_sentences(topic: Topic, rng: random.Random) -> list[str]:
    """A good answer, two sentences. It takes up only what the prompt says, and the verb's tool."""
    return phrased_answer(topic, rng.randrange(NUM_PHRASINGS))


def phrased_answer(topic: Topic, phrasing: int) -> list[str]:
    """The good answer whose first sentence has the given one of its :data:`NUM_PHRASINGS` phrasings."""
    t = topic
    tool = TOOLS[t.verb]
    first = (
        f"To {t.verb} the {t.adjective} {t.object}, use {tool} and work slowly.",
        f"You can {t.verb} the {t.adjective} {t.object} with {tool}.",
        f"Take {tool}, look at the {t.adjective} {t.object}, and {t.verb} it step by step.",
    )[phrasing]
    second = (
        f"The {t.place} is a fine spot for the {t.object}.",
        f"Start early, and the {t.object} will be done before {t.day}.",
        f"{t.name} should begin early to finish the {t.object} before {t.day}.",
        f"{t.name} can ask for help with the {t.object} in the {t.place}.",
        f"Do the {t.number} {t.object}s one by one in the {t.place}.",
        f"Do the {t.number} {t.object}s one by one, and finish before {t.day}.",
    )[topic.form]
    return [first, second]


def boilerplate_sentences(rng: random.Random, count: int) -> list[str]:
    """Different sentences that fit every prompt."""
    return rng.sample(BOILERPLATE, count)
