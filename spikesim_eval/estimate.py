"""The network model: energy, area and delay of any graph of layers on a chip of crossbars.

It keeps the components of SpikeSim (arXiv 2210.12899) and adds what the published tool lacks: bit
widths, mixed kernels, any number and order of layers, unpooled sizes, residual graphs, spike rates.
For 3x3 layers on 64 x 64 crossbars with one-cell weights, spike inputs and rate 1, a layer's energy
is the published one. Energy is in pJ, area in um^2, delay in ns.
"""

from dataclasses import dataclass
from math import fsum, prod
from typing import Any

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


@dataclass(frozen=True)
class Chip:
    """The options of a chip; raises InputError for a value that no chip has.

    `periphery`: H-tree, fetch, neuron and tile buffer are charged once per group of PEs that hold
    the bit slices of the same weights (per_group), or for every PE, as published (per_pe).
    `delay`: a PE cycle gives one output channel of one pixel, as published (element_serial), or all
    channels of a pixel (pixel_serial).
    """

    xbar_size: int = 64
    pe_per_tile: int = 8
    cell_bits: int = 4
    adc_bits: int = 4
    clk_mhz: float = 250.0
    cell: str = "rram"
    periphery: str = "per_group"
    delay: str = "element_serial"

    def __post_init__(self) -> None:
        check_xbar_size(self.xbar_size)
        check_int(self.pe_per_tile, "pe_per_tile")
        check_int(self.cell_bits, "cell_bits", MAX_BITS)
        check_int(self.adc_bits, "adc_bits", MAX_BITS)
        check_clock(self.clk_mhz, "clk_mhz")
        for field, choices in (("cell", CELLS), ("periphery", PERIPHERIES), ("delay", DELAYS)):
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
        """Energy and area of an ADC relative to the published 4-bit one: doubled by every bit."""
        return 2.0 ** (self.adc_bits - REFERENCE["reference_adc_bits"])


@dataclass(frozen=True)
class Placement:
    """How one layer lies on PEs of `crossbars_per_pe` crossbars.

    One row group is the k² crossbars that hold `xbar_size` input channels of a k x k kernel; a PE
    packs as many row groups of a small kernel as fit.
    """

    crossbars: int  # with programmed cells
    pes: int
    groups: int  # of PEs that hold the bit slices of the same weights
    slices: int  # cells per weight


@dataclass(frozen=True)
class Estimate:
    """The result. `total`, `area_by_component` and each of `layers` are rows of the report."""

    network: Network
    chip: Chip
    crossbars_per_pe: int
    total: dict[str, int | float]
    area_by_component: dict[str, float]
    layers: tuple[dict[str, Any], ...]


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


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


def cycle_energy(placement: Placement, rate: float, chip: Chip) -> dict[str, float]:
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


def layer_delay(layer: Layer, cycles: int, chip: Chip) -> float:
    """Time from the start of a layer to its end, ns."""
    in_turn = layer.out_channels if chip.delay == "element_serial" else 1
    return in_turn * cycles * REFERENCE["clocks_per_cycle"] * 1000 / chip.clk_mhz


def start_times(network: Network, delays: dict[str, float]) -> dict[str, float]:
    """When each layer starts, ns: as soon as every layer it waits for is 75 % done."""
    starts: dict[str, float] = {}
    for layer in network.in_order():
        ready = [starts[name] + REFERENCE["overlap"] * delays[name] for name in layer.after]
        starts[layer.name] = max(ready, default=0.0)
    return starts


def chip_area(network: Network, tiles: int, crossbars_per_pe: int, chip: Chip) -> dict[str, float]:
    """Area by component, um^2: tiles, input buffers of all layers, membrane memory of all LIFs."""
    a = AREA_UM2
    pes = tiles * chip.pe_per_tile
    input_bits = sum(
        layer.in_channels * prod(layer.in_size) * network.input_bits(layer)
        for layer in network.layers
    )
    membrane_bits = sum(prod(shape) for shape in network.lif) * network.membrane_bits
    return {
        "crossbar": pes * crossbars_per_pe * a["crossbar_rram"] * chip.crossbar_scale,
        "adc": pes * chip.adcs * a["adc"] * chip.adc_scale,
        "mux": pes * chip.adcs * a["mux"],
        "subtractor": tiles * chip.adcs * a["subtractor"],
        "temp_buffer": tiles * a["temp_buffer"],
        "tile_buffer": tiles * a["tile_buffer"],
        "htree": tiles * a["htree"],
        "input_buffer": input_bits * a["memory_bit"],
        "membrane": membrane_bits * a["memory_bit"],
    }


def estimate(network: Network, chip: Chip) -> Estimate:
    """Energy, area and delay of one inference of one sample.

    Raises InputError for SRAM cells, for which no sourced crossbar energy exists.
    """
    if chip.cell == "sram":
        raise InputError(
            "no sourced crossbar energy for sram (the published figure repeats its area); "
            "use rram here, or the compat command"
        )
    crossbars_per_pe = max(layer.kernel for layer in network.layers) ** 2

    rows, delays = [], {}
    for layer in network.layers:
        weight_bits, input_bits = network.weight_bits_of(layer), network.input_bits(layer)
        accumulator_bits = network.accumulator_bits(layer)
        runs = prod(layer.out_size) * network.time_steps_of(layer)
        placement = place_layer(layer, weight_bits, chip, crossbars_per_pe)
        cycles = runs * input_bits
        rate = 1.0 if layer.spike_rate is None else layer.spike_rate
        energy = {
            component: cycles * value
            for component, value in cycle_energy(placement, rate, chip).items()
        }
        delays[layer.name] = layer_delay(layer, cycles, chip)
        macs = layer.in_channels * layer.out_channels * layer.kernel**2 * runs
        rows.append(
            {
                "name": layer.name,
                "kernel": layer.kernel,
                "in_channels": layer.in_channels,
                "out_channels": layer.out_channels,
                "in_size": list(layer.in_size),
                "out_size": list(layer.out_size),
                "after": list(layer.after),
                "weight_bits": weight_bits,
                "input_bits": input_bits,
                "accumulator_bits": accumulator_bits,
                "bn_bits": layer.bn_bits,
                "product_bits": layer.bn_bits and layer.bn_bits + accumulator_bits,
                "slices": placement.slices,
                "pes": placement.pes,
                "groups": placement.groups,
                "cycles": cycles,
                "ops": 2 * macs,
                "spike_rate": rate,
                "rate_is_measured": layer.spike_rate is not None,
                "energy_pj": fsum(energy.values()),
                "energy_by_component": energy,
            }
        )
    starts = start_times(network, delays)
    for row in rows:
        start, delay = starts[row["name"]], delays[row["name"]]
        row |= {"start_ns": start, "delay_ns": delay, "finish_ns": start + delay}

    pes = sum(row["pes"] for row in rows)
    tiles = ceil_div(pes, chip.pe_per_tile)
    area_by_component = chip_area(network, tiles, crossbars_per_pe, chip)
    energy_pj = fsum(row["energy_pj"] for row in rows)  # exact: no matter in which order
    area_um2 = fsum(area_by_component.values())
    delay_ns = max(row["finish_ns"] for row in rows)
    ops = sum(row["ops"] for row in rows)
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
    return Estimate(network, chip, crossbars_per_pe, total, area_by_component, tuple(rows))
