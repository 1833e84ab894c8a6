"""python -m spikesim_eval report | compare | sweep | nonideal | technologies | compat: what a
network costs on a chip of memristor crossbars.

report estimates one network, compare several, sweep a grid of chips; nonideal runs a trained
network on crossbars that are not ideal, as made and calibrated; technologies lists what chips are
made of; compat prints the figures of the published SpikeSim tool.
A mistake of the user gives one line and exit code 2.
"""

import argparse
import io
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from display import PICTURES, picture_files, short_names, tested_on, text_table
from runtime.command import Parser, run_command
from runtime.errors import UserError
from runtime.files import check_writable, write_files

from .assumptions import assumptions
from .chip import OPTIONS, PRESETS, Chip, Draws, about_option, check_layers, options_of
from .compare import check_same_classes, choice, compare, notes, published_ratios, tables
from .estimate import estimate
from .layer_list import (
    FULL_PRECISION_BITS,
    MAX_BITS,
    Subject,
    check_int,
    check_number,
    load_layer_list,
    read_json,
)
from .plots import accuracy_plot, compare_plot, svg, sweep_plot
from .presets import technology_rows, technology_tables, value_table
from .published import estimate_published
from .render import Section, csv_text, markdown, options_section, page
from .report import build_report, totals_text, write_report
from .sweep import (
    AXES,
    cheapest_lines,
    check_size,
    front_table,
    front_text,
    grid_of,
    shown_front,
    sweep,
    sweep_csv,
    variants,
)
from .technology import BY_HAND, DEFAULT, load_technology, presets
from .technology_keys import KEYS, OF_OPTIONS


def numbers(kind: type) -> Any:
    """A parser of lists such as 32,64,128."""

    def parse(text: str) -> list[float]:
        return [kind(part) for part in text.split(",")]

    parse.__name__ = f"comma-separated {kind.__name__} list"
    return parse


def adc_bits(text: str) -> int | str | None:
    return None if text == "ideal" else text if text == "auto" else int(text)


def key_and_number(text: str) -> tuple[str, int | float | str]:
    """What --set says: adc.energy_pj=1.5 or cell.kind=SRAM."""
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--set wants a key and a value, as adc.energy_pj=1.5, got {text!r}")
    for kind in (int, float):
        with suppress(ValueError):
            return key, kind(value)
    return key, value


def add_option(parser: Parser, name: str, value: Any, text: str, **how: Any) -> None:
    """An option whose help says its default `value`."""
    shown = f"{value:g}" if isinstance(value, float) else str(value)
    how = {"default": value, "help": f"{text} (default {shown})"} | how
    parser.add_argument(f"--{name}", **how)


def add_chip_options(parser: Parser, *parts: str, lists: bool = False) -> None:
    """The options that Chip declares of these parts; with `lists` several values of a number."""
    if "price" in parts:
        text = "simulate the networks on the chip and give their accuracy there"
        parser.add_argument("--on_chip", action="store_true", help=text)
        text = "width of a full-precision checkpoint, 2 to 32 (default 16; published: 32)"
        parser.add_argument("--full_precision_bits", type=int, help=text)
        text = "default: a chip that could be built; published: as the published tool charges"
        add_option(parser, "preset", "default", text, choices=PRESETS)
    add_set(parser)
    for option in fields(Chip):
        default, about = option.default, option.metadata
        if about["part"] not in ("both", *parts):
            continue
        text, how = about_option(option), {"type": type(default)}
        if option.name == "technology":
            how = {"type": load_technology}
        elif about["choices"]:
            how = {"choices": about["choices"]}
        elif lists and option.name in AXES:
            how, text = {"type": numbers(type(default))}, f"{text}: one, or a,b,c"
        elif option.name == "adc_bits":
            how = {"type": adc_bits}
            text += ", or auto: the fewest within --max_drop" if "price" in parts else ", or ideal"
        if option.name in OF_OPTIONS:
            text += ", by default the technology's"
        how["default"] = argparse.SUPPRESS  # what is not given may be the preset's
        add_option(parser, option.name, default, text, **how)


def add_set(parser: Parser) -> None:
    text = "one value of the technology, as adc.energy_pj=1.5; again for another"
    parser.add_argument("--set", action="append", type=key_and_number, default=[], help=text)


def add_data_options(parser: Parser) -> None:
    parser.add_argument("--data_path", help="data root: rates and accuracy are measured")
    text = "test images that are drawn to measure on (default: all), always the same"
    parser.add_argument("--test_images", type=int, help=text)


def set_by_hand(args: argparse.Namespace) -> dict[str, int | float | str]:
    """What --set says, each value once. Raises UserError."""
    said = dict(args.set)
    if len(said) < len(args.set):
        keys = [key for key, _ in args.set]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise UserError(f"--set says {twice} twice: leave one of them out")
    return said


def simulates(args: argparse.Namespace) -> bool:
    """Whether a chip is simulated; `nonideal` always does it."""
    return getattr(args, "on_chip", True)


def given(args: argparse.Namespace) -> dict[str, Any]:
    """The options of a chip that the command line and its preset say. Raises UserError for what is
    wrong with them, or with how a chip is simulated."""
    Draws(args.seed, args.trials)  # or an error
    if getattr(args, "full_precision_bits", None) is not None:
        check_int(args.full_precision_bits, "full_precision_bits", MAX_BITS, low=2)
    said = {x.name: getattr(args, x.name) for x in fields(Chip) if hasattr(args, x.name)}
    for x in fields(Chip):
        if x.name in said and x.metadata["part"] == "simulation" and not simulates(args):
            raise UserError(f"--{x.name} says how a chip is simulated: add --on_chip")
    technology = said.pop("technology", DEFAULT)
    if changed := set_by_hand(args):
        technology = technology.with_values(changed)
    for key in changed:
        option = OPTIONS.get(KEYS[key].option)
        is_simulated = KEYS[key].model or (option and option.metadata["part"] == "simulation")
        if is_simulated and not simulates(args):
            raise UserError(f"--set {key} says how a chip is simulated: add --on_chip")
    defaults = options_of(technology) if technology is not DEFAULT else {}
    return defaults | PRESETS[getattr(args, "preset", "default")] | said


def add_sweep(grid: Parser) -> None:
    grid.add_argument("--checkpoint", nargs="+", default=[], help="one or more")
    grid.add_argument("--layers", nargs="+", default=[], help="layer lists")
    widths = "other numbers of bits too: a,b,c; layers with one of their own keep it"
    grid.add_argument("--bits", type=numbers(int), default=[], help=widths)
    grid.add_argument("--time_steps", type=numbers(int), default=[], help="other T too: a,b,c")
    own = (
        "points below its own accuracy that a network may lose on the cheapest chip, with --on_chip"
    )
    add_option(grid, "max_drop", 1.0, own, type=float)
    grid.add_argument("--force", action="store_true", help="even above a million points")
    add_chip_options(grid, "price", "simulation", lists=True)


def add_technologies(known: Parser) -> None:
    known.add_argument("technologies", nargs="*", help="presets or files (default: every preset)")
    add_set(known)
    priced = known.add_mutually_exclusive_group()
    priced.add_argument("--checkpoint", help="of a network that is priced on each")
    priced.add_argument("--layers", help="layer list of such a network")
    known.add_argument("--on_chip", action="store_true", help="and its accuracy on each chip")
    add_data_options(known)
    known.add_argument("--out", help="folder for technologies.csv and .md, with all values")
    known.set_defaults(full_precision_bits=None, preset="default")


def add_nonideal(nonideal: Parser) -> None:
    of = "of a quantized network; more of the same data beside it"
    nonideal.add_argument("--checkpoint", nargs="+", required=True, help=of)
    nonideal.add_argument("--time_steps", type=int, help="T, where it is not the trained one")
    add_chip_options(nonideal, "simulation")
    alone = "also every layer alone on such crossbars, of as many chips"
    nonideal.add_argument("--each_layer", action="store_true", help=alone)
    strengths = "also at other values of an option of its cells, as sigma=0.05,0.1,0.2"
    nonideal.add_argument("--over", help=strengths)
    changes = (
        "also on chips with one ADC bit more (everywhere, and in the layer that clips most), one "
        "cell bit less, other columns, half the side"
    )
    nonideal.add_argument("--each_change", action="store_true", help=changes)
    good = "points of its own accuracy that a network may lose on a chip that counts as good"
    add_option(nonideal, "max_drop", 1.0, good, type=float)
    same = "accuracy in % that it needs there instead, the same bar for all networks"
    nonideal.add_argument("--at_least", type=float, metavar="PERCENT", help=same)
    again = "accuracy and yield also of calibrated chips, each with so many training images (64)"
    nonideal.add_argument("--calibrate", nargs="?", type=int, const=64, metavar="N", help=again)


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
    lost = "points of a network's accuracy that --adc_bits auto may lose"
    add_option(report, "max_drop", 1.0, lost, type=float)
    report.add_argument("--baseline", help="checkpoint, or layer list (*.json), to compare with")
    report.add_argument("--time_steps", type=int, help="T, where it is not the trained one")
    copies = (
        "area of the chip, filled with the copies of weights that make the pipeline fastest; what "
        "does not fit comes from DRAM"
    )
    report.add_argument("--area_mm2", type=float, help=copies)
    report.add_argument("--bits", type=int, help="with --module: width of weights and membranes")
    add_chip_options(report, "price", "simulation")

    several = add("compare", run_compare, "networks against the first")
    several.add_argument("networks", nargs="+", help="checkpoints or layer lists (*.json)")
    several.add_argument("--time_steps", type=int, help="T of all, where it is not the trained one")
    acceptable = f"points below the first that are acceptable, and {lost}"
    add_option(several, "max_drop", 1.0, acceptable, type=float)
    add_chip_options(several, "price", "simulation")

    grid = add("sweep", run_sweep, "a whole grid of chips")
    add_sweep(grid)

    add_technologies(add("technologies", run_technologies, "what chips are made of, and cost"))

    nonideal = add("nonideal", run_nonideal, "on imperfect crossbars")
    add_nonideal(nonideal)
    for command in (report, several, grid, nonideal):
        add_option(command, "seed", 0, "of what is random in cells", type=int)
        add_option(command, "trials", 5, "chips that are drawn, where cells are random", type=int)
        add_data_options(command)
        command.add_argument("--out", required=True, help="folder for the results")
    return parser


def files_of_pictures(*stems: str) -> list[str]:
    """Files of pictures that not every run of a command draws."""
    return [f"{stem}.{ending}" for stem in stems for ending in PICTURES]


def as_list(value: Any) -> list[Any]:
    """A preset says one value of an axis, the command line a list."""
    return value if isinstance(value, list) else [value]


def is_layer_list(path: str) -> bool:
    return path.lower().endswith(".json")


def subject_of(
    path: str, args: argparse.Namespace, chip: Chip, time_steps: int | None = None
) -> Subject:
    """A layer list where the name ends in .json, otherwise a checkpoint."""
    if is_layer_list(path):
        return listed(path, time_steps)
    return traced(path, args, chip, time_steps)


def listed(path: str, time_steps: int | None = None) -> Subject:
    return Subject(path, load_layer_list(path).at(time_steps=time_steps))


def traced(
    path: str, args: argparse.Namespace, chip: Chip, time_steps: int | None = None
) -> Subject:
    """The network of a checkpoint, what is silent in the tiles of the chip or of a grid of them.
    One of full precision gets the width that it has on a chip."""
    width = args.full_precision_bits
    if width is None:
        width = MAX_BITS if args.preset == "published" else FULL_PRECISION_BITS
    from .trace import trace_checkpoint  # needs torch, and layer lists do not

    subject = trace_checkpoint(path, args.data_path, time_steps, chip, args.test_images)
    if subject.network.weight_bits < MAX_BITS:
        return subject
    return replace(subject, network=subject.network.at(width))


def reported(args: argparse.Namespace, chip: Chip) -> Subject:
    """The network that `report` is about."""
    if args.module is None:
        if args.bits is not None:
            raise UserError("--bits goes with --module: a checkpoint or a list has its own")
        if args.layers is not None:
            return listed(args.layers, args.time_steps)
        return traced(args.checkpoint, args, chip, args.time_steps)
    if args.time_steps is None or args.bits is None:
        raise UserError("--module needs --time_steps and --bits")
    from .module import trace_module

    return trace_module(args.module, args.time_steps, args.bits)


def chip_of(args: argparse.Namespace) -> Chip:
    """The chip that the options say; with --adc_bits auto it has the default's until `simulated`
    has found its own."""
    options = given(args)
    if options.get("adc_bits", 0) is None:
        raise UserError("an ideal ADC has no price: adc_bits must be a number")
    if options.get("adc_bits") == "auto":
        if options.get("layer_adc_bits"):
            raise UserError("--adc_bits auto finds the layers' bits: leave --layer_adc_bits out")
        if not args.on_chip:
            raise UserError("--adc_bits auto simulates the networks: add --on_chip")
        options["adc_bits"] = OPTIONS["adc_bits"].default
        if options.get("adc_law") == "table":
            technology = options.get("technology", DEFAULT)
            technology.check_adc_bits(1)
            options["adc_bits"] = min(options["adc_bits"], technology.most_adc_bits)
    return Chip(**options)


def about_chip(chip: Chip, args: argparse.Namespace) -> dict[str, Any]:
    """The options of a chip that is priced, and perhaps simulated."""
    more = chip.options("simulation") | {"seed": args.seed, "trials": args.trials}
    return chip.options("price") | (more if args.on_chip else {})


def simulated(
    subjects: Sequence[Subject], chip: Chip, args: argparse.Namespace
) -> tuple[list[Subject], Chip]:
    """The networks with their accuracies on the chip, where --on_chip asks for them, and the chip,
    with --adc_bits auto of the smallest ADCs that serve all of them."""
    check_layers(chip, (subject.network for subject in subjects))
    if not args.on_chip:
        return list(subjects), chip
    check_simulation(subjects, args)
    for subject in subjects:  # what cannot be priced is not simulated
        estimate(subject.network, chip, getattr(args, "area_mm2", None))
    from .nonideal import most_clipped, on_chip, smallest_adcs

    draws = Draws(args.seed, args.trials)
    tested = [subject for subject in subjects if subject.tested is not None]
    if given(args).get("adc_bits") == "auto":
        chip = smallest_adcs(tested, chip, args.max_drop, draws)
    found = []
    for subject in subjects:
        if subject.tested is not None:
            accuracies, runs = on_chip(subject, chip, draws.numbers, subject.name)
            subject = replace(subject, chip_accuracies=accuracies, clipped=most_clipped(runs))
        found.append(subject)
    return found, chip


def check_simulation(subjects: Sequence[Subject], args: argparse.Namespace) -> None:
    """Raise UserError where --on_chip has nothing to run."""
    if all(subject.tested is None for subject in subjects):
        raise UserError(
            "--on_chip runs checkpoints of quantized networks on their test data: there is none "
            "(--data_path says where the data lie)"
        )


def check_sources(args: argparse.Namespace, checkpoints: Sequence[str]) -> None:
    """Raise UserError for data with nothing to measure, and, before any is measured, for a
    checkpoint of other data than the first."""
    for name in ("data_path", "test_images"):
        if getattr(args, name) is not None and not checkpoints:
            raise UserError(f"--{name} measures spike rates of a checkpoint, and there is none")
    if len(checkpoints) > 1:
        from .trace import check_same_data

        check_same_data(checkpoints)


def run_compat(args: argparse.Namespace) -> None:
    print(json.dumps(estimate_published(read_json(args.case)), indent=2))


def run_report(args: argparse.Namespace) -> None:
    chip = chip_of(args)
    check_number(args.max_drop, "max_drop", 0, 100)
    if args.area_mm2 is not None:
        check_number(args.area_mm2, "area_mm2", 0, 1e6)
    checkpoints = [] if args.checkpoint is None else [args.checkpoint]
    if args.baseline is not None and not is_layer_list(args.baseline):
        checkpoints.append(args.baseline)
    check_sources(args, checkpoints)
    subject = reported(args, chip)
    baseline = None if args.baseline is None else subject_of(args.baseline, args, chip)
    if baseline is not None:
        check_same_classes(subject, baseline)
    (subject, *baselines), chip = simulated([x for x in (subject, baseline) if x], chip, args)
    baseline = baselines[0] if baselines else None
    report = build_report(subject, chip, baseline, args.area_mm2)
    write_report(args.out, report, subject.network)
    print(totals_text(report))
    print(f"as a page, with plots: {Path(args.out) / 'report.html'}")


def run_compare(args: argparse.Namespace) -> None:
    chip = chip_of(args)
    check_number(args.max_drop, "max_drop", 0, 100)
    if len(args.networks) < 2:
        raise UserError("compare needs at least two networks, the first of them the baseline")
    check_sources(args, [path for path in args.networks if not is_layer_list(path)])
    subjects = [subject_of(path, args, chip, args.time_steps) for path in args.networks]
    for subject in subjects[1:]:
        check_same_classes(subject, subjects[0])
    subjects, chip = simulated(subjects, chip, args)
    rows, estimates = compare(subjects, chip)
    first, (figures, better) = f"baseline: {subjects[0].name}", tables(rows)
    lines = [*notes(subjects), choice(rows, args.max_drop), published_ratios()]
    sections = [
        Section(first, [f"{line}." for line in lines], *figures),
        Section("Times better than the baseline", [], *better),
        options_section("Chip", about_chip(chip, args)),
        Section("Assumptions", assumptions(chip)),
    ]
    names = short_names([subject.name for subject in subjects])
    figure = compare_plot(names, [vars(found) for found in estimates])
    contents = {
        "compare.csv": csv_text(rows[0], (row.values() for row in rows)),
        "compare.md": markdown("Comparison", sections),
        "compare.html": page("Comparison", sections, {"By component": svg(figure)}),
    }
    write_files(args.out, contents | picture_files(figure, "compare"))
    as_text = [line for table in (figures, better) for line in ["", *text_table(*table)]]
    print("\n".join([first, *as_text, "", *lines]))


def run_sweep(args: argparse.Namespace) -> None:
    options = given(args)
    axes = {name: as_list(options.pop(name)) for name in AXES if name in options}
    if "cell_bits" in axes:  # of a technology whose cells hold no others
        options["cell_bits"] = axes["cell_bits"][0]
    paths = [*args.checkpoint, *args.layers]
    if not paths:
        raise UserError("sweep needs --checkpoint or --layers")
    check_sources(args, args.checkpoint)
    check_number(args.max_drop, "max_drop", 0, 100)
    variety = max(1, len(args.bits)) * max(1, len(args.time_steps))
    points = check_size(len(paths) * variety, axes, args.force)
    chip = Chip(**options)
    grid = grid_of(chip, axes)
    subjects = [traced(path, args, grid) for path in args.checkpoint]
    subjects += [listed(path) for path in args.layers]
    check_layers(chip, (subject.network for subject in subjects))
    draws = None
    if args.on_chip:
        check_simulation(subjects, args)
        draws = Draws(args.seed, args.trials)
    try:
        columns = sweep(list(variants(subjects, args.bits, args.time_steps)), chip, axes, draws)
        front = shown_front(columns)
        kinds = {subject.name: subject.kind for subject in subjects}
        figure = sweep_plot(columns, front, kinds)
        plots = {"All points": svg(figure)}
        contents = {"sweep.csv": sweep_csv(columns), "sweep.svg": plots["All points"]}
        contents |= picture_files(figure, "sweep")
        if columns["pareto"].any():
            figure = accuracy_plot(columns, kinds)
            plots["Accuracy on the chip over EDAP"] = svg(figure)
            contents |= picture_files(figure, "accuracy")
    except MemoryError:
        raise UserError("the grid does not fit into memory: leave values out") from None
    first = front_text(columns, points)
    last = [*cheapest_lines(columns, args.max_drop), *notes(subjects, args.on_chip)]
    if args.bits or args.time_steps:
        last.append("spike rates are those of the networks as trained, at every width and T")
    table, names = front_table(columns, front)
    section = Section("Chips", [*first, *names, *last], *table)
    about = options_section("Options of the chips", about_chip(chip, args) | axes)
    sections = [section, about, Section("Assumptions", assumptions(chip))]
    contents["sweep.html"] = page("Sweep", sections, plots)
    write_files(args.out, contents, instead_of=files_of_pictures("accuracy"))
    print("\n".join([*first, *text_table(*table), *names, *last]))


def run_technologies(args: argparse.Namespace) -> None:
    named, changed = args.technologies or presets(), set_by_hand(args)
    technologies = [load_technology(name).with_values(changed) for name in named]
    chips = [Chip(**options_of(technology)) for technology in technologies]
    check_sources(args, [args.checkpoint] if args.checkpoint else [])
    subject = None
    if args.checkpoint or args.layers:
        subject = listed(args.layers) if args.layers else traced(args.checkpoint, args, Chip())
    if args.on_chip:
        check_simulation([subject] if subject else [], args)
    rows = technology_rows(chips, subject, args.on_chip)
    tables, said = technology_tables(rows), tested_on(subject.test_images) if subject else []
    if args.out is not None:
        first, *priced = tables
        sections = [Section("What they are", [], *first)]
        sections += [Section(subject.name, said, *table) for table in priced]
        sections.append(Section("Values", [], *value_table(technologies)))
        contents = {
            "technologies.csv": csv_text(rows[0], (row.values() for row in rows)),
            "technologies.md": markdown("Technologies", sections),
        }
        write_files(args.out, contents)
    said += [f"{BY_HAND}: {', '.join(f'{x} = {y}' for x, y in changed.items())}"] * bool(changed)
    parts = [*(text_table(*table) for table in tables), *([said] if said else [])]
    print("\n\n".join("\n".join(lines) for lines in parts))


def run_nonideal(args: argparse.Namespace) -> None:
    chip, draws = Chip(**given(args)), Draws(args.seed, args.trials)
    check_sources(args, args.checkpoint)
    from .robustness import (
        Question,
        chips_csv,
        layers_csv,
        lines_of,
        page_of,
        pictures_of,
        reports,
    )

    asked = Question(
        max_drop=args.max_drop,
        each_layer=args.each_layer,
        over=args.over,
        each_change=args.each_change,
        images=args.calibrate,
        at_least=args.at_least,
    )
    few = args.time_steps, args.test_images
    found = reports(args.checkpoint, args.data_path, chip, draws, asked, *few)
    single, pictures = found[0] if len(found) == 1 else found, pictures_of(found)
    contents = {
        "nonideal.json": json.dumps(single, indent=2) + "\n",
        "nonideal.csv": layers_csv(found),
        "chips.csv": chips_csv(found),
        "nonideal.html": page_of(found, pictures),
    }
    for stem, (_, figure) in pictures.items():
        contents |= picture_files(figure, stem)
    write_files(args.out, contents, instead_of=files_of_pictures("nonideal", "edap"))
    for report in found:
        if len(found) > 1:
            print(("" if report is found[0] else "\n") + f"{report['checkpoint']}:")
        print("\n".join(lines_of(report)))


def work(argv: list[str] | None) -> None:
    args = build_parser().parse_args(argv)
    if getattr(args, "out", None) is not None:
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
