"""Tokenizers trained on the spot, and where the shared data lie."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

LLAMA3_SPECIALS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
TEXTS = [
    "How do I bake a small loaf of bread? Mix flour, water and salt; wait; bake it hot.",
    "The river runs to the sea, and the sea does not fill. Why does it not?",
    "Write down what changed and what did not: that is the whole of the method.\n\nThen read it again.",
    "Human: hello there\nAssistant: hello to you, what may I do?",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 2))",
    "[INST] [/INST] user assistant system 0 1 2 3 4 5 6 7 8 9",
] * 4

_LLAMA3_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim"
    " + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def shared_data() -> Path:
    """The folder of shared data, which may be absent."""
    return Path(os.environ.get("RMIPO_SHARED", Path(__file__).parents[3] / "shared")) / "data"


def save_byte_bpe(
    directory: Path,
    *,
    chat_template: str | None = _LLAMA3_TEMPLATE,
    bos: str | None = "<|begin_of_text|>",
    eos: str | None = "<|end_of_text|>",
) -> Path:
    """A byte-level BPE tokenizer in Llama 3's manner, as a Hugging Face directory."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # merges across any boundary
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in LLAMA3_SPECIALS],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 4096}
    config |= {"bos_token": bos} if bos else {}
    config |= {"eos_token": eos} if eos else {}
    config |= {"chat_template": chat_template} if chat_template else {}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def save_sentencepiece(path: Path, **options: object) -> Path:
    """A sentencepiece BPE model with byte fallback, as Llama 2 and Mistral use."""
    model = io.BytesIO()
    settings: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": 420,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "hard_vocab_limit": False,
        "minloglevel": 2,
        **options,
    }
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXTS), model_writer=model, **settings)
    path.write_bytes(model.getvalue())
    return path
