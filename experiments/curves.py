"""Loss terms, accuracies and learning rate of several runs over their epochs, in one picture."""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import repeat
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from display import kind_of, legend_below, new_figure, picture_files, plain, short_names, styles
from experiments.found_runs import Run, names_of, place_of, warn
from runtime.errors import UserError
from runtime.files import check_writable, write_files

PANELS = {  # column of metrics.csv: (label of the panel, scale)
    "test_accuracy": ("test accuracy, %", 100),
    "val_accuracy": ("validation accuracy, %", 100),
    "train_accuracy": ("training accuracy, %", 100),
    "loss": ("training loss", 1),
    "ce": ("cross-entropy, training", 1),
    "logit": ("logit loss (unweighted)", 1),
    "membrane": ("membrane loss (unweighted)", 1),
    "test_loss": ("cross-entropy, test", 1),
    "val_loss": ("cross-entropy, validation", 1),
    "lr": ("learning rate", 1),
}


def draw(runs: Sequence[Run], out: str) -> list[Path]:
    """Write OUT.png and OUT.pdf, and return their paths. Raises UserError where no run has an epoch
    or the files cannot be written."""
    out = Path(str(out).removesuffix(".png").removesuffix(".pdf"))
    for run in runs:
        if not run.rows:
            warn(f"{run.folder} has no whole epoch yet: left out")
    runs = sorted((run for run in runs if run.rows), key=lambda run: place_of(run.settings))
    if not runs:
        raise UserError("no run has a whole epoch yet: there is nothing to draw")
    check_writable(out.parent, "--out")
    contents = picture_files(picture(runs), out.name)
    write_files(out.parent, contents)
    return [out.with_name(name) for name in contents]


def picture(runs: Sequence[Run]) -> Figure:
    """A panel for each of PANELS that a run has, a line a run."""
    shown = [name for name in PANELS if any(map(_points, runs, repeat(name)))]
    if not {"logit", "membrane"} & {*shown}:
        shown.remove("ce")  # it is the loss
    columns = min((4, 3), key=lambda columns: -len(shown) % columns)  # leaves the fewest empty
    rows, legend_rows = math.ceil(len(shown) / columns), math.ceil(len(runs) / 3)
    size = 3.4 * columns, 2.3 * rows + 0.25 * legend_rows + 0.3
    figure, panels = new_figure(*size, rows, columns, sharex=True, squeeze=False)
    lines = styles([kind_of(run.settings.paper_setting, run.settings.loss) for run in runs])
    labels, used = _labels(runs), panels.flat[: len(shown)]
    for panel, name in zip(used, shown, strict=True):
        if "accuracy" in name and panel is not used[0]:
            panel.sharey(used[0])
        title, scale = PANELS[name]
        for run, label, line in zip(runs, labels, lines, strict=True):
            points = _points(run, name)
            panel.plot(
                [epoch for epoch, _ in points],
                [scale * value for _, value in points],
                marker="o" if len(points) == 1 else "",
                label=label,
                **line,
            )
        panel.set_title(title, fontsize=10)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        if "accuracy" not in name:
            panel.set_ylim(bottom=0)
        panel.tick_params(labelbottom=True)  # also where the panel below is left out
    for panel in panels.flat[len(shown) :]:
        panel.remove()
    for panel in panels.flat[max(0, len(shown) - columns) : len(shown)]:
        panel.set_xlabel("epoch")
    legend_below(figure, [used[0]], ncols=min(3, len(runs)))
    return figure


def _points(run: Run, name: str) -> list[tuple[int, float]]:
    """(epoch, value) of the epochs that have one."""
    return [(row["epoch"], row[name]) for row in run.rows if row.get(name) is not None]


def _labels(runs: Sequence[Run]) -> list[str]:
    """What tells the runs apart, else their folders."""
    names = names_of([run.settings for run in runs], without=["epochs"])
    folders = short_names([str(run.folder.resolve()) for run in runs])
    several = Counter(names)
    return [
        plain(
            name
            + f" ({folder})" * (several[name] > 1)
            + f", {run.state} at {len(run.rows)}/{run.settings.epochs}" * (run.state != "finished")
        )
        for name, folder, run in zip(names, folders, runs, strict=True)
    ]
