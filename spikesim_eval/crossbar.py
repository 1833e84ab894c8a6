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

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import as_rows

from .cells import Cells
from .chip import Chip, place_layer
from .codes import count_silent, driven_rows
from .layer_list import Layer, LayerList
from .silence import pes_together

LARGEST_WORKSPACE = 2**19  # partial sums held at once: about what a core's cache holds
# what a layer keeps of what it has computed, where asked
KEPT = ("errors", "largest", "sums", "clipped")


def ladder(conductance: Tensor, wire: float) -> Tensor:
    """What each row's voltage adds to each column's current, with resistive wires.

    `conductance` (..., rows, columns) of the cells; `wire` is the conductance of one wire segment,
    in the same unit. Rows are driven from the left, columns are sensed at the bottom by virtual
    grounds: one segment from driver to first cell, one between neighbours, one to the ground. The
    result, of the same shape, is linear in the voltages, so it takes the place of the conductances.

    Nodes of a row are eliminated first, which leaves a block-tridiagonal system over the column
    nodes; of its solution only the last block, at the sensing end, is needed. All matrices are
    symmetric and positive definite. In float64.
    """
    g = conductance.double()
    rows, columns = g.shape[-2:]
    along_row = torch.full((columns,), 2 * wire, dtype=g.dtype)
    along_row[-1] = wire  # the last cell of a row has no neighbour to its right
    neighbours = torch.full((columns - 1,), -wire, dtype=g.dtype)
    along_row = along_row.diag() + neighbours.diag(1) + neighbours.diag(-1)

    inverse = right_sides = None
    for i in range(rows):
        cells = g[..., i, :]
        # row nodes = A⁻¹ (cells · column nodes + drive), put into the column nodes' equations
        of_row = _inverse(along_row + torch.diag_embed(cells))
        segments = 1 if i == 0 else 2  # every column node has one below, all but the first above
        block = torch.diag_embed(cells + segments * wire)
        block = block - cells[..., None] * of_row * cells[..., None, :]
        right = wire * (cells * of_row[..., 0])[..., None]  # the driver is at the first node
        if i > 0:
            above = wire * inverse
            block = block - wire * above
            right = torch.cat([above @ right_sides, right], dim=-1)
        inverse, right_sides = _inverse(block), right
    return (wire * inverse @ right_sides).mT


def _inverse(x: Tensor) -> Tensor:
    return torch.cholesky_inverse(torch.linalg.cholesky(x))


_solved: OrderedDict[tuple, Tensor] = OrderedDict()
MOST_SOLVED = 2**28  # bytes of `_solved`


def solve_once(conductance: Tensor, wire: float) -> Tensor:
    """`ladder` in float32. What was solved last is kept: the same crossbars are placed again for
    every ADC that is tried, and for every draw of what else is random."""
    content = hashlib.sha256(conductance.contiguous().numpy()).digest()
    key = content, conductance.shape, conductance.dtype, wire
    found = _solved.pop(key, None)
    _solved[key] = found = ladder(conductance, wire).float() if found is None else found
    while len(_solved) > 1 and sum(x.nbytes for x in _solved.values()) > MOST_SOLVED:
        _solved.popitem(last=False)
    return found


def images_last(x: Tensor) -> Tensor:
    """(N, C, H, W) as (C, H, W, N) of which the last dimension lies together in memory: then what a
    position of the kernel reads are whole rows. Torch is fast at transposing matrices only."""
    rows = x.permute(0, 2, 3, 1).flatten(1).t().contiguous()
    return rows.view(*x.shape[2:], x.shape[1], len(x)).permute(2, 0, 1, 3)


def images_first(x: Tensor) -> Tensor:
    """(C, H, W, N) as (N, C, H, W), channels last in memory."""
    channels, *size, images = x.shape
    rows = x.permute(1, 2, 0, 3).flatten(0, 2).t().contiguous()
    return rows.view(images, *size, channels).permute(0, 3, 1, 2)


def convert(sums: Tensor, step: float, bits: int | None) -> Tensor:
    """What ADCs of so many bits, a code being `step`, make of the sums of columns; None: no ADC.

    `CrossbarLayer._convert` does the same in place, and no more of it than the sums call for.
    """
    if bits is None:
        return sums
    return (sums / step).round().clamp(max=2**bits - 1) * step


class Window(NamedTuple):
    """The outputs whose patch has a position of the kernel inside of the plane, and the inputs that
    they read there: slices along both sides."""

    outputs: tuple[slice, slice]
    inputs: tuple[slice, slice]


@cache
def window(
    position: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    plane: tuple[int, int],
    size: tuple[int, int],
) -> Window:
    """Of a position (y, x) of the kernel, from a plane to outputs of this size."""
    outputs, inputs = [], []
    for at, step, pad, read, written in zip(position, stride, padding, plane, size, strict=True):
        first = max(0, math.ceil((pad - at) / step))
        last = min(written - 1, (read - 1 + pad - at) // step)
        start = first * step + at - pad
        outputs.append(slice(first, max(first, last + 1)))
        inputs.append(slice(start, max(start, last * step + at - pad + 1), step))
    return Window(tuple(outputs), tuple(inputs))


class Images:
    """The images that a network computes right now, each known by what it is. Noise that is drawn
    by that depends neither on the rest of the batch nor on the order in which it is computed."""

    def __init__(self, network: nn.Module):
        self.digests: list[bytes] = []
        network.register_forward_pre_hook(self._look)

    def _look(self, network: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        whole = inputs[0].detach().contiguous().numpy()
        self.digests = [hashlib.blake2b(image, digest_size=16).digest() for image in whole]


class Readers(NamedTuple):
    """Columns that ADCs read of a crossbar, or of the crossbars in line in a PE together."""

    columns: Tensor | None  # their numbers; None: all
    crossbars: tuple[tuple[int, Tensor], ...]  # place in line, conductances (columns, rows)


class Clipped(NamedTuple):
    """Conversions that ADCs clipped, of columns that are read together."""

    columns: Tensor  # their numbers
    crossbars: tuple[int, ...]  # places in line of what they read
    outputs: tuple[slice, slice]  # along both sides of the plane
    size: tuple[int, ...]  # (columns, H', W', input bits · images), of `outputs` alone
    bits: np.ndarray  # one of each, packed: they wait for the backward pass

    @property
    def where(self) -> Tensor:
        bits = np.unpackbits(self.bits, count=math.prod(self.size))
        return torch.from_numpy(bits).view(self.size)


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

    The definition is `_read` over all columns: of every crossbar the columns' sums, converted,
    added up. Where cells are as meant, and whole numbers of cell steps, and ADCs have such steps
    too, nothing is off but sums that ADCs clip. Then the layer is the convolution, and of the
    crossbars' columns only those are computed that may be clipped, for what the clipping takes
    away.

    Args:
        codes: integer weights (O, I, k, k).
        layer, network: what the layer list says of it. Inputs are fed bit by bit; those of the
            residual stream are in two's complement.
        chip: the options.
        stride, padding: of the convolution.
        generator: for the cells' variation, and then for the noise of reads.
        images: that the network computes: the noise of reads is then drawn for each of them and
            timestep by itself. Without, for each row of the inputs of all calls.
        keep: which of KEPT to keep: "errors", how far the sums are off (`relative_error`);
            "largest", the largest sum of a column; "sums", how often each sum was read; "clipped",
            where ADCs clipped in the last call, for training.py.

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
        keep: Collection[str] = (),
        images: Images | None = None,
    ):
        self.chip, self.stride, self.padding = chip.of_layer(layer.name), stride, padding
        self.linear = layer.linear
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
        # (planes, k²·groups, rows, O·slices), as the ADCs see them
        self.cells = self._wired(torch.stack(self.how.conductances(codes, generator)))
        self.slice_weights = self.how.slice_weights

        self.images = images
        self.noise_seed = 0
        if chip.is_read_anew:
            self.noise_seed = torch.randint(2**62, (1,), generator=generator).item()
        self.reading: list[torch.Generator] = []  # of the noise in what is computed right now
        self.positions = network.time_steps * math.prod(layer.in_size)
        self.counts = Counts()
        self.sums = torch.zeros(1, dtype=torch.int64) if "sums" in keep else None
        self.largest_sum = 0.0 if "largest" in keep else None  # in cell steps
        self.squared_error = self.squared_output = 0.0 if "errors" in keep else None
        # of each chunk of images
        self.clipped: list[tuple[slice, list[Clipped]]] | None = [] if "clipped" in keep else None
        self.columns = len(self.cells) * self.cells.shape[-1]  # side by side
        # Where calibration has set them: the ADCs' step; scale and shift of a linear layer's sums.
        self.set_adc_step: float | None = None
        self.correction: tuple[Tensor, Tensor] | None = None
        # Called with the layer and what it reads, before it computes; see calibration.py.
        self.before: Callable[[CrossbarLayer, Tensor], None] | None = None
        meant = self.in_crossbars(torch.stack(self.how.targets(codes)))
        self.as_meant = torch.equal(self.cells, meant)
        self._plan()

    def _plan(self) -> None:
        """Which columns are read, together and one by one."""
        in_line = torch.cat(self.cells.unbind(), dim=-1).mT.contiguous().split(self.per_reading)
        largest = torch.stack([crossbars.sum(dim=(0, 2)) for crossbars in in_line])
        self.only_clips = (
            (self.sums is None and self.largest_sum is None)
            and self.adc_step == 1
            and not self.chip.is_read_anew
            and self.as_meant
            and all(torch.equal(x, x.round()) for x in in_line)
            and largest.max().item() < 2**24  # beyond, float32 rounds
        )
        # Codes that ADCs give are whole numbers too, but others.
        most = self.largest_code * math.ceil(self.stack / self.per_reading)
        most *= self.slice_weights.sum().item() * (2**self.input_bits - 1)
        self.adds_exactly = self.only_clips or (
            self.chip.columns == "differential" and most < 2**24
        )
        self.readers: list[Readers] = []
        for number, (crossbars, most) in enumerate(zip(in_line, largest, strict=True)):
            columns = None
            if self.only_clips:
                columns = (most > self.largest_code).nonzero()[:, 0]
                crossbars = crossbars[:, columns]
            if columns is None or len(columns):
                places = range(number * self.per_reading, self.stack)
                cells = zip(places, crossbars.unbind(), strict=False)
                self.readers.append(Readers(columns, tuple(cells)))

    def in_crossbars(self, cells: Tensor) -> Tensor:
        """(planes, k, k, I, O·slices) as (planes, k²·groups, rows, O·slices): those of an input
        block in line, as they lie in PEs. Rows that no channel uses stay unselected."""
        cells = F.pad(cells.flatten(1, 2), (0, 0, 0, self.groups * self.rows - self.in_channels))
        return cells.unflatten(2, (self.groups, self.rows)).transpose(1, 2).flatten(1, 2)

    def _wired(self, cells: Tensor) -> Tensor:
        """Cells in crossbars, and with wires what ADCs see of them."""
        chip, cells = self.chip, self.in_crossbars(cells)
        if chip.wire_ohm:
            highest = (2**chip.cell_bits - 1) / chip.on_ohm  # of the cell's own levels
            cell_step = highest / (self.levels + self.off_conductance)
            wire = 1 / (chip.wire_ohm * cell_step)
            arrays = cells.split(chip.xbar_size // self.slices * self.slices, dim=-1)
            cells = torch.cat([solve_once(array, wire) for array in arrays], dim=-1)
        return cells

    @property
    def per_reading(self) -> int:
        """Crossbars in line that an ADC reads together."""
        return min(self.chip.crossbars_per_pe, self.stack) if self.chip.adc_of == "pe" else 1

    @property
    def adc_step(self) -> float:
        """What one code of the ADC stands for, in cell steps."""
        if self.set_adc_step is not None:
            return self.set_adc_step
        return 1.0 if self.chip.adc_bits is None else self.adc_step_of(self.chip.adc_bits)

    @property
    def adc_reach(self) -> float | None:
        """The largest sum that the ADC does not clip, in cell steps; None of an ideal one."""
        bits = self.chip.adc_bits
        return None if bits is None else self.adc_step * (2**bits - 1)

    def adc_step_of(self, bits: int) -> float:
        """The same of an ADC of so many bits."""
        if self.chip.adc_range == "unit":
            return 1.0
        return max(1.0, self.full_range / (2**bits - 1))

    @property
    def full_range(self) -> float:
        """The largest sum of a column whose cells are as meant, in cell steps."""
        return self.per_reading * self.rows * (self.levels + self.off_conductance)

    @property
    def largest_code(self) -> float:
        return math.inf if self.chip.adc_bits is None else 2**self.chip.adc_bits - 1

    def adc_error(self, bits: int) -> float:
        """What ADCs of so many bits would have made of the `sums` that were read: the mean square
        of what they add, relative to that of the sums."""
        sums = torch.arange(len(self.sums)).double()
        read = convert(sums, self.adc_step_of(bits), bits)
        squares = (self.sums * sums.square()).sum().item()
        return (self.sums * (read - sums).square()).sum().item() / squares if squares else 0.0

    def set_step(self, step: float) -> None:
        """Give the ADCs another step than their chip's, in cell steps."""
        self.set_adc_step = step
        self._plan()

    def trial(self, x: Tensor, step: float) -> Tensor:
        """The sums of inputs x with ADCs of this step, which they keep; it counts nothing."""
        self.set_step(step)
        names = "counts", "before", "sums", "largest_sum", "squared_error", "squared_output"
        kept = {name: getattr(self, name) for name in names}
        vars(self).update(dict.fromkeys(names), counts=Counts())
        sums = self(x)
        vars(self).update(kept)
        return sums

    def ideal_sums(self, x: Tensor) -> Tensor:
        """Those of inputs x (N, I, H, W) that a perfect chip would give, (N, O, H', W')."""
        inputs = x.to(self.codes.dtype)
        return F.conv2d(inputs, self.codes, None, self.stride, self.padding)

    def __call__(self, x: Tensor) -> Tensor:
        """Sums (N, O, H', W') of integer inputs x (N, I, H, W), in the dtype of x."""
        if self.before is not None:
            self.before(self, x)
        self.counts.images += len(x)
        size = tuple(
            (side + 2 * pad - kernel) // step + 1
            for side, pad, kernel, step in zip(
                x.shape[2:], self.padding, self.kernel, self.stride, strict=True
            )
        )
        if self.clipped is not None:
            self.clipped.clear()
        ideal = result = None
        if self.only_clips or self.squared_error is not None:
            ideal = self.ideal_sums(x)
        if self.squared_error is not None:
            self.squared_output += ideal.double().square().sum().item()
        if self.only_clips:
            result = ideal.to(x.dtype)
        else:
            shape = len(x), len(self.codes), *size
            result = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
        chunk = max(1, LARGEST_WORKSPACE // (self.columns * self.input_bits * math.prod(size)))
        for start in range(0, len(x), chunk):
            here = slice(start, start + chunk)
            if self.clipped is not None:
                self.clipped.append((here, []))
            if self.chip.is_read_anew:
                self.reading = [self._noise_of(row, x) for row in range(len(x))[here]]
            sums = self._sums(x[here], size)
            if sums is None:
                continue
            if self.squared_error is not None:
                off = sums if self.only_clips else sums - ideal[here].permute(1, 2, 3, 0)
                self.squared_error += off.double().square().sum().item()
            sums = images_first(sums.to(x.dtype))
            if self.only_clips:
                result[here] += sums
            else:
                result[here] = sums
        return result

    def of_means(self, spikes: Tensor) -> Tensor:
        """The same of a linear layer that reads mean spikes (N, I) over all timesteps and
        positions, of which the crossbars are fed the numbers: mean sums (N, O)."""
        sums = self(self.numbers(spikes)).flatten(1)
        if self.correction is not None:
            scale, shift = self.correction
            sums = sums * scale + shift
        return sums / self.positions

    def numbers(self, spikes: Tensor) -> Tensor:
        return (spikes * self.positions).round()[..., None, None]

    def _sums(self, x: Tensor, size: tuple[int, int]) -> Tensor | None:
        """Sums (O, H', W', N), or, where ADCs only clip, how much less they are; None: nothing."""
        fed = x
        if self.input_bits > 1:
            codes = x.int()
            fed = torch.cat([codes >> bit & 1 for bit in range(self.input_bits)])
        fed = fed.float()
        self._count(fed, size)
        if not self.readers:
            return None
        fed = images_last(fed)
        return self._from_bits(self._from_slices(self._read(fed, size), fed))

    def _read(self, fed: Tensor, size: tuple[int, int]) -> Tensor:
        """The codes of ADCs of all columns together, or their sums without ADCs, or, where that is
        all that is off, how much less than the sums it is: (columns, H', W', images) of what rows
        are fed (I, H, W, images)."""
        images, plane = fed.shape[-1], fed.shape[1:3]
        read = torch.zeros(self.columns, *size, images)
        for reader in self.readers:
            sums, outputs = None, (slice(None), slice(None))
            for place, cells in reader.crossbars:
                group, at = self.window_of(place, plane, size)
                rows = fed[group * self.rows : (group + 1) * self.rows, *at.inputs]
                if not rows.numel():
                    continue
                found = self._currents(cells[:, : len(rows)], rows.flatten(1))
                found = found.unflatten(1, rows.shape[1:])
                if len(reader.crossbars) == 1:
                    sums, outputs = found, at.outputs
                else:
                    if sums is None:
                        sums = torch.zeros(len(cells), *size, images)
                    sums[:, *at.outputs] += found
            if sums is not None:
                self._convert(sums, reader, outputs, read)
        return read

    def window_of(
        self, place: int, plane: tuple[int, int], size: tuple[int, int]
    ) -> tuple[int, Window]:
        """What a crossbar in line reads and gives: its group of input channels, and where."""
        group, position = divmod(place, math.prod(self.kernel))
        there = divmod(position, self.kernel[1])
        return group, window(there, self.stride, self.padding, plane, size)

    def _currents(self, cells: Tensor, rows: Tensor) -> Tensor:
        """Sums of the columns of a crossbar (columns, reads), of cells (columns, rows) and what
        rows are fed (rows, reads), with read noise: of each cell, conversion and plane of input
        bits drawn anew, and independent; a sum of normal numbers is one of their summed variance,
        and is drawn as one. No current flows backwards."""
        sums = cells @ rows
        if self.chip.is_read_anew:
            floor = self.chip.read_floor * (self.levels + self.off_conductance)
            variance = (self.chip.read_noise * cells).square_().add_(floor**2) @ rows
            sums = sums.add_(variance.sqrt_().mul_(self._noise(*sums.shape))).clamp_min_(0)
        return sums

    def _noise_of(self, row: int, x: Tensor) -> torch.Generator:
        """Of the noise in what is read for this row of inputs x (T·images, ...)."""
        if self.images is None:
            what = b"%d" % (self.counts.images - len(x) + row)
        else:
            timestep, image = divmod(row, len(self.images.digests))
            what = b"%d of %s" % (timestep, self.images.digests[image])
        seed = hashlib.blake2b(b"%d %s" % (self.noise_seed, what), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(seed))

    def _noise(self, columns: int, reads: int) -> Tensor:
        """Standard normal numbers (columns, reads); rows of inputs come last in reads."""
        by_row = torch.empty(len(self.reading), columns * reads // len(self.reading))
        for numbers, generator in zip(by_row, self.reading, strict=True):
            numbers.normal_(generator=generator)
        return by_row.t().reshape(columns, reads)

    def _convert(
        self, sums: Tensor, reader: Readers, outputs: tuple[slice, slice], read: Tensor
    ) -> None:
        """Add to these outputs of `read` (all columns, ...) the codes that ADCs make of the sums of
        a reader's columns, or, where they only clip, how much less it is. See `convert`; `sums` are
        overwritten."""
        step, largest_code = self.adc_step, self.largest_code
        read = read[:, *outputs]
        flat = sums.flatten(1)
        if self.largest_sum is not None:
            self.largest_sum = max(self.largest_sum, flat.max().item())
        if self.sums is not None:
            self._keep_sums(flat)
        if self.only_clips:
            clipped = (flat.amax(dim=1) > largest_code).nonzero()[:, 0]
            if len(clipped):
                over = sums.index_select(0, clipped).sub_(largest_code).clamp_min_(0)
                columns = reader.columns[clipped]
                self._keep_clipped(over, 0, columns, reader, outputs)
                read.index_add_(0, columns, over, alpha=-1)
            return
        if self.chip.adc_bits is not None:
            if step != 1:
                flat.div_(step)
            flat.round_()
            if self._keep_clipped(sums, largest_code, torch.arange(len(sums)), reader, outputs):
                flat.clamp_(max=largest_code)
        read += sums

    def _keep_clipped(
        self,
        sums: Tensor,
        largest: float,
        columns: Tensor,
        reader: Readers,
        outputs: tuple[slice, slice],
    ) -> int:
        """Count those of the sums of columns that are larger, and keep which, where asked; how many
        there are."""
        above = sums.detach().numpy() > largest  # NumPy compares and counts faster than torch
        number = int(np.count_nonzero(above))
        self.counts.clipped += number
        if self.clipped is not None and number:
            some = above.any(axis=(1, 2, 3))
            above, columns = above[some], columns[torch.from_numpy(some)]
            places = tuple(place for place, _ in reader.crossbars)
            clipped = Clipped(columns, places, outputs, above.shape, np.packbits(above))
            self.clipped[-1][1].append(clipped)
        return number

    def _keep_sums(self, sums: Tensor) -> None:
        self.sums[0] -= sums.numel()  # `_count` took them for zeros
        found = torch.bincount(sums.round().long().clamp_min(0).flatten())
        more = F.pad(self.sums, (0, max(0, len(found) - len(self.sums))))
        more[: len(found)] += found
        self.sums = more

    def _from_slices(self, read: Tensor, fed: Tensor) -> Tensor:
        """Sums (O, H', W', images) of what `_read` gives for what is fed."""
        # beyond 24 bits float32 would round what shift-add keeps
        dtype = self.codes.dtype if self.adds_exactly else torch.float64
        read = read.unflatten(0, (len(self.cells), -1, self.slices))
        result = torch.zeros(read.shape[1], *read.shape[3:], dtype=dtype)
        for plane, sign in zip(read, (1, -1), strict=False):
            for i, weight in enumerate(self.slice_weights.tolist()):
                result.add_(plane[:, i], alpha=sign * weight)
        if self.adc_step != 1 and self.chip.adc_bits is not None:
            result = result.double() * self.adc_step
        if self.chip.columns == "offset" and not self.only_clips:
            # every stored weight is Q too large, and every active cell leaks its off-state
            leak = self.off_conductance * self.slice_weights.sum().item()
            ones = self._ones(fed.sum(dim=0).permute(2, 0, 1)[:, None])
            result = result - (self.how.offset + leak) * ones[:, 0].permute(1, 2, 0)
        return result

    def _ones(self, by_pixel: Tensor) -> Tensor:
        """Ones of every patch, (images, 1, H', W'), of those of pixels (images, 1, H, W)."""
        kernel = torch.ones(1, 1, *self.kernel, dtype=by_pixel.dtype)
        return F.conv2d(by_pixel, kernel, None, self.stride, self.padding)

    def _from_bits(self, by_bit: Tensor) -> Tensor:
        """(..., input bits · images) as sums (..., images)."""
        first, *others = by_bit.unflatten(-1, (self.input_bits, -1)).unbind(dim=-2)
        for bit, more in enumerate(others, start=1):
            is_sign = self.signed_input and bit == self.input_bits - 1
            first = first.add(more, alpha=-(2**bit) if is_sign else 2**bit)
        return first

    def _count(self, fed: Tensor, size: tuple[int, int]) -> None:
        """Count what is done where rows are fed (images, I, H, W)."""
        cycles = len(fed) * math.prod(size)
        readings = math.ceil(self.stack / self.per_reading)
        # a product of matrices adds faster than a sum over dimensions
        by_channel = (torch.ones(1, len(fed)) @ as_rows(fed)).view(*fed.shape[2:], -1)
        ones = self._ones(by_channel.sum(dim=-1, dtype=torch.float64)[None, None])
        self.counts.cycles += cycles
        self.counts.driven_cells += int(ones.sum()) * self.columns
        self.counts.conversions += (readings * cycles - self._skipped(fed)) * self.columns
        if self.sums is not None:  # what is read of outside of the plane is 0
            self.sums[0] += readings * cycles * self.columns

    def _skipped(self, fed: Tensor) -> int:
        """Conversions of a column that are skipped (`Chip.skip`), of all crossbars or PEs in line;
        silent ones would give 0."""
        chip, per_pe, skipped = self.chip, self.chip.crossbars_per_pe, [0]
        if not (chip.skips("patches") or chip.skips("tiles")):
            return 0
        how = {"kernel_size": self.kernel, "stride": self.stride, "padding": self.padding}
        driven = driven_rows(fed, self.rows, **how)
        inside = F.unfold(torch.ones(1, 1, *fed.shape[2:]), **how)[0].bool()
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

    @property
    def relative_error(self) -> float:
        """Root mean square of what the sums are off, relative to that of the sums."""
        return math.sqrt(self.squared_error / self.squared_output) if self.squared_output else 0.0

    @property
    def unclipped_adc_bits(self) -> int:
        """ADC bits that, a code being one cell step, would have clipped none of these sums."""
        return max(1, math.ceil(self.largest_sum)).bit_length()
