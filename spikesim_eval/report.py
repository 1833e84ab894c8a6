"""An estimate as report.json, report.csv (a row a layer), report.md and report.html."""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from math import fsum
from pathlib import Path
from typing import Any

from display import component_name, engineering, percent, short_names, significant, text_table
from runtime.files import write_files

from .assumptions import COPIES, LOADS, assumptions
from .chip import Chip
from .compare import (
    SEARCHED_AXES,
    SEARCHED_CHOICES,
    nearest,
    notes,
    sensitivity,
)
from .constants import AREA, ENERGY, PUBLISHED_RATIO, STRUCTURE, Constant
from .estimate import Estimate, area_of, estimate, ratios
from .layer_list import LayerList, Subject
from .plots import PARTS, report_plots
from .render import (
    QUANTITIES,
    RATIO_NAMES,
    RATIOS,
    Section,
    csv_text,
    markdown,
    on_chip_text,
    page,
    shown,
)
from .technology import DEFAULT

TITLE = "SpikeSim estimate"
UNITS = {  # of the figures in report.json
    "energy_pj": "pJ",
    "area_um2": "um^2",
    "delay_ns": "ns",
    "edp_pj_ns": "pJ ns",
    "edap_pj_ns_um2": "pJ ns um^2",
    "frames_per_second": "1/s",
    "power_mw": "mW",
    "leakage_mw": "mW",
    "ops": "ops",
    "dram_bits": "bit",
    "tops_per_watt": "1e12 ops/J",
    "tops_per_mm2": "1e12 ops/s/mm^2",
}
COLUMNS = {  # key of a layer's row: its column in report.csv, with the unit; its heading elsewhere
    "name": ("layer_name", "layer"),
    "kernel": ("kernel_pixels", "kernel"),
    "in_channels": ("in_channels", "in"),
    "out_channels": ("out_channels", "out"),
    "weight_bits": ("weight_bits", "weight bits"),
    "input_bits": ("input_bits", "input bits"),
    "accumulator_bits": ("accumulator_bits", "accumulator bits"),
    "bn_bits": ("bn_scale_bits", "scale bits"),
    "product_bits": ("bn_product_bits", "product bits"),
    "adc_bits": ("adc_bits", "ADC bits"),
    "slices": ("slices_cells_per_weight", None),
    "channel_groups": ("channel_groups", None),
    "runs": ("runs_per_timestep", None),
    "has_lif": ("lif_behind_yes_no", None),
    "static": ("static_yes_no", None),
    "copies": ("copies_count", "copies"),
    "from_dram": ("weights_from_dram_yes_no", None),
    "crossbars": ("crossbars_count", None),
    "pes": ("pes_count", "PEs"),
    "groups": ("groups_count", "PE groups"),
    "utilization": ("utilization_share_of_cells", "cells used, %"),
    "cycles": ("pe_cycles", "PE cycles"),
    "conversions": ("adc_conversions", None),
    "ops": ("ops", None),
    "spike_rate": ("spike_rate_per_timestep", "spike rate"),
    "rate_is_measured": ("rate_is_measured_yes_no", None),
    "silent_patches": ("silent_patches_share_of_pe_cycles", "silent patches, %"),
    "energy_pj": ("energy_pj", "energy"),
    "area_um2": ("area_um2", "area"),
    "start_ns": ("start_ns", "start"),
    "delay_ns": ("delay_ns", "delay"),
    "finish_ns": ("finish_ns", "finish"),
    "busy_ns": ("busy_ns", "busy"),
    "on_critical_path": ("on_critical_path_yes_no", None),
}


def summary(network: LayerList) -> dict[str, Any]:
    return {
        "time_steps": network.time_steps,
        "weight_bits": network.weight_bits,
        "membrane_bits": network.membrane_bits,
        "leak": network.leak,
        "reset": network.reset,
        "layer_count": len(network.layers),
        "lif_count": len(network.lif),
    }


def build_report(
    subject: Subject, chip: Chip, baseline: Subject | None = None, area_mm2: float | None = None
) -> dict[str, Any]:
    """The contents of report.json. A chip of `area_mm2` is filled with copies of weights."""
    ours = estimate(subject.network, chip, area_mm2)
    report = {
        "name": subject.name,
        "accuracy": subject.accuracy,
        "chip_accuracies": subject.chip_accuracies,
        "notes": notes([subject] if baseline is None else [baseline, subject]),
        "network": summary(ours.network),
        "chip": chip.options("price")
        | (chip.options("simulation") if subject.chip_accuracies else {}),
        "units": UNITS | {"energy_by_component": "pJ", "area_by_component": "um^2"},
        "total": ours.total,
        "energy_by_component": ours.energy_by_component,
        "area_by_component": ours.area_by_component,
        "area_outside_layers": outside_layers(ours),
        "critical_path": list(ours.critical_path),
        "layers": list(ours.layers),
        "spike_rates_by_timestep": {name: list(rates) for name, rates in subject.rates.items()},
        "published": {name: constant.value for name, constant in PUBLISHED_RATIO.items()},
        "constants": constants(chip),
        "assumptions": assumptions(chip) + COPIES * (area_mm2 is not None),
    }
    loads = "layers_from_dram" in ours.total
    if baseline is not None:
        theirs = estimate(baseline.network, chip, area_mm2)
        loads = loads or "layers_from_dram" in theirs.total
        report["baseline_name"], report["baseline_accuracy"] = baseline.name, baseline.accuracy
        report["baseline_chip_accuracies"] = baseline.chip_accuracies
        report["baseline"] = theirs.total
        for kind in PARTS:
            report[f"baseline_{kind}"] = getattr(theirs, kind)
        report["baseline_network"] = summary(theirs.network)
        report["ratio"] = ratios(ours.total, theirs.total)
        report["sensitivity"] = sensitivity(subject.network, baseline.network, chip)
        if chip.technology is DEFAULT:  # else nobody claims the ratios
            report["nearest_to_published"] = nearest(subject.network, baseline.network, chip)
    report["assumptions"] += LOADS * loads
    return report


def outside_layers(ours: Estimate) -> dict[str, float]:
    """Area that belongs to no layer, um^2: membranes, the residual stream, the PEs that layers
    share whose weights come from DRAM, and the idle PEs of the last tile."""
    in_layers = fsum(row["area_um2"] for row in ours.layers)
    states = {name: ours.area_by_component[name] for name in ("membrane", "stream")}
    if loaded := [row for row in ours.layers if row["from_dram"]]:
        bits = max(row["adc_bits"] for row in loaded)
        chip = replace(ours.chip, adc_bits=bits, layer_adc_bits="")
        shared = area_of(max(row["pes"] for row in loaded), chip)
        states["shared_pes"] = fsum(shared.values())
    idle = max(0.0, ours.total["area_um2"] - in_layers - fsum(states.values()))
    return states | {"idle_pes": idle}


def constants(chip: Chip) -> list[dict[str, Any]]:
    """Every published number that the estimate rests on."""

    def rows(table: str, entries: Mapping[str, Constant]) -> list[dict[str, Any]]:
        return [{"table": table, "name": name} | x._asdict() for name, x in entries.items()]

    if chip.costs == "published":
        return rows("energy", ENERGY) + rows("area", AREA) + rows("structure", STRUCTURE)
    used = {"stream_bits": STRUCTURE["stream_bits"]}
    return [*chip.technology.rows(), *rows("structure", used)]


def layers_csv(report: Mapping[str, Any]) -> str:
    """A row a layer; every column's name ends in its unit or in what it counts."""
    header, rows = [column for column, _ in COLUMNS.values()], []
    for kind, unit in PARTS.items():
        header += [f"{name}_{unit}" for name in report["layers"][0][kind]]
    for row in report["layers"]:
        cells = (row[key] for key in COLUMNS)
        cells = [("no", "yes")[x] if isinstance(x, bool) else x for x in cells]
        rows.append([*cells, *(x for kind in PARTS for x in row[kind].values())])
    return csv_text(header, rows)


def names_of(report: Mapping[str, Any], width: int | None = None) -> list[str]:
    """Short names of the network and, where there is one, of the baseline."""
    return short_names([report[x] for x in ("name", "baseline_name") if x in report], width)


def totals_table(report: Mapping[str, Any], names: list[str]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: each figure, beside the baseline's where there is one."""
    totals = [report[key] for key in ("total", "baseline") if key in report]
    name, *baseline = names
    header = ["", name, *(f"{other} (baseline)" for other in baseline)]
    header += ["times better"] * len(baseline)
    rows = []
    accuracies = [report[key] for key in ("accuracy", "baseline_accuracy") if key in report]
    if any(x is not None for x in accuracies):
        rows.append(["accuracy", *("" if x is None else percent(x, 2) for x in accuracies)])
    keys = [key for key in ("chip_accuracies", "baseline_chip_accuracies") if key in report]
    if any(report[key] for key in keys):
        rows.append(["accuracy on the chip", *(on_chip_text(report[key]) for key in keys)])
    for key, label in (("pes", "PEs"), ("tiles", "tiles")):
        rows.append([label, *(f"{total[key]:,}" for total in totals)])
    if any("dram_bits" in total for total in totals):
        networks = [report[key] for key in ("network", "baseline_network") if key in report]
        of = zip(totals, networks, strict=True)
        loaded = (f"{x.get('layers_from_dram', 0)} of {y['layer_count']}" for x, y in of)
        rows.append(["layers from DRAM", *loaded])
        bits = (engineering(total.get("dram_bits", 0), "bit") for total in totals)
        rows.append(["from and to DRAM", *bits])
    if report["chip"]["layer_adc_bits"]:
        bits = [row["adc_bits"] for row in report["layers"]]
        rows.append(["ADC bits, by layer", f"{min(bits)} to {max(bits)}"])
    for key, (label, *_) in QUANTITIES.items():
        cells = [label, *(shown(key, total[key]) for total in totals)]
        if baseline and key in RATIOS:
            cells.append(significant(report["ratio"][RATIOS[key]], 4))
        rows.append(cells)
    return header, [row + [""] * (len(header) - len(row)) for row in rows]


def sections(report: Mapping[str, Any]) -> list[Section]:
    """What a reader is shown, in order."""
    rows = map(dict.values, report["constants"])
    constants = [[f"{table}: {name}", *about] for table, name, *about in rows]
    header = ["constant", "value", "unit", "published for", "source"]
    options = [list(item) for item in (report["chip"] | report["network"]).items()]
    return [
        *comparison_sections(report),
        *layer_sections(report),
        component_section(report),
        Section("Chip and network", [], ["option", "value"], options),
        Section("Assumptions", report["assumptions"]),
        Section("Constants", [], header, constants),
    ]


def comparison_sections(report: Mapping[str, Any]) -> list[Section]:
    """The totals, and what they rest on where there is a baseline."""
    names = names_of(report)
    sentences = [f"One inference of one sample by {report['name']}."]
    if "baseline" in report:
        sentences.append(f"The baseline is {report['baseline_name']}.")
    sentences += map(_sentence, report["notes"])
    found = [Section(names[0], sentences, *totals_table(report, names))]
    if "baseline" in report:
        rows = [
            [RATIO_NAMES[name], ratio, report["published"].get(name, "")]
            for name, ratio in report["ratio"].items()
        ]
        header = ["quantity", "here", "published (N-Caltech101, information only)"]
        found.append(Section(f"Times better than the baseline, {names[1]}", [], header, rows))
        sentences = [
            "Each assumption changed alone, for both networks where it concerns both; times off is "
            "the largest factor between a ratio and the published one (dashed in the picture).",
            *(nearest_text(near) for near in (report.get("nearest_to_published"),) if near),
        ]
        of_ratios = [RATIO_NAMES[name] for name in report["published"]]
        header = ["change", *of_ratios, "times off"]
        rows = [
            [row["change"], *row["ratio"].values(), row["times_off"]]
            for row in report["sensitivity"]
        ]
        found.append(Section("Sensitivity", sentences, header, rows))
    return found


def nearest_text(near: Mapping[str, Any]) -> str:
    searched = ", ".join((*SEARCHED_AXES, *SEARCHED_CHOICES))
    ratio = ", ".join(f"{RATIO_NAMES[x]} {significant(y)}" for x, y in near["ratio"].items())
    return (
        f"Of {near['combinations']} combinations (of {searched} and the baseline's width) the "
        f"nearest to the published ratios is {near['change']}: {ratio}, "
        f"{significant(near['times_off'])} times off. That is fitting, and no evidence."
    )


def layer_sections(report: Mapping[str, Any]) -> list[Section]:
    layers, rows = report["layers"], []
    headings = {key: heading for key, (_, heading) in COLUMNS.items() if heading}
    if all(row["silent_patches"] is None for row in layers):
        del headings["silent_patches"]
    for row in layers:
        rate = f"{row['spike_rate']:.4g}" + ("" if row["rate_is_measured"] else " (not measured)")
        cells = row | {"utilization": f"{100 * row['utilization']:.1f}", "spike_rate": rate}
        if row["silent_patches"] is not None:
            cells["silent_patches"] = f"{100 * row['silent_patches']:.1f}"
        cells |= {key: shown(key, row[key]) for key in ("energy_pj", "area_um2")}
        times = ("start_ns", "delay_ns", "finish_ns", "busy_ns")
        cells |= {key: shown("delay_ns", row[key]) for key in times}
        rows.append([cells[key] for key in headings])
    path = f"Critical path: {' → '.join(report['critical_path'])}."
    found = [Section("Layers", [path], list(headings.values()), rows)]
    for parts, key in PARTS.items():
        header = ["layer", *map(component_name, layers[0][parts])]
        rows = [[row["name"], *(shown(key, x) for x in row[parts].values())] for row in layers]
        found.append(Section(f"Layers: {QUANTITIES[key][0]}", [], header, rows))
    return found


def component_section(report: Mapping[str, Any]) -> Section:
    """Of each component energy and area, and its share of all of them."""
    parts = {"energy_pj": report["energy_by_component"], "area_um2": report["area_by_component"]}
    rows = {name: [component_name(name)] for part in parts.values() for name in part}
    for key, part in parts.items():
        total = fsum(part.values())
        for name, row in rows.items():
            x = part.get(name)
            row += ["", ""] if x is None else [shown(key, x), f"{100 * x / total:.1f}"]
    outside = {key: shown("area_um2", x) for key, x in report["area_outside_layers"].items()}
    sentence = (
        "Of the area, {membrane} are membranes, {stream} the residual stream, "
        + "{shared_pes} the PEs that layers from DRAM share " * ("shared_pes" in outside)
        + "and {idle_pes} idle PEs of the last tile; the rest belongs to layers."
    ).format_map(outside)
    header = ["component", "energy", "share, %", "area", "share, %"]
    return Section("Energy and area by component", [sentence], header, list(rows.values()))


def _sentence(note: str) -> str:
    return f"{note[0].upper()}{note[1:]}."


def totals_text(report: Mapping[str, Any]) -> str:
    """The totals, beside those of the baseline and the published ratios where there is one, and
    what to know, for the terminal."""
    header, rows = totals_table(report, names_of(report, 20))
    notes = report["notes"]
    if "baseline" in report:
        published = {
            QUANTITIES[key][0]: report["published"].get(ratio) for key, ratio in RATIOS.items()
        }
        header.append("published")
        rows = [[*row, str(published.get(row[0]) or "")] for row in rows]
        notes = ["published: on N-Caltech101, against floating point, as information only", *notes]
    return "\n".join([*text_table(header, rows), *notes])


def write_report(folder: str | Path, report: Mapping[str, Any], network: LayerList) -> None:
    """Write report.json, .csv, .md and .html into `folder`, and the network that was estimated as
    layers.json; raises as `write_files`."""
    found = sections(report)
    write_files(
        folder,
        {
            "report.json": json.dumps(report, indent=2, allow_nan=False) + "\n",
            "layers.json": json.dumps(asdict(network), indent=2, allow_nan=False) + "\n",
            "report.csv": layers_csv(report),
            "report.md": markdown(TITLE, found),
            "report.html": page(TITLE, found, report_plots(report)),
        },
    )
