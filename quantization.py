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
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import kernels
from kernels import as_rows, from_rows, integer_codes

# Every real-valued stream of a quantized network (batch norm outputs, residual sums, membrane
# potentials) is a multiple of GRID, so that float32 adds them exactly below 2^24 · GRID = 1024 and
# a chip computes the same with integers.
GRID = 2.0**-14
STEP_GRID = 4 * GRID  # steps are multiples of it, those of membranes of `membrane_step_grid`
# The smallest leak that keeps a membrane on the grid: the steps of one half as large would be
# multiples of 2^-7, and 8 bits of the default threshold have a step of 2^-7.
SMALLEST_LEAK = 2.0**-6


def signed_range(bits: int) -> tuple[int, int]:
    """Codes of two's complement."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def symmetric_range(bits: int) -> tuple[int, int]:
    """Codes of a signed number whose range is symmetric, as stored in a crossbar."""
    high = 2 ** (bits - 1) - 1
    return -high, high


def leak_stays_on_grid(leak: float) -> bool:
    """Whether a leaked membrane of any step can be a multiple of GRID: of 0 and powers of two."""
    return leak == 0 or (math.frexp(leak)[0] == 0.5 and SMALLEST_LEAK <= leak <= 1)


def membrane_step_grid(leak: float) -> float:
    """What the steps of a membrane are multiples of: leak times them is one of GRID, if it can."""
    return GRID / leak if leak > 0 and leak_stays_on_grid(leak) else STEP_GRID


class _Integers(torch.autograd.Function):
    """`integer_codes`, differentiated so that codes · step has LSQ's gradients."""

    @staticmethod
    def forward(ctx, x: Tensor, step: Tensor, low: int, high: int) -> Tensor:
        ctx.save_for_backward(x, step)
        ctx.range = low, high
        rows, step = as_rows(x), step.flatten(1) if step.dim() else step
        return from_rows(kernels.integers_forward(rows, step, low, high), x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, step = ctx.saved_tensors
        flat_step = step.flatten(1) if step.dim() else step
        grad_x, grad_step = kernels.integers_backward(
            as_rows(grad), as_rows(x), flat_step, *ctx.range
        )
        return from_rows(grad_x, x), grad_step.view(step.shape), None, None


class Quantizer(nn.Module):
    """A uniform quantizer with one learned step, or one per leading index of `step_shape`.

    In the forward pass the step is at least `smallest_step`, whatever the optimizer does, and a
    multiple of `step_grid` where one is given.
    """

    def __init__(
        self,
        code_range: tuple[int, int],
        step: float,
        step_shape: tuple[int, ...] = (),
        smallest_step: float = 0.0,
        step_grid: float | None = None,
    ):
        super().__init__()
        self.low, self.high = code_range
        self.step_grid = step_grid
        self.step = nn.Parameter(torch.full(step_shape, step))
        self.register_buffer("smallest_step", torch.full(step_shape, smallest_step))

    def used_step(self) -> Tensor:
        """The step of the forward pass, without gradient."""
        used = torch.maximum(self.step.detach(), self.smallest_step)
        if self.step_grid is None:
            return used
        smallest = torch.ceil(self.smallest_step / self.step_grid)
        return torch.maximum(torch.round(used / self.step_grid), smallest) * self.step_grid

    def positive_step(self, values_per_step: int) -> Tensor:
        """`used_step()` with LSQ's gradient, scaled for `values_per_step` values."""
        used = self.used_step()
        # Worth `used` to the last bit: a sum with the difference would round.
        return _StraightThrough.apply(self.step, used, 1 / math.sqrt(values_per_step * self.high))

    def forward(self, x: Tensor) -> Tensor:
        """Codes of x (B, ...) as whole floats, with straight-through gradients."""
        return _Integers.apply(x, self.positive_step(x[0].numel()), self.low, self.high)

    @torch.no_grad()
    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Integer codes (int32, shape of x) and their scale: x̂ = codes · scale."""
        step = self.used_step()
        return integer_codes(x, step, self.low, self.high).int(), step


class _StraightThrough(torch.autograd.Function):
    """The value of `used` with the gradient of scale · x."""

    @staticmethod
    def forward(ctx, x: Tensor, used: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return used.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad * ctx.scale, None, None


class WeightQuantizer(Quantizer):
    """b bits, symmetric, one step per output channel, started from the weights as LSQ does.

    A step never falls below a tenth of its start: where it did, all codes of the channel would lie
    at the end of the range, and there neither weights nor step have a gradient.
    """

    def __init__(self, bits: int, weight: Tensor):
        self.bits = bits
        super().__init__(symmetric_range(bits), 1.0, (len(weight),) + (1,) * (weight.dim() - 1))
        self.start_from(weight)

    @torch.no_grad()
    def start_from(self, weight: Tensor) -> None:
        """Set the steps to LSQ's 2·mean|w| / √high of each output channel."""
        if weight.is_meta:  # nothing to see, and torch would load its compiler: a second
            return
        mean = weight.abs().mean(dim=tuple(range(1, weight.dim())), keepdim=True)
        self.step.copy_((2 * mean / math.sqrt(self.high)).clamp_min(1e-6))
        self.smallest_step.copy_(self.step / 10)


def membrane_steps(bits: int, threshold: float) -> list[float]:
    """Steps with which rounding a membrane potential, of whatever size, changes no spike: the
    threshold is halfway between two codes, θ / (k + ½). Of them those of k = 2^j - 1, each at least
    twice as long as the one before. With the first the largest code is 2θ, with the last, of k = 0,
    2 (2^(b-1) - 1) θ."""
    return [threshold / (2**j - 0.5) for j in range(bits - 2, -1, -1)]


class MembraneQuantizer(Quantizer):
    """b bits, two's complement, one step a layer, started so that the largest code is 2·threshold:
    the first of `membrane_steps`.

    The largest code never falls below 1.25·threshold, so that the layer can always fire. Not
    `learned`, the step stays at its start.
    """

    def __init__(
        self, bits: int, threshold: float, learned: bool = True, step_grid: float = STEP_GRID
    ):
        high = signed_range(bits)[1]
        super().__init__(
            signed_range(bits),
            membrane_steps(bits, threshold)[0],
            smallest_step=1.25 * threshold / high,
            step_grid=step_grid,
        )
        self.step.requires_grad_(learned)
        self.bits = bits


class StreamQuantizer(Quantizer):
    """b bits, two's complement, for the real-valued residual stream that a 1×1 shortcut reads.

    The step starts at LSQ's 2·E|x| / √high for a normal distribution of the given deviation.
    """

    def __init__(self, bits: int, deviation: float):
        code_range = signed_range(bits)
        step = 2 * deviation * math.sqrt(2 / math.pi) / math.sqrt(code_range[1])
        super().__init__(code_range, step, smallest_step=step / 10, step_grid=STEP_GRID)


class ImageQuantizer(nn.Module):
    """8 bits, unsigned, fixed step: 1/255 for images in [0, 1], 1 for event counts."""

    low, high = 0, 255

    def __init__(self, step: float):
        super().__init__()
        self.step = step

    def forward(self, image: Tensor) -> Tensor:
        """Codes of the image as whole floats."""
        return integer_codes(image, self.step, self.low, self.high)

    def codes(self, image: Tensor) -> tuple[Tensor, float]:
        return self(image).int(), self.step


def codes_of(frames: Tensor, step: float) -> Tensor:
    """8-bit codes of event frames of any shape: clamp(round(frames / step), 0, 255), halves rounded
    to even; whole float32."""
    if step == 1 and frames.dtype == torch.uint8:
        return frames.float()
    # In float64: a step may be smaller than what float32 divides by.
    return (frames.double() / step).round_().clamp_(ImageQuantizer.low, ImageQuantizer.high).float()


def pixels_of(codes: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """8-bit codes of an image / 255, in torch's default type if in no other."""
    # By a tensor, because CUDA multiplies by the reciprocal of a plain number.
    return codes / torch.full((), 255.0, dtype=dtype, device=codes.device)


class BatchNormQuantizer(nn.Module):
    """Quantizes a folded batch norm y = scale·x + shift, both (C,), to `bits` symmetric bits.

    A layer's scales share one step and its shifts another: the smallest power of two (a shift, no
    multiplier) whose range holds the largest magnitude, for shifts at least GRID. The statistics
    decide the steps, so they are not learned.
    """

    def __init__(self, bits: int):
        super().__init__()
        self.bits = bits
        self.low, self.high = symmetric_range(bits)

    @torch.no_grad()
    def forward(self, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        (scale_codes, scale_step), (shift_codes, shift_step) = self.codes(scale, shift)
        return scale_codes * scale_step, shift_codes * shift_step

    @torch.no_grad()
    def codes(self, scale: Tensor, shift: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        """((integer scales, their step), (integer shifts, their step)), floats of whole value."""
        scale_step = self._step(scale)
        shift_step = self._step(shift).clamp_min(GRID)
        return (
            (integer_codes(scale, scale_step, self.low, self.high), scale_step),
            (integer_codes(shift, shift_step, self.low, self.high), shift_step),
        )

    def _step(self, x: Tensor) -> Tensor:
        largest = x.abs().max().clamp_min(torch.finfo(x.dtype).tiny)
        # The same on every device: CUDA multiplies by the reciprocal of a plain number, and ldexp
        # asks pow, which need not be exact.
        smallest = largest / torch.full_like(largest, self.high)
        mantissa, _ = torch.frexp(smallest)  # 0.5 of a power of two, else above
        return torch.where(mantissa == 0.5, smallest, smallest / mantissa)
