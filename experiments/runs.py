"""Many runs of main.py at a glance, whether they have ended or not:

    python -m experiments.runs list FOLDER…      what each run is, its state, epochs, best and time
    python -m experiments.runs table FOLDER…     accuracies over seeds: Markdown, CSV or LaTeX
    python -m experiments.runs curves FOLDER… --out NAME     losses, accuracy and learning rate

A run is a folder with a SETTING-last.pth, or with settings.json and metrics.csv; all below the
given folders are found, but for hidden ones. Nothing is changed in them, so runs that are going on
can be looked at. What cannot be read is named and left out.
"""

import argparse
import sys
from collections.abc import Sequence

from display import percent, printable, text_table
from engine.log import duration
from engine.run_folder import deciding
from experiments import as_command
from experiments.found_runs import Run, find_runs, names_of
from experiments.table import FORMATS, table_text
from runtime.command import Parser
from runtime.errors import UserError


def list_text(runs: Sequence[Run]) -> str:
    """A line a run."""
    header = ["run", "state", "epoch", "best", "last", "time", "folder"]
    names, lines = names_of([run.settings for run in runs], without=["epochs"]), []
    for name, run in zip(names, runs, strict=True):
        done, epochs, best, last, clock = len(run.rows), run.settings.epochs, "-", "-", "-"
        if done:
            best = f"{percent(run.best[deciding(run.best)], 2)} (epoch {run.best['epoch']})"
            last = percent(run.rows[-1]["test_accuracy"], 2)
            if deciding(run.best) == "val_accuracy":
                best = f"validation {best}, test {percent(run.best['test_accuracy'], 2)}"
        if (seconds := run.seconds_an_epoch) is not None:
            left = f", {duration(seconds * (epochs - done))} left" * (run.state == "going on")
            clock = duration(seconds * done) + left
        lines.append([name, run.state, f"{done}/{epochs}", best, last, clock, str(run.folder)])
        lines[-1] = list(map(printable, lines[-1]))
    return "\n".join(text_table(header, lines))


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="experiments.runs", description=__doc__.split("\n\n")[0], allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("list", "what each run is, its state, epochs, best accuracy (epoch) and time"),
        ("table", "mean ± standard error over the seeds of runs that are finished"),
        ("curves", "loss terms, accuracy and learning rate over the epochs, as PNG and PDF"),
    ):
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.add_argument("folders", nargs="+", metavar="FOLDER", help="runs are below it")
        if name == "table":
            command.add_argument("--format", choices=FORMATS, default="markdown")
        if name == "curves":
            command.add_argument("--out", required=True, help="NAME of NAME.png and NAME.pdf")
    return as_command(parser.prog, lambda: show(parser.parse_args(argv)))


def show(args: argparse.Namespace) -> None:
    runs = find_runs(args.folders)
    if not runs:
        raise UserError(f"there is no run below {', '.join(args.folders)}")
    if args.command == "list":
        print(list_text(runs))
    elif args.command == "table":
        print(table_text(runs, args.format))
    else:
        from experiments.curves import draw  # matplotlib takes a second

        for path in draw(runs, args.out):
            print(printable(str(path)))


if __name__ == "__main__":
    sys.exit(main())
