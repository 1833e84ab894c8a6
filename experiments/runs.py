"""Many runs of main.py at a glance, whether they have ended or not:

    python -m experiments.runs list FOLDER…      what each run is, its state, epochs, best and time
    python -m experiments.runs table FOLDER…     accuracies over seeds: Markdown, CSV or LaTeX
    python -m experiments.runs curves FOLDER… --out NAME     losses, accuracy and learning rate

A run is a folder with a SETTING-last.pth, or with settings.json and metrics.csv; all below the
given folders are found, but for hidden ones. Nothing is changed in them, so runs that are going on
can be looked at. What cannot be read is named and left out.
"""

import os
import sys
from collections.abc import Sequence

from experiments.found_runs import Run, find_runs, names_of
from experiments.table import FORMATS, table_text
from load_settings import Parser, UserError


def list_text(runs: Sequence[Run]) -> str:
    """A line a run."""
    names = names_of([run.settings for run in runs], without=["epochs"])
    lines = [["run", "state", "epoch", "best", "last", "time", "folder"]]
    for name, run in zip(names, runs, strict=True):
        best = last = "-"
        if run.rows:
            best = f"{run.best[run.chosen_by]:.2%} ({run.best['epoch']})"
            last = f"{run.rows[-1]['test_accuracy']:.2%}"
            if run.chosen_by == "val_accuracy":
                best = f"val {best}, test {run.best['test_accuracy']:.2%}"
        epoch, clock = f"{len(run.rows)}/{run.settings.epochs}", "-"
        if (seconds := run.seconds_an_epoch) is not None:
            clock = duration(seconds * len(run.rows))
            if run.state == "going on":
                clock += f", {duration(seconds * (run.settings.epochs - len(run.rows)))} left"
        lines.append([name, run.state, epoch, best, last, clock, str(run.folder)])
    return aligned(lines)


def duration(seconds: float) -> str:
    """Such as 8 s, 12 min or 1 h 5 min."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = (
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )
    return "\n".join(line.rstrip() for line in padded)


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
    try:
        args = parser.parse_args(argv)
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
                print(path)
        sys.stdout.flush()
    except UserError as error:
        print("experiments.runs: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except BrokenPipeError:  # its reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
