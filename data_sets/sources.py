"""What the rooms share: how a data set is declared, asked for and found on the disk."""

import hashlib
import os
import re
import shutil
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException
from itertools import permutations
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from tqdm import tqdm

from runtime.command import similar_path
from runtime.errors import UserError
from runtime.files import file_lock
from runtime.processes import is_main_process, usable_cores


@dataclass(frozen=True)
class DataSet:
    """A data set: how it is read, what a network must know of it, its recipe's defaults."""

    read: Callable[["Request"], "Samples"]
    num_classes: int  # 0: as many as `classes_of` finds
    in_channels: int
    image_size: tuple[int, int]  # pixels, height and width
    time_window: int = 4
    batch_size: int = 256
    events: bool = False  # frames (T, C, H, W) instead of one image (C, H, W)
    any_size: bool = False  # --image_size may say another one
    augmented: bool = True  # --augment has a meaning
    recordings: "Recordings | None" = None  # what frames of events are made of
    # Of the user's own data: the classes in the folder of the data.
    classes_of: Callable[[str | Path], list[str]] | None = None

    @property
    def image_step(self) -> float:
        """What one code of the 8-bit input stands for, where no input step was found."""
        return 1.0 if self.events else 1 / 255

    def input_shape(self, time_window: int) -> tuple[int, ...]:
        """(C, H, W) of an image; (T, C, H, W) of a sample of events."""
        frames = (time_window,) if self.events else ()
        return (*frames, self.in_channels, *self.image_size)


class Request(NamedTuple):
    """Which samples are wanted: all that the function that reads a data set is given."""

    name: str
    about: DataSet  # with the image size that is wanted
    data: Path  # the folder where data lie
    caches: Path  # the folder where what is made of them goes: caches, converted events
    time_window: int  # T, of events


class Input(NamedTuple):
    """How event frames become the 8-bit input of the networks."""

    step: float  # what one code stands for
    clipped: float  # share of the non-zero training values that lie above the highest code


# Folders of frames of a user's recordings, which are no classes, and what was set aside in them.
MADE = re.compile(r"frames_T\d+_by_.*|.*\.npz\.damaged")
Labelled = tuple[Tensor, Sequence[int]]


class Samples(NamedTuple):
    """What is read of a data set: images (N, C, H, W), uint8, or event counts (N, T, 2, H, W), and
    a label from 0 on for each."""

    train: Labelled
    test: Labelled
    classes: list[str]  # the labels' names
    whole: Labelled | None = None  # all samples, where they have an order or an array of their own
    input: Input | None = None  # of events; None: the one that fits the training frames
    sensor: tuple[int, int] | None = None  # of the user's own events: height and width of frames


class Archive(NamedTuple):
    """A zip file that is only unpacked where it is the one that was published."""

    top: str  # the only folder in it, whose name it has
    md5: str
    url: str

    @property
    def name(self) -> str:
        return f"{self.top}.zip"

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
                files.extract(name, unfinished)


class Recordings(NamedTuple):
    """Recordings CLASS/* of events, below one folder or two."""

    folder: str
    sensor: tuple[int, int] | None  # height and width of the camera, pixels; None: measured
    # The folders of classes, of all files or of the training and of the test files, and what each
    # is unpacked from; None: `make` makes it.
    parts: dict[str, Archive | None]
    one_in: int = 0  # of a class's files is for the test, where all are in one part
    classes: tuple[str, ...] = ()  # that every part has; of none, those that are found
    endings: tuple[str, ...] = (".bin",)
    # Of the data set's folder, that of what is made of it, and the missing part.
    make: Callable[[Path, Path, Path], None] | None = None
    own: bool = False  # the user's: parts and classes are those that are found
    split_by: str = "number"  # into frames, as SpikingJelly does: recordings.frames_of

    def test_share(self, files: int) -> int:
        """How many of a class's files are for the test."""
        return max(1, files // self.one_in) if self.one_in and files > 1 else 0

    def frames(self, root: Path) -> dict[str, Path]:
        """The folder of classes of each part's frames, below the folder of all frames: where there
        are two, in lower case, as SpikingJelly names them."""
        two = len(self.parts) > 1
        return {part: root / Path(part).name.lower() if two else root for part in self.parts}


@contextmanager
def getting(request: Request, target: Path, archive: Path, remedy: str) -> Iterator[None]:
    """Be the only process that gets `target` where it is missing; a failure leaves nothing new and
    is a UserError that ends with the remedy."""
    new_folders = [path for path in (request.data, *request.data.parents) if not path.exists()]
    try:
        if target.exists():  # perhaps in a folder that cannot be written
            yield
            return
        request.data.mkdir(parents=True, exist_ok=True)
        with file_lock(target), ExitStack() as new:
            if not archive.exists():
                new.callback(archive.unlink, missing_ok=True)
            if not target.exists():
                new.callback(shutil.rmtree, target, ignore_errors=True)
            yield
            new.pop_all()
    except BaseException as error:
        for path in new_folders:
            with suppress(OSError):  # never made, or no longer empty
                path.rmdir()
        if not isinstance(error, OSError | HTTPException | RuntimeError):  # the last: a wrong md5
            raise
        reason = " ".join(str(error).split())
        raise UserError(
            f"{request.name} is expected in {target}, which is missing or damaged, and getting it "
            f"failed ({reason}): {remedy}"
        ) from error


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


def files_below(root: Path) -> tuple[list[str], Counter[str]]:
    """(names of the files below `root`, relative to it and sorted; what else is there, counted).

    Links to folders are followed, and each folder is entered once, under the name that is no link
    where it has one, else under the one that is least deep: links in a circle end, no image gets
    two classes, and a class that is a link keeps its images. Hidden files and folders are left
    alone.
    """
    seen = {x.resolve() for x in (*root.absolute().parents, *root.resolve().parents)}
    files, other, links = [], Counter(), [root]

    def unreadable(error: OSError) -> None:
        other["unreadable folders"] += 1

    while links:
        links.sort(key=lambda link: (len(link.parts), link))
        for name, folders, names in os.walk(links.pop(0), onerror=unreadable):  # follows no link
            folder = Path(name)
            if folder.resolve() in seen:
                other["links to folders that are read already"] += 1
                folders.clear()
                continue
            seen.add(folder.resolve())
            other["hidden"] += sum(x.startswith(".") for x in folders + names)
            folders[:] = [x for x in folders if not x.startswith(".")]
            links += [folder / x for x in folders if (folder / x).is_symlink()]
            for path in (folder / x for x in names if not x.startswith(".")):
                if path.is_file():
                    files.append(str(path.relative_to(root)))
                else:
                    other["broken links" if path.is_symlink() else "pipes or devices"] += 1
    return sorted(files), +other


def classes_below(data: str, root: Path, parts: Sequence[str]) -> list[str]:
    """The classes of a user's own data: the names of the folders in each part, in code-point order.
    Raises UserError where the parts have different ones, or less than two."""
    expected = f"--data {data} expects " + " and ".join(f"{root / x}/CLASS/*" for x in parts)
    names = {}
    for part in parts:
        try:
            folders = [x.name for x in (root / part).iterdir() if x.is_dir()]
        except OSError as error:
            meant = similar_path(root, folder=True) if not root.exists() else ""
            raise UserError(
                f"{expected}: cannot read {root / part} ({error.strerror}){meant}"
            ) from None
        names[part] = sorted(x for x in folders if not (x.startswith(".") or MADE.fullmatch(x)))
    for part, other in permutations(parts, 2):
        missing = sorted(set(names[other]) - set(names[part]))
        if missing:
            raise UserError(
                f"{root / part} lacks {len(missing)} of the classes of {root / other}: "
                f"{', '.join(missing[:5])}{' …' if len(missing) > 5 else ''}"
            )
    if len(names[parts[0]]) < 2:
        raise UserError(f"{expected} with two classes or more, found {len(names[parts[0]])}")
    return names[parts[0]]


def files_of_classes(
    data: str,
    root: Path,
    classes: Sequence[str],
    endings: Sequence[str],
    deep: bool = False,
    known: re.Pattern = re.compile("(?!)"),
) -> dict[str, list[str]]:
    """Sorted names, relative to `root`, of each class's files CLASS/* (`deep`: anywhere below
    CLASS) with one of the endings. Says, once, how many other files and things are there that are
    not `known`."""
    of_class: dict[str, list[str]] = {name: [] for name in classes}
    files, other = files_below(root)
    for path in files:
        folder, _, name = path.partition("/")
        belongs = name and (deep or "/" not in name) and name.lower().endswith(tuple(endings))
        if belongs and folder in of_class:
            of_class[folder].append(path)
        elif not known.fullmatch(path):
            other[Path(path).suffix.lower()[:12] or "no ending"] += 1
    if other and is_main_process():
        counted = ", ".join(f"{kind} {number}" for kind, number in other.most_common(8))
        text = (
            f"{data}: {other.total()} of the files and folders in {root} are not read ({counted}"
            f"{', …' if len(other) > 8 else ''})"
        )
        print("".join(x if x.isprintable() else "?" for x in text), file=sys.stderr)
    return of_class


def in_threads(function: Callable[[Any], Any], items: Sequence, what: str) -> Iterator[Any]:
    """function(item) of each item in order, on all cores, with a progress bar on a terminal.

    Threads are enough: decompressing and decoding let go of Python's lock.
    """
    cores = usable_cores()
    with (
        ThreadPoolExecutor(cores) as pool,
        tqdm(total=len(items), desc=what, leave=False, disable=None) as bar,
    ):
        for start in range(0, len(items), 4 * cores):  # in parts, so that few results wait
            for result in pool.map(function, items[start : start + 4 * cores]):
                yield result
                bar.update()
