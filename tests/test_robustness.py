"""Many chips of one kind: yield, strengths of a noise, what one change buys back, the page."""

import json
import re
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from checkpoints import load_checkpoint
from conftest import nonideal_report, read_csv
from spikesim_eval import device_plots, robustness
from spikesim_eval.__main__ import main
from spikesim_eval.calibration import calibration_of
from spikesim_eval.chip import Chip, Draws
from spikesim_eval.estimate import estimate
from spikesim_eval.nonideal import load_subject, most_clipped, on_chip
from spikesim_eval.robustness import (
    Question,
    changed_chips,
    chips_over,
    judged,
    network_report,
    wilson,
)


@pytest.mark.parametrize(("good", "of"), [(0, 10), (3, 10), (10, 10), (1, 1), (50, 400)])
def test_the_ends_of_a_yield_are_shares_that_just_allow_what_was_seen(good, of):
    """Wilson's ends solve |p - seen| = z sqrt(p (1 - p) / n), with z = Phi^-1(0.975)."""
    seen, z = good / of, norm.ppf(0.975)

    def beyond(p: float) -> float:
        return abs(p - seen) - z * np.sqrt(p * (1 - p) / of)

    low, high = wilson(good, of)
    assert low == pytest.approx(0 if good == 0 else brentq(beyond, 1e-12, seen - 1e-9), abs=1e-6)
    assert high == pytest.approx(
        1 if good == of else brentq(beyond, seen + 1e-9, 1 - 1e-12), abs=1e-6
    )


def test_what_was_seen_lies_between_the_ends_whatever_rounds():
    """Else its picture has errors below 0, and nothing is written."""
    for of in range(1, 1001):
        for good in (0, of):
            low, high = wilson(good, of)
            assert low <= good / of <= high


def test_a_chip_is_good_where_no_more_is_lost_than_allowed():
    a_point, none = (Question(max_drop=x).needed(0.9) for x in (1.0, 0.0))
    found = judged([0.9, 0.89, 0.8901, 0.95], a_point)
    assert found["yield_share"] == 1.0  # just one point is no more than one
    assert judged([0.9, 0.889], a_point)["yield_share"] == 0.5
    assert judged([0.9, 0.8999], none)["yield_share"] == 0.5
    same = Question(max_drop=1.0, at_least=80).needed
    assert same(0.9) == same(0.3) == 0.8
    assert judged([0.7, 0.9], 0.9)["accuracy_std"] == pytest.approx(0.2 / np.sqrt(2))


def test_changes_are_of_one_thing_and_only_those_that_can_be_built():
    chip = Chip(adc_bits=5, layer_adc_bits="linear=6,stem.conv=3", cell_bits=1, xbar_size=8)
    found = dict(changed_chips(chip, "linear"))
    more_in_one = "a bit more in ADCs of linear"
    assert list(found) == ["as it is", "a bit more in ADCs", more_in_one, "offset columns"]
    assert found[more_in_one] == replace(chip, layer_adc_bits="linear=7,stem.conv=3")
    assert dict(changed_chips(chip, "a"))["a bit more in ADCs of a"].of_layer("a").adc_bits == 6
    more = found["a bit more in ADCs"]
    assert (more.adc_bits, more.layer_adc_bits) == (6, "linear=7,stem.conv=4")
    assert replace(more, adc_bits=5, layer_adc_bits=chip.layer_adc_bits) == chip
    assert "a bit more in ADCs" not in dict(changed_chips(Chip(adc_bits=None), "a"))
    assert dict(changed_chips(Chip(), "a"))["crossbars of half the side"].xbar_size == 32


@pytest.fixture(scope="module")
def found(trained, tmp_path_factory):
    """(folder, what was printed) of two networks on chips of several strengths of variation."""
    out = tmp_path_factory.mktemp("nonideal")
    line = f"nonideal --checkpoint {trained['qamd']} {trained['student']} --time_steps 1 --sigma 1"
    line += f" --trials 2 --max_drop 5 --over sigma=0.1,1 --each_change --out {out}"
    line += " --test_images 60 --calibrate 16"
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda text="", **_: printed.append(text))
        assert main(line.split()) == 0
    return out, "\n".join(printed)


def test_the_report_of_several_networks_has_each_ones_own(found, trained):
    out, printed = found
    reports = json.loads((out / "nonideal.json").read_text())
    assert [x["checkpoint"] for x in reports] == [str(trained["qamd"]), str(trained["student"])]
    few = {"time_steps": 1, "test_images": 60}
    alone = nonideal_report(trained["student"], Chip(sigma=1.0), Draws(trials=2), **few)
    assert reports[1]["accuracies"] == alone["accuracies"]
    assert reports[1]["layers"] == alone["layers"]
    assert reports[0]["layers"] != alone["layers"]
    for report in reports:
        little, same = report["over"]["points"]
        assert (little["value"], same["value"]) == ("0.1", "1")
        assert same["accuracies"] == report["accuracies"]
        assert len(little["accuracies"]) == 2
        assert little["accuracies"] != same["accuracies"]
        assert f"{report['checkpoint']}:\ndigital accuracy" in printed
    assert printed.count("yield, the share of chips that lose at most 5 points: ") == 2
    assert printed.count("\na bit more in ADCs  ") == 2
    assert printed.count("\na bit more in ADCs of ") == 2


def test_what_a_change_buys_back_is_what_that_chip_has(found):
    report = json.loads((found[0] / "nonideal.json").read_text())[0]
    subject = load_subject(report["checkpoint"], None, 1, 60)
    layer = max(report["layers"], key=lambda row: row["clipped_share"])["layer"]
    chips = dict(changed_chips(Chip(sigma=1.0), layer))
    assert [x["change"] for x in report["changes"]] == list(chips)
    assert report["changes"][0]["accuracies"] == report["accuracies"]
    for row in report["changes"]:
        total = estimate(subject.network, chips[row["change"]]).total
        for cost in ("energy_pj", "delay_ns", "area_um2", "edap_pj_ns_um2"):
            assert row[cost] == total[cost]
    row = report["changes"][-1]
    accuracies, runs = on_chip(subject, chips[row["change"]], [0, 1])
    assert row["accuracies"] == accuracies
    counts = [layers[row["clipped_layer"]].counts for layers in runs]
    clipped = [x.clipped / x.conversions for x in counts]
    assert row["clipped_share"] == pytest.approx(np.mean(clipped)) == most_clipped(runs)[0]
    as_it_is, more, more_in_one = report["changes"][:3]
    assert as_it_is["clipped_layer"] == layer
    assert as_it_is["clipped_share"] > more_in_one["clipped_share"] >= more["clipped_share"]


def test_calibrated_chips_are_the_same_chips_and_calibrated_everywhere(found, trained):
    report = json.loads((found[0] / "nonideal.json").read_text())[0]
    assert report["calibration_images"] == 16
    path = report["checkpoint"]
    subject = load_subject(path, None, 1, 60)
    calibrate = calibration_of(load_checkpoint(path), None, 16, 1)
    little, same = report["over"]["points"]
    half = replace(Chip(sigma=1.0), xbar_size=32, columns_per_adc=8)
    for row, chip in ((report["changes"][-1], half), (little, Chip(sigma=0.1))):
        expected, _ = on_chip(subject, chip, [0, 1], prepare=calibrate)
        assert row["calibrated"].items() >= judged(expected, subject.accuracy - 0.05).items()
    accuracies, runs = on_chip(subject, Chip(sigma=1.0), [0, 1], prepare=calibrate)
    for chips in (report, same, report["changes"][0]):
        assert chips["calibrated"]["accuracies"] == accuracies != chips["accuracies"]
    for name, steps in report["calibrated"]["adc_steps"].items():
        assert steps == [layers[name].adc_step for layers in runs]


def test_what_calibration_wins_is_said_and_drawn(found):
    out, printed = found
    reports = json.loads((out / "nonideal.json").read_text())
    for report in reports:
        mean = f"{100 * report['calibrated']['accuracy_mean']:.2f}"
        assert f"\ncalibrated, with 16 training images: {mean} ± " in printed
    assert printed.count("yield calibrated") == 4
    assert "<th>ADC step, calibrated</th>" in (out / "nonideal.html").read_text()
    above = device_plots.bands_plot(["a", "b"], reports).axes[0]
    lines = {line.get_label(): list(line.get_ydata()) for line in above.get_lines()}
    means = [100 * x["calibrated"]["accuracy_mean"] for x in reports[1]["over"]["points"]]
    assert lines["b, calibrated"] == pytest.approx(means)
    points = {}
    for drawn in device_plots.edap_plot(["a", "b"], reports).axes[0].collections:
        is_filled = len(drawn.get_facecolors()) > 0
        points.setdefault(is_filled, []).extend(drawn.get_offsets()[:, 1].tolist())
    ways = {False: lambda x: x, True: lambda x: x["calibrated"]}
    for is_filled, way in ways.items():
        chips = [100 * y for x in reports for z in x["changes"] for y in way(z)["accuracies"]]
        assert points[is_filled] == pytest.approx(chips)


def test_the_command_says_what_calibration_wins(trained, tmp_path, capsys):
    line = f"nonideal --checkpoint {trained['qamd']} --adc_bits 2 --trials 1 --calibrate 32"
    line += " --test_images 90 --at_least 15"
    for name in ("edap.png", "nonideal.pdf", "mine.png"):  # of a run that drew more, and another's
        (tmp_path / name).write_text("")
    assert main([*line.split(), "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "calibrated, with 32 training images: " in printed
    found = json.loads((tmp_path / "nonideal.json").read_text())
    (before,), (after,) = found["accuracies"], found["calibrated"]["accuracies"]
    assert after > before
    assert f"on crossbars {100 * before:.2f} % (1 trial, " in printed  # one chip does not deviate
    assert found["accuracy_std"] is found["calibrated"]["accuracy_std"] is None
    rows = read_csv(tmp_path / "chips.csv")
    assert [row["good"] == "yes" for row in rows] == [before >= 0.15, after >= 0.15]
    assert [x.name for x in tmp_path.glob("*.p[nd][gf]")] == ["mine.png"]
    assert max(max(steps) for steps in found["calibrated"]["adc_steps"].values()) > 1


def test_of_chips_whose_cost_nobody_knows_there_is_no_picture_over_it(trained):
    subject, chip = load_subject(str(trained["student"]), None, 1, 60), Chip(adc_bits=None)
    report = network_report(subject, chip, Draws(), Question(each_change=True))
    assert {x["edap_pj_ns_um2"] for x in report["changes"]} == {None}
    assert robustness.pictures_of([report]) == {}


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("--calibrate 0", "calibrate must be"),
        ("--calibrate 9999", "9999 images to calibrate chips with: there are 1437 training images"),
    ],
)
def test_images_that_are_not_there_are_one_line(trained, option, reason, tmp_path, capsys):
    line = f"nonideal --checkpoint {trained['student']} {option} --out {tmp_path}"
    assert main(line.split()) == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert reason in said


def test_where_nothing_is_clipped_no_layer_is_said_to_clip_most(trained):
    subject, chip = load_subject(str(trained["student"]), None, 1, 60), Chip(adc_range="full")
    changes = network_report(subject, chip, Draws(), Question(each_change=True))["changes"]
    assert [x["clipped_share"] for x in changes] == [0.0] * 5
    assert not any("ADCs of" in x["change"] for x in changes)


def test_the_csv_of_chips_gives_the_yield(found):
    out, _ = found
    rows = read_csv(out / "chips.csv")
    for report in json.loads((out / "nonideal.json").read_text()):
        own = [row for row in rows if row["network"] == report["checkpoint"]]
        assert len(own) == 2 * 2 * (1 + 2 + 5)
        for images, chips in (("0", report), ("16", report["calibrated"])):
            plain = [row for row in own if row["what"] == "as it is"]
            plain = [row for row in plain if row["calibration_images"] == images]
            assert [float(row["accuracy_share"]) for row in plain] == chips["accuracies"]
            assert sum(row["good"] == "yes" for row in plain) / 2 == chips["yield_share"]
    layers = read_csv(out / "nonideal.csv")
    assert [row["layer"] for row in layers[:21]] == [row["layer"] for row in layers[21:]]


def test_the_page_shows_bands_layers_sums_and_tables(found):
    page = (found[0] / "nonideal.html").read_text()
    assert page.count("<svg") == 6
    for words in (
        "Accuracy and yield over sigma",
        "Accuracy over EDAP, a point a chip",
        "layers by what is lost in them",
        "sums that ADCs read",
        "what one change of the chip buys back",
        "crossbars of half the side",
        "<td>sigma</td><td>1</td>",
        "<td>trials</td><td>2</td>",
        "with 95 % confidence",
    ):
        assert words in page, words


def test_the_page_is_well_formed_and_every_id_stands_once(found):
    page = (found[0] / "nonideal.html").read_text()
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids)) > 100
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', page))
    assert used
    assert used <= set(ids)
    body = page.removeprefix("<!doctype html>").replace('<meta charset="utf-8">', "")
    root = ElementTree.fromstring(body)
    assert [x.text for x in root.iter("h2")][1] == "Accuracy and yield over sigma"


def test_pictures_are_kept_beside_the_page(found):
    for name in ("nonideal.png", "edap.png"):
        assert (found[0] / name).read_bytes().startswith(b"\x89PNG")
        assert (found[0] / name).with_suffix(".pdf").read_bytes().startswith(b"%PDF")


def test_histograms_are_of_the_digital_networks_sums_and_say_what_is_clipped(found):
    report = json.loads((found[0] / "nonideal.json").read_text())[0]
    linear = next(row for row in report["layers"] if row["layer"] == "linear")
    counts = np.array(report["adc_sums"]["linear"], dtype=float)
    assert len(counts) == 1 + linear["largest_sum_cell_steps"]
    assert linear["adc_reach_cell_steps"] == 31
    share = counts[32:].sum() / counts.sum()
    assert device_plots.share_above(counts, 31) == share
    assert device_plots.share_above(counts, None) == 0
    titles = [panel.get_title() for panel in device_plots.adc_plot(report).axes]
    assert titles[20] == f"linear\n{100 * share:.2f} % clipped"
    assert titles[0] == "stem.conv\nnone clipped"
    row = {"layer": "a", "clipped_share": 0.0, "adc_reach_cell_steps": 1.0}
    plot = device_plots.adc_plot({"layers": [row], "adc_sums": {"a": [8, 4, 3, 1]}})
    assert plot.axes[0].get_title() == "a\n25.00 % clipped"


def test_bands_lie_around_the_mean_of_the_chips(found):
    reports = json.loads((found[0] / "nonideal.json").read_text())
    figure = device_plots.bands_plot(["a", "b"], reports)
    above = figure.axes[0]
    lines = {line.get_label(): list(line.get_ydata()) for line in above.get_lines()}
    for name, report in zip("ab", reports, strict=True):
        means = [100 * point["accuracy_mean"] for point in report["over"]["points"]]
        assert lines[name] == pytest.approx(means)


def test_where_nothing_is_random_one_chip_says_it_of_all():
    for accuracy, share in ((0.9, 1.0), (0.8, 0.0)):
        found = judged([accuracy], 0.89, is_random=False)
        assert {found[f"yield_{x}share"] for x in ("", "low_", "high_")} == {share}


def test_values_are_drawn_in_their_order_and_times_by_how_long_they_are():
    points = [{"value": x, **judged([0.9, 0.8], 0.89)} for x in ("1y", "1h", "1d")]
    report = {"kind": None, "digital_accuracy": 0.9, "over": {"option": "after", "points": points}}
    figure = device_plots.bands_plot(["a"], [report])
    assert figure.axes[0].get_lines()[0].get_xdata().tolist() == [0, 1, 2]
    assert [x.get_text() for x in figure.axes[1].get_xticklabels()] == ["1h", "1d", "1y"]


def test_a_value_may_be_0_or_infinite():
    points = [
        {"value": x, **judged([y], 0.8, is_random=False)}
        for x, y in {"inf": 0.9, "10": 0.7, "100": 0.8}.items()
    ]
    report = {"kind": None, "digital_accuracy": 0.9}
    figure = device_plots.bands_plot(
        ["a"], [report | {"over": {"option": "on_off_ratio", "points": points}}]
    )
    above, below = figure.axes
    assert above.get_lines()[0].get_ydata().tolist() == pytest.approx([70, 80, 90])
    assert [x.get_text() for x in below.get_xticklabels()] == ["10", "100", "inf"]
    assert below.get_lines()[0].get_ydata().tolist() == [0, 100, 100]


def test_values_of_an_option_make_chips_with_them():
    name, chips = chips_over(Chip(), "stuck_on=0.01,0.1,0.01")
    assert name == "stuck_on"
    assert chips == [("0.01", Chip(stuck_on=0.01)), ("0.1", Chip(stuck_on=0.1))]
    assert set(robustness.OVER) <= set(Chip().options("simulation"))
