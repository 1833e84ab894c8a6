"""Plots of a report, of a comparison and of a sweep, drawn with matplotlib without a screen."""

import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from display import (
    COMPONENT_COLOURS,
    SHADING,
    component_name,
    cut,
    legend_below,
    legend_beside,
    new_figure,
    plain,
    short_names,
    styles,
)

from .render import QUANTITIES, RATIO_NAMES, unit_of

# The same report is the same file, and its text stays text: the browser has the fonts, so that
# matplotlib need not say which of them it lacks.
logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
matplotlib.rcParams |= {"svg.hashsalt": "spikesim_eval", "svg.fonttype": "none"}

WIDTH = 9  # of a figure, inches
MOST_LABELS = 55  # beside one another on an axis
LONGEST_LABEL = 28  # characters
VISIBLE = 2e-3  # share of the largest bar: half a point on a screen
PARTS = {"energy_by_component": "energy_pj", "area_by_component": "area_um2"}
CRITICAL, BESIDE_IT = "#D55E00", "#BBBBBB"  # of layers


def svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def report_plots(report: Mapping[str, Any]) -> dict[str, str]:
    """SVG by heading."""
    plots = {}
    if "baseline" in report:
        names = short_names([report["baseline_name"], report["name"]])
        baseline = {kind: report[f"baseline_{kind}"] for kind in PARTS}
        plots["Beside the baseline"] = compare_plot(names, [baseline, report])
    plots |= {
        "Energy by layer": stacked(report["layers"], "energy_by_component"),
        "Area by layer": stacked(report["layers"], "area_by_component"),
        "Critical path": timeline(report["layers"]),
    }
    if "sensitivity" in report:
        plots["Sensitivity"] = swings(report["sensitivity"], report["published"])
    if report["spike_rates_by_timestep"]:
        plots["Spike rate by layer and timestep"] = spike_rates(report["spike_rates_by_timestep"])
    return {heading: svg(figure) for heading, figure in plots.items()}


def label_ticks(
    axis: Axis, names: Sequence[str], longest: int = LONGEST_LABEL, **options: Any
) -> None:
    """A name a place from 0; of more than fit beside one another, every second, third …"""
    places = range(0, len(names), -(-len(names) // MOST_LABELS))
    axis.set_ticks(places, [plain(cut(names[i], longest)) for i in places], **options)


def draw_stacked(
    panel: Axes, rows: Sequence[Mapping[str, float]], kind: str, flat: bool = False
) -> None:
    """A bar a row, a colour a component, the largest component first; `kind` is a key of PARTS.

    The axis has the unit that suits the largest bar. What is too thin to be seen in every bar has
    no entry in the legend.
    """
    what, *_ = QUANTITIES[PARTS[kind]]
    largest = max(sum(row.values()) for row in rows)
    one, unit = unit_of(PARTS[kind], largest)
    components = dict.fromkeys(component for row in rows for component in row)
    components = sorted(components, key=lambda x: -sum(row.get(x, 0.0) for row in rows))
    draw, start = (panel.barh, "left") if flat else (panel.bar, "bottom")
    before = np.zeros(len(rows))
    for component in components:
        values = np.array([row.get(component, 0.0) for row in rows], dtype=float)
        draw(
            range(len(rows)),
            values / one,
            **{start: before / one},
            label=component_name(component) if values.max() > VISIBLE * largest else None,
            color=COMPONENT_COLOURS[component],
            edgecolor="white",
            linewidth=0.3,
        )
        before = before + values
    panel.set(**{"xlabel" if flat else "ylabel": f"{what}, {unit}"})
    panel.set(**{"xlim" if flat else "ylim": (0, 1.03 * largest / one)})


def stacked(layers: Sequence[Mapping[str, Any]], kind: str) -> Figure:
    """Energy or area (`kind`, a key of PARTS) of every layer, by component."""
    figure, panel = new_figure(WIDTH, 4.2)
    draw_stacked(panel, [row[kind] for row in layers], kind)
    label_ticks(panel.xaxis, [row["name"] for row in layers], rotation=70, ha="right", fontsize=8)
    panel.margins(x=0.01)
    legend_beside(panel, reverse=True)  # as they lie on one another
    return figure


def timeline(layers: Sequence[Mapping[str, Any]]) -> Figure:
    """When each layer starts and ends; the critical path in colour."""
    figure, panel = new_figure(WIDTH, 0.9 + 0.22 * min(len(layers), MOST_LABELS))
    one, unit = unit_of("delay_ns", max(row["finish_ns"] for row in layers))
    for label, colour, on_path in (
        ("on the critical path", CRITICAL, True),
        ("beside it", BESIDE_IT, False),
    ):
        places = [i for i, row in enumerate(layers) if row["on_critical_path"] is on_path]
        starts, lengths = (
            [layers[i][key] / one for i in places] for key in ("start_ns", "delay_ns")
        )
        if places:
            panel.barh(places, lengths, left=starts, color=colour, label=label)
    label_ticks(panel.yaxis, [row["name"] for row in layers], fontsize=8)
    panel.margins(y=0.01)
    panel.invert_yaxis()
    panel.set_xlabel(f"time, {unit}")
    legend_beside(panel)
    return figure


def swings(rows: Sequence[Mapping[str, Any]], published: Mapping[str, float]) -> Figure:
    """What each assumption changed alone does to the paper's ratios, from where they are as
    assumed (the first row); dashed: the published ones."""
    figure, panels = new_figure(WIDTH, 1.2 + 0.24 * len(rows), columns=len(published), sharey=True)
    assumed, *changed = rows
    for panel, (name, value) in zip(panels, published.items(), strict=True):
        at = assumed["ratio"][name]
        ends = [row["ratio"][name] for row in changed]
        colours = [CRITICAL if end > at else BESIDE_IT for end in ends]
        widths = [end - at for end in ends]
        panel.barh(range(len(ends)), widths, left=at, color=colours)
        panel.axvline(at, color="black", linewidth=0.8)
        panel.axvline(value, color="black", linewidth=0.8, linestyle="--")
        panel.set(xscale="log", xlabel=f"{RATIO_NAMES[name]}, times better")
        log_ticks(panel.xaxis, min(*ends, at, value), max(*ends, at, value))
    label_ticks(panels[0].yaxis, [row["change"] for row in changed], longest=40, fontsize=8)
    panels[0].invert_yaxis()
    return figure


def spike_rates(rates: Mapping[str, Sequence[float]]) -> Figure:
    """A row a timestep, a column a LIF layer."""
    values = 100 * np.array(list(rates.values())).T
    figure, panel = new_figure(WIDTH, 2.2 + 0.25 * min(len(values), MOST_LABELS // 2))
    image = panel.imshow(values, aspect="auto", vmin=0, cmap=SHADING)
    label_ticks(panel.xaxis, list(rates), rotation=70, ha="right", fontsize=8)
    label_ticks(panel.yaxis, [str(t + 1) for t in range(len(values))], fontsize=8)
    panel.set_ylabel("timestep")
    figure.colorbar(image, label="spikes per neuron, %")
    return figure


def compare_plot(names: Sequence[str], parts: Sequence[Mapping[str, Mapping]]) -> Figure:
    """Energy and area of several networks, by component; a row a network, the first on top. Each of
    `parts` holds what the keys of PARTS name."""
    figure, panels = new_figure(WIDTH, 1.7 + 0.35 * len(names), columns=2, sharey=True)
    for panel, kind in zip(panels, PARTS, strict=True):
        draw_stacked(panel, [found[kind] for found in parts], kind, flat=True)
        panel.xaxis.set_major_locator(MaxNLocator(6))
    label_ticks(panels[0].yaxis, names)
    panels[0].invert_yaxis()
    legend_below(figure, panels, ncols=6)
    return figure


def sweep_plot(
    columns: Mapping[str, np.ndarray], front: np.ndarray, kinds: Mapping[str, str | None]
) -> Figure:
    """Energy · delay over area, a colour a network; in black circles the Pareto front, or, where
    there is none, the points of `front`: those that get a number, from 1.

    `kinds` says how the networks of the column were trained (display.COLOURS).
    """
    figure, panel = new_figure(WIDTH, 6)
    (area, area_unit), (edp, edp_unit) = (
        (columns[key] / one, unit)
        for key in ("area_um2", "edp_pj_ns")
        for one, unit in [unit_of(key, np.median(columns[key]))]
    )
    for here, colour, label, size in points_by_network(columns, kinds):
        panel.scatter(area[here], edp[here], s=size, color=colour, rasterized=True)
        panel.scatter([], [], s=24, color=colour, label=label)
    circled, label = np.flatnonzero(columns["pareto"]), "Pareto front"
    if not len(circled):
        circled, label = front, "least EDAP"
    circles = {"s": 90, "facecolors": "none", "edgecolors": "black", "label": label}
    panel.scatter(area[circled], edp[circled], **circles)
    panel.set(
        xscale="log",
        yscale="log",
        xlabel=f"area, {area_unit}",
        ylabel=f"energy · delay, {edp_unit}",
    )
    for axis, values in ((panel.xaxis, area), (panel.yaxis, edp)):
        log_ticks(axis, values.min(), values.max())
    legend_beside(panel)
    points = np.column_stack([area, edp])
    number_points(figure, panel, points[front], points[circled])
    return figure


def points_by_network(
    columns: Mapping[str, np.ndarray], kinds: Mapping[str, str | None]
) -> Iterator[tuple[np.ndarray, str, str, float]]:
    """(which points are its, colour, label, size of a point) of each network, width and T.
    Networks that cost the same lie on one another: those drawn first are larger."""
    names = dict(zip(kinds, short_names(list(kinds), LONGEST_LABEL), strict=True))
    keys = zip(*(columns[key].tolist() for key in ("network", "bits", "time_steps")), strict=True)
    found: dict[tuple, int] = {}
    index = np.array([found.setdefault(key, len(found)) for key in keys])
    looks = styles([kinds[network] or network for network, *_ in found])
    for (network, bits, steps), i in found.items():
        label = plain(f"{names[network]}, {bits} bits, T = {steps}")
        yield index == i, looks[i]["color"], label, 6 + 24 * (1 - (i + 1) / len(found))


def accuracy_plot(columns: Mapping[str, np.ndarray], kinds: Mapping[str, str | None]) -> Figure:
    """Accuracy on the chip over EDAP, of the chips on which it is known: a line is the best that a
    network reaches with so much EDAP, dashed is what it has off the chip."""
    figure, panel = new_figure(WIDTH, 5)
    known = ~np.isnan(columns["chip_accuracy"])
    values = columns["edap_pj_ns_um2"]
    one, unit = unit_of("edap_pj_ns_um2", np.median(values[known]))
    edap, accuracy = values / one, 100 * columns["chip_accuracy"]
    for points, colour, label, size in points_by_network(columns, kinds):
        here = np.flatnonzero(points & known)
        if not len(here):
            continue
        order = here[np.argsort(edap[here], kind="stable")]
        best = np.maximum.accumulate(accuracy[order])
        panel.scatter(edap[here], accuracy[here], s=size, color=colour, rasterized=True)
        panel.plot(edap[order], best, color=colour, drawstyle="steps-post", label=label)
        panel.axhline(100 * columns["accuracy"][here[0]], color=colour, linestyle="--", linewidth=1)
    what = "accuracy on the chip, %"
    panel.set(xscale="log", xlabel=f"{QUANTITIES['edap_pj_ns_um2'][0]}, {unit}", ylabel=what)
    log_ticks(panel.xaxis, edap[known].min(), edap[known].max())
    legend_beside(panel)
    return figure


def log_ticks(axis: Axis, low: float, high: float) -> None:
    """Plain numbers, also where the values are less than a decade apart."""
    if high < 3 * low:
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    else:
        few = (1, 2, 5) if high < 1000 * low else (1,)
        axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if high < 10 * low else few))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axis.set_minor_formatter(NullFormatter())


LEADER = {"arrowstyle": "-", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 4}  # to a number
# Where a number may stand: first towards the corner that a Pareto front leaves empty.
DIRECTIONS = ((-1, -1), (-1, 0), (0, -1), (1, 1), (-1, 1), (1, -1), (0, 1), (1, 0))


def number_points(
    figure: Figure, panel: Axes, points: np.ndarray, marks: np.ndarray, radius: float = 5
) -> None:
    """Write 1, 2, 3 … beside the points where no other number is and none of the `marks` (circles,
    radius in points); neighbours too close for two numbers share one: 3-5.

    `points` and `marks` are (count, 2), in data coordinates.
    """
    figure.draw_without_rendering()  # until then nobody knows where the panel is
    points_of = 72 / figure.dpi  # of a pixel
    corner = np.array([panel.bbox.min, panel.bbox.max]) * points_of
    taken = panel.transData.transform(marks) * points_of
    taken = np.hstack([taken - radius, taken + radius])  # left, bottom, right, top
    places = panel.transData.transform(points) * points_of
    groups: list[list[int]] = []
    for i, place in enumerate(places):
        if groups and np.hypot(*(place - places[groups[-1][0]])) < 8:
            groups[-1].append(i)
        else:
            groups.append([i])
    for first, *others in groups:
        label = f"{first + 1}-{others[-1] + 1}" if others else f"{first + 1}"
        half = np.array([2.7 * len(label) + 1, 5])
        for far, direction in product((4, 10, 18, 28, 40, 54), DIRECTIONS):
            offset = np.array(direction) * (radius + half + far - 3)
            low, high = places[first] + offset - half, places[first] + offset + half
            is_free = ((taken[:, :2] >= high) | (taken[:, 2:] <= low)).any(axis=1).all()
            if is_free and (low >= corner[0]).all() and (high <= corner[1]).all():
                break
        taken = np.vstack([taken, [*low, *high]])
        panel.annotate(
            label,
            points[first],
            offset,
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=8,
            path_effects=[withStroke(linewidth=2, foreground="white")],
            arrowprops=LEADER if far > 4 else None,
        )
