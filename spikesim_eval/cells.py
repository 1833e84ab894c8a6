"""What weights become in the cells of crossbars: integer codes in, conductances out.

    weight code -> differential or offset columns -> c-bit digits -> levels with an off-state
    -> Gaussian variation

How they then lie in crossbars, and what wires do to them, is `crossbar`'s. Conductances are in
units of one cell step, the difference between neighbouring levels of a cell.
"""

import torch
from torch import Tensor

from .chip import Chip


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

    def digits(self, codes: Tensor) -> list[Tensor]:
        """Levels of the cells, (k, k, I, O·slices), for weight codes (O, I, k, k): those of
        positive and of negative weights, or of weights with the offset."""
        codes = codes.long()
        if self.chip.columns == "differential":
            stored = [codes.clamp_min(0), (-codes).clamp_min(0)]
        else:
            stored = [codes + self.offset]
        digits = (slices_of(x, self.stored_bits, self.cell_bits) for x in stored)
        return [x.permute(2, 3, 1, 0, 4).flatten(3) for x in digits]

    def conductances(self, codes: Tensor, generator: torch.Generator | None = None) -> list[Tensor]:
        """The same cells' conductances, in cell steps, of a chip whose random draws are the
        generator's."""
        return [self.programmed(x, generator) for x in self.digits(codes)]

    def programmed(self, digits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """What cells of these levels, of any shape, conduct."""
        cells, sigma = digits.float() + self.off_conductance, self.chip.sigma
        if sigma:
            noise = torch.randn(cells.shape, generator=generator)
            cells = (cells * (1 + sigma * noise)).clamp_min(0)
        return cells
