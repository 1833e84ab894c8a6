"""Training for a chip: the sums of a quantized network's layers are what crossbars make of them.

In training the cells are drawn anew in every forward pass, so that the network learns to do with
any chip, not with one; in evaluation they are those of the first chip that `nonideal` draws with
its seed 0. The gradient is that of the ideal sums (models/quantized_layers.py): straight-through,
also where an ADC clips.
"""

from dataclasses import replace
from math import prod

import numpy as np
import torch
from torch import Tensor, nn

from models import SpikingNetwork

from .chip import Chip
from .crossbar import CrossbarLayer
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
    """

    def __init__(
        self,
        network: SpikingNetwork,
        description: LayerList,
        index: int,
        chip: Chip,
        generator: torch.Generator,
    ):
        self.network, self.description, self.index = network, description, index
        self.layer, self.chip, self.generator = description.layers[index], chip, generator

    def __call__(self, x: Tensor, codes: Tensor) -> Tensor:
        """The sums of integers x (N, I, H, W) with weight codes (O, I, k, k); of a linear layer,
        (O, I), that reads mean spikes (N, I), their means."""
        layer = self.layer
        description = replace(self.description, time_steps=self.network.time_window)
        is_training = self.network.training
        generator = self.generator if is_training else generator_of(self.index, description, 0)
        codes = codes.round().int()
        if not layer.linear:
            how = layer.stride, layer.padding
            return CrossbarLayer(codes, layer, description, self.chip, *how, generator).read(x)
        positions = description.time_steps * prod(layer.in_size)
        counts = (x * positions).round()[..., None, None]
        placed = CrossbarLayer(
            codes[..., None, None], layer, description, self.chip, generator=generator
        )
        return placed.read(counts).flatten(1) / positions


def put_on_chip(network: SpikingNetwork, chip: Chip) -> torch.Generator:
    """Let a chip compute the sums of all layers of a quantized network, in training as in
    evaluation; returns the generator of its cells' draws in training."""
    generator, description = torch.Generator(), describe(network)
    for index, layer in enumerate(description.layers):
        module = network.get_submodule(layer.name)
        module.crossbars = LayerOnChip(network, description, index, chip, generator)
    return generator


def seed_of_step(seed: int, step: int) -> int:
    """Of the cells' draws in a training step, counted from 0 over all epochs: of nothing else, so
    that they are the same in all processes, and in a resumed run."""
    # NumPy promises that a bit generator's raw numbers stay the same in all its versions.
    return int(np.random.PCG64([seed, CELLS, step]).random_raw())
