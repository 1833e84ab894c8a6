"""Leaky integrate-and-fire neuron of MS-ResNet (Hu et al., arXiv 2112.08954), as one autograd op.

    u[t] = LEAK · u[t-1] · (1 - s[t-1]) + x[t], s[t] = 1 if u[t] > THRESHOLD else 0, u[0] = s[0] = 0

u[t], after integration and before reset, is "the membrane potential" everywhere in this project.
The reset factor (1 - s) is detached from the graph, and a spike's surrogate derivative is the
rectangle ∂s/∂u = 1{|u - THRESHOLD| < WINDOW} / (2 · WINDOW). With a quantizer, û = quantize(u)
takes the place of u where the neuron fires, carries its state on, and is looked at from outside.

Time is folded into the batch: tensors are (T·B, ...), all images of timestep 1 first.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from quantization import MembraneQuantizer, fake_quantize_backward, integer_codes

LEAK = 0.25
THRESHOLD = 0.5
WINDOW = 0.5


def unfold_time(x: Tensor, time_window: int) -> Tensor:
    """View (T·B, ...) as (T, B, ...)."""
    return x.unflatten(0, (time_window, -1))


def in_window(u: Tensor) -> Tensor:
    """Where a spike has a surrogate gradient: |u - THRESHOLD| < WINDOW, as bool."""
    return (u > THRESHOLD - WINDOW) & (u < THRESHOLD + WINDOW)


class _LIF(torch.autograd.Function):
    """Forward and backward through time, a timestep at a time.

    For backward it saves one byte per neuron and timestep (a quantized one: u), beside the spikes,
    which the next convolution saves anyway.
    """

    @staticmethod
    def forward(ctx, x, step, code_range, time_window, want_membrane):
        # A membrane potential rounded to half precision fires at other times: integrate in float32.
        dtype = torch.promote_types(x.dtype, torch.float32)
        spikes = torch.empty_like(x)
        membrane = torch.empty_like(x, dtype=dtype) if want_membrane else None
        for_backward = None
        if any(ctx.needs_input_grad):
            for_backward = torch.empty_like(x, dtype=torch.bool if step is None else dtype)

        u = not_fired = None
        for t in range(time_window):
            x_t, spikes_t = (
                unfold_time(x, time_window)[t].to(dtype),
                unfold_time(spikes, time_window)[t],
            )
            u = x_t if t == 0 else torch.addcmul(x_t, u, not_fired, value=LEAK)
            if for_backward is not None:
                saved = in_window(u) if step is None else u
                unfold_time(for_backward, time_window)[t] = saved
            if step is not None:
                u = integer_codes(u, step, *code_range) * step
            torch.gt(u, THRESHOLD, out=spikes_t)
            not_fired = 1 - spikes_t.to(dtype)
            if want_membrane:
                unfold_time(membrane, time_window)[t] = u

        ctx.save_for_backward(spikes, for_backward, step)
        ctx.code_range, ctx.time_window = code_range, time_window
        ctx.set_materialize_grads(False)
        return spikes, membrane

    @staticmethod
    def backward(ctx, grad_spikes, grad_membrane):
        spikes, saved, step = ctx.saved_tensors
        dtype = torch.promote_types(spikes.dtype, torch.float32)
        grad_x = torch.empty_like(spikes)
        spikes, saved, grad_spikes, grad_membrane = (
            None if x is None else unfold_time(x, ctx.time_window)
            for x in (spikes, saved, grad_spikes, grad_membrane)
        )
        grad_step = None if step is None else torch.zeros_like(step)
        grad_u = None
        for t in reversed(range(ctx.time_window)):
            grad = torch.zeros_like(spikes[t], dtype=dtype)
            if grad_spikes is not None:
                window = saved[t] if step is None else in_window(saved[t])
                torch.mul(grad_spikes[t], window, out=grad).div_(2 * WINDOW)
            if grad_membrane is not None:
                grad += grad_membrane[t]
            if grad_u is not None:
                grad.addcmul_(grad_u, 1 - spikes[t].to(dtype), value=LEAK)
            if step is not None:
                grad, per_neuron = fake_quantize_backward(grad, saved[t], step, *ctx.code_range)
                grad_step += per_neuron.sum()
            unfold_time(grad_x, ctx.time_window)[t] = grad
            grad_u = grad
        return grad_x, grad_step, None, None, None


class LIF(nn.Module):
    """A population of LIF neurons; with a quantizer, of b-bit membrane potentials."""

    def __init__(self, quantizer: MembraneQuantizer | None = None):
        super().__init__()
        self.quantizer = quantizer
        self.threshold = THRESHOLD

    def forward(self, x: Tensor, time_window: int, membranes: list[Tensor] | None = None) -> Tensor:
        """Spikes (T·B, C, H, W) of the input currents x (T·B, C, H, W), in the dtype of x.

        Where a list is given, the membrane potentials (T, B, C, H, W), float32 or wider, are
        appended to it; gradients flow through them too.
        """
        step = code_range = None
        if self.quantizer is not None:
            neurons = x[0].numel() * time_window
            step = self.quantizer.positive_step(neurons)
            code_range = self.quantizer.low, self.quantizer.high
        spikes, membrane = _LIF.apply(x, step, code_range, time_window, membranes is not None)
        if membranes is not None:
            membranes.append(unfold_time(membrane, time_window))
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
