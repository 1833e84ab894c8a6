"""The same MS-ResNet as others compute it: what `benchmarks.training_step` compares with.

loops          every layer a loop over timesteps, as in the public MS-ResNet code
spikingjelly   its multi-step layers and neurons
relu           no time at all: the T·B images of all timesteps and ReLU for the neurons
convolutions   nothing but them and the residual additions
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import MSResNet
from models.MS_ResNet import BLOCKS, Layers
from models.neuron import LEAK, THRESHOLD, Spike


class LoopedLIF(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        spikes, u, fired = torch.zeros_like(x), None, None
        for t, x_t in enumerate(x):
            u = x_t if u is None else LEAK * u * (1 - fired.detach()) + x_t
            fired = Spike.apply(u, u)
            spikes[t] = fired
        return spikes


class LoopedConv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        size = ((n - 1) // self.stride[0] + 1 for n in x.shape[-2:])  # padding keeps the size
        y = x.new_zeros(*x.shape[:2], self.out_channels, *size)
        for t, x_t in enumerate(x):
            y[t] = super().forward(x_t)
        return y


class LoopedBatchNorm(nn.BatchNorm3d):
    """The public code knows time as the depth of a volume, and copies there and back."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(1, 2, 0, 3, 4).contiguous()).permute(2, 0, 1, 3, 4)


def spikingjelly_layers(surrogate: str) -> tuple:
    """Convolution, batch norm and neuron; the surrogate is "Rect" or "ATan"."""
    from spikingjelly.activation_based import layer, neuron
    from spikingjelly.activation_based import surrogate as surrogates

    derivative = {"Rect": surrogates.Rect(alpha=1.0), "ATan": surrogates.ATan()}[surrogate]
    return (
        lambda *args, **options: layer.Conv2d(*args, **options, step_mode="m"),
        lambda channels: layer.BatchNorm2d(channels, step_mode="m"),
        lambda: neuron.LIFNode(
            tau=1 / (1 - LEAK),
            decay_input=False,
            v_threshold=THRESHOLD,
            surrogate_function=derivative,
            detach_reset=True,
            step_mode="m",
        ),
    )


class _Block(nn.Module):
    def __init__(self, in_channels, channels, stride, conv, batch_norm, lif):
        super().__init__()
        self.lif1, self.conv1 = lif(), conv(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = batch_norm(channels)
        self.lif2, self.conv2 = lif(), conv(channels, channels, 3, 1, 1, bias=False)
        self.bn2, self.shortcut = batch_norm(channels), nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                conv(in_channels, channels, 1, stride, bias=False), batch_norm(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.lif2(self.bn1(self.conv1(self.lif1(x))))))
        return y + self.shortcut(x)


class StepByStep(nn.Module):
    """MS-ResNet on (T, B, C, H, W), of the layers given; its parameters come in our order."""

    def __init__(self, depth, num_classes, time_window, in_channels, width, conv, batch_norm, lif):
        super().__init__()
        self.time_window = time_window
        self.stem = nn.Sequential(conv(in_channels, width, 3, 1, 1, bias=False), batch_norm(width))
        blocks, channels = [], width
        for stage, count in enumerate(BLOCKS[depth]):
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                out_channels = width * 2**stage
                blocks.append(_Block(channels, out_channels, stride, conv, batch_norm, lif))
                channels = out_channels
        self.blocks, self.lif = nn.Sequential(*blocks), lif()
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = images.unsqueeze(0).repeat(self.time_window, 1, 1, 1, 1)
        spikes = self.lif(self.blocks(self.stem(x)))
        return self.linear(spikes.mean(dim=(0, 3, 4)))


def loops(*shape: int) -> StepByStep:
    return StepByStep(*shape, LoopedConv2d, LoopedBatchNorm, LoopedLIF)


def spikingjelly(*shape: int, surrogate: str) -> StepByStep:
    return StepByStep(*shape, *spikingjelly_layers(surrogate))


class _ReLU(nn.Module):
    def forward(self, x: Tensor, time_window: int, watch: None) -> Tensor:
        return F.relu(x)


class _BatchNorm2d(nn.BatchNorm2d):
    def __init__(self, channels: int, weight: float):
        super().__init__(channels)

    def forward(self, x: Tensor, repeats: int = 1) -> Tensor:
        return super().forward(x)


def _conv2d(in_channels: int, channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, bias=False)


RELU = Layers(
    stem_conv=_conv2d, conv=_conv2d, stream_conv=_conv2d, batch_norm=_BatchNorm2d, lif=_ReLU
)


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
        super().__init__(*shape, layers=replace(RELU, batch_norm=_Nothing, lif=_Nothing))
        with torch.no_grad():  # nothing keeps their output from growing
            for name, weight in self.named_parameters():
                weight.mul_(0.1 if "conv" in name else 1)


def copy_parameters(source: nn.Module, target: nn.Module) -> nn.Module:
    """Give `target` the parameters of `source`, which come in the same order; returns it."""
    with torch.no_grad():
        for ours, theirs in zip(source.parameters(), target.parameters(), strict=True):
            theirs.copy_(ours)
    return target
