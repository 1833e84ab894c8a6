"""One teacher for every latency: students of several T, with and without it.

    python -m experiments.timesteps --data CIFAR10 --bits 4 --teacher_time_window 4 \\
        --time_windows 1 2 4 6 --seeds 1 2 3

At each T: a plain student, one taught (CLK) by the one teacher, and one taught by a teacher that
was trained at the student's own T. Of static images also one network for every T (CLK, by the one
teacher): each of its batches has a T of the list, and it is tested at each.

All other options are those of experiments.study.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from display import legend_below, new_figure, plain, styles
from experiments.plan import NOT_GIVEN, TEACHER, Planned, plan
from experiments.rows import Row
from experiments.study import axes_of, base_parser, command, of_teacher
from experiments.study_table import (
    MEASURES,
    Group,
    shown_value,
    teachers_of,
    values_of,
    varied,
    words,
    write_tables,
)
from experiments.table import cell, mean_and_error
from runtime.command import Parser
from settings import DATA_SETS

METHOD = "CLK"
PLAIN, ONE, OWN_T, EVERY = (
    "student",
    f"{METHOD}, the one teacher",
    f"{METHOD}, a teacher of its T",
    f"{METHOD}, one network for T",  # and its list
)
KINDS = {TEACHER: TEACHER, PLAIN: PLAIN, ONE: METHOD, OWN_T: "CL", EVERY: "CLM"}  # and colours
COLUMNS = ("accuracy", "gain", "spike_rate", "energy_pj", "delay_ns", "edap")


def timesteps_parser() -> Parser:
    parser = base_parser("timesteps", __doc__, methods=[])
    parser.set_defaults(time_window=["1", "2", "4", "6"])
    return parser


def planned_runs(args: argparse.Namespace, runs: Path) -> list[Planned]:
    axes, theirs = axes_of(args), of_teacher(args)
    windows = list(dict.fromkeys(axes["time_window"]))
    one = {"time_window": "4"} | theirs
    own = {name: x for name, x in theirs.items() if name != "time_window"}
    found = plan(axes, args.bits, ["student", METHOD], args.starts, one, runs)
    found = plan(axes, args.bits, [METHOD], args.starts, own, runs, found)
    static = [x for x in axes["data"] if not DATA_SETS[x].events]
    if len(windows) > 1 and static:
        every = {"data": static, "time_window": NOT_GIVEN, "time_windows": [" ".join(windows)]}
        one |= {"time_windows": None}
        found = plan(axes | every, args.bits, [METHOD], args.starts, one, runs, found)
    return found


def networks_of(group: Group, groups: Sequence[Group]) -> list[str]:
    """What it is: one of KINDS, or two where the one teacher has the student's T."""
    row = group.about
    if row["method"] != METHOD:
        return [row["method"]]
    windows = values_of(row["settings"]).get("time_windows")
    if windows is not None:
        return [f"{EVERY} {', '.join(re.findall(r'[0-9]+', windows))}"]
    teachers = teachers_of(row)
    if ("time_window", row["time_window"]) not in teachers:
        return [ONE]
    taught = {
        other.about["time_window"]
        for other in groups
        if other.about["method"] == METHOD and teachers_of(other.about) == teachers
    }
    return [ONE, OWN_T] if len(taught) > 1 else [OWN_T]


def kind_of(network: str) -> str:
    """Which of KINDS a network is that `networks_of` names so."""
    return next(kind for kind in KINDS if network.startswith(kind))


def order_of(network: str) -> tuple[int, str]:
    """Where it stands among others."""
    return list(KINDS).index(kind_of(network)), network


def options_of(groups: Sequence[Group]) -> list[str]:
    return [name for name in varied(groups) if name != "time_windows"]


def cells_of(groups: Sequence[Group]) -> list[list[str]]:
    """The table as a person reads it, with its header."""
    names, lines = options_of(groups), []
    measures = [name for name in COLUMNS if any(group.values[name] for group in groups)]
    for group in groups:
        row, networks = group.about, networks_of(group, groups)
        line = [row["data"], row["bits"] or "full", row["start"] * (row["method"] != TEACHER)]
        line += [shown_value(row, name) for name in names]
        line += [networks[0], row["time_window"], str(group.n)]
        for name in measures:
            _, _, scale, form = MEASURES[name]
            line.append(cell([scale * x for x in group.values[name]], form, group.n))
        lines.append((order_of(networks[0]), line))
    header = ["data", "bits", "from", *names, "network", "T", "n"]
    ordered = sorted(lines, key=lambda pair: (pair[1][: 3 + len(names)], pair[0]))
    return [header + [MEASURES[name][1] for name in measures], *(line for _, line in ordered)]


def picture(groups: Sequence[Group]) -> Figure:
    """Accuracy over latency, and over energy; a row of panels for each data set, width in bits,
    start and recipe."""
    names = options_of(groups)

    def panel_of(row: Row) -> str:
        about = [row["data"], f"{row['bits']} bits", f"from {row['start']}"]
        return ", ".join([*about, *words(row, names)])

    students = [group for group in groups if group.about["method"] != TEACHER]
    titles = list(dict.fromkeys(panel_of(group.about) for group in students))
    networks = sorted({x for group in students for x in networks_of(group, groups)}, key=order_of)
    looks = dict(zip(networks, styles([KINDS[kind_of(x)] for x in networks]), strict=True))
    height = 0.8 + 3.4 * len(titles)
    figure, panels = new_figure(10, height, len(titles), 2, sharey="row", squeeze=False)
    for title, line in zip(titles, panels, strict=True):
        here = [group for group in students if panel_of(group.about) == title]
        for measure, panel in zip(("delay_ns", "energy_pj"), line, strict=True):
            _, label, scale, _ = MEASURES[measure]
            highest: dict[str, list[float]] = {}
            for network, look in looks.items():
                shown = [group for group in here if network in networks_of(group, groups)]
                shown.sort(key=lambda group: int(group.about["time_window"]))
                x = [scale * mean_and_error(group.values[measure])[0] for group in shown]
                points = [mean_and_error([100 * a for a in g.values["accuracy"]]) for g in shown]
                heights, errors = [y for y, _ in points], [error or 0.0 for _, error in points]
                if shown:
                    how = {"marker": "o", "capsize": 2, "label": network, **look}
                    panel.errorbar(x, heights, errors, **how)
                for group, *point in zip(shown, x, heights, strict=True):
                    T = group.about["time_window"]
                    highest[T] = max(highest.get(T, point), point, key=lambda point: point[1])
            for T, point in highest.items():
                how = {"textcoords": "offset points", "ha": "center", "fontsize": 8}
                panel.annotate(f"T {T}", point, (0, 7), **how)
            panel.margins(y=0.12)
            panel.set_xlabel(label)
        line[0].set_ylabel("accuracy, %")
        line[0].set_title(plain(title), loc="left", fontsize=10)
    legend_below(figure, panels.flat, ncols=2)
    return figure


def write(args: argparse.Namespace, folder: Path) -> None:
    write_tables(folder, cells_of, picture)


def main(argv: Sequence[str] | None = None) -> int:
    return command(argv, timesteps_parser(), planned_runs, write)


if __name__ == "__main__":
    sys.exit(main())
