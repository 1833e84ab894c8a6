"""Weak scaling and the price of communication: python -m benchmarks.scaling

Processes on one machine train MS-ResNet-18 on random images, each with the same number of images a
step and one thread. The table says how a step grows with the processes, which share of it is
communication, and whether sending gradients while backward runs (DistributedDataParallel) beats
sending them all after it. All ways to make a step are measured in turn, in the same run and by all
processes at the same time, so that the competition for the cores is the same for each.
"""

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.timing import parser_of, quartiles, report, table, wait, with_spread
from models import MSResNet, batch_norm

HEADER = (
    "width",
    "processes",
    "img/s",
    "of linear, %",
    "step, ms",
    "communication, %",
    "batch norm's, %",
    "gradients', %",
    "more computation, %",
    "gradients after backward, %",
    "batch norm's messages alone, ms",
)
LEGEND = """\
Medians over the rounds, with their quartiles. A step ends when the last process is done.

- *of linear*: img/s, where as many times the img/s of one process is 100 %.
- *communication*: share of the step that goes when nothing is sent: the same instructions, but
  batch norm's statistics and the gradients stay where they are. The next two are its parts.
- *more computation*: share of the step by which batch norm over several processes computes longer
  than that of one process, messages apart.
- *gradients after backward*: how much longer a step takes (below 0: shorter) that sends all
  gradients at once when backward is over, instead of overlapping them with it.
- *batch norm's messages alone*: a step's all_reduces of batch norm (one forward and one backward a
  layer, each waits for the one before) with nothing else to do: latency, sizes hardly matter."""


def ways_to_step(network: MSResNet, batch: int) -> dict[str, Callable[[], None]]:
    """One training step: as main.py makes it, and with less and less of what processes add to it.

    `network` trains on `batch` random images (3, 32, 32), where it is.
    """
    device = network.linear.weight.device
    images = torch.rand(batch, 3, 32, 32, device=device)
    labels = torch.randint(10, (batch,), device=device)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)

    def step(student: nn.Module = network, after_backward: Callable[[], None] | None = None):
        optimizer.zero_grad()
        F.cross_entropy(student(images), labels).backward()
        if after_backward is not None:
            after_backward()
        optimizer.step()

    def average_gradients() -> None:
        gradients = [p.grad for p in network.parameters()]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        means = (flat / dist.get_world_size()).split([g.numel() for g in gradients])
        for gradient, mean in zip(gradients, means, strict=True):
            gradient.copy_(mean.view_as(gradient))

    def send_nothing() -> None:
        with mock.patch.object(dist, "all_reduce"):
            step()

    def as_one_process() -> None:
        with mock.patch.object(batch_norm, "world_size", return_value=1):
            step()

    def messages_alone() -> None:
        for module in network.modules():
            if isinstance(module, batch_norm.BatchNorm):
                for size in (2 * module.num_features + 1, 2 * module.num_features):
                    dist.all_reduce(torch.zeros(size, dtype=torch.float64, device=device))

    if dist.get_world_size() == 1:
        return {"all": step}
    overlapping = DistributedDataParallel(network, broadcast_buffers=False)
    return {
        "all": lambda: step(overlapping),
        "after backward": lambda: step(after_backward=average_gradients),
        "batch norm": step,
        "nothing": send_nothing,
        "one process": as_one_process,
        "messages": messages_alone,
    }


def measure(rank: int, processes: int, width: int, args: argparse.Namespace, folder: str) -> None:
    """What each process runs; the first writes the seconds of a step, {way: [one per round]}."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = torch.device("cpu")
    if args.backend == "nccl":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    store = f"file://{folder}/store"
    dist.init_process_group(args.backend, store, rank=rank, world_size=processes)
    ways = ways_to_step(MSResNet(18, 10, 4, 3, width).to(device), args.batch)
    seconds = {way: [] for way in ways}
    # The steps of a narrow network are short and scatter: it gets more rounds.
    for _ in range(1 + args.rounds * max(args.width) // width):
        for way, step in ways.items():
            meet(device)
            start = time.perf_counter()
            step()
            meet(device)
            seconds[way].append(time.perf_counter() - start)
    if rank == 0:
        after_warm_up = {way: times[1:] for way, times in seconds.items()}
        Path(folder, "seconds.json").write_text(json.dumps(after_warm_up))
    del ways, step
    gc.collect()  # gloo's threads abort now and then if DistributedDataParallel outlives the group
    dist.destroy_process_group()


def meet(device: torch.device) -> None:
    dist.barrier()
    wait(device)


def run(processes: int, width: int, args: argparse.Namespace) -> dict[str, list[float]]:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(measure, (processes, width, args, folder), processes)
        return json.loads(Path(folder, "seconds.json").read_text())


def spread(values: list[float]) -> str:
    return with_spread(quartiles(values), 0)


def table_row(
    width: int, processes: int, batch: int, seconds: dict[str, list[float]], alone: float
) -> list[str]:
    """Cells of the table; `alone` is the median step of one process, in seconds."""
    step = statistics.median(seconds["all"])
    cells = [
        *(
            str(width),
            str(processes),
            f"{processes * batch / step:.1f}",
            f"{100 * alone / step:.0f}",
        ),
        spread([1e3 * s for s in seconds["all"]]),
    ]
    if processes == 1:
        return cells + ["-"] * (len(HEADER) - len(cells))

    def share(more: str, less: str) -> str:
        rounds = zip(seconds[more], seconds[less], seconds["all"], strict=True)
        return spread([100 * (a - b) / whole for a, b, whole in rounds])

    return [
        *cells,
        share("all", "nothing"),
        share("batch norm", "nothing"),
        share("all", "batch norm"),
        share("nothing", "one process"),
        share("after backward", "all"),
        spread([1e3 * s for s in seconds["messages"]]),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, rounds=4)  # of all ways in turn, of the widest network
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4], help="beside one")
    parser.add_argument("--width", type=int, nargs="+", default=[16, 64], help="of the network")
    parser.add_argument("--batch", type=int, default=8, help="images per process and step (8)")
    args = parser.parse_args(arguments)
    cores, most = os.cpu_count() or 1, max(args.processes)
    args.backend = "nccl" if torch.cuda.device_count() >= most else "gloo"

    rows = []
    for width in args.width:
        seconds = run(1, width, args)
        alone = statistics.median(seconds["all"])
        rows.append(table_row(width, 1, args.batch, seconds, alone))
        for processes in args.processes:
            seconds = run(processes, width, args)
            rows.append(table_row(width, processes, args.batch, seconds, alone))

    parts = [
        f"{args.backend}, one thread a process; MS-ResNet-18, T = 4, 32×32, float32, {args.batch} "
        "images a process",
        table(HEADER, rows),
        LEGEND,
    ]
    if args.backend == "gloo" and most > cores:
        parts.append(
            f"**Oversubscribed**: {most} processes share {cores} cores, so they cannot reach more "
            f"than {100 * cores / most:.0f} % of linear, and their communication is also waiting "
            "for a core."
        )
    device = torch.device("cuda" if args.backend == "nccl" else "cpu")
    report("scaling", arguments, device, parts, args.out)


if __name__ == "__main__":
    main()
