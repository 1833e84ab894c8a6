"""Many chips of one kind, each with cells drawn anew: how many of them are good enough, where noise
of what strength leaves a network, and what calibration, one more bit or other columns buy back.

Simulated by `nonideal`; a chip is good where the network loses at most `max_drop` points of its own
digital accuracy there, or has an accuracy of `at_least`, and the yield is the share of good ones.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from matplotlib.figure import Figure

from checkpoints import load_checkpoint
from display import percent, short_names, text_table
from runtime.errors import UserError

from .calibration import calibration_of
from .chip import OPTIONS, Chip, Draws, bits_by_layer, check_layers
from .device_plots import MEANING, adc_plot, bands_plot, edap_plot, layers_plot
from .estimate import estimate
from .layer_list import Subject, check_int, check_number
from .nonideal import (
    Prepare,
    load_subject,
    most_clipped,
    nonideal_lines,
    on_chip,
    report_of,
)
from .plots import svg
from .render import (
    Section,
    csv_text,
    mean_and_deviation,
    options_section,
    page,
    shown,
    spread_text,
)

COSTS = ("energy_pj", "delay_ns", "area_um2", "edap_pj_ns_um2")  # of an image
SURE = 1.959964  # standard deviations on both sides of which 95 % of normal numbers lie
OVER = tuple(MEANING)  # options that have an axis


def wilson(good: int, of: int) -> tuple[float, float]:
    """Where a share lies with 95 % confidence, of which `good` of `of` draws were seen: the score
    interval of E. B. Wilson (1927), which also none and all of few draws do not make certain."""
    share, z = good / of, SURE**2 / of
    middle = (share + z / 2) / (1 + z)
    half = SURE / (1 + z) * math.sqrt(share * (1 - share) / of + z / (4 * of))
    # the share itself is within, also after rounding
    return min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half))


def is_good(accuracy: float, needed: float) -> bool:
    """Whether a chip is, whose network has this accuracy there; rounding does not decide it."""
    return accuracy >= needed - 1e-11


def judged(accuracies: Sequence[float], needed: float, is_random: bool = True) -> dict[str, Any]:
    """Mean, deviation and yield of chips on which a network has these accuracies, a good one at
    least what is `needed`; where nothing is random one says it of all. One chip has no deviation.
    """
    good = sum(is_good(x, needed) for x in accuracies)
    share = good / len(accuracies)
    low, high = wilson(good, len(accuracies)) if is_random else (share, share)
    mean, deviation = mean_and_deviation(accuracies)
    return {
        "accuracies": list(accuracies),
        "accuracy_mean": mean,
        "accuracy_std": deviation,
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


@dataclass(frozen=True)
class Question:
    """What is asked about a network on chips of one kind.

    Attributes:
        max_drop: points of its own accuracy that it may lose on a chip that counts as good.
        at_least: or, where given, the accuracy in % that it needs there, the same of all networks.
        each_layer: also with each layer alone on them.
        over: also at other values of an option, as `chips_over` reads it.
        each_change: also on chips changed in one thing, and what an image costs there.
        images: accuracies and yields also of calibrated chips, with so many training images each;
            None: not.

    Raises UserError for numbers that make no sense.
    """

    max_drop: float = 1.0
    each_layer: bool = False
    over: str | None = None
    each_change: bool = False
    images: int | None = None
    at_least: float | None = None

    def __post_init__(self) -> None:
        check_number(self.max_drop, "max_drop", 0, 100)
        if self.at_least is not None:
            check_number(self.at_least, "at_least", 0, 100)
        if self.images is not None:
            check_int(self.images, "calibrate", 10**4)

    def needed(self, digital: float) -> float:
        """The accuracy that a network of this digital one needs on a good chip."""
        least = 100 * digital - self.max_drop if self.at_least is None else self.at_least
        return least / 100

    @property
    def good(self) -> str:
        """What good chips do."""
        if self.at_least is not None:
            return f"have at least {self.at_least:g} %"
        return f"lose at most {self.max_drop:g} {'point' if self.max_drop == 1 else 'points'}"


def network_report(
    subject: Subject,
    chip: Chip,
    draws: Draws,
    asked: Question,
    calibrate: Prepare | None = None,
) -> dict[str, Any]:
    """`nonideal`'s report of a network, and what is asked; `calibrate` does so to a chip."""
    report = report_of(subject, chip, draws, asked.each_layer)

    def judge(accuracies: Sequence[float], on: Chip) -> dict[str, Any]:
        return judged(accuracies, asked.needed(subject.accuracy), on.is_random)

    def calibrated(on: Chip, name: str) -> dict[str, Any]:
        """What is said beside that of chips as made; nothing where nothing calibrates."""
        if calibrate is None:
            return {}
        name = f"{name}, calibrated"
        accuracies, runs = on_chip(subject, on, draws.numbers, name, prepare=calibrate)
        steps = {layer: [layers[layer].adc_step for layers in runs] for layer in runs[0]}
        return {"calibrated": judge(accuracies, on) | {"adc_steps": steps}}

    report |= {"kind": subject.kind, "good_chips": asked.good}
    report["needed_accuracy"] = asked.needed(subject.accuracy)
    report |= {"calibration_images": asked.images, **judge(report["accuracies"], chip)}
    as_it_is = calibrated(chip, "crossbars")
    report |= as_it_is
    clipped, worst = max((row["clipped_share"], row["layer"]) for row in report["layers"])

    def on(other: Chip, name: str) -> dict[str, Any]:
        if other == chip:
            found, most = judge(report["accuracies"], chip) | as_it_is, (clipped, worst)
        else:
            accuracies, runs = on_chip(subject, other, draws.numbers, name)
            found, most = judge(accuracies, other), most_clipped(runs)
            del runs  # they are large
            found |= calibrated(other, name)
        return found | dict(zip(("clipped_share", "clipped_layer"), most, strict=True))

    if asked.over is not None:
        name, chips = chips_over(chip, asked.over)
        points = [{"value": value, **on(x, f"{name} {value}")} for value, x in chips]
        report["over"] = {"option": name, "points": points}
    if asked.each_change:
        report["changes"] = []
        for name, changed in changed_chips(chip, worst if clipped else None):
            costs = dict.fromkeys(COSTS)  # of an ideal ADC nobody knows them
            if changed.adc_bits is not None:
                total = estimate(subject.network, changed).total
                costs = {key: total[key] for key in COSTS}
            report["changes"].append({"change": name, **costs, **on(changed, name)})
    return report


def reports(
    paths: Sequence[str],
    data_path: str | None,
    chip: Chip,
    draws: Draws,
    asked: Question,
    time_steps: int | None = None,
    test_images: int | None = None,
) -> list[dict[str, Any]]:
    """`network_report` of each checkpoint. Raises UserError, before any is simulated, for whatever
    is wrong with one of them."""
    if asked.over is not None:
        chips_over(chip, asked.over)
    subjects = [load_subject(path, data_path, time_steps, test_images) for path in paths]
    check_layers(chip, (subject.network for subject in subjects))
    for subject in subjects:
        for layer in subject.network.layers:
            chip.check_fits(
                f"{subject.name}: layer {layer.name}", subject.network.weight_bits_of(layer)
            )
    ways: list[Prepare | None] = [None] * len(paths)
    if asked.images is not None:
        how = data_path, asked.images, time_steps
        ways = [calibration_of(load_checkpoint(path), *how) for path in paths]
    return [
        network_report(subject, chip, draws, asked, calibrate)
        for subject, calibrate in zip(subjects, ways, strict=True)
    ]


# What a person is told.


def yield_text(found: dict[str, Any]) -> str:
    """ "80.0 % (38 to 96)": a yield with where it lies with 95 % confidence."""
    low, high = (100 * found[f"yield_{end}_share"] for end in ("low", "high"))
    return f"{percent(found['yield_share'])} ({low:.0f} to {high:.0f})"


def accuracy_text(found: dict[str, Any]) -> str:
    return spread_text(found["accuracy_mean"], found["accuracy_std"])


def calibrated_columns(found: dict[str, Any]) -> dict[str, str]:
    """Cells by header of what is said of calibrated chips; none where none are."""
    if "calibrated" not in found:
        return {}
    again = found["calibrated"]
    return {"calibrated": accuracy_text(again), "yield calibrated": yield_text(again)}


def table_of(rows: Sequence[dict[str, str]]) -> tuple[list[str], list[list[str]]]:
    return [*rows[0]], [[*row.values()] for row in rows]


def over_table(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    return table_of(
        [
            {
                report["over"]["option"]: x["value"],
                "accuracy": accuracy_text(x),
                "worst": percent(min(x["accuracies"]), 2),
                "yield (95 % sure)": yield_text(x),
                **calibrated_columns(x),
            }
            for x in report["over"]["points"]
        ]
    )


def change_table(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    first, rows = report["changes"][0], []
    for x in report["changes"]:
        row = {
            "chip": x["change"],
            "accuracy": accuracy_text(x),
            "yield (95 % sure)": yield_text(x),
        }
        row |= {"clipped, worst layer": percent(x["clipped_share"], 2), **calibrated_columns(x)}
        energy, edap = "energy_pj", "edap_pj_ns_um2"
        is_known = first[energy] and x[energy]
        row["energy"] = shown(energy, x[energy]) if is_known else ""
        for name, key in {"times": energy, "EDAP, times": edap}.items():
            row[name] = f"{x[key] / first[key]:.3g}" if is_known else ""
        rows.append(row)
    return table_of(rows)


def layer_table(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Layers, that with the largest error of its sums first."""
    steps, rows = {}, []
    if report["crossbar"]["adc_bits"] is not None:
        steps = report.get("calibrated", {}).get("adc_steps", {})
    for x in sorted(report["layers"], key=lambda row: -row["relative_error"]):
        reach = x["adc_reach_cell_steps"]
        row = {
            "layer": x["layer"],
            "error of sums": percent(x["relative_error"], 2),
            "clipped": percent(x["clipped_share"], 2),
            "largest sum": f"{x['largest_sum_cell_steps']:g}",
            "ADC reaches": "all" if reach is None else f"{reach:g}",
            "bits that clip none": str(x["unclipped_adc_bits"]),
        }
        if "accuracy_alone" in x:
            row["accuracy alone"] = spread_text(x["accuracy_alone"], x["accuracy_alone_std"])
        if own := steps.get(x["layer"]):
            several = "" if min(own) == max(own) else f" to {max(own):.3g}"
            row["ADC step, calibrated"] = f"{min(own):.3g}{several}"
        rows.append(row)
    return table_of(rows)


def calibrated_line(report: dict[str, Any]) -> str:
    again = report["calibrated"]
    lost = 100 * (report["digital_accuracy"] - again["accuracy_mean"])
    line = f"calibrated, with {report['calibration_images']} training images: "
    line += f"{accuracy_text(again)} ({lost:.2f} points lost)"
    return line + (f", yield {yield_text(again)}" if len(again["accuracies"]) > 1 else "")


def lines_of(report: dict[str, Any]) -> list[str]:
    """Of one network, in a terminal."""
    first, *others = nonideal_lines(report)
    lines = [first]
    if len(report["accuracies"]) > 1:
        lines.append(
            f"yield, the share of chips that {report['good_chips']}: {yield_text(report)} with "
            "95 % confidence"
        )
    if "calibrated" in report:
        lines.append(calibrated_line(report))
    lines += others
    for key, table in (("over", over_table), ("changes", change_table)):
        if key in report:
            lines += ["", *text_table(*table(report))]
    return lines


def chips_csv(found: Sequence[dict[str, Any]]) -> str:
    """A row a chip that was simulated; 0 training images calibrate a chip as made, and EDAP is said
    where `each_change` is."""
    header = ["network", "what", "value", "trial", "seed", "calibration_images", "accuracy_share"]
    header += ["lost_points", "good", "edap_pj_ns_um2"]
    rows = []
    for report in found:
        as_it_is = report["changes"][0] if "changes" in report else report
        groups = [("as it is", "", as_it_is)]
        if "over" in report:
            groups += [(report["over"]["option"], x["value"], x) for x in report["over"]["points"]]
        groups += [(x["change"], "", x) for x in report.get("changes", [])[1:]]
        for what, value, chips in groups:
            ways = {0: chips}
            if "calibrated" in chips:
                ways[report["calibration_images"]] = chips["calibrated"]
            for images, way in ways.items():
                for trial, accuracy in enumerate(way["accuracies"]):
                    lost = 100 * (report["digital_accuracy"] - accuracy)
                    good = "yes" if is_good(accuracy, report["needed_accuracy"]) else "no"
                    start = [report["checkpoint"], what, value, trial, report["seed"], images]
                    rows.append([*start, accuracy, lost, good, chips.get("edap_pj_ns_um2")])
    return csv_text(header, rows)


def layers_csv(found: Sequence[dict[str, Any]]) -> str:
    """A row a layer of a network."""
    rows = [{"network": x["checkpoint"], **row} for x in found for row in x["layers"]]
    return csv_text(rows[0], (row.values() for row in rows))


def pictures_of(found: Sequence[dict[str, Any]]) -> dict[str, tuple[str, Figure]]:
    """(heading on the page, figure) by the name of its files: of `over`, and, where costs are
    known, of `each_change`."""
    names, figures = short_names([report["checkpoint"] for report in found]), {}
    if "over" in found[0]:
        heading = f"Accuracy and yield over {found[0]['over']['option']}"
        figures["nonideal"] = heading, bands_plot(names, found)
    if any(x["edap_pj_ns_um2"] for report in found for x in report.get("changes", ())):
        figures["edap"] = "Accuracy over EDAP, a point a chip", edap_plot(names, found)
    return figures


def page_of(found: Sequence[dict[str, Any]], pictures: Mapping[str, tuple[str, Figure]]) -> str:
    """All of it, with the pictures of `pictures_of` and those of each network."""
    names = short_names([report["checkpoint"] for report in found])
    plots = {heading: svg(figure) for heading, figure in pictures.values()}
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
    sections.append(options_section("Chips", chip))
    return page("On crossbars", sections, plots)


TABLES = {
    "over": ("accuracy and yield", over_table),
    "changes": ("what one change of the chip buys back", change_table),
}
