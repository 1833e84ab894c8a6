"""What all commands share: a mistake is one line, with what was meant, and exit code 2."""

import argparse
import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from textwrap import wrap
from typing import Any, NoReturn

from runtime.errors import Stopped, UserError
from runtime.launcher import launcher_variable, leave_for_launcher, say_last, tells_user

MOST_NAMES = 1000  # of a folder that are compared with a misspelt one


# What writing to stdout may meet: a full disk, a reader that has gone.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EPIPE)


def run_command(
    program: str,
    work: Callable[[], int | None],
    explain: Callable[[Exception], str | None] = lambda error: None,
    interrupted: str = "interrupted",
) -> int:
    """Run a command's `work`; the exit code: what it returns (None: 0), 2 after one line on stderr
    for what the user has to know of, 128 + its number after a signal.

    `explain` has the line for other errors than a UserError; None where an error is a fault of the
    program, which keeps its traceback; "" where there is nothing to say.
    """
    try:
        code = work()
        sys.stdout.flush()
        return code or 0
    except (Stopped, KeyboardInterrupt) as stop:
        text, code = str(stop) or interrupted, 128 + getattr(stop, "signal_number", signal.SIGINT)
        leave_for_launcher(text)
        if launcher_variable("RANK") == 0:
            say_last(f"{program}: {text}", code)
        return code
    except Exception as error:
        text = str(error) if isinstance(error, UserError) else explain(error)
        if text is None and cannot_print(error):
            text = f"cannot print ({error.strerror})"
        if text is None and is_too_long(error):
            text = f"{str(error.filename)[:60]}...: {error.strerror}"
        if text is None:
            leave_for_launcher(repr(error), traceback.format_exc())
            raise
        if getattr(error, "errno", None) in NO_ROOM:
            # What is left to print, Python would try to print when it ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if text and tells_user(error):
            text = " ".join(text.split())
            leave_for_launcher(text)
            say_last(f"{program}: error: {text}", 2)
        return 2


def cannot_print(error: Exception) -> bool:
    return isinstance(error, OSError) and error.filename is None and error.errno in NO_ROOM


def is_too_long(error: Exception) -> bool:
    """Whether a path that the user gave is none."""
    is_long = isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG
    return is_long and error.filename is not None


class Parser(argparse.ArgumentParser):
    """A parser whose errors are UserErrors, without the usage, and say what was probably
    meant by a misspelt option or value."""

    given: Sequence[str] = ()

    def error(self, message: str) -> NoReturn:
        # argparse looks for what is required before it looks at what it does not know.
        if "required" in message:
            for option in (x.partition("=")[0] for x in self.given if x.startswith("--")):
                meant = did_you_mean(option, self._option_string_actions)
                if option not in self._option_string_actions and meant:
                    message = f"unrecognized arguments: {option}{meant}"
                    break
        raise UserError(message)

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Unlike argparse's it knows all: a subcommand, too, refuses what is not its own."""
        self.given = sys.argv[1:] if args is None else args
        known, rest = super().parse_known_args(args, namespace)
        if rest:
            meant = did_you_mean(rest[0].partition("=")[0], self._option_string_actions)
            self.error(f"unrecognized arguments: {' '.join(rest)}{meant}")
        return known, []

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, wrong_choice(value, action.choices))


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Breaks lines between words alone, and not in MD-SNN."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return wrap(" ".join(text.split()), width, break_on_hyphens=False)


def wrong_choice(value: Any, choices: Iterable) -> str:
    meant = did_you_mean(value, map(str, choices))
    return f"invalid choice: {value!r}{meant} (choose from {', '.join(map(repr, choices))})"


def did_you_mean(word: Any, known: Iterable[str]) -> str:
    """ ": did you mean X?" with the one known word that begins with this one, or else the word that
    is most like it; "" if none is.

    Upper and lower case and "-" and "_" are the same.
    """
    words, meant = {plain(name): name for name in known}, plain(str(word))
    found = [name for name in words if meant and name.startswith(meant)]
    if len(found) != 1:
        found = get_close_matches(meant, words, n=1)
    return f": did you mean {words[found[0]]}?" if found else ""


def plain(word: str) -> str:
    # Without the dashes of an option, which would make all short ones alike.
    return word.casefold().replace("-", "_").lstrip("_")


def similar_path(path: str | os.PathLike, folder: bool = False) -> str:
    """ ": did you mean X?" with a file (or folder) whose path differs from that of a missing one by
    misspelt names; "" if there is none."""
    *above, name = Path(path).parts or (".",)
    found = Path()
    for part, is_folder in (*((x, True) for x in above), (name, folder)):
        if is_there(found / part, is_folder):
            found /= part
            continue
        try:
            with os.scandir(found) as entries:
                names = [x.name for x in islice(entries, MOST_NAMES)]
        except OSError:
            return ""
        words = {plain(x): x for x in names if is_there(found / x, is_folder)}
        close = get_close_matches(plain(part), words, n=1)
        if not close:
            return ""
        found /= words[close[0]]
    return f": did you mean {found}?"


def is_there(path: Path, folder: bool) -> bool:
    try:
        return path.is_dir() if folder else path.is_file()
    except (OSError, ValueError):  # no permission; a null character
        return False
