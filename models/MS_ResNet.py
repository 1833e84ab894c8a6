"""MS-ResNet (Hu et al., arXiv 2112.08954): the full-precision spiking network.

Its residual stream is real-valued: a block adds BN(conv(LIF(BN(conv(LIF(x)))))) to it. Time is
folded into the batch, so each convolution and batch norm runs once, on (T·B, C, H, W) in
channels_last, and only the LIF neurons step through time.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from kernels import at_least_float32
from models.batch_norm import BatchNorm, FoldedBatchNorm
from models.neuron import DEFAULT_NEURON, LIF, Neuron, Watch, unfold_time
from quantization import codes_of, pixels_of

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
PREDICTED_AT_ONCE = 256  # images, so that many fit into the memory


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

    def __init__(self, in_channels: int, channels: int, kernel: int, stride: int = 1):
        super().__init__(in_channels, channels, kernel, stride, padding=kernel // 2, bias=False)

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.kernel_size != (1, 1):
            return F.conv2d(x, weight, self.bias, self.stride, self.padding)
        return F.conv2d(_PickPixels.apply(x, self.stride[0]), weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(x, self.weight)


@dataclass(frozen=True)
class Layers:
    """Constructors of the network's layers: what a quantized network changes, in one place; and
    the neuron, whose threshold is what batch norms start from."""

    image: Callable[[], nn.Module] = nn.Identity
    stem_conv: Callable[..., nn.Module] = Conv2d
    conv: Callable[..., nn.Module] = Conv2d  # of spikes
    stream_conv: Callable[..., nn.Module] = Conv2d  # of the residual stream
    batch_norm: Callable[..., nn.Module] = BatchNorm
    lif: Callable[[Neuron], nn.Module] = LIF
    stream: Callable[[], nn.Module] = nn.Identity
    linear: Callable[..., nn.Module] = nn.Linear
    neuron: Neuron = DEFAULT_NEURON


FULL_PRECISION = Layers()


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class Stem(nn.Module):
    """BN(conv3×3(image)); the same image at every timestep is computed once."""

    def __init__(self, in_channels: int, channels: int, layers: Layers):
        super().__init__()
        self.image = layers.image()
        self.conv = layers.stem_conv(in_channels, channels, 3)
        self.bn = layers.batch_norm(channels, layers.neuron.threshold)

    def forward(self, image: Tensor, repeats: int) -> Tensor:
        x = self.bn(self.conv(self.image(image)), repeats)
        # x.repeat() would forget channels_last
        return x if repeats == 1 else torch.cat([x] * repeats)


class Shortcut(nn.Module):
    """BN(conv1×1(x)) of the real-valued stream: no LIF before it."""

    def __init__(self, in_channels: int, channels: int, stride: int, layers: Layers):
        super().__init__()
        self.stream = layers.stream()
        self.conv = layers.stream_conv(in_channels, channels, 1, stride)
        self.bn = layers.batch_norm(channels, layers.neuron.threshold)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(self.stream(x)))


class Block(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int, layers: Layers):
        super().__init__()
        self.lif1 = layers.lif(layers.neuron)
        self.conv1 = layers.conv(in_channels, channels, 3, stride)
        self.bn1 = layers.batch_norm(channels, layers.neuron.threshold)
        self.lif2 = layers.lif(layers.neuron)
        self.conv2 = layers.conv(channels, channels, 3)
        self.bn2 = layers.batch_norm(channels, 0.2 * layers.neuron.threshold)
        changes_shape = stride != 1 or in_channels != channels
        self.shortcut = (
            Shortcut(in_channels, channels, stride, layers) if changes_shape else nn.Identity()
        )

    def forward(self, x: Tensor, time_window: int, watch: Watch | None) -> Tensor:
        y = self.bn1(self.conv1(self.lif1(x, time_window, watch)))
        y = self.bn2(self.conv2(self.lif2(y, time_window, watch)))
        return y + self.shortcut(x)


class MSResNet(nn.Module):
    """MS-ResNet-18 or -34 for small images (3×3 stem of stride 1).

    Args:
        depth: 18 or 34.
        num_classes: number of logits.
        time_window: timesteps T.
        in_channels: 3 for colour images, 1 for grey ones, 2 for event frames.
        width: channels of the stem and the first stage; the stages have 1, 2, 4, 8 times as many.
        layers: constructors of the layers (see `QuanMSResNet`).
    """

    def __init__(
        self,
        depth: int,
        num_classes: int,
        time_window: int,
        in_channels: int = 3,
        width: int = 64,
        layers: Layers = FULL_PRECISION,
    ):
        super().__init__()
        if depth not in BLOCKS:
            raise ValueError(f"depth must be one of {sorted(BLOCKS)}, got {depth}")
        self.time_window = time_window
        # Of the data that it was made for; None where only the caller knows them.
        self.input_shape: tuple[int, ...] | None = None
        self.input_step: float | None = None  # of event frames: what one 8-bit code stands for
        self.class_names: list[str] | None = None
        self.stem = Stem(in_channels, width, layers)
        blocks, channels = [], width
        for stage, count in enumerate(BLOCKS[depth]):
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                out_channels = width * 2**stage
                blocks.append(Block(channels, out_channels, stride, layers))
                channels = out_channels
        self.blocks = nn.ModuleList(blocks)
        self.lif = layers.lif(layers.neuron)
        self.linear = layers.linear(channels, num_classes)
        self.apply(_initialize)
        self.to(memory_format=torch.channels_last)

    def forward(
        self, images: Tensor, membranes: bool | Watch = False, logit_steps: int | None = None
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Logits (B, num_classes) of static images (B, C, H, W) or frames (B, T, C, H, W).

        With `membranes`, also the membrane potentials of every LIF layer in forward order, each
        (T, B, C, H, W); a function is given each as soon as it is there, and nothing is kept. The
        logits are those of the first `logit_steps` timesteps, of all where None.
        Raises ValueError where frames have another T than the network.
        """
        T = self.time_window
        kept: list[Tensor] = []
        watch = kept.append if membranes is True else membranes or None
        if images.dim() == 4:
            x = self.stem(images.contiguous(memory_format=torch.channels_last), repeats=T)
        elif images.shape[1] == T:
            frames = images.transpose(0, 1).flatten(0, 1)
            x = self.stem(frames.contiguous(memory_format=torch.channels_last), repeats=1)
        else:
            raise ValueError(f"expected frames of T = {T} timesteps, got {images.shape[1]}")
        for block in self.blocks:
            x = block(x, T, watch)
        spikes = unfold_time(self.lif(x, T, watch), T)
        logits = self.linear(spikes[:logit_steps].mean(dim=(0, 3, 4)))
        return (logits, kept) if membranes is True else logits

    @contextmanager
    def running_for(self, time_window: int) -> Iterator[None]:
        """While open, it runs for another number of timesteps: its weights know of none."""
        own, self.time_window = self.time_window, time_window
        try:
            yield
        finally:
            self.time_window = own

    @torch.no_grad()
    def predict(self, images: Tensor | np.ndarray) -> Tensor:
        """The share of each class, softmax of the logits, (B, num_classes) float32, on the device
        of the network and in evaluation mode.

        images: (B, C, H, W), pixels as uint8 from 0 to 255 or as floats from 0 to 1; of a network
        for event frames (B, T, C, H, W) of counts. Raises TypeError for another type of numbers,
        ValueError for another shape and for values out of range.
        """
        images = self._checked(images)
        training, weight = self.training, self.linear.weight
        shares = []
        self.eval()
        try:
            for part in images.split(PREDICTED_AT_ONCE):
                if part.dim() == 5:
                    part = codes_of(part, self.input_step or 1.0)
                x = part.to(weight.device, weight.dtype)
                logits = self(pixels_of(x, x.dtype) if part.dtype == torch.uint8 else x)
                shares.append(at_least_float32(logits).softmax(1).float())
        finally:
            self.train(training)
        return torch.cat(shares)

    def _checked(self, images: Tensor | np.ndarray) -> Tensor:
        """`images` as a tensor, where they are what `predict` says."""
        if isinstance(images, np.ndarray):
            kind = images.dtype
            if kind.kind in "fui":  # torch knows the machine's own order of bytes alone
                images = images.astype(kind.newbyteorder("="), order="C")
            with suppress(TypeError):  # no numbers
                images = torch.from_numpy(images)
        if not isinstance(images, Tensor):
            raise TypeError(f"expected a tensor or an array of numbers, got {type(images)}")
        shape, known, T = tuple(images.shape), self.input_shape, self.time_window
        events = len(shape) == 5 if known is None else len(known) == 4
        if known is None:
            known = (*(T,) * events, self.stem.conv.in_channels, *shape[-2:])
        if shape[1:] != known or 0 in shape:
            names = "(B, T, C, H, W)" if events else "(B, C, H, W)"
            expected = ", ".join(map(str, known))
            raise ValueError(f"expected {names} = (B, {expected}), got {shape}")
        if images.dtype == torch.uint8:
            return images
        if events and not images.is_complex() and images.dtype != torch.bool:
            images = images.float()
        if not images.is_floating_point():
            raise TypeError(
                "expected pixels as uint8 from 0 to 255 or as floats from 0 to 1, got "
                f"{images.dtype}"
            )
        low, high = images.min().item(), images.max().item()
        if not (low >= 0 and high < math.inf and (events or high <= 1)):  # NaN is none of it
            allowed = "counts" if events else "floats from 0 to 1 (or uint8 from 0 to 255)"
            raise ValueError(f"expected {allowed}, got values from {low:.4g} to {high:.4g}")
        return images


def convolutions(network: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """(module, name of its convolution, name of the batch norm behind it), in forward order."""
    for module in network.modules():
        for conv, bn in (("conv", "bn"), ("conv1", "bn1"), ("conv2", "bn2")):
            if hasattr(module, bn):
                yield module, conv, bn


def folded(network: MSResNet) -> MSResNet:
    """A copy to evaluate a full-precision network faster: without gradients, and with each batch
    norm's running statistics in the convolution before it. It is equal but for rounding."""
    network = copy.deepcopy(network).eval().requires_grad_(False)
    for module, conv, bn in convolutions(network):
        setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, bn)))
        setattr(module, bn, FoldedBatchNorm())
    return network
