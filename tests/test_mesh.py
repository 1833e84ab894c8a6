"""Values that travel between tiles: every bit, tile after tile."""

from dataclasses import replace

import pytest
from hypothesis import given, settings

from runtime.errors import UserError
from spikesim_eval.chip import Chip
from spikesim_eval.estimate import estimate
from spikesim_eval.technology import DEFAULT
from test_chip import chips, fit
from test_spikesim import conv, net, networks

A_HOP = DEFAULT.energy["router"]


def coordinates(number: int, side: int) -> tuple[int, int]:
    """(row, column) of a tile, found by walking there."""
    row = column = 0
    step = 1
    for _ in range(number):
        if 0 <= column + step < side:
            column += step
        else:
            row, step = row + 1, -step
    return row, column


def walked(network, chip) -> float:
    """Bits times tiles, of PEs put down one by one."""
    priced = {row["name"]: row for row in estimate(network, replace(chip, noc="free")).layers}
    depth = {}
    while len(depth) < len(network.layers):
        for layer in network.layers:
            if layer.name not in depth and all(x in depth for x in layer.after):
                depth[layer.name] = 1 + max([depth[x] for x in layer.after], default=0)
    layers = sorted(network.layers, key=lambda layer: (depth[layer.name], layer.name))
    tiles, tile, room = {}, -1, 0
    for layer in layers:
        if chip.tiles == "own":
            room = 0
        tiles[layer.name] = []
        for _ in range(priced[layer.name]["pes"]):
            if room == 0:
                tile, room = tile + 1, chip.pe_per_tile
            room -= 1
            tiles[layer.name].append(tile)
        if chip.tiles == "own":
            tiles[layer.name] += [tile] * room
    side = 1
    while side * side < tile + 1:
        side += 1
    middle = {name: coordinates(x[len(x) // 2], side) for name, x in tiles.items()}
    place = [layer.name for layer in layers]

    def hops(a, b):
        return sum(abs(x - y) for x, y in zip(middle[a], middle[b], strict=True))

    bits, streams = 0, {}
    for layer in layers:
        before = sorted(layer.after, key=place.index)
        once = layer.linear or layer.static
        steps = 1 if once else network.time_steps
        plane = 1 if layer.linear else layer.in_size[0] * layer.in_size[1]
        values = layer.in_channels * plane * layer.runs * steps
        if before:
            width = priced[layer.name]["input_bits"]
            bits += values * width * hops(before[-1], layer.name)
        if len(before) > 1:
            last = network.layers[[x.name for x in network.layers].index(before[-1])]
            sums = last.out_channels * last.out_size[0] * last.out_size[1] * last.runs
            moved = 25 * sums * network.time_steps * hops(before[-2], before[-1])
            streams[before[-2], before[-1]] = moved
    return bits + sum(streams.values())


@settings(deadline=None, max_examples=80)
@given(networks(), chips())
def test_bits_take_a_router_for_every_tile_that_they_walk(network, chip):
    if not fit(network, chip) or chip.costs == "published":
        return
    found = estimate(network, replace(chip, noc="mesh"))
    assert found.energy_by_component["router"] == pytest.approx(A_HOP * walked(network, chip))
    routers = found.total["tiles"] * DEFAULT.area["router"]
    assert found.area_by_component["router"] == pytest.approx(routers)
    free = estimate(network, chip)
    assert "router" not in free.energy_by_component
    assert found.total["delay_ns"] == free.total["delay_ns"]


def test_a_chain_by_hand():
    # Layers of 18 PEs, a tile of 8: 54 PEs on 7 tiles, 3 x 3; middles at PEs 9, 27, 45 of tiles
    # 1, 3 and 5, which lie at (0, 1), (1, 2) and (1, 0): two tiles from each to the next.
    sizes = {"in_channels": 192, "out_channels": 192}
    layers = [conv("a", **sizes), conv("b", after=("a",), **sizes)]
    layers.append(conv("c", after=("b",), input_bits=4, **sizes))
    found = estimate(net(*layers, time_steps=3), Chip(noc="mesh"))
    assert (found.total["pes"], found.total["tiles"]) == (54, 7)
    router = [row["energy_by_component"]["router"] for row in found.layers]
    assert router == pytest.approx([0, *(3 * 192 * 16 * bits * 2 * A_HOP for bits in (1, 4))])


def test_published_costs_know_no_mesh():
    with pytest.raises(UserError, match="noc goes with counted costs"):
        Chip(costs="published", noc="mesh")
