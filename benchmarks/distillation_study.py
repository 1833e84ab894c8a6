"""What membrane distillation is worth on digits: python -m benchmarks.distillation_study

Trains MS-ResNet-18 on five stratified folds of scikit-learn's digits, so that each of the 1,797
images is a test image once: a teacher per fold (seed = fold), then, for every width, a student
without a teacher, CL, CLM and CLK, each from scratch and from the teacher's weights. Every run is
a run of main.py with its defaults. A run whose row is in the CSV is not run again, so the command
can be stopped and continued; its summary is the mean ± standard deviation over the folds present.
"""

import argparse
import csv
import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold
from tqdm import tqdm

import main
from data_loader import digits_of, evaluation_loader
from distiller import distance_to_teacher
from load_settings import load_checkpoint, load_network
from spikesim_eval.estimate import Chip, estimate
from spikesim_eval.report import ratios
from spikesim_eval.trace import trace_checkpoint

FOLDS = 5
METHODS = {  # name: options of main.py
    "student": ["--paper_setting", "student"],
    "CL": ["--paper_setting", "qamd", "--loss", "CL"],
    "CLM": ["--paper_setting", "qamd", "--loss", "CLM"],
    "CLK": ["--paper_setting", "qamd", "--loss", "CLK"],
}
STARTS = {"scratch": [], "teacher": ["--init_from_teacher"]}
MEASURES = (
    *("accuracy", "drop_to_teacher", "membrane_kl", "membrane_mse"),
    *("differing_spikes", "spike_rate", "edap_ratio"),
)
KEYS = ("fold", "bits", "method", "start")


def fold_data(fold: int):
    """(training set, test set) of one fold; the split has one seed for all folds."""
    labels = load_digits().target
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(labels, labels)
    return digits_of(*list(folds)[fold])


def train(folder: Path, fold: int, options: list[str]) -> Path:
    """Run main.py on a fold; the checkpoint of the last epoch."""
    main.load_data_sets = lambda *_: fold_data(fold)
    common = ["--data", "digits", "--workers", "0", "--seed", str(fold)]
    if main.main([*common, *options, "--save_path", str(folder)]) != 0:
        raise RuntimeError(f"main.py refused {options}")
    (checkpoint,) = folder.glob("*-last.pth")
    return checkpoint


def teacher_of(out: Path, fold: int) -> Path:
    return out / f"fold{fold}" / "teacher" / "original-last.pth"


def train_teacher(out: Path, fold: int, options: list[str]) -> None:
    if not teacher_of(out, fold).is_file():
        train(teacher_of(out, fold).parent, fold, ["--paper_setting", "original", *options])


def run(out: Path, fold: int, bits: int, method: str, start: str, options: list[str]) -> dict:
    """Train one student and measure it on the test images of its fold."""
    teacher = teacher_of(out, fold)
    arguments = [*METHODS[method], *STARTS[start], "--bits", str(bits), *options]
    if method != "student" or start == "teacher":
        arguments += ["--teacher_path", str(teacher)]
    folder = out / f"fold{fold}" / f"{bits}bit-{method}-{start}"
    checkpoint = train(folder, fold, arguments)

    _, test = fold_data(fold)
    batches = evaluation_loader(test, 64, 0, 1, workers=0)
    student = load_network(load_checkpoint(checkpoint))
    distance = distance_to_teacher(load_network(load_checkpoint(teacher)), student, batches)
    _, _, spike_rate = main.evaluate(student, batches, torch.device("cpu"), amp=False)
    ours, baseline = (
        estimate(trace_checkpoint(path), Chip()).total for path in (checkpoint, teacher)
    )
    accuracy = load_checkpoint(checkpoint).accuracy
    return {
        "fold": fold,
        "bits": bits,
        "method": method,
        "start": start,
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


def finished(path: Path) -> dict[tuple, dict[str, str]]:
    if not path.is_file():
        return {}
    with path.open(newline="") as file:
        return {tuple(row[key] for key in KEYS): row for row in csv.DictReader(file)}


def append(path: Path, row: dict) -> None:
    is_new = not path.is_file()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [*KEYS, *MEASURES])
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def summary(rows: list[dict[str, str]]) -> str:
    """A Markdown table of mean ± standard deviation over the folds."""
    groups: dict[tuple, list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault((int(row["bits"]), row["start"], row["method"]), []).append(row)
    header = ["bits", "start", "method", "folds", *MEASURES]
    lines = [header, ["---"] * len(header)]
    for (bits, start, method), runs in sorted(groups.items()):
        cells = [str(bits), start, method, str(len(runs))]
        for name in MEASURES:
            values = [float(row[name]) for row in runs]
            deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
            cells.append(f"{statistics.mean(values):.4f} ± {deviation:.4f}")
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def study(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--runs", type=Path, default=Path("runs/distillation_study"))
    parser.add_argument("--folds", type=int, nargs="+", default=list(range(FOLDS)))
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 8])
    parser.add_argument("--width", default="8")
    parser.add_argument("--epochs", default="8")
    parser.add_argument("--teacher_epochs", default="12")
    args = parser.parse_args(arguments)
    args.results.mkdir(parents=True, exist_ok=True)
    args.runs.mkdir(parents=True, exist_ok=True)
    path = args.results / "distillation_study.csv"

    done_before = finished(path)
    todo = [
        (fold, bits, method, start)
        for fold in args.folds
        for bits in args.bits
        for start in STARTS
        for method in METHODS
        if tuple(map(str, (fold, bits, method, start))) not in done_before
    ]
    size = ["--width", args.width]
    pool = ProcessPoolExecutor(
        os.cpu_count(), get_context("spawn"), quiet_worker, (args.runs / "log.txt",)
    )
    with pool, tqdm(total=len(todo), desc="runs") as bar:
        teachers = [
            pool.submit(train_teacher, args.runs, fold, [*size, "--epochs", args.teacher_epochs])
            for fold in sorted({fold for fold, *_ in todo})
        ]
        for teacher in teachers:
            teacher.result()
        options = [*size, "--epochs", args.epochs]
        for done in as_completed([pool.submit(run, args.runs, *key, options) for key in todo]):
            append(path, done.result())
            bar.update()
    text = summary(list(finished(path).values()))
    (args.results / "distillation_study.md").write_text(text)
    print(text)


if __name__ == "__main__":
    study()
