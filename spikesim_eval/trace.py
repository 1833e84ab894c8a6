"""From a checkpoint to the layer list that the estimate reads."""

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from data_loader import evaluation_loader, load_data_sets
from load_settings import DATA_SETS, Settings, load_checkpoint, load_network
from models.neuron import LIF, count_spikes

from .layers import Layer, Network

FLOAT_BITS = 32  # full precision enters the estimate as 32-bit fixed point
IMAGE_BITS = 8


class _Origins(TorchDispatchMode):
    """Follows every tensor of a forward pass back to the layers and LIF populations it comes from.

    Kept per storage, so that views and writes into views are followed too.
    """

    def __init__(self):
        super().__init__()
        self.layers: dict[int, frozenset[str]] = {}
        self.populations: dict[int, frozenset[str]] = {}
        self._alive: list[Tensor] = []  # a freed storage's key could come back as another's

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        inputs = [self._key(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                for origins in (self.layers, self.populations):
                    found = (origins.get(key, frozenset()) for key in [*inputs, self._key(x)])
                    origins[self._key(x)] = frozenset().union(*found)
                self._alive.append(x)
        return result

    @staticmethod
    def _key(x: Tensor) -> int:
        return x.untyped_storage()._cdata

    def of(self, x: Tensor) -> tuple[frozenset[str], frozenset[str]]:
        """(layers, LIF populations) that x was computed from, up to the nearest of each."""
        key = self._key(x)
        return self.layers.get(key, frozenset()), self.populations.get(key, frozenset())

    def start(self, x: Tensor, layers: frozenset[str], populations: frozenset[str]) -> None:
        self.layers[self._key(x)], self.populations[self._key(x)] = layers, populations


def trace_network(
    network: nn.Module, sample: Tensor, bits: int, bn_bits: int, rates: dict[str, float]
) -> Network:
    """Layer list of a spiking network, from a forward pass of one sample.

    `bits` is the width of its membranes, `bn_bits` that of its batch norm scales. `rates` holds the
    measured spike rate of each LIF layer, by name; without it a rate counts as not measured. A
    convolution reads 1 bit where its input is spikes, 8 where it is the image, and
    `bits` where it is the residual stream.
    """
    origins = _Origins()
    shapes: dict[str, tuple[int, int, int]] = {}
    layers: list[Layer] = []

    def after_lif(name: str, spikes: Tensor) -> None:
        shapes[name] = tuple(spikes.shape[1:])
        before, _ = origins.of(spikes)
        origins.start(spikes, before, frozenset({name}))

    def after_layer(name: str, module: nn.Conv2d | nn.Linear, x: Tensor, y: Tensor) -> None:
        before, populations = origins.of(x)
        common = {
            "name": name,
            "after": tuple(sorted(before)),
            "weight_bits": module.quantizer.bits if hasattr(module, "quantizer") else FLOAT_BITS,
        }
        if isinstance(module, nn.Linear):
            (population,) = populations
            layer = Layer(
                kernel=1,
                in_channels=module.in_features,
                out_channels=module.out_features,
                in_size=shapes[population][1:],
                out_size=(1, 1),
                input_bits=None,
                linear=True,
                **common,
            )
        else:
            layer = Layer(
                kernel=module.kernel_size[0],
                in_channels=module.in_channels,
                out_channels=module.out_channels,
                in_size=tuple(x.shape[2:]),
                out_size=tuple(y.shape[2:]),
                input_bits=1 if populations else bits if before else IMAGE_BITS,
                bn_bits=bn_bits,
                spike_rate=rates.get(*populations) if populations else None,
                **common,
            )
        layers.append(layer)
        origins.start(y, frozenset({name}), frozenset())

    handles = []
    for name, module in network.named_modules():
        if isinstance(module, LIF):
            hook = lambda module, inputs, spikes, name=name: after_lif(name, spikes)  # noqa: E731
        elif isinstance(module, nn.Conv2d | nn.Linear):
            hook = lambda module, inputs, y, name=name: after_layer(name, module, inputs[0], y)  # noqa: E731
        else:
            continue
        handles.append(module.register_forward_hook(hook))
    try:
        with torch.no_grad(), origins:
            network.eval()(sample)
    finally:
        for handle in handles:
            handle.remove()
    return Network(
        time_steps=network.time_window,
        weight_bits=bits,
        membrane_bits=bits,
        layers=tuple(layers),
        lif=tuple(shapes.values()),
    )


@torch.no_grad()
def measured_rates(network: nn.Module, settings: Settings, data_path: str) -> dict[str, float]:
    """Spikes per neuron and timestep of each LIF layer, over the whole test set."""
    _, test_set = load_data_sets(settings.data, data_path, settings.time_window)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batches = evaluation_loader(test_set, settings.batch_size, 0, 1, settings.workers)
    network.to(device)
    with count_spikes(network) as counts:
        for images, _ in tqdm(batches, "measuring spike rates", leave=False):
            network(images.to(device))
    network.cpu()
    return {name: (fired / neurons).item() for name, (fired, neurons) in counts.items()}


def trace_checkpoint(path: str, data_path: str | None = None) -> Network:
    """The layers of a checkpoint's network, with spike rates where there are data to measure them.

    The digits are always at hand; other data sets are read below `data_path` where it is given.
    Raises load_settings.UserError where the checkpoint or the data cannot be read.
    """
    checkpoint = load_checkpoint(path)
    settings, network = checkpoint.settings, load_network(checkpoint)
    rates = {}
    if data_path is not None or settings.data == "digits":
        rates = measured_rates(network, settings, data_path or ".")
    data_set = DATA_SETS[settings.data]
    shape = (data_set.in_channels, data_set.image_size, data_set.image_size)
    steps = (settings.time_window,) if data_set.events else ()
    sample = torch.zeros(1, *steps, *shape)
    bits, bn_bits = settings.bits or FLOAT_BITS, settings.bn_bits or FLOAT_BITS
    return trace_network(network, sample, bits, bn_bits, rates)
