"""The token that stands before a response in log p(y), so that all tokens of the response are scored."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from megatron_rmipo.data.encoding.tokenize import PreferenceTokenizer
from megatron_rmipo.data.store.manifest import Manifest


@dataclasses.dataclass(frozen=True)
class ContextToken:
    """What stands before a response in log p(y).

    Attributes:
        token_id: None where nothing can: the first token of a response is not scored then.
        text: what it is, in words that follow "log p(y): each response".
    """

    token_id: int | None
    text: str


def find_context_token(tokenizer: PreferenceTokenizer, manifests: Sequence[Manifest]) -> ContextToken:
    """The tokenizer's BOS; where it has none, the special token that every prompt begins with; else nothing.

    What begins every prompt is what the model has seen at the beginning of its conversations: ``<|im_start|>`` with a template of
    ChatML's kind.

    Args:
        tokenizer: of the model.
        manifests: of all data of the run, made with that tokenizer.
    """
    names = {token_id: token for token, token_id in tokenizer.backend.special_ids.items()}
    bos = tokenizer.info.bos_token_id
    if bos is not None:
        return ContextToken(bos, f"after {names.get(bos, tokenizer.decode([bos]))} (token {bos}), the tokenizer's BOS")
    first, *others = {manifest.first_token_id for manifest in manifests}
    if first is not None and not others and first in names:
        return ContextToken(first, f"after {names[first]} (token {first}), which begins every prompt; the tokenizer has no BOS")
    return ContextToken(
        None, "alone, its first token not scored: the tokenizer has no BOS, and no special token begins every prompt"
    )
