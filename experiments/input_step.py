"""Which rule finds the step of event frames that are no whole numbers of at most 255?

The highest code stands for the largest training value, or for so many times a quantile of the
non-zero ones where that is less (data_sets.events.input_of). Made-up frames of two classes, in
kinds that are hard for one rule or another; of a 4-bit student on each, the accuracy in the last
epochs.

    python -m experiments.input_step        # 4 minutes on 1 core; prints the table
"""

import tempfile
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from statistics import mean

import numpy as np
import torch

from data_loader import ImageSet
from data_sets.events import input_of
from engine.run_folder import read_metrics
from load_settings import parse_settings
from main import train

T, SIDE, FILES, TESTED = 4, 16, 120, 12  # files of each class; the last ones are for the test
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


def accuracy(frames: np.ndarray, rule: str) -> float:
    """Of a 4-bit student of frames (2, FILES, T, 2, SIDE, SIDE), a row a class, %: mean over the
    test set in its last four epochs."""
    parts = frames[:, :-TESTED], frames[:, -TESTED:]
    samples = [part.reshape(-1, *part.shape[2:]) for part in parts]
    labels = [np.repeat((0, 1), part.shape[1]) for part in parts]
    step = input_of(samples[0], bounds=RULES[rule]).step
    train_set, test_set = (
        ImageSet(torch.from_numpy(x), y, step=step, classes=["0", "1"])
        for x, y in zip(samples, labels, strict=True)
    )
    options = f"--time_window {T} --image_size {SIDE} --width 4 --workers 0 --batch_size 16"
    options += " --data ncaltech101 --paper_setting student --bits 4 --epochs 8 --augment none"
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        settings = parse_settings([*options.split(), "--save_path", folder, "--device", "cpu"])
        train(settings, torch.device("cpu"), (train_set, test_set))
        rows = read_metrics(Path(folder, "metrics.csv"))
    return 100 * mean(row["test_accuracy"] for row in rows[-4:])


if __name__ == "__main__":
    print(f"| kind | {' | '.join(RULES)} |")
    print("| --- |" + " --- |" * len(RULES))
    for kind in KINDS:
        frames = np.stack([[kind(label) for _ in range(FILES)] for label in (0, 1)])
        cells = [f"{accuracy(frames.astype(np.float32), rule):.0f}" for rule in RULES]
        print(f"| {kind.__name__.replace('_', ' ')} | {' | '.join(cells)} |", flush=True)
