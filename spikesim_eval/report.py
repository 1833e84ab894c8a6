"""An estimate as report.json, report.csv (a row a layer), report.md and report.html."""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from math import fsum
from pathlib import Path
from typing import Any

from display import component_name, engineering, percent, short_names, significant, text_table
from runtime.files import write_files

from .chip import NOTHING, Chip
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

ADC_LAW = {
    "doubling": "Energy and area of an ADC double with every bit above the technology's and halve "
    "with every bit below.",
    "linear": "Energy and area of an ADC are in proportion to its bits.",
    "table": "Energy, area and, where it says them, clocks of an ADC grow as in the technology's "
    "table by bits, in between in proportion in logarithms; one of fewer bits than the table's "
    "first costs as much as that.",
}
COLUMN_KINDS = {
    "differential": "Positive and negative weights lie in crossbars of their own, of w - 1 bits, "
    "whose ADCs' codes are subtracted.",
    "offset": "A weight is stored with an offset, in w bits; what the offset adds is subtracted.",
}
ADC_OF = {
    "crossbar": "Each crossbar's columns have ADCs of their own, and each is converted.",
    "pe": "The columns that lie in line in a PE are added before they are converted.",
}


CHARGED = {  # by Chip.costs
    "published": [
        "H-tree, fetch, neuron and tile buffer are charged once per PE cycle and group of PEs "
        "that hold the bit slices of the same weights; all of a PE's columns are converted, "
        "and whole crossbars are driven, however few of their cells hold weights.",
        "The stem is charged at every timestep, though software computes it once for a static "
        "image.",
        "A PE cycle gives one channel of one output pixel; a layer starts when every layer it "
        "waits for is 75 % done.",
        "Membranes, batch norm and leakage take no energy, as published; accumulators, batch "
        "norm's products and the residual stream no area.",
    ],
    "counted": [
        "Charged is what happens: driven cells that hold weights, conversions of columns that "
        "hold weights, sums that leave a PE, bits read and written, additions and products. "
        "One conversion, driven cell or moved sum costs what the published tool charges for "
        "it; arithmetic, memory and leakage are from the sources below, scaled to 65 nm where "
        "they say so.",
        "Where every timestep reads the same image the stem runs once, and its sums are kept "
        "twice, in 25 bits: it begins with the next image while they are still read.",
        "A PE cycle takes one clock for currents to settle and one for each bit of each "
        "column that an ADC reads in turn; all PEs of a layer work at once.",
        "Layers are pipelined: a layer starts a row of pixels when the rows that its kernel "
        "reads have arrived, timestep after timestep. The delay is one image's alone; frames a "
        "second and power are of image after image.",
        "A membrane is read and written at every update, in as many bits as it has; an input "
        "is written once and read at every kernel position. The residual stream is kept, in "
        "25 bits, while a block computes what is added to it, written and read at every "
        "timestep. Not charged: DRAM for inputs and results, the distribution of clocks, the count "
        "of driven rows that offset columns need, and the area of multipliers and LIF logic.",
        "Transistors leak as an SRAM cell of the same area does; the H-tree's wires do not, nor "
        "do crossbars, but for SRAM.",
    ],
}
SKIPPED = {  # by what Chip.skip names
    "rows": "Of a silent row, a bit inside of the plane that is no one, nothing is read from the "
    "tile buffer, as from cells whose read port discharges for a one alone; nothing drives a "
    "silent row in any case.",
    "patches": "A silent patch, an output pixel and input bit at which no row of the layer carries "
    "a one, converts nothing: of its cycle the clock is left in which that is seen, and neither "
    "ADCs, adders and temporary buffers nor fetch and H-tree work. A row of pixels takes its "
    "layer's average time.",
    "tiles": "A tile none of whose rows carries a one in a cycle converts nothing and moves no "
    "sums, but takes the time of the others. A tile holds PEs that read the same rows, and of as "
    "many in line as fit, as if each layer began a tile.",
}
NOC = {
    "free": "What it takes to bring spikes and sums from one layer's tiles to another's is not "
    "charged.",
    "mesh": "Tiles lie on a square mesh in the order of the layers. A bit takes a router for every "
    "tile between the middles of two layers' tiles: inputs from where the last of the layers lies "
    "that they come from, sums of the residual stream, of 25 bits, to there. Links are wide enough "
    "to take no time.",
}
NOT_SKIPPED = (
    "Seeing silence costs nothing. Inputs are written, sums normalized and membranes updated where "
    "nothing fires, too. What lies outside of the plane is charged as without skipping."
)
SILENCE = (
    "Silence is counted from recorded spikes where there are any ('silent patches' of the layers); "
    "else each bit is taken for a one with the layer's rate, independently of all others."
)
UPDATE = {  # what a LIF update costs, by Chip.costs
    "published": "A LIF update costs the same whatever its reset and leak, as published.",
    "counted": "The published LIF module is taken to reset to 0 and to leak by a shift. A soft "
    "reset takes an addition of 25 bits more at every update; a leak that is no power of two a "
    "product of the membrane's bits with as many; with a leak of 0 no membrane is kept.",
}
LOADS = [
    "The chip holds fewer weights than the network has. Layers that get theirs from DRAM share the "
    "PEs of the largest of them and run one after the other, by depth, each for all timesteps. "
    "When one is done the next is loaded, for every image anew: its crossbars are programmed all "
    "at once, row by row, a row in the time of one write, or as fast as DRAM gives the bits. The "
    "chip can begin with the next image when the last of them is done.",
    "What such layers read waits for them in DRAM, of all timesteps, written and read once; so do "
    "the sums of the residual stream, in 25 bits, that such layers, or others of their branch, add "
    "to. A row of pixels takes at least the time of its bits. The layers are chosen for the fewest "
    "bits, of weights and what waits.",
    "Every cell that holds part of a loaded weight is written, zeros too, once: several levels in "
    "a cell may take more pulses. DRAM that nobody reads takes nothing, nor do wires from its pins "
    "to the cells. Cells wear: they are written as often as there are images.",
]
COPIES = [
    "Copies of weights are put on the chip as long as they make the pipeline faster and the area "
    "given is not exceeded; copies compute pixels of a row side by side. The sensitivities are of "
    "a chip that holds every weight once."
]


def assumptions(chip: Chip) -> list[str]:
    """What the figures rest on, one sentence each."""
    return [
        f"Component figures are those of {chip.technology} ({chip.technology.title}), with their "
        "sources below; nothing is measured on a chip.",
        *CHARGED[chip.costs],
        COLUMN_KINDS[chip.columns],
        ADC_OF[chip.adc_of],
        "Inputs are fed bit by bit, one PE cycle a bit: 1 bit for spikes, 8 for the image, the "
        "quantized stream's own width for a shortcut convolution.",
        "The linear layer runs once, on spike counts of ceil(log2(T*H*W + 1)) bits.",
        "The LIF module is charged once per update, after all input bits, and only behind layers "
        "whose sums update LIF neurons: not for shortcuts and the classifier, and as many pixels "
        "as the layer has where a pooling lies between.",
        UPDATE[chip.costs],
        "A stored weight of b bits takes ceil(b / cell bits) cells side by side in one crossbar, "
        "so a crossbar row of X cells holds the whole weights that fit into X; a PE's crossbars "
        "hold kernel positions and row groups of the same columns, as many as it has.",
        "The channel groups of a grouped or depthwise convolution are blocks: where several fit, "
        "they share a crossbar as blocks on its diagonal, else each has crossbars of its own, and "
        "never more than the same layer without groups.",
        "A layer that runs several times in a timestep has its weights on the chip once, and takes "
        "energy and time for every run.",
        "A layer's sums are shifted and added in an accumulator wide enough for the worst case; "
        "batch norm multiplies them by an integer scale, and its products are shifted onto the "
        "residual stream of 24 bits and a sign, 14 of them behind the point "
        "(models/integer_network.py).",
        *skipping(chip),
        NOC[chip.noc],
        f"{ADC_LAW[chip.adc_law]} Those of a crossbar grow with its cells.",
        *[f"Transistors ({chip.process}) leak as at {chip.celsius:g} °C."]
        * (chip.costs == "counted"),
        "Area counts an input buffer per layer and a membrane memory for every LIF neuron, with "
        "their own bit widths (the published tool: 22 bits, membranes of five layers).",
        "A full-precision checkpoint enters as fixed point of --full_precision_bits (weights, "
        "membranes, shortcut inputs, batch norm) on the same chip with the same ADCs, because "
        "crossbars hold no floating-point numbers: 16 bits, as ISAAC and PUMA build it (32 with "
        "--preset published), and other widths among the sensitivities. It is priced and not "
        "simulated: these ADCs would clip its sums, so one that keeps its accuracy costs more.",
        "The published ratios (N-Caltech101, against floating point) are printed as information "
        "only: the published tool ignores bit widths and 2.64 x 6.19 is not 14.85, so the authors' "
        "set-up cannot be recovered from them.",
    ]


def skipping(chip: Chip) -> list[str]:
    """What depends on spikes."""
    if chip.skip == NOTHING:
        return [
            "Only crossbar energy scales with the spike rate; where no rate was measured it is 1."
        ]
    return [*(text for name, text in SKIPPED.items() if chip.skips(name)), NOT_SKIPPED, SILENCE]


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
    return [*chip.technology.rows(), *rows("structure", STRUCTURE)]


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
