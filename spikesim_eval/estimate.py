"""The network model: energy, area and delay of any graph of layers on a chip of crossbars.

It keeps the components of SpikeSim (arXiv 2210.12899) and adds what the published tool lacks: bit
widths, mixed kernels, any number and order of layers, unpooled sizes, residual graphs, spike rates.
For 3x3 layers on 64 x 64 crossbars with one-cell weights, spike inputs and rate 1, a layer's energy
is the published one. Energy is in pJ, area in um^2, delay in ns.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from math import fsum, prod
from typing import Any

import numpy as np

from .constants import AREA_UM2, ENERGY_PJ, REFERENCE
from .layers import (
    MAX_BITS,
    InputError,
    Layer,
    Network,
    check_clock,
    check_int,
    check_xbar_size,
    show,
)

CELLS = ("rram", "sram")
PERIPHERIES = ("per_group", "per_pe")
DELAYS = ("element_serial", "pixel_serial")
ADC_LAWS = ("doubling", "linear")
BUFFERS = ("own", "published")


CHOICES = {
    "cell": CELLS,
    "periphery": PERIPHERIES,
    "delay": DELAYS,
    "adc_law": ADC_LAWS,
    "buffers": BUFFERS,
}


@dataclass(frozen=True)
class Chip:
    """The options of a chip; raises InputError for a value that no chip has.

    The functions below compute with one number an option, or with arrays of them (see ChipGrid).

    `periphery`: H-tree, fetch, neuron and tile buffer are charged once per group of PEs that hold
    the bit slices of the same weights (per_group), or for every PE, as published (per_pe).
    `delay`: a PE cycle gives one output channel of one pixel, as published (element_serial), or all
    channels of a pixel (pixel_serial). `adc_law`: energy and area of an ADC double with every bit
    (doubling), or grow in proportion to its bits (linear). `buffers`: input values and membranes
    are stored in as many bits as they have (own), or in 22 (published).
    """

    xbar_size: int = 64
    pe_per_tile: int = 8
    cell_bits: int = 4
    adc_bits: int = 4
    clk_mhz: float = 250.0
    cell: str = "rram"
    periphery: str = "per_group"
    delay: str = "element_serial"
    adc_law: str = "doubling"
    buffers: str = "own"

    def __post_init__(self) -> None:
        check_xbar_size(self.xbar_size)
        check_int(self.pe_per_tile, "pe_per_tile")
        check_int(self.cell_bits, "cell_bits", MAX_BITS)
        check_int(self.adc_bits, "adc_bits", MAX_BITS)
        check_clock(self.clk_mhz, "clk_mhz")
        for field, choices in CHOICES.items():
            value = getattr(self, field)
            if value not in choices:
                raise InputError(f"{field} must be one of {choices}, got {show(value)}")

    @property
    def adcs(self) -> float:
        """ADCs of a PE, each shared by eight columns."""
        return self.xbar_size / REFERENCE["columns_per_adc"]

    @property
    def crossbar_scale(self) -> float:
        """Cells of a crossbar, relative to the 64 x 64 one the published figures belong to."""
        return (self.xbar_size / REFERENCE["reference_side"]) ** 2

    @property
    def adc_scale(self) -> float:
        """Energy and area of an ADC relative to the published 4-bit one."""
        if self.adc_law == "linear":
            return self.adc_bits / REFERENCE["reference_adc_bits"]
        return 2.0 ** (self.adc_bits - REFERENCE["reference_adc_bits"])


class ChipGrid(Chip):
    """Many chips at once: numeric options are float64 arrays of one shape, checked beforehand."""

    def __post_init__(self) -> None:
        pass


Value = float | np.ndarray


@dataclass(frozen=True)
class Placement:
    """How one layer lies on PEs of `crossbars_per_pe` crossbars.

    One row group is the k² crossbars that hold `xbar_size` input channels of a k x k kernel; a PE
    packs as many row groups of a small kernel as fit.
    """

    crossbars: Value  # with programmed cells
    pes: Value
    groups: Value  # of PEs that hold the bit slices of the same weights
    slices: Value  # cells per weight


@dataclass(frozen=True)
class LayerCost:
    placement: Placement
    cycles: Value  # of a PE
    energy: dict[str, Value]  # pJ by component
    delay: Value  # ns


@dataclass(frozen=True)
class Estimate:
    """The result. `total`, `area_by_component` and each of `layers` are rows of the report."""

    network: Network
    chip: Chip
    crossbars_per_pe: int
    total: dict[str, int | float]
    area_by_component: dict[str, float]
    layers: tuple[dict[str, Any], ...]
    critical_path: tuple[str, ...]  # names, first to last


def ceil_div(a: Value, b: Value) -> Value:
    return -(-a // b)


def add(values: Iterable[Value]) -> Value:
    """The sum; of plain numbers the exact one, which does not depend on their order."""
    values = list(values)
    return sum(values) if any(isinstance(x, np.ndarray) for x in values) else fsum(values)


def latest(times: Iterable[Value]) -> Value:
    return reduce(lambda a, b: max(a, b) if isinstance(a, float) else np.maximum(a, b), times)


def place_layer(layer: Layer, weight_bits: int, chip: Chip, crossbars_per_pe: int) -> Placement:
    slices = ceil_div(weight_bits, chip.cell_bits)
    row_crossbars = ceil_div(layer.in_channels, chip.xbar_size) * layer.kernel**2
    row_pes = ceil_div(row_crossbars, crossbars_per_pe)
    columns = ceil_div(layer.out_channels * slices, chip.xbar_size)
    return Placement(
        crossbars=row_crossbars * columns,
        pes=row_pes * columns,
        groups=row_pes * ceil_div(layer.out_channels, chip.xbar_size),
        slices=slices,
    )


def cycle_energy(placement: Placement, rate: float, chip: Chip) -> dict[str, Value]:
    """Energy of one PE cycle of a layer by component, pJ; a silent input drives no crossbar row."""
    e = ENERGY_PJ
    column_groups = REFERENCE["columns_per_adc"]
    adcs = placement.pes * chip.adcs
    shared = placement.groups if chip.periphery == "per_group" else placement.pes
    return {
        "crossbar": column_groups
        * placement.crossbars
        * e["crossbar_rram"]
        * chip.crossbar_scale
        * rate,
        "adc": column_groups * adcs * e["adc"] * chip.adc_scale,
        "mux": column_groups * adcs * e["mux"],
        "subtractor": adcs * REFERENCE["subtractions"] * e["subtractor"],
        "temp_buffer": adcs * e["temp_buffer"],
        "htree": shared * e["htree"],
        "fetch": shared * e["fetch"],
        "neuron": shared * e["neuron"],
        "tile_buffer": shared * e["tile_buffer"],
    }


def layer_delay(layer: Layer, cycles: int, chip: Chip) -> Value:
    """Time from the start of a layer to its end, ns."""
    in_turn = layer.out_channels if chip.delay == "element_serial" else 1
    return in_turn * cycles * REFERENCE["clocks_per_cycle"] * 1000 / chip.clk_mhz


def layer_cost(network: Network, layer: Layer, chip: Chip, crossbars_per_pe: int) -> LayerCost:
    placement = place_layer(layer, network.weight_bits_of(layer), chip, crossbars_per_pe)
    cycles = prod(layer.out_size) * network.time_steps_of(layer) * network.input_bits(layer)
    rate = 1.0 if layer.spike_rate is None else layer.spike_rate
    per_cycle = cycle_energy(placement, rate, chip)
    energy = {component: cycles * value for component, value in per_cycle.items()}
    return LayerCost(placement, cycles, energy, layer_delay(layer, cycles, chip))


def start_times(network: Network, costs: dict[str, LayerCost]) -> dict[str, Value]:
    """When each layer starts, ns: as soon as every layer it waits for is 75 % done."""
    starts: dict[str, Value] = {}
    for layer in network.in_order():
        ready = [starts[name] + REFERENCE["overlap"] * costs[name].delay for name in layer.after]
        starts[layer.name] = latest(ready) if ready else 0.0 * costs[layer.name].delay
    return starts


def pe_area(chip: Chip, crossbars_per_pe: int) -> dict[str, Value]:
    """Area of one PE by component, um^2."""
    return {
        "crossbar": crossbars_per_pe * AREA_UM2["crossbar_rram"] * chip.crossbar_scale,
        "adc": chip.adcs * AREA_UM2["adc"] * chip.adc_scale,
        "mux": chip.adcs * AREA_UM2["mux"],
    }


def tile_area(chip: Chip) -> dict[str, Value]:
    """Area of what a tile has beside its PEs, by component, um^2."""
    return {
        "subtractor": chip.adcs * AREA_UM2["subtractor"],
        "temp_buffer": AREA_UM2["temp_buffer"],
        "tile_buffer": AREA_UM2["tile_buffer"],
        "htree": AREA_UM2["htree"],
    }


def input_buffer_area(network: Network, layer: Layer, chip: Chip) -> float:
    bits = REFERENCE["state_bits"] if chip.buffers == "published" else network.input_bits(layer)
    return layer.in_channels * prod(layer.in_size) * bits * AREA_UM2["memory_bit"]


def chip_area(
    network: Network, tiles: Value, crossbars_per_pe: int, chip: Chip
) -> dict[str, Value]:
    """Area by component, um^2: tiles, input buffers of all layers, membrane memory of all LIFs."""
    in_pes, in_tiles = pe_area(chip, crossbars_per_pe), tile_area(chip)
    bits = REFERENCE["state_bits"] if chip.buffers == "published" else network.membrane_bits
    membrane_bits = sum(prod(shape) for shape in network.lif) * bits
    return (
        {name: tiles * chip.pe_per_tile * area for name, area in in_pes.items()}
        | {name: tiles * area for name, area in in_tiles.items()}
        | {
            "input_buffer": fsum(
                input_buffer_area(network, layer, chip) for layer in network.layers
            ),
            "membrane": membrane_bits * AREA_UM2["memory_bit"],
        }
    )


def layer_area(
    network: Network, layer: Layer, pes: int, crossbars_per_pe: int, chip: Chip
) -> dict[str, float]:
    """Area of a layer's PEs, its share of their tiles and its input buffer, um^2."""
    in_pes, in_tiles = pe_area(chip, crossbars_per_pe), tile_area(chip)
    return (
        {name: pes * area for name, area in in_pes.items()}
        | {name: pes / chip.pe_per_tile * area for name, area in in_tiles.items()}
        | {"input_buffer": input_buffer_area(network, layer, chip)}
    )


def totals(
    network: Network,
    chip: Chip,
    costs: dict[str, LayerCost],
    starts: dict[str, Value],
    crossbars_per_pe: int,
) -> tuple[dict[str, Value], dict[str, Value]]:
    """(the figures of the whole chip, its area by component)"""
    pes = sum(cost.placement.pes for cost in costs.values())
    tiles = ceil_div(pes, chip.pe_per_tile)
    area_by_component = chip_area(network, tiles, crossbars_per_pe, chip)
    energy_pj = add(value for cost in costs.values() for value in cost.energy.values())
    area_um2 = add(area_by_component.values())
    delay_ns = latest([starts[name] + cost.delay for name, cost in costs.items()])
    ops = sum(network.ops(layer) for layer in network.layers)
    total = {
        "pes": pes,
        "tiles": tiles,
        "energy_pj": energy_pj,
        "area_um2": area_um2,
        "delay_ns": delay_ns,
        "edap_pj_ns_um2": energy_pj * delay_ns * area_um2,
        "ops": ops,
        "tops_per_watt": ops / energy_pj,
        "tops_per_mm2": ops / (delay_ns * area_um2) * 1e3,  # ops/ns is 1e-3 TOPS, um^2 1e-6 mm^2
    }
    return total, area_by_component


def check_cell(chip: Chip) -> None:
    """Raise InputError for SRAM cells, for which no sourced crossbar energy exists."""
    if chip.cell == "sram":
        raise InputError(
            "no sourced crossbar energy for sram (the published figure repeats its area); "
            "use rram here, or the compat command"
        )


def estimate(network: Network, chip: Chip) -> Estimate:
    """Energy, area and delay of one inference of one sample. Raises InputError for SRAM cells."""
    check_cell(chip)
    crossbars_per_pe = network.largest_kernel**2
    costs = {
        layer.name: layer_cost(network, layer, chip, crossbars_per_pe) for layer in network.layers
    }
    starts = start_times(network, costs)
    total, area_by_component = totals(network, chip, costs, starts, crossbars_per_pe)
    rows = []
    for layer in network.layers:
        cost, start = costs[layer.name], starts[layer.name]
        accumulator_bits = network.accumulator_bits(layer)
        area = layer_area(network, layer, cost.placement.pes, crossbars_per_pe, chip)
        rows.append(
            {
                "name": layer.name,
                "kernel": layer.kernel,
                "in_channels": layer.in_channels,
                "out_channels": layer.out_channels,
                "in_size": list(layer.in_size),
                "out_size": list(layer.out_size),
                "after": list(layer.after),
                "weight_bits": network.weight_bits_of(layer),
                "input_bits": network.input_bits(layer),
                "accumulator_bits": accumulator_bits,
                "bn_bits": layer.bn_bits,
                "product_bits": layer.bn_bits and layer.bn_bits + accumulator_bits,
                "slices": cost.placement.slices,
                "pes": cost.placement.pes,
                "groups": cost.placement.groups,
                "utilization": utilization(layer, cost.placement, chip, crossbars_per_pe),
                "cycles": cost.cycles,
                "ops": network.ops(layer),
                "spike_rate": 1.0 if layer.spike_rate is None else layer.spike_rate,
                "rate_is_measured": layer.spike_rate is not None,
                "energy_pj": fsum(cost.energy.values()),
                "energy_by_component": cost.energy,
                "area_um2": fsum(area.values()),
                "area_by_component": area,
                "start_ns": start,
                "delay_ns": cost.delay,
                "finish_ns": start + cost.delay,
            }
        )
    path = critical_path(network, starts, costs)
    for row in rows:
        row["on_critical_path"] = row["name"] in path
    return Estimate(network, chip, crossbars_per_pe, total, area_by_component, tuple(rows), path)


def utilization(layer: Layer, placement: Placement, chip: Chip, crossbars_per_pe: int) -> float:
    """Share of the cells of the layer's PEs that hold a weight."""
    used = layer.in_channels * layer.kernel**2 * layer.out_channels * placement.slices
    return used / (placement.pes * crossbars_per_pe * chip.xbar_size**2)


def critical_path(
    network: Network, starts: dict[str, float], costs: dict[str, LayerCost]
) -> tuple[str, ...]:
    """Names of the layers that decide the delay, first to last."""
    by_name = {layer.name: layer for layer in network.layers}
    overlap = REFERENCE["overlap"]

    def last(names: Iterable[str], share: float) -> str:
        """The one that is `share` done last; of several the last by name, whatever their order."""
        return max(names, key=lambda name: (starts[name] + share * costs[name].delay, name))

    path = [last(costs, 1.0)]
    while before := by_name[path[-1]].after:
        path.append(last(before, overlap))
    return tuple(reversed(path))


# A ratio above 1 means better: less of what is spent, more of what is gained.
SPENT = {"edap": "edap_pj_ns_um2", "energy": "energy_pj", "delay": "delay_ns", "area": "area_um2"}
GAINED = ("tops_per_watt", "tops_per_mm2")


def ratios(ours: Mapping[str, float], baseline: Mapping[str, float]) -> dict[str, float]:
    """How many times better `ours` is than `baseline`; both are the `total` of an estimate."""
    spent = {name: baseline[key] / ours[key] for name, key in SPENT.items()}
    return spent | {name: ours[name] / baseline[name] for name in GAINED}
