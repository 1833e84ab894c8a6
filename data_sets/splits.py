"""Which samples are trained on, held out (--val_share) or tested on (--fold)."""

from collections.abc import Sequence
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from runtime.errors import UserError

HELD_OUT = 1  # beside the seed: other random numbers than an epoch's
FOLDS = 5  # parts of a split of --fold


def held_out_rows(labels: Tensor, share: float, seed: int) -> np.ndarray:
    """Whether each of N training images is held out, (N,) bool: the same ones for a seed on every
    machine, round(share·N) of them and of each class share·n, rounded up or down.

    A class keeps an image for the training, as `share` is at most a half: one with a single image
    has it there.
    """
    labels = labels.numpy()
    # NumPy promises that a bit generator's raw numbers stay the same in all its versions.
    order = np.lexsort((np.random.PCG64([seed, HELD_OUT]).random_raw(len(labels)), labels))
    order = order[np.bincount(labels)[labels[order]] > 1]  # class by class
    marks = np.floor(np.arange(len(order) + 1) * share + 0.5)
    chosen = np.zeros(len(labels), bool)
    chosen[order[np.diff(marks) > 0]] = True
    return chosen


def fold_rows(labels: Tensor, fold: int, classes: Sequence[str]) -> tuple[Tensor, Tensor]:
    """(training rows, test rows) of images with these labels, sorted: stratified parts, of which
    each image is a test image once in the FOLDS folds of a split. Raises UserError where a class
    has too few images for that."""
    # Imported here because it takes more than a second.
    from sklearn.model_selection import StratifiedKFold

    for label, number in enumerate(labels.bincount().tolist()):
        if 0 < number < FOLDS:
            name = [*classes, *map(str, range(len(classes), label + 1))][label]
            raise UserError(
                f"--fold needs {FOLDS} images of every class, one for the test of each fold: "
                f"{name} has {number}"
            )
    split, part = divmod(fold, FOLDS)
    parts = StratifiedKFold(FOLDS, shuffle=True, random_state=split).split(labels, labels)
    train, test = next(islice(parts, part, None))
    return torch.from_numpy(train), torch.from_numpy(test)
