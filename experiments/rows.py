"""rows.csv of a study: a line a finished run, which says all that tells it from another."""

import csv
import io
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.plan import METHODS, STARTS, TEACHER, Planned, options_text, teacher_text
from runtime.errors import UserError
from runtime.files import writing_alone

ROWS = "rows.csv"
KEYS = ("data", "time_window", "bits", "method", "start", "seed", "fold")
MEASURED = (
    "accuracy",  # share of the test images, last epoch
    "best_accuracy",  # of the best epoch
    "teacher_accuracy",
    "drop_to_teacher",
    "membrane_kl",
    "membrane_mse",
    "differing_spikes",
    "spike_rate",
    "energy_pj",  # of an image
    "delay_ns",
    "area_um2",
    "edap_ratio",  # times better than the full-precision teacher
    "seconds",  # of training, all interruptions left out
)
RECORDED = ("commit", "hardware", "teacher_file")
IDENTITY = ("settings", "teacher_settings")
COLUMNS = (*KEYS, "options", "teacher_options", *MEASURED, *RECORDED, *IDENTITY)
Row = dict[str, str]


def identity_of(row: Row) -> tuple[str, str]:
    return row["settings"], row["teacher_settings"]


def rows_of(planned: Planned, measured: Mapping[str, Any]) -> list[Row]:
    """The row of a run that is finished, and measured by one_run.py: of a network for several T one
    for each, the largest last."""
    rows = []
    for T, found in measured.get("at", {}).items():
        settings = replace(planned.settings, time_window=int(T))
        rows.append(_row_of(replace(planned, settings=settings), found))
    return [*rows, _row_of(planned, measured)]


def _row_of(planned: Planned, measured: Mapping[str, Any]) -> Row:
    settings = planned.settings
    about = {"method": planned.method, "start": planned.start}
    about |= {name: getattr(settings, name) for name in KEYS if name not in about}
    about |= {"options": options_text(settings), "teacher_options": teacher_text(planned)}
    about |= dict(zip(IDENTITY, planned.identity, strict=True))
    about |= {name: measured.get(name) for name in (*MEASURED, *RECORDED)}
    return {name: "" if about[name] is None else str(about[name]) for name in COLUMNS}


def read_rows(path: Path) -> list[Row]:
    """The rows; none where there is no file. A line that was cut off in the middle is left out.
    Raises UserError for another program's file, a value that can be none, and a run that is there
    twice: a mean over copies would be none over seeds."""
    text = _whole_lines(path)
    rows: dict[tuple[str, str], Row] = {}
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        if text and next(reader) != [*COLUMNS]:
            raise UserError(
                f"{path} is not the rows.csv of a study of this version: move it, or choose "
                "another --name"
            )
        for line in filter(None, reader):
            if len(line) != len(COLUMNS):
                raise ValueError(f"{len(line)} values for {len(COLUMNS)} columns")
            row = dict(zip(COLUMNS, line, strict=True))
            _check(row)
            if rows.setdefault(identity_of(row), row) is not row:
                raise ValueError("a run that is there before")
    except (ValueError, csv.Error) as error:
        place = f"{path}, line {reader.line_num}"
        raise UserError(f"{place}: {error}: mend it, or choose another --name") from None
    return [*rows.values()]


def _check(row: Row) -> None:
    """Raise ValueError for what no run leaves."""
    for name, known in (("method", (TEACHER, *METHODS)), ("start", STARTS)):
        if row[name] not in known:
            raise ValueError(f"{name} {row[name]!r}")
    for name in ("time_window", "seed", *(x for x in ("bits", "fold") if row[x])):
        int(row[name])
    numbers = {name: float(row[name]) for name in MEASURED if row[name] or name == "accuracy"}
    if not 0 <= numbers["accuracy"] <= 1:
        raise ValueError(f"accuracy {row['accuracy']} is no share of images")
    for name in ("settings", *(x for x in ("options", "teacher_settings") if row[x])):
        if not all("=" in word for word in shlex.split(row[name])):
            raise ValueError(f"{name} without a value")


def _whole_lines(path: Path) -> str:
    try:
        content = path.read_bytes()
        return content[: content.rfind(b"\n") + 1].decode()
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} ({getattr(error, 'strerror', error)})") from None


def append(path: Path, rows: Sequence[Row]) -> None:
    """Add whole lines, all or none, but for runs that are there, and have them on the disk. Raises
    UserError where it fails."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        try:
            with writing_alone(file, path):  # another study may write here too
                there = set(map(identity_of, read_rows(path)))
                size = len(_whole_lines(path).encode())  # what was cut off in the middle goes
                if size == 0:
                    writer.writeheader()
                writer.writerows(row for row in rows if identity_of(row) not in there)
                try:
                    _write(file, text.getvalue().encode(), size)
                except OSError:
                    os.ftruncate(file, size)
                    raise
        finally:
            os.close(file)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror})") from None


def _write(file: int, content: bytes, at: int) -> None:
    os.ftruncate(file, at)
    os.lseek(file, at, os.SEEK_SET)
    while content:
        content = content[os.write(file, content) :]
    os.fsync(file)
