"""Networks against a baseline: the paper's ratios, what they rest on, and the cheapest choice."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np

from display import (
    percent,
    room_for_names,
    run_at,
    short_names,
    significant,
    tested_on,
    trained_for,
)
from runtime.errors import UserError

from .chip import AS_PUBLISHED, CHOICES, NOTHING, SKIPPED, Chip
from .constants import PUBLISHED_RATIO
from .estimate import GAINED, SPENT, Estimate, estimate, ratios
from .layer_list import Layer, LayerList, Subject
from .render import QUANTITIES, RATIO_NAMES, mean_and_deviation, shown
from .sweep import sweep
from .technology import DEFAULT

# (our network, the baseline's, chip) -> the same under another assumption
Case = tuple[LayerList, LayerList, Chip]


ACCURACY = (
    "accuracy: the digital network's; what crossbars and their ADCs leave of it, --on_chip says"
)
ALL_ONES = {"spike_rate": None, "silent_patches": None, "silent_tiles": ()}
FULL_PRECISION = (16, 24, 32)  # fixed-point widths that stand for it
ON_CHIP = "accuracy on the chip: simulated on the crossbars and ADCs that are priced"


def classes(network: LayerList) -> list[int]:
    """Outputs of the classifiers: linear layers that no other layer waits for."""
    waited_for = {name for layer in network.layers for name in layer.after}
    last = (x for x in network.layers if x.linear and x.name not in waited_for)
    return sorted(layer.out_channels for layer in last)


def check_same_classes(ours: Subject, baseline: Subject) -> None:
    """Raise UserError where both have classifiers, and these different numbers of classes."""
    one, other = classes(ours.network), classes(baseline.network)
    if one and other and one != other:
        raise UserError(
            f"{ours.name} tells {_listed(one)} classes apart, {baseline.name} {_listed(other)}: "
            "networks of different tasks are not compared"
        )


def notes(subjects: Sequence[Subject], on_chip: bool = False) -> list[str]:
    """What a reader must know: which accuracy it is (`on_chip`: of chips beside these), where a
    network is run at another T than it was trained with, and where networks differ from the first.
    """
    found = [ACCURACY] if any(subject.accuracy is not None for subject in subjects) else []
    if on_chip or any(subject.chip_accuracies for subject in subjects):
        found = [ON_CHIP]
    found += dict.fromkeys(x for subject in subjects for x in tested_on(subject.test_images))
    for subject in subjects:
        T = subject.network.time_steps
        said = run_at(T, subject.trained_time_steps or [T])
        if on_chip or subject.chip_accuracies:
            said += trained_for(subject.trained_for)
        if subject.chip_accuracies and subject.clipped is not None:
            said += clipping(subject)
        found += (f"{subject.name}: {x}" for x in said)
    return found + [x for subject in subjects[1:] for x in differences(subject, subjects[0])]


def clipping(subject: Subject) -> list[str]:
    """Where ADCs are too small for a network that runs on the chip, and loses a point there."""
    lost = 100 * (subject.accuracy - mean_and_deviation(subject.chip_accuracies)[0])
    share, layer = subject.clipped
    if lost < 1 or share < 0.01:
        return []
    return [
        f"on the chip it loses {lost:.2f} points, and ADCs clip {percent(share)} of the sums of "
        f"{layer}: give them more --adc_bits, or auto"
    ]


def differences(ours: Subject, baseline: Subject) -> list[str]:
    """What makes two networks not quite comparable, as far as their layers say."""
    one, other = _about(ours.network), _about(baseline.network)
    return [
        f"{what} differ: {one[what]} ({ours.name}), {other[what]} ({baseline.name})"
        for what in one
        if one[what] != other[what] and one[what] and other[what]
    ]


def _about(network: LayerList) -> dict[str, str]:
    first = [layer for layer in network.layers if not layer.after]
    measured = any(layer.spike_rate is not None for layer in network.layers)
    return {
        "classes": _listed(classes(network)),
        "timesteps": str(network.time_steps),
        "inputs": _listed(sorted({"{}x{}x{}".format(x.in_channels, *x.in_size) for x in first})),
        "spike rates": "measured" if measured else "not measured and taken as 1",
    }


def _listed(values: Sequence[object]) -> str:
    return " and ".join(map(str, values))


def other_assumptions(
    ours: LayerList, baseline: LayerList, chip: Chip
) -> Iterator[tuple[str, Case]]:
    """Each assumption that the claim rests on, changed alone."""

    def with_layers(which: Callable[[LayerList, Layer], bool], **values: Any) -> Case:
        return ours.with_layers(which, **values), baseline.with_layers(which, **values), chip

    def reads_image(network: LayerList, layer: Layer) -> bool:
        return not layer.linear and layer.input_bits > 1 and not layer.after

    yield "as assumed", (ours, baseline, chip)
    counted = ["noc"] if chip.costs == "counted" else []
    for option in ("columns", "adc_of", "costs", *counted):
        if option == "costs" and chip.technology is not DEFAULT:
            continue  # the published tool knows one technology
        (other,) = set(CHOICES[option]) - {getattr(chip, option)}
        plain = AS_PUBLISHED if other == "published" else {}
        yield f"--{option} {other}", (ours, baseline, replace(chip, **plain | {option: other}))
    if counted:
        other = ",".join(SKIPPED) if chip.skip == NOTHING else NOTHING
        yield f"--skip {other}", (ours, baseline, replace(chip, skip=other))
    yield "shortcut inputs charged as spikes", with_layers(LayerList.reads_stream, input_bits=1)
    yield "image charged as spikes", with_layers(reads_image, input_bits=1)
    yield "spike rate 1 everywhere", with_layers(lambda network, layer: True, **ALL_ONES)
    # At 4 bits both laws say the same: there they are compared at 8.
    bits = 8 if chip.adc_bits == 4 else chip.adc_bits
    for adc_law in CHOICES["adc_law"]:
        if (bits, adc_law) != (chip.adc_bits, chip.adc_law):
            try:
                other = replace(chip, adc_bits=bits, adc_law=adc_law)
            except UserError:  # the technology's table is none, or not of so many bits
                continue
            yield f"--adc_bits {bits} --adc_law {adc_law}", (ours, baseline, other)
    for bits in FULL_PRECISION:
        if baseline.weight_bits in FULL_PRECISION and bits != baseline.weight_bits:
            yield f"baseline of {bits} bits", (ours, baseline.at(bits), chip)


def sensitivity(ours: LayerList, baseline: LayerList, chip: Chip) -> list[dict[str, Any]]:
    """The paper's three ratios under each assumption changed alone, and how far they are from the
    published ones."""
    rows = []
    for change, (network, against, on) in other_assumptions(ours, baseline, chip):
        with suppress(UserError):  # a weight that does not fit: nobody has asked for this chip
            ratio = ratios(estimate(network, on).total, estimate(against, on).total)
            ratio = {name: ratio[name] for name in PUBLISHED_RATIO}
            rows.append({"change": change, "ratio": ratio, "times_off": times_off(ratio)})
    return rows


def times_off(ratio: Mapping[str, float]) -> float:
    """The largest factor between a ratio and the published one, 1 where all three agree."""
    factors = [ratio[name] / constant.value for name, constant in PUBLISHED_RATIO.items()]
    return max(max(factor, 1 / factor) for factor in factors)


SEARCHED_AXES = {  # what `nearest` combines: numbers
    "columns_per_adc": (8,),
    "xbar_size": (64, 128),
    "cell_bits": (2, 4, 8),
    "adc_bits": (4, 6, 8),
}
SEARCHED_CHOICES = ("columns", "adc_of", "costs")


def nearest(ours: LayerList, baseline: LayerList, chip: Chip) -> dict[str, Any]:
    """Of all combinations of what is SEARCHED and widths of the baseline the one whose ratios are
    nearest to the published ones: {"combinations", "change", "ratio", "times_off"}.

    It is what fits the published figures best, and no evidence that they were found so.
    """
    widths = FULL_PRECISION if baseline.weight_bits in FULL_PRECISION else (baseline.weight_bits,)
    others = [baseline if x == baseline.weight_bits else baseline.at(x) for x in widths]
    networks = [Subject("", network) for network in (ours, *others)]
    found = []
    for values in product(*(CHOICES[name] for name in SEARCHED_CHOICES)):
        chosen = dict(zip(SEARCHED_CHOICES, values, strict=True))
        on = replace(chip, xbar_size=64, columns_per_adc=8, **AS_PUBLISHED | chosen)
        columns = sweep(networks, on, SEARCHED_AXES)  # as many points for each network
        totals = {name: np.split(column, len(networks)) for name, column in columns.items()}
        first = {name: parts[0] for name, parts in totals.items()}
        for i, bits in enumerate(widths, 1):
            ratio = ratios(first, {name: parts[i] for name, parts in totals.items()})
            for point in range(len(first["energy_pj"])):
                options = {name: f"{first[name][point]:g}" for name in SEARCHED_AXES} | chosen
                said = " ".join(f"--{name} {value}" for name, value in options.items())
                at = {name: ratio[name][point].item() for name in PUBLISHED_RATIO}
                change = f"{said}, baseline of {bits} bits"
                found.append({"change": change, "ratio": at, "times_off": times_off(at)})
    return {"combinations": len(found)} | min(found, key=lambda row: row["times_off"])


def compare(subjects: Sequence[Subject], chip: Chip) -> tuple[list[dict[str, Any]], list[Estimate]]:
    """A row a network, and its estimate; the first one is the baseline of all ratios."""
    estimates = [estimate(subject.network, chip) for subject in subjects]
    baseline = estimates[0].total
    # Where one network's accuracy is that on the chip, a digital one says nothing beside it.
    simulated = any(subject.chip_accuracies for subject in subjects)
    rows = []
    for subject, found in zip(subjects, estimates, strict=True):
        total = found.total
        chip_accuracy, deviation = mean_and_deviation(subject.chip_accuracies)
        kept = chip_accuracy if simulated else subject.accuracy
        accuracies = subject.accuracy if subject is subjects[0] else kept, subjects[0].accuracy
        drop = None if None in accuracies else 100 * (accuracies[1] - accuracies[0])
        rows.append(
            {
                "network": subject.name,
                "bits": subject.network.weight_bits,
                "time_steps_count": subject.network.time_steps,
                "digital_accuracy_percent": subject.accuracy and 100 * subject.accuracy,
                "chip_accuracy_percent": chip_accuracy and 100 * chip_accuracy,
                "chip_accuracy_deviation_points": deviation and 100 * deviation,
                "drop_points": drop,
                **{key: total[key] for key in ("energy_pj", "delay_ns", "area_um2")},
                **{key: total[key] for key in ("edap_pj_ns_um2", *GAINED)},
                **{
                    f"{name}_times_better": value for name, value in ratios(total, baseline).items()
                },
            }
        )
    return rows, estimates


Table = tuple[list[str], list[list[str]]]  # header, rows


def tables(rows: Sequence[dict[str, Any]]) -> list[Table]:
    """What `compare` found as two tables that fit a screen: figures, and times better than the
    first network."""
    figures = {"bits": [str(row["bits"]) for row in rows]}
    figures["T"] = [str(row["time_steps_count"]) for row in rows]
    for name, key, form in (
        ("accuracy", "digital_accuracy_percent", "{:.2f} %"),
        ("on chip", "chip_accuracy_percent", "{:.2f} %"),
        ("drop", "drop_points", "{:.2f}"),
    ):
        if any(row[key] is not None for row in rows):
            figures[name] = ["" if row[key] is None else form.format(row[key]) for row in rows]
    for key in SPENT.values():
        figures[QUANTITIES[key][0]] = [shown(key, row[key], digits=3) for row in rows]
    better = {
        name: [significant(row[f"{ratio}_times_better"]) for row in rows]
        for ratio, name in RATIO_NAMES.items()
    }
    found = []
    for title, columns in (("network", figures), ("times better", better)):
        header, cells = list(columns), list(zip(*columns.values(), strict=True))
        names = short_names([row["network"] for row in rows], room_for_names(header, cells))
        found.append(([title, *header], [[x, *y] for x, y in zip(names, cells, strict=True)]))
    return found


def cheapest(rows: Sequence[dict[str, Any]], max_drop: float) -> dict[str, Any] | None:
    """The row of the least EDAP among those at most `max_drop` points below the baseline (the first
    row, which is not a choice); None where there is none."""
    good = [row for row in rows[1:] if row["drop_points"] is not None]
    good = [row for row in good if row["drop_points"] <= max_drop + 1e-9]  # 98 - 97 is 1 + 9e-16
    return min(good, key=lambda row: row["edap_pj_ns_um2"], default=None)


def choice(rows: Sequence[dict[str, Any]], max_drop: float) -> str:
    """What `cheapest` says of these rows, in words."""
    best = cheapest(rows, max_drop)
    found = "none" if best is None else best["network"]
    if all(row["drop_points"] is None for row in rows[1:]):
        found = "not known, for want of accuracies"
    points = "point" if max_drop == 1 else "points"
    return f"least EDAP within {max_drop:g} {points} of the baseline: {found}"


def published_ratios() -> str:
    figures = ", ".join(f"{RATIO_NAMES[name]} {x.value}" for name, x in PUBLISHED_RATIO.items())
    return f"published, times better than floating point (information only): {figures}"
