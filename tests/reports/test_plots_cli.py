from pathlib import Path

import pytest

from megatron_rmipo.reports.plots_cli import main
from tests.reports.pictures.made_up import KINDS, write_rows, write_run


def test_all_draws_what_the_runs_allow_and_says_what_they_lack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "runs/a")
    rows = write_rows(tmp_path / "rows.jsonl", kind=KINDS)
    pictures = tmp_path / "pictures"
    arguments = [
        "all",
        "--runs",
        str(tmp_path / "runs"),
        "--rows",
        str(rows),
        "--output",
        str(pictures),
        "--format",
        "svg",
    ]
    assert main(arguments) == 0
    drawn = {f"{name}.svg" for name in ("gaps", "wins", "training", "schedule")}
    assert {path.name for path in pictures.iterdir()} == drawn
    lines = capsys.readouterr().out.splitlines()
    reasons = {line.split(":")[0]: line for line in lines if "not drawn" in line}
    assert set(reasons) == {"sensitivity", "rewards", "wins_judge"}
    assert "no two of them differ in beta" in reasons["sensitivity"]
    assert "no pair has both a reward margin and a score" in reasons["rewards"]
    assert sum(str(pictures) in line for line in lines) == 4


def test_the_name_says_the_format_unless_formats_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["wins", "--runs", f"mine={write_run(tmp_path / 'a')}", "--output"]
    for output, formats, names in (
        ("a.svg", [], ["a.svg"]),
        ("b", [], ["b.png"]),
        ("c.png", ["--format", "pdf", "svg"], ["c.pdf", "c.svg"]),
        ("v1.2", ["--format", "png"], ["v1.2.png"]),
    ):
        assert main([*base, str(tmp_path / output), *formats]) == 0
        assert capsys.readouterr().out.splitlines() == [str(tmp_path / name) for name in names]
        assert all((tmp_path / name).is_file() for name in names)
    assert ">mine</text>" in (tmp_path / "a.svg").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["training", "--category", "kind"], "--category: training does not look at it; it is of gaps, wins"),
        (["gaps", "--smoothing", "0.1"], "--smoothing: gaps does not look at it; it is of training"),
        (["gaps", "--category", "kind"], "--category kind: a field of which rows?"),
        (["training", "--smoothing", "2"], "--smoothing 2: a part of the training"),
        (["training", "--runs", "judge.json"], "judge.json: the file of an evaluation is drawn by plot_runs.py wins --by judge"),
        (["wins", "--by", "judge", "--runs", "judge.json"], "judge.json: not a readable evaluation"),
        (["all", "--runs", "judge.json"], "these runs allow no figure"),
    ],
)
def test_what_cannot_be_drawn_is_said(tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [] if "--runs" in words else ["--runs", str(write_run(tmp_path / "a"))]
    assert main([*words, *runs, "--output", str(tmp_path / "p")]) == 1
    assert said in capsys.readouterr().err
    assert not list(tmp_path.glob("p*"))
