"""Programs in processes of their own that start at once: forked from one that has imported torch,
which takes seconds of a start. What is said of starts and launchers is tested with real ones."""

import multiprocessing
import os
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from conftest import REPOSITORY

CONTEXT = multiprocessing.get_context("forkserver")
IMPORTED = ["main", "sklearn.datasets", "sklearn.model_selection", "torch._dynamo"]


class Program(CONTEXT.Process):
    """A Python file that runs with these arguments, in a session of its own; has what is used here
    of subprocess.Popen. `stdout` is a file, where the outputs are not to be kept."""

    def __init__(
        self,
        program: Path,
        *arguments: object,
        cwd: Path = REPOSITORY,
        env: dict[str, str] | None = None,
        stdout: str | None = None,
    ):
        super().__init__()
        self.command, self.cwd = [str(program), *map(str, arguments)], cwd
        self.env = dict(os.environ if env is None else env)
        self.folder = tempfile.mkdtemp()
        self.outputs = [stdout or f"{self.folder}/out", f"{self.folder}/err"]
        CONTEXT.set_forkserver_preload(IMPORTED)
        self.start()

    def run(self) -> None:
        os.setsid()
        for number, path in enumerate(self.outputs, 1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), number)
        os.chdir(self.cwd)
        os.environ.clear()
        os.environ.update(self.env)
        sys.argv = self.command
        torch.set_num_threads(1)
        multiprocessing.set_start_method(None, force=True)  # as of a program, not as of this
        runpy.run_path(self.command[0], run_name="__main__")

    def poll(self) -> int | None:
        return self.exitcode

    @property
    def returncode(self) -> int | None:
        return self.exitcode

    def communicate(self, timeout: float = 120) -> tuple[str, str]:
        self.join(timeout)
        if self.exitcode is None:
            self.kill()
            raise subprocess.TimeoutExpired(self.command, timeout)
        out, err = (Path(self.folder, x) for x in ("out", "err"))
        said = out.read_text() if out.exists() else "", err.read_text()
        shutil.rmtree(self.folder)
        return said


def launched(processes: int, *command: object, **how) -> subprocess.CompletedProcess:
    """What so many processes say and end with together, several started as by a launcher."""
    environment = how.pop("env", os.environ)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    ranks = [world | dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)) for rank in range(processes)]
    ranks = ranks if processes > 1 else [{}]
    started = [Program(*command, env=environment | rank, **how) for rank in ranks]
    out, err = map("".join, zip(*(one.communicate() for one in started), strict=True))
    code = next((one.returncode for one in started if one.returncode), 0)
    return subprocess.CompletedProcess(command, code, out, err)
