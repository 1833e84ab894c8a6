"""What a network does with an image, read off its own forward pass: `graph_of`.

Whatever has to know how layers are connected (the integer network's checks, the hardware report,
folding, exports) works from this list, so it works for any network that is built of `Layers`.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.batch_norm import BatchNorm
from models.layers import Conv2d, Stream
from models.neuron import LIF
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
    def of(cls, graph: list[Node], kind: str, name: str, reads: tuple, like: Tensor) -> "_Value":
        value = torch.empty_like(like, device="meta").as_subclass(cls)
        graph.append(Node(kind, name, reads, tuple(like.shape[1:])))
        value.graph, value.number = graph, len(graph) - 1
        return value

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        if not isinstance(result, Tensor):
            return result
        name = getattr(func, "__name__", str(func))
        first, *rest = args[0] if name == "cat" else args
        values = [first, *(x for x in rest if isinstance(x, Tensor))]
        if all(isinstance(x, cls) for x in values):
            reads = tuple(x.number for x in values)
            if name in UNCHANGED:
                value = result.as_subclass(cls)
                value.graph, value.number = first.graph, first.number
                return value
            if name in ADDITIONS and len(values) == 2 and values[0].shape == values[1].shape:
                return cls.of(first.graph, "add", "", reads, result)
            if name == "cat" and len(set(reads)) == 1:
                return cls.of(first.graph, "repeat", "", reads[:1], result)
        raise ValueError(
            f"a network here adds, and has layers of `Layers` and nn.MaxPool2d, but it calls {name}"
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


@torch.no_grad()
def graph_of(network: nn.Module) -> list[Node]:
    """The operations of a `SpikingNetwork`, in the order of its forward pass, the image first; the
    last one's spikes, averaged over time and plane, are what its `linear` reads.

    Of the images that the network is made for: its `input_shape`, or 32×32 pixels where it has
    none. Raises ValueError for a network that does something else, with what that is.
    """
    graph: list[Node] = []
    kinds = {module: (kind, name) for name, module, kind in layers_of(network)}

    def apply(module: nn.Module, x: Tensor, *_: object) -> Tensor:
        kind, name = kinds[module]
        if any(node.name == name for node in graph):
            raise ValueError(f"{name} is used twice: a layer has one place in a network")
        if not isinstance(x, _Value):
            raise ValueError(f"{name} reads what was not computed from the image")
        y = torch.empty(x.shape, device="meta")
        if kind == "conv":
            check_input(name, module, source_of(graph, x.number))
            weight = torch.empty(module.weight.shape, device="meta")
            y = F.conv2d(y, weight, None, module.stride, module.padding)
        elif kind == "pool":
            if source_of(graph, x.number) != "lif":
                raise ValueError(f"{name} pools what are no spikes")
            how = module.kernel_size, module.stride, module.padding, module.dilation
            y = F.max_pool2d(y, *how, module.ceil_mode)
        return _Value.of(graph, kind, name, (x.number,), y)

    shape = network.input_shape or (network.stem.conv.in_channels, 32, 32)
    functions = {module: partial(apply, module) for module in kinds}
    timesteps = shape[0] if len(shape) == 4 else 2
    with network.running_for(timesteps), computed_by(network, functions):
        image = torch.empty(1, *shape, device="meta")
        if len(shape) == 4:  # (T, C, H, W), the timesteps already in the batch
            image = image[0]
        image = _Value.of(graph, "image", "", (), image)
        last = network.last_spikes(image, None, frames=len(shape) == 4)
    if not isinstance(last, _Value) or source_of(graph, last.number) != "lif":
        raise ValueError("the last layer of a network must be a LIF layer")
    return graph[: last.number + 1]


def source_of(graph: list[Node], number: int) -> str:
    """What a value is: "image", "lif" (spikes), "stream" (codes, or what would be rounded to them)
    or "sums" (real values)."""
    kind = graph[number].kind
    if kind in ("pool", "repeat", "codes"):
        return source_of(graph, graph[number].reads[0])
    return kind if kind in ("image", "lif", "stream") else "sums"


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
    found = []
    for node in graph:
        if node.kind == "batch_norm":
            conv = graph[node.reads[0]]
            if conv.kind != "conv":
                raise ValueError(f"{node.name} is not right behind a convolution")
            found.append((graph[conv.reads[0]], conv, node))
    return found
