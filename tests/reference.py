"""MS-ResNet written naively from the equations: plain loops over timesteps, autograd, any dtype.

Shares no code with models/: it reads a network's state_dict by the names of its weights.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LEAK, THRESHOLD, WINDOW, EPS = 0.25, 0.5, 0.5, 1e-5
BLOCKS = {18: [2, 2, 2, 2], 34: [3, 4, 6, 3]}


class Spike(torch.autograd.Function):
    """1 where the potential fires; the derivative is the rectangle around the threshold."""

    @staticmethod
    def forward(ctx, fires_at: Tensor, window_at: Tensor) -> Tensor:
        ctx.save_for_backward(window_at)
        return (fires_at > THRESHOLD).to(fires_at.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (u,) = ctx.saved_tensors
        return grad * ((u - THRESHOLD).abs() < WINDOW) / (2 * WINDOW), None


def round_straight_through(x: Tensor) -> Tensor:
    return x + (torch.round(x) - x).detach()


def quantize(x: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    """LSQ by autograd: rounding is straight-through, clamping and the step are differentiated."""
    return step * round_straight_through(torch.clamp(x / step, low, high))


def lif(currents: list[Tensor], quantizer=None) -> tuple[list[Tensor], list[Tensor]]:
    """(spikes, membrane potentials) at each timestep."""
    spikes, membranes = [], []
    u = s = torch.zeros_like(currents[0])
    for x in currents:
        before_rounding = LEAK * u * (1 - s.detach()) + x
        u = before_rounding if quantizer is None else quantizer(before_rounding)
        s = Spike.apply(u, before_rounding.detach())
        spikes.append(s)
        membranes.append(u)
    return spikes, membranes


def batch_norm(currents: list[Tensor], weight: Tensor, bias: Tensor) -> list[Tensor]:
    """With the statistics of the batch over (T, B, H, W)."""
    x = torch.stack(currents)
    mean = x.mean(dim=(0, 1, 3, 4), keepdim=True)
    var = (x - mean).square().mean(dim=(0, 1, 3, 4), keepdim=True)
    weight, bias = (p.view(1, 1, -1, 1, 1) for p in (weight, bias))
    return list((x - mean) / torch.sqrt(var + EPS) * weight + bias)


def ms_resnet(
    weights: dict[str, Tensor], depth: int, images: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """(logits, membranes (T, B, C, H, W) of each LIF) of images (B, C, H, W), one a timestep."""

    def conv(name: str, xs: list[Tensor], stride: int = 1) -> list[Tensor]:
        kernel = weights[name]
        return [F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2) for x in xs]

    def bn(name: str, xs: list[Tensor]) -> list[Tensor]:
        return batch_norm(xs, weights[f"{name}.weight"], weights[f"{name}.bias"])

    membranes: list[Tensor] = []

    def fire(xs: list[Tensor]) -> list[Tensor]:
        spikes, u = lif(xs)
        membranes.append(torch.stack(u))
        return spikes

    stream = bn("stem.bn", conv("stem.conv.weight", images))
    index = 0
    for stage, blocks in enumerate(BLOCKS[depth]):
        for block in range(blocks):
            stride = 2 if stage > 0 and block == 0 else 1
            here = f"blocks.{index}"
            y = bn(f"{here}.bn1", conv(f"{here}.conv1.weight", fire(stream), stride))
            y = bn(f"{here}.bn2", conv(f"{here}.conv2.weight", fire(y)))
            if stride == 2:
                shortcut = conv(f"{here}.shortcut.conv.weight", stream, stride)
                stream = bn(f"{here}.shortcut.bn", shortcut)
            stream = [a + b for a, b in zip(y, stream, strict=True)]
            index += 1
    features = [s.mean(dim=(2, 3)) for s in fire(stream)]
    pooled = sum(features) / len(features)
    return pooled @ weights["linear.weight"].T + weights["linear.bias"], membranes
