"""Training for a chip: the sums of a quantized network's layers are what crossbars make of them.

In training the cells are drawn anew in every forward pass, so that the network learns to do with
any chip, not with one; in evaluation they are those of the first chip that `nonideal` draws with
its seed 0, and so is the noise of its reads. The gradient is that of the ideal sums
(models/quantized_layers.py), straight-through, but of what an ADC clips there is none
(`lost_gradient`): else the loss drives on sums that cannot follow.
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
from .crossbar import CrossbarLayer, Images, images_first, images_last
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
            sums, lost = placed.of_means(x), lost_gradient_of_means
        else:
            sums, lost = placed(x), lost_gradient
        return sums, partial(lost, placed, x) if is_training else None


def lost_gradient(layer: CrossbarLayer, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """What of the gradient of the sums (N, O, H', W') of a layer's last call does not reach its
    inputs x (N, I, H, W) and its weight codes (O, I, k, k), because ADCs clipped.

    An ideal sum is that of crossbars, of positive weights less those of negative ones. What a
    crossbar adds is put together from conversions, of slices of weights and bits of inputs, each of
    which counts a power of two. Its gradient goes through as much as of them was not clipped:

        d added / d its inputs = stored weights (1 - lost), d added / d stored weights = its inputs
        (1 - lost), lost = (what the clipped conversions count) / (what all of them count)

    A weight of 0 stands between the two kinds of crossbars, and gets the mean of both gradients.
    """
    counts = layer.slice_weights.float() / layer.slice_weights.sum()
    of_bits = [2**bit / (2**layer.input_bits - 1) for bit in range(layer.input_bits)]
    kinds = zip((1, -1), layer.how.stored(layer.codes), strict=False)
    signed = [sign * kind for sign, kind in kinds]
    signed = torch.stack(signed)[..., None] * counts
    stored = torch.cat(layer.in_crossbars(signed.flatten(-2)).unbind(), dim=-1)
    of_stored = torch.zeros_like(stored)  # (k²·groups, rows, columns)
    of_inputs = []
    for images, parts in layer.clipped:
        inputs, grads = images_last(x[images].float()), images_last(grad[images].float())
        of_input = torch.zeros_like(inputs)
        for part in parts:
            columns, places, outputs = part.columns, part.crossbars, part.outputs
            of_bit = part.where.unflatten(-1, (layer.input_bits, -1)).unbind(dim=-2)
            lost = of_bit[0] * of_bits[0]
            for share, where in zip(of_bits[1:], of_bit[1:], strict=True):
                lost.add_(where, alpha=share)
            of_outputs = grads[columns // layer.slices % len(layer.codes)]
            of_sums = of_outputs[:, *outputs] * lost
            for place in places:
                group, at = layer.window_of(place, inputs.shape[1:3], grads.shape[1:3])
                rows = slice(group * layer.rows, (group + 1) * layer.rows)
                fed = inputs[rows, *at.inputs]
                here = (of_sums if len(places) == 1 else of_sums[:, *at.outputs]).flatten(1)
                back = stored[place, : len(fed)].index_select(1, columns) @ here
                of_input[rows, *at.inputs] += back.view_as(fed)
                of_stored[place, : len(fed)].index_add_(1, columns, fed.flatten(1) @ here.T)
        of_inputs.append(images_first(of_input))
    return torch.cat(of_inputs).to(grad.dtype), of_codes(layer, of_stored, counts)


def lost_gradient_of_means(
    layer: CrossbarLayer, spikes: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """The same of a linear layer that was called with mean spikes (N, I): (N, I) and (O, I)."""
    grad = grad[..., None, None] / layer.positions
    of_numbers, of_weights = lost_gradient(layer, layer.numbers(spikes), grad)
    return of_numbers.flatten(1) * layer.positions, of_weights.flatten(1)


def of_codes(layer: CrossbarLayer, of_stored: Tensor, counts: Tensor) -> Tensor:
    """The gradient of weight codes, of that of what is stored in columns that count so much."""
    by_position = of_stored.unflatten(0, (layer.groups, -1)).transpose(0, 1).flatten(1, 2)
    by_position = by_position[:, : layer.in_channels]  # (k², I, planes·O·slices)
    kinds = by_position.unflatten(-1, (len(layer.cells), -1, len(counts))) @ counts
    kinds = kinds.permute(2, 3, 1, 0).unflatten(-1, layer.kernel)
    if len(kinds) == 1:
        return kinds[0]
    positive = (1 + layer.codes.sign()) / 2
    return kinds[0] * positive + kinds[1] * (1 - positive)


def put_on_chip(network: SpikingNetwork, chip: Chip) -> None:
    """Let a chip compute the sums of all layers of a quantized network, in training as in
    evaluation. Raises UserError for a weight that does not fit into a crossbar row, and where a GPU
    would have to."""
    if next(network.parameters()).device.type != "cpu":
        raise UserError("--crossbar: crossbars are simulated on a CPU: add --device cpu")
    generator, description = torch.Generator(), describe(network)
    check_layers(chip, [description])
    images = Images(network) if chip.is_read_anew else None
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
