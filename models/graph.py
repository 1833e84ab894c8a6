"""What a network does with an image, read off its own forward pass: `graph_of`.

Whatever has to know how layers are connected (the integer network's checks, the hardware report,
folding, exports) works from this list, so it works for any network that is built of `Layers`.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from models.batch_norm import BatchNorm
from models.layers import Conv2d, Stream
from models.neuron import LIF, Watch
from quantization import ImageQuantizer, StreamQuantizer

KINDS = {  # of the layers whose names are in a graph
    Conv2d: "conv",
    BatchNorm: "batch_norm",
    LIF: "lif",
    nn.MaxPool2d: "pool",
    StreamQuantizer: "stream",
    Stream: "stream",
    ImageQuantizer: "codes",
}
ADDITIONS = {"add", "add_", "__add__", "__iadd__", "__radd__"}
SOURCES = {  # of values, in words (`source_of`)
    "image": "the image",
    "lif": "spikes",
    "stream": "a stream's codes",
    "sums": "the real values behind a batch norm",
}
READS = {"lif": "sums", "stream": "sums", "pool": "lif"}  # see `source_of`
SOME_T = 89  # timesteps while a graph is read: no network has this number by chance
UNCHANGED = {"contiguous", "clone", "detach"}  # the same values


class Node(NamedTuple):
    """One operation of a network.

    kind: "image", "codes" (of the image), "conv", "batch_norm", "lif", "pool" (the maximum of
    spikes), "stream" (codes of real values, in full precision these values), "add", or "repeat" (a
    static image's stem, given to all timesteps).
    name: of its module; empty for "image", "add" and "repeat".
    reads: the numbers of the nodes whose results it takes.
    shape: (C, H, W) of its result.
    """

    kind: str
    name: str
    reads: tuple[int, ...]
    shape: tuple[int, int, int]


class _Value(Tensor):
    """The result of a node while a graph is read: a tensor without numbers."""

    graph: list[Node]
    number: int

    @classmethod
    def of(cls, graph: list[Node], kind: str, name: str, reads: tuple, shape: tuple) -> "_Value":
        graph.append(Node(kind, name, reads, tuple(shape[1:])))
        return cls.at(graph, len(graph) - 1, shape)

    @classmethod
    def at(cls, graph: list[Node], number: int, shape: tuple) -> "_Value":
        value = torch.empty(shape, device="meta").as_subclass(cls)
        value.graph, value.number = graph, number
        return value

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", str(func))
        values = [x for x in (args[0] if name == "cat" else args) if isinstance(x, Tensor)]
        if all(isinstance(x, cls) for x in values):  # nothing is computed: only shapes are known
            first, *others = values
            numbers = tuple(x.number for x in values)
            if name in UNCHANGED:
                return cls.at(first.graph, first.number, first.shape)
            plain = not kwargs  # alpha=2 adds twice of it
            if name in ADDITIONS and plain and [x.shape for x in others] == [first.shape]:
                for number in numbers:
                    check_source("an addition", "sums", source_of(first.graph, number))
                total = cls.of(first.graph, "add", "", numbers, first.shape)
                if name not in ("add_", "__iadd__"):
                    return total
                first.number = total.number  # whatever else this tensor is called
                return first
            if name == "cat" and len(set(numbers)) == 1:
                shape = len(values) * len(first), *first.shape[1:]
                return cls.of(first.graph, "repeat", "", numbers[:1], shape)
        with torch._C.DisableTorchFunctionSubclass(), suppress(Exception):
            result = func(*args, **(kwargs or {}))
            if not isinstance(result, Tensor):
                return result
        raise ValueError(
            f"it calls {name}, and what is known of a network is that it adds, and the layers of "
            "`Layers` and nn.MaxPool2d"
        )


@contextmanager
def computed_by(network: nn.Module, functions: Mapping[nn.Module, Callable]) -> Iterator[None]:
    """While open, these modules of a network are computed by their functions, and none of its hooks
    is called: they are for the values of the network itself."""
    before = {module: dict(vars(module)) for module in network.modules()}
    for module in before:
        vars(module).update(_forward_hooks=OrderedDict(), _forward_pre_hooks=OrderedDict())
    for module, function in functions.items():
        module.forward = function
    try:
        yield
    finally:
        for module, attributes in before.items():
            vars(module).clear()
            vars(module).update(attributes)


def layers_of(network: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(name, module, kind) of what a graph knows by name."""
    for name, module in network.named_modules():
        for type_, kind in KINDS.items():
            if isinstance(module, type_):
                yield name, module, kind


def watched(membranes: Tensor) -> None:
    """Stands for whoever wants to see membranes."""


@torch.no_grad()
def graph_of(network: nn.Module) -> list[Node]:
    """The operations of a `SpikingNetwork`, in the order of its forward pass, the image first; the
    last one's spikes, averaged over time and plane, are what its `linear` reads.

    Of the images that the network is made for: its `input_shape`, or 32×32 pixels where it has
    none. Raises ValueError for a network that does something else, with what that is.
    """
    graph: list[Node] = []
    unscaled: set[int] = set()  # what must go into a batch norm
    kinds = {module: (kind, name) for name, module, kind in layers_of(network)}

    # Of a batch norm, what is behind x is its number of repeats.
    def apply(module: nn.Module, x: Tensor, time_window: int = 0, watch: Watch | None = None):
        kind, name = kinds[module]
        if any(node.name == name for node in graph):
            raise ValueError(f"{name} is used twice: a layer has one place in a network")
        if not isinstance(x, _Value):
            raise ValueError(f"{name} reads what was not computed from the image")
        batch, channels, *plane = x.shape
        if kind == "batch_norm":
            if graph[x.number].kind != "conv":
                raise ValueError(f"{name} is not right behind a convolution")
            check_channels(name, module.num_features, channels)
        if kind == "conv":
            check_input(name, module, source_of(graph, x.number))
            check_channels(name, module.in_channels, channels)
            channels = module.out_channels
            if module.bias is None:  # else a batch norm is in it (`folded`)
                unscaled.add(len(graph))
            how = module.kernel_size, module.stride, module.padding
            plane = [outputs(size, *of_side) for size, *of_side in zip(plane, *how, strict=True)]
        elif kind in READS:
            check_source(name, READS[kind], source_of(graph, x.number))
        if kind == "lif" and time_window != SOME_T:
            raise ValueError(f"{name} is not given the time_window of `spikes`")
        if kind == "lif" and watch is not watched:
            raise ValueError(f"{name} is not given `watch`: nobody could see its membranes")
        if kind == "pool" and _pair(module.dilation) != (1, 1):
            raise ValueError(f"{name} has a dilation, which no chip here knows")
        if kind == "pool":
            how = map(_pair, (module.kernel_size, module.stride, module.padding))
            sides = zip(plane, *how, strict=True)
            plane = [outputs(size, *of_side, module.ceil_mode) for size, *of_side in sides]
        if min(plane) < 1:
            raise ValueError(f"{name} leaves nothing of a plane of {x.shape[-2]}x{x.shape[-1]}")
        return _Value.of(graph, kind, name, (x.number,), (batch, channels, *plane))

    shape = network.input_shape or (network.stem.conv.in_channels, 32, 32)
    functions = {module: partial(apply, module) for module in kinds}
    with network.running_for(SOME_T), computed_by(network, functions):
        frames = len(shape) == 4  # (T, C, H, W), the timesteps already in the batch
        image = _Value.of(graph, "image", "", (), (SOME_T if frames else 1, *shape[-3:]))
        last = network.last_spikes(image, watched, frames)
    check_last(network, graph, last)
    for node in graph:
        for number in unscaled & set(node.reads if node.kind != "batch_norm" else ()):
            raise ValueError(f"{graph[number].name} needs a batch norm right behind it")
    return graph[: last.number + 1]


def check_last(network: nn.Module, graph: list[Node], last: object) -> None:
    """Refuses a network whose classifier reads anything but the spikes that it was made for."""
    if not isinstance(last, _Value) or source_of(graph, last.number) != "lif":
        raise ValueError("the last layer of a network must be a LIF layer")
    if last.shape[1] != network.linear.in_features:
        raise ValueError(
            f"`spikes` gives spikes of {last.shape[1]} channels, and `build` returned "
            f"{network.linear.in_features}"
        )


def outputs(size: int, kernel: int, stride: int, padding: int, ceil: bool = False) -> int:
    """Of a convolution or a pooling along one side; torch's own shapes take a second to load."""
    steps, rest = divmod(size + 2 * padding - kernel, stride)
    # A window that hangs over the end has to begin before it.
    more = ceil and rest > 0 and (steps + 1) * stride < size + padding
    return steps + 1 + more


def source_of(graph: list[Node], number: int) -> str:
    """What a value is: "image", "lif" (spikes), "stream" (codes, or what would be rounded to them)
    or "sums" (real values)."""
    kind = graph[number].kind
    if kind in ("pool", "repeat", "codes"):
        return source_of(graph, graph[number].reads[0])
    return kind if kind in ("image", "lif", "stream") else "sums"


def check_channels(name: str, expected: int, found: int) -> None:
    if expected != found:
        raise ValueError(f"{name} is for {expected} channels, and reads {found}")


def check_source(name: str, expected: str, source: str) -> None:
    """Raises ValueError for values of another kind: in integers they would be others."""
    if source != expected:
        raise ValueError(f"{name} reads {SOURCES[source]}, and should read {SOURCES[expected]}")


def check_input(name: str, conv: nn.Module, source: str) -> None:
    """Raises ValueError for a convolution that reads what a crossbar does not."""
    if source == "sums":
        raise ValueError(f"{name} reads no spikes: put a layers.stream() before a stream_conv")
    if source != "lif" and getattr(conv, "of_spikes", False):
        wanted = "stem_conv" if source == "image" else "stream_conv"
        raise ValueError(f"{name} reads no spikes: it must be a layers.{wanted}")


def convolutions(network: nn.Module) -> list[tuple[Node, Node, Node]]:
    """(what a convolution reads, the convolution, the batch norm behind it), in forward order."""
    graph = graph_of(network)
    behind = [(graph[node.reads[0]], node) for node in graph if node.kind == "batch_norm"]
    return [(graph[conv.reads[0]], conv, batch_norm) for conv, batch_norm in behind]
