"""The hardware estimate: the published figures, the network model by hand, and the command."""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import read_csv, refused, reported
from display import engineering
from runtime.errors import UserError
from spikesim_eval import layer_list
from spikesim_eval.__main__ import main
from spikesim_eval.chip import PRESETS, Chip
from spikesim_eval.estimate import estimate, ratios
from spikesim_eval.layer_list import (
    Layer,
    LayerList,
    load_layer_list,
)
from spikesim_eval.published import estimate_published

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = json.loads((ROOT / "tests/data/spikesim_golden.json").read_text())["cases"]
RRAM_64 = [
    case
    for case in GOLDEN
    if case["inputs"]["xbar_size"] == 64 and case["inputs"]["device"] == "rram"
]
CYCLE_NS = 104.0  # 26 clocks at 250 MHz


def conv(name: str, **changes) -> Layer:
    """A 3x3 convolution of 64 channels on 4x4 pixels with spike input."""
    values = {
        "kernel": 3,
        "in_channels": 64,
        "out_channels": 64,
        "in_size": (4, 4),
        "out_size": (4, 4),
        "input_bits": 1,
        "after": (),
    }
    return Layer(name=name, **(values | changes))


def as_json(network: LayerList) -> dict:
    """What a file holds of a layer list."""
    return json.loads(json.dumps(asdict(network)))


def net(*layers: Layer, time_steps=1, weight_bits=4, membrane_bits=4, lif=()) -> LayerList:
    return LayerList(time_steps, weight_bits, membrane_bits, layers, lif)


def published(**options) -> Chip:
    return Chip(**PRESETS["published"] | options)


def by_name(network: LayerList, chip: Chip | None = None) -> dict[str, dict]:
    return {row["name"]: row for row in estimate(network, chip or Chip()).layers}


def documented(number: int) -> dict:
    """The JSON objects of docs/layer_list.md."""
    text = (ROOT / "docs/layer_list.md").read_text(encoding="utf-8")
    return json.loads(re.findall(r"```json\n(.*?)```", text, re.DOTALL)[number])


def residual_block() -> dict:
    """A layer list as a file holds it: stem, two convolutions, 1x1 shortcut, classifier."""
    return documented(0)


def published_chain(case: dict) -> LayerList:
    """A golden case as a layer list: a chain of spike-fed layers with one-cell weights."""
    inputs = case["inputs"]
    rows = zip(*(inputs[key] for key in ("in_ch", "out_ch", "in_dim", "out_dim")), strict=True)
    layers = [
        conv(
            f"conv{i}",
            kernel=inputs["kernel_size"],
            in_channels=in_ch,
            out_channels=out_ch,
            in_size=(in_dim, in_dim),
            out_size=(out_dim, out_dim),
            after=(f"conv{i - 1}",) if i else (),
        )
        for i, (in_ch, out_ch, in_dim, out_dim) in enumerate(rows)
    ]
    return net(*layers, time_steps=inputs["time_steps"])


# The published tool.


@pytest.mark.parametrize("case", GOLDEN, ids=[case["name"] for case in GOLDEN])
def test_compat_command_prints_every_published_figure(case, tmp_path, capsys):
    path = tmp_path / "case.json"
    path.write_text(json.dumps(case["inputs"]))
    assert main(["compat", str(path)]) == 0
    printed, expected = json.loads(capsys.readouterr().out), case["expected"]
    assert printed.keys() == expected.keys()
    for key, value in expected.items():
        assert printed[key] == pytest.approx(value, rel=1e-12, abs=0), key


def test_the_documented_case_is_one():
    assert estimate_published(documented(1)).keys() == GOLDEN[0]["expected"].keys()


def test_compat_latency_rounds_three_quarters_of_a_layer_down():
    # No golden case has a layer whose number of outputs is not a multiple of four.
    lists = {"in_ch": [1, 3], "out_ch": [3, 1], "in_dim": [1, 1], "out_dim": [1, 1]}
    case = GOLDEN[0]["inputs"] | lists | {"time_steps": 2}
    assert estimate_published(case)["latency_ns"] == 2 * CYCLE_NS * (2 + 1)


@pytest.mark.parametrize("case", RRAM_64, ids=[case["name"] for case in RRAM_64])
def test_network_model_gives_the_published_layer_energies_where_they_apply(case):
    side = case["inputs"]["kernel_size"]
    chip = published(crossbars_per_pe=side**2)
    result = estimate(published_chain(case), chip)
    energies = [row["energy_pj"] for row in result.layers]
    assert energies == pytest.approx(case["expected"]["layer_energy_pj"], rel=1e-12)
    assert result.total["pes"] == case["expected"]["pes"]
    if case == GOLDEN[0]:  # the published tool rounds the delays of others
        expected = pytest.approx(case["expected"]["latency_ns"], rel=1e-12)
        assert result.total["delay_ns"] == expected


def test_network_model_agrees_with_the_spikingjelly_profiler_on_vgg9():
    torch = pytest.importorskip("torch")
    pytest.importorskip("spikingjelly")
    from spikingjelly.activation_based import neuron
    from spikingjelly.activation_based.op_counter.spikesim import SpikeSimEnergyProfiler

    network = published_chain(GOLDEN[0])
    modules = []
    for layer in network.layers:
        stride = layer.in_size[0] // layer.out_size[0]
        modules += [
            torch.nn.Conv2d(layer.in_channels, layer.out_channels, 3, stride, 1, bias=False),
            neuron.IFNode(),
        ]
    vgg9 = torch.nn.Sequential(*modules).eval()
    with torch.no_grad(), SpikeSimEnergyProfiler() as profiler:
        for _ in range(network.time_steps):
            vgg9(torch.ones(1, 3, 32, 32))

    energy = estimate(network, published()).total["energy_pj"]
    assert profiler.get_total() == pytest.approx(15_906_934.026240, rel=1e-12)
    assert energy == pytest.approx(profiler.get_total(), rel=1e-12)


# The network model, by hand.


def test_accumulators_hold_the_worst_sum_and_products_its_scaled_one():
    # 9 · 2 products of 4-bit weights (±7) and 3-bit inputs (0..7): 882 needs 10 bits and a sign
    rows = by_name(
        net(
            conv("a", in_channels=2, input_bits=3, bn_bits=6),
            conv("binary", in_channels=1, weight_bits=1),  # ±1: 9 needs 4 bits and a sign
            conv("depthwise", groups=64),  # 9 products of at most 7: 63 needs 6 bits and a sign
        )
    )
    assert rows["depthwise"]["accumulator_bits"] == 7
    assert (rows["a"]["accumulator_bits"], rows["a"]["product_bits"]) == (11, 17)
    assert (rows["binary"]["accumulator_bits"], rows["binary"]["product_bits"]) == (5, None)


def test_every_published_component_of_a_layer_equals_the_one_worked_out_by_hand():
    layer = conv("a", kernel=1, in_channels=128, out_channels=96, input_bits=2, spike_rate=0.25)
    network = net(layer, time_steps=3, weight_bits=8)
    chip = published(xbar_size=32, cell_bits=4, adc_bits=6)
    # g = 4, K = 9, m = 96·2/32 = 6, m1 = 3: n = 1·6 PEs, n1 = 3 groups; q = 16·3·2 cycles; f = 4
    # LIF neurons are updated once a timestep, not once an input bit: 16·3 times
    cycles, pes, groups, adcs = 96, 6, 3, 4
    expected = {
        "crossbar": cycles * 8 * (4 * 6) * 1.76423 * 0.25 * 0.25,
        "adc": cycles * 8 * pes * adcs * 2.03084 * 4,
        "mux": cycles * 8 * pes * adcs * 0.094245,
        "subtractor": cycles * pes * adcs * 16 * 1.15e-6,
        "temp_buffer": cycles * pes * adcs * 0.2,
        "htree": cycles * groups * 157.12,
        "fetch": cycles * groups * 4.64,
        "neuron": 48 * groups * 5.096,
        "tile_buffer": cycles * groups * 397,
    }
    row = by_name(network, chip)["a"]
    assert (row["cycles"], row["pes"], row["groups"]) == (cycles, pes, groups)
    assert row["energy_by_component"] == pytest.approx(expected, rel=1e-12)
    assert row["energy_pj"] == pytest.approx(sum(expected.values()), rel=1e-12)


def test_every_counted_component_of_a_layer_equals_the_one_worked_out_by_hand():
    sizes = {"in_size": (5, 5), "out_size": (3, 3), "in_channels": 100, "out_channels": 20}
    layer = conv("a", **sizes, input_bits=2, spike_rate=0.25, bn_bits=6)
    network = net(layer, time_steps=3, weight_bits=8, membrane_bits=4)
    # 7 bits without the sign on cells of 4: 2 slices, 40 columns in each of 2 planes, of 9 · 2
    # crossbars in line in two PEs. 9 pixels, 3 timesteps, 2 bits: 54 cycles. Of the 9 · 9 positions
    # of 3 x 3 kernels with stride 2 and padding 1 on 5 x 5 pixels 7 · 7 lie inside.
    cycles, columns, stack, accumulator = 54, 80, 18, 20
    row = by_name(network, Chip(adc_bits=6))["a"]
    assert (row["cycles"], row["crossbars"], row["pes"]) == (cycles, 2 * 18, 4)
    assert row["accumulator_bits"] == accumulator
    bit, read, write = 0.03 / 8 * 1.99, 15.9 / 64, 17.7 / 64
    expected = {
        "crossbar": 3 * 2 * 49 * 100 * 0.25 * columns * 1.76423 / 512,
        "adc": cycles * stack * columns * 2.03084 * 4,
        "mux": cycles * stack * columns * 0.094245,
        "temp_buffer": cycles * stack * columns * 0.025,
        "shift_add": cycles * stack * columns * accumulator * bit,
        "htree": cycles * 2 * 2 * 20 * 2.455,  # the sums of two PEs in two planes
        "fetch": cycles * 4 * 4.64,
        "tile_buffer": cycles * 900 * 8.23 / 64,
        "input_buffer": 3 * 100 * 25 * 2 * write,
        "batch_norm": 27 * 20 * (accumulator * 6 * 0.2 / 64 * 1.99 + (accumulator + 6) * bit),
        "kept_sums": 0,
        "neuron": 27 * 20 * 1.274 * 4 / 64,
        "membrane": 27 * 20 * 4 * (read + write),
    }
    assert row["energy_by_component"] == pytest.approx(expected, rel=1e-12)
    # one clock to settle, and 40 columns at 8 ADCs in 5 turns of 6 bits
    assert row["busy_ns"] == pytest.approx(cycles * (1 + 5 * 6) * 4)


def test_membranes_cost_energy_by_their_bits_and_a_static_stem_runs_once():
    of_bits = {}
    for bits in (4, 32):
        network = net(conv("a"), time_steps=2, membrane_bits=bits)
        of_bits[bits] = by_name(network)["a"]["energy_by_component"]["membrane"]
    assert of_bits[32] == pytest.approx(8 * of_bits[4])
    stem = conv("a", input_bits=8)
    every, once = (by_name(net(x, time_steps=4))["a"] for x in (stem, replace(stem, static=True)))
    assert every["cycles"] == 4 * once["cycles"]
    assert every["energy_by_component"]["adc"] == 4 * once["energy_by_component"]["adc"]
    assert every["energy_by_component"]["membrane"] == once["energy_by_component"]["membrane"] > 0
    kept = 64 * 16 * 25  # of two images in turn
    assert once["energy_by_component"]["kept_sums"] == pytest.approx(kept * (17.7 + 4 * 15.9) / 64)
    assert once["area_by_component"]["kept_sums"] == pytest.approx(2 * kept * 0.7391)
    at_one = by_name(net(replace(stem, static=True)))["a"]
    assert at_one["energy_by_component"]["kept_sums"] == 0  # there is nothing to keep


def test_power_and_leakage_are_those_of_image_after_image():
    network = net(conv("a"), conv("b", after=("a",)), time_steps=5, lif=((64, 4, 4),))
    found = {x: estimate(network, Chip(process=x)) for x in ("lstp", "lop")}
    total, area = found["lstp"].total, found["lstp"].area_by_component
    transistors = sum(area.values()) - area["crossbar"] - area["htree"]
    assert total["leakage_mw"] == pytest.approx(transistors * 0.35e-3 / 8192 / 0.7391)
    assert found["lop"].total["leakage_mw"] / total["leakage_mw"] == pytest.approx(29 / 0.35)
    leaked = found["lstp"].energy_by_component["leakage"]
    assert leaked == pytest.approx(total["leakage_mw"] * total["delay_ns"])
    interval = 1e9 / total["frames_per_second"]
    dynamic = total["energy_pj"] - leaked
    assert total["power_mw"] == pytest.approx(dynamic / interval + total["leakage_mw"])
    assert sum(found["lstp"].energy_by_component.values()) == pytest.approx(total["energy_pj"])


def test_h_trees_and_subtractors_grow_with_the_pes_that_they_serve():
    network = net(*(conv(f"layer{i}") for i in range(8)))  # of two PEs each
    few, many = (estimate(network, Chip(pe_per_tile=n)).area_by_component for n in (2, 16))
    for part in ("htree", "subtractor", "adc"):
        assert few[part] == pytest.approx(many[part])
    assert few["tile_buffer"] == pytest.approx(8 * many["tile_buffer"])


def test_from_python_the_best_of_a_grid_takes_three_lines(layer_file):
    from spikesim_eval import chips, estimate, load_layer_list

    network = load_layer_list(layer_file)
    found = [estimate(network, chip) for chip in chips(xbar_size=[64, 128], adc_bits=[4, 5])]
    best = min(found, key=lambda x: x.total["edap_pj_ns_um2"])

    assert len({(x.chip.xbar_size, x.chip.adc_bits) for x in found}) == 4
    assert best.chip.adc_bits == 4
    with pytest.raises(UserError, match="xbar_size must be"):
        list(chips(xbar_size=[64, 4]))


def test_layers_share_tiles_or_have_their_own():
    network = net(conv("a"), conv("b", after=("a",)), conv("c", out_channels=200, after=("b",)))
    shared, own = (estimate(network, Chip(tiles=x)).total for x in ("shared", "own"))
    assert shared["pes"] == own["pes"] == 2 + 2 + 8
    assert (shared["tiles"], own["tiles"]) == (2, 3)
    assert own["area_um2"] > shared["area_um2"]


def test_an_ideal_adc_has_no_price():
    with pytest.raises(UserError, match="adc_bits must be a number"):
        estimate(net(conv("a")), Chip(adc_bits=None))


def test_input_bits_given_for_a_linear_layer_are_ignored():
    data = residual_block()
    data["layers"][4]["input_bits"] = 3
    given = LayerList.from_json(data)
    assert (
        estimate(given, Chip()).total
        == estimate(LayerList.from_json(residual_block()), Chip()).total
    )
    assert given.input_bits(given.layers[4]) == 11  # 0..4·16·16


def test_efficiencies_are_tera_operations_per_joule_and_per_second_and_square_millimetre():
    total = estimate(net(conv("a"), conv("b"), time_steps=5), Chip()).total
    assert total["ops"] == 2 * (2 * 64 * 64 * 9 * 16) * 5
    joule, second, mm2 = total["energy_pj"] / 1e12, total["delay_ns"] / 1e9, total["area_um2"] / 1e6
    assert total["tops_per_watt"] == pytest.approx(total["ops"] / joule / 1e12)
    assert total["tops_per_mm2"] == pytest.approx(total["ops"] / second / mm2 / 1e12)
    product = total["energy_pj"] * total["delay_ns"] * total["area_um2"]
    assert total["edap_pj_ns_um2"] == pytest.approx(product)


def test_ratios_above_one_mean_better_than_the_baseline():
    keys = ("edap_pj_ns_um2", "energy_pj", "delay_ns", "area_um2", "tops_per_watt", "tops_per_mm2")
    ours = dict(zip(keys, (1, 2, 4, 8, 6, 9), strict=True))
    baseline = dict(zip(keys, (10, 8, 8, 4, 2, 3), strict=True))
    assert ratios(ours, baseline) == {
        "edap": 10,
        "energy": 4,
        "delay": 2,
        "area": 0.5,
        "tops_per_watt": 3,
        "tops_per_mm2": 3,
    }


# What holds for every network.


@st.composite
def with_geometry(draw, layer: Layer) -> Layer:
    """The same convolution with a stride and a padding of its own, and the outputs that these have
    where the padding lies evenly, or fewer."""
    pair = [draw(st.tuples(st.integers(1, 3), st.integers(0, layer.kernel - 1))) for _ in range(2)]
    most = [(size + p - 1) // s + 1 for size, (s, p) in zip(layer.in_size, pair, strict=True)]
    sizes = tuple(draw(st.integers(1, min(x, 6))) for x in most)
    stride, padding = zip(*pair, strict=True)
    return replace(layer, out_size=sizes, stride=stride, padding=padding)


@st.composite
def networks(draw) -> LayerList:
    small = st.integers(1, 6)
    size = st.tuples(small, small)
    layers = []
    for i in range(draw(st.integers(1, 6))):
        linear = draw(st.booleans()) and i > 0
        groups = 1 if linear else draw(st.sampled_from([1, 1, 2, 7, 64]))
        most = 200 // groups
        after = tuple(draw(st.sets(st.sampled_from([x.name for x in layers])))) if i else ()
        layers.append(
            Layer(
                name=f"layer{i}",
                kernel=1 if linear else draw(st.sampled_from([1, 3, 5])),
                in_channels=groups * draw(st.integers(1, most)),
                out_channels=groups * draw(st.integers(1, most)),
                in_size=draw(size),
                out_size=(1, 1) if linear else draw(size),
                input_bits=None if linear else draw(st.integers(1, 8)),
                after=after,
                spike_rate=draw(st.none() | st.floats(0, 1)),
                weight_bits=draw(st.none() | st.integers(1, 16)),
                linear=linear,
                groups=groups,
                runs=draw(st.sampled_from([1, 1, 3])),
                bn_bits=draw(st.none() | st.integers(1, 16)),
                lif=draw(st.none() | st.booleans()),
                static=not linear and not after and draw(st.booleans()),
            )
        )
    for i, layer in enumerate(layers):
        if not layer.linear and draw(st.booleans()):
            layers[i] = draw(with_geometry(layer))
    lif = draw(st.lists(st.tuples(small, small, small), max_size=3))
    return LayerList(draw(small), draw(st.integers(1, 31)), draw(small), tuple(layers), tuple(lif))


@settings(deadline=None, max_examples=50)
@given(networks(), st.randoms(use_true_random=False))
def test_the_order_of_layers_in_the_file_changes_no_total(network, random):
    data = as_json(network)
    random.shuffle(data["layers"])
    shuffled = estimate(LayerList.from_json(data), Chip())
    assert shuffled.total == estimate(network, Chip()).total


@settings(deadline=None, max_examples=50)
@given(networks())
def test_a_layer_list_written_and_read_back_is_the_same_network(network):
    assert LayerList.from_json(as_json(network)) == network


# The report command.


def full_precision() -> LayerList:
    """The same network in 32-bit fixed point."""
    data = residual_block() | {"weight_bits": 32, "membrane_bits": 32}
    for layer in data["layers"]:
        layer.pop("weight_bits", None)
    data["layers"][3]["input_bits"] = 32
    return LayerList.from_json(data)


@pytest.fixture
def layer_file(tmp_path) -> Path:
    path = tmp_path / "net.json"
    path.write_text(json.dumps(residual_block()))
    return path


@pytest.fixture
def baseline_file(tmp_path) -> Path:
    path = tmp_path / "baseline.JSON"
    path.write_text(json.dumps(as_json(full_precision())))
    return path


@pytest.mark.parametrize(
    "command", ["report --layers {0}", "sweep --layers {0}", "compare {0} {0}"]
)
def test_adcs_of_a_layer_that_is_not_there_are_refused(command, layer_file, tmp_path, capsys):
    line = f"{command.format(layer_file)} --out {tmp_path / 'out'} --layer_adc_bits no_layer=3"
    assert "layer_adc_bits: there is no layer 'no_layer'" in refused(capsys, main, line.split())


def test_report_command_writes_its_files_and_prints_the_totals(layer_file, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    report = reported(out, f"--layers {layer_file} --xbar_size 128")
    files = {f"report.{suffix}" for suffix in ("csv", "html", "json", "md")}
    assert {path.name for path in out.iterdir()} == files | {"layers.json"}
    assert load_layer_list(out / "layers.json") == load_layer_list(layer_file)

    expected = estimate(load_layer_list(layer_file), Chip(xbar_size=128))
    assert report["total"] == expected.total
    assert report["chip"]["xbar_size"] == 128
    assert report["chip"]["crossbars_per_pe"] == 9
    assert {row["name"]: row["rate_is_measured"] for row in report["layers"]} == {
        "stem": False,
        "conv1": True,
        "conv2": True,
        "shortcut": False,
        "fc": False,
    }
    assert "ratio" not in report
    assert (
        engineering(expected.total["energy_pj"] * 1e-12, "J", digits=4) in capsys.readouterr().out
    )
    rows = read_csv(out / "report.csv")
    assert [row["layer_name"] for row in rows] == [row["name"] for row in report["layers"]]
    energies = [float(row["energy_pj"]) for row in rows]
    energies += [report["energy_by_component"][x] for x in ("stream", "leakage")]  # of no layer
    assert sum(energies) == pytest.approx(expected.total["energy_pj"])
    assert (
        float(rows[1]["crossbar_energy_pj"])
        == (report["layers"][1]["energy_by_component"]["crossbar"])
    )


def test_report_compares_with_a_baseline_and_shows_the_published_ratios(
    layer_file, baseline_file, tmp_path
):
    out = tmp_path / "out"
    report = reported(out, f"--layers {layer_file} --baseline {baseline_file}")
    assert report["baseline"] == estimate(load_layer_list(baseline_file), Chip()).total
    assert report["ratio"] == ratios(report["total"], report["baseline"])
    assert report["ratio"]["energy"] > 1
    assert report["ratio"]["edap"] > 1
    assert report["published"] == {"edap": 14.85, "tops_per_watt": 2.64, "tops_per_mm2": 6.19}
    text = (out / "report.md").read_text()
    for published in ("14.85", "2.64", "6.19"):
        assert published in text
    for sentence in report["assumptions"]:
        assert sentence in text


def test_every_chip_option_of_the_command_reaches_the_estimate(layer_file, tmp_path):
    options = {
        "xbar_size": 32,
        "cell_bits": 2,
        "columns": "offset",
        "crossbars_per_pe": 7,
        "pe_per_tile": 5,
        "tiles": "own",
        "adc_bits": 6,
        "adc_of": "pe",
        "adc_law": "linear",
        "columns_per_adc": 4,
        "clk_mhz": 500.0,
        "process": "hp",
        "celsius": 85.0,
        "costs": "published",
        "skip": "rows,tiles",
        "noc": "mesh",
        "layer_adc_bits": "stem=7,fc=3",
    }
    priced = {x.name for x in fields(Chip) if x.metadata["part"] != "simulation"}
    assert options.keys() == priced - {"technology"}  # of test_technology.py
    network = load_layer_list(layer_file)
    for costs in ("counted", "published"):
        chip = options | {"costs": costs}
        if costs == "published":
            chip |= {"skip": "nothing", "noc": "free", "layer_adc_bits": "", "celsius": 27.0}
        said = " ".join(f"--{name}={value}" for name, value in chip.items())
        report = reported(tmp_path, f"--layers {layer_file} {said}")
        assert report["total"] == estimate(network, Chip(**chip)).total
        assert report["chip"] == chip | {"technology": "spikesim-65nm"}


# What the default was at commit 8863b76, for the layer list of docs/layer_list.md.
OLD_DEFAULT = {
    "pes": 14,
    "tiles": 2,
    "energy_pj": 45926797.585587196,
    "area_um2": 2131896.055678,
    "delay_ns": 218103808.0,
    "edap_pj_ns_um2": 2.1354796541288783e22,
    "ops": 483943424,
    "tops_per_watt": 10.53727778641966,
    "tops_per_mm2": 0.0010407952908355193,
}


def test_the_published_preset_is_the_default_of_earlier_versions(layer_file, tmp_path):
    total = reported(tmp_path, f"--layers {layer_file} --preset published")["total"]
    assert {name: total[name] for name in OLD_DEFAULT} == pytest.approx(OLD_DEFAULT, rel=1e-12)
    assert total["leakage_mw"] == 0


def test_an_option_that_is_given_wins_over_the_preset(layer_file, tmp_path):
    options = "--preset published --adc_bits 6 --columns differential"
    report = reported(tmp_path, f"--layers {layer_file} {options}")
    chip = published(adc_bits=6, columns="differential")
    assert report["total"] == estimate(load_layer_list(layer_file), chip).total
    assert report["chip"] == chip.options("price")


def test_compat_and_layer_lists_need_no_torch(layer_file, tmp_path):
    case = tmp_path / "case.json"
    case.write_text(json.dumps(GOLDEN[0]["inputs"]))
    code = (
        "import sys; from spikesim_eval.__main__ import main; "
        f"assert main(['compat', {str(case)!r}]) == 0; "
        f"report = ['report', '--layers', {str(layer_file)!r}, '--out', {str(tmp_path)!r}]; "
        "assert main(report) == 0; "
        "assert 'torch' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


# Mistakes of the user.


def changed(*path_and_value) -> dict:
    """The good layer list with one value replaced; `...` removes the key."""
    data = residual_block()
    *path, last, value = path_and_value
    entry = data
    for key in path:
        entry = entry[key]
    if value is ...:
        del entry[last]
    else:
        entry[last] = value
    return data


NAN, INF = float("nan"), float("inf")
BAD_VALUES = {  # by where they stand; `...` is a key left out
    ("timesteps",): (4,),
    ("time_steps",): (..., True, 4.0, "4", None, 0, 10**9 + 1),
    ("weight_bits",): (0, 33),
    ("membrane_bits",): (33,),
    ("layers",): ({}, []),
    ("layers", 0): (7,),
    ("layers", 0, "stride"): (1,),
    ("layers", 4, "bias"): (True,),
    ("layers", 0, "input_bits"): (..., None, 0, 33),
    ("layers", 0, "bn_bits"): (33,),
    ("layers", 0, "kernel"): (..., 0),
    ("layers", 0, "in_channels"): (-3,),
    ("layers", 0, "out_channels"): (True, 10**12, NAN),
    ("layers", 0, "in_size"): (32, [32, 32, 32]),
    ("layers", 0, "out_size"): ([0, 32], ["32", 32], [True, 32]),
    ("layers", 1, "spike_rate"): (1.01, -0.1, NAN, INF, True, "0.5"),
    ("layers", 0, "weight_bits"): (8.0,),
    ("layers", 4, "linear"): (1,),
    ("layers", 0, "static"): (1, None),
    ("layers", 0, "silent_patches"): (1.01, True),
    ("layers", 0, "silent_tiles"): (
        1,
        [1],
        [[64, 9, 1, 0.5]],
        [[0, 9, 1, 0, 0]],
        [[64, 9, 1, -1, 0]],
    ),
    ("layers", 1, "static"): (True,),  # behind another layer
    ("layers", 4, "static"): (True,),
    ("layers", 4, "kernel"): (3,),
    ("layers", 4, "out_size"): ([2, 2],),
    ("layers", 0, "name"): (["stem"], "", "a\nb", "\ud800"),
    ("layers", 1, "name"): ("stem",),
    ("layers", 0, "after"): (..., ["conv2"], ["stem"]),
    ("layers", 1, "after"): ("stem", [0], [["stem"]], ["stern"]),
    ("lif",): (..., 3, [[64, 32]], [[64, 0, 32]], [[64, True, 32]]),
}
BAD_LISTS = [
    *("{", "", b"\xff\xfe\x00", "[" * 100_000, [], None),
    json.dumps(residual_block()).replace('"time_steps": 4', '"time_steps": ' + "9" * 5000),
    json.dumps(residual_block()).replace("{", '{"time_steps": 2, ', 1),  # a key twice
    *(changed(*where, value) for where, values in BAD_VALUES.items() for value in values),
]


def write(path: Path, content: object) -> None:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))


def test_a_bad_layer_list_gives_one_error_line_and_writes_nothing(tmp_path, capsys):
    path, out = tmp_path / "net.json", tmp_path / "out"
    for content in BAD_LISTS:
        write(path, content)
        line = refused(capsys, main, ["report", "--layers", str(path), "--out", str(out)])
        assert len(line) < 400
        assert not out.exists()


NET = json.dumps(residual_block(), indent=1)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_layer_list_is_read_with_and_without_a_byte_order_mark(encoding, tmp_path):
    path = tmp_path / "net.json"
    path.write_text(NET, encoding=encoding)
    assert load_layer_list(path) == LayerList.from_json(residual_block())


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (NET.replace("stem", "Stämme").encode("latin-1"), "is no text"),
        (NET.encode("utf-16"), "is text in UTF-16: wanted"),
        (NET.encode("utf-16-be"), "is text in UTF-16: wanted"),
        (NET.encode("utf-32"), "is text in UTF-16: wanted"),
        (NET.replace("4", "4" * 5000).encode(), "holds a number of too many digits"),
        (b"name,kernel\nstem,3\n", "goes wrong in line 1, column 1"),
        (b" \n", "goes wrong in line 2, column 1"),
        (b"PK\x03\x04\0\0\x08\x08\0\0\xf3" + bytes(range(256)), "(a zip archive, perhaps a ch"),
        (b"\x80\x02}q\0.", "is no text"),
        (NET[: NET.index("layers")].encode(), "goes wrong in line 5, column 2"),
        (b"[" * 10**6, "holds lists in lists, too deep"),
    ],
)
def test_what_is_no_json_is_named_in_plain_words(content, named, tmp_path, capsys):
    path = tmp_path / "net.json"
    path.write_bytes(content)
    said = refused(capsys, main, ["compat", str(path)])
    assert len(said) < 400
    assert f"{str(path)!r} {named}" in said
    assert "wanted is a JSON object, in UTF-8" in said
    assert not any(jargon in said for jargon in ("Expecting", "codec", "byte 0x", "char "))


@pytest.mark.parametrize("out", ["", "a\0b", "new/" + 300 * "b"])
def test_a_folder_that_cannot_be_made_is_one_line_and_leaves_nothing(
    out, layer_file, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.rglob("*"))
    refused(capsys, main, ["report", "--layers", str(layer_file), "--out", out])
    assert set(tmp_path.rglob("*")) == before


BAD_CASES = [
    *({"bits": 4}, {"device": ...}, {"device": "dram"}, {"device": ["rram"]}, {"in_ch": []}),
    *({"in_ch": 3}, {"in_ch": [3]}, {"out_dim": [32, 16, 16, 8, 8, 8, 0]}, {"xbar_size": 60}),
    *({"in_dim": [32, 16, 16, 8, 8, 8, True]}, {"kernel_size": 3.0}, {"time_steps": True}),
    *({"pe_per_tile": 0}, {"clk_freq_mhz": 0}, {"clk_freq_mhz": NAN}, {"clk_freq_mhz": "250"}),
]


def test_a_bad_compat_case_gives_one_error_line(tmp_path, capsys):
    path = tmp_path / "case.json"
    for case in (GOLDEN[0], *(GOLDEN[0]["inputs"] | changes for changes in BAD_CASES)):
        write(path, {key: value for key, value in case.items() if value is not ...})
        refused(capsys, main, ["compat", str(path)])


@pytest.mark.parametrize("kind", ["pipe", "/dev/zero", "large"])
def test_what_may_never_end_is_not_read(kind, tmp_path, capsys, monkeypatch):
    path = tmp_path / "case.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "large":
        monkeypatch.setattr(layer_list, "MOST_JSON", 10)
        write(path, GOLDEN[0]["inputs"])
    else:
        path.symlink_to(kind)
    refused(capsys, main, ["compat", str(path)])


def test_no_file_is_written_where_one_of_them_cannot_be(layer_file, tmp_path, capsys):
    blocked = tmp_path / "out" / "report.md"
    blocked.mkdir(parents=True)
    refused(capsys, main, f"report --layers {layer_file} --out {blocked.parent}".split())
    assert list(blocked.parent.iterdir()) == [blocked]


def test_the_largest_numbers_allowed_still_give_finite_figures(tmp_path):
    data = residual_block() | {"time_steps": 10**9, "weight_bits": 32}
    big = 10**9
    data["layers"][0] |= {
        "kernel": big,
        "in_channels": big,
        "out_channels": big,
        "in_size": [big, big],
        "out_size": [big, big],
        "input_bits": 32,
        "weight_bits": 32,
    }
    path = tmp_path / "net.json"
    write(path, data)
    options = "--xbar_size 32 --cell_bits 1 --adc_bits 16 --clk_mhz 1 --crossbars_per_pe 1"
    line = f"report --layers {path} --out {tmp_path} {options}"
    assert main([*line.split(), "--preset", "published"]) == 0
    assert main(line.split()) == 2  # so many rows of pixels are not scheduled
    data["time_steps"] = 2**15
    data["layers"][0] |= {"in_size": [32, 32], "out_size": [32, 32]}
    write(path, data)
    assert main(line.split()) == 0
