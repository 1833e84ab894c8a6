"""What the figures of an estimate rest on, in sentences for its reader."""

from .chip import NOTHING, Chip

ADC_LAW = {
    "doubling": "Energy and area of an ADC double with every bit above the technology's and halve "
    "with every bit below.",
    "linear": "Energy and area of an ADC are in proportion to its bits.",
    "table": "Energy, area and, where it says them, clocks of an ADC grow as in the technology's "
    "table by bits, in between in proportion in logarithms; one of fewer bits than the table's "
    "first costs as much as that.",
}
COLUMN_KINDS = {
    "differential": "Positive and negative weights lie in crossbars of their own, of w - 1 bits, "
    "whose ADCs' codes are subtracted.",
    "offset": "A weight is stored with an offset, in w bits; what the offset adds is subtracted.",
}
ADC_OF = {
    "crossbar": "Each crossbar's columns have ADCs of their own, and each is converted.",
    "pe": "The columns that lie in line in a PE are added before they are converted.",
}


CHARGED = {  # by Chip.costs
    "published": [
        "H-tree, fetch, neuron and tile buffer are charged once per PE cycle and group of PEs "
        "that hold the bit slices of the same weights; all of a PE's columns are converted, "
        "and whole crossbars are driven, however few of their cells hold weights.",
        "The stem is charged at every timestep, though software computes it once for a static "
        "image.",
        "A PE cycle gives one channel of one output pixel; a layer starts when every layer it "
        "waits for is 75 % done.",
        "Membranes, batch norm and leakage take no energy, as published; accumulators, batch "
        "norm's products and the residual stream no area.",
    ],
    "counted": [
        "Charged is what happens: driven cells that hold weights, conversions of columns that "
        "hold weights, sums that leave a PE, bits read and written, additions and products. "
        "Each costs what the technology says.",
        "Where every timestep reads the same image the stem runs once, and its sums are kept "
        "twice, in 25 bits: it begins with the next image while they are still read.",
        "A PE cycle takes one clock for currents to settle and, for each column that an ADC reads "
        "in turn, those of a conversion; all PEs of a layer work at once.",
        "Layers are pipelined: a layer starts a row of pixels when the rows that its kernel "
        "reads have arrived, timestep after timestep. The delay is one image's alone; frames a "
        "second and power are of image after image.",
        "A membrane is read and written at every update, in as many bits as it has; an input "
        "is written once and read at every kernel position. The residual stream is kept, in "
        "25 bits, while a block computes what is added to it, written and read at every "
        "timestep. Not charged: DRAM for inputs and results, the distribution of clocks, the count "
        "of driven rows that offset columns need, and the area of multipliers and LIF logic.",
        "Transistors leak by their area, as the technology says, and so do SRAM cells; the "
        "H-tree's wires do not, nor do other cells where the technology does not say so.",
    ],
}
SKIPPED = {  # by what Chip.skip names
    "rows": "Of a silent row, a bit inside of the plane that is no one, nothing is read from the "
    "tile buffer, as from cells whose read port discharges for a one alone; nothing drives a "
    "silent row in any case.",
    "patches": "A silent patch, an output pixel and input bit at which no row of the layer carries "
    "a one, converts nothing: of its cycle the clock is left in which that is seen, and neither "
    "ADCs, adders and temporary buffers nor fetch and H-tree work. A row of pixels takes its "
    "layer's average time.",
    "tiles": "A tile none of whose rows carries a one in a cycle converts nothing and moves no "
    "sums, but takes the time of the others. A tile holds PEs that read the same rows, and of as "
    "many in line as fit, as if each layer began a tile.",
}
NOC = {
    "free": "What it takes to bring spikes and sums from one layer's tiles to another's is not "
    "charged.",
    "mesh": "Tiles lie on a square mesh in the order of the layers. A bit takes a router for every "
    "tile between the middles of two layers' tiles: inputs from where the last of the layers lies "
    "that they come from, sums of the residual stream, of 25 bits, to there. Links are wide enough "
    "to take no time.",
}
NOT_SKIPPED = (
    "Seeing silence costs nothing. Inputs are written, sums normalized and membranes updated where "
    "nothing fires, too. What lies outside of the plane is charged as without skipping."
)
SILENCE = (
    "Silence is counted from recorded spikes where there are any ('silent patches' of the layers); "
    "else each bit is taken for a one with the layer's rate, independently of all others."
)
UPDATE = {  # what a LIF update costs, by Chip.costs
    "published": "A LIF update costs the same whatever its reset and leak, as published.",
    "counted": "The published LIF module is taken to reset to 0 and to leak by a shift. A soft "
    "reset takes an addition of 25 bits more at every update; a leak that is no power of two a "
    "product of the membrane's bits with as many; with a leak of 0 no membrane is kept.",
}
LOADS = [
    "The chip holds fewer weights than the network has. Layers that get theirs from DRAM share the "
    "PEs of the largest of them and run one after the other, by depth, each for all timesteps. "
    "When one is done the next is loaded, for every image anew: its crossbars are programmed all "
    "at once, row by row, a row in the time of one write, or as fast as DRAM gives the bits. The "
    "chip can begin with the next image when the last of them is done.",
    "What such layers read waits for them in DRAM, of all timesteps, written and read once; so do "
    "the sums of the residual stream, in 25 bits, that such layers, or others of their branch, add "
    "to. A row of pixels takes at least the time of its bits. The layers are chosen for the fewest "
    "bits, of weights and what waits.",
    "Every cell that holds part of a loaded weight is written, zeros too, once: several levels in "
    "a cell may take more pulses. DRAM that nobody reads takes nothing, nor do wires from its pins "
    "to the cells. Cells wear: they are written as often as there are images.",
]
COPIES = [
    "Copies of weights are put on the chip as long as they make the pipeline faster and the area "
    "given is not exceeded; copies compute pixels of a row side by side. The sensitivities are of "
    "a chip that holds every weight once."
]


def assumptions(chip: Chip) -> list[str]:
    """What the figures rest on, one sentence each."""
    return [
        f"Component figures are those of {chip.technology.label} ({chip.technology.title}), whose "
        "sources its file and a report give; nothing is measured on a chip.",
        *CHARGED[chip.costs],
        COLUMN_KINDS[chip.columns],
        ADC_OF[chip.adc_of],
        "Inputs are fed bit by bit, one PE cycle a bit: 1 bit for spikes, 8 for the image, the "
        "quantized stream's own width for a shortcut convolution.",
        "The linear layer runs once, on spike counts of ceil(log2(T*H*W + 1)) bits.",
        "The LIF module is charged once per update, after all input bits, and only behind layers "
        "whose sums update LIF neurons: not for shortcuts and the classifier, and as many pixels "
        "as the layer has where a pooling lies between.",
        UPDATE[chip.costs],
        "A stored weight of b bits takes ceil(b / cell bits) cells side by side in one crossbar, "
        "so a crossbar row of X cells holds the whole weights that fit into X; a PE's crossbars "
        "hold kernel positions and row groups of the same columns, as many as it has.",
        "The channel groups of a grouped or depthwise convolution are blocks: where several fit, "
        "they share a crossbar as blocks on its diagonal, else each has crossbars of its own, and "
        "never more than the same layer without groups.",
        "A layer that runs several times in a timestep has its weights on the chip once, and takes "
        "energy and time for every run.",
        "A layer's sums are shifted and added in an accumulator wide enough for the worst case; "
        "batch norm multiplies them by an integer scale, and its products are shifted onto the "
        "residual stream of 24 bits and a sign, 14 of them behind the point "
        "(models/integer_network.py).",
        *skipping(chip),
        NOC[chip.noc],
        f"{ADC_LAW[chip.adc_law]} Those of a crossbar grow with its cells.",
        *[f"Transistors ({chip.process}) leak as at {chip.celsius:g} °C."]
        * (chip.costs == "counted"),
        "Area counts an input buffer per layer and a membrane memory for every LIF neuron, with "
        "their own bit widths (the published tool: 22 bits, membranes of five layers).",
        "A full-precision checkpoint enters as fixed point of --full_precision_bits (weights, "
        "membranes, shortcut inputs, batch norm) on the same chip with the same ADCs, because "
        "crossbars hold no floating-point numbers: 16 bits, as ISAAC and PUMA build it (32 with "
        "--preset published), and other widths among the sensitivities. It is priced and not "
        "simulated: these ADCs would clip its sums, so one that keeps its accuracy costs more.",
        "The published ratios (N-Caltech101, against floating point) are printed as information "
        "only: the published tool ignores bit widths and 2.64 x 6.19 is not 14.85, so the authors' "
        "set-up cannot be recovered from them.",
    ]


def skipping(chip: Chip) -> list[str]:
    """What depends on spikes."""
    if chip.skip == NOTHING:
        return [
            "Only crossbar energy scales with the spike rate; where no rate was measured it is 1."
        ]
    return [*(text for name, text in SKIPPED.items() if chip.skips(name)), NOT_SKIPPED, SILENCE]
