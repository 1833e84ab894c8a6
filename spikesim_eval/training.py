"""Training for a chip: the sums of a quantized network's layers are what crossbars make of them.

In training the cells are drawn anew in every forward pass, so that the network learns to do with
any chip, not with one; in evaluation they are those of the first chip that `nonideal` draws with
its seed 0, and so is the noise of its reads. The gradient is that of the ideal sums
(models/quantized_layers.py), straight-through, but of what an ADC clips there is none
(`CrossbarLayer.lost_gradient`): else the loss drives on sums that cannot follow.
"""

from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from models import SpikingNetwork
from models.quantized_layers import Lost
from runtime.errors import UserError

from .chip import Chip, check_layers
from .crossbar import CrossbarLayer, Images
from .layer_list import LayerList
from .nonideal import generator_of
from .trace import describe

CELLS = 3  # beside the seed: other random numbers than those of held-out images and time windows


class LayerOnChip:
    """Computes the sums of one layer with the weights of now.

    Args:
        network: whose layer it is; quantized, and knowing its `input_shape`.
        description: the network's layer list.
        index: of the layer there.
        chip: the options.
        generator: of all layers, for the cells' draws in training.
        images: that the network computes, where the noise of reads is drawn by them.
    """

    def __init__(
        self,
        network: SpikingNetwork,
        description: LayerList,
        index: int,
        chip: Chip,
        generator: torch.Generator,
        images: Images | None,
    ):
        self.images = images
        self.network, self.description, self.index = network, description, index
        self.layer, self.chip, self.generator = description.layers[index], chip, generator

    def __call__(self, x: Tensor, codes: Tensor) -> tuple[Tensor, Lost | None]:
        """The sums of integers x (N, I, H, W) with weight codes (O, I, k, k); of a linear layer,
        (O, I), that reads mean spikes (N, I), their means. And, in training, what of their gradient
        is lost where ADCs clip."""
        layer, is_training = self.layer, self.network.training
        description = replace(self.description, time_steps=self.network.time_window)
        generator = self.generator if is_training else generator_of(self.index, description, 0)
        codes = codes.round().int()
        if layer.linear:
            codes, how = codes[..., None, None], ()
        else:
            how = layer.stride, layer.padding
        placed = CrossbarLayer(
            *(codes, layer, description, self.chip, *how),
            generator=generator,
            images=self.images,
            keep=["clipped"] if is_training else [],
        )
        if layer.linear:
            sums, lost = placed.of_means(x), placed.lost_gradient_of_means
        else:
            sums, lost = placed(x), placed.lost_gradient
        return sums, partial(lost, x) if is_training else None


def put_on_chip(network: SpikingNetwork, chip: Chip) -> None:
    """Let a chip compute the sums of all layers of a quantized network, in training as in
    evaluation. Raises UserError for a weight that does not fit into a crossbar row, and where a GPU
    would have to."""
    if next(network.parameters()).device.type != "cpu":
        raise UserError("--crossbar: crossbars are simulated on a CPU: add --device cpu")
    generator, description = torch.Generator(), describe(network)
    check_layers(chip, [description])
    images = Images(network) if chip.read_noise else None
    for index, layer in enumerate(description.layers):
        chip.check_fits(f"layer {layer.name}", description.weight_bits_of(layer))
        module = network.get_submodule(layer.name)
        module.crossbars = LayerOnChip(network, description, index, chip, generator, images)


def draw_cells(network: SpikingNetwork, seed: int, step: int) -> None:
    """Let the cells' draws depend on the seed and the number of the training step alone, counted
    from 0 over all epochs: they are the same in all processes, and in a resumed run. Of a network
    on no chip nothing happens."""
    crossbars = getattr(network.linear, "crossbars", None)
    if crossbars is not None:
        # NumPy promises that a bit generator's raw numbers stay the same in all its versions.
        drawn = np.random.PCG64([seed, CELLS, step]).random_raw()
        crossbars.generator.manual_seed(int(drawn))
