"""Silence that a chip skips: what recorded spikes say, counted once more by hand, and its laws."""

import json
from dataclasses import replace
from itertools import pairwise
from math import ceil

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from conftest import refused
from runtime.errors import UserError
from spikesim_eval.__main__ import main
from spikesim_eval.chip import Chip
from spikesim_eval.codes import Rows
from spikesim_eval.compare import sensitivity
from spikesim_eval.estimate import estimate
from spikesim_eval.layer_list import Layer, LayerList, Subject, load_layer_list
from spikesim_eval.silence import expected_tiles, positions_inside, silent_patches, tile_sizes
from spikesim_eval.sweep import grid_of, sweep
from spikesim_eval.technology import DEFAULT
from test_chip import chips, fit
from test_spikesim import as_json, conv, net, networks, residual_block

EVERYTHING = "rows,patches,tiles"


@st.composite
def layers(draw) -> Layer:
    kernel, stride = draw(st.sampled_from([1, 2, 3])), draw(st.integers(1, 2))
    padding, size = draw(st.integers(0, kernel - 1)), draw(st.integers(3, 6))
    outputs = (size + 2 * padding - kernel) // stride + 1
    return conv(
        "a",
        kernel=kernel,
        in_channels=draw(st.integers(1, 40)),
        out_channels=draw(st.integers(1, 40)),
        in_size=(size, size),
        out_size=(outputs, outputs),
        stride=(stride, stride),
        padding=(padding, padding),
        input_bits=draw(st.sampled_from([1, 1, 3])),
    )


def some_chips() -> st.SearchStrategy[Chip]:
    return st.builds(
        Chip,
        xbar_size=st.sampled_from([8, 16]),
        crossbars_per_pe=st.integers(1, 10),
        pe_per_tile=st.integers(1, 9),
        columns=st.sampled_from(["differential", "offset"]),
        adc_of=st.sampled_from(["crossbar", "pe"]),
        skip=st.sampled_from(["rows", "patches", "tiles", "patches,tiles", EVERYTHING]),
    )


def spikes(layer: Layer, seed: int, rate: float, images: int = 2) -> torch.Tensor:
    """Codes of the layer's inputs whose bits are ones with this probability."""
    generator = torch.Generator().manual_seed(seed)
    shape = images, layer.in_channels, *layer.in_size, layer.input_bits
    bits = (torch.rand(shape, generator=generator) < rate).long()
    return (bits << torch.arange(layer.input_bits)).sum(dim=-1)


def recorded(layer: Layer, codes: torch.Tensor, chip: Chip) -> Layer:
    """The layer with what has been measured of it."""
    rows = Rows(
        layer.kernel, layer.input_bits, layer.stride, layer.padding, tile_sizes(layer, chip)
    )
    for image in codes:
        rows.add(image[None])
    return replace(layer, **rows.found())


def events(layer: Layer, codes: torch.Tensor, chip: Chip) -> dict[str, int]:
    """What a chip does, one PE cycle after the other, with these images."""
    (s, _), (p, _), k = layer.stride, layer.padding, layer.kernel
    found = dict.fromkeys(("conversions", "moved", "pes", "read", "clocks"), 0)
    slices = 1 if chip.stored_bits(4) <= chip.cell_bits else 2
    wide = ceil(layer.out_channels / (chip.xbar_size // slices))
    places = [(y, x) for y in range(k) for x in range(k)]
    blocks = [*range(0, layer.in_channels, chip.xbar_size), layer.in_channels]
    crossbars = [(place, block) for block in pairwise(blocks) for place in places]
    size = chip.crossbars_per_pe
    pes = [crossbars[i : i + size] for i in range(0, len(crossbars), size)]
    fitting = max(1, chip.pe_per_tile // (wide * chip.planes))
    tiles = [pes[i : i + fitting] for i in range(0, len(pes), fitting)]
    columns = layer.out_channels * slices * chip.planes
    turns = ceil(min(layer.out_channels, chip.xbar_size // slices) * slices / chip.adcs)
    for image in codes.tolist():
        for y in range(layer.out_size[0]):
            for x in range(layer.out_size[1]):
                for bit in range(layer.input_bits):

                    def fed(crossbar, y=y, x=x, bit=bit, image=image):
                        (dy, dx), (first, last) = crossbar
                        at = y * s - p + dy, x * s - p + dx
                        if not all(0 <= a < n for a, n in zip(at, layer.in_size, strict=True)):
                            return []
                        return [image[c][at[0]][at[1]] >> bit & 1 for c in range(first, last)]

                    def silent(tile, fed=fed):
                        bits = [one for pe in tile for crossbar in pe for one in fed(crossbar)]
                        return not any(bits) if bits else tile is not pes and silent(pes)

                    patch = silent(pes)
                    found["read"] += layer.in_channels * k * k
                    if "rows" in chip.skip:
                        found["read"] -= sum(fed(x).count(0) for x in crossbars)
                    skips_patch = patch and "patches" in chip.skip
                    found["clocks"] += 1 if skips_patch else 1 + turns * chip.adc_bits
                    for tile in tiles:
                        if skips_patch or ("tiles" in chip.skip and silent(tile)):
                            continue
                        of_crossbars = sum(map(len, tile))
                        read = of_crossbars if chip.adc_of == "crossbar" else len(tile)
                        found["conversions"] += read * columns
                        found["moved"] += len(tile) * layer.out_channels * chip.planes
                        found["pes"] += len(tile)
    return found


@settings(deadline=None, max_examples=60)
@given(layers(), some_chips(), st.integers(0, 1000), st.sampled_from([0.0, 0.02, 0.1, 0.5]))
def test_what_is_skipped_is_what_is_silent_cycle_by_cycle(layer, chip, seed, rate):
    codes = spikes(layer, seed, rate)
    network = net(recorded(layer, codes, chip))
    (row,), counted = estimate(network, chip).layers, events(layer, codes, chip)
    energy, images, cost = row["energy_by_component"], len(codes), DEFAULT.energy
    in_line = ceil(
        row["pes"]
        and layer.kernel**2 * ceil(layer.in_channels / chip.xbar_size) / chip.crossbars_per_pe
    )
    groups = row["groups"] / in_line
    assert row["conversions"] * images == pytest.approx(counted["conversions"])
    assert energy["htree"] * images == pytest.approx(counted["moved"] * cost["htree"])
    assert energy["fetch"] * images == pytest.approx(counted["pes"] * groups * cost["fetch"])
    assert energy["tile_buffer"] * images == pytest.approx(counted["read"] * cost["tile_read"])
    assert row["busy_ns"] * images == pytest.approx(counted["clocks"] * chip.clock_ns)


@settings(deadline=None, max_examples=40)
@given(layers(), some_chips())
def test_recorded_ones_everywhere_give_the_dense_figures(layer, chip):
    codes = spikes(layer, 0, 1.1)
    network = net(recorded(layer, codes, chip))
    dense = estimate(network, replace(chip, skip="nothing"))
    assert estimate(network, chip).total == dense.total


@settings(deadline=None, max_examples=60)
@given(networks(), chips())
def test_rates_of_one_give_the_dense_figures_and_skipping_more_never_costs_more(network, chip):
    if not fit(network, chip) or chip.costs == "published":
        return
    dense = replace(chip, skip="nothing")
    ones = network.with_layers(lambda *_: True, spike_rate=1.0)
    assert estimate(ones, chip).total == estimate(ones, dense).total
    spent = [
        estimate(network, replace(chip, skip=skip)).total
        for skip in ("nothing", "patches", "patches,tiles", EVERYTHING)
    ]
    for less, more in pairwise(spent):
        for key in ("energy_pj", "delay_ns"):
            assert more[key] <= less[key] * (1 + 1e-12)
        assert more["area_um2"] == less["area_um2"]


@settings(deadline=None, max_examples=30)
@given(layers(), some_chips(), st.sampled_from([0.003, 0.01, 0.05]), st.integers(0, 99))
def test_of_independent_spikes_the_expectation_is_what_is_recorded(layer, chip, rate, seed):
    layer = replace(layer, input_bits=1)
    chip = replace(chip, skip=EVERYTHING)
    found = recorded(layer, spikes(layer, seed, rate, images=300), chip)
    expected = replace(layer, spike_rate=rate)
    measured, hoped = (estimate(net(x), chip).layers[0] for x in (found, expected))
    most = estimate(net(replace(layer, spike_rate=1.0)), chip).layers[0]
    # 300 images, whose pixels share inputs: a deviation of at most 1 / (2 √300), five of them
    for key in ("conversions", "busy_ns"):
        assert abs(measured[key] - hoped[key]) / most[key] < 2.5 / 300**0.5


@given(st.integers(1, 5), st.tuples(*[st.integers(1, 9)] * 2), st.tuples(*[st.integers(1, 9)] * 2))
def test_a_layer_that_never_fires_is_silent_for_exactly_one(kernel, in_size, out_size):
    """Else what is left of all conversions of a large layer by rounding would be charged."""
    layer = Layer("a", kernel, 70, 8, in_size, out_size, 1, (), spike_rate=0.0)
    # a patch outside of the plane is no silence
    assume(all(positions_inside(layer, side)[0].any(axis=1).all() for side in (0, 1)))
    assert silent_patches(layer) == 1
    stack = 2 * kernel**2  # crossbars in line, of 64 rows
    assert expected_tiles(layer, 64, 9, 1) == (stack, ceil(stack / 9))


def test_a_layer_by_hand():
    # 1x1, 16 inputs in two crossbars of one PE each, silent with (1/2)^8 and together (1/2)^16.
    layer = conv("a", kernel=1, in_channels=16, out_channels=8, spike_rate=0.5)
    chip = Chip(xbar_size=8, columns_per_adc=8, crossbars_per_pe=1, pe_per_tile=2, adc_bits=5)
    patch, tile = 0.5**16, 0.5**8
    conversions = 16 * 2 * 2 * 8  # pixels, crossbars, planes, columns
    for skip, silent in (("nothing", 0), ("patches", patch), ("tiles", tile)):
        row = estimate(net(layer), replace(chip, skip=skip)).layers[0]
        assert row["conversions"] == pytest.approx(conversions * (1 - silent))
        clocks = 1 + 40 * (1 - (patch if skip == "patches" else 0))
        assert row["busy_ns"] == pytest.approx(16 * clocks * chip.clock_ns)
    # Four PEs, all of a layer, in one tile: it is silent where the patch is.
    one_tile = replace(chip, pe_per_tile=4, skip="tiles")
    row = estimate(net(layer), one_tile).layers[0]
    assert row["conversions"] == pytest.approx(conversions * (1 - patch))
    # A rate of 0 leaves the clocks in which silence is seen.
    row = estimate(net(replace(layer, spike_rate=0.0)), replace(chip, skip=EVERYTHING)).layers[0]
    assert row["conversions"] == row["energy_by_component"]["tile_buffer"] == 0
    assert row["busy_ns"] == 16 * chip.clock_ns


def test_a_sweep_skips_as_single_estimates_do():
    torch.manual_seed(0)
    layer = conv("a", in_channels=24, stride=(1, 1), padding=(1, 1))
    axes = {"xbar_size": [8, 16], "crossbars_per_pe": [3, 9], "pe_per_tile": [1, 4, 8]}
    chip = Chip(skip=EVERYTHING, noc="mesh", layer_adc_bits="b=3")
    measured = recorded(layer, spikes(layer, 3, 0.03), grid_of(chip, axes))
    assert len(measured.silent_tiles) == sum(
        len(set(tile_sizes(layer, replace(chip, xbar_size=x, crossbars_per_pe=k))))
        for x in (8, 16)
        for k in (3, 9)
    )
    network = net(measured, conv("b", after=("a",), spike_rate=0.02), time_steps=3)
    columns = sweep([Subject("", network)], chip, axes)
    for i in range(12):
        one = replace(chip, **{name: int(columns[name][i]) for name in axes})
        for key in ("energy_pj", "delay_ns", "area_um2"):
            assert columns[key][i] == pytest.approx(estimate(network, one).total[key]), key


def test_an_assumption_of_ones_everywhere_forgets_what_was_measured():
    layer = conv("a", stride=(1, 1), padding=(1, 1))
    chip = Chip(skip=EVERYTHING, noc="mesh")
    network = net(recorded(layer, spikes(layer, 3, 0.01), chip))
    rows = {x["change"]: x["ratio"] for x in sensitivity(network, net(layer), chip)}
    ones = rows["spike rate 1 everywhere"]
    assert ones["edap"] == 1
    assert rows["as assumed"]["edap"] > 1
    assert rows["--skip nothing"]["edap"] < rows["as assumed"]["edap"]


@pytest.mark.parametrize("skip", ["row", "rows,rows", "", "rows,", ["rows"], 3, None])
def test_what_cannot_be_skipped_is_refused(skip):
    with pytest.raises(UserError, match="skip must be nothing, or some of rows,patches,tiles"):
        Chip(skip=skip)


def test_published_costs_know_no_silence(tmp_path, capsys):
    path = tmp_path / "net.json"
    path.write_text(json.dumps(residual_block()))
    line = f"report --layers {path} --preset published --skip rows --out {tmp_path / 'out'}"
    assert "skip goes with counted costs" in refused(capsys, main, line.split())


def test_reports_say_what_they_skip(tmp_path):
    path = tmp_path / "net.json"
    path.write_text(json.dumps(residual_block()))
    files = {"report": "report.md", "compare": "compare.md", "sweep": "sweep.html"}
    for command, file in files.items():
        paths = f"{path} {path}" if command == "compare" else f"--layers {path}"
        for skip in ("nothing", EVERYTHING):
            out = tmp_path / command / skip
            assert main(f"{command} {paths} --skip {skip} --out {out}".split()) == 0
            said = (out / file).read_text()
            assert ("A silent patch" in said) == (skip != "nothing")
    report = json.loads((tmp_path / "report" / EVERYTHING / "report.json").read_text())
    network = load_layer_list(path)
    assert report["total"] == estimate(network, Chip(skip=EVERYTHING)).total
    assert report["chip"]["skip"] == EVERYTHING


def test_what_was_measured_is_written_and_read_back():
    layer = conv("a", stride=(1, 1), padding=(1, 1))
    network = net(recorded(layer, spikes(layer, 1, 0.1), Chip(pe_per_tile=16)))
    assert LayerList.from_json(as_json(network)) == network
