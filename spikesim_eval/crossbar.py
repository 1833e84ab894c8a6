"""What chips and crossbars share, and the options of crossbars that are not ideal."""

import math
from dataclasses import dataclass
from statistics import NormalDist

from .constants import REFERENCE
from .layers import InputError, check_int, check_number, check_xbar_size, show

COLUMNS = ("differential", "offset")
ADC_RANGES = ("full", "unit")

# Of a chip: smallest and largest value, and why others are refused.
LIMITS = {
    "xbar_size": (8, 1024, "the figures are those of a 64 x 64 crossbar, scaled"),
    "pe_per_tile": (1, 1024, "a tile's H-tree and buffer cost the same however many it has"),
    "crossbars_per_pe": (1, 1024, "a PE's ADCs and buffers cost the same however many it has"),
    "cell_bits": (1, 8, "beyond 256 levels a cell's variation is larger than a step"),
    "adc_bits": (1, 12, "the figures are those of a 4-bit ADC, scaled"),
    "clk_mhz": (1, 5000, "a PE cycle is taken to cost the same energy at every clock"),
}


def check_limits(name: str, value: object) -> None:
    """Raise InputError, with the reason, unless an option of a chip is within LIMITS."""
    low, high, reason = LIMITS[name]
    try:
        (check_number if name == "clk_mhz" else check_int)(value, name, low=low, high=high)
    except InputError as error:
        raise InputError(f"{error} ({reason})") from None
    if name == "xbar_size":
        check_xbar_size(value)


def weights_per_row(weight_bits: int, cell_bits: int, xbar_size: int) -> int:
    """Whole weights in a crossbar row: the cells of a weight lie in one crossbar.

    0 where a weight does not fit into a row; of arrays elementwise.
    """
    return xbar_size // -(-weight_bits // cell_bits)


def check_weight_fits(what: str, weight_bits: int, cell_bits: int, xbar_size: int) -> None:
    """Raise InputError where a weight has more cells than a crossbar row."""
    if not weights_per_row(weight_bits, cell_bits, xbar_size):
        raise InputError(
            f"{what}: a weight of {weight_bits} bits takes {-(-weight_bits // cell_bits)} cells of "
            f"{cell_bits} bits, more than the {xbar_size} of a crossbar row: raise cell_bits or "
            "xbar_size"
        )


@dataclass(frozen=True)
class Crossbar:
    """The options of non-ideal crossbars; by default they are ideal.

    `columns`: "differential" keeps positive and negative weights in crossbars of their own and
    subtracts what their ADCs say, "offset" stores weight + Q and subtracts Q times the number of
    active rows. A weight of fewer bits than a cell uses the cell's whole range. `adc_range`: the
    ADC reaches to the largest sum that a layer's rows can give, in steps of at least one cell step
    ("full"), or a code is always one cell step and larger sums are clipped ("unit").
    `adc_bits` None is an ADC that neither rounds nor clips. `on_off_ratio`: conductance of the
    highest level of a cell over that of the lowest. `sigma`: standard deviation of a cell's
    conductance, relative to it, before conductances below 0 are set to 0. `wire_ohm`: resistance of
    a wire from cell to cell; `on_ohm`: of a cell at the lowest of its 2^c - 1 levels above 0; level
    L conducts L times as much, so the highest has `on_ohm` / (2^c - 1).
    Raises InputError for values that no crossbar has.
    """

    xbar_size: int = 64
    cell_bits: int = 4
    columns: str = "differential"
    on_ohm: float = REFERENCE["on_ohm"]
    adc_range: str = "full"
    adc_bits: int | None = None
    on_off_ratio: float = math.inf
    sigma: float = 0.0
    wire_ohm: float = 0.0

    def __post_init__(self) -> None:
        check_limits("xbar_size", self.xbar_size)
        check_limits("cell_bits", self.cell_bits)
        if self.adc_bits is not None:
            check_int(self.adc_bits, "adc_bits", 24)
        if self.on_off_ratio != math.inf:
            check_number(self.on_off_ratio, "on_off_ratio", 1.001, 1e12)
        check_number(self.sigma, "sigma", 0, 10)
        if self.wire_ohm != 0:  # less is lost in rounding
            check_number(self.wire_ohm, "wire_ohm", 1e-6, 1e6)
        check_number(self.on_ohm, "on_ohm", 1, 1e12)
        for field, choices in (("columns", COLUMNS), ("adc_range", ADC_RANGES)):
            if getattr(self, field) not in choices:
                raise InputError(
                    f"{field} must be one of {choices}, got {show(getattr(self, field))}"
                )

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
