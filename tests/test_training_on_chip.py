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
from conftest import evaluated, refused
from engine.log import next_commands
from exchange.__main__ import about_of
from models import QuanMSResNet
from models.quantized_layers import QuanConv2d
from runtime.errors import UserError
from settings import OF_CHIP, Settings
from spikesim_eval import trace
from spikesim_eval.chip import OPTIONS as CHIP_OPTIONS
from spikesim_eval.chip import Chip
from spikesim_eval.compare import notes
from spikesim_eval.nonideal import nonideal_lines, nonideal_report, on_crossbars
from spikesim_eval.technology import load_technology
from spikesim_eval.trace import describe
from spikesim_eval.training import draw_cells, put_on_chip
from test_resume import PowerCutError, assert_same_end, cut_off_after

IDEAL = Chip(adc_bits=None)


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
        xbar_size=st.sampled_from([8, 64]),
        cell_bits=st.sampled_from([1, 2, 4]),
        columns=st.sampled_from(["differential", "offset"]),
        adc_bits=st.sampled_from([None, 2, 4]),
        adc_of=st.sampled_from(["crossbar", "pe"]),
        adc_range=st.sampled_from(["unit", "full"]),
        on_off_ratio=st.sampled_from([10.0, math.inf]),
        sigma=st.sampled_from([0.0, 0.1]),
        layer_adc_bits=st.sampled_from(["", "stem.conv=3,blocks.2.conv1=2"]),
    ),
)
def test_a_trained_network_is_evaluated_as_nonideal_simulates_it(bits, chip):
    network, x = a_network(bits)
    simulated, _ = on_crossbars(network, describe(network), chip, seed=0)
    put_on_chip(network, chip)
    logits, membranes = network.eval()(x, membranes=True)
    theirs, their_membranes = simulated(x, membranes=True)
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


def test_the_gradient_of_a_layer_is_that_of_the_ideal_sums():
    conv = QuanConv2d(4, 3, 3, bits=4)
    x = (torch.rand(2, 4, 5, 5) < 0.3).float().requires_grad_()
    upstream = torch.randn(2, 3, 5, 5)
    ideal = torch.autograd.grad(conv(x), (x, conv.weight, conv.quantizer.step), upstream)
    conv.crossbars = lambda x, codes: torch.full((2, 3, 5, 5), 7.0)
    sums = conv(x)
    assert torch.equal(sums, torch.full((2, 3, 5, 5), 7.0))
    found = torch.autograd.grad(sums, (x, conv.weight, conv.quantizer.step), upstream)
    assert all(map(torch.equal, found, ideal))


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

STUDENT = ["--data", "digits", "--width", "1", "--batch_size", "240", "--workers", "0"]
STUDENT += ["--paper_setting", "student", "--bits", "4", "--epochs", "2", "--deterministic"]
ON_CHIP = [*STUDENT, "--crossbar", "spikesim-65nm", "--sigma", "0.1", "--adc_bits", "4"]


@pytest.fixture(autouse=True)
def nondeterministic_again():
    yield
    torch.use_deterministic_algorithms(False)


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
    assert nonideal_report(str(last), None, chip)["accuracies"][0] == checkpoint.accuracy
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
    subject, other = trace.trace_checkpoint(str(last)), nonideal_report(str(last), None, Chip())
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
    settings = Settings.of("digits", "student", bits=4, crossbar="neurosim-22nm", sigma=0.3)
    technology = load_technology("neurosim-22nm")
    assert technology.options.keys() - CHIP_OPTIONS.keys() == set()
    for name in OF_CHIP:
        expected = technology.options.get(name, CHIP_OPTIONS[name].default)
        assert getattr(settings.chip, name) == (0.3 if name == "sigma" else expected)


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
