"""Data sets without a command line."""

import copy
from pathlib import Path

import torch

from data_loader import ImageSet, load_data_sets
from settings import Settings


def settings_of(
    data: str,
    data_path: str | Path = ".",
    time_window: int = 4,
    seed: int = 0,
    augment: str = "basic",
    image_size: tuple[int, int] | None = None,
    **rest,
) -> Settings:
    """Settings of a training on these data."""
    size = image_size and "{}x{}".format(*image_size)
    where = {"data_path": str(data_path), "image_size": size}
    return Settings.of(data, time_window=time_window, seed=seed, augment=augment, **where, **rest)


def data_sets_of(*arguments, **rest) -> tuple[ImageSet, ImageSet]:
    """(train, test) of such settings."""
    return load_data_sets(settings_of(*arguments, **rest))


def one_by_one(data_set: ImageSet) -> ImageSet:
    """The same images, from a DataLoader: their transform, if any, is none of batches."""
    other, augment = copy.copy(data_set), data_set.augment
    other.augment = torch.nn.Identity() if augment is None else getattr(augment, "of_one", augment)
    return other
