"""Pairs token by token: the text of each, and how it is marked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_rmipo.data.encoding.tokenize import load_tokenizer
from megatron_rmipo.reports.page.run_files import records_so_far
from megatron_rmipo.reports.page.token_record import LEAST, MOST, TOKENS_FILE, choose_pairs
from megatron_rmipo.reports.page.tokens import Piece, find_tokenizer, pieces_of, shown_pairs
from tests.data.tokenizers import save_byte_bpe, save_sentencepiece
from tests.reports.page.runs import write_lines, write_page_run, write_page_tokens

TEXT = " Gr\u00fc\u00dfe, \u4f60\u597d! \U0001f600 twice  spaced\n\nend"


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_the_pieces_of_a_text_are_the_text(kind: str, tmp_path: Path) -> None:
    path = save_byte_bpe(tmp_path / "bpe") if kind == "bytes" else save_sentencepiece(tmp_path / "tokenizer.model")
    tokenizer = load_tokenizer(str(path))
    prompt, ids = tokenizer.encode("Say it.\n"), tokenizer.backend.continuation([TEXT])[0]
    logps = [-0.01 * number for number in range(len(ids))]
    pieces = pieces_of(ids, logps, [None, *logps[1:]], prompt, tokenizer.decode_continuation)
    assert "".join(piece.text for piece in pieces) == TEXT
    # Bytes of one character are one piece, with the sum of their numbers.
    assert any(piece.text == "\U0001f600" or piece.text == " \U0001f600" for piece in pieces)
    assert len(pieces) < len(ids)
    assert sum(piece.logp for piece in pieces) == pytest.approx(sum(logps))
    assert pieces[0].alone is None
    assert sum(piece.alone or 0.0 for piece in pieces[1:]) == pytest.approx(sum(piece.logp for piece in pieces[1:]))


@pytest.mark.parametrize(
    ("logp", "alone", "marks"),
    [
        (-0.1, -0.2, ""),
        (-0.1, -0.7, "p1"),
        (-0.1, -2.2, "p2"),
        (-1.5, -0.8, "n1 s1"),
        (-3.0, -0.8, "n2 s2"),
        (-5.0, None, "s3"),
    ],
)
def test_a_token_is_marked_by_what_the_prompt_does_and_by_surprise(logp: float, alone: float | None, marks: str) -> None:
    assert Piece("x", logp, alone).marks == marks


def test_most_and_least_certain_pairs_are_shown_with_their_sums(tmp_path: Path) -> None:
    logs = write_page_run(tmp_path / "run")
    write_page_tokens(logs, {"prompt": "p", "chosen": "abc"})
    write_page_tokens(logs, {"prompt": "q", "chosen": "ab", "rejected": "c"}, pair=1, why=LEAST)
    last = [*records_so_far(logs / "held_out_pairs.jsonl")]
    shown = shown_pairs([*records_so_far(logs / TOKENS_FILE)], last, None)
    assert [(why, [pair.number for pair in pairs]) for why, pairs in shown.items()] == [(MOST, [3]), (LEAST, [1])]
    (pair,) = shown[MOST]
    assert pair.values["rewards/margins"] == pytest.approx(1.03)
    (chosen,) = pair.responses
    assert (chosen.logp, chosen.alone) == (pytest.approx(-0.3), pytest.approx(-0.6))
    # The first token was not scored alone, and does not count.
    assert chosen.pmi == pytest.approx(0.3)
    assert [piece.text for piece in chosen.telling] == ["[99]", "[98]"]


def test_pairs_are_chosen_by_margin_or_by_loss_of_the_last_evaluation(tmp_path: Path) -> None:
    assert choose_pairs(tmp_path, 7) == []
    margins = [0.5, -2.0, None, 3.0, 0.0]
    write_lines(tmp_path / "held_out_pairs.jsonl", [{"step": 7, "rewards/margins": margin} for margin in margins])
    assert choose_pairs(tmp_path, 7) == [(3, MOST), (0, MOST), (1, LEAST), (4, LEAST)]
    assert choose_pairs(tmp_path, 8) == []
    write_lines(tmp_path / "held_out_pairs.jsonl", [{"step": 7, "loss": loss} for loss in (2.0, 0.5, 1.0)])
    assert choose_pairs(tmp_path, 7) == [(1, MOST), (2, MOST), (0, LEAST)]
    write_lines(tmp_path / "held_out_pairs.jsonl", [{"step": 7, "rewards/margins": float(number)} for number in range(100)])
    chosen = choose_pairs(tmp_path, 7)
    assert [number for number, _ in chosen] == [*range(99, 91, -1), *range(8)]


def test_a_tokenizer_is_looked_for_where_it_may_be(tmp_path: Path) -> None:
    path = save_byte_bpe(tmp_path / "bpe")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "tokenizer.json").write_text(json.dumps({"no": "tokenizer"}))
    assert find_tokenizer([None, "owner/name-on-a-hub", str(broken), str(path)]) is not None
    assert find_tokenizer([None, str(broken)]) is None
