"""A chip of crossbars: every option once, with its default, its limits and what it means.

One description, read by what prices a network (`estimate`) and by what simulates it (`crossbar`):
how a layer lies on it is `place_layer`.
"""

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import Field, dataclass, field, fields, replace
from itertools import product
from statistics import NormalDist
from typing import Any

import numpy as np

from runtime.command import did_you_mean
from runtime.errors import UserError

from .constants import REFERENCE
from .layer_list import Layer, LayerList, check_int, check_number, show
from .technology import DEFAULT, Technology, load_technology, presets
from .technology_keys import (
    CELSIUS,
    KEYS,
    MOST_ADC_BITS,
    OF_OPTIONS,
    check_numbers,
    keys_of,
    numbers_of,
)

Value = int | float | np.ndarray


def option(
    default: Any,
    text: str,
    limits: tuple[float, float] | None = None,
    reason: str = "",
    **more: Any,
) -> Any:
    """A field of a chip. `limits`: smallest and largest value beside the default, of whole numbers
    where they are whole, and the `reason` why others are refused. `part`: whether only the price
    knows it, or only the simulation. `several`: names of which a value lists some."""
    about = {"text": text, "limits": limits, "reason": reason, "choices": (), "part": "both"}
    return field(default=default, metadata=about | more)


def choice(text: str, *choices: str, **more: Any) -> Any:
    """A field that has one of these values, by default the first."""
    return option(choices[0], text, choices=choices, **more)


def about_option(about: Field) -> str:
    """What an option means, with its limits, for a help text."""
    text, limits = about.metadata["text"], about.metadata["limits"]
    if about.metadata["reason"]:
        text += ", {:g} to {:g}".format(*limits)
    return text


def check_option(about: Field, value: object) -> None:
    """Raise UserError, with the reason, for a value that an option of a chip cannot have."""
    limits, reason, choices = map(about.metadata.get, ("limits", "reason", "choices"))
    if about.name == "technology" and not isinstance(value, Technology):
        raise UserError(f"technology must be what load_technology gives, got {show(value)}")
    several = about.metadata.get("several")
    if several and value != about.default:
        given = value.split(",") if isinstance(value, str) else [""]
        if set(given) - set(several) or len(set(given)) < len(given):
            raise UserError(
                f"{about.name} must be {about.default}, or some of {','.join(several)}, got "
                f"{show(value)}"
            )
    if about.name == "layer_adc_bits":
        bits_by_layer(value)
    if about.name == "after" and value != about.default:
        seconds(value)
    key = OF_OPTIONS.get(about.name)
    if key and KEYS[key].lengths and value != about.default:
        found = check_numbers(about.name, value, KEYS[key].lengths)
        if key == "cell.level_conductances" and (
            sorted(found) != found or (found[0], found[-1]) != (0, 1)
        ):
            raise UserError(f"{about.name} must rise from 0 to 1, got {show(value)}")
        targets = np.linspace(0, 1, 257)
        if key == "device.programming" and min(np.polyval(found[::-1], targets)) < -1e-12:
            raise UserError(
                f"{about.name} is a deviation, and must be at least 0 for all g from 0 to 1, got "
                f"{show(value)}"
            )
    if choices and value not in choices:
        raise UserError(f"{about.name} must be one of {choices}, got {show(value)}")
    is_ideal = about.name == "adc_bits" and value is None
    if limits and value != about.default and not is_ideal:
        low, high = limits
        try:
            (check_int if type(low) is int else check_number)(value, about.name, low=low, high=high)
        except UserError as error:
            raise UserError(f"{error} ({reason})" if reason else str(error)) from None


def bits_by_layer(text: str) -> dict[str, int]:
    """What `layer_adc_bits` says: bits by the names of layers. Raises UserError."""
    found: dict[str, int] = {}
    if text == "":
        return found
    for entry in text.split(",") if isinstance(text, str) else [""]:
        name, _, bits = entry.rpartition("=")
        if not name or name in found or not (bits.isdecimal() and 1 <= int(bits) <= MOST_ADC_BITS):
            raise UserError(
                f"layer_adc_bits must be as stem.conv=6,linear=8, each layer once with 1 to "
                f"{MOST_ADC_BITS} bits, got {show(text)}"
            )
        found[name] = int(bits)
    return found


def check_layers(chip: "Chip", networks: Iterable[LayerList]) -> None:
    """Raise UserError where `layer_adc_bits` names a layer that none of the networks has."""
    there = dict.fromkeys(layer.name for network in networks for layer in network.layers)
    for name in bits_by_layer(chip.layer_adc_bits):
        if name not in there:
            meant = did_you_mean(name, there) or f" (layers: {', '.join(there)})"
            raise UserError(f"layer_adc_bits: there is no layer {show(name)}{meant}")


def seconds(text: str) -> float:
    """What a time such as 90s, 2.5h or 1y means. Raises UserError."""
    found = re.fullmatch(r"([0-9]*\.?[0-9]+(?:e[-+]?[0-9]+)?) *(s|min|h|d|y)", str(text))
    value = float(found[1]) * TIMES[found[2]] if found else math.nan
    if not 0 <= value <= LONGEST_S:
        units = ", ".join(TIMES)
        raise UserError(
            f"after must be a time with its unit ({units}) of at most 100y, as 1h, got {show(text)}"
        )
    return value


TIMES = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "y": 365.25 * 86400.0}
LONGEST_S = 100 * TIMES["y"]
MOST_TRIALS = 10**6


@dataclass(frozen=True)
class Draws:
    """Chips of one kind, whose cells are drawn anew for each trial. Raises UserError for numbers
    that make no sense."""

    seed: int = 0
    trials: int = 1

    def __post_init__(self) -> None:
        check_int(self.trials, "trials", MOST_TRIALS)
        check_int(self.seed, "seed", 10**9, low=0)

    @property
    def numbers(self) -> range:
        """Of the chips: what their cells are drawn with."""
        first = self.seed * MOST_TRIALS
        return range(first, first + self.trials)


PRICE, SIMULATION = {"part": "price"}, {"part": "simulation"}
NOTHING = "nothing"  # is skipped
# What published costs know nothing of, as it must be with them.
AS_PUBLISHED = {"skip": NOTHING, "noc": "free", "layer_adc_bits": "", "celsius": CELSIUS}


@dataclass(frozen=True)
class Chip:
    """A chip; raises UserError for values that no chip has.

    "differential" columns keep positive and negative weights in crossbars of their own and subtract
    what their ADCs say; "offset" ones store weight + Q and subtract Q times the number of active
    rows. A weight of fewer bits than a cell uses the cell's whole range. An ADC reads a column of
    each crossbar, or the sum of the columns that lie in line in a PE (`adc_of`). Its codes are
    steps of a cell, and larger sums are clipped ("unit"), or they reach to the largest sum that the
    rows can give, in steps of at least one cell step ("full"). `sigma` is a deviation before
    conductances below 0 are set to 0. The estimate computes with one number an option, or with
    arrays of them (see ChipGrid).
    """

    technology: Technology = option(  # noqa: RUF009 - a field, as all others
        DEFAULT, "what its parts cost: the name of a preset, or a TOML file"
    )
    xbar_size: int = option(
        64, "crossbar side", (8, 1024), "the figures are those of the technology's crossbars"
    )
    cell_bits: int = option(
        4,
        "bits per cell",
        *((1, 8), "beyond 256 levels a cell's variation is larger than a step"),
    )
    columns: str = choice(
        "positive and negative weights in crossbars of their own, or weights with an offset",
        *("differential", "offset"),
    )
    crossbars_per_pe: int = option(
        9, "crossbars of a PE", (1, 1024), "a PE's buffers cost the same however many it has"
    )
    pe_per_tile: int = option(
        8, "PEs of a tile", (1, 1024), "a tile's buffer costs the same however many it has", **PRICE
    )
    tiles: str = choice(
        "PEs of different layers share tiles, or a layer has tiles of its own",
        *("shared", "own"),
        **PRICE,
    )
    adc_bits: int | None = option(  # None: an ideal ADC, which neither rounds nor clips
        5,
        "bits of an ADC",
        *((1, MOST_ADC_BITS), "the figures are those of the technology's ADC, scaled"),
    )
    layer_adc_bits: str = option(
        "", "bits of the ADCs of single layers, as stem.conv=6,linear=8; adc_bits of all others"
    )
    adc_of: str = choice(
        "an ADC reads a column of one crossbar, or the sum of the columns in line in a PE",
        *("crossbar", "pe"),
    )
    adc_range: str = choice(
        "unit: a code is a cell step, larger sums are clipped; full: the ADC reaches to the "
        "largest possible sum",
        *("unit", "full"),
        **SIMULATION,
    )
    adc_law: str = choice(
        "an ADC's energy and area double with every bit above the technology's and halve with "
        "every bit below, are in proportion to the bits, or, with its clocks, as the technology's "
        "table has them",
        *("doubling", "linear", "table"),
        **PRICE,
    )
    columns_per_adc: int = option(
        8,
        "columns that take turns at an ADC",
        *((1, 1024), "the figures are those of the technology's ADC and its multiplexer"),
        **PRICE,
    )
    clk_mhz: float = option(
        250.0,
        "clock, MHz",
        *((1.0, 5000.0), "what happens in a clock is taken to cost the same energy at every clock"),
        **PRICE,
    )
    costs: str = choice(
        "each conversion, driven cell, moved and stored bit, leakage, and layers pipelined over "
        "rows of pixels; or a PE cycle as a whole and one output element after another, as "
        "published",
        *("counted", "published"),
        **PRICE,
    )
    skip: str = option(
        NOTHING,
        "what is not done where no input is a one: the reading of silent rows, the conversions of "
        "silent patches (an output pixel and input bit) and their clocks, and those of silent "
        "tiles",
        several=("rows", "patches", "tiles"),
        **PRICE,
    )
    noc: str = choice(
        "how values reach another layer's tiles: for nothing, as in the published tool, or over a "
        "mesh of routers, one a tile",
        *("free", "mesh"),
        **PRICE,
    )
    process: str = choice(
        "transistors, which decide the leakage: low standby power, low operating power, high "
        "performance",
        *("lstp", "lop", "hp"),
        **PRICE,
    )
    celsius: float = option(
        CELSIUS,
        "temperature, at which transistors leak as the technology's do: warm ones more",
        *((0.0, 150.0), "no chip is made for others"),
        **PRICE,
    )
    on_ohm: float = option(
        DEFAULT["cell.on_ohm"],
        "resistance of a cell at its lowest level above 0; at level L it is divided by L, so at "
        "the highest by 2^cell_bits - 1",
        (1.0, 1e12),
        **SIMULATION,
    )
    on_off_ratio: float = option(
        math.inf,
        "conductance of a cell's highest level over its lowest",
        (1.001, 1e12),
        **SIMULATION,
    )
    sigma: float = option(
        0.0,
        "relative deviation of a cell's conductance; what would be negative is 0, so that the mean "
        "is larger (at 0.5 by 0.4 %%, at 1 by 8.3 %%)",
        (0.0, 10.0),
        **SIMULATION,
    )
    level_conductances: str = option(
        "",
        "what levels of a cell that are written evenly add to its lowest, as shares of what the "
        "highest adds: 0,0.2,1; others lie between",
        **SIMULATION,
    )
    programming: str = option(
        "",
        "deviation of a cell's conductance that depends on its target g, as c0,c1,c2 of "
        "c0 + c1 g + c2 g^2, all as shares of the highest level's",
        **SIMULATION,
    )
    after: str = option(
        "",
        "how long after writing the chip is read, as 90s, 5min, 1h, 30d or 1y: cells have drifted "
        "as the technology's do",
        **SIMULATION,
    )
    stuck_on: float = option(
        0.0, "share of cells that stay at their highest level", (0.0, 1.0), **SIMULATION
    )
    stuck_off: float = option(
        0.0, "share of cells that stay at their lowest level", (0.0, 1.0), **SIMULATION
    )
    read_noise: float = option(
        0.0,
        "relative deviation of a cell's conductance from read to read",
        (0.0, 10.0),
        **SIMULATION,
    )
    read_floor: float = option(
        0.0,
        "deviation of every cell's conductance from read to read, whatever its level, as a share "
        "of the highest level's",
        (0.0, 10.0),
        **SIMULATION,
    )
    wire_ohm: float = option(  # less than 1e-6 is lost in rounding
        0.0, "resistance of a wire from cell to cell", (1e-6, 1e6), **SIMULATION
    )

    def __post_init__(self) -> None:
        for about in fields(self):
            check_option(about, getattr(self, about.name))
        if self.xbar_size % self.columns_per_adc:
            raise UserError(
                f"xbar_size must be a multiple of columns_per_adc, {self.columns_per_adc}, got "
                f"{self.xbar_size} (what is not given is that of {self.technology}; a file of "
                "yours can have another in [chip])"
            )
        self.technology.check_cell_bits(self.cell_bits)
        self._check_cells()
        if self.adc_law == "table":
            of_layers = bits_by_layer(self.layer_adc_bits).values()
            self.technology.check_adc_bits(max(self.adc_bits or 1, *of_layers, 1))
        if self.celsius != CELSIUS:
            self.technology.check_celsius(self.process, self.celsius)
        if self.costs == "published" and self.technology is not DEFAULT:
            raise UserError(
                f"costs published are those of {DEFAULT} as it is: leave --technology and --set out"
            )
        if self.costs == "published":
            for name, value in AS_PUBLISHED.items():
                if getattr(self, name) != value:
                    raise UserError(f"{name} goes with counted costs, not with --costs published")

    def _check_cells(self) -> None:
        if self.stuck_on + self.stuck_off > 1:
            raise UserError(
                f"stuck_on and stuck_off are shares of the same cells: {self.stuck_on:g} and "
                f"{self.stuck_off:g} are more than all (what is not given is that of "
                f"{self.technology})"
            )
        if self.after and not self.technology.has("drift"):
            missing = ", ".join(x for x in keys_of("drift") if x not in self.technology.entries)
            drifting = [x for x in presets() if load_technology(x).has("drift")]
            raise UserError(
                f"after: {self.technology} does not say how its cells drift ({missing}): take a "
                f"technology that does, as {', '.join(drifting)}, or write these into "
                f"{self.technology.place}"
            )

    def options(self, part: str) -> dict[str, Any]:
        """What is said of the chip where it is priced ("price") or simulated ("simulation")."""
        said = {
            x.name: getattr(self, x.name)
            for x in fields(self)
            if x.metadata["part"] in ("both", part)
        }
        said["technology"] = self.technology.label
        return {name: str(x) if x == math.inf else x for name, x in said.items()}

    def of_layer(self, name: str) -> "Chip":
        """The same chip with the ADCs of this layer."""
        bits = bits_by_layer(self.layer_adc_bits).get(name) if self.layer_adc_bits else None
        return self if bits is None else replace(self, adc_bits=bits, layer_adc_bits="")

    def skips(self, what: str) -> bool:
        """Whether silent "rows", "patches" or "tiles" are skipped."""
        return what in self.skip.split(",")

    @property
    def adcs(self) -> Value:
        """ADCs of a crossbar, or of a PE (`adc_of`)."""
        return self.xbar_size / self.columns_per_adc

    @property
    def adcs_of_pe(self) -> Value:
        return self.adcs * (self.crossbars_per_pe if self.adc_of == "crossbar" else 1)

    @property
    def clock_ns(self) -> Value:
        return 1000 / self.clk_mhz

    @property
    def crossbar_scale(self) -> Value:
        """Cells of a crossbar, relative to the 64 x 64 one the published figures belong to."""
        return (self.xbar_size / REFERENCE["reference_side"]) ** 2

    def adc_scale(self, what: str) -> Value:
        """Energy or area (`what`) of an ADC relative to the one that the technology's are of."""
        if self.adc_law == "table":
            return self.technology.adc_growth(what, self.adc_bits)
        if self.adc_law == "linear":
            return self.adc_bits / self.technology["adc.bits"]
        return 2.0 ** (self.adc_bits - self.technology["adc.bits"])

    @property
    def adc_clocks(self) -> Value:
        """Of a conversion; successive approximation takes longer for more bits."""
        clocks = self.technology["adc.clocks"]
        if self.adc_law == "table" and "adc.clocks_by_bits" in self.technology.entries:
            return clocks * self.technology.adc_growth("clocks", self.adc_bits)
        if self.technology["adc.kind"] == "flash":
            return clocks
        return self.adc_bits * (clocks / self.technology["adc.bits"])

    @property
    def leakage_growth(self) -> float:
        """Of what leaks at its temperature, relative to CELSIUS."""
        key = f"leakage.{self.process}_by_celsius"
        return self.technology.growth(key, self.celsius, CELSIUS)

    @property
    def leakage_mw_per_um2(self) -> float:
        """Of transistors of its process at its temperature."""
        return self.technology[f"leakage.{self.process}_mw"] * self.leakage_growth

    @property
    def cell_leakage_mw(self) -> float:
        """Of a cell at its temperature: what the technology says, else of an SRAM cell what
        transistors of its area leak, and of others nothing."""
        said = self.technology.entries.get("cell.leakage_mw")
        if said is not None:
            return said.value * self.leakage_growth
        area = self.technology["cell.area_um2"] if self.technology.is_sram else 0.0
        return area * self.leakage_mw_per_um2

    @property
    def planes(self) -> int:
        """Crossbars that a weight lies in."""
        return 2 if self.columns == "differential" else 1

    def tiles_of(self, pes: Iterable[Value]) -> Value:
        """Tiles that hold the layers' PEs, of which there are so many each."""
        if self.tiles == "own":
            return sum(ceil_div(x, self.pe_per_tile) for x in pes)
        return ceil_div(sum(pes), self.pe_per_tile)

    def stored_bits(self, weight_bits: int) -> int:
        """Bits of what the cells hold of a weight: its size without a sign, or weight + Q."""
        return max(1, weight_bits - 1) if self.columns == "differential" else weight_bits

    def slices(self, weight_bits: int) -> Value:
        """Cells of a weight in a row."""
        return ceil_div(self.stored_bits(weight_bits), self.cell_bits)

    def check_fits(self, what: str, weight_bits: int) -> None:
        """Raise UserError where a weight has more cells than a crossbar row."""
        if self.slices(weight_bits) > self.xbar_size:
            raise UserError(
                f"{what}: a weight of {weight_bits} bits takes {self.slices(weight_bits)} cells of "
                f"{self.cell_bits} bits, more than the {self.xbar_size} of a crossbar row: raise "
                "cell_bits or xbar_size"
            )

    @property
    def is_random(self) -> bool:
        """Whether two chips of this kind differ, or two reads of one."""
        if self.is_read_anew:
            return True
        if 1 in (self.stuck_on, self.stuck_off):  # nothing else is left of any cell
            return False
        written = self.sigma or (self.programming and any(numbers_of(self.programming)))
        return bool(written or self.stuck_on or self.stuck_off or self._ages_at_random)

    @property
    def is_read_anew(self) -> bool:
        """Whether two reads of one chip differ."""
        return bool(self.read_noise or self.read_floor)

    @property
    def _ages_at_random(self) -> bool:
        if not self.after:
            return False
        if self.technology.numbers("device.drift_deviation")[-1] > 0:  # it, or its limit
            return True
        if not self.technology.has("flicker"):
            return False
        factor, _, most = self.technology.numbers("device.flicker")
        return factor != 0 and most != 0

    @property
    def ideal(self) -> "Chip":
        """The same but for all that varies, ages or rounds: its cells as meant, its ADCs ideal."""
        off = ["sigma", "programming", "after", "stuck_on", "stuck_off", "read_noise", "read_floor"]
        off += ["wire_ohm", "level_conductances"]
        said = {name: OPTIONS[name].default for name in off}
        return replace(self, **said, adc_bits=None, layer_adc_bits="")

    @property
    def variation_bias(self) -> float:
        """How much setting conductances below 0 to 0 adds to their mean, relative to it.

        The mean of max(0, 1 + sigma·n), n standard normal, is Φ(1/sigma) + sigma·φ(1/sigma).
        """
        if not self.sigma:
            return 0.0
        normal, edge = NormalDist(), 1 / self.sigma
        return self.sigma * normal.pdf(edge) - normal.cdf(-edge)


PRESETS = {
    "default": {},
    # The network model as it was before conversions were counted: one column of ADCs a PE, columns
    # that know signs, and PE cycles charged as in the published tool.
    "published": {"columns": "offset", "adc_of": "pe", "adc_bits": 4, "costs": "published"},
}
OPTIONS = {x.name: x for x in fields(Chip)}
CHOICES = {x.name: x.metadata["choices"] for x in fields(Chip) if x.metadata["choices"]}
SKIPPED = OPTIONS["skip"].metadata["several"]


def options_of(technology: Technology) -> dict[str, Any]:
    """A technology with the options of a chip that it has defaults for; raises UserError, in one
    line with its name, where a chip cannot have them."""
    for name, value in technology.options.items():
        try:
            check_option(OPTIONS[name], value)
        except UserError as error:
            raise UserError(f"{technology}: {OF_OPTIONS[name]}: {error}") from None
    return {"technology": technology} | technology.options


def chips(**options: Any) -> Iterator[Chip]:
    """Every chip of a grid: chips(xbar_size=[64, 128], adc_bits=[4, 5], columns="offset"). A list
    says several values of an option, technologies by name or as `load_technology` gives them; what
    is not given is the technology's, or the default's. Raises UserError."""
    axes = [x if isinstance(x, list | tuple) else [x] for x in options.values()]
    for values in product(*axes):
        said = dict(zip(options, values, strict=True))
        technology = said.get("technology", DEFAULT)
        if isinstance(technology, str):
            technology = said["technology"] = load_technology(technology)
        if isinstance(technology, Technology):
            said = options_of(technology) | said
        yield Chip(**said)


class ChipGrid(Chip):
    """Many chips at once: numeric options are float64 arrays of one shape, checked beforehand."""

    def __post_init__(self) -> None:
        pass


def ceil_div(a: Value, b: Value) -> Value:
    return -(-a // b)


def smaller(a: Value, b: Value) -> Value:
    return np.minimum(a, b) if np.ndarray in (type(a), type(b)) else min(a, b)


def larger(a: Value, b: Value) -> Value:
    return np.maximum(a, b) if np.ndarray in (type(a), type(b)) else max(a, b)


@dataclass(frozen=True)
class Placement:
    """How one layer lies on a chip; its weights lie there once, however often it runs.

    Each of the k² positions of a kernel has crossbars of its own, of at most `xbar_size` input
    channels. Those that add into the same columns, the `stack`, share PEs of `crossbars_per_pe`;
    columns beyond a crossbar's take further PEs. A PE cycle is one input bit of one output pixel.
    """

    slices: Value  # cells of a weight in a row
    columns: int | Value  # with cells, of all crossbars side by side
    stack: Value  # crossbars that add into a column
    crossbars: Value  # with programmed cells
    pes: Value
    groups: Value  # of PEs that hold the bit slices of the same weights
    driven: Value  # crossbars side by side that an input drives a row of
    conversions: Value  # in a PE cycle
    turns: Value  # of the busiest ADC in a PE cycle


def place_layer(network: LayerList, layer: Layer, chip: Chip) -> Placement:
    """Where a layer's weights lie, and what each of its PE cycles does.

    The channel groups of a grouped convolution are blocks of their own. Where several fit, they
    share a crossbar as blocks on its diagonal: rows and columns apart, zeros elsewhere. No count is
    above that of the layer without groups, whose crossbars could hold the blocks just as well.
    """
    slices = chip.slices(network.weight_bits_of(layer))
    per_row = chip.xbar_size // slices
    crossbars, pes = layer_crossbars(layer, per_row, chip)
    _, groups = layer_crossbars(layer, chip.xbar_size, chip)  # as if a weight were one cell
    stack = layer.kernel**2 * ceil_div(layer.in_channels // layer.groups, chip.xbar_size)
    columns = chip.planes * layer.out_channels * slices
    read = stack if chip.adc_of == "crossbar" else ceil_div(stack, chip.crossbars_per_pe)
    rows, outputs = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    blocks = larger(smaller(chip.xbar_size // rows, per_row // outputs), 1)  # in a crossbar
    busiest = smaller(smaller(blocks, layer.groups) * outputs, per_row) * slices
    return Placement(
        slices,
        columns,
        stack,
        crossbars * chip.planes,
        pes * chip.planes,
        groups * chip.planes,
        driven=chip.planes * ceil_div(outputs, per_row),
        conversions=read * columns,
        turns=ceil_div(busiest, chip.adcs),
    )


def matrix_crossbars(
    rows: int, columns: int, kernel: int, per_row: Value, chip: Chip
) -> tuple[Value, Value]:
    """(crossbars, PEs) of the weights from `rows` to `columns` channels, of which `per_row` fit
    side by side into a crossbar."""
    row_crossbars = ceil_div(rows, chip.xbar_size) * kernel**2
    wide = ceil_div(columns, per_row)
    return row_crossbars * wide, ceil_div(row_crossbars, chip.crossbars_per_pe) * wide


def layer_crossbars(layer: Layer, per_row: Value, chip: Chip) -> tuple[Value, Value]:
    """(crossbars, PEs) of a layer, of one plane."""
    dense = matrix_crossbars(layer.in_channels, layer.out_channels, layer.kernel, per_row, chip)
    if layer.groups == 1:
        return dense
    rows, columns = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    fitting = smaller(chip.xbar_size // rows, per_row // columns)
    diagonal = ceil_div(layer.groups, larger(fitting, 1))
    block = matrix_crossbars(rows, columns, layer.kernel, per_row, chip)
    crossbars, pes = (smaller(diagonal * b, d) for b, d in zip(block, dense, strict=True))
    return crossbars, pes
