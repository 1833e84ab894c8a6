"""Many chips of one kind, each with cells drawn anew: how many of them are good enough, where noise
of what strength leaves a network, and what one more bit or other columns buy back.

Simulated by `nonideal`; a chip is good where the network loses at most `max_drop` points of its own
digital accuracy there, and the yield is the share of good ones.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from matplotlib.figure import Figure

from display import percent, short_names, text_table
from runtime.errors import UserError

from .chip import OPTIONS, Chip, Draws, bits_by_layer, check_layers
from .device_plots import adc_plot, bands_plot, layers_plot
from .estimate import estimate
from .layer_list import Subject, check_number
from .nonideal import (
    load_subject,
    most_clipped,
    nonideal_lines,
    on_chip,
    report_of,
    spread_text,
)
from .plots import svg
from .render import Section, csv_text, mean_and_deviation, page, shown

SURE = 1.959964  # standard deviations on both sides of which 95 % of normal numbers lie
OVER = ("sigma", "read_noise", "stuck_on", "stuck_off", "after", "wire_ohm", "on_off_ratio")


def wilson(good: int, of: int) -> tuple[float, float]:
    """Where a share lies with 95 % confidence, of which `good` of `of` draws were seen: the score
    interval of E. B. Wilson (1927), which also none and all of few draws do not make certain."""
    share, z = good / of, SURE**2 / of
    middle = (share + z / 2) / (1 + z)
    half = SURE / (1 + z) * math.sqrt(share * (1 - share) / of + z / (4 * of))
    # the share itself is within, also after rounding
    return min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half))


def judged(
    accuracies: Sequence[float], digital: float, max_drop: float, is_random: bool = True
) -> dict[str, Any]:
    """Mean, deviation and yield of chips on which a network has these accuracies; where nothing is
    random one says it of all."""
    good = sum(100 * (digital - x) <= max_drop + 1e-9 for x in accuracies)
    share = good / len(accuracies)
    low, high = wilson(good, len(accuracies)) if is_random else (share, share)
    mean, deviation = mean_and_deviation(accuracies)
    return {
        "accuracies": list(accuracies),
        "accuracy_mean": mean,
        "accuracy_std": deviation or 0.0,
        "yield_share": share,
        "yield_low_share": low,
        "yield_high_share": high,
    }


def chips_over(chip: Chip, text: str) -> tuple[str, list[tuple[str, Chip]]]:
    """What --over says, as sigma=0.05,0.1: (option, its values with the chips that have them).
    Raises UserError for an option that is none of OVER, or a value that no chip has."""
    name, _, values = text.partition("=")
    if name not in OVER or not values:
        raise UserError(
            f"--over must be as sigma=0.05,0.1,0.2, of one of {', '.join(OVER)}, got {text!r}"
        )
    found = []
    for value in dict.fromkeys(values.split(",")):
        try:
            option = value if isinstance(OPTIONS[name].default, str) else float(value)
        except ValueError:
            raise UserError(f"--over {name} must be numbers, got {value!r}") from None
        found.append((value, replace(chip, **{name: option})))
    return name, found


def changed_chips(chip: Chip, layer: str | None) -> Iterator[tuple[str, Chip]]:
    """Chips that differ from this one in one thing that a designer can choose, with a name; of a
    layer the ADCs alone, where one is given."""
    other = {"differential": "offset", "offset": "differential"}[chip.columns]
    changes: dict[str, dict[str, Any]] = {"as it is": {}}
    if chip.adc_bits is not None:
        more = {x: bits + 1 for x, bits in bits_by_layer(chip.layer_adc_bits).items()}
        changes["a bit more in ADCs"] = {
            "adc_bits": chip.adc_bits + 1,
            "layer_adc_bits": said_by_layer(more),
        }
    if chip.adc_bits is not None and layer is not None:
        one = bits_by_layer(chip.layer_adc_bits) | {layer: chip.of_layer(layer).adc_bits + 1}
        changes[f"a bit more in ADCs of {layer}"] = {"layer_adc_bits": said_by_layer(one)}
    changes["a bit less in cells"] = {"cell_bits": chip.cell_bits - 1}
    changes[f"{other} columns"] = {"columns": other}
    half = chip.xbar_size // 2
    changes["crossbars of half the side"] = {
        "xbar_size": half,
        "columns_per_adc": math.gcd(chip.columns_per_adc, half),
    }
    for name, change in changes.items():
        try:
            yield name, replace(chip, **change)
        except UserError:  # no chip can be so: an SRAM cell has one bit, and a crossbar 8 rows
            continue


def said_by_layer(bits: Mapping[str, int]) -> str:
    """As `bits_by_layer` reads it."""
    return ",".join(f"{name}={x}" for name, x in bits.items())


def network_report(
    subject: Subject,
    chip: Chip,
    draws: Draws,
    max_drop: float,
    each_layer: bool = False,
    over: str | None = None,
    each_change: bool = False,
) -> dict[str, Any]:
    """`nonideal`'s report of a network with the yield; with `over` also at each value of that
    option, and with `each_change` also on chips changed in one thing, with their energy."""
    report = report_of(subject, chip, draws, each_layer)

    report |= {"kind": subject.kind, "max_drop_points": max_drop}
    report |= judged(report["accuracies"], subject.accuracy, max_drop, chip.is_random)
    clipped, worst = max((row["clipped_share"], row["layer"]) for row in report["layers"])

    def on(other: Chip, name: str) -> dict[str, Any]:
        accuracies, most = report["accuracies"], (clipped, worst)
        if other != chip:
            accuracies, runs = on_chip(subject, other, draws.numbers, name)
            most = most_clipped(runs)
        found = judged(accuracies, subject.accuracy, max_drop, other.is_random)
        return found | dict(zip(("clipped_share", "clipped_layer"), most, strict=True))

    if over is not None:
        name, chips = chips_over(chip, over)
        points = [{"value": value, **on(x, f"{name} {value}")} for value, x in chips]
        report["over"] = {"option": name, "points": points}
    if each_change:
        report["changes"] = []
        for name, changed in changed_chips(chip, worst if clipped else None):
            energy = None  # of an ideal ADC nobody knows it
            if changed.adc_bits is not None:
                energy = estimate(subject.network, changed).total["energy_pj"]
            report["changes"].append({"change": name, "energy_pj": energy, **on(changed, name)})
    return report


def reports(
    paths: Sequence[str],
    data_path: str | None,
    chip: Chip,
    draws: Draws,
    max_drop: float,
    time_steps: int | None = None,
    test_images: int | None = None,
    **what: Any,
) -> list[dict[str, Any]]:
    """`network_report` of each checkpoint; `what` says what is in it. Raises UserError, before any
    is simulated, for whatever is wrong with one of them."""
    check_number(max_drop, "max_drop", 0, 100)
    if what.get("over") is not None:
        chips_over(chip, what["over"])
    subjects = [load_subject(path, data_path, time_steps, test_images) for path in paths]
    check_layers(chip, (subject.network for subject in subjects))
    for subject in subjects:
        for layer in subject.network.layers:
            chip.check_fits(
                f"{subject.name}: layer {layer.name}", subject.network.weight_bits_of(layer)
            )
    return [network_report(subject, chip, draws, max_drop, **what) for subject in subjects]


# What a person is told.


def yield_text(found: dict[str, Any]) -> str:
    """ "80.0 % (38 to 96)": a yield with where it lies with 95 % confidence."""
    low, high = (100 * found[f"yield_{end}_share"] for end in ("low", "high"))
    return f"{percent(found['yield_share'])} ({low:.0f} to {high:.0f})"


def accuracy_text(found: dict[str, Any]) -> str:
    return spread_text(found["accuracy_mean"], found["accuracy_std"])


def over_table(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    header = [report["over"]["option"], "accuracy", "worst", "yield (95 % sure)"]
    rows = [
        [x["value"], accuracy_text(x), percent(min(x["accuracies"]), 2), yield_text(x)]
        for x in report["over"]["points"]
    ]
    return header, rows


def change_table(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    header = ["chip", "accuracy", "yield (95 % sure)", "clipped, worst layer", "energy", "times"]
    first, rows = report["changes"][0]["energy_pj"], []
    for x in report["changes"]:
        energy = ["", ""]
        if first and x["energy_pj"]:
            energy = [shown("energy_pj", x["energy_pj"]), f"{x['energy_pj'] / first:.3g}"]
        clipped = percent(x["clipped_share"], 2)
        rows.append([x["change"], accuracy_text(x), yield_text(x), clipped, *energy])
    return header, rows


def layer_table(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Layers, that with the largest error of its sums first."""
    header = [
        "layer",
        "error of sums",
        "clipped",
        "largest sum",
        "ADC reaches",
        "bits that clip none",
    ]
    rows = []
    for x in sorted(report["layers"], key=lambda row: -row["relative_error"]):
        reach = x["adc_reach_cell_steps"]
        sums = [f"{x['largest_sum_cell_steps']:g}", "all" if reach is None else f"{reach:g}"]
        shares = [percent(x["relative_error"], 2), percent(x["clipped_share"], 2)]
        rows.append([x["layer"], *shares, *sums, str(x["unclipped_adc_bits"])])
        if "accuracy_alone" in x:
            rows[-1].append(spread_text(x["accuracy_alone"], x["accuracy_alone_std"]))
    return header + ["accuracy alone"] * (len(rows[0]) - len(header)), rows


def lines_of(report: dict[str, Any]) -> list[str]:
    """Of one network, in a terminal."""
    first, *others = nonideal_lines(report)
    lines = [first]
    if len(report["accuracies"]) > 1:
        points = "point" if report["max_drop_points"] == 1 else "points"
        lines.append(
            f"yield, the share of chips that lose at most {report['max_drop_points']:g} {points}: "
            f"{yield_text(report)} with 95 % confidence"
        )
    lines += others
    for key, table in (("over", over_table), ("changes", change_table)):
        if key in report:
            lines += ["", *text_table(*table(report))]
    return lines


def chips_csv(found: Sequence[dict[str, Any]]) -> str:
    """A row a chip that was simulated."""
    header = ["network", "what", "value", "trial", "seed", "accuracy_share", "lost_points", "good"]
    rows = []
    for report in found:
        groups = [("as it is", "", report["accuracies"])]
        if "over" in report:
            name = report["over"]["option"]
            groups += [(name, x["value"], x["accuracies"]) for x in report["over"]["points"]]
        groups += [(x["change"], "", x["accuracies"]) for x in report.get("changes", [])[1:]]
        for what, value, accuracies in groups:
            for trial, accuracy in enumerate(accuracies):
                lost = 100 * (report["digital_accuracy"] - accuracy)
                good = "yes" if lost <= report["max_drop_points"] + 1e-9 else "no"
                start = [report["checkpoint"], what, value, trial, report["seed"]]
                rows.append([*start, accuracy, lost, good])
    return csv_text(header, rows)


def layers_csv(found: Sequence[dict[str, Any]]) -> str:
    """A row a layer of a network."""
    rows = [{"network": x["checkpoint"], **row} for x in found for row in x["layers"]]
    return csv_text(rows[0], (row.values() for row in rows))


def bands_of(found: Sequence[dict[str, Any]]) -> Figure:
    """The picture of `over`."""
    return bands_plot(short_names([report["checkpoint"] for report in found]), found)


def page_of(found: Sequence[dict[str, Any]]) -> str:
    """All of it, with pictures."""
    names = short_names([report["checkpoint"] for report in found])
    plots = {}
    if "over" in found[0]:
        heading = f"Accuracy and yield over {found[0]['over']['option']}"
        plots[heading] = svg(bands_of(found))
    sections = []
    for name, report in zip(names, found, strict=True):
        layers = layers_plot(report["layers"], report["digital_accuracy"])
        plots[f"{name}: layers by what is lost in them"] = svg(layers)
        heading = f"{name}: sums that ADCs read of the digital network, and those that they clip"
        plots[heading] = svg(adc_plot(report))
        sentences = [x for x in lines_of({k: v for k, v in report.items() if k not in TABLES}) if x]
        sections.append(Section(report["checkpoint"], sentences))
        for key, (title, table) in TABLES.items():
            if key in report:
                sections.append(Section(f"{name}: {title}", [], *table(report)))
        about = "Sums are in cell steps; the largest is the digital network's."
        sections.append(Section(f"{name}: layers", [about], *layer_table(report)))
    chip = found[0]["crossbar"] | {"seed": found[0]["seed"], "trials": len(found[0]["accuracies"])}
    options = [[x, "ideal" if y is None else y] for x, y in chip.items() if y != ""]
    sections.append(Section("Chips", [], ["option", "value"], options))
    return page("On crossbars", sections, plots)


TABLES = {
    "over": ("accuracy and yield", over_table),
    "changes": ("what one change of the chip buys back", change_table),
}
