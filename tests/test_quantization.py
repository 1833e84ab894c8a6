"""Quantizers: codes and gradients by hand, and the laws that every quantizer obeys."""

from fractions import Fraction
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from models.integer_network import round_shift
from models.neuron import DEFAULT_NEURON, LIF, Neuron
from models.quantized_layers import QuanConv2d, QuanLinear
from quantization import (
    BatchNormQuantizer,
    ImageQuantizer,
    MembraneQuantizer,
    StreamQuantizer,
    WeightQuantizer,
    membrane_step_grid,
    membrane_steps,
    signed_range,
    symmetric_range,
)

THRESHOLD = DEFAULT_NEURON.threshold
BITS = (2, 3, 4, 5, 6, 7, 8)
VALUES = arrays("float64", (2, 6), elements=st.floats(-50, 50))


def learned_quantizers(bits: int, device: torch.device):
    torch.manual_seed(0)
    quantizers = (
        MembraneQuantizer(bits, THRESHOLD),
        StreamQuantizer(bits, THRESHOLD),
        WeightQuantizer(bits, torch.randn(2, 6)),
    )
    return [quantizer.double().to(device) for quantizer in quantizers]


def test_ranges_of_the_codes():
    assert [signed_range(b) for b in (2, 4, 8)] == [(-2, 1), (-8, 7), (-128, 127)]
    assert [symmetric_range(b) for b in (2, 4, 8)] == [(-1, 1), (-7, 7), (-127, 127)]


@given(values=VALUES, bits=st.sampled_from(BITS))
def test_codes_are_in_range_and_quantizing_twice_changes_nothing(values, bits, device):
    x = torch.from_numpy(values).to(device)
    for quantizer in learned_quantizers(bits, device):
        codes, scale = quantizer.codes(x)
        assert codes.dtype == torch.int32
        assert codes.min() >= quantizer.low
        assert codes.max() <= quantizer.high
        assert torch.equal(quantizer(x), codes.double())
        assert torch.equal(quantizer(codes * scale), codes.double())


@given(values=VALUES, bits=st.sampled_from(BITS))
def test_quantizing_keeps_the_order_of_values(values, bits, device):
    x = torch.from_numpy(values).sort(dim=1).values.to(device)
    for quantizer in learned_quantizers(bits, device):
        assert (quantizer(x).diff(dim=1) >= 0).all()


@given(values=VALUES, bits=st.sampled_from(BITS))
def test_inside_the_range_the_error_is_at_most_half_a_step(values, bits, device):
    x = torch.from_numpy(values).to(device)
    for quantizer in learned_quantizers(bits, device):
        step = quantizer.used_step()
        inside = (x >= quantizer.low * step) & (x <= quantizer.high * step)
        error = (quantizer(x) - x / step).abs()[inside]
        assert (error <= 0.5 + 1e-9).all()


def test_gradients_of_lsq_by_hand(device):
    # step 0.5, codes -2 … 1: x/step = -2.6 (below), -0.8, 0.6 (inside), 3 (above)
    quantizer = MembraneQuantizer(2, THRESHOLD).double().to(device)
    quantizer.smallest_step.zero_()
    with torch.no_grad():
        quantizer.step.fill_(0.5)
    values = [[-1.3, -0.4, 0.3, 1.5]]
    x = torch.tensor(values, dtype=torch.float64, device=device, requires_grad=True)
    (quantizer(x) * quantizer.positive_step(4)).sum().backward()
    assert x.grad.tolist() == [[0, 1, 1, 0]]
    by_hand = -2 + (-1 + 0.8) + (1 - 0.6) + 1
    scale = 1 / (4 * 1) ** 0.5  # 1/√(N · high)
    assert quantizer.step.grad.item() == pytest.approx(by_hand * scale)


def test_each_output_channel_of_a_weight_has_its_own_step_and_gradient():
    weight = torch.tensor([[[[0.1, -0.1]]], [[[10.0, -10.0]]]])
    quantizer = WeightQuantizer(4, weight)
    first, second = quantizer.step.flatten().tolist()
    assert second == pytest.approx(100 * first)
    assert first == pytest.approx(2 * 0.1 / 7**0.5)
    quantizer(weight).square().sum().backward()
    assert quantizer.step.grad.shape == (2, 1, 1, 1)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    "neuron", [DEFAULT_NEURON, Neuron(1 / 64, 0.01), Neuron(0.3, 0.3), Neuron(1.0, 4.0, "soft")]
)
def test_a_layer_can_fire_at_every_width_whatever_its_step_has_become(neuron, bits):
    for step in (None, 0.0, -1.0, 1e-9, 5.0):
        grid = membrane_step_grid(neuron.leak)
        lif = LIF(neuron, MembraneQuantizer(bits, neuron.threshold, step_grid=grid))
        if step is not None:
            with torch.no_grad():
                lif.quantizer.step.fill_(step)
        assert lif(torch.full((1, 3), 10.0), 1).all()
        assert not lif(torch.full((1, 3), -10.0), 1).any()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("step", [0.0, -50.0])
def test_a_weight_step_that_crossed_zero_leaves_weights_that_learn(bits, step):
    torch.manual_seed(0)
    weight = torch.randn(3, 20, requires_grad=True)
    quantizer = WeightQuantizer(bits, weight)
    with torch.no_grad():
        quantizer.step.fill_(step)
    (quantizer(weight) * torch.randn(3, 20)).sum().backward()
    assert (weight.grad != 0).any(dim=1).all()
    assert (quantizer.step.grad != 0).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("threshold", [0.3, THRESHOLD, 4.0])
def test_the_largest_membrane_code_starts_at_twice_the_threshold_and_stays_above_it(
    threshold, bits
):
    quantizer = MembraneQuantizer(bits, threshold)
    largest = quantizer.high * quantizer.used_step()
    assert largest.item() == pytest.approx(2 * threshold, rel=0.05)  # steps lie on a grid
    with torch.no_grad():
        quantizer.step.fill_(0.0)
    assert quantizer.high * quantizer.used_step() >= 1.25 * threshold


@given(st.sampled_from(BITS), st.floats(0.1, 4), st.floats(-30, 30))
def test_rounding_to_one_of_the_membrane_steps_changes_no_spike(bits, threshold, u):
    steps, (low, high) = membrane_steps(bits, threshold), signed_range(bits)
    for step in steps:
        code = max(low, min(high, round(u / step)))
        if abs(u - threshold) > 1e-9:  # there the threshold is where rounding goes up or down
            assert (code * step > threshold) == (u > threshold)
    assert len(steps) == bits - 1
    assert steps[0] * high == pytest.approx(2 * threshold)
    assert steps[-1] == pytest.approx(2 * threshold)
    assert all(longer >= 2 * step for step, longer in pairwise(steps))


def test_a_step_below_its_smallest_value_still_learns():
    quantizer = StreamQuantizer(4, THRESHOLD)
    with torch.no_grad():
        quantizer.step.fill_(-1.0)
    assert quantizer.used_step() >= quantizer.smallest_step > 0
    (quantizer(torch.ones(1, 8)) * quantizer.positive_step(8)).sum().backward()
    assert quantizer.step.grad > 0


def test_the_8_bit_image_is_exact_for_8_bit_pixels_and_for_event_counts(device):
    pixels = (torch.arange(256) / 255).to(device)
    assert ImageQuantizer(1 / 255)(pixels).tolist() == list(range(256))
    counts = torch.tensor([0.0, 1, 7, 255, 300], device=device)
    assert ImageQuantizer(1.0)(counts).tolist() == [0, 1, 7, 255, 255]


@given(
    values=arrays("float64", (2, 5), elements=st.floats(-100, 100)),
    bits=st.sampled_from((2, 4, 8, 16)),
)
def test_batch_norm_codes_share_a_power_of_two_and_lose_at_most_half_a_step(values, bits, device):
    quantizer = BatchNormQuantizer(bits)
    x = torch.from_numpy(values).to(device)
    quantized = quantizer(*x)
    for original, result, (codes, step) in zip(x, quantized, quantizer.codes(*x), strict=True):
        assert codes.abs().max() <= quantizer.high
        assert torch.equal(codes, codes.round())
        assert torch.frexp(step).mantissa == 0.5  # a power of two
        assert torch.equal(codes * step, result)
        inside = original.abs() <= quantizer.high * step
        assert inside.all()
        assert ((result - original).abs() <= step / 2).all()


def test_a_convolution_gives_integer_accumulators_and_a_linear_layer_scaled_ones(device):
    torch.manual_seed(0)
    conv = QuanConv2d(3, 4, 3, bits=4).to(device)
    linear = QuanLinear(3, 4, bits=8).to(device)
    spikes = (torch.rand(2, 3, 5, 5) < 0.3).double()
    codes, _ = conv.quantizer.codes(conv.weight)
    accumulators = F.conv2d(spikes, codes.cpu().double(), padding=1)
    found = conv(spikes.float().to(device)).cpu()
    # On a GPU a fast algorithm may leave them off by a little: the batch norm behind rounds.
    torch.testing.assert_close(found, accumulators.float(), rtol=0, atol=0.01)
    assert device.type == "cuda" or torch.equal(found, accumulators.float())
    codes, scale = linear.quantizer.codes(linear.weight)
    x = torch.randn(2, 3, device=device)
    torch.testing.assert_close(linear(x), x @ (codes * scale).T + linear.bias)


def test_gradients_of_integer_weights_before_a_batch_norm_are_those_of_scaled_ones(device):
    # A batch norm undoes a channel's scale, so codes and codes · step must train alike.
    torch.manual_seed(0)
    x, target = (torch.randn(8, *shape).double().to(device) for shape in ((3, 6, 6), (4, 4, 4)))
    gradients = []
    for scaled in (False, True):
        torch.manual_seed(1)
        conv = QuanConv2d(3, 4, 3, bits=4).double().to(device)
        weight = conv.quantizer(conv.weight)
        if scaled:
            weight = weight * conv.quantizer.positive_step(conv.weight[0].numel())
        y = F.batch_norm(F.conv2d(x, weight), None, None, training=True, eps=1e-30)
        (y * target).sum().backward()
        gradients += [conv.weight.grad, conv.quantizer.step.grad]
    torch.testing.assert_close(gradients[:2], gradients[2:], rtol=1e-9, atol=1e-9)


@given(values=st.lists(st.integers(-(2**40), 2**40), min_size=1), divisor=st.integers(1, 2**20))
def test_round_shift_is_division_rounded_half_to_even(values, divisor, device):
    result = round_shift(torch.tensor(values, device=device), divisor).tolist()
    assert result == [round(Fraction(value, divisor)) for value in values]
