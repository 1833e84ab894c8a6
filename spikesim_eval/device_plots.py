"""Plots of `nonideal`: accuracy and yield over a noise, accuracy over EDAP, layers, and what ADCs
read."""

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from display import cut, legend_beside, new_figure, percent, plain, styles

from .chip import seconds
from .plots import BESIDE_IT, CRITICAL, LONGEST_LABEL, WIDTH, label_ticks
from .render import QUANTITIES, unit_of

MEANING = {
    "sigma": "relative deviation of cells, --sigma",
    "read_noise": "relative deviation of cells from read to read, --read_noise",
    "read_floor": "deviation of every cell from read to read, --read_floor",
    "stuck_on": "share of cells that stay on, --stuck_on",
    "stuck_off": "share of cells that stay off, --stuck_off",
    "after": "time since cells were written, --after",
    "wire_ohm": "wire from cell to cell, Ω, --wire_ohm",
    "on_off_ratio": "highest over lowest conductance, --on_off_ratio",
}
APART = 0.05  # networks' yields at the same value, of what values are apart
MARKERS = "osD^vPX*<>ph"  # of changed chips
MOST_HISTOGRAMS = 40


def bands_plot(names: Sequence[str], reports: Sequence[Mapping[str, Any]]) -> Figure:
    """Accuracy over a noise: a line through the mean of the chips, a band of a standard deviation
    on both sides, a dot a chip, and, dashed, the digital network; below it the yield, with what it
    may be with 95 % confidence. Calibrated chips have lines of their own, which are dotted. Values
    stand in their order, as far apart as any others: they may be 0 or infinite."""
    option = reports[0]["over"]["option"]
    texts = [point["value"] for point in reports[0]["over"]["points"]]
    values = [seconds(text) if option == "after" else float(text) for text in texts]
    order = np.argsort(values)
    x = np.arange(len(order))
    lines = []  # label, how it looks, points in order
    looks = styles([report["kind"] for report in reports])
    for name, look, report in zip(names, looks, reports, strict=True):
        points = [report["over"]["points"][i] for i in order]
        label, colour = plain(cut(name, LONGEST_LABEL)), look["color"]
        lines.append((label, {"color": colour, "linestyle": "-", "marker": "o"}, points))
        if "calibrated" in points[0]:
            again = [point["calibrated"] for point in points]
            how = {"color": colour, "linestyle": ":", "marker": "s"}
            lines.append((f"{label}, calibrated", how, again))

    figure, (above, below) = new_figure(WIDTH, 6.4, rows=2, sharex=True, height_ratios=(2, 1))
    for number, (label, look, points) in enumerate(lines):
        beside = x + APART * (number - (len(lines) - 1) / 2)
        mean = 100 * np.array([p["accuracy_mean"] for p in points])
        spread = 100 * np.array([p["accuracy_std"] or 0.0 for p in points])
        colour = look["color"]
        above.fill_between(x, mean - spread, mean + spread, color=colour, alpha=0.18, lw=0)
        above.plot(x, mean, label=label, markersize=4, **look)
        for at, point in zip(x, points, strict=True):
            chips = 100 * np.array(point["accuracies"])
            above.scatter(np.full(len(chips), at), chips, s=7, color=colour, alpha=0.5, lw=0)
        share, low, high = (
            100 * np.array([p[key] for p in points])
            for key in ("yield_share", "yield_low_share", "yield_high_share")
        )
        errors = [share - low, high - share]
        below.errorbar(beside, share, errors, capsize=3, lw=1, markersize=4, **look)
    for look, report in zip(looks, reports, strict=True):
        level = 100 * report["digital_accuracy"]
        above.axhline(level, color=look["color"], linestyle="--", linewidth=0.8)
    above.plot([], [], color="black", linestyle="--", linewidth=0.8, label="digital")
    above.set_ylabel("accuracy on chips, %")
    below.set(ylabel="yield, %", ylim=(-4, 104), xlabel=MEANING[option])
    below.set_xticks(x, [texts[i] for i in order])
    legend_beside(above)
    return figure


def edap_plot(names: Sequence[str], reports: Sequence[Mapping[str, Any]]) -> Figure:
    """Accuracy over what an image costs, a point a chip: a marker for each change of the chip,
    hollow as made, filled where it is calibrated; dashed the digital network."""
    figure, panel = new_figure(WIDTH, 4.6)
    looks = styles([report["kind"] for report in reports])
    known = [
        (look, x)
        for report, look in zip(reports, looks, strict=True)
        for x in report["changes"]
        if x["edap_pj_ns_um2"]
    ]
    most = max(x["edap_pj_ns_um2"] for _, x in known)
    one, unit = unit_of("edap_pj_ns_um2", most)
    changes = list(dict.fromkeys(x["change"] for report in reports for x in report["changes"]))
    marks = dict(zip(changes, cycle(MARKERS), strict=False))
    for look, x in known:
        how = {"marker": marks[x["change"]], "s": 26, "edgecolors": look["color"], "alpha": 0.7}
        for way, face in ((x, "none"), (x.get("calibrated"), look["color"])):
            if way is not None:
                accuracies = 100 * np.array(way["accuracies"])
                at = np.full(len(accuracies), x["edap_pj_ns_um2"] / one)
                panel.scatter(at, accuracies, facecolors=face, linewidths=1, **how)
    for name, report, look in zip(names, reports, looks, strict=True):
        level, label = 100 * report["digital_accuracy"], plain(cut(name, LONGEST_LABEL))
        panel.axhline(level, color=look["color"], linestyle="--", linewidth=0.8)
        panel.plot([], [], color=look["color"], linewidth=3, label=label)
    panel.plot([], [], color="black", linestyle="--", linewidth=0.8, label="digital")
    hollow = {"color": "black", "linestyle": "none", "markerfacecolor": "none"}
    for change in dict.fromkeys(x["change"] for _, x in known):
        panel.plot([], [], marker=marks[change], label=change, **hollow)
    if any("calibrated" in x for _, x in known):
        panel.plot(
            [], [], marker="o", label="filled: calibrated", **hollow | {"markerfacecolor": "black"}
        )
    panel.set(
        xlabel=f"{QUANTITIES['edap_pj_ns_um2'][0]} of an image, {unit}",
        ylabel="accuracy on a chip, %",
    )
    panel.set_xlim(0, 1.06 * most / one)
    legend_beside(panel)
    return figure


def layers_plot(rows: Sequence[Mapping[str, Any]], digital: float) -> Figure:
    """Layers, that with the largest error of its sums on top, and, where it is known, the accuracy
    with that layer alone on crossbars, with the deviation of chips and, dashed, the `digital`."""
    rows = sorted(rows, key=lambda row: -row["relative_error"])
    panels = {"error of sums (root mean square), %": "relative_error"}
    panels["sums clipped, %"] = "clipped_share"
    if "accuracy_alone" in rows[0]:
        panels["accuracy with it alone, %"] = "accuracy_alone"
    height = 1.0 + 0.2 * len(rows)
    figure, drawn = new_figure(WIDTH, height, columns=len(panels), sharey=True)
    for panel, (what, key) in zip(drawn, panels.items(), strict=True):
        values, places = [100 * row[key] for row in rows], range(len(rows))
        if key == "accuracy_alone":
            spread = [100 * (row["accuracy_alone_std"] or 0.0) for row in rows]
            panel.errorbar(values, places, xerr=spread, fmt="o", markersize=4, color="black", lw=1)
            panel.axvline(100 * digital, color="black", linestyle="--", linewidth=0.8)
        else:
            panel.barh(places, values, color=CRITICAL if panel is drawn[0] else BESIDE_IT)
        panel.set_xlabel(what)
        panel.margins(y=0.01)
    label_ticks(drawn[0].yaxis, [row["layer"] for row in rows], fontsize=8)
    drawn[0].invert_yaxis()
    return figure


def adc_plot(report: Mapping[str, Any]) -> Figure:
    """A panel a layer: how often a column's sum, in cell steps, is what it is in the digital
    network, on a logarithmic scale; in colour what the layer's ADC clips of it, and how much that
    is."""
    rows = report["layers"]
    if len(rows) > MOST_HISTOGRAMS:
        rows = sorted(rows, key=lambda row: -row["clipped_share"])[:MOST_HISTOGRAMS]
    columns = min(5, len(rows))
    lines = math.ceil(len(rows) / columns)
    figure, panels = new_figure(WIDTH, 0.5 + 1.5 * lines, lines, columns, squeeze=False)
    for panel in panels.flat[len(rows) :]:
        panel.set_axis_off()
    for panel, row in zip(panels.flat, rows, strict=False):
        counts = np.array(report["adc_sums"][row["layer"]], dtype=float)
        draw_sums(panel, counts, row["adc_reach_cell_steps"])
        share = share_above(counts, row["adc_reach_cell_steps"])
        said = "none clipped" if share == 0 else f"{percent(share, 2)} clipped"
        said = "< 0.01 % clipped" if 0 < share < 1e-4 else said
        panel.set_title(f"{plain(cut(row['layer'], LONGEST_LABEL))}\n{said}", fontsize=7)
        panel.tick_params(labelsize=6)
    figure.supxlabel("sum of a column, cell steps", fontsize=8)
    figure.supylabel("share of reads", fontsize=8)
    return figure


def share_above(counts: np.ndarray, reach: float | None) -> float:
    """Share of the sums 0, 1, 2 ... that an ADC of this reach would clip."""
    if reach is None or not counts.sum():
        return 0.0
    return counts[np.arange(len(counts)) > reach].sum() / counts.sum()


def draw_sums(panel: Axes, counts: np.ndarray, reach: float | None) -> None:
    """The last that the ADC does not clip is marked where it is near."""
    shares, edges = counts / max(1, counts.sum()), np.arange(len(counts) + 1) - 0.5
    within = len(counts) if reach is None else min(len(counts), int(reach) + 1)
    panel.stairs(shares[:within], edges[: within + 1], fill=True, color=BESIDE_IT)
    if within < len(counts):
        panel.stairs(shares[within:], edges[within:], fill=True, color=CRITICAL)
    if reach is not None and reach < 1.2 * len(counts):
        panel.axvline(reach + 0.5, color="black", linewidth=0.8)
    panel.set(yscale="log", ylim=(0.5 / max(1, counts.sum()), 1.5))
