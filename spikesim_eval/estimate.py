"""The network model: energy, area and delay of any graph of layers on a chip of crossbars.

It keeps the components of SpikeSim (arXiv 2210.12899) and adds what the published tool lacks: bit
widths, mixed kernels, any number and order of layers, unpooled sizes, residual graphs, grouped
convolutions, spike rates. For k x k layers on PEs of k² crossbars of 64 x 64 with one-cell weights,
spike inputs, rate 1 and LIF neurons behind them, a layer's energy is the published one.
Energy is in pJ, area in um^2, delay in ns.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from math import fsum, prod
from typing import Any

import numpy as np

from .chip import Chip, check_weight_fits, weights_per_row
from .constants import AREA_UM2, ENERGY_PJ, REFERENCE
from .layer_list import Layer, LayerList, show

Value = float | np.ndarray


@dataclass(frozen=True)
class Placement:
    """How one layer lies on the chip; its weights lie there once, however often it runs.

    One row group is the k² crossbars that hold `xbar_size` input channels of a k x k kernel. The
    crossbars of a PE add into the same columns: it takes `crossbars_per_pe` of them, of as many row
    groups as that may be; columns beyond a crossbar's take further PEs.
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

    network: LayerList
    chip: Chip
    total: dict[str, int | float]
    area_by_component: dict[str, float]
    layers: tuple[dict[str, Any], ...]
    critical_path: tuple[str, ...]  # names, first to last

    @property
    def energy_by_component(self) -> dict[str, float]:
        """Of all layers together, pJ."""
        names = self.layers[0]["energy_by_component"]
        return {
            name: fsum(row["energy_by_component"][name] for row in self.layers) for name in names
        }


def ceil_div(a: Value, b: Value) -> Value:
    return -(-a // b)


def add(values: Iterable[Value]) -> Value:
    """The sum; of plain numbers the exact one, which does not depend on their order."""
    values = list(values)
    return sum(values) if any(isinstance(x, np.ndarray) for x in values) else fsum(values)


def _extreme(plain: Callable, of_arrays: Callable) -> Callable[[Iterable[Value]], Value]:
    def pick(a: Value, b: Value) -> Value:
        return (of_arrays if np.ndarray in (type(a), type(b)) else plain)(a, b)

    return lambda values: reduce(pick, values)


latest, least = _extreme(max, np.maximum), _extreme(min, np.minimum)


def matrix_crossbars(
    rows: int, columns: int, kernel: int, per_row: Value, chip: Chip
) -> tuple[Value, Value]:
    """(crossbars, PEs) of the weights from `rows` to `columns` channels, of which `per_row` fit
    side by side into a crossbar."""
    row_crossbars = ceil_div(rows, chip.xbar_size) * kernel**2
    wide = ceil_div(columns, per_row)
    return row_crossbars * wide, ceil_div(row_crossbars, chip.crossbars_per_pe) * wide


def layer_crossbars(layer: Layer, per_row: Value, chip: Chip) -> tuple[Value, Value]:
    """(crossbars, PEs) of a layer.

    The channel groups of a grouped convolution are blocks of their own. Where several fit, they
    share a crossbar as blocks on its diagonal: rows and columns apart, zeros elsewhere. No count is
    above that of the layer without groups, whose crossbars could hold the blocks just as well.
    """
    dense = matrix_crossbars(layer.in_channels, layer.out_channels, layer.kernel, per_row, chip)
    if layer.groups == 1:
        return dense
    rows, columns = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    fitting = least([chip.xbar_size // rows, per_row // columns])
    diagonal = ceil_div(layer.groups, latest([fitting, 1]))
    block = matrix_crossbars(rows, columns, layer.kernel, per_row, chip)
    crossbars, pes = (least([diagonal * b, d]) for b, d in zip(block, dense, strict=True))
    return crossbars, pes


def place_layer(layer: Layer, weight_bits: int, chip: Chip) -> Placement:
    per_row = weights_per_row(weight_bits, chip.cell_bits, chip.xbar_size)
    crossbars, pes = layer_crossbars(layer, per_row, chip)
    _, groups = layer_crossbars(layer, chip.xbar_size, chip)  # as if a weight were one cell
    return Placement(crossbars, pes, groups, slices=ceil_div(weight_bits, chip.cell_bits))


def cycle_energy(placement: Placement, shared: Value, rate: float, chip: Chip) -> dict[str, Value]:
    """Energy of one PE cycle of a layer by component, pJ; a silent input drives no crossbar row.

    `shared` is how often the periphery is charged.
    """
    e = ENERGY_PJ
    column_groups = REFERENCE["columns_per_adc"]
    adcs = placement.pes * chip.adcs
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
        "tile_buffer": shared * e["tile_buffer"],
    }


def layer_delay(layer: Layer, cycles: int, chip: Chip) -> Value:
    """Time from the start of a layer to its end, ns."""
    in_turn = layer.out_channels if chip.delay == "element_serial" else 1
    return in_turn * cycles * REFERENCE["clocks_per_cycle"] * 1000 / chip.clk_mhz


def layer_cost(network: LayerList, layer: Layer, chip: Chip) -> LayerCost:
    placement = place_layer(layer, network.weight_bits_of(layer), chip)
    cycles = network.outputs(layer) * network.input_bits(layer)
    rate = 1.0 if layer.spike_rate is None else layer.spike_rate
    shared = placement.groups if chip.periphery == "per_group" else placement.pes
    per_cycle = cycle_energy(placement, shared, rate, chip)
    energy = {component: cycles * value for component, value in per_cycle.items()}
    # A neuron takes the sum of all input bits at once.
    updates = network.outputs(layer) if network.has_lif(layer) else 0
    energy["neuron"] = updates * shared * ENERGY_PJ["neuron"]
    return LayerCost(placement, cycles, energy, layer_delay(layer, cycles, chip))


def start_times(network: LayerList, costs: dict[str, LayerCost]) -> dict[str, Value]:
    """When each layer starts, ns: as soon as every layer it waits for is 75 % done."""
    starts: dict[str, Value] = {}
    for layer in network.in_order():
        ready = [starts[name] + REFERENCE["overlap"] * costs[name].delay for name in layer.after]
        starts[layer.name] = latest(ready) if ready else 0.0 * costs[layer.name].delay
    return starts


def area_of(pes: Value, tiles: Value, chip: Chip) -> dict[str, Value]:
    """Area of so many PEs, and of what so many tiles have beside theirs, by component, um^2."""
    a = AREA_UM2
    return {
        "crossbar": pes * (chip.crossbars_per_pe * a["crossbar_rram"] * chip.crossbar_scale),
        "adc": pes * (chip.adcs * a["adc"] * chip.adc_scale),
        "mux": pes * (chip.adcs * a["mux"]),
        "subtractor": tiles * (chip.adcs * a["subtractor"]),
        **{name: tiles * a[name] for name in ("temp_buffer", "tile_buffer", "htree")},
    }


def input_buffer_area(network: LayerList, layer: Layer, chip: Chip) -> float:
    bits = REFERENCE["state_bits"] if chip.buffers == "published" else network.input_bits(layer)
    return layer.in_channels * prod(layer.in_size) * bits * AREA_UM2["memory_bit"]


def chip_area(network: LayerList, tiles: Value, chip: Chip) -> dict[str, Value]:
    """Area by component, um^2: tiles, input buffers of all layers, membrane memory of all LIFs."""
    bits = REFERENCE["state_bits"] if chip.buffers == "published" else network.membrane_bits
    membrane_bits = sum(prod(shape) for shape in network.lif) * bits
    return area_of(tiles * chip.pe_per_tile, tiles, chip) | {
        "input_buffer": fsum(input_buffer_area(network, layer, chip) for layer in network.layers),
        "membrane": membrane_bits * AREA_UM2["memory_bit"],
    }


def layer_area(network: LayerList, layer: Layer, pes: int, chip: Chip) -> dict[str, float]:
    """Area of a layer's PEs, its share of their tiles and its input buffer, um^2."""
    tiles = pes / chip.pe_per_tile
    return area_of(pes, tiles, chip) | {"input_buffer": input_buffer_area(network, layer, chip)}


def totals(
    network: LayerList, chip: Chip, costs: dict[str, LayerCost], starts: dict[str, Value]
) -> tuple[dict[str, Value], dict[str, Value]]:
    """(the figures of the whole chip, its area by component)"""
    pes = sum(cost.placement.pes for cost in costs.values())
    tiles = ceil_div(pes, chip.pe_per_tile)
    area_by_component = chip_area(network, tiles, chip)
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


def estimate(network: LayerList, chip: Chip) -> Estimate:
    """Energy, area and delay of one inference of one sample.

    Raises UserError for a weight that does not fit into a crossbar row.
    """
    for layer in network.layers:
        what, bits = f"layer {show(layer.name)}", network.weight_bits_of(layer)
        check_weight_fits(what, bits, chip.cell_bits, chip.xbar_size)
    costs = {layer.name: layer_cost(network, layer, chip) for layer in network.layers}
    starts = start_times(network, costs)
    total, area_by_component = totals(network, chip, costs, starts)
    rows = []
    for layer in network.layers:
        cost, start = costs[layer.name], starts[layer.name]
        accumulator_bits = network.accumulator_bits(layer)
        area = layer_area(network, layer, cost.placement.pes, chip)
        rows.append(
            {
                "name": layer.name,
                "kernel": layer.kernel,
                "in_channels": layer.in_channels,
                "out_channels": layer.out_channels,
                "in_size": list(layer.in_size),
                "out_size": list(layer.out_size),
                "after": list(layer.after),
                "channel_groups": layer.groups,
                "runs": layer.runs,
                "has_lif": network.has_lif(layer),
                "weight_bits": network.weight_bits_of(layer),
                "input_bits": network.input_bits(layer),
                "accumulator_bits": accumulator_bits,
                "bn_bits": layer.bn_bits,
                "product_bits": layer.bn_bits and layer.bn_bits + accumulator_bits,
                "slices": cost.placement.slices,
                "pes": cost.placement.pes,
                "groups": cost.placement.groups,
                "utilization": utilization(layer, cost.placement, chip),
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
    return Estimate(network, chip, total, area_by_component, tuple(rows), path)


def utilization(layer: Layer, placement: Placement, chip: Chip) -> float:
    """Share of the cells of the layer's PEs that hold a weight."""
    weights = layer.in_channels // layer.groups * layer.out_channels * layer.kernel**2
    return weights * placement.slices / (placement.pes * chip.crossbars_per_pe * chip.xbar_size**2)


def critical_path(
    network: LayerList, starts: dict[str, float], costs: dict[str, LayerCost]
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
