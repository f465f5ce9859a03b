"""What the log-probs of the reference cost a rank, at two sizes: who does not look for what is missing pays nothing a row."""

from __future__ import annotations

from benchmarks.scale_scores import score_figures


def test_only_the_first_rank_pays_by_the_row() -> None:
    small, large = score_figures(50_001), score_figures(1_600_001)
    assert (small["rows_scored"], large["rows_scored"]) == (5_000, 160_000)
    for what in ("other_rank", "batch", "write"):
        assert large[f"{what}_private_bytes"] < 1.5 * small[f"{what}_private_bytes"]
    assert large["told_bytes"] == 200_001
    # Two sets of a bit a row, and pieces of the file.
    assert large["first_rank_none_there_private_bytes"] < 16e6
    assert large["bytes_on_disk"] < 100_000
