"""Which network survives a real crossbar: plain students and distilled ones (CLK), each trained
with and without the chip that it will run on.

    python -m experiments.chip_recovery --data digits --bits 4 --seeds 1 2 3 4 5 \\
        --crossbar spikesim-65nm --sigma 0.1 0.2 0.4 --adc_bits 3 4 --trained_sigma 0.2

Every network is run on --chips draws of each chip, of every --sigma and --adc_bits, as it is made
and once more calibrated with --images training images. With the chip it is trained at the same ADC
and the one variation of --trained_sigma, and is tested where it was trained and beside. A row of
chips.csv is a network on one drawn chip; with more --chips only those that lack are computed. The
yield is the share of chips on which it is at most --max_drop points below the same method's network
of the same seed that was trained without the chip and runs on none. All other options are those of
experiments.study.
"""

import argparse
import csv
import io
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations, product
from pathlib import Path
from statistics import fmean as mean

from matplotlib.figure import Figure

from checkpoints import load_checkpoint
from display import legend_below, new_figure, percent, picture_files, styles
from experiments.plan import METHODS, NOT_GIVEN, STARTS, TEACHER, Planned, plan
from experiments.run_plan import measured, say
from experiments.study import axes_of, base_parser, command, of_teacher
from experiments.table import cell, markdown
from runtime.command import Parser
from runtime.errors import UserError
from runtime.files import write_files, write_whole
from settings import OF_CHIP, chip_defaults
from spikesim_eval.calibration import calibration_of
from spikesim_eval.chip import Chip, Draws
from spikesim_eval.estimate import estimate
from spikesim_eval.layer_list import Subject, check_int, check_number
from spikesim_eval.nonideal import Prepare, on_chip
from spikesim_eval.render import csv_text
from spikesim_eval.trace import trace_checkpoint

ACCURACIES = {"accuracy": "as made", "calibrated_accuracy": "calibrated"}
CHIPS = "chips.csv"


@dataclass(frozen=True)
class OneChip:
    """A network on one drawn chip; a row of chips.csv. Energy, delay and area are an image's."""

    data: str
    bits: int
    method: str
    start: str  # its weights': scratch, teacher
    seed: int
    run: str  # its folder's name, which tells its settings from all others
    trained_sigma: float | None  # with the chip; None: without
    crossbar: str
    sigma: float
    adc_bits: int
    draw: int
    images: int  # of the training set, that calibrate it
    accuracy: float
    calibrated_accuracy: float
    digital_accuracy: float
    energy_pj: float
    delay_ns: float
    area_um2: float

    @property
    def network(self) -> tuple[str, str, bool]:
        """What it is but for its seed."""
        return self.method, self.start, self.trained_sigma is not None

    @property
    def edap(self) -> float:
        """µJ·ms·mm²"""
        return self.energy_pj * self.delay_ns * self.area_um2 * 1e-18


def recovery_parser() -> Parser:
    parser = base_parser("chip_recovery", __doc__, [*METHODS], ["student", "CLK"])
    parser.set_defaults(crossbar=["spikesim-65nm"], sigma=["0.1", "0.2", "0.4"])
    parser.set_defaults(adc_bits=["3", "4"], seed=["1", "2", "3", "4", "5"])
    group = parser.add_argument_group("chips")
    for name, kind, default, text in (
        ("--trained_sigma", str, "0.2", "variation of the chips that networks are trained for"),
        ("--chips", int, 10, "draws of each chip"),
        ("--images", int, 64, "training images that calibrate a chip"),
        ("--max_drop", float, 5.0, "points that a network may lose on a chip that counts as good"),
        ("--min_yield", float, 90.0, "good chips, in %%, with which the cheapest ADC does"),
    ):
        text = f"{text} (default {default})"
        group.add_argument(name, type=kind, default=default, help=text)
    return parser


def planned_runs(args: argparse.Namespace, runs: Path) -> list[Planned]:
    """Those without the chip, and then those with it. Raises UserError for what no chip can have,
    and for networks that the tables would not tell apart, also from those of chips.csv."""
    Draws(trials=args.chips)
    check_int(args.images, "images", 10**4)
    check_number(args.max_drop, "max_drop", 0, 100)
    check_number(args.min_yield, "min_yield", 0, 100)
    for name in OF_CHIP:
        if name not in ("sigma", "adc_bits") and len(getattr(args, name) or ()) > 1:
            raise UserError(f"--{name}: a study is of one chip, but for --sigma and --adc_bits")
    if len(args.crossbar) > 1:
        raise UserError("--crossbar: a study is of one technology")
    axes, theirs = axes_of(args), of_teacher(args)
    of_chip = ("crossbar", *OF_CHIP)
    without = axes | dict.fromkeys(of_chip, NOT_GIVEN)
    found = plan(without, args.bits, args.methods, args.starts, theirs, runs)
    trained = axes | {"sigma": [args.trained_sigma]}
    found = plan(trained, args.bits, args.methods, args.starts, theirs, runs, found)
    some = with_a_chip(found)
    for one in found:
        list(chips_of(one, args, some))
    check_told_apart(found, args.results / args.name / CHIPS, about_chip(some), args.images)
    return found


def with_a_chip(planned: Sequence[Planned]) -> Planned:
    return next(x for x in planned if x.settings.crossbar is not None)


def about_chip(planned: Planned) -> str:
    """The technology that a network is trained for, with its own options but for those of which a
    study has several."""
    settings = planned.settings
    usual = chip_defaults(settings.crossbar)
    own = {name: getattr(settings, name) for name in OF_CHIP if name not in ("sigma", "adc_bits")}
    said = [f"{name} {x}" for name, x in own.items() if x != usual[name]]
    return ", ".join([str(settings.chip.technology), *said])


def check_told_apart(planned: Sequence[Planned], path: Path, crossbar: str, images: int) -> None:
    """Raise UserError where two runs would be one network in the tables, or the rows that are there
    are those of other chips."""
    runs = {}
    for row in read_chips(path):
        theirs = f"{row.crossbar}, --images {row.images}"
        if theirs != (ours := f"{crossbar}, --images {images}"):
            raise UserError(f"{path} is of {theirs}, and not {ours}: choose another --name")
        trained_at = None if row.trained_sigma is None else row.adc_bits
        runs[*key_of_bar(row), trained_at] = row.run
    for one in planned:
        if one.method != TEACHER:
            settings = one.settings
            key = settings.data, settings.bits, one.method, one.start, settings.seed
            run = runs.setdefault((*key, settings.adc_bits), one.name)
            if run != one.name:
                raise UserError(
                    f"the tables would not tell {run} from {one.name}: give one value of what is "
                    "none of --data, --bits, --starts, --seeds, --sigma and --adc_bits, or choose "
                    "another --name"
                )


def chips_of(planned: Planned, args: argparse.Namespace, some: Planned) -> Iterator[Chip]:
    """The chips that a network is tested on; `some` network that is trained for one says what else
    they are."""
    own = planned.settings.chip
    for sigma, adc_bits in product(args.sigma, args.adc_bits):
        try:
            strength = float(sigma)
        except ValueError:
            raise UserError(f"--sigma must be numbers, got {sigma!r}") from None
        chip = replace(some.settings.chip, sigma=strength, adc_bits=int(adc_bits))
        if own is None or own.adc_bits == chip.adc_bits:
            yield chip


def test_on_chips(args: argparse.Namespace, runs: Path, planned: Sequence[Planned]) -> None:
    """Add to chips.csv what is missing there of the networks that are trained."""
    path = args.results / args.name / CHIPS
    rows = read_chips(path)
    some = with_a_chip(planned)
    for one in planned:
        if one.method == TEACHER or not measured(one.folder(runs)):
            continue
        subject = prepare = None
        for chip in chips_of(one, args, some):
            key = one.name, chip.sigma, chip.adc_bits
            its = {x.draw: x for x in rows if (x.run, x.sigma, x.adc_bits) == key}
            lacking = [draw for draw in range(args.chips) if draw not in its]
            if not lacking:
                continue
            if subject is None:
                trained, data_path = one.checkpoint(runs), one.settings.data_path
                subject = trace_checkpoint(str(trained), data_path)
                prepare = calibration_of(load_checkpoint(trained), data_path, args.images)
            found = on_chips(one, subject, chip, about_chip(some), args, prepare, lacking)
            its |= {x.draw: x for x in found}
            others = [x for x in rows if (x.run, x.sigma, x.adc_bits) != key]
            rows = others + [its[draw] for draw in sorted(its)]
            write_whole(path, csv_of(rows).encode())
            about = f"{one.title}: sigma {chip.sigma:g}, ADCs of {chip.adc_bits} bits"
            said = [mean_of([*its.values()], name) for name in ACCURACIES]
            say(f"on chips  {about}: {percent(said[0], 2)}, calibrated {percent(said[1], 2)}")


def on_chips(
    planned: Planned,
    subject: Subject,
    chip: Chip,
    crossbar: str,
    args: argparse.Namespace,
    calibrate: Prepare,
    draws: Sequence[int],
) -> list[OneChip]:
    """A trained network on these draws of a chip, in whose rows it is called `crossbar`, and what
    an image costs there; `calibrate` sees `args.images`."""
    settings = planned.settings
    as_made, _ = on_chip(subject, chip, draws)
    calibrated, _ = on_chip(subject, chip, draws, prepare=calibrate)
    times = 1 if chip.is_random else len(draws)  # all are the same
    total = estimate(subject.network, chip).total
    about = {name: getattr(settings, name) for name in ("data", "bits", "seed")}
    about |= {name: total[name] for name in ("energy_pj", "delay_ns", "area_um2")}
    return [
        OneChip(
            method=planned.method,
            start=planned.start,
            run=planned.name,
            trained_sigma=settings.sigma,
            crossbar=crossbar,
            sigma=chip.sigma,
            adc_bits=chip.adc_bits,
            draw=draw,
            images=args.images,
            accuracy=accuracies[0],
            calibrated_accuracy=accuracies[1],
            digital_accuracy=subject.accuracy,
            **about,
        )
        for draw, *accuracies in zip(draws, as_made * times, calibrated * times, strict=True)
    ]


def csv_of(rows: Sequence[OneChip]) -> str:
    return csv_text(OneChip.__dataclass_fields__, (asdict(row).values() for row in rows))


def read_chips(path: Path) -> list[OneChip]:
    """The rows; none where there is no file. Raises UserError for another program's file."""
    if not path.is_file():
        return []
    kinds = {name: x.type for name, x in OneChip.__dataclass_fields__.items()}
    try:
        lines = list(csv.DictReader(io.StringIO(path.read_text())))
        return [
            OneChip(
                **{
                    name: None if value == "" else (float if "None" in str(kind) else kind)(value)
                    for (name, value), kind in zip(line.items(), kinds.values(), strict=True)
                }
            )
            for line in lines
        ]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{path} is not the chips.csv of such a study ({error}): move it away, or choose "
            "another --name"
        ) from None


# What is said.

WORDS = {
    (method, start, trained): method
    + " from teacher" * (start == "teacher")
    + ", for the chip" * trained
    for method, start, trained in product(METHODS, STARTS, (False, True))
}


def yields(rows: Sequence[OneChip], max_drop: float) -> Callable[[Sequence[OneChip], str], float]:
    """A function that gives the share of good ones among chips, by an accuracy's name: not more
    than `max_drop` points below what the network of the same data, width, method, start and seed
    that was trained without the chip has on none."""
    bar = {key_of_bar(x): x.digital_accuracy for x in rows if x.trained_sigma is None}

    def share(chips: Sequence[OneChip], name: str) -> float:
        return mean(100 * (bar[key_of_bar(x)] - getattr(x, name)) <= max_drop + 1e-9 for x in chips)

    return share


def key_of_bar(row: OneChip) -> tuple:
    return row.data, row.bits, row.method, row.start, row.seed


def by_seed(rows: Sequence[OneChip]) -> list[list[OneChip]]:
    seeds = sorted({x.seed for x in rows})
    return [[x for x in rows if x.seed == seed] for seed in seeds]


def panels_of(rows: Sequence[OneChip]) -> dict[tuple[str, int, float, int], list[OneChip]]:
    """The rows by (data, bits, sigma, ADC bits), in order."""
    found = {}
    for row in rows:
        found.setdefault((row.data, row.bits, row.sigma, row.adc_bits), []).append(row)
    return dict(sorted(found.items()))


def cells_of(rows: Sequence[OneChip], max_drop: float) -> list[list[str]]:
    """The table, with its header: means over seeds, of a seed over its chips."""
    good = yields(rows, max_drop)
    lines = []
    for (data, bits, sigma, adc_bits), chip in panels_of(rows).items():
        for network, name in WORDS.items():
            seeds = by_seed([x for x in chip if x.network == network])
            if not seeds:
                continue
            line = [data, str(bits), f"{sigma:g}", str(adc_bits), name, str(len(seeds))]
            line.append(
                cell([100 * x[0].digital_accuracy for x in seeds], "{:.2f}".format, len(seeds))
            )
            for name in ACCURACIES:
                values = [100 * mean_of(x, name) for x in seeds]
                line.append(cell(values, "{:.2f}".format, len(seeds)))
                line.append(cell([100 * good(x, name) for x in seeds], "{:.0f}".format, len(seeds)))
            lines.append([*line, f"{mean(x.edap for x in chip if x.network == network):.4g}"])
    header = ["data", "bits", "sigma", "ADC bits", "network", "seeds", "digital, %"]
    for name in ACCURACIES.values():
        header += [f"{name}, %", "yield, %"]
    return [[*header, "EDAP, µJ·ms·mm²"], *lines]


def cheapest_of(rows: Sequence[OneChip], max_drop: float, min_yield: float) -> list[list[str]]:
    """What a chip costs at equal yield, with a header: at each variation, for each network, the
    cheapest of the ADCs with which at least `min_yield` % of all seeds' chips are good."""
    header = ["data", "bits", "sigma", "network"]
    for name in ACCURACIES.values():
        header += [f"ADC bits, {name}", "EDAP, µJ·ms·mm²"]
    good, lines = yields(rows, max_drop), []
    for data, bits, sigma in sorted({(x.data, x.bits, x.sigma) for x in rows}):
        here = [x for x in rows if (x.data, x.bits, x.sigma) == (data, bits, sigma)]
        for network, title in WORDS.items():
            its = [x for x in here if x.network == network]
            line = [data, str(bits), f"{sigma:g}", title]
            for name in ACCURACIES:
                found = []
                for adc_bits in sorted({x.adc_bits for x in its}):
                    chips = [x for x in its if x.adc_bits == adc_bits]
                    if 100 * good(chips, name) >= min_yield - 1e-9:
                        found.append((mean(x.edap for x in chips), adc_bits))
                line += [str(min(found)[1]), f"{min(found)[0]:.4g}"] if found else ["-", "-"]
            if its:
                lines.append(line)
    return [header, *lines]


def leads_of(rows: Sequence[OneChip]) -> list[list[str]]:
    """By how many points a network is above another one, with a header: of the same chips, paired
    by seed. Two are compared that differ in their method alone, or in whether they were trained for
    the chip."""
    header = ["data", "bits", "sigma", "ADC bits", "network", "over", "seeds"]
    lines = [[*header, "digital", *ACCURACIES.values()]]
    for panel, chips in panels_of(rows).items():
        there = [network for network in WORDS if any(x.network == network for x in chips)]
        for other, network in combinations(there, 2):
            if sum(x != y for x, y in zip(other, network, strict=True)) > 1:
                continue
            above, below = (
                {x[0].seed: x for x in by_seed([x for x in chips if x.network == y])}
                for y in (network, other)
            )
            seeds = sorted(above.keys() & below.keys())
            line = [*map(str, panel), WORDS[network], WORDS[other], str(len(seeds))]
            for name in ("digital_accuracy", *ACCURACIES):
                points = [
                    100 * (mean_of(above[seed], name) - mean_of(below[seed], name))
                    for seed in seeds
                ]
                line.append(cell(points, "{:+.1f}".format, len(seeds)))
            lines.append(line)
    return lines


def mean_of(chips: Sequence[OneChip], name: str) -> float:
    return mean(getattr(x, name) for x in chips)


def picture(rows: Sequence[OneChip]) -> Figure:
    """Accuracy over EDAP, a point a chip, as made and calibrated; a column of panels for each data
    set, width and variation. What costs the same is drawn side by side."""
    columns = sorted({(x.data, x.bits, x.sigma) for x in rows})
    shared = {"sharex": "col", "sharey": True, "squeeze": False}
    figure, axes = new_figure(3.4 * len(columns), 6.4, len(ACCURACIES), len(columns), **shared)
    looks = dict(zip(WORDS, styles([method for method, *_ in WORDS]), strict=True))
    for (data, bits, sigma), column in zip(columns, axes.T, strict=True):
        here = [x for x in rows if (x.data, x.bits, x.sigma) == (data, bits, sigma)]
        there = [network for network in WORDS if any(x.network == network for x in here)]
        most = max(x.edap for x in here)
        for (name, said), panel in zip(ACCURACIES.items(), column, strict=True):
            for place, network in enumerate(there):
                chips = [x for x in here if x.network == network]
                marker, colour = "o" if network[2] else "x", looks[network]["color"]
                aside = 0.025 * most * (place - (len(there) - 1) / 2)
                x, y = [x.edap + aside for x in chips], [100 * getattr(x, name) for x in chips]
                how = {"s": 12, "color": colour, "marker": marker, "alpha": 0.6, "linewidths": 0.8}
                panel.scatter(x, y, label=WORDS[network], **how)
            panel.set_title(f"{data}, {bits} bits, sigma {sigma:g}, {said}", loc="left", fontsize=9)
            panel.set_xlim(0, 1.1 * most)
        column[-1].set_xlabel("EDAP, µJ·ms·mm² (equal ones side by side)")
    for panel in axes[:, 0]:
        panel.set_ylabel("accuracy on a chip, %")
    legend_below(figure, axes.flat, ncols=4)
    return figure


def write(folder: Path, max_drop: float, min_yield: float) -> None:
    """Write table.md and picture.png, .pdf into the folder of chips.csv, and print the tables."""
    check_number(max_drop, "max_drop", 0, 100)
    check_number(min_yield, "min_yield", 0, 100)
    rows = read_chips(folder / CHIPS)
    if not rows:
        raise UserError(f"{folder / CHIPS} holds no rows: there is no table yet")
    bars = {key_of_bar(x) for x in rows if x.trained_sigma is None}
    if lacking := [x.run for x in rows if key_of_bar(x) not in bars]:
        raise UserError(
            f"{folder / CHIPS} holds {lacking[0]}, and not the same network trained without the "
            "chip, which says how good a chip is: run the study to its end"
        )
    draws = Counter((x.run, x.sigma, x.adc_bits) for x in rows).values()
    some = "" if min(draws) == max(draws) else f"{min(draws)} to "
    notes = [
        f"Mean ± standard error over seeds, of a seed over {some}{max(draws)} chips. Yield: chips "
        f"on which a network is at most {max_drop:g} points below the same method's of its seed, "
        "trained without the chip and on none."
    ]
    cost = f"What a chip costs of which at least {min_yield:g} % are good: the cheapest of these "
    cost += "ADCs with which they are."
    lead = "By how many points a network is above another on the same chips: mean ± standard error "
    lead += "of the differences, seed by seed."
    text = "\n\n".join(
        [
            *(markdown(cells_of(rows, max_drop), notes), cost),
            *(markdown(cheapest_of(rows, max_drop, min_yield), []), lead),
            markdown(leads_of(rows), []),
        ]
    )
    contents = {"table.md": text + "\n", **picture_files(picture(rows), "picture")}
    write_files(folder, contents, "--results")
    print(text, flush=True)
    print(f"{', '.join(contents)} are in {folder}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    to_test: list[Planned] = []

    def planned(args: argparse.Namespace, runs: Path) -> list[Planned]:
        to_test.extend(planned_runs(args, runs))
        return [*to_test]

    def tables(args: argparse.Namespace, folder: Path) -> None:
        if to_test:
            test_on_chips(args, args.runs / args.name, to_test)
        write(folder, args.max_drop, args.min_yield)

    return command(argv, recovery_parser(), planned, tables)


if __name__ == "__main__":
    sys.exit(main())
