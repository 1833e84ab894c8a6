"""What a layer reads, as the whole-number codes that a chip would feed it bit by bit."""

import torch
from torch import Tensor

MOST_LEVELS = 2**15  # different values; more of them are real numbers
MOST_COUNT = 10_000  # in units of a step that nobody has told
ROUNDING = 2e-6  # of float32 values, relative


class Levels:
    """The different values seen, and how often; `values` is None of real numbers.

    `rounding` is the relative error that they may have.
    """

    def __init__(self):
        self.values: Tensor | None = torch.zeros(0, dtype=torch.float64)
        self.rounding = ROUNDING
        self.counts = torch.zeros(0, dtype=torch.int64)

    def add(self, x: Tensor) -> None:
        if x.is_floating_point():
            self.rounding = max(self.rounding, 4 * torch.finfo(x.dtype).eps)
        x = x.detach().flatten().double().cpu()
        start = x[: 4 * MOST_LEVELS]  # the whole is sorted only where that is worth it
        if self.values is None or len(start.unique()) > MOST_LEVELS:
            self.values = None
            return
        values, counts = x.unique(return_counts=True)
        values, where = torch.cat([self.values, values]).unique(return_inverse=True)
        counts = torch.cat([self.counts, counts])
        self.counts = torch.zeros(len(values), dtype=torch.int64).index_add_(0, where, counts)
        self.values = values if len(values) <= MOST_LEVELS else None

    @property
    def is_whole(self) -> bool:
        return self.values is not None and bool((self.values == self.values.round()).all())

    @property
    def is_zero(self) -> bool:
        return self.values is not None and not self.values.any()

    def step(self, hints: tuple[float, ...] = ()) -> float | None:
        return common_step(self.values, hints, self.rounding)


def common_step(
    values: Tensor | None, hints: tuple[float, ...] = (), rounding: float = ROUNDING
) -> float | None:
    """The step that all `values` are multiples of: 1 of whole numbers, 1/n of averages of n spikes.

    None where there is none. `hints` are tried first, then the greatest common divisor. `rounding`
    is the values' error, as a share of the largest.
    """
    if values is None:
        return None
    sizes = values[values != 0].abs().unique()
    if len(sizes) == 0 or torch.equal(sizes, sizes.round()):
        return 1.0
    if not sizes.isfinite().all():
        return None
    for step in hints:
        if _are_multiples(sizes, step):
            return step
    largest = sizes[-1].item()
    step = sizes[0].item()
    for multiple in sizes[sizes > rounding * largest].tolist():
        size = multiple
        while size > rounding * largest:
            step, size = size, abs(step - round(step / size) * size)
        if step * MOST_COUNT < largest:
            return None
        step = multiple / round(multiple / step)  # known best by the largest
    step = largest / round(largest / step)
    return step if _are_multiples(sizes, step) else None


def _are_multiples(sizes: Tensor, step: float) -> bool:
    counts = sizes / step
    return bool(counts.min() > 0.5 and (counts - counts.round()).abs().max() < 0.05)


def code_bits(low: int, high: int) -> int:
    """Bits of a code in low..high, two's complement where there are negative ones; at least 1."""
    if low < 0:
        return max((-low - 1).bit_length(), high.bit_length()) + 1
    return max(1, high.bit_length())


def share_of_ones(levels: Levels, step: float, bits: int) -> float:
    """Share of ones among the bits that drive a crossbar's rows, of codes in two's complement."""
    codes = (levels.values / step).round().long()
    ones = sum((codes >> bit & 1) * levels.counts for bit in range(bits))
    return ones.sum().item() / (bits * levels.counts.sum().item())
