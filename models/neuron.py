"""Leaky integrate-and-fire neuron of MS-ResNet (Hu et al., arXiv 2112.08954), as one autograd op.

    u[t] = LEAK · u[t-1] · (1 - s[t-1]) + x[t], s[t] = 1 if u[t] > THRESHOLD else 0, u[0] = s[0] = 0

u[t], after integration and before reset, is "the membrane potential" everywhere in this project.
The reset factor (1 - s) is detached from the graph, and a spike's surrogate derivative is the
rectangle ∂s/∂u = 1{|u - THRESHOLD| < WINDOW} / (2 · WINDOW). With a quantizer, û = quantize(u)
takes the place of u where the neuron fires, carries its state on, and is looked at from outside.

Time is folded into the batch: tensors are (T·B, ...), all images of timestep 1 first.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from quantization import (
    MembraneQuantizer,
    as_rows,
    at_least_float32,
    fake_quantize_backward,
    from_rows,
    integer_codes,
    is_above,
)

LEAK = 0.25
THRESHOLD = 0.5
WINDOW = 0.5

Watch = Callable[[Tensor], None]  # is given a layer's membrane potentials (T, B, C, H, W)
Parts = tuple[Tensor, ...]  # of a tensor, one a timestep: a fused kernel is slow at writing slices


def unfold_time(x: Tensor, time_window: int) -> Tensor:
    """View (T·B, ...) as (T, B, ...)."""
    return x.unflatten(0, (time_window, -1))


def lif_forward(
    x: Tensor,
    spikes: Parts,
    membrane: Parts | None,
    saved: Parts | None,
    step: Tensor | None,
    code_range: tuple[int, int] | None,
) -> None:
    """Spikes and membrane potentials of input currents x (T, neurons), written where asked.

    `saved` gets what backward needs: whether u is in the surrogate's window, a bit for each
    timestep, as uint8 (T / 8, neurons); with a quantizer's `step`, u itself (T, neurons).
    """
    u = fired = bits = None
    for t, current in enumerate(x.unbind()):
        # A membrane potential rounded to half precision fires at other times: keep it in float32.
        current = at_least_float32(current)
        u = current if u is None else torch.addcmul(current, u, 1 - fired, value=LEAK)
        if saved is not None and step is not None:
            saved[t].copy_(u)
        elif saved is not None:
            window = in_window(u)
            bits = window if t % 8 == 0 else bits.add(window, alpha=2 ** (t % 8))
            if t % 8 == 7 or t == len(x) - 1:
                saved[t // 8].copy_(bits)
        if step is not None:
            u = integer_codes(u, step, *code_range) * step
        if membrane is not None:
            membrane[t].copy_(u)
        fired = is_above(u, THRESHOLD, out=spikes[t]).to(u.dtype)


def in_window(u: Tensor) -> Tensor:
    """1 where a spike has a surrogate gradient, |u - THRESHOLD| < WINDOW, else 0; dtype of u."""
    return (u - THRESHOLD).abs_().lt_(WINDOW)


def lif_backward(
    grad_spikes: Tensor | None,
    grad_membrane: Tensor | None,
    spikes: Tensor | None,
    saved: Tensor,
    step: Tensor | None,
    code_range: tuple[int, int] | None,
    grad_x: Parts,
) -> Tensor | None:
    """Gradients of `lif_forward`: with respect to x, written into `grad_x`, and to the step.

    A quantized neuron needs no `spikes`: its saved u tells.
    """
    grad_u = bits = grad_step = None
    for t in reversed(range(len(grad_x))):
        grad = None
        if step is None:
            # Later timesteps' bits are gone: the highest that is left is this one's.
            bits = saved[t // 8].float() if bits is None or t % 8 == 7 else bits
            window = is_above(bits, 2 ** (t % 8) - 1)
            bits = bits.sub(window, alpha=2 ** (t % 8))
        if grad_spikes is not None:
            window = window if step is None else in_window(saved[t])
            grad = (window * grad_spikes[t]).mul_(1 / (2 * WINDOW))
        if grad_membrane is not None:
            grad = grad_membrane[t] if grad is None else grad + grad_membrane[t]
        if step is None:
            fired = spikes[t]
        else:
            fired = is_above(integer_codes(saved[t], step, *code_range) * step, THRESHOLD)
        if grad_u is not None:
            grad = torch.addcmul(grad, grad_u, 1 - fired, value=LEAK)
        if step is not None:
            grad, per_neuron = fake_quantize_backward(grad, saved[t], step, *code_range)
            grad_step = per_neuron.sum() + (0 if grad_step is None else grad_step)
        grad_x[t].copy_(grad)
        grad_u = grad
    return grad_step


class _LIF(torch.autograd.Function):
    """`lif_forward` and `lif_backward` for (T·B, C, ...), channels last in memory."""

    @staticmethod
    def forward(ctx, x, step, code_range, time_window, want_membrane):
        by_time = as_rows(x).view(time_window, -1)
        neurons, wide = by_time.shape[1], torch.promote_types(x.dtype, torch.float32)
        spikes = torch.empty_like(by_time)
        membrane = torch.empty_like(by_time, dtype=wide) if want_membrane else None
        saved = None
        if any(ctx.needs_input_grad) and step is None:
            saved = x.new_empty(-(-time_window // 8), neurons, dtype=torch.uint8)
        elif any(ctx.needs_input_grad):
            saved = torch.empty_like(by_time, dtype=wide)
        membrane_parts, saved_parts = (
            None if whole is None else whole.unbind() for whole in (membrane, saved)
        )
        lif_forward(by_time, spikes.unbind(), membrane_parts, saved_parts, step, code_range)
        # The next convolution keeps the spikes anyway; a quantized neuron can tell them from u.
        ctx.save_for_backward(spikes if step is None else None, saved, step)
        ctx.code_range, ctx.time_window, ctx.dtype = code_range, time_window, x.dtype
        ctx.set_materialize_grads(False)
        return from_rows(spikes, x), None if membrane is None else from_rows(membrane, x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_spikes, grad_membrane):
        spikes, saved, step = ctx.saved_tensors
        like = grad_membrane if grad_spikes is None else grad_spikes
        by_time = (
            None if grad is None else as_rows(grad).view(ctx.time_window, -1)
            for grad in (grad_spikes, grad_membrane)
        )
        grad_x = like.new_empty(ctx.time_window, like.numel() // ctx.time_window, dtype=ctx.dtype)
        grad_step = lif_backward(*by_time, spikes, saved, step, ctx.code_range, grad_x.unbind())
        return from_rows(grad_x, like), grad_step, None, None, None


class LIF(nn.Module):
    """A population of LIF neurons; with a quantizer, of b-bit membrane potentials."""

    def __init__(self, quantizer: MembraneQuantizer | None = None):
        super().__init__()
        self.quantizer = quantizer
        self.threshold = THRESHOLD

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
