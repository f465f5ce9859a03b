from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rmipo.data.encoding.tokenize import PreferenceTokenizer, load_tokenizer
from tests.data.tokenizers import save_byte_bpe, save_sentencepiece


@pytest.fixture(scope="session")
def byte_bpe(tmp_path_factory: pytest.TempPathFactory) -> PreferenceTokenizer:
    """Byte-level BPE with Llama 3's special tokens and chat template."""
    return load_tokenizer(str(save_byte_bpe(tmp_path_factory.mktemp("byte_bpe"))))


@pytest.fixture(scope="session")
def sentencepiece_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sentencepiece(tmp_path_factory.mktemp("sentencepiece") / "small.model")


@pytest.fixture(scope="session")
def pieces(sentencepiece_path: Path) -> PreferenceTokenizer:
    """A bare sentencepiece model with byte fallback."""
    return load_tokenizer(str(sentencepiece_path))
