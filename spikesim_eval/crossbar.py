"""The options of crossbars that are not ideal."""

import math
from dataclasses import dataclass

from .constants import REFERENCE
from .layers import InputError, check_int, check_number, check_xbar_size, show

COLUMNS = ("differential", "offset")
ADC_RANGES = ("full", "unit")


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
    conductance, relative to it. `wire_ohm`: resistance of a wire from cell to cell; `on_ohm`: of a
    cell at its highest level.
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
        check_xbar_size(self.xbar_size)
        check_int(self.cell_bits, "cell_bits", 8)
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
