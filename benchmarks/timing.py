"""Times of several ways to do the same work, taken in turn in one process, on a quiet machine."""

import argparse
import gc
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext, suppress
from itertools import chain
from pathlib import Path

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NOISE = 1.08  # a round is repeated where the calibration took this much longer than at its best


def machine(device: torch.device) -> str:
    """Hardware and versions, for the head of a result."""
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    else:
        models = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
        name = models[0].split(":")[1].strip() if models else platform.processor()
        name = f"{name}, {torch.get_num_threads()} cores"
    return f"{name}; torch {torch.__version__}, Python {platform.python_version()}"


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(function: Callable[[], object], device: torch.device) -> float:
    wait(device)
    start = time.perf_counter()
    function()
    wait(device)
    return time.perf_counter() - start


def in_turn(
    functions: dict[str, Callable[[], object]], rounds: int, device: torch.device
) -> tuple[dict[str, list[float]], int]:
    """Seconds of each function in each round, and how many rounds were repeated.

    A round runs every function once, after two rounds that are not counted. Before and after each
    a matrix product is timed: where other work on the machine slows it down, the round is repeated,
    but no more than `rounds` times in all.
    """
    side = 8192 if device.type == "cuda" else 1024
    matrix = torch.rand(side, side, device=device)

    def calibration() -> float:
        return min(seconds(lambda: matrix @ matrix, device) for _ in range(3))

    best = min(calibration() for _ in range(10))
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(2):
        for function in functions.values():
            function()
    repeated = 0
    while len(next(iter(times.values()))) < rounds:
        before = calibration()
        row = {name: seconds(function, device) for name, function in functions.items()}
        slowest = max(before, calibration())
        best = min(best, before)
        if slowest > NOISE * best and repeated < rounds:
            repeated += 1
            continue
        for name, value in row.items():
            times[name].append(value)
    return times, repeated


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """(first quartile, median, third quartile)"""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def ratios(times: list[float], reference: list[float]) -> tuple[float, float, float]:
    """Quartiles of the ratios to a reference, taken round by round."""
    return quartiles([a / b for a, b in zip(times, reference, strict=True)])


def with_spread(values: tuple[float, float, float], digits: int) -> str:
    low, median, high = (f"{value:z.{digits}f}" for value in values)
    return f"{median} ({low} … {high})"


class OwnProcess:
    """`make(*arguments)` in a process of its own, whose methods run there when they are asked for.

    Its C library treats memory as it does by default, whatever was asked of this process's.
    """

    def __init__(self, make: Callable[..., object], *arguments: object):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
        process.start()
        theirs.close()  # so that the end of the process is an EOFError here

    def call(self, method: str) -> object:
        """What a method returns without arguments. EOFError where it failed."""
        self.connection.send(method)
        return self.connection.recv()


def _serve(connection, make, arguments) -> None:
    target = make(*arguments)
    with suppress(EOFError):  # the other process has ended, or wants no more
        while True:
            connection.send(getattr(target, connection.recv())())


class _Peak:
    def __init__(self, make: Callable[..., Callable[[], object]], *arguments: object):
        self.before, self.function = resident_peak(), make(*arguments)

    def megabytes(self) -> float:
        for _ in range(3):
            self.function()
        return resident_peak() - self.before


def peak_megabytes(make: Callable[..., Callable[[], object]], *arguments: object) -> float:
    """Largest memory that `make(*arguments)` and three runs of the function that it returns need:
    on a GPU of what it allocates, on a CPU of what a process of its own has.

    There tensors are mapped one by one, so that a freed one is not counted again.
    """
    if torch.cuda.is_available():
        gc.collect()
        before = torch.cuda.memory_allocated()
        function = make(*arguments)
        function()  # cuDNN tries its algorithms, with the memory that the greediest wants
        torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            function()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # of glibc; read when a process starts
    apart = OwnProcess(_Peak, make, *arguments)
    del os.environ["MALLOC_MMAP_THRESHOLD_"]
    return apart.call("megabytes")


def resident_peak() -> float:
    """MB; unlike getrusage's, not inherited from the process that started this one."""
    status = dict(x.split(":") for x in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024


def parser_of(docstring: str, rounds: int | None = None) -> argparse.ArgumentParser:
    """The options of a benchmark, which its first line describes."""
    parser = argparse.ArgumentParser(description=docstring.splitlines()[0])
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    return parser


def table(header: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def report(
    benchmark: str,
    arguments: Sequence[str] | None,
    device: torch.device,
    parts: Iterable[str],
    out: Path | None,
) -> None:
    """Print paragraphs below the command and the machine, and write them to `out` if there is one:
    each as soon as `parts` gives it, so that a benchmark that is stopped has not measured in vain.

    `arguments` are those of the benchmark's main: None for the command line's.
    """
    given = sys.argv[1:] if arguments is None else arguments
    command = " ".join([f"python -m benchmarks.{benchmark}", *given])
    with nullcontext() if out is None else out.open("w") as file:
        for part in chain((f"`{command}`", f"\n{machine(device)}"), (f"\n{x}" for x in parts)):
            print(part, flush=True)
            if file is not None:
                print(part, file=file, flush=True)
