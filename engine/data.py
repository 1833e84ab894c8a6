"""The data of a run: the same in all processes, and fit for its settings."""

import math
import zlib
from dataclasses import replace
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from checkpoints import Checkpoint
from data_loader import (
    ImageSet,
    Share,
    evaluation_loader,
    input_text,
    load_data_sets,
    set_epoch,
    training_loader,
)
from data_sets import DATA_SETS
from load_settings import refuse_another_fold, refuse_single_values
from runtime.errors import UserError
from runtime.processes import all_agree, is_main_process, rank, world_size
from settings import Settings, input_step_of

SHARE_OF_STATISTICS = 0.05  # of an epoch's batches, without gradients: under 2 % of its time
MOST_OF_STATISTICS = 20  # batches: they stay in memory, and are little beside what a step takes
TESTED_AT_ONCE = 256  # images, on a GPU: see tested_share_of

DataSets = tuple[ImageSet, ImageSet]  # training and test data


class Batches(NamedTuple):
    """This process's share of the data, in batches."""

    train: DataLoader
    test: DataLoader
    held_out: DataLoader | None


def share_of(settings: Settings) -> Share:
    """What this process takes of every batch: an image at least, so that also an evaluation on more
    processes than --batch_size has its batches."""
    batch = max(1, settings.batch_size // world_size())
    return Share(batch, rank(), world_size(), settings.workers)


def tested_share_of(settings: Settings, device: torch.device) -> Share:
    """The same of an evaluation between epochs.

    A GPU waits for Python there, as long for 64 images as for 256: it takes so many at once, but
    not more than four times a training step's. They take less memory than that step, since nothing
    is kept for backward.
    """
    share = share_of(settings)
    if device.type != "cuda":
        return share
    at_once = max(share.batch_size, min(4 * share.batch_size, TESTED_AT_ONCE))
    return share._replace(batch_size=at_once)


def batches_of(
    settings: Settings, train_set: ImageSet, test_set: ImageSet, device: torch.device
) -> Batches:
    tested, held_out = tested_share_of(settings, device), train_set.held_out
    return Batches(
        training_loader(train_set, share_of(settings), device),
        evaluation_loader(test_set, tested, device),
        None if held_out is None else evaluation_loader(held_out, tested, device),
    )


def load_same_data(settings: Settings) -> DataSets:
    """Training and test data; for an evaluation as the checkpoint's network reads them."""
    input_step = None if settings.eval_only is None else input_step_of(settings)
    train_set, test_set = load_data_sets(settings, input_step)
    if world_size() > 1:
        # With other numbers of batches the processes would wait for each other for ever.
        all_agree(
            {
                "training images": len(train_set),
                "test images": len(test_set),
                "input step": train_set.step,
                "labels' checksum": zlib.crc32(train_set.labels.numpy(), len(test_set)),
                "training images' checksum": zlib.crc32(train_set.rows.numpy())
                if train_set.rows is not None
                else 0,
            },
            "found data",
            "give all the same --data_path, or copies of it",
        )
    if is_main_process() and (text := input_text(train_set)) is not None:
        print(text, flush=True)
    return train_set, test_set


def settings_for(settings: Settings, train_set: ImageSet, teacher: Checkpoint | None) -> Settings:
    """The settings with what the training data have told. Raises UserError where the data do not go
    with them, or with the teacher."""
    refuse_single_values(settings, world_size(), len(train_set))
    if train_set.held_out is not None and len(train_set.held_out) == 0:
        raise UserError(
            f"--val_share {settings.val_share} holds out none of the {len(train_set)} training "
            "images: take more"
        )
    step = train_set.step
    if step not in (None, DATA_SETS[settings.data].image_step):
        settings = replace(settings, input_step=step)
    if train_set.sensor is not None:
        settings = replace(settings, sensor="{}x{}".format(*train_set.sensor))
    if teacher is not None:
        if teacher.settings.sensor != settings.sensor:
            raise UserError(
                f"--teacher_path {settings.teacher_path} was trained on frames of a camera of "
                f"{teacher.settings.sensor} pixels, these are of {settings.sensor}: give "
                f"--sensor {teacher.settings.sensor}"
            )
        refuse_another_fold(teacher, settings.teacher_path, settings, len(train_set))
        _refuse_another_step(teacher.settings, settings)
    return settings


def _refuse_another_step(teacher: Settings, settings: Settings) -> None:
    """Raises UserError where the teacher reads the same frames in other steps."""
    theirs, ours = input_step_of(teacher), input_step_of(settings)
    # The frames of another T have other counts.
    if teacher.time_window != settings.time_window or theirs == ours:
        return
    used = f" (it had --val_share {teacher.val_share} --seed {teacher.seed})"
    used *= teacher.val_share > 0 or settings.val_share > 0  # the step is of the images in use
    raise UserError(
        f"--teacher_path {settings.teacher_path} was trained with the input step {theirs!r}, the "
        f"training data in {settings.data_path} have {ours!r}: give the data that the teacher was "
        f"trained on{used}, or train a teacher on these"
    )


def first_images(batches: DataLoader, device: torch.device) -> list[Tensor]:
    """The first batches of images, of an order and an augmentation that no epoch has."""
    set_epoch(batches, 0)
    number = min(MOST_OF_STATISTICS, math.ceil(SHARE_OF_STATISTICS * len(batches)))
    return [images.to(device) for images, _ in islice(batches, number)]
