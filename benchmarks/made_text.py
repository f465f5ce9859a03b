"""Preference rows and a tokenizer made on the spot, where no data set is given: words of no language, in sentences.

How long each text is comes from recorded token lengths. Words come by rank as in natural text (a word's share falls as one over
its rank), commoner ones being shorter, so that the tokenizer finds some whole and breaks others.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_rmipo.data.encoding.templates import BUILT_IN_TEMPLATES, NEEDED_TOKENS

NUM_WORDS = 20_000
WORDS_PER_TOKEN = 0.7
MEAN_EXCHANGES = 1.5  # before the last turn of a dialogue, as in Anthropic's HH
VOCAB_SIZE = 8_192
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
_CONSONANTS, _VOWELS = "bcdfghlmnprstvw", ("a", "e", "i", "o", "u", "ea", "ou")


class TextMaker:
    """Makes texts of a number of words, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        syllables = [first + vowel for first in _CONSONANTS for vowel in _VOWELS]
        lengths = np.sort(self.rng.integers(1, 5, NUM_WORDS))
        # All at once: a draw for each word takes a hundred times as long.
        drawn = self.rng.choice(syllables, lengths.sum()).tolist()
        ends = np.cumsum(lengths).tolist()
        words = ["".join(drawn[first:end]) for first, end in zip([0, *ends], ends, strict=False)]
        self._words = np.array(words, dtype=object)
        self._by_rank = np.cumsum(1 / np.arange(3, NUM_WORDS + 3))

    def text(self, num_words: int) -> str:
        """Sentences of 4 to 24 words, every fourth or so beginning a paragraph."""
        ranks = np.searchsorted(self._by_rank, self.rng.random(num_words) * self._by_rank[-1])
        words = self._words[ranks].tolist()
        parts: list[str] = []
        start = 0
        while start < num_words:
            size, mark, gap = int(self.rng.integers(4, 25)), int(self.rng.integers(5)), int(self.rng.integers(4))
            sentence = " ".join(words[start : start + size]).capitalize()
            parts += [sentence, "?" if mark == 0 else ".", "\n\n" if gap == 0 else " "]
            start += size
        return "".join(parts[:-1])

    def dialogue(self, num_words: int) -> str:
        """A transcript in the form of Anthropic's HH that ends with the human's turn."""
        num_turns = 1 + 2 * min(int(self.rng.poisson(MEAN_EXCHANGES)), num_words // 16)
        turns = [self.text(max(1, num_words // num_turns)).replace("\n\n", "\n") for _ in range(num_turns)]
        return "".join(f"\n\n{'Assistant' if number % 2 else 'Human'}: {turn}" for number, turn in enumerate(turns))


def make_rows(source: str, lengths: np.ndarray, seed: int) -> list[dict[str, str]]:
    """Rows with about as many tokens as recorded: dialogues for ``hh``, else a prompt and two answers.

    Args:
        source: name of the lengths.
        lengths: int ``[P, 3]``: tokens of prompt, chosen, rejected.
        seed: of words and sentences.
    """
    maker = TextMaker(seed)
    rows = []
    for sizes in np.maximum(1, np.round(lengths * WORDS_PER_TOKEN)).astype(int).tolist():
        prompt = maker.dialogue(sizes[0]) if source == "hh" else maker.text(sizes[0])
        chosen, rejected = (maker.text(size) for size in sizes[1:])
        if source == "hh":
            rows.append({name: f"{prompt}\n\nAssistant: {text}" for name, text in (("chosen", chosen), ("rejected", rejected))})
        else:
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


def save_rows(path: Path, rows: Iterable[dict[str, str]]) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def save_tokenizer(directory: Path, rows: Sequence[dict[str, str]]) -> None:
    """Train byte-level BPE on the rows; save it as a Hugging Face directory with Llama 3's special tokens and chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special_tokens = (BOS, EOS, *NEEDED_TOKENS["llama3"])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special_tokens],
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for row in rows for text in row.values()), trainer)
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS}
    config |= {"chat_template": BUILT_IN_TEMPLATES["llama3"]}
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
