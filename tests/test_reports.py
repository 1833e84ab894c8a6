"""What stands in a report, comparisons, sweeps, and networks that are not this project's."""

import json
import re
import statistics
import textwrap
from dataclasses import replace
from html.parser import HTMLParser
from itertools import product
from math import fsum
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints import load_checkpoint
from conftest import nonideal_report, read_csv, refused, reported
from data_loader import data_of
from display import percent
from load_settings import load_network
from runtime.errors import UserError
from spikesim_eval import nonideal
from spikesim_eval.__main__ import main
from spikesim_eval.chip import CHOICES, Chip, Draws, options_of
from spikesim_eval.compare import cheapest, sensitivity
from spikesim_eval.estimate import estimate, ratios
from spikesim_eval.layer_list import LayerList, Subject
from spikesim_eval.module import trace_module
from spikesim_eval.render import on_chip_text
from spikesim_eval.report import build_report
from spikesim_eval.sweep import AXES, SHOWN, pareto_front, sweep
from spikesim_eval.technology import load_technology
from spikesim_eval.trace import trace_checkpoint
from test_chip import chips, fit
from test_spikesim import (
    as_json,
    full_precision,
    networks,
    published,
    residual_block,
)


def network(**changes) -> LayerList:
    return LayerList.from_json(residual_block() | changes)


@pytest.fixture
def files(tmp_path) -> dict[str, Path]:
    found = {}
    for name, net in {"NET": network(), "BASE": full_precision()}.items():
        found[name] = tmp_path / f"{name}.json"
        found[name].write_text(json.dumps(as_json(net)))
    return found


# The report.


def test_the_area_of_layers_membranes_and_idle_pes_is_the_total():
    report = build_report(Subject("net", network()), Chip(pe_per_tile=5))
    in_layers = fsum(row["area_um2"] for row in report["layers"])
    outside = report["area_outside_layers"]
    total = report["total"]
    assert in_layers + sum(outside.values()) == pytest.approx(total["area_um2"])
    idle_share = outside["idle_pes"] / (total["area_um2"] - outside["membrane"])
    assert 0 < idle_share < (5 * total["tiles"] - total["pes"]) / (5 * total["tiles"])


def test_the_critical_path_runs_through_the_slower_branch():
    report = build_report(Subject("net", network()), Chip())
    finish = {row["name"]: row["finish_ns"] for row in report["layers"]}
    assert report["critical_path"][0] == "stem"
    assert report["critical_path"][-1] == max(finish, key=finish.get)
    slow = network()
    layers = tuple(
        replace(layer, input_bits=32) if layer.name == "shortcut" else layer
        for layer in slow.layers
    )
    subject = Subject("net", replace(slow, layers=layers))
    assert build_report(subject, Chip())["critical_path"] == ["stem", "shortcut", "fc"]
    # There the classifier starts when it is done for the most part, and has ended before it.
    assert build_report(subject, published())["critical_path"] == ["stem", "shortcut"]


def test_every_published_constant_stands_in_the_report_with_unit_and_source(files, tmp_path):
    constants = reported(tmp_path, f"--layers {files['NET']}")["constants"]
    text = (tmp_path / "report.md").read_text()
    assert len(constants) > 20
    for constant in constants:
        assert constant["source"]
        assert f"| {constant['table']}: {constant['name']} |" in text


class Page(HTMLParser):
    """Open tags, and whatever the page would load from elsewhere."""

    def __init__(self):
        super().__init__()
        self.count, self.loads, self.text = {}, [], ""

    def handle_starttag(self, tag, attributes):
        self.count[tag] = self.count.get(tag, 0) + 1
        for name, value in attributes:
            inside = str(value).startswith(("#", "data:"))
            link = name in ("src", "href", "xlink:href") and not inside
            if link or tag in ("script", "link", "iframe"):
                self.loads.append((tag, name, value))

    def handle_data(self, data):
        self.text += data


def test_the_page_is_one_file_with_plots_and_tables_that_loads_nothing(trained, files, tmp_path):
    pair = f"--checkpoint {trained['qamd']} --baseline {trained['original']}"
    report = reported(tmp_path, pair)
    page = Page()
    page.feed((tmp_path / "report.html").read_text())
    assert page.loads == []
    assert page.count["svg"] == 6
    assert page.count["table"] == 9
    for row in report["layers"]:
        assert row["name"] in page.text
    rates = report["spike_rates_by_timestep"]
    assert len(rates) == 17
    assert {len(steps) for steps in rates.values()} == {4}


def test_text_of_a_layer_list_breaks_neither_page_nor_table(tmp_path):
    name = '<script>$x$|a,"b"'
    data = residual_block()
    data["layers"][1]["name"] = data["layers"][2]["after"][0] = name
    path = tmp_path / "net.json"
    path.write_text(json.dumps(data))
    assert main(f"report --layers {path} --out {tmp_path}".split()) == 0
    page = Page()
    page.feed((tmp_path / "report.html").read_text())
    assert page.loads == []
    assert name in page.text
    assert '| <script>$x$\\|a,"b" | 3 |' in (tmp_path / "report.md").read_text()
    assert [row["layer_name"] for row in read_csv(tmp_path / "report.csv")][1] == name


# Sensitivity and comparison.


def changed(which, **values) -> list[LayerList]:
    return [net.with_layers(which, **values) for net in (network(), full_precision())]


@pytest.mark.parametrize("chip", [Chip(), published()], ids=["default", "published"])
def test_each_assumption_is_changed_alone(chip):
    both = network(), full_precision()
    rows = {row["change"]: row["ratio"] for row in sensitivity(*both, chip)}
    expected = {"as assumed": (*both, chip)}
    for name in ("columns", "adc_of", "costs"):
        other = next(x for x in CHOICES[name] if x != getattr(chip, name))
        expected[f"--{name} {other}"] = (*both, replace(chip, **{name: other}))
    if chip.costs == "counted":
        expected["--noc mesh"] = (*both, replace(chip, noc="mesh"))
        skipping = replace(chip, skip="rows,patches,tiles")
        expected["--skip rows,patches,tiles"] = (*both, skipping)
    for change, which, values in (
        ("shortcut inputs charged as spikes", lambda x: x.name == "shortcut", {"input_bits": 1}),
        ("image charged as spikes", lambda x: x.name == "stem", {"input_bits": 1}),
        ("spike rate 1 everywhere", lambda x: True, {"spike_rate": None}),
    ):
        expected[change] = (*changed(lambda net, x, which=which: which(x), **values), chip)
    laws = [(5, "linear"), (5, "table")]
    if chip.adc_bits == 4:
        laws = [(8, "doubling"), (8, "linear"), (8, "table")]
    for bits, law in laws:  # at 4 bits all laws are the same
        other = replace(chip, adc_bits=bits, adc_law=law)
        expected[f"--adc_bits {bits} --adc_law {law}"] = (*both, other)
    for bits in (16, 24):
        expected[f"baseline of {bits} bits"] = (both[0], both[1].at(bits), chip)
    assert list(rows) == list(expected)
    for change, (ours, theirs, on) in expected.items():
        found = ratios(estimate(ours, on).total, estimate(theirs, on).total)
        assert rows[change] == {name: found[name] for name in rows[change]}, change
    assert set(rows["as assumed"]) == {"edap", "tops_per_watt", "tops_per_mm2"}
    assert rows["baseline of 16 bits"]["edap"] < rows["as assumed"]["edap"]
    assert rows["spike rate 1 everywhere"] != rows["as assumed"]


def test_of_a_chip_with_other_adcs_only_the_law_is_changed():
    rows = {row["change"] for row in sensitivity(network(), full_precision(), Chip(adc_bits=6))}
    assert "--adc_bits 6 --adc_law linear" in rows
    assert "--adc_bits 6 --adc_law table" in rows
    assert not any("--adc_law doubling" in change for change in rows)


def test_compare_puts_every_network_beside_the_first(files, trained, tmp_path, capsys):
    paths = [trained["original"], trained["student"], trained["qamd"]]
    assert main(["compare", *map(str, paths), "--max_drop", "100", "--out", str(tmp_path)]) == 0
    rows = read_csv(tmp_path / "compare.csv")
    assert [row["network"] for row in rows] == list(map(str, paths))
    assert float(rows[0]["edap_times_better"]) == 1
    assert float(rows[0]["drop_points"]) == 0
    assert float(rows[2]["edap_times_better"]) > 5
    accuracy = 100 * load_checkpoint(paths[2]).accuracy
    assert float(rows[2]["digital_accuracy_percent"]) == pytest.approx(accuracy)
    best = min(rows[1:], key=lambda row: float(row["edap_pj_ns_um2"]))["network"]
    text = (tmp_path / "compare.md").read_text()
    assert f"within 100 points of the baseline: {best}." in text
    assert "14.85" in text
    assert "fixed point of --full_precision_bits" in text  # the assumptions
    assert f"## {capsys.readouterr().out.splitlines()[0]}\n" in text


def test_compare_takes_another_t(files, tmp_path):
    line = f"compare {files['NET']} {files['BASE']} --out {tmp_path}"
    delays = []
    for T in (2, 4):
        assert main([*line.split(), "--time_steps", str(T)]) == 0
        delays.append([float(row["delay_ns"]) for row in read_csv(tmp_path / "compare.csv")])
    assert all(two < four < 2 * two for two, four in zip(*delays, strict=True))


def test_the_cheapest_choice_is_accurate_enough_and_not_the_baseline():
    def row(network, drop, edap):
        return {"network": network, "drop_points": drop, "edap_pj_ns_um2": edap}

    rows = [row("baseline", 0, 1.0), row("a", 0.5, 9), row("b", 1.0, 8), row("c", 1.1, 2)]
    rows.append(row("unknown accuracy", None, 3))
    assert cheapest(rows, 1.0)["network"] == "b"
    assert cheapest(rows, 0.7)["network"] == "a"
    assert cheapest(rows, 0.1) is None
    exactly = [row("baseline", 0, 1.0), row("a", 100 * (0.98 - 0.97), 9)]
    assert cheapest(exactly, 1.0)["network"] == "a"


# Sweeps.


AXIS_VALUES = {
    "xbar_size": [8, 24, 64, 256],
    "cell_bits": [1, 3, 4],
    "adc_bits": [1, 5, 8],
    "columns_per_adc": [1, 8, 16],
    "pe_per_tile": [1, 7, 8],
    "crossbars_per_pe": [1, 4, 9],
    "clk_mhz": [100.0, 250.0],
}


@settings(deadline=None, max_examples=60)
@given(st.lists(networks(), min_size=1, max_size=2), chips(), st.data())
def test_every_point_of_a_sweep_is_the_estimate_of_that_chip(found, chip, data):
    chip = replace(chip, columns_per_adc=8)
    axes = {
        name: data.draw(st.lists(st.sampled_from(values), max_size=2, unique=True), name)
        for name, values in AXIS_VALUES.items()
    }
    subjects = {f"net{i}": Subject(f"net{i}", net) for i, net in enumerate(found)}
    chosen = [axes[name] or [getattr(chip, name)] for name in AXES]
    expected = {}
    for (name, subject), *point in product(subjects.items(), *chosen):
        options = dict(zip(AXES, point, strict=True))
        if options["xbar_size"] % options["columns_per_adc"]:
            continue
        on = replace(chip, **options)
        if fit(subject.network, on):
            expected[name, *point] = estimate(subject.network, on).total
    if not expected:
        with pytest.raises(UserError, match="more cells than a crossbar row"):
            sweep([*subjects.values()], chip, axes)
        return
    columns = sweep([*subjects.values()], chip, axes)
    points = zip(columns["network"], *(columns[axis] for axis in AXES), strict=True)
    points = [tuple(x) for x in points]
    assert points == list(expected)
    for i, total in enumerate(expected.values()):
        for key in SHOWN:
            assert columns[key][i] == pytest.approx(total[key], rel=1e-12), (points[i], key)
    assert not columns["pareto"].any()  # no accuracy is known


VALUES = st.integers(0, 4).map(float)
POINTS = st.lists(st.tuples(VALUES, VALUES, VALUES | st.just(np.nan)), min_size=1, max_size=30)


@settings(max_examples=200, deadline=None)
@given(POINTS)
def test_the_pareto_front_is_what_nothing_beats(points):
    edp, area, accuracy = np.array(points).T

    def beats(a, b):
        no_worse = a[0] <= b[0] and a[1] <= b[1] and a[2] >= b[2]
        return no_worse and tuple(a) != tuple(b)

    known = [x for x in points if not np.isnan(x[2])]
    expected = [x in known and not any(beats(a, x) for a in known) for x in points]
    assert pareto_front(edp, area, accuracy).tolist() == expected


def test_the_sweep_command_writes_every_point_and_a_plot(files, trained, tmp_path, capsys):
    line = f"sweep --checkpoint {trained['qamd']} --layers {files['NET']} --out {tmp_path}"
    options = "--xbar_size 32,64 --cell_bits 1,2,4 --bits 2,4 --time_steps 1,4"
    capsys.readouterr()
    assert main(f"{line} {options}".split()) == 0
    assert "no Pareto front" in capsys.readouterr().out
    rows = read_csv(tmp_path / "sweep.csv")
    assert len(rows) == 2 * 2 * 3 * 2 * 2
    known = [row for row in rows if row["digital_accuracy_share"]]
    assert len(known) == 6  # the checkpoint as it was trained: 4 bits, T = 4
    assert {(row["bits"], row["time_steps_count"]) for row in known} == {("4", "4")}
    assert {row["on_pareto_front_yes_no"] for row in rows} == {"no"}
    assert {row["chip_accuracy_share"] for row in rows} == {""}
    assert (tmp_path / "sweep.svg").read_text().count("<svg") == 1


# Accuracy on the chip.

ON_CHIP = "--on_chip --adc_bits 3 --xbar_size 32 --adc_range full --sigma 0.2 --trials 2 --seed 3"
ON_CHIP += " --test_images 90"


@pytest.fixture(scope="module")
def on_chip(trained) -> dict[str, list[float]]:
    """Accuracies that `nonideal` finds on that chip."""
    chip = Chip(adc_bits=3, xbar_size=32, adc_range="full", sigma=0.2)
    return {
        name: nonideal_report(trained[name], chip, Draws(3, 2), test_images=90)["accuracies"]
        for name in ("student", "qamd")
    }


def test_a_report_gives_the_accuracy_that_nonideal_finds_on_that_chip(
    on_chip, trained, tmp_path, capsys
):
    pair = f"--checkpoint {trained['qamd']} --baseline {trained['student']}"
    report = reported(tmp_path, f"{pair} {ON_CHIP}")
    assert report["chip_accuracies"] == on_chip["qamd"]
    assert report["baseline_chip_accuracies"] == on_chip["student"]
    assert report["chip"]["sigma"] == 0.2
    assert report["chip"]["adc_range"] == "full"
    said = on_chip_text(on_chip["qamd"])
    assert " ± " in said
    for text in (capsys.readouterr().out, (tmp_path / "report.md").read_text()):
        (row,) = (x for x in text.splitlines() if "accuracy on the chip" in x and "simul" not in x)
        assert said in row


def test_compare_chooses_by_the_accuracy_on_the_chip(on_chip, trained, tmp_path, capsys):
    paths = [str(trained[name]) for name in ("original", "student", "qamd")]
    line = f"compare {' '.join(paths)} {ON_CHIP} --out {tmp_path} --max_drop"
    assert main([*line.split(), "100"]) == 0
    teacher, *rows = read_csv(tmp_path / "compare.csv")
    assert teacher["chip_accuracy_percent"] == ""  # it is not simulated
    for row, name in zip(rows, ("student", "qamd"), strict=True):
        mean = 100 * statistics.mean(on_chip[name])
        assert float(row["chip_accuracy_percent"]) == pytest.approx(mean)
        assert float(row["chip_accuracy_deviation_points"]) == pytest.approx(
            100 * statistics.stdev(on_chip[name])
        )
        drop = float(teacher["digital_accuracy_percent"]) - mean
        assert float(row["drop_points"]) == pytest.approx(drop)
    assert "on chip" in capsys.readouterr().out


def test_adcs_that_are_too_small_are_said_beside_the_accuracy(trained, tmp_path, capsys):
    line = f"report --checkpoint {trained['qamd']} --time_steps 1 --on_chip --out {tmp_path}"
    line += " --test_images 90"
    assert main([*line.split(), "--adc_bits", "1"]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    lost = 100 * (report["accuracy"] - report["chip_accuracies"][0])
    few = {"time_steps": 1, "test_images": 90}
    rows = nonideal_report(trained["qamd"], Chip(adc_bits=1), **few)["layers"]
    worst = max(rows, key=lambda row: row["clipped_share"])
    assert lost > 1
    said = (
        f"on the chip it loses {lost:.2f} points, and ADCs clip {percent(worst['clipped_share'])}"
    )
    said += f" of the sums of {worst['layer']}: give them more --adc_bits, or auto"
    assert said in capsys.readouterr().out
    assert main([*line.split(), "--adc_bits", "8"]) == 0
    assert "ADCs clip" not in capsys.readouterr().out


def test_a_sweep_simulates_only_chips_that_a_simulation_tells_apart(
    trained, files, tmp_path, monkeypatch, capsys
):
    simulated, on_chip = [], nonideal.on_chip

    def counted(subject, chip, *draws):
        found = on_chip(subject, chip, *draws)
        simulated.append((chip.adc_bits, found[0][0]))
        return found

    monkeypatch.setattr(nonideal, "on_chip", counted)
    few = f"{trained['qamd']} --test_images 90"
    line = f"sweep --checkpoint {few} --layers {files['NET']} --out {tmp_path}"
    options = "--on_chip --adc_bits 2,5 --pe_per_tile 4,8 --clk_mhz 100,250 --crossbars_per_pe 9,18"
    assert main(f"{line} {options} --bits 2,4 --columns_per_adc 4,8".split()) == 0
    printed = capsys.readouterr().out
    assert "on the Pareto front" in printed
    assert "accuracy on the chip: simulated" in printed
    assert "accuracy: the digital" not in printed
    rows = read_csv(tmp_path / "sweep.csv")
    assert len(rows) == 2 * 2 * 32  # of the checkpoint and the list, with 2 and 4 bits
    assert len(simulated) == 2  # the checkpoint's own width, with 2 ADCs
    for row in rows:
        is_own = (row["network"], row["bits"]) == (str(trained["qamd"]), "4")
        accuracy = str(dict(simulated)[int(row["adc_bits"])]) if is_own else ""
        assert row["chip_accuracy_share"] == accuracy
        assert is_own or row["on_pareto_front_yes_no"] == "no"
    assert any(row["on_pareto_front_yes_no"] == "yes" for row in rows)

    # Where a PE's sums are converted, its crossbars are part of what is simulated.
    simulated.clear()
    line = f"sweep --checkpoint {few} --on_chip --adc_of pe --out {tmp_path}"
    assert main([*line.split(), "--crossbars_per_pe", "4,9", "--pe_per_tile", "4,8"]) == 0
    assert len(simulated) == 2


def test_a_sweep_simulates_what_nonideal_does(on_chip, trained, tmp_path):
    line = f"sweep --checkpoint {trained['student']} {ON_CHIP} --pe_per_tile 4,8 --out {tmp_path}"
    assert main(line.split()) == 0
    rows = read_csv(tmp_path / "sweep.csv")
    mean = statistics.mean(on_chip["student"])
    assert [float(row["chip_accuracy_share"]) for row in rows] == pytest.approx([mean] * 2)


OF_60 = (
    "accuracies and spike rates are of 60 test images, the same draw for all: the standard error "
    "of an accuracy is at most 6.5 points"
)


@pytest.mark.parametrize(
    ("line", "file", "key"),
    [
        ("report --checkpoint QAMD", "report.json", "accuracy"),
        ("compare QAMD QAMD", "compare.csv", "digital_accuracy_percent"),
        ("sweep --checkpoint QAMD", "sweep.csv", "digital_accuracy_share"),
        ("nonideal --checkpoint QAMD --adc_bits ideal", "nonideal.json", "accuracy_mean"),
    ],
)
def test_every_command_measures_on_the_same_draw_of_test_images_and_says_so(
    line, file, key, trained, tmp_path, capsys
):
    checkpoint = load_checkpoint(trained["qamd"])
    _, test_set = data_of(checkpoint.settings, ".")
    drawn = torch.randperm(360, generator=torch.Generator().manual_seed(0))[:60]
    predicted = load_network(checkpoint).predict(test_set.images[drawn]).argmax(1)
    expected = (predicted == test_set.labels[drawn]).double().mean().item()
    assert expected != checkpoint.accuracy
    capsys.readouterr()
    line = f"{line.replace('QAMD', str(trained['qamd']))} --test_images 60 --out {tmp_path}"
    assert main(line.split()) == 0
    assert capsys.readouterr().out.count(OF_60) == 1
    path = tmp_path / file
    of_csv = path.suffix == ".csv"
    found = float((read_csv(path)[0] if of_csv else json.loads(path.read_text()))[key])
    assert found == pytest.approx(expected * (100 if "percent" in key else 1))


def test_technologies_are_simulated_on_so_many_test_images(trained, tmp_path, capsys):
    line = f"technologies spikesim-65nm --checkpoint {trained['qamd']} --on_chip --out {tmp_path}"
    assert main([*line.split(), "--test_images", "60"]) == 0
    subject = trace_checkpoint(str(trained["qamd"]), test_images=60)
    (accuracy,), _ = nonideal.on_chip(subject, Chip(**options_of(load_technology("spikesim-65nm"))))
    (row,) = read_csv(tmp_path / "technologies.csv")
    assert float(row["chip_accuracy_share"]) == accuracy
    assert OF_60 in capsys.readouterr().out
    assert OF_60 in (tmp_path / "technologies.md").read_text()


# Full precision on a chip.


@pytest.mark.parametrize(
    ("options", "bits"),
    [("", 16), ("--preset published", 32), ("--full_precision_bits 24 --preset published", 24)],
)
def test_a_teacher_has_the_width_of_full_precision_on_a_chip(options, bits, trained, tmp_path):
    pair = f"--checkpoint {trained['original']} --baseline {trained['qamd']}"
    report = reported(tmp_path, f"{pair} --test_images 60 {options}")
    assert report["network"]["weight_bits"] == report["network"]["membrane_bits"] == bits
    assert report["baseline_network"]["weight_bits"] == 4
    rows = {row["name"]: row for row in report["layers"]}
    assert {row["weight_bits"] for row in rows.values()} == {bits}
    assert {row["bn_bits"] for name, row in rows.items() if name != "linear"} == {bits}
    assert rows["blocks.2.shortcut.conv"]["input_bits"] == bits
    assert report["ratio"]["energy"] < 1


def test_other_widths_change_weights_membranes_and_streams_but_not_stem_and_classifier():
    net = network().at(2, time_steps=7)
    assert (net.weight_bits, net.membrane_bits, net.time_steps) == (2, 2, 7)
    by_name = {layer.name: layer for layer in net.layers}
    assert {name: net.weight_bits_of(layer) for name, layer in by_name.items()} == {
        "stem": 8,
        "conv1": 2,
        "conv2": 2,
        "shortcut": 2,
        "fc": 8,
    }
    assert (by_name["shortcut"].input_bits, by_name["stem"].input_bits) == (2, 8)


def test_every_rate_of_a_quantized_network_is_measured_and_its_stem_runs_once(trained, tmp_path):
    rows = {}
    for name, preset in (("qamd", "default"), ("qamd", "published"), ("original", "default")):
        line = f"--checkpoint {trained[name]} --test_images 60 --preset {preset}"
        report = reported(tmp_path, line)
        rows[name, preset] = {row["name"]: row for row in report["layers"]}
    ours, published, teacher = rows.values()
    assert all(0 < row["spike_rate"] < 1 for row in ours.values())
    assert all(row["rate_is_measured"] for row in ours.values())
    # What full precision reads as real numbers has no bits to count.
    unknown = {name for name, row in teacher.items() if not row["rate_is_measured"]}
    shortcuts = {name for name in teacher if "shortcut" in name}
    assert unknown == {"stem.conv"} | shortcuts
    assert len(shortcuts) == 3
    assert [name for name, row in ours.items() if row["static"]] == ["stem.conv"]
    assert not any(row["static"] for row in published.values())
    assert published["stem.conv"]["cycles"] == 4 * ours["stem.conv"]["cycles"]


# Networks of a user's own.

USERS = """
    import torch
    from torch import nn
    from spikingjelly.activation_based import functional, layer, neuron

    def vgg():
        torch.manual_seed(0)
        net = nn.Sequential(
            layer.Conv2d(3, 8, 3, padding=1), neuron.LIFNode(v_threshold=0.1),
            layer.Conv2d(8, 16, 3, padding=1), neuron.LIFNode(v_threshold=0.1),
            layer.AvgPool2d(2), layer.Flatten(),
            layer.Linear(16 * 4 * 4, 12), neuron.IFNode(v_threshold=0.1), layer.Linear(12, 5),
        )
        functional.set_step_mode(net, "m")
        return net, torch.rand(2, 3, 8, 8).repeat(6, 1, 1, 1, 1)

    def no_tuple():
        return nn.Conv2d(4, 4, 3)

    def wrong_sample():
        return nn.Conv2d(4, 4, 3), torch.rand(1, 3, 8, 8)

    def broken():
        raise RuntimeError("on purpose")

    class Odd(nn.Module):
        def __init__(self, forward):
            super().__init__()
            self.conv, self.lif = nn.Conv2d(4, 4, 3, 1, 1), neuron.LIFNode(v_threshold=0.1)
            self.run = forward

        def forward(self, x):
            return self.run(self, x)

    def odd(forward):
        return Odd(forward), torch.rand(1, 4, 8, 8)

    def no_lif():
        return odd(lambda self, x: self.conv(x))

    def key_error():
        return odd(lambda self, x: {}["missing"])

    def leaves():
        raise SystemExit(3)
"""


@pytest.fixture
def users(tmp_path, monkeypatch) -> None:
    (tmp_path / "users_net.py").write_text(textwrap.dedent(USERS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


def test_a_spikingjelly_vgg_of_many_steps_is_traced(users):
    subject = trace_module("users_net:vgg", time_steps=6, bits=4)
    layers = {layer.name: layer for layer in subject.network.layers}
    assert list(layers) == ["0", "2", "6", "8"]
    first, second, hidden, last = layers.values()
    assert (first.input_bits, first.after, first.in_size) == (8, (), (8, 8))
    assert (second.input_bits, second.after) == (1, ("0",))
    assert 0 < second.spike_rate < 1
    # 2×2 spikes averaged are counts up to 4, read at every timestep
    assert (hidden.input_bits, hidden.kernel, hidden.linear) == (3, 1, False)
    assert (hidden.in_channels, hidden.in_size, hidden.after) == (256, (1, 1), ("2",))
    assert (last.input_bits, last.linear, last.after) == (1, False, ("6",))
    assert subject.network.lif == ((8, 8, 8), (16, 8, 8), (12, 1, 1))
    assert estimate(subject.network, Chip()).total["energy_pj"] > 0


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("no_tuple", "must return"),
        ("wrong_sample", "RuntimeError"),
        ("broken", "on purpose"),
        ("absent", "absent"),
        ("no_lif", "no LIF population"),
        ("key_error", "missing"),
        ("leaves", "SystemExit"),
        ("vgg", "timesteps, not 2"),
    ],
)
def test_a_module_that_cannot_be_traced_is_one_line(function, words, users, tmp_path, capsys):
    line = f"report --module users_net:{function} --time_steps 2 --bits 4 --out out"
    assert words in refused(capsys, main, line.split())
    assert not (tmp_path / "out").exists()


# Fewer timesteps, and imperfect crossbars.


@pytest.mark.parametrize("line", ["report --time_steps 2", "nonideal"])
def test_accuracy_without_data_is_one_line(line, trained, tmp_path, capsys):
    checkpoint = torch.load(trained["qamd"], weights_only=True)
    checkpoint["settings"]["data"] = "CIFAR10"
    weight = checkpoint["model"]["stem.conv.weight"]
    checkpoint["model"]["stem.conv.weight"] = weight.repeat(1, 3, 1, 1)
    torch.save(checkpoint, tmp_path / "cifar.pth")
    command, *options = line.split()
    arguments = [command, "--checkpoint", str(tmp_path / "cifar.pth"), *options]
    assert "--data_path" in refused(capsys, main, [*arguments, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_the_offered_adc_clips_nothing(trained):
    path = trained["qamd"]
    few = {"time_steps": 1, "test_images": 90}
    broken = nonideal_report(path, Chip(adc_bits=1, adc_range="unit"), **few)
    assert max(row["clipped_share"] for row in broken["layers"]) > 0
    offered = Chip(adc_bits=broken["unclipped_adc_bits"], adc_range="unit")
    mended = nonideal_report(path, offered, **few)
    assert mended["accuracy_mean"] == mended["digital_accuracy"]
    assert all(row["clipped_share"] == 0 for row in mended["layers"])


def test_a_network_of_another_t_is_on_crossbars_what_its_evaluation_is(trained, tmp_path, capsys):
    line = f"nonideal --checkpoint {trained['qamd']} --time_steps 1 --adc_bits ideal"
    assert main(f"{line} --out {tmp_path}".split()) == 0
    printed = capsys.readouterr().out
    assert "\nrun at T 1 (trained at T 4)\n" in printed
    assert "mean conductance" not in printed
    report = json.loads((tmp_path / "nonideal.json").read_text())
    evaluated = trace_checkpoint(str(trained["qamd"]), time_steps=1)
    assert report["accuracies"] == [report["digital_accuracy"]] == [evaluated.accuracy]


def test_the_nonideal_command_reports_trials_and_layers(trained, tmp_path, capsys):
    line = f"nonideal --checkpoint {trained['qamd']} --out {tmp_path} --adc_bits 5 --sigma 1"
    assert main(f"{line} --trials 2 --each_layer --time_steps 1 --test_images 90".split()) == 0
    report = json.loads((tmp_path / "nonideal.json").read_text())
    assert len(report["accuracies"]) == 2
    assert len(report["layers"]) == 21
    subject = nonideal.load_subject(report["checkpoint"], None, 1, test_images=90)
    row = report["layers"][0]
    alone, _ = nonideal.on_chip(subject, Chip(sigma=1.0), [0, 1], only=[row["layer"]])
    assert row["accuracy_alone"] == statistics.mean(alone)
    assert row["accuracy_alone_std"] == statistics.stdev(alone)
    assert max(row["relative_error"] for row in report["layers"]) > 0.01
    printed = capsys.readouterr().out
    assert "digital accuracy" in printed
    assert "raises the mean conductance by 8.3 %" in printed
    few = {"time_steps": 1, "test_images": 90}
    again = nonideal_report(trained["qamd"], Chip(sigma=1.0), Draws(trials=2), **few)
    assert again["accuracies"] == report["accuracies"]  # seeded


MISTAKES = {  # a command: what makes each a mistake
    "": "; estimate; compat; compat no; compat NET; sweep --out OUT; report --layers NET",
    "report --out OUT": "; --layers NET --checkpoint NET; --layers no; --checkpoint no; "
    "--layers FOLDER; --checkpoint FOLDER; --checkpoint QAMD --time_steps 0; "
    "--module a:b --bits 4 --time_steps 0; --module a:b --bits 4; "
    "--module json --bits 4 --time_steps 2",
    "report --layers NET": "--out NET; --out NET/out",
    "report --layers NET --out OUT": "--baseline_layers NET; --baseline no.json; "
    "--baseline no.pth; --data_path FOLDER; --bits 4; --time_steps 0; --cell sram; "
    "--costs none; --preset old; --xbar_size big; --xbar_size 0; --xbar_size 60; --xbar_size=-64; "
    "--pe_per_tile 0; --cell_bits 0; --adc_bits 17; --adc_bits ideal; --clk_mhz 0; --clk_mhz nan; "
    "--clk_mhz inf; --columns_per_adc 6; --on_chip; --sigma 0.1; --adc_range full; --wire_ohm 1; "
    "--process fast; --test_images 5",
    "report --checkpoint QAMD --out OUT": "--sigma 0.1; --on_chip --trials 0; --on_chip --seed -1; "
    "--on_chip --sigma -1; --full_precision_bits 1; --full_precision_bits 33; --test_images 0; "
    "--test_images 361",
    "report --checkpoint FP --out OUT": "--on_chip",
    "compare FP NET --out OUT": "--on_chip",
    "compare QAMD NET --out OUT": "--on_off_ratio 10",
    "sweep --checkpoint FP --layers NET --out OUT": "--on_chip",
    "sweep --checkpoint QAMD --out OUT": "--sigma 0.1; --on_chip --trials 0; --adc_bits 5,ideal",
    "compare --out OUT": f"BASE; BASE no.pth; BASE NET --max_drop -1; BASE {'a' * 300}",
    "sweep --layers NET --out OUT": "--on_chip; --columns_per_adc 6; --xbar_size 64,7; "
    "--cell_bits 1,x; --cell_bits ,; --bits 0; --time_steps 0",
    "nonideal --out OUT --checkpoint": "FP; no.pth",
    "nonideal --checkpoint QAMD --out OUT": "--adc_range half; --time_steps 0; --adc_bits many; "
    "--sigma -1; --on_off_ratio nan; --on_off_ratio 1; --trials 0; --seed -1; --xbar_size 12; "
    "--cell_bits 0; --adc_bits 0; --wire_ohm inf; --wire_ohm 1e-320; --on_ohm 0; --columns both",
}


@pytest.mark.parametrize(
    "line", [f"{x} {y}" for x, mistakes in MISTAKES.items() for y in mistakes.split("; ")]
)
def test_a_mistake_is_one_line_that_names_the_option(line, files, trained, tmp_path, capsys):
    names = files | {"OUT": tmp_path / "out", "QAMD": trained["qamd"], "FP": trained["original"]}
    names |= {"FOLDER": tmp_path, "NET/out": files["NET"] / "out"}
    before = files["NET"].read_bytes()
    error = refused(capsys, main, [str(names.get(word, word)) for word in line.split()])
    option = re.search(r"--(?!layers|baseline|checkpoint|out)(\w+)[ =]\S+$", line)
    assert option is None or option[1] in error or "--module json" in line
    assert not (tmp_path / "out").exists()
    assert files["NET"].read_bytes() == before


@pytest.mark.parametrize("command", ["report", "sweep", "nonideal"])
def test_a_folder_that_cannot_be_written_to_is_found_first(command, files, capsys):
    line = f"{command} --checkpoint not_even_looked_for.pth --out {files['NET']}/below/a/file"
    assert f"cannot write into {files['NET']}/below/a/file (Not a directory)" in refused(
        capsys, main, line.split()
    )


def test_a_grid_beyond_a_million_points_needs_force(files, tmp_path, capsys):
    many = ",".join(map(str, range(1, 65)))
    line = f"sweep --layers {files['NET']} --adc_bits {many} --cell_bits {many} --out {tmp_path}/o"
    line += f" --pe_per_tile {many} --xbar_size 8,16,24,32"
    assert "--force" in refused(capsys, main, line.split())


def test_a_report_of_the_layer_list_that_a_report_wrote_is_the_same(trained, tmp_path):
    options = "--skip rows,patches,tiles --noc mesh"
    first = reported(tmp_path, f"--checkpoint {trained['qamd']} {options}")
    again = reported(tmp_path / "again", f"--layers {tmp_path / 'layers.json'} {options}")
    assert first["total"] == again["total"]
    assert first["layers"] == again["layers"]
