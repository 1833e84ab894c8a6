"""Calibration: the best step of an ADC, batch norms of the chip's own sums, and what it wins."""

import copy
import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints import load_checkpoint
from models import QuanMSResNet
from models.batch_norm import BatchNorm
from settings import OF_CHIP, Settings
from spikesim_eval.__main__ import main
from spikesim_eval.calibration import best_step, calibrate, calibration_of
from spikesim_eval.chip import Chip
from spikesim_eval.crossbar import convert
from spikesim_eval.nonideal import on_chip, on_crossbars
from spikesim_eval.trace import describe, trace_checkpoint


def a_network() -> tuple[QuanMSResNet, torch.Tensor]:
    torch.manual_seed(0)
    network = QuanMSResNet(18, 5, 2, 2, 6, bits=4)
    x = torch.rand(16, 2, 8, 8)
    for _ in range(20):
        network(x)
    network.input_shape = tuple(x[0].shape)
    return network.eval(), x


@settings(max_examples=30, deadline=None, database=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=80), st.integers(1, 6))
def test_no_other_step_of_an_adc_is_off_less(counts, bits):
    counts = torch.tensor(counts)
    sums = torch.arange(len(counts)).double()

    def error(step: float) -> float:
        return (counts * (convert(sums, step, bits) - sums).square()).sum().item()

    found = best_step(counts, bits)
    assert found >= 1
    assert error(found) <= error(1.0)  # that of --adc_range unit
    assert error(found) <= error(max(1.0, (len(counts) - 1) / (2**bits - 1))) + 1e-9  # of all
    if len(counts) <= 2**bits:
        assert error(found) == 0


def test_a_perfect_chip_is_calibrated_to_the_batch_norms_of_the_digital_network():
    network, x = a_network()
    placed, layers = on_crossbars(network, describe(network), Chip(adc_bits=None), seed=0)
    calibrate(placed, layers.values(), x, [2])
    digital = copy.deepcopy(network).train()
    for module in digital.modules():
        if isinstance(module, BatchNorm):
            module.momentum = 1.0
    digital(x)
    theirs = [m for m in placed.modules() if isinstance(m, BatchNorm)]
    ours = [m for m in digital.modules() if isinstance(m, BatchNorm)]
    for a, b in zip(theirs, ours, strict=True):
        torch.testing.assert_close(a.running_mean, b.running_mean)
        torch.testing.assert_close(a.running_var, b.running_var)


def test_calibrated_adcs_are_off_less_layer_by_layer_and_nothing_of_it_is_counted():
    network, x = a_network()
    chip = Chip(adc_bits=2, sigma=0.1)
    keep = ["errors"]
    placed, layers = on_crossbars(network, describe(network), chip, seed=0, keep=keep)
    calibrate(placed, layers.values(), x, [2])
    assert not placed.training
    assert all(layer.before is None for layer in layers.values())
    assert {layer.counts.images for layer in layers.values()} == {16, 32}  # a static stem's once
    made, others = on_crossbars(network, describe(network), chip, seed=0, keep=keep)
    made(x)
    # The first layer reads the same in both.
    assert layers["stem.conv"].adc_step > 1
    assert layers["stem.conv"].relative_error < others["stem.conv"].relative_error


def test_adcs_stay_where_a_network_was_trained_with_them(trained):
    checkpoint = load_checkpoint(trained["student"])
    chip = Chip(adc_bits=2, sigma=0.1)
    subject = trace_checkpoint(str(trained["student"]))

    def calibrated(settings: Settings) -> tuple[list[float], dict[str, float]]:
        prepare = calibration_of(checkpoint._replace(settings=settings), None, 32)
        accuracies, (layers,) = on_chip(subject, chip, prepare=prepare)
        return accuracies, {name: layer.adc_step for name, layer in layers.items()}

    plain, steps = calibrated(checkpoint.settings)
    assert max(steps.values()) > 1
    of_chip = dataclasses.asdict(Settings.of("digits", "student", bits=4, crossbar="spikesim-65nm"))
    of_chip = {name: of_chip[name] for name in ("crossbar", *OF_CHIP)}
    accuracies, steps = calibrated(dataclasses.replace(checkpoint.settings, **of_chip))
    assert set(steps.values()) == {1.0}
    as_made, _ = on_chip(subject, chip)
    assert accuracies not in (plain, as_made)  # batch norms are


def test_the_command_says_what_calibration_wins(trained, tmp_path, capsys):
    line = f"calibrate --checkpoint {trained['qamd']} --adc_bits 2 --trials 1 --images 32"
    assert main([*line.split(), "--out", str(tmp_path)]) == 0
    assert "calibrated (32 images)" in capsys.readouterr().out
    found = json.loads((tmp_path / "calibration.json").read_text())
    assert len(found["accuracies_before"]) == len(found["accuracies_after"]) == 1
    assert max(max(steps) for steps in found["adc_steps"].values()) > 1


@pytest.mark.parametrize(
    ("option", "reason"),
    [("--images 0", "images must be"), ("--images 9999", "there are 1437 training images")],
)
def test_images_that_are_not_there_are_one_line(trained, option, reason, tmp_path, capsys):
    line = f"calibrate --checkpoint {trained['student']} {option} --out {tmp_path}"
    assert main(line.split()) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert reason in said[0]
