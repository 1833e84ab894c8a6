"""The packed cache: many files as one array, mapped into memory, that is whole or not there."""

import json
import math
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_sets.sources import Input, in_threads
from runtime.errors import UserError
from runtime.files import file_lock, write_whole
from runtime.launcher import launcher_variable


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
    new_array = index.with_suffix(".npy.tmp")
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
        array = index.with_name(f"{index.stem}-{crc:08x}.npy")
        outdated = set(index.parent.glob(f"{index.stem}-????????.npy")) - {array}
        new_array.rename(array)
        # It makes the array valid, so it comes last.
        write_whole(index, json.dumps({"crc32": crc, **contents}).encode())
    except OSError as error:  # a full disk
        raise UserError(f"cannot write the cache {index} ({error}): it was not made") from error
    finally:
        new_array.unlink(missing_ok=True)
    for path in outdated:  # one that a running training has mapped lives on until that ends
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
