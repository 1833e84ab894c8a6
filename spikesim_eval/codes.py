"""What a layer reads, as the whole-number codes that a chip would feed it bit by bit."""

from collections.abc import Iterable
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MOST_LEVELS = 2**15  # different values; more of them are real numbers
MOST_COUNT = 10_000  # in units of a step that nobody has told
ROUNDING = 2.4e-7  # of float32 values: two units in the last place of the largest


class Levels:
    """The different values seen, and how often; `values` is None of real numbers.

    `rounding` is the error that they may have, as a share of the largest.
    """

    def __init__(self):
        self.values: Tensor | None = torch.zeros(0, dtype=torch.float64)
        self.rounding = ROUNDING
        self.counts = torch.zeros(0, dtype=torch.int64)

    def add(self, x: Tensor) -> None:
        if x.is_floating_point():
            self.rounding = max(self.rounding, torch.finfo(x.dtype).eps)
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
    least = rounding * largest  # error of a value; it grows with every division
    step, error = sizes[0].item(), least
    for multiple in sizes.tolist():
        size, of_size = multiple, least
        while size > of_size:
            times = round(step / size)
            step, error, size, of_size = (
                size,
                of_size,
                abs(step - times * size),
                error + times * of_size,
            )
        if step * MOST_COUNT < largest:
            return None
        count = round(multiple / step)
        if count:  # the step is known best by the largest of its multiples
            step, error = multiple / count, least / count
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


def count_silent(
    driven: Tensor, inside: Tensor, crossbars_per_pe: int, together: int
) -> tuple[int, int]:
    """(crossbars, PEs) in line whose tile is silent, summed over PE cycles; see silence.py.

    `driven` (crossbars in line, ...) says in which cycles a row carries a one, `inside`, of a shape
    that broadcasts to it, where a crossbar reads the plane; a tile has the rows of so many PEs.
    """
    crossbars = pes = 0
    size = crossbars_per_pe * together
    patch = inside.any(dim=0) & ~driven.any(dim=0)
    for rows, there in zip(driven.split(size), inside.split(size), strict=True):
        silent = int(torch.where(there.any(dim=0), ~rows.any(dim=0), patch).sum())
        crossbars += silent * len(rows)
        pes += silent * ceil(len(rows) / crossbars_per_pe)
    return crossbars, pes


def driven_rows(fed: Tensor, xbar_size: int, **how: Any) -> Tensor:
    """Whether a row carries a one, of each crossbar in line: (crossbars, N, outputs), of what rows
    are fed (N, channels, height, width); `how` is `unfold`'s."""
    blocks = ceil(fed.shape[1] / xbar_size)
    padded = F.pad(fed, (0, 0, 0, 0, 0, blocks * xbar_size - fed.shape[1]))
    any_one = padded.unflatten(1, (blocks, xbar_size)).amax(dim=2).float()
    return F.unfold(any_one, **how).bool().transpose(0, 1)


class Rows:
    """Counts what the rows of a layer's crossbars carry: ones, and silence (silence.py).

    Args:
        kernel: its sides, or side, of a convolution with this stride and padding.
        bits: of an input that are fed.
        sizes: (xbar_size, crossbars_per_pe, PEs in line that a tile reads) of the tiles to count.
    """

    def __init__(
        self,
        kernel: int | tuple[int, int],
        bits: int,
        stride: tuple[int, int],
        padding: tuple[int, int],
        sizes: Iterable[tuple[int, int, int]] = (),
    ):
        self.bits = bits
        self.how = {"kernel_size": kernel, "stride": stride, "padding": padding}
        self.ones = self.read = 0.0
        self.cycles = self.silent = 0
        self.tiles = dict.fromkeys(sizes, (0, 0))
        self._inside = torch.zeros(0)  # which positions of the kernel lie in the plane
        self._readers = torch.zeros(0)  # outputs that read a pixel

    def add(self, codes: Tensor) -> None:
        """Whole numbers (N, channels, height, width) that the layer reads."""
        plane = codes.shape[-2:]
        if self._readers.shape != plane or self._readers.device != codes.device:
            one = torch.ones(1, 1, *plane, dtype=torch.float64, device=codes.device)
            inside = F.unfold(one, **self.how)
            self._inside = inside[0].bool()
            self._readers = F.fold(inside, plane, **self.how)[0, 0]
        self.read += self._readers.sum().item() * self.bits * codes[:, :, 0, 0].numel()
        for bit in range(self.bits):
            fed = codes >> bit & 1
            self.ones += (fed.sum(dim=(0, 1)) * self._readers).sum().item()
            patches = driven_rows(fed, codes.shape[1], **self.how)
            silent, _ = self._silent(patches, len(patches), 1)
            self.cycles += patches[0].numel()
            self.silent += silent // len(patches)
            for side in {side for side, *_ in self.tiles}:
                driven = driven_rows(fed, side, **self.how)
                for size in self.tiles:
                    if size[0] == side:
                        found = zip(self.tiles[size], self._silent(driven, *size[1:]), strict=True)
                        self.tiles[size] = tuple(map(sum, found))

    def _silent(self, driven: Tensor, crossbars_per_pe: int, together: int) -> tuple[int, int]:
        inside = self._inside.repeat(len(driven) // len(self._inside), 1)[:, None]
        return count_silent(driven, inside, crossbars_per_pe, together)

    def found(self) -> dict[str, Any]:
        """What the layer list says of it."""
        return {
            "spike_rate": self.ones / self.read,
            "silent_patches": self.silent / self.cycles,
            "silent_tiles": tuple(
                (*size, *(x / self.cycles for x in found)) for size, found in self.tiles.items()
            ),
        }
