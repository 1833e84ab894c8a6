"""The folder of a run: what it holds, one run at a time, and moved aside instead of overwritten.

python -m engine.run_folder FOLDER renames it to the first of FOLDER.1, FOLDER.2, … that is free, as
--overwrite does; nothing is ever deleted. Options of a training after it are checked before; with
--resume among them the folder stays.
"""

import csv
import itertools
import math
import os
import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from checkpoints import Checkpoint, load_checkpoint
from load_settings import parse_settings
from runtime.command import run_command
from runtime.errors import UserError
from runtime.files import check_writable, is_locked_open, is_still_at, lock_open
from settings import PAPER_SETTINGS, Settings

PROGRAM = Path(__file__).resolve().parent.parent
EVENTS = "events.out.tfevents.md-snn"
LOGS = ("metrics.csv", EVENTS, "settings.json")  # written after the first checkpoint


def checkpoints_of(folder: Path, paper_setting: str) -> tuple[Path, Path]:
    """Paths of the last and the best checkpoint of a run."""
    return folder / f"{paper_setting}-last.pth", folder / f"{paper_setting}-best.pth"


def trained_in(folder: Path) -> list[Path]:
    """What a start in `folder` would replace and cost more than the first epoch of a run:
    checkpoints of whole epochs or that cannot be read, and logs that no checkpoint lies beside."""
    pairs = [checkpoints_of(folder, setting) for setting in PAPER_SETTINGS]
    there = [path for pair in pairs for path in pair if os.path.lexists(path)]
    if not there:
        return [path for name in LOGS if os.path.isfile(path := folder / name)]
    # The best comes with the first epoch.
    alone = [last for last, best in pairs if last in there and best not in there]
    return [path for path in there if path not in alone or epochs_in(path) != 0]


def epochs_in(last: Path) -> int | None:
    """Whole epochs of a checkpoint; None where it cannot be read."""
    with suppress(UserError):
        return load_checkpoint(last, weights=False).epoch
    return None


def check_save_path(settings: Settings) -> None:
    """Raise UserError, before any long work, where the run could not have its save path."""
    folder = Path(settings.save_path)
    if (folder / ".lock").is_file():
        lock(folder).close()
    last_of(settings, weights=False)
    must_move(settings)


def last_of(settings: Settings, weights: bool = True) -> Checkpoint | None:
    """What a run with --resume goes on from; None where there is nothing yet. Raises UserError,
    with what is left to do, where it cannot be read."""
    folder = Path(settings.save_path)
    last, _ = checkpoints_of(folder, settings.paper_setting)
    if not (settings.resume and os.path.lexists(last)):
        return None
    try:
        return load_checkpoint(last, weights)
    except UserError as damage:
        raise UserError(f"--resume: {damage}: {what_to_do(folder, settings)}") from None


def must_move(settings: Settings) -> bool:
    """Whether --overwrite has something to move out of the save path.

    Raises UserError where the run would cost what lies there, or where that cannot be moved.
    """
    folder = Path(settings.save_path)
    own = last, _ = checkpoints_of(folder, settings.paper_setting)
    found = trained_in(folder)
    goes_on = settings.resume and os.path.lexists(last)
    if goes_on:
        found = [path for path in found if path not in own]
    if not found:
        return False
    if settings.overwrite:
        place_aside(folder, settings)
        return True
    name = found[0].name
    if goes_on:
        raise UserError(
            f"--resume: {folder} holds {name} of another run than {last.name}: move one of the "
            "two to a folder of its own"
        )
    if settings.resume:
        raise UserError(
            f"--resume: {folder} holds {name} but no {last.name} to go on from: "
            + what_to_do(folder, settings)
        )
    resumable = last in found and {*found} <= {*own} and epochs_in(last) is not None
    raise UserError(f"{folder} already holds {name}: {what_to_do(folder, settings, resumable)}")


def what_to_do(folder: Path, settings: Settings, resumable: bool = False) -> str:
    """What is left to a run that cannot have its save path."""
    ways = ["--resume goes on with it"] if resumable else []
    with suppress(UserError):  # it cannot be moved
        instead = " instead of --resume" if settings.resume else ""
        place = place_aside(folder, settings)
        ways.append(f"--overwrite{instead} moves all to {place} and starts anew")
    return ", ".join(ways) + "; or " * bool(ways) + "choose another --save_path"


def place_aside(folder: Path, settings: Settings | None = None) -> Path:
    """Where `folder`, or what it is a link to, can be moved: the first of FOLDER.1, FOLDER.2, …
    that does not exist. Raises UserError where it cannot be moved."""
    real = Path(os.path.realpath(folder))
    numbered = (Path(f"{real}.{number}") for number in itertools.count(1))
    place = next(path for path in numbered if not os.path.lexists(path))
    in_use = {"the current folder": ".", "this program": PROGRAM}
    if settings is not None:
        for name in ("data_path", "cache_path", "teacher_path"):
            in_use[f"--{name}"] = getattr(settings, name)
    for what, path in in_use.items():
        if path is not None and Path(os.path.realpath(path)).is_relative_to(real):
            raise cannot_move(folder, place, f"{what} is in it")
    if os.path.ismount(real):
        raise cannot_move(folder, place, "it is a mount point")
    check_writable(place)
    return place


def cannot_move(folder: Path, place: Path, why: str | None) -> UserError:
    return UserError(f"{folder} cannot be moved to {place} ({why}): choose another --save_path")


def move_aside(folder: Path, settings: Settings | None = None) -> None:
    """Rename `folder` to the first free number, and leave an empty one in its place.

    Raises UserError where it cannot be moved, or where a run writes into it or a folder below.
    """
    real, place = Path(os.path.realpath(folder)), place_aside(folder, settings)
    locks = []
    try:
        for path in real.rglob(".lock"):
            locks.append(lock(path.parent))
        real.rename(place)
    except OSError as error:
        raise cannot_move(folder, place, error.strerror) from None
    finally:
        for file in locks:
            file.close()
    print(f"what was in {real} is now in {place}", flush=True)
    try:
        real.mkdir(exist_ok=True)  # another start may have been faster: one of the two has the lock
        shutil.copymode(place, real)
    except OSError as error:
        raise UserError(f"cannot write {real} ({error.strerror})") from None


def lock(folder: Path, warn: bool = False) -> ExitStack:
    """What this process holds until it is closed or the process ends, however it ends.

    Raises UserError where another process has it; says so, with `warn`, where there are no locks.
    """
    path, held = folder / ".lock", ExitStack()
    refusal = UserError(
        f"another run is writing into {folder}: wait for its end, or choose another --save_path"
    )
    file = held.enter_context(path.open("a"))
    try:
        held.callback(lock_open(file))
    except BlockingIOError:
        held.close()
        raise refusal from None
    except OSError as error:  # a file system without locks
        if warn:
            print(
                f"main.py: warning: {folder} cannot be locked ({error.strerror}): "
                "nothing keeps a second run from using it",
                file=sys.stderr,
            )
    # Between opening and locking it another run may have moved the folder and taken its place.
    if not is_still_at(path, file):
        held.close()
        raise refusal
    return held


def is_locked(folder: Path) -> bool:
    """Whether another process writes a run into `folder`, asked without disturbing it. False where
    nobody can tell: the file system has no locks, or the run is of a version without them."""
    try:
        return is_locked_open(folder / ".lock")
    except OSError:
        return False


def deciding(row: dict[str, Any]) -> str:
    """The accuracy that decides which epoch is the best: where a share of the training images was
    set apart for that, theirs."""
    return "val_accuracy" if row.get("val_accuracy") is not None else "test_accuracy"


def best_row(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return max(rows, key=lambda row: row[deciding(row)])  # the first of equal ones


def are_rows(rows: Any, held_out: bool) -> bool:
    """A list of metrics, one dictionary of numbers an epoch; of held-out images too, or not."""
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        return False
    numbers = ["test_accuracy", "best_accuracy", "time"] + ["val_accuracy"] * held_out
    return all(
        all(type(name) is str for name in row)
        and all(type(x) in (float, type(None)) for name, x in row.items() if name != "epoch")
        and type(row.get("epoch")) is int
        and row["epoch"] == epoch
        and all(type(row.get(name)) is float and math.isfinite(row[name]) for name in numbers)
        and (held_out or row.get("val_accuracy") is None)
        and 0 <= (row.get("seconds") or 0.0) < math.inf
        for epoch, row in enumerate(rows, 1)
    )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.csv, an epoch each, as numbers, None where a field is empty. A line
    that is just being written is left out. Raises UserError for a missing or damaged file."""
    try:
        text = path.read_bytes().decode()
        header, *lines = list(csv.reader(text[: text.rfind("\n") + 1].splitlines())) or [[]]
        rows = []
        for line in lines:
            row = {name: float(x) if x else None for name, x in zip(header, line, strict=True)}
            rows.append(row | {"epoch": int(row["epoch"])})
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, OverflowError, csv.Error):
        raise UserError(f"{path} is not the metrics.csv of a run, or it is damaged") from None
    return rows


def move_of(argv: Sequence[str]) -> None:
    """Move the folder aside, where there is something in it and nothing that will go on."""
    if not argv or argv[0].startswith("-"):
        raise UserError("expected one folder, and options of main.py")
    folder, *options = Path(argv[0]), *argv[1:]
    settings = parse_settings(options) if options else None
    for name in ("dry_run", "eval_only") if settings is not None else ():
        if getattr(settings, name):
            raise UserError(f"--{name} trains nothing, and {folder} stays: leave it out")
    goes_on = settings is not None and settings.resume
    try:
        if not goes_on and os.path.lexists(folder) and os.listdir(folder):
            move_aside(folder)
    except OSError as error:
        raise UserError(str(error)) from None


def main(argv: Sequence[str]) -> int:
    return run_command("run_folder.py", lambda: move_of(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
