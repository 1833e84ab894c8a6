"""What a person is shown: numbers with units, names, colours, and pictures as files."""

import math
import re
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import REPOSITORY
from display import (
    COLOURS,
    COMPONENT_COLOURS,
    OTHER_COLOURS,
    PREFIXES,
    engineering,
    legend_below,
    new_figure,
    percent,
    prefixed,
    save_picture,
    short_names,
    styles,
)


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (0, "J", "0 J"),
        (1, "s", "1.00 s"),
        (999.4, "", "999"),
        (999.96, "", "1.00 k"),
        (999.96e-9, "s", "1.00 µs"),
        (-0.0012345, "J", "-1.23 mJ"),
        (-999.96, "J", "-1.00 kJ"),
        (11.17e6, "", "11.2 M"),
        (1.56e12, "OPS/W", "1.56 TOPS/W"),
        (3.4e-6, "J·ms·mm²", "3.40 µJ·ms·mm²"),
        (999.4e30, "J", "999 QJ"),
        (1e33, "J", "1.00e+33 J"),  # beyond the prefixes
        (1e-33, "J", "1.00e-33 J"),
        (5e-324, "J", "4.94e-324 J"),
        (math.inf, "J", "inf J"),
        (-math.inf, "J", "-inf J"),
        (math.nan, "m²", "nan m²"),
        (1.836e-6, "m²", "1.84 mm²"),
        (433660e-12, "m²", "0.434 mm²"),
        (0.0216, "m²", "21,600 mm²"),
        (9999.7e-12, "m²", "0.0100 mm²"),
        (26.2e-12, "m²", "26.2 µm²"),
        (0.9999, "m²", "1.00 m²"),
        (0, "m²", "0 m²"),
    ],
)
def test_a_quantity_is_shown_with_the_prefix_a_person_would_choose(value, unit, shown):
    assert engineering(value, unit) == shown


def test_more_digits_are_shown_where_they_are_asked_for():
    assert engineering(1.2345678e-3, "J", digits=5) == "1.2346 mJ"
    assert engineering(999.96, "J", digits=4) == "1.000 kJ"
    assert engineering(999.96, "J", digits=5) == "999.96 J"


@given(st.floats(-1e32, 1e32).filter(lambda x: abs(x) > 1e-29), st.integers(1, 6))
def test_what_is_shown_is_the_value_to_the_last_digit(value, digits):
    number, _, name = engineering(value, "J", digits).partition(" ")
    factor = {prefix + "J": 10.0**exponent for exponent, prefix in PREFIXES.items()}[name]
    shown = float(number.replace(",", ""))
    assert 1 <= abs(shown) < 1000
    assert shown * factor == pytest.approx(value, rel=0.51 * 10 ** (1 - digits))


def test_a_column_has_the_unit_of_its_largest_value():
    one, unit = prefixed(1234e-12, "J")
    assert (1e-12 / one, unit) == (pytest.approx(1e-3), "nJ")


def test_a_share_is_written_in_one_way_everywhere():
    assert [percent(2 / 3), percent(1, 2), percent(0.0004, 0)] == ["66.7 %", "100.00 %", "0 %"]
    programs = [*REPOSITORY.glob("[!.]*.py"), *REPOSITORY.glob("[!.]*/*.py")]
    others = [path for path in programs if re.search(r"\{[^{}\n]*:[^{}\n]*%\}", path.read_text())]
    assert others == []


def test_names_are_as_short_as_tells_them_apart():
    paths = ["runs/a/student/student-last.pth", "runs/a/mdsnn/qamd-last.pth"]
    assert short_names(paths) == ["student-last", "qamd-last"]
    paths = ["runs/a/qamd-best.pth", "runs/b/qamd-best.pth", "lists/big.json"]
    assert short_names(paths) == ["a/qamd-best", "b/qamd-best", "big"]
    assert short_names(["net.json", "net.pth"]) == ["net.json", "net.pth"]
    assert short_names(["net.json", "net.json", "./net.json"]) == ["net", "net (2)", "net (3)"]
    same = ["a/net.json", "b/net.json", "b/net.json"]
    assert short_names(same) == ["a/net", "b/net", "b/net (2)"]
    assert short_names(["/x/net.json", "net.json", "y/net.json"]) == ["x/net", "net", "y/net"]
    assert short_names(["package.module:function"]) == ["package.module:function"]
    assert short_names([]) == []


NAMES = st.lists(st.text("ab./\n(2)\udcff", max_size=12) | st.sampled_from(["a (2)", "a", "/", ""]))


@given(NAMES, st.none() | st.integers(8, 14))
def test_names_are_unique_printable_and_no_wider_than_asked(paths, width):
    names = short_names(paths, width)
    assert len(set(names)) == len(paths)
    assert all(name and name.isprintable() for name in names)
    assert width is None or max(map(len, names), default=0) <= width


# Colours as the colour-blind see them: Machado, Oliveira, Fernandes (2009), severity 1, on linear
# sRGB. Differences are those of CIELAB, where 2 to 3 are just seen.
SEEN_BY = {
    "all": "1 0 0  0 1 0  0 0 1",
    "protanopia": "0.152286 1.052583 -0.204868  0.114503 0.786281 0.099216 "
    "-0.003882 -0.048116 1.051998",
    "deuteranopia": "0.367322 0.860646 -0.227968  0.280085 0.672501 0.047413 "
    "-0.011820 0.042940 0.968881",
    "tritanopia": "1.255528 -0.076749 -0.178779  -0.078411 0.930809 0.147602 "
    "0.004733 0.691367 0.303900",
}
XYZ = np.array(
    [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
) / np.array([[0.95047], [1.0], [1.08883]])


def lab(colour: str, seen: np.ndarray) -> np.ndarray:
    encoded = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    x, y, z = XYZ @ np.clip(seen @ linear, 0, 1)
    fx, fy, fz = (np.cbrt(v) if v > 0.008856 else 7.787 * v + 16 / 116 for v in (x, y, z))
    return np.array([116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)])


@pytest.mark.parametrize("eyes", SEEN_BY)
@pytest.mark.parametrize(
    "colours",
    [set(COLOURS.values()), set(COMPONENT_COLOURS.values()), set(OTHER_COLOURS)],
    ids=["networks", "components", "others"],
)
def test_all_colours_of_a_picture_are_told_apart(colours, eyes):
    seen = np.array(SEEN_BY[eyes].split(), float).reshape(3, 3)
    for one, other in combinations(sorted(colours), 2):
        difference = np.linalg.norm(lab(one, seen) - lab(other, seen))
        assert difference > 15, (one, other)


def test_one_kind_of_network_has_one_colour_and_another_line_when_it_comes_again():
    teacher, ours, again, student, unknown, second = styles(
        ["teacher", "MD-SNN", "CLK", "student", None, None]
    )
    assert teacher == {"color": COLOURS["teacher"], "linestyle": "-"}
    assert student == {"color": COLOURS["student"], "linestyle": "-"}
    assert ours == {"color": COLOURS["MD-SNN"], "linestyle": "-"}
    assert COLOURS["MD-SNN"] == COLOURS["CLK"]
    assert again["color"] not in {*COLOURS.values()}  # a lighter shade of it
    assert again["linestyle"] != "-"
    assert unknown["color"] != second["color"]
    assert not {unknown["color"], second["color"]} & {*COLOURS.values()}
    many = styles([None] * 9 + ["student"] * 5)
    assert len({tuple(style.values()) for style in many}) == len(many)


def test_a_picture_is_a_png_with_a_pdf_beside_it_and_the_same_each_time(tmp_path):
    def draw(name: str) -> list[bytes]:
        figure, panels = new_figure(4, 3, columns=2, sharey=True)
        for panel in panels:
            panel.plot([1, 2], label="student")
        panels[1].plot([2, 1], label="teacher")
        legend_below(figure, panels)
        assert [text.get_text() for text in figure.legends[0].get_texts()] == ["student", "teacher"]
        save_picture(figure, tmp_path / name)
        return [(tmp_path / name).with_suffix(end).read_bytes() for end in (".png", ".pdf")]

    png, pdf = draw("one.png")
    assert png.startswith(b"\x89PNG")
    assert pdf.startswith(b"%PDF")
    assert draw("other.png") == [png, pdf]
