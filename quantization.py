"""Quantizers: what a crossbar or an adder sees is an integer code times a scale.

Gradients are straight-through, learned steps follow LSQ (Esser et al., arXiv 1902.08153, eq. 1-3):

    x̂ = step · clamp(round(x / step), low, high)
    ∂x̂/∂x    = 1 inside the range, 0 outside
    ∂x̂/∂step = round(x/step) - x/step inside the range, low or high outside

and the step's gradient is scaled by 1/√(N · high), N the number of values that share the step
within one sample. Every quantizer has `codes(x)`, which returns the integers and their scale.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OFF = 32  # this many bits and more: nothing is quantized


def signed_range(bits: int) -> tuple[int, int]:
    """Codes of two's complement."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def symmetric_range(bits: int) -> tuple[int, int]:
    """Codes of a signed number whose range is symmetric, as stored in a crossbar."""
    high = 2 ** (bits - 1) - 1
    return -high, high


def integer_codes(x: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    """clamp(round(x / step), low, high), halves rounded to even; the dtype of x."""
    return torch.round(x / step).clamp_(low, high)


def fake_quantize_backward(
    grad: Tensor, x: Tensor, step: Tensor, low: int, high: int
) -> tuple[Tensor, Tensor]:
    """LSQ gradients of `step · integer_codes(x)` with respect to x and to the step (arXiv
    1902.08153, eq. 3 and 5). The second is per element: sum it over the values of each step."""
    scaled = x / step
    inside = (scaled > low) & (scaled < high)
    codes = torch.round(scaled).clamp_(low, high)
    return grad * inside, grad * (codes - scaled * inside)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, step: Tensor, low: int, high: int) -> Tensor:
        ctx.save_for_backward(x, step)
        ctx.range = low, high
        return integer_codes(x, step, low, high) * step

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, step = ctx.saved_tensors
        grad_x, grad_step = fake_quantize_backward(grad, x, step, *ctx.range)
        return grad_x, grad_step.sum_to_size(step.shape), None, None


class Quantizer(nn.Module):
    """A uniform quantizer with one learned step, or one per leading index of `step_shape`.

    The step stays at or above `smallest_step` in the forward pass, whatever the optimizer does.
    """

    def __init__(
        self,
        code_range: tuple[int, int],
        step: float,
        step_shape: tuple[int, ...] = (),
        smallest_step: float = 1e-6,
    ):
        super().__init__()
        self.low, self.high = code_range
        self.smallest_step = smallest_step
        self.step = nn.Parameter(torch.full(step_shape, step))

    def positive_step(self, values_per_step: int) -> Tensor:
        """The step as used, with LSQ's gradient scale for `values_per_step` values."""
        scale = 1 / math.sqrt(values_per_step * self.high)
        step = self.step * scale + (self.step * (1 - scale)).detach()
        return step + (self.smallest_step - step).clamp_min(0).detach()

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize a batch (B, ...) with one step."""
        return _FakeQuantize.apply(x, self.positive_step(x[0].numel()), self.low, self.high)

    @torch.no_grad()
    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Integer codes (int32, shape of x) and their scale: x̂ = codes · scale."""
        step = self.positive_step(1)
        return integer_codes(x, step, self.low, self.high).int(), step


class WeightQuantizer(Quantizer):
    """b bits, symmetric, one step per output channel, started from the weights as LSQ does."""

    def __init__(self, bits: int, weight: Tensor):
        self.bits = bits
        super().__init__(symmetric_range(bits), 1.0, (len(weight),) + (1,) * (weight.dim() - 1))
        self.start_from(weight)

    @torch.no_grad()
    def start_from(self, weight: Tensor) -> None:
        """Set the steps to LSQ's 2·mean|w| / √high of each output channel."""
        mean = weight.abs().mean(dim=tuple(range(1, weight.dim())), keepdim=True)
        self.step.copy_((2 * mean / math.sqrt(self.high)).clamp_min(self.smallest_step))

    def forward(self, weight: Tensor) -> Tensor:
        step = self.positive_step(weight[0].numel())
        return _FakeQuantize.apply(weight, step, self.low, self.high)


class MembraneQuantizer(Quantizer):
    """b bits, two's complement, one step a layer, started so that the largest code is 2·threshold.

    The largest code never falls below 1.25·threshold, so that the layer can always fire.
    """

    def __init__(self, bits: int, threshold: float):
        high = signed_range(bits)[1]
        super().__init__(
            signed_range(bits), 2 * threshold / high, smallest_step=1.25 * threshold / high
        )


class StreamQuantizer(Quantizer):
    """b bits, two's complement, for the real-valued residual stream that a 1×1 shortcut reads.

    The step starts at LSQ's 2·E|x| / √high for a normal distribution of the given deviation.
    """

    def __init__(self, bits: int, deviation: float):
        code_range = signed_range(bits)
        mean = deviation * math.sqrt(2 / math.pi)
        super().__init__(code_range, 2 * mean / math.sqrt(code_range[1]))


class ImageQuantizer(nn.Module):
    """8 bits, unsigned, fixed step: 1/255 for images in [0, 1], 1 for event counts."""

    low, high = 0, 255

    def __init__(self, step: float):
        super().__init__()
        self.step = step

    def forward(self, image: Tensor) -> Tensor:
        return integer_codes(image, self.step, self.low, self.high) * self.step

    def codes(self, image: Tensor) -> tuple[Tensor, float]:
        return integer_codes(image, self.step, self.low, self.high).int(), self.step


class BatchNormQuantizer(nn.Module):
    """Quantizes a folded batch norm y = scale·x + shift, both (C,), to `bits` symmetric bits.

    A layer's scales share one step and its shifts another: the smallest power of two (a binary
    point, no multiplier) whose range holds the largest magnitude. The statistics decide the step,
    so it is not learned.
    """

    def __init__(self, bits: int):
        super().__init__()
        self.low, self.high = symmetric_range(bits)

    @torch.no_grad()
    def forward(self, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        (scale_codes, scale_step), (shift_codes, shift_step) = self.codes(scale, shift)
        return scale_codes * scale_step, shift_codes * shift_step

    @torch.no_grad()
    def codes(self, scale: Tensor, shift: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        """((integer scales, their step), (integer shifts, their step)), floats of whole value."""
        return self._codes(scale), self._codes(shift)

    def _codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        largest = x.abs().max().clamp_min(torch.finfo(x.dtype).tiny)
        step = torch.exp2(torch.ceil(torch.log2(largest / self.high)))
        return integer_codes(x, step, self.low, self.high), step


class QuanConv2d(nn.Conv2d):
    """Convolution with quantized weights, no bias."""

    def __init__(self, *args, bits: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.quantizer = WeightQuantizer(bits, self.weight)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.quantizer(self.weight)
        return F.conv2d(x, weight, None, self.stride, self.padding)


class QuanLinear(nn.Linear):
    """Linear layer with quantized weights; its bias is added digitally in full precision."""

    def __init__(self, *args, bits: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.quantizer = WeightQuantizer(bits, self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.quantizer(self.weight), self.bias)
