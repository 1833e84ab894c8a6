"""Table and plots of the quickstart: python scripts/quickstart_table.py runs/quickstart

Reads the three runs (teacher, student, mdsnn) and their SpikeSim reports below the folder, measures
both students' distance to the teacher's membranes over the test set, prints the table and writes
table.md, table.csv and quickstart.png. The students are those of the last epoch, which nobody
chose; the teacher is that of its best epoch, which taught. The best accuracies stand below: chosen
on the test set, as SNN papers do.
"""

import csv
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data_loader import evaluation_loader, load_data_sets
from distiller import distance_to_teacher
from load_settings import Settings, load_checkpoint, load_network

RUNS = {  # folder: (label, the checkpoint that the SpikeSim report describes, colour)
    "teacher": ("teacher (full precision)", "original-best.pth", "tab:gray"),
    "student": ("student", "student-last.pth", "tab:orange"),
    "mdsnn": ("MD-SNN", "qamd-last.pth", "tab:blue"),
}
COSTS = ("energy", "delay", "area", "edap")


def main(folder: Path) -> None:
    checkpoints = {run: load_checkpoint(folder / run / RUNS[run][1]) for run in RUNS}
    metrics = {run: read_metrics(folder / run / "metrics.csv") for run in RUNS}
    reports = {run: json.loads((folder / run / "edap" / "report.json").read_text()) for run in RUNS}
    settings = checkpoints["mdsnn"].settings
    networks = {run: load_network(checkpoint) for run, checkpoint in checkpoints.items()}
    distances = {
        run: distance_to_teacher(networks["teacher"], networks[run], test_batches(settings))
        for run in ("student", "mdsnn")
    }
    epochs = [str(checkpoint.settings.epochs) for checkpoint in checkpoints.values()]
    rows = [["epochs", *epochs], *table(checkpoints, metrics, reports, distances)]
    write_table(folder, rows, settings)
    plot(folder / "quickstart.png", metrics, distances, reports)
    print(f"\ntable.md, table.csv, quickstart.png and the runs are in {folder}")


def read_metrics(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_batches(settings: Settings):
    _, test_set = load_data_sets(settings.data, settings.data_path, settings.time_window)
    return evaluation_loader(test_set, settings.batch_size, 0, 1, workers=0)


def table(checkpoints, metrics, reports, distances) -> list[list[str]]:
    """Rows [quantity, teacher, student, MD-SNN], already formatted."""

    def row(name: str, cell) -> list[str]:
        return [name, *(cell(run) for run in RUNS)]

    def distance(name: str, form: str) -> list[str]:
        def cell(run: str) -> str:
            return format(distances[run][name].mean().item(), form) if run in distances else "-"

        return row(
            {"membrane_kl": "membrane KL to teacher", "differing_spikes": "differing spikes"}[name],
            cell,
        )

    def total(name: str, key: str, scale: float) -> list[str]:
        return row(name, lambda run: f"{reports[run]['total'][key] * scale:.4g}")

    def ratio(name: str, key: str) -> list[str]:
        return row(
            f"{name}, × better",
            lambda run: f"{reports[run]['ratio'][key]:.2f}" if "ratio" in reports[run] else "1.00",
        )

    return [
        row("bits", lambda run: str(checkpoints[run].settings.bits or "32 (float)")),
        row("accuracy", lambda run: f"{checkpoints[run].accuracy:.2%}"),
        row("accuracy, best epoch", lambda run: f"{float(metrics[run][-1]['best_accuracy']):.2%}"),
        distance("membrane_kl", ".4f"),
        distance("differing_spikes", ".2%"),
        row(
            "spike rate",
            lambda run: f"{float(metrics[run][checkpoints[run].epoch - 1]['spike_rate']):.2%}",
        ),
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


def write_table(folder: Path, rows: list[list[str]], settings: Settings) -> None:
    header = ["", *(label for label, *_ in RUNS.values())]
    title = (
        f"{settings.data}, MS-ResNet-{settings.model_depth}, width {settings.width}, "
        f"T = {settings.time_window}, seed {settings.seed}"
    )
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    print(f"\n{title}\n")
    for line in [header, *rows]:
        first, *others = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join([first, *others]).rstrip())
    with (folder / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    lines = [header, ["---"] * len(header), *rows]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    (folder / "table.md").write_text(f"{title}\n\n{text}\n")


def plot(path: Path, metrics, distances: dict[str, dict[str, Tensor]], reports) -> None:
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for run, (label, _, colour) in RUNS.items():
        accuracy = [100 * float(row["test_accuracy"]) for row in metrics[run]]
        left.plot(range(1, len(accuracy) + 1), accuracy, label=label, color=colour)
    left.set(xlabel="epoch", ylabel="test accuracy, %", title="accuracy")
    left.legend(loc="lower right")

    for run, distance in distances.items():
        label, _, colour = RUNS[run]
        share = 100 * distance["differing_spikes"].mean(dim=1)
        middle.plot(range(1, len(share) + 1), share, marker="o", label=label, color=colour)
    middle.set(
        xlabel="LIF layer, in forward order",
        ylabel="%",
        title="spikes that differ from the teacher's",
    )
    middle.set_ylim(bottom=0)
    middle.xaxis.set_major_locator(MaxNLocator(integer=True))
    middle.legend()

    for offset, run in ((-0.2, "student"), (0.2, "mdsnn")):
        label, _, colour = RUNS[run]
        values = [reports[run]["ratio"][name] for name in COSTS]
        bars = right.bar([i + offset for i in range(len(COSTS))], values, 0.4, label=label)
        for bar in bars:
            bar.set_color(colour)
        right.bar_label(bars, fmt="%.1f", fontsize=8)
    right.axhline(1, color=RUNS["teacher"][2], linestyle="--", label=RUNS["teacher"][0])
    right.set(ylabel="times better than the teacher", title="SpikeSim estimate")
    right.set_xticks(range(len(COSTS)), [*COSTS[:-1], "EDAP"])
    right.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart"))
