"""A chip of crossbars: every option once, with its default, its limits and what it means.

`Chip` is what the estimate prices, `Crossbar` what the engine of `nonideal` simulates.
"""

import math
from dataclasses import Field, dataclass, field, fields
from statistics import NormalDist
from typing import Any

from runtime.errors import UserError

from .constants import REFERENCE
from .layer_list import check_int, check_number, show


def option(
    default: Any,
    text: str,
    limits: tuple[float, float] | None = None,
    reason: str = "",
    **more: Any,
) -> Any:
    """A field of a chip. `limits`: smallest and largest value beside the default, of whole numbers
    where they are whole, and the `reason` why others are refused."""
    about = {"text": text, "limits": limits, "reason": reason, "choices": ()}
    return field(default=default, metadata=about | more)


def choice(text: str, *choices: str) -> Any:
    """A field that has one of these values, by default the first."""
    return option(choices[0], text, choices=choices)


def check_option(about: Field, value: object) -> None:
    """Raise UserError, with the reason, for a value that an option of a chip cannot have."""
    limits, reason, choices = map(about.metadata.get, ("limits", "reason", "choices"))
    if choices and value not in choices:
        raise UserError(f"{about.name} must be one of {choices}, got {show(value)}")
    if limits and value != about.default:
        low, high = limits
        try:
            (check_int if type(low) is int else check_number)(value, about.name, low=low, high=high)
        except UserError as error:
            raise UserError(f"{error} ({reason})" if reason else str(error)) from None
    if about.name == "xbar_size":
        check_columns(value)


def check_columns(xbar_size: int) -> None:
    """Raise UserError unless the columns of a crossbar fill whole ADCs."""
    if xbar_size % REFERENCE["columns_per_adc"]:
        raise UserError(f"xbar_size must be a multiple of 8 (columns per ADC), got {xbar_size}")


ALIKE = "cost the same however many it has"
# What both have.
SIDE = ("crossbar side", (8, 1024), "the figures are those of a 64 x 64 crossbar, scaled")
CELL = ("bits per cell", (1, 8), "beyond 256 levels a cell's variation is larger than a step")


@dataclass(frozen=True)
class Chip:
    """What the estimate prices; raises UserError for a value that no chip has.

    The estimate computes with one number an option, or with arrays of them (see ChipGrid).
    """

    xbar_size: int = option(64, *SIDE)
    pe_per_tile: int = option(8, "PEs of a tile", (1, 1024), f"a tile's H-tree and buffer {ALIKE}")
    crossbars_per_pe: int = option(
        9, "crossbars of a PE", (1, 1024), f"a PE's ADCs and buffers {ALIKE}"
    )
    cell_bits: int = option(4, *CELL)
    adc_bits: int = option(
        4, "ADC resolution", (1, 12), "the figures are those of a 4-bit ADC, scaled"
    )
    clk_mhz: float = option(
        250.0,
        "clock, MHz",
        *((1.0, 5000.0), "a PE cycle is taken to cost the same energy at every clock"),
    )
    periphery: str = choice(
        "H-tree, fetch, neuron and tile buffer are charged once per group of PEs that hold the bit "
        "slices of the same weights, or for every PE, as published",
        *("per_group", "per_pe"),
    )
    delay: str = choice(
        "a PE cycle gives one output channel of a pixel, as published, or all of them",
        *("element_serial", "pixel_serial"),
    )
    adc_law: str = choice(
        "an ADC's energy and area double with every bit above the published 4 and halve with every "
        "bit below, or are in proportion to the bits",
        *("doubling", "linear"),
    )
    buffers: str = choice(
        "inputs and membranes stored in as many bits as they have, or in the published 22",
        *("own", "published"),
    )

    def __post_init__(self) -> None:
        for about in fields(self):
            check_option(about, getattr(self, about.name))

    @property
    def adcs(self) -> float:
        """ADCs of a PE, each shared by eight columns."""
        return self.xbar_size / REFERENCE["columns_per_adc"]

    @property
    def crossbar_scale(self) -> float:
        """Cells of a crossbar, relative to the 64 x 64 one the published figures belong to."""
        return (self.xbar_size / REFERENCE["reference_side"]) ** 2

    @property
    def adc_scale(self) -> float:
        """Energy and area of an ADC relative to the published 4-bit one."""
        if self.adc_law == "linear":
            return self.adc_bits / REFERENCE["reference_adc_bits"]
        return 2.0 ** (self.adc_bits - REFERENCE["reference_adc_bits"])


CHOICES = {x.name: x.metadata["choices"] for x in fields(Chip) if x.metadata["choices"]}


class ChipGrid(Chip):
    """Many chips at once: numeric options are float64 arrays of one shape, checked beforehand."""

    def __post_init__(self) -> None:
        pass


@dataclass(frozen=True)
class Crossbar:
    """Crossbars that are not ideal; by default they are. Raises UserError for values that no
    crossbar has.

    "differential" columns keep positive and negative weights in crossbars of their own and subtract
    what their ADCs say; "offset" ones store weight + Q and subtract Q times the number of active
    rows. A weight of fewer bits than a cell uses the cell's whole range. The ADC reaches to the
    largest sum that a layer's rows can give, in steps of at least one cell step ("full"), or larger
    sums are clipped ("unit"); without `adc_bits` it neither rounds nor clips. `sigma` is a
    deviation before conductances below 0 are set to 0.
    """

    xbar_size: int = option(64, *SIDE)
    cell_bits: int = option(4, *CELL)
    columns: str = choice("differential or offset", "differential", "offset")
    on_ohm: float = option(
        REFERENCE["on_ohm"],
        "resistance of a cell at its lowest level above 0; at level L it is divided by L, so at "
        "the highest by 2^cell_bits - 1",
        (1.0, 1e12),
    )
    adc_range: str = choice(
        "full: the ADC reaches to the largest possible sum; unit: a code is a cell step",
        *("full", "unit"),
    )
    adc_bits: int | None = option(None, "ADC resolution, or ideal", (1, 24))
    on_off_ratio: float = option(
        math.inf, "conductance of a cell's highest level over its lowest", (1.001, 1e12)
    )
    sigma: float = option(
        0.0,
        "relative deviation of a cell's conductance; what would be negative is 0, so that the mean "
        "is larger (at 0.5 by 0.4 %%, at 1 by 8.3 %%)",
        (0.0, 10.0),
    )
    # Less than 1e-6 is lost in rounding.
    wire_ohm: float = option(0.0, "resistance of a wire from cell to cell", (1e-6, 1e6))

    __post_init__ = Chip.__post_init__

    @property
    def is_random(self) -> bool:
        return self.sigma > 0

    @property
    def variation_bias(self) -> float:
        """How much setting conductances below 0 to 0 adds to their mean, relative to it.

        The mean of max(0, 1 + sigma·n), n standard normal, is Φ(1/sigma) + sigma·φ(1/sigma).
        """
        if not self.is_random:
            return 0.0
        normal, edge = NormalDist(), 1 / self.sigma
        return self.sigma * normal.pdf(edge) - normal.cdf(-edge)


def weights_per_row(weight_bits: int, cell_bits: int, xbar_size: int) -> int:
    """Whole weights in a crossbar row: the cells of a weight lie in one crossbar.

    0 where a weight does not fit into a row; of arrays elementwise.
    """
    return xbar_size // -(-weight_bits // cell_bits)


def check_weight_fits(what: str, weight_bits: int, cell_bits: int, xbar_size: int) -> None:
    """Raise UserError where a weight has more cells than a crossbar row."""
    if not weights_per_row(weight_bits, cell_bits, xbar_size):
        raise UserError(
            f"{what}: a weight of {weight_bits} bits takes {-(-weight_bits // cell_bits)} cells of "
            f"{cell_bits} bits, more than the {xbar_size} of a crossbar row: raise cell_bits or "
            "xbar_size"
        )
