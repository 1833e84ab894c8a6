"""The published SpikeSim tool (arXiv 2210.12899, ela_spikesim.py): figure by figure ("compat"),
with its limits and slips, and its way of charging on any network (`--costs published`).

`estimate_published`: the tool assumes square, chained convolutions of one kernel size, ignores bit
widths, counts membranes for five layers only, and gives SRAM's crossbar energy the value of its
area; none of this is corrected. The latency is the last layer's finish, which counts the timesteps
once (the layer-wise latencies it prints count them twice).

`energies` and `times`: each PE cycle is charged as a whole, with all of its columns converted, and
gives one output channel of a pixel; a layer starts when those before it are 75 % done. Added are
bit widths, mixed kernels, residual graphs, grouped convolutions and spike rates. For k x k layers
on PEs of k² crossbars of 64 x 64 with one-cell weights, spike inputs, rate 1 and LIF neurons behind
them, a layer's energy is the published one.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from runtime.errors import UserError

from .chip import Chip, Placement, Value, larger
from .constants import AREA_UM2, ENERGY_PJ, REFERENCE
from .layer_list import (
    LayerList,
    check_int,
    check_keys,
    check_number,
    check_sizes,
    show,
)
from .schedule import Times

LISTS = ("in_ch", "out_ch", "in_dim", "out_dim")
NUMBERS = ("xbar_size", "kernel_size", "pe_per_tile", "time_steps")
DEVICES = ("rram", "sram")


def _check(inputs: object) -> None:
    check_keys(inputs, "the case", (*LISTS, *NUMBERS, "device", "clk_freq_mhz"))
    if not isinstance(inputs["in_ch"], list) or not inputs["in_ch"]:
        raise UserError(f"in_ch must be a list of whole numbers, got {show(inputs['in_ch'])}")
    for key in LISTS:
        check_sizes(inputs[key], key, len(inputs["in_ch"]))
    for key in NUMBERS:
        check_int(inputs[key], key)
    if inputs["xbar_size"] % REFERENCE["columns_per_adc"]:
        got = inputs["xbar_size"]
        raise UserError(f"xbar_size must be a multiple of 8 (columns per ADC), got {got}")
    check_number(inputs["clk_freq_mhz"], "clk_freq_mhz", 1e-3, 1e6)
    if inputs["device"] not in DEVICES:
        raise UserError(f"device must be one of {DEVICES}, got {show(inputs['device'])}")


def estimate_published(inputs: dict[str, Any]) -> dict[str, Any]:
    """The published figures of one network and chip.

    `inputs` has per-layer lists `in_ch`, `out_ch` (channels), `in_dim`, `out_dim` (side in pixels)
    and `xbar_size`, `kernel_size`, `pe_per_tile`, `time_steps`, `device` (rram or sram),
    `clk_freq_mhz`. Energy is in pJ, area in um^2, latency in ns. Raises UserError.
    """
    _check(inputs)
    in_ch, out_ch, in_dim, out_dim = (inputs[key] for key in LISTS)
    xbar_size, kernel, pe_per_tile, time_steps = (inputs[key] for key in NUMBERS)
    crossbar = f"crossbar_{inputs['device']}"
    adcs = xbar_size / REFERENCE["columns_per_adc"]

    layer_pes = [
        math.ceil(i / xbar_size) * math.ceil(o / xbar_size)
        for i, o in zip(in_ch, out_ch, strict=True)
    ]
    tiles = math.ceil(sum(layer_pes) / pe_per_tile)
    outputs = [o * side**2 for o, side in zip(out_ch, out_dim, strict=True)]
    inputs_stored = sum(i * side**2 for i, side in zip(in_ch, in_dim, strict=True))

    e = ENERGY_PJ
    pe_energy = (
        e["htree"]
        + e["fetch"]
        + e["neuron"]
        + e["tile_buffer"]
        + adcs * (kernel**2 * e[crossbar] + adcs * (e["adc"] + e["mux"]))
        + adcs * (REFERENCE["subtractions"] * e["subtractor"] + e["temp_buffer"])
    )
    layer_energy = [
        time_steps * pes * side**2 * pe_energy for pes, side in zip(layer_pes, out_dim, strict=True)
    ]

    a = AREA_UM2
    pes_area = tiles * pe_per_tile * (kernel**2 * a[crossbar] + adcs * (a["adc"] + a["mux"]))
    subtractor_area = tiles * adcs * a["subtractor"]
    state_bit_area = a["memory_bit"] * REFERENCE["state_bits"]
    neuron_area = state_bit_area * sum(outputs[: REFERENCE["state_layers"]])
    digital_area = (
        tiles * (a["temp_buffer"] + a["tile_buffer"]) + pes_area + state_bit_area * inputs_stored
    )

    cycle_ns = REFERENCE["clocks_per_cycle"] * 1000 / inputs["clk_freq_mhz"]
    waited = sum(math.floor(REFERENCE["overlap"] * values) for values in outputs[:-1])
    return {
        "pes": sum(layer_pes),
        "tiles": tiles,
        "total_energy_pj": math.fsum(layer_energy),
        "layer_energy_pj": layer_energy,
        "area_um2": {
            "neuron_mem": neuron_area,
            "pe_and_sub": pes_area + subtractor_area,
            "digital": digital_area,
            "total": digital_area + subtractor_area + tiles * a["htree"] + neuron_area,
        },
        "latency_ns": time_steps * cycle_ns * (waited + outputs[-1]),
        "pe_cycle_ns": cycle_ns,
    }


def energies(
    network: LayerList,
    places: Mapping[str, Placement],
    cycles: Mapping[str, int],
    chip: Chip,
) -> dict[str, dict[str, Value]]:
    """Energy of each layer by component, pJ; a silent input drives no crossbar row.

    H-tree, fetch, neuron and tile buffer are charged once per group of PEs that hold the bit slices
    of the same weights.
    """
    e, found = ENERGY_PJ, {}
    for layer in network.layers:
        placement, count = places[layer.name], cycles[layer.name]
        rate = 1.0 if layer.spike_rate is None else layer.spike_rate
        adcs = placement.pes * chip.adcs_of_pe
        converted = adcs * chip.columns_per_adc
        columns = REFERENCE["columns_per_adc"]  # that the published crossbar's figure is of
        cells = columns * placement.crossbars * chip.crossbar_scale
        # A neuron takes the sum of all input bits at once.
        updates = network.outputs(layer) if network.has_lif(layer) else 0
        found[layer.name] = {
            "crossbar": count * rate * cells * e["crossbar_rram"],
            "adc": count * converted * e["adc"] * chip.adc_scale("energy"),
            "mux": count * converted * e["mux"],
            "subtractor": count * adcs * REFERENCE["subtractions"] * e["subtractor"],
            "temp_buffer": count * adcs * e["temp_buffer"],
            **{x: count * placement.groups * e[x] for x in ("htree", "fetch", "tile_buffer")},
            "neuron": updates * placement.groups * e["neuron"],
        }
    return found


def times(network: LayerList, cycles: Mapping[str, int]) -> dict[str, Times]:
    """When each layer runs, in clocks: one output channel of a pixel in a PE cycle; it starts as
    soon as every layer it waits for is 75 % done."""
    found: dict[str, Times] = {}
    for layer in network.in_order():
        delay = layer.out_channels * cycles[layer.name] * REFERENCE["clocks_per_cycle"]
        start: Value = 0.0 * delay
        for name in layer.after:
            start = larger(start, found[name].start + REFERENCE["overlap"] * found[name].busy)
        found[layer.name] = Times(start, start + delay, delay)
    return found


def critical_path(network: LayerList, times: Mapping[str, Times]) -> tuple[str, ...]:
    """Names of the layers that decide the delay, first to last."""
    by_name = {layer.name: layer for layer in network.layers}

    def last(names: Iterable[str], share: float) -> str:
        """The one that is `share` done last; of several the last by name, whatever their order."""
        return max(names, key=lambda name: (times[name].start + share * times[name].busy, name))

    path = [last(times, 1.0)]
    while before := by_name[path[-1]].after:
        path.append(last(before, REFERENCE["overlap"]))
    return tuple(reversed(path))
