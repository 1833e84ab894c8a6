"""Data sets of events: archives of recordings, frames of event counts, their 8-bit codes."""

import os
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Lock
from typing import IO

import numpy as np
from numpy.lib import format as npy
from torch import Tensor

from data_sets.cache import Source, packed
from data_sets.event_camera import SENSOR, write_digit_events
from data_sets.sources import (
    Archive,
    DataSet,
    Input,
    Recordings,
    Request,
    Samples,
    files_of_classes,
    in_threads,
)
from runtime.errors import UserError
from runtime.files import file_lock

HIGHEST = 255  # code of the 8-bit input
BOUNDS = ((99, 2), (50, 64))  # percent, room: see input_of
MOST_VALUES = 2**24  # of training data that quantiles are taken of, and that are read at once


_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
_HEADER = Lock()


class DamagedError(UserError):
    """A file of events or frames that cannot be used; --skip_damaged goes on without it."""


SITE = "https://www.garrickorchard.com/datasets"
CALTECH = Archive(
    "Caltech101.zip", "Caltech101", "66201824eabb0239c7ab992480b50ba3", f"{SITE}/n-caltech101"
)
TRAIN = Archive("Train.zip", "Train", "20959b8e626244a1b502305a9e6e2031", f"{SITE}/n-mnist")
TEST = Archive("Test.zip", "Test", "69ca8762b2fe404d9b9bad1103e97832", f"{SITE}/n-mnist")
N_CALTECH101 = Recordings("N-Caltech101", (180, 240), {CALTECH.top: CALTECH}, one_in=10)
N_MNIST = Recordings(
    "N-MNIST", (34, 34), {TRAIN.top: TRAIN, TEST.top: TEST}, classes=tuple("0123456789")
)
DIGITS_DVS = Recordings("Digits-DVS", SENSOR, {"Caltech101": None}, one_in=5)


def frames_folder(request: Request) -> Path:
    """The folder of the frames: beside the data where they are there, else where they are made."""
    name = f"frames_number_{request.time_window}_split_by_number"
    places = [x / request.about.recordings.folder / name for x in (request.data, request.caches)]
    return next(filter(Path.is_dir, places), places[-1])


def event_cache(request: Request) -> Path:
    name = "{}-{}x{}.json".format(frames_folder(request).name, *request.about.image_size)
    return request.caches / request.about.recordings.folder / name


def events(request: Request) -> Samples:
    """N-Caltech101, N-MNIST (Orchard et al. 2015) or data like them, as frames of event counts, T
    per sample.

    The split, the same on every machine: N-MNIST's own; else, of a class's n file names in
    code-point order, the last max(1, ⌊n/10⌋) (digits-dvs: ⌊n/5⌋) are test files and those before
    them training files; a class with a single file has it in the training set. Label = place of the
    class's folder name in code-point order.
    """
    frames, index = frames_folder(request), event_cache(request)
    if not frames.is_dir() and not index.exists():
        if any(request.about.recordings.parts.values()):
            beside = {request.data / index.parent.name, index.parent}
            found = sorted(x.name for y in beside for x in y.glob("frames_number_*_by_number"))
            raise UserError(
                f"{request.name} with --time_window {request.time_window} is expected in {frames}, "
                f"which is missing (found there: {', '.join(found) or 'no frames'}): "
                f"{_remedy(request)}"
            )
        convert_events(request)
    images, labels, classes, found = packed(
        index,
        frames,
        partial(_find_frames, request),
        partial(read_frames, time_window=request.time_window, size=request.about.image_size),
        request.about.input_shape(request.time_window),
        partial(_measure, request),
    )
    n = _training_samples(request, labels)
    parts = (images[:n], labels[:n]), (images[n:], labels[n:])
    return Samples(*parts, classes, whole=(images, labels), input=found)


def _training_samples(request: Request, labels: Tensor) -> int:
    """How many of the samples, the first ones, are for the training."""
    kind = request.about.recordings
    if not kind.one_in:  # the last class of the training files, then the first of the others
        return int(labels.diff().argmin()) + 1
    tests = sum(kind.test_share(n) for n in labels.bincount().tolist())
    if not tests:
        raise UserError(f"{frames_folder(request)} holds no class of two files or more")
    return len(labels) - tests


def _measure(request: Request, images: np.ndarray, labels: Tensor) -> Input:
    """The 8-bit input of the training frames. Raises UserError where these are all 0."""
    train = images[: _training_samples(request, labels)]
    if not any(part.any() for part in _parts(train, np.arange(len(train)))):
        size = "{}x{}".format(*request.about.image_size)
        raise UserError(
            f"the training frames in {frames_folder(request)} are all 0 (at --image_size {size}): "
            "convert the events again, or take a larger --image_size"
        )
    return input_of(train)


def frames_of(
    recordings: Recordings, num_classes: int, image_size: tuple[int, int], batch_size: int
) -> DataSet:
    """The data set of a camera's recordings, by default as 10 frames."""
    about = {"time_window": 10, "batch_size": batch_size, "events": True, "any_size": True}
    return DataSet(events, num_classes, 2, image_size, recordings=recordings, **about)


def _remedy(request: Request) -> str:
    caches = f" --cache_path {request.caches}" if request.caches != request.data else ""
    return (
        f"run python data_loader.py prepare --data {request.name} --data_path {request.data} "
        f"--time_window {request.time_window}{caches}"
    )


def _files_of(
    request: Request, root: Path, ending: str, remedy: str, remove: str
) -> dict[str, list[str]]:
    """The files of each class in `root`. Raises UserError where a class is missing that the data
    set has, and where one has no files: with the remedy, and with `remove` where it may go."""
    classes = request.about.recordings.classes
    missing = [name for name in classes if not (root / name).is_dir()]
    if missing:
        what = "is missing" if not root.is_dir() else f"lacks {', '.join(missing)}"
        raise UserError(
            f"{request.name} is expected in {root}/CLASS/*, but {root} {what}: {remedy}"
        )
    below = (path.name for path in root.iterdir() if path.is_dir() and path.name[0] != ".")
    found = files_of_classes(request.name, root, classes or sorted(below), (ending,))
    for name, files in found.items():
        if not files:
            do = remedy if classes else remove
            raise UserError(f"{root / name} holds no files *{ending}: {do}")
    return found


def _find_frames(request: Request) -> Source:
    """All training files, then all test files."""
    kind, root = request.about.recordings, frames_folder(request)
    _refuse_unfinished(root)
    again = f"remove {root} and " + _remedy(request)
    train, test = [], []
    for of_test, folder in enumerate(kind.frames(root).values()):  # where there are two parts
        of_class = _files_of(request, folder, ".npz", again, f"remove it, or {again}")
        most = request.about.num_classes
        if not 1 <= len(of_class) <= most:
            raise UserError(f"{folder} holds {len(of_class)} classes, {request.name} has {most}")
        for label, files in enumerate(of_class.values()):
            found = [(str((folder / x).relative_to(root)), label) for x in files]
            first_test = 0 if of_test else len(found) - kind.test_share(len(found))
            train += found[:first_test]
            test += found[first_test:]
    return Source([*of_class], train + test)


def _read_array(file: IO[bytes]) -> np.ndarray:
    """The array of a .npy file; its header by one thread at a time.

    NumPy parses it as Python, which other threads may disturb before Python 3.13: now and then an
    intact file was a SystemError (https://github.com/python/cpython/issues/106905).
    """
    with _HEADER:
        read_header = _HEADERS[npy.read_magic(file)]
        shape, column_major, dtype = read_header(file)
    return np.frombuffer(file.read(), dtype).reshape(shape, order="F" if column_major else "C")


def read_frames(path: Path, time_window: int, size: tuple[int, int]) -> np.ndarray:
    """Event counts (T, 2, *size) of a file that SpikingJelly wrote, or data_loader.py.

    Nearest neighbour: a pixel of the sensor in (H / height) · (W / width) is kept, so that counts
    stay whole. Raises UserError for a damaged file, for frames of another T, and for negative,
    infinite or undefined numbers anywhere in them.
    """
    again = "remove it and convert its events again"
    try:
        with zipfile.ZipFile(path) as arrays, arrays.open("frames.npy") as file:
            frames = _read_array(file)
    except KeyError:
        raise DamagedError(f"{path} holds no array named frames: {again}") from None
    except Exception as error:  # what numpy raises depends on where the bytes stop making sense
        raise DamagedError(f"{path} cannot be read ({error}): {again}") from error
    shape = frames.shape
    if len(shape) != 4 or shape[1] != 2 or not frames.size or frames.dtype.kind not in "fuib":
        raise DamagedError(
            f"{path} holds {frames.dtype} of shape {shape}, not frames (T, 2, H, W): {again}"
        )
    if shape[0] != time_window:
        raise UserError(
            f"{path} holds frames of another T: got {shape[0]}, --time_window says {time_window}"
        )
    if not (frames.min() >= 0 and frames.max() <= np.finfo(np.float32).max):  # NaN is neither
        raise DamagedError(f"{path} holds negative, infinite or undefined numbers (NaN): {again}")
    rows, columns = (np.arange(side) * n // side for side, n in zip(size, shape[2:], strict=True))
    frames = frames[..., rows[:, None], columns]
    if ((frames > 0) & (frames < np.finfo(np.float32).tiny)).any():
        raise DamagedError(f"{path} holds numbers too small for 32 bits: scale the frames")
    return frames


def convert_events(request: Request, skip_damaged: bool = False) -> list[str]:
    """Make frames of the raw events, split by number of events, with SpikingJelly on all cores.

    A conversion that was stopped goes on where it was. Returns the damaged files that were skipped;
    without `skip_damaged` the first one raises UserError.
    """
    kind, T, frames = request.about.recordings, request.time_window, frames_folder(request)
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
            kind.frames(unfinished)[part] / path.parent.name / f"{path.stem}.npz": path
            for part, path in _find_events(request)
        }
        for path in unfinished.rglob("*"):  # of files that are no longer there
            if path not in targets and not path.is_dir():
                path.unlink()
        for target in targets:
            target.parent.mkdir(parents=True, exist_ok=True)
        skipped = []

        def convert(target: Path) -> None:
            try:
                convert_file(targets[target], target, T, kind.sensor)
            except DamagedError as error:
                if not skip_damaged:
                    raise
                target.unlink(missing_ok=True)
                skipped.append(str(error))

        for _ in in_threads(convert, list(targets), f"converting events to {T} frames"):
            pass
        for folder in sorted(unfinished.rglob("*"), reverse=True):
            with suppress(OSError):  # of classes that are gone or that had only damaged files
                folder.rmdir()
        unfinished.rename(frames)
    return sorted(skipped)


def set_damaged_frames_aside(request: Request) -> list[str]:
    """Rename frames that cannot be read to *.npz.damaged, which nobody reads; what was wrong."""
    kind, aside = request.about.recordings, []

    def check(path: Path) -> None:
        try:
            read_frames(path, request.time_window, kind.sensor)
        except DamagedError as error:
            path.rename(path.with_name(f"{path.name}.damaged"))
            aside.append(str(error))

    folders = kind.frames(frames_folder(request)).values()
    files = sorted(path for folder in folders for path in folder.glob("*/[!.]*.npz"))
    for _ in in_threads(check, files, "checking frames"):
        pass
    return sorted(aside)


def _find_events(request: Request) -> list[tuple[str, Path]]:
    """(part, file CLASS/*.bin) of all parts, unpacked or made first where they are missing."""
    data, kind = request.name, request.about.recordings
    root, made = request.data / kind.folder, request.caches / kind.folder / "extract"
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
                    write_digit_events(extracted)
        remedy = f"unpack {archive.name} of {archive.url} again" if archive else "remove it"
        of_class = _files_of(request, extracted, ".bin", remedy, "fill or remove it")
        events += [(part, extracted / x) for files in of_class.values() for x in files]
    if not events:
        raise UserError(f"{extracted} holds no classes CLASS/*.bin")
    return events


def convert_file(path: Path, target: Path, time_window: int, sensor: tuple[int, int]) -> None:
    """Write the frames of one file of events of a camera of (height, width) pixels, dated as it is,
    unless they are there."""
    # Imported here: it takes seconds, and needs a torchaudio that fits torch.
    from spikingjelly.datasets import utils

    stat, (H, W) = path.stat(), sensor
    if target.exists() and target.stat().st_mtime_ns == stat.st_mtime_ns:
        return
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


def _refuse_unfinished(frames: Path) -> None:
    marker = frames.with_name(f"{frames.name}.building")
    if marker.exists():
        raise UserError(
            f"{marker} says that SpikingJelly did not finish {frames}: remove both and start again"
        )


def input_of(
    train: np.ndarray,
    rows: np.ndarray | None = None,
    bounds: tuple[tuple[int, int], ...] = BOUNDS,
) -> Input:
    """The 8-bit input that fits training frames (N, …), of which `rows` are used (None: all), and
    them alone: nothing of a test is seen.

    Whole numbers of at most 255 are their own codes: the step is 1. Otherwise the highest code is
    for the least of the largest value and, for each (percent, room) of `bounds`, `room` times the
    value that so many of the non-zero ones do not exceed: a hot pixel of 60,000 events shall not
    round the others to nothing (`python -m experiments.input_step` compares other bounds). Whole
    numbers never get a step below 1. Quantiles are actual values of the data, of evenly spaced
    samples where all are more than MOST_VALUES.
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
        places = [-(-percent * values.size // 100) - 1 for percent, _ in bounds]
        quantiles = np.partition(values, places)[places].tolist()
        rooms = (room for _, room in bounds)
        reach = min(largest, *(room * x for room, x in zip(rooms, quantiles, strict=True)))
    step = max(reach / HIGHEST, 1.0 if whole else 0.0)
    above = sum(np.count_nonzero(part > (HIGHEST + 0.5) * step) for part in _parts(train, rows))
    return Input(step, above / sum(np.count_nonzero(part) for part in _parts(train, rows)))


def _parts(array: np.ndarray, rows: np.ndarray) -> Iterator[np.ndarray]:
    """Rows of the array, a few at a time: mapped from a file, all may be larger than the memory."""
    number = max(1, MOST_VALUES // array[0].size)
    for start in range(0, len(rows), number):
        yield array[rows[start : start + number]]
