"""Accuracies, drops to the teacher and hardware costs of groups of runs that differ in the seed."""

import json
import math
import os
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

from checkpoints import Checkpoint, load_checkpoint
from display import significant
from engine.run_folder import checkpoints_of, deciding
from experiments.found_runs import Run, compared, names_of, place_of, warn
from runtime.errors import UserError
from runtime.files import digest
from settings import Settings
from spikesim_eval.render import csv_text, markdown_table

two_digits = "{:.2f}".format

MEASURES = {  # column of the CSV, with its unit: (what a reader sees, its format)
    "accuracy_last_epoch_percent": ("accuracy, last epoch, %", two_digits),
    "accuracy_best_epoch_percent": ("accuracy, best epoch, %", two_digits),
    "validation_accuracy_best_epoch_percent": ("validation, best epoch, %", two_digits),
    "drop_to_teacher_last_epoch_points": ("drop to teacher, points", two_digits),
    "test_loss_last_epoch": ("test loss", "{:.3f}".format),
    "spike_rate_last_epoch_percent": ("spike rate, %", two_digits),
    "edap_uj_ms_mm2": ("EDAP, µJ·ms·mm²", partial(significant, digits=4)),
    "edap_times_better_than_baseline": ("EDAP, × better", two_digits),
}


@dataclass
class Group:
    """Runs with the same settings but the seed, taught by teachers of which that is true too.

    Attributes:
        runs: the finished ones, one a seed.
        unfinished: how many more there are.
        values: of each measure, of the runs that have it.
    """

    name: str
    settings: Settings
    runs: list[Run]
    unfinished: int
    values: dict[str, list[float]]


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error s / √n, s with n − 1; None of a single value."""
    if len(values) == 1:
        return values[0], None
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def groups_of(runs: Sequence[Run]) -> list[Group]:
    """The groups, by data, then teachers before students, fewer bits first."""
    candidates = _teachers_files(runs)
    members: dict[str, list[tuple[Run, Checkpoint | None]]] = {}
    for run in runs:
        teacher = teacher_of(run, candidates)
        key = compared(run.settings), teacher and compared(teacher.settings)
        members.setdefault(repr(key), []).append((run, teacher))
    names = _names([pairs[0] for pairs in members.values()])
    groups = []
    for name, pairs in zip(names, members.values(), strict=True):
        counted = _one_a_seed([pair for pair in pairs if pair[0].state == "finished"])
        found = [measured(run, teacher) for run, teacher in counted]
        values = {x: [row[x] for row in found if row[x] is not None] for x in MEASURES}
        unfinished = sum(run.state != "finished" for run, _ in pairs)
        settings = pairs[0][0].settings
        groups.append(Group(name, settings, [run for run, _ in counted], unfinished, values))

    return sorted(groups, key=lambda group: (place_of(group.settings), group.name))


def _one_a_seed(
    pairs: list[tuple[Run, Checkpoint | None]],
) -> list[tuple[Run, Checkpoint | None]]:
    """Of several runs of a seed the newest: a mean over copies would be none over seeds."""
    of_seed: dict[int, tuple[Run, Checkpoint | None]] = {}
    for pair in sorted(pairs, key=lambda pair: pair[0].rows[-1]["time"]):
        run = pair[0]
        if (older := of_seed.get(run.settings.seed)) is not None:
            warn(
                f"{older[0].folder} has the settings and the seed of {run.folder}, which is "
                "newer: left out"
            )
        of_seed[run.settings.seed] = pair
    return [of_seed[seed] for seed in sorted(of_seed)]


def _names(pairs: Sequence[tuple[Run, Checkpoint | None]]) -> list[str]:
    """Names of the groups; of those that their teachers alone tell apart, with these."""
    names = names_of([run.settings for run, _ in pairs], without=["seed"])
    taught = [teacher.settings for _, teacher in pairs if teacher is not None]
    of_teachers = iter(names_of(taught, without=["seed"]))
    teachers = [None if teacher is None else next(of_teachers) for _, teacher in pairs]
    several = Counter(names)
    return [
        f"{name}, taught by {teacher or 'an unknown teacher'}" if several[name] > 1 else name
        for name, teacher in zip(names, teachers, strict=True)
    ]


def _teachers_files(runs: Sequence[Run]) -> dict[str, Path]:
    """Files that may have taught, by their SHA-256: those of the runs and those that are named."""
    students = [run for run in runs if run.settings.teacher_path is not None]
    files = [
        path
        for run in runs
        if students and run.settings.paper_setting == "original"
        for path in checkpoints_of(run.folder, "original")
    ]
    files += [Path(run.settings.teacher_path) for run in students]
    found = {}
    for path in filter(os.path.isfile, dict.fromkeys(files)):
        try:
            found[digest(path)] = path
        except UserError as error:
            warn(str(error))
    return found


def teacher_of(run: Run, candidates: dict[str, Path]) -> Checkpoint | None:
    """The checkpoint that taught a run, without its weights: by its digest in the run's checkpoint,
    by the beginning of that in the run's name, or, where both are gone, by its path."""
    if run.settings.teacher_path is None:
        return None
    named = re.search(r"-(?:from-)?teacher([0-9a-f]{6})-", run.folder.resolve().name)
    begin = run.teacher or (named[1] if named else None)
    for code, path in candidates.items():
        by_path = begin is None and path == Path(run.settings.teacher_path)
        if by_path or (begin is not None and code.startswith(begin)):
            try:
                return _checkpoint(path)
            except UserError as error:
                warn(f"{error}: no drop to it is shown")
                return None
    warn(
        f"{run.folder}: the file that taught it (once {run.settings.teacher_path}) is not below "
        "the given folders: no drop to it is shown"
    )
    return None


@cache
def _checkpoint(path: Path) -> Checkpoint:
    return load_checkpoint(path, weights=False)


def measured(run: Run, teacher: Checkpoint | None) -> dict[str, float | None]:
    """Each of MEASURES, of one run."""
    last, best = run.rows[-1], run.best
    report = report_of(run) or {"total": {}}
    edap = report["total"].get("edap_pj_ns_um2")

    def percentage(row: dict[str, Any], name: str) -> float | None:
        return None if row.get(name) is None else 100 * row[name]

    return {
        "accuracy_last_epoch_percent": percentage(last, "test_accuracy"),
        "accuracy_best_epoch_percent": percentage(best, "test_accuracy"),
        "validation_accuracy_best_epoch_percent": percentage(best, "val_accuracy"),
        "drop_to_teacher_last_epoch_points": (
            None if teacher is None else 100 * (teacher.accuracy - last["test_accuracy"])
        ),
        "test_loss_last_epoch": last.get("test_loss"),
        "spike_rate_last_epoch_percent": percentage(last, "spike_rate"),
        "edap_uj_ms_mm2": None if edap is None else edap * 1e-18,
        "edap_times_better_than_baseline": report.get("ratio", {}).get("edap"),
    }


def report_of(run: Run) -> dict[str, Any] | None:
    """The hardware report of the run's network that lies in its folder or in one there; None where
    there is none, or where there are some of several chips."""
    reports = {}
    for path in sorted([*run.folder.glob("report.json"), *run.folder.glob("*/report.json")]):
        try:
            report = json.loads(path.read_bytes())
            if not _is_of(run, report):
                warn(f"{path} is of another network than the one in {run.folder}: left out")
                continue
            reports[repr(report["chip"])] = report
        except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
            warn(f"{path} is no report of spikesim_eval, or a damaged one: left out")
    if len(reports) > 1:
        warn(f"{run.folder} holds reports of {len(reports)} chips: no EDAP is shown")
    return next(iter(reports.values())) if len(reports) == 1 else None


def _is_of(run: Run, report: dict[str, Any]) -> bool:
    """Whether a report is of a checkpoint of the run; raises LookupError or TypeError for what is
    none. Another device may have counted a test image or two otherwise."""
    settings, accuracy = run.settings, report["accuracy"]
    float(report["total"]["edap_pj_ns_um2"])
    names = [path.name for path in checkpoints_of(run.folder, settings.paper_setting)]
    return (
        Path(report["name"]).name in names
        and report["network"]["time_steps"] == settings.time_window
        and report["network"]["membrane_bits"] == (settings.bits or 32)
        and (
            accuracy is None or min(abs(accuracy - row["test_accuracy"]) for row in run.rows) < 0.01
        )
    )


# Text.


def table_text(runs: Sequence[Run], form: str) -> str:
    """The table in one of FORMATS."""
    return FORMATS[form](groups_of(runs))


def _shown(groups: Sequence[Group]) -> list[str]:
    """The measures that some group has."""
    return [name for name in MEASURES if any(group.values[name] for group in groups)]


def _cells(groups: Sequence[Group]) -> list[list[str]]:
    """The table as a person reads it, with its header."""
    shown = _shown(groups)
    lines = [["", "runs", *(MEASURES[name][0] for name in shown)]]
    for group in groups:
        number = str(len(group.runs)) + f" (+ {group.unfinished} unfinished)" * (
            group.unfinished > 0
        )
        lines.append([group.name, number])
        for name in shown:
            lines[-1].append(cell(group.values[name], MEASURES[name][1], len(group.runs)))
    return lines


def cell(values: Sequence[float], form: Callable[[float], str], runs: int) -> str:
    """Mean ± standard error of those of so many runs that have the value."""
    if not values:
        return "-"
    mean, error = mean_and_error(values)
    text = form(mean) + ("" if error is None else f" ± {form(error).lstrip('+')}")
    return text + f" ({len(values)} of {runs})" * (len(values) < runs)


def _notes(groups: Sequence[Group]) -> list[str]:
    """What the numbers are, in sentences."""
    notes = ["Mean ± standard error over runs that are finished and differ in the seed alone."]
    if all(len(group.runs) < 2 for group in groups):
        notes = ["Runs that are finished, one seed each: nothing is known of their spread."]
    choices = {deciding(run.best) for group in groups for run in group.runs}
    if "test_accuracy" in choices:
        notes.append("The best epoch is chosen on the test set, as SNN papers do.")
    if "val_accuracy" in choices:
        notes.append("Where there is a validation accuracy, the best epoch is chosen by it.")
    if any(group.values["drop_to_teacher_last_epoch_points"] for group in groups):
        notes.append("The drop is of the last epoch, to the very file that taught the run.")
    return notes


def markdown(cells: Sequence[list[str]], notes: Sequence[str]) -> str:
    header, *rows = cells
    return "\n".join([*markdown_table(header, rows), "", *notes])


LATEX = str.maketrans(
    {x: rf"\{x}" for x in "{}$&#%_"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"±": r"$\pm$", "×": r"$\times$", "·": r"$\cdot$", "µ": r"$\mu$", "²": "$^2$"}
)


def latex(cells: Sequence[list[str]], notes: Sequence[str]) -> str:
    """A tabular of booktabs."""
    header, *rows = (" & ".join(x.translate(LATEX) for x in line) + r" \\" for line in cells)
    top = [r"% \usepackage{booktabs}", *(f"% {note}" for note in notes)]
    top += [rf"\begin{{tabular}}{{l{'r' * (len(cells[0]) - 1)}}}", r"\toprule", header, r"\midrule"]
    return "\n".join([*top, *rows, r"\bottomrule", r"\end{tabular}"])


def mean_columns(names: Iterable[str], number: str) -> list[str]:
    """Of a CSV: for each of `mean_cells`."""
    return [f"{name}_{part}" for name in names for part in ("mean", "standard_error", number)]


def mean_cells(values: Sequence[float]) -> list[float | None]:
    """Mean, standard error and number of the values."""
    return [*(mean_and_error(values) if values else (None, None)), len(values)]


def _csv(groups: Sequence[Group]) -> str:
    shown = _shown(groups)
    keys = ("data", "paper_setting", "loss", "bits", "time_window")
    header = ["name", *keys, "seeds", "runs_finished", "runs_unfinished"]
    lines = []
    for group in groups:
        about = [getattr(group.settings, key) for key in keys]
        seeds = " ".join(str(run.settings.seed) for run in group.runs)
        values = chain.from_iterable(mean_cells(group.values[name]) for name in shown)
        lines.append([group.name, *about, seeds, len(group.runs), group.unfinished, *values])
    return csv_text([*header, *mean_columns(shown, "runs")], lines).rstrip("\n")


FORMATS = {
    "markdown": lambda groups: markdown(_cells(groups), _notes(groups)),
    "csv": _csv,
    "latex": lambda groups: latex(_cells(groups), _notes(groups)),
}
