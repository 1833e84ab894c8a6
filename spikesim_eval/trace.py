"""From a checkpoint of main.py to the layer list that the estimate reads."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from checkpoints import Checkpoint, build_network, load_checkpoint
from data_loader import Share, data_of, evaluation_loader
from display import kind_of
from engine.evaluate import evaluate
from load_settings import check_classes, load_network, refuse_another_fold
from models import SpikingNetwork
from models.graph import Node, graph_of, source_of
from models.neuron import neuron_of
from runtime.errors import UserError
from settings import Settings

from .chip import Chip
from .codes import Rows
from .layer_list import IMAGE_BITS, MAX_BITS, Layer, LayerList, Subject, check_int, show
from .silence import tile_sizes


def describe(
    network: SpikingNetwork, measured: Mapping[str, Mapping[str, Any]] | None = None
) -> LayerList:
    """The layer list of a network that knows its `input_shape`.

    Convolutions read the image, spikes, or a stream of real values, which are as wide as a
    membrane. Real values that wait for what is added to them are kept. `measured` holds what
    `counting_rows` has found of each layer, by name. Raises UserError for a network that is no
    such one.
    """
    try:
        graph = graph_of(network)
    except ValueError as error:
        raise UserError(f"the network has no layer list: {error}") from None
    measured, linear, is_static = measured or {}, network.linear, len(network.input_shape) == 3
    of_spikes = [x for x in graph if x.kind == "conv" and _source(graph, x) == "lif"]
    if not of_spikes:
        raise UserError("the network has no layer list: no convolution reads spikes")
    bits = bits_of(network.get_submodule(of_spikes[0].name)) or MAX_BITS
    batch_norms = {
        graph[x.reads[0]].name: bits_of(network.get_submodule(x.name)) or MAX_BITS
        for x in graph
        if x.kind == "batch_norm"
    }
    before = sums_in(graph)
    updating = layers_that_update(graph, before)
    layers: list[Layer] = []
    for node in graph:
        if node.kind != "conv":
            continue
        conv, source = network.get_submodule(node.name), _source(graph, node)
        reads = node.reads[0]
        more: dict[str, Any] = {}
        if source == "image":
            more = {"weight_bits": bits_of(conv), "static": is_static}
        layers.append(
            Layer(
                node.name,
                kernel=conv.kernel_size[0],
                in_channels=conv.in_channels,
                out_channels=conv.out_channels,
                in_size=graph[reads].shape[1:],
                out_size=node.shape[1:],
                input_bits={"image": IMAGE_BITS, "lif": 1, "stream": bits}[source],
                after=tuple(sorted(before[reads])),
                stride=conv.stride,
                padding=conv.padding,
                bn_bits=batch_norms.get(node.name),
                lif=node.name in updating,
                **more | measured.get(node.name, {}),
            )
        )
    shape = 1, linear.in_features, linear.out_features, graph[-1].shape[1:], (1, 1), None
    how = {"weight_bits": bits_of(linear), "linear": True, "lif": False}
    how |= measured.get("linear", {})
    layers.append(Layer("linear", *shape, tuple(sorted(before[-1])), **how))
    populations = tuple(node.shape for node in graph if node.kind == "lif")
    neuron, streams = neuron_of(network), tuple(streams_of(graph))
    shared = network.time_window, bits, bits
    return LayerList(*shared, tuple(layers), populations, streams, neuron.leak, neuron.reset)


def _source(graph: list[Node], node: Node) -> str:
    return source_of(graph, node.reads[0])


def sums_in(graph: list[Node]) -> list[set[str]]:
    """Of each node the convolutions whose sums are in its result, or in the membranes that its
    spikes come from."""
    found: list[set[str]] = []
    for node in graph:
        found.append({node.name} if node.kind == "conv" else set())
        if node.kind != "conv":
            found[-1].update(*(found[number] for number in node.reads))
    return found


def layers_that_update(graph: list[Node], before: list[set[str]]) -> set[str]:
    """The convolutions that pay for an update of membranes: of those that are added in front of a
    LIF layer the last one that reads no stream."""
    order = [node for node in graph if node.kind == "conv"]
    order.sort(key=lambda node: _source(graph, node) != "stream")  # those come first then
    taken: set[str] = set()
    for node, names in zip(graph, before, strict=True):
        if node.kind == "lif":
            free = [x.name for x in order if x.name in names - taken]
            taken.update(free[-1:])
    return taken


def streams_of(graph: list[Node]) -> list[tuple[int, int, int]]:
    """Shapes of the real values that two nodes read, one of them later. Those of a static image's
    stem are not among them: they are kept for all timesteps anyway."""
    readers = Counter(number for node in graph for number in node.reads)
    return [
        node.shape
        for number, node in enumerate(graph)
        if node.kind in ("batch_norm", "add") and readers[number] > 1
    ]


def bits_of(layer: nn.Module) -> int | None:
    """Of its weights, or of a batch norm's scales; None in full precision."""
    quantizer = getattr(layer, "quantizer", None)
    return None if quantizer is None else quantizer.bits


@contextmanager
def counting_rows(
    network: SpikingNetwork, description: LayerList, chip: Chip | None = None
) -> Iterator[Callable[[], dict[str, dict[str, Any]]]]:
    """Measures, while the network runs, what drives the rows of each layer's crossbars: the share
    of ones among their bits, silent patches and, for a chip or a grid of chips, silent tiles.
    Padding drives no row, and a pixel as many as there are outputs that read it.

    Yields a function that gives by layer what `describe` is to say of it; what a full-precision
    network reads as real numbers is not in it.
    """
    counts: dict[str, Rows] = {}

    def count(layer: Layer, _: nn.Module, inputs: tuple[Tensor]) -> None:
        (x,) = inputs
        if layer.linear:
            x = (x * description.time_steps * prod(layer.in_size)).round()[..., None, None]
        counts[layer.name].add(x.long())

    is_integer = bits_of(network.linear) is not None
    with ExitStack() as hooks:
        for layer in description.layers:
            if not (is_integer or layer.linear or layer.input_bits == 1):
                continue
            sizes = () if chip is None else tile_sizes(layer, chip)
            how = (1, 1), (0, 0)
            if not layer.linear:
                how = layer.stride, layer.padding
            counts[layer.name] = Rows(layer.kernel, description.input_bits(layer), *how, sizes)
            module = network.get_submodule(layer.name)
            hooks.enter_context(module.register_forward_pre_hook(partial(count, layer)))
        yield lambda: {name: rows.found() for name, rows in counts.items()}


def check_same_data(checkpoints: Sequence[str]) -> None:
    """Raise UserError where a checkpoint is missing, or not of the same data as the first."""
    first: dict[str, Any] = {}
    for path in dict.fromkeys(checkpoints):
        settings = load_checkpoint(path, weights=False).settings
        data_set = settings.data_set
        about = {"data": settings.data, "image size": data_set.image_size}
        about |= {"classes": settings.classes or data_set.num_classes, "fold": settings.fold}
        for what, value in about.items():
            if value != first.setdefault(what, value):
                raise UserError(
                    f"{path} and {checkpoints[0]} are not compared: {what} {show(value)} against "
                    f"{show(first[what])}"
                )


def evaluation_data(
    checkpoint: Checkpoint, data_path: str | None, time_window: int, test_images: int | None = None
) -> DataLoader | None:
    """The test set of a checkpoint's data, for this T, or `test_images` that are drawn of it; None
    where nobody has said where it lies.

    The digits are always at hand. Raises UserError where the data cannot be read, and for more
    images than there are.
    """
    settings = replace(checkpoint.settings, time_window=time_window)
    if data_path is None and settings.data != "digits":
        if test_images is not None:
            raise UserError(f"--test_images {test_images}: give --data_path, where they lie")
        return None
    check_classes(settings, data_path or ".", "the checkpoint")
    train_set, test_set = data_of(settings, data_path or ".")
    refuse_another_fold(checkpoint, "the checkpoint", settings, len(train_set))
    if test_images is not None and not 1 <= test_images <= len(test_set):
        raise UserError(f"--test_images must be 1 to {len(test_set)}, got {test_images}")
    workers = min(settings.workers, os.cpu_count() or 1)  # trained elsewhere, perhaps
    share = Share(settings.batch_size, workers=workers)
    return evaluation_loader(test_set, share, number=test_images)


def macs_of_image(settings: Settings) -> int:
    """Multiplications with accumulation that an image takes over all timesteps, with a stem that
    runs at each."""
    with torch.device("meta"):
        network = describe(build_network(settings)).always_running()
    return sum(map(network.ops, network.layers)) // 2


def trace_checkpoint(
    path: str,
    data_path: str | None = None,
    time_steps: int | None = None,
    chip: Chip | None = None,
    test_images: int | None = None,
) -> Subject:
    """The network of a checkpoint, with accuracy and, where there are data, measured spike rates
    and silence, of the tiles that a `chip` or a grid of chips has; of all test images, or of so
    many that are drawn.

    With `time_steps` it is run at so many timesteps instead of those it was trained with, events on
    as many frames, and its accuracy is measured again. Raises UserError where that needs data that
    nobody has given, and where the checkpoint or the data cannot be read.
    """
    checkpoint = load_checkpoint(path)
    settings = checkpoint.settings
    # that of a network trained for a chip is the one there, and not the digital one
    accuracy = None if settings.crossbar else checkpoint.accuracy
    if time_steps is not None:
        check_int(time_steps, "time_steps", 1024)
    network = load_network(checkpoint, time_steps)
    batches = evaluation_data(checkpoint, data_path, network.time_window, test_images)
    if batches is None and network.time_window != settings.time_window:
        raise UserError(
            f"--time_steps {time_steps}: accuracy is measured again, so give --data_path"
        )
    measured, by_timestep = {}, {}
    if batches is not None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with counting_rows(network.to(device), describe(network), chip) as counted:
            tested = evaluate(network, batches, device, name="measuring spike rates")
        network.cpu()
        accuracy, measured = tested.accuracy, counted()
        rates = {name: fired / seen for name, (fired, seen) in tested.spikes.items()}
        by_timestep = {name: rate.tolist() for name, rate in rates.items()}
    kind = kind_of(settings.paper_setting, settings.loss)
    trained = checkpoint.settings.trained_at
    described = describe(network, measured)
    tested = None if settings.bits is None or batches is None else (network, batches)
    what = accuracy, by_timestep, kind, trained, tested
    how = {"trained_for": settings.trained_for, "test_images": test_images}
    return Subject(str(path), described, *what, **how)
