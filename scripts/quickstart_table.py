"""Table and plots of a quickstart: python scripts/quickstart_table.py runs/quickstart

Reads the runs (a teacher, and students with and without it) and their SpikeSim reports below the
folder, measures the students' distance to the membranes of the teacher that taught over the test
set, prints the table and writes table.md, table.csv and quickstart.png. All networks are those of
the last epoch, which nobody chose. The best accuracies stand below, with their epochs: chosen on
the test set, as SNN papers do. The teacher's best epoch is the one that taught.
"""

import csv
import json
import sys
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data_loader import data_of, evaluation_loader
from distiller import distance_to_teacher
from load_settings import Checkpoint, Settings, load_checkpoint, load_network

COSTS = ("energy", "delay", "area", "edap")
LABELS = {"original": "teacher (full precision)", "student": "student", "qamd": "MD-SNN"}
COLOURS = ("tab:gray", "tab:orange", "tab:blue", "tab:green", "tab:red")


class Run(NamedTuple):
    label: str
    colour: str
    checkpoint: Checkpoint  # which the SpikeSim report describes
    metrics: list[dict[str, str]]
    report: dict


def main(folder: Path) -> None:
    teacher, *students = runs = find_runs(folder)
    taught = load_checkpoint(folder / "teacher" / "original-best.pth")
    network = load_network(taught)
    batches = test_batches(teacher.checkpoint.settings)
    distances = {
        run.label: distance_to_teacher(network, load_network(run.checkpoint), batches)
        for run in students
    }
    write_table(folder, table(runs, distances), taught, runs)
    plot(folder / "quickstart.png", runs, distances)
    print(f"\ntable.md, table.csv, quickstart.png and the runs are in {folder}")


def find_runs(folder: Path) -> list[Run]:
    """The runs below the folder: the teacher, then students, then MD-SNN; fewer bits first."""
    found = []
    for path in folder.glob("*/settings.json"):
        (file,) = path.parent.glob("*-last.pth")
        checkpoint = load_checkpoint(file)
        place = list(LABELS).index(checkpoint.settings.paper_setting)
        found.append((place, checkpoint.settings.bits or 0, path.parent, checkpoint))
    kinds = [checkpoint.settings.paper_setting for *_, checkpoint in found]
    runs = []
    for colour, (*_, path, checkpoint) in zip(cycle(COLOURS), sorted(found), strict=False):
        kind, bits = checkpoint.settings.paper_setting, checkpoint.settings.bits
        label = LABELS[kind] + (f", {bits} bits" if kinds.count(kind) > 1 else "")
        report = json.loads((path / "edap" / "report.json").read_text())
        runs.append(Run(label, colour, checkpoint, read_metrics(path / "metrics.csv"), report))
    return runs


def read_metrics(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_batches(settings: Settings):
    _, test_set = data_of(settings, settings.data_path)
    return evaluation_loader(test_set, settings.batch_size, 0, 1, workers=0)


def table(runs: list[Run], distances: dict[str, dict[str, Tensor]]) -> list[list[str]]:
    """Rows [quantity, a cell per run], already formatted."""

    def row(name: str, cell: Callable[[Run], str]) -> list[str]:
        return [name, *map(cell, runs)]

    def distance(name: str, key: str, form: str) -> list[str]:
        def cell(run: Run) -> str:
            measured = distances.get(run.label)
            return "-" if measured is None else format(measured[key].mean().item(), form)

        return row(name, cell)

    def total(name: str, key: str, scale: float) -> list[str]:
        return row(name, lambda run: f"{run.report['total'][key] * scale:.4g}")

    def ratio(name: str, key: str) -> list[str]:
        def cell(run: Run) -> str:
            return f"{run.report['ratio'][key]:.2f}" if "ratio" in run.report else "1.00"

        return row(f"{name}, × better", cell)

    def spike_rate(run: Run) -> str:
        return f"{float(run.metrics[run.checkpoint.epoch - 1]['spike_rate']):.2%}"

    def best(run: Run) -> str:
        accuracies = [float(line["test_accuracy"]) for line in run.metrics]
        epoch = accuracies.index(max(accuracies))  # the first, as main.py keeps it
        return f"{accuracies[epoch]:.2%} (epoch {epoch + 1})"

    return [
        row("epochs", lambda run: str(run.checkpoint.settings.epochs)),
        row("bits", lambda run: str(run.checkpoint.settings.bits or "32 (float)")),
        row("accuracy, last epoch", lambda run: f"{run.checkpoint.accuracy:.2%}"),
        row("accuracy, best epoch", best),
        distance("membrane KL to teacher", "membrane_kl", ".4f"),
        distance("differing spikes", "differing_spikes", ".2%"),
        row("spike rate", spike_rate),
        total("energy, µJ", "energy_pj", 1e-6),
        total("delay, ms", "delay_ns", 1e-6),
        total("area, mm²", "area_um2", 1e-6),
        total("EDAP, µJ·ms·mm²", "edap_pj_ns_um2", 1e-18),
        total("TOPS/W", "tops_per_watt", 1),
        total("TOPS/mm²", "tops_per_mm2", 1),
        ratio("energy", "energy"),
        ratio("delay", "delay"),
        ratio("area", "area"),
        ratio("EDAP", "edap"),
        ratio("TOPS/W", "tops_per_watt"),
        ratio("TOPS/mm²", "tops_per_mm2"),
    ]


def write_table(folder: Path, rows: list[list[str]], taught: Checkpoint, runs: list[Run]) -> None:
    settings = taught.settings
    header = ["", *(run.label for run in runs)]
    title = (
        f"{settings.data}, MS-ResNet-{settings.model_depth}, width {settings.width}, "
        f"T = {settings.time_window}, seed {settings.seed}; "
        "accuracy: the digital network's (on crossbars: `spikesim_eval nonideal`)"
    )
    teacher = (
        f"MD-SNN was taught by the teacher of its best epoch ({taught.epoch}, "
        f"{taught.accuracy:.2%}): membrane KL and differing spikes are to that one."
    )
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    print(f"\n{title}\n")
    for line in [header, *rows]:
        first, *others = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join([first, *others]).rstrip())
    print(f"\n{teacher}")
    with (folder / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    lines = [header, ["---"] * len(header), *rows]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    (folder / "table.md").write_text(f"{title}\n\n{text}\n\n{teacher}\n")


def plot(path: Path, runs: list[Run], distances: dict[str, dict[str, Tensor]]) -> None:
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for run in runs:
        accuracy = [100 * float(row["test_accuracy"]) for row in run.metrics]
        left.plot(range(1, len(accuracy) + 1), accuracy, label=run.label, color=run.colour)
    left.set(xlabel="epoch", ylabel="test accuracy, %", title="accuracy")
    left.legend(loc="lower right")

    teacher, *students = runs
    width = 0.8 / len(students)
    for number, run in enumerate(students):
        share = 100 * distances[run.label]["differing_spikes"].mean(dim=1)
        layers = range(1, len(share) + 1)
        middle.plot(layers, share, marker="o", label=run.label, color=run.colour)
        values = [run.report["ratio"][name] for name in COSTS]
        places = [i + (number - (len(students) - 1) / 2) * width for i in range(len(COSTS))]
        bars = right.bar(places, values, width, label=run.label, color=run.colour)
        right.bar_label(bars, fmt="%.1f", fontsize=8)
    middle.set(
        xlabel="LIF layer, in forward order",
        ylabel="%",
        title="spikes that differ from the teacher's",
    )
    middle.set_ylim(bottom=0)
    middle.xaxis.set_major_locator(MaxNLocator(integer=True))
    middle.legend()
    right.axhline(1, color=teacher.colour, linestyle="--", label=teacher.label)
    right.set(ylabel="times better than the teacher", title="SpikeSim estimate")
    right.set_xticks(range(len(COSTS)), [*COSTS[:-1], "EDAP"])
    right.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart"))
