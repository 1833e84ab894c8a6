"""The sentence that ends a run, kept in sight under torchrun and torch.distributed.launch.

Both end with 24 to 35 lines of their own after the program's last one. What a process leaves in
TORCHELASTIC_ERROR_FILE stands at the end of those, and in the launcher's own error file; but after
a signal they are a bare traceback. So the sentence is said again when the launcher has ended.
"""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from types import FrameType

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


def interrupt_at_once(number: int, frame: FrameType | None) -> None:
    """Handler of SIGINT while modules are loaded: these take a KeyboardInterrupt for their own
    trouble, and end with any traceback."""
    code = 128 + number
    leave_for_launcher("interrupted")
    if os.environ.get("RANK", "0") == "0":
        say_last("main.py: interrupted", code)
    os._exit(code)
