"""Design space: one network, or several students, on a whole grid of chips at once.

The formulas are those of `estimate`, called with arrays: one entry a grid point.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from math import prod

import numpy as np
from tqdm import tqdm

from display import percent, room_for_names, short_names
from runtime.errors import UserError

from .chip import OPTIONS, Chip, ChipGrid, Draws, check_option
from .estimate import as_charged, layer_costs, totals
from .layer_list import MAX_BITS, Subject, check_int
from .render import QUANTITIES, csv_text, shown

AXES = {  # options of the chip: their columns in a terminal
    "xbar_size": "xbar",
    "cell_bits": "cell",
    "adc_bits": "ADC",
    "columns_per_adc": "shared",
    "pe_per_tile": "PEs",
    "crossbars_per_pe": "xbars",
    "clk_mhz": "MHz",
}
LEFT_OUT = (
    "a weight has more cells than a crossbar row, or xbar_size is no multiple of columns_per_adc"
)
LARGEST_GRID = 10**6  # points; more with --force
SHOWN = (
    *("energy_pj", "area_um2", "delay_ns", "edp_pj_ns", "edap_pj_ns_um2"),
    *("frames_per_second", "power_mw", "tops_per_watt", "tops_per_mm2"),
)


def variants(
    subjects: Sequence[Subject], bits: Sequence[int], time_steps: Sequence[int]
) -> Iterator[Subject]:
    """Every candidate at every width and number of timesteps; accuracy is known of its own only."""
    for value in bits:
        check_int(value, "bits", MAX_BITS)
    for value in time_steps:
        check_int(value, "time_steps")
    for subject in subjects:
        own = subject.network
        for b, t in product(bits or [own.weight_bits], time_steps or [own.time_steps]):
            is_own = (b, t) == (own.weight_bits, own.time_steps)
            network = own if is_own else own.at(b, t)
            known = {"accuracy": subject.accuracy, "tested": subject.tested} if is_own else {}
            yield Subject(subject.name, network, kind=subject.kind, **known)


def values_of(chip: Chip, axes: Mapping[str, Sequence[float]]) -> dict[str, Sequence[float]]:
    """The values of every axis; the chip's own where none are given."""
    return {name: axes.get(name) or [getattr(chip, name)] for name in AXES}


def grid_of(chip: Chip, axes: Mapping[str, Sequence[float]]) -> ChipGrid:
    """All chips that differ from `chip` in `axes`: an axis a dimension, so that what depends on few
    options is computed for these alone. Raises UserError for a value that makes no chip."""
    values = values_of(chip, axes)
    for name, axis in values.items():
        for value in axis:
            check_option(OPTIONS[name], value)
    for value in values["cell_bits"]:
        chip.technology.check_cell_bits(value)
    if chip.adc_law == "table":
        chip.technology.check_adc_bits(max(values["adc_bits"]))
    dimensions = np.ix_(*(np.array(axis, dtype=np.float64) for axis in values.values()))
    fixed = {name: getattr(chip, name) for name in OPTIONS if name not in AXES}
    return ChipGrid(**dict(zip(AXES, dimensions, strict=True)), **fixed)


def sweep(
    subjects: Sequence[Subject],
    chip: Chip,
    axes: Mapping[str, Sequence[float]],
    draws: Draws | None = None,
) -> dict[str, np.ndarray]:
    """Columns of the results: every candidate on every chip that differs from `chip` in `axes`.

    With `draws` each trained network is simulated on each chip, once for those
    that differ in nothing that a simulation knows; the accuracy there is the draws' mean. Points
    where a weight has more cells than a crossbar row are left out. Raises UserError where a value
    makes no chip, and where no point is left.
    """
    values, grid = values_of(chip, axes), grid_of(chip, axes)
    dimensions = {name: getattr(grid, name) for name in AXES}
    shape = tuple(map(len, values.values()))

    parts = []
    for subject in subjects:
        network = as_charged(subject.network, chip)
        widest = max(network.weight_bits_of(layer) for layer in network.layers)
        fits = grid.slices(widest) <= grid.xbar_size
        fits = fits & (grid.xbar_size % grid.columns_per_adc == 0)
        with np.errstate(divide="ignore", invalid="ignore"):  # of those that do not fit
            total, _ = totals(network, grid, layer_costs(network, grid))
        own = {
            "network": subject.name,
            "bits": network.weight_bits,
            "time_steps": network.time_steps,
            "accuracy": np.nan if subject.accuracy is None else subject.accuracy,
            "chip_accuracy": on_chips(subject, chip, values, fits, draws),
            **dimensions,
            **{name: total[name] for name in SHOWN},
        }
        kept = np.flatnonzero(np.broadcast_to(fits, shape))
        everywhere = len(kept) == np.prod(shape)  # then there is nothing to pick
        flat = {name: np.broadcast_to(x, shape).ravel() for name, x in own.items()}
        parts.append(flat if everywhere else {name: x[kept] for name, x in flat.items()})
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if not len(columns["network"]):
        raise UserError(f"on every chip of the grid {LEFT_OUT}: raise cell_bits or xbar_size")
    columns["pareto"] = pareto_front(
        columns["edp_pj_ns"], columns["area_um2"], columns["chip_accuracy"]
    )
    return columns


def on_chips(
    subject: Subject,
    chip: Chip,
    values: Mapping[str, Sequence[float]],
    fits: np.ndarray,
    draws: Draws | None,
) -> np.ndarray | float:
    """Mean accuracy of a network on every chip of the grid; nan where it is not simulated."""
    if draws is None or subject.tested is None:
        return np.nan
    from .nonideal import on_chip  # torch is needed here, and not for layer lists

    seen = [x for x in AXES if OPTIONS[x].metadata["part"] == "both"]
    if chip.adc_of == "crossbar":  # then a PE is nothing but a count
        seen.remove("crossbars_per_pe")
    shape = tuple(len(axis) if name in seen else 1 for name, axis in values.items())
    unseen = tuple(i for i, name in enumerate(values) if name not in seen)
    fits = np.broadcast_to(fits, np.broadcast_shapes(fits.shape, shape)).any(unseen, keepdims=True)
    chip = replace(chip, columns_per_adc=1)  # of price alone, and a divisor of every side
    found = np.full(shape, np.nan)
    where = [index for index in np.ndindex(shape) if fits[index]]
    for index in tqdm(where, f"{subject.name} on {len(where)} chips", disable=None, leave=False):
        options = {
            name: axis[i]
            for (name, axis), i in zip(values.items(), index, strict=True)
            if name in seen
        }
        accuracies, _ = on_chip(subject, replace(chip, **options), draws.numbers)
        found[index] = np.mean(accuracies)
    return found


def pareto_front(edp: np.ndarray, area: np.ndarray, accuracy: np.ndarray) -> np.ndarray:
    """Points that nothing beats in energy · delay, area and accuracy on the chip; none whose
    accuracy there is not known."""
    front = np.zeros(len(edp), dtype=bool)
    for level in np.unique(accuracy[~np.isnan(accuracy)]):
        here = accuracy == level
        x, y, better = edp[here], area[here], accuracy > level
        front[here] = (
            (y < least_area(x, y, x, "left"))
            & (y <= least_area(x, y, x, "right"))
            # a more accurate point wins with equal EDAP and area too
            & (y < least_area(edp[better], area[better], x, "right"))
        )
    return front


def least_area(edp: np.ndarray, area: np.ndarray, at: np.ndarray, side: str) -> np.ndarray:
    """The least area of the points of less EDP than `at` ("left"), or of no more ("right")."""
    order = np.argsort(edp)
    least = np.append(np.inf, np.minimum.accumulate(area[order]))
    return least[np.searchsorted(edp[order], at, side)]


def check_size(networks: int, axes: Mapping[str, Sequence[float]], force: bool) -> int:
    """Points of the grid; raises UserError for more than anyone means."""
    points = networks * prod(max(1, len(axis)) for axis in axes.values())
    if points > LARGEST_GRID and not force:
        raise UserError(
            f"the grid has {points} points, more than {LARGEST_GRID}: leave values out, or --force"
        )
    return points


COLUMN_NAMES = {  # columns whose name alone does not say the unit
    "xbar_size": "xbar_size_cells",
    "pe_per_tile": "pe_per_tile_count",
    "crossbars_per_pe": "crossbars_per_pe_count",
    "time_steps": "time_steps_count",
    "accuracy": "digital_accuracy_share",
    "chip_accuracy": "chip_accuracy_share",
    "pareto": "on_pareto_front_yes_no",
}


def sweep_csv(columns: Mapping[str, np.ndarray]) -> str:
    """A row a grid point."""
    whole = set(AXES) - {"clk_mhz"}
    shown = {name: x.astype(int) if name in whole else x for name, x in columns.items()}
    shown["pareto"] = np.where(columns["pareto"], "yes", "no")
    for key in ("accuracy", "chip_accuracy"):
        shown[key] = np.where(np.isnan(columns[key]), "", columns[key].astype(str))
    header = [COLUMN_NAMES.get(name, name) for name in shown]
    rows = zip(*(column.tolist() for column in shown.values()), strict=True)
    return csv_text(header, rows)


MOST_SHOWN = 20  # points of a front that are printed and numbered


def shown_front(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """Indices of the points of the front that a person is shown, network by network and from small
    chips to large ones; of more than MOST_SHOWN so many, evenly, with the first and the last. Where
    there is no front: of each network and ADC resolution the point of the least EDAP."""
    front = np.flatnonzero(columns["pareto"])
    if not len(front):
        order = np.argsort(columns["edap_pj_ns_um2"], kind="stable")
        kinds = ("network", "bits", "time_steps", "adc_bits")
        names = zip(*(columns[key][order].tolist() for key in kinds), strict=True)
        cheapest: dict[tuple, int] = {}
        for kind, index in zip(names, order.tolist(), strict=True):
            cheapest.setdefault(kind, index)
        front = np.array(sorted(cheapest.values()))
    keys = ("edap_pj_ns_um2", "area_um2", "time_steps", "bits", "network")  # the last one first
    front = front[np.lexsort([columns[key][front] for key in keys])]
    if len(front) <= MOST_SHOWN:
        return front
    return front[np.linspace(0, len(front) - 1, MOST_SHOWN).round().astype(int)]


def cheapest_lines(columns: Mapping[str, np.ndarray], max_drop: float) -> list[str]:
    """Of each simulated network the chip of the least EDAP on which it has no more than `max_drop`
    points less than its own digital accuracy: iso-accuracy EDAP."""
    lines = []
    lost = 100 * (columns["accuracy"] - columns["chip_accuracy"])
    for network in dict.fromkeys(columns["network"].tolist()):
        here = (columns["network"] == network) & ~np.isnan(lost)
        good = np.flatnonzero(here & (lost <= max_drop + 1e-9))
        if not here.any():
            continue
        points = "point" if max_drop == 1 else "points"
        what = f"{network}: least EDAP within {max_drop:g} {points} of its own accuracy"
        if not len(good):
            lines.append(f"{what}: on no chip (the best loses {lost[here].min():.2f} points)")
            continue
        best = good[np.argmin(columns["edap_pj_ns_um2"][good])]
        varied = [key for key in AXES if (columns[key] != columns[key][0]).any()]
        chip = "".join(f" --{key} {columns[key][best]:g}" for key in varied)
        edap = shown("edap_pj_ns_um2", columns["edap_pj_ns_um2"][best])
        lines.append(f"{what}: {edap}, {lost[best]:.2f} points lost,{chip}")
    return lines


def front_text(columns: Mapping[str, np.ndarray], points: int) -> list[str]:
    """What the points are that a person is shown, of a grid of so many."""
    total, on_front = len(columns["pareto"]), int(columns["pareto"].sum())
    counted = "1 point" if total == 1 else f"{total} points"
    if on_front:
        first = f"{counted}, {on_front} on the Pareto front of EDP, area and accuracy on the chip"
        lines = [first + (f", {MOST_SHOWN} of them here, evenly" if on_front > MOST_SHOWN else "")]
    else:
        lines = [
            f"{counted}, no Pareto front: the accuracy on these chips is not known (--on_chip)",
            "the least EDAP of each network and ADC resolution:",
        ]
    if total < points:
        left = "1 point" if points - total == 1 else f"{points - total} points"
        lines.insert(1, f"{left} left out: there {LEFT_OUT}")
    return lines


def front_table(
    columns: Mapping[str, np.ndarray], front: np.ndarray
) -> tuple[tuple[list[str], list[tuple[str, ...]]], list[str]]:
    """These points in a table that fits a screen, numbered from 1 as in the plot, with those
    options that are not the same in the whole sweep; and a line on the options' names."""

    def cells(key: str) -> list[str]:
        return [f"{value:g}" for value in columns[key][front]]

    varies = {key: (columns[key] != columns[key][0]).any() for key in columns}
    table = {"point": [str(i + 1) for i in range(len(front))]}
    for key in ("area_um2", "edp_pj_ns", "edap_pj_ns_um2"):
        table[QUANTITIES[key][0]] = [shown(key, value) for value in columns[key][front]]
    for key, name in {"accuracy": "digital", "chip_accuracy": "on chip"}.items():
        if not np.isnan(columns[key]).all():
            shares = columns[key][front]
            table[name] = ["" if np.isnan(x) else percent(x, 2) for x in shares]
    table |= {short: cells(key) for key, short in AXES.items() if varies[key]}
    for key, short in {"bits": "bits", "time_steps": "T"}.items():
        if varies[key]:
            table[short] = cells(key)
    if varies["network"]:
        room = room_for_names(list(table), list(zip(*table.values(), strict=True)))
        networks = list(dict.fromkeys(columns["network"].tolist()))
        names = dict(zip(networks, short_names(networks, room), strict=True))
        table["network"] = [names[network] for network in columns["network"][front].tolist()]
    options = [f"{short} --{key}" for key, short in AXES.items() if varies[key]]
    names = [f"({', '.join(options)})"] if options else []
    return (list(table), list(zip(*table.values(), strict=True))), names
