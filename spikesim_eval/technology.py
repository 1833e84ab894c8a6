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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from runtime.command import did_you_mean, similar_path
from runtime.errors import UserError

from .layer_list import show
from .technology_keys import (
    KEYS,
    OF_OPTIONS,
    check_complete,
    check_key,
    is_of_chip,
    keys_of,
    numbers_of,
)

FOLDER = Path(__file__).parent / "technologies"
BY_HAND = "set by hand"  # the source of what --set says


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

    @property
    def label(self) -> str:
        """Its name, with what was set by hand: "isaac-32nm with adc.energy_pj=0.6"."""
        said = [f"{x}={self.text(x)}" for x, y in self.entries.items() if y.source == BY_HAND]
        return f"{self.name} with {', '.join(said)}" if said else self.name

    @property
    def place(self) -> str:
        """Where a user writes what it does not say."""
        return f'a file with like = "{self}"' if self.name in presets() else self.name

    def _table(self, end: str) -> dict[str, float]:
        return {x.removesuffix(end): self[x] for x in KEYS if x.endswith(end)}

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
        return {option: self[x] for option, x in OF_OPTIONS.items() if x in self.entries}

    def has(self, model: str) -> bool:
        """Whether it says how its cells drift, or flicker (`Key.model`)."""
        return all(key in self.entries for key in keys_of(model))

    def numbers(self, key: str) -> list[float]:
        """What a key of several numbers lists."""
        return numbers_of(self[key])

    @property
    def laws(self) -> dict[str, Any]:
        """What it says of how its cells age, and are no chip's options."""
        return {x: self[x] for x, key in KEYS.items() if key.model and x in self.entries}

    def _adc_tables(self) -> list[dict[str, float]]:
        """What it says of ADCs by their bits."""
        return [self[x] for x, key in KEYS.items() if key.by == "bits" and x in self.entries]

    @property
    def is_sram(self) -> bool:
        """SRAM cells are transistors."""
        return self["cell.kind"] == "SRAM"

    @property
    def most_adc_bits(self) -> int:
        """Of which its tables say what an ADC costs."""
        return min(max(map(int, table)) for table in self._adc_tables())

    def check_adc_bits(self, bits: int) -> None:
        """Raise UserError where it does not say what an ADC of so many bits costs."""
        tables = self._adc_tables()
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
        """What a table has `at` so many bits or degrees, relative to what it has at its `own`: in
        between in proportion in logarithms; below its first as much as there. 1 where there is no
        such table."""
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
                f"missing: leave it out, or write the table into {self.place}"
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
        known = [x for x in KEYS if not is_of_chip(x)]
        for key, value in said.items():
            if key in KEYS and is_of_chip(key):
                raise UserError(f"--set {key}: it is an option of its own, --{KEYS[key].option}")
            check_key(key, known, "--set")
            if KEYS[key].is_label:
                raise UserError(f"--set {key}: it only says what a technology is; nothing is of it")
            if KEYS[key].by is not None and not isinstance(value, dict):
                raise UserError(
                    f"--set {key}: it is a table, and a table stands in a file: write it into "
                    f"{self.place}"
                )
            KEYS[key].check(value, f"--set: {key}")
            changed[key] = Entry(value, BY_HAND)
        entries = self.entries | changed
        check_complete(entries, "--set")
        return replace(self, entries=entries)

    def text(self, key: str) -> str:
        """A value as a person reads it; a table as 4: 0.79, 8: 1.67."""
        if KEYS[key].by is None:
            return str(self[key])
        return ", ".join(f"{at}: {value:g}" for at, value in self[key].items())

    def rows(self) -> Iterator[dict[str, Any]]:
        """Everything it says, one row a value."""
        for key, (value, source, scaled) in self.entries.items():
            table, name = key.split(".")
            yield {
                "table": table,
                "name": name,
                "value": self.text(key) if value == math.inf or KEYS[key].by else value,
                "unit": KEYS[key].unit,
                "meaning": KEYS[key].meaning,
                "source": f"{source}; {scaled}" if scaled else source,
            }


def presets() -> list[str]:
    """The names of the technologies that come with the program."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_technology(name: str) -> Technology:
    """A technology by the name of its preset or the path of its file; raises UserError, in one line
    with file, key and remedy, for every mistake in it."""
    path = FOLDER / f"{name}.toml" if name in presets() else Path(name)
    if not os.path.exists(path):  # also of a name that is too long
        meant = did_you_mean(name, presets()) or similar_path(path)
        raise UserError(
            f"there is no technology {show(name)}{meant} (presets: {', '.join(presets())})"
        )
    data = read_toml(path)
    file = str(name)
    sources, said = data.pop("sources", {}), {}
    title, like = data.pop("name", path.stem), data.pop("like", None)
    if not isinstance(sources, dict) or not all(map(is_text, sources.values())):
        raise UserError(
            f"{file}: sources must be a table of texts that say where values are from, [sources]"
        )
    if not is_text(title):
        raise UserError(f"{file}: name must be a text, got {show(title)}")
    if like is not None:
        if like not in presets():
            raise UserError(
                f"{file}: like must be a preset ({', '.join(presets())}), got {show(like)}"
            )
        said = dict(load_technology(like).entries)
    sections = dict.fromkeys(key.partition(".")[0] for key in KEYS)
    for section, entries in data.items():
        if not isinstance(entries, dict):
            check_key(section, sections, file)
            raise UserError(f"{file}: {section} must be a table of values, [{section}]")
        for name_of, entry in entries.items():
            key = f"{section}.{name_of}"
            check_key(key, KEYS, file)
            said[key] = read_entry(key, entry, sources, file)
    for name_of, key in KEYS.items():
        if not key.optional and name_of not in said:
            raise UserError(
                f"{file}: {name_of} ({key.meaning}) is missing: write it as {key.example}, or take "
                'what is missing from another technology with like = "NAME"'
            )
    check_complete(said, file)
    return Technology(file, one_line(title), said)


def is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def one_line(text: str) -> str:
    """As it stands in a table."""
    return " ".join(text.split())


def read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # no TOML, no text, a number of 5000 digits
        raise UserError(f"{str(path)!r} is no TOML file: {error}") from None


def read_entry(name: str, entry: object, sources: Mapping[str, str], file: str) -> Entry:
    """What a file says of one key."""
    key, about = KEYS[name], f"{file}: {name}"
    if not isinstance(entry, dict) or "value" not in entry:
        raise UserError(f"{about} must be written as {key.example}, got {show(entry)}")
    for word in entry:
        if word not in ("value", "unit", "source", "scaled"):
            meant = did_you_mean(word, ("value", "unit", "source", "scaled"))
            raise UserError(f"{about} has an unknown key {show(word)}{meant}: {key.example}")
    unit = entry.get("unit", "")
    if unit != key.unit:
        wanted = f"give it in {key.unit}" if key.unit else "it has none"
        raise UserError(f"{about} has the unit {show(unit)}: {wanted}, {key.example}")
    if not is_of_chip(name):
        key.check(entry["value"], about)
    source, scaled = entry.get("source"), entry.get("scaled", "")
    if not isinstance(source, str) or source not in sources:
        said = "no source" if source is None else f"the source {show(source)}"
        there = f"name one of [sources] ({', '.join(sources)})"
        raise UserError(
            f"{about} has {said}: {there if sources else 'write where it is from in [sources]'}"
        )
    if not isinstance(scaled, str):
        raise UserError(f"{about}: scaled must say what was done to it, got {show(scaled)}")
    return Entry(entry["value"], one_line(sources[source]), one_line(scaled))


DEFAULT = load_technology("spikesim-65nm")
