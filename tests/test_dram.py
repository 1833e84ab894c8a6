"""Weights from DRAM: which, what is moved and written, and when, against counting one by one."""

import json
import re
from dataclasses import asdict
from itertools import chain, combinations
from math import fsum, prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import refused, reported
from models import QuanMSResNet
from runtime.errors import UserError
from spikesim_eval.__main__ import main
from spikesim_eval.chip import Chip
from spikesim_eval.dram import branch, dram_bits, layers_to_load
from spikesim_eval.estimate import estimate, layer_costs, totals
from spikesim_eval.layer_list import LayerList
from spikesim_eval.schedule import schedule, waited_for
from spikesim_eval.trace import describe
from test_schedule import graphs
from test_spikesim import conv, net

CHIP = Chip(pe_per_tile=1)


def subsets(names):
    return chain.from_iterable(combinations(names, n) for n in range(len(names) + 1))


@settings(deadline=None)
@given(
    st.dictionaries(st.sampled_from("abcdefgh"), st.tuples(*[st.integers(1, 9)] * 2), min_size=1),
    st.integers(1, 40),
)
def test_the_layers_that_are_loaded_are_those_of_exhaustive_search(layers, pes):
    sizes = {name: size for name, (size, _) in layers.items()}
    bits = {name: 100 * value for name, (_, value) in layers.items()}

    def taken(loaded):
        return sum(sizes.values()) - sum(map(sizes.get, loaded)) + max(map(sizes.get, loaded))

    ways = [x for x in subsets(sizes) if x and taken(x) <= pes]
    found = layers_to_load(sizes, bits, pes)
    if sum(sizes.values()) <= pes:
        assert found == ()
    elif found is None:
        assert max(sizes.values()) > pes
    else:
        assert taken(found) <= pes
        assert sum(map(bits.get, found)) == min(sum(map(bits.get, x)) for x in ways)


def loaded_of(found):
    return [row["name"] for row in found.layers if row["from_dram"]]


def smaller(network, chip, share):
    """The estimate on a chip of an area between the least and that which holds every weight."""
    most = estimate(network, chip).total["area_um2"] / 1e6
    with pytest.raises(UserError, match="a chip that holds its largest layer alone") as refused:
        estimate(network, chip, 1e-6)
    least = float(str(refused.value).split("the ")[1].split()[0])
    area = 1.001 * least + share * (most - 1.001 * least)
    found = estimate(network, chip, area)
    assert found.total["area_um2"] <= 1e6 * area
    return found


@settings(deadline=None, max_examples=30)
@given(graphs(), st.floats(0, 0.95), st.sampled_from(["shared", "own"]), st.data())
def test_bits_cells_and_time_are_those_of_counting_one_by_one(network, share, tiles, data):
    chip = Chip(pe_per_tile=data.draw(st.sampled_from([1, 8])), tiles=tiles, columns="offset")
    most = estimate(network, chip).total["area_um2"] / 1e6
    try:
        found = smaller(network, chip, share)
    except ValueError:  # one tile holds every weight
        return
    loaded, technology = loaded_of(found), chip.technology
    if not loaded:
        assert found.total == estimate(network, chip, most).total
        return
    bits = written = 0
    joins = {x.after for x in network.layers if len(x.after) > 1}
    for layer in network.layers:
        weights = 0
        for _ in range(layer.out_channels):
            weights += layer.in_channels // layer.groups * layer.kernel**2
        row = next(row for row in found.layers if row["name"] == layer.name)
        own = 0
        if layer.name in loaded:
            own += weights * network.weight_bits_of(layer)
            written += weights * row["slices"]
            for _ in range(network.time_steps_of(layer) * layer.runs):  # written, and read
                values = 1 if layer.linear else prod(layer.in_size)
                own += 2 * values * layer.in_channels * network.input_bits(layer)
        waits = layer.name in loaded
        before = layer
        while len(before.after) == 1 and not any(before.after[0] in join for join in joins):
            (before,) = (x for x in network.layers if x.name == before.after[0])
            waits = waits or before.name in loaded
        if waits and any(layer.name in join for join in joins):
            sums = layer.out_channels * prod(layer.out_size) * layer.runs
            own += 2 * 25 * sums * network.time_steps
        assert row["energy_by_component"]["dram"] == pytest.approx(8.0 * own), layer.name
        bits += own
    assert found.total["dram_bits"] == bits
    energy = found.energy_by_component
    assert energy["dram"] == pytest.approx(bits * technology["dram.energy_pj"])
    assert energy["cell_write"] == pytest.approx(written * technology["cell_write.energy_pj"])
    alone = estimate(network, chip)
    moved = {"dram", "cell_write", "leakage"}
    assert {x: y for x, y in energy.items() if x not in moved} == {
        x: y for x, y in alone.energy_by_component.items() if x not in moved
    }
    assert found.total["energy_pj"] == pytest.approx(fsum(energy.values()))
    assert found.total["delay_ns"] >= alone.total["delay_ns"]
    of_bits = bits / technology["dram.bits_per_ns"]
    assert 1e9 / found.total["frames_per_second"] >= of_bits * (1 - 1e-9)
    held = [row["pes"] for row in found.layers if not row["from_dram"]]
    shared = max(row["pes"] for row in found.layers if row["from_dram"])
    assert found.total["pes"] == sum(held) + shared
    assert sum(found.area_by_component.values()) == pytest.approx(found.total["area_um2"])


@settings(deadline=None, max_examples=60)
@given(graphs(), st.data())
def test_layers_that_share_pes_wait_for_them_and_for_their_weights(network, data):
    names = [layer.name for layer in network.in_order()]
    loads = {x: data.draw(st.integers(0, 500)) for x in names if data.draw(st.booleans())}
    times = {x: float(data.draw(st.integers(1, 40))) for x in names}
    found = schedule(network, times, loads)
    done, before = {}, None
    for layer in network.in_order():
        waits = dict(waited_for(network, layer))
        rows = len(found[layer.name].rows)
        clock = 0.0
        if layer.name in loads:
            clock = (done[before][-1] if before else 0.0) + loads[layer.name]
        done[layer.name] = []
        for row in range(rows):
            clock = max([clock, *(done[x][index[row]] for x, index in waits.items())])
            clock += times[layer.name]
            done[layer.name].append(clock)
        if layer.name in loads:
            before = layer.name
    for name in names:
        assert found[name].rows.tolist() == pytest.approx(done[name])
    if loads:
        ends = [x.finish for name, x in found.items() if name in loads]
        starts = [x.start - loads[name] for name, x in found.items() if name in loads]
        assert {found[x].busy for x in loads} == {max(ends) - min(starts)}


def chosen_and_best(network: LayerList, chip: Chip, share: float):
    """(chosen, best of all subsets) of DRAM bits, and of EDP, on a chip of this area."""
    found = smaller(network, chip, share)
    area = found.total["area_um2"]
    bits, edp = [], []
    for loaded in subsets([layer.name for layer in network.layers]):
        if len(loaded) < 2:
            continue
        total, _ = totals(network, chip, layer_costs(network, chip, None, loaded))
        if total["area_um2"] <= area * (1 + 1e-9):
            bits.append(total["dram_bits"])
            edp.append(total["edp_pj_ns"])
    return (found.total["dram_bits"], min(bits)), (found.total["edp_pj_ns"], min(edp))


def small_network(channels, sides, T):
    """A stem, blocks of two layers each with its own channels, and a classifier."""
    layers = [conv("stem", in_channels=3, out_channels=channels[0], input_bits=8)]
    stream, before, side = ("stem",), channels[0], layers[0].out_size[0]
    for i, (wide, less) in enumerate(zip(channels, sides, strict=True)):
        to = side // less
        size = {"in_size": (side, side), "out_size": (to, to)}
        shape = {"in_channels": before, "out_channels": wide}
        layers.append(conv(f"{i}a", after=stream, **size, **shape))
        size = {"in_size": (to, to), "out_size": (to, to)}
        layers.append(conv(f"{i}b", after=(f"{i}a",), in_channels=wide, out_channels=wide, **size))
        if before != wide or less > 1:
            size = {"in_size": (side, side), "out_size": (to, to)}
            layers.append(conv(f"{i}s", after=stream, kernel=1, input_bits=4, **size, **shape))
            stream = (f"{i}b", f"{i}s")
        else:
            stream = (*stream, f"{i}b")
        before, side = wide, to
    return net(*layers, time_steps=T)


@settings(deadline=None, max_examples=20)
@given(
    st.lists(st.sampled_from([64, 128, 256]), min_size=2, max_size=2),
    st.lists(st.sampled_from([1, 2]), min_size=2, max_size=2),
    st.integers(1, 4),
    st.floats(0, 0.95),
)
def test_the_choice_is_near_that_of_exhaustive_search(channels, sides, T, share):
    network = small_network(channels, sides, T)
    (bits, fewest), (edp, least) = chosen_and_best(network, CHIP, share)
    assert fewest <= bits <= 2 * fewest  # of branches of two layers
    assert least <= edp * (1 + 1e-9) <= 2 * least


def test_the_stream_waits_for_every_layer_of_a_branch():
    torch.manual_seed(0)
    quantized = QuanMSResNet(18, 10, 2, 3, 8, bits=4)
    quantized.input_shape = (3, 8, 8)
    network = describe(quantized)
    by_name = {layer.name: layer for layer in network.layers}
    assert branch(network, by_name["blocks.2.conv2"]) == {"blocks.2.conv1", "blocks.2.conv2"}
    assert branch(network, by_name["blocks.2.shortcut.conv"]) == {"blocks.2.shortcut.conv"}
    assert branch(network, by_name["blocks.2.conv1"]) == set()
    layer = by_name["blocks.2.conv2"]
    alone = 2 * 25 * 2 * layer.out_channels * 4 * 4
    assert dram_bits(network, layer, ["blocks.2.conv1"]) == alone
    assert dram_bits(network, layer, ["blocks.3.conv1"]) == 0


def test_a_report_says_what_comes_from_dram(tmp_path, capsys):
    network = small_network([128, 128], [1, 2], 2)
    path, out = tmp_path / "net.json", tmp_path / "report"
    path.write_text(json.dumps(asdict(network)))
    area = 0.7 * estimate(network, Chip(pe_per_tile=2)).total["area_um2"] / 1e6
    line = f"--layers {path} --area_mm2 {area} --pe_per_tile 2"
    report = reported(out, f"{line} --baseline {path}")
    printed = capsys.readouterr().out
    assert re.search(r"layers from DRAM +\d of 6 +\d of 6", printed)
    assert re.search(r"from and to DRAM +[\d.]+ Mbit", printed)
    page = (out / "report.html").read_text()
    for words in ("from DRAM share", "cell write", ">DRAM<"):
        assert words in page
    outside = report["area_outside_layers"]
    assert outside["shared_pes"] > 0
    in_layers = sum(row["area_um2"] for row in report["layers"])
    assert sum(outside.values()) + in_layers == pytest.approx(report["total"]["area_um2"])
    error = refused(capsys, main, f"report {line} --noc mesh --out {out}".split())
    assert "have no place of their own on a mesh" in error


def test_layers_with_adcs_of_their_own_share_the_largest():
    network = small_network([128, 128], [1, 1], 2)
    found = smaller(network, Chip(pe_per_tile=1, adc_bits=4), 0.3)
    loaded = loaded_of(found)
    chip = Chip(pe_per_tile=1, adc_bits=4, layer_adc_bits=f"{loaded[-1]}=7")
    _, area = totals(network, chip, layer_costs(network, chip, None, loaded))
    shared = max(row["pes"] for row in found.layers if row["from_dram"])
    one = chip.adcs_of_pe * chip.technology["adc.area_um2"]
    more = area["adc"] - found.area_by_component["adc"]
    assert more == pytest.approx(shared * one * (2**3 - 1))
