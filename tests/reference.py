"""MS-ResNet and VGG written naively from the equations: loops over timesteps, autograd, any dtype.

Shares with models/ the neuron's definition alone, and reads a state_dict by its names.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from models.neuron import DEFAULT_NEURON, Neuron, lif

EPS = 1e-5
BLOCKS = {18: [2, 2, 2, 2], 34: [3, 4, 6, 3]}
VGG, HIDDEN = {9: [2, 2, 3], 16: [2, 2, 3, 3, 3]}, {9: 1, 16: 2}


def round_straight_through(x: Tensor) -> Tensor:
    return x + (torch.round(x) - x).detach()


def codes(x: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    """LSQ by autograd: rounding is straight-through; at the ends of the range there is no gradient
    (torch.clamp has one, and membranes on a grid do lie exactly there)."""
    scaled = x / step
    inside = (scaled > low) & (scaled < high)
    clamped = torch.where(inside, scaled, torch.clamp(scaled.detach(), low, high))
    return round_straight_through(clamped)


def quantize(x: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    return step * codes(x, step, low, high)


def batch_norm(currents: list[Tensor], weight: Tensor, bias: Tensor, eps: float = EPS):
    """(scale·x + shift, scale, shift) with the statistics of the batch over (T, B, H, W)."""
    x = torch.stack(currents)
    mean = x.mean(dim=(0, 1, 3, 4), keepdim=True)
    var = (x - mean).square().mean(dim=(0, 1, 3, 4), keepdim=True)
    weight, bias = (p.view(1, 1, -1, 1, 1) for p in (weight, bias))
    scale = weight / torch.sqrt(var + eps)
    return list((x - mean) * scale + bias), scale, bias - mean * scale


class FullPrecision:
    """The layers of MS-ResNet, reading the weights of a state_dict by name."""

    def __init__(
        self, weights: dict[str, Tensor], time_window: int, neuron: Neuron = DEFAULT_NEURON
    ):
        self.weights, self.time_window, self.neuron = weights, time_window, neuron

    def image(self, x: Tensor) -> Tensor:
        return x

    def weight(self, name: str) -> Tensor:
        return self.weights[f"{name}.weight"]

    def linear_weight(self) -> Tensor:
        return self.weight("linear")

    def stream(self, name: str, xs: list[Tensor]) -> list[Tensor]:
        return xs

    def bn(self, name: str, xs: list[Tensor]) -> list[Tensor]:
        return batch_norm(xs, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])[0]

    def lif(self, name: str, xs: list[Tensor]) -> tuple[Tensor, Tensor]:
        return lif(torch.stack(xs), None, self.neuron)


class Quantized(FullPrecision):
    """The layers of Quan-MS-ResNet: integer codes, power-of-two batch norms, streams on a grid."""

    GRID = 2.0**-14
    EPS = 0.25
    IMAGE_STEP = 1 / 255

    def __init__(self, weights, time_window: int, bits: int, bn_bits: int, neuron=DEFAULT_NEURON):
        super().__init__(weights, time_window, neuron)
        self.bits, self.bn_bits = bits, bn_bits

    def step(self, name: str, values: int, high: int, grid: float | None = None) -> Tensor:
        """The learned step, rounded where it lies on a grid, with LSQ's gradient scale."""
        step = self.weights[f"{name}.step"]
        used = step.detach() if grid is None else torch.round(step.detach() / grid) * grid
        return used + (step - step.detach()) / (values * high) ** 0.5

    def weight_codes(self, name: str, bits: int) -> tuple[Tensor, Tensor]:
        w, high = self.weights[f"{name}.weight"], 2 ** (bits - 1) - 1
        step = self.step(f"{name}.quantizer", w[0].numel(), high)
        return codes(w, step, -high, high), step

    def image(self, x: Tensor) -> Tensor:
        return torch.clamp(torch.round(x / self.IMAGE_STEP), 0, 255)

    def weight(self, name: str) -> Tensor:
        return self.weight_codes(name, 8 if name == "stem.conv" else self.bits)[0]

    def linear_weight(self) -> Tensor:
        weight, step = self.weight_codes("linear", 8)
        return weight * step

    def stream(self, name: str, xs: list[Tensor]) -> list[Tensor]:
        low, high = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        step = self.step(name, xs[0][0].numel(), high, 4 * self.GRID)
        return [codes(x, step, low, high) for x in xs]

    def bn(self, name: str, xs: list[Tensor]) -> list[Tensor]:
        smooth, scale, shift = batch_norm(
            xs, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], self.EPS
        )
        scale = self.power_of_two_quantized(scale, 0.0)
        shift = self.power_of_two_quantized(shift, self.GRID)
        rounded = [torch.round((scale[0] * x + shift[0]) / self.GRID) * self.GRID for x in xs]
        return [y + (r - y).detach() for y, r in zip(smooth, rounded, strict=True)]

    def power_of_two_quantized(self, x: Tensor, smallest: float) -> Tensor:
        high = 2 ** (self.bn_bits - 1) - 1
        largest = x.detach().abs().max().item()
        step = max(2.0 ** math.ceil(math.log2(largest / high)), smallest)
        return torch.clamp(torch.round(x.detach() / step), -high, high) * step

    def lif(self, name: str, xs: list[Tensor]) -> tuple[Tensor, Tensor]:
        low, high = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        values = xs[0][0].numel() * self.time_window
        step = self.step(f"{name}.quantizer", values, high, self.GRID / self.neuron.leak)
        return lif(torch.stack(xs), lambda u: quantize(u, step, low, high), self.neuron)


def vgg(layers: FullPrecision, depth: int, images: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """As `ms_resnet`, of VGG-9 or -16."""
    membranes: list[Tensor] = []

    def unit(here: str, xs: list[Tensor], padding: int, lif: str) -> list[Tensor]:
        kernel = layers.weight(f"{here}.conv")
        sums = [F.conv2d(x, kernel, padding=padding) for x in xs]
        spikes, u = layers.lif(lif, layers.bn(f"{here}.bn", sums))
        membranes.append(u)
        return list(spikes)

    x = unit("stem", [layers.image(x) for x in images], 1, "lif")
    index = 0
    for number, convolutions in enumerate(VGG[depth]):
        for _ in range(convolutions - (number == 0)):
            x = unit(f"units.{index}", x, 1, f"units.{index}.lif")
            index += 1
        x = [F.max_pool2d(s, 2, ceil_mode=True) for s in x]
    for _ in range(HIDDEN[depth]):
        x = unit(f"units.{index}", x, 0, f"units.{index}.lif")
        index += 1
    assert x[0].shape[2:] == (1, 1)
    pooled = sum(s[:, :, 0, 0] for s in x) / len(x)
    return pooled @ layers.linear_weight().T + layers.weights["linear.bias"], membranes


def ms_resnet(
    layers: FullPrecision, depth: int, images: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """(logits, membranes (T, B, C, H, W) of each LIF) of images (B, C, H, W), one a timestep."""

    def conv(name: str, xs: list[Tensor], stride: int = 1) -> list[Tensor]:
        kernel = layers.weight(name)
        return [F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2) for x in xs]

    membranes: list[Tensor] = []

    def fire(name: str, xs: list[Tensor]) -> list[Tensor]:
        spikes, u = layers.lif(name, xs)
        membranes.append(u)
        return list(spikes)

    stream = layers.bn("stem.bn", conv("stem.conv", [layers.image(x) for x in images]))
    index = 0
    for stage, blocks in enumerate(BLOCKS[depth]):
        for block in range(blocks):
            stride = 2 if stage > 0 and block == 0 else 1
            here = f"blocks.{index}"
            spikes = fire(f"{here}.lif1", stream)
            y = layers.bn(f"{here}.bn1", conv(f"{here}.conv1", spikes, stride))
            spikes = fire(f"{here}.lif2", y)
            y = layers.bn(f"{here}.bn2", conv(f"{here}.conv2", spikes))
            if stride == 2:
                read = layers.stream(f"{here}.shortcut.stream", stream)
                shortcut = conv(f"{here}.shortcut.conv", read, stride)
                stream = layers.bn(f"{here}.shortcut.bn", shortcut)
            stream = [a + b for a, b in zip(y, stream, strict=True)]
            index += 1
    features = [s.mean(dim=(2, 3)) for s in fire("lif", stream)]
    pooled = sum(features) / len(features)
    return pooled @ layers.linear_weight().T + layers.weights["linear.bias"], membranes
