"""The published SpikeSim tool, figure by figure ("compat"), with its limits and slips.

Source: ela_spikesim.py of SpikeSim (arXiv 2210.12899). It assumes square, chained convolutions of
one kernel size, ignores bit widths, counts membranes for five layers only, and gives SRAM's
crossbar energy the value of its area; none of this is corrected. The latency is the last layer's
finish, which counts the timesteps once (the layer-wise latencies it prints count them twice).
"""

import math
from typing import Any

from runtime.errors import UserError

from .chip import check_columns
from .constants import AREA_UM2, ENERGY_PJ, REFERENCE
from .layer_list import (
    check_int,
    check_keys,
    check_number,
    check_sizes,
    show,
)

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
    check_columns(inputs["xbar_size"])
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
