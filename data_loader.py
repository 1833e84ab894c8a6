"""The data sets as pairs (train, test), and the loaders that share them out over processes.

| name | read from (below --data_path) | image, float32 | classes |
|---|---|---|---|
| CIFAR10 | cifar-10-batches-py, downloaded when missing | (3, 32, 32) | 10 |
| CIFAR100 | cifar-100-python, downloaded when missing | (3, 32, 32) | 100 |
| TinyImagenet | tiny-imagenet-200, downloaded when missing | (3, 64, 64) | 200 |
| ncaltech101 | N-Caltech101/frames_number_T_split_by_number | (T, 2, 48, 48) | 101 |
| nmnist | N-MNIST/frames_number_T_split_by_number | (T, 2, 34, 34) | 10 |
| digits | scikit-learn itself | (1, 16, 16) | 10 |
| digits-dvs | Digits-DVS, made from scikit-learn's digits when missing | (T, 2, 24, 24) | 10 |
| folder | train/CLASS/*, val/CLASS/* | (3, 64, 64) | as many as there are |

Static images are pixel values / 255, so they lie in [0, 1] and are **not** normalised by a mean and
a standard deviation: the network's first batch norm does that, and the image that enters the
quantized network is then exactly an 8-bit integer times 1/255. Events are counts per frame and
polarity, as 8-bit codes (`input_of` says how): full-precision and quantized networks read the same.

Whatever is many files on disk is packed once into a cache beside them (or in --cache_path), one
array that is mapped into memory.
`python data_loader.py prepare --data ncaltech101 --data_path D --time_window 10` makes frames of
raw events and the cache; a training makes what is missing too, but for the frames.
"""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from http.client import HTTPException
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.datasets.utils import download_url
from torchvision.transforms import v2
from tqdm import tqdm

from load_settings import Checkpoint, classes_of_folder
from quantization import codes_of
from runtime.command import Parser, similar_path
from runtime.errors import UserError
from runtime.files import file_lock
from runtime.launcher import launcher_variable
from runtime.processes import PATIENCE, first_process_first, is_main_process
from settings import (
    DATA_SETS,
    Settings,
    check_value,
    data_set_of,
    input_step_of,
    parse_image_size,
)

Arrays = tuple[tuple[Tensor, Sequence[int]], tuple[Tensor, Sequence[int]]]  # (images, labels) twice
# How long a process waits for another that says nothing, or for a batch of a loader. One that dies
# is noticed at once; a checkpoint may take its time on a slow disk.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # end a run, but not its loaders
CACHE_PATH = "MD_SNN_CACHE_PATH"  # of the environment: the default of --cache_path
MOST_PIXELS = 2**20  # of an event camera
HIGHEST = 255  # code of the 8-bit input
BOUNDS = ((99, 2), (50, 64))  # percent, room: see input_of
MOST_VALUES = 2**24  # of training data that quantiles are taken of, and that are read at once
HELD_OUT = 1  # beside the seed: other random numbers than an epoch's
FOLDS = 5  # parts of a split of --fold
GRAY = 128  # what AutoAugment and cutout fill with: the images' mean, nearly


class ImageSet(Dataset):
    """Pairs (image, label): an augmented image in torch's default dtype, an int.

    images: (N, …), in memory or mapped from a file, so that a loader's worker takes no memory for
    it. rows: which of the images and labels are in the set; None: all. held_out: a set of the
    training images that are in none, to choose the best checkpoint by. step: None of 8-bit pixels,
    which become pixel / 255; of event frames what one of their 8-bit codes stands for, and the
    codes are what the networks read. clipped: the share of the non-zero training values that lie
    above the highest code. classes: the labels' names.

    The augmentation of an image depends on (seed, epoch, index) alone: neither the number of
    processes nor of loader workers changes it. `augment` may therefore draw from torch's CPU
    generator only, as torchvision's v2 transforms do.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Sequence[int],
        augment: Callable[[Tensor], Tensor] | None = None,
        seed: int = 0,
        step: float | None = None,
        clipped: float = 0.0,
        rows: Tensor | None = None,
        classes: Sequence[str] | None = None,
    ):
        self.images, self.rows, self.labels = images, rows, torch.as_tensor(labels)
        if rows is not None:
            self.labels = self.labels[rows]
        self.held_out: ImageSet | None = None
        self.augment, self.step, self.clipped = augment, step, clipped
        self.classes = None if classes is None else list(classes)
        self.seed, self.epoch = seed, 0

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index if self.rows is None else self.rows[index]]
        if self.step is not None:
            image = codes_of(image, self.step)
        if self.augment is not None:
            with torch.random.fork_rng(devices=[]):
                # torch.manual_seed would reseed the GPU's generators too, and for good.
                torch.default_generator.manual_seed(seed_of(self.seed, self.epoch, index))
                image = self.augment(image)
        image = image.to(torch.get_default_dtype())
        if self.step is None:
            image = image / HIGHEST  # v2.ToDtype multiplies by 1/255: not always the same
        return image, self.labels[index].item()


class Input(NamedTuple):
    """How event frames become the 8-bit input of the networks."""

    step: float  # what one code stands for
    clipped: float  # share of the non-zero training values that lie above the highest code


def input_of(train: np.ndarray, rows: np.ndarray | None = None) -> Input:
    """The 8-bit input that fits training frames (N, …), of which `rows` are used (None: all), and
    them alone: nothing of a test is seen.

    Whole numbers of at most 255 are their own codes: the step is 1. Otherwise the largest value has
    the highest code, 255, or whatever is less of twice the value that 99 % of the non-zero ones do
    not exceed and 64 times their median: a hot pixel of 60,000 events shall not round the others
    to nothing. Whole numbers never get a step below 1. Quantiles are actual values of the data, of
    evenly spaced samples where all are more than MOST_VALUES; whether values are whole, and the
    largest, are found from all. `python -m benchmarks.input_step` compares such rules.
    """
    if train.dtype == np.uint8:
        return Input(1.0, 0.0)
    whole, largest = True, 0.0
    rows = np.arange(len(train)) if rows is None else rows
    for part in _parts(train, rows):
        whole = whole and bool((part == np.floor(part)).all())
        largest = max(largest, float(part.max()))
    if whole and largest <= HIGHEST:
        return Input(1.0, 0.0)
    number = min(len(rows), max(1, MOST_VALUES // train[0].size))
    values = train[rows[np.arange(number) * len(rows) // number]]
    values = values[values > 0]
    reach = largest
    if values.size:
        places = [-(-percent * values.size // 100) - 1 for percent, _ in BOUNDS]
        quantiles = np.partition(values, places)[places].tolist()
        rooms = (room for _, room in BOUNDS)
        reach = min(largest, *(room * x for room, x in zip(rooms, quantiles, strict=True)))
    step = max(reach / HIGHEST, 1.0 if whole else 0.0)
    above = sum(np.count_nonzero(part > (HIGHEST + 0.5) * step) for part in _parts(train, rows))
    return Input(step, above / sum(np.count_nonzero(part) for part in _parts(train, rows)))


def _parts(array: np.ndarray, rows: np.ndarray) -> Iterator[np.ndarray]:
    """Rows of the array, a few at a time: mapped from a file, all may be larger than the memory."""
    number = max(1, MOST_VALUES // array[0].size)
    for start in range(0, len(rows), number):
        yield array[rows[start : start + number]]


def input_text(train: ImageSet) -> str | None:
    """The line that says how frames are read; None where whole counts are read as they are."""
    text = []
    if train.step not in (None, 1):
        highest = HIGHEST * train.step
        text.append(f"code 255 of the 8-bit input stands for {highest:.4g} in the frames")
    if train.clipped:
        text.append(f"{train.clipped:.2g} of the non-zero training values are above and clipped")
    return f"input step {train.step:.4g}: {', '.join(text)}" if text else None


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


def seed_of(*entropy: int) -> int:
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def load_data_sets(
    data: str,
    data_path: str | Path,
    time_window: int,
    seed: int = 0,
    augment: str = "basic",
    image_size: tuple[int, int] | None = None,
    cache_path: str | Path | None = None,
    input_step: float | None = None,
    val_share: float = 0.0,
    fold: int | None = None,
) -> tuple[ImageSet, ImageSet]:
    """The data sets (train, test) of `data`; training images are augmented, from `seed` ≥ 0.

    `time_window` (T) is used by event data alone: static images are repeated by the network, not
    here. augment: "basic", "auto" (colour images) or "none"; image_size: (height, width) where it
    is not the data set's own. cache_path: the folder for caches and converted events; by default
    what MD_SNN_CACHE_PATH in the environment says, else data_path. input_step: what one code of
    event frames stands for, by default what `input_of` finds. val_share: this share of the training
    images is not in `train` but in `train.held_out`, without augmentation. fold: the test images
    are that fold's of all images, and the training images the others (see `fold_rows`). Under
    torch.distributed every process must call this, since the first one reads (and downloads, and
    packs) before the others. Raises UserError, one line, where data are missing or damaged; it
    names the expected folder and how to fill it.
    """
    if data not in DATA_SETS:
        raise UserError(f"there is no data set {data!r}")
    size = image_size or DATA_SETS[data].image_size
    place, found, whole = Place.of(data_path, cache_path), None, None
    with first_process_first():
        try:
            match data:
                case "CIFAR10":
                    arrays, classes = _cifar(CIFAR10, place.data)
                case "CIFAR100":
                    arrays, classes = _cifar(CIFAR100, place.data)
                case "TinyImagenet":
                    arrays, classes = _tiny_imagenet(place)
                case "ncaltech101" | "nmnist" | "digits-dvs":
                    arrays, classes, found, whole = _events(data, place, time_window, size)
                case "digits":
                    arrays, classes = _digits(split=fold is None), list("0123456789")
                case "folder":
                    arrays, classes = _folder(place, size)
        except OSError as error:  # no permission, a disk that fails or is full
            raise UserError(cannot_prepare(data, place.data, error)) from error
    (train, train_labels), (test, test_labels) = arrays
    train_labels, test_labels = map(torch.as_tensor, (train_labels, test_labels))
    rows = test_rows = held_out = None
    if fold is not None:
        train = test = torch.cat((train, test)) if whole is None else whole
        train_labels = test_labels = torch.cat((train_labels, test_labels))
        rows, test_rows = fold_rows(train_labels, fold, classes)
    if val_share:
        rows = torch.arange(len(train_labels)) if rows is None else rows
        chosen = torch.from_numpy(held_out_rows(train_labels[rows], val_share, seed))
        rows, held_out = rows[~chosen], rows[chosen]
    if found is not None and rows is not None:
        found = input_of(train.numpy(), rows.numpy())
    step, clipped = found or (None, 0.0)
    if found is not None and input_step not in (None, step):
        if is_main_process():
            print(
                f"warning: the network was trained with the input step {input_step:.4g}, which is "
                f"used, but the training data in {place.data} have {step:.4g}",
                file=sys.stderr,
            )
        step, clipped = input_step, 0.0
    transform = None
    if data != "digits":  # which are told by their place and side
        transform = augmentation(augment, DATA_SETS[data].events, size)
    sets = (
        ImageSet(train, train_labels, transform, seed, step, clipped, rows, classes),
        ImageSet(test, test_labels, step=step, rows=test_rows, classes=classes),
    )
    if held_out is not None:
        sets[0].held_out = ImageSet(train, train_labels, step=step, rows=held_out)
    known = DATA_SETS[data].num_classes or len(classes_of_folder(data_path))
    highest = max(labels.max().item() for labels in (train_labels, test_labels))
    if highest >= known:
        raise UserError(
            f"{data} has {known} classes, {data_path} a label {highest}: remove the cache there"
        )
    return sets


def data_of(settings: Settings, data_path: str | Path) -> tuple[ImageSet, ImageSet]:
    """The data sets (train, test) as the network that was trained with these settings reads them,
    without augmentation. Raises UserError as load_data_sets does."""
    of_training = os.fspath(data_path) == settings.data_path
    return load_data_sets(
        settings.data,
        data_path,
        settings.time_window,
        settings.seed,
        "none",
        image_size=data_set_of(settings).image_size,
        cache_path=settings.cache_path if of_training else None,
        input_step=input_step_of(settings),
        val_share=settings.val_share,
        fold=settings.fold,
    )


def refuse_another_fold(
    trained: Checkpoint, path: str | Path, settings: Settings, train: ImageSet
) -> None:
    """Raises UserError where the network at `path` was trained on another number of images than
    these of its fold: the data were others, and so was the fold."""
    theirs = trained.rest.get("training_images")
    same_share = trained.settings.val_share == settings.val_share
    if settings.fold is not None and same_share and theirs not in (None, len(train)):
        raise UserError(
            f"{path} was trained on {theirs} images of its --fold {settings.fold}, the data here "
            f"have {len(train)} there: it may have been trained on the test images, give the data "
            "that it was trained on"
        )


class Place(NamedTuple):
    """Where data are read, and where what is made of them goes: caches, converted events."""

    data: Path
    caches: Path

    @classmethod
    def of(cls, data_path: str | Path, cache_path: str | Path | None) -> "Place":
        return cls(Path(data_path), Path(cache_path or os.environ.get(CACHE_PATH) or data_path))


def cannot_prepare(data: str, data_path: Path, error: OSError) -> str:
    """What to say where preparing failed; of a folder that cannot be written, what to do."""
    text = f"cannot prepare {data} in {data_path}: {error}"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM) and isinstance(error.filename, str):
        folder = Path(error.filename).parent
        while not folder.exists():
            folder = folder.parent
        if not os.access(folder, os.W_OK):
            text += (
                f": {folder} cannot be written; give another folder for what is made of the data "
                f"with --cache_path (or {CACHE_PATH} in the environment, for every command)"
            )
    return text


class CropAndFlip(torch.nn.Module):
    """Crop of the image padded with zeros to its own size again, flipped in half of the cases.

    Called on one image (torchvision's transforms, in a loader's worker) or, as `of_batch`, on a
    batch on any device: the same distribution, other draws.
    """

    def __init__(self, size: tuple[int, int]):
        super().__init__()
        self.padding = size[0] // 8, size[1] // 8  # 4 of 32 pixels, 8 of 64
        crop = v2.RandomCrop(size, padding=self.padding[::-1])  # of the sides, then above and below
        self.of_one = v2.Compose([crop, v2.RandomHorizontalFlip()])

    def forward(self, image: Tensor) -> Tensor:
        return self.of_one(image)

    def draw(self, number: int, seed: int) -> Tensor:
        """(number, 3): first row, first column of each crop, whether it is flipped."""
        generator = torch.Generator().manual_seed(seed)
        limits = (2 * self.padding[0] + 1, 2 * self.padding[1] + 1, 2)
        draws = [torch.randint(limit, (number,), generator=generator) for limit in limits]
        return torch.stack(draws, dim=1)

    def of_batch(self, images: Tensor, draws: Tensor) -> Tensor:
        """(B, C, H, W) images, each cropped and flipped as its row of `draws` says."""
        B, C, H, W = images.shape
        above, beside = self.padding
        padded = F.pad(images, [beside, beside, above, above])
        row, column, flipped = draws.unsqueeze(-1).unbind(1)  # (B, 1) each
        rows = row + torch.arange(H, device=images.device)
        columns = torch.arange(W, device=images.device)
        columns = column + torch.where(flipped == 1, columns.flip(0), columns)
        image = torch.arange(B, device=images.device)[:, None, None, None]
        channel = torch.arange(C, device=images.device)[:, None, None]
        return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


class Cutout(torch.nn.Module):
    """A square of `side` pixels around a random pixel is grey (DeVries, Taylor: 1708.04552)."""

    def __init__(self, side: int):
        super().__init__()
        self.side = side

    def forward(self, image: Tensor) -> Tensor:
        H, W = image.shape[-2:]
        top, left = (int(torch.randint(n, ())) - self.side // 2 for n in (H, W))
        image = image.clone()
        image[..., max(top, 0) : top + self.side, max(left, 0) : left + self.side] = GRAY
        return image


def roll(frames: Tensor) -> Tensor:
    """Shift (…, H, W) frames by −3 … 3 pixels along each axis, cyclically."""
    return frames.roll(torch.randint(-3, 4, (2,)).tolist(), dims=(-2, -1))


def augmentation(
    name: str, events: bool, size: tuple[int, int]
) -> Callable[[Tensor], Tensor] | None:
    """The transform of --augment; all T frames of a sample get the same one."""
    if name == "none":
        return None
    if events:
        nearest = v2.InterpolationMode.NEAREST  # keeps counts whole
        rotate = v2.RandomRotation(15, interpolation=nearest)
        return v2.RandomChoice([roll, rotate, v2.RandomAffine(0, shear=15, interpolation=nearest)])
    if name == "basic":
        return CropAndFlip(size)
    # AutoAugment's policy for CIFAR-10 (Cubuk et al.: 1805.09501)
    policy = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10, fill=GRAY)
    return v2.Compose([CropAndFlip(size), policy, Cutout(min(16, *(side // 2 for side in size)))])


def training_batches(
    data_set: ImageSet,
    batch_size: int,
    rank: int,
    world_size: int,
    workers: int,
    seed: int,
    device: torch.device,
) -> "DeviceLoader | DataLoader":
    """Batches (images, labels int64) of process `rank`, in the order of training_order.

    Static images are kept and augmented on the device, where no loader can hold up a step; events
    and --augment auto need transforms of single images, in `workers` processes.
    """
    share = batch_size, rank, world_size
    if not _for_device(data_set):
        return train_loader(data_set, *share, workers, seed, device.type == "cuda")
    return DeviceLoader(data_set, batch_size, *training_order(data_set, *share, seed), device)


def evaluation_batches(
    data_set: ImageSet,
    batch_size: int,
    rank: int,
    world_size: int,
    workers: int,
    device: torch.device,
) -> "DeviceLoader | DataLoader":
    """Batches of the images of evaluation_loader, on the device where training_batches has them."""
    share = batch_size, rank, world_size
    if not _for_device(data_set):
        return evaluation_loader(data_set, *share, workers, device.type == "cuda")
    return DeviceLoader(data_set, batch_size, range(rank, len(data_set), world_size), False, device)


def _for_device(data_set: ImageSet) -> bool:
    return data_set.step is None and isinstance(data_set.augment, CropAndFlip | None)


class Shuffled(DistributedSampler):
    """A process's share of an epoch, from its image number `first` on; its length is the whole."""

    first = 0

    def __iter__(self) -> Iterator[int]:
        return islice(super().__iter__(), self.first, None)


def training_order(
    data_set: Dataset, batch_size: int, rank: int, world_size: int, seed: int
) -> tuple[Shuffled, bool]:
    """(shuffled indices of process `rank`, whether an incomplete last batch is dropped).

    Batch k of all processes together is the same set of images for any `world_size` with the same
    global batch batch_size · world_size. Images left over after the last global batch are dropped
    for this epoch. A data set smaller than one global batch gives one partial batch per process, of
    equal sizes: up to world_size − 1 images come twice.
    """
    # The sampler must drop too: padded to equal shares, two processes could get one batch more than
    # a single process.
    drop_last = len(data_set) >= batch_size * world_size
    return Shuffled(
        data_set, world_size, rank, shuffle=True, seed=seed, drop_last=drop_last
    ), drop_last


class DeviceLoader:
    """The batches of train_loader or evaluation_loader, taken from images on the device.

    The same images in the same batches, and, where there is no augmentation, the same numbers. An
    epoch's augmentation is drawn for all images at once, from (seed, epoch): the number of
    processes does not change it. Images that would take more than a quarter of a GPU's memory stay
    where they are, and each batch is copied.
    """

    def __init__(
        self,
        data_set: ImageSet,
        batch_size: int,
        sampler: Shuffled | range,
        drop_last: bool,
        device: torch.device,
    ):
        self.dataset, self.sampler, self.device = data_set, sampler, device
        self.batch_size, self.drop_last = batch_size, drop_last
        self.images, self.labels = data_set.images, data_set.labels.to(device)
        self.rows = torch.arange(len(self.images)) if data_set.rows is None else data_set.rows
        if device.type == "cuda":
            memory = torch.cuda.get_device_properties(device).total_memory
            if self.images[:1].nbytes * len(self.rows) <= memory / 4:
                own = self.images if data_set.rows is None else self.images[self.rows]
                self.images, self.rows = own.to(device), torch.arange(len(own), device=device)
        # A tensor, because CUDA multiplies by the reciprocal of a plain number.
        self.white = torch.tensor(HIGHEST, dtype=torch.get_default_dtype(), device=device)

    def __len__(self) -> int:
        full, left = divmod(len(self.sampler), self.batch_size)
        return full + (left > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        augment, draws = self.dataset.augment, None
        if augment is not None:
            draws = augment.draw(len(self.dataset), seed_of(self.dataset.seed, self.dataset.epoch))
            draws = draws.to(self.device)
        # All numbers are copied to a GPU once an epoch: each copy waits for it.
        order = torch.tensor(list(self.sampler), dtype=torch.int64, device=self.device)
        order_of_images = self.rows[order.to(self.images.device)]
        for start in range(0, len(order), self.batch_size):
            part = slice(start, start + self.batch_size)
            batch = order[part]
            if self.drop_last and len(batch) < self.batch_size:
                break
            images = self.images[order_of_images[part]].to(self.device)
            if draws is not None:
                images = augment.of_batch(images, draws[batch])
            yield images / self.white, self.labels[batch]


def train_loader(
    data_set: ImageSet,
    batch_size: int,
    rank: int,
    world_size: int,
    workers: int,
    seed: int,
    pin_memory: bool = False,
) -> DataLoader:
    """Shuffled batches of process `rank`, `batch_size` images each (see training_order)."""
    sampler, drop_last = training_order(data_set, batch_size, rank, world_size, seed)
    # Workers start anew each epoch (not persistent): they get their copy of the data set, with its
    # epoch, at their start.
    return DataLoader(
        data_set,
        batch_size,
        sampler=sampler,
        num_workers=workers,
        pin_memory=pin_memory,
        drop_last=drop_last,
        worker_init_fn=ignore_signals,
        timeout=PATIENCE.total_seconds() if workers else 0,
        generator=torch.Generator(),  # leaves the global one alone: --resume restores its state
    )


def ignore_signals(worker: int) -> None:
    """Those that end a run are for the main process: it finishes its step, and needs its workers
    for that. Ctrl-C reaches the whole process group, Slurm's signals every process of a step."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def evaluation_loader(
    data_set: ImageSet,
    batch_size: int,
    rank: int,
    world_size: int,
    workers: int,
    pin_memory: bool = False,
) -> DataLoader:
    """Batches of images rank, rank + world_size, …: each exactly once over all processes.

    Without padding the processes may get different numbers of batches, even none: sum over
    processes after the loop.
    """
    share = Subset(data_set, range(rank, len(data_set), world_size))
    return DataLoader(
        share,
        batch_size,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=ignore_signals,
        timeout=PATIENCE.total_seconds() if workers else 0,
        generator=torch.Generator(),
    )


def set_epoch(loader: DeviceLoader | DataLoader, epoch: int, first_batch: int = 0) -> None:
    """Give the next pass over training batches the order and the augmentation of `epoch`, from its
    batch number `first_batch` on. The loader's length stays that of a whole epoch."""
    loader.sampler.set_epoch(epoch)
    loader.sampler.first = first_batch * loader.batch_size
    loader.dataset.epoch = epoch


# Files are made whole or not at all, by one process at a time.


def _refuse_unfinished(frames: Path) -> None:
    marker = frames.with_name(f"{frames.name}.building")
    if marker.exists():
        raise UserError(
            f"{marker} says that SpikingJelly did not finish {frames}: remove both and start again"
        )


@contextmanager
def whole_folder(folder: Path, top: str = "") -> Iterator[Path]:
    """A new folder to fill: it, or `top` in it, becomes `folder`; a failure removes it."""
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        (unfinished / top).rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def downloading(data_path: Path, target: Path, archive: Path) -> Iterator[None]:
    """Be the only process that gets `target`; a failure leaves no new archive and folders."""
    new_folders = [path for path in (data_path, *data_path.parents) if not path.exists()]
    had_archive = archive.exists()
    try:
        data_path.mkdir(parents=True, exist_ok=True)
        with file_lock(target):
            yield
    except BaseException:
        if not had_archive:
            archive.unlink(missing_ok=True)
        for path in new_folders:
            with suppress(OSError):  # never made, or no longer empty
                path.rmdir()
        raise


class Archive(NamedTuple):
    """A zip file that is only unpacked where it is the one that was published."""

    name: str
    top: str  # the only folder in it
    md5: str
    url: str

    def unpack(self, archive: Path, folder: Path) -> None:
        """Make `folder` of what is in it; raises UserError for another archive, which is kept."""
        print(f"checking {archive} ...", flush=True)
        with archive.open("rb") as file:
            md5 = hashlib.file_digest(file, "md5").hexdigest()
        if md5 != self.md5:
            raise UserError(
                f"{archive} has the md5 {md5}, not {self.md5}: it is incomplete or another file, "
                f"put the one of {self.url} in its place"
            )
        with zipfile.ZipFile(archive) as files, whole_folder(folder, self.top) as unfinished:
            for name in tqdm(files.namelist(), "unpacking", leave=False, disable=None):
                if not (unfinished / name).resolve().is_relative_to(unfinished.resolve()):
                    raise UserError(f"{archive} holds {name!r}, which leads out of {folder}")
                files.extract(name, unfinished)


def files_below(root: Path) -> tuple[list[str], Counter[str]]:
    """(names of the files below `root`, relative to it and sorted; what else is there, counted).

    Links to folders are followed, and each folder is entered once, under the name that is no link
    where it has one, else under the one that is least deep: links in a circle end, no image gets
    two classes, and a class that is a link keeps its images. Hidden files and folders are left
    alone.
    """
    seen = {_identity(x) for x in (*root.absolute().parents, *root.resolve().parents)}
    files, other = [], Counter()
    folders, links = [""], []
    while folders or links:
        name = folders.pop() if folders else links.pop(0)
        try:
            if (identity := _identity(root / name)) in seen:
                other["links to folders that are read already"] += 1
                continue
            seen.add(identity)
            entries = sorted(os.scandir(root / name), key=lambda entry: entry.name)
        except OSError:
            other["unreadable folders"] += 1
            continue
        for entry in entries:
            path = f"{name}/{entry.name}".lstrip("/")
            try:
                if entry.name.startswith("."):
                    other["hidden"] += 1
                elif entry.is_dir():
                    (links if entry.is_symlink() else folders).append(path)
                elif entry.is_file():
                    files.append(path)
                else:
                    other["broken links" if entry.is_symlink() else "pipes or devices"] += 1
            except OSError:  # links to one another
                other["broken links"] += 1
        links.sort(key=lambda link: (link.count("/"), link))
    return sorted(files), other


def _identity(folder: Path) -> tuple[int, int]:
    stat = os.stat(folder)
    return stat.st_dev, stat.st_ino


def _say_unused(data: str, root: Path, files: Iterable[str], other: Counter[str]) -> None:
    """Print, once, how many `files` and other things in `root` are there and not used."""
    kinds = other + Counter(Path(name).suffix.lower()[:12] or "no ending" for name in files)
    if kinds and is_main_process():
        counted = ", ".join(f"{kind} {number}" for kind, number in kinds.most_common(8))
        text = (
            f"{data}: {kinds.total()} of the files and folders in {root} are not read ({counted}"
            f"{', …' if len(kinds) > 8 else ''})"
        )
        print("".join(x if x.isprintable() else "?" for x in text), file=sys.stderr)


class Source(NamedTuple):
    """The files of a data set, by names relative to a root, and what they show."""

    classes: list[str]
    files: list[tuple[str, int]]  # (name, label: place in classes)
    reading: int = 1  # counts the ways in which a program has read such files: see READING


class Packed(NamedTuple):
    """A cache that has been read."""

    images: Tensor  # (N, *shape), mapped from a file
    labels: Tensor  # (N,)
    classes: list[str]
    found: Input | None  # what `measure` of `packed` gave


def packed(
    index: Path,
    root: Path,
    find: Callable[[], Source],
    read: Callable[[Path], np.ndarray],
    shape: tuple[int, ...],
    measure: Callable[[np.ndarray, Tensor], Input] | None = None,
) -> Packed:
    """What is packed of the files that `find` names.

    Two files beside each other: the index NAME.json, which says what it was made of (see
    _contents) and what was measured, and NAME-CRC32.npy, uint8 or uint16 where that holds all
    values and else float32. They are written whole or not at all, and anew where a source has
    changed. Where `root` is gone they are enough. Raises UserError where they are damaged.
    """
    source = _contents(root, find()) if root.is_dir() or not index.exists() else None

    def current() -> Packed | None:
        if not index.exists():
            return None
        contents, found, images = _read_packed(index, shape)
        if source is not None and contents != source:
            return None
        labels = torch.tensor([row[1] for row in contents["files"]])
        if measure is not None and found is None:  # of a version that did not measure
            found = measure(images, labels)
        return Packed(torch.from_numpy(images), labels, contents["classes"], found)

    if (already := current()) is not None:
        return already
    index.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(index):
        if (made_by_another := current()) is not None:
            return made_by_another
        _write_packed(index, root, source, read, shape, measure)
        return current()


def _contents(root: Path, source: Source) -> dict[str, Any]:
    """The classes, and of each file [name, label, bytes, time of its last change]."""
    rows = []
    for name, label in source.files:
        stat = os.stat(root / name)
        rows.append([name, label, stat.st_size, stat.st_mtime_ns])
    reading = {} if source.reading == 1 else {"reading": source.reading}
    return {"classes": source.classes, "files": rows, **reading}


def _checksum(contents: dict[str, Any], crc_of_images: int) -> int:
    return zlib.crc32(json.dumps(contents).encode(), crc_of_images)


def _read_packed(
    index: Path, shape: tuple[int, ...]
) -> tuple[dict[str, Any], Input | None, np.ndarray]:
    found = None
    try:
        contents = json.loads(index.read_bytes())
        crc = contents.pop("crc32")
        labels = [label for _, label, _, _ in contents["files"]]
        path = index.with_name(f"{index.stem}-{crc:08x}.npy")
        images = np.load(path, mmap_mode="c", allow_pickle=False)
        damaged = (
            not labels
            or any(type(label) is not int for label in labels)
            or not 0 <= min(labels) <= max(labels) < len(contents["classes"])
            or images.shape != (len(labels), *shape)
            or images.dtype not in (np.uint8, np.uint16, np.float32)
            # Once on a machine: all processes read the same file.
            or (
                launcher_variable("LOCAL_RANK") == 0
                and _checksum(contents, zlib.crc32(images)) != crc
            )
        )
        if (measured := contents.pop("input", None)) is not None:
            found = Input(**measured)
            damaged = damaged or not (0 < found.step < math.inf and 0 <= found.clipped <= 1)
    except Exception:  # what these raise depends on where the bytes stop making sense
        damaged = True
    if damaged:
        raise UserError(
            f"the cache {index} is damaged: remove it, and it will be made again from its source"
        )
    return contents, found, images


def _write_packed(
    index: Path,
    root: Path,
    contents: dict[str, Any],
    read: Callable[[Path], np.ndarray],
    shape: tuple[int, ...],
    measure: Callable[[np.ndarray, Tensor], Input] | None,
) -> None:
    files = [root / name for name, *_ in contents["files"]]
    new_index, new_array = index.with_suffix(".json.tmp"), index.with_suffix(".npy.tmp")
    try:
        for dtype in (np.uint8, np.uint16, np.float32):
            with new_array.open("wb") as file:
                crc = _write_array(file, files, read, (len(files), *shape), np.dtype(dtype))
                file.flush()
                os.fsync(file.fileno())
            if crc is not None:
                break
        if measure is not None:
            labels = torch.tensor([row[1] for row in contents["files"]])
            found = measure(np.load(new_array, mmap_mode="r"), labels)
            contents = contents | {"input": found._asdict()}
        crc = _checksum(contents, crc)
        with new_index.open("w") as file:
            json.dump({"crc32": crc, **contents}, file)
            file.flush()
            os.fsync(file.fileno())
        # The index is what makes the array valid, so it comes last; an array that a running
        # training has mapped lives on until that ends.
        array = index.with_name(f"{index.stem}-{crc:08x}.npy")
        outdated = set(index.parent.glob(f"{index.stem}-????????.npy")) - {array}
        new_array.rename(array)
        new_index.rename(index)
    except OSError as error:  # a full disk
        raise UserError(f"cannot write the cache {index} ({error}): it was not made") from error
    finally:
        new_array.unlink(missing_ok=True)
        new_index.unlink(missing_ok=True)
    for path in outdated:
        path.unlink()


def _write_array(
    file, files: list[Path], read: Callable, shape: tuple[int, ...], dtype: np.dtype
) -> int | None:
    """Write what `read` gives of each file as .npy; its CRC-32, None where `dtype` is too small."""
    header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    crc = 0
    for array in in_threads(read, files, f"packing {files[0].parent.parent.name}"):
        whole = dtype.kind == "u"
        # float: the largest of a half-precision array is no number that dtype's limit fits into.
        if whole and (float(array.max()) > np.iinfo(dtype).max or (array != np.floor(array)).any()):
            return None
        data = np.ascontiguousarray(array, dtype)
        file.write(data)
        crc = zlib.crc32(data, crc)
    return crc


def in_threads(function: Callable[[Any], Any], items: Sequence, what: str) -> Iterator[Any]:
    """function(item) of each item in order, on all cores, with a progress bar on a terminal.

    Threads are enough: decompressing and decoding let go of Python's lock.
    """
    cores = len(os.sched_getaffinity(0))
    with (
        ThreadPoolExecutor(cores) as pool,
        tqdm(total=len(items), desc=what, leave=False, disable=None) as bar,
    ):
        for start in range(0, len(items), 4 * cores):  # in parts, so that few results wait
            for result in pool.map(function, items[start : start + 4 * cores]):
                yield result
                bar.update()


def _cifar(cifar: type[CIFAR10] | type[CIFAR100], data_path: Path) -> tuple[Arrays, list[str]]:
    """CIFAR-10/100 (Krizhevsky 2009), checked by md5, and the classes' names; a failed download
    leaves nothing behind."""
    folder, archive = data_path / cifar.base_folder, data_path / cifar.filename
    downloads = not folder.exists()
    try:
        with downloading(data_path, folder, archive) if downloads else nullcontext():
            try:
                parts = cifar(data_path, train=True, download=True), cifar(data_path, train=False)
            except BaseException:
                if downloads:
                    shutil.rmtree(folder, ignore_errors=True)
                raise
    except (OSError, HTTPException, RuntimeError) as error:  # RuntimeError: a wrong md5
        reason = " ".join(str(error).split())
        raise UserError(
            f"{cifar.__name__} is expected in {folder}, which is missing or damaged, and "
            f"downloading it failed ({reason}): remove what is there and unpack {cifar.url} "
            f"in {data_path}"
        ) from error
    train, test = (
        (torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), part.targets)
        for part in parts
    )
    return (train, test), parts[0].classes


TINY_IMAGENET = Archive(
    "tiny-imagenet-200.zip",
    "tiny-imagenet-200",
    "90528d7ca1a48142e341f4ef8d21d0de",
    "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
)


def _tiny_imagenet(place: Place) -> tuple[Arrays, list[str]]:
    """Tiny ImageNet with val/ as the test set, and the classes' names; label = place of the WNID in
    sorted order.

    Missing, it is unpacked from the archive, which is downloaded if that is missing too.
    """
    data_path = place.data
    root, archive = data_path / TINY_IMAGENET.top, data_path / TINY_IMAGENET.name
    remedy = f"unpack {TINY_IMAGENET.url} in {data_path}"
    indexes = {part: place.caches / f"{root.name}-{part}.json" for part in ("train", "val")}
    if not root.is_dir() and not all(index.exists() for index in indexes.values()):
        try:
            with downloading(data_path, root, archive):
                if not (root.exists() or archive.exists()):
                    download_url(TINY_IMAGENET.url, data_path, archive.name, TINY_IMAGENET.md5)
                if not root.exists():
                    TINY_IMAGENET.unpack(archive, root)
        except (OSError, HTTPException, RuntimeError) as error:  # RuntimeError: a wrong md5
            reason = " ".join(str(error).split())
            raise UserError(
                f"TinyImagenet is expected in {root}, which is missing, and getting it failed "
                f"({reason}): {remedy}"
            ) from error
    train, test = (
        packed(index, root, partial(_find_tiny, root, part, remedy), _read_tiny, (3, 64, 64))
        for part, index in indexes.items()
    )
    return (train[:2], test[:2]), _words(root, train.classes)


def _words(root: Path, wnids: list[str]) -> list[str]:
    """The first word for each class, where words.txt says one."""
    try:
        text = (root / "words.txt").read_text(errors="replace")
    except OSError:  # trained from the cache alone
        return wnids
    words = dict(line.split("\t")[:2] for line in text.splitlines() if "\t" in line)
    return [words.get(wnid, wnid).split(",")[0] for wnid in wnids]


def _find_tiny(root: Path, part: str, remedy: str) -> Source:
    annotations, val = root / "val" / "val_annotations.txt", root / "val"
    rearranged = not _images_in(val / "images")
    for needed in (root / "wnids.txt", root / "train", val if rearranged else annotations):
        if not needed.exists():
            raise UserError(
                f"TinyImagenet is expected in {root}, but {needed} is missing: {remedy}"
            )
    wnids = sorted((root / "wnids.txt").read_text(errors="replace").split())
    if not 1 <= len(wnids) <= 200:
        raise UserError(f"{root / 'wnids.txt'} names {len(wnids)} classes, not 200: {remedy}")
    for wnid in wnids:
        if not re.fullmatch(r"\w+", wnid):  # they name folders, here and nowhere else
            raise UserError(f"{root / 'wnids.txt'} names the class {wnid!r}: {remedy}")
    labels = {wnid: label for label, wnid in enumerate(wnids)}

    found = []
    if part == "train" or rearranged:
        for wnid, label in labels.items():
            folder = root / part / wnid
            images = folder / "images" if (folder / "images").is_dir() else folder
            names = _images_in(images)
            if not names:
                raise UserError(f"{images} holds no image (*.JPEG): {remedy}")
            found += [(f"{images.relative_to(root)}/{name}", label) for name in names]
    else:
        found = _annotated(annotations, labels, remedy)
    used = {name for name, _ in found}
    files, other = files_below(root / part)
    unused = (name for name in files if f"{part}/{name}" not in used)
    lists = re.compile(r"val_annotations\.txt|\w+/\w+_boxes\.txt")
    _say_unused("TinyImagenet", root / part, [x for x in unused if not lists.fullmatch(x)], other)
    return Source(wnids, found, READING)


def _images_in(folder: Path) -> list[str]:
    """Names of Tiny ImageNet's images, sorted."""
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted(x for x in names if x.lower().endswith(".jpeg") and x[0] != ".")


def _annotated(annotations: Path, labels: dict[str, int], remedy: str) -> list[tuple[str, int]]:
    """(name, label) of the images that val_annotations.txt names."""
    images = annotations.parent / "images"
    found, present = [], set(os.listdir(images))
    for line in annotations.read_text(errors="replace").splitlines():
        name, wnid = [*line.split("\t"), ""][:2]  # then a box: x, y, width, height
        if wnid not in labels:
            raise UserError(
                f"{annotations} gives {name} the class {wnid!r}, which wnids.txt lacks: {remedy}"
            )
        if name not in present:
            raise UserError(f"{annotations} names {name}, which is not in {images}: {remedy}")
        found.append((f"val/images/{name}", labels[wnid]))
    if not found:
        raise UserError(f"{annotations} is empty: {remedy}")
    return found


READING = 2  # of images: 1 left them as they lay, 2 turns them upright
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _read_tiny(path: Path) -> np.ndarray:
    pixels = read_image(path)
    if pixels.shape != (3, 64, 64):
        height, width = pixels.shape[1:]
        raise UserError(f"{path} is {height}×{width} pixels, not 64×64: fetch it again")
    return pixels


def read_sample(path: str | Path, settings: Settings) -> np.ndarray:
    """A file as the network that was trained with these settings has those of its data set: uint8
    (C, H, W) of an image, counts (T, 2, H, W) of events as frames (.npz) or as they are (.bin).

    An image of another size is scaled and cropped in the middle. Raises UserError for a file that
    is missing, damaged or of another kind.
    """
    data_set, path = data_set_of(settings), Path(path)
    if not os.path.isfile(path):
        is_folder = os.path.isdir(path)
        what = "is a folder, not a file" if is_folder else f"is no file{similar_path(path)}"
        raise UserError(f"{path} {what}")
    if not data_set.events:
        return read_image(path, data_set.image_size, gray=data_set.in_channels == 1)
    T, suffix = settings.time_window, path.suffix.lower()
    if suffix not in (".npz", ".bin"):
        raise UserError(f"{path} is no file of events: .bin of the camera, or .npz of {T} frames")
    with tempfile.TemporaryDirectory() as folder:
        frames = path
        if suffix == ".bin":
            frames = Path(folder) / "frames.npz"
            _convert(path, frames, T, EVENT_DATA[settings.data].sensor)
        return read_frames(frames, T, data_set.image_size).astype(np.float32)


def read_image(path: Path, size: tuple[int, int] | None = None, gray: bool = False) -> np.ndarray:
    """uint8 (3, H, W), upright, or (1, H, W) of `gray` images; with `size` scaled and cropped in
    the middle to fit.

    16 bits become 8 (their upper ones), transparency is dropped, and of several frames or pages the
    first is read. Raises UserError for a damaged file, and where nothing says what is black and
    what white: numbers of 32 bits, signed or floating-point ones.
    """
    try:
        with Image.open(path) as image:
            # From a name Pillow (13.0) maps a TIFF, and mixes up the rows of one on its side.
            image.filename = ""
            image.info.pop("transparency", None)  # a palette's gives a warning
            kind = _unclear(image)
            if kind is not None:
                raise UserError(
                    f"{path} holds {kind}, which would be misread: save it with 8 or 16 bits, "
                    "black 0, white the largest number"
                )
            image = _upright(image)
            if image.mode.startswith("I"):  # 16 bits: convert would clip them
                image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
            if image.mode in ("La", "RGBa"):  # colours multiplied by their opacity
                image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
            image = image.convert("RGB")
            if gray:
                image = image.convert("L")
            if size is not None:
                image = ImageOps.fit(image, size[::-1], Image.Resampling.BILINEAR)
            return np.atleast_3d(image).transpose(2, 0, 1)
    except UserError:
        raise
    except Exception as error:  # what Pillow raises depends on where the bytes stop making sense
        why = "it is no image" if isinstance(error, UnidentifiedImageError) else error
        raise UserError(f"{path} cannot be read ({why}): fetch it again or remove it") from error


def _unclear(image: Image.Image) -> str | None:
    """What an image holds whose numbers Pillow would read wrongly as 8 or 16 bits, or None."""
    if image.mode == "F":
        return "floating-point numbers"
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    if set(_numbers(tags.get(339, 1))) - {1, 4}:  # SampleFormat: unsigned, unspecified
        return "signed numbers"
    bits = max(_numbers(tags.get(258, 1)))  # BitsPerSample
    if bits > 16 or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        return "numbers of 32 bits"  # of PNG and PPM, older Pillows give 16 bits as these
    if 8 < bits < 16:
        return f"numbers of {bits} bits"
    if bits == 16 and image.mode.startswith("I") and tags.get(262) == 0:
        return "16-bit numbers with 0 for white"  # which Pillow does not turn round
    return None


def _numbers(tag: Any) -> tuple:
    return tag if isinstance(tag, tuple) else (tag,)


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says; one whose EXIF is damaged stays as it is."""
    image.load()  # of a TIFF this turns it, and removes the mark
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # what Pillow raises depends on where the bytes stop making sense
        return image
    return image.transpose(TURNS[orientation]) if orientation in TURNS else image


def _folder(place: Place, size: tuple[int, int]) -> tuple[Arrays, list[str]]:
    """A user's own images, val/ as the test set, and the classes' names; label = place of the
    folder in sorted order."""
    train, test = (
        packed(
            place.caches / "{}-{}x{}.json".format(part, *size),
            place.data / part,
            partial(_find_images, place.data, part),
            partial(read_image, size=size),
            (3, *size),
        )
        for part in ("train", "val")
    )
    return (train[:2], test[:2]), train.classes


def _find_images(data_path: Path, part: str) -> Source:
    classes, root, found = classes_of_folder(data_path), data_path / part, []
    files, other = files_below(root)
    of_class: dict[str, list[str]] = {name: [] for name in classes}
    unused = []
    for name in files:
        folder, inside, _ = name.partition("/")
        is_image = inside and Path(name).suffix.lower() in IMG_EXTENSIONS
        (of_class.get(folder, unused) if is_image else unused).append(name)
    for label, (name, images) in enumerate(of_class.items()):
        if not images:
            kinds = " ".join(IMG_EXTENSIONS)
            raise UserError(
                f"{root / name} holds no image ({kinds}) of its own: add some or remove it"
            )
        found += [(image, label) for image in images]
    _say_unused("folder", root, unused, other)
    return Source(classes, found, READING)


class DamagedError(UserError):
    """A file of events or frames that cannot be used; --skip_damaged goes on without it."""


class EventData(NamedTuple):
    """Events CLASS/*.bin of five bytes each, below one folder or two."""

    folder: str
    sensor: tuple[int, int]  # height and width of the camera, pixels
    # The folders of classes, of all files or of the training and of the test files, and what each
    # is unpacked from; None: made here.
    parts: dict[str, Archive | None]
    one_in: int = 0  # of a class's files is for the test, where all are in one part
    classes: tuple[str, ...] = ()  # that every part has; of none, those that are found

    def frames(self, root: Path) -> dict[str, Path]:
        """The folder of classes of each part's frames, below the folder of all frames: where there
        are two, in lower case, as SpikingJelly names them."""
        return {part: root / part.lower() if len(self.parts) > 1 else root for part in self.parts}


SITE = "https://www.garrickorchard.com/datasets"
CALTECH = Archive(
    "Caltech101.zip", "Caltech101", "66201824eabb0239c7ab992480b50ba3", f"{SITE}/n-caltech101"
)
EVENT_DATA = {
    "ncaltech101": EventData("N-Caltech101", (180, 240), {CALTECH.top: CALTECH}, one_in=10),
    "nmnist": EventData(
        "N-MNIST",
        (34, 34),
        {
            top: Archive(f"{top}.zip", top, md5, f"{SITE}/n-mnist")
            for top, md5 in (
                ("Train", "20959b8e626244a1b502305a9e6e2031"),
                ("Test", "69ca8762b2fe404d9b9bad1103e97832"),
            )
        },
        classes=tuple("0123456789"),
    ),
    "digits-dvs": EventData("Digits-DVS", (180, 240), {"Caltech101": None}, one_in=5),
}


def _frames_folder(data: str, place: Place, time_window: int) -> Path:
    """The folder of the frames: beside the data where they are there, else where they are made."""
    name = f"{EVENT_DATA[data].folder}/frames_number_{time_window}_split_by_number"
    return next((x / name for x in place if (x / name).is_dir()), place.caches / name)


def _events(
    data: str, place: Place, time_window: int, size: tuple[int, int]
) -> tuple[Arrays, list[str], Input, Tensor]:
    """N-Caltech101, N-MNIST (Orchard et al. 2015) or data like them, as frames of event counts, T
    per sample, the classes' names, how the frames are read, and the images of both parts as they
    are mapped.

    The split, the same on every machine: N-MNIST's own; else, of a class's n file names in
    code-point order, the last max(1, ⌊n/10⌋) (digits-dvs: ⌊n/5⌋) are test files and those before
    them training files; a class with a single file has it in the training set. Label = place of the
    class's folder name in code-point order.
    """
    kind, frames = EVENT_DATA[data], _frames_folder(data, place, time_window)
    index = _event_cache(data, place, time_window, size)
    if not frames.is_dir() and not index.exists():
        if any(kind.parts.values()):
            beside = (x / kind.folder for x in dict.fromkeys(place))
            found = sorted(x.name for y in beside for x in y.glob("frames_number_*_by_number"))
            raise UserError(
                f"{data} with --time_window {time_window} is expected in {frames}, which is "
                f"missing (found there: {', '.join(found) or 'no frames'}): "
                + _remedy(data, place, time_window)
            )
        convert_events(data, place, time_window)

    def measure(images: np.ndarray, labels: Tensor) -> Input:
        train = images[: training(labels)]
        if not any(part.any() for part in _parts(train, np.arange(len(train)))):
            raise UserError(
                f"the training frames in {frames} are all 0 (at --image_size {size[0]}x{size[1]}): "
                "convert the events again, or take a larger --image_size"
            )
        return input_of(train)

    def training(labels: Tensor) -> int:
        if not kind.one_in:  # the last class of the training files, then the first of the others
            return int(labels.diff().argmin()) + 1
        tests = sum(_test_share(data, n) for n in labels.bincount().tolist())
        if not tests:
            raise UserError(f"{frames} holds no class of two files or more")
        return len(labels) - tests

    images, labels, classes, found = packed(
        index,
        frames,
        partial(_find_frames, data, place, time_window),
        partial(read_frames, time_window=time_window, size=size),
        (time_window, 2, *size),
        measure,
    )
    n = training(labels)
    return ((images[:n], labels[:n]), (images[n:], labels[n:])), classes, found, images


def _event_cache(data: str, place: Place, time_window: int, size: tuple[int, int]) -> Path:
    name = "frames_number_{}_split_by_number-{}x{}.json".format(time_window, *size)
    return place.caches / EVENT_DATA[data].folder / name


def _test_share(data: str, files: int) -> int:
    """How many of a class's files are for the test."""
    one_in = EVENT_DATA[data].one_in
    return max(1, files // one_in) if one_in and files > 1 else 0


def _remedy(data: str, place: Place, time_window: int) -> str:
    caches = f" --cache_path {place.caches}" if place.caches != place.data else ""
    return (
        f"run python data_loader.py prepare --data {data} --data_path {place.data} "
        f"--time_window {time_window}{caches}"
    )


def _classes_of(data: str, root: Path, remedy: str) -> list[str]:
    """The names of the folders of classes in `root`, sorted. Raises UserError where one is missing
    that the data set has."""
    classes = EVENT_DATA[data].classes
    missing = [name for name in classes if not (root / name).is_dir()]
    if missing:
        what = "is missing" if not root.is_dir() else f"lacks {', '.join(missing)}"
        raise UserError(f"{data} is expected in {root}/CLASS/*, but {root} {what}: {remedy}")
    below = (path.name for path in root.iterdir() if path.is_dir() and path.name[0] != ".")
    return list(classes) or sorted(below)


def _files_of_classes(
    data: str, root: Path, classes: Sequence[str], ending: str
) -> dict[str, list[str]]:
    """Sorted names of each class's files root/CLASS/*ending; says how many others there are."""
    of_class: dict[str, list[str]] = {name: [] for name in classes}
    files, other = files_below(root)
    unused = []
    for path in files:
        folder, _, name = path.partition("/")
        if folder in of_class and "/" not in name and name.lower().endswith(ending):
            of_class[folder].append(name)
        else:
            unused.append(path)
    _say_unused(data, root, unused, other)
    return of_class


def _find_frames(data: str, place: Place, time_window: int) -> Source:
    """All training files, then all test files."""
    kind, root = EVENT_DATA[data], _frames_folder(data, place, time_window)
    _refuse_unfinished(root)
    again = f"remove {root} and " + _remedy(data, place, time_window)
    train, test = [], []
    for of_test, folder in enumerate(kind.frames(root).values()):  # where there are two parts
        classes = _classes_of(data, folder, again)
        most = DATA_SETS[data].num_classes
        if not 1 <= len(classes) <= most:
            raise UserError(f"{folder} holds {len(classes)} classes, {data} has {most}")
        of_class = _files_of_classes(data, folder, classes, ".npz")
        for label, (name, files) in enumerate(of_class.items()):
            if not files:
                remove = "" if kind.classes else "remove it, or "
                raise UserError(f"{folder / name} holds no frames (*.npz): {remove}{again}")
            found = [(str((folder / name / x).relative_to(root)), label) for x in files]
            first_test = 0 if of_test else len(found) - _test_share(data, len(found))
            train += found[:first_test]
            test += found[first_test:]
    return Source(classes, train + test)


def read_frames(path: Path, time_window: int, size: tuple[int, int]) -> np.ndarray:
    """Event counts (T, 2, *size) of a file that SpikingJelly wrote, or data_loader.py.

    Nearest neighbour: a pixel of the sensor in (H / height) · (W / width) is kept, so that counts
    stay whole. Raises UserError for a damaged file, for frames of another T, and for negative,
    infinite or undefined numbers anywhere in them.
    """
    again = "remove it and convert its events again"
    try:
        with zipfile.ZipFile(path) as arrays, arrays.open("frames.npy") as file:
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError("an unknown version of .npy")
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            if len(shape) != 4 or shape[1] != 2 or dtype.kind not in "fuib":
                raise DamagedError(
                    f"{path} holds {dtype} of shape {shape}, not frames (T, 2, H, W): {again}"
                )
            if shape[0] != time_window:
                raise UserError(
                    f"{path} holds frames of another T: got {shape[0]}, --time_window says "
                    f"{time_window}"
                )
            if min(shape) < 1 or shape[2] * shape[3] > MOST_PIXELS:
                raise ValueError(f"shape {shape}")
            file.seek(0)
            frames = np.lib.format.read_array(file, allow_pickle=False)
    except UserError:
        raise
    except KeyError:
        raise DamagedError(f"{path} holds no array named frames: {again}") from None
    except Exception as error:  # what zipfile and numpy raise depends on where the bytes go wrong
        raise DamagedError(f"{path} cannot be read ({error}): {again}") from error
    if not (frames.min() >= 0 and frames.max() <= np.finfo(np.float32).max):  # NaN is neither
        raise DamagedError(f"{path} holds negative, infinite or undefined numbers (NaN): {again}")
    rows, columns = (np.arange(side) * n // side for side, n in zip(size, shape[2:], strict=True))
    frames = frames[..., rows[:, None], columns]
    if ((frames > 0) & (frames < np.finfo(np.float32).tiny)).any():
        raise DamagedError(f"{path} holds numbers too small for 32 bits: scale the frames")
    return frames


def convert_events(
    data: str, place: Place, time_window: int, skip_damaged: bool = False
) -> list[str]:
    """Make frames of the raw events, split by number of events, with SpikingJelly on all cores.

    A conversion that was stopped goes on where it was. Returns the damaged files that were skipped;
    without `skip_damaged` the first one raises UserError.
    """
    frames = _frames_folder(data, place, time_window)
    _refuse_unfinished(frames)
    if frames.is_dir():
        print(f"{frames} is there already: remove it to convert its events again")
        return []
    frames.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(frames):
        if frames.is_dir():
            return []  # made by the process that was waited for
        unfinished = frames.with_name(f"{frames.name}.unfinished")
        targets = {
            EVENT_DATA[data].frames(unfinished)[part] / path.parent.name / f"{path.stem}.npz": path
            for part, path in _find_events(data, place)
        }
        for path in unfinished.rglob("*"):  # of files that are no longer there
            if path not in targets and not path.is_dir():
                path.unlink()
        for target in targets:
            target.parent.mkdir(parents=True, exist_ok=True)
        skipped = []

        def convert(target: Path) -> None:
            try:
                _convert(targets[target], target, time_window, EVENT_DATA[data].sensor)
            except DamagedError as error:
                if not skip_damaged:
                    raise
                target.unlink(missing_ok=True)
                skipped.append(str(error))

        what = f"converting events to {time_window} frames"
        for _ in in_threads(convert, list(targets), what):
            pass
        for folder in sorted(unfinished.rglob("*"), reverse=True):
            with suppress(OSError):  # of classes that are gone or that had only damaged files
                folder.rmdir()
        unfinished.rename(frames)
    return sorted(skipped)


def set_damaged_frames_aside(data: str, place: Place, time_window: int) -> list[str]:
    """Rename frames that cannot be read to *.npz.damaged, which nobody reads; what was wrong."""
    aside = []

    def check(path: Path) -> None:
        try:
            read_frames(path, time_window, EVENT_DATA[data].sensor)
        except DamagedError as error:
            path.rename(path.with_name(f"{path.name}.damaged"))
            aside.append(str(error))

    root = _frames_folder(data, place, time_window)
    files = sorted(x for y in EVENT_DATA[data].frames(root).values() for x in y.glob("*/[!.]*.npz"))
    for _ in in_threads(check, files, "checking frames"):
        pass
    return sorted(aside)


def _find_events(data: str, place: Place) -> list[tuple[str, Path]]:
    """(part, file CLASS/*.bin) of all parts, unpacked or made first where they are missing."""
    kind = EVENT_DATA[data]
    root, made = place.data / kind.folder, place.caches / kind.folder / "extract"
    sources = {}  # all are looked for before one is unpacked: that takes long
    for part, archive in kind.parts.items():
        folders = [folder / part for folder in (root / "extract", root, made)]
        archives = [folder / archive.name for folder in (root / "download", root) if archive]
        found = [*filter(Path.is_dir, folders), *filter(Path.is_file, archives)]
        sources[part] = found[0] if found else None
        if archive and sources[part] is None:
            raise UserError(
                f"{data} is expected in {root / part}/CLASS/*.bin or in {archives[0]}, and neither "
                f"is there: get {archive.name} from {archive.url}"
            )
    events = []
    for part, archive in kind.parts.items():
        extracted = sources[part] or made / part
        if not extracted.is_dir():
            extracted = made / part
            extracted.parent.mkdir(parents=True, exist_ok=True)
            with file_lock(extracted):
                if archive and not extracted.is_dir():
                    archive.unpack(sources[part], extracted)
                elif not extracted.is_dir():
                    with whole_folder(extracted) as unfinished:
                        write_digit_events(unfinished)
        remedy = f"unpack {archive.name} of {archive.url} again" if archive else "remove it"
        classes = _classes_of(data, extracted, remedy)
        for name, files in _files_of_classes(data, extracted, classes, ".bin").items():
            if not files:
                do = remedy if kind.classes else "fill or remove it"
                raise UserError(f"{extracted / name} holds no events (*.bin): {do}")
            events += [(part, extracted / name / file) for file in files]
    if not events:
        raise UserError(f"{extracted} holds no classes CLASS/*.bin")
    return events


def _convert(path: Path, target: Path, time_window: int, sensor: tuple[int, int]) -> None:
    """Write the frames of one file of events of a camera of (height, width) pixels, dated as it is,
    unless they are there."""
    # Imported here: it takes seconds, and needs a torchaudio that fits torch.
    from spikingjelly.datasets import utils

    stat = path.stat()
    if target.exists() and target.stat().st_mtime_ns == stat.st_mtime_ns:
        return
    H, W = sensor
    size = stat.st_size
    events = utils.load_ATIS_bin(path) if size and size % 5 == 0 else None
    if events is None or (events["x"] >= W).any() or (events["y"] >= H).any():
        raise DamagedError(
            f"{path} is damaged: {size} bytes are not events (5 bytes each) of a {W}×{H} camera"
        )
    frames = utils.integrate_events_by_fixed_frames_number(events, "number", time_window, H, W)
    temporary = target.with_name(f"{target.name}.tmp")
    with temporary.open("wb") as file:
        np.savez_compressed(file, frames=frames)
    os.utime(temporary, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    temporary.rename(target)


# The event camera of digits-dvs.
SENSOR = EVENT_DATA["digits-dvs"].sensor
SACCADE_MS = 100  # each of the three, as N-Caltech101's (Orchard et al. 2015)
STEPS = 24  # per saccade
REACH = 8  # pixels from the centre to a side of the triangle
SIDE = 160  # pixels of the displayed digit with a frame of one of its own pixels
DARK = 0.1  # of the background, where the digit's brightest pixel is 1
THRESHOLD = 0.3  # of the logarithm of the intensity


def write_digit_events(folder: Path) -> None:
    """scikit-learn's 1,797 digits as an event camera sees them, in N-Caltech101's layout.

    The camera makes three saccades of 100 ms along an isosceles triangle (Orchard et al. 2015,
    10.3389/fnins.2015.00437) in front of the enlarged digit. A pixel sends an event when its log
    intensity has moved by THRESHOLD since its last one, at the time that linear interpolation gives
    (the ideal sensor of ESIM, Rebecq et al. 2018): no noise, no refractory time, no mismatch.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()

    def write(number: int) -> None:
        label = str(digits.target[number])
        (folder / label).mkdir(exist_ok=True)
        path = folder / label / f"image_{number:04d}.bin"
        path.write_bytes(as_atis(*digit_events(digits.images[number])))

    for _ in in_threads(write, range(len(digits.images)), "making the events of digits-dvs"):
        pass


def digit_events(digit: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Events (t in µs, x, y, p) of an 8×8 digit of values 0 … 16, in order of time."""
    H, W = SENSOR
    framed = F.pad(torch.from_numpy(digit)[None, None] / 16, [1] * 4)  # a hard edge would flash
    enlarged = F.interpolate(framed, (SIDE, SIDE), mode="bilinear")[0, 0]
    scene = DARK + (1 - DARK) * F.pad(enlarged, [REACH + 1] * 4).numpy()
    corners = np.array([(-REACH, REACH), (0, -REACH), (REACH, REACH), (-REACH, REACH)])
    places = np.concatenate(
        [a + (b - a) * np.arange(STEPS)[:, None] / STEPS for a, b in pairwise(corners)]
        + [corners[-1:]]
    )
    # Log intensity in thresholds since the start: a pixel sends an event at each whole number.
    seen = [np.log(_shifted(scene, *place)) / THRESHOLD for place in places]
    start, last = seen[0], np.zeros(scene.shape, int)
    step = SACCADE_MS * 1000 / STEPS
    parts = []
    for k, (before, now) in enumerate(pairwise(seen)):
        before, now = before - start, now - start
        reached = np.where(now > last, np.floor(now), np.ceil(now)).astype(int)
        y, x = (reached != last).nonzero()
        rises, number = reached[y, x] > last[y, x], np.abs(reached - last)[y, x]
        pixel = np.repeat(np.arange(len(y)), number)
        event = np.arange(len(pixel)) - np.repeat(number.cumsum() - number, number) + 1
        y, x, rises = y[pixel], x[pixel], rises[pixel]
        level = last[y, x] + np.where(rises, event, -event)
        moved = (level - before[y, x]) / (now[y, x] - before[y, x])
        parts.append(((k + moved) * step, x, y, rises))
        last = reached
    t, x, y, p = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(t, kind="stable")
    top, left = (H - scene.shape[0]) // 2, (W - scene.shape[1]) // 2
    return t[order].astype(int), x[order] + left, y[order] + top, p[order]


def _shifted(image: np.ndarray, down: float, right: float) -> np.ndarray:
    """The image moved by parts of pixels, bilinearly, and cyclically: give it a margin."""
    for axis, shift in ((0, down), (1, right)):
        whole = int(np.floor(shift))
        part = shift - whole
        image = (1 - part) * np.roll(image, whole, axis) + part * np.roll(image, whole + 1, axis)
    return image


def as_atis(t: np.ndarray, x: np.ndarray, y: np.ndarray, p: np.ndarray) -> bytes:
    """Events as N-Caltech101 stores them, 5 bytes each: x, y, p and the 23 bits of t."""
    columns = (x, y, p.astype(int) << 7 | t >> 16, t >> 8 & 255, t & 255)
    return np.stack(columns, axis=1).astype(np.uint8).tobytes()


def digits_of(*shares: Sequence[int]) -> tuple[ImageSet, ...]:
    """Data sets of the given indices into scikit-learn's 1,797 digits, enlarged from 8×8 to 16×16.

    The values 0 … 16 become uint8 pixels 0 … 255.
    """
    # Imported here because it takes more than a second, which no other data set should pay.
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = torch.from_numpy(digits.images).unsqueeze(1)
    enlarged = F.interpolate(small, size=(16, 16), mode="bilinear", align_corners=False)
    images = (enlarged * 255 / 16).round().to(torch.uint8)
    names = list(map(str, digits.target_names))
    return tuple(ImageSet(images[share], digits.target[share], classes=names) for share in shares)


def _digits(split: bool) -> Arrays:
    """All digits, split 80/20, stratified, random_state 0; without `split` all are training images,
    in scikit-learn's order."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    labels = load_digits().target
    shares = np.arange(len(labels)), np.arange(0)
    if split:
        shares = train_test_split(shares[0], test_size=0.2, stratify=labels, random_state=0)
    train, test = digits_of(*shares)
    return (train.images, train.labels), (test.images, test.labels)


def main(argv: Sequence[str] | None = None) -> int:
    """`python data_loader.py prepare`: everything that a first training would have to make."""
    parser = Parser(
        prog="data_loader.py",
        description="Convert raw events to frames, fetch what can be fetched, pack the cache.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="prepare")
    prepare = commands.add_parser("prepare", allow_abbrev=False)
    add = prepare.add_argument
    add("--data", choices=DATA_SETS, required=True)
    add("--data_path", default="./data", help="default ./data")
    add("--cache_path", help="where frames and caches go (default: into the data path)")
    add("--time_window", type=int, help="frames of a sample of events (default 10)")
    add(
        "--image_size",
        help="HxW or one side (ncaltech101 48, all of its camera: 180x240; nmnist 34)",
    )
    add("--skip_damaged", action="store_true", help="leave damaged files of events out")
    try:
        args = parser.parse_args(argv)
        data_set, place = DATA_SETS[args.data], Place.of(args.data_path, args.cache_path)
        T = data_set.time_window if args.time_window is None else args.time_window
        check_value("time_window", T)
        if args.image_size is not None and not data_set.any_size:
            raise UserError(f"--image_size: the images of {args.data} have a size of their own")
        size = data_set.image_size
        if args.image_size is not None:
            size = parse_image_size(args.image_size)
        if args.skip_damaged and args.data not in EVENT_DATA:
            raise UserError("--skip_damaged goes with raw events")
        skipped = []
        if data_set.events and not _event_cache(args.data, place, T, size).exists():
            skipped = convert_events(args.data, place, T, args.skip_damaged)
        if args.skip_damaged:
            skipped += set_damaged_frames_aside(args.data, place, T)
        for text in skipped:
            print(f"data_loader.py: warning: skipped: {text}", file=sys.stderr)
        train, test = load_data_sets(
            args.data, place.data, T, image_size=size, cache_path=place.caches
        )
    except UserError as error:
        print("data_loader.py: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except OSError as error:
        text = cannot_prepare(args.data, place.data, error)
        print("data_loader.py: error:", " ".join(text.split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("data_loader.py: interrupted: the same command goes on", file=sys.stderr)
        return 130
    classes = len(torch.cat([train.labels, test.labels]).unique())
    print(
        f"{args.data}: {len(train)} training and {len(test)} test samples of {classes} classes, "
        f"{tuple(train.images.shape[1:])} {str(train.images.dtype).removeprefix('torch.')} each"
    )
    if (text := input_text(train)) is not None:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
