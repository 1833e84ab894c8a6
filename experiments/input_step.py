"""Which rule finds the step of event frames that are no whole numbers of at most 255?

The highest code stands for the largest training value, or for so many times a quantile of the
non-zero ones where that is less (data_sets.events.input_of). Made-up frames of two classes, in
kinds that are hard for one rule or another; of a 4-bit student on each, the accuracy in the last
epochs.

    python -m experiments.input_step        # 4 minutes on 1 core; prints the table
"""

import csv
import tempfile
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from statistics import mean

import numpy as np

import main
from data_sets import events

T, SIDE, FILES = 4, 16, 120  # files of each class; the last 12 are for the test
RULES = {  # name: pairs of percent and room
    "largest": ((100, 1),),
    "99 %": ((99, 1),),
    "2 × 99 %": ((99, 2),),
    "4 × 90 %": ((90, 4),),
    "2 × 99 %, 255 × median": ((99, 2), (50, 255)),
    "2 × 99 %, 64 × median": ((99, 2), (50, 64)),
}
rng = np.random.default_rng(0)


def uniform(label: int) -> np.ndarray:
    """Fractions, up to 0.15 or 0.45."""
    return rng.random((T, 2, SIDE, SIDE)) * (0.15, 0.45)[label]


def large(label: int) -> np.ndarray:
    """Whole counts, around 400 or 1000."""
    return rng.integers((300, 900)[label], (500, 1100)[label], (T, 2, SIDE, SIDE))


def exponential(label: int) -> np.ndarray:
    """A tenth of the pixels have an exponential value, of mean 1 or 2."""
    values = rng.exponential((1, 2)[label], (T, 2, SIDE, SIDE))
    return values * (rng.random(values.shape) < 0.1)


def heavy_tail(label: int) -> np.ndarray:
    """Log-normal values (σ = 2), of the median 1 or 3."""
    return rng.lognormal((0, np.log(3))[label], 2, (T, 2, SIDE, SIDE))


def bright(label: int) -> np.ndarray:
    """3 % of the pixels are bright, 20 or 40 times the others: they alone tell the classes."""
    values = rng.random((T, 2, SIDE, SIDE))
    return np.where(rng.random(values.shape) < 0.03, values * (20, 40)[label], values)


def hot_pixel(label: int) -> np.ndarray:
    """The exponential values in half of the pixels, and one of 60,000 in each frame (0.4 %)."""
    values = rng.exponential((1, 2)[label], (T, 2, SIDE, SIDE))
    values *= rng.random(values.shape) < 0.5
    values[:, 0, 5, 7] = 60_000
    return values


def sparse_hot_pixel(label: int) -> np.ndarray:
    """The exponential values, and one of 60,000 in each frame: 2 % of the non-zero values."""
    values = exponential(label)
    values[:, 0, 5, 7] = 60_000
    return values


KINDS = (uniform, large, exponential, heavy_tail, bright, hot_pixel, sparse_hot_pixel)


def accuracy(folder: Path, rule: str) -> float:
    """Of a 4-bit student, %: mean over the test set in its last four epochs."""
    events.BOUNDS = RULES[rule]
    save_path, caches = (folder / f"{name} {rule}" for name in ("run", "caches"))
    options = f"--time_window {T} --image_size {SIDE} --width 4 --workers 0 --batch_size 16"
    command = ["--data", "ncaltech101", "--data_path", str(folder), *options.split()]
    command += ["--paper_setting", "student", "--bits", "4", "--epochs", "8", "--augment", "none"]
    with redirect_stdout(StringIO()):
        code = main.main([*command, "--save_path", str(save_path), "--cache_path", str(caches)])
    if code != 0:
        raise RuntimeError(f"main.py refused {folder}")
    with (save_path / "metrics.csv").open() as file:
        return 100 * mean(float(row["test_accuracy"]) for row in list(csv.DictReader(file))[-4:])


if __name__ == "__main__":
    print(f"| kind | {' | '.join(RULES)} |")
    print("| --- |" + " --- |" * len(RULES))
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            frames = folder / "N-Caltech101" / f"frames_number_{T}_split_by_number"
            for label in (0, 1):
                (frames / str(label)).mkdir(parents=True)
                for i in range(FILES):
                    path = frames / str(label) / f"{i:03d}.npz"
                    np.savez_compressed(path, frames=kind(label))
            cells = [f"{accuracy(folder, rule):.0f}" for rule in RULES]
        print(f"| {kind.__name__.replace('_', ' ')} | {' | '.join(cells)} |", flush=True)
