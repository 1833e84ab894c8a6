"""The chip that is priced is the chip that is simulated: what the engine counts while it runs is
what the estimate charges, layer by layer."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import QuanMSResNet
from models.integer_network import IntegerNetwork
from runtime.errors import UserError
from spikesim_eval.chip import PRESETS, Chip
from spikesim_eval.estimate import estimate, layer_costs, totals
from spikesim_eval.layer_list import Layer, LayerList
from spikesim_eval.nonideal import on_crossbars
from spikesim_eval.technology import DEFAULT
from spikesim_eval.trace import counting_rows, describe

IMAGES = 3
CHIPS = [
    Chip(xbar_size=16, adc_bits=None),
    Chip(xbar_size=16, columns="offset", adc_bits=None, cell_bits=2),
    Chip(xbar_size=8, adc_of="pe", cell_bits=1, crossbars_per_pe=4, adc_bits=None),
    Chip(adc_of="pe", columns="offset", adc_bits=None),
    Chip(xbar_size=8, crossbars_per_pe=4, pe_per_tile=4, adc_bits=None, skip="rows,patches,tiles"),
    Chip(xbar_size=16, adc_of="pe", crossbars_per_pe=5, adc_bits=None, skip="tiles"),
    Chip(xbar_size=8, columns="offset", adc_bits=None, skip="patches"),
]


def network_and_images(static: bool, bits: int, T: int):
    torch.manual_seed(bits)
    network = QuanMSResNet(18, 10, T, 3, 6, bits=bits)
    size = (3, 9, 9) if static else (T, 3, 9, 9)
    network.input_shape = size
    images = torch.rand(IMAGES, *size) if static else torch.randint(0, 3, (IMAGES, *size)).float()
    network(images)  # running statistics
    return network.eval(), images


@pytest.mark.parametrize(
    "chip", CHIPS, ids=lambda chip: f"{chip.columns}-{chip.adc_of}-{chip.skip}"
)
@pytest.mark.parametrize(("static", "bits", "T"), [(True, 2, 4), (True, 4, 1), (False, 4, 2)])
@torch.no_grad()
def test_what_is_priced_is_what_the_crossbars_do(static, bits, T, chip):
    network, images = network_and_images(static, bits, T)
    with counting_rows(network, describe(network), chip) as counted:
        network(images)
    description = describe(network, counted())
    placed, layers = on_crossbars(network, description, chip, seed=0)
    placed(images)
    priced = estimate(description, Chip(**chip.__dict__ | {"adc_bits": 5}))
    assert len(layers) == len(priced.layers)
    for row in priced.layers:
        layer, counts = layers[row["name"]], layers[row["name"]].counts
        assert counts.cycles == IMAGES * row["cycles"], row["name"]
        assert counts.conversions == pytest.approx(IMAGES * row["conversions"]), row["name"]
        if chip.skips("patches"):
            silent = row["silent_patches"] * counts.cycles
            assert counts.silent == pytest.approx(silent), row["name"]
        arrays = sum(
            len(cells) * -(-cells.shape[-1] // (chip.xbar_size // row["slices"] * row["slices"]))
            for cells in layer.cells
        )
        assert arrays == row["crossbars"], row["name"]
        driven = row["energy_by_component"]["crossbar"] / DEFAULT.energy["cell"]
        assert driven == pytest.approx(counts.driven_cells / IMAGES, rel=1e-9), row["name"]


@torch.no_grad()
def test_what_is_silent_would_have_added_nothing():
    network, images = network_and_images(False, 4, 3)
    found = []
    for skip in ("nothing", "rows,patches,tiles"):
        how = {"columns": "offset", "on_off_ratio": 10, "sigma": 0.2, "crossbars_per_pe": 4}
        chip = Chip(xbar_size=8, skip=skip, **how)
        placed, layers = on_crossbars(network, describe(network), chip, seed=0)
        found.append((placed(images), sum(x.counts.conversions for x in layers.values())))
    (dense, all_of_them), (skipping, fewer) = found
    assert torch.equal(dense, skipping)
    assert fewer < 0.9 * all_of_them


@torch.no_grad()
def test_only_ones_in_the_plane_drive_rows():
    network, images = network_and_images(True, 4, 2)
    with counting_rows(network, describe(network)) as counted:
        network(images)
    seen = {}

    def keep(name):
        return lambda module, inputs: seen.setdefault(name, inputs[0])

    names = "stem.conv", "blocks.2.conv1", "blocks.2.shortcut.conv"
    for name in names:
        network.get_submodule(name).register_forward_pre_hook(keep(name))
    network(images)
    for name, bits in zip(names, (8, 1, 4), strict=True):
        conv, driven, possible = network.get_submodule(name), 0, 0
        (k, _), (s, _), (p, _) = conv.kernel_size, conv.stride, conv.padding
        plane = seen[name][:, 0]
        rows = range(-p, plane.shape[-1] + p - k + 1, s)
        for y in rows:
            for x in rows:
                patch = seen[name][:, :, max(y, 0) : y + k, max(x, 0) : x + k].long()
                possible += bits * patch.numel()
                driven += sum((patch >> bit & 1).sum().item() for bit in range(bits))
        assert counted()[name]["spike_rate"] == pytest.approx(driven / possible)


def test_a_sum_over_a_pe_needs_the_range_of_all_its_crossbars():
    network, _ = network_and_images(True, 4, 1)
    description = describe(network)
    steps = {}
    for adc_of in ("crossbar", "pe"):
        chip = Chip(adc_of=adc_of, adc_range="full", adc_bits=4)
        _, layers = on_crossbars(network, description, chip, seed=0)
        steps[adc_of] = layers["blocks.7.conv2"].adc_step
    assert steps["pe"] == 9 * steps["crossbar"]


def every_way(network, chip, budget_mm2):
    """(the shortest interval, the fewest copies that have it) by trying all copies."""
    found = []
    widths = [range(1, layer.out_size[1] + 1) for layer in network.layers]
    for copies in product(*widths):
        of = dict(zip((layer.name for layer in network.layers), copies, strict=True))
        costs = layer_costs(network, chip, of)
        total, _ = totals(network, chip, costs)
        if total["area_um2"] <= 1e6 * budget_mm2:
            found.append((max(cost.times.busy for cost in costs.values()), sum(copies)))
    return min(found)


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_copies_of_weights_are_those_of_exhaustive_search(data):
    side = st.integers(1, 4)
    layers = []
    for i in range(data.draw(st.integers(1, 3))):
        after = (f"layer{i - 1}",) if i else ()
        size = (data.draw(side), data.draw(side))
        bits = data.draw(st.sampled_from([1, 4, 8]))
        out_channels = data.draw(st.sampled_from([8, 40, 100]))
        layers.append(Layer(f"layer{i}", 3, 64, out_channels, size, size, bits, after))
    network = LayerList(data.draw(side), 4, 4, tuple(layers), ())
    chip = Chip(pe_per_tile=1)
    alone = estimate(network, chip).total
    budget = alone["area_um2"] * data.draw(st.floats(1, 5)) / 1e6
    found = estimate(network, chip, budget)
    interval, copies = every_way(network, chip, budget)
    assert 1e9 / found.total["frames_per_second"] == pytest.approx(interval * chip.clock_ns)
    assert found.total["area_um2"] <= 1e6 * budget
    assert sum(row["copies"] for row in found.layers) == copies
    assert found.total["delay_ns"] <= alone["delay_ns"]
    for component in ("adc", "crossbar", "htree", "membrane"):  # work is shared, not repeated
        energy = estimate(network, chip).energy_by_component[component]
        assert found.energy_by_component[component] == pytest.approx(energy)


def test_published_costs_fill_no_area():
    network = describe(network_and_images(True, 4, 1)[0])
    with pytest.raises(UserError, match="published"):
        estimate(network, Chip(**PRESETS["published"]), 1e4)


def test_the_residual_stream_is_kept_while_a_block_computes():
    of_images = describe(network_and_images(True, 4, 4)[0])
    network = describe(network_and_images(False, 4, 4)[0])
    assert of_images.streams == network.streams[1:]  # the first is the stem's sums, which are kept
    sides = [9, 9, 9, 5, 5, 3, 3, 2]  # of what the eight blocks read
    channels = [6, 6, 6, 12, 12, 24, 24, 48]
    assert [shape[:2] for shape in network.streams] == [
        (c, s) for c, s in zip(channels, sides, strict=True)
    ]
    bits = 25 * sum(c * s * s for c, s in zip(channels, sides, strict=True))
    found = estimate(network, Chip())
    assert found.area_by_component["stream"] == pytest.approx(bits * 0.7391)
    expected = 4 * bits * (15.9 + 17.7) / 64
    assert found.energy_by_component["stream"] == pytest.approx(expected)
    assert estimate(network, Chip(**PRESETS["published"])).energy_by_component["stream"] == 0


class Instrumented(IntegerNetwork):
    """Counts what it does to membranes, sums and image."""

    membranes = sums = 0

    def _lif(self, lif, spikes, current, *how):
        self.membranes += current.numel()
        return super()._lif(lif, spikes, current, *how)

    def _batch_norm(self, bn, accumulator, *how):
        self.sums += accumulator.numel()
        return super()._batch_norm(bn, accumulator, *how)


@pytest.mark.parametrize("static", [True, False])
def test_memory_is_accessed_as_often_as_the_integer_network_does(static):
    network, images = network_and_images(static, 4, 3)
    integers, description = Instrumented(network), describe(network)
    integers(images)
    energy = estimate(description, Chip()).energy_by_component
    a_membrane = 4 * (DEFAULT.energy["read"] + DEFAULT.energy["write"])
    assert energy["membrane"] == pytest.approx(integers.membranes / IMAGES * a_membrane)
    assert energy["neuron"] == pytest.approx(integers.membranes / IMAGES * DEFAULT.energy["neuron"])
    normalized = sum(
        layer.out_channels * description.outputs(layer) for layer in description.layers[:-1]
    )
    assert normalized == integers.sums / IMAGES


@st.composite
def layer_bits(draw):
    return {name: draw(st.integers(1, 12)) for name in draw(st.sets(st.sampled_from(NAMES)))}


NAMES = ("stem.conv", "blocks.0.conv1", "blocks.2.shortcut.conv", "linear")


@settings(deadline=None, max_examples=30)
@given(layer_bits(), st.integers(1, 12), st.sampled_from(["shared", "own"]))
def test_a_layers_own_adcs_cost_what_they_cost_on_a_chip_of_such(of_layers, bits, tiles):
    network = describe(network_and_images(True, 4, 2)[0])
    said = ",".join(f"{name}={bits}" for name, bits in of_layers.items())
    chip = Chip(adc_bits=bits, tiles=tiles)
    found = estimate(network, replace(chip, layer_adc_bits=said))
    everywhere = {
        b: estimate(network, replace(chip, adc_bits=b)) for b in {bits, *of_layers.values()}
    }
    adc = everywhere[bits].area_by_component["adc"]
    for i, row in enumerate(found.layers):
        own = everywhere[of_layers.get(row["name"], bits)].layers[i]
        for key in ("adc_bits", "energy_pj", "area_um2", "busy_ns", "conversions"):
            assert row[key] == pytest.approx(own[key]), (row["name"], key)
        adc += own["area_by_component"]["adc"]
        adc -= everywhere[bits].layers[i]["area_by_component"]["adc"]
    assert found.area_by_component["adc"] == pytest.approx(adc)
    assert estimate(network, replace(chip, layer_adc_bits=said), 5000).total["area_um2"] < 5e9


@torch.no_grad()
def test_layers_are_simulated_with_their_own_adcs():
    network, _ = network_and_images(True, 4, 2)
    chip = Chip(adc_bits=7, layer_adc_bits="blocks.0.conv1=2,linear=9")
    _, layers = on_crossbars(network, describe(network), chip, seed=0)
    found = {name: layer.chip.adc_bits for name, layer in layers.items()}
    assert found.pop("blocks.0.conv1") == 2
    assert found.pop("linear") == 9
    assert set(found.values()) == {7}


@torch.no_grad()
def test_the_error_of_smaller_adcs_is_that_of_sums_one_by_one():
    network, images = network_and_images(True, 4, 2)
    for how in ("unit", "full"):
        chip = Chip(xbar_size=16, adc_bits=6, adc_range=how)
        placed, layers = on_crossbars(network, describe(network), chip, seed=0, keep=["sums"])
        layer, seen = layers["blocks.2.conv1"], []
        convert = layer._convert

        def keep(sums, *rest, convert=convert, seen=seen):
            seen.append(sums.flatten().clone())
            convert(sums, *rest)

        layer._convert = keep
        placed(images)
        for bits in (1, 2, 4, 6):
            top = 2**bits - 1
            step = 1.0 if how == "unit" else max(1.0, layer.rows * 7 / top)
            squares = error = 0.0
            for value in torch.cat(seen).tolist():
                squares += value**2
                error += (min(top, round(value / step)) * step - value) ** 2
            assert layer.adc_error(bits) == pytest.approx(error / squares)


@pytest.mark.parametrize(
    "text", ["a", "a=", "a=0", "a=17", "a=3,a=3", "=3", "a=3,", "a=-1", 5, None]
)
def test_adcs_of_layers_that_make_no_sense_are_refused(text):
    with pytest.raises(UserError, match=r"layer_adc_bits must be as stem\.conv=6,linear=8"):
        Chip(layer_adc_bits=text)
