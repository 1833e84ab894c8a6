"""What it takes to bring values from one layer's tiles to the next (`--noc mesh`).

Tiles lie on a square mesh in the order of the layers, by depth, along rows that run to and fro, so
that a layer's tiles are neighbours. A bit takes a router for every tile from the middle of one
layer's tiles to the middle of another's, along rows and columns; within a layer, H-trees carry it.

Two things travel. A layer's inputs come from where the layer lies that ends last of those it waits
for: there sums are added, membranes are kept and spikes are made. And the sums of the residual
stream come there from the last but one, in the stream's width, at every timestep. What comes from
outside of the chip is not charged, nor is the time: links are taken to be wide enough.
"""

from collections.abc import Iterator, Mapping

import numpy as np

from .chip import Chip, Value, ceil_div
from .constants import REFERENCE
from .layer_list import LayerList


def transfers(network: LayerList) -> Iterator[tuple[str, str, int]]:
    """(from, to, bits of an inference) of what travels between layers."""
    place = {layer.name: i for i, layer in enumerate(network.in_order())}
    by_name = {layer.name: layer for layer in network.layers}
    added: set[tuple[str, str]] = set()
    for layer in network.layers:
        before = sorted(layer.after, key=place.__getitem__)
        if before:
            yield before[-1], layer.name, network.bits_written(layer)
        if len(before) > 1:
            added.add((before[-2], before[-1]))
    for name, last in sorted(added):
        layer = by_name[last]
        sums = layer.out_channels * layer.out_size[0] * layer.out_size[1] * layer.runs
        yield name, last, sums * network.time_steps * int(REFERENCE["stream_bits"])


def mesh_energy(network: LayerList, pes: Mapping[str, Value], chip: Chip) -> dict[str, Value]:
    """Energy of an inference by the layer that values travel to, pJ; of numbers, or of a grid of
    chips. `pes` are all those of each layer."""
    middles: dict[str, Value] = {}
    before: Value = 0
    for layer in network.in_order():
        size = pes[layer.name]
        if chip.tiles == "own":
            size = ceil_div(size, chip.pe_per_tile) * chip.pe_per_tile
        middles[layer.name] = (before + size / 2) // chip.pe_per_tile
        before = before + size
    side = np.ceil(np.sqrt(ceil_div(before, chip.pe_per_tile)))
    places = {name: on_mesh(middle, side) for name, middle in middles.items()}
    energy: dict[str, Value] = {layer.name: 0.0 for layer in network.layers}
    for start, end, bits in transfers(network):
        (y, x), (to_y, to_x) = places[start], places[end]
        hops = abs(y - to_y) + abs(x - to_x)
        energy[end] = energy[end] + bits * hops * chip.technology.energy["router"]
    return energy


def on_mesh(tile: Value, side: Value) -> tuple[Value, Value]:
    """(row, column) of a tile by its number; every second row runs back."""
    row, column = tile // side, tile % side
    return row, np.where(row % 2, side - 1 - column, column)[()]
