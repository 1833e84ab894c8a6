"""Recordings of event cameras, of the kinds that people have, and their frames.

| ending | events | source of the layout |
|---|---|---|
| .bin | five bytes: x, y, p and 23 bits of t | N-MNIST, N-Caltech101 (Orchard et al. 2015) |
| .npz, .npy | arrays t, x, y, p; four columns or fields | SpikingJelly's events_np |
| .txt, .csv | columns t x y p, or as a first line names them | |
| .dat | after lines of "%", type and size: words t and p·2²⁸ + y·2¹⁴ + x | Prophesee's DAT 2 |
| .aedat, .aedat2 | after lines of "#", address and t, big-endian | iniVation's AEDAT 2.0 |
| .aedat, .aedat4 | packets of AEDAT 3.1; AEDAT 4.0, with the package aedat | iniVation |
"""

import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import IO, NamedTuple

import numpy as np
from numpy.lib import format as npy

from runtime.errors import UserError

SPLITS = ("number", "time")
LARGEST_SENSOR = 2048  # pixels a side: what is beyond comes from a damaged file
NAMES = "txyp"
_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
_HEADER = Lock()


class DamagedError(UserError):
    """A file of events or frames that cannot be used; --skip_damaged goes on without it."""


class Events(NamedTuple):
    """N events as they lie in their file: t in µs, pixels x and y, p 1 where it became brighter and
    else 0, all int64."""

    t: np.ndarray
    x: np.ndarray
    y: np.ndarray
    p: np.ndarray
    sensor: tuple[int, int] | None = None  # height and width, where the file says them

    def in_order(self) -> "Events":
        """In order of time; those of one time stay in the file's order."""
        if (np.diff(self.t) >= 0).all():
            return self
        order = np.argsort(self.t, kind="stable")
        return Events(*(column[order] for column in self[:4]), self.sensor)


def read_events(path: Path) -> Events:
    """The events of a recording, one or more. Raises DamagedError where it has none, or what makes
    no sense, and UserError where its kind is not known or a package for it is missing."""
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path} is no file of events ({', '.join(READERS)})")
    try:
        if path.stat().st_size == 0:
            raise ValueError("it is empty")
        *columns, sensor = reader(path)
        events = Events(*_checked(*columns), sensor)
    except UserError:
        raise
    except Exception as error:  # what they raise depends on where the bytes stop making sense
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise DamagedError(f"{path} is damaged: {why}") from error
    return events


def _checked(t: np.ndarray, x: np.ndarray, y: np.ndarray, p: np.ndarray) -> list[np.ndarray]:
    """As Events has them. Raises ValueError where they make no sense."""
    columns = [np.asarray(column) for column in (t, x, y, p)]
    if len({column.shape for column in columns}) > 1 or columns[0].ndim != 1:
        raise ValueError("t, x, y and p are not four arrays of one length")
    if not columns[0].size:
        raise ValueError("it holds no events")
    for name, column in zip(NAMES, columns, strict=True):
        if column.dtype.kind not in "fuib" or not np.isfinite(column).all():
            raise ValueError(f"{name} holds what is no number")
    if (columns[0] != np.floor(columns[0])).any():  # in seconds
        columns[0] = np.round(columns[0] * 1e6)
    for name, column in zip(NAMES, columns, strict=True):
        if (column != np.floor(column)).any():
            raise ValueError(f"{name} holds fractions")
    t, x, y, p = (column.astype(np.int64) for column in columns)
    if min(x.min(), y.min()) < 0:
        raise ValueError("it holds negative pixels")
    signed = p.min() < 0
    if not np.isin(p, (-1, 1) if signed else (0, 1)).all():
        raise ValueError("p is neither 0 and 1 nor -1 and 1")
    return [t, x, y, (p > 0).astype(np.int64)]


def frames_of(
    events: Events, time_window: int, sensor: tuple[int, int], split_by: str
) -> np.ndarray:
    """Counts (T, 2, H, W) of events in order, each of them in one frame: T parts of as many events,
    or of as much time, as divide evenly; the last one has the rest too.

    This is how SpikingJelly splits (`cal_fixed_frames_number_segment_index`), also where a part has
    no event, which it cannot do. Raises ValueError for events beyond the sensor.
    """
    T, (H, W) = time_window, sensor
    if events.x.max() >= W or events.y.max() >= H:
        raise ValueError(f"it holds events beyond a {W}×{H} camera")
    place, whole = np.arange(len(events.t)), len(events.t)
    if split_by == "time":
        place = events.t - events.t[0]
        whole = place[-1]
    length = int(whole) // T
    frame = np.minimum(place // length, T - 1) if length else np.full(len(place), T - 1)
    index = ((frame * 2 + events.p) * H + events.y) * W + events.x
    counts = np.bincount(index, minlength=T * 2 * H * W).reshape(T, 2, H, W)
    return counts.astype(float)  # as SpikingJelly's


def read_array(file: IO[bytes]) -> np.ndarray:
    """The array of a .npy file; its header by one thread at a time.

    NumPy parses it as Python, which other threads may disturb before Python 3.13: now and then an
    intact file was a SystemError (https://github.com/python/cpython/issues/106905).
    """
    with _HEADER:
        read_header = _HEADERS[npy.read_magic(file)]
        shape, column_major, dtype = read_header(file)
    return np.frombuffer(file.read(), dtype).reshape(shape, order="F" if column_major else "C")


def holds_frames(path: Path) -> bool:
    """Whether a .npz has frames, and not events or nothing that can be read."""
    try:
        with zipfile.ZipFile(path) as arrays:
            return "frames.npy" in arrays.namelist()
    except (OSError, zipfile.BadZipFile):
        return False


# What reads a kind: t, x, y, p, and the sensor or None.


def _continued(t: np.ndarray, bits: int) -> np.ndarray:
    """Times of a counter of so many bits that has begun again after its largest number."""
    t = t.astype(np.int64)
    return t + (np.cumsum(np.diff(t, prepend=t[:1]) < -(1 << (bits - 1))) << bits)


def _of_bytes(content: bytes, kind: type | str, columns: int) -> np.ndarray:
    """The columns of rows of so many numbers, int64."""
    size = np.dtype(kind).itemsize * columns
    if len(content) % size:
        raise ValueError(f"{len(content)} bytes are not events of {size} bytes each")
    return np.frombuffer(content, kind).reshape(-1, columns).T.astype(np.int64)


def _bin(path: Path) -> tuple:
    x, y, high, middle, low = _of_bytes(path.read_bytes(), np.uint8, 5)
    return _continued((high & 127) << 16 | middle << 8 | low, 23), x, y, high >> 7, None


def _npz(path: Path) -> tuple:
    with zipfile.ZipFile(path) as arrays:
        missing = [name for name in NAMES if f"{name}.npy" not in arrays.namelist()]
        if missing:
            raise ValueError(f"it lacks the arrays {', '.join(missing)}")
        found = []
        for name in NAMES:
            with arrays.open(f"{name}.npy") as file:
                found.append(read_array(file))
    return *found, None


def _npy(path: Path) -> tuple:
    with path.open("rb") as file:
        array = read_array(file)
    if array.dtype.names is not None:
        missing = [name for name in NAMES if name not in array.dtype.names]
        if missing:
            raise ValueError(f"it lacks the fields {', '.join(missing)}")
        return *(array[name] for name in NAMES), None
    if array.ndim != 2 or array.shape[1] != 4:
        raise ValueError(f"its shape is {array.shape}, not (N, 4): columns t, x, y, p")
    return *array.T, None


def _text(path: Path) -> tuple:
    lines = [x.strip() for x in path.read_text("utf-8-sig").splitlines() if x.strip()]
    rows = [x for x in lines if not x.startswith("#")]
    if not rows:
        raise ValueError("it holds no events")
    delimiter = "," if "," in rows[0] else None

    def columns(line: str) -> list[str]:
        return [x.strip(' ",').lower() for x in line.lstrip("# ").split(delimiter)]

    number, order = len(columns(rows[0])), None
    for line in lines[: lines.index(rows[0]) + 1]:  # NumPy's savetxt writes names as a comment
        names = columns(line)
        if set(NAMES) <= set(names) and len(names) == number:
            order = [names.index(name) for name in NAMES]
    if set(NAMES) <= set(columns(rows[0])):
        rows = rows[1:]
    elif order is None and number != 4:
        raise ValueError(f"its first line has {number} columns, not t, x, y and p")
    if not rows:
        raise ValueError("it holds no events")
    order = order or range(4)
    return *np.loadtxt(rows, delimiter=delimiter, ndmin=2, usecols=order).T, None


# Prophesee's DAT: docs.prophesee.ai, "DAT File Format".
DAT_TYPES = (0x00, 0x0C)  # Event2d and EventCd; others are triggers


def _dat(path: Path) -> tuple:
    content = path.read_bytes()
    header = re.match(rb"(?:%[^\n]*\n)*", content)[0]
    said = dict(re.findall(r"% (Version|Width|Height) (\d+)", header.decode(errors="replace")))
    if said.get("Version", "2") != "2":
        raise ValueError(f"it is DAT of version {said['Version']}, not 2")
    if len(content) < len(header) + 2:
        raise ValueError("it ends before its first event")
    kind, size = content[len(header) : len(header) + 2]
    if kind not in DAT_TYPES or size != 8:
        raise ValueError(f"its events have the type {kind} and {size} bytes, not 0 or 12 and 8")
    t, word = _of_bytes(content[len(header) + 2 :], "<u4", 2)
    sensor = None
    if {"Height", "Width"} <= said.keys():
        sensor = int(said["Height"]), int(said["Width"])
    return _continued(t, 32), word & 0x3FFF, word >> 14 & 0x3FFF, word >> 28, sensor


# iniVation's AEDAT 2.0: how the header's name of a chip begins, and its height and width.
CHIPS = {"DAVIS240": (180, 240), "DAVIS346": (260, 346), "DAVIS640": (480, 640)}


def _aedat(path: Path) -> tuple:
    with path.open("rb") as file:
        version = re.match(rb"#!AER-DAT([234])\.", file.read(12))
    if version is None:
        raise ValueError("its first line is not #!AER-DAT2.0, 3.1 or 4.0")
    return {b"2": _aedat2, b"3": _aedat3, b"4": _aedat4}[version[1]](path)


def _aedat2(path: Path) -> tuple:
    """Addresses of a DVS128, as SpikingJelly reads them for CIFAR10-DVS, or of a DAVIS: the header
    says which, or else the addresses; a DVS128's have 16 bits."""
    content = path.read_bytes()
    # An event may begin like a line of the header, but hardly goes on like one.
    end = rb"\r\n" if content.partition(b"\n")[0].endswith(b"\r") else rb"\n"
    header = re.match(rb"(?:#[^\x00-\x08\x0a-\x1f]*" + end + rb")*", content)[0]
    address, t = _of_bytes(content[len(header) :], ">u4", 2)
    said = re.search(r"AEChip:.*\.(\w+)", header.decode(errors="replace"))
    name = said[1].upper() if said else ""
    if name.startswith("DAVIS") or (not name and (address >> 16).any()):
        sensor = next((size for chip, size in CHIPS.items() if name.startswith(chip)), None)
        seen = address & 0x8000_0400 == 0  # no pixel of a frame, no signal from outside
        x, y, p = address >> 12 & 0x3FF, address >> 22 & 0x1FF, address >> 11 & 1
    else:
        sensor, seen = (128, 128), address & 0x8000 == 0
        x, y, p = 127 - (address >> 8 & 127), 127 - (address >> 1 & 127), 1 - (address & 1)
    return *(column[seen] for column in (_continued(t, 32), x, y, p)), sensor


def _aedat3(path: Path) -> tuple:
    # Imported here: it takes seconds, and needs a torchaudio that fits torch.
    from spikingjelly.datasets.utils import load_aedat_v3

    found = load_aedat_v3(path)
    return *(found[name] for name in NAMES), None


# In a process of its own: a damaged file may end the one that reads it.
AEDAT4 = """
import sys, aedat, numpy
decoder = aedat.Decoder(sys.argv[1])
streams = [x for x in decoder.id_to_stream().values() if x["type"] == "events"]
if len(streams) != 1:
    sys.exit(f"it has {len(streams)} streams of events")
found = [packet["events"] for packet in decoder if "events" in packet]
if not found:
    sys.exit("it holds no events")
events = numpy.concatenate(found)
columns = {name: events[long] for name, long in zip("txyp", ("t", "x", "y", "on"))}
numpy.savez(sys.stdout.buffer, sensor=[streams[0]["height"], streams[0]["width"]], **columns)
"""


def _aedat4(path: Path) -> tuple:
    if find_spec("aedat") is None:
        raise UserError(f"{path} is AEDAT 4, which the package aedat reads: pip install aedat")
    command = [sys.executable, "-c", AEDAT4, os.path.abspath(path)]
    done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise ValueError(said[-1] if done.returncode > 0 and said else "its reader has crashed")
    with zipfile.ZipFile(BytesIO(done.stdout)) as arrays:
        *found, sensor = (read_array(arrays.open(f"{name}.npy")) for name in (*NAMES, "sensor"))
    return *found, tuple(sensor.tolist())


READERS: dict[str, Callable[[Path], tuple]] = {
    ".bin": _bin,
    ".npz": _npz,
    ".npy": _npy,
    ".txt": _text,
    ".csv": _text,
    ".dat": _dat,
    ".aedat": _aedat,
    ".aedat2": _aedat,
    ".aedat4": _aedat,
}
