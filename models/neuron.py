"""Leaky integrate-and-fire neuron of MS-ResNet (Hu et al., arXiv 2112.08954).

    u[t] = LEAK · u[t-1] · (1 - s[t-1]) + x[t], s[t] = 1 if u[t] > THRESHOLD else 0, u[0] = s[0] = 0

u[t], after integration and before reset, is "the membrane potential" everywhere in this project.
The reset factor (1 - s) is detached from the graph, and a spike's surrogate derivative is the
rectangle ∂s/∂u = 1{|u - THRESHOLD| < WINDOW} / (2 · WINDOW). With a quantizer, û = quantize(u)
takes the place of u where the neuron fires, carries its state on, and is looked at from outside.

`lif` says so in torch, and defines the neuron. The networks run `LIF`: the same numbers from one
autograd function, whose loops stand in `kernels.py`. Time is folded into the batch there: tensors
are (T·B, ...), all images of timestep 1 first.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import kernels
from kernels import as_rows, from_rows
from quantization import MembraneQuantizer

LEAK, THRESHOLD, WINDOW = NEURON = 0.25, 0.5, 0.5

Watch = Callable[[Tensor], None]  # is given a layer's membrane potentials (T, B, C, H, W)


class Spike(torch.autograd.Function):
    """1 where the potential (quantized where there is a quantizer) fires, else 0."""

    @staticmethod
    def forward(ctx, potential: Tensor, u: Tensor) -> Tensor:
        ctx.save_for_backward(u)
        return (potential > THRESHOLD).to(u.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (u,) = ctx.saved_tensors
        return grad * ((u - THRESHOLD).abs() < WINDOW) / (2 * WINDOW), None


def lif(x: Tensor, quantize: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """The neuron's definition: spikes and membrane potentials of input currents, all (T, ...)."""
    spikes, membranes = [], []
    u = s = torch.zeros_like(x[0])
    for current in x:
        u = before_rounding = LEAK * u * (1 - s.detach()) + current
        if quantize is not None:
            u = quantize(u)
        s = Spike.apply(u, before_rounding.detach())
        spikes.append(s)
        membranes.append(u)
    return torch.stack(spikes), torch.stack(membranes)


def unfold_time(x: Tensor, time_window: int) -> Tensor:
    """View (T·B, ...) as (T, B, ...)."""
    return x.unflatten(0, (time_window, -1))


class _LIF(torch.autograd.Function):
    """`lif` of (T·B, C, ...), channels last in memory, by the kernels."""

    @staticmethod
    def forward(ctx, x, step, code_range, time_window, want_membrane):
        by_time = as_rows(x).view(time_window, -1)
        neurons, wide = by_time.shape[1], torch.promote_types(x.dtype, torch.float32)
        spikes = torch.empty_like(by_time)
        membrane = torch.empty_like(by_time, dtype=wide) if want_membrane else None
        saved = None
        if any(ctx.needs_input_grad) and step is None:
            saved = x.new_empty(-(-time_window // kernels.PER_BYTE), neurons, dtype=torch.uint8)
        elif any(ctx.needs_input_grad):
            saved = torch.empty_like(by_time, dtype=wide)
        parts = (None if whole is None else whole.unbind() for whole in (spikes, membrane, saved))
        quantizer = None if step is None else (step, *code_range)
        kernels.lif_forward(by_time, *parts, NEURON, quantizer)
        # The next convolution keeps the spikes anyway; a quantized neuron can tell them from u.
        ctx.save_for_backward(spikes if step is None else None, saved, step)
        ctx.code_range, ctx.time_window, ctx.dtype = code_range, time_window, x.dtype
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
            by_time, spikes, saved, grad_x.unbind(), NEURON, quantizer, ctx.needs_input_grad[1]
        )
        return from_rows(grad_x, like), grad_step, None, None, None


class LIF(nn.Module):
    """A population of LIF neurons; with a quantizer, of b-bit membrane potentials."""

    def __init__(self, quantizer: MembraneQuantizer | None = None):
        super().__init__()
        self.quantizer = quantizer

    def forward(self, x: Tensor, time_window: int, watch: Watch | None = None) -> Tensor:
        """Spikes (T·B, C, H, W) of the input currents x (T·B, C, H, W), in the dtype of x.

        `watch` is given the membrane potentials (T, B, C, H, W), float32 or wider; gradients flow
        through them too.
        """
        step = code_range = None
        if self.quantizer is not None:
            neurons = x[0].numel() * time_window
            step = self.quantizer.positive_step(neurons)
            code_range = self.quantizer.low, self.quantizer.high
        spikes, membrane = _LIF.apply(x, step, code_range, time_window, watch is not None)
        if watch is not None:
            watch(unfold_time(membrane, time_window))
        return spikes


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

    layers = [(name, layer) for name, layer in network.named_modules() if isinstance(layer, LIF)]
    handles = [layer.register_forward_hook(hook_of(name)) for name, layer in layers]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()
