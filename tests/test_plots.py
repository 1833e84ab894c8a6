"""What reports, comparisons, sweeps and studies show a person, in terminal, tables and pictures."""

import io
import json
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from conftest import read_csv
from display import COLOURS, COMPONENT_COLOURS, component_name, engineering, text_table
from spikesim_eval import plots
from spikesim_eval.__main__ import main
from spikesim_eval.chip import Chip
from spikesim_eval.estimate import estimate
from spikesim_eval.layer_list import Subject
from spikesim_eval.report import build_report, totals_text
from spikesim_eval.sweep import MOST_SHOWN, front_table, pareto_front, shown_front, sweep
from test_reports import network
from test_spikesim import as_json, full_precision


def legend_of(figure: Figure) -> list[str]:
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
    return [text.get_text() for legend in legends for text in legend.get_texts()]


def overlapping(texts: list[Text], figure: Figure) -> list[tuple[str, str]]:
    figure.draw_without_rendering()
    boxes = [(text.get_text(), Text.get_window_extent(text)) for text in texts]
    return [
        (one, other)
        for i, (one, box) in enumerate(boxes)
        for other, other_box in boxes[:i]
        if box.overlaps(other_box)
    ]


@pytest.fixture
def files(tmp_path) -> dict[str, Path]:
    """Layer lists in folders of their own, by the name of the folder; all are net.json."""
    found = {}
    for name, net in {"ours": network(), "theirs": full_precision()}.items():
        found[name] = tmp_path / "lists" / name / "net.json"
        found[name].parent.mkdir(parents=True)
        found[name].write_text(json.dumps(as_json(net)))
    return found


# Reports.


def test_a_figure_is_the_same_in_terminal_page_and_markdown_and_plain_in_files(
    files, tmp_path, capsys
):
    line = f"report --layers {files['ours']} --baseline {files['theirs']} --out {tmp_path}/out"
    assert main(line.split()) == 0
    printed = capsys.readouterr().out
    found = estimate(network(), Chip())
    total = found.total
    outside = sum(found.energy_by_component[name] for name in ("leakage", "stream"))  # of layers
    for text in (
        engineering(total["energy_pj"] * 1e-12, "J", 4),
        engineering(total["delay_ns"] * 1e-9, "s", 4),
        engineering(total["area_um2"] * 1e-12, "m²", 4),
        engineering(total["tops_per_watt"] * 1e12, "OPS/W", 4),
        "ours/net",
        "theirs/net (baseline)",
    ):
        assert text in printed
        for end in ("md", "html"):
            assert text in (tmp_path / "out" / f"report.{end}").read_text()
    rows = read_csv(tmp_path / "out" / "report.csv")
    energies = [float(row["energy_pj"]) for row in rows]
    assert sum(energies) + outside == pytest.approx(total["energy_pj"], rel=1e-12)
    *lines, last = printed.splitlines()
    assert last.endswith(f" {tmp_path}/out/report.html")
    assert Path(last.split()[-1]).is_file()
    table = [line for line in lines if "differ" not in line]
    assert max(map(len, table)) <= 100
    assert f"The baseline is {files['theirs']}." in (tmp_path / "out" / "report.md").read_text()


def test_the_terminal_shows_the_ratio_of_each_figure_and_the_published_one():
    baseline = Subject("b" * 300, full_precision(), 0.9)
    report = build_report(Subject("a" * 300, network(), 0.8), Chip(), baseline)
    lines = {line[:17].strip(): line.split() for line in totals_text(report).splitlines()}
    assert lines["EDAP"][-1] == "14.85"
    assert float(lines["EDAP"][-2]) == pytest.approx(report["ratio"]["edap"], rel=1e-3)
    assert float(lines["delay"][-1]) == pytest.approx(report["ratio"]["delay"], rel=1e-3)
    assert lines["accuracy"] == ["accuracy", "80.00", "%", "90.00", "%"]
    assert max(map(len, totals_text(report).splitlines()[:10])) <= 100


def test_output_in_a_terminal_without_these_letters_is_no_error(files, tmp_path, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main(f"report --layers {files['ours']} --out {tmp_path}/out".split()) == 0
    assert rb" mm\xb2" in terminal.buffer.getvalue()


def test_a_component_has_its_colour_in_every_picture_and_a_name_where_it_is_seen():
    found = estimate(network(), Chip())
    figures = [plots.stacked(found.layers, kind) for kind in plots.PARTS]
    figures.append(
        plots.compare_plot(["one", "two"], [vars(found), vars(estimate(full_precision(), Chip()))])
    )
    named = {component_name(key): colour for key, colour in COMPONENT_COLOURS.items()}
    seen = set()
    for figure in figures:
        for axes in figure.axes:
            for bars in axes.containers:
                if not bars.get_label().startswith("_"):
                    colour = to_hex(bars.patches[0].get_facecolor())
                    assert colour == named[bars.get_label()].lower()
                    seen.add(bars.get_label())
        assert set(legend_of(figure)) <= seen
    assert {"ADC", "H-tree", "tile buffer", "membrane"} <= seen
    energy, area, both = map(legend_of, figures)
    assert "subtractor" in area
    assert "subtractor" not in energy  # a billionth of the energy: there is nothing to see
    assert set(both) >= {*energy, *area}
    assert len(both) == len(set(both))


def test_the_bars_of_a_picture_are_the_figures_in_the_unit_of_its_axis():
    found = estimate(network(), Chip())
    (panel,) = plots.stacked(found.layers, "energy_by_component").axes
    what, unit = panel.get_ylabel().split(", ")
    assert what == "energy"
    one = {"pJ": 1, "nJ": 1e3, "µJ": 1e6, "mJ": 1e9}[unit]
    heights = sum(np.array([bar.get_height() for bar in bars]) for bars in panel.containers)
    assert heights * one == pytest.approx([row["energy_pj"] for row in found.layers])
    assert 1 <= max(heights) < 1000
    assert panel.get_ylim()[1] > max(heights)


@pytest.mark.parametrize("count", [1, 40, 120])
def test_labels_of_many_layers_with_long_names_do_not_touch(count):
    row = estimate(network(), Chip()).layers[0]
    layers = [row | {"name": f"network.{'stage.' * 20}block{i}.conv"} for i in range(count)]
    rates = {row["name"]: [0.1] * count for row in layers}
    for figure in (
        plots.stacked(layers, "energy_by_component"),
        plots.timeline(layers),
        plots.spike_rates(rates),
    ):
        figure.draw_without_rendering()
        panel = figure.axes[0]
        texts = [text for text in panel.get_yticklabels() if text.get_text()]
        assert not overlapping(texts, figure)
        ticks = panel.transData.transform([(x, 0) for x in panel.get_xticks()])[:, 0]
        if panel.get_xticklabels()[0].get_rotation() == 70 and count > 1:
            between = np.diff(ticks).min() * np.sin(np.radians(70)) / figure.dpi * 72
            assert between > 8  # the height of a line of text, in points
        assert panel.bbox.width > 0.5 * figure.bbox.width  # names leave room for the picture


# Comparisons.


def test_a_comparison_fits_a_screen_whatever_the_names(files, tmp_path, capsys):
    names = [str(files["theirs"]), str(files["ours"]), str(files["ours"])]
    deep = tmp_path / ("x" * 120) / ("y" * 120)
    deep.mkdir(parents=True)
    for ending in ("a", "b"):
        names.append(str(deep / f"{'z' * 200}{ending}.json"))
        Path(names[-1]).write_text(files["ours"].read_text())
    assert main(["compare", *names, "--out", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"baseline: {names[0]}"
    figures = lines[2 : 3 + len(names)]
    ratios = lines[4 + len(names) : 5 + 2 * len(names)]
    assert figures[0].split()[:3] == ["network", "bits", "T"]
    assert ratios[0].startswith("times better")
    for table in (figures, ratios):
        assert max(map(len, table)) <= 100
        labels = [line.split("  ")[0] for line in table[1:]]
        assert labels[:3] == ["theirs/net", "ours/net", "ours/net (2)"]
        assert len(set(labels)) == len(names)
    assert [line.split()[-3:] for line in ratios[1:2]] == [["1.00"] * 3]
    text = (tmp_path / "out" / "compare.md").read_text()
    assert "| theirs/net | 32 |" in text
    assert [row["network"] for row in read_csv(tmp_path / "out" / "compare.csv")] == names
    assert (tmp_path / "out" / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "compare.pdf").read_bytes().startswith(b"%PDF")


# Sweeps.


def test_a_sweep_without_accuracies_prints_the_least_edap_of_each_network_and_adc(
    files, tmp_path, capsys
):
    line = f"sweep --layers {files['ours']} {files['theirs']} --out {tmp_path}/out"
    axes = "--xbar_size 24,32,64 --pe_per_tile 12,27,39 --crossbars_per_pe 18,27 --adc_bits 3,4"
    assert main(f"{line} {axes}".split()) == 0
    first, second, header, *points, options = capsys.readouterr().out.splitlines()
    assert "no Pareto front" in first
    assert second == "the least EDAP of each network and ADC resolution:"
    columns = "point area EDP EDAP xbar ADC PEs xbars bits network"
    assert header.split() == columns.split()
    assert options == (
        "(xbar --xbar_size, ADC --adc_bits, PEs --pe_per_tile, xbars --crossbars_per_pe)"
    )
    assert [line.split()[0] for line in points] == ["1", "2", "3", "4"]
    expected = set()
    for name, net in (("ours/net", network()), ("theirs/net", full_precision())):
        for bits in (3, 4):
            chips = [
                Chip(xbar_size=x, adc_bits=bits, pe_per_tile=tile, crossbars_per_pe=n)
                for x, tile, n in product((24, 32, 64), (12, 27, 39), (18, 27))
            ]
            best = min(chips, key=lambda chip: estimate(net, chip).total["edap_pj_ns_um2"])
            sizes = (best.xbar_size, bits, best.pe_per_tile, best.crossbars_per_pe)
            expected.add((*map(str, sizes), name))
    assert {(*line.split()[-6:-2], line.split()[-1]) for line in points} == expected
    svg = (tmp_path / "out" / "sweep.svg").read_text()
    assert "ours/net, 4 bits, T = 4" in svg
    assert "Pareto" not in svg
    assert "least EDAP" in svg
    assert str(tmp_path) not in svg
    assert (tmp_path / "out" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "sweep.pdf").read_bytes().startswith(b"%PDF")


@pytest.fixture(scope="module")
def cloud() -> dict[str, np.ndarray]:
    """A sweep with a long front, which chips seldom give."""
    random = np.random.default_rng(0)
    count = 3000
    columns = sweep([Subject("a", network())], Chip(), {"adc_bits": [4]})
    columns = {name: np.repeat(column, count) for name, column in columns.items()}
    area = 2e6 * np.exp(random.normal(0, 0.7, count))
    columns["area_um2"] = area
    columns["edp_pj_ns"] = 4e20 / area * np.exp(np.abs(random.normal(0, 0.5, count)))
    columns["edap_pj_ns_um2"] = columns["edp_pj_ns"] * area
    columns["chip_accuracy"] = random.choice([0.93, 0.95], count)
    columns["network"] = random.choice(["runs/a/qamd-best.pth", "runs/b/qamd-best.pth"], count)
    columns["pareto"] = pareto_front(
        columns["edp_pj_ns"], columns["area_um2"], columns["chip_accuracy"]
    )
    return columns


def test_of_a_long_front_so_many_points_are_shown_as_a_screen_holds(cloud):
    front = shown_front(cloud)
    assert cloud["pareto"].sum() > len(front) == MOST_SHOWN
    assert len(set(front.tolist())) == MOST_SHOWN
    assert cloud["pareto"][front].all()
    on_front = np.flatnonzero(cloud["pareto"] & (cloud["network"] == "runs/a/qamd-best.pth"))
    assert front[0] == on_front[cloud["area_um2"][on_front].argmin()]
    table, _ = front_table(cloud, front)
    lines = text_table(*table)
    assert len(lines) == 1 + MOST_SHOWN
    assert max(map(len, lines)) <= 100
    assert {line.split()[-1] for line in lines[1:]} == {"a/qamd-best", "b/qamd-best"}


def test_the_numbers_of_a_front_cover_neither_one_another_nor_its_points(cloud):
    front = shown_front(cloud)
    kinds = {"runs/a/qamd-best.pth": "CLK", "runs/b/qamd-best.pth": None}
    figure = plots.sweep_plot(cloud, front, kinds)
    (panel,) = figure.axes
    assert not overlapping(panel.texts, figure)
    covered = [number for text in panel.texts for number in numbers_in(text.get_text())]
    assert covered == list(range(1, MOST_SHOWN + 1))
    *_, circles = panel.collections
    places = panel.transData.transform(circles.get_offsets())
    assert len(places) == cloud["pareto"].sum()
    for text in panel.texts:
        box = Text.get_window_extent(text)
        assert not box.count_contains(places)
        assert panel.bbox.contains(*box.min)
        assert panel.bbox.contains(*box.max)


def numbers_in(label: str) -> range:
    first, _, last = label.partition("-")
    return range(int(first), int(last or first) + 1)


def test_networks_of_a_sweep_have_the_colours_of_their_kinds_and_only_they_are_named(cloud):
    kinds = {"runs/a/qamd-best.pth": "CLK", "runs/b/qamd-best.pth": "student"}
    figure = plots.sweep_plot(cloud, shown_front(cloud), kinds)
    labels = legend_of(figure)
    assert sorted(labels) == ["Pareto front", *(f"{x}/qamd-best, 4 bits, T = 4" for x in "ab")]
    (panel,) = figure.axes
    colours = {
        dots.get_label()[0]: to_hex(dots.get_facecolor()[0])
        for dots in panel.collections
        if dots.get_label() in labels and dots.get_label() != "Pareto front"
    }
    assert colours == {"a": COLOURS["MD-SNN"].lower(), "b": COLOURS["student"].lower()}


def test_accuracy_over_edap_shows_the_best_that_so_much_edap_reaches(cloud):
    kinds = {"runs/a/qamd-best.pth": "CLK", "runs/b/qamd-best.pth": "student"}
    unknown = cloud["chip_accuracy"].copy()
    unknown[::7] = np.nan
    figure = plots.accuracy_plot(cloud | {"chip_accuracy": unknown}, kinds)
    (panel,) = figure.axes
    lines = {x.get_label()[0]: x for x in panel.get_lines() if not x.get_label().startswith("_")}
    assert set(lines) == {"a", "b"}
    for name, line in lines.items():
        here = (cloud["network"] == f"runs/{name}/qamd-best.pth") & ~np.isnan(unknown)
        edap, best = line.get_xdata(), line.get_ydata()
        assert len(edap) == here.sum()
        assert (np.diff(edap) >= 0).all()
        order = np.argsort(cloud["edap_pj_ns_um2"][here], kind="stable")
        running = 0.0
        for i, accuracy in enumerate(unknown[here][order]):
            running = max(running, 100 * accuracy)
            assert best[i] == pytest.approx(running)
