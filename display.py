"""What a person sees: numbers with units, short names, one colour for one thing, pictures as files.

Everything that prints a quantity or draws goes through here, so that a terminal, a page and a
picture say the same. Files for programs (CSV, JSON) keep their plain numbers and units.
"""

import io
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import cycle
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what only prints numbers need not wait for matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Numbers and their units.

PREFIXES = dict(zip(range(-30, 33, 3), [*"qryzafpnµm", "", *"kMGTPEZYRQ"], strict=True))
# A square's prefix is squared too. A chip is read in mm², whatever its size; a part of it also in
# hundredths of one. (least value, one of the unit, its name), both in m².
AREAS = ((1.0, 1.0, "m²"), (1e-8, 1e-6, "mm²"), (0.0, 1e-12, "µm²"))


def prefixed(value: float, unit: str = "", digits: int = 3) -> tuple[float, str]:
    """(one of the unit that suits `value`, in `unit`; its name): (1e-3, "mJ") for 0.00123 and "J".

    The prefix is the one with which `value`, rounded to `digits` significant digits, lies from 1 to
    below 1000. Areas are given in "m²". 0, infinities and what is beyond all prefixes get none.
    """
    if value == 0 or not math.isfinite(value):
        return 1.0, unit
    rounded = f"{abs(value):.{digits - 1}e}"
    if unit == "m²":
        return next((one, name) for least, one, name in AREAS if float(rounded) >= least)
    exponent = int(rounded.split("e")[1]) // 3 * 3
    if exponent not in PREFIXES:
        return 1.0, unit
    return 10.0**exponent, PREFIXES[exponent] + unit


def significant(value: float, digits: int = 3) -> str:
    """`value` with so many significant digits, without an exponent from 1e-4 to below a million."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    rounded = f"{value:.{digits - 1}e}"
    exponent = int(rounded.split("e")[1])
    if not -4 <= exponent < 6:
        return rounded
    return f"{value:,.{max(0, digits - 1 - exponent)}f}"


def engineering(value: float, unit: str = "", digits: int = 3) -> str:
    """A quantity as a person reads it: "1.23 mJ" for 1.2345e-3 and "J", "11.2 M" for 11.2e6.

    Areas are given in "m²": "0.520 mm²" for 5.2e-7.
    """
    one, name = prefixed(value, unit, digits)
    return f"{significant(value / one, digits)} {name}".rstrip()


def run_at(time_window: int, trained: Sequence[int]) -> list[str]:
    """What a reader must know of figures at a T: nothing where the network was trained with that
    one alone."""
    if list(trained) == [time_window]:
        return []
    return [f"run at T {time_window} (trained at T {', '.join(map(str, trained))})"]


def trained_for(chip: str | None) -> list[str]:
    """What a reader must know of figures on a simulated chip: nothing where the network was trained
    for none."""
    return [] if chip is None else [f"trained for {chip}; here on the chip that the options say"]


def tested_on(test_images: int | None) -> list[str]:
    """What a reader must know of what was measured on some of the test images: nothing where it was
    on all."""
    if test_images is None:
        return []
    error = significant(50 / math.sqrt(test_images), 2)
    return [
        f"accuracies and spike rates are of {test_images} test images, the same draw for all: the "
        f"standard error of an accuracy is at most {error} points"
    ]


def percent(share: float, digits: int = 1) -> str:
    """A share as a person reads it: "66.7 %" for 2/3."""
    return f"{100 * share:.{digits}f} %"


# Names.

ENDINGS = (".pth", ".json")  # of checkpoints and layer lists


def printable(text: str) -> str:
    """In one line, for any terminal: names of files may hold control characters and bytes."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def short_names(paths: Sequence[str], width: int | None = None) -> list[str]:
    """A label for each path, all of them different: the file's name without its ending, and so many
    of the folders before it as tell it apart. A path that comes twice gets a number.

    No label is longer than `width` characters (at least 8), the end of a name is kept.
    """
    shown = list(map(printable, paths))
    parts = [PurePosixPath(_without_ending(path, shown)).parts for path in shown]
    used = dict.fromkeys(parts, 1)  # of each path's parts, from its end

    def label(path: tuple[str, ...]) -> str:
        return str(PurePosixPath(*path[-used[path] :]))

    while True:
        count = Counter(map(label, used))
        longer = [path for path in used if count[label(path)] > 1 and used[path] < len(path)]
        if not longer:
            break
        for path in longer:
            used[path] += 1
    labels: list[str] = []
    for name in map(label, parts):
        candidate, number = cut(name, width), 1
        while candidate in labels:
            number += 1
            suffix = f" ({number})"
            candidate = cut(name, width and width - len(suffix)) + suffix
        labels.append(candidate)
    return labels


def _without_ending(path: str, paths: Iterable[str]) -> str:
    """`path`, unless a.json and a.pth are both among `paths`."""
    ending = next((ending for ending in ENDINGS if path.endswith(ending)), "")
    bare = path.removesuffix(ending)
    return path if any(bare + other in paths for other in ENDINGS if other != ending) else bare


def cut(name: str, width: int | None) -> str:
    """The end of a name that is too long: there it differs from its neighbours."""
    return name if width is None or len(name) <= width else "…" + name[len(name) - width + 1 :]


# Tables in a terminal.

SCREEN = 100  # columns


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: columns of numbers to the right, others to the left."""
    lines = []
    for name, *cells in zip(header, *rows, strict=True):
        width = max(map(len, (name, *cells)))
        numbers = all(cell[0].isdigit() or cell[0] in "+-" for cell in cells if cell)
        align = str.rjust if numbers else str.ljust
        lines.append([align(cell, width) for cell in (name, *cells)])
    return ["  ".join(line).rstrip() for line in zip(*lines, strict=True)]


def room_for_names(header: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    """Columns of the SCREEN that a table leaves for one more column, at least 8."""
    return max(8, SCREEN - 2 - max(map(len, text_table(header, rows)), default=0))


# Colours. A test sees to it that all in a group differ for the colour-blind too.

COLOURS = {  # of networks, by how they were trained
    "teacher": "#666666",
    "student": "#E69F00",
    "MD-SNN": "#0072B2",  # CLK is the loss of MD-SNN
    "CLK": "#0072B2",
    "CL": "#009E73",
    "CLM": "#CC79A7",
}
OTHER_COLOURS = ("#D55E00", "#000000", "#56B4E9", "#F0E442")  # networks that are none of these
COMPONENT_COLOURS = {  # of a chip, for energy and for area
    "crossbar": "#332288",
    "adc": "#88CCEE",
    "mux": "#999933",
    "subtractor": "#882255",
    "neuron": "#AA4499",
    "htree": "#CC6677",
    "fetch": "#44AA99",
    "tile_buffer": "#DDCC77",
    "temp_buffer": "#117733",
    "input_buffer": "#DDDDDD",
    "membrane": "#000000",
    "shift_add": "#F0B40F",
    "batch_norm": "#4B4BF0",
    "kept_sums": "#9696F0",
    "leakage": "#4B1E00",
    "stream": "#C3FFC3",
    "router": "#9944CC",
    "dram": "#5A00B4",
    "cell_write": "#B40000",
}
COMPONENT_NAMES = {  # where the key is not the word
    "adc": "ADC",
    "dram": "DRAM",
    "htree": "H-tree",
    "stream": "residual stream",
}
LINES = ("-", "--", ":", "-.")
SHADING = "viridis"  # of matrices: equal steps for every eye, and in grey


def kind_of(paper_setting: str, loss: str) -> str:
    """The key in COLOURS of a run with these settings; a qamd run is named by its loss."""
    return {"original": "teacher", "student": "student"}.get(paper_setting, loss)


def styles(kinds: Sequence[str | None]) -> list[dict[str, str]]:
    """Colour and line of each network. `kinds` are keys of COLOURS, or any other names: one colour
    each, and each None has its own. Of equal ones the second and those after it have a lighter
    shade and another line."""
    named = [kind or f"\0{i}" for i, kind in enumerate(kinds)]
    others = list(dict.fromkeys(kind for kind in named if kind not in COLOURS))
    palette = COLOURS | dict(zip(others, cycle(OTHER_COLOURS), strict=False))
    colours = [palette[kind] for kind in named]
    found = []
    for i, colour in enumerate(colours):
        turn, total = colours[:i].count(colour), colours.count(colour)
        lighter = min(0.5 * turn, 0.55 * turn / (total - 1)) if turn else 0.0
        found.append({"color": _lighter(colour, lighter), "linestyle": LINES[turn % len(LINES)]})
    return found


def component_name(key: str) -> str:
    """A component of a chip as a person reads it: "tile buffer"."""
    return COMPONENT_NAMES.get(key, key.replace("_", " "))


def _lighter(colour: str, share: float) -> str:
    """So much of the way to white."""
    channels = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(c + share * (255 - c)):02X}" for c in channels)


# Pictures.


def new_figure(
    width: float, height: float, rows: int = 1, columns: int = 1, **shared: Any
) -> tuple["Figure", Any]:
    """A figure, in inches, and its panels as `plt.subplots` gives them; `shared` are its options
    (sharex, sharey, width_ratios …). It needs no screen, and nothing keeps it once written."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams |= {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "pdf.fonttype": 42,  # text that can be searched and edited
        "savefig.dpi": 150,
    }
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **shared)


def plain(name: str) -> str:
    """As matplotlib shows it unchanged: no mathematics, no hidden legend entry, no lone bytes."""
    text = name.encode(errors="backslashreplace").decode().replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def legend_beside(panel: "Axes", **options: Any) -> None:
    """The legend to the right of the panel, where it covers nothing."""
    options.setdefault("fontsize", 8)
    panel.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.5, **options)


def legend_below(figure: "Figure", panels: Iterable["Axes"], **options: Any) -> None:
    """One legend for all panels, below them: each label once, in the order of the panels."""
    handles: dict[str, Any] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    options.setdefault("ncols", len(handles))
    figure.legend(handles.values(), handles, loc="outside lower center", **options)


PICTURES = {"png": {"Software": None}, "pdf": {"CreationDate": None}}  # endings: metadata left out


def picture_files(figure: "Figure", stem: str) -> dict[str, bytes]:
    """The figure as contents of `stem`.png and `stem`.pdf; the same figure gives the same bytes."""
    contents = {}
    for ending, metadata in PICTURES.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format=ending, metadata=metadata)
        contents[f"{stem}.{ending}"] = buffer.getvalue()
    return contents


def save_picture(figure: "Figure", path: str | Path) -> None:
    """Write the figure to `path`, a .png, and beside it to a .pdf of the same name."""
    path = Path(path)
    for name, content in picture_files(figure, path.stem).items():
        path.with_name(name).write_bytes(content)
