"""What every spiking network here shares: time, the classifier, predictions.

A network is one class: `build` makes its layers of `Layers`, `spikes` says how they are run. The
same class is the full-precision teacher and, of quantized `Layers`, its student. Time is folded
into the batch, so each convolution and batch norm runs once, on (T·B, C, H, W) in channels_last,
and only the LIF neurons step through time.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from kernels import at_least_float32
from models.batch_norm import FoldedBatchNorm
from models.graph import convolutions, graph_of
from models.layers import FULL_PRECISION, Layers, Stem
from models.neuron import LIF, Watch, unfold_time
from quantization import ImageQuantizer, StreamQuantizer, WeightQuantizer, codes_of, pixels_of

PREDICTED_AT_ONCE = 256  # images, so that many fit into the memory


def _initialize(module: nn.Module) -> None:
    # Without data there is nothing to draw, and torch would load its compiler for that: a second.
    if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class SpikingNetwork(nn.Module):
    """A stem on the image, layers of spiking neurons, and a linear classifier that reads the last
    one's spikes, averaged over time and plane.

    A network of its own defines `build` and `spikes` (docs/extend.md).

    Args:
        num_classes: number of logits.
        time_window: timesteps T.
        in_channels: 3 for colour images, 1 for grey ones, 2 for event frames.
        width: channels of the stem; what else scales with it is the network's to say.
        layers: constructors of the layers, of full precision or `quantized_layers`.
        image_size: height and width, for networks that are made for one size.
    """

    def __init__(
        self,
        num_classes: int,
        time_window: int,
        in_channels: int = 3,
        width: int = 64,
        layers: Layers = FULL_PRECISION,
        image_size: tuple[int, int] = (32, 32),
    ):
        super().__init__()
        self.time_window = time_window
        # Of the data that it was made for; None where only the caller knows them.
        self.input_shape: tuple[int, ...] | None = None
        self.input_step: float | None = None  # of event frames: what one 8-bit code stands for
        self.class_names: list[str] | None = None
        self.stem = Stem(in_channels, width, layers)
        channels = self.build(width, image_size, layers)
        self.linear = layers.linear(channels, num_classes)
        self.apply(_initialize)
        self.to(memory_format=torch.channels_last)
        self.start_steps_from_weights()

    def build(self, channels: int, image_size: tuple[int, int], layers: Layers) -> int:
        """Make the layers behind the stem, which gives so many channels and the image's size;
        returns how many channels the last one's spikes have."""
        raise NotImplementedError

    def spikes(self, x: Tensor, time_window: int, watch: Watch | None) -> Tensor:
        """The last layer's spikes (T·B, C, H, W), of what the stem gives (T·B, channels, H, W).
        Time window and watch are for the LIF layers."""
        raise NotImplementedError

    def last_spikes(self, images: Tensor, watch: Watch | None, frames: bool) -> Tensor:
        """`spikes` of static images (B, C, H, W), or of frames (T·B, C, H, W)."""
        x = self.stem(images, repeats=1 if frames else self.time_window)
        return self.spikes(x, self.time_window, watch)

    def fold_time(self, images: Tensor) -> Tensor:
        """Static images (B, C, H, W) as they are, frames (B, T, C, H, W) as (T·B, C, H, W); both in
        channels_last. Raises ValueError where frames have another T than the network."""
        if images.dim() == 5:
            if images.shape[1] != self.time_window:
                raise ValueError(
                    f"expected frames of T = {self.time_window} timesteps, got {images.shape[1]}"
                )
            images = images.transpose(0, 1).flatten(0, 1)
        return images.contiguous(memory_format=torch.channels_last)

    def forward(
        self, images: Tensor, membranes: bool | Watch = False, logit_steps: int | None = None
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Logits (B, num_classes) of static images (B, C, H, W) or frames (B, T, C, H, W).

        With `membranes`, also the membrane potentials of every LIF layer in forward order, each
        (T, B, C, H, W); a function is given each layer with its own as soon as they are there, and
        nothing is kept. The logits are those of the first `logit_steps` timesteps, of all where
        None.
        Raises ValueError where frames have another T than the network.
        """
        kept: dict[LIF, Tensor] = {}
        watch = kept.__setitem__ if membranes is True else membranes or None
        spikes = self.last_spikes(self.fold_time(images), watch, frames=images.dim() == 5)
        spikes = unfold_time(spikes, self.time_window)
        logits = self.linear(spikes[:logit_steps].mean(dim=(0, 3, 4)))
        return (logits, list(kept.values())) if membranes is True else logits

    def neurons(self) -> dict[str, LIF]:
        """The LIF layers by name, in the order in which they run."""
        names = [node.name for node in graph_of(self) if node.kind == "lif"]
        return {name: self.get_submodule(name) for name in names}

    @torch.no_grad()
    def start_steps_from_weights(self) -> None:
        """Set the weight steps of a quantized network to suit the weights, as LSQ starts them."""
        for module in self.modules():
            quantizer = getattr(module, "quantizer", None)
            if isinstance(quantizer, WeightQuantizer):
                quantizer.start_from(module.weight)

    @torch.no_grad()
    def start_from(self, other: "SpikingNetwork") -> None:
        """Copy another network's weights and batch norms. A quantized network that starts from one
        of full precision starts its steps anew."""
        self.load_state_dict(other.state_dict(), strict=False)
        if type(other.stem.conv) is type(self.stem.conv):
            return
        self.start_steps_from_weights()
        for source, conv, bn in convolutions(self):
            # The other's statistics are of real values, ours of integer accumulators.
            scale = self.get_submodule(conv.name).quantizer.used_step().flatten()
            match self.get_submodule(source.name):
                case ImageQuantizer(step=step):
                    scale = scale * step
                case StreamQuantizer() as stream:
                    scale = scale * stream.used_step()
            batch_norm = self.get_submodule(bn.name)
            batch_norm.running_mean /= scale
            batch_norm.running_var /= scale.square()

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


def folded(network: SpikingNetwork) -> SpikingNetwork:
    """A copy to evaluate a full-precision network faster: without gradients, and with each batch
    norm's running statistics in the convolution before it. It is equal but for rounding."""
    network = copy.deepcopy(network).eval().requires_grad_(False)
    for _, conv, bn in convolutions(network):
        before, behind = network.get_submodule(conv.name), network.get_submodule(bn.name)
        network.set_submodule(conv.name, fuse_conv_bn_eval(before, behind))
        network.set_submodule(bn.name, FoldedBatchNorm())
    return network
