"""What a study's rows.csv says: a table (Markdown, CSV, LaTeX) and a picture (PNG, PDF)."""

import math
import re
import shlex
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from data_sets import DATA_SETS
from display import COLOURS, legend_below, new_figure, picture_files, plain, significant, styles
from experiments.plan import METHODS, STARTS, TEACHER
from experiments.rows import ROWS, Row, read_rows
from experiments.table import cell, latex, markdown, mean_and_error, mean_cells, mean_columns
from runtime.errors import UserError
from runtime.files import write_files
from settings import MS_RESNETS, OPTIONS, complete
from spikesim_eval.render import csv_text

two_digits, signed = "{:.2f}".format, "{:+.2f}".format
# Accuracies of MD-SNN, %, as public digests of arXiv 2512.04443 give them.
PAPER = {"CIFAR10": 94.27, "CIFAR100": 74.91, "TinyImagenet": 60.59, "ncaltech101": 81.73}
PAPERS_METHOD = "CLK"
PAPERS_COLUMN = "the paper's, second-hand, %"
MEASURES = {  # column of rows.csv: (its name with the unit, what a reader sees, scale, format)
    "accuracy": ("accuracy_percent", "accuracy, %", 100, two_digits),
    "gain": ("gain_over_student_points", "gain over student, points", 100, signed),
    "drop_to_teacher": ("drop_to_teacher_points", "drop to teacher, points", 100, two_digits),
    "membrane_kl": ("membrane_kl", "membrane KL", 1, partial(significant, digits=3)),
    "membrane_mse": ("membrane_mse", "membrane MSE", 1, partial(significant, digits=3)),
    "differing_spikes": ("differing_spikes_percent", "differing spikes, %", 100, two_digits),
    "spike_rate": ("spike_rate_percent", "spike rate, %", 100, two_digits),
    "edap_ratio": ("edap_times_better_than_teacher", "EDAP, × better", 1, two_digits),
    "best_accuracy": ("best_epoch_accuracy_percent", "best epoch, %", 100, two_digits),
    "energy_pj": ("energy_uj", "energy, µJ", 1e-6, partial(significant, digits=4)),
    "delay_ns": ("delay_ms", "delay, ms", 1e-6, partial(significant, digits=4)),
    "edap": ("edap_uj_ms_mm2", "EDAP, µJ·ms·mm²", 1e-18, partial(significant, digits=4)),
}
NOT_IN_THE_TABLE = {"energy_pj", "delay_ns", "edap"}  # of a person: EDAP says it
SHOWN = ("accuracy", "membrane_kl", "differing_spikes")  # in the picture
Values = dict[str, str]  # settings by name


@dataclass
class Group:
    """Rows that differ in seed and fold alone.

    Attributes:
        about: the first of them, with all that the rows of its teachers say of them.
        values: of each measure, of the rows that have it, unscaled; with several folds of each the
            mean, since runs of a fold share their test images.
    """

    about: Row
    rows: list[Row]
    values: dict[str, list[float]]

    @property
    def folds(self) -> set[str]:
        return {row["fold"] for row in self.rows}

    @property
    def n(self) -> int:
        """How many values a measure has."""
        return len(self.folds) if len(self.folds) > 1 else len(self.rows)


@cache
def values_of(telling: str) -> Values:
    """The settings of a column `settings`, as words."""
    return dict(word.split("=", 1) for word in shlex.split(telling))


@cache
def of_method() -> frozenset[str]:
    """Settings that a plain student has not, or has another default of, than one that is taught."""
    student, taught = (
        complete({"data": "digits", "paper_setting": setting, "bits": 4})
        for setting in ("student", "qamd")
    )
    return frozenset(
        name
        for name, about in OPTIONS.items()
        if name in ("paper_setting", "loss")
        or (about.where is not None and about.where(student) and not about.where(taught))
        or (callable(about.default) and about.default(student) != about.default(taught))
    )


def groups_of(rows: Sequence[Row]) -> list[Group]:
    """The groups, sorted for a reader: teachers first, few bits first, the plain student first."""
    members: dict[tuple, list[Row]] = {}
    # A student says only what its teacher has of its own: one that has less in common with the same
    # teacher says more.
    said_of: dict[tuple, set[str]] = {}
    for row in rows:
        members.setdefault(kind_of(row), []).append(row)
        said_of.setdefault(teachers_of(row), set()).update(shlex.split(row["teacher_options"]))
    students = [row for row in rows if row["method"] == "student"]
    groups = []
    for of_group in members.values():
        of_rows = [measures_of(row, students) for row in of_group]
        values = {name: _values(of_group, [x.get(name) for x in of_rows]) for name in MEASURES}
        words = " ".join(sorted(said_of[teachers_of(of_group[0])]))
        groups.append(Group(of_group[0] | {"teacher_options": words}, of_group, values))
    return sorted(groups, key=place_of)


def measures_of(row: Row, students: Sequence[Row]) -> dict[str, float]:
    """Those of MEASURES that a row has, unscaled."""
    found = {name: float(row[name]) for name in MEASURES if row.get(name)}
    costs = [row[name] for name in ("energy_pj", "delay_ns", "area_um2")]
    if all(costs):
        found["edap"] = math.prod(map(float, costs))
    if row["method"] not in (TEACHER, "student") and (theirs := partner(row, students)):
        found["gain"] = found["accuracy"] - float(theirs["accuracy"])
    return found


def _values(rows: Sequence[Row], found: Sequence[float | None]) -> list[float]:
    of_fold: dict[str, list[float]] = {}
    for row, value in zip(rows, found, strict=True):
        if value is not None:
            of_fold.setdefault(row["fold"], []).append(value)
    if len({row["fold"] for row in rows}) < 2:
        return next(iter(of_fold.values()), [])
    return [statistics.fmean(values) for values in of_fold.values()]


def kind_of(row: Row) -> tuple:
    """What the rows of a group have in common."""
    return tuple(without_seed(values_of(row[x])) for x in ("settings", "teacher_settings"))


def teachers_of(row: Row) -> tuple:
    """What tells them from others but seed and fold."""
    return without_seed(values_of(row["teacher_settings"]))


def without_seed(values: Values) -> tuple:
    return tuple((name, x) for name, x in values.items() if name not in ("seed", "fold"))


def partner(row: Row, students: Iterable[Row]) -> Row | None:
    """The plain student that is like it in all but how it was taught; of a network for several T
    one of this T."""

    def like(row: Row, ignored: Iterable[str]) -> Values:
        values = values_of(row["settings"])
        return {name: x for name, x in values.items() if name not in ignored}

    for ignored in (of_method(), {*of_method(), "time_windows"}):
        ours = like(row, ignored)
        alike = [student for student in students if like(student, ignored) == ours]
        if alike:
            break
    # Teachers teach no plain student, but those that differ in them are other rows.
    same_teacher = [x for x in alike if x["teacher_settings"] == row["teacher_settings"]]
    alike = same_teacher or alike
    values = values_of(row["settings"])
    # What has another default is the same where somebody has given it for both.
    same = [x for x in alike if like(x, ("paper_setting", "loss")).items() <= values.items()]
    defaults = [x for x in alike if not _given(x) & of_method()]
    return next(iter([*same, *defaults, *alike]), None)


def _given(row: Row) -> set[str]:
    return {word.split("=", 1)[0] for word in shlex.split(row["options"])}


def place_of(group: Group) -> tuple:
    row = group.about
    methods, numbers = [TEACHER, *METHODS], values_of(row["settings"])
    order = [_number(x) for name, x in sorted(numbers.items()) if name not in ("seed", "fold")]
    method = methods.index(row["method"])
    own = int(row["bits"] or 0), [*STARTS].index(row["start"]), method
    return row["data"], int(row["time_window"]), *own, order


def _number(text: str) -> tuple:
    try:
        return 0, float(text), ""
    except ValueError:
        return 1, 0.0, text


# The table.


def varied(groups: Sequence[Group]) -> list[str]:
    """Options that somebody has given and that are not the same in all groups that have them."""
    groups = _students(groups) or groups  # what teachers have of their own is said otherwise
    given = dict.fromkeys(name for group in groups for name in sorted(_given(group.about)))
    return [name for name in given if len(_all_values(groups, name)) > 1]


def _students(groups: Sequence[Group]) -> list[Group]:
    return [group for group in groups if group.about["method"] != TEACHER]


def _all_values(groups: Sequence[Group], name: str) -> set[str]:
    found = (_value(group.about, name) for group in groups)
    return {value for value in found if value is not None}


def _value(row: Row, name: str) -> str | None:
    values, about = values_of(row["settings"]), OPTIONS[name]
    if name in values or not about.has("added"):
        return values.get(name)
    # Defaults that `plan.telling` leaves out, and what is stored in another way.
    if name == "arch":
        return f"resnet{values['model_depth']}"
    if name == "image_size":
        return "{}x{}".format(*DATA_SETS[values["data"]].image_size)
    default = about.constant_default
    return None if default is None or about.refusal(values) else str(default)


def shown_value(row: Row, name: str) -> str:
    text = _value(row, name) or ""
    try:
        return f"{float(text):g}"
    except ValueError:
        return text


def words(row: Row, names: Iterable[str]) -> list[str]:
    """Its values of these options, of those that have a meaning for it."""
    return [f"{x} {shown_value(row, x)}" for x in names if shown_value(row, x)]


def cells_of(groups: Sequence[Group]) -> list[list[str]]:
    """The table as a person reads it, with its header."""
    axes = varied(groups)
    teachers = {group.about["teacher_options"] for group in _students(groups)}
    measures = [
        name
        for name in MEASURES
        if name not in NOT_IN_THE_TABLE and any(group.values[name] for group in groups)
    ]
    papers = any(group.about["data"] in PAPER for group in groups)
    header = ["data", "T", "bits", "method", "from", *axes, *["teacher"] * (len(teachers) > 1)]
    header += ["n", *(MEASURES[name][1] for name in measures)]
    if papers:
        header.insert(header.index("n") + 2, PAPERS_COLUMN)
    lines = [header]
    for group in groups:
        row = group.about
        is_teacher = row["method"] == TEACHER
        line = [row["data"], row["time_window"], row["bits"] or "full", row["method"]]
        line += ["" if is_teacher else row["start"], *(shown_value(row, name) for name in axes)]
        line += [row["teacher_options"]] * (len(teachers) > 1)
        number = len(line)
        line.append(str(group.n))
        for name in measures:
            _, _, scale, form = MEASURES[name]
            line.append(cell([scale * x for x in group.values[name]], form, group.n))
        if papers:
            of_paper = row["method"] == PAPERS_METHOD and PAPER.get(row["data"])
            line.insert(number + 2, two_digits(of_paper) if of_paper else "")
        lines.append(line)
    return lines


def notes_of(groups: Sequence[Group], header: Sequence[str]) -> list[str]:
    """What the numbers of a table with this header are, in sentences."""
    rows = [row for group in groups for row in group.rows]

    def has(*names: str) -> bool:
        return any(MEASURES[name][1] in header for name in names)

    notes = [f"{_common_options(groups)}."]
    over = sorted({"folds" if len(g.folds) > 1 else "seeds" for g in groups if g.n > 1})
    spread = f"mean ± standard error over n {' or '.join(over)}"
    if not over:
        spread = "one run each: nothing is known of the spread"
    notes.append(f"Last epoch, all test images; {spread}.")
    if any(group.n < len(group.rows) for group in groups):
        notes.append("A fold is the mean of its seeds, which share their test images.")
    if "folds" in over:
        notes.append("Folds share training images: their standard error is a little too small.")
    if has("gain"):
        notes.append("The gain is paired: each run against the plain student of its seed and fold.")
    if has("drop_to_teacher", "membrane_kl", "membrane_mse", "differing_spikes", "edap_ratio"):
        notes.append(
            "Drop, membranes and the ratio of EDAP are to each run's own full-precision teacher, "
            "EDAP as the published tool charges it (spikesim_eval --preset published)."
        )
    validated = {"val_share" in values_of(row["settings"]) for row in rows}
    if has("best_accuracy") and True in validated:
        notes.append("With val_share the best epoch is the best on the validation part.")
    if has("best_accuracy") and False in validated:
        notes.append("The best epoch is chosen on the test images, as SNN papers do.")
    if PAPERS_COLUMN in header:
        notes.append(
            "The paper's accuracies are second-hand: as public digests of arXiv 2512.04443 give "
            "them, bits and T unstated, its text not seen."
        )
    for name in ("hardware", "commit"):
        several = Counter(_short(row[name]) or "unknown" for row in rows)
        counts = "; ".join(f"{x} ({n} runs)" if len(several) > 1 else x for x, n in several.items())
        notes.append(f"{name.capitalize()}: {counts}.")
    return notes


def _short(text: str) -> str:
    """A commit's first twelve digits; anything else as it is."""
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{28}\b", r"\1", text)


def _common_options(groups: Sequence[Group]) -> str:
    """Depth, width and epochs, and what else was given and is the same in all."""
    given = {name for group in groups for name in _given(group.about)}
    depths = sorted(_all_values(groups, "model_depth"), key=int)
    words = [f"MS-ResNet-{'/'.join(depths)}"] * bool(depths)
    words += sorted(_all_values(groups, "arch") - {*MS_RESNETS})
    for name in dict.fromkeys(
        ["width", "epochs", *sorted(given - {"arch", "model_depth", "time_windows"})]
    ):
        values = _all_values(_students(groups) or groups, name)
        if len(values) == 1:
            words.append(
                f"{name} {shown_value({'settings': f'{name}={shlex.quote(*values)}'}, name)}"
            )
    teachers = {group.about["teacher_options"] for group in _students(groups)}
    if len(teachers) == 1 and teachers != {""}:
        words.append(f"teachers with {' '.join(teachers)}")
    return ", ".join(words)


def table_csv(groups: Sequence[Group]) -> str:
    """Of each measure the mean, its standard error and how many values it is of."""
    keys = ("data", "time_window", "bits", "method", "start", "options", "teacher_options")
    columns = mean_columns((name for name, *_ in MEASURES.values()), "n")
    lines = []
    for group in groups:
        row = group.about
        line = [row[key] for key in keys]
        line += [" ".join(dict.fromkeys(x[name] for x in group.rows)) for name in ("seed", "fold")]
        for name, (_, _, scale, _) in MEASURES.items():
            line += mean_cells([scale * x for x in group.values[name]])
        line.append(PAPER.get(row["data"]) if row["method"] == PAPERS_METHOD else None)
        lines.append(line)
    return csv_text([*keys, "seeds", "folds", *columns, "paper_second_hand_percent"], lines)


# The picture.


def picture(groups: Sequence[Group]) -> Figure:
    """Accuracy, membrane KL and differing spikes over bits; a row of panels for each data set, T,
    start and recipe. Those of a data set have one scale."""
    axes = varied(groups)
    of_line = [name for name in axes if name in of_method()]
    of_panel = [name for name in axes if name not in of_method()]
    students = _students(groups)

    def panel_of(row: Row) -> str:
        parts = [row["data"], f"T {row['time_window']}", f"from {row['start']}"]
        of_teachers = [f"teachers with {x}" for x in [row["teacher_options"]] if x]
        return ", ".join([*parts, *words(row, of_panel), *of_teachers])

    titles = list(dict.fromkeys(panel_of(group.about) for group in students))
    labels = {}
    for group in students:
        name = ", ".join([group.about["method"], *words(group.about, of_line)])
        labels.setdefault(name, group.about["method"])
    looks = dict(zip(labels, styles([*labels.values()]), strict=True))
    widths = sorted({int(group.about["bits"]) for group in students})
    height = 0.8 + 2.8 * len(titles)
    figure, panels = new_figure(12, height, len(titles), len(SHOWN), sharex=True, squeeze=False)
    first_of: dict[str, Any] = {}  # the panels of a data set that are drawn first
    for title, line in zip(titles, panels, strict=True):
        here = [group for group in students if panel_of(group.about) == title]
        firsts = first_of.setdefault(here[0].about["data"], line)
        for measure, panel, first in zip(SHOWN, line, firsts, strict=True):
            if panel is not first:
                panel.sharey(first)
            _, label, scale, _ = MEASURES[measure]
            for i, (name, look) in enumerate(looks.items()):
                shown = [
                    group
                    for group in here
                    if ", ".join([group.about["method"], *words(group.about, of_line)]) == name
                    and group.values[measure]
                ]
                points = [mean_and_error([scale * x for x in g.values[measure]]) for g in shown]
                aside = 0.06 * (i - (len(looks) - 1) / 2)
                panel.errorbar(
                    [widths.index(int(group.about["bits"])) + aside for group in shown],
                    [mean for mean, _ in points],
                    [error or 0.0 for _, error in points],
                    **{"marker": "o", "capsize": 2, "label": plain(name), **look},
                )
            panel.set_xticks(range(len(widths)), widths)
            panel.set(xlim=(-0.5, len(widths) - 0.5), ylabel=label)
        line[0].set_title(plain(title), loc="left", fontsize=10)
        _levels(line[0], here)
    for panel in panels[-1]:
        panel.set_xlabel("bits")
    legend_below(figure, panels.flat, ncols=min(6, len(looks) + 2))
    return figure


def _levels(panel: Any, students: Sequence[Group]) -> None:
    """The accuracies of the teachers and of the paper."""
    rows = [row for group in students for row in group.rows if row["teacher_accuracy"]]
    taught_by = {
        (row["teacher_settings"], row["teacher_accuracy"]): float(row["teacher_accuracy"])
        for row in rows
    }
    if taught_by:
        mean, _ = mean_and_error([100 * x for x in taught_by.values()])
        panel.axhline(mean, color=COLOURS[TEACHER], linestyle="--", label="teacher")
    if (paper := PAPER.get(students[0].about["data"])) is not None:
        panel.axhline(paper, color="#000000", linestyle=":", label="the paper's, second-hand")


def write_tables(
    folder: Path,
    cells_of: Callable[[Sequence[Group]], list[list[str]]] = cells_of,
    picture: Callable[[Sequence[Group]], Figure] = picture,
) -> None:
    """Write table.md, .csv, .tex and picture.png, .pdf into the folder of rows.csv, and print the
    table. Raises UserError where there are no rows, or nothing can be written."""
    rows = read_rows(folder / ROWS)
    if not rows:
        raise UserError(f"{folder / ROWS} holds no rows: there is no table yet")
    groups = groups_of(rows)
    cells = cells_of(groups)
    notes = notes_of(groups, cells[0])
    text = markdown(cells, notes)
    contents: dict[str, str | bytes] = {
        "table.md": text + "\n",
        "table.csv": table_csv(groups),
        "table.tex": latex(cells, notes) + "\n",
    }
    if any(group.about["method"] != TEACHER for group in groups):
        contents |= picture_files(picture(groups), "picture")
    write_files(folder, contents, "--results")
    print(text, flush=True)
    print(f"{', '.join(contents)} are in {folder}", flush=True)
