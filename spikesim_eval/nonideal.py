"""Non-ideal inference: a trained quantized network whose layers crossbars compute (crossbar.py)."""

import copy
import statistics
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from checkpoints import load_checkpoint
from display import percent, run_at, tested_on, trained_for
from engine.evaluate import evaluate
from runtime.errors import UserError

from .chip import OPTIONS, Chip, Draws
from .crossbar import CrossbarLayer, Images
from .layer_list import Layer, LayerList, Subject
from .render import mean_and_deviation, spread_text
from .trace import trace_checkpoint

SMALL_BIAS = 1e-3  # of the mean conductance, not worth a word
# What is done to a network on a chip, and its layers there, before it is tested.
Prepare = Callable[[nn.Module, Collection[CrossbarLayer]], None]


def on_crossbars(
    network: nn.Module,
    description: LayerList,
    chip: Chip,
    seed: int,
    only: Iterable[str] | None = None,
    keep: Collection[str] = (),
) -> tuple[nn.Module, dict[str, CrossbarLayer]]:
    """A copy of a trained quantized network whose layers run on crossbars, and these layers by
    name; with `only`, no others than those. `description` is the network's own layer list, `keep`
    what a `CrossbarLayer` is to keep.
    """
    network = copy.deepcopy(network).eval()
    images = Images(network) if chip.is_read_anew else None
    layers: dict[str, CrossbarLayer] = {}
    bar = tqdm(description.layers, "wires", leave=False, disable=not chip.wire_ohm or None)
    for index, layer in enumerate(bar):
        if only is not None and layer.name not in only:
            continue
        module = network.get_submodule(layer.name)
        generator = generator_of(index, description, seed)
        layers[layer.name] = _place(module, layer, description, chip, generator, keep, images)
    return network, layers


def generator_of(index: int, description: LayerList, seed: int) -> torch.Generator:
    """Draws the cells of the layer of this index."""
    return torch.Generator().manual_seed(seed * len(description.layers) + index)


def _place(
    module: nn.Module,
    layer: Layer,
    description: LayerList,
    chip: Chip,
    generator: torch.Generator,
    keep: Collection[str],
    images: Images | None,
) -> CrossbarLayer:
    """Let crossbars compute what `module` computes."""
    codes, step = module.quantizer.codes(module.weight)
    placed = CrossbarLayer(
        codes[..., None, None] if layer.linear else codes,
        layer,
        description,
        chip,
        (1, 1) if layer.linear else module.stride,
        (0, 0) if layer.linear else module.padding,
        generator,
        keep,
        images,
    )
    if not layer.linear:
        module.forward = placed
        return placed

    def linear(mean_spikes: Tensor) -> Tensor:
        return placed.of_means(mean_spikes) * step.T + module.bias

    module.forward = linear
    return placed


def on_chip(
    subject: Subject,
    chip: Chip,
    draws: Sequence[int] = (0,),
    name: str = "on the chip",
    keep: Collection[str] = (),
    prepare: Prepare | None = None,
    only: Collection[str] | None = None,
) -> tuple[list[float], list[dict[str, CrossbarLayer]]]:
    """(accuracies, layers) of a trained network on the chip, one for each of the `draws` of its
    cells (`Draws.numbers`); of a chip of which nothing is random all are the same, and the first is
    enough. `keep`: what a `CrossbarLayer` is to keep. `prepare` is done to each chip before. With
    `only` no other layers are on it."""
    network, batches = subject.tested
    accuracies, runs = [], []
    for trial, draw in enumerate(draws if chip.is_random else draws[:1], start=1):
        placed, layers = on_crossbars(network, subject.network, chip, draw, only, keep)
        if prepare is not None:
            prepare(placed, layers.values())
        what = f"{name}, trial {trial} of {len(draws)}" if chip.is_random else name
        tested = evaluate(placed, batches, torch.device("cpu"), name=what)
        accuracies.append(tested.accuracy)
        runs.append(layers)
    return accuracies, runs


def smallest_adcs(subjects: Sequence[Subject], chip: Chip, max_drop: float, draws: Draws) -> Chip:
    """The chip with the smallest ADCs with which each of the networks loses at most `max_drop`
    points of its own accuracy: first the fewest bits that are the same everywhere, then fewer layer
    by layer.

    Single bits are taken from single layers in the order of what that adds to the layer's sums (see
    `CrossbarLayer.adc_error`, of the sums that ADCs of the same bits read) for the conversions'
    energy that it saves; how many of them, bisection says, with the networks simulated at each.
    Raises UserError where no resolution is enough.
    """

    def is_enough(chip: Chip, subject: Subject, name: str) -> bool:
        accuracies, _ = on_chip(subject, chip, draws.numbers, name)
        return 100 * (subject.accuracy - statistics.mean(accuracies)) <= max_drop + 1e-9

    low, high = OPTIONS["adc_bits"].metadata["limits"]
    if chip.adc_law == "table":
        high = min(high, chip.technology.most_adc_bits)
    bits, chip = low, replace(chip, layer_adc_bits="")
    for subject in subjects:
        while not is_enough(replace(chip, adc_bits=bits), subject, f"ADCs of {bits} bits"):
            if bits == high:
                raise UserError(
                    f"--adc_bits auto: with ADCs of {low} to {high} bits {subject.name} loses more "
                    f"than {max_drop:g} points: raise --max_drop, or change what else is not ideal"
                )
            bits += 1
    chip = replace(chip, adc_bits=bits)
    if chip.costs == "published":
        return chip
    steps = fewer_bits(subjects, chip, draws.numbers[0])

    def after(count: int) -> Chip:
        of_layers = dict(steps[:count])
        said = ",".join(f"{name}={bits}" for name, bits in of_layers.items())
        return replace(chip, layer_adc_bits=said)

    enough, too_many = 0, len(steps) + 1
    while enough + 1 < too_many:
        count = (enough + too_many) // 2
        name = f"ADCs with {count} bits less"
        good = all(is_enough(after(count), subject, name) for subject in subjects)
        enough, too_many = (count, too_many) if good else (enough, count)
    return after(enough)


def fewer_bits(subjects: Sequence[Subject], chip: Chip, draw: int) -> list[tuple[str, int]]:
    """(layer, its ADCs' bits) in the order in which single bits are taken from single layers."""
    runs = [on_chip(x, chip, [draw], "sums", keep=["sums"])[1][0] for x in subjects]
    found = []
    for name in dict.fromkeys(name for run in runs for name in run):
        layers = [run[name] for run in runs if name in run]
        conversions = sum(layer.counts.conversions / layer.counts.images for layer in layers)
        added, ratio = max(layer.adc_error(chip.adc_bits) for layer in layers), 0.0
        for bits in range(chip.adc_bits - 1, 0, -1):
            before, added = added, max(layer.adc_error(bits) for layer in layers)
            more, less = (replace(chip, adc_bits=x).adc_scale("energy") for x in (bits + 1, bits))
            saved = more - less
            # Never less than that of the bit before, which is taken first.
            ratio = max(ratio, (added - before) / max(1.0, conversions * saved))
            found.append((ratio, -bits, name))
    return [(name, -bits) for _, bits, name in sorted(found)]


def load_subject(
    path: str,
    data_path: str | None,
    time_steps: int | None = None,
    test_images: int | None = None,
) -> Subject:
    """A quantized checkpoint that can run on a simulated chip, with its digital accuracy and what
    drives its rows (`trace_checkpoint`). Raises UserError for a full-precision one, and for missing
    data."""
    settings = load_checkpoint(path, weights=False).settings
    if settings.bits is None:
        raise UserError(f"{path} is a full-precision network: crossbars hold integers")
    subject = trace_checkpoint(path, data_path, time_steps, test_images=test_images)
    if subject.tested is None:
        raise UserError(f"accuracy on {settings.data} is measured: give --data_path")
    return subject


def report_of(
    subject: Subject, chip: Chip, draws: Draws, each_layer: bool = False
) -> dict[str, Any]:
    """Accuracy of a network on such crossbars, over draws of their cells, and where it is lost;
    with `each_layer` also the accuracy with a single layer on them. `adc_sums` counts, by layer,
    how often the digital network's sums are 0, 1, 2 ... cell steps."""
    network, batches = subject.tested
    description = subject.network

    def accuracy(network: nn.Module, name: str) -> float:
        return evaluate(network, batches, torch.device("cpu"), name=name).accuracy

    # What an ADC must reach to is what the digital network's sums are, not those of a broken one.
    keep = ["largest", "sums"]
    placed, needed = on_crossbars(network, description, chip.ideal, draws.seed, keep=keep)
    accuracy(placed, "ADC range")
    accuracies, runs = on_chip(subject, chip, draws.numbers, "crossbars", keep=["errors"])
    rows = [layer_row(name, [layers[name] for layers in runs], needed[name]) for name in needed]
    for row in rows if each_layer else ():
        name = row["layer"]
        alone, _ = on_chip(subject, chip, draws.numbers, name, only=[name])
        mean, deviation = mean_and_deviation(alone)
        row |= {"accuracy_alone": mean, "accuracy_alone_std": deviation}
    mean, deviation = mean_and_deviation(accuracies)
    return {
        "checkpoint": subject.name,
        "crossbar": chip.options("simulation"),
        "variation_bias": chip.variation_bias,
        "seed": draws.seed,
        "time_steps": network.time_window,
        "trained_time_steps": subject.trained_time_steps,
        "trained_for": subject.trained_for,
        "test_images": subject.test_images,
        "digital_accuracy": subject.accuracy,
        "accuracy_mean": mean,
        "accuracy_std": deviation,
        "accuracies": accuracies,
        "unclipped_adc_bits": max(row["unclipped_adc_bits"] for row in rows),
        "layers": rows,
        "adc_sums": {name: layer.sums.tolist() for name, layer in needed.items()},
    }


def clipped_share(chips: Sequence[CrossbarLayer]) -> float:
    """Of the conversions of a layer, on these chips."""
    return statistics.mean(x.counts.clipped / x.counts.conversions for x in chips)


def most_clipped(runs: Sequence[dict[str, CrossbarLayer]]) -> tuple[float, str]:
    """The largest `clipped_share` of a layer, and the layer."""
    return max((clipped_share([layers[name] for layers in runs]), name) for name in runs[0])


def layer_row(name: str, runs: Sequence[CrossbarLayer], needed: CrossbarLayer) -> dict[str, Any]:
    """One layer over all trials; sums, in cell steps, are those of the digital network."""
    return {
        "layer": name,
        "relative_error": statistics.mean(layer.relative_error for layer in runs),
        "clipped_share": clipped_share(runs),
        "largest_sum_cell_steps": needed.largest_sum,
        "unclipped_adc_bits": needed.unclipped_adc_bits,
        "adc_reach_cell_steps": runs[0].adc_reach,
    }


def nonideal_lines(report: dict[str, Any]) -> list[str]:
    """What a person is told."""
    lost = 100 * (report["digital_accuracy"] - report["accuracy_mean"])
    trials = len(report["accuracies"])
    lines = [
        f"digital accuracy {percent(report['digital_accuracy'], 2)}; on crossbars "
        f"{spread_text(report['accuracy_mean'], report['accuracy_std'])} "
        f"({trials} {'trial' if trials == 1 else 'trials'}, {lost:.2f} points lost)",
        *run_at(report["time_steps"], report["trained_time_steps"]),
        *trained_for(report["trained_for"]),
        *tested_on(report["test_images"]),
        "layers that hurt most (root mean square error, relative to their sums):",
    ]
    by_error = sorted(report["layers"], key=lambda row: -row["relative_error"])
    worst = sorted(by_error, key=lambda row: row.get("accuracy_alone", 0.0))[:5]
    for row in worst:
        alone = ""
        if "accuracy_alone" in row:
            alone = f", alone {spread_text(row['accuracy_alone'], row['accuracy_alone_std'])}"
        lines.append(
            f"  {row['layer']}: {percent(row['relative_error'])}, "
            f"{percent(row['clipped_share'])} of partial sums clipped{alone}"
        )
    if report["variation_bias"] > SMALL_BIAS:
        lines.append(
            f"sigma {report['crossbar']['sigma']:g} would make some conductances negative: they "
            "are set to 0, which raises the mean conductance by "
            f"{percent(report['variation_bias'])}"
        )
    if report["crossbar"]["adc_bits"] is not None and lost > 0:
        lines.append(
            "an ADC that clips none of the digital network's sums: --adc_bits "
            f"{report['unclipped_adc_bits']} --adc_range unit"
        )
    return lines
