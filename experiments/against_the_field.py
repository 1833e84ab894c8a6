"""The hardware estimate beside what others publish: NeuroSim's example, and measured macros.

    python -m experiments.against_the_field

prints each published figure, ours and our error, component by component where they publish it, as
the tables of docs/hardware.md. Ours are those of the technology files as they are: nothing is
fitted. What a file takes from the very source has a star: it checks how often things happen, and
not what they cost.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import fsum

from display import significant
from spikesim_eval.chip import Chip, chips
from spikesim_eval.estimate import Estimate, estimate
from spikesim_eval.layer_list import Layer, LayerList
from spikesim_eval.render import shown
from spikesim_eval.technology import presets

CONVERSION = ("adc", "mux")
KEYS = {"pJ": "energy_pj", "um^2": "area_um2", "mW": "leakage_mw"}
KEYS |= {"TOPS/W": "tops_per_watt", "TOPS/mm^2": "tops_per_mm2"}
POST_LAYOUT = 1.23  # what NeuroSim divides its efficiency by, and no other figure


@dataclass(frozen=True)
class Figure:
    """A published figure. `parts` are the components that we count for it, of energy (pJ), of area
    (um^2), or of the energy of all operations (TOPS/W); None: the whole chip's; () we have none.
    `times` is what the energies are scaled with."""

    name: str
    value: float
    unit: str
    parts: tuple[str, ...] | None = None
    taken: bool = False
    times: float = 1.0

    def ours(self, found: Estimate) -> float:
        if self.parts is None:
            return float(found.total[KEYS[self.unit]])
        of = found.area_by_component if self.unit == "um^2" else found.energy_by_component
        total = fsum(of[part] for part in self.parts) * self.times
        return found.total["ops"] / total if self.unit == "TOPS/W" else total

    def row(self, found: Estimate) -> str:
        key, ours = KEYS[self.unit], self.ours(found)
        error = f"{round(100 * (ours / self.value - 1)):+d} %" + " *" * self.taken
        cells = [self.name, shown(key, self.value, digits=3), "none", "-"]
        if self.parts != ():
            cells[2:] = [shown(key, ours, digits=3), error]
        return f"| {' | '.join(cells)} |"


@dataclass(frozen=True)
class Published:
    """What somebody publishes of a network on a chip, and the chip that is nearest to it."""

    title: str
    source: str
    network: LayerList
    chip: Chip
    figures: tuple[Figure, ...]


def layer(
    name: str, rows: int, columns: int, kernel: int, sides: tuple[int, int], bits: int, **more
) -> Layer:
    """A convolution from a plane of one side to one of another, of inputs that are no spikes."""
    before, behind = ((side, side) for side in sides)
    after = more.get("after", ())
    return Layer(name, kernel, rows, columns, before, behind, bits, after, lif=False)


def network(weight_bits: int, *layers: Layer) -> LayerList:
    return LayerList(1, weight_bits, 1, layers, ())


def vgg8() -> LayerList:
    """NeuroSim's example, of 8-bit weights and inputs (NetWork_VGG8.csv)."""
    sizes = [(3, 128, 3, 32), (128, 128, 3, 32), (128, 256, 3, 16), (256, 256, 3, 16)]
    sizes += [(256, 512, 3, 8), (512, 512, 3, 8), (8192, 1024, 1, 1), (1024, 10, 1, 1)]
    layers: list[Layer] = []
    for number, (rows, columns, kernel, side) in enumerate(sizes, 1):
        after = tuple(x.name for x in layers[-1:])
        layers.append(layer(f"layer{number}", rows, columns, kernel, (side, side), 8, after=after))
    return network(8, *layers)


def on(technology: str, **options) -> Chip:
    (chip,) = chips(technology=technology, **options)
    return chip


def neurosim() -> Published:
    interconnect, buffers = 8.94262e6, 412969.0
    return Published(
        "NeuroSim, VGG-8 of 8 bits, RRAM of 22 nm, on `neurosim-22nm`",
        "DNN+NeuroSim V1.3, its manual, figure 24, at commit 388f421",
        vgg8(),
        on("neurosim-22nm"),
        (
            Figure("energy", 3.77518e7 + 1.19011e6, "pJ"),
            Figure("ADC and array", 1.8274e7, "pJ", (*CONVERSION, "crossbar")),
            Figure("accumulation", 5.16853e6, "pJ", ("shift_add", "temp_buffer")),
            Figure("interconnect", interconnect, "pJ", ("htree",)),
            Figure("buffers", buffers, "pJ", ("tile_buffer", "input_buffer")),
            Figure("other periphery", 1.43092e7 - interconnect - buffers, "pJ", ("fetch",)),
            Figure("leakage", 1.19011e6, "pJ", ("leakage",), taken=True),
            Figure("area", 4.5554e7, "um^2"),
            Figure("array", 1.5408e6, "um^2", ("crossbar",)),
            Figure("ADC", 1.46062e7, "um^2", CONVERSION, taken=True),
            Figure("accumulation", 3.13322e6, "um^2", ("shift_add",), taken=True),
            Figure("interconnect", 6.17954e6, "um^2", ("htree",)),
            Figure(
                "other periphery",
                2.00943e7,
                "um^2",
                ("temp_buffer", "tile_buffer", "input_buffer", "subtractor"),
            ),
            Figure("leakage power", 0.628781, "mW", taken=True),
            Figure("efficiency, without its post-layout factor", 25.7176 * POST_LAYOUT, "TOPS/W"),
        ),
    )


def peak(title: str, technology: str, source: str, efficiency: float, density: float) -> Published:
    """A tile all of whose crossbars multiply weights and inputs of 16 bits."""
    chip = on(technology)
    rows = chip.xbar_size * chip.crossbars_per_pe
    columns = chip.xbar_size // int(chip.slices(16)) * chip.pe_per_tile
    return Published(
        f"{title}, all crossbars of a tile at work, weights and inputs of 16 bits, on "
        f"`{technology}`",
        source,
        network(16, layer("tile", rows, columns, 1, (1, 1), 16)),
        chip,
        (
            Figure("efficiency", efficiency, "TOPS/W", taken=True),
            Figure("density", density, "TOPS/mm^2", taken=True),
        ),
    )


def jia(adc_law: str) -> Published:
    """2304 rows of 256 columns, one bit a cell: nine crossbars of 256 x 256 whose columns add."""
    columns = 256
    return Published(
        "Jia et al., SRAM of 65 nm at 1.2 V, weights and inputs of one bit, outputs of 8, on "
        f"`spikesim-65nm-sram`, `--adc_law {adc_law}`",
        "JSSC 55(9), 2020, tables I and II and figure 11, by CiMLoop's jia_jssc_2020/_tests.py at "
        "commit d6e1390",
        network(1, layer("macro", 256, columns, 3, (3, 1), 1)),
        on(
            "spikesim-65nm-sram",
            **{"xbar_size": 256, "columns": "offset", "adc_of": "pe", "adc_bits": 8},
            **{"columns_per_adc": 1, "pe_per_tile": 1, "adc_law": adc_law},
        ),
        (
            Figure("ADC", 3.56 * columns, "pJ", CONVERSION),
            Figure("array", 20.4 * columns, "pJ", ("crossbar",)),
            Figure("digital datapath", 14.7 * columns, "pJ", ("shift_add", "temp_buffer")),
            Figure("efficiency, ADC and array", 192.0, "TOPS/W", (*CONVERSION, "crossbar")),
            Figure("ADC", 0.497e6, "um^2", CONVERSION),
            Figure("array", 2.91e6, "um^2", ("crossbar",)),
            Figure("digital datapath", 0.497e6, "um^2", ("shift_add", "subtractor")),
        ),
    )


# Energies at 130 nm and 1.3 V over those at 65 nm and 1.1 V (Stillmaker and Baas 2017).
TIMES_130 = (7.171 * 1.3**2 - 6.709 * 1.3 + 2.904) / (3.755 * 1.1**2 - 4.398 * 1.1 + 1.975)


def wan(
    input_bits: int,
    adc_bits: int,
    efficiency: float,
    fj_per_op: tuple[float, ...],
    adc_law: str = "doubling",
) -> Published:
    """256 rows of 128 weights of 4 bits, each in two cells."""
    rows, weights = 256, 128
    wordlines, neurons, inputs = (x * 2 * rows * weights * 1e-3 for x in fj_per_op)
    digital = (*CONVERSION, "temp_buffer", "shift_add")
    every = (*digital, "crossbar")
    return Published(
        f"Wan et al., RRAM of 130 nm, weights of 4 bits, inputs of {input_bits}, outputs of "
        f"{adc_bits}, on `spikesim-65nm`, `--adc_law {adc_law}`",
        "Nature 608, 2022, energy and efficiency over bits, by CiMLoop's wan_nature_2022/_tests.py "
        "at commit d6e1390",
        network(4, layer("macro", rows, weights, 1, (1, 1), input_bits)),
        on(
            "spikesim-65nm",
            **{"xbar_size": 256, "adc_bits": adc_bits, "columns_per_adc": 1, "pe_per_tile": 1},
            adc_law=adc_law,
        ),
        (
            Figure("neurons (ADC and control)", neurons, "pJ", digital),
            Figure("input pulses", inputs, "pJ", ("crossbar",)),
            Figure("word lines", wordlines, "pJ", ()),
            Figure("efficiency", efficiency, "TOPS/W", every),
            Figure("efficiency, ours at 130 nm", efficiency, "TOPS/W", every, times=TIMES_130),
        ),
    )


def hermes() -> Published:
    """A core of 256 x 256 weights, each in cells of both signs, with an ADC for every column; its
    inputs of 8 bits are pulses of 8 bits' length, so that it converts once."""
    side = 256
    every = (*CONVERSION, "temp_buffer", "shift_add", "crossbar")
    return Published(
        "HERMES, PCM of 14 nm, inputs and outputs of 8 bits, on `spikesim-65nm-pcm`, "
        "`--adc_law table`",
        "Khaddam-Aljameh et al., JSSC 57(4), 2022, abstract; a chip of 64 cores: Le Gallo et al., "
        "Nature Electronics 6, 2023, abstract, one-phase mode",
        network(5, layer("core", side, side, 1, (1, 1), 8)),
        on(
            "spikesim-65nm-pcm",
            **{"xbar_size": side, "adc_bits": 8, "columns_per_adc": 1, "pe_per_tile": 1},
            adc_law="table",
        ),
        (
            Figure("efficiency of a core", 10.5, "TOPS/W", every),
            Figure("efficiency of the chip of 64", 9.76, "TOPS/W", every),
        ),
    )


def published() -> tuple[Published, ...]:
    return (
        neurosim(),
        peak(
            "ISAAC",
            "isaac-32nm",
            "ISCA 2016, table I: 41.3 TOPS, 65.8 W and 85.4 mm² of 168 tiles, as Aguirre et al., "
            "Nature Communications 15, 2024, table 3, have it",
            *(41.3 / 65.8, 41.3 / 85.4),
        ),
        peak("PUMA", "puma-32nm", "ASPLOS 2019, abstract", 0.837, 0.577),
        *(jia(law) for law in ("doubling", "linear", "table")),
        wan(1, 3, 43.07875866, (8.99015248, 10.6186848, 3.446220545)),
        *(
            wan(4, 6, 15.95409517, (21.75617998, 29.1084171, 11.50740478), law)
            for law in ("doubling", "table")
        ),
        hermes(),
    )


def adc_growth() -> str:
    """What four bits more cost an ADC, by our laws and by others'."""

    def growth(law: str, technology: str = "spikesim-65nm") -> str:
        four, eight = (
            on(technology, adc_law=law, adc_bits=bits).adc_scale("energy") for bits in (4, 8)
        )
        return significant(eight / four)

    return (
        f"An 8-bit conversion over a 4-bit one: {growth('doubling')} by `--adc_law doubling`, "
        f"{growth('linear')} by `linear`; by `table` {growth('table')} on `spikesim-65nm` "
        "(NeuroSim's formula of successive approximation at 65 nm, SarADC.cpp), "
        f"{growth('table', 'isaac-32nm')} on `isaac-32nm` (what Accelergy makes of ISAAC's ADC, "
        f"isaac_adc.csv), {growth('table', 'neurosim-22nm')} on `neurosim-22nm` (comparators)."
    )


def lines() -> Iterator[str]:
    for about in published():
        found = estimate(about.network, about.chip)
        yield f"**{about.title}** ({about.source}):\n"
        yield "| | published | ours | error |"
        yield "|---|---|---|---|"
        yield from (figure.row(found) for figure in about.figures)
        yield ""
    efficiencies = (
        f"`{name}` {significant(estimate(vgg8(), on(name)).total['tops_per_watt'])}"
        for name in presets()
    )
    yield (
        f"VGG-8 on every preset, TOPS/W: {', '.join(efficiencies)}; NeuroSim, of its own RRAM, "
        f"25.7, divided by its factor of {POST_LAYOUT:g}."
    )
    yield ""
    yield adc_growth()


if __name__ == "__main__":
    print("\n".join(lines()))
