"""Quantizers: codes and gradients by hand, and the laws that every quantizer obeys."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from models.neuron import LIF, THRESHOLD
from quantization import (
    BatchNormQuantizer,
    ImageQuantizer,
    MembraneQuantizer,
    QuanConv2d,
    QuanLinear,
    StreamQuantizer,
    WeightQuantizer,
    signed_range,
    symmetric_range,
)

BITS = (2, 3, 4, 5, 6, 7, 8)
VALUES = arrays("float64", (2, 6), elements=st.floats(-50, 50))


def learned_quantizers(bits: int):
    torch.manual_seed(0)
    return [
        MembraneQuantizer(bits, THRESHOLD).double(),
        StreamQuantizer(bits, THRESHOLD).double(),
        WeightQuantizer(bits, torch.randn(2, 6)).double(),
    ]


def test_ranges_of_the_codes():
    assert [signed_range(b) for b in (2, 4, 8)] == [(-2, 1), (-8, 7), (-128, 127)]
    assert [symmetric_range(b) for b in (2, 4, 8)] == [(-1, 1), (-7, 7), (-127, 127)]


@given(values=VALUES, bits=st.sampled_from(BITS))
def test_codes_are_in_range_times_scale_is_the_value_and_quantizing_twice_changes_nothing(
    values, bits
):
    x = torch.from_numpy(values)
    for quantizer in learned_quantizers(bits):
        codes, scale = quantizer.codes(x)
        assert codes.dtype == torch.int32
        assert codes.min() >= quantizer.low
        assert codes.max() <= quantizer.high
        quantized = quantizer(x)
        torch.testing.assert_close(codes * scale, quantized, rtol=1e-12, atol=0)
        torch.testing.assert_close(quantizer(quantized), quantized, rtol=1e-12, atol=0)


@given(values=VALUES, bits=st.sampled_from(BITS))
def test_quantizing_keeps_the_order_of_values(values, bits):
    x = torch.from_numpy(values).sort(dim=1).values
    for quantizer in learned_quantizers(bits):
        assert (quantizer(x).diff(dim=1) >= 0).all()


@given(values=VALUES, bits=st.sampled_from(BITS))
def test_inside_the_range_the_error_is_at_most_half_a_step(values, bits):
    x = torch.from_numpy(values)
    for quantizer in learned_quantizers(bits):
        step = quantizer.positive_step(1)
        inside = (x >= quantizer.low * step) & (x <= quantizer.high * step)
        error = ((quantizer(x) - x).abs() / step)[inside]
        assert (error <= 0.5 + 1e-9).all()


def test_gradients_of_lsq_by_hand():
    # step 0.5, codes -2 … 1: x/step = -2.6 (below), -0.8, 0.6 (inside), 3 (above)
    quantizer = MembraneQuantizer(2, THRESHOLD).double()
    quantizer.smallest_step = 1e-6
    with torch.no_grad():
        quantizer.step.fill_(0.5)
    x = torch.tensor([[-1.3, -0.4, 0.3, 1.5]], dtype=torch.float64, requires_grad=True)
    quantizer(x).sum().backward()
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
def test_a_layer_can_fire_at_every_width_whatever_its_step_has_become(bits):
    for step in (None, 0.0, -1.0, 1e-9, 5.0):
        lif = LIF(MembraneQuantizer(bits, THRESHOLD))
        if step is not None:
            with torch.no_grad():
                lif.quantizer.step.fill_(step)
        assert lif(torch.full((1, 3), 10.0), 1).all()
        assert not lif(torch.full((1, 3), -10.0), 1).any()


@pytest.mark.parametrize("bits", BITS)
def test_the_largest_membrane_code_starts_at_twice_the_threshold(bits):
    quantizer = MembraneQuantizer(bits, THRESHOLD)
    assert (quantizer.high * quantizer.step).item() == pytest.approx(2 * THRESHOLD)


def test_a_step_below_its_smallest_value_still_learns():
    quantizer = StreamQuantizer(4, THRESHOLD)
    with torch.no_grad():
        quantizer.step.fill_(-1.0)
    assert quantizer.positive_step(1).item() == pytest.approx(quantizer.smallest_step, 0.1)
    quantizer(torch.ones(1, 8)).sum().backward()
    assert quantizer.step.grad > 0


def test_the_8_bit_image_is_exact_for_8_bit_pixels_and_for_event_counts():
    pixels = torch.arange(256) / 255
    torch.testing.assert_close(ImageQuantizer(1 / 255)(pixels), pixels, rtol=1e-6, atol=0)
    codes, _ = ImageQuantizer(1 / 255).codes(pixels)
    assert codes.tolist() == list(range(256))
    counts = torch.tensor([0.0, 1, 7, 255, 300])
    assert ImageQuantizer(1.0)(counts).tolist() == [0, 1, 7, 255, 255]


@given(
    values=arrays("float64", (2, 5), elements=st.floats(-100, 100)),
    bits=st.sampled_from((2, 4, 8, 16)),
)
def test_batch_norm_codes_share_a_power_of_two_and_lose_at_most_half_a_step(values, bits):
    quantizer = BatchNormQuantizer(bits)
    x = torch.from_numpy(values)
    quantized = quantizer(*x)
    for original, result, (codes, step) in zip(x, quantized, quantizer.codes(*x), strict=True):
        assert codes.abs().max() <= quantizer.high
        assert torch.equal(codes, codes.round())
        assert torch.frexp(step).mantissa == 0.5  # a power of two
        assert torch.equal(codes * step, result)
        assert ((result - original).abs() <= step / 2).all()


@pytest.mark.parametrize(
    "layer", [QuanConv2d(3, 4, 3, bias=False, bits=4), QuanLinear(3, 4, bits=8)]
)
def test_a_layer_computes_with_integer_weights_times_a_scale(layer):
    codes, scale = layer.quantizer.codes(layer.weight)
    x = torch.randn(2, 3, 5, 5) if isinstance(layer, QuanConv2d) else torch.randn(2, 3)
    with torch.no_grad():
        y = layer(x)
        layer.weight.copy_(codes * scale)
        plain = super(type(layer), layer).forward(x)
    torch.testing.assert_close(y, plain)
