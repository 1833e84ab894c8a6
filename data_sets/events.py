"""Data sets of events: archives of recordings, frames of event counts, their 8-bit codes."""

import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
from torch import Tensor

from data_sets.cache import Source, packed
from data_sets.event_camera import SENSOR, write_digit_events
from data_sets.recordings import (
    LARGEST_SENSOR,
    READERS,
    DamagedError,
    frames_of,
    read_array,
    read_events,
)
from data_sets.sources import (
    MADE,
    Archive,
    DataSet,
    Input,
    Recordings,
    Request,
    Samples,
    classes_below,
    files_of_classes,
    in_threads,
    whole_folder,
)
from runtime.errors import UserError
from runtime.files import file_lock

HIGHEST = 255  # code of the 8-bit input
BOUNDS = ((99, 2), (50, 64))  # percent, room: see input_of
MOST_VALUES = 2**24  # of training data that quantiles are taken of, and that are read at once

SITE = "https://www.garrickorchard.com/datasets"
CALTECH = Archive("Caltech101", "66201824eabb0239c7ab992480b50ba3", f"{SITE}/n-caltech101")
TRAIN = Archive("Train", "20959b8e626244a1b502305a9e6e2031", f"{SITE}/n-mnist")
TEST = Archive("Test", "69ca8762b2fe404d9b9bad1103e97832", f"{SITE}/n-mnist")
N_CALTECH101 = Recordings("N-Caltech101", (180, 240), {CALTECH.top: CALTECH}, one_in=10)
N_MNIST = Recordings(
    "N-MNIST", (34, 34), {TRAIN.top: TRAIN, TEST.top: TEST}, classes=tuple("0123456789")
)
DIGITS_DVS = Recordings(
    "Digits-DVS",
    SENSOR,
    {"extract/Caltech101": None},
    one_in=5,
    make=lambda root, caches, part: write_digit_events(caches / part),
)
OWN = Recordings("", None, {}, endings=tuple(READERS), own=True)
ONE_IN = 10  # of a class's recordings is for the test, where nothing else says which


def from_spikingjelly(data_set: str) -> Callable[[Path, Path, Path], None]:
    """What makes the parts of one of SpikingJelly's data sets, in the folder of events that it has
    too, with its own conversion."""

    def make(root: Path, caches: Path, part: Path) -> None:
        # Imported here: it takes seconds, and needs a torchaudio that fits torch.
        from spikingjelly import datasets

        theirs = getattr(datasets, data_set)
        download, extract = root / "download", root / "extract"
        if not extract.is_dir():
            extract = caches / "extract"
        names = [name for name, _, _ in theirs.resource_url_md5()]
        url = theirs.resource_url_md5()[0][1]
        if not extract.is_dir() and not all((download / name).is_file() for name in names):
            raise UserError(
                f"{data_set} is expected in {extract} (unpacked) or in {download} "
                f"({', '.join(names)}), and neither is there: get it from {url}"
            )
        try:
            if not extract.is_dir():
                with whole_folder(extract) as unfinished:
                    theirs.extract_downloaded_files(download, unfinished)
            with whole_folder(caches / part.parts[0]) as unfinished:
                theirs.create_raw_from_extracted(extract, unfinished)
        except Exception as error:  # what it raises depends on where the bytes stop making sense
            raise UserError(f"spikingjelly cannot convert {extract}: {error}") from error

    return make


CIFAR10_DVS = Recordings(
    "CIFAR10DVS",
    (128, 128),
    {"events_np": None},
    one_in=ONE_IN,
    endings=(".npz",),
    make=from_spikingjelly("CIFAR10DVS"),
)
DVS128_GESTURE = Recordings(
    "DVS128Gesture",
    (128, 128),
    {"events_np/train": None, "events_np/test": None},
    classes=tuple(map(str, range(11))),
    endings=(".npz",),
    make=from_spikingjelly("DVS128Gesture"),
)


def parts_of_own(root: Path) -> tuple[str, ...]:
    """The folders of the classes of a user's recordings: of training and test ones, or `root`."""
    with suppress(OSError):
        below = {x.name.lower(): x.name for x in root.iterdir() if x.is_dir()}
        if "train" in below:
            return below["train"], below.get("val") or below.get("test") or "val"
    return ("",)


def classes_of_own(data_path: str | Path) -> list[str]:
    """The classes of --data events."""
    return classes_below("events", Path(data_path), parts_of_own(Path(data_path)))


def found_recordings(kind: Recordings, root: Path) -> Recordings:
    """The recordings with the parts and classes that are found, where they are the user's own."""
    if not kind.own:
        return kind
    parts = parts_of_own(root)
    return kind._replace(
        parts=dict.fromkeys(parts),
        classes=tuple(classes_of_own(root)),
        one_in=ONE_IN if len(parts) == 1 else 0,
    )


def frames_folder(request: Request) -> Path:
    """The folder of the frames: beside the data where they are there, else where they are made."""
    kind, T = request.about.recordings, request.time_window
    name = f"frames_T{T}" if kind.own else f"frames_number_{T}_split"
    name += f"_by_{kind.split_by}"
    places = [x / kind.folder / name for x in (request.data, request.caches)]
    found = next(filter(Path.is_dir, places), places[-1])
    if kind.own and kind.sensor is not None and sensor_of(found) != kind.sensor:
        return request.caches / "{}-{}x{}".format(name, *kind.sensor)
    return found


def sensor_of(frames: Path) -> tuple[int, int] | None:
    """Height and width of the frames in a folder; None where there are none."""
    path = next(frames.rglob("[!.]*.npz"), None)
    return None if path is None else _frames_in(path).shape[2:]


def event_cache(request: Request) -> Path:
    name = "{}-{}x{}.json".format(frames_folder(request).name, *request.about.image_size)
    return request.caches / request.about.recordings.folder / name


def events(request: Request) -> Samples:
    """N-Caltech101, N-MNIST (Orchard et al. 2015) or data like them, as frames of event counts, T
    per sample.

    The split, the same on every machine: that of the data set, where it has two parts; else, of a
    class's n file names in code-point order, the last max(1, ⌊n/10⌋) (digits-dvs: ⌊n/5⌋) are test
    files and those before them training files; a class with a single file has it in the training
    set. Label = place of the class's folder name in code-point order.
    """
    frames, index = frames_folder(request), event_cache(request)
    if request.about.recordings.own:
        convert_events(request)
    elif not frames.is_dir() and not index.exists():
        if any(request.about.recordings.parts.values()):
            beside = {request.data / index.parent.name, index.parent}
            split_by = request.about.recordings.split_by
            found = sorted(x.name for y in beside for x in y.glob(f"frames_number_*_by_{split_by}"))
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
    sensor = sensor_of(frames) if request.about.recordings.own else None
    return Samples(*parts, classes, whole=(images, labels), input=found, sensor=sensor)


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


def frames_of_recordings(
    recordings: Recordings, num_classes: int, image_size: tuple[int, int], batch_size: int
) -> DataSet:
    """The data set of a camera's recordings, by default as 10 frames."""
    about = {"time_window": 10, "batch_size": batch_size, "events": True, "any_size": True}
    return DataSet(events, num_classes, 2, image_size, recordings=recordings, **about)


def _remedy(request: Request) -> str:
    rest = f" --cache_path {request.caches}" if request.caches != request.data else ""
    split_by = request.about.recordings.split_by
    rest += f" --split_by {split_by}" if split_by != "number" else ""
    return (
        f"run python data_loader.py prepare --data {request.name} --data_path {request.data} "
        f"--time_window {request.time_window}{rest}"
    )


def _files_of(
    request: Request, root: Path, endings: tuple[str, ...], remedy: str, remove: str
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
    found = files_of_classes(request.name, root, classes or sorted(below), endings, known=MADE)
    for name, files in found.items():
        if not files:
            do = remedy if classes else remove
            raise UserError(f"{root / name} holds no files *{' *'.join(endings)}: {do}")
    return found


def _find_frames(request: Request) -> Source:
    """All training files, then all test files."""
    kind, root = request.about.recordings, frames_folder(request)
    _refuse_unfinished(root)
    again = f"remove {root} and " + _remedy(request)
    train, test = [], []
    for of_test, folder in enumerate(kind.frames(root).values()):  # where there are two parts
        of_class = _files_of(request, folder, (".npz",), again, f"remove it, or {again}")
        most = request.about.num_classes or len(kind.classes)
        if not 1 <= len(of_class) <= most:
            raise UserError(f"{folder} holds {len(of_class)} classes, {request.name} has {most}")
        for label, files in enumerate(of_class.values()):
            found = [(str((folder / x).relative_to(root)), label) for x in files]
            first_test = 0 if of_test else len(found) - kind.test_share(len(found))
            train += found[:first_test]
            test += found[first_test:]
    return Source([*of_class], train + test)


def _frames_in(path: Path) -> np.ndarray:
    """The array named frames of a .npz, (T, 2, H, W). Raises DamagedError where it is none."""
    again = "remove it and convert its events again"
    try:
        with zipfile.ZipFile(path) as arrays, arrays.open("frames.npy") as file:
            frames = read_array(file)
    except KeyError:
        raise DamagedError(f"{path} holds no array named frames: {again}") from None
    except Exception as error:  # what numpy raises depends on where the bytes stop making sense
        raise DamagedError(f"{path} cannot be read ({error}): {again}") from error
    shape = frames.shape
    if len(shape) != 4 or shape[1] != 2 or not frames.size or frames.dtype.kind not in "fuib":
        raise DamagedError(
            f"{path} holds {frames.dtype} of shape {shape}, not frames (T, 2, H, W): {again}"
        )
    return frames


def read_frames(path: Path, time_window: int, size: tuple[int, int] | None = None) -> np.ndarray:
    """Event counts (T, 2, *size) of a file that SpikingJelly wrote, or data_loader.py; without a
    size those of all pixels.

    Nearest neighbour: a pixel of the sensor in (H / height) · (W / width) is kept, so that counts
    stay whole. Raises UserError for a damaged file, for frames of another T, and for negative,
    infinite or undefined numbers anywhere in them.
    """
    frames = _frames_in(path)
    shape, again = frames.shape, "remove it and convert its events again"
    if shape[0] != time_window:
        raise UserError(
            f"{path} holds frames of another T: got {shape[0]}, --time_window says {time_window}"
        )
    if not (frames.min() >= 0 and frames.max() <= np.finfo(np.float32).max):  # NaN is neither
        raise DamagedError(f"{path} holds negative, infinite or undefined numbers (NaN): {again}")
    frames = frames if size is None else scaled(frames, size)
    if ((frames > 0) & (frames < np.finfo(np.float32).tiny)).any():
        raise DamagedError(f"{path} holds numbers too small for 32 bits: scale the frames")
    return frames


def scaled(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Frames (T, 2, *size): of a pixel's neighbours in the sensor the nearest one, see
    read_frames."""
    H, W = frames.shape[2:]
    rows, columns = (np.arange(side) * n // side for side, n in zip(size, (H, W), strict=True))
    return frames[..., rows[:, None], columns]


def convert_events(request: Request, skip_damaged: bool = False) -> list[str]:
    """Make frames of the raw events, split as SpikingJelly does, on all cores.

    A conversion that was stopped goes on where it was. Frames that are there are used as they are;
    of the user's own recordings, those of files that have changed are made anew. Returns the
    damaged files that were skipped; without `skip_damaged` the first one raises UserError.
    """
    kind, T, frames = request.about.recordings, request.time_window, frames_folder(request)
    _refuse_unfinished(frames)
    found = _find_events(request) if kind.own else None  # before there is a lock beside them

    def is_made() -> bool:
        return frames.is_dir() and (not kind.own or _are_of(frames, _targets(kind, frames, found)))

    if is_made():
        if not kind.own:
            print(f"{frames} is there already: remove it to convert its events again")
        return []
    frames.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(frames):
        if is_made():
            return []  # by the process that was waited for
        unfinished = frames.with_name(f"{frames.name}.unfinished")
        if frames.is_dir():
            shutil.rmtree(unfinished, ignore_errors=True)
            frames.rename(unfinished)
        targets = _targets(kind, unfinished, found or _find_events(request))
        if kind.sensor is None:
            kind = kind._replace(sensor=_measured([*targets.values()], skip_damaged))
        if kind.own and sensor_of(unfinished) not in (None, kind.sensor):
            shutil.rmtree(unfinished)
        for path in unfinished.rglob("*"):  # of files that are no longer there
            if path not in targets and not path.is_dir():
                path.unlink()
        for target in targets:
            target.parent.mkdir(parents=True, exist_ok=True)
        skipped = []

        def convert(target: Path) -> None:
            try:
                convert_file(targets[target], target, T, kind)
            except DamagedError as error:
                if not skip_damaged:
                    raise _with_remedy(error) from None
                target.unlink(missing_ok=True)
                skipped.append(str(error))
                if kind.own:
                    _date(_aside(target), b"", targets[target])

        for _ in in_threads(convert, list(targets), f"converting events to {T} frames"):
            pass
        for folder in sorted(unfinished.rglob("*"), reverse=True):
            with suppress(OSError):  # of classes that are gone or that had only damaged files
                folder.rmdir()
        unfinished.rename(frames)
    return sorted(skipped)


def _targets(kind: Recordings, folder: Path, found: list[tuple[str, Path]]) -> dict[Path, Path]:
    """The file of frames in `folder` of each recording (part, file)."""
    parts, targets = kind.frames(folder), {}
    for part, path in found:
        target = parts[part] / path.parent.name / f"{path.stem}.npz"
        if target in targets:
            raise UserError(
                f"{targets[target]} and {path} have one name: rename one, or remove it if they are "
                "the same recording"
            )
        targets[target] = path
    return targets


def _are_of(frames: Path, targets: dict[Path, Path]) -> bool:
    """Whether the frames are those of the recordings as they are now; of a damaged one they are set
    aside."""
    made = {
        path.with_name(path.name.removesuffix(".damaged")): path.stat().st_mtime_ns
        for path in frames.rglob("*.npz*")
    }
    return made == {target: _date_for(path) for target, path in targets.items()}


def _date_for(source: Path) -> int:
    """The date of what is made of a file, ns: its own, and later by its length, so that a file of
    another length is told from it though it has the same date."""
    stat = source.stat()
    return stat.st_mtime_ns + stat.st_size % 1021 * 2 * 10**9  # every file system keeps 2 s


def _measured(recordings: list[Path], skip_damaged: bool) -> tuple[int, int]:
    """Height and width of the camera: what its files say of it, and their farthest events."""

    def size(path: Path) -> tuple[int, int]:
        try:
            events = read_events(path)
            seen = int(events.y.max()) + 1, int(events.x.max()) + 1
            if max(seen) > LARGEST_SENSOR:
                raise DamagedError(
                    f"{path} is damaged: it has an event in row {seen[0] - 1}, column {seen[1] - 1}"
                )
        except DamagedError as error:
            if not skip_damaged:
                raise _with_remedy(error) from None
            return 0, 0
        return tuple(map(max, zip(seen, events.sensor or seen, strict=True)))

    H, W = 0, 0
    for height, width in in_threads(size, recordings, "measuring the camera"):
        H, W = max(H, height), max(W, width)
    return H, W


def _with_remedy(error: DamagedError) -> DamagedError:
    return DamagedError(
        f"{error}: remove it, or leave it out with data_loader.py prepare --skip_damaged"
    )


def _aside(frames: Path) -> Path:
    return frames.with_name(f"{frames.name}.damaged")


def set_damaged_frames_aside(request: Request) -> list[str]:
    """Rename frames that cannot be read to *.npz.damaged, which nobody reads; what was wrong."""
    kind, aside = request.about.recordings, []
    frames = frames_folder(request)

    def check(path: Path) -> None:
        try:
            read_frames(path, request.time_window)
        except DamagedError as error:
            path.rename(_aside(path))
            aside.append(str(error))

    files = sorted(path for x in kind.frames(frames).values() for path in x.glob("*/[!.]*.npz"))
    for _ in in_threads(check, files, "checking frames"):
        pass
    return sorted(aside)


def _find_events(request: Request) -> list[tuple[str, Path]]:
    """(part, file of events) of all parts, unpacked or made first where they are missing."""
    kind = request.about.recordings
    folders = {part: request.data / part for part in kind.parts}
    if not kind.own:
        folders = _folders_of_parts(request)
    events = []
    for part, folder in folders.items():
        archive, remedy = kind.parts[part], "fill or remove it"
        again = f"unpack {archive.name} of {archive.url} again" if archive else remedy
        of_class = _files_of(request, folder, kind.endings, again, remedy)
        events += [(part, folder / x) for files in of_class.values() for x in files]
    if not events:
        raise UserError(f"{folder} holds no classes CLASS/*{' '.join(kind.endings)}")
    return events


def _folders_of_parts(request: Request) -> dict[str, Path]:
    """The folder of classes of each part."""
    data, kind = request.name, request.about.recordings
    root, caches = request.data / kind.folder, request.caches / kind.folder
    sources, made = {}, {}  # all are looked for before one is unpacked: that takes long
    for part, archive in kind.parts.items():
        made[part] = caches / "extract" / part if archive else caches / part
        folders = [root / "extract" / part, root / part, made[part]]
        archives = [folder / archive.name for folder in (root / "download", root) if archive]
        found = [*filter(Path.is_dir, folders), *filter(Path.is_file, archives)]
        sources[part] = found[0] if found else None
        if archive and sources[part] is None:
            raise UserError(
                f"{data} is expected in {root / part}/CLASS/*.bin or in {archives[0]}, and neither "
                f"is there: get {archive.name} from {archive.url}"
            )
    for part, archive in kind.parts.items():
        if sources[part] is not None and sources[part].is_dir():
            made[part] = sources[part]
        elif not made[part].is_dir():
            # What is made is made whole, also where that is of two parts.
            whole = made[part] if archive else caches / Path(part).parts[0]
            whole.parent.mkdir(parents=True, exist_ok=True)
            with file_lock(whole):
                if archive and not made[part].is_dir():
                    archive.unpack(sources[part], made[part])
                elif not made[part].is_dir():
                    kind.make(root, caches, Path(part))
    return made


def convert_file(path: Path, target: Path, time_window: int, kind: Recordings) -> None:
    """Write the frames of a recording, dated by it, unless they are there."""
    if not target.exists() or target.stat().st_mtime_ns != _date_for(path):
        content = BytesIO()
        np.savez_compressed(content, frames=frames_of_file(path, time_window, kind))
        _date(target, content.getbuffer(), path)


def _date(target: Path, content: bytes | memoryview, source: Path) -> None:
    """Write a file that is dated by its source."""
    date, temporary = _date_for(source), target.with_name(f"{target.name}.tmp")
    temporary.write_bytes(content)
    os.utime(temporary, ns=(date, date))
    temporary.rename(target)


def frames_of_file(path: Path, time_window: int, kind: Recordings) -> np.ndarray:
    """Counts (T, 2, H, W) of a recording. Raises DamagedError where it is damaged, or not of the
    camera."""
    events = read_events(path)
    # By number, SpikingJelly takes events as they lie: frames of its data sets are to be its own.
    if kind.own or kind.split_by != "number":
        events = events.in_order()
    try:
        return frames_of(events, time_window, kind.sensor, kind.split_by)
    except ValueError as error:
        raise DamagedError(f"{path} is damaged: {error}") from None


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
