"""Technologies side by side: what they are, and what one network costs on the chip of each."""

from collections.abc import Sequence
from typing import Any

from display import percent, short_names

from .chip import Chip
from .compare import Table
from .estimate import estimate
from .layer_list import Subject
from .render import QUANTITIES, shown
from .technology import Technology
from .technology_keys import KEYS, is_of_chip

COSTS = ("energy_pj", "delay_ns", "area_um2", "edap_pj_ns_um2", "power_mw", "tops_per_watt")


def technology_rows(
    chips: Sequence[Chip], subject: Subject | None = None, simulate: bool = False
) -> list[dict[str, Any]]:
    """A row a chip, each of a technology of its own: what they are, what a network, if any, costs
    there, and with `simulate` its accuracy there."""
    rows = []
    for chip in chips:
        technology = chip.technology
        row = {
            "technology": technology.name,
            "title": technology.title,
            "node_nm": technology["process.node_nm"],
            "supply_v": technology["process.supply_v"],
            "cell": technology["cell.kind"],
            "cell_bits": chip.cell_bits,
            "on_ohm": chip.on_ohm,
            "on_off_ratio": str(chip.on_off_ratio),
            "xbar_size_cells": chip.xbar_size,
            "columns": chip.columns,
            "adc": technology["adc.kind"],
            "adc_bits": chip.adc_bits,
            "columns_per_adc_count": chip.columns_per_adc,
            "clk_mhz": chip.clk_mhz,
        }
        if subject is not None:
            total = estimate(subject.network, chip).total
            row |= {key: total[key] for key in (*COSTS, "frames_per_second", "tops_per_mm2")}
        rows.append(row)
    if simulate:
        from .nonideal import on_chip  # torch is needed here, and not for layer lists

        for chip, row in zip(chips, rows, strict=True):
            (accuracy,), _ = on_chip(subject, chip, name=chip.technology.name)
            row["chip_accuracy_share"] = accuracy
    return rows


def technology_tables(rows: Sequence[dict[str, Any]]) -> list[Table]:
    """The same as one table of what they are, and one of what the network costs."""
    header = ["technology", "node", "supply", "cell", "crossbar", "ADC", "clock"]
    names = short_names([row["technology"] for row in rows])
    cells = [
        [
            name,
            f"{row['node_nm']:g} nm",
            f"{row['supply_v']:g} V",
            f"{row['cell']}, {row['cell_bits']} bit",
            f"{row['xbar_size_cells']}, {row['columns']}",
            f"{row['adc']}, {row['adc_bits']} bit, of {row['columns_per_adc_count']} columns",
            f"{row['clk_mhz']:.4g} MHz",
        ]
        for name, row in zip(names, rows, strict=True)
    ]
    found = [(header, cells)]
    if "energy_pj" in rows[0]:
        costs = [
            [name, *(shown(key, row[key], digits=3) for key in COSTS)]
            for name, row in zip(names, rows, strict=True)
        ]
        header = ["on its chip", *(QUANTITIES[key][0] for key in COSTS)]
        if "chip_accuracy_share" in rows[0]:
            header.append("accuracy")
            for line, row in zip(costs, rows, strict=True):
                line.append(percent(row["chip_accuracy_share"], 2))
        found.append((header, costs))
    return found


def value_table(technologies: Sequence[Technology]) -> Table:
    """Every value of all of them, side by side."""
    header = ["value", "unit", *short_names([x.name for x in technologies])]
    rows = []
    for name, key in KEYS.items():
        said = [x.text(name) if name in x.entries else "" for x in technologies]
        if any(said) and not is_of_chip(name):
            rows.append([name, key.unit, *said])
    return header, rows
