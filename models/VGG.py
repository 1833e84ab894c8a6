"""The spiking VGG that SpikeSim (Moitra et al., arXiv 2210.12899) maps onto crossbars: VGG-9 as in
its public code, and VGG-16, configuration D of Simonyan and Zisserman (arXiv 1409.1556).

Stages of conv3×3, batch norm and LIF, each followed by pooling; then hidden layers that read the
whole plane, and the classifier. Three things are this project's own. Batch norm is there, because
it is what a quantized layer's scales go into. Pooling takes the maximum of four spikes, where
SpikeSim's code averages them: so every crossbar but the first reads spikes, one bit a value, an
average would need three, and a chip pools with an OR. And the neuron is that of all networks here.
"""

from torch import Tensor, nn

from models.layers import FULL_PRECISION, Layers
from models.network import SpikingNetwork
from models.neuron import Watch

STAGES = {  # depth: channels of each convolution of each stage, in widths
    9: ((1, 1), (2, 2), (4, 4, 4)),
    16: ((1, 1), (2, 2), (4, 4, 4), (8, 8, 8), (8, 8, 8)),
}
HIDDEN = {9: (16,), 16: (64, 64)}  # at width 64: 1,024, and twice 4,096


class Unit(nn.Module):
    """pool(LIF(BN(conv(spikes))))"""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        layers: Layers,
        kernel: int = 3,
        padding: int | None = None,
        pools: bool = False,
    ):
        super().__init__()
        self.conv = layers.conv(in_channels, channels, kernel, 1, padding)
        self.bn = layers.batch_norm(channels, layers.threshold)
        self.lif = layers.lif()
        self.pool = pool() if pools else nn.Identity()

    def forward(self, x: Tensor, time_window: int, watch: Watch | None) -> Tensor:
        return self.pool(self.lif(self.bn(self.conv(x)), time_window, watch))


def pool() -> nn.MaxPool2d:
    """Halves a plane, rounding up, so that there is something left of the smallest."""
    return nn.MaxPool2d(2, ceil_mode=True)


class VGG(SpikingNetwork):
    """VGG-9 or -16 of spiking neurons, for square images of one size.

    Args:
        depth: 9 or 16, layers with weights.
        num_classes: number of logits.
        time_window: timesteps T.
        in_channels: 3 for colour images, 1 for grey ones, 2 for event frames.
        width: channels of the first stage; the others have 2, 4 and 8 times as many.
        layers: constructors of the layers, of full precision or `quantized_layers`.
        image_size: height and width.

    Raises ValueError for another depth, and for images that are not square.
    """

    def __init__(
        self,
        depth: int,
        num_classes: int,
        time_window: int,
        in_channels: int = 3,
        width: int = 64,
        layers: Layers = FULL_PRECISION,
        image_size: tuple[int, int] = (32, 32),
    ):
        if depth not in STAGES:
            raise ValueError(f"depth must be one of {sorted(STAGES)}, got {depth}")
        if image_size[0] != image_size[1]:
            height, width = image_size
            raise ValueError(f"images must be square, got {height}x{width}")
        self.depth = depth
        super().__init__(num_classes, time_window, in_channels, width, layers, image_size)

    def build(self, channels: int, image_size: tuple[int, int], layers: Layers) -> int:
        width, side, units = channels, image_size[0], []
        self.lif = layers.lif()  # behind the stem, the first convolution
        for stage, of_stage in enumerate(STAGES[self.depth]):
            for index, multiple in enumerate(of_stage):
                if stage == index == 0:
                    continue
                pools = index == len(of_stage) - 1
                units.append(Unit(channels, width * multiple, layers, pools=pools))
                channels = width * multiple
            side = -(-side // 2)
        for multiple in HIDDEN[self.depth]:
            # A layer that reads the whole plane, as a convolution that has one output pixel.
            units.append(Unit(channels, width * multiple, layers, kernel=side, padding=0))
            channels, side = width * multiple, 1
        self.units = nn.ModuleList(units)
        return channels

    def spikes(self, x: Tensor, time_window: int, watch: Watch | None) -> Tensor:
        x = self.lif(x, time_window, watch)
        for unit in self.units:
            x = unit(x, time_window, watch)
        return x
