"""A trained network as plain numbers: what every export is written from.

How its layers are connected is read off its own forward pass (`models/graph.py`), so this serves
any network that is built of `Layers`. A full-precision one has its batch norms folded into the
convolutions before them. In a quantized one all is whole: codes of weights and membranes, and
streams in units of `quantization.GRID`, as in `models/integer_network.py`.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from models.batch_norm import BatchNorm
from models.graph import Node, graph_of
from models.integer_network import in_grid_units
from models.layers import Stream
from models.network import SpikingNetwork, folded
from models.neuron import LIF, Neuron, neuron_of
from models.quantized_layers import QuanConv2d, QuanLinear
from quantization import GRID, ImageQuantizer, Quantizer, StreamQuantizer
from runtime.errors import UserError


@dataclass(frozen=True)
class Operation:
    """One operation on values (T·B, C, H, W), timestep 1 of all images first; before the `repeat`
    of a static image (B, C, H, W).

    kind, and its numbers; those of a quantized network are whole, and // stands for a division that
    rounds to the nearest integer, halves to even:
        image   the input as the network reads it
        codes   clamp(x // step, low, high): of an image, or of what a shortcut reads
        conv    weight (O, I, k, k), stride, padding (top, left, bottom, right) by zeros; of full
                precision bias (O,)
        norm    (x · scale + shift) // divisor, both (C, 1, 1)
        repeat  the same at every timestep
        add     the sum of what it reads
        pool    the largest spike of each window: kernel, stride, padding, as a convolution's
        lif     the neuron of `models/neuron.py`: leak, threshold, reset; with `step`, before it
                fires u[t] becomes step · clamp(u[t] // step, low, high)
        head    logits: of the spikes' sums over T, H, W, times weight (K, C), times step (K,) if
                there is one, divided by positions = T·H·W, plus bias (K,)
    name: that of its module; "image", "head", or the kind and a number.
    reads: the names of the operations whose results it takes.
    shape: (C, H, W) of its result, of the head (K,).
    """

    kind: str
    name: str
    reads: tuple[str, ...]
    shape: tuple[int, ...]
    numbers: dict[str, Any]


@dataclass(frozen=True)
class Description:
    """The operations of a network in forward order, the image first and the head last.

    about: what else a file should say of it, plain enough for JSON.
    """

    operations: tuple[Operation, ...]
    time_window: int
    input_shape: tuple[int, ...]  # (C, H, W), of event frames (T, C, H, W)
    neuron: Neuron
    is_quantized: bool
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def takes_frames(self) -> bool:
        return len(self.input_shape) == 4

    def read_by(self, operation: Operation) -> Operation:
        """The first operation that it reads."""
        return next(x for x in self.operations if x.name == operation.reads[0])


def described(network: SpikingNetwork, about: dict[str, Any] | None = None) -> Description:
    """The description of a trained network that knows its `input_shape`.

    Raises UserError for a network that does what a description has no word for.
    """
    is_quantized = isinstance(network.linear, QuanLinear)
    network = network.eval() if is_quantized else folded(network)
    try:
        graph = graph_of(network)
    except ValueError as error:
        raise UserError(f"the network cannot be exported: {error}") from None
    operations: list[Operation] = []
    names: list[str] = []  # of each node, the operation with its value
    for node in graph:
        module = network.get_submodule(node.name) if node.name else None
        if isinstance(module, Stream):  # of full precision, where nothing is rounded
            names.append(names[node.reads[0]])
            continue
        plane = graph[node.reads[0]].shape[1:] if node.reads else ()
        kind, numbers = numbers_of(node, module, plane)
        name = node.name or (kind if kind == "image" else f"{kind}{len(operations)}")
        names.append(name)
        reads = tuple(names[i] for i in node.reads)
        operations.append(Operation(kind, name, reads, node.shape, numbers))
    head = numbers_of_head(network.linear)
    head["positions"] = network.time_window * node.shape[1] * node.shape[2]
    shape = (network.linear.out_features,)
    operations.append(Operation("head", "head", (names[-1],), shape, head))
    of_network = network.time_window, network.input_shape, neuron_of(network)
    return Description(tuple(operations), *of_network, is_quantized, about or {})


def numbers_of(node: Node, module: nn.Module | None, plane: tuple) -> tuple[str, dict[str, Any]]:
    """Kind and numbers of the operation that a node of a graph is, which reads a plane (H, W)."""
    match module:
        case nn.Conv2d():
            return "conv", numbers_of_convolution(module)
        case BatchNorm():
            return "norm", numbers_of_batch_norm(module)
        case ImageQuantizer():
            return "codes", {"step": module.step, "low": module.low, "high": module.high}
        case StreamQuantizer():
            return "codes", steps_of(module)
        case nn.MaxPool2d():
            return "pool", numbers_of_pool(module, plane, node.shape[1:])
        case LIF():
            leak, threshold, reset, *_ = module.neuron
            about = {"leak": leak, "threshold": threshold, "reset": reset}
            if module.quantizer is not None:
                about |= {"threshold": threshold / GRID} | steps_of(module.quantizer)
            return "lif", about
    return node.kind, {}


def numbers_of_convolution(conv: nn.Conv2d) -> dict[str, Any]:
    is_quantized = isinstance(conv, QuanConv2d)
    weight = conv.quantizer.codes(conv.weight)[0] if is_quantized else conv.weight
    bias = {} if conv.bias is None else {"bias": array(conv.bias)}
    how = {"stride": conv.stride, "padding": conv.padding * 2}
    return {"weight": array(weight)} | how | bias


def numbers_of_batch_norm(bn: BatchNorm) -> dict[str, Any]:
    """Of a quantized one, whole: the step of its scales is a power of two."""
    (scale, scale_step), (shift, shift_step) = bn.codes(*bn.running_statistics())
    ratio = scale_step.item() / GRID
    divisor = max(1, round(1 / ratio))
    return {
        "scale": array(scale.long()[:, None, None]) * max(1, round(ratio)),
        "shift": array(shift.long()[:, None, None]) * in_grid_units(shift_step.item()) * divisor,
        "divisor": divisor,
    }


def numbers_of_pool(pool: nn.MaxPool2d, reads: tuple, gives: tuple) -> dict[str, Any]:
    """Padding adds zeros, which are no spikes; with ceil_mode the last windows reach beyond."""
    kernel, stride, padding = map(_pair, (pool.kernel_size, pool.stride, pool.padding))
    behind = (
        max(0, (gives[i] - 1) * stride[i] + kernel[i] - reads[i] - padding[i]) for i in (0, 1)
    )
    return {"kernel": kernel, "stride": stride, "padding": (*padding, *behind)}


def numbers_of_head(linear: nn.Linear) -> dict[str, Any]:
    if isinstance(linear, QuanLinear):
        codes, step = linear.quantizer.codes(linear.weight)
        weight = {"weight": array(codes), "step": array(step.flatten().double())}
    else:
        weight = {"weight": array(linear.weight)}
    return weight | {"bias": array(linear.bias)}


def steps_of(quantizer: Quantizer) -> dict[str, int]:
    step = in_grid_units(quantizer.used_step().item())
    return {"step": step, "low": quantizer.low, "high": quantizer.high}


def array(x: Tensor) -> np.ndarray:
    """In one piece, rows first: a network's weights are channels_last."""
    return x.detach().contiguous().numpy()
