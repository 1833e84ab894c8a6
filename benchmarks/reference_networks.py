"""The same MS-ResNet as others compute it: what `benchmarks.training_step` compares with.

loops          every layer a loop over timesteps, as in the public MS-ResNet code
spikingjelly   its multi-step layers and neurons
relu           no time at all: the T·B images of all timesteps and ReLU for the neurons
convolutions   nothing but them and the residual additions
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import MSResNet
from models.layers import Layers
from models.neuron import Neuron, Spike


def layers_of(
    conv: Callable[..., nn.Module],
    batch_norm: Callable[..., nn.Module],
    lif: Callable[[Neuron], nn.Module],
) -> Layers:
    return Layers(stem_conv=conv, conv=conv, stream_conv=conv, batch_norm=batch_norm, lif_of=lif)


class _LoopedLIF(nn.Module):
    def __init__(self, neuron: Neuron):
        super().__init__()
        self.neuron = neuron

    def forward(self, x: Tensor, time_window: int, watch: None) -> Tensor:
        spikes, u, fired = torch.zeros_like(x), None, None
        for t, x_t in enumerate(x):
            u = x_t if u is None else self.neuron.leak * u * (1 - fired.detach()) + x_t
            fired = Spike.apply(u, u, self.neuron)
            spikes[t] = fired
        return spikes


def _conv2d(
    in_channels: int, channels: int, kernel: int, stride: int = 1, of: type = nn.Conv2d, **options
) -> nn.Conv2d:
    return of(in_channels, channels, kernel, stride, kernel // 2, bias=False, **options)


class _LoopedConv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        size = ((n - 1) // self.stride[0] + 1 for n in x.shape[-2:])  # padding keeps the size
        y = x.new_zeros(*x.shape[:2], self.out_channels, *size)
        for t, x_t in enumerate(x):
            y[t] = super().forward(x_t)
        return y


class _LoopedBatchNorm(nn.BatchNorm3d):
    """The public code knows time as the depth of a volume, and copies there and back."""

    def __init__(self, channels: int, weight: float):
        super().__init__(channels)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(1, 2, 0, 3, 4).contiguous()).permute(2, 0, 1, 3, 4)


class StepByStep(MSResNet):
    """MS-ResNet of layers on (T, B, C, H, W)."""

    def forward(self, images: Tensor) -> Tensor:
        T = self.time_window
        x = self.stem.bn(self.stem.conv(images.unsqueeze(0).repeat(T, 1, 1, 1, 1)))
        for block in self.blocks:
            x = block(x, T, None)
        return self.linear(self.lif(x, T, None).mean(dim=(0, 3, 4)))


def loops(*shape: int) -> StepByStep:
    conv = partial(_conv2d, of=_LoopedConv2d)
    return StepByStep(*shape, layers=layers_of(conv, _LoopedBatchNorm, _LoopedLIF))


def spikingjelly(*shape: int, surrogate: str) -> StepByStep:
    """The surrogate is "Rect" or "ATan"."""
    from spikingjelly.activation_based import layer
    from spikingjelly.activation_based import surrogate as surrogates
    from spikingjelly.activation_based.neuron import LIFNode

    class Neurons(LIFNode):
        def forward(self, x: Tensor, time_window: int, watch: None) -> Tensor:
            return super().forward(x)

    def lif(neuron: Neuron) -> Neurons:
        return Neurons(
            tau=1 / (1 - neuron.leak),
            decay_input=False,
            v_threshold=neuron.threshold,
            surrogate_function={"Rect": surrogates.Rect(alpha=1.0), "ATan": surrogates.ATan()}[
                surrogate
            ],
            detach_reset=True,
            step_mode="m",
        )

    conv = partial(_conv2d, of=layer.Conv2d, step_mode="m")
    batch_norm = lambda channels, weight: layer.BatchNorm2d(channels, step_mode="m")  # noqa: E731
    return StepByStep(*shape, layers=layers_of(conv, batch_norm, lif))


class _ReLU(nn.Module):
    def forward(self, x: Tensor, time_window: int, watch: None) -> Tensor:
        return F.relu(x)


class _BatchNorm2d(nn.BatchNorm2d):
    def __init__(self, channels: int, weight: float):
        super().__init__(channels)

    def forward(self, x: Tensor, repeats: int = 1) -> Tensor:
        return super().forward(x)


RELU = layers_of(_conv2d, _BatchNorm2d, lambda neuron: _ReLU())


class ReLUNetwork(MSResNet):
    """The limit: the same convolutions and batch norms on T·B images, in channels_last."""

    def __init__(self, *shape: int):
        super().__init__(*shape, layers=RELU)

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.unsqueeze(1).expand(-1, self.time_window, -1, -1, -1))


class _Nothing(nn.Module):
    """In the place of a batch norm or of neurons."""

    def __init__(self, *_: object):
        super().__init__()

    def forward(self, x: Tensor, *_: object) -> Tensor:
        return x


class ConvolutionsAlone(MSResNet):
    """What is left if batch norms and neurons cost nothing; the static image's stem runs once."""

    def __init__(self, *shape: int):
        super().__init__(*shape, layers=layers_of(_conv2d, _Nothing, _Nothing))
        with torch.no_grad():  # nothing keeps their output from growing
            for name, weight in self.named_parameters():
                weight.mul_(0.1 if "conv" in name else 1)


def copy_parameters(source: nn.Module, target: nn.Module) -> nn.Module:
    """Give `target` the parameters of `source`, which come in the same order; returns it."""
    with torch.no_grad():
        for ours, theirs in zip(source.parameters(), target.parameters(), strict=True):
            theirs.copy_(ours)
    return target
