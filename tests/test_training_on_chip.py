"""Training for a chip: forward as its crossbars compute, backward as the ideal network does."""

import json
import math
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import main
import spikesim_eval.__main__
from checkpoints import load_checkpoint
from conftest import evaluated, nonideal_report, refused
from engine.log import next_commands
from exchange.__main__ import about_of
from models import QuanMSResNet
from models.quantized_layers import QuanConv2d
from runtime.errors import UserError
from settings import OF_CHIP, Settings
from spikesim_eval import crossbar, trace
from spikesim_eval.chip import OPTIONS as CHIP_OPTIONS
from spikesim_eval.chip import Chip, options_of
from spikesim_eval.compare import notes
from spikesim_eval.crossbar import CrossbarLayer
from spikesim_eval.layer_list import Layer, LayerList
from spikesim_eval.nonideal import nonideal_lines, on_crossbars
from spikesim_eval.technology import load_technology, presets
from spikesim_eval.trace import describe
from spikesim_eval.training import (
    draw_cells,
    lost_gradient,
    lost_gradient_of_means,
    put_on_chip,
)
from test_resume import PowerCutError, assert_same_end, cut_off_after

IDEAL = Chip(adc_bits=None)
CHIPS = {
    "xbar_size": st.sampled_from([8, 64]),
    "cell_bits": st.sampled_from([1, 2, 4]),
    "columns": st.sampled_from(["differential", "offset"]),
    "adc_of": st.sampled_from(["crossbar", "pe"]),
    "adc_range": st.sampled_from(["unit", "full"]),
}


def a_network(bits: int = 4, T: int = 2) -> tuple[QuanMSResNet, torch.Tensor]:
    """A small network whose batch norms have seen the images beside it."""
    torch.manual_seed(0)
    network = QuanMSResNet(18, 5, T, 2, 6, bits=bits)
    x = torch.rand(3, 2, 8, 8)
    for _ in range(20):
        network(x)
    network.input_shape = tuple(x[0].shape)
    return network, x


def gradients(network: torch.nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    network.zero_grad()
    network(x).square().sum().backward()
    return {name: y.grad for name, y in network.named_parameters() if y.grad is not None}


@settings(max_examples=8, deadline=None, database=None)
@given(
    bits=st.sampled_from([2, 4]),
    chip=st.builds(
        Chip,
        **CHIPS,
        adc_bits=st.sampled_from([None, 2, 4]),
        on_off_ratio=st.sampled_from([10.0, math.inf]),
        sigma=st.sampled_from([0.0, 0.1]),
        read_noise=st.sampled_from([0.0, 0.1]),
        read_floor=st.sampled_from([0.0, 0.05]),
        layer_adc_bits=st.sampled_from(["", "stem.conv=3,blocks.2.conv1=2"]),
    ),
)
def test_a_trained_network_is_evaluated_as_nonideal_simulates_it(bits, chip):
    network, x = a_network(bits)
    simulated, _ = on_crossbars(network, describe(network), chip, seed=0)
    put_on_chip(network, chip)
    network.eval()(x.flip(0))  # what was tested before changes nothing
    logits, membranes = network(x, membranes=True)
    theirs, their_membranes = simulated(x, membranes=True)
    assert all(map(torch.equal, membranes, their_membranes))
    assert torch.equal(logits, theirs)


@pytest.mark.parametrize("static", [True, False], ids=["image", "frames"])
@pytest.mark.parametrize(
    ("bits", "options"), [(4, {}), (8, {"adc_of": "pe", "sigma": 0.1, "read_floor": 0.02})]
)
def test_an_image_meets_the_same_noise_in_any_batch_however_a_layer_divides_it(
    bits, options, static, monkeypatch
):
    network, _ = a_network(bits)
    chip = Chip(read_noise=0.1, **options)
    x = torch.rand(6, 2, 8, 8) if static else torch.rand(6, 2, 2, 8, 8)
    found = []
    for size, largest in ((6, crossbar.LARGEST_WORKSPACE), (4, 2**12), (1, 1)):
        monkeypatch.setattr(crossbar, "LARGEST_WORKSPACE", largest)
        placed, _ = on_crossbars(network, describe(network), chip, seed=3)
        with torch.no_grad():
            found.append(torch.cat([placed(batch) for batch in x.split(size)]))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    placed, _ = on_crossbars(network, describe(network), chip, seed=4)
    assert not torch.equal(placed(x), found[0])


def test_under_autocast_a_chip_computes_as_without():
    network, x = a_network()
    put_on_chip(network.eval(), Chip(adc_bits=6, sigma=0.1))
    logits, membranes = network(x, membranes=True)
    with torch.autocast("cpu", torch.bfloat16):
        theirs, their_membranes = network(x, membranes=True)
    assert all(map(torch.equal, membranes, their_membranes))
    assert torch.equal(logits, theirs)


def test_what_a_layer_computes_in_training_is_the_definition_crossbar_by_crossbar():
    network, x = a_network()
    chip = Chip(xbar_size=8, cell_bits=2, adc_bits=3)
    put_on_chip(network, chip)
    conv = network.blocks[2].conv2
    read = []
    conv.register_forward_hook(lambda _, inputs, sums: read.append((inputs[0], sums.detach())))
    network.train()(x)
    ((spikes, sums),) = read
    codes = conv.quantizer.codes(conv.weight)[0].long()
    N, _, H, W = spikes.shape
    padded = torch.nn.functional.pad(spikes, (1, 1, 1, 1))
    expected = torch.zeros(N, len(codes), H, W)
    for sign in (1, -1):
        stored = (sign * codes).clamp_min(0)
        for slice_ in (0, 1):
            digit = ((stored >> (2 * slice_)) & 3).float()
            for y, z, first in ((y, z, i) for y in range(3) for z in range(3) for i in (0, 8, 16)):
                rows = padded[:, first : first + 8, y : y + H, z : z + W]
                column = torch.einsum("nihw,oi->nohw", rows, digit[:, first : first + 8, y, z])
                expected += sign * 4**slice_ * column.clamp(max=7)
    assert torch.equal(sums, expected)
    assert not torch.equal(sums, conv.convolve(spikes, codes.float()))  # some are clipped


@pytest.mark.parametrize("bits", [2, 4])
def test_on_an_ideal_chip_training_is_that_of_the_plain_student(bits):
    network, x = a_network(bits)
    state = {name: y.clone() for name, y in network.state_dict().items()}
    logits, membranes = network.train()(x, membranes=True)
    network.load_state_dict(state)
    plain = gradients(network, x)
    network.load_state_dict(state)
    put_on_chip(network, IDEAL)
    on_chip, their_membranes = network(x, membranes=True)
    assert all(map(torch.equal, membranes, their_membranes))
    torch.testing.assert_close(on_chip, logits, rtol=1e-5, atol=1e-6)  # scales come later
    network.load_state_dict(state)
    found = gradients(network, x)
    assert found.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_the_gradient_of_a_layer_is_that_of_the_ideal_sums_but_for_what_is_lost():
    conv = QuanConv2d(4, 3, 3, bits=4)
    x = (torch.rand(2, 4, 5, 5) < 0.3).float().requires_grad_()
    upstream = torch.randn(2, 3, 5, 5)
    of = x, conv.weight, conv.quantizer.step
    ideal = torch.autograd.grad(conv(x), of, upstream)
    sevens, half = torch.full((2, 3, 5, 5), 7.0), torch.autograd.grad(conv(x), of, upstream / 2)

    def lost(grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes = conv.quantizer(conv.weight).detach().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(conv.convolve(x, codes), (x, codes), grad / 2)

    for nothing_or_half, expected in ((None, ideal), (lost, half)):
        conv.crossbars = lambda x, codes, lost=nothing_or_half: (sevens, lost)
        sums = conv(x)
        assert torch.equal(sums, sevens)
        found = torch.autograd.grad(sums, of, upstream)
        for its, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(its, theirs, rtol=1e-4, atol=1e-5)


def gradients_by_definition(
    layer: CrossbarLayer, codes: torch.Tensor, x: torch.Tensor, upstream: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """`lost_gradient` crossbar by crossbar and conversion by conversion, with
    autograd in float64; what goes through, not what is lost."""
    chip, cells, k = layer.chip, layer.how, layer.kernel[0]
    x, weights = x.double().requires_grad_(), codes.double().requires_grad_()
    straight, sign = weights - weights.detach(), codes.sign()
    if chip.columns == "differential":
        planes = [
            (1, codes.clamp_min(0), (1 + sign) / 2),
            (-1, (-codes).clamp_min(0), (1 - sign) / 2),
        ]
    else:
        planes = [(1, codes + cells.offset, torch.ones_like(codes))]
    H, W = upstream.shape[2:]
    padding, stride = layer.padding[0], layer.stride[0]

    def read_at(values: torch.Tensor, place: int) -> torch.Tensor:
        group, position = divmod(place, k * k)
        y, z = divmod(position, k)
        padded = torch.nn.functional.pad(values, [padding] * 4)
        rows = padded[:, group * layer.rows : (group + 1) * layer.rows]
        return rows[
            ..., y : y + stride * (H - 1) + 1 : stride, z : z + stride * (W - 1) + 1 : stride
        ]

    def weights_at(values: torch.Tensor, place: int) -> torch.Tensor:
        group, position = divmod(place, k * k)
        return values[:, group * layer.rows : (group + 1) * layer.rows, *divmod(position, k)]

    sums = 0
    for start in range(0, layer.stack, layer.per_reading):
        places = range(start, min(start + layer.per_reading, layer.stack))
        for p, (plane, stored, share) in enumerate(planes):
            columns = stored + share * plane * straight
            ideal = sum(
                torch.einsum("nihw,oi->nohw", read_at(x, r), weights_at(columns, r)) for r in places
            )
            lost = all_of_them = 0
            for s, counts in enumerate(cells.slice_weights.tolist()):
                for bit in range(layer.input_bits):
                    fed = (x.detach().long() >> bit & 1).double()
                    read = 0
                    for r in places:
                        rows = read_at(fed, r)
                        of_slice = layer.cells[p, r, : rows.shape[1], s :: layer.slices].double()
                        read = read + torch.einsum("nihw,io->nohw", rows, of_slice)
                    clipped = (read / layer.adc_step).round() > layer.largest_code
                    lost = lost + counts * 2**bit * clipped
                    all_of_them += counts * 2**bit
            sums = sums + plane * ideal * (1 - lost / all_of_them)
    if chip.columns == "offset":
        ones = torch.ones(1, codes.shape[1], k, k, dtype=torch.float64)
        sums = sums - cells.offset * torch.nn.functional.conv2d(x, ones, None, stride, padding)
    return torch.autograd.grad(sums, (x, weights), upstream)


@settings(max_examples=40, deadline=None, database=None)
@given(
    seed=st.integers(0, 1000),
    reads=st.sampled_from(["spikes", "image", "stream"]),
    kernel=st.sampled_from([1, 3]),
    stride=st.sampled_from([1, 2]),
    chip=st.builds(
        Chip,
        **CHIPS,
        adc_bits=st.sampled_from([None, 1, 2, 4]),
        sigma=st.sampled_from([0.0, 0.3]),
    ),
)
def test_no_gradient_comes_through_what_an_adc_clips(seed, reads, kernel, stride, chip):
    torch.manual_seed(seed)
    codes = torch.randint(-7, 8, (5, 11, kernel, kernel))
    low, high = {"spikes": (0, 2), "image": (0, 256), "stream": (-8, 8)}[reads]
    x = torch.randint(low, high, (2, 11, 5, 5)).float()
    padding = kernel // 2
    size = (4 + stride) // stride
    stem = Layer("stem", 1, 1, 11, (5, 5), (5, 5), 8, ())
    bits = {"spikes": 1, "image": 8, "stream": 4}[reads]
    about = Layer("a", kernel, 11, 5, (5, 5), (size, size), bits, ("stem",))
    how = (stride, stride), (padding, padding)
    generator = torch.Generator().manual_seed(seed)
    layer = CrossbarLayer(
        codes, about, LayerList(1, 4, 4, (stem, about), ()), chip, *how, generator, keep=["clipped"]
    )
    sums = layer(x)
    upstream = torch.randn_like(sums)
    lost = lost_gradient(layer, x, upstream)
    ideal_x, ideal_codes = x.double().requires_grad_(), codes.double().requires_grad_()
    ideal = torch.nn.functional.conv2d(ideal_x, ideal_codes, None, stride, padding)
    ideals = torch.autograd.grad(ideal, (ideal_x, ideal_codes), upstream.double())
    through = gradients_by_definition(layer, codes, x, upstream.double())
    for its, whole, expected in zip(lost, ideals, through, strict=True):
        assert its.shape == expected.shape
        torch.testing.assert_close(whole - its, expected, rtol=1e-4, atol=1e-3)
    if chip.adc_bits == 1 and chip.adc_range == "unit":
        assert all(its.abs().max() > 0 for its in lost)


def test_the_gradient_of_mean_spikes_is_that_of_their_numbers():
    torch.manual_seed(0)
    codes = torch.randint(-127, 128, (5, 11, 1, 1))
    spikes = torch.randint(0, 9, (3, 11)) / 8  # of two timesteps of 2 x 2 pixels
    about = Layer("linear", 1, 11, 5, (2, 2), (1, 1), None, (), linear=True)
    network, chip = LayerList(2, 8, 4, (about,), ()), Chip(xbar_size=8, adc_bits=4)
    layer = CrossbarLayer(codes, about, network, chip, keep=["clipped"])
    upstream = torch.randn_like(layer.of_means(spikes))
    of_spikes, of_codes = lost_gradient_of_means(layer, spikes, upstream)
    numbers = 8 * spikes[..., None, None]
    through = gradients_by_definition(layer, codes, numbers, upstream[..., None, None].double())
    ideal_spikes, ideal_codes = upstream @ codes[..., 0, 0].float(), upstream.T @ spikes
    assert of_codes.abs().max() > 0
    torch.testing.assert_close(ideal_spikes - of_spikes, through[0][..., 0, 0].float())
    torch.testing.assert_close(ideal_codes - of_codes, through[1][..., 0, 0].float() / 8)


def test_cells_are_drawn_anew_in_every_step_and_the_same_in_the_same_step():
    network, x = a_network()
    network.train()
    put_on_chip(network, replace(IDEAL, sigma=0.2))

    def logits(step: int) -> torch.Tensor:
        draw_cells(network, 1, step)
        return network(x).detach()

    first = logits(0)
    assert not torch.equal(logits(1), first)
    assert torch.equal(logits(0), first)
    assert not torch.equal(network(x), first)  # a later part of the same step
    put_on_chip(network, replace(IDEAL, read_noise=0.2))
    first = logits(0)
    assert not torch.equal(logits(1), first)
    assert torch.equal(logits(0), first)
    assert not torch.equal(network(x), first)
    network.eval()
    assert torch.equal(network(x), network(x))  # tested on one chip


def test_less_and_less_variation_ends_at_the_integer_network():
    network, x = a_network()
    network.eval()
    logits = network(x)
    distances = []
    for sigma in (0.1, 1e-3, 1e-7):
        put_on_chip(network, replace(IDEAL, sigma=sigma))
        distances.append((network(x) - logits).abs().max().item())
    assert distances[0] > distances[2]
    put_on_chip(network, replace(IDEAL, sigma=0.0, adc_bits=16))
    _, membranes = network(x, membranes=True)
    simulated, _ = on_crossbars(network, describe(network), IDEAL, seed=0)
    _, ideal = simulated(x, membranes=True)
    assert all(map(torch.equal, membranes, ideal))


# The command.

STUDENT = ["--data", "digits", "--width", "1", "--time_window", "2", "--workers", "0"]
STUDENT += ["--batch_size", "240", "--paper_setting", "student", "--bits", "4"]
STUDENT += ["--epochs", "2", "--deterministic"]
ON_CHIP = [*STUDENT, "--crossbar", "spikesim-65nm", "--sigma", "0.1", "--adc_bits", "4"]


def test_a_training_for_a_chip_is_resumed_tested_on_it_and_told(tmp_path, monkeypatch, capsys):
    def train(folder: Path, *options: str) -> int:
        return main.main([*ON_CHIP, "--save_path", str(folder), *options])

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train(whole) == 0
    with monkeypatch.context() as patch:
        cut_off_after(5, patch)  # of five steps: the epoch's statistics and test are left
        with pytest.raises(PowerCutError):
            train(cut, "--save_every", "1")
    assert "--sigma 0.2 instead of 0.1" in refused(capsys, train, cut, "--resume", "--sigma", "0.2")
    assert train(cut, "--resume") == 0
    assert_same_end(cut, whole)

    # The accuracy that it is chosen by is what the chip's simulation says.
    last = whole / "student-last.pth"
    checkpoint = load_checkpoint(last)
    chip = Chip(sigma=0.1, adc_bits=4)
    assert checkpoint.settings.chip.options("simulation") == chip.options("simulation")
    assert nonideal_report(last, chip)["accuracies"][0] == checkpoint.accuracy
    card = (whole / "student-best.md").read_text()
    assert "| chip | spikesim-65nm: crossbars of 64 x 64, ADCs of 4 bits, sigma 0.1;" in card
    assert "| `sigma` | 0.1 |" in card
    capsys.readouterr()
    assert main.main(["--eval_only", str(last)]) == 0
    assert "digital, but trained for a chip of spikesim-65nm" in capsys.readouterr().out

    told = "spikesim-65nm: crossbars of 64 x 64, ADCs of 4 bits, sigma 0.1"
    assert evaluated(capsys, last)["trained_for"] == told

    # No accuracy of the chip passes for a digital one, and no other chip for that one.
    assert about_of(checkpoint, checkpoint.settings.time_window)["accuracy"] is None
    subject = trace.trace_checkpoint(str(last), test_images=60)
    other = nonideal_report(last, Chip(), test_images=60)
    assert subject.accuracy == other["digital_accuracy"]
    told = f"trained for {told}; here on the chip"
    assert told in "\n".join(nonideal_lines(other))
    assert told in "\n".join(notes([replace(subject, chip_accuracies=[0.5])]))
    monkeypatch.setattr(trace, "evaluation_data", lambda *_: None)
    assert trace.trace_checkpoint(str(last)).accuracy is None


def test_adcs_of_a_layer_that_is_not_there_are_refused():
    network, _ = a_network()
    with pytest.raises(UserError, match="there is no layer 'linaer': did you mean linear"):
        put_on_chip(network, Chip(layer_adc_bits="linaer=3"))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("--paper_setting original --crossbar spikesim-65nm", "--crossbar has no meaning with"),
        ("--paper_setting student --crossbar spikesim-65nm", "needs --bits"),
        ("--paper_setting student --bits 4 --crossbar rram", "no technology 'rram'"),
        ("--paper_setting student --bits 4 --sigma 0.1", "--sigma goes with --crossbar TECHNOLOGY"),
        ("--paper_setting student --bits 4 --crossbar isaac-32nm --adc_bits 17", "adc_bits must"),
        ("--paper_setting student --bits 4 --crossbar isaac-32nm --sigma -1", "sigma must be"),
        ("--paper_setting student --bits 4 --crossbar isaac-32nm --columns x", "columns"),
        (
            "--paper_setting student --bits 8 --crossbar isaac-32nm --xbar_size 8 --cell_bits 1 "
            "--columns_per_adc 8",
            "unrecognized",
        ),
        # of these options no report makes a chip either
        (
            "--paper_setting student --bits 4 --crossbar isaac-32nm --xbar_size 64",
            "columns_per_adc",
        ),
        ("--paper_setting student --bits 4 --crossbar isaac-32nm --adc_bits 12", "at most 10 bits"),
        (
            "--paper_setting student --bits 4 --crossbar spikesim-65nm --after 1h",
            "take a technology that does, as spikesim-65nm-pcm, or write these into a file",
        ),
    ],
)
def test_a_chip_that_cannot_be_trained_for_is_one_line(options, reason, tmp_path, capsys):
    words = ["--data", "digits", "--save_path", str(tmp_path / "run"), *options.split()]
    assert main.main(words) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert reason in said[0]
    assert not (tmp_path / "run").exists()


def test_every_option_of_a_simulated_chip_is_one_of_training_but_for_wires():
    simulated = {name for name, x in CHIP_OPTIONS.items() if x.metadata["part"] != "price"}
    assert simulated - set(OF_CHIP) == {"technology", "on_ohm", "wire_ohm"}


@pytest.mark.parametrize("name", presets())
def test_the_chip_of_a_training_is_that_of_a_report_priced_and_simulated(name):
    settings = Settings.of("digits", "student", bits=4, crossbar=name, sigma=0.3)
    technology = load_technology(name)
    assert technology.options.keys() - CHIP_OPTIONS.keys() == set()
    for option in OF_CHIP:
        expected = technology.options.get(option, CHIP_OPTIONS[option].default)
        assert getattr(settings.chip, option) == (0.3 if option == "sigma" else expected)
    chip = Chip(**options_of(technology) | {"sigma": 0.3})
    for part in ("price", "simulation"):
        assert settings.chip.options(part) == chip.options(part)


def test_another_law_of_drift_in_the_technologys_file_is_another_run(tmp_path, capsys):
    technology, run = tmp_path / "cells.toml", tmp_path / "run"
    said = 'like = "spikesim-65nm-pcm"\n[sources]\nus = "us"\n[device]\n'

    def train(drift: float, *options: str) -> int:
        entry = f'drift = {{ value = {drift}, source = "us" }}\n'
        technology.write_text(said + entry)
        chip = "--crossbar", str(technology), "--after", "1h"
        return main.main([*ON_CHIP, *chip, "--save_path", str(run), *options])

    assert train(0.05) == 0
    assert train(0.5, "--resume", "--epochs", "2") == 2
    assert f"other device.* values of {technology}" in capsys.readouterr().err
    assert train(0.05, "--resume", "--epochs", "2") == 0
    assert "after 1h" in (run / "student-best.md").read_text()

    # The next command simulates the chip that the network is chosen on.
    best = run / "student-best.pth"
    report = shlex.split(next_commands(load_checkpoint(best).settings, best)[1])
    assert report[1:3] == ["-m", "spikesim_eval"]
    assert spikesim_eval.__main__.main([*report[3:], "--trials", "1"]) == 0
    figures = json.loads((run / "report" / "report.json").read_text())
    assert load_checkpoint(best).accuracy in figures["chip_accuracies"]
