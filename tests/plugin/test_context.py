"""The token before a response in log p(y), as the data says it."""

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rmipo.data.store.in_memory import PairsInMemory
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.plugin.context import context_token


def data(*told: tuple[int | None, int | None]) -> Any:
    """Data sets whose tokenizers have a BOS, and whose prompts begin with a token."""
    manifests = [SimpleNamespace(tokenizer=SimpleNamespace(bos_token_id=bos), first_token_id=first) for bos, first in told]
    return SimpleNamespace(stores=[SimpleNamespace(manifest=manifest) for manifest in manifests])


def test_bos_of_the_data_or_what_the_caller_says() -> None:
    assert context_token("bos", data((7, 7), (7, 3))) == 7
    assert context_token("bos", data((0, None))) == 0
    assert context_token(5, data((7, 7))) == 5
    assert context_token(None, data((7, 7))) is None


@pytest.mark.parametrize(
    ("pairs", "hint"),
    [
        (data((None, 9)), r"begins with token 9\)"),
        (data((None, None)), "begins with, or None"),
        (data((7, 7), (None, 8)), "context_token_id"),
        (SimpleNamespace(stores=[PairsInMemory([([1], [2], [3])])]), "does not say it"),
    ],
)
def test_data_that_does_not_say_it_is_refused(pairs: Any, hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        context_token("bos", pairs)
