"""The published SpikeSim tool's numbers, the paper's ratios, and what the estimate has of widths:
value, unit, what it is, where it stands. What single events cost is a technology's (technology.py).
"""

from typing import NamedTuple

from .technology import DEFAULT


class Source:
    """Where the numbers stand."""

    TOOL = "SpikeSim, ela_spikesim.py at commit c2627bc (arXiv 2210.12899)"
    MD_SNN = "MD-SNN, abstract (arXiv 2512.04443)"


class Constant(NamedTuple):
    value: float
    unit: str
    meaning: str
    source: str


# Of a PE cycle of a PE of nine 64 x 64 crossbars and their X/8 ADCs, X the side of a crossbar: what
# technologies/spikesim-65nm.toml has of single events, times the events, and what it does not use.
E, A = DEFAULT.energy, DEFAULT.area
ENERGY = {
    "crossbar_rram": Constant(512 * E["cell"], "pJ", "8 columns of 64 rows, RRAM", Source.TOOL),
    "crossbar_sram": Constant(671.089, "pJ", "the same, SRAM; repeats the SRAM area", Source.TOOL),
    "adc": Constant(E["adc"], "pJ", "one 4-bit conversion", Source.TOOL),
    "mux": Constant(E["mux"], "pJ", "one switch of an ADC's column multiplexer", Source.TOOL),
    "subtractor": Constant(1.15e-6, "pJ", "one subtraction, 16 per ADC and PE cycle", Source.TOOL),
    "temp_buffer": Constant(
        8 * E["temp_buffer"], "pJ", "temporary buffer, per ADC and PE cycle", Source.TOOL
    ),
    "htree": Constant(
        64 * E["htree"], "pJ", "H-tree, 8 transfers of 19.64 pJ per PE cycle", Source.TOOL
    ),
    "fetch": Constant(E["fetch"], "pJ", "memory fetch per PE cycle", Source.TOOL),
    "neuron": Constant(
        64 * E["neuron"], "pJ", "LIF module, 4 steps of 1.274 pJ per PE cycle", Source.TOOL
    ),
    "tile_buffer": Constant(397.0, "pJ", "tile buffer access per PE cycle", Source.TOOL),
}
AREA = {
    "crossbar_rram": Constant(4096 * A["cell"], "um^2", "one 64 x 64 crossbar, RRAM", Source.TOOL),
    "crossbar_sram": Constant(671.089, "um^2", "one 64 x 64 crossbar, SRAM", Source.TOOL),
    "adc": Constant(A["adc"], "um^2", "one 4-bit ADC", Source.TOOL),
    "mux": Constant(A["mux"], "um^2", "multiplexer of one ADC", Source.TOOL),
    "subtractor": Constant(
        8 * A["subtractor"], "um^2", "subtractors of a tile, per X/8", Source.TOOL
    ),
    "temp_buffer": Constant(A["temp_buffer"], "um^2", "temporary buffer of a tile", Source.TOOL),
    "tile_buffer": Constant(A["tile_buffer"], "um^2", "tile buffer of 64 x 128 bits", Source.TOOL),
    "htree": Constant(8 * A["htree"], "um^2", "H-tree of a tile", Source.TOOL),
    "memory_bit": Constant(
        A["memory_bit"], "um^2", "one bit of buffer or membrane memory", Source.TOOL
    ),
}
STRUCTURE = {
    "columns_per_adc": Constant(8, "columns", "crossbar columns that share one ADC", Source.TOOL),
    "reference_pes": Constant(8, "PEs", "of a tile that the tile's figures belong to", Source.TOOL),
    "reference_side": Constant(
        64, "cells", "crossbar side the crossbar figures belong to", Source.TOOL
    ),
    "subtractions": Constant(16, "", "subtractions per ADC and PE cycle", Source.TOOL),
    "state_bits": Constant(22, "bit", "width of a value in input buffer and membrane", Source.TOOL),
    "stream_bits": Constant(25, "bit", "of the residual stream", "models/integer_network.py"),
    "state_layers": Constant(5, "layers", "leading layers whose membrane is counted", Source.TOOL),
    "clocks_per_cycle": Constant(26, "clocks", "clock cycles of one PE cycle", Source.TOOL),
    "overlap": Constant(0.75, "", "part of a layer done when its successor starts", Source.TOOL),
}
# How many times better than floating point the paper reports its network on N-Caltech101.
PUBLISHED_RATIO = {
    "edap": Constant(14.85, "x", "energy-delay-area product", Source.MD_SNN),
    "tops_per_watt": Constant(2.64, "x", "operations per energy", Source.MD_SNN),
    "tops_per_mm2": Constant(6.19, "x", "throughput per area", Source.MD_SNN),
}


def _values(table: dict[str, Constant]) -> dict[str, float]:
    return {name: constant.value for name, constant in table.items()}


ENERGY_PJ = _values(ENERGY)
AREA_UM2 = _values(AREA)
REFERENCE = _values(STRUCTURE)
