"""The chip's arithmetic: every figure against plain loops, its laws, and what is refused."""

import json
import re
from collections import Counter
from dataclasses import fields, replace
from math import prod

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from conftest import read_csv, refused, reported
from runtime.errors import UserError
from spikesim_eval.__main__ import main
from spikesim_eval.chip import Chip
from spikesim_eval.compare import cheapest, compare
from spikesim_eval.estimate import estimate
from spikesim_eval.layer_list import Layer, LayerList, Subject
from spikesim_eval.report import build_report
from spikesim_eval.silence import positions_inside
from spikesim_eval.technology import DEFAULT
from test_spikesim import changed, conv, net, networks, residual_block

NUMBERS = [x for x in fields(Chip) if x.metadata["limits"] and x.metadata["part"] != "simulation"]
DIGITAL = "accuracy: the digital network's"


# An estimator that places cells and adds up figures one by one.


def filled(items: int, capacity: int) -> int:
    """Boxes of `capacity` for so many items, put in one after the other."""
    boxes = room = 0
    for _ in range(items):
        if room == 0:
            boxes, room = boxes + 1, capacity
        room -= 1
    return boxes


def cells_of(bits: int, cell_bits: int) -> int:
    cells = 0
    while bits > 0:
        cells, bits = cells + 1, bits - cell_bits
    return cells


def weights_in(row: int, cells: int) -> int:
    weights = 0
    while (weights + 1) * cells <= row:
        weights += 1
    return weights


def placed(layer: Layer, in_row: int, chip: Chip) -> tuple[int, int]:
    """(crossbars, PEs) of one plane where `in_row` weights lie side by side in a crossbar."""
    places = layer.kernel * layer.kernel

    def matrix(rows: int, columns: int) -> tuple[int, int]:
        high, wide = filled(rows, chip.xbar_size), filled(columns, in_row)
        pes = 0
        for _ in range(wide):
            pes += filled(high * places, chip.crossbars_per_pe)
        return high * places * wide, pes

    whole = matrix(layer.in_channels, layer.out_channels)
    if layer.groups == 1:
        return whole
    rows, columns = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    arrays = free_rows = free_columns = 0
    for _ in range(layer.groups):
        if rows > free_rows or columns > free_columns:
            arrays, free_rows, free_columns = arrays + 1, chip.xbar_size, in_row
        free_rows, free_columns = free_rows - rows, free_columns - columns
    block = matrix(rows, columns)
    return min(whole[0], arrays * block[0]), min(whole[1], arrays * block[1])


def geometry(size: int, outputs: int, kernel: int) -> tuple[int, int]:
    """(stride, padding in front) along a side."""
    stride = max(1, round(size / outputs))
    padding = 0
    while 2 * padding < (outputs - 1) * stride + kernel - size:
        padding += 1
    return stride, padding


def side_by_side(layer: Layer, in_row: int, chip: Chip) -> int:
    """Weights in the fullest row of a crossbar, the layer's blocks put in one after the other."""
    rows, columns = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    most = free_rows = free_columns = used = 0
    for _ in range(layer.groups):
        if rows > free_rows or columns > free_columns:
            free_rows, free_columns, used = chip.xbar_size, in_row, 0
        free_rows, free_columns, used = free_rows - rows, free_columns - columns, used + columns
        most = max(most, min(used, in_row))
    return most


def given_geometry(layer: Layer, side: int) -> tuple[int, int]:
    if layer.stride is not None:
        return layer.stride[side], layer.padding[side]
    return geometry(layer.in_size[side], layer.out_size[side], layer.kernel)


def inside(size: int, outputs: int, kernel: int, stride: int, padding: int) -> int:
    """Positions of a kernel along a side that lie in the plane, over all outputs."""
    return sum(
        0 <= output * stride - padding + offset < size
        for output in range(outputs)
        for offset in range(kernel)
    )


def skipped(layer: Layer, chip: Chip, alike: int) -> tuple[float, float, float]:
    """(share of the cycles, crossbars in line, PEs in line) that are skipped, on average, if every
    bit is a one with the layer's rate; of so many PEs that read the same rows."""
    rate, places = 1 if layer.spike_rate is None else layer.spike_rate, layer.kernel**2
    stride_y, padding_y = given_geometry(layer, 0)
    stride_x, padding_x = given_geometry(layer, 1)
    stack, rows = [], []  # kernel position and rows of each crossbar in line
    left = layer.in_channels // layer.groups
    while left > 0:
        stack += range(places)
        rows += [min(left, chip.xbar_size) * layer.groups] * places
        left -= chip.xbar_size
    pes = [
        range(len(stack))[i : i + chip.crossbars_per_pe]
        for i in range(0, len(stack), chip.crossbars_per_pe)
    ]
    together = 1
    while layer.groups > 1 or (together + 1) * alike <= chip.pe_per_tile:
        together += 1
        if together > len(pes):
            break
    tiles = [pes[i : i + together] for i in range(0, len(pes), together)]
    seen = Counter()  # what of a kernel lies in the plane: output pixels
    for y in range(layer.out_size[0]):
        for x in range(layer.out_size[1]):
            at = (
                (y * stride_y - padding_y + ky, x * stride_x - padding_x + kx)
                for ky in range(layer.kernel)
                for kx in range(layer.kernel)
            )
            seen[tuple(0 <= a < layer.in_size[0] and 0 <= b < layer.in_size[1] for a, b in at)] += 1
    if layer.linear:
        seen = {(True,): 1}
    found = [0.0, 0.0, 0.0]

    def silent(crossbars, there):
        bits = sum(rows[i] for i in crossbars if there[stack[i]])
        if not bits:  # nothing but padding: silent where the patch is
            bits = sum(rows[i] for i in range(len(stack)) if there[stack[i]])
        return (1 - rate) ** bits if bits else 0

    for there, pixels in seen.items():
        of_patch = silent(range(len(stack)), there) if "patches" in chip.skip else 0
        of_tiles = [
            silent([i for pe in tile for i in pe], there) if "tiles" in chip.skip else 0
            for tile in tiles
        ]
        found[0] += pixels * of_patch
        for tile, quiet in zip(tiles, of_tiles, strict=True):
            quiet = max(quiet, of_patch)
            found[1] += pixels * quiet * sum(map(len, tile))
            found[2] += pixels * quiet * len(tile)
    return tuple(x / sum(seen.values()) for x in found)


def counted_energy(network, layer, chip, row, stack, columns) -> float:
    """Energy of a layer of which what happens is counted."""
    differential = chip.columns == "differential"
    fan_in = layer.in_channels // layer.groups * layer.kernel**2
    rate = 1 if layer.spike_rate is None else layer.spike_rate
    adc = 2.0 ** (chip.adc_bits - 4) if chip.adc_law == "doubling" else chip.adc_bits / 4
    in_line = filled(stack, chip.crossbars_per_pe)
    row["skipped"], crossbars, pes = skipped(layer, chip, row["pes"] // in_line)
    read = stack - crossbars if chip.adc_of == "crossbar" else in_line - pes
    conversions, moving = columns * read, in_line - pes
    once = layer.linear or layer.static
    bit, accumulator = 0.03 / 8 * 1.99, row["accumulator_bits"]
    read, write = 15.9 / 64, 17.7 / 64

    sides = zip(layer.in_size, layer.out_size, strict=True)
    positions = (
        1
        if layer.linear
        else prod(
            inside(*side, layer.kernel, *given_geometry(layer, i)) for i, side in enumerate(sides)
        )
    )
    pixels = layer.out_size[0] * layer.out_size[1] * layer.runs
    plane = 1 if layer.linear else layer.in_size[0] * layer.in_size[1]  # a counter a channel
    values_in = layer.in_channels * plane * layer.runs
    energy = 0.0
    for _ in range(1 if once else network.time_steps):
        for _ in range(row["input_bits"]):
            driven = layer.in_channels // layer.groups * positions * layer.runs * rate
            energy += driven * columns * 1.76423 / 512
            energy += pixels * conversions * (2.03084 * adc + 0.094245 + 0.025 + accumulator * bit)
            energy += pixels * moving * (1 + differential) * layer.out_channels * 19.64 / 8
            energy += pixels * row["groups"] * moving / in_line * 4.64
            energy += pixels * fan_in * layer.groups * 8.23 / 64
            if "rows" in chip.skip:
                energy -= (1 - rate) * layer.in_channels * positions * layer.runs * 8.23 / 64
            energy += values_in * write
        if layer.bn_bits is not None:
            product = layer.bn_bits * accumulator * 0.2 / 64 * 1.99
            sums = pixels * layer.out_channels
            energy += sums * (product + (layer.bn_bits + accumulator) * bit)
    kept = layer.out_channels * pixels * 25 if layer.static and network.time_steps > 1 else 0
    energy += kept * write
    for _ in range(network.time_steps):
        energy += kept * read
        if row["has_lif"]:
            neuron = 1.274 * 4 / 64 + network.membrane_bits * (read + write)
            energy += layer.out_channels * pixels * neuron
    return energy


def finished(network: LayerList, row_times: dict[str, float]) -> dict[str, list[list[float]]]:
    """When each layer's rows are done, by timestep: a row after the other."""
    done: dict[str, list[list[float]]] = {}
    by_name = {layer.name: layer for layer in network.layers}
    while len(done) < len(by_name):
        for layer in network.layers:
            if layer.name in done or not all(name in done for name in layer.after):
                continue
            rows, now, steps = layer.out_size[0] * layer.runs, 0.0, []
            for step in range(1 if layer.linear or layer.static else network.time_steps):
                steps.append([])
                for row in range(rows):
                    for name in layer.after:
                        now = max(now, arrival(layer, step, row, by_name[name], done[name]))
                    now += row_times[layer.name]
                    steps[-1].append(now)
            done[layer.name] = steps
    return done


def arrival(layer: Layer, step: int, row: int, before: Layer, done: list[list[float]]) -> float:
    """When what a row reads of a layer before it is there."""
    if layer.linear:
        return done[-1][-1]
    high, outputs, rows = layer.in_size[0], layer.out_size[0], before.out_size[0]
    run, row = divmod(row, outputs)
    stride, padding = given_geometry(layer, 0)
    read = min(high, max(1, row * stride - padding + layer.kernel))
    given = of_run = 1
    while given * high < read * rows:
        given += 1
    while of_run * layer.runs < (run + 1) * before.runs:
        of_run += 1
    return done[min(step, len(done) - 1)][(of_run - 1) * rows + given - 1]


def by_loops(network: LayerList, chip: Chip) -> tuple[dict, dict[str, dict]]:
    """(totals, layers by name)"""
    published = chip.costs == "published"
    planes = 2 if chip.columns == "differential" else 1
    adcs = chip.xbar_size / chip.columns_per_adc
    adcs_of_pe = adcs * (chip.crossbars_per_pe if chip.adc_of == "crossbar" else 1)
    side = chip.xbar_size / 64
    adc = 2.0 ** (chip.adc_bits - 4) if chip.adc_law == "doubling" else chip.adc_bits / 4
    clock_ns = 1000 / chip.clk_mhz
    layers, starts, row_times = {}, {}, {}
    bits_stored = 0
    for layer in network.layers:
        once = layer.linear or (layer.static and not published)
        steps = 1 if once else network.time_steps
        if layer.linear:
            largest, input_bits = network.time_steps * layer.in_size[0] * layer.in_size[1], 0
            while 2**input_bits < largest + 1:
                input_bits += 1
        else:
            input_bits = layer.input_bits
        weight_bits = network.weight_bits if layer.weight_bits is None else layer.weight_bits
        stored = max(1, weight_bits - 1) if planes == 2 else weight_bits
        cells = cells_of(stored, chip.cell_bits)
        crossbars, pes = placed(layer, weights_in(chip.xbar_size, cells), chip)
        groups = placed(layer, chip.xbar_size, chip)[1]
        crossbars, pes, groups = planes * crossbars, planes * pes, planes * groups
        stream = bool(layer.after) and input_bits == network.membrane_bits and input_bits > 1
        lif = not layer.linear and not stream if layer.lif is None else layer.lif
        pixels = layer.out_size[0] * layer.out_size[1] * steps * layer.runs
        cycles = pixels * input_bits
        rate = 1 if layer.spike_rate is None else layer.spike_rate
        fan_in = layer.in_channels // layer.groups * layer.kernel**2
        worst = fan_in * max(1, 2 ** (weight_bits - 1) - 1) * (2**input_bits - 1)
        row = layers[layer.name] = {
            "pes": pes,
            "crossbars": crossbars,
            "groups": groups,
            "input_bits": input_bits,
            "cycles": cycles,
            "has_lif": lif,
            "accumulator_bits": len(f"{worst:b}") + 1,
            "ops": 2 * fan_in * layer.out_channels * pixels,
            "utilization": planes
            * fan_in
            * layer.out_channels
            * cells
            / (pes * chip.crossbars_per_pe * chip.xbar_size**2),
        }
        if published:
            energy = cycles * (
                8 * crossbars * 1.76423 * side * side * rate
                + chip.columns_per_adc * pes * adcs_of_pe * (2.03084 * adc + 0.094245)
                + pes * adcs_of_pe * (16 * 1.15e-6 + 0.2)
                + groups * (157.12 + 4.64 + 397)
            )
            row["energy_pj"] = energy + (pixels * groups * 5.096 if lif else 0)
            row["busy_ns"] = layer.out_channels * cycles * 26 * clock_ns
        else:
            stack = layer.kernel**2 * filled(layer.in_channels // layer.groups, chip.xbar_size)
            columns = planes * layer.out_channels * cells
            row["energy_pj"] = counted_energy(network, layer, chip, row, stack, columns)
            read = side_by_side(layer, weights_in(chip.xbar_size, cells), chip) * cells
            clocks = 1 + (1 - row.pop("skipped")) * filled(read, adcs) * chip.adc_bits
            row["busy_ns"] = cycles * clocks * clock_ns
            row_times[layer.name] = layer.out_size[1] * input_bits * clocks * clock_ns
        plane = layer.in_size[0] * layer.in_size[1]
        counters = layer.linear and not published
        bits_stored += layer.in_channels * (1 if counters else plane) * input_bits
        if layer.static and not published and network.time_steps > 1:
            bits_stored += 2 * layer.out_channels * pixels * 25
    for channels, height, width in network.lif:
        bits_stored += channels * height * width * network.membrane_bits

    pes = sum(row["pes"] for row in layers.values())
    tiles = filled(pes, chip.pe_per_tile)
    serving = 1 if published else chip.pe_per_tile / 8
    adder = 0 if published else 24 * 22.2 / 8 * (65 / 28) ** 2
    converters = adcs_of_pe * (693.633 * adc + 45.9 + adder)
    cells_area = tiles * chip.pe_per_tile * chip.crossbars_per_pe * 26.2144 * side * side
    wires = tiles * serving * 433660
    tile = serving * adcs * 13411.41498 + 484.643999 + 0.7391 * 64 * 128
    tile += chip.pe_per_tile * converters
    transistors = tiles * tile + 0.7391 * bits_stored
    energy = sum(row["energy_pj"] for row in layers.values())
    if published:
        while len(starts) < len(layers):
            for layer in network.layers:
                if layer.name not in starts and all(name in starts for name in layer.after):
                    ready = [starts[x] + 0.75 * layers[x]["busy_ns"] for x in layer.after]
                    starts[layer.name] = max([0, *ready])
        delay = max(starts[name] + layers[name]["busy_ns"] for name in layers)
        leakage_mw = 0.0
    else:
        done = finished(network, row_times)
        for name, row in layers.items():
            row["finish_ns"] = done[name][-1][-1]
            row["start_ns"] = done[name][0][0] - row_times[name]
        delay = max(row["finish_ns"] for row in layers.values())
        uw_per_kb = {"lstp": 0.35, "lop": 29, "hp": 641}[chip.process]
        leakage_mw = transistors / 0.7391 / 8192 * uw_per_kb / 1000
    interval = max(row["busy_ns"] for row in layers.values())
    area = transistors + cells_area + wires
    total = {
        "pes": pes,
        "tiles": tiles,
        "area_um2": area,
        "ops": sum(row["ops"] for row in layers.values()),
        "energy_pj": energy + leakage_mw * delay,
        "delay_ns": delay,
        "edap_pj_ns_um2": (energy + leakage_mw * delay) * delay * area,
        "frames_per_second": 1e9 / interval,
        "leakage_mw": leakage_mw,
        "power_mw": energy / interval + leakage_mw,
    }
    return total, layers


@st.composite
def chips(draw) -> Chip:
    costs = draw(st.sampled_from(["counted", "counted", "published"]))
    skips = [
        "nothing",
        "nothing",
        "rows",
        "patches",
        "tiles",
        "tiles,patches",
        "rows,patches,tiles",
    ]
    return Chip(
        costs=costs,
        skip=draw(st.sampled_from(skips if costs == "counted" else skips[:1])),
        xbar_size=8 * draw(st.integers(1, 16)),
        pe_per_tile=draw(st.integers(1, 12)),
        crossbars_per_pe=draw(st.integers(1, 30)),
        cell_bits=draw(st.integers(1, 8)),
        adc_bits=draw(st.integers(1, 12)),
        clk_mhz=draw(st.sampled_from([1.0, 250.0, 333.0])),
        columns=draw(st.sampled_from(["differential", "offset"])),
        columns_per_adc=draw(st.sampled_from([1, 2, 4, 8])),
        adc_of=draw(st.sampled_from(["crossbar", "pe"])),
        adc_law=draw(st.sampled_from(["doubling", "linear"])),
        process=draw(st.sampled_from(["lstp", "lop", "hp"])),
    )


def fit(network: LayerList, chip: Chip) -> bool:
    widest = max(network.weight_bits_of(layer) for layer in network.layers)
    return cells_of(chip.stored_bits(widest), chip.cell_bits) <= chip.xbar_size


# Shares of its outputs, a third of a third each, do not add up to 1; numbers of them do.
SILENT = net(
    Layer("a", 5, 113, 52, (1, 1), (3, 3), 1, (), spike_rate=0.0),
    Layer("b", 1, 1, 1, (1, 1), (1, 1), None, ("a",), linear=True),
    **{"weight_bits": 1, "membrane_bits": 1},
)


@settings(deadline=None, max_examples=150)
@given(networks(), chips())
@example(SILENT, Chip(skip="patches", xbar_size=8, cell_bits=1, crossbars_per_pe=1))
def test_every_figure_is_that_of_plain_loops_over_cells_and_layers(network, chip):
    if not fit(network, chip):
        with pytest.raises(UserError, match="of a crossbar row"):
            estimate(network, chip)
        return
    result, (total, layers) = estimate(network, chip), by_loops(network, chip)
    for key, value in total.items():
        assert result.total[key] == pytest.approx(value, rel=1e-12), key
    for row in result.layers:
        for key, value in layers[row["name"]].items():
            assert row[key] == pytest.approx(value, rel=1e-12), (row["name"], key)


# Whole weights.


@settings(deadline=None, max_examples=100)
@given(networks(), chips())
def test_no_cell_holds_more_than_one_digit(network, chip):
    assume(fit(network, chip))
    for row in estimate(network, chip).layers:
        assert 0 < row["utilization"] <= 1
        assert row["groups"] <= row["pes"]


def test_a_weight_wider_than_a_crossbar_is_refused_and_left_out_of_a_sweep(tmp_path, capsys):
    path = tmp_path / "net.json"
    path.write_text(json.dumps(changed("weight_bits", 32)))
    line = f"--layers {path} --out {tmp_path / 'out'} --xbar_size"
    error = refused(capsys, main, f"report {line} 16 --cell_bits 1".split())
    assert "31 cells" in error  # without the sign
    assert "the 16 of a crossbar row" in error
    refused(capsys, main, f"sweep {line} 8,16 --cell_bits 1".split())
    assert not (tmp_path / "out").exists()

    assert main(f"sweep {line} 8,16,32 --cell_bits 1,2".split()) == 0
    assert "3 points left out" in capsys.readouterr().out
    rows = read_csv(tmp_path / "out" / "sweep.csv")
    sizes = {(row["xbar_size_cells"], row["cell_bits"]) for row in rows}
    assert sizes == {("16", "2"), ("32", "1"), ("32", "2")}


# Grouped layers.


SPENT = ("pes", "tiles", "energy_pj", "area_um2", "delay_ns")


@settings(deadline=None, max_examples=150)
@given(
    st.integers(1, 100),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(1, 16),
    chips(),
    st.data(),
)
def test_a_grouped_layer_never_costs_more_than_the_same_without_groups(
    channels, multiplier, kernel, bits, chip, data
):
    groups = data.draw(st.sampled_from([d for d in range(1, channels + 1) if channels % d == 0]))
    shape = {"in_channels": channels, "out_channels": channels * multiplier, "kernel": kernel}
    assume(cells_of(chip.stored_bits(bits), chip.cell_bits) <= chip.xbar_size)
    grouped, dense = (
        estimate(net(conv("a", groups=g, **shape), weight_bits=bits), chip).total
        for g in (groups, 1)
    )
    for key in SPENT:
        assert grouped[key] <= dense[key] * (1 + 1e-12), key
    assert grouped["ops"] * groups == dense["ops"]


@settings(deadline=None, max_examples=150)
@given(networks(), chips(), st.data())
def test_a_larger_layer_or_more_spikes_never_cost_less(network, chip, data):
    assume(fit(network, chip))
    index = data.draw(st.integers(0, len(network.layers) - 1))
    layer = network.layers[index]
    fields = ["in_channels", "out_channels", "runs", "weight_bits", "spike_rate"]
    field = data.draw(st.sampled_from(fields + ["kernel"] * (not layer.linear)))
    if field == "weight_bits":
        more = network.weight_bits_of(layer) + 1
        assume(cells_of(chip.stored_bits(more), chip.cell_bits) <= chip.xbar_size)
    elif field == "spike_rate":
        more = None if layer.spike_rate is None else data.draw(st.floats(layer.spike_rate, 1))
    else:
        more = getattr(layer, field) + (layer.groups if field.endswith("channels") else 1)
    if field == "kernel":  # a patch that reads nothing is no silent one, and may become one
        assume(all(positions_inside(layer, side)[0].any(axis=1).all() for side in (0, 1)))
    layers = list(network.layers)
    layers[index] = replace(layer, **{field: more})
    larger = estimate(replace(network, layers=tuple(layers)), chip).total
    smaller = estimate(network, chip).total
    for key in SPENT:
        # Fewer whole weights or groups in a row may fill fewer columns, which are read sooner.
        packed = field == "weight_bits" or (layer.groups > 1 and field.endswith("channels"))
        if not packed or key not in ("delay_ns", "energy_pj"):
            assert larger[key] >= smaller[key] * (1 - 1e-12), (field, key)


@settings(deadline=None, max_examples=100)
@given(networks(), chips(), st.data())
def test_what_costs_energy_and_what_does_not(network, chip, data):
    """Silent inputs drive no cell, finer ADCs are never cheaper, and a tile is but a place."""
    assume(fit(network, chip))
    found = estimate(network, chip)
    silent = network.with_layers(lambda network, layer: True, spike_rate=0.0)
    assert estimate(silent, chip).energy_by_component["crossbar"] == 0

    finer = estimate(network, replace(chip, adc_bits=chip.adc_bits + 1)).total
    for key in ("energy_pj", "area_um2", "delay_ns", "edap_pj_ns_um2"):
        assert finer[key] >= found.total[key] * (1 - 1e-12), key
    assert finer["frames_per_second"] <= found.total["frames_per_second"]

    # where whole tiles are skipped, larger ones are silent less often
    place = replace(chip, skip="nothing") if chip.skips("tiles") else chip
    other = estimate(network, replace(place, pe_per_tile=data.draw(st.integers(1, 12))))
    found = estimate(network, place)
    assert other.total["delay_ns"] == found.total["delay_ns"]
    for one, two in zip(found.layers, other.layers, strict=True):
        assert one["energy_by_component"] == two["energy_by_component"]

    faster = estimate(network, replace(place, clk_mhz=2 * chip.clk_mhz)).total
    assert faster["delay_ns"] == pytest.approx(found.total["delay_ns"] / 2)
    leaked = found.energy_by_component["leakage"]
    assert faster["energy_pj"] == pytest.approx(found.total["energy_pj"] - leaked / 2)
    assert leaked == 0 or chip.costs == "counted"


# Options that make no chip.


@pytest.mark.parametrize("option", NUMBERS, ids=lambda option: option.name)
@pytest.mark.parametrize("command", ["report", "sweep"])
def test_an_option_beyond_its_limits_is_refused_with_the_reason(option, command, tmp_path, capsys):
    path = tmp_path / "net.json"
    path.write_text(json.dumps(residual_block()))
    name, reason, (low, high) = (option.name, *map(option.metadata.get, ("reason", "limits")))
    step = 8 if name == "xbar_size" else 1
    for value in (low - step, high + step):
        line = f"{command} --layers {path} --out {tmp_path / 'out'} --{name}={value}"
        error = refused(capsys, main, line.split())
        assert f"{name} must be" in error
        assert f"from {low:g} to {high:g}" in error
        assert reason in error
    table = {"0": 1e-8, "150": 2e-8}
    beside = {
        "columns_per_adc": {"xbar_size": 1024},
        "celsius": {"technology": DEFAULT.with_values({"leakage.lstp_by_celsius": table})},
    }
    for value in (low, high):
        kind = float if name == "clk_mhz" else int
        chip = Chip(**beside.get(name, {}) | {name: kind(value)})
        assert estimate(net(conv("a")), chip).total["energy_pj"] > 0


# Baselines of something else, and whose accuracy it is.


@pytest.fixture
def lists(tmp_path) -> dict[str, str]:
    """Layer lists of the same network but for one thing."""
    different = {
        "own": residual_block(),
        "T": changed("time_steps", 6),
        "classes": changed("layers", 4, "out_channels", 10),
        "input": changed("layers", 0, "in_channels", 1),
        "rates": changed("layers", 1, "spike_rate", None),
    }
    del different["rates"]["layers"][2]["spike_rate"]
    paths = {}
    for name, data in different.items():
        paths[name] = str(tmp_path / f"{name}.json")
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    return paths


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ("T", "timesteps differ: 4 ({own}), 6 ({other})"),
        ("input", "inputs differ: 3x32x32 ({own}), 1x32x32 ({other})"),
        ("rates", "spike rates differ: measured ({own}), not measured and taken as 1 ({other})"),
    ],
)
def test_a_comparison_says_where_the_networks_differ(other, words, lists, tmp_path, capsys):
    out = tmp_path / "out"
    words = words.format(own=lists["own"], other=lists[other])
    report = reported(out, f"--layers {lists['own']} --baseline {lists[other]}")
    assert words in capsys.readouterr().out
    assert report["notes"] == [words]
    for name in ("report.md", "report.html"):
        assert words[1:] in (out / name).read_text().split("TOPS/W")[0]  # above the figures
    assert main(f"compare {lists[other]} {lists['own']} --out {out}".split()) == 0
    assert words in capsys.readouterr().out
    assert words in (out / "compare.md").read_text()


def test_equal_networks_are_compared_without_a_word():
    own = Subject("a", net(conv("a", spike_rate=0.5)))
    assert build_report(own, Chip(), replace(own, name="b"))["notes"] == []


@pytest.mark.parametrize("line", ["report --layers own --baseline", "compare own"])
def test_networks_that_tell_other_classes_apart_are_not_compared(line, lists, tmp_path, capsys):
    words = [lists.get(word, word) for word in line.split()]
    error = refused(capsys, main, [*words, lists["classes"], "--out", str(tmp_path / "out")])
    assert re.search(
        r"own.json tells 100 classes apart, .*classes.json 10|classes.json tells", error
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["report", "compare", "sweep"])
def test_checkpoints_of_other_data_are_refused_before_any_is_measured(
    command, trained, tmp_path, capsys
):
    checkpoint = torch.load(trained["original"], weights_only=True)
    checkpoint["settings"] |= {"data": "folder", "classes": tuple("abcdefghij")}
    checkpoint["settings"]["image_size"] = "16x16"
    weight = checkpoint["model"]["stem.conv.weight"]
    checkpoint["model"]["stem.conv.weight"] = weight.repeat(1, 3, 1, 1)
    other = tmp_path / "other.pth"
    torch.save(checkpoint, other)
    line = {
        "report": f"report --checkpoint {trained['qamd']} --baseline {other}",
        "compare": f"compare {other} {trained['qamd']}",
        "sweep": f"sweep --checkpoint {trained['qamd']} {other}",
    }[command]
    capsys.readouterr()
    error = refused(capsys, main, [*line.split(), "--out", str(tmp_path / "out")])
    assert "'folder'" in error
    assert "'digits'" in error
    assert not (tmp_path / "out").exists()


def test_every_command_says_whose_accuracy_it_prints(trained, tmp_path, capsys):
    student, teacher = trained["student"], trained["original"]
    for line in (
        f"report --checkpoint {student} --baseline {teacher} --time_steps 2",
        f"compare {teacher} {student}",
        f"sweep --checkpoint {student}",
    ):
        capsys.readouterr()
        assert main([*line.split(), "--test_images", "60", "--out", str(tmp_path)]) == 0
        printed = capsys.readouterr().out
        assert printed.count(DIGITAL) == 1
        assert "--on_chip" in printed
        if "--time_steps 2" in line:
            assert f"timesteps differ: 2 ({student}), 4 ({teacher})" in printed
    for name in ("report.md", "report.html", "compare.md"):
        assert DIGITAL[1:] in (tmp_path / name).read_text().replace("&#x27;", "'")
    for name, column in (
        ("compare", "digital_accuracy_percent"),
        ("sweep", "digital_accuracy_share"),
    ):
        assert column in (tmp_path / f"{name}.csv").read_text().splitlines()[0]


# What a hostile reviewer tried.


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("sweep --layers {own} --xbar_size 64 --columns_per_adc 48", "no multiple of"),
        ("report --layers {own} --area_mm2 0.01", "less than the"),
    ],
)
def test_what_makes_no_chip_is_one_line(line, words, lists, tmp_path, capsys):
    assert words in refused(
        capsys, main, f"{line.format(**lists)} --out {tmp_path / 'out'}".split()
    )


def test_a_sweep_leaves_out_sides_that_shared_adcs_do_not_divide(lists, tmp_path, capsys):
    line = f"sweep --layers {lists['own']} --xbar_size 64,96 --columns_per_adc 64,8"
    assert main(f"{line} --out {tmp_path}".split()) == 0
    assert "1 point left out" in capsys.readouterr().out


def test_an_assumption_that_fits_no_crossbar_is_left_out_of_the_sensitivities(lists, tmp_path):
    wide = tmp_path / "wide.json"
    wide.write_text(json.dumps(changed("weight_bits", 16)))
    chip = "--xbar_size 8 --cell_bits 2 --columns_per_adc 1"
    report = reported(tmp_path, f"--layers {lists['own']} --baseline {wide} {chip}")
    changes = [row["change"] for row in report["sensitivity"]]
    assert "as assumed" in changes
    assert "baseline of 24 bits" not in changes


def test_beside_accuracies_on_the_chip_a_digital_one_is_no_choice():
    network = LayerList.from_json(residual_block())
    known = [Subject("baseline", network, 0.9), Subject("never simulated", network, 0.9)]
    rows, _ = compare(known, Chip())
    assert cheapest(rows, 1.0)["network"] == "never simulated"
    known.append(Subject("simulated", network, 0.9, chip_accuracies=[0.8, 0.9]))
    rows, _ = compare(known, Chip())
    assert [row["drop_points"] for row in rows] == [0.0, None, pytest.approx(5.0)]
    assert cheapest(rows, 1.0) is None
