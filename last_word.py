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
AGAIN = """\
import os, select, sys
if select.select([int(sys.argv[1])], [], [], float(sys.argv[2]))[0]:
    os.write(2, os.fsencode(sys.argv[3]) + b"\\n")
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
    # A process of its own, as the launcher ends after this one; in a session of its own, as the
    # launcher ends all that are left in this one's.
    with suppress(AttributeError, OSError):  # not Linux, or no memory left
        launcher = os.pidfd_open(os.getppid())
        subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", AGAIN, str(launcher), str(PATIENCE), line],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[launcher],
            start_new_session=True,
        )


def interrupt_at_once(number: int, frame: FrameType | None) -> None:
    """Handler of SIGINT while modules are loaded: these take a KeyboardInterrupt for their own
    trouble, and end with any traceback."""
    code = 128 + number
    if os.environ.get("RANK", "0") == "0":
        say_last("main.py: interrupted", code)
    os._exit(code)
