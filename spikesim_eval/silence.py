"""What a layer need not do where nothing fires (`Chip.skip`): how many of its patches are silent.

In a PE cycle a layer reads a patch: one bit of all its inputs at the k² positions of an output
pixel. A patch is silent where no bit of it inside of the plane is a one: its crossbars add up to
nothing, so there is nothing to convert. A tile holds PEs that read the same rows side by side, and
those of as many PEs in line as fit; it is silent in a cycle where none of its rows carries a one.
What lies outside of the plane is no silence of its own: a tile that reads nothing else is silent
where its patch is.

Silence is counted where spikes are recorded (trace.py, and crossbar.py while it computes). Where
only a rate r is known, each bit is taken for a one with probability r, independently of all others:
n bits are silent with (1 - r)ⁿ.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from .chip import Chip, Placement, Value, ceil_div, larger, smaller
from .layer_list import Layer


@dataclass(frozen=True)
class Silence:
    """What a layer skips in a PE cycle, on average."""

    patches: Value = 0  # share of the cycles in which it converts nothing
    crossbars: Value = 0  # of those that add into a column: their columns are not converted
    pes: Value = 0  # of those in line: their sums do not move


def silence_of(layer: Layer, placement: Placement, chip: Chip) -> Silence:
    """What a layer skips on this chip; nothing where the chip skips neither patches nor tiles."""
    patches = crossbars = pes = 0
    in_line = ceil_div(placement.stack, chip.crossbars_per_pe)
    if chip.skips("patches"):
        patches = silent_patches(layer)
        crossbars, pes = patches * placement.stack, patches * in_line
    if chip.skips("tiles"):
        # A silent patch is a patch of silent tiles, also where one is measured and one expected.
        of_tiles = silent_tiles(layer, chip, pes_together(placement, chip))
        crossbars, pes = larger(crossbars, of_tiles[0]), larger(pes, of_tiles[1])
    return Silence(patches, crossbars, pes)


def silent_patches(layer: Layer) -> float:
    """Share of a layer's cycles whose patch is silent: as measured, else as its rate says."""
    if layer.silent_patches is not None:
        return layer.silent_patches
    everywhere = np.full((1, layer.kernel, layer.kernel), layer.in_channels)
    return expected_silence(layer, everywhere).item()


def pes_together(placement: Placement, chip: Chip) -> Value:
    """PEs in line whose rows a tile reads: it holds all PEs that read the rows of one, and of as
    many more as fit."""
    in_line = ceil_div(placement.stack, chip.crossbars_per_pe)
    fitting = chip.pe_per_tile * in_line // placement.pes
    return larger(smaller(fitting, in_line), 1)


def tile_sizes(layer: Layer, chip: Chip) -> Iterator[tuple[int, int, int]]:
    """Every (xbar_size, crossbars_per_pe, PEs in line that a tile reads) that the chip, or a grid
    of chips, can have of a layer, whatever the widths of its weights."""
    axes = (chip.xbar_size, chip.crossbars_per_pe, chip.pe_per_tile)
    for side, per_pe, per_tile in np.unique(as_rows(axes), axis=0).tolist():
        in_line = ceil_div(stack_of(layer, side), per_pe)
        together = {min(max(1, per_tile // alike), in_line) for alike in range(1, per_tile + 1)}
        yield from ((side, per_pe, x) for x in sorted(together))


def stack_of(layer: Layer, xbar_size: int) -> int:
    """Crossbars in line, of all input channels; see `Placement`."""
    return layer.kernel**2 * ceil_div(layer.in_channels, xbar_size)


def silent_tiles(layer: Layer, chip: Chip, together: Value) -> tuple[Value, Value]:
    """(crossbars, PEs) of those in line whose tile is silent, of an average cycle; of numbers, or
    of a grid of chips. The blocks of a grouped layer are skipped together, as one patch."""
    if layer.groups > 1:
        patches, rows = silent_patches(layer), layer.in_channels // layer.groups
        stack = layer.kernel**2 * ceil_div(rows, chip.xbar_size)
        return patches * stack, patches * ceil_div(stack, chip.crossbars_per_pe)
    measured = {entry[:3]: entry[3:] for entry in layer.silent_tiles}
    axes = (chip.xbar_size, chip.crossbars_per_pe, together)
    sizes, which = np.unique(as_rows(axes), axis=0, return_inverse=True)
    found = [measured.get(x) or expected_tiles(layer, *x) for x in map(tuple, sizes.tolist())]
    shape = np.broadcast_shapes(*map(np.shape, axes))
    crossbars, pes = np.array(found)[which.ravel()].T.reshape(2, *shape)
    return crossbars[()], pes[()]


def as_rows(axes: Iterable[Value]) -> np.ndarray:
    """All combinations of whole numbers that a grid holds, (points, axes)."""
    return np.stack([x.ravel() for x in np.broadcast_arrays(*axes)], axis=1).astype(int)


def expected_tiles(
    layer: Layer, xbar_size: int, crossbars_per_pe: int, together: int
) -> tuple[float, float]:
    """(crossbars, PEs) in silent tiles of an average cycle, where only a rate is known."""
    places, stack = layer.kernel**2, stack_of(layer, xbar_size)
    rows = np.full(stack, xbar_size)
    rows[stack - places :] = layer.in_channels - xbar_size * (stack // places - 1)
    starts = np.arange(0, stack, crossbars_per_pe * together)
    of_tile = np.zeros((len(starts), places), dtype=int)
    every = np.arange(stack)
    np.add.at(of_tile, (every // (crossbars_per_pe * together), every % places), rows)
    silent = expected_silence(layer, of_tile.reshape(-1, layer.kernel, layer.kernel))
    crossbars = np.diff(starts, append=stack)
    return (silent @ crossbars).item(), (silent @ ceil_div(crossbars, crossbars_per_pe)).item()


def expected_silence(layer: Layer, rows: np.ndarray) -> np.ndarray:
    """Share of the output pixels at which all rows of a part of a patch are silent, if each carries
    a one with the layer's rate. `rows` (parts, k, k) at each position of the kernel; (parts,)."""
    rate = 1.0 if layer.spike_rate is None else layer.spike_rate
    (inside_y, many_y), (inside_x, many_x) = (positions_inside(layer, side) for side in (0, 1))
    bits = np.einsum("yi,pij,xj->pyx", inside_y, rows, inside_x)
    of_patch = layer.in_channels * np.outer(inside_y.sum(axis=1), inside_x.sum(axis=1))
    bits = np.where(bits > 0, bits, of_patch)
    silent = np.where(bits > 0, (1.0 - rate) ** bits, 0.0)
    # Numbers of outputs, not shares: a layer that is always silent is so for exactly 1.
    return np.einsum("pyx,y,x->p", silent, many_y, many_x) / (many_y.sum() * many_x.sum())


def positions_inside(layer: Layer, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Which positions of the kernel lie in the plane along a side, and for how many outputs:
    (ways, k) of 0 and 1, (ways,)."""
    if layer.linear:
        return np.ones((1, 1)), np.ones(1, dtype=int)
    stride, padding = layer.stride_and_padding(side)
    outputs = np.arange(layer.out_size[side]) * stride - padding
    at = outputs[:, None] + np.arange(layer.kernel)
    inside = (at >= 0) & (at < layer.in_size[side])
    ways, counts = np.unique(inside, axis=0, return_counts=True)
    return ways.astype(float), counts
