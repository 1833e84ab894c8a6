"""What membrane distillation is worth on digits: python -m benchmarks.distillation_study

Trains MS-ResNet-18 on five stratified folds of scikit-learn's digits, so that each of the 1,797
images is a test image once: a teacher per fold (seed = fold), then, for every width in bits, a
student without a teacher, CL, CLM and CLK, each from scratch and from the teacher's weights. Every
run is a run of main.py with its defaults. A run whose row is in the CSV is not run again, so the
command can be stopped and continued; tables and plot are of all rows of this width, length and
precision (`size`). Folds 5 to 9 are those of another split, and so on: `--folds 0 1 2 3 4 5 6 7 8
9` tests twice on each image.
"""

import argparse
import csv
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold
from torch.utils.data import Dataset
from tqdm import tqdm

import main
from benchmarks.timing import table
from data_loader import digits_of, evaluation_loader
from display import COLOURS, legend_below, new_figure, save_picture
from distiller import distance_to_teacher
from load_settings import load_checkpoint, load_network
from spikesim_eval.estimate import Chip, estimate
from spikesim_eval.report import ratios
from spikesim_eval.trace import trace_checkpoint

FOLDS = 5
STUDENT = ["--paper_setting", "student"]
METHODS = {  # name: options of main.py
    "student": STUDENT,
    "CL": ["--paper_setting", "qamd", "--loss", "CL"],
    "CLM": ["--paper_setting", "qamd", "--loss", "CLM"],
    "CLK": ["--paper_setting", "qamd", "--loss", "CLK"],
}
STARTS = {"scratch": [], "teacher": ["--init_from_teacher"]}
MEASURES = {  # column of the CSV: (what a reader sees, its scale, its format)
    "accuracy": ("accuracy, %", 100, ".2f"),
    "drop_to_teacher": ("drop to teacher, points", 100, ".2f"),
    "membrane_kl": ("membrane KL", 1, ".3f"),
    "membrane_mse": ("membrane MSE", 1, ".3f"),
    "differing_spikes": ("differing spikes, %", 100, ".2f"),
    "spike_rate": ("spike rate, %", 100, ".2f"),
    "edap_ratio": ("EDAP, times better", 1, ".2f"),
}
KIND = ("bits", "method", "start")
KEYS = ("fold", *KIND)
DataSets = tuple[Dataset, Dataset]


def fold_indices(fold: int):
    """(training indices, test indices) of one fold; every FOLDS of them are one split."""
    labels = load_digits().target
    split, part = divmod(fold, FOLDS)
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=split).split(labels, labels)
    return list(folds)[part]


def fold_data(fold: int) -> DataSets:
    return digits_of(*fold_indices(fold))


def train(folder: Path, fold: int, data_sets: DataSets, options: Sequence[str]) -> Path:
    """Run main.py, or what is left of a run, on the data of a fold; its last checkpoint."""
    main.load_data_sets = lambda *_: data_sets
    common = ["--data", "digits", "--workers", "0", "--seed", str(fold)]
    if main.main([*common, *options, "--save_path", str(folder), "--resume"]) != 0:
        raise RuntimeError(f"main.py refused {options}")
    (checkpoint,) = folder.glob("*-last.pth")
    return checkpoint


def teacher_of(out: Path, fold: int) -> Path:
    return out / f"fold{fold}" / "teacher" / "original-last.pth"


def train_teacher(out: Path, fold: int, data_of: Callable, options: Sequence[str]) -> None:
    options = ["--paper_setting", "original", *options]
    train(teacher_of(out, fold).parent, fold, data_of(fold), options)


def run(out: Path, name: str, fold: int, data_of: Callable, options: Sequence[str]) -> dict:
    """Train one student and measure it on the test images of its fold."""
    teacher, data_sets = teacher_of(out, fold), data_of(fold)
    if "qamd" in options or "--init_from_teacher" in options:
        options = [*options, "--teacher_path", str(teacher)]
    checkpoint = train(out / f"fold{fold}" / name, fold, data_sets, options)

    batches = evaluation_loader(data_sets[1], 64, 0, 1, workers=0)
    student = load_network(load_checkpoint(checkpoint))
    distance = distance_to_teacher(load_network(load_checkpoint(teacher)), student, batches)
    spike_rate = main.evaluate(student, batches, torch.device("cpu"), amp=False)[2]
    ours, baseline = (
        estimate(trace_checkpoint(path).network, Chip()).total for path in (checkpoint, teacher)
    )
    accuracy = load_checkpoint(checkpoint).accuracy
    return {
        "accuracy": accuracy,
        "drop_to_teacher": load_checkpoint(teacher).accuracy - accuracy,
        **{name: value.mean().item() for name, value in distance.items()},
        "spike_rate": spike_rate,
        "edap_ratio": ratios(ours, baseline)["edap"],
    }


def quiet_worker(log: Path) -> None:
    """One thread a run, and the runs' own output into a file beside the results."""
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = log.open("a")


def read_rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def run_missing(
    path: Path,
    keys: Sequence[str],
    size: str,
    todo: dict[tuple, Sequence[str]],
    out: Path,
    data_of: Callable,
    teacher_options: Sequence[str],
    initializer: Callable = quiet_worker,
) -> list[dict[str, str]]:
    """Run what has no row of this size in the CSV yet, two at a time on two cores; all its rows.

    `todo` maps a row's keys, of which the first is the fold, to options of main.py.
    """

    def rows_of_size() -> list[dict[str, str]]:
        return [row for row in read_rows(path) if row["size"] == size]

    out = out / size
    path.parent.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    finished = {tuple(row[key] for key in keys) for row in rows_of_size()}
    todo = {key: todo[key] for key in todo if tuple(map(str, key)) not in finished}
    pool = ProcessPoolExecutor(
        os.cpu_count(), get_context("spawn"), initializer, (out / "log.txt",)
    )
    with pool, tqdm(total=len(todo), desc="runs") as bar:
        teachers = [
            pool.submit(train_teacher, out, fold, data_of, teacher_options)
            for fold in sorted({fold for fold, *_ in todo})
        ]
        for teacher in teachers:
            teacher.result()
        runs = {}
        for key, options in todo.items():
            name = "-".join(str(part).replace(" ", "_") for part in key[1:])
            runs[pool.submit(run, out, name, key[0], data_of, options)] = key
        for done in as_completed(runs):
            if done.exception() is not None:
                pool.shutdown(cancel_futures=True)  # or all others would run before it is told
            row = dict(zip(keys, runs[done], strict=True)) | {"size": size} | done.result()
            is_new = not path.is_file()
            with path.open("a", newline="") as file:
                writer = csv.DictWriter(file, [*keys, "size", *MEASURES])
                if is_new:
                    writer.writeheader()
                writer.writerow(row)
            bar.update()
    return rows_of_size()


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else float("nan")


def against_student(ours: list[dict[str, str]], students: list[dict[str, str]]) -> list[str]:
    """Four cells: gain in accuracy (mean ± standard error over the folds, in points), folds in
    which it is a gain, and the ratios of mean membrane KL and of differing spikes."""
    by_fold = {row["fold"]: row for row in students}
    pairs = [(row, by_fold[row["fold"]]) for row in ours if row["fold"] in by_fold]
    gains = [100 * (float(a["accuracy"]) - float(b["accuracy"])) for a, b in pairs]
    gain, deviation = mean_and_deviation(gains)
    cells = [f"{gain:+.2f} ± {deviation / len(gains) ** 0.5:.2f}"]
    cells.append(f"{sum(gain > 0 for gain in gains)} of {len(gains)}")
    for name in ("membrane_kl", "differing_spikes"):
        mine, theirs = (sum(float(pair[i][name]) for pair in pairs) for i in (0, 1))
        cells.append(f"{mine / theirs:.2f}")
    return cells


AGAINST_STUDENT = ("gain over student, points", "folds with a gain", "KL ratio", "spikes ratio")


def grouped(rows: list[dict[str, str]], keys: Sequence[str]) -> dict[tuple, list[dict[str, str]]]:
    groups: dict[tuple, list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def measured(runs: list[dict[str, str]], name: str) -> str:
    _, scale, form = MEASURES[name]
    mean, deviation = mean_and_deviation([scale * float(row[name]) for row in runs])
    return f"{mean:{form}} ± {deviation:{form}}"


def full_table(rows: list[dict[str, str]]) -> str:
    """Every measure, mean ± standard deviation over the folds, and the comparison to student."""
    groups = grouped(rows, ("bits", "start", "method"))
    lines = []
    for bits in sorted({key[0] for key in groups}, key=int):
        for start in STARTS:
            for method in METHODS:
                if runs := groups.get((bits, start, method)):
                    cells = [measured(runs, name) for name in MEASURES]
                    students = groups.get((bits, start, "student"), runs)
                    against = against_student(runs, students)
                    lines.append([bits, start, method, str(len(runs)), *cells, *against])
    names = (name for name, *_ in MEASURES.values())
    return table(["bits", "start", "method", "folds", *names, *AGAINST_STUDENT], lines) + "\n"


def teachers_of(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """A row for the teacher of each fold, with its accuracy."""
    kind = {"bits": "32", "method": "teacher", "start": "scratch"}
    accuracies = {
        row["fold"]: float(row["accuracy"]) + float(row["drop_to_teacher"]) for row in rows
    }
    return [{"fold": fold, **kind, "accuracy": str(x)} for fold, x in accuracies.items()]


def difference_table(rows: list[dict[str, str]], others: list[dict[str, str]]) -> str:
    """Accuracies of the runs that two studies share, and their differences, paired by run."""

    def key_of(row: dict[str, str]) -> tuple[str, ...]:
        return tuple(row[key] for key in KEYS)

    other_of = {key_of(row): row for row in others}
    shared = [row for row in rows if key_of(row) in other_of]
    lines = []
    for kind, runs in grouped(shared, KIND).items():
        partners = [other_of[key_of(row)] for row in runs]
        differences = [
            100 * (float(ours["accuracy"]) - float(theirs["accuracy"]))
            for ours, theirs in zip(runs, partners, strict=True)
        ]
        mean, deviation = mean_and_deviation(differences)
        cells = [measured(runs, "accuracy"), measured(partners, "accuracy")]
        cells.append(f"{mean:+.2f} ± {deviation / len(runs) ** 0.5:.2f}")
        lines.append([*kind, str(len(runs)), *cells])
    names = ("folds", "accuracy, %", "the other's, %", "difference, points")
    return table([*KIND, *names], lines) + "\n"


def short_table(rows: list[dict[str, str]], name: str) -> str:
    """One measure, a column a method."""
    groups = grouped(rows, ("bits", "start", "method"))
    methods = [method for method in METHODS if any(key[2] == method for key in groups)]
    lines = [
        [bits, start, *(measured(groups[bits, start, method], name) for method in methods)]
        for bits in sorted({key[0] for key in groups}, key=int)
        for start in STARTS
        if all((bits, start, method) in groups for method in methods)
    ]
    return f"{MEASURES[name][0]}:\n\n" + table(["bits", "from", *methods], lines) + "\n"


def plot(path: Path, rows: list[dict[str, str]]) -> None:
    """Accuracy, membrane KL and differing spikes over bits; a row of panels for each start."""
    groups = grouped(rows, ("bits", "start", "method"))
    widths = sorted({key[0] for key in groups}, key=int)
    starts = [start for start in STARTS if any(key[1] == start for key in groups)]
    methods = [method for method in METHODS if any(key[2] == method for key in groups)]
    shown = ("accuracy", "membrane_kl", "differing_spikes")
    figure, panels = new_figure(
        12, 0.6 + 3 * len(starts), len(starts), 3, sharex=True, sharey="col", squeeze=False
    )
    for start, line in zip(starts, panels, strict=True):
        for name, panel in zip(shown, line, strict=True):
            label, scale, _ = MEASURES[name]
            for i, method in enumerate(methods):
                have = [bits for bits in widths if (bits, start, method) in groups]
                points = [
                    mean_and_deviation([scale * float(r[name]) for r in groups[b, start, method]])
                    for b in have
                ]
                panel.errorbar(
                    [widths.index(bits) + 0.08 * (i - (len(methods) - 1) / 2) for bits in have],
                    [mean for mean, _ in points],
                    [deviation for _, deviation in points],
                    marker="o",
                    capsize=2,
                    color=COLOURS[method],
                    label=method,
                )
            panel.set_xticks(range(len(widths)), widths)
            panel.set(xlim=(-0.5, len(widths) - 0.5), ylabel=label, title=f"from {start}")
    for panel in panels[-1]:
        panel.set_xlabel("bits")
    legend_below(figure, panels.flat)
    save_picture(figure, path)


def parser_of(description: str, name: str, folds: int) -> argparse.ArgumentParser:
    """The options of every experiment: where it is kept, on how many folds, and its size."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--runs", type=Path, default=Path("runs") / name)
    parser.add_argument("--folds", type=int, nargs="+", default=list(range(folds)))
    parser.add_argument("--width", default="4")
    parser.add_argument("--epochs", default="8")
    parser.add_argument("--teacher_epochs", default="20")
    return parser


def size_of(args: argparse.Namespace) -> str:
    """What runs, beside their other keys, have to have in common: a name without spaces."""
    return f"width{args.width}-epochs{args.epochs}-teacher{args.teacher_epochs}"


def study(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__.splitlines()[0], "distillation_study", FOLDS)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 8])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--amp", action="store_true", help="train and test in bf16 autocast")
    parser.add_argument("--against", type=Path, metavar="CSV", help="compare with another study")
    args = parser.parse_args(arguments)

    common = ["--width", args.width, *["--amp"] * args.amp]
    size = size_of(args) + "-amp" * args.amp
    todo = {
        (fold, bits, method, start): [
            *(*METHODS[method], *STARTS[start], "--bits", str(bits)),
            *(*common, "--epochs", args.epochs),
        ]
        for fold in args.folds
        for bits in args.bits
        for start in STARTS
        for method in args.methods
    }
    teacher_options = [*common, "--epochs", args.teacher_epochs]
    path = args.results / "distillation_study.csv"
    rows = run_missing(path, KEYS, size, todo, args.runs, fold_data, teacher_options)

    teachers = teachers_of(rows)
    mean, deviation = mean_and_deviation([100 * float(row["accuracy"]) for row in teachers])
    title = (
        f"digits, {len(teachers)} folds, MS-ResNet-18, width {args.width}, T = 4, "
        f"{'bf16, ' * args.amp}{args.epochs} epochs (teacher {args.teacher_epochs}, accuracy "
        f"{mean:.2f} ± {deviation:.2f} %); last epoch, mean ± standard deviation over folds\n"
    )
    short = [short_table(rows, name) for name in ("accuracy", "membrane_kl", "differing_spikes")]
    text = "\n".join([title, *short, "All measures (± of the gain is the standard error):\n"])
    text += "\n" + full_table(rows)
    if args.against is not None:
        text += f"\nAgainst {args.against} (± is the standard error):\n\n"
        others = read_rows(args.against)
        text += difference_table([*teachers, *rows], [*teachers_of(others), *others])
    path.with_suffix(".md").write_text(text)
    plot(path.with_suffix(".png"), rows)
    print(text)


if __name__ == "__main__":
    study()
