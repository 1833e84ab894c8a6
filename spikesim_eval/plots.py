"""Plots of a report and of a sweep, drawn with matplotlib without a screen."""

import io
import logging
import warnings
from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

# The same report is the same file, and its text stays text: the browser has the fonts, so that
# matplotlib need not say which of them it lacks.
logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
matplotlib.rcParams |= {"svg.hashsalt": "spikesim_eval", "svg.fonttype": "none"}


def svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def report_plots(report: Mapping[str, Any]) -> dict[str, str]:
    """SVG by heading."""
    plots = {
        "Energy by layer": stacked(report, "energy_by_component", "energy, pJ"),
        "Area by layer": stacked(report, "area_by_component", "area, um^2"),
        "Critical path": timeline(report),
    }
    if report["spike_rates_by_timestep"]:
        plots["Spike rate by layer and timestep"] = spike_rates(report["spike_rates_by_timestep"])
    return {heading: svg(figure) for heading, figure in plots.items()}


def _figure(height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(11, height), layout="constrained")
    return figure, figure.subplots()


def _plain(name: str) -> str:
    """As matplotlib shows it unchanged: no mathematics, no hidden legend entry, no lone bytes."""
    text = name.encode(errors="backslashreplace").decode().replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def stacked(report: Mapping[str, Any], key: str, label: str) -> Figure:
    """A bar a layer, a colour a component, the largest component at the bottom."""
    layers = report["layers"]
    figure, axis = _figure(4.2)
    components = sorted(layers[0][key], key=lambda name: -sum(row[key][name] for row in layers))
    bottom = np.zeros(len(layers))
    for component, colour in zip(components, matplotlib.colormaps["tab20"].colors, strict=False):
        values = np.array([row[key][component] for row in layers], dtype=float)
        axis.bar(range(len(layers)), values, bottom=bottom, label=component, color=colour)
        bottom += values
    names = [_plain(row["name"]) for row in layers]
    axis.set_xticks(range(len(layers)), names, rotation=70, ha="right", fontsize=8)
    axis.set_ylabel(label)
    axis.legend(fontsize=8, ncols=2)
    return figure


def timeline(report: Mapping[str, Any]) -> Figure:
    """When each layer starts and ends; the critical path in colour."""
    layers = report["layers"]
    figure, axis = _figure(0.9 + 0.22 * len(layers))
    colours = ["tab:red" if row["on_critical_path"] else "tab:gray" for row in layers]
    starts, lengths = ([row[key] for row in layers] for key in ("start_ns", "delay_ns"))
    axis.barh(range(len(layers)), lengths, left=starts, color=colours)
    axis.set_yticks(range(len(layers)), [_plain(row["name"]) for row in layers], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("time, ns (red: the critical path)")
    return figure


def spike_rates(rates: Mapping[str, list[float]]) -> Figure:
    """A row a timestep, a column a LIF layer."""
    values = 100 * np.array(list(rates.values())).T
    figure, axis = _figure(2.2 + 0.25 * len(values))
    image = axis.imshow(values, aspect="auto", vmin=0, cmap="viridis")
    names = [_plain(name) for name in rates]
    axis.set_xticks(range(len(names)), names, rotation=70, ha="right", fontsize=8)
    axis.set_yticks(range(len(values)), [str(t + 1) for t in range(len(values))])
    axis.set_ylabel("timestep")
    figure.colorbar(image, label="spikes per neuron, %")
    return figure


def sweep_plot(columns: Mapping[str, np.ndarray]) -> Figure:
    """EDAP over area, a colour a network; the Pareto front in black circles."""
    figure, axis = _figure(6)
    labels = [
        f"{name}, {bits} bits, T = {steps}"
        for name, bits, steps in zip(
            columns["network"], columns["bits"], columns["time_steps"], strict=True
        )
    ]
    unique, index = np.unique(labels, return_inverse=True)
    for i, label in enumerate(unique):
        here = index == i
        axis.scatter(
            columns["area_um2"][here] / 1e6,
            columns["edap_pj_ns_um2"][here],
            s=8,
            alpha=0.5,
            label=_plain(label),
            rasterized=True,
        )
    front = columns["pareto"]
    axis.scatter(
        columns["area_um2"][front] / 1e6,
        columns["edap_pj_ns_um2"][front],
        s=50,
        facecolors="none",
        edgecolors="black",
        label="Pareto front",
    )
    axis.set(xscale="log", yscale="log", xlabel="area, mm^2", ylabel="EDAP, pJ ns um^2")
    axis.legend(fontsize=8)
    return figure
