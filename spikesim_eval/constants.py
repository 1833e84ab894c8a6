"""Every published number the estimate uses: value, unit, what it is, where it stands.

The energy and area tables share their component names, which are the names in the reports.
"""

from typing import NamedTuple


class Source:
    """Where the numbers stand."""

    TOOL = "SpikeSim, ela_spikesim.py at commit c2627bc (arXiv 2210.12899)"
    MD_SNN = "MD-SNN, abstract (arXiv 2512.04443)"
    MNSIM = "MNSIM 2.0, Hardware_Model/Buffer.py at commit ca39ccb, 65 nm, 64-bit port"
    HOROWITZ = (
        "Horowitz, ISSCC 2014, 45 nm at 0.9 V, times 1.99 for 65 nm at 1.1 V (Stillmaker and Baas "
        "2017)"
    )
    CACTI = "CACTI 7, tech_params/65nm.dat, cells alone at 300 K, over their area"
    SATA = (
        "SATA_Sim, hw_kernels.py at commit d447058: 22.2 um^2 for 8 bits at 28 nm, times (65 / "
        "28)^2"
    )


class Constant(NamedTuple):
    value: float
    unit: str
    meaning: str
    source: str


# X is the side of a crossbar; a PE has X/8 ADCs, one for every eight columns.
ENERGY = {
    "crossbar_rram": Constant(1.76423, "pJ", "8 columns of a 64-row crossbar, RRAM", Source.TOOL),
    "crossbar_sram": Constant(671.089, "pJ", "the same, SRAM; repeats the SRAM area", Source.TOOL),
    "adc": Constant(2.03084, "pJ", "one 4-bit conversion", Source.TOOL),
    "mux": Constant(0.094245, "pJ", "one switch of an ADC's column multiplexer", Source.TOOL),
    "subtractor": Constant(1.15e-6, "pJ", "one subtraction, 16 per ADC and PE cycle", Source.TOOL),
    "temp_buffer": Constant(0.2, "pJ", "temporary buffer, per ADC and PE cycle", Source.TOOL),
    "htree": Constant(19.64 * 8, "pJ", "H-tree, 8 transfers of 19.64 pJ per PE cycle", Source.TOOL),
    "fetch": Constant(4.64, "pJ", "memory fetch per PE cycle", Source.TOOL),
    "neuron": Constant(
        1.274 * 4, "pJ", "LIF module, 4 steps of 1.274 pJ per PE cycle", Source.TOOL
    ),
    "tile_buffer": Constant(397.0, "pJ", "tile buffer access per PE cycle", Source.TOOL),
}
AREA = {
    "crossbar_rram": Constant(26.2144, "um^2", "one 64 x 64 crossbar, RRAM", Source.TOOL),
    "crossbar_sram": Constant(671.089, "um^2", "one 64 x 64 crossbar, SRAM", Source.TOOL),
    "adc": Constant(693.633, "um^2", "one 4-bit ADC", Source.TOOL),
    "mux": Constant(45.9, "um^2", "multiplexer of one ADC", Source.TOOL),
    "shift_add": Constant(24 * 22.2 / 8 * (65 / 28) ** 2, "um^2", "adder of 24 bits", Source.SATA),
    "subtractor": Constant(13411.41498, "um^2", "subtractors of a tile, per X/8", Source.TOOL),
    "temp_buffer": Constant(484.643999, "um^2", "temporary buffer of a tile", Source.TOOL),
    "tile_buffer": Constant(0.7391 * 64 * 128, "um^2", "tile buffer of 64 x 128 bits", Source.TOOL),
    "htree": Constant(216830.0 * 2, "um^2", "H-tree of a tile", Source.TOOL),
    "memory_bit": Constant(0.7391, "um^2", "one bit of buffer or membrane memory", Source.TOOL),
}
# What single events cost where they are counted; those of ENERGY are charged a PE cycle of a PE of
# nine 64 x 64 crossbars.
EVENT = {
    "crossbar": Constant(
        1.76423 / 512, "pJ", "a cell whose row is driven", f"{Source.TOOL}, by 64 x 8"
    ),
    "adc": Constant(2.03084, "pJ", "one 4-bit conversion", Source.TOOL),
    "mux": Constant(0.094245, "pJ", "one switch of an ADC's column multiplexer", Source.TOOL),
    "temp_buffer": Constant(
        0.2 / 8, "pJ", "a converted value kept", f"{Source.TOOL}, by 8 columns"
    ),
    "htree": Constant(
        19.64 / 8, "pJ", "a sum moved through the H-tree", f"{Source.TOOL}, by 8 ADCs"
    ),
    "fetch": Constant(4.64, "pJ", "a PE cycle of a group of PEs", Source.TOOL),
    "neuron": Constant(1.274 * 4 / 64, "pJ", "a LIF update", f"{Source.TOOL}, by 64 columns"),
    "add_bit": Constant(0.03 / 8 * 1.99, "pJ", "an addition, a bit", Source.HOROWITZ),
    "multiply_bit": Constant(
        0.2 / 64 * 1.99, "pJ", "a product, a bit times a bit", Source.HOROWITZ
    ),
    "tile_read": Constant(8.23 / 64, "pJ", "a bit read from a buffer of 2 KB", Source.MNSIM),
    "read": Constant(15.9 / 64, "pJ", "a bit read from a bank of 8 KB", Source.MNSIM),
    "write": Constant(17.7 / 64, "pJ", "a bit written into a bank of 8 KB", Source.MNSIM),
}
# Of an SRAM cell, the densest logic there is: more than the same area of anything else leaks.
LEAKAGE = {
    process: Constant(
        uw_per_kb * 1e-3 / 8192 / 0.7391, "mW", f"1 um^2 of {name} logic", Source.CACTI
    )
    for process, uw_per_kb, name in (
        ("lstp", 0.35, "low standby power"),
        ("lop", 29.0, "low operating power"),
        ("hp", 641.0, "high performance"),
    )
}
STRUCTURE = {
    "columns_per_adc": Constant(8, "columns", "crossbar columns that share one ADC", Source.TOOL),
    "reference_pes": Constant(8, "PEs", "of a tile that the tile's figures belong to", Source.TOOL),
    "reference_side": Constant(
        64, "cells", "crossbar side the crossbar figures belong to", Source.TOOL
    ),
    "reference_adc_bits": Constant(4, "bit", "resolution the ADC figures belong to", Source.TOOL),
    "subtractions": Constant(16, "", "subtractions per ADC and PE cycle", Source.TOOL),
    "state_bits": Constant(22, "bit", "width of a value in input buffer and membrane", Source.TOOL),
    "stream_bits": Constant(25, "bit", "of the residual stream", "models/integer_network.py"),
    "state_layers": Constant(5, "layers", "leading layers whose membrane is counted", Source.TOOL),
    "clocks_per_cycle": Constant(26, "clocks", "clock cycles of one PE cycle", Source.TOOL),
    "on_ohm": Constant(
        19139.0, "ohm", "a cell at its lowest level above 0 (level L: / L)", Source.TOOL
    ),
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
EVENT_PJ = _values(EVENT)
LEAKAGE_MW = _values(LEAKAGE)
REFERENCE = _values(STRUCTURE)
