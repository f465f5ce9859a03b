"""What every picture has in common: the style, the bytes, and what is said without matplotlib."""

import re
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgb, to_rgba
from matplotlib.figure import Figure
from PIL import Image

from megatron_rmipo.errors import ConfigError
from megatron_rmipo.reports.pictures.style import (
    COLORS,
    DASHES,
    HATCHES,
    MARKERS,
    bar_style,
    legend_below,
    line_style,
    marker_style,
    new_figure,
    save,
    short_label,
    styled,
)

# Of red, green and blue in what is seen in grey.
GREY = (0.299, 0.587, 0.114)


@styled
def draw(label: str = "a line") -> Figure:
    figure, panels = new_figure(1, 2, (4.0, 2.0))
    lines = [
        panels[0][0].plot([0.0, 1.0], [number, 1.0], label=f"{label} {number}", **line_style(number))[0] for number in range(5)
    ]
    panels[0][1].bar([0, 1], [1.0, 2.0], **bar_style(2))
    legend_below(figure, lines)
    return figure


def test_nothing_is_told_apart_by_colour_alone() -> None:
    # In grey a line is known by its dashes and its marker, a bar by its hatch.
    shapes = [(DASHES[number % len(DASHES)], MARKERS[number % len(MARKERS)]) for number in range(40)]
    assert len(set(map(str, shapes))) == 40
    assert [line_style(number)["linestyle"] for number in range(5)] == list(DASHES)
    assert [marker_style(number)["marker"] for number in range(8)] == list(MARKERS)
    assert len({bar_style(number)["hatch"] for number in range(len(HATCHES))}) == len(HATCHES)
    assert len({to_rgb(color) for color in COLORS}) == len(COLORS)
    # A hatch is seen: it has another lightness than what it stands on, which hides nothing and is hidden by nothing.
    for number in range(len(COLORS)):
        face, edge = to_rgba(bar_style(number)["facecolor"]), to_rgba(bar_style(number)["edgecolor"])
        assert (face[3], edge[3]) == (1.0, 1.0)
        assert np.dot(face[:3], GREY) - np.dot(edge[:3], GREY) > 0.1


def test_the_same_figure_has_the_same_bytes_in_every_format(tmp_path: Path) -> None:
    heads = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}
    for form, head in heads.items():
        for name in ("first", "again"):
            save(draw(), tmp_path / "new" / f"{name}.{form}")
        content = (tmp_path / "new" / f"first.{form}").read_bytes()
        assert content.startswith(head)
        assert content == (tmp_path / "new" / f"again.{form}").read_bytes()
    # Text stays text in an SVG, and in a PDF it is of a font that is there (type 42).
    drawn = (tmp_path / "new/first.svg").read_text()
    assert ">a line 3</text>" in drawn
    # The hatch of the bars, on their colour.
    (pattern,) = re.findall(r"<pattern.*?</pattern>", drawn, re.DOTALL)
    assert len(set(re.findall(r"fill: ?(#\w{6})|fill=\"(#\w{6})", pattern))) == 2
    assert b"/FontFile2" in (tmp_path / "new/first.pdf").read_bytes()
    with Image.open(tmp_path / "new/first.png") as image:
        assert image.size == (600, 300)


def test_a_readers_settings_neither_change_a_picture_nor_are_changed(tmp_path: Path) -> None:
    save(draw(), tmp_path / "plain.png")
    with matplotlib.rc_context({"font.size": 30.0, "axes.facecolor": "red"}):
        save(draw(), tmp_path / "own.png")
        assert matplotlib.rcParams["font.size"] == 30.0
    assert (tmp_path / "plain.png").read_bytes() == (tmp_path / "own.png").read_bytes()


def test_the_legend_is_as_wide_as_the_figure_allows() -> None:
    # Two long names do not stand side by side in four inches.
    assert [legend._ncols for legend in draw("x" * 30).legends] == [1]  # type: ignore[attr-defined]
    assert [legend._ncols for legend in draw("a").legends] == [3]  # type: ignore[attr-defined]


def test_a_long_name_keeps_its_ends() -> None:
    assert short_label("a" * 34) == "a" * 34
    short = short_label("begin" + "x" * 60 + "end")
    assert (len(short), short.startswith("begin"), short.endswith("end")) == (33, True, True)


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    figure = draw()
    with pytest.raises(ConfigError, match=r"p\.colour: cannot be written.*Formats are png, svg, pdf"):
        save(figure, tmp_path / "p.colour")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file/p\.png: cannot be written"):
        save(figure, tmp_path / "file" / "p.png")


def test_without_matplotlib_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"pip install 'megatron-rmipo\[plots\]'"):
        draw()
