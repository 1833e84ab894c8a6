"""The layers that a network of this project is built of, and what a quantized one changes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.batch_norm import BatchNorm
from models.neuron import DEFAULT_NEURON, LIF, Neuron


class _PickPixels(torch.autograd.Function):
    """x[:, :, ::stride, ::stride] in channels_last, as is its gradient: torch's own is not, and
    then everything before it in the network has to change layouts."""

    @staticmethod
    def forward(ctx, x, stride):
        ctx.shape, ctx.stride = x.shape, stride
        return x[:, :, ::stride, ::stride].contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx, grad):
        N, C, H, W = ctx.shape
        grad_x = grad.new_zeros(N, H, W, C).movedim(-1, 1)
        grad_x[:, :, :: ctx.stride, :: ctx.stride] = grad
        return grad_x, None


class Conv2d(nn.Conv2d):
    """Convolution without bias, but for what `folded` gives it.

    A strided 1×1 convolution first picks the pixels that it reads: the same sum, and oneDNN (torch
    2.11, CPU, channels_last) writes outside its memory in the weight gradient of a strided one.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel: int,
        stride: int = 1,
        padding: int | None = None,  # None: half of the kernel, which keeps the plane's size
    ):
        padding = kernel // 2 if padding is None else padding
        super().__init__(in_channels, channels, kernel, stride, padding, bias=False)

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.kernel_size != (1, 1):
            return F.conv2d(x, weight, self.bias, self.stride, self.padding)
        return F.conv2d(_PickPixels.apply(x, self.stride[0]), weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(x, self.weight)


class Stream(nn.Identity):
    """Where a convolution reads real values, and no spikes: a quantized network rounds them."""


@dataclass(frozen=True)
class Layers:
    """Constructors of a network's layers: what a quantized network changes, in one place; and the
    neuron, whose threshold is what batch norms start from."""

    image: Callable[[], nn.Module] = nn.Identity
    stem_conv: Callable[..., nn.Module] = Conv2d
    conv: Callable[..., nn.Module] = Conv2d  # of spikes
    stream_conv: Callable[..., nn.Module] = Conv2d  # of real values, behind a `stream`
    batch_norm: Callable[..., nn.Module] = BatchNorm
    lif_of: Callable[[Neuron], nn.Module] = LIF
    stream: Callable[[], nn.Module] = Stream
    linear: Callable[..., nn.Module] = nn.Linear
    neuron: Neuron = DEFAULT_NEURON

    def lif(self) -> nn.Module:
        return self.lif_of(self.neuron)

    @property
    def threshold(self) -> float:
        return self.neuron.threshold


FULL_PRECISION = Layers()


class Stem(nn.Module):
    """BN(conv3×3(image)); the same image at every timestep is computed once."""

    def __init__(self, in_channels: int, channels: int, layers: Layers):
        super().__init__()
        self.image = layers.image()
        self.conv = layers.stem_conv(in_channels, channels, 3)
        self.bn = layers.batch_norm(channels, layers.threshold)

    def forward(self, image: Tensor, repeats: int) -> Tensor:
        x = self.bn(self.conv(self.image(image)), repeats)
        # x.repeat() would forget channels_last
        return x if repeats == 1 else torch.cat([x] * repeats)
