"""Calibration of a chip: what is set once on each, after its cells are written, with a few training
images that it computes itself. Two things, layer by layer in one forward pass:

- the range of a layer's ADCs, as NeuRRAM's are set from training data (Wan et al., Nature 608,
  2022): the step with which the least is lost of what the sums of each output channel say, whatever
  their scale (`lost_share`). The step that is off the least from all that they read would round
  channels of small weights away;
- a digital scale and shift of each output channel, which are multiplied anyway: the statistics of
  the batch norm behind a convolution, of what the chip gives instead of what a perfect one would
  (AdaBS: Joshi et al., Nature Communications 11, 2020), and of the classifier, which has no batch
  norm, the line of least squares.

Of a network that was trained for a chip batch norms alone are set: it has learned to do with what
its ADCs clip, and the perfect chip's sums are not what it wants.
"""

import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from checkpoints import Checkpoint
from data_loader import data_of, some_images
from display import percent, tested_on
from engine.evaluate import evaluate
from models.batch_norm import estimate_statistics
from runtime.errors import UserError

from .chip import Chip, Draws, check_layers
from .crossbar import CrossbarLayer
from .layer_list import Subject, check_int
from .nonideal import Prepare, load_quantized, on_chip
from .render import mean_and_deviation
from .trace import describe

# The smallest step of an ADC that is tried, in cell steps: cells that have drifted add up to less.
SMALLEST_STEP = 0.25


def calibrate(
    network: nn.Module,
    layers: Collection[CrossbarLayer],
    images: Tensor,
    time_windows: Sequence[int],
    sums: bool = True,
) -> None:
    """Calibrate a network whose layers run on crossbars (`on_crossbars`), on a batch of images, for
    the T that it was trained with: its batch norms, and before them, with `sums`, what is set in
    the layers. It is in evaluation mode then."""
    for layer in layers:
        layer.before = calibrate_sums if sums else None
    with torch.no_grad():
        estimate_statistics(network, [images], time_windows)
    for layer in layers:
        layer.before = None
    network.eval()


def calibrate_sums(layer: CrossbarLayer, x: Tensor) -> None:
    """Set the step of a layer's ADCs to that with which the sums of inputs x lose the least, and of
    a linear layer the scale and shift of each output, by least squares from the ideal sums."""
    widest = max(1.0, layer.full_range / layer.largest_code)  # clips nothing that is meant
    first, last = (math.ceil(2 * math.log2(step)) for step in (SMALLEST_STEP, widest))
    # √2 apart. Of steps that lose equally little the largest is taken: it reaches furthest.
    steps = [2 ** (i / 2) for i in range(last, first - 1, -1)]
    ideal = layer.ideal_sums(x)
    # What differs by rounding alone is equal.
    lost = [round(lost_share(layer.trial(x, step), ideal), 12) for step in steps]
    layer.set_step(steps[int(np.argmin(lost))])
    if layer.linear:
        sums = layer.trial(x, layer.adc_step)
        layer.correction = scale_and_shift(sums.flatten(1), ideal.flatten(1))


def lost_share(sums: Tensor, ideal: Tensor) -> float:
    """What of the ideal sums (N, O, H', W') no scale and shift of a chip's brings back, a share of
    their variance: the mean of 1 - squared correlation over the output channels. A channel that
    says nothing counts 1."""
    sums, ideal = (x.double().transpose(0, 1).flatten(1) for x in (sums, ideal))
    sums, ideal = (x - x.mean(dim=1, keepdim=True) for x in (sums, ideal))
    squares = sums.square().sum(dim=1) * ideal.square().sum(dim=1)
    kept = (sums * ideal).sum(dim=1).square() / squares
    return 1 - kept.nan_to_num(0.0).mean().item()


def scale_and_shift(sums: Tensor, ideal: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, shift), (O,) each, with which sums (N, O) are nearest to the ideal ones; a scale of 0
    where all sums of an output are the same."""
    sums, ideal, dtype = sums.double(), ideal.double(), sums.dtype
    centre = sums.mean(dim=0)
    scale = ((sums - centre) * ideal).sum(dim=0) / (sums - centre).square().sum(dim=0)
    scale = scale.nan_to_num(0.0, posinf=0.0, neginf=0.0)
    return scale.to(dtype), (ideal.mean(dim=0) - scale * centre).to(dtype)


def training_images(checkpoint: Checkpoint, data_path: str | None, number: int) -> Tensor:
    """Some training images of a checkpoint's data, without augmentation. Raises UserError where
    there are fewer."""
    train_set, _ = data_of(checkpoint.settings, data_path or ".")
    if number > len(train_set):
        raise UserError(f"--images {number}: there are {len(train_set)} training images")
    return some_images(train_set, number)


def calibration_of(checkpoint: Checkpoint, data_path: str | None, images: int) -> Prepare:
    """What calibrates a chip that computes a checkpoint's network, with so many training images."""
    seen, settings = training_images(checkpoint, data_path, images), checkpoint.settings
    plain = settings.crossbar is None
    return lambda network, layers: calibrate(network, layers, seen, settings.trained_at, plain)


def calibration_report(
    path: str,
    data_path: str | None,
    chip: Chip,
    images: int,
    draws: Draws,
    test_images: int | None = None,
) -> dict[str, Any]:
    """Accuracy of a checkpoint on drawn chips before and after each is calibrated with so many
    training images, and the steps of its ADCs by layer; with `test_images` it is measured on so
    many, which are drawn.

    Raises UserError for a full-precision checkpoint, missing data and numbers that make no sense.
    """
    check_int(images, "images", 10**4)
    checkpoint, network, batches = load_quantized(path, data_path, test_images=test_images)
    description = describe(network)
    check_layers(chip, [description])
    prepare = calibration_of(checkpoint, data_path, images)
    digital = evaluate(network, batches, torch.device("cpu"), name="digital").accuracy
    subject = Subject(path, description, tested=(network, batches))

    before, _ = on_chip(subject, chip, draws.numbers, "as made")
    after, runs = on_chip(subject, chip, draws.numbers, "calibrated", prepare=prepare)
    return {
        "checkpoint": str(path),
        "crossbar": chip.options("simulation"),
        "seed": draws.seed,
        "images": images,
        "test_images": test_images,
        "digital_accuracy": digital,
        "accuracies_before": before,
        "accuracies_after": after,
        "adc_steps": {
            name: [layers[name].adc_step for layers in runs] for name in (runs[0] if runs else ())
        },
    }


def calibration_lines(report: dict[str, Any]) -> list[str]:
    """What a person is told."""
    lines = [f"digital accuracy {percent(report['digital_accuracy'], 2)}"]
    for name, when in (("before", "as made"), ("after", f"calibrated ({report['images']} images)")):
        found = report[f"accuracies_{name}"]
        mean, deviation = mean_and_deviation(found)
        text = f"{100 * mean:.2f} ± {percent(deviation or 0.0, 2)}"
        lines.append(f"on chips, {when}: {text} ({len(found)} chips)")
    return lines + tested_on(report["test_images"])
