"""A technology: what the parts of a chip cost, in a TOML file of `technologies/` or of the user's.

Every value is a table with its number, its unit and the key of its source in [sources]:

    [adc]
    energy_pj = { value = 2.03084, unit = "pJ", source = "spikesim" }

`scaled` says what was done to a published figure, `like = "NAME"` takes what a file does not say
from another one. [chip] and what is said of the cell are the defaults of a `Chip`'s options; the
rest is charged by `estimate`.
"""

import math
import os
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from runtime.command import did_you_mean, similar_path
from runtime.errors import UserError

from .layer_list import check_int, show

FOLDER = Path(__file__).parent / "technologies"
CELLS = ("RRAM", "PCM", "SRAM", "FeFET")
ADCS = ("sar", "flash")

KEYS = {  # section.key -> unit and meaning; what ends in _pj or _um2 is charged
    "process.node_nm": ("nm", "feature size"),
    "process.supply_v": ("V", "supply voltage"),
    "cell.kind": ("", f"one of {', '.join(CELLS)}"),
    "cell.bits": ("bit", "bits of a cell"),
    "cell.on_ohm": ("ohm", "a cell at its lowest level above 0; at level L divided by L"),
    "cell.on_off_ratio": ("", "conductance of a cell's highest level over its lowest"),
    "cell.energy_pj": ("pJ", "a cell whose row is driven"),
    "cell.area_um2": ("um^2", "a cell"),
    "driver.energy_pj": ("pJ", "a row of a crossbar that is driven"),
    "driver.area_um2": ("um^2", "the driver of a crossbar's row"),
    "adc.kind": ("", f"one of {', '.join(ADCS)}: whether its time grows with its bits"),
    "adc.bits": ("bit", "resolution that the ADC's figures belong to"),
    "adc.clocks": ("clocks", "a conversion"),
    "adc.energy_pj": ("pJ", "a conversion"),
    "adc.area_um2": ("um^2", "an ADC"),
    "mux.energy_pj": ("pJ", "a switch of an ADC's column multiplexer"),
    "mux.area_um2": ("um^2", "multiplexer of an ADC"),
    "temp_buffer.energy_pj": ("pJ", "a converted value kept in its register"),
    "temp_buffer.area_um2": ("um^2", "registers of a tile"),
    "shift_add.area_um2": ("um^2", "adder behind an ADC"),
    "subtractor.area_um2": ("um^2", "subtractor, of a PE and one of a crossbar's ADCs"),
    "htree.energy_pj": ("pJ", "a sum moved through the H-tree"),
    "htree.area_um2": ("um^2", "H-tree, of a PE"),
    "cell_write.energy_pj": ("pJ", "a cell programmed"),
    "cell_write.row_ns": ("ns", "a row of a crossbar programmed"),
    "dram.energy_pj": ("pJ", "a bit read from DRAM"),
    "dram.bits_per_ns": ("bit/ns", "what DRAM gives at once"),
    "router.energy_pj": ("pJ", "a bit moved to a neighbouring tile"),
    "router.area_um2": ("um^2", "router of a tile"),
    "fetch.energy_pj": ("pJ", "a PE cycle of a group of PEs"),
    "tile_read.energy_pj": ("pJ", "a bit read from a tile's buffer"),
    "tile_buffer.area_um2": ("um^2", "buffer of a tile"),
    "read.energy_pj": ("pJ", "a bit read from a memory bank"),
    "write.energy_pj": ("pJ", "a bit written into a memory bank"),
    "memory_bit.area_um2": ("um^2", "a bit of buffer or membrane memory"),
    "neuron.energy_pj": ("pJ", "a LIF update"),
    "add_bit.energy_pj": ("pJ", "an addition, a bit"),
    "multiply_bit.energy_pj": ("pJ", "a product, a bit times a bit"),
    "leakage.lstp_mw": ("mW", "1 um^2 of low standby power logic"),
    "leakage.lop_mw": ("mW", "1 um^2 of low operating power logic"),
    "leakage.hp_mw": ("mW", "1 um^2 of high performance logic"),
}
BY_BITS = {  # optional: how an ADC's figures grow, in proportion to those of its adc.bits
    "adc.energy_by_bits": ("pJ", "a conversion, by the ADC's bits (--adc_law table)"),
    "adc.area_by_bits": ("um^2", "an ADC, by its bits (--adc_law table)"),
    "adc.clocks_by_bits": ("clocks", "a conversion, by the ADC's bits (--adc_law table)"),
}
BY_CELSIUS = {  # optional: how leakage grows, in proportion to that at CELSIUS
    "leakage.lstp_by_celsius": ("mW", "the same by its temperature (--celsius)"),
    "leakage.lop_by_celsius": ("mW", "the same by its temperature (--celsius)"),
    "leakage.hp_by_celsius": ("mW", "the same by its temperature (--celsius)"),
}
TABLES = BY_BITS | BY_CELSIUS
CELSIUS = 27.0  # that a technology's leakage is of
DEVICE = {  # what single cells do: not of every technology known
    "cell.level_conductances": ("", "evenly written levels from lowest to highest: what they add"),
    "cell.leakage_mw": ("mW", "a cell; where none is said an SRAM cell leaks by its area"),
    "device.programming": ("", "deviation of a written conductance, c0,c1,... of c0 + c1 g + ..."),
    "device.read_noise": ("", "relative deviation of a conductance from read to read"),
    "device.stuck_on": ("", "share of cells that stay at the highest level"),
    "device.stuck_off": ("", "share of cells that stay at the lowest level"),
    "device.drift": ("", "mean exponent of drift: one, or a,b,c,d of a + b ln g from c to d"),
    "device.drift_deviation": ("", "its deviation from cell to cell, written likewise"),
    "device.drift_start_s": ("s", "age at which a cell conducts as written"),
    "device.flicker": ("", "a,b,c of a share a g^b, at most c, of 1/f noise"),
    "device.flicker_read_s": ("s", "duration of a read, for 1/f noise"),
}
MODELS = {  # of DEVICE, what is said together
    "drift": ("device.drift", "device.drift_deviation", "device.drift_start_s"),
    "flicker": ("device.flicker", "device.flicker_read_s"),
}
COEFFICIENTS = {  # how many numbers, separated by commas
    "cell.level_conductances": range(2, 257),
    "device.programming": range(1, 10),
    "device.drift": (1, 4),
    "device.drift_deviation": (1, 4),
    "device.flicker": (3,),
}
POSITIVE = (
    *("process.node_nm", "cell.bits", "cell.on_ohm", "cell.area_um2", "adc.bits"),
    *("device.drift_start_s", "device.flicker_read_s"),
    "dram.bits_per_ns",
)
LARGEST = 1e15  # in whatever unit: beyond it nothing is built
SMALLEST = 1e-15  # but for 0; products of these stay finite
MOST_ADC_BITS = 16
# Nothing is computed of them.
LABELS = ("process.node_nm", "process.supply_v")
CHOICES = {"cell.kind": CELLS, "adc.kind": ADCS}
CHIP = {  # options of a chip that a technology may have defaults for: their units
    "xbar_size": "cells",
    "columns": "",
    "crossbars_per_pe": "crossbars",
    "pe_per_tile": "PEs",
    "adc_bits": "bit",
    "adc_of": "",
    "adc_law": "",
    "columns_per_adc": "columns",
    "clk_mhz": "MHz",
    "process": "",
}
VALUES = KEYS | DEVICE | TABLES
UNITS = {key: unit for key, (unit, _) in VALUES.items()}
UNITS |= {f"chip.{x}": y for x, y in CHIP.items()}
OF_CELLS = {  # options of a chip that cells have defaults for
    "cell_bits": "cell.bits",
    "on_ohm": "cell.on_ohm",
    "on_off_ratio": "cell.on_off_ratio",
    "level_conductances": "cell.level_conductances",
    "programming": "device.programming",
    "read_noise": "device.read_noise",
    "stuck_on": "device.stuck_on",
    "stuck_off": "device.stuck_off",
}


class Entry(NamedTuple):
    value: Any
    source: str
    scaled: str = ""


@dataclass(frozen=True, eq=False, repr=False)
class Technology:
    """`name` is its file's, `entries` all its values by "section.key"."""

    name: str
    title: str
    entries: Mapping[str, Entry]

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"<technology {self.name}>"

    def __getitem__(self, key: str) -> Any:
        return self.entries[key].value

    def _table(self, end: str) -> dict[str, float]:
        return {key.removesuffix(end): self[key] for key in KEYS if key.endswith(end)}

    @cached_property
    def energy(self) -> dict[str, float]:
        """pJ, by section."""
        return self._table(".energy_pj")

    @cached_property
    def area(self) -> dict[str, float]:
        """um^2, by section."""
        return self._table(".area_um2")

    @cached_property
    def options(self) -> dict[str, Any]:
        """What it says of a chip's options."""
        said = {name: self[f"chip.{name}"] for name in CHIP if f"chip.{name}" in self.entries}
        return said | {x: self[key] for x, key in OF_CELLS.items() if key in self.entries}

    def has(self, model: str) -> bool:
        """Whether it says how its cells drift, or flicker (MODELS)."""
        return all(key in self.entries for key in MODELS[model])

    def coefficients(self, key: str) -> list[float]:
        """What a key of COEFFICIENTS lists."""
        return coefficients(self[key])

    @property
    def laws(self) -> dict[str, Any]:
        """What it says of how its cells age, and are no chip's options."""
        return {x: self[x] for keys in MODELS.values() for x in keys if x in self.entries}

    @property
    def is_sram(self) -> bool:
        """SRAM cells are transistors."""
        return self["cell.kind"] == "SRAM"

    @property
    def most_adc_bits(self) -> int:
        """Of which its tables say what an ADC costs."""
        return min(max(map(int, self[key])) for key in BY_BITS if key in self.entries)

    def check_adc_bits(self, bits: int) -> None:
        """Raise UserError where it does not say what an ADC of so many bits costs."""
        tables = [self[key] for key in BY_BITS if key in self.entries]
        if not tables:
            raise UserError(f"{self} has no table of ADCs by bits: adc_law must be another")
        own = self["adc.bits"]
        if not max(int(min(x, key=int)) for x in tables) <= own <= self.most_adc_bits:
            raise UserError(
                f"{self}: adc.bits {own} is none of its tables of ADCs by bits, which are taken "
                "relative to it: give another table, or adc_law doubling or linear"
            )
        if bits > self.most_adc_bits:
            raise UserError(
                f"adc_bits {bits}: {self} gives ADCs of at most {self.most_adc_bits} bits: "
                "take no more, or adc_law doubling or linear (chip.adc_law in a file), which say "
                "what larger ones cost"
            )

    def growth(self, key: str, at: Any, own: float) -> Any:
        """What a table of TABLES has `at` so many bits or degrees, relative to what it has at its
        `own`: in between in proportion in logarithms; below its first as much as there. 1 where
        there is no such table."""
        if key not in self.entries:
            return 1.0
        logs = {int(x): math.log(y) for x, y in self[key].items()}
        found, of_own = (np.interp(x, list(logs), list(logs.values())) for x in (at, own))
        return np.exp(found - of_own)[()]

    def adc_growth(self, what: str, bits: int | np.ndarray) -> float | np.ndarray:
        """What an ADC of so many bits has of "energy", "area" or "clocks", relative to that of
        adc.bits; a larger ADC can stand for those below the table's first."""
        return self.growth(f"adc.{what}_by_bits", bits, self["adc.bits"])

    def check_celsius(self, process: str, celsius: float) -> None:
        """Raise UserError where it does not say what transistors leak at this temperature."""
        key = f"leakage.{process}_by_celsius"
        if key not in self.entries:
            raise UserError(
                f"celsius: {self} does not say how leakage grows with temperature, {key} is "
                "missing: leave it out, or write the table into a file of yours"
            )
        first, *_, last = map(int, self[key])
        if not first <= celsius <= last:
            raise UserError(f"celsius must be {first} to {last} on {self}, got {show(celsius)}")

    def check_cell_bits(self, bits: int) -> None:
        """Raise UserError where its cells cannot hold so many bits."""
        if self.is_sram and bits != 1:
            raise UserError(
                f"{self}: an SRAM cell has 1 bit: cell_bits (cell.bits in a file) must be 1, got "
                f"{show(bits)}"
            )

    def with_values(self, said: Mapping[str, Any]) -> "Technology":
        """The same with other values, "section.key" -> number. Raises UserError."""
        changed = {}
        for key, value in said.items():
            check_key(key, VALUES, "--set")
            if key in LABELS:
                raise UserError(f"--set {key}: it only says what a technology is; nothing is of it")
            check_value(key, value, "--set")
            changed[key] = Entry(value, "set by hand")
        entries = self.entries | changed
        check_models(entries, "--set")
        return replace(self, entries=entries)

    def text(self, key: str) -> str:
        """A value as a person reads it; a table as 4: 0.79, 8: 1.67."""
        if key not in TABLES:
            return str(self[key])
        return ", ".join(f"{at}: {value:g}" for at, value in self[key].items())

    def rows(self) -> Iterator[dict[str, Any]]:
        """Everything it says, one row a value."""
        for key, (value, source, scaled) in self.entries.items():
            table, name = key.split(".")
            meaning = VALUES[key][1] if key in VALUES else f"--{name}"
            yield {
                "table": table,
                "name": name,
                "value": self.text(key) if value == math.inf or key in TABLES else value,
                "unit": UNITS[key],
                "meaning": meaning,
                "source": f"{source}; {scaled}" if scaled else source,
            }


def presets() -> list[str]:
    """The names of the technologies that come with the program."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_technology(name: str) -> Technology:
    """A technology by the name of its preset or the path of its file; raises UserError, in one line
    with file, key and remedy, for every mistake in it."""
    path = FOLDER / f"{name}.toml" if name in presets() else Path(name)
    if not os.path.isfile(path):  # also of a name that is too long
        meant = did_you_mean(name, presets()) or similar_path(path)
        raise UserError(
            f"there is no technology {show(name)}{meant} (presets: {', '.join(presets())})"
        )
    data = read_toml(path)
    file = str(name)
    sources, said = data.pop("sources", {}), {}
    title, like = data.pop("name", path.stem), data.pop("like", None)
    if not isinstance(sources, dict) or not all(isinstance(x, str) for x in sources.values()):
        raise UserError(f"{file}: sources must be a table of texts, [sources]")
    if like is not None:
        if like not in presets():
            raise UserError(
                f"{file}: like must be a preset ({', '.join(presets())}), got {show(like)}"
            )
        said = dict(load_technology(like).entries)
    sections = dict.fromkeys(key.partition(".")[0] for key in UNITS)
    for section, entries in data.items():
        if not isinstance(entries, dict):
            check_key(section, sections, file)
            raise UserError(f"{file}: {section} must be a table of values, [{section}]")
        for name_of, entry in entries.items():
            key = f"{section}.{name_of}"
            check_key(key, UNITS, file)
            said[key] = read_entry(key, entry, sources, file)
    for key in KEYS:
        if key not in said:
            raise UserError(
                f"{file}: {key} ({KEYS[key][1]}) is missing: write it as {example(key)}, or take "
                'what is missing from another technology with like = "NAME"'
            )
    check_models(said, file)
    return Technology(file, str(title), said)


def coefficients(value: object) -> list[float]:
    """Numbers of a text that separates them by commas, or one number. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(value)
    found = [float(x) for x in str(value).split(",")]
    if not all(abs(x) < LARGEST for x in found):
        raise ValueError(value)
    return found


def check_coefficients(name: str, value: object, lengths: Sequence[int]) -> list[float]:
    """The numbers of a text; raises UserError where it holds no numbers, or not so many."""
    try:
        found = coefficients(value)
    except (ValueError, OverflowError):
        found = []
    if len(found) not in lengths:
        many = " or ".join(map(str, lengths)) if len(lengths) < 3 else f"{lengths[0]} or more"
        number = "number" if list(lengths) == [1] else "numbers"
        raise UserError(f"{name} must be {many} {number}, as 0.1,0.2, got {show(value)}")
    return found


def read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # no TOML, no text, a number of 5000 digits
        raise UserError(f"{str(path)!r} is no TOML file: {error}") from None


def example(key: str) -> str:
    unit = f'unit = "{UNITS[key]}", ' if UNITS[key] else ""
    return f'{{ value = ..., {unit}source = "..." }}'


def check_key(key: str, known: Iterable[str], file: str) -> None:
    """Raise UserError for a key that is not known, with one that was meant, or what there is."""
    if key in known:
        return
    section = key.partition(".")[0]
    near = [x for x in known if x.startswith(f"{section}.")]
    there = ", ".join(near or dict.fromkeys(x.partition(".")[0] for x in known))
    meant = did_you_mean(key, known) or f" ({'keys' if near else 'sections'}: {there})"
    raise UserError(f"{file}: unknown key {show(key)}{meant}")


def check_models(said: Iterable[str], file: str) -> None:
    """Raise UserError for a part of what is said together: alone it would do nothing."""
    for model, keys in MODELS.items():
        missing = [key for key in keys if key not in said]
        if missing and len(missing) < len(keys):
            how = f"{missing[0]}=..." if file == "--set" else example(missing[0])
            raise UserError(
                f"{file}: {missing[0]} ({DEVICE[missing[0]][1]}) is missing beside the rest of the "
                f"{model}: write it as {how}"
            )


def check_value(key: str, value: object, file: str) -> None:
    """Raise UserError for a value that makes no sense."""
    if key in CHOICES:
        if value not in CHOICES[key]:
            raise UserError(f"{file}: {key} must be one of {CHOICES[key]}, got {show(value)}")
        return
    if key in TABLES:
        check_table(key, value, file)
        return
    if key in COEFFICIENTS:
        found = check_coefficients(f"{file}: {key}", value, COEFFICIENTS[key])
        limits = [0.0, *(found[2:] or found)]
        if key in MODELS["drift"] and limits != sorted(limits):
            raise UserError(
                f"{file}: {key} is {show(value)}: give a number of at least 0, or a,b,c,d with "
                "limits c of at least 0 and d of at least c"
            )
        if key == "device.flicker" and min(found[0], found[2]) < 0:
            raise UserError(f"{file}: {key} is {show(value)}: a and c must be at least 0")
        return
    if key not in VALUES:  # an option of a chip, which checks it itself
        return
    if key == "adc.bits":
        is_whole = isinstance(value, float) and value.is_integer()
        check_int(int(value) if is_whole else value, f"{file}: {key}", MOST_ADC_BITS)
        return
    if not is_size(value, key not in POSITIVE) and (key, value) != ("cell.on_off_ratio", math.inf):
        least = "" if key in POSITIVE else "0, or "
        unit = f", in {UNITS[key]}" if UNITS[key] else ""
        raise UserError(
            f"{file}: {key} is {show(value)}: give {least}a number from {SMALLEST:g} to {LARGEST:g}"
            f"{unit}"
        )


def is_size(value: object, or_none: bool) -> bool:
    """Whether it is a number that things in a chip can have; with `or_none` also 0."""
    if type(value) not in (int, float):
        return False
    return SMALLEST <= value <= LARGEST or (or_none and value == 0)


def check_table(key: str, value: object, file: str) -> None:
    """Raise UserError for what is no table by bits, or by degrees Celsius."""
    good = isinstance(value, dict) and len(value) > 1
    good = good and all(len(x) < 4 and x.isdecimal() for x in value)
    good = good and (key in BY_CELSIUS or all(0 < int(x) < 100 for x in value))
    good = good and all(is_size(x, or_none=False) for x in value.values())
    if not good or sorted(map(int, value)) != list(map(int, value)):
        by = "degrees" if key in BY_CELSIUS else "numbers of bits"
        raise UserError(
            f"{file}: {key} is {show(value)}: give numbers from {SMALLEST:g} to {LARGEST:g} by two "
            f"or more whole {by}, the smallest first, as {{ 4 = 0.8, 8 = 1.7 }}"
        )
    first, *_, last = map(int, value)
    if key in BY_CELSIUS and not first <= CELSIUS <= last:
        raise UserError(
            f"{file}: {key} is of {first} to {last} degrees: it must hold {CELSIUS:g}, at which "
            "the technology's leakage is"
        )


def read_entry(key: str, entry: object, sources: Mapping[str, str], file: str) -> Entry:
    """What a file says of one key."""
    if not isinstance(entry, dict) or "value" not in entry:
        raise UserError(f"{file}: {key} must be written as {example(key)}, got {show(entry)}")
    for word in entry:
        if word not in ("value", "unit", "source", "scaled"):
            meant = did_you_mean(word, ("value", "unit", "source", "scaled"))
            raise UserError(f"{file}: {key} has an unknown key {show(word)}{meant}: {example(key)}")
    unit = entry.get("unit", "")
    if unit != UNITS[key]:
        wanted = f"give it in {UNITS[key]}" if UNITS[key] else "it has none"
        raise UserError(f"{file}: {key} has the unit {show(unit)}: {wanted}, {example(key)}")
    check_value(key, entry["value"], file)
    source = entry.get("source")
    if not isinstance(source, str) or source not in sources:
        said = "no source" if source is None else f"the source {show(source)}"
        raise UserError(f"{file}: {key} has {said}: name one of [sources] ({', '.join(sources)})")
    return Entry(entry["value"], sources[source], str(entry.get("scaled", "")))


DEFAULT = load_technology("spikesim-65nm")
