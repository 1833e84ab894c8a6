"""main.py in float64 on 48 digits: in float32 a rounding can flip a spike (see test_processes).

FAULT="SIGTERM 1 2" sends a signal to process 1 in its step 2, in the first attempt of a launcher.
"""

import os
import signal
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import main
from data_loader import ImageSet, load_data_sets
from load_settings import parse_settings
from runtime import launcher, processes


def first(data_set: ImageSet | None, number: int) -> ImageSet | None:
    if data_set is None:
        return None
    rows = torch.arange(len(data_set)) if data_set.rows is None else data_set.rows
    whole = torch.zeros(len(data_set.images), dtype=torch.int64)
    whole[rows] = data_set.labels
    return ImageSet(data_set.images, whole, rows=rows[:number])


def few_digits(options: list[str]) -> tuple[ImageSet, ImageSet]:
    settings = parse_settings(options, launcher.launcher_variable("WORLD_SIZE"))
    train, test = load_data_sets(settings)
    few = first(train, 48)
    few.held_out = first(train.held_out, 9)
    return few, first(test, 48)


name, rank, step = os.environ.get("FAULT", "none 0 0").split()
add = main.EpochSums.add


def add_and_meet_fault(sums: main.EpochSums, *arguments) -> None:
    add(sums, *arguments)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if (processes.rank(), sums.run.steps_done + 1, attempt) == (int(rank), int(step), "0"):
        os.kill(os.getpid(), signal.Signals[name])


main.EpochSums.add = add_and_meet_fault
torch.set_default_dtype(torch.float64)
shape = ["--data", "digits", "--width", "4", "--batch_size", "16", "--epochs", "1"]
options = [*shape, "--workers", "0", *sys.argv[1:]]
main.leave(main.main(options, few_digits(options)))
