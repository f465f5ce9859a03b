"""What a judge is asked, and what its answer says."""

from __future__ import annotations

import re
from pathlib import Path

from megatron_rmipo.errors import ConfigError

FIELDS = ("{question}", "{answer_a}", "{answer_b}")
DEFAULT_TEMPLATE = """\
Two assistants, A and B, answered the same user. Decide whose answer serves the user better: whether it does what was asked, is \
correct, complete and to the point. Do not let the order of the answers, their length or their layout decide.

<question>
{question}
</question>

<answer_of_A>
{answer_a}
</answer_of_A>

<answer_of_B>
{answer_b}
</answer_of_B>

Say in a few sentences what speaks for each answer. Then end with your verdict alone on the last line: [[A]] if A is better, \
[[B]] if B is better, [[C]] if neither is.
"""
# As MT-Bench's and Arena-Hard's judges write it.
_VERDICT = re.compile(r"\[\[\s*(A|B|C|tie|A>>B|A>B|A=B|B=A|B>A|B>>A|A<B|A<<B|B<A|B<<A)\s*\]\]", re.IGNORECASE)
_MEANS = {"A": "A", "B": "B", "C": "tie", "TIE": "tie", "A=B": "tie", "B=A": "tie"}


def read_template(path: Path | None) -> str:
    """The text that a judge is asked with; None for ours.

    Raises:
        ConfigError: it cannot be read, or lacks a field.
    """
    if path is None:
        return DEFAULT_TEMPLATE
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"--prompt-template {path}: cannot be read ({reason}).") from None
    missing = [field for field in FIELDS if field not in text]
    if missing:
        raise ConfigError(
            f"--prompt-template {path}: it has no {', '.join(missing)}; the judge would not see what it stands for."
        )
    return text


def fill_template(template: str, question: str, answer_a: str, answer_b: str) -> str:
    """The judge's message. Braces in the texts stay as they are."""
    texts = dict(zip(FIELDS, (question, answer_a, answer_b), strict=True))
    return re.sub("|".join(map(re.escape, FIELDS)), lambda found: texts[found[0]], template)


def parse_verdict(text: str) -> str | None:
    """``A``, ``B`` or ``tie``; None where there is no verdict. The last one counts: a judge may weigh others before it."""
    found = _VERDICT.findall(text)
    if not found:
        return None
    verdict = str(found[-1]).upper()
    if verdict in _MEANS:
        return _MEANS[verdict]
    first, second = verdict[0], verdict[-1]
    return first if ">" in verdict else second


def as_conversation(asked: tuple[str, ...], answers: tuple[str, ...]) -> tuple[str, str]:
    """Question and answer as a judge reads them: those of several turns with a heading each."""
    if len(asked) == 1:
        return asked[0], answers[0]
    numbered = [[f"[turn {number}]\n{text}" for number, text in enumerate(texts, 1)] for texts in (asked, answers)]
    return "\n\n".join(numbered[0]), "\n\n".join(numbered[1])
