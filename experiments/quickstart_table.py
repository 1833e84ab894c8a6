"""Table and plots of a quickstart: python -m experiments.quickstart_table runs/quickstart

Reads the runs (a teacher, and students with and without it) and their SpikeSim reports below the
folder, measures the students' distance to the membranes of the teacher that taught over the test
set, prints the table and writes table.md, table.csv, quickstart.png and quickstart.pdf. All
networks are those of the last epoch, which nobody chose. The best accuracies stand below, with
their epochs: chosen on the test set, as SNN papers do, or with --val_share on a part of the
training images. The teacher's best epoch is the one that taught.
"""

import csv
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.ticker import MaxNLocator
from torch import Tensor

from checkpoints import Checkpoint, load_checkpoint
from data_loader import Share, data_of, evaluation_loader
from display import kind_of, legend_below, new_figure, percent, save_picture, styles, text_table
from distiller import distance_to_teacher
from engine.run_folder import best_row, read_metrics
from experiments import as_command
from load_settings import load_network
from runtime.command import HelpFormatter, Parser
from runtime.errors import UserError
from spikesim_eval.render import QUANTITIES, RATIO_NAMES, markdown_table, shown

COSTS = ("energy", "delay", "area", "edap")
FILE_UNITS = {  # in table.csv: (row, one of the report's unit in the row's)
    "energy_pj": ("energy, µJ", 1e-6),
    "delay_ns": ("delay, µs", 1e-3),
    "area_um2": ("area, mm²", 1e-6),
    "edap_pj_ns_um2": ("EDAP, µJ·ms·mm²", 1e-18),
    "tops_per_watt": ("TOPS/W", 1),
    "tops_per_mm2": ("TOPS/mm²", 1),
}
LABELS = {"original": "teacher (full precision)", "student": "student", "qamd": "MD-SNN"}


class Run(NamedTuple):
    label: str
    style: dict[str, str]  # colour and line
    checkpoint: Checkpoint  # which the SpikeSim report describes
    metrics: list[dict[str, Any]]
    report: dict


def write(folder: Path) -> None:
    taught = load_checkpoint(folder / "teacher" / "original-best.pth")
    teacher, *students = runs = find_runs(folder)
    if not students:
        raise UserError(f"{folder} holds no student")
    network = load_network(taught)
    settings = teacher.checkpoint.settings
    _, test_set = data_of(settings, settings.data_path)
    batches = evaluation_loader(test_set, Share(settings.batch_size))
    distances = {
        run.label: distance_to_teacher(network, load_network(run.checkpoint), batches)
        for run in students
    }
    write_table(folder, taught, runs, distances)
    plot(folder / "quickstart.png", runs, distances)
    print(f"\ntable.md, table.csv, quickstart.png, .pdf and the runs are in {folder}")


def find_runs(folder: Path) -> list[Run]:
    """The runs below the folder: the teacher, then students, then MD-SNN; fewer bits first."""
    found = []
    for path in folder.glob("*/settings.json"):
        (file,) = path.parent.glob("*-last.pth")
        checkpoint = load_checkpoint(file)
        place = list(LABELS).index(checkpoint.settings.paper_setting)
        found.append((place, checkpoint.settings.bits or 0, path.parent, checkpoint))
    found.sort(key=lambda run: run[:3])
    settings = [checkpoint.settings for *_, checkpoint in found]
    kinds = [of_run.paper_setting for of_run in settings]
    looks = styles([kind_of(of_run.paper_setting, of_run.loss) for of_run in settings])
    runs = []
    for style, (*_, path, checkpoint) in zip(looks, found, strict=True):
        kind, bits = checkpoint.settings.paper_setting, checkpoint.settings.bits
        label = LABELS[kind] + (f", {bits} bits" if kinds.count(kind) > 1 else "")
        report = json.loads((path / "edap" / "report.json").read_text())
        runs.append(Run(label, style, checkpoint, read_metrics(path / "metrics.csv"), report))
    return runs


def chip_bits(runs: list[Run]) -> int:
    """With how many bits the teacher stands in the reports."""
    return runs[0].report["network"]["weight_bits"]


def on_chip(run: Run) -> float | None:
    accuracies = run.report.get("chip_accuracies")
    return accuracies and statistics.mean(accuracies)


def adc_bits(run: Run) -> str:
    bits = [layer["adc_bits"] for layer in run.report["layers"]]
    return f"{min(bits)}" if min(bits) == max(bits) else f"{min(bits)} to {max(bits)}"


def table(
    runs: list[Run], distances: dict[str, dict[str, Tensor]], for_programs: bool = False
) -> list[list[str]]:
    """Rows [quantity, a cell per run], already formatted: with the units that suit them, or for
    programs as plain numbers in the units that the rows name."""

    def row(name: str, cell: Callable[[Run], str]) -> list[str]:
        return [name, *map(cell, runs)]

    def share(name: str, of: Callable[[Run], float | None], note: Callable = lambda _: "") -> list:
        def cell(run: Run) -> str:
            if (value := of(run)) is None:
                return "-"
            return f"{100 * value:.2f}" if for_programs else percent(value, 2) + note(run)

        return row(f"{name}, %" if for_programs else name, cell)

    def distance(run: Run, key: str) -> float | None:
        measured = distances.get(run.label)
        return None if measured is None else measured[key].mean().item()

    def membrane_kl(run: Run) -> str:
        value = distance(run, "membrane_kl")
        return "-" if value is None else f"{value:.4f}"

    def total(key: str) -> list[str]:
        if for_programs:
            name, scale = FILE_UNITS[key]
            return row(name, lambda run: f"{run.report['total'][key] * scale:.4g}")
        return row(QUANTITIES[key][0], lambda run: shown(key, run.report["total"][key]))

    def ratio(key: str) -> list[str]:
        def cell(run: Run) -> str:
            return f"{run.report['ratio'][key]:.2f}" if "ratio" in run.report else "1.00"

        return row(f"{RATIO_NAMES[key]}, × better", cell)

    best_of = {run.label: best_row(run.metrics) for run in runs}
    best_epochs = [row("best epoch", lambda run: str(best_of[run.label]["epoch"]))]
    return [
        row("epochs", lambda run: str(run.checkpoint.settings.epochs)),
        row("bits", lambda run: str(run.checkpoint.settings.bits or "32 (float)")),
        share("accuracy, last epoch", lambda run: run.checkpoint.accuracy),
        share(
            "accuracy, best epoch",
            lambda run: best_of[run.label]["test_accuracy"],
            lambda run: f" (epoch {best_of[run.label]['epoch']})",
        ),
        *(best_epochs if for_programs else []),
        share("accuracy on the chip", on_chip),
        row("membrane KL to teacher", membrane_kl),
        share("differing spikes", lambda run: distance(run, "differing_spikes")),
        share("spike rate", lambda run: run.metrics[run.checkpoint.epoch - 1]["spike_rate"]),
        row("ADC bits", adc_bits),
        *map(total, FILE_UNITS),
        *map(ratio, ("energy", "delay", "area", "edap", "tops_per_watt", "tops_per_mm2")),
    ]


def write_table(
    folder: Path, taught: Checkpoint, runs: list[Run], distances: dict[str, dict[str, Tensor]]
) -> None:
    rows = table(runs, distances)
    settings = taught.settings
    header = ["", *(run.label for run in runs)]
    title = (
        f"{settings.data}, {settings.network_name}, width {settings.width}, "
        f"T = {settings.time_window}, seed {settings.seed}; "
        f"the teacher on the chip: {chip_bits(runs)}-bit fixed point; times better: than the "
        "teacher on the student's own chip"
    )
    teacher = (
        f"MD-SNN was taught by the teacher of its best epoch ({taught.epoch}, "
        f"{percent(taught.accuracy, 2)}): membrane KL and differing spikes are to that one."
    )
    print("\n".join(["", title, "", *text_table(header, rows), "", teacher]))
    with (folder / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *table(runs, distances, for_programs=True)])
    text = "\n".join(markdown_table(header, rows))
    (folder / "table.md").write_text(f"{title}\n\n{text}\n\n{teacher}\n")


def plot(path: Path, runs: list[Run], distances: dict[str, dict[str, Tensor]]) -> None:
    figure, panels = new_figure(13, 4.2, columns=3)
    left, middle, right = panels
    for run in runs:
        accuracy = [100 * row["test_accuracy"] for row in run.metrics]
        left.plot(range(1, len(accuracy) + 1), accuracy, label=run.label, **run.style)
    left.set(xlabel="epoch", ylabel="test accuracy, %", title="accuracy")

    _, *students = runs
    height = 0.8 / len(students)
    for number, run in enumerate(students):
        share = 100 * distances[run.label]["differing_spikes"].mean(dim=1)
        middle.plot(range(1, len(share) + 1), share, marker="o", label=run.label, **run.style)
        values = [run.report["ratio"][name] for name in COSTS]
        places = [i + (number - (len(students) - 1) / 2) * height for i in range(len(COSTS))]
        bars = right.barh(places, values, 0.9 * height, color=run.style["color"])
        right.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
    middle.set(
        xlabel="LIF layer, in forward order",
        ylabel="neurons · timesteps, %",
        title="spikes that differ from the teacher's",
    )
    middle.set_ylim(bottom=0)
    right.margins(x=0.12)  # for the numbers beside the bars
    right.axvline(1, color=runs[0].style["color"], linestyle="--", linewidth=1)
    dashed = f"times better than the teacher of {chip_bits(runs)} bits (dashed)"
    right.set(xlabel=dashed, title="SpikeSim estimate")
    right.set_yticks(range(len(COSTS)), [*COSTS[:-1], "EDAP"])
    right.invert_yaxis()
    for axis in (left.xaxis, middle.xaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    legend_below(figure, panels)
    save_picture(figure, path)


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="experiments.quickstart_table", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, default="runs/quickstart")
    return as_command(parser.prog, lambda: write(parser.parse_args(argv).folder))


if __name__ == "__main__":
    sys.exit(main())
