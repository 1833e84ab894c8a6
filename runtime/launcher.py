"""What a launcher (torchrun, torch.distributed.launch) tells a process, and a process the launcher.

Both end with 24 to 35 lines of their own after the program's last one. What a process leaves in
TORCHELASTIC_ERROR_FILE stands at the end of those, and in the launcher's own error file; but after
a signal they are a bare traceback. So the sentence that ends a run is said again when the launcher
has ended.
"""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from types import FrameType

from runtime.errors import UserError

# What a launcher sets; the values without one.
VARIABLES = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
PATIENCE = 60  # seconds: a launcher kills what is left 30 s after it has been told to end
# A process that ends gives back its memory, and its command line with it, a while before the shell
# is told: the sentence comes after the launcher's last line and before the prompt.
AGAIN = """\
import os, sys, time
_, command_line, patience, sentence = sys.argv
end = time.monotonic() + float(patience)
while time.monotonic() < end:
    try:
        with open(command_line, "rb") as file:
            runs = file.read(1)
    except OSError:
        runs = b""
    if not runs:
        os.write(2, os.fsencode(sentence) + b"\\n")
        break
    time.sleep(0.005)
"""


def is_launched() -> bool:
    return "RANK" in os.environ


def launcher_variable(name: str) -> int:
    """A number of VARIABLES that the launcher has set, if it makes sense."""
    text = os.environ.get(name, "") if is_launched() else ""
    return int(text) if text.isascii() and text.isdigit() else VARIABLES[name]


def check_launcher() -> None:
    """Raises UserError for a mistake in what the launcher has set."""
    for name in VARIABLES if is_launched() else ():
        text = os.environ.get(name, str(VARIABLES[name]))
        number = text.isascii() and text.isdigit()
        if not number or (name == "WORLD_SIZE" and int(text) == 0):
            raise UserError(f"the launcher's {name} makes no sense: {text!r}")


def leave_for_launcher(text: str, trace: str | None = None) -> None:
    """Write `text`, or for a fault of the program the `trace`, into the file in which torchrun
    looks for what has ended a process."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    more = {"timestamp": str(int(time.time()))} | ({} if trace is None else {"py_callstack": trace})
    with suppress(OSError), open(path, "w") as file:
        json.dump({"message": {"message": text, "extraInfo": more}}, file)


def say_last(line: str, code: int) -> None:
    """Print `line` to stderr, now and after the last line of the launcher that `code` ends."""
    print(line, file=sys.stderr, flush=True)
    launched = "TORCHELASTIC_RUN_ID" in os.environ  # and not one by one, by hand or Slurm
    attempt, last_attempt = (
        os.environ.get(f"TORCHELASTIC_{name}", "0") for name in ("RESTART_COUNT", "MAX_RESTARTS")
    )
    if not launched or (attempt != last_attempt and code != 128 + signal.SIGINT):
        return  # nobody speaks after us, or the launcher starts us again
    command_line = f"/proc/{os.getppid()}/cmdline"
    if not os.path.exists(command_line):
        return  # not Linux
    # A process of its own, as the launcher ends after this one; in a session of its own, as the
    # launcher ends all that are left in this one's.
    with suppress(OSError):  # no memory left
        subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", AGAIN, command_line, str(PATIENCE), line],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )


def tells_user(error: Exception) -> bool:
    """Whether this process, of all that end with an error, is the one that tells the user.

    A launcher ends all with the first that ends, so the silent ones wait until one has spoken.
    """
    if hasattr(error, "said_first"):  # see processes.init_distributed
        if not error.said_first:
            time.sleep(1)
        return error.said_first
    # Before the processes have met, all of a node meet the same mistake, and the first says it. One
    # that nobody has ended by now has made one of its own.
    if launcher_variable("LOCAL_RANK") > 0:
        time.sleep(10)
    return True


def interrupt_at_once(number: int, frame: FrameType | None) -> None:
    """Handler of SIGINT while modules are loaded: these take a KeyboardInterrupt for their own
    trouble, and end with any traceback."""
    code = 128 + number
    leave_for_launcher("interrupted")
    if launcher_variable("RANK") == 0:
        say_last("main.py: interrupted", code)
    os._exit(code)
