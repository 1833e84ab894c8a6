"""What a technology can say: each key, its unit, what it means and which values make sense."""

import math
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass

from runtime.command import did_you_mean
from runtime.errors import UserError

from .layer_list import check_int, show

LARGEST = 1e15  # in whatever unit: beyond it nothing is built
SMALLEST = 1e-15  # but for 0; products of these stay finite
MOST_ADC_BITS = 16
CELSIUS = 27.0  # that a technology's leakage is of


@dataclass(frozen=True)
class Key:
    """A value of a technology: a number from SMALLEST to LARGEST, but for what is said here.

    Attributes:
        unit: of its figures.
        meaning: in a few words.
        optional: not every technology says it.
        above_0: it is never 0.
        largest: it is a whole number, and no larger one.
        may_be_inf: also infinite.
        is_label: it only says what a technology is; nothing is computed of it.
        choices: it is one of these words.
        by: it is a table, of figures by whole numbers of "bits" or by "degrees".
        lengths: it is a text of numbers separated by commas, and so many of them.
        wrong: what is wrong with such numbers, or None.
        model: what single cells do that it says only together with the other keys of the model.
        option: of a chip, that it is the default of.
    """

    unit: str = ""
    meaning: str = ""
    optional: bool = False
    above_0: bool = False
    largest: int | None = None
    may_be_inf: bool = False
    is_label: bool = False
    choices: tuple[str, ...] = ()
    by: str | None = None
    lengths: Sequence[int] = ()
    wrong: Callable[[Sequence[float]], str | None] | None = None
    model: str | None = None
    option: str | None = None

    def check(self, value: object, name: str) -> None:
        """Raise UserError, which begins with `name`, for a value that makes no sense."""
        if self.choices:
            if value not in self.choices:
                raise UserError(f"{name} must be one of {self.choices}, got {show(value)}")
        elif self.by is not None:
            check_table(value, self.by, name)
        elif self.lengths:
            found = check_numbers(name, value, self.lengths)
            if self.wrong is not None and (wrong := self.wrong(found)):
                raise UserError(f"{name} is {show(value)}: {wrong}")
        elif self.largest is not None:
            is_whole = isinstance(value, float) and value.is_integer()
            check_int(int(value) if is_whole else value, name, self.largest)
        elif not is_size(value, not self.above_0) and not (self.may_be_inf and value == math.inf):
            least = "" if self.above_0 else "0, or "
            unit = f", in {self.unit}" if self.unit else ""
            raise UserError(
                f"{name} is {show(value)}: give {least}a number from {SMALLEST:g} to {LARGEST:g}"
                f"{unit}"
            )

    @property
    def example(self) -> str:
        """How a file says it."""
        unit = f'unit = "{self.unit}", ' if self.unit else ""
        return f'{{ value = ..., {unit}source = "..." }}'


def wrong_exponents(found: Sequence[float]) -> str | None:
    """Of drift: one number, or a, b, c, d of a + b ln g from c to d."""
    limits = [0.0, *(found[2:] or found)]
    if limits == sorted(limits):
        return None
    return "give a number of at least 0, or a,b,c,d with limits c of at least 0 and d of at least c"


def wrong_flicker(found: Sequence[float]) -> str | None:
    return "a and c must be at least 0" if min(found[0], found[2]) < 0 else None


def one_of(*choices: str, why: str = "") -> Key:
    return Key("", f"one of {', '.join(choices)}{why}", choices=choices)


def table_of(by: str, unit: str, meaning: str) -> Key:
    """What grows, in proportion to the technology's own figure."""
    return Key(unit, meaning, optional=True, by=by)


def of_cells(meaning: str, unit: str = "", **how: object) -> Key:
    """What single cells do: not of every technology known."""
    return Key(unit, meaning, optional=True, **how)


def of_chip(option: str, unit: str = "") -> Key:
    """The default of an option of a chip, which checks it itself."""
    return Key(unit, f"--{option}", optional=True, option=option)


LAW = {"lengths": (1, 4), "wrong": wrong_exponents, "model": "drift"}
IN_TABLE = "(--adc_law table)"
WARMER = "the same by its temperature (--celsius)"
KEYS = {  # section.key
    "process.node_nm": Key("nm", "feature size", above_0=True, is_label=True),
    "process.supply_v": Key("V", "supply voltage", is_label=True),
    "cell.kind": one_of("RRAM", "PCM", "SRAM", "FeFET"),
    "cell.bits": Key("bit", "bits of a cell", above_0=True, option="cell_bits"),
    "cell.on_ohm": Key(
        "ohm",
        "a cell at its lowest level above 0; at level L divided by L",
        above_0=True,
        option="on_ohm",
    ),
    "cell.on_off_ratio": Key(
        "",
        "conductance of a cell's highest level over its lowest",
        may_be_inf=True,
        option="on_off_ratio",
    ),
    "cell.energy_pj": Key("pJ", "a cell whose row is driven"),
    "cell.area_um2": Key("um^2", "a cell", above_0=True),
    "driver.energy_pj": Key("pJ", "a row of a crossbar that is driven"),
    "driver.area_um2": Key("um^2", "the driver of a crossbar's row"),
    "adc.kind": one_of("sar", "flash", why=": whether its time grows with its bits"),
    "adc.bits": Key("bit", "resolution that the ADC's figures belong to", largest=MOST_ADC_BITS),
    "adc.clocks": Key("clocks", "a conversion"),
    "adc.energy_pj": Key("pJ", "a conversion"),
    "adc.area_um2": Key("um^2", "an ADC"),
    "mux.energy_pj": Key("pJ", "a switch of an ADC's column multiplexer"),
    "mux.area_um2": Key("um^2", "multiplexer of an ADC"),
    "temp_buffer.energy_pj": Key("pJ", "a converted value kept in its register"),
    "temp_buffer.area_um2": Key("um^2", "registers of a tile"),
    "shift_add.area_um2": Key("um^2", "adder behind an ADC"),
    "subtractor.area_um2": Key("um^2", "subtractor, of a PE and one of a crossbar's ADCs"),
    "htree.energy_pj": Key("pJ", "a sum moved through the H-tree"),
    "htree.area_um2": Key("um^2", "H-tree, of a PE"),
    "cell_write.energy_pj": Key("pJ", "a cell programmed"),
    "cell_write.row_ns": Key("ns", "a row of a crossbar programmed"),
    "dram.energy_pj": Key("pJ", "a bit read from DRAM, or written there"),
    "dram.bits_per_ns": Key("bit/ns", "what DRAM gives at once", above_0=True),
    "router.energy_pj": Key("pJ", "a bit moved to a neighbouring tile"),
    "router.area_um2": Key("um^2", "router of a tile"),
    "fetch.energy_pj": Key("pJ", "a PE cycle of a group of PEs"),
    "tile_read.energy_pj": Key("pJ", "a bit read from a tile's buffer"),
    "tile_buffer.area_um2": Key("um^2", "buffer of a tile"),
    "read.energy_pj": Key("pJ", "a bit read from a memory bank"),
    "write.energy_pj": Key("pJ", "a bit written into a memory bank"),
    "memory_bit.area_um2": Key("um^2", "a bit of buffer or membrane memory"),
    "neuron.energy_pj": Key("pJ", "a LIF update"),
    "add_bit.energy_pj": Key("pJ", "an addition, a bit"),
    "multiply_bit.energy_pj": Key("pJ", "a product, a bit times a bit"),
    "leakage.lstp_mw": Key("mW", "1 um^2 of low standby power logic"),
    "leakage.lop_mw": Key("mW", "1 um^2 of low operating power logic"),
    "leakage.hp_mw": Key("mW", "1 um^2 of high performance logic"),
    "cell.level_conductances": of_cells(
        "evenly written levels from lowest to highest: what they add",
        lengths=range(2, 257),
        option="level_conductances",
    ),
    "cell.leakage_mw": of_cells(
        "a cell; where none is said an SRAM cell leaks by its area", unit="mW"
    ),
    "device.programming": of_cells(
        "deviation of a written conductance, c0,c1,... of c0 + c1 g + ...",
        lengths=range(1, 10),
        option="programming",
    ),
    "device.read_noise": of_cells(
        "relative deviation of a conductance from read to read", option="read_noise"
    ),
    "device.read_floor": of_cells(
        "the same of every cell, a share of the highest level's", option="read_floor"
    ),
    "device.stuck_on": of_cells("share of cells that stay at the highest level", option="stuck_on"),
    "device.stuck_off": of_cells(
        "share of cells that stay at the lowest level", option="stuck_off"
    ),
    "device.drift": of_cells(
        "mean exponent of drift: one, or a,b,c,d of a + b ln g from c to d", **LAW
    ),
    "device.drift_deviation": of_cells("its deviation from cell to cell, written likewise", **LAW),
    "device.drift_start_s": of_cells(
        "age at which a cell conducts as written", unit="s", above_0=True, model="drift"
    ),
    "device.flicker": of_cells(
        "a,b,c of a share a g^b, at most c, of 1/f noise",
        lengths=(3,),
        wrong=wrong_flicker,
        model="flicker",
    ),
    "device.flicker_read_s": of_cells(
        "duration of a read, for 1/f noise", unit="s", above_0=True, model="flicker"
    ),
    "adc.energy_by_bits": table_of("bits", "pJ", f"a conversion, by the ADC's bits {IN_TABLE}"),
    "adc.area_by_bits": table_of("bits", "um^2", f"an ADC, by its bits {IN_TABLE}"),
    "adc.clocks_by_bits": table_of("bits", "clocks", f"a conversion, by the ADC's bits {IN_TABLE}"),
    "leakage.lstp_by_celsius": table_of("degrees", "mW", WARMER),
    "leakage.lop_by_celsius": table_of("degrees", "mW", WARMER),
    "leakage.hp_by_celsius": table_of("degrees", "mW", WARMER),
    "chip.xbar_size": of_chip("xbar_size", "cells"),
    "chip.columns": of_chip("columns"),
    "chip.crossbars_per_pe": of_chip("crossbars_per_pe", "crossbars"),
    "chip.pe_per_tile": of_chip("pe_per_tile", "PEs"),
    "chip.adc_bits": of_chip("adc_bits", "bit"),
    "chip.adc_of": of_chip("adc_of"),
    "chip.adc_law": of_chip("adc_law"),
    "chip.columns_per_adc": of_chip("columns_per_adc", "columns"),
    "chip.clk_mhz": of_chip("clk_mhz", "MHz"),
    "chip.process": of_chip("process"),
}
OF_OPTIONS = {key.option: name for name, key in KEYS.items() if key.option is not None}


def is_of_chip(name: str) -> bool:
    return name.startswith("chip.")


def keys_of(model: str) -> list[str]:
    """What is said together."""
    return [name for name, key in KEYS.items() if key.model == model]


def check_key(name: str, known: Iterable[str], file: str) -> None:
    """Raise UserError for a key that is not known, with one that was meant, or what there is."""
    if name in known:
        return
    section = name.partition(".")[0]
    near = [x for x in known if x.startswith(f"{section}.")]
    there = ", ".join(near or dict.fromkeys(x.partition(".")[0] for x in known))
    meant = did_you_mean(name, known) or f" ({'keys' if near else 'sections'}: {there})"
    raise UserError(f"{file}: unknown key {show(name)}{meant}")


def check_complete(said: Container[str], file: str) -> None:
    """Raise UserError for a part of a model, which alone would do nothing, and for 1/f noise
    without drift, after which it comes."""
    drift, flicker = keys_of("drift"), keys_of("flicker")
    for model, keys, needed in (("drift", drift, drift), ("flicker", flicker, flicker + drift)):
        missing = [name for name in needed if name not in said]
        if missing and any(name in said for name in keys):
            first = missing[0]
            how = f"{first}=..." if file == "--set" else KEYS[first].example
            raise UserError(
                f"{file}: {first} ({KEYS[first].meaning}) is missing beside the rest of the "
                f"{model}: write it as {how}"
            )


def numbers_of(value: object) -> list[float]:
    """Numbers of a text that separates them by commas, or one number. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(value)
    found = [float(x) for x in str(value).split(",")]
    if not all(abs(x) < LARGEST for x in found):
        raise ValueError(value)
    return found


def check_numbers(name: str, value: object, lengths: Sequence[int]) -> list[float]:
    """The numbers of a text; raises UserError where it holds no numbers, or not so many."""
    try:
        found = numbers_of(value)
    except (ValueError, OverflowError):
        found = []
    if len(found) not in lengths:
        many = " or ".join(map(str, lengths))
        if isinstance(lengths, range):
            many = f"{lengths[0]} to {lengths[-1]}"
        raise UserError(f"{name} must be {many} numbers, as 0.1,0.2, got {show(value)}")
    return found


def is_size(value: object, or_0: bool) -> bool:
    """Whether it is a number that things in a chip can have; with `or_0` also 0."""
    if type(value) not in (int, float):
        return False
    return SMALLEST <= value <= LARGEST or (or_0 and value == 0)


def check_table(value: object, by: str, name: str) -> None:
    """Raise UserError for what is no table by "bits", or by "degrees"."""
    of_degrees = by == "degrees"
    good = isinstance(value, dict) and len(value) > 1
    good = good and all(len(x) < 4 and x.isdecimal() for x in value)
    good = good and (of_degrees or all(0 < int(x) < 100 for x in value))
    good = good and all(is_size(x, or_0=False) for x in value.values())
    if not good or sorted(map(int, value)) != list(map(int, value)):
        what = "degrees" if of_degrees else "numbers of bits"
        said = show(value)
        if isinstance(value, dict):  # in its own order, which may be what is wrong
            said = f"of {show(', '.join(value))}"
        raise UserError(
            f"{name} is {said}: give numbers from {SMALLEST:g} to {LARGEST:g} by two "
            f"or more whole {what}, the smallest first, as {{ 4 = 0.8, 8 = 1.7 }}"
        )
    first, *_, last = map(int, value)
    if of_degrees and not first <= CELSIUS <= last:
        raise UserError(
            f"{name} is of {first} to {last} degrees: it must hold {CELSIUS:g}, at which "
            "the technology's leakage is"
        )
