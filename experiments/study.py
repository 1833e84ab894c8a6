"""The paper's table in one command: teachers, students without one, and students taught by CL, CLM
and CLK, on every data set, over seeds or folds.

    python -m experiments.study --data CIFAR10 CIFAR100 --bits 4 8 --seeds 1 2 3 --parallel 2

Any option of main.py may follow. With several values each is tried: --beta 5 20 100. What an option
has no meaning for (a student's beta, a teacher's bits) goes without it. Teachers have the students'
options but for --teacher_X: --epochs 15 --teacher_epochs 20.

Stopped, by whatever, the same command goes on; what is in rows.csv is never run again.
"""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from display import printable
from engine.log import count, duration
from engine.run_folder import lock
from experiments import as_command
from experiments.plan import (
    CHANGE_NO_NUMBER,
    METHODS,
    NOT_GIVEN,
    OWN,
    STARTS,
    Planned,
    plan,
)
from experiments.rows import ROWS, Row, append, identity_of, read_rows, rows_of
from experiments.run_plan import (
    Plan,
    measure_times,
    measured,
    places,
    run_all,
    say_finished,
    seconds_left,
    why_missing,
)
from experiments.slurm import write_jobs
from runtime.command import HelpFormatter, Parser
from runtime.errors import UserError
from runtime.files import check_writable
from settings import DATA_SETS, OPTIONS, is_flag

OF_TEACHER = "of teacher: "  # main.py has options that begin with teacher_


def base_parser(
    name: str, description: str, methods: Sequence[str], chosen: Sequence[str] = ()
) -> Parser:
    """What all studies can be told: data, seeds, how to run them, and the options of main.py, which
    are known though its help does not show them. methods: those that one can choose from, `chosen`
    those that are where one does not; all, if it is empty."""
    parser = Parser(
        prog=f"experiments.{name}",
        usage=f"python -m experiments.{name} --data NAME… [options] [options of main.py]",
        description=description,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    add_axes(parser.add_argument_group("what to compare"), methods, chosen)
    how = parser.add_argument_group("how to run them")
    one = how.add_mutually_exclusive_group()
    for option, text in (
        ("parallel", "so many at a time, with cores / N threads each"),
        ("gpus", "one on each of N GPUs"),
    ):
        one.add_argument(f"--{option}", type=int, metavar="N", help=text)
    for option, text in (
        ("dry_run", "say how many there are and how long they take"),
        ("slurm", "write jobs for a Slurm cluster instead of running"),
        (
            "table",
            "run nothing: write tables and pictures of rows.csv, with --data also of runs that are "
            "finished and have no row yet",
        ),
    ):
        how.add_argument(f"--{option}", action="store_true", help=text)
    how.add_argument("--name", default=name, help=f"of the study's folders (default {name})")
    for option, default, text in (
        ("runs", "runs", "the runs"),
        ("results", "docs/results", "rows.csv, tables and pictures"),
    ):
        text = f"FOLDER/NAME holds {text} (default {default})"
        how.add_argument(
            f"--{option}", type=Path, default=Path(default), metavar="FOLDER", help=text
        )
    how.add_argument("-h", "--help", action="help", help="print this")
    hidden = {"help": argparse.SUPPRESS}
    for option in (x for x in OPTIONS if x not in OWN):
        if is_flag(option):
            parser.add_argument(f"--{option}", action="store_const", const=[""], **hidden)
            continue
        if option not in ("data", "bits", "time_window", "seed", "fold"):
            parser.add_argument(f"--{option}", nargs="+", **hidden)
        if option not in ("data", "bits"):
            parser.add_argument(f"--teacher_{option}", dest=f"{OF_TEACHER}{option}", **hidden)
    return parser


def add_axes(group: Any, methods: Sequence[str], chosen: Sequence[str]) -> None:
    """The options of which each value is tried."""
    about_methods = f"of {', '.join(methods)} (default {' '.join(chosen) or 'all'})"
    for names, default, choices, text in (
        (["data"], None, DATA_SETS, f"of {', '.join(DATA_SETS)}"),
        (["bits"], ["4"], None, "widths (default 4)"),
        (["methods"], [*(chosen or methods)], methods, about_methods),
        (["starts"], ["scratch"], STARTS, "students' weights: scratch, teacher, or both"),
        (["seeds", "seed"], ["1", "2", "3"], None, "of a teacher and its students (default 1 2 3)"),
        (["folds", "fold"], None, None, "each tests on another of five parts of all images"),
        (
            ["time_windows", "time_window"],
            None,
            None,
            "timesteps T, for each of which networks are trained (default: the data set's); "
            "main.py's --time_windows is one network for several T",
        ),
    ):
        if names != ["methods"] or methods:
            about = {"dest": names[-1], "default": default, "choices": choices, "help": text}
            about["metavar"] = "N" if choices is None else "NAME"
            group.add_argument(*(f"--{x}" for x in names), nargs="+", **about)


def study_parser() -> Parser:
    return base_parser("study", __doc__, [*METHODS])


def axes_of(args: argparse.Namespace) -> dict[str, Sequence[str | None]]:
    """All values of each option of main.py."""
    given = vars(args)
    names = [x for x in OPTIONS if x not in OWN and x != "bits"]
    for name in CHANGE_NO_NUMBER:
        if len(given[name] or NOT_GIVEN) > 1:
            raise UserError(f"--{name} changes no number: give one value")
    return {name: given[name] or NOT_GIVEN for name in names}


def of_teacher(args: argparse.Namespace) -> dict[str, str]:
    """The options that teachers have instead of the students'."""
    given = {name: x for name, x in vars(args).items() if name.startswith(OF_TEACHER)}
    return {name.removeprefix(OF_TEACHER): x for name, x in given.items() if x is not None}


def planned_runs(args: argparse.Namespace, runs: Path) -> list[Planned]:
    return plan(axes_of(args), args.bits, args.methods, args.starts, of_teacher(args), runs)


def missing(runs: Sequence[Planned], rows: Sequence[Row], folder: Path) -> list[Planned]:
    """Runs without a row, and teachers whose checkpoints are gone and that are needed once more."""
    there = set(map(identity_of, rows))
    lacking = {x for x in runs if x.identity not in there}
    teachers = {x.teacher for x in lacking if x.teacher is not None}
    lacking |= {x for x in teachers if not is_there(x, folder)}
    return [x for x in runs if x in lacking]


def is_there(planned: Planned, folder: Path) -> bool:
    return bool(measured(planned.folder(folder))) and planned.checkpoint(folder).is_file()


def write_tables(args: argparse.Namespace, results: Path) -> None:
    from experiments import study_table  # matplotlib takes a second

    study_table.write_tables(results)


def main(argv: Sequence[str] | None = None) -> int:
    return command(argv, study_parser(), planned_runs, write_tables)


def command(
    argv: Sequence[str] | None,
    parser: Parser,
    planned_runs: Callable[[argparse.Namespace, Path], list[Planned]],
    write_tables: Callable[[argparse.Namespace, Path], None],
) -> int:
    """Run the command line of a study; the exit code: 0, 1 where a run has failed, 2 for a mistake,
    and 128 + its number after a signal."""

    def work() -> int:
        args = parser.parse_args(argv)
        check(args)
        results, runs = args.results / args.name, args.runs / args.name
        if args.table and args.data is None:
            write_tables(args, results)
            return 0
        for option, folder in (("results", results), ("runs", runs)):
            check_writable(folder, f"--{option}")
        there = places(args.parallel, args.gpus)
        plan = Plan(planned_runs(args, runs), runs, there)
        if args.dry_run:
            outline(plan, read_rows(results / ROWS))
            return 0
        runs.mkdir(parents=True, exist_ok=True)
        try:
            held = lock(runs)
        except UserError:
            raise UserError(f"another study is running in {runs}: choose another --name") from None
        with held:
            if args.slurm:
                words = sys.argv[1:] if argv is None else argv
                return write_slurm(plan, results, [parser.prog, *words])
            return carry_out(plan, results, partial(write_tables, args), only_table=args.table)

    return as_command(parser.prog, work, "interrupted: the same command goes on")


def check(args: argparse.Namespace) -> None:
    if not re.fullmatch(r"\w[\w.-]*", args.name):
        raise UserError(f"--name {args.name!r}: letters, digits, '-', '_' and '.' make a name")
    if args.data is None and not args.table:
        raise UserError("--data is required: one data set or more")
    for name in ("parallel", "gpus"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} must be 1 or more")


def outline(plan: Plan, rows: Sequence[Row]) -> None:
    """Leave in the plan what is missing, and say how much that is."""
    wanted, plan.todo = plan.todo, missing(plan.todo, rows, plan.runs)
    teachers = sum(x.teacher is None for x in wanted)
    print(
        f"runs      {count(teachers, 'teacher')}, {count(len(wanted) - teachers, 'student')}; "
        f"{len(plan.todo)} of them to run, {len(plan.places)} at a time",
        flush=True,
    )
    if plan.todo:
        measure_times(plan)
        compiled = any(x.settings.compile for x in plan.todo)
        how = ", as measured without --compile" * compiled
        print(f"time      about {duration(seconds_left(plan, plan.todo))}{how}", flush=True)


def take_finished(plan: Plan, path: Path) -> None:
    """Add the rows of runs that a killed study, or Slurm, has left without one."""
    for planned in plan.todo:
        if found := measured(planned.folder(plan.runs)):
            append(path, rows_of(planned, found))


def carry_out(
    plan: Plan, results: Path, write_tables: Callable[[Path], None], only_table: bool
) -> int:
    path = results / ROWS
    take_finished(plan, path)

    def finished(planned: Planned, found: dict[str, Any]) -> None:
        append(path, rows_of(planned, found))
        say_finished(planned, found)

    if only_table:
        todo = missing(plan.todo, read_rows(path), plan.runs)
        failed = [(planned, why_missing(planned.folder(plan.runs))) for planned in todo]
    else:
        outline(plan, read_rows(path))
        failed = run_all(plan, finished) if plan.todo else []
    if not failed or read_rows(path):
        write_tables(results)
    for planned, reason in failed:
        print(f"failed: {planned.title}: {printable(reason)}", file=sys.stderr)
        print(f"        {planned.folder(plan.runs)}", file=sys.stderr)
    return 1 if failed else 0


def write_slurm(plan: Plan, results: Path, words: Sequence[str]) -> int:
    take_finished(plan, results / ROWS)
    outline(plan, read_rows(results / ROWS))
    words = [x for x in words if x != "--slurm"]
    path = write_jobs(plan.todo, plan.runs, ["python", "-m", *words, "--table"])
    print(f"submit    bash {path} [options of sbatch]")
    return 0


if __name__ == "__main__":
    sys.exit(main())
