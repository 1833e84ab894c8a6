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

import numpy as np
import torch
from torch import Tensor, nn

from checkpoints import Checkpoint
from data_loader import data_of, some_images
from models.batch_norm import estimate_statistics
from runtime.errors import UserError

from .crossbar import CrossbarLayer
from .nonideal import Prepare

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
    these T: its batch norms, and before them, with `sums`, what is set in
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
        raise UserError(
            f"{number} images to calibrate chips with: there are {len(train_set)} training images"
        )
    return some_images(train_set, number)


def calibration_of(
    checkpoint: Checkpoint, data_path: str | None, images: int, time_steps: int | None = None
) -> Prepare:
    """What calibrates a chip that computes a checkpoint's network, with so many training images;
    `time_steps` is T, where it is not the trained one."""
    seen, settings = training_images(checkpoint, data_path, images), checkpoint.settings
    at = settings.trained_at if time_steps is None else [time_steps]
    plain = settings.crossbar is None
    return lambda network, layers: calibrate(network, layers, seen, at, plain)
