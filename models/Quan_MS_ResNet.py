"""Quan-MS-ResNet: MS-ResNet whose weights, membrane potentials, batch norms and inputs are integers
times a scale (MD-SNN, arXiv 2512.04443)."""

from models.MS_ResNet import MSResNet
from models.neuron import DEFAULT_NEURON, Neuron
from models.quantized_layers import quantized_layers


class QuanMSResNet(MSResNet):
    """MS-ResNet of `quantized_layers`, which have the arguments behind `width`."""

    def __init__(
        self,
        depth: int,
        num_classes: int,
        time_window: int,
        in_channels: int = 3,
        width: int = 64,
        *,
        bits: int,
        bn_bits: int = 8,
        image_step: float = 1 / 255,
        membrane_steps_learned: bool = True,
        neuron: Neuron = DEFAULT_NEURON,
    ):
        layers = quantized_layers(bits, bn_bits, image_step, membrane_steps_learned, neuron)
        super().__init__(depth, num_classes, time_window, in_channels, width, layers)
