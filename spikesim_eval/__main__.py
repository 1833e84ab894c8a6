"""python -m spikesim_eval report | compare | sweep | nonideal | compat: what a network costs on a
chip of memristor crossbars.

report estimates one network, compare several, sweep a grid of chips; nonideal runs a trained
network on crossbars that are not ideal; compat prints the figures of the published SpikeSim tool.
A mistake of the user gives one line and exit code 2.
"""

import argparse
import csv
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from display import picture_files, short_names, text_table
from runtime.command import Parser as CommandParser
from runtime.command import similar_path

from .compare import cheapest, compare, notes, tables
from .constants import PUBLISHED_RATIO
from .crossbar import LIMITS, Crossbar
from .estimate import CHOICES, Chip, check_cell
from .layers import InputError, Subject, check_number, load_layer_list, read_json, show
from .plots import compare_plot, svg, sweep_plot
from .published import estimate_published
from .quantities import RATIO_NAMES
from .report import (
    assumptions,
    build_report,
    check_folder,
    markdown_table,
    totals_text,
    write_files,
    write_report,
)
from .sweep import AXES, check_size, csv_text, front_lines, shown_front, sweep, variants


class Parser(CommandParser):
    mistake = InputError


def numbers(kind: type) -> Any:
    """A parser of lists such as 32,64,128."""

    def parse(text: str) -> list[float]:
        return [kind(part) for part in text.split(",")]

    parse.__name__ = f"comma-separated {kind.__name__} list"
    return parse


def adc_bits(text: str) -> int | None:
    return None if text == "ideal" else int(text)


CHIP_HELP = {
    "xbar_size": "crossbar side",
    "pe_per_tile": "PEs of a tile",
    "crossbars_per_pe": "crossbars of a PE",
    "cell_bits": "bits per cell",
    "adc_bits": "ADC resolution",
    "clk_mhz": "clock, MHz",
}
CHOICE_HELP = {
    "cell": "memory of a cell",
    "periphery": "charged once per group of PEs with the same weights' slices, or per PE",
    "delay": "a PE cycle gives one output channel of a pixel, or all of them",
    "adc_law": "an ADC's energy and area double with every bit above the published 4 and halve "
    "with every bit below, or are in proportion to the bits",
    "buffers": "inputs and membranes stored in as many bits as they have, or in the published 22",
}

CROSSBAR_HELP = {
    **{name: CHIP_HELP[name] for name in ("xbar_size", "cell_bits")},
    "columns": "differential or offset",
    "adc_range": "full: the ADC reaches to the largest possible sum; unit: a code is a cell step",
    "on_off_ratio": "conductance of a cell's highest level over its lowest",
    "sigma": "relative deviation of a cell's conductance; what would be negative is 0, so that "
    "the mean is larger (at 0.5 by 0.4 %%, at 1 by 8.3 %%)",
    "wire_ohm": "resistance of a wire from cell to cell",
    "on_ohm": "resistance of a cell at its lowest level above 0; at level L it is divided by L, so "
    "at the highest by 2^cell_bits - 1",
}


def add_option(
    parser: argparse.ArgumentParser, name: str, default: Any, text: str, **how: Any
) -> None:
    """An option whose help says its default."""
    (value,) = default if isinstance(default, list) else [default]
    shown = f"{value:g}" if isinstance(value, float) else value
    parser.add_argument(f"--{name}", default=default, help=f"{text} (default {shown})", **how)


def add_chip_options(parser: argparse.ArgumentParser, lists: bool = False) -> None:
    chip = Chip()
    for name, text in CHIP_HELP.items():
        value = getattr(chip, name)
        low, high, _ = LIMITS[name]
        text = f"{text}, {low} to {high}"
        if lists:
            kind, default, text = numbers(type(value)), [value], f"{text}: one, or a,b,c"
        else:
            kind, default = type(value), value
        add_option(parser, name, default, text, type=kind)
    for name, choices in CHOICES.items():
        add_option(parser, name, getattr(chip, name), CHOICE_HELP[name], choices=choices)


def build_parser() -> Parser:
    parser = Parser(prog="spikesim_eval", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)

    compat = commands.add_parser("compat", help="the published tool's figures, as JSON")
    compat.add_argument("case", help="JSON with in_ch, out_ch, in_dim, out_dim, xbar_size, ...")

    report = commands.add_parser("report", help="estimate a network", allow_abbrev=False)
    source = report.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", help="checkpoint of a training run")
    source.add_argument("--layers", help="layer list, see docs/layer_list.md")
    source.add_argument("--module", help="package.module:function that returns (network, sample)")
    report.add_argument("--baseline", help="checkpoint, or layer list (*.json), to compare with")
    report.add_argument("--time_steps", type=int, help="T, where it is not the trained one")
    report.add_argument("--bits", type=int, help="with --module: width of weights and membranes")
    add_chip_options(report)

    several = commands.add_parser("compare", help="networks against the first", allow_abbrev=False)
    several.add_argument("networks", nargs="+", help="checkpoints or layer lists (*.json)")
    acceptable = "points below the first that are acceptable"
    add_option(several, "max_drop", 1.0, acceptable, type=float)
    add_chip_options(several)

    grid = commands.add_parser("sweep", help="a whole grid of chips", allow_abbrev=False)
    grid.add_argument("--checkpoint", nargs="+", default=[], help="one or more")
    grid.add_argument("--layers", nargs="+", default=[], help="layer lists")
    grid.add_argument(
        "--bits",
        type=numbers(int),
        default=[],
        help="other numbers of bits too: a,b,c; layers with one of their own keep it",
    )
    grid.add_argument("--time_steps", type=numbers(int), default=[], help="other T too: a,b,c")
    grid.add_argument("--force", action="store_true", help="even above a million points")
    add_chip_options(grid, lists=True)

    nonideal = commands.add_parser("nonideal", help="on imperfect crossbars", allow_abbrev=False)
    nonideal.add_argument("--checkpoint", required=True, help="of a quantized network")
    nonideal.add_argument("--time_steps", type=int, help="T, where it is not the trained one")
    ideal = Crossbar()
    for name, text in CROSSBAR_HELP.items():
        value = getattr(ideal, name)
        add_option(nonideal, name, value, text, type=type(value))
    add_option(nonideal, "adc_bits", 4, "ADC resolution, or ideal", type=adc_bits)
    add_option(nonideal, "seed", 0, "of the draws", type=int)
    add_option(nonideal, "trials", 5, "draws of the cells, with --sigma", type=int)
    nonideal.add_argument(
        "--each_layer", action="store_true", help="also every layer alone on such crossbars"
    )
    for command in (report, several, grid, nonideal):
        command.add_argument("--data_path", help="data root: rates and accuracy are measured")
        command.add_argument("--out", required=True, help="folder for the results")
    return parser


def chip_of(args: argparse.Namespace) -> Chip:
    chip = Chip(**{name: getattr(args, name) for name in (*CHIP_HELP, *CHOICES)})
    check_cell(chip)
    return chip


def is_layer_list(path: str) -> bool:
    return path.lower().endswith(".json")


def subject_of(path: str, data_path: str | None) -> Subject:
    """A layer list where the name ends in .json, otherwise a checkpoint."""
    return listed(path) if is_layer_list(path) else traced(path, data_path)


def check_files(checkpoints: Sequence[str]) -> None:
    """Raise InputError for the first that is missing: before the others are read and measured."""
    for path in checkpoints:
        if not os.path.isfile(path):
            meant = similar_path(path)
            raise InputError(f"no such checkpoint: {path!r}{meant}")


def check_same_data(checkpoints: Sequence[str]) -> None:
    """Raise InputError where two were trained on other data: before any is measured."""
    paths = list(dict.fromkeys(checkpoints))
    if len(paths) < 2:
        return
    from load_settings import data_set_of, load_checkpoint
    from runtime.errors import UserError

    def data_of(path: str) -> dict[str, Any]:
        try:
            settings = load_checkpoint(path).settings
        except UserError as error:
            raise InputError(str(error)) from error
        data_set = data_set_of(settings)
        return {
            "data": settings.data,
            "image size": data_set.image_size,
            "classes": settings.classes or data_set.num_classes,
            "fold": settings.fold,
        }

    first = data_of(paths[0])
    for path in paths[1:]:
        for what, value in data_of(path).items():
            if value != first[what]:
                raise InputError(
                    f"{path} and {paths[0]} are not compared: {what} {show(value)} against "
                    f"{show(first[what])}"
                )


def listed(path: str, time_steps: int | None = None) -> Subject:
    return Subject(path, load_layer_list(path).at(time_steps=time_steps))


def traced(path: str, data_path: str | None, time_steps: int | None = None) -> Subject:
    """The network of a checkpoint; torch is needed here, and not for layer lists."""
    check_files([path])
    from runtime.errors import UserError

    from .trace import trace_checkpoint

    try:
        return trace_checkpoint(path, data_path, time_steps)
    except UserError as error:
        raise InputError(str(error)) from error


def reported(args: argparse.Namespace) -> Subject:
    """The network that `report` is about."""
    if args.module is None:
        if args.bits is not None:
            raise InputError("--bits goes with --module: a checkpoint or a list has its own")
        if args.layers is not None:
            return listed(args.layers, args.time_steps)
        return traced(args.checkpoint, args.data_path, args.time_steps)
    if args.time_steps is None or args.bits is None:
        raise InputError("--module needs --time_steps and --bits")
    from .trace import trace_module

    return trace_module(args.module, args.time_steps, args.bits)


def check_sources(args: argparse.Namespace, checkpoints: Sequence[str]) -> None:
    """Raise InputError for --data_path with nothing to measure, and for a missing checkpoint or one
    of other data than the first."""
    if args.data_path is not None and not checkpoints:
        raise InputError("--data_path measures spike rates of a checkpoint, and there is none")
    check_files(checkpoints)
    check_same_data(checkpoints)


def run_report(args: argparse.Namespace) -> None:
    chip = chip_of(args)
    checkpoints = [] if args.checkpoint is None else [args.checkpoint]
    if args.baseline is not None and not is_layer_list(args.baseline):
        checkpoints.append(args.baseline)
    check_sources(args, checkpoints)
    subject = reported(args)
    baseline = None if args.baseline is None else subject_of(args.baseline, args.data_path)
    report = build_report(subject, chip, baseline)
    write_report(args.out, report)
    print(totals_text(report))
    print(f"as a page, with plots: {Path(args.out) / 'report.html'}")


def run_compare(args: argparse.Namespace) -> None:
    chip = chip_of(args)
    check_number(args.max_drop, "max_drop", 0, 100)
    if len(args.networks) < 2:
        raise InputError("compare needs at least two networks, the first of them the baseline")
    check_sources(args, [path for path in args.networks if not is_layer_list(path)])
    subjects = [subject_of(path, args.data_path) for path in args.networks]
    rows, estimates = compare(subjects, chip)
    best = cheapest(rows, args.max_drop)
    points = "point" if args.max_drop == 1 else "points"
    choice = f"least EDAP within {args.max_drop:g} {points} of the baseline: "
    if all(row["drop_points"] is None for row in rows[1:]):
        choice += "not known, for want of accuracies"
    else:
        choice += "none" if best is None else best["network"]
    figures = ", ".join(f"{RATIO_NAMES[name]} {x.value}" for name, x in PUBLISHED_RATIO.items())
    published = f"published, times better than floating point (information only): {figures}"
    first = f"baseline: {subjects[0].name}"
    shown = tables(rows)
    found = notes(subjects)
    as_markdown = ["\n".join(markdown_table(header, cells)) for header, cells in shown]
    sentences = "\n".join(f"- {sentence}" for sentence in assumptions(chip))
    paragraphs = [f"{line}." for line in (*found, choice, published)]
    text = "\n\n".join([first, *as_markdown, *paragraphs, sentences]) + "\n"
    names = short_names([subject.name for subject in subjects])
    pictures = picture_files(compare_plot(names, estimates), "compare")
    write_files(args.out, {"compare.csv": dicts_as_csv(rows), "compare.md": text} | pictures)
    as_text = [line for table in shown for line in ["", *text_table(*table)]]
    print("\n".join([first, *as_text, "", *found, choice, published]))


def dicts_as_csv(rows: Sequence[dict[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def run_sweep(args: argparse.Namespace) -> None:
    axes = {name: getattr(args, name) for name in AXES}
    paths = [*args.checkpoint, *args.layers]
    if not paths:
        raise InputError("sweep needs --checkpoint or --layers")
    check_sources(args, args.checkpoint)
    options = max(1, len(args.bits)) * max(1, len(args.time_steps))
    points = check_size(len(paths) * options, axes, args.force)
    chip = Chip(**{name: getattr(args, name) for name in CHOICES})
    subjects = [traced(path, args.data_path) for path in args.checkpoint]
    subjects += [listed(path) for path in args.layers]
    try:
        columns = sweep(list(variants(subjects, args.bits, args.time_steps)), chip, axes)
        front = shown_front(columns)
        figure = sweep_plot(columns, front, {subject.name: subject.kind for subject in subjects})
        contents = {"sweep.csv": csv_text(columns), "sweep.svg": svg(figure)}
        contents |= picture_files(figure, "sweep")
    except MemoryError:
        raise InputError("the grid does not fit into memory: leave values out") from None
    write_files(args.out, contents)
    total, on_front = len(columns["pareto"]), columns["pareto"].sum()
    counted = "1 point" if total == 1 else f"{total} points"
    print(f"{counted}, {on_front} on the Pareto front of EDAP, area and accuracy")
    if total < points:
        print(f"{points - total} points left out: a weight has more cells than a crossbar row")
    print("\n".join(front_lines(columns, front)))
    if len(front) < on_front:
        print(f"{len(front)} of the front's {on_front} points, evenly; all of them: sweep.csv")
    for note in notes(subjects):
        print(note)
    if args.bits or args.time_steps:
        print("spike rates are those of the networks as trained, at every width and T")


def run_nonideal(args: argparse.Namespace) -> None:
    check_files([args.checkpoint])
    from runtime.errors import UserError

    from .nonideal import nonideal_report, nonideal_text

    crossbar = Crossbar(**{name: getattr(args, name) for name in (*CROSSBAR_HELP, "adc_bits")})
    try:
        report = nonideal_report(
            *(args.checkpoint, args.data_path, crossbar),
            *(args.seed, args.trials, args.each_layer, args.time_steps),
        )
    except UserError as error:
        raise InputError(str(error)) from error
    layers = dicts_as_csv(report["layers"])
    contents = {"nonideal.json": json.dumps(report, indent=2) + "\n", "nonideal.csv": layers}
    write_files(args.out, contents)
    print(nonideal_text(report))


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0, or 2 after one line on stderr for a mistake of the user."""
    runs = {
        "report": run_report,
        "compare": run_compare,
        "sweep": run_sweep,
        "nonideal": run_nonideal,
    }
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        # Units and names have letters that not every terminal has: µ, ², those of a file's name.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        args = build_parser().parse_args(argv)
        if args.command == "compat":
            print(json.dumps(estimate_published(read_json(args.case)), indent=2))
        else:
            check_folder(args.out)
            runs[args.command](args)
        sys.stdout.flush()
    except InputError as error:
        print("spikesim_eval: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except OSError as error:
        if error.filename is not None:
            raise
        # What is left to print, Python would try to print when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        print(f"spikesim_eval: error: cannot print ({error.strerror})", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
