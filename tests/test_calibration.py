"""Calibration: the best step of an ADC, batch norms of the chip's own sums, and what it wins."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints import load_checkpoint
from models import QuanMSResNet
from models.batch_norm import BatchNorm
from settings import OF_CHIP, Settings
from spikesim_eval.calibration import (
    calibrate,
    calibrate_sums,
    calibration_of,
    lost_share,
    scale_and_shift,
)
from spikesim_eval.chip import Chip
from spikesim_eval.nonideal import on_chip, on_crossbars
from spikesim_eval.trace import describe, trace_checkpoint
from test_nonideal import on_chip as one_layer
from test_nonideal import random_layer


def a_network() -> tuple[QuanMSResNet, torch.Tensor]:
    torch.manual_seed(0)
    network = QuanMSResNet(18, 5, 2, 2, 6, bits=4)
    x = torch.rand(16, 2, 8, 8)
    for _ in range(20):
        network(x)
    network.input_shape = tuple(x[0].shape)
    return network.eval(), x


def channels(numbers: list[list[float]]) -> torch.Tensor:
    """(N, O, 1, 1) of so many numbers of each channel."""
    return torch.tensor(numbers).T[..., None, None]


NUMBERS = st.lists(
    st.lists(st.integers(-9, 9), min_size=6, max_size=6), min_size=2, max_size=2
).filter(lambda x: all(len(set(channel)) > 1 for channel in x))


@settings(max_examples=50, deadline=None, database=None)
@given(NUMBERS, NUMBERS, st.floats(0.01, 100), st.integers(-50, 50))
def test_what_is_lost_is_what_no_scale_and_shift_brings_back(sums, ideal, scale, shift):
    expected = [1 - np.corrcoef(a, b)[0, 1] ** 2 for a, b in zip(sums, ideal, strict=True)]
    sums, ideal = channels(sums).double(), channels(ideal).double()
    assert lost_share(sums, ideal) == pytest.approx(np.mean(expected))
    changed = sums * torch.tensor([scale, 1.0])[:, None, None] + shift
    assert lost_share(changed, ideal) == pytest.approx(np.mean(expected))
    by, more = scale_and_shift(changed.flatten(1), ideal.flatten(1))
    back = changed.flatten(1) * by + more
    off = (back - ideal.flatten(1)).square().mean(0) / ideal.flatten(1).var(0, correction=0)
    assert off.tolist() == pytest.approx(expected)


def test_a_channel_that_says_nothing_is_lost():
    ideal = channels([[1.0, 2, 3], [1, 2, 4]])
    silent = channels([[1.0, 2, 3], [7, 7, 7]])
    assert lost_share(ideal, ideal) == pytest.approx(0)
    assert lost_share(silent, ideal) == pytest.approx(0.5)
    scale, shift = scale_and_shift(silent.flatten(1), ideal.flatten(1))
    assert scale.tolist() == pytest.approx([1, 0])
    assert shift.tolist() == pytest.approx([0, 7 / 3])


def test_a_channel_of_small_weights_is_not_rounded_away():
    """A step of 3 would be right for all columns but those of the first channel, and is off the
    least; of the first channel nothing would be left. Below 2 batch norms lose nothing."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2, (8, 1, 3, 3), generator=generator) * 2 - 1
    codes[1:] *= 3
    x = torch.randint(0, 2, (9, 1, 8, 8), generator=generator).double()
    layer = one_layer(codes, 3, Chip(adc_bits=1))
    ideal = layer.ideal_sums(x)
    off = [(layer.trial(x, step) - ideal).square().mean() for step in (1, 3)]
    assert off[1] < off[0]
    calibrate_sums(layer, x)
    assert layer.adc_step == 2**0.5  # the largest below 2, of which half is a code of theirs
    assert lost_share(layer(x), ideal) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_no_other_step_that_is_tried_loses_less(bits):
    layer, _, x = random_layer(Chip(adc_bits=bits, sigma=0.2), keep=())
    calibrate_sums(layer, x)
    ideal = layer.ideal_sums(x)
    lost = lost_share(layer(x), ideal)
    for step in (0.25, 0.5, 1.0, 2.0, 4.0, 8.0):  # 8 reaches 6 rows of 3, in cells of 2 bits
        assert lost <= lost_share(layer.trial(x, step), ideal) + 1e-12


def test_of_steps_that_lose_nothing_the_largest_is_taken():
    layer, _, x = random_layer(Chip(adc_bits=16), keep=())
    calibrate_sums(layer, x)
    assert layer.adc_step == 1


def test_cells_that_lost_most_of_their_conductance_are_read_in_smaller_steps():
    layer, _, x = random_layer(Chip(adc_bits=8), keep=())
    layer.cells *= 0.3
    ideal = layer.ideal_sums(x)
    calibrate_sums(layer, x)
    assert layer.adc_step < 0.3
    assert lost_share(layer(x), ideal) < 0.5 * lost_share(layer.trial(x, 1.0), ideal)


def test_what_a_classifier_on_a_chip_is_off_by_scale_and_shift_comes_back():
    network, x = a_network()
    chip = Chip(adc_bits=3, sigma=0.2)
    placed, layers = on_crossbars(network, describe(network), chip, seed=0, only=["linear"])
    with torch.no_grad():
        ideal, made = network(x), placed(x)
        layers["linear"].before = calibrate_sums
        placed(x)
        layers["linear"].before = None
        calibrated = placed(x)
    assert (calibrated - ideal).square().sum() < (made - ideal).square().sum()
    torch.testing.assert_close(calibrated.mean(0), ideal.mean(0))  # as least squares have it


def test_a_trial_counts_nothing_and_keeps_nothing():
    layer, _, x = random_layer(Chip(adc_bits=2), keep=["errors", "largest", "sums"])
    layer(x)
    names = "counts", "sums", "largest_sum", "squared_error", "squared_output"
    before = copy.deepcopy([getattr(layer, name) for name in names])
    sums = layer.trial(x, 4.0)
    after = [getattr(layer, name) for name in names]
    assert all(
        torch.equal(a, b) if name == "sums" else a == b
        for name, a, b in zip(names, after, before, strict=True)
    )
    assert layer.adc_step == 4
    torch.testing.assert_close(layer(x), sums)


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


def test_adcs_are_calibrated_layer_by_layer_and_nothing_of_it_is_counted():
    network, x = a_network()
    placed, layers = on_crossbars(network, describe(network), Chip(adc_bits=2, sigma=0.1), seed=0)
    calibrate(placed, layers.values(), x, [2])
    assert not placed.training
    assert all(layer.before is None for layer in layers.values())
    assert {layer.counts.images for layer in layers.values()} == {16, 32}  # a static stem's once
    assert len({layer.adc_step for layer in layers.values()}) > 1


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
