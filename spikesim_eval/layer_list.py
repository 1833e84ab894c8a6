"""The list of layers an estimate works from, and how it is read from JSON (docs/layer_list.md)."""

import json
import reprlib
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from graphlib import CycleError, TopologicalSorter
from math import prod
from pathlib import Path
from typing import Any

from runtime.errors import UserError
from runtime.files import must_be_file

LARGEST = 10**9  # far above any chip or network; keeps every product a finite float
MAX_BITS = 32  # stand for full precision
FULL_PRECISION_BITS = 16  # that it has on a chip where nobody says otherwise
IMAGE_BITS = 8
RESETS = ("hard", "soft")
MOST_JSON = 2**26  # bytes of a file


@dataclass(frozen=True)
class Layer:
    """One convolution, or the linear classifier. Sizes are (height, width) in pixels.

    `in_size` is the plane the layer reads; for a linear layer the plane that is pooled before it.
    `input_bits` is 1 for spikes, 8 for an image; None for a linear layer (see `LayerList`).
    `spike_rate` is the measured share of ones in the input, None where it was not measured.
    `weight_bits` None takes the network's. `bn_bits` is the width of the scale that multiplies the
    layer's sums, None where there is none. `after` names the layers this one waits for.
    `groups` is that of a grouped convolution (depthwise: as many as channels). `runs` is how often
    the layer runs for one sample and timestep, with the same weights. `lif` says whether a LIF
    population is updated with its sums; None: see LayerList.has_lif. A `static` layer reads the
    same at every timestep, as a stem does of an image: it runs once, and its sums are kept.
    `stride` and `padding`, (vertical, horizontal), are the convolution's, the padding above and to
    the left; None where they are to be worked out of the sizes. `silent_patches` is the measured
    share of silent patches, `silent_tiles` entries (xbar_size, crossbars_per_pe, PEs in line that a
    tile reads, crossbars and PEs of these that are silent in an average cycle); see silence.py.
    """

    name: str
    kernel: int
    in_channels: int
    out_channels: int
    in_size: tuple[int, int]
    out_size: tuple[int, int]
    input_bits: int | None
    after: tuple[str, ...]
    spike_rate: float | None = None
    weight_bits: int | None = None
    bn_bits: int | None = None
    linear: bool = False
    groups: int = 1
    runs: int = 1
    lif: bool | None = None
    static: bool = False
    stride: tuple[int, int] | None = None
    padding: tuple[int, int] | None = None
    silent_patches: float | None = None
    silent_tiles: tuple[tuple[int, int, int, float, float], ...] = ()

    def __post_init__(self) -> None:
        # Printable, because the name stands in a CSV cell and in a Markdown table.
        if not isinstance(self.name, str) or not self.name or not self.name.isprintable():
            raise UserError(f"a layer's name must be printable text, got {show(self.name)}")
        here = f"layer {show(self.name)}: "
        for name in ("kernel", "in_channels", "out_channels", "groups", "runs"):
            check_int(getattr(self, name), here + name)
        for name in ("in_channels", "out_channels"):
            if getattr(self, name) % self.groups:
                raise UserError(f"{here}{name} do not divide into {self.groups} groups")
        if self.lif is not None and not isinstance(self.lif, bool):
            raise UserError(f"{here}lif must be true or false, got {show(self.lif)}")
        check_sizes(self.in_size, here + "in_size", 2)
        check_sizes(self.out_size, here + "out_size", 2)
        for name in ("linear", "static"):
            if not isinstance(getattr(self, name), bool):
                value = show(getattr(self, name))
                raise UserError(f"{here}{name} must be true or false, got {value}")
        if self.static and (self.linear or self.after):
            raise UserError(f"{here}only a layer that reads the image is static")
        if self.linear and (self.kernel != 1 or tuple(self.out_size) != (1, 1)):
            raise UserError(f"{here}a linear layer has kernel 1 and out_size [1, 1]")
        if not self.linear:
            check_int(self.input_bits, here + "input_bits", MAX_BITS)
        for name in ("weight_bits", "bn_bits"):
            if getattr(self, name) is not None:
                check_int(getattr(self, name), here + name, MAX_BITS)
        for name in ("spike_rate", "silent_patches"):
            if getattr(self, name) is not None:
                check_number(getattr(self, name), here + name, 0, 1)
        self._check_geometry(here)
        self._check_tiles(here)
        if not isinstance(self.after, list | tuple):
            raise UserError(f"{here}after must be a list of layer names, got {show(self.after)}")

    def _check_geometry(self, here: str) -> None:
        if (self.stride is None) != (self.padding is None):
            raise UserError(f"{here}stride and padding are given together, or neither is")
        if self.stride is None:
            return
        if self.linear:
            raise UserError(f"{here}a linear layer has neither stride nor padding")
        check_sizes(self.stride, here + "stride", 2)
        check_sizes(self.padding, here + "padding", 2, low=0)
        for side in (0, 1):
            last = (self.out_size[side] - 1) * self.stride[side] - self.padding[side]
            if self.padding[side] >= self.kernel or last >= self.in_size[side]:
                raise UserError(
                    f"{here}with stride {self.stride[side]} and padding {self.padding[side]} some "
                    f"of {self.out_size[side]} outputs read nothing of {self.in_size[side]} pixels"
                )

    def _check_tiles(self, here: str) -> None:
        if not isinstance(self.silent_tiles, list | tuple):
            raise UserError(f"{here}silent_tiles must be a list, got {show(self.silent_tiles)}")
        for entry in self.silent_tiles:
            if not isinstance(entry, list | tuple) or len(entry) != 5:
                raise UserError(
                    f"{here}an entry of silent_tiles must be [xbar_size, crossbars_per_pe, PEs, "
                    f"silent crossbars, silent PEs], got {show(entry)}"
                )
            for size in entry[:3]:
                check_int(size, here + "a size in silent_tiles")
            for found in entry[3:]:
                check_number(found, here + "a number of silent_tiles", 0, LARGEST)

    @property
    def weights(self) -> int:
        return self.in_channels // self.groups * self.out_channels * self.kernel**2

    def stride_and_padding(self, side: int) -> tuple[int, int]:
        """Along a side, 0 vertical, 1 horizontal: as given, or as the sizes say."""
        if self.stride is not None:
            return self.stride[side], self.padding[side]
        return stride_and_padding(self.in_size[side], self.out_size[side], self.kernel)

    @classmethod
    def from_json(cls, entry: object, what: str) -> "Layer":
        required = [x.name for x in fields(cls) if x.default is MISSING]
        optional = [x.name for x in fields(cls) if x.default is not MISSING]
        if isinstance(entry, dict) and entry.get("linear") is True:
            entry = entry | {"input_bits": None}  # computed from T, H and W, whatever the file says
        check_keys(entry, what, required, optional)
        return cls(**{key: _tuple(value) for key, value in entry.items()})


@dataclass(frozen=True)
class LayerList:
    """All layers of a network, in any order, and what they share.

    `lif` holds the (channels, height, width) of every LIF population with a membrane memory, and
    `streams` those of every residual stream that is kept while a block computes what is added.
    `leak` and `reset` are the neurons' (see `models.neuron.Neuron`).
    Raises UserError where the layers do not form one acyclic graph of uniquely named layers.
    """

    time_steps: int
    weight_bits: int
    membrane_bits: int
    layers: tuple[Layer, ...]
    lif: tuple[tuple[int, int, int], ...]
    streams: tuple[tuple[int, int, int], ...] = ()
    leak: float = 0.25
    reset: str = "hard"

    def __post_init__(self) -> None:
        check_int(self.time_steps, "time_steps")
        check_int(self.weight_bits, "weight_bits", MAX_BITS)
        check_int(self.membrane_bits, "membrane_bits", MAX_BITS)
        check_number(self.leak, "leak", 0, 1)
        if self.reset not in RESETS:
            raise UserError(f"reset must be {' or '.join(RESETS)}, got {show(self.reset)}")
        for name in ("lif", "streams"):
            shapes = getattr(self, name)
            if not isinstance(shapes, list | tuple):
                raise UserError(f"{name} must be a list of [C, H, W], got {show(shapes)}")
            for shape in shapes:
                check_sizes(shape, f"an entry of {name}", 3)
        if not self.layers:
            raise UserError("a network needs at least one layer")
        name, count = Counter(layer.name for layer in self.layers).most_common(1)[0]
        if count > 1:
            raise UserError(f"two layers have the name {show(name)}")
        names = {layer.name for layer in self.layers}
        for layer in self.layers:
            for before in layer.after:
                if not isinstance(before, str) or before not in names:
                    raise UserError(
                        f"layer {show(layer.name)} comes after {show(before)}, which is no layer"
                    )
        try:
            self.in_order()
        except CycleError as error:
            raise UserError(f"layers wait for one another: {show(error.args[1])}") from None

    def in_order(self) -> list[Layer]:
        """The layers by depth in the graph, then by name, whatever the list's order: each one
        behind every layer it waits for."""
        by_name = {layer.name: layer for layer in self.layers}
        graph = TopologicalSorter({layer.name: layer.after for layer in self.layers})
        depth: dict[str, int] = {}
        for name in graph.static_order():
            depth[name] = 1 + max((depth[x] for x in by_name[name].after), default=0)
        return sorted(self.layers, key=lambda layer: (depth[layer.name], layer.name))

    def time_steps_of(self, layer: Layer) -> int:
        """How often the layer runs: at every timestep; a linear layer once, on spike counts, and
        a static one once, on an image."""
        return 1 if layer.linear or layer.static else self.time_steps

    def input_bits(self, layer: Layer) -> int:
        """Bits of one input value, fed one after another.

        A linear layer reads the spikes counted over time and over the pooled plane, 0..T·H·W,
        which need ceil(log2(T·H·W + 1)) bits.
        """
        if layer.linear:
            return (self.time_steps * prod(layer.in_size)).bit_length()
        return layer.input_bits

    def weight_bits_of(self, layer: Layer) -> int:
        return self.weight_bits if layer.weight_bits is None else layer.weight_bits

    def outputs(self, layer: Layer) -> int:
        """Output pixels of one inference."""
        return prod(layer.out_size) * self.time_steps_of(layer) * layer.runs

    def ops(self, layer: Layer) -> int:
        """Multiplications and additions of one inference."""
        return 2 * layer.weights * self.outputs(layer)

    def positions(self, layer: Layer) -> int:
        """Values of an input channel that the kernel reads for one output channel in one inference:
        k² for every output pixel, less what lies outside of the plane.
        """
        reads = 1 if layer.linear else prod(reads_along(layer, side) for side in (0, 1))
        return reads * self.time_steps_of(layer) * layer.runs

    def bits_stored(self, layer: Layer) -> int:
        """Of a layer's inputs; a linear layer has a counter for each channel, whatever was
        pooled."""
        values = layer.in_channels * (1 if layer.linear else prod(layer.in_size))
        return values * self.input_bits(layer)

    def bits_written(self, layer: Layer) -> int:
        """Of a layer's inputs in one inference."""
        return self.bits_stored(layer) * layer.runs * self.time_steps_of(layer)

    def updates(self, layer: Layer) -> int:
        """Membranes updated with the layer's sums in one inference, all timesteps together."""
        if not self.has_lif(layer):
            return 0
        return layer.out_channels * prod(layer.out_size) * self.time_steps * layer.runs

    def has_lif(self, layer: Layer) -> bool:
        """Whether a LIF population is updated with the layer's sums.

        Where the layer does not say: all but linear layers and those that read the residual stream.
        """
        if layer.lif is None:
            return not layer.linear and not self.reads_stream(layer)
        return layer.lif

    def reads_stream(self, layer: Layer) -> bool:
        """Whether the input is the residual stream: not spikes, their counts, or the image.

        It has as many bits as a membrane potential.
        """
        is_first = not layer.after
        return not layer.linear and not is_first and layer.input_bits == self.membrane_bits > 1

    def always_running(self) -> "LayerList":
        """The same network with its static layers run at every timestep."""
        return replace(self, layers=tuple(replace(x, static=False) for x in self.layers))

    def at(self, bits: int | None = None, time_steps: int | None = None) -> "LayerList":
        """The same network with other widths, as `--bits` sets them, or fewer or more timesteps.

        Layers with a `weight_bits` of their own keep it: a quantized network's stem and classifier,
        not a full-precision one's.
        """
        network = self if time_steps is None else replace(self, time_steps=time_steps)
        if bits is None:
            return network
        network = network.with_layers(LayerList.reads_stream, input_bits=bits)
        if all(layer.weight_bits is None for layer in self.layers):  # full precision has one width
            network = network.with_layers(
                lambda x, layer: layer.bn_bits == x.weight_bits, bn_bits=bits
            )
        return replace(network, weight_bits=bits, membrane_bits=bits)

    def with_layers(
        self, which: "Callable[[LayerList, Layer], bool]", **values: Any
    ) -> "LayerList":
        """The same network with other values in these layers. Which layers update neurons stays as
        it is: with other widths one could be taken for a reader of the stream."""
        layers = (replace(layer, lif=self.has_lif(layer)) for layer in self.layers)
        changed = (replace(x, **values) if which(self, x) else x for x in layers)
        return replace(self, layers=tuple(changed))

    def accumulator_bits(self, layer: Layer) -> int:
        """Two's complement bits that hold every sum of k²·I/G products of weight and input codes.

        The worst case of symmetric weights and of inputs 0..2^bits - 1; a signed stream has half
        that range.
        """
        weight = max(1, 2 ** (self.weight_bits_of(layer) - 1) - 1)
        fan_in = layer.kernel**2 * layer.in_channels // layer.groups
        return (fan_in * weight * (2 ** self.input_bits(layer) - 1)).bit_length() + 1

    @classmethod
    def from_json(cls, data: object) -> "LayerList":
        """The network that a layer list describes; raises UserError where it is not one."""
        required = [x.name for x in fields(cls) if x.default is MISSING]
        check_keys(data, "the layer list", required, ["streams", "leak", "reset"])
        layers = data["layers"]
        if not isinstance(layers, list):
            raise UserError(f"layers must be a list, got {show(layers)}")
        found = tuple(Layer.from_json(entry, f"layers[{i}]") for i, entry in enumerate(layers))
        planes = {x: data[x] for x in ("lif", "streams") if x in data}
        planes = {x: _tuple(y) for x, y in planes.items()}
        return cls(**data | planes | {"layers": found})


def _tuple(value: object) -> object:
    """A JSON list, also one of lists, as the tuple the dataclasses hold; anything else is left for
    their checks."""
    if not isinstance(value, list):
        return value
    return tuple(tuple(x) if isinstance(x, list) else x for x in value)


@dataclass(frozen=True)
class Subject:
    """A network and what else is known of it: what reports, comparisons and sweeps are about.

    `accuracy` is a share of the test images, of so many of them as `test_images` says where it is
    not None; None where it is not known. `rates` holds, for each
    LIF layer in forward order, its spikes per neuron at every timestep. `kind` says how it was
    trained, where that is known: a key of display.COLOURS; `trained_time_steps` with which T, and
    `trained_for` for which chip, in words.
    `tested` is the network and its test batches where it can run on a simulated chip, and
    `chip_accuracies` what it has there, a share for each draw of its cells; `clipped` is the
    largest share of a layer's sums that ADCs clip there, and the layer.
    """

    name: str
    network: LayerList
    accuracy: float | None = None
    rates: Mapping[str, Sequence[float]] = field(default_factory=dict)
    kind: str | None = None
    trained_time_steps: tuple[int, ...] | None = None
    tested: tuple[Any, Any] | None = None
    chip_accuracies: Sequence[float] | None = None
    trained_for: str | None = None
    clipped: tuple[float, str] | None = None
    test_images: int | None = None


def stride_and_padding(size: int, outputs: int, kernel: int) -> tuple[int, int]:
    """Of a convolution along one side, worked out of its sizes, as if the padding lay evenly."""
    stride = max(1, round(size / outputs))
    return stride, -(-max(0, (outputs - 1) * stride + kernel - size) // 2)


def reads_along(layer: Layer, side: int) -> int:
    """How many pixels a kernel reads along one side of the plane, over all outputs: of output y
    those from y·stride - padding on, `kernel` of them, less what lies outside."""
    size, outputs, kernel = layer.in_size[side], layer.out_size[side], layer.kernel
    stride, padding = layer.stride_and_padding(side)

    def starts(below: int) -> int:
        """Sum of y·stride - padding over the outputs before this one."""
        return stride * below * (below - 1) // 2 - padding * below

    def first(start: int) -> int:
        """The first output that starts to read at this pixel or behind it."""
        return min(outputs, max(0, -(-(start + padding) // stride)))

    # Σ min(start + kernel, size) - Σ max(start, 0) over the outputs that read any pixel
    begin, end = first(1 - kernel), first(size)
    whole, inside = max(begin, first(size - kernel + 1)), max(begin, first(0))
    ends = starts(whole) - starts(begin) + (whole - begin) * kernel + (end - whole) * size
    return ends - (starts(end) - starts(inside))


# Files.


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON allows a key twice and Python keeps the last; a size given twice is a mistake."""
    entry = dict(pairs)
    if len(entry) < len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise UserError(f"the key {show(key)} stands twice in one JSON object")
    return entry


def read_json(path: str | Path) -> Any:
    """The contents of a JSON file; raises UserError where it cannot be read."""
    try:
        must_be_file(path)
        with open(path, "rb") as file:
            content = file.read(MOST_JSON + 1)
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r}: {error.strerror}") from None
    if len(content) > MOST_JSON:
        raise UserError(f"{str(path)!r} is larger than {MOST_JSON >> 20} MB")
    is_utf_16 = b"\0" in content[:4] or content[:2] in (BOM_UTF16_LE, BOM_UTF16_BE)  # or UTF-32
    try:
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=_unique_keys)
    except UnicodeDecodeError:
        what = "is no text"
    except json.JSONDecodeError as error:
        what = f"goes wrong in line {error.lineno}, column {error.colno}"
    except RecursionError:
        what = "holds lists in lists, too deep to be read"
    except ValueError:  # beyond Python's limit of 4,300 digits
        what = "holds a number of too many digits"
    if is_utf_16:
        what = "is text in UTF-16"
    kind = " (a zip archive, perhaps a checkpoint)" if content.startswith(b"PK") else ""
    raise UserError(f"{str(path)!r}{kind} {what}: wanted is a JSON object, in UTF-8")


def load_layer_list(path: str | Path) -> LayerList:
    """The network in the layer-list file at `path`; raises UserError for every mistake in it."""
    return LayerList.from_json(read_json(path))


# Checks of what a file or a command line says.

_SHORT = reprlib.Repr()  # unlike repr() it also ends well on a list nested a thousand deep
_SHORT.maxlevel = 2
_SHORT.maxstring = 60


def show(value: object) -> str:
    """A short, one-line repr for error messages."""
    text = _SHORT.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def check_int(value: object, what: str, high: int = LARGEST, low: int = 1) -> None:
    """Raise UserError unless `value` is a whole number in low..high (True and 4.0 are not)."""
    if type(value) is not int or not low <= value <= high:
        raise UserError(f"{what} must be a whole number from {low} to {high}, got {show(value)}")


def check_number(value: object, what: str, low: float, high: float) -> None:
    """Raise UserError unless `value` is an int or float in low..high (so never NaN)."""
    if type(value) not in (int, float) or not low <= value <= high:
        raise UserError(f"{what} must be a number from {low:g} to {high:g}, got {show(value)}")


def check_sizes(value: object, what: str, count: int, low: int = 1) -> None:
    """Raise UserError unless `value` is a list of `count` whole numbers from `low` on."""
    if not isinstance(value, list | tuple) or len(value) != count:
        raise UserError(f"{what} must be a list of {count} whole numbers, got {show(value)}")
    for size in value:
        check_int(size, what, low=low)


def check_keys(
    entry: object, what: str, required: Iterable[str], optional: Iterable[str] = ()
) -> None:
    """Raise UserError unless `entry` is a mapping with the required keys and no unknown one."""
    if not isinstance(entry, Mapping):
        raise UserError(f"{what} must be a JSON object, got {show(entry)}")
    required = list(required)
    unknown = [key for key in entry if key not in {*required, *optional}]
    if unknown:
        raise UserError(f"{what} has an unknown key: {show(unknown[0])}")
    missing = [key for key in required if key not in entry]
    if missing:
        raise UserError(f"{what} lacks the key {show(missing[0])}")
