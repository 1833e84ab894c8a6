"""Energy, area and delay of any graph of layers on a chip of crossbars.

What happens is counted: cells whose rows are driven, conversions, sums that move, bits that are
read and written, additions, products, LIF updates; and each costs what the chip's technology says,
by default after SpikeSim (arXiv 2210.12899). Layers are pipelined (schedule.py). With `costs`
"published" a PE cycle is charged as a whole instead, as the published tool does (published.py).
Energy is in pJ, area in um^2, delay in ns, power in mW.
"""

from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from math import frexp, fsum, isqrt, prod
from typing import Any

import numpy as np

from runtime.errors import UserError

from . import published
from .chip import Chip, Placement, Value, bits_by_layer, ceil_div, larger, place_layer
from .constants import REFERENCE
from .dram import (
    alone_bits,
    dram_bits,
    dram_clocks,
    dram_energy,
    layers_to_load,
    load_clocks,
    waiting_clocks,
)
from .layer_list import Layer, LayerList, show
from .mesh import mesh_energy
from .schedule import Times, check_rows, critical_path, rows_of, schedule
from .silence import Silence, silence_of


@dataclass(frozen=True)
class LayerCost:
    placement: Placement  # of one copy of the weights
    copies: int
    cycles: Value  # of a PE, in one inference
    energy: dict[str, Value]  # pJ by component
    times: Times  # clocks
    silence: Silence
    loaded: bool = False  # whether its weights come from DRAM, for each image anew


@dataclass(frozen=True)
class Estimate:
    """The result. `total`, the figures by component and each of `layers` are rows of the report."""

    network: LayerList
    chip: Chip
    total: dict[str, int | float]
    energy_by_component: dict[str, float]
    area_by_component: dict[str, float]
    layers: tuple[dict[str, Any], ...]
    critical_path: tuple[str, ...]  # names, first to last


def add(values: Iterable[Value]) -> Value:
    """The sum; of plain numbers the exact one, which does not depend on their order."""
    values = list(values)
    return sum(values) if any(isinstance(x, np.ndarray) for x in values) else fsum(values)


def cycle_energy(
    network: LayerList, layer: Layer, placement: Placement, chip: Chip, silence: Silence
) -> dict[str, Value]:
    """Energy of one PE cycle of a layer by component, pJ: one input bit of one output pixel.

    Every input channel's bit is read at each of the k² positions; a silent one drives no row, and
    neither does what lies outside of the plane. What `silence` says is not converted or moved.
    """
    e = chip.technology.energy
    inputs = layer.in_channels // layer.groups * layer.kernel**2
    rate = 1.0 if layer.spike_rate is None else layer.spike_rate
    inside = network.positions(layer) / (layer.kernel**2 * network.outputs(layer))
    in_line = ceil_div(placement.stack, chip.crossbars_per_pe)
    moving = in_line - silence.pes
    conversions, accumulator = converted(placement, chip, silence), network.accumulator_bits(layer)
    read = 1.0 - inside * (1.0 - rate) if chip.skips("rows") else 1.0
    return {
        "crossbar": inputs * inside * rate * placement.columns * e["cell"]
        + inputs * layer.groups * inside * rate * placement.driven * e["driver"],
        "adc": conversions * e["adc"] * chip.adc_scale("energy"),
        "mux": conversions * e["mux"],
        "temp_buffer": conversions * e["temp_buffer"],
        "shift_add": conversions * accumulator * e["add_bit"],
        "htree": moving * chip.planes * layer.out_channels * e["htree"],
        "fetch": placement.groups * (moving / in_line) * e["fetch"],
        "tile_buffer": inputs * layer.groups * read * e["tile_read"],
    }


def converted(placement: Placement, chip: Chip, silence: Silence) -> Value:
    """Conversions in an average PE cycle."""
    silent = silence.crossbars if chip.adc_of == "crossbar" else silence.pes
    return placement.conversions - silent * placement.columns


def state_energy(network: LayerList, layer: Layer, chip: Chip) -> dict[str, float]:
    """Energy beside the PE cycles, of one inference, by component, pJ: a layer's inputs are written
    once, its sums normalized, and membranes read, updated and written at every timestep."""
    e = chip.technology.energy
    accumulator, updates = network.accumulator_bits(layer), network.updates(layer)
    sums = layer.out_channels * network.outputs(layer)
    bn = 0.0
    if layer.bn_bits is not None:
        product = accumulator + layer.bn_bits
        bn = accumulator * layer.bn_bits * e["multiply_bit"] + product * e["add_bit"]
    kept = kept_bits(network, layer)
    # The published LIF update is taken to reset to 0 and to leak by a shift.
    lif = e["neuron"]
    if network.reset == "soft":
        lif += REFERENCE["stream_bits"] * e["add_bit"]
    if network.leak > 0 and frexp(network.leak)[0] != 0.5:
        lif += network.membrane_bits**2 * e["multiply_bit"]
    return {
        "input_buffer": network.bits_written(layer) * e["write"],
        "batch_norm": sums * bn,
        "kept_sums": kept * (e["write"] + network.time_steps * e["read"]),
        "neuron": updates * lif,
        "membrane": updates * kept_state(network) * (e["read"] + e["write"]),
    }


def kept_state(network: LayerList) -> int:
    """Bits of a membrane that wait for the next timestep: without a leak nothing does."""
    return network.membrane_bits if network.leak > 0 else 0


def kept_bits(network: LayerList, layer: Layer) -> int:
    """The normalized sums that a static layer hands on at every timestep."""
    if not layer.static or network.time_steps == 1:
        return 0
    return layer.out_channels * prod(layer.out_size) * layer.runs * REFERENCE["stream_bits"]


def as_charged(network: LayerList, chip: Chip) -> LayerList:
    """What the published tool knows of a network: a stem runs at every timestep, also where the
    image stays the same, and a residual stream takes no memory."""
    if chip.costs == "published":
        return replace(network.always_running(), streams=())
    return network


def layer_costs(
    network: LayerList,
    chip: Chip,
    copies: Mapping[str, int] | None = None,
    loaded: Collection[str] = (),
) -> dict[str, LayerCost]:
    """What each layer takes, and when; of numbers, or of a whole grid of chips. Copies of a layer's
    weights, 1 where `copies` does not name it, compute pixels of a row side by side. The weights of
    the layers `loaded` come from DRAM."""
    copies = {layer.name: 1 for layer in network.layers} | (copies or {})
    places = {layer.name: place_layer(network, layer, chip) for layer in network.layers}
    cycles = {x.name: network.outputs(x) * network.input_bits(x) for x in network.layers}
    if chip.costs == "published":
        energies = published.energies(network, places, cycles, chip)
        times = published.times(network, cycles)
        return {
            x: LayerCost(places[x], 1, cycles[x], energies[x], times[x], Silence()) for x in places
        }
    check_rows(network)
    silence = {layer.name: silence_of(layer, places[layer.name], chip) for layer in network.layers}
    row_clocks, energies = {}, {}
    for layer in network.layers:
        name, placement, own = layer.name, places[layer.name], chip.of_layer(layer.name)
        per_cycle = cycle_energy(network, layer, placement, own, silence[name])
        energies[name] = {component: cycles[name] * pj for component, pj in per_cycle.items()}
        energies[name] |= state_energy(network, layer, chip)
        in_turn = ceil_div(layer.out_size[1], copies[name])
        row_clocks[name] = in_turn * pixel_clocks(network, layer, placement, own, silence[name])
    if chip.noc == "mesh":
        pes = {name: places[name].pes * copies[name] for name in places}
        for name, moved in mesh_energy(network, pes, chip).items():
            energies[name]["router"] = moved
    loads = {}
    for layer in network.layers if loaded else ():
        name, rows = layer.name, network.time_steps_of(layer) * rows_of(layer)
        energies[name] |= dram_energy(network, layer, places[name], chip, loaded)
        waiting = waiting_clocks(network, layer, chip, loaded) / rows
        row_clocks[name] = max(row_clocks[name], waiting)
        if name in loaded:
            loads[name] = load_clocks(network, layer, chip)
    times = schedule(network, row_clocks, loads)
    return {
        x: LayerCost(places[x], copies[x], cycles[x], energies[x], times[x], silence[x], x in loads)
        for x in places
    }


def pixel_clocks(
    network: LayerList, layer: Layer, placement: Placement, chip: Chip, silence: Silence
) -> Value:
    """Of all input bits of one output pixel. An ADC reads its columns one after the other, behind a
    clock in which the currents settle. Of a silent patch that is skipped there is that clock alone;
    a pixel takes the average."""
    clocks = 1 + (1 - silence.patches) * placement.turns * chip.adc_clocks
    return network.input_bits(layer) * clocks


def copies_within(network: LayerList, chip: Chip, area_um2: float) -> dict[str, int]:
    """How many copies of each layer's weights make the pipeline fastest on a chip of at most this
    area; of several ways the one of the fewest copies.

    The pipeline gives an image as often as its busiest layer can. So for each time that a layer's
    rows can take, from the shortest on, all layers get as few copies as keep to it.
    """
    places = {layer.name: place_layer(network, layer, chip) for layer in network.layers}
    busy = {}  # of one copy, with a pixel of a row after the other
    for layer in network.layers:
        placement = places[layer.name]
        silence = silence_of(layer, placement, chip)
        clocks = pixel_clocks(network, layer, placement, chip.of_layer(layer.name), silence)
        busy[layer.name] = network.time_steps_of(layer) * rows_of(layer) * clocks
    widths = {layer.name: layer.out_size[1] for layer in network.layers}

    def copies(interval: float) -> dict[str, int]:
        fitting = {x: max(1, int(interval / busy[x] * (1 + 1e-12))) for x in places}
        return {x: ceil_div(width, min(fitting[x], width)) for x, width in widths.items()}

    def area(of: Mapping[str, int]) -> float:
        pes = {name: places[name].pes * of[name] for name in places}
        return fsum(chip_area(network, pes, chip).values())

    def is_possible(interval: float) -> bool:
        return interval >= max(busy.values()) * (1 - 1e-12) and area(copies(interval)) <= area_um2

    intervals = sorted({busy[x] * n for x, width in widths.items() for n in in_turns(width)})
    return copies(intervals[bisect_left(intervals, True, key=is_possible)])


def in_turns(width: int) -> set[int]:
    """How many pixels of a row a copy may have to compute one after the other: ⌈width / copies⌉."""
    root = isqrt(width) + 1
    return {*range(1, root + 1), *(ceil_div(width, copies) for copies in range(1, root + 1))}


def loaded_within(network: LayerList, chip: Chip, area_um2: float) -> tuple[str, ...]:
    """The layers whose weights come from DRAM on a chip of at most this area; none where it holds
    every weight once. Those that take the fewest bits from and to DRAM, where each takes what it
    took alone (`alone_bits`); so they take at most as many times the fewest as a branch of the
    residual stream has layers.

    Raises UserError where the largest layer needs more area, for the published costs, which know
    neither of copies nor of DRAM, and for a mesh, on which PEs that layers share have no place.
    """
    if chip.costs == "published":
        raise UserError("area_mm2 fills a chip whose costs are counted, not published ones")
    places = {layer.name: place_layer(network, layer, chip) for layer in network.layers}
    once = dict.fromkeys(places, 1)

    def area(loaded: Collection[str]) -> float:
        pes = pes_on_chip(places, once, loaded, chip)
        return fsum(chip_area(network, pes, chip).values())

    alone = area(())
    if alone <= area_um2:
        return ()
    small = f"area_mm2 {area_um2 / 1e6:g} is less than the"
    if chip.noc == "mesh":
        raise UserError(
            f"{small} {alone / 1e6:.4g} mm² of a chip that holds every weight once, and layers "
            "whose weights come from DRAM have no place of their own on a mesh: --noc free"
        )
    whole = chip.pe_per_tile if chip.tiles == "own" else 1
    sizes = {name: ceil_div(place.pes, whole) * whole for name, place in places.items()}
    bits = alone_bits(network)
    least = ceil_div(max(sizes.values()), chip.pe_per_tile)
    tiles = chip.tiles_of(place.pes for place in places.values())
    smallest = alone
    while tiles > least:
        tiles -= 1
        loaded = layers_to_load(sizes, bits, tiles * chip.pe_per_tile)
        smallest = area(loaded)
        if smallest <= area_um2:
            return loaded
    raise UserError(
        f"{small} {smallest / 1e6:.4g} mm² of a chip that holds its largest layer alone and gets "
        "the others' weights from DRAM"
    )


def pes_on_chip(
    places: Mapping[str, Placement],
    copies: Mapping[str, int],
    loaded: Collection[str],
    chip: Chip,
) -> dict[str, Value]:
    """PEs by layer. Those that the loaded layers share stand at the one of the largest ADCs."""
    pes = {name: place.pes * copies[name] for name, place in places.items()}
    if loaded:
        at = max(sorted(loaded), key=lambda name: chip.of_layer(name).adc_bits)
        pes |= dict.fromkeys(loaded, 0) | {at: max(places[name].pes for name in loaded)}
    return pes


def area_of(pes: Value, chip: Chip) -> dict[str, Value]:
    """Area of so many PEs with their share of the tiles by component, um^2.

    H-tree and subtractors grow with the PEs that they serve; a tile's buffers do not.
    """
    a, tiles = chip.technology.area, pes / chip.pe_per_tile
    counted = chip.costs == "counted"
    served = pes if counted else tiles * REFERENCE["reference_pes"]
    adcs = pes * chip.adcs_of_pe
    cells = chip.crossbars_per_pe * a["cell"] * chip.xbar_size**2
    return {
        "crossbar": pes * (cells + chip.crossbars_per_pe * a["driver"] * chip.xbar_size),
        "adc": adcs * a["adc"] * chip.adc_scale("area"),
        "mux": adcs * a["mux"],
        "shift_add": adcs * (a["shift_add"] * counted),
        "subtractor": served * (chip.adcs * a["subtractor"]),
        "htree": served * a["htree"],
        **{name: tiles * a[name] for name in ("temp_buffer", "tile_buffer")},
        **({"router": tiles * a["router"]} if chip.noc == "mesh" else {}),
    }


def memory_area(network: LayerList, layer: Layer, chip: Chip) -> dict[str, float]:
    """Area of a layer's input buffer and of the sums that it keeps, um^2. These are there twice: a
    static layer begins with the next image while this one's are still read."""
    bits = network.bits_stored(layer)
    if chip.costs == "published":
        bits = layer.in_channels * prod(layer.in_size) * network.input_bits(layer)
    kept = 2 * kept_bits(network, layer)
    a = chip.technology.area["memory_bit"]
    return {"input_buffer": bits * a, "kept_sums": kept * a}


def chip_area(network: LayerList, pes: Mapping[str, Value], chip: Chip) -> dict[str, Value]:
    """Area by component, um^2, of a chip with so many PEs of each layer: tiles, input buffers of
    all layers, membrane memory of all LIFs."""
    membrane_bits = sum(prod(shape) for shape in network.lif) * kept_state(network)
    memories = [memory_area(network, layer, chip) for layer in network.layers]
    a = chip.technology.area["memory_bit"]
    of_tiles = area_of(chip.tiles_of(pes.values()) * chip.pe_per_tile, chip)
    for name in bits_by_layer(chip.layer_adc_bits):  # of the rest, idle PEs too, it is the chip's
        if name in pes:
            own, others = (area_of(pes[name], x)["adc"] for x in (chip.of_layer(name), chip))
            of_tiles["adc"] = of_tiles["adc"] + own - others
    return of_tiles | {
        **{name: fsum(memory[name] for memory in memories) for name in memories[0]},
        "membrane": membrane_bits * a,
        "stream": stream_bits(network) * a,
    }


def stream_bits(network: LayerList) -> int:
    """Memory of the residual stream, which waits for what the blocks add to it."""
    return sum(prod(shape) for shape in network.streams) * REFERENCE["stream_bits"]


def stream_energy(network: LayerList, chip: Chip) -> float:
    """Of writing and reading the residual stream at every timestep, pJ."""
    e = chip.technology.energy
    return stream_bits(network) * network.time_steps * (e["read"] + e["write"])


def leakage(area: Mapping[str, Value], chip: Chip) -> Value:
    """Power of a chip that does nothing, mW: of all its transistors, so not of the H-tree's wires,
    and of its cells. None is published."""
    if chip.costs == "published":
        return 0.0
    a, side = chip.technology.area, chip.xbar_size
    crossbars = area["crossbar"] / (a["cell"] * side**2 + a["driver"] * side)
    elsewhere = add(x for name, x in area.items() if name not in ("crossbar", "htree"))
    transistors = elsewhere + crossbars * side * a["driver"]
    cells = crossbars * side**2 * chip.cell_leakage_mw
    return transistors * chip.leakage_mw_per_um2 + cells


def totals(
    network: LayerList, chip: Chip, costs: dict[str, LayerCost]
) -> tuple[dict[str, Value], dict[str, Value]]:
    """(the figures of the whole chip, its area by component)

    The delay is that of one image alone, leakage included; frames a second and power are those of
    a chip that is given image after image, as soon as its busiest layer is free.
    """
    loaded = tuple(name for name, cost in costs.items() if cost.loaded)
    places = {name: cost.placement for name, cost in costs.items()}
    copies = {name: cost.copies for name, cost in costs.items()}
    of_layers = pes_on_chip(places, copies, loaded, chip)
    pes, tiles = sum(of_layers.values()), chip.tiles_of(of_layers.values())
    area_by_component = chip_area(network, of_layers, chip)
    area_um2 = add(area_by_component.values())
    delay = interval = 0.0
    for cost in costs.values():
        delay = larger(delay, cost.times.finish)
        interval = larger(interval, cost.times.busy)
    moved = sum(dram_bits(network, layer, loaded) for layer in network.layers)
    if loaded:
        interval = max(interval, dram_clocks(moved, chip))
    delay_ns, interval_ns = delay * chip.clock_ns, interval * chip.clock_ns
    leakage_mw = leakage(area_by_component, chip)
    dynamic_pj = add(
        [
            *(value for cost in costs.values() for value in cost.energy.values()),
            stream_energy(network, chip),
        ]
    )
    energy_pj = dynamic_pj + leakage_mw * delay_ns
    if np.any(energy_pj == 0):
        raise UserError(
            f"{chip.technology}: a network takes no energy there, so there is nothing to compare: "
            "give one of the *.energy_pj that it uses, or the leakage, a value above 0"
        )
    ops = sum(network.ops(layer) for layer in network.layers)
    total = {
        "pes": pes,
        "tiles": tiles,
        "energy_pj": energy_pj,
        "area_um2": area_um2,
        "delay_ns": delay_ns,
        "edp_pj_ns": energy_pj * delay_ns,
        "edap_pj_ns_um2": energy_pj * delay_ns * area_um2,
        "frames_per_second": 1e9 / interval_ns,
        "power_mw": dynamic_pj / interval_ns + leakage_mw,
        "leakage_mw": leakage_mw,
        "ops": ops,
        "tops_per_watt": ops / energy_pj,
        "tops_per_mm2": ops / (delay_ns * area_um2) * 1e3,  # ops/ns is 1e-3 TOPS, um^2 1e-6 mm^2
    }
    if loaded:
        total["layers_from_dram"] = len(loaded)
        total["dram_bits"] = moved
    return total, area_by_component


def estimate(network: LayerList, chip: Chip, area_mm2: float | None = None) -> Estimate:
    """Energy, area and delay of one inference of one sample. A chip of `area_mm2` is filled with
    copies of weights (`copies_within`), or gets from DRAM what does not fit (`loaded_within`).

    Raises UserError for a weight that does not fit into a crossbar row, an ideal ADC and too small
    an area.
    """
    if chip.adc_bits is None:
        raise UserError("an ideal ADC has no price: adc_bits must be a number")
    for layer in network.layers:
        chip.check_fits(f"layer {show(layer.name)}", network.weight_bits_of(layer))
    network = as_charged(network, chip)
    copies, loaded = None, ()
    if area_mm2 is not None:
        loaded = loaded_within(network, chip, 1e6 * area_mm2)
        copies = None if loaded else copies_within(network, chip, 1e6 * area_mm2)
    costs = layer_costs(network, chip, copies, loaded)
    total, area_by_component = totals(network, chip, costs)
    energy = {
        name: fsum(cost.energy[name] for cost in costs.values())
        for name in next(iter(costs.values())).energy
    }
    energy["stream"] = stream_energy(network, chip)
    energy["leakage"] = total["leakage_mw"] * total["delay_ns"]
    path_of = published.critical_path if chip.costs == "published" else critical_path
    path = path_of(network, {name: cost.times for name, cost in costs.items()})
    rows = tuple(layer_row(network, layer, costs[layer.name], chip) for layer in network.layers)
    for row in rows:
        row["on_critical_path"] = row["name"] in path
    return Estimate(network, chip, total, energy, area_by_component, rows, path)


def layer_row(network: LayerList, layer: Layer, cost: LayerCost, chip: Chip) -> dict[str, Any]:
    """One layer of the report."""
    placement, accumulator_bits = cost.placement, network.accumulator_bits(layer)
    pes = placement.pes * cost.copies
    own = chip.of_layer(layer.name)
    area = area_of(0 if cost.loaded else pes, own) | memory_area(network, layer, chip)
    return {
        "name": layer.name,
        "kernel": layer.kernel,
        "in_channels": layer.in_channels,
        "out_channels": layer.out_channels,
        "in_size": list(layer.in_size),
        "out_size": list(layer.out_size),
        "after": list(layer.after),
        "channel_groups": layer.groups,
        "runs": layer.runs,
        "static": layer.static,
        "has_lif": network.has_lif(layer),
        "weight_bits": network.weight_bits_of(layer),
        "input_bits": network.input_bits(layer),
        "accumulator_bits": accumulator_bits,
        "bn_bits": layer.bn_bits,
        "product_bits": layer.bn_bits and layer.bn_bits + accumulator_bits,
        "adc_bits": own.adc_bits,
        "slices": placement.slices,
        "copies": cost.copies,
        "from_dram": cost.loaded,
        "crossbars": placement.crossbars * cost.copies,
        "pes": pes,
        "groups": placement.groups,
        "utilization": utilization(layer, placement, chip),
        "cycles": cost.cycles,
        "conversions": cost.cycles * converted(placement, chip, cost.silence),
        "silent_patches": layer.silent_patches,
        "ops": network.ops(layer),
        "spike_rate": 1.0 if layer.spike_rate is None else layer.spike_rate,
        "rate_is_measured": layer.spike_rate is not None,
        "energy_pj": fsum(cost.energy.values()),
        "energy_by_component": cost.energy,
        "area_um2": fsum(area.values()),
        "area_by_component": area,
        "start_ns": cost.times.start * chip.clock_ns,
        "delay_ns": (cost.times.finish - cost.times.start) * chip.clock_ns,
        "finish_ns": cost.times.finish * chip.clock_ns,
        "busy_ns": cost.times.busy * chip.clock_ns,
    }


def utilization(layer: Layer, placement: Placement, chip: Chip) -> float:
    """Share of the cells of the layer's PEs that hold a weight."""
    cells = layer.in_channels // layer.groups * layer.kernel**2 * placement.columns
    return cells / (placement.pes * chip.crossbars_per_pe * chip.xbar_size**2)


# A ratio above 1 means better: less of what is spent, more of what is gained.
SPENT = {"edap": "edap_pj_ns_um2", "energy": "energy_pj", "delay": "delay_ns", "area": "area_um2"}
GAINED = ("tops_per_watt", "tops_per_mm2")


def ratios(ours: Mapping[str, float], baseline: Mapping[str, float]) -> dict[str, float]:
    """How many times better `ours` is than `baseline`; both are the `total` of an estimate."""
    spent = {name: baseline[key] / ours[key] for name, key in SPENT.items()}
    return spent | {name: ours[name] / baseline[name] for name in GAINED}
