"""Weights that do not fit on a chip: whose come from DRAM, and what it takes to load them.

Such layers run one after the other in the same PEs, as many as the largest of them takes, each for
all timesteps of an image. When one is done, the next one's crossbars are programmed, all at once
and row by row, or as fast as DRAM gives the bits. What they read waits in DRAM, of all timesteps,
and so does the residual stream that their sums are added to.
"""

from collections.abc import Collection, Mapping
from math import prod

import numpy as np

from runtime.errors import UserError

from .chip import Chip, Placement
from .constants import REFERENCE
from .layer_list import Layer, LayerList

MOST_PES = 10**7  # of a chip: `layers_to_load` holds numbers for each


def weight_bits(network: LayerList, layer: Layer) -> int:
    """Of all of a layer's weights."""
    return layer.weights * network.weight_bits_of(layer)


def branch(network: LayerList, layer: Layer) -> set[str]:
    """The layers between the residual stream and a layer that adds to it, with this one; none where
    it adds to none. While one of them waits for its weights the stream waits, too."""
    by_name = {x.name: x for x in network.layers}
    adding = {name for x in network.layers if len(x.after) > 1 for name in x.after}
    found, todo = set(), [layer.name] if layer.name in adding else []
    while todo:
        found.add(todo[-1])
        todo += [x for x in by_name[todo.pop()].after if x not in adding | found]
    return found


def stream_bits(network: LayerList, layer: Layer) -> int:
    """From and to DRAM in an inference of a stream that waits for this layer: written and read."""
    sums = layer.out_channels * prod(layer.out_size) * layer.runs * network.time_steps
    return 2 * sums * int(REFERENCE["stream_bits"])


def dram_bits(network: LayerList, layer: Layer, loaded: Collection[str]) -> int:
    """From and to DRAM in an inference on a chip that loads these layers, because of one: its
    weights, its inputs twice, and the stream that waits for it."""
    bits = 0
    if layer.name in loaded:
        bits += weight_bits(network, layer) + 2 * network.bits_written(layer)
    if loaded and not branch(network, layer).isdisjoint(loaded):
        bits += stream_bits(network, layer)
    return bits


def alone_bits(network: LayerList) -> dict[str, int]:
    """Of each layer all bits from and to DRAM if it were the only one that is loaded. The sum of
    some layers' counts a stream once for each of its branch, and nothing less than there is."""
    layers = network.layers
    return {x.name: sum(dram_bits(network, y, [x.name]) for y in layers) for x in layers}


def dram_energy(
    network: LayerList, layer: Layer, placement: Placement, chip: Chip, loaded: Collection[str]
) -> dict[str, float]:
    """Of an inference, by component, pJ. Every cell that holds part of a loaded weight is written,
    also with a zero."""
    e = chip.technology.energy
    cells = layer.in_channels // layer.groups * layer.kernel**2 * placement.columns
    return {
        "dram": dram_bits(network, layer, loaded) * e["dram"],
        "cell_write": (layer.name in loaded) * cells * e["cell_write"],
    }


def dram_clocks(bits: float, chip: Chip) -> float:
    """That DRAM takes for so many bits."""
    return bits / chip.technology["dram.bits_per_ns"] / chip.clock_ns


def load_clocks(network: LayerList, layer: Layer, chip: Chip) -> float:
    """Of loading a layer's weights once."""
    rows = min(layer.in_channels, chip.xbar_size)
    writing = rows * chip.technology["cell_write.row_ns"] / chip.clock_ns
    return max(dram_clocks(weight_bits(network, layer), chip), writing)


def waiting_clocks(network: LayerList, layer: Layer, chip: Chip, loaded: Collection[str]) -> float:
    """That DRAM takes for what waits there, of a layer in an inference."""
    bits = dram_bits(network, layer, loaded)
    return dram_clocks(bits - weight_bits(network, layer) * (layer.name in loaded), chip)


def layers_to_load(
    sizes: Mapping[str, int], bits: Mapping[str, int], pes: int
) -> tuple[str, ...] | None:
    """The layers of the fewest bits whose weights must come from DRAM if there are so many PEs.

    `sizes` are the PEs and `bits` what loading takes of each layer. The others keep theirs,
    beside PEs for the largest of these. For each size of the shared PEs, layers that are larger
    stay, and what else stays is a knapsack, solved exactly. None: not even the largest layer
    fits. Raises UserError beyond MOST_PES.
    """
    if sum(sizes.values()) <= pes:
        return ()
    if pes > MOST_PES:
        raise UserError(f"weights come from DRAM on chips of at most {MOST_PES} PEs, not {pes}")
    ways = []
    for shared in sorted(set(sizes.values())):
        staying = sum(size for size in sizes.values() if size > shared)
        room = pes - shared - staying
        if room >= 0:
            others = [name for name in sizes if sizes[name] <= shared]
            kept = most_kept([sizes[x] for x in others], [bits[x] for x in others], room)
            loaded = tuple(name for i, name in enumerate(others) if i not in kept)
            ways.append((sum(bits[name] for name in loaded), shared, loaded))
    return min(ways)[2] if ways else None


def most_kept(sizes: list[int], bits: list[int], room: int) -> set[int]:
    """Indices of what has the most bits and fits into the room."""
    best = np.zeros(room + 1, dtype=np.int64)  # bits, by room
    taken = np.zeros((len(sizes), room + 1), dtype=bool)
    for i, (size, value) in enumerate(zip(sizes, bits, strict=True)):
        if size <= room:
            with_it = best[: room + 1 - size] + value
            taken[i, size:] = with_it > best[size:]
            best[size:] = np.maximum(best[size:], with_it)
    kept = set()
    for i in reversed(range(len(sizes))):
        if taken[i, room]:
            kept.add(i)
            room -= sizes[i]
    return kept
