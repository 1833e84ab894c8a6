"""The runs of main.py below some folders: found, read, and told apart."""

import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from checkpoints import load_checkpoint
from data_sets import DATA_SETS
from display import kind_of
from engine.run_folder import are_rows, best_row, checkpoints_of, is_locked, read_metrics
from load_settings import read_settings
from runtime.command import similar_path
from runtime.errors import UserError
from settings import MAY_CHANGE, PAPER_SETTINGS, Settings, as_text

# What two runs may differ in and still be the same but for the seed. The teacher is looked up.
NOT_COMPARED = (MAY_CHANGE - {"epochs"}) | {"seed", "input_step", "sensor", "classes"}
# What has another meaning, or default, in another paper setting.
OF_ITS_KIND = {"bits", "bn_bits", "loss", "alpha", "beta", "tau", "beta_schedule", "clip_grad"}
SHORT = {"time_window": "T", "model_depth": "depth", "batch_size": "batch", "data_path": "of"}


@dataclass(frozen=True)
class Run:
    """What is known of one run.

    Attributes:
        rows: its metrics, an epoch each, as in metrics.csv, and "time", the end of the epoch in
            seconds since 1970: 0 where no checkpoint was read.
        state: "going on" (a process writes into it), "finished" or "stopped".
        teacher: SHA-256 of its teacher's file; None without one, or where only the CSV is left.
    """

    folder: Path
    settings: Settings
    rows: list[dict[str, Any]]
    state: str
    teacher: str | None

    @property
    def best(self) -> dict[str, Any]:
        """The row of the best epoch."""
        return best_row(self.rows)

    @property
    def seconds_an_epoch(self) -> float | None:
        """The median: pauses of the run do not count. None where too little is known."""
        seconds = [row["seconds"] for row in self.rows if row.get("seconds") is not None]
        ends = [row["time"] for row in self.rows if row["time"]]
        seconds = seconds or [after - before for before, after in pairwise(ends)]
        return statistics.median(seconds) if seconds else None


def warn(text: str) -> None:
    print("experiments.runs: warning:", " ".join(text.split()), file=sys.stderr)


def find_runs(folders: Sequence[str | Path]) -> list[Run]:
    """All runs below the folders, each once, in the order of their paths; what cannot be read is
    named on stderr. Raises UserError where a folder is missing."""
    runs, seen = [], set()
    for top in folders:
        if not os.path.isdir(top):
            raise UserError(f"there is no folder {top}{similar_path(top, folder=True)}")
        for folder, names in _folders_below(Path(top), seen):
            for setting in _runs_in(names):
                try:
                    runs.append(read_run(folder, setting))
                except UserError as error:
                    warn(f"{error}: left out")
    return runs


def _folders_below(top: Path, seen: set[str]) -> Iterator[tuple[Path, list[str]]]:
    """(folder, names of its files) of `top` and all below it; links are followed, and a folder is
    entered once, however many lead to it."""

    def unreadable(error: OSError) -> None:
        warn(f"cannot read {error.filename} ({error.strerror}): left out")

    for folder, below, files in os.walk(top, onerror=unreadable, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        below[:] = sorted(name for name in below if not name.startswith("."))
        yield Path(folder), files


def _runs_in(names: Sequence[str]) -> list[str | None]:
    """The paper settings of the runs in a folder with files of these names; None: its settings.json
    has to tell."""
    settings = [x for x in PAPER_SETTINGS if {f"{x}-last.pth", f"{x}-best.pth"} & {*names}]
    return settings or [None] * bool({"settings.json", "metrics.csv"} & {*names})


def read_run(folder: Path, setting: str | None) -> Run:
    """The run of a paper setting in `folder`: what its last checkpoint says, else its settings.json
    and metrics.csv, else its best checkpoint. Raises UserError where none of them can be read."""
    text, failures = folder / "metrics.csv", []
    last, best = checkpoints_of(folder, setting) if setting else (text, text)
    for path in (last, text, best):
        if path != text and not os.path.lexists(path):
            continue
        try:
            settings, rows, teacher = (_of_text if path == text else _of_checkpoint)(path)
            if setting not in (None, settings.paper_setting):
                raise UserError(f"{path} is of a run of {settings.paper_setting}, not {setting}")
            if not are_rows(rows, held_out=settings.val_share > 0):
                raise UserError(f"{path} holds no metrics, or damaged ones")
        except UserError as error:
            failures.append(str(error))
            continue
        if failures:
            warn(f"{failures[0]}: {path.name} was read instead")
        state = "finished" if len(rows) >= settings.epochs else "stopped"
        if is_locked(folder):
            state = "going on"
        return Run(folder, settings, rows, state, teacher)
    raise UserError(failures[0])


def _of_checkpoint(path: Path) -> tuple[Settings, Any, str | None]:
    """(settings, rows that are to be checked, digest of the teacher's file)."""
    checkpoint = load_checkpoint(path, weights=False)
    teacher = checkpoint.rest.get("teacher")
    rows = checkpoint.rest.get("rows")
    return checkpoint.settings, rows, teacher if isinstance(teacher, str) else None


def _of_text(metrics: Path) -> tuple[Settings, Any, None]:
    """As _of_checkpoint; when an epoch ended is not written there."""
    rows = [row | {"time": 0.0} for row in read_metrics(metrics)]
    return read_settings(metrics.with_name("settings.json")), rows, None


# What tells runs apart.


def compared(settings: Settings) -> dict[str, Any]:
    """The settings of a run without its seed and without what changes nothing of its training."""
    shown = {name: x for name, x in asdict(settings).items() if name not in NOT_COMPARED}
    shown |= {"arch": settings.told_arch, "arch_digest": None}
    if DATA_SETS[settings.data].classes_of is not None:  # one's own are told apart by their folder
        shown["data_path"] = Path(settings.data_path).name
    return shown


def name_of_kind(settings: Settings) -> str:
    """What a picture and a table call it."""
    name = kind_of(settings.paper_setting, settings.loss)
    name = "MD-SNN" if name == "CLK" else name
    return name if settings.bits is None else f"{name}, {settings.bits} bits"


def place_of(settings: Settings) -> tuple[Any, ...]:
    """To sort by: the data, then teachers, then fewer bits first, students before the taught."""
    kind = PAPER_SETTINGS.index(settings.paper_setting), settings.loss or ""
    return settings.data, settings.bits or 0, *kind, settings.seed


def names_of(all_settings: Sequence[Settings], without: Sequence[str] = ()) -> list[str]:
    """A short name for each: its kind and bits, and what it has otherwise than another on the same
    data; of settings with another meaning in another kind of run, than another of its kind."""
    everything = [compared(settings) | {"seed": settings.seed} for settings in all_settings]
    skipped = {"paper_setting", "bits", "loss", "data", *without}
    names = []
    for settings, ours in zip(all_settings, everything, strict=True):
        parts = [name_of_kind(settings)]
        if any(theirs["data"] != settings.data for theirs in everything):
            parts.insert(0, settings.data)
        for name in (name for name in ours if name not in skipped):
            same = ("data", "paper_setting", "loss") if name in OF_ITS_KIND else ("data",)
            others = [x[name] for x in everything if all(x[key] == ours[key] for key in same)]
            if ours[name] is not None and any(x != ours[name] for x in others):
                parts.append(_said(name, ours[name]))
        names.append(", ".join(filter(None, parts)))
    return names


def _said(name: str, value: Any) -> str:
    text = SHORT.get(name, name.replace("_", " "))
    if isinstance(value, bool):
        return text if value else ""
    return f"{text} {value:g}" if isinstance(value, float) else f"{text} {as_text(value)}"
