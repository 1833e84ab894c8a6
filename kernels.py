"""The hot functions of flat tensors: eager, or fused by `--compile`.

A reader of the method may skip them: what they compute is defined in `models/neuron.py` (`lif`),
`quantization.py`, `models/batch_norm.py` and `distiller.py`. What each trick is worth is measured
by `python -m benchmarks.step_ablation`. No kernel is written by hand: torch.compile makes them of
the functions marked `region`.
"""

import math
from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

Parts = tuple[Tensor, ...]  # of a tensor, one a timestep: a fused kernel is slow at writing slices
Neuron = tuple[float, float, str, str, float]  # leak, threshold, reset, surrogate, its width

REGIONS: dict[str, Callable] = {}  # the hot functions, eager, by name
fused: dict[str, Callable] = {}  # by name, what runs in their place
PER_BYTE = 8  # timesteps whose window bits share a byte


def region(function: Callable) -> Callable:
    """`function`, or what `fused` has in its place when it is called."""
    name = function.__name__
    REGIONS[name] = function

    @wraps(function)
    def call(*args: object) -> object:
        return fused.get(name, function)(*args)

    return call


def at_least_float32(x: Tensor) -> Tensor:
    """x, in float32 where its dtype is narrower."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def as_rows(x: Tensor) -> Tensor:
    """(N, C, ...) as (N, values), channels last: a view where x lies so in memory."""
    return x.movedim(1, -1).flatten(1)


def as_pixels(x: Tensor) -> Tensor:
    """(N, C, H, W) as (N·H·W, C), a view where x is channels_last."""
    return x.movedim(1, -1).flatten(0, -2)


def from_rows(rows: Tensor, like: Tensor) -> Tensor:
    """`as_rows` or `as_pixels` undone, for a tensor of the shape of `like`."""
    return rows.view(like.movedim(1, -1).shape).movedim(-1, 1)


def is_above(x: Tensor, bound: float, out: Tensor | None = None) -> Tensor:
    """1 where x > bound, else 0, in the dtype of x: on a CPU several times faster than a bool."""
    return torch.gt(x, bound, out=torch.empty_like(x) if out is None else out)


def inside(scaled: Tensor, low: int, high: int) -> Tensor:
    """1 where low < scaled < high, else 0, in the dtype of `scaled`."""
    return is_above(scaled, low).mul_(torch.lt(scaled, high, out=torch.empty_like(scaled)))


def integer_codes(x: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    """clamp(round(x / step), low, high), halves rounded to even; the dtype of x."""
    return torch.round(x / step).clamp_(low, high)


@region
def integers_forward(x: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    """`integer_codes` of (rows, values), the step () or (rows, 1)."""
    return integer_codes(x, step, low, high)


@region
def integers_backward(
    grad: Tensor, x: Tensor, step: Tensor, low: int, high: int
) -> tuple[Tensor, Tensor]:
    """Gradients of `integers_forward` with respect to x and to the step that give step · codes
    LSQ's (see `quantization`)."""
    scaled = x / step
    grad_x = grad * inside(scaled, low, high) / step
    return grad_x, -(grad_x * scaled).sum(dim=1, keepdim=True).sum_to_size(step.shape)


def saves_bits(neuron: Neuron, quantized: bool) -> bool:
    """Whether `lif_backward` needs one bit of u, not u itself."""
    _, _, _, surrogate, _ = neuron
    return surrogate == "rect" and not quantized


def surrogate_shape(u: Tensor, threshold: float, surrogate: str, width: float) -> Tensor:
    """A spike's surrogate gradient times 2 · width, so that it is 1 at the threshold; dtype of u.
    Of "rect" it is 1 inside the window, |u - threshold| < width, else 0."""
    distance = u - threshold
    match surrogate:
        case "rect":
            return distance.abs_().lt_(width)
        case "atan":
            return distance.mul_(math.pi / (2 * width)).square_().add_(1).reciprocal_()
        case "sigmoid":
            return distance.div_(width).cosh_().square_().reciprocal_()
        case "triangle":
            return distance.abs_().mul_(-1 / (2 * width)).add_(1).clamp_min_(0)
        case _:
            raise ValueError(f"no such surrogate: {surrogate!r}")


@region
def lif_forward(
    x: Tensor,
    spikes: Parts,
    membrane: Parts | None,
    saved: Parts | None,
    neuron: Neuron,
    quantizer: tuple[Tensor, int, int] | None,
) -> None:
    """Spikes and membrane potentials of input currents x (T, neurons), written where asked.

    `saved` gets what backward needs: u before it is quantized (T, neurons); where it `saves_bits`
    whether u is in the surrogate's window, a bit for each timestep, as uint8 (T / PER_BYTE,
    neurons). `quantizer` is the step, the lowest and the highest code.
    """
    leak, threshold, reset, surrogate, width = neuron
    as_bits = saves_bits(neuron, quantizer is not None)
    u = fired = bits = None
    for t, current in enumerate(x.unbind()):
        # A membrane potential rounded to half precision fires at other times: keep it in float32.
        current = at_least_float32(current)
        if u is None:
            u = current
        elif reset == "hard":
            u = torch.addcmul(current, u, 1 - fired, value=leak)
        else:
            u = torch.sub(u, fired, alpha=threshold).mul_(leak).add_(current)
        if saved is not None and not as_bits:
            saved[t].copy_(u)
        elif saved is not None:
            bit, place = surrogate_shape(u, threshold, surrogate, width), t % PER_BYTE
            bits = bit if place == 0 else bits.add(bit, alpha=2**place)
            if place == PER_BYTE - 1 or t == len(x) - 1:
                saved[t // PER_BYTE].copy_(bits)
        if quantizer is not None:
            u = integer_codes(u, *quantizer) * quantizer[0]
        if membrane is not None:
            membrane[t].copy_(u)
        fired = is_above(u, threshold, out=spikes[t]).to(u.dtype)


@region
def lif_backward(
    grads: tuple[Tensor | None, Tensor | None],
    spikes: Tensor | None,
    saved: Tensor,
    grad_x: Parts,
    neuron: Neuron,
    quantizer: tuple[Tensor, int, int] | None,
    step_learns: bool,
) -> Tensor | None:
    """Gradients of `lif_forward`, given those of its spikes and membrane potentials (T, neurons):
    with respect to x, written into `grad_x`, and to the step if that learns.

    Where u is saved `spikes` are not needed: it tells.
    """
    leak, threshold, reset, surrogate, width = neuron
    as_bits = saves_bits(neuron, quantizer is not None)
    grad_spikes, grad_membrane = grads
    grad_u = bits = grad_step = None
    for t in reversed(range(len(grad_x))):
        grad = None
        if as_bits:
            # Later timesteps' bits are gone: the highest that is left is this one's.
            place, fired = t % PER_BYTE, spikes[t]
            bits = saved[t // PER_BYTE].float() if bits is None or place == PER_BYTE - 1 else bits
            passes = is_above(bits, 2**place - 1)
            bits = bits.sub(passes, alpha=2**place)
        elif quantizer is None:
            fired = is_above(saved[t], threshold)
        else:
            step, low, high = quantizer
            scaled = saved[t] / step
            codes = torch.round(scaled).clamp_(low, high)
            fired = is_above(codes * step, threshold)
        if grad_spikes is not None:
            if not as_bits:
                passes = surrogate_shape(saved[t], threshold, surrogate, width)
            grad = (passes * grad_spikes[t]).mul_(1 / (2 * width))
        if grad_membrane is not None:
            grad = grad_membrane[t] if grad is None else grad + grad_membrane[t]
        if grad_u is not None and reset == "hard":
            grad = torch.addcmul(grad, grad_u, 1 - fired, value=leak)
        elif grad_u is not None:
            grad = torch.add(grad, grad_u, alpha=leak)
        if quantizer is not None:
            in_range = inside(scaled, low, high)
            if step_learns:  # LSQ's gradient (arXiv 1902.08153, eq. 3)
                of_step = (grad * (codes - scaled * in_range)).sum()
                grad_step = of_step + (0 if grad_step is None else grad_step)
            grad = grad * in_range
        grad_x[t].copy_(grad)
        grad_u = grad
    return grad_step


@region
def affine(x: Tensor, scale: Tensor, shift: Tensor, grid: float | None) -> Tensor:
    """x·scale + shift of pixels (N, C), dtype of x; rounded to multiples of a grid if there is
    one."""
    if grid is None:
        return torch.addcmul(shift, x, scale).to(x.dtype)
    # A fast convolution algorithm may have left integers that are not quite.
    exact = x if x.dtype == scale.dtype else x.to(scale.dtype).round_()
    y = torch.addcmul(shift / grid, exact, scale / grid)
    return y.round_().mul_(grid).to(x.dtype)


@region
def gradient_sums(grad: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over all pixels, (C,), of grad and of grad · (x - mean), all (N, C)."""
    return grad.sum(dim=0, dtype=mean.dtype), (grad * (x - mean)).sum(dim=0)


@region
def gradient_of_input(
    grad: Tensor, x: Tensor, mean: Tensor, scale: Tensor, mean_grad: Tensor, slope: Tensor
) -> Tensor:
    """(grad - mean_grad - (x - mean) · slope) · scale of pixels (N, C), in the dtype of x."""
    return torch.addcmul(grad - mean_grad, x - mean, slope, value=-1).mul_(scale).to(x.dtype)


@region
def softmax_kl_forward(student: Tensor, teacher: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over rows of KL(softmax(teacher) ‖ softmax(student)), both (rows, values), and its
    gradient with respect to the student: (p_S - p_T) / rows. Every row of both has one more value,
    the `anchor`, (): of -inf there is nothing to see.

    KL = Σ p_T·(teacher - student) + log Σ exp(student) - log Σ exp(teacher): one exp per value.
    """
    rows = len(student)
    highest_student = torch.maximum(student.amax(1, True), anchor)
    highest_teacher = torch.maximum(teacher.amax(1, True), anchor)
    exp_student = (student - highest_student).exp_()
    exp_teacher = (teacher - highest_teacher).exp_()
    sum_student = exp_student.sum(1, True) + (anchor - highest_student).exp()
    sum_teacher = exp_teacher.sum(1, True) + (anchor - highest_teacher).exp()
    products = (teacher - student).mul_(exp_teacher).sum(1, True)
    kl = products / sum_teacher + (sum_student / sum_teacher).log()
    kl = (kl + highest_student - highest_teacher).sum() / rows
    gradient = exp_student.div_(sum_student * rows).sub_(exp_teacher.div_(sum_teacher * rows))
    return kl, gradient
