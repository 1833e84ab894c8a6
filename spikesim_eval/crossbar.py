"""A layer computed by memristor crossbars that are not ideal (SpikeSim, arXiv 2210.12899, calls its
engine NICE).

Integer weights become columns of c-bit cells, inputs drive rows bit by bit, and every crossbar's
column is read by its own ADC:

    weight code -> conductances of cells (cells.py) -> wire resistance -> partial sum of at most
    `xbar_size` rows -> ADC -> shift-add over slices, input bits and crossbars -> digital correction

and the rest of the network, the LIF neurons' state included, is the digital one. How a layer lies
on the chip is what the estimate prices (`place_layer`), and `Counts` says what it did: as many
conversions and cycles as are priced. Where a PE has one set of ADCs (`adc_of` "pe"), the columns of
its crossbars are added before they are read. Conductances and partial sums are in units of one cell
step, the difference between neighbouring levels of a cell.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .cells import Cells
from .chip import Chip, place_layer
from .codes import count_silent
from .layer_list import Layer, LayerList
from .silence import pes_together

LARGEST_WORKSPACE = 2**19  # partial sums held at once: about what a core's cache holds


def ladder(conductance: Tensor, wire: float) -> Tensor:
    """What each row's voltage adds to each column's current, with resistive wires.

    `conductance` (..., rows, columns) of the cells; `wire` is the conductance of one wire segment,
    in the same unit. Rows are driven from the left, columns are sensed at the bottom by virtual
    grounds: one segment from driver to first cell, one between neighbours, one to the ground. The
    result, of the same shape, is linear in the voltages, so it takes the place of the conductances.

    Nodes of a row are eliminated first, which leaves a block-tridiagonal system over the column
    nodes; of its solution only the last block, at the sensing end, is needed. In float64.
    """
    g = conductance.double()
    rows, columns = g.shape[-2:]
    identity = torch.eye(columns, dtype=g.dtype, device=g.device)
    along_row = 2 * wire * identity
    along_row[-1, -1] = wire  # the last cell of a row has no neighbour to its right
    neighbours = torch.ones(columns - 1, dtype=g.dtype, device=g.device)
    along_row = along_row - wire * (neighbours.diag(1) + neighbours.diag(-1))
    drive = torch.zeros(columns, 1, dtype=g.dtype, device=g.device)
    drive[0] = wire

    blocks = right_sides = None
    for i in range(rows):
        cells = g[..., i, :]
        # row nodes = A⁻¹ (cells · column nodes + drive), put into the column nodes' equations
        a = along_row + torch.diag_embed(cells)
        through = cells[..., None] * torch.linalg.solve(
            a, torch.cat([torch.diag_embed(cells), drive.expand(*cells.shape, 1)], dim=-1)
        )
        segments = 1 if i == 0 else 2  # every column node has one below, all but the first above
        block = torch.diag_embed(cells) + segments * wire * identity - through[..., :-1]
        right = torch.zeros_like(g.mT)
        right[..., i] = through[..., -1]
        if i > 0:
            both = torch.cat([wire * identity.expand_as(blocks), right_sides], dim=-1)
            solved = wire * torch.linalg.solve(blocks, both)
            block = block - solved[..., :columns]
            right = right + solved[..., columns:]
        blocks, right_sides = block, right
    return wire * torch.linalg.solve(blocks, right_sides).mT


@dataclass
class Counts:
    """What a layer's crossbars have done so far."""

    images: int = 0
    cycles: int = 0  # input bits of output pixels
    silent: int = 0  # of them, in which nothing was converted
    conversions: int = 0
    driven_cells: int = 0  # with a weight in them, on rows that carried a one
    clipped: int = 0  # of the conversions


class CrossbarLayer:
    """One convolution or linear layer on crossbars; called with integer inputs, it returns what the
    digital side takes for the integer sums.

    Args:
        codes: integer weights (O, I, k, k).
        layer, network: what the layer list says of it. Inputs are fed bit by bit; those of the
            residual stream are in two's complement.
        chip: the options.
        stride, padding: of the convolution.
        generator: for the cells' variation, and then for the noise of reads.

    Raises UserError for a weight that does not fit into a crossbar row.
    """

    def __init__(
        self,
        codes: Tensor,
        layer: Layer,
        network: LayerList,
        chip: Chip,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        generator: torch.Generator | None = None,
    ):
        self.chip, self.stride, self.padding = chip.of_layer(layer.name), stride, padding
        self.input_bits, self.signed_input = network.input_bits(layer), network.reads_stream(layer)
        # Sums of whole numbers below 2^24 are exact in float32, which is faster.
        is_small = network.accumulator_bits(layer) <= 25  # with the sign
        self.codes = codes.float() if is_small else codes.double()
        _, self.in_channels, *self.kernel = codes.shape
        self.rows = min(chip.xbar_size, self.in_channels)
        self.groups = math.ceil(self.in_channels / self.rows)
        weight_bits = network.weight_bits_of(layer)
        self.how = Cells(weight_bits, chip, f"layer {layer.name}")
        self.levels, self.off_conductance = self.how.levels, self.how.off_conductance
        placement = place_layer(network, layer, chip)
        self.stack, self.slices = placement.stack, placement.slices
        self.together = pes_together(placement, chip)
        self.generator = generator
        self.cells = list(map(self._wired, self.how.conductances(codes, generator)))
        self.slice_weights = self.how.slice_weights

        self.counts = Counts()
        # How often each sum was read, in cell steps; kept where a tensor is put here.
        self.sums: Tensor | None = None
        self.largest_sum = 0.0
        self.squared_error = self.squared_output = 0.0

    def _wired(self, cells: Tensor) -> Tensor:
        """Conductances (k, k, I, O·slices) as (k²·groups, rows, O·slices), as the ADCs see them."""
        chip = self.chip
        cells = self._in_crossbars(cells.flatten(0, 1))
        if chip.wire_ohm:
            highest = (2**chip.cell_bits - 1) / chip.on_ohm  # of the cell's own levels
            cell_step = highest / (self.levels + self.off_conductance)
            wire = 1 / (chip.wire_ohm * cell_step)
            arrays = cells.split(chip.xbar_size // self.slices * self.slices, dim=-1)
            cells = torch.cat([ladder(array, wire) for array in arrays], dim=-1).float()
        return cells

    def _in_crossbars(self, x: Tensor) -> Tensor:
        """(k², I, columns) as (k²·groups, rows, columns): those of an input block in line, as they
        lie in PEs. Rows that no channel uses stay unselected."""
        x = F.pad(x, (0, 0, 0, self.groups * self.rows - self.in_channels))
        return x.unflatten(1, (self.groups, self.rows)).transpose(0, 1).flatten(0, 1)

    @property
    def adc_step(self) -> float:
        """What one code of the ADC stands for, in cell steps."""
        return self.adc_step_of(self.chip.adc_bits)

    def adc_step_of(self, bits: int) -> float:
        """The same of an ADC of so many bits."""
        chip = self.chip
        if chip.adc_range == "unit":
            return 1.0
        added = min(chip.crossbars_per_pe, self.stack) if chip.adc_of == "pe" else 1
        full = added * self.rows * (self.levels + self.off_conductance)
        return max(1.0, full / (2**bits - 1))

    def adc_error(self, bits: int) -> float:
        """What ADCs of so many bits would have made of the `sums` that were read: the mean square
        of what they add, relative to that of the sums."""
        sums, step = torch.arange(len(self.sums)).double(), self.adc_step_of(bits)
        read = (sums / step).round().clamp(max=2**bits - 1) * step
        squares = (self.sums * sums.square()).sum().item()
        return (self.sums * (read - sums).square()).sum().item() / squares if squares else 0.0

    def _skipped(self, active: Tensor, size: torch.Size) -> int:
        """Conversions of a column that are skipped (`Chip.skip`), of all crossbars or PEs in line
        and all columns of `active`, from planes of this size; silent ones would give 0."""
        chip, per_pe, skipped = self.chip, self.chip.crossbars_per_pe, [0]
        if not (chip.skips("patches") or chip.skips("tiles")):
            return 0
        one = torch.ones(1, 1, *size, device=active.device)
        inside = F.unfold(one, self.kernel, padding=self.padding, stride=self.stride)[0].bool()
        driven = active.any(dim=1).unflatten(1, (-1, inside.shape[1]))
        inside = inside.repeat(self.groups, 1)[:, None]
        if chip.skips("patches"):
            found = count_silent(driven, inside, self.stack, 1)
            self.counts.silent += found[0] // self.stack
            in_line = math.ceil(self.stack / per_pe)
            skipped.append(found[1] * (self.stack if chip.adc_of == "crossbar" else in_line))
        if chip.skips("tiles"):
            found = count_silent(driven, inside, per_pe, self.together)
            skipped.append(found[chip.adc_of == "pe"])
        return max(skipped)

    def _noisy(self, sums: Tensor, cells: Tensor, active: Tensor) -> Tensor:
        """Sums of columns with read noise: of each cell, conversion and plane of input bits drawn
        anew, and independent; a sum of normal numbers is one of their summed variance, and is drawn
        as one. No current flows backwards."""
        deviation = self.chip.read_noise * (cells.square().mT @ active).sqrt_()
        noise = torch.randn(sums.shape, generator=self.generator)
        return (sums + deviation * noise).clamp_min_(0)

    def _read(self, active: Tensor, size: torch.Size) -> Tensor:
        """(O, columns of active) of 0/1 row inputs `active` (k²·groups, rows, columns), which come
        from planes of this size."""
        result: Tensor | float = 0.0
        self.counts.cycles += active.shape[-1]
        skipped = self._skipped(active, size)
        ones = int(torch.count_nonzero(active))
        for cells, sign in zip(self.cells, (1, -1), strict=False):
            self.counts.driven_cells += ones * cells.shape[-1]
            sums = cells.mT @ active
            if self.chip.read_noise:
                sums = self._noisy(sums, cells, active)
            if self.chip.adc_of == "pe":
                in_pes = sums.split(self.chip.crossbars_per_pe)
                sums = torch.stack([of_pe.sum(dim=0) for of_pe in in_pes])
            largest = sums.max().item()
            self.largest_sum = max(self.largest_sum, largest)
            if self.sums is not None:
                found = torch.bincount(sums.round().long().clamp_min(0).flatten())
                more = F.pad(self.sums, (0, max(0, len(found) - len(self.sums))))
                more[: len(found)] += found
                self.sums = more
            self.counts.conversions += sums.numel() - skipped * cells.shape[-1]
            if self.chip.adc_bits is not None:
                step, largest_code = self.adc_step, 2**self.chip.adc_bits - 1
                sums = sums.div_(step).round_()
                if largest > step * largest_code:
                    self.counts.clipped += int(torch.count_nonzero(sums > largest_code))
                    sums = sums.clamp_(max=largest_code)
                sums = sums.mul_(step)
            # beyond 24 bits float32 would round what shift-add keeps
            by_slice = sums.sum(dim=0).double().unflatten(0, (-1, self.slices))
            result = result + sign * torch.einsum("osl,s->ol", by_slice, self.slice_weights)
        if self.chip.columns == "offset":
            # every stored weight is Q too large, and every active cell leaks its off-state
            leak = self.off_conductance * self.slice_weights.sum().item()
            result = result - (self.how.offset + leak) * active.sum(dim=(0, 1))
        return result

    def __call__(self, x: Tensor) -> Tensor:
        """Sums (N, O, H', W') of integer inputs x (N, I, H, W), in the dtype of x."""
        self.counts.images += len(x)
        inputs = x.to(self.codes.dtype)
        ideal = F.conv2d(inputs, self.codes, None, self.stride, self.padding).double()
        per_image = self.cells[0].numel() // self.rows * ideal[0, 0].numel()
        chunk = max(1, LARGEST_WORKSPACE // per_image)
        sums = torch.cat([self._sums(part, ideal.shape[2:]) for part in x.split(chunk)])
        self.squared_error += (sums - ideal).square().sum().item()
        self.squared_output += ideal.square().sum().item()
        return sums.to(x.dtype)

    def _sums(self, x: Tensor, size: torch.Size) -> Tensor:
        patches = F.unfold(x.float(), self.kernel, padding=self.padding, stride=self.stride)
        patches = patches.unflatten(1, (self.in_channels, -1)).permute(2, 1, 0, 3).flatten(2)
        patches = self._in_crossbars(patches)
        plane = x.shape[-2:]
        if self.input_bits == 1:
            sums = self._read(patches, plane)
        else:
            codes, sums = patches.long(), 0.0
            for bit in range(self.input_bits):
                is_sign = self.signed_input and bit == self.input_bits - 1
                value = -(2.0**bit) if is_sign else 2.0**bit
                sums = sums + value * self._read(((codes >> bit) & 1).float(), plane)
        return sums.unflatten(1, (len(x), -1)).permute(1, 0, 2).unflatten(2, size)

    @property
    def relative_error(self) -> float:
        """Root mean square of what the sums are off, relative to that of the sums."""
        return math.sqrt(self.squared_error / self.squared_output) if self.squared_output else 0.0

    @property
    def unclipped_adc_bits(self) -> int:
        """ADC bits that, a code being one cell step, would have clipped none of these sums."""
        return max(1, math.ceil(self.largest_sum)).bit_length()
