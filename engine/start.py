"""How main.py's processes start and end: their device, their group, random numbers and memory, and
what the user is told about an error."""

import ctypes
import multiprocessing
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from typing import NoReturn

import torch
import torch.distributed as dist

from engine.run import how_to_go_on
from runtime.command import cannot_print
from runtime.errors import UserError
from runtime.files import digest
from runtime.launcher import is_launched, launcher_variable
from runtime.processes import all_agree, has_started_before, init_distributed, is_main_process
from settings import SHARED_GPU, Settings

# What may differ between the nodes of a run.
PER_PROCESS = {"data_path", "cache_path", "save_path", "teacher_path", "workers"}


@contextmanager
def start_processes(settings: Settings) -> Iterator[tuple[Settings, torch.device]]:
    """While open, this process has its device and, under a launcher, is one of a group.

    Yields the settings too: a launcher's next attempt goes on with the run of the one before.
    Raises UserError where the processes have other settings, or too few GPUs.
    """
    device, backend = device_of(settings)
    with init_distributed(backend):
        if is_launched():
            _refuse_different_settings(settings)
        if has_started_before():
            # To refuse or move away what the first attempt left would lose it.
            settings = replace(settings, resume=True, overwrite=False)
        yield settings, device


def device_of(settings: Settings) -> tuple[torch.device, str]:
    """This process's device, and the backend by which processes talk."""
    if settings.device == "cpu" or not torch.cuda.is_available():
        keep_freed_memory()
        return torch.device("cpu"), "gloo"
    gpus, local_rank = torch.cuda.device_count(), launcher_variable("LOCAL_RANK")
    here = max(launcher_variable("LOCAL_WORLD_SIZE"), local_rank + 1)  # not every launcher sets it
    if gpus < here and settings.device != SHARED_GPU:
        raise UserError(
            f"{here} processes need as many GPUs, this machine shows {gpus}: start "
            f"fewer, or use --device cpu (or --device {SHARED_GPU}, which is slow)"
        )
    if settings.device == SHARED_GPU and is_main_process():
        print(f"processes: {here}, GPUs: {gpus}: they talk by gloo, slowly", flush=True)
    device = torch.device("cuda", local_rank % gpus)
    torch.cuda.set_device(device)
    torch.backends.cudnn.benchmark = not settings.deterministic
    # NCCL refuses two processes on one GPU.
    return device, "gloo" if settings.device == SHARED_GPU else "nccl"


def _refuse_different_settings(settings: Settings) -> None:
    """Processes that were started one by one may have got different arguments."""
    ours = {name: x for name, x in asdict(settings).items() if name not in PER_PROCESS}
    ours["teacher's file"] = settings.teacher_path and digest(settings.teacher_path)
    ours["eval_only"] = settings.eval_only and digest(settings.eval_only)
    all_agree(ours, "was started", "start all with the same options")


def keep_freed_memory() -> None:
    """Let glibc keep what tensors free. By default it gives tensors of 32 MB back to the system and
    asks for new, zeroed pages at once: that takes up to half of a step on a CPU."""
    with suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def make_deterministic(settings: Settings) -> None:
    """Seed all that is random; with --deterministic the same run gives the same bits."""
    random.seed(settings.seed)
    torch.manual_seed(settings.seed)
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def explain(error: Exception, settings: Settings | None) -> str | None:
    """The line for the user about what ended the run; None where it is a fault of the program."""
    text, go_on = str(error), "start it again"
    if settings is not None and settings.eval_only is None:
        go_on = how_to_go_on(settings, f"{settings.paper_setting}-last.pth")
    if isinstance(error, RuntimeError) and text.startswith("DataLoader worker (pid"):
        return f"{text.splitlines()[0]} (killed, or no memory left?): {go_on}"
    if isinstance(error, RuntimeError) and text.startswith("DataLoader timed out"):
        return f"the data have stopped coming ({text.splitlines()[0]}): {go_on}"
    if isinstance(error, torch.OutOfMemoryError):
        less = "take a smaller --batch_size, or --accumulate N (a batch in N parts)"
        return f"the GPU has no memory left ({text.splitlines()[0]}): {less}"
    if cannot_print(error):
        return f"cannot print ({error.strerror}): {go_on}"
    if is_launched() and (isinstance(error, dist.DistError) or "gloo" in text):
        return f"another process of this run has died or is silent: {go_on}"
    return None


def leave(code: int) -> NoReturn:
    """End the program."""
    for worker in multiprocessing.active_children():
        worker.kill()  # one that hangs would be waited for
    if is_launched() and code != 0:
        # The process group is still there, and taking it down may hang or abort.
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
