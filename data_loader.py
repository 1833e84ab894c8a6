"""The data sets as pairs (train, test), and the loaders that share them out over processes.

Which there are, `data_sets.DATA_SETS` says, and how they lie on the disk, docs/data.md.

Static images are pixel values / 255, so they lie in [0, 1] and are **not** normalised by a mean and
a standard deviation: the network's first batch norm does that, and the image that enters the
quantized network is then exactly an 8-bit integer times 1/255. Events are counts per frame and
polarity, as 8-bit codes (`input_of` says how): full-precision and quantized networks read the same.

`python data_loader.py prepare --data ncaltech101 --data_path D --time_window 10` makes frames of
raw events and the cache; a training makes what is missing too, but for the frames.
"""

import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from data_sets import DATA_SETS, Request, Samples
from data_sets.augment import CropAndFlip, augmentation
from data_sets.events import (
    HIGHEST,
    convert_events,
    event_cache,
    found_recordings,
    frames_of_file,
    input_of,
    read_frames,
    scaled,
    set_damaged_frames_aside,
)
from data_sets.recordings import READERS, holds_frames
from data_sets.splits import fold_rows, held_out_rows
from data_sets.static import read_image
from quantization import codes_of, pixels_of
from runtime.command import Parser, run_command, similar_path
from runtime.errors import UserError
from runtime.processes import PATIENCE, SIGNALS, first_process_first, is_main_process
from settings import OPTIONS, Settings, add_option, check_settings, input_step_of

CPU = torch.device("cpu")
CACHE_PATH = "MD_SNN_CACHE_PATH"  # of the environment: the default of --cache_path


@dataclass(eq=False)
class ImageSet(Dataset):
    """Pairs (image, label): an augmented image in torch's default dtype, an int.

    The augmentation of an image depends on (seed, epoch, index) alone: neither the number of
    processes nor of loader workers changes it. `augment` may therefore draw from torch's CPU
    generator only, as torchvision's v2 transforms do.
    """

    images: Tensor  # (N, …), 8-bit pixels or event frames, in memory or mapped from a file
    labels: Tensor | Sequence[int]
    augment: Callable[[Tensor], Tensor] | None = None
    seed: int = 0
    step: float | None = None  # of event frames: what one of their 8-bit codes stands for
    clipped: float = 0.0  # share of the non-zero training values that lie above the highest code
    sensor: tuple[int, int] | None = None  # of the user's own events: height and width of frames
    rows: Tensor | None = None  # of the images and labels that are in the set; None: all
    classes: Sequence[str] | None = None  # the labels' names
    held_out: "ImageSet | None" = None  # other images, to choose the best checkpoint by
    epoch: int = 0

    def __post_init__(self) -> None:
        self.labels = torch.as_tensor(self.labels)
        if self.rows is not None:
            self.labels = self.labels[self.rows]

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
        image = pixels_of(image) if self.step is None else image.to(torch.get_default_dtype())
        return image, self.labels[index].item()


def input_text(train: ImageSet) -> str | None:
    """The line that says how frames are read; None where whole counts are read as they are."""
    text = []
    if train.step not in (None, 1):
        highest = HIGHEST * train.step
        text.append(f"code 255 of the 8-bit input stands for {highest:.4g} in the frames")
    if train.clipped:
        text.append(f"{train.clipped:.2g} of the non-zero training values are above and clipped")
    return f"input step {train.step:.4g}: {', '.join(text)}" if text else None


def seed_of(*entropy: int) -> int:
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def request_of(settings: Settings) -> Request:
    data, caches = settings.data_path, settings.cache_path or os.environ.get(CACHE_PATH)
    about, T = settings.data_set, settings.time_window
    if about.recordings is not None:
        about = replace(about, recordings=found_recordings(about.recordings, Path(data)))
    return Request(settings.data, about, Path(data), Path(caches or data), T)


def load_data_sets(
    settings: Settings, input_step: float | None = None
) -> tuple[ImageSet, ImageSet]:
    """The data sets (train, test) of the settings; training images are augmented.

    input_step: what one code of event frames stands for, by default what `input_of` finds. The
    images that --val_share holds out are in `train.held_out`; with --fold the test images are that
    fold's of all images. Under torch.distributed every process must call this, since the first one
    reads (and downloads, and packs) before the others. Raises UserError, one line, where data are
    missing or damaged; it names the expected folder and how to fill it.
    """
    request = request_of(settings)
    samples = _read(request)
    (train, train_labels), (test, test_labels) = samples.train, samples.test
    rows = test_rows = held_out = None
    if settings.fold is not None:
        both = samples.whole or [*map(torch.cat, zip(*samples[:2], strict=True))]
        train, train_labels = test, test_labels = both
        rows, test_rows = fold_rows(train_labels, settings.fold, samples.classes)
    if settings.val_share:
        rows = torch.arange(len(train_labels)) if rows is None else rows
        chosen = held_out_rows(train_labels[rows], settings.val_share, settings.seed)
        chosen = torch.from_numpy(chosen)
        rows, held_out = rows[~chosen], rows[chosen]
    found = samples.input
    if request.about.events and (found is None or rows is not None):
        found = input_of(train.numpy(), None if rows is None else rows.numpy())
    step, clipped = found or (None, 0.0)
    if found is not None and input_step not in (None, step):
        if is_main_process():
            print(
                f"warning: the network was trained with the input step {input_step:.4g}, which is "
                f"used, but the training data in {request.data} have {step:.4g}",
                file=sys.stderr,
            )
        step, clipped = input_step, 0.0
    about, name = request.about, settings.augment if request.about.augmented else "none"
    transform = augmentation(name, about.events, about.image_size)
    test_set = ImageSet(test, test_labels, step=step, rows=test_rows, classes=samples.classes)
    if held_out is not None:
        held_out = ImageSet(train, train_labels, step=step, rows=held_out)
    how = transform, settings.seed, step, clipped, samples.sensor, rows, samples.classes, held_out
    return ImageSet(train, train_labels, *how), test_set


def _read(request: Request) -> Samples:
    """What the data set's function reads, first in process 0; labels are tensors."""

    def read() -> Samples:
        with preparing(request):
            return request.about.read(request)

    samples = first_process_first(read)
    parts = ((images, torch.as_tensor(labels)) for images, labels in samples[:2])
    samples = Samples(*parts, *samples[2:])
    for part, (images, labels) in zip(("training", "test"), samples[:2], strict=True):
        _check_images(request, part, images, labels, checked=samples.input is not None)
    known = request.about.num_classes or len(samples.classes)
    labels = torch.cat([labels for _, labels in samples[:2]])
    for label in (int(labels.min()), int(labels.max())):
        if not 0 <= label < known:
            raise UserError(
                f"{request.name} has {known} classes, {request.data} a label {label}: remove the "
                "cache there"
            )
    return samples


def _check_images(
    request: Request, part: str, images: Tensor, labels: Tensor, checked: bool
) -> None:
    """Raise UserError where a data set's function gives what networks would not read alike: they
    read images of 8 bits and frames in codes of 8 bits, from 0 on. `checked`: frames whose values
    are known to be fit for that."""
    here = f"{request.name}: its {part} images"
    shape = request.about.input_shape(request.time_window)
    if tuple(images.shape[1:]) != shape or len(images) != len(labels) or not len(labels):
        raise UserError(
            f"{here} are {tuple(images.shape)} with {len(labels)} labels; wanted are "
            f"{('N', *shape)} and N labels, N at least 1".replace("'", "")
        )
    if not request.about.events:
        if images.dtype != torch.uint8:
            raise UserError(
                f"{here} are {images.dtype}: give 8 bits (torch.uint8), 0 black and 255 white"
            )
    elif not checked and images.dtype != torch.uint8:
        for frames in images.split(256):
            values = frames.numpy()  # which compares unsigned numbers of 16 bits too
            if not (values.min() >= 0 and values.max() <= np.finfo(np.float32).max):
                raise UserError(f"{here} hold negative, infinite or undefined numbers (NaN)")


def data_of(settings: Settings, data_path: str | Path) -> tuple[ImageSet, ImageSet]:
    """The data sets (train, test) as the network that was trained with these settings reads them,
    without augmentation. Raises UserError as load_data_sets does."""
    path = os.fspath(data_path)
    caches = settings.cache_path if path == settings.data_path else None
    here = replace(settings, data_path=path, cache_path=caches, augment="none")
    return load_data_sets(here, input_step_of(settings))


def some_images(data_set: Dataset, number: int) -> Tensor:
    """So many images of a data set, or all where it has fewer, (N, ...) as a network reads them:
    always the same, and drawn, since in many data sets the classes lie one behind the other."""
    return torch.stack([data_set[index][0] for index in drawn(len(data_set), number)])


def drawn(length: int, number: int) -> list[int]:
    """So many of 0 to length - 1, or all where there are fewer: always the same."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(0))[:number].tolist()


@contextmanager
def preparing(request: Request) -> Iterator[None]:
    """What the disk refuses becomes a UserError; of a folder that cannot be written, it says what
    to do."""
    try:
        yield
    except OSError as error:  # no permission, a disk that fails or is full
        text = f"cannot prepare {request.name} in {request.data}: {error}"
        refused = error.errno in (errno.EROFS, errno.EACCES, errno.EPERM)
        if refused and isinstance(error.filename, str):
            folder = next(x for x in Path(error.filename).parents if x.exists())
            if not os.access(folder, os.W_OK):
                text += (
                    f": {folder} cannot be written; give another folder for what is made of the "
                    f"data with --cache_path (or {CACHE_PATH} in the environment, for every "
                    "command)"
                )
        raise UserError(text) from error


class Share(NamedTuple):
    """What a process takes of a data set, and how."""

    batch_size: int  # images
    rank: int = 0
    world_size: int = 1
    workers: int = 0  # processes that load images one by one, where that is needed


def training_loader(
    data_set: ImageSet, share: Share, device: torch.device = CPU
) -> "DeviceLoader | DataLoader":
    """A process's batches (images, labels int64), shuffled.

    Batch k of all processes together is the same set of images for any `world_size` with the same
    global batch batch_size · world_size. Images left over after the last global batch are dropped
    for this epoch. A data set smaller than one global batch gives one partial batch per process, of
    equal sizes: up to world_size − 1 images come twice.
    """
    # The sampler must drop too: padded to equal shares, two processes could get one batch more than
    # a single process.
    drop_last = len(data_set) >= share.batch_size * share.world_size
    order = Shuffled(data_set, share.world_size, share.rank, True, data_set.seed, drop_last)
    return _loader(data_set, order, drop_last, share, device)


def evaluation_loader(
    data_set: ImageSet, share: Share, device: torch.device = CPU, number: int | None = None
) -> "DeviceLoader | DataLoader":
    """Batches of images rank, rank + world_size, …: each exactly once over all processes, which may
    get different numbers of batches, even none: sum over processes after the loop. Of all images,
    or of `number` that are `drawn`."""
    order: Sequence[int] = range(len(data_set))
    if number is not None:
        order = sorted(drawn(len(data_set), number))
    return _loader(data_set, order[share.rank :: share.world_size], False, share, device)


def _loader(
    data_set: ImageSet,
    order: "Shuffled | Sequence[int]",
    drop_last: bool,
    share: Share,
    device: torch.device,
) -> "DeviceLoader | DataLoader":
    """Static images are kept and augmented on the device, where no loader can hold up a step;
    events and --augment auto need transforms of single images, in workers."""
    if data_set.step is None and isinstance(data_set.augment, CropAndFlip | None):
        return DeviceLoader(data_set, share.batch_size, order, drop_last, device)
    # Workers start anew each epoch (not persistent): they get their copy of the data set, with its
    # epoch, at their start.
    return DataLoader(
        data_set,
        share.batch_size,
        sampler=order,
        num_workers=share.workers,
        pin_memory=device.type == "cuda",
        drop_last=drop_last,
        worker_init_fn=ignore_signals,
        timeout=PATIENCE.total_seconds() if share.workers else 0,
        generator=torch.Generator(),  # leaves the global one alone: --resume restores its state
    )


def ignore_signals(worker: int) -> None:
    """Those that end a run are for the main process: it finishes its step, and needs its workers
    for that. Ctrl-C reaches the whole process group, Slurm's signals every process of a step."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class Shuffled(DistributedSampler):
    """A process's share of an epoch, from its image number `first` on; its length is the whole."""

    first = 0

    def __iter__(self) -> Iterator[int]:
        return islice(super().__iter__(), self.first, None)


class DeviceLoader:
    """Batches of images on the device.

    The same images in the same batches as a DataLoader's, and, where there is no augmentation, the
    same numbers. An epoch's augmentation is drawn for all images at once, from (seed, epoch): the
    number of processes does not change it. Images that would take more than a quarter of a GPU's
    memory stay where they are, and each batch is copied.
    """

    def __init__(
        self,
        data_set: ImageSet,
        batch_size: int,
        sampler: Shuffled | Sequence[int],
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
            yield pixels_of(images), self.labels[batch]


def set_epoch(loader: DeviceLoader | DataLoader, epoch: int, first_batch: int = 0) -> None:
    """Give the next pass over training batches the order and the augmentation of `epoch`, from its
    batch number `first_batch` on. The loader's length stays that of a whole epoch."""
    loader.sampler.set_epoch(epoch)
    loader.sampler.first = first_batch * loader.batch_size
    loader.dataset.epoch = epoch


def read_sample(path: str | Path, settings: Settings) -> np.ndarray:
    """A file as the network that was trained with these settings has those of its data set: uint8
    (C, H, W) of an image, counts (T, 2, H, W) of events as frames (.npz) or as they were recorded.

    An image of another size is scaled and cropped in the middle. Raises UserError for a file that
    is missing, damaged or of another kind.
    """
    data_set, path = settings.data_set, Path(path)
    if not os.path.isfile(path):
        is_folder = os.path.isdir(path)
        what = "is a folder, not a file" if is_folder else f"is no file{similar_path(path)}"
        raise UserError(f"{path} {what}")
    if not data_set.events:
        return read_image(path, data_set.image_size, gray=data_set.in_channels == 1)
    T, suffix, kind = settings.time_window, path.suffix.lower(), data_set.recordings
    if suffix == ".npz" and (holds_frames(path) or not kind.own):
        return read_frames(path, T, data_set.image_size).astype(np.float32)
    if suffix not in READERS:
        raise UserError(f"{path} is no file of events ({', '.join(READERS)}) or of {T} frames")
    return scaled(frames_of_file(path, T, kind), data_set.image_size).astype(np.float32)


def main(argv: Sequence[str] | None = None) -> int:
    """`python data_loader.py prepare`; returns the exit code."""
    goes_on = "interrupted: the same command goes on"
    return run_command("data_loader.py", lambda: prepare(argv), interrupted=goes_on)


def prepare(argv: Sequence[str] | None = None) -> None:
    """Make everything that a first training would have to make, and say what there is."""
    parser = Parser(
        prog="data_loader.py",
        description="Convert raw events to frames, fetch what can be fetched, pack the cache.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="prepare")
    command = commands.add_parser("prepare", allow_abbrev=False)
    add_option(command, "data").required = True
    for name in ("data_path", "cache_path", "time_window", "image_size", "sensor", "split_by"):
        add_option(command, name)
    skip = "leave damaged files of events out"
    command.add_argument("--skip_damaged", action="store_true", help=skip)
    given = vars(parser.parse_args(argv))
    del given["command"]
    skip, about = given.pop("skip_damaged"), DATA_SETS[given["data"]]
    for name in ("image_size", "sensor", "split_by"):
        if given.get(name) is not None and (refusal := OPTIONS[name].refusal(given)):
            raise UserError(f"--{name} {refusal}")
    if skip and about.recordings is None:
        raise UserError("--skip_damaged goes with raw events")
    settings = Settings.of(**given)
    check_settings(settings)
    request, skipped = request_of(settings), []
    with preparing(request):
        if about.recordings and (about.recordings.own or not event_cache(request).exists()):
            skipped = convert_events(request, skip)
        if skip:
            skipped += set_damaged_frames_aside(request)
    for text in skipped:
        print(f"data_loader.py: warning: skipped: {text}", file=sys.stderr)
    train, test = load_data_sets(settings)
    classes, images = len(torch.cat([train.labels, test.labels]).unique()), train.images
    print(
        f"{settings.data}: {len(train)} training and {len(test)} test samples of {classes} "
        f"classes, {tuple(images.shape[1:])} {str(images.dtype).removeprefix('torch.')} each"
    )
    if train.sensor is not None:
        print("camera: {}x{} pixels".format(*train.sensor))
    if (text := input_text(train)) is not None:
        print(text)


if __name__ == "__main__":
    sys.exit(main())
