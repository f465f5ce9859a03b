"""A sentencepiece tokenizer trained on the embedded text, and the same vocabulary as a Hugging Face tokenizer."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
import transformers

BOS, END_OF_TURN, UNKNOWN = "<|begin_of_text|>", "<|eot_id|>", "<|unknown|>"
HEADER_START, HEADER_END = "<|start_header_id|>", "<|end_header_id|>"

# Llama 3's form of a conversation.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def train_sentencepiece(texts: Iterable[str], vocab_size: int) -> bytes:
    """A BPE model with byte fallback, as the bytes of a ``.model`` file. The same texts give the same bytes."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        character_coverage=1.0,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        # A response starts behind the newlines of its header, not behind a space.
        add_dummy_prefix=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        unk_piece=UNKNOWN,
        bos_piece=BOS,
        eos_piece=END_OF_TURN,
        control_symbols=[HEADER_START, HEADER_END],
        user_defined_symbols=["\n"],
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def save_tokenizer(model: bytes, directory: Path) -> transformers.PreTrainedTokenizerBase:
    """Write ``tokenizer.model`` and its Hugging Face form, which ``AutoTokenizer.from_pretrained(directory)`` loads offline."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.model").write_bytes(model)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocab = {processor.id_to_piece(number): number for number in range(processor.get_piece_size())}
    tokenizer = transformers.LlamaTokenizer(
        vocab=vocab,
        merges=_merges(processor, vocab),
        unk_token=UNKNOWN,
        bos_token=BOS,
        eos_token=END_OF_TURN,
        add_prefix_space=False,
        additional_special_tokens=[HEADER_START, HEADER_END],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(directory)
    return tokenizer


def _merges(processor: sentencepiece.SentencePieceProcessor, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """The BPE merges behind the pieces, in the order they were learned.

    sentencepiece merges whichever two neighbours make the piece learned first, so every way to cut a piece in two known ones is
    a merge, at the rank of the piece.
    """
    merges = []
    for piece, number in vocab.items():
        if processor.is_control(number) or processor.is_byte(number) or processor.is_unknown(number):
            continue
        cuts = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        merges += [cut for cut in cuts if cut[0] in vocab and cut[1] in vocab]
    return merges
