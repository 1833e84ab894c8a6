"""MS-ResNet (Hu et al., arXiv 2112.08954): the full-precision spiking network.

Its residual stream is real-valued: a block adds BN(conv(LIF(BN(conv(LIF(x)))))) to it.
"""

from torch import Tensor, nn

from models.layers import FULL_PRECISION, Layers
from models.network import SpikingNetwork
from models.neuron import Watch

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}


class Shortcut(nn.Module):
    """BN(conv1×1(x)) of the real-valued stream: no LIF before it."""

    def __init__(self, in_channels: int, channels: int, stride: int, layers: Layers):
        super().__init__()
        self.stream = layers.stream()
        self.conv = layers.stream_conv(in_channels, channels, 1, stride)
        self.bn = layers.batch_norm(channels, layers.threshold)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(self.stream(x)))


class Block(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int, layers: Layers):
        super().__init__()
        self.lif1 = layers.lif()
        self.conv1 = layers.conv(in_channels, channels, 3, stride)
        self.bn1 = layers.batch_norm(channels, layers.threshold)
        self.lif2 = layers.lif()
        self.conv2 = layers.conv(channels, channels, 3)
        self.bn2 = layers.batch_norm(channels, 0.2 * layers.threshold)
        changes_shape = stride != 1 or in_channels != channels
        self.shortcut = (
            Shortcut(in_channels, channels, stride, layers) if changes_shape else nn.Identity()
        )

    def forward(self, x: Tensor, time_window: int, watch: Watch | None) -> Tensor:
        y = self.bn1(self.conv1(self.lif1(x, time_window, watch)))
        y = self.bn2(self.conv2(self.lif2(y, time_window, watch)))
        return y + self.shortcut(x)


class MSResNet(SpikingNetwork):
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
        image_size: tuple[int, int] = (32, 32),  # any
    ):
        if depth not in BLOCKS:
            raise ValueError(f"depth must be one of {sorted(BLOCKS)}, got {depth}")
        self.depth = depth
        super().__init__(num_classes, time_window, in_channels, width, layers, image_size)

    def build(self, channels: int, image_size: tuple[int, int], layers: Layers) -> int:
        blocks, width = [], channels
        for stage, count in enumerate(BLOCKS[self.depth]):
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                out_channels = width * 2**stage
                blocks.append(Block(channels, out_channels, stride, layers))
                channels = out_channels
        self.blocks = nn.ModuleList(blocks)
        self.lif = layers.lif()
        return channels

    def spikes(self, x: Tensor, time_window: int, watch: Watch | None) -> Tensor:
        for block in self.blocks:
            x = block(x, time_window, watch)
        return self.lif(x, time_window, watch)
