"""From a trained network to the layer list that the estimate reads.

A checkpoint of main.py, or any torch module of a user's: its convolutions, linear layers and LIF
populations are met by forward hooks, and the residual graph is followed tensor by tensor.
"""

import importlib
import os
import sys
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader
from tqdm import tqdm

from data_loader import data_of, evaluation_loader
from load_settings import (
    DATA_SETS,
    Checkpoint,
    Settings,
    check_classes,
    data_set_of,
    load_checkpoint,
    load_network,
)
from models import MSResNet
from models.neuron import LIF, count_spikes

from .layers import MAX_BITS, InputError, Layer, Network, Subject, check_int

FLOAT_BITS = 32  # full precision enters the estimate as 32-bit fixed point
IMAGE_BITS = 8
AVERAGES = ("mean", "sum", "avg_pool2d", "_adaptive_avg_pool2d")  # names of aten functions
ADDITIONS = ("add", "add_")
CONVOLUTIONS, PRODUCTS = ("convolution",), ("addmm", "mm", "bmm")


@dataclass(frozen=True)
class Origin:
    """What a tensor was computed from: the nearest layers, the nearest LIF populations, the largest
    sum of their spikes, whether these have been averaged, and whether a layer's real-valued output
    is in it."""

    layers: frozenset[str] = frozenset()
    populations: frozenset[str] = frozenset()
    spikes: int = 0
    averaged: bool = False
    real: bool = False

    def join(self, other: "Origin", added: bool = False) -> "Origin":
        return Origin(
            self.layers | other.layers,
            self.populations | other.populations,
            self.spikes + other.spikes if added else max(self.spikes, other.spikes),
            self.averaged or other.averaged,
            self.real or other.real,
        )


class _Origins(TorchDispatchMode):
    """Follows every tensor of a forward pass back to where it comes from.

    Kept per storage, so that views and writes into views are followed too.
    """

    def __init__(self):
        super().__init__()
        self.calls: Counter[str] = Counter()  # of aten functions
        self._origins: dict[int, Origin] = {}
        self._alive: list[Tensor] = []  # a freed storage's key could come back as another's

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        self.calls[name] += 1
        origin = Origin(averaged=name in AVERAGES)
        for x in _tensors((args, kwargs)):
            origin = origin.join(self.of(x), added=name in ADDITIONS)
        for x in _tensors(result):
            self.start(x, origin.join(self.of(x)))
        return result

    def of(self, x: Tensor) -> Origin:
        return self._origins.get(x.untyped_storage()._cdata, Origin())

    def start(self, x: Tensor, origin: Origin) -> None:
        self._origins[x.untyped_storage()._cdata] = origin
        self._alive.append(x)


def _tensors(tree: object) -> list[Tensor]:
    """All but oneDNN's packed weights, which have no storage to follow."""
    leaves = (x for x in tree_leaves(tree) if isinstance(x, Tensor))
    return [x for x in leaves if x.layout == torch.strided]


def is_spiking(module: nn.Module) -> bool:
    """This project's neurons and spikingjelly's."""
    if isinstance(module, LIF):
        return True
    spikingjelly = sys.modules.get("spikingjelly.activation_based.neuron.base_node")
    return spikingjelly is not None and isinstance(module, spikingjelly.BaseNode)


@dataclass(frozen=True)
class _Met:
    """A layer as its hook first saw it."""

    module: nn.Conv2d | nn.Linear
    in_size: tuple[int, int]
    out_size: tuple[int, int]
    origin: Origin


class _Tracer:
    """What the hooks of one forward pass see, and the layer list made of it."""

    def __init__(self, time_steps: int):
        self.time_steps, self.samples = time_steps, 1
        self.origins = _Origins()
        self.met: dict[str, _Met] = {}
        self.rows: dict[str, int] = {}  # inputs that a linear layer has seen
        self.calls: Counter[type] = Counter()  # of layers
        self.shapes: dict[str, tuple[int, int, int]] = {}
        self.spikes: dict[str, float] = {}
        self.steps: Counter[str] = Counter()  # timesteps that a LIF population has run

    def after_lif(self, name: str, module: nn.Module, spikes: Tensor) -> None:
        """`spikes` are (T·N, ...), or (N, ...) in a loop, or (T, N, ...) in spikingjelly's "m"."""
        is_folded = isinstance(module, LIF)
        leading = 2 if getattr(module, "step_mode", "s") == "m" else 1
        self.samples = spikes.shape[leading - 1] // (self.time_steps if is_folded else 1)
        self.steps[name] += self.time_steps if is_folded else spikes.shape[0] if leading == 2 else 1
        shape = tuple(spikes.shape[leading:])
        self.shapes[name] = shape + (1,) * (3 - len(shape))
        self.spikes[name] = self.spikes.get(name, 0.0) + spikes.sum().item()
        before = self.origins.of(spikes).layers
        self.origins.start(spikes, Origin(before, frozenset({name}), spikes=1))

    def after_layer(self, name: str, module: nn.Module, x: Tensor, y: Tensor) -> None:
        is_linear = isinstance(module, nn.Linear)
        self.calls[nn.Linear if is_linear else nn.Conv2d] += 1
        if is_linear:
            self.rows[name] = self.rows.get(name, 0) + x.numel() // module.in_features
            sizes = (1, 1), (1, 1)
        else:
            sizes = tuple(x.shape[-2:]), tuple(y.shape[-2:])
        met = self.met.setdefault(name, _Met(module, *sizes, self.origins.of(x)))
        if met.origin != self.origins.of(x):
            raise InputError(
                f"layer {name} runs in several places of the network, or feeds back: the estimate "
                "knows layers that run once a timestep"
            )
        self.origins.start(y, Origin(frozenset({name}), real=True))

    def check(self) -> None:
        """Raise InputError where something ran that the layer list would not show."""
        if not self.shapes:
            raise InputError("no LIF population found: this project's neurons and spikingjelly's")
        for kind, functions in ((nn.Conv2d, CONVOLUTIONS), (nn.Linear, PRODUCTS)):
            if sum(self.origins.calls[function] for function in functions) > self.calls[kind]:
                raise InputError(
                    f"the network computes {' or '.join(functions)} outside of {kind.__name__} "
                    "modules, which the estimate would miss"
                )
        for name, steps in self.steps.items():
            if steps != self.time_steps:
                raise InputError(f"LIF {name} ran {steps} timesteps, not {self.time_steps}")

    def layers(self, bits: int, bn_bits: int | None, rates: dict[str, float]) -> tuple[Layer, ...]:
        return tuple(self._layer(name, met, bits, bn_bits, rates) for name, met in self.met.items())

    def _layer(self, name: str, met: _Met, bits: int, bn_bits: int | None, rates) -> Layer:
        module, origin = met.module, met.origin
        common = {"name": name, "after": tuple(sorted(origin.layers)), "out_size": met.out_size}
        if hasattr(module, "quantizer") and (name in self.rows or not origin.layers):
            common["weight_bits"] = module.quantizer.bits  # stem and classifier have their own
        if name in self.rows:
            common |= {"in_channels": module.in_features, "out_channels": module.out_features}
            if self.time_steps == 1 or self.rows[name] < self.samples * self.time_steps:
                plane = self._pooled_plane(module.in_features, origin)
                return Layer(kernel=1, in_size=plane, input_bits=None, linear=True, **common)
        else:
            common |= {"in_channels": module.in_channels, "out_channels": module.out_channels}
        rate = rates.get(*origin.populations) if len(origin.populations) == 1 else None
        return Layer(
            kernel=1 if name in self.rows else module.kernel_size[0],
            in_size=met.in_size,
            input_bits=self._input_bits(met, bits),
            spike_rate=None if origin.averaged or origin.real else rate,
            bn_bits=bn_bits,
            **common,
        )

    def _pooled_plane(self, features: int, origin: Origin) -> tuple[int, int]:
        """What a classifier's inputs are averages over, beside time."""
        shapes = [self.shapes[name] for name in origin.populations]
        return shapes[0][1:] if shapes and shapes[0][0] == features else (1, 1)

    def _input_bits(self, met: _Met, bits: int) -> int:
        """Of one timestep's value; added or averaged populations give counts of spikes."""
        origin = met.origin
        if origin.real or not origin.populations:
            return bits if origin.layers else IMAGE_BITS
        module, pooled = met.module, 1
        if origin.averaged:
            is_linear = isinstance(module, nn.Linear)
            channels = module.in_features if is_linear else module.in_channels
            neurons = max(prod(self.shapes[name]) for name in origin.populations)
            pooled = neurons // (channels * prod(met.in_size))
        return (origin.spikes * max(1, pooled)).bit_length()


def check_convolution(name: str, module: nn.Module) -> None:
    """Raise InputError for a layer that the estimate would get wrong or not see."""
    if isinstance(module, nn.modules.conv._ConvNd) and (
        not isinstance(module, nn.Conv2d)
        or module.groups != 1
        or module.dilation != (1, 1)
        or module.kernel_size[0] != module.kernel_size[1]
    ):
        raise InputError(
            f"layer {name}: the estimate knows 2-d convolutions with square kernels, without "
            "groups and dilation"
        )


def trace_network(
    network: nn.Module,
    sample: Tensor,
    bits: int,
    bn_bits: int | None,
    rates: dict[str, float] | None,
    time_steps: int,
) -> Network:
    """Layer list of a spiking network, from a forward pass of `sample`.

    `bits` is the width of its membranes, `bn_bits` that of its batch norm scales. `rates` holds the
    measured spike rate of each LIF layer, by name, and without one it counts as not measured; with
    None the rates are those of the sample. A layer reads 1 bit where its input is spikes, more
    where populations are added or averaged, 8 where it is the image and `bits` where it is the
    residual stream. A linear layer that runs once, on averages over time, is the classifier; one
    that runs at every timestep is a 1×1 convolution. Raises InputError for layers that the estimate
    does not know.
    """
    tracer = _Tracer(time_steps)
    handles = []
    for name, module in network.named_modules():
        check_convolution(name, module)
        if is_spiking(module):
            hook = lambda m, x, y, name=name: tracer.after_lif(name, m, y)  # noqa: E731
        elif isinstance(module, nn.Conv2d | nn.Linear):
            hook = lambda m, x, y, name=name: tracer.after_layer(name, m, x[0], y)  # noqa: E731
        else:
            continue
        handles.append(module.register_forward_hook(hook))
    try:
        with torch.no_grad(), tracer.origins:
            network.eval()(sample)
    finally:
        for handle in handles:
            handle.remove()
    tracer.check()
    if rates is None:
        updates = time_steps * tracer.samples
        rates = {
            name: fired / (updates * prod(tracer.shapes[name]))
            for name, fired in tracer.spikes.items()
        }
    return Network(
        time_steps=time_steps,
        weight_bits=bits,
        membrane_bits=bits,
        layers=tracer.layers(bits, bn_bits, rates),
        lif=tuple(tracer.shapes.values()),
    )


def describe(network: MSResNet, settings: Settings, rates: dict[str, float]) -> Network:
    """The layer list of a checkpoint's network."""
    data_set = data_set_of(settings)
    shape = (data_set.in_channels, *data_set.image_size)
    steps = (network.time_window,) if data_set.events else ()
    sample = torch.zeros(1, *steps, *shape)
    bits, bn_bits = settings.bits or FLOAT_BITS, settings.bn_bits or FLOAT_BITS
    return trace_network(network, sample, bits, bn_bits, rates, network.time_window)


def evaluation_data(settings: Settings, data_path: str | None) -> DataLoader | None:
    """The test set of a checkpoint's data; None where nobody has said where it lies.

    The digits are always at hand. Raises load_settings.UserError where the data cannot be read.
    """
    if data_path is None and settings.data != "digits":
        return None
    check_classes(settings, data_path or ".", "the checkpoint")
    _, test_set = data_of(settings, data_path or ".")
    workers = min(settings.workers, os.cpu_count() or 1)  # trained elsewhere, perhaps
    return evaluation_loader(test_set, settings.batch_size, 0, 1, workers)


@torch.no_grad()
def measure(network: MSResNet, batches: DataLoader) -> tuple[float, dict[str, Tensor]]:
    """(accuracy, spikes per neuron at each timestep, (T,), of every LIF layer by name)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network.to(device)
    correct = total = 0
    with count_spikes(network) as counts:
        for images, labels in tqdm(batches, "measuring spike rates", leave=False, disable=None):
            if images.dim() == 5:
                images = images[:, : network.time_window]  # of a network run at fewer timesteps
            correct += (network(images.to(device)).argmax(1).cpu() == labels).sum().item()
            total += len(labels)
    network.cpu()
    return correct / total, {
        name: (fired / neurons).cpu() for name, (fired, neurons) in counts.items()
    }


def trace_checkpoint(
    path: str, data_path: str | None = None, time_steps: int | None = None
) -> Subject:
    """The network of a checkpoint, with accuracy and, where there are data, measured spike rates.

    With `time_steps` it is run at so many timesteps instead of those it was trained with, and its
    accuracy is measured again. Raises InputError where that needs data that nobody has given, and
    load_settings.UserError where the checkpoint or the data cannot be read.
    """
    checkpoint = load_checkpoint(path)
    settings, network, accuracy = checkpoint.settings, load_network(checkpoint), checkpoint.accuracy
    batches = evaluation_data(settings, data_path)
    if time_steps is not None and time_steps != settings.time_window:
        check_time_steps(checkpoint, time_steps, batches)
        network.time_window = time_steps
    rates: dict[str, Tensor] = {}
    if batches is not None:
        accuracy, rates = measure(network, batches)
    means = {name: rate.mean().item() for name, rate in rates.items()}
    by_timestep = {name: rate.tolist() for name, rate in rates.items()}
    return Subject(str(path), describe(network, settings, means), accuracy, by_timestep)


def check_time_steps(checkpoint: Checkpoint, time_steps: int, batches: DataLoader | None) -> None:
    check_int(time_steps, "time_steps", 1024)
    settings = checkpoint.settings
    if batches is None:
        raise InputError(
            f"--time_steps {time_steps}: accuracy is measured again, so give --data_path"
        )
    if DATA_SETS[settings.data].events and time_steps > settings.time_window:
        raise InputError(f"--time_steps {time_steps}: the frames have {settings.time_window}")


def trace_module(spec: str, time_steps: int, bits: int) -> Subject:
    """The network that a user's function gives: `spec` is "package.module:function".

    The function takes nothing and returns (network, sample): a torch module and an input as the
    module takes it. Spike rates are those of the sample, so it should be real data.
    The module must run all timesteps in one forward pass, in a loop or in spikingjelly's step mode
    "m"; T and bits are the caller's to say. Raises InputError for whatever is wrong with it.
    """
    check_int(time_steps, "time_steps", 10**6)
    check_int(bits, "bits", MAX_BITS)
    module_name, _, function_name = spec.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        returned = getattr(importlib.import_module(module_name), function_name)()
        match returned:
            case (nn.Module() as network, Tensor() as sample) if sample.numel():
                return Subject(spec, trace_network(network, sample, bits, None, None, time_steps))
    except InputError as error:
        raise InputError(f"--module {spec}: {error}") from None
    except (Exception, SystemExit) as error:  # whatever a user's code raises
        raise InputError(f"--module {spec}: {type(error).__name__}: {error}") from None
    finally:
        sys.path.pop(0)
    raise InputError(f"--module {spec} must return (torch module, tensor of samples)")
