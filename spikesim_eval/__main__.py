"""python -m spikesim_eval report | compare | sweep | nonideal | compat: what a network costs on a
chip of memristor crossbars.

report estimates one network, compare several, sweep a grid of chips; nonideal runs a trained
network on crossbars that are not ideal; compat prints the figures of the published SpikeSim tool.
A mistake of the user gives one line and exit code 2.
"""

import argparse
import io
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from display import picture_files, short_names, text_table
from runtime.command import Parser, run_command
from runtime.errors import UserError
from runtime.files import check_writable, write_files

from .chip import PRESETS, Chip
from .compare import choice, compare, notes, published_ratios, tables
from .layer_list import (
    MAX_BITS,
    Subject,
    check_int,
    check_number,
    load_layer_list,
    read_json,
)
from .plots import compare_plot, svg, sweep_plot
from .published import estimate_published
from .render import csv_text, markdown_table
from .report import assumptions, build_report, totals_text, write_report
from .sweep import AXES, check_size, front_lines, shown_front, sweep, sweep_csv, variants


def numbers(kind: type) -> Any:
    """A parser of lists such as 32,64,128."""

    def parse(text: str) -> list[float]:
        return [kind(part) for part in text.split(",")]

    parse.__name__ = f"comma-separated {kind.__name__} list"
    return parse


def adc_bits(text: str) -> int | None:
    return None if text == "ideal" else int(text)


def add_option(parser: Parser, name: str, default: Any, text: str, **how: Any) -> None:
    """An option whose help says its default."""
    (value,) = default if isinstance(default, list) else [default]
    shown = f"{value:g}" if isinstance(value, float) else value
    parser.add_argument(f"--{name}", default=default, help=f"{text} (default {shown})", **how)


def add_chip_options(parser: Parser, *parts: str, lists: bool = False) -> None:
    """The options that Chip declares of these parts; with `lists`, several values of each number.

    What is not given is the preset's.
    """
    if "price" in parts:
        text = "simulate the networks on the chip and give their accuracy there"
        parser.add_argument("--on_chip", action="store_true", help=text)
        text = "fixed-point width of a full-precision checkpoint (default 16; published: 32)"
        parser.add_argument("--full_precision_bits", type=int, help=text)
        text = "default: a chip that could be built; published: as the published tool charges"
        add_option(parser, "preset", "default", text, choices=PRESETS)
    for option in fields(Chip):
        default, about = option.default, option.metadata
        if about["part"] not in ("both", *parts):
            continue
        text, how = about["text"], {"type": type(default)}
        if about["reason"]:
            low, high = about["limits"]
            text += f", {low:g} to {high:g}"
        if about["choices"]:
            how = {"choices": about["choices"]}
        elif lists and option.name in AXES:
            how, text = {"type": numbers(type(default))}, f"{text}: one, or a,b,c"
        elif option.name == "adc_bits":
            how = {"type": adc_bits}
        shown = f"{default:g}" if isinstance(default, float) else default
        help = f"{text} (default {shown})"
        parser.add_argument(f"--{option.name}", default=argparse.SUPPRESS, help=help, **how)


def simulates(args: argparse.Namespace) -> bool:
    """Whether a chip is simulated; `nonideal` always does it."""
    return getattr(args, "on_chip", True)


def given(args: argparse.Namespace) -> dict[str, Any]:
    """The options of a chip that the command line and its preset say."""
    said = {x.name: getattr(args, x.name) for x in fields(Chip) if hasattr(args, x.name)}
    for x in fields(Chip):
        if x.name in said and x.metadata["part"] == "simulation" and not simulates(args):
            raise UserError(f"--{x.name} says how a chip is simulated: add --on_chip")
    return PRESETS[getattr(args, "preset", "default")] | said


def build_parser() -> Parser:
    parser = Parser(prog="spikesim_eval", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, run: Callable[[argparse.Namespace], None], text: str) -> Parser:
        command = commands.add_parser(name, help=text, allow_abbrev=False)
        command.set_defaults(run=run)
        return command

    compat = add("compat", run_compat, "the published tool's figures, as JSON")
    compat.add_argument("case", help="JSON with in_ch, out_ch, in_dim, out_dim, xbar_size, ...")

    report = add("report", run_report, "estimate a network")
    source = report.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", help="checkpoint of a training run")
    source.add_argument("--layers", help="layer list, see docs/layer_list.md")
    source.add_argument("--module", help="package.module:function that returns (network, sample)")
    report.add_argument("--baseline", help="checkpoint, or layer list (*.json), to compare with")
    report.add_argument("--time_steps", type=int, help="T, where it is not the trained one")
    report.add_argument("--bits", type=int, help="with --module: width of weights and membranes")
    add_chip_options(report, "price", "simulation")

    several = add("compare", run_compare, "networks against the first")
    several.add_argument("networks", nargs="+", help="checkpoints or layer lists (*.json)")
    acceptable = "points below the first that are acceptable"
    add_option(several, "max_drop", 1.0, acceptable, type=float)
    add_chip_options(several, "price", "simulation")

    grid = add("sweep", run_sweep, "a whole grid of chips")
    grid.add_argument("--checkpoint", nargs="+", default=[], help="one or more")
    grid.add_argument("--layers", nargs="+", default=[], help="layer lists")
    widths = "other numbers of bits too: a,b,c; layers with one of their own keep it"
    grid.add_argument("--bits", type=numbers(int), default=[], help=widths)
    grid.add_argument("--time_steps", type=numbers(int), default=[], help="other T too: a,b,c")
    grid.add_argument("--force", action="store_true", help="even above a million points")
    add_chip_options(grid, "price", "simulation", lists=True)

    nonideal = add("nonideal", run_nonideal, "on imperfect crossbars")
    nonideal.add_argument("--checkpoint", required=True, help="of a quantized network")
    nonideal.add_argument("--time_steps", type=int, help="T, where it is not the trained one")
    add_chip_options(nonideal, "simulation")
    alone = "also every layer alone on such crossbars"
    nonideal.add_argument("--each_layer", action="store_true", help=alone)
    for command in (report, several, grid, nonideal):
        add_option(command, "seed", 0, "of the draws of cells, with --sigma", type=int)
        add_option(command, "trials", 5, "draws of the cells, with --sigma", type=int)
        command.add_argument("--data_path", help="data root: rates and accuracy are measured")
        command.add_argument("--out", required=True, help="folder for the results")
    return parser


def as_list(value: Any) -> list[Any]:
    """A preset says one value of an axis, the command line a list."""
    return value if isinstance(value, list) else [value]


def is_layer_list(path: str) -> bool:
    return path.lower().endswith(".json")


def subject_of(path: str, args: argparse.Namespace) -> Subject:
    """A layer list where the name ends in .json, otherwise a checkpoint."""
    return listed(path) if is_layer_list(path) else traced(path, args)


def listed(path: str, time_steps: int | None = None) -> Subject:
    return Subject(path, load_layer_list(path).at(time_steps=time_steps))


def traced(path: str, args: argparse.Namespace, time_steps: int | None = None) -> Subject:
    """The network of a checkpoint. One of full precision gets the width that it has on a chip."""
    width = args.full_precision_bits
    if width is None:
        width = MAX_BITS if args.preset == "published" else 16
    check_int(width, "full_precision_bits", MAX_BITS, low=2)
    from .trace import trace_checkpoint  # needs torch, and layer lists do not

    subject = trace_checkpoint(path, args.data_path, time_steps)
    if subject.network.weight_bits < MAX_BITS:
        return subject
    return replace(subject, network=subject.network.at(width))


def reported(args: argparse.Namespace) -> Subject:
    """The network that `report` is about."""
    if args.module is None:
        if args.bits is not None:
            raise UserError("--bits goes with --module: a checkpoint or a list has its own")
        if args.layers is not None:
            return listed(args.layers, args.time_steps)
        return traced(args.checkpoint, args, args.time_steps)
    if args.time_steps is None or args.bits is None:
        raise UserError("--module needs --time_steps and --bits")
    from .module import trace_module

    return trace_module(args.module, args.time_steps, args.bits)


def simulated(subjects: Sequence[Subject], chip: Chip, args: argparse.Namespace) -> list[Subject]:
    """The networks with their accuracies on the chip, where --on_chip asks for them."""
    if not args.on_chip:
        return list(subjects)
    check_simulation(subjects, args)
    from .nonideal import on_chip

    found = []
    for subject in subjects:
        if subject.tested is not None:
            accuracies, _ = on_chip(subject, chip, args.seed, args.trials, subject.name)
            subject = replace(subject, chip_accuracies=accuracies)
        found.append(subject)
    return found


def check_simulation(subjects: Sequence[Subject], args: argparse.Namespace) -> None:
    """Raise UserError where --on_chip has nothing to run, or --trials and --seed make no sense."""
    from .nonideal import check_draws

    check_draws(args.seed, args.trials)
    if all(subject.tested is None for subject in subjects):
        raise UserError(
            "--on_chip runs checkpoints of quantized networks on their test data: there is none "
            "(--data_path says where the data lie)"
        )


def check_sources(args: argparse.Namespace, checkpoints: Sequence[str]) -> None:
    """Raise UserError for --data_path with nothing to measure, and, before any is measured, for a
    checkpoint of other data than the first."""
    if args.data_path is not None and not checkpoints:
        raise UserError("--data_path measures spike rates of a checkpoint, and there is none")
    if len(checkpoints) > 1:
        from .trace import check_same_data

        check_same_data(checkpoints)


def run_compat(args: argparse.Namespace) -> None:
    print(json.dumps(estimate_published(read_json(args.case)), indent=2))


def run_report(args: argparse.Namespace) -> None:
    chip = Chip(**given(args))
    checkpoints = [] if args.checkpoint is None else [args.checkpoint]
    if args.baseline is not None and not is_layer_list(args.baseline):
        checkpoints.append(args.baseline)
    check_sources(args, checkpoints)
    subject = reported(args)
    baseline = None if args.baseline is None else subject_of(args.baseline, args)
    subject, *baselines = simulated([x for x in (subject, baseline) if x], chip, args)
    report = build_report(subject, chip, *baselines)
    write_report(args.out, report)
    print(totals_text(report))
    print(f"as a page, with plots: {Path(args.out) / 'report.html'}")


def run_compare(args: argparse.Namespace) -> None:
    chip = Chip(**given(args))
    check_number(args.max_drop, "max_drop", 0, 100)
    if len(args.networks) < 2:
        raise UserError("compare needs at least two networks, the first of them the baseline")
    check_sources(args, [path for path in args.networks if not is_layer_list(path)])
    subjects = [subject_of(path, args) for path in args.networks]
    subjects = simulated(subjects, chip, args)
    rows, estimates = compare(subjects, chip)
    first, shown = f"baseline: {subjects[0].name}", tables(rows)
    lines = [*notes(subjects), choice(rows, args.max_drop), published_ratios()]
    as_markdown = ["\n".join(markdown_table(*table)) for table in shown]
    sentences = "\n".join(f"- {sentence}" for sentence in assumptions(chip))
    text = "\n\n".join([first, *as_markdown, *(f"{line}." for line in lines), sentences]) + "\n"
    as_csv = csv_text(rows[0], (row.values() for row in rows))
    names = short_names([subject.name for subject in subjects])
    pictures = picture_files(compare_plot(names, estimates), "compare")
    write_files(args.out, {"compare.csv": as_csv, "compare.md": text} | pictures)
    as_text = [line for table in shown for line in ["", *text_table(*table)]]
    print("\n".join([first, *as_text, "", *lines]))


def run_sweep(args: argparse.Namespace) -> None:
    options = given(args)
    axes = {name: as_list(options.pop(name)) for name in AXES if name in options}
    paths = [*args.checkpoint, *args.layers]
    if not paths:
        raise UserError("sweep needs --checkpoint or --layers")
    check_sources(args, args.checkpoint)
    variety = max(1, len(args.bits)) * max(1, len(args.time_steps))
    points = check_size(len(paths) * variety, axes, args.force)
    chip = Chip(**options)
    subjects = [traced(path, args) for path in args.checkpoint]
    subjects += [listed(path) for path in args.layers]
    try:
        if args.on_chip:
            check_simulation(subjects, args)
            draws = args.seed, args.trials
        else:
            draws = None
        columns = sweep(list(variants(subjects, args.bits, args.time_steps)), chip, axes, draws)
        front = shown_front(columns)
        figure = sweep_plot(columns, front, {subject.name: subject.kind for subject in subjects})
        contents = {"sweep.csv": sweep_csv(columns), "sweep.svg": svg(figure)}
        contents |= picture_files(figure, "sweep")
    except MemoryError:
        raise UserError("the grid does not fit into memory: leave values out") from None
    write_files(args.out, contents)
    total, on_front = len(columns["pareto"]), columns["pareto"].sum()
    counted = "1 point" if total == 1 else f"{total} points"
    if on_front:
        print(f"{counted}, {on_front} on the Pareto front of EDP, area and accuracy on the chip")
    else:
        print(f"{counted}, no Pareto front: the accuracy on these chips is not known (--on_chip)")
        print("the least EDAP of each network and ADC resolution:")
    if total < points:
        print(f"{points - total} points left out: a weight has more cells than a crossbar row")
    print("\n".join(front_lines(columns, front)))
    if on_front and len(front) < on_front:
        print(f"{len(front)} of the front's {on_front} points, evenly; all of them: sweep.csv")
    for note in notes(subjects, args.on_chip):
        print(note)
    if args.bits or args.time_steps:
        print("spike rates are those of the networks as trained, at every width and T")


def run_nonideal(args: argparse.Namespace) -> None:
    from .nonideal import nonideal_report, nonideal_text

    report = nonideal_report(
        *(args.checkpoint, args.data_path, Chip(**given(args))),
        *(args.seed, args.trials, args.each_layer, args.time_steps),
    )
    rows = report["layers"]
    contents = {
        "nonideal.json": json.dumps(report, indent=2) + "\n",
        "nonideal.csv": csv_text(rows[0], (row.values() for row in rows)),
    }
    write_files(args.out, contents)
    print(nonideal_text(report))


def work(argv: list[str] | None) -> None:
    args = build_parser().parse_args(argv)
    if "out" in args:
        check_writable(args.out, "--out")
    args.run(args)


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0, or 2 after one line on stderr for a mistake of the user."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        # Units and names have letters that not every terminal has: µ, ², those of a file's name.
        sys.stdout.reconfigure(errors="backslashreplace")
    return run_command("spikesim_eval", lambda: work(argv))


if __name__ == "__main__":
    sys.exit(main())
