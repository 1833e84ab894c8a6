"""Writes an estimate as report.json, report.csv (a row a layer) and report.md (for a reader)."""

import csv
import errno
import io
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .constants import PUBLISHED_RATIO
from .estimate import Chip, Estimate
from .layers import InputError, Network

# A ratio above 1 means better: less of what is spent, more of what is gained.
SPENT = {"edap": "edap_pj_ns_um2", "energy": "energy_pj", "delay": "delay_ns", "area": "area_um2"}
GAINED = ("tops_per_watt", "tops_per_mm2")

TOTALS = {  # key in `total`: label and unit for a reader
    "pes": ("PEs", ""),
    "tiles": ("tiles", ""),
    "energy_pj": ("energy", "pJ"),
    "area_um2": ("area", "um^2"),
    "delay_ns": ("delay", "ns"),
    "edap_pj_ns_um2": ("energy-delay-area product", "pJ ns um^2"),
    "ops": ("operations", "ops"),
    "tops_per_watt": ("TOPS/W", "1e12 ops/J"),
    "tops_per_mm2": ("TOPS/mm^2", "1e12 ops/s/mm^2"),
}
CSV_COLUMNS = {  # column, with its unit: key of a layer's row
    "layer_name": "name",
    "kernel_pixels": "kernel",
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "weight_bits": "weight_bits",
    "input_bits": "input_bits",
    "accumulator_bits": "accumulator_bits",
    "bn_scale_bits": "bn_bits",
    "bn_product_bits": "product_bits",
    "slices_cells_per_weight": "slices",
    "pes_count": "pes",
    "groups_count": "groups",
    "pe_cycles": "cycles",
    "ops": "ops",
    "spike_rate_per_timestep": "spike_rate",
    "rate_is_measured_yes_no": "rate_is_measured",
    "energy_pj": "energy_pj",
    "start_ns": "start_ns",
    "delay_ns": "delay_ns",
    "finish_ns": "finish_ns",
}


def ratios(ours: Mapping[str, float], baseline: Mapping[str, float]) -> dict[str, float]:
    """How many times better `ours` is than `baseline`; both are the `total` of an estimate."""
    spent = {name: baseline[key] / ours[key] for name, key in SPENT.items()}
    return spent | {name: ours[name] / baseline[name] for name in GAINED}


def assumptions(chip: Chip) -> list[str]:
    """What the figures rest on, one sentence each."""
    periphery = {
        "per_group": "H-tree, fetch, neuron and tile buffer are charged once per group of PEs that "
        "hold the bit slices of the same weights (the published tool has no slices and charges "
        "every PE: --periphery per_pe).",
        "per_pe": "H-tree, fetch, neuron and tile buffer are charged for every PE, bit slices "
        "included, as the published tool does.",
    }
    delay = {
        "element_serial": "A PE cycle gives one channel of one output pixel, as published.",
        "pixel_serial": "A PE cycle gives all channels of one output pixel; the published tool "
        "takes one cycle per channel (--delay element_serial).",
    }
    return [
        "Component figures are those of the published SpikeSim tool; nothing is measured on a "
        "chip.",
        periphery[chip.periphery],
        "Inputs are fed bit by bit, one PE cycle a bit: 1 bit for spikes, 8 for the image, the "
        "quantized stream's own width for a shortcut convolution.",
        "The stem reads the 8-bit image at every timestep and is charged at every timestep, "
        "though software computes it once for a static image.",
        "The linear layer runs once, on spike counts of ceil(log2(T*H*W + 1)) bits.",
        "A weight of w bits takes ceil(w / cell bits) cells in neighbouring columns; a PE packs "
        "the row groups of a smaller kernel into its crossbars.",
        "A layer's sums are shifted and added in an accumulator wide enough for the worst case; "
        "batch norm multiplies them by an integer scale, and its products are shifted onto the "
        "residual stream of 24 bits and a sign, 14 of them behind the point (quantization.py, "
        "IntegerNetwork). These widths are stated; the published tool has no digital "
        "multiplier to charge.",
        "Only crossbar energy scales with the spike rate; where no rate was measured it is 1.",
        "Energy and area of an ADC double with every bit above 4; energy and area of a crossbar "
        "grow with its cells.",
        delay[chip.delay],
        "A layer starts when every layer it waits for is 75 % done, so an addition waits for both "
        "branches.",
        "Area counts an input buffer per layer and a membrane memory for every LIF neuron, with "
        "their own bit widths (the published tool: 22 bits, membranes of five layers).",
        "A floating-point network enters as 32-bit fixed point (weights, membranes, shortcut "
        "inputs) on the same chip, because crossbars hold no floating-point numbers.",
        "The published ratios (N-Caltech101, against floating point) are printed as information "
        "only: the published tool ignores bit widths and 2.64 x 6.19 is not 14.85, so the authors' "
        "set-up cannot be recovered from them.",
    ]


def summary(network: Network) -> dict[str, int]:
    return {
        "time_steps": network.time_steps,
        "weight_bits": network.weight_bits,
        "membrane_bits": network.membrane_bits,
        "layer_count": len(network.layers),
        "lif_count": len(network.lif),
    }


def build_report(ours: Estimate, baseline: Estimate | None = None) -> dict[str, Any]:
    """The contents of report.json."""
    report = {
        "network": summary(ours.network),
        "chip": asdict(ours.chip) | {"crossbars_per_pe": ours.crossbars_per_pe},
        "units": {key: unit for key, (_, unit) in TOTALS.items() if unit}
        | {"energy_by_component": "pJ", "area_by_component": "um^2"},
        "total": ours.total,
        "area_by_component": ours.area_by_component,
        "layers": list(ours.layers),
        "published": {name: constant.value for name, constant in PUBLISHED_RATIO.items()},
        "assumptions": assumptions(ours.chip),
    }
    if baseline is not None:
        report["baseline"] = baseline.total
        report["baseline_network"] = summary(baseline.network)
        report["ratio"] = ratios(ours.total, baseline.total)
    return report


def csv_text(report: Mapping[str, Any]) -> str:
    """A row a layer; every column's name ends in its unit or in what it counts."""
    components = list(report["layers"][0]["energy_by_component"])
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*CSV_COLUMNS, *(f"{component}_energy_pj" for component in components)])
    for row in report["layers"]:
        row = row | {"rate_is_measured": "yes" if row["rate_is_measured"] else "no"}
        energy = row["energy_by_component"]
        writer.writerow([*(row[key] for key in CSV_COLUMNS.values()), *energy.values()])
    return out.getvalue()


def _table(header: list[str], rows: list[list[Any]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    cells = ((_cell(value) for value in line) for line in lines)
    return [f"| {' | '.join(line)} |" for line in cells] + [""]


def _cell(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text.replace("\\", "\\\\").replace("|", "\\|")


def markdown_text(report: Mapping[str, Any]) -> str:
    total, baseline = report["total"], report.get("baseline")
    header = ["quantity", "value", *(["baseline"] if baseline else []), "unit"]
    rows = [
        [label, total[key], *([baseline[key]] if baseline else []), unit]
        for key, (label, unit) in TOTALS.items()
    ]
    lines = ["# SpikeSim estimate", "", "One inference of one sample.", ""]
    lines += _table(header, rows)
    if baseline:
        lines += ["## Times better than the baseline", ""]
        lines += _table(
            ["quantity", "here", "published (N-Caltech101, information only)"],
            [
                [name, ratio, report["published"].get(name, "")]
                for name, ratio in report["ratio"].items()
            ],
        )
    lines += ["## Layers", ""]
    lines += _table(
        [
            *("layer", "kernel", "in", "out", "weight bits", "input bits", "accumulator bits"),
            *("scale bits", "product bits", "PEs", "groups", "PE cycles", "spike rate"),
            *("energy pJ", "start ns", "delay ns", "finish ns"),
        ],
        [
            [
                *(row[key] for key in ("name", "kernel", "in_channels", "out_channels")),
                *(row[key] for key in ("weight_bits", "input_bits", "accumulator_bits")),
                *("" if row[key] is None else row[key] for key in ("bn_bits", "product_bits")),
                *(row[key] for key in ("pes", "groups", "cycles")),
                f"{row['spike_rate']:.4g}" + ("" if row["rate_is_measured"] else " (not measured)"),
                *(row[key] for key in ("energy_pj", "start_ns", "delay_ns", "finish_ns")),
            ]
            for row in report["layers"]
        ],
    )
    lines += ["## Energy and area by component", ""]
    area = report["area_by_component"]
    energy = {
        name: sum(row["energy_by_component"][name] for row in report["layers"])
        for name in report["layers"][0]["energy_by_component"]
    }
    lines += _table(
        ["component", "energy pJ", "area um^2"],
        [[name, energy.get(name, ""), area.get(name, "")] for name in energy | area],
    )
    lines += ["## Chip and network", ""]
    lines += _table(
        ["option", "value"], [list(item) for item in (report["chip"] | report["network"]).items()]
    )
    lines += ["## Assumptions", "", *(f"- {sentence}" for sentence in report["assumptions"])]
    return "\n".join(lines) + "\n"


def totals_text(report: Mapping[str, Any]) -> str:
    """The totals, and the ratios where there is a baseline, for the terminal."""
    lines = [
        f"{label:<28}{_cell(report['total'][key]):>14} {unit}".rstrip()
        for key, (label, unit) in TOTALS.items()
    ]
    for name, ratio in report.get("ratio", {}).items():
        published = report["published"].get(name)
        beside = f" (published, information only: {published})" if published else ""
        lines.append(f"{name + ', times better':<28}{ratio:>14.4g}{beside}")
    return "\n".join(lines)


def write_report(folder: str | Path, report: Mapping[str, Any]) -> None:
    """Write report.json, report.csv and report.md into `folder`, all of them or none.

    Each is written beside its target and moved there once all three are complete. Raises InputError
    where the folder cannot be made or written to.
    """
    if not str(folder):
        raise InputError("the folder of the report has no name")
    folder = Path(folder)
    made = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    texts = {
        "report.json": json.dumps(report, indent=2, allow_nan=False) + "\n",
        "report.csv": csv_text(report),
        "report.md": markdown_text(report),
    }
    complete: dict[Path, Path] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            target = folder / name
            if target.is_dir():  # found out now, not after its neighbours have been replaced
                raise IsADirectoryError(errno.EISDIR, f"{name} is a folder there")
            temporary = folder / f".{name}.{os.getpid()}"
            complete[temporary] = target
            temporary.write_text(text, encoding="utf-8", newline="\n")
        for temporary, target in complete.items():
            os.replace(temporary, target)
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        for temporary in complete:
            temporary.unlink(missing_ok=True)
        for path in made:
            with suppress(OSError, ValueError):
                path.rmdir()
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"cannot write to {str(folder)!r}: {reason}") from None
