"""What weights become in the cells of crossbars: integer codes in, conductances out.

    weight code -> differential or offset columns -> c-bit digits -> levels with an off-state
    -> written with an error -> drifted -> stuck

The order is the physical one, and aihwkit's (`BaseNoiseModel.apply_noise`): what is written is
off first, that ages, with an exponent of drift that belongs to the target, and 1/f noise has added
up by the time of reading. Writing does not reach a stuck cell, and it stays where it is, so stuck
cells come last. Read noise is new at every read, and belongs to sums (`CrossbarLayer`).
How cells lie in crossbars, and what wires do to them, is `crossbar`'s. Conductances are in units of
one cell step, the mean difference between neighbouring levels of a cell.

Laws, of g = target / highest conductance:

- `sigma`: G (1 + sigma n), n standard normal.
- `programming`: G + G_highest (c0 + c1 g + c2 g^2 + ...) n. PCM: Nandakumar et al. (ICECS 2019) and
  Joshi et al. (Nature Communications 2020), figures as aihwkit has them (inference/noise/pcm.py);
  RRAM: Wan et al. (Nature 2022), fitted by aihwkit (inference/noise/reram.py).
- `after` t: G ((t + t0) / t0)^-|nu|, nu normal with mean and deviation that each are
  a + b ln g, no less than c and no more than d (the same PCM).
- 1/f noise by then, where a technology has it: G (1 + q n sqrt(ln((t + t0 + t_r) / 2 t_r))),
  q = min(a g^b, c) of the written g (the same PCM); none in less time than a read takes.

What would be negative is 0.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .chip import Chip, seconds
from .technology_keys import numbers_of

SMALLEST = 1e-7  # of g, in its logarithm, as aihwkit has it, and where b below 0 is its power


def slices_of(codes: Tensor, bits: int, cell_bits: int) -> Tensor:
    """Base-2^c digits of non-negative integers: (..., slices), least significant first."""
    digits = [(codes >> shift) & (2**cell_bits - 1) for shift in range(0, bits, cell_bits)]
    return torch.stack(digits, dim=-1)


class Cells:
    """The cells that hold the weights of a layer, of `weight_bits` each.

    Attributes:
        offset: what is added to a weight before it is stored; 0 of differential columns.
        cell_bits: of a cell that are used; a weight of fewer bits than a cell has fewer levels.
        levels: the highest; the lowest is 0.
        off_conductance: of the lowest level.
        slice_weights: what a step of each of a weight's cells counts, least significant first.

    Raises UserError for a weight that does not fit into a crossbar row.
    """

    def __init__(self, weight_bits: int, chip: Chip, name: str = "weights"):
        chip.check_fits(name, weight_bits)
        self.chip = chip
        self.stored_bits = chip.stored_bits(weight_bits)
        self.offset = 0 if chip.columns == "differential" else 2 ** (weight_bits - 1) - 1
        self.cell_bits = min(chip.cell_bits, self.stored_bits)
        self.levels = 2**self.cell_bits - 1
        self.off_conductance = self.levels / (chip.on_off_ratio - 1)
        slices = torch.arange(chip.slices(weight_bits))
        self.slice_weights = 2.0 ** (self.cell_bits * slices).double()

    def stored(self, codes: Tensor) -> list[Tensor]:
        """What is written, (k, k, I, O), for weight codes (O, I, k, k): positive and negative
        weights, each with zeros in the other's places, or weights with the offset."""
        codes = codes.long().permute(2, 3, 1, 0)
        if self.chip.columns == "differential":
            return [codes.clamp_min(0), (-codes).clamp_min(0)]
        return [codes + self.offset]

    def digits(self, codes: Tensor) -> list[Tensor]:
        """The same as levels of cells, (k, k, I, O·slices)."""
        return [
            slices_of(x, self.stored_bits, self.cell_bits).flatten(3) for x in self.stored(codes)
        ]

    def targets(self, codes: Tensor) -> list[Tensor]:
        """What the same cells are meant to conduct: levels one cell step apart, in cell steps."""
        return [x.float() + self.off_conductance for x in self.digits(codes)]

    def conductances(self, codes: Tensor, generator: torch.Generator | None = None) -> list[Tensor]:
        """The same cells' conductances, in cell steps, of a chip whose random draws are the
        generator's."""
        return [self.programmed(x, generator) for x in self.digits(codes)]

    def programmed(self, digits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """What cells conduct that were written to these levels, of any shape, and have aged."""
        chip = self.chip
        cells = target = self._targets(digits)
        if chip.sigma:
            noise = torch.randn(cells.shape, generator=generator)
            cells = (cells * (1 + chip.sigma * noise)).clamp_min(0)
        if chip.programming:
            law, share = numbers_of(chip.programming), target / self.highest
            deviation = self.highest * sum(c * share**power for power, c in enumerate(law))
            noise = torch.randn(cells.shape, generator=generator)
            cells = (cells + deviation * noise).clamp_min(0)
        if chip.after:
            cells = self._aged(cells, target, generator)
        if chip.stuck_on or chip.stuck_off:
            drawn = torch.rand(cells.shape, generator=generator)
            cells = torch.where(drawn < chip.stuck_on, self.highest, cells)
            off = (drawn >= chip.stuck_on) & (drawn < chip.stuck_on + chip.stuck_off)
            cells = torch.where(off, self.off_conductance, cells)
        return cells

    @property
    def highest(self) -> float:
        """Conductance of the highest level."""
        return self.levels + self.off_conductance

    def _targets(self, digits: Tensor) -> Tensor:
        if not self.chip.level_conductances:
            return digits.float() + self.off_conductance
        table = torch.tensor(numbers_of(self.chip.level_conductances), dtype=torch.float64)
        place = digits.double() * (len(table) - 1) / self.levels
        low = place.floor().long().clamp_max(len(table) - 2)
        share = table[low] + (table[low + 1] - table[low]) * (place - low)
        return (self.levels * share + self.off_conductance).float()

    def _aged(self, cells: Tensor, target: Tensor, generator: torch.Generator | None) -> Tensor:
        """Cells as they are `after` they were written."""
        technology = self.chip.technology
        start = technology["device.drift_start_s"]
        time = seconds(self.chip.after) + start
        mean, deviation = (
            logarithmic(technology.numbers(key), target / self.highest)
            for key in ("device.drift", "device.drift_deviation")
        )
        noise = torch.randn(cells.shape, generator=generator)
        aged = cells * (time / start) ** -(mean + deviation * noise).abs()
        if technology.has("flicker"):
            a, b, most = technology.numbers("device.flicker")
            reading = technology["device.flicker_read_s"]
            written = (cells / self.highest).clamp_min(SMALLEST)
            share = (a * written**b).clamp_max(most)
            share = share * math.sqrt(math.log(max(1.0, (time + reading) / (2 * reading))))
            noise = torch.randn(cells.shape, generator=generator)
            aged = aged * (1 + share * noise)
        return aged.clamp_min(0)


def logarithmic(law: Sequence[float], share: Tensor) -> Tensor:
    """a + b ln(share), no less than c and no more than d; or one number."""
    if len(law) == 1:
        return torch.full_like(share, law[0])
    a, b, low, high = law
    return (a + b * share.clamp_min(SMALLEST).log()).clamp(low, high)
