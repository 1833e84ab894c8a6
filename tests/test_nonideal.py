"""Crossbars: exact where they are ideal, and the right distance away where they are not."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import REPOSITORY, nonideal_report, reported
from models import QuanMSResNet
from runtime.errors import UserError
from spikesim_eval import nonideal
from spikesim_eval.__main__ import main
from spikesim_eval.cells import slices_of
from spikesim_eval.chip import Chip, Draws, options_of
from spikesim_eval.crossbar import KEPT, Counts, CrossbarLayer, convert, ladder, solve_once
from spikesim_eval.layer_list import Layer, LayerList, Subject
from spikesim_eval.nonideal import generator_of, on_crossbars
from spikesim_eval.technology import load_technology
from spikesim_eval.trace import describe

COLUMNS = pytest.mark.parametrize("columns", ["differential", "offset"])


def ideal(*args, **options) -> Chip:
    """With an ADC that neither rounds nor clips, unless the options say how many bits it has."""
    return Chip(*args, **{"adc_bits": None} | options)


def on_chip(
    codes, weight_bits, chip, input_bits=1, signed=False, stride=1, padding=0, seed=0, keep=()
) -> CrossbarLayer:
    """A layer of these weights (O, I, k, k); signed inputs are the residual stream's."""
    out_channels, in_channels, kernel, _ = codes.shape
    after = ("before",) if signed else ()
    sizes = (1, 1), (1, 1)  # of a plane that these tests do not price
    layer = Layer("a", kernel, in_channels, out_channels, *sizes, input_bits, after)
    network = LayerList(1, weight_bits, input_bits, (replace(layer, name="before", after=()),), ())
    generator = torch.Generator().manual_seed(seed)
    how = (stride,) * 2, (padding,) * 2, generator, keep
    return CrossbarLayer(codes, layer, network, chip, *how)


def random_layer(
    chip: Chip,
    weight_bits=4,
    input_bits=1,
    signed=False,
    shape=(5, 6, 3, 3),
    stride=1,
    padding=1,
    size=7,
    keep=("errors",),
):
    """(the layer, its weight codes, random inputs of its range)"""
    generator = torch.Generator().manual_seed(0)
    high = max(1, 2 ** (weight_bits - 1) - 1)
    codes = torch.randint(-high, high + 1, shape, generator=generator)
    low = -(2 ** (input_bits - 1)) if signed else 0
    x = torch.randint(low, low + 2**input_bits, (3, shape[1], size, size), generator=generator)
    how = input_bits, signed, stride, padding
    layer = on_chip(codes, weight_bits, chip, *how, seed=1, keep=keep)
    return layer, codes.double(), x.double()


def exact(codes, x, stride=1, padding=1):
    return F.conv2d(x, codes, None, stride, padding)


@COLUMNS
@pytest.mark.parametrize("cell_bits", [1, 2, 4, 8])
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"stride": 2},
        {"shape": (5, 6, 1, 1), "padding": 0, "input_bits": 4, "signed": True},
        {"shape": (5, 20, 3, 3)},  # three groups of 8 rows, the last one padded
        {"shape": (3, 2, 5, 5), "padding": 2, "stride": 3},
        {"weight_bits": 2},
        {"weight_bits": 8, "input_bits": 8},
        {"input_bits": 2, "signed": True, "shape": (5, 6, 1, 1), "padding": 0, "stride": 2},
    ],
)
def test_ideal_crossbars_are_the_integer_convolution_bit_for_bit(case, cell_bits, columns):
    crossbar = ideal(xbar_size=8, cell_bits=cell_bits, columns=columns)
    layer, codes, x = random_layer(crossbar, **case)
    geometry = {key: case[key] for key in ("stride", "padding") if key in case}
    assert torch.equal(layer(x), exact(codes, x, **geometry))
    assert layer.relative_error == 0


def one_by_one(layer: CrossbarLayer, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What crossbars compute, by the book: a patch of one bit after another, in float64; and the
    sums that ADCs read."""
    k, chip, result, sums = layer.kernel, layer.chip, 0.0, []
    size = exact(torch.zeros(1, *layer.codes.shape[1:]), x[:1].float(), layer.stride, layer.padding)
    for bit in range(layer.input_bits):
        fed = (x.long() >> bit & 1).double()
        patches = F.unfold(fed, k, padding=layer.padding, stride=layer.stride)
        patches = patches.unflatten(1, (-1, math.prod(k)))  # (N, I, k², outputs)
        value = -(2**bit) if layer.signed_input and bit == layer.input_bits - 1 else 2**bit
        for cells, sign in zip(layer.cells, (value, -value), strict=False):
            parts = []
            for number, array in enumerate(cells.double()):
                group, position = divmod(number, math.prod(k))
                rows = patches[:, group * layer.rows : (group + 1) * layer.rows, position]
                parts.append(torch.einsum("nrl,rc->ncl", rows, array[: rows.shape[1]]))
            for together in torch.stack(parts).split(layer.per_reading):
                sums.append(together.sum(dim=0))
                read = convert(sums[-1], layer.adc_step, chip.adc_bits).unflatten(
                    1, (-1, layer.slices)
                )
                for i, weight in enumerate(layer.slice_weights.tolist()):
                    result = result + sign * weight * read[:, :, i]
        leak = layer.off_conductance * sum(layer.slice_weights.tolist())
        if chip.columns == "offset":
            result = result - value * (layer.how.offset + leak) * patches.sum(dim=(1, 2))[:, None]
    return result.unflatten(2, size.shape[2:]), sums


@given(st.data())
@settings(deadline=None, max_examples=120)
def test_a_layer_computes_what_its_crossbars_do_one_by_one(data):
    pick = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    chip = Chip(
        xbar_size=pick(8, 16),
        cell_bits=pick(1, 2, 4),
        columns=pick("differential", "offset"),
        adc_of=pick("crossbar", "pe"),
        crossbars_per_pe=pick(1, 4, 9),
        adc_bits=pick(None, 1, 2, 4, 6),
        adc_range=pick("unit", "unit", "full"),
        on_off_ratio=pick(math.inf, math.inf, 8.0),
        sigma=pick(0.0, 0.0, 0.2),
    )
    kernel, input_bits = pick(1, 2, 3), pick(1, 1, 2, 5)
    case = {
        "weight_bits": pick(2, 4, 8),
        "input_bits": input_bits,
        "signed": input_bits > 1 and pick(True, False),
        "shape": (pick(1, 5), pick(1, 3, 20), kernel, kernel),
        "stride": pick(1, 2, 3),
        "padding": data.draw(st.integers(0, kernel - 1)),
        "size": data.draw(st.integers(kernel, 6)),
    }
    layer, codes, x = random_layer(chip, keep=(), **case)
    everything, *_ = random_layer(chip, keep=KEPT, **case)
    found, expected, sums = layer(x), *one_by_one(layer, x)
    # An ADC rounds either way what lies between two of its codes but for a rounding.
    halves = [(x / layer.adc_step - 0.5) % 1 for x in sums] if chip.adc_bits else []
    is_whole = chip.sigma == 0 and chip.on_off_ratio == math.inf and layer.adc_step == 1
    if not is_whole and any(((half < 1e-4) | (half > 1 - 1e-4)).any() for half in halves):
        return
    if is_whole:
        assert torch.equal(found, expected)
    near = {"rtol": 1e-5, "atol": 1e-5 * expected.abs().max().item() + 1e-4}
    torch.testing.assert_close(found, expected, **near)
    torch.testing.assert_close(everything(x), found, **near)
    assert layer.counts == everything.counts
    assert layer.counts.conversions == sum(x.numel() for x in sums)
    if chip.adc_bits:
        above = sum((x / layer.adc_step).round() > layer.largest_code for x in sums)
        assert layer.counts.clipped == above.sum()
    assert everything.largest_sum == pytest.approx(max(x.max().item() for x in sums), rel=1e-6)
    seen = torch.cat([x.flatten() for x in sums]).round().long()
    assert torch.equal(everything.sums, torch.bincount(seen, minlength=len(everything.sums)))
    ideal = exact(codes, x, case["stride"], case["padding"])
    if ideal.any():
        off = math.sqrt((expected - ideal).square().sum() / ideal.square().sum())
        assert everything.relative_error == pytest.approx(off, rel=1e-3, abs=1e-5)


@COLUMNS
def test_a_finite_on_off_ratio_is_corrected_digitally(columns):
    layer, codes, x = random_layer(ideal(xbar_size=8, on_off_ratio=10, columns=columns))
    torch.testing.assert_close(layer(x), exact(codes, x), rtol=1e-5, atol=1e-3)


@COLUMNS
def test_an_adc_with_unit_steps_is_exact_until_it_clips(columns):
    options = {"xbar_size": 8, "cell_bits": 2, "adc_range": "unit", "columns": columns}
    layer, codes, x = random_layer(ideal(adc_bits=5, **options), keep=KEPT)  # 31 >= 6 · 3
    assert torch.equal(layer(x), exact(codes, x))
    assert layer.counts.clipped == 0
    assert layer.largest_sum <= 18
    clipping, codes, x = random_layer(ideal(adc_bits=2, **options), keep=KEPT)
    assert not torch.equal(clipping(x), exact(codes, x))
    assert clipping.counts.clipped > 0
    enough, codes, x = random_layer(ideal(adc_bits=clipping.unclipped_adc_bits, **options))
    assert torch.equal(enough(x), exact(codes, x))


@COLUMNS
@pytest.mark.parametrize("adc_bits", [1, 2])
def test_an_adc_is_off_by_at_most_half_a_step_per_partial_sum(adc_bits, columns):
    how = {"adc_range": "full", "adc_bits": adc_bits}
    crossbar = Chip(xbar_size=8, cell_bits=1, columns=columns, **how)
    layer, codes, x = random_layer(crossbar, shape=(5, 20, 3, 3))
    error = (layer(x) - exact(codes, x)).abs().max()
    crossbars = 9 * 3 * len(layer.cells)  # kernel positions, groups, polarities
    assert layer.counts.clipped == 0
    assert 0 < error <= crossbars * sum(layer.slice_weights.tolist()) * layer.adc_step / 2


@COLUMNS
def test_no_spikes_in_gives_zero_out_whatever_the_crossbar(columns):
    crossbar = Chip(
        xbar_size=8,
        cell_bits=2,
        columns=columns,
        adc_bits=3,
        on_off_ratio=5,
        sigma=0.2,
        wire_ohm=10,
    )
    layer, _, x = random_layer(crossbar)
    assert torch.equal(layer(torch.zeros_like(x)), torch.zeros(3, 5, 7, 7, dtype=x.dtype))


def test_no_two_chips_share_what_a_layer_is_drawn_with():
    """Nor do two layers, of one chip or of two."""
    layers = tuple(Layer(f"layer {i}", 1, 4, 4, (1, 1), (1, 1), 1, ()) for i in range(21))
    description = LayerList(1, 4, 4, layers, ())
    seeds = [
        generator_of(index, description, draw).initial_seed()
        for numbers in (Draws(0, 20).numbers, Draws(1, 20).numbers)
        for draw in numbers
        for index in range(len(description.layers))
    ]
    assert len(set(seeds)) == len(seeds) == 40 * len(description.layers)


def test_variation_has_the_right_mean_and_deviation_and_a_seed():
    crossbar = ideal(on_off_ratio=4, sigma=0.1)
    codes = torch.full((64, 64, 3, 3), 5)

    def cells(seed):
        return on_chip(codes, 4, crossbar, seed=seed).cells[0]

    # All weights are 5, so are all cells; their highest level is 7 and conducts 4 times the lowest.
    target = 5 + 7 / 3
    assert cells(0).mean() == pytest.approx(target, rel=2e-3)
    assert cells(0).std() == pytest.approx(0.1 * target, rel=2e-2)
    assert torch.equal(cells(0), cells(0))
    assert not torch.equal(cells(0), cells(1))


def nodal_analysis(g: torch.Tensor, wire: float, volts: torch.Tensor) -> np.ndarray:
    """Current of each column: the whole network at once, as a sparse matrix; all in siemens."""
    rows, columns = g.shape
    n = rows * columns
    at_row, at_column = np.arange(n).reshape(rows, columns), n + np.arange(n).reshape(rows, columns)
    ends = [(at_row, at_column, g.numpy())]
    ends += [(at_row[:, :-1], at_row[:, 1:], np.full((rows, columns - 1), wire))]
    ends += [(at_column[:-1], at_column[1:], np.full((rows - 1, columns), wire))]
    a, b, value = (np.concatenate([x[i].ravel() for x in ends]) for i in range(3))
    y = scipy.sparse.coo_matrix((value, (a, b)), shape=(2 * n, 2 * n)).tocsr()
    y = y + y.T
    outside = np.zeros(2 * n)
    outside[at_row[:, 0]] = outside[at_column[-1]] = wire  # drivers and grounds
    laplacian = scipy.sparse.diags(np.asarray(y.sum(axis=1)).ravel() + outside) - y
    injected = np.zeros(2 * n)
    injected[at_row[:, 0]] = wire * volts.numpy()
    return wire * scipy.sparse.linalg.spsolve(laplacian.tocsc(), injected)[at_column[-1]]


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (4, 1), (5, 3), (6, 7)])
def test_the_ladder_equals_nodal_analysis_of_the_whole_network(shape):
    torch.manual_seed(0)
    g = torch.rand(2, *shape, dtype=torch.float64)
    for effective, one in zip(ladder(g, 7.0), g, strict=True):
        rows = [nodal_analysis(one, 7.0, row) for row in torch.eye(len(one)).double()]
        np.testing.assert_allclose(effective, rows, rtol=1e-9, atol=1e-12)


def test_the_same_wires_are_solved_once():
    g = torch.rand(2, 8, 6, generator=torch.Generator().manual_seed(0))
    found = solve_once(g, 7.0)
    assert torch.equal(found, ladder(g, 7.0).float())
    assert solve_once(g.clone(), 7.0) is found
    assert torch.equal(solve_once(g, 3.0), ladder(g, 3.0).float())
    assert torch.equal(solve_once(g.mT, 7.0), ladder(g.mT, 7.0).float())


def test_sums_beyond_24_bits_stay_exact():
    codes = torch.full((1, 512, 1, 1), 127)
    codes[0, 0] = 126
    layer = on_chip(codes, 8, ideal(), input_bits=13)
    x = torch.full((1, 512, 1, 1), 2.0**13 - 1, dtype=torch.float64)
    assert layer(x).item() == (511 * 127 + 126) * (2**13 - 1)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("static", [True, False])
def test_a_network_on_ideal_crossbars_is_the_digital_network(bits, static):
    torch.manual_seed(0)
    network = QuanMSResNet(18, 5, 3, 2, 8, bits=bits)
    x = torch.rand(4, 2, 16, 16) if static else torch.rand(4, 3, 2, 16, 16)
    for _ in range(20):
        network(x)
    network.eval()
    network.input_shape = tuple(x[0].shape)
    description = describe(network)
    crossbars, layers = on_crossbars(network, description, ideal(xbar_size=16), seed=0)
    assert len(layers) == 21
    logits, membranes = network(x, membranes=True)
    theirs, their_membranes = crossbars(x, membranes=True)
    assert all(map(torch.equal, membranes, their_membranes))
    torch.testing.assert_close(theirs, logits, rtol=1e-5, atol=1e-6)
    noisy, layers = on_crossbars(
        network,
        description,
        ideal(sigma=0.3),
        seed=0,
        only=["blocks.3.conv1"],
        keep=["errors"],
    )
    assert list(layers) == ["blocks.3.conv1"]
    assert not torch.equal(noisy(x), logits)
    assert layers["blocks.3.conv1"].relative_error > 0
    assert torch.equal(network(x), logits)  # which has stayed what it was


def test_a_wire_of_an_ohm_takes_half_the_current_of_four_bit_cells():
    # Cells of all levels, as the engine of SpikeSim has them: level L has 19139 / L ohm.
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (64, 64, 1, 1), generator=generator)
    on = torch.zeros(64).double()
    on[torch.randperm(64, generator=generator)[:13]] = 1  # 20 %
    layer = on_chip(codes, 5, ideal(wire_ohm=1.0))
    levels = codes[..., 0, 0].mT.double()
    currents = on @ layer.cells[0][0].double() / 19139
    truth = nodal_analysis(levels / 19139, 1.0, on)
    torch.testing.assert_close(currents.numpy(), truth, rtol=1e-5, atol=0)
    lost = 1 - currents.sum() / (on @ levels / 19139).sum()
    assert lost == pytest.approx(0.51, abs=0.01)


def test_the_highest_level_has_the_lowest_ones_resistance_over_the_number_of_levels():
    # One cell and two wires in series. A weight of fewer bits uses the whole range of its cell.
    for bits, code in ((5, 15), (4, 7), (2, 1)):
        codes = torch.full((1, 1, 1, 1), code)
        options = {"wire_ohm": 50.0, "on_off_ratio": 10.0}
        layer = on_chip(codes, bits, ideal(**options))
        highest = 19139 / 15
        share = highest / (highest + 2 * 50)
        steps = code + code / 9  # the lowest level conducts a tenth
        assert layer.cells[0].item() == pytest.approx(steps * share, rel=1e-6)


def test_the_cells_of_a_weight_lie_in_one_crossbar_of_wires():
    # 3 cells a weight: crossbars of 8 columns hold 2 weights each, 5 outputs take 6 + 6 + 3 columns
    codes = torch.randint(0, 8, (5, 8, 1, 1), generator=torch.Generator().manual_seed(0))
    crossbar = ideal(xbar_size=8, cell_bits=1, wire_ohm=100.0)
    layer = on_chip(codes, 4, crossbar)
    digits = slices_of(codes[..., 0, 0].mT, 3, 1).flatten(1).double()  # (8 rows, 5·3 columns)
    arrays = (digits[:, :6], digits[:, 6:12], digits[:, 12:])
    expected = torch.cat([ladder(x / 19139, 1 / 100) * 19139 for x in arrays], dim=1)
    torch.testing.assert_close(layer.cells[0][0].double(), expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(UserError, match="of a crossbar row"):
        on_chip(codes, 16, crossbar)


@pytest.mark.parametrize(("sigma", "percent"), [(0.1, 0.0), (0.5, 0.42), (1.0, 8.33), (2.0, 39.56)])
def test_negative_conductances_set_to_0_raise_the_mean_as_the_formula_says(sigma, percent):
    bias = Chip(sigma=sigma).variation_bias
    assert 100 * bias == pytest.approx(percent, abs=0.005)
    codes = torch.full((256, 256, 3, 3), 7)
    layer = on_chip(codes, 4, Chip(sigma=sigma))
    assert layer.cells[0].double().mean() / 7 - 1 == pytest.approx(bias, abs=5 * sigma / 768)


# The smallest ADCs.


def test_auto_finds_adcs_layer_by_layer_that_serve_and_cost_less(tmp_path, capsys):
    path = REPOSITORY / "tests" / "data" / "qamd-last.pth"
    line = f"--checkpoint {path} --on_chip --adc_bits auto --max_drop 2 --test_images 60"
    found = reported(tmp_path / "auto", line)
    assert "ADC bits, by layer" in capsys.readouterr().out
    (accuracy,) = found["chip_accuracies"]
    assert 100 * (found["accuracy"] - accuracy) <= 2 + 1e-9
    uniform = found["chip"]["adc_bits"]
    bits = {row["name"]: row["adc_bits"] for row in found["layers"]}
    assert max(bits.values()) <= uniform
    assert min(bits.values()) < uniform
    # One bit less everywhere would not do, and what is said makes the same chip again.
    chip = Chip(adc_bits=uniform, layer_adc_bits=found["chip"]["layer_adc_bits"])
    again = nonideal_report(path, chip, test_images=60)
    assert again["accuracies"] == [accuracy]
    if uniform > 1:
        fewer = Chip(adc_bits=uniform - 1)
        fewer = nonideal_report(path, fewer, test_images=60)
        assert 100 * (found["accuracy"] - fewer["accuracy_mean"]) > 2
    everywhere = reported(tmp_path, f"--checkpoint {path} --adc_bits {uniform}")
    for key in ("energy_pj", "area_um2", "delay_ns"):
        assert found["total"][key] <= everywhere["total"][key]
    assert found["total"]["energy_pj"] < everywhere["total"]["energy_pj"]


def test_bits_are_taken_one_by_one_and_harmless_ones_first():
    layer = SimpleNamespace(counts=Counts(images=1, conversions=100))
    errors = {"a": (0, 0, 0.5, 0.9), "b": (0, 0.1, 0.2, 0.3)}  # of 4, 3, 2 and 1 bits
    layers = {
        name: SimpleNamespace(counts=layer.counts, adc_error=lambda bits, x=x: x[4 - bits])
        for name, x in errors.items()
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nonideal, "on_chip", lambda *_, **__: ([], [layers]))
        steps = nonideal.fewer_bits([Subject("", None)], Chip(adc_bits=4), 0)
    # a to 3 for nothing; saved are 1/2, 1/4 and 1/8 of 100 conversions of 4 bits
    assert steps[0] == ("a", 3)
    for name in "ab":
        assert [bits for layer, bits in steps if layer == name] == [3, 2, 1]
    assert steps.index(("b", 3)) < steps.index(("a", 2))


def test_auto_tries_no_adc_that_the_technology_does_not_know(monkeypatch):
    chip = Chip(**options_of(load_technology("neurosim-22nm")))
    monkeypatch.setattr(nonideal, "on_chip", lambda *_, **__: ([0.1], []))
    with pytest.raises(UserError, match="with ADCs of 1 to 8 bits it loses more than 2 points"):
        nonideal.smallest_adcs([Subject("it", None, accuracy=0.9)], chip, 2, Draws())


def test_auto_leaves_no_room_for_layers_said_by_hand(trained, tmp_path, capsys):
    line = f"report --checkpoint {trained['qamd']} --on_chip --adc_bits auto"
    assert main([*line.split(), "--layer_adc_bits", "linear=3", "--out", str(tmp_path)]) == 2
    assert "leave --layer_adc_bits out" in capsys.readouterr().err
