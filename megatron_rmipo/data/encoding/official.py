"""The RMiPO authors' own tokenization and truncation, faults included, for reproducing their runs.

Prompt and response are encoded together; the boundary is where the prompt's own tokens end, one token earlier if the last of them
changed. A pair beyond the limit has its prompt cut to its last ``max_prompt_length`` tokens (BOS is lost), then both responses to
their first ``max_length - max_prompt_length`` (EOS is lost).

Source: ``build_tokenized_answer`` and ``tokenize_row`` of the authors' trainer, https://github.com/liavonpenn/rmipo (d21db9b0).
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_rmipo.data.encoding.chat import ChatTemplate
from megatron_rmipo.data.encoding.tokenize import PreferenceTokenizer
from megatron_rmipo.data.reading.rows import PreferencePair, RowFault, Turn
from megatron_rmipo.errors import DataError


def render_official(template: ChatTemplate, pair: PreferencePair) -> tuple[str, ...]:
    """Prompt and responses as the authors render them: no generation prompt, each answer as a conversation of its own.

    Raises:
        RowFault: the template refuses a conversation.
    """
    prompt = pair.prompt
    if prompt[0].role != "system" and ("system" in template.source or "<|im_start|>" in template.source):
        prompt = (Turn("system", ""), *prompt)
    answers = [template.render((turn,), pair.variables, add_generation_prompt=False) for turn in pair.responses.values()]
    bos = template.special_tokens.get("bos_token", "")
    return template.render(prompt, pair.variables, add_generation_prompt=False), *(answer.removeprefix(bos) for answer in answers)


def encode_official(
    tokenizer: PreferenceTokenizer, prompt: str, responses: Sequence[str], max_length: int, max_prompt_length: int
) -> tuple[list[int], list[list[int]], bool]:
    """Ids of the prompt and of each response from rendered text, and whether anything was cut.

    Raises:
        DataError: the tokenizer has no BOS or no EOS, which this policy needs.
        RowFault: the boundary falls differently for the two responses, so that they have no prompt in common.
    """
    bos, eos = tokenizer.info.bos_token_id, tokenizer.info.eos_token_id
    if bos is None or eos is None:
        raise DataError(f"{tokenizer.spec.name}: --overlong official needs a tokenizer with BOS and EOS. Choose another policy.")
    alone, *together = tokenizer.backend.first([prompt, *(prompt + response for response in responses)])
    splits = [len(alone) if whole[: len(alone)] == alone else len(alone) - 1 for whole in together]
    prompts = [_with_bos(whole[:split], bos) for whole, split in zip(together, splits, strict=True)]
    if prompts[0] != prompts[-1]:
        raise RowFault(
            "boundary", "", f"the prompt's last tokens are {prompts[0][-3:]} before chosen and {prompts[1][-3:]} before rejected"
        )
    ended = [_with_eos(whole[split:], eos) for whole, split in zip(together, splits, strict=True)]
    ids, longer = prompts[0], max(map(len, ended))
    truncated = len(ids) + longer > max_length
    if truncated:
        ids = ids[-max_prompt_length:]
    if len(ids) + longer > max_length:
        ended = [response[: max_length - max_prompt_length] for response in ended]
    return ids, ended, truncated


def _with_bos(ids: list[int], bos: int) -> list[int]:
    return ids if ids[:1] == [bos] else [bos, *ids]


def _with_eos(ids: list[int], eos: int) -> list[int]:
    return ids if ids[-1:] == [eos] else [*ids, eos]
