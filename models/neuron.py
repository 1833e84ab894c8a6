"""Leaky integrate-and-fire neuron, by default that of MS-ResNet (Hu et al., arXiv 2112.08954).

    u[t] = leak · u[t-1] · (1 - s[t-1]) + x[t]           hard reset, to 0
    u[t] = leak · (u[t-1] - threshold · s[t-1]) + x[t]   soft reset, by subtraction
    s[t] = 1 if u[t] > threshold else 0,                 u[0] = s[0] = 0

u[t], after integration and before reset, is "the membrane potential" everywhere in this project.
The reset is detached from the graph: no gradient flows through its s[t-1]. A spike's surrogate
derivative is one of SURROGATES. With a quantizer, û = quantize(u) takes the place of u where the
neuron fires, carries its state on, and is looked at from outside.

`lif` says so in torch, and defines the neuron. The networks run `LIF`: the same numbers from one
autograd function, whose loops stand in `kernels.py`. Time is folded into the batch there: tensors
are (T·B, ...), all images of timestep 1 first.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import kernels
from kernels import as_rows, from_rows
from quantization import MembraneQuantizer

# Is given a LIF layer and its membrane potentials (T, B, C, H, W).
Watch = Callable[["LIF", Tensor], None]

RESETS = ("hard", "soft")
# ∂s/∂u of v = u - threshold and a width a. All have the area 1 and the height 1/(2a) at v = 0, so
# that 2a is the width of the rectangle of this area and height.
SURROGATES: dict[str, Callable[[Tensor, float], Tensor]] = {
    # MS-ResNet's own; STBP's h1 (Wu et al., arXiv 1706.02609)
    "rect": lambda v, a: (v.abs() < a).to(v.dtype) / (2 * a),
    # Fang et al., arXiv 2007.05785, whose alpha is 1/a
    "atan": lambda v, a: 1 / (2 * a) / (1 + (math.pi * v / (2 * a)) ** 2),
    # of a logistic function of slope 2/a; Zenke and Vogels, Neural Computation 33 (2021)
    "sigmoid": lambda v, a: 2 / a * torch.sigmoid(2 * v / a) * torch.sigmoid(-2 * v / a),
    # Bellec et al., arXiv 1803.09574, without their dampening
    "triangle": lambda v, a: (1 - v.abs() / (2 * a)).clamp(min=0) / (2 * a),
}


class Neuron(NamedTuple):
    """What a LIF neuron is: `lif`'s parameters. The last two change its gradient alone.

    leak: share of the membrane potential that is left after a timestep, 0 to 1.
    threshold: above it the neuron fires.
    reset: one of RESETS.
    surrogate, width: one of SURROGATES, and its a, in units of the membrane potential.
    """

    leak: float = 0.25
    threshold: float = 0.5
    reset: str = "hard"
    surrogate: str = "rect"
    width: float = 0.5


DEFAULT_NEURON = Neuron()  # MS-ResNet's


class Spike(torch.autograd.Function):
    """1 where the potential (quantized where there is a quantizer) fires, else 0."""

    @staticmethod
    def forward(ctx, potential: Tensor, u: Tensor, neuron: Neuron) -> Tensor:
        ctx.save_for_backward(u)
        ctx.neuron = neuron
        return (potential > neuron.threshold).to(u.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (u,) = ctx.saved_tensors
        neuron = ctx.neuron
        return grad * SURROGATES[neuron.surrogate](u - neuron.threshold, neuron.width), None, None


def lif(
    x: Tensor, quantize: Callable[[Tensor], Tensor] | None = None, neuron: Neuron = DEFAULT_NEURON
) -> tuple[Tensor, Tensor]:
    """The neuron's definition: spikes and membrane potentials of input currents, all (T, ...)."""
    spikes, membranes = [], []
    u = s = torch.zeros_like(x[0])
    for current in x:
        s = s.detach()
        left = u * (1 - s) if neuron.reset == "hard" else u - neuron.threshold * s
        u = before_rounding = neuron.leak * left + current
        if quantize is not None:
            u = quantize(u)
        s = Spike.apply(u, before_rounding.detach(), neuron)
        spikes.append(s)
        membranes.append(u)
    return torch.stack(spikes), torch.stack(membranes)


def unfold_time(x: Tensor, time_window: int) -> Tensor:
    """View (T·B, ...) as (T, B, ...)."""
    return x.unflatten(0, (time_window, -1))


class _LIF(torch.autograd.Function):
    """`lif` of (T·B, C, ...), channels last in memory, by the kernels."""

    @staticmethod
    def forward(ctx, x, step, code_range, neuron, time_window, want_membrane):
        by_time = as_rows(x).view(time_window, -1)
        neurons, wide = by_time.shape[1], torch.promote_types(x.dtype, torch.float32)
        spikes = torch.empty_like(by_time)
        membrane = torch.empty_like(by_time, dtype=wide) if want_membrane else None
        saved, as_bits = None, kernels.saves_bits(neuron, step is not None)
        if any(ctx.needs_input_grad) and as_bits:
            saved = x.new_empty(-(-time_window // kernels.PER_BYTE), neurons, dtype=torch.uint8)
        elif any(ctx.needs_input_grad):
            saved = torch.empty_like(by_time, dtype=wide)
        parts = (None if whole is None else whole.unbind() for whole in (spikes, membrane, saved))
        quantizer = None if step is None else (step, *code_range)
        kernels.lif_forward(by_time, *parts, neuron, quantizer)
        # The next convolution keeps the spikes anyway; where u is saved, it tells them.
        ctx.save_for_backward(spikes if as_bits else None, saved, step)
        ctx.code_range, ctx.neuron = code_range, neuron
        ctx.time_window, ctx.dtype = time_window, x.dtype
        ctx.set_materialize_grads(False)
        return from_rows(spikes, x), None if membrane is None else from_rows(membrane, x)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        spikes, saved, step = ctx.saved_tensors
        like = next(grad for grad in grads if grad is not None)
        by_time = tuple(
            None if grad is None else as_rows(grad).view(ctx.time_window, -1) for grad in grads
        )
        grad_x = like.new_empty(ctx.time_window, like.numel() // ctx.time_window, dtype=ctx.dtype)
        quantizer = None if step is None else (step, *ctx.code_range)
        grad_step = kernels.lif_backward(
            by_time, spikes, saved, grad_x.unbind(), ctx.neuron, quantizer, ctx.needs_input_grad[1]
        )
        return from_rows(grad_x, like), grad_step, None, None, None, None


class LIF(nn.Module):
    """A population of LIF neurons; with a quantizer, of b-bit membrane potentials."""

    def __init__(self, neuron: Neuron = DEFAULT_NEURON, quantizer: MembraneQuantizer | None = None):
        super().__init__()
        self.neuron, self.quantizer = neuron, quantizer

    def forward(self, x: Tensor, time_window: int, watch: Watch | None = None) -> Tensor:
        """Spikes (T·B, C, H, W) of the input currents x (T·B, C, H, W), in the dtype of x.

        `watch` is given this layer and its membrane potentials (T, B, C, H, W), float32 or wider;
        gradients flow through them too.
        """
        step = code_range = None
        if self.quantizer is not None:
            neurons = x[0].numel() * time_window
            step = self.quantizer.positive_step(neurons)
            code_range = self.quantizer.low, self.quantizer.high
        spikes, membrane = _LIF.apply(
            x, step, code_range, self.neuron, time_window, watch is not None
        )
        if watch is not None:
            watch(self, unfold_time(membrane, time_window))
        return spikes


def neuron_of(network: nn.Module) -> Neuron:
    """The neuron of a network, the same in all of its LIF layers."""
    return next(layer.neuron for layer in network.modules() if isinstance(layer, LIF))


@contextmanager
def count_spikes(network: nn.Module) -> Iterator[dict[str, Tensor]]:
    """While open, each LIF layer adds its [spikes, neurons] of every timestep to the dict, by name:
    (2, T), in float64."""
    counts: dict[str, Tensor] = {}

    def hook_of(name: str):
        def add(module: nn.Module, inputs: tuple, spikes: Tensor) -> None:
            by_step = unfold_time(spikes, inputs[1]).flatten(1)
            fired = by_step.sum(1, dtype=torch.float64)
            seen = torch.stack([fired, torch.full_like(fired, by_step.shape[1])])
            counts[name] = counts[name] + seen if name in counts else seen

        return add

    with ExitStack() as hooks:
        for name, layer in network.named_modules():
            if isinstance(layer, LIF):
                hooks.enter_context(layer.register_forward_hook(hook_of(name)))
        yield counts
