"""Train and evaluate the networks of MD-SNN (arXiv 2512.04443).

    teacher   python main.py --data digits --paper_setting original
    student   python main.py --data digits --paper_setting student --bits 4
    MD-SNN    python main.py --data digits --paper_setting qamd --bits 4 --teacher_path TEACHER.pth

On several devices: torchrun --nproc_per_node=2 main.py … (or python -m torch.distributed.launch).
"""

import csv
import ctypes
import gc
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from data_loader import ImageSet, evaluation_loader, load_data_sets, loaders, set_epoch
from distiller import Distiller, softmax_kl_forward
from load_settings import (
    Settings,
    UserError,
    build_network,
    build_optimizer,
    data_set_of,
    load_checkpoint,
    load_network,
    parse_settings,
)
from models import MSResNet
from models.batch_norm import BatchNorm
from models.compiling import compile_regions
from models.neuron import THRESHOLD, count_spikes
from quantization import IntegerNetwork, at_least_float32

# (images, labels) -> (logits, loss, unweighted terms of the loss)
LossFunction = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]

LAUNCHED = "RANK" in os.environ  # by torchrun or torch.distributed.launch
RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE = (
    int(os.environ.get(name, default)) if LAUNCHED else default
    for name, default in (
        ("RANK", 0),
        ("WORLD_SIZE", 1),
        ("LOCAL_RANK", 0),
        ("LOCAL_WORLD_SIZE", 1),
    )
)
FIRST_PROCESS = RANK == 0
COLUMNS = (
    "epoch",
    "lr",
    "loss",
    "ce",
    "logit",
    "membrane",
    "train_accuracy",
    "test_accuracy",
    "best_accuracy",
    "spike_rate",
    "images_per_second",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code: 0, or 2 for a mistake of the user's."""
    try:
        settings = parse_settings(argv, WORLD_SIZE)
        with processes(settings) as device:
            if settings.eval_only is None:
                train(settings, device)
            else:
                print_accuracy(settings, device)
    except UserError as error:
        if LOCAL_RANK == 0:  # all processes of a node meet the same mistake
            print("main.py: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


@contextmanager
def processes(settings: Settings) -> Iterator[torch.device]:
    """Join the process group where a launcher started several processes; yields the device."""
    use_cuda = settings.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda", LOCAL_RANK) if use_cuda else torch.device("cpu")
    if use_cuda:
        if torch.cuda.device_count() < LOCAL_WORLD_SIZE:
            raise UserError(
                f"{LOCAL_WORLD_SIZE} processes need as many GPUs, this machine shows "
                f"{torch.cuda.device_count()}: start fewer, or use --device cpu"
            )
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    if settings.compile:
        compile_for(settings, device)
    if not LAUNCHED:
        yield device
        return
    dist.init_process_group("nccl" if use_cuda else "gloo")
    try:
        yield device
    finally:
        # gloo's threads abort now and then if a DistributedDataParallel outlives the group.
        gc.collect()
        dist.destroy_process_group()


def keep_freed_memory() -> None:
    """Let glibc keep what tensors free. By default it gives tensors of 32 MB back to the system and
    asks for new, zeroed pages at once: that takes up to half of a step on a CPU."""
    with suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def compile_for(settings: Settings, device: torch.device) -> None:
    """--compile: compile the hot functions by using a throwaway network; where that fails, warn and
    stay eager."""

    def use() -> None:
        network = build_network(settings).to(device)
        data_set, T = data_set_of(settings), settings.time_window
        shape = (T,) * data_set.events + (data_set.in_channels, 16, 16)
        images = torch.rand(4, *shape, device=device)
        labels = torch.zeros(4, dtype=torch.int64, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.amp):
            if settings.eval_only is None:
                teacher = build_network(replace(settings, paper_setting="original")).to(device)
                build_loss(settings, network, teacher)(images, labels)[1].backward()
            with torch.no_grad():
                network.eval()(images)

    start = time.perf_counter()
    if FIRST_PROCESS:
        print("compiling, which takes up to a minute ...", flush=True)
    error = compile_regions(use, softmax_kl_forward)
    if FIRST_PROCESS and error is None:
        print(f"compiled in {time.perf_counter() - start:.0f} s", flush=True)
    elif FIRST_PROCESS:
        print(f"main.py: warning: --compile: going on without it: {error}", file=sys.stderr)


def make_deterministic(settings: Settings) -> None:
    random.seed(settings.seed)
    torch.manual_seed(settings.seed)
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def data_sets(settings: Settings) -> tuple[ImageSet, ImageSet]:
    return load_data_sets(
        settings.data,
        settings.data_path,
        settings.time_window,
        settings.seed,
        settings.augment,
        data_set_of(settings).image_size,
    )


def train(settings: Settings, device: torch.device) -> None:
    make_deterministic(settings)
    shard = (settings.batch_size // WORLD_SIZE, RANK, WORLD_SIZE, settings.workers)
    train_batches, test_batches = loaders(*data_sets(settings), *shard, settings.seed, device)

    network = build_network(settings)
    teacher = None
    if settings.teacher_path is not None:
        teacher = load_network(load_checkpoint(settings.teacher_path)).to(device)
    if settings.init_from_teacher:
        network.start_from(teacher)
    network.to(device)
    if settings.accumulate > 1:
        slow_down_running_statistics(network, settings.accumulate)
    optimizer = build_optimizer(network, settings)
    steps = settings.epochs * len(train_batches)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    student = network
    if WORLD_SIZE > 1:
        # Batch norm statistics are already the same on all processes: nothing to broadcast.
        student = DistributedDataParallel(network, broadcast_buffers=False)
    loss_function = build_loss(settings, student, teacher)
    del teacher  # the loss has a faster copy

    log = Log(settings) if FIRST_PROCESS else None
    best_accuracy = 0.0
    for epoch in range(1, settings.epochs + 1):
        set_epoch(train_batches, epoch)
        if isinstance(loss_function, Distiller):
            loss_function.set_epoch(epoch, settings.epochs)
        network.train()
        row = {"epoch": epoch, "lr": scheduler.get_last_lr()[0]}
        row |= train_epoch(
            student, loss_function, train_batches, optimizer, scheduler, settings, device
        )
        correct, total, row["spike_rate"] = evaluate(network, test_batches, device, settings.amp)
        row["test_accuracy"] = correct / total
        is_best = row["test_accuracy"] > best_accuracy or epoch == 1
        best_accuracy = row["best_accuracy"] = max(best_accuracy, row["test_accuracy"])
        if log is not None:
            log.write(row)
            save_checkpoints(network, optimizer, scheduler, settings, row, is_best)
    if log is not None:
        log.close()
        print(
            f"best accuracy {best_accuracy:.2%}, last {row['test_accuracy']:.2%}; "
            f"checkpoints in {settings.save_path}"
        )


def slow_down_running_statistics(network: nn.Module, parts: int) -> None:
    """Let `parts` updates of batch norm's running statistics go as far as one did before."""
    for module in network.modules():
        if isinstance(module, BatchNorm):
            module.momentum = 1 - (1 - module.momentum) ** (1 / parts)


def build_loss(settings: Settings, student: nn.Module, teacher: MSResNet | None) -> LossFunction:
    if settings.paper_setting != "qamd":
        return cross_entropy(student)
    weights = settings.alpha, settings.beta, settings.tau, settings.beta_schedule
    return Distiller(teacher, student, settings.loss, *weights)


def cross_entropy(network: nn.Module) -> LossFunction:
    """The loss of a network trained without a teacher."""

    def loss_function(images: Tensor, labels: Tensor):
        logits = network(images)
        loss = F.cross_entropy(at_least_float32(logits), labels)
        return logits, loss, {"ce": loss}

    return loss_function


def train_epoch(
    student: nn.Module,
    loss_function: LossFunction,
    batches: DataLoader,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    settings: Settings,
    device: torch.device,
) -> dict[str, float]:
    """One pass over the training data; means over all images and processes."""
    sums: dict[str, Tensor] = {}
    images_seen, start = 0, time.perf_counter()
    bar = tqdm(batches, desc="train", leave=False, disable=not FIRST_PROCESS)
    for step, (images, labels) in enumerate(bar):
        images, labels = (x.to(device, non_blocking=True) for x in (images, labels))
        optimizer.zero_grad()
        means = add_gradients(student, loss_function, images, labels, settings)
        if settings.clip_grad:
            # Surrogate gradients through many timesteps and layers now and then explode.
            parameters = (p for group in optimizer.param_groups for p in group["params"])
            nn.utils.clip_grad_norm_(parameters, settings.clip_grad)
        optimizer.step()
        scheduler.step()

        for name, mean in means.items():
            sums[name] = sums.get(name, 0) + mean * len(labels)
        images_seen += len(labels) * WORLD_SIZE
        if step % 10 == 0:  # reading a number waits for the GPU
            bar.set_postfix(
                loss=f"{means['loss'].item():.3f}",
                accuracy=f"{means['train_accuracy'].item():.1%}",
                img_per_s=f"{images_seen / (time.perf_counter() - start):.0f}",
            )
    totals = add_over_processes(torch.stack(list(sums.values())))
    speed = images_seen / (time.perf_counter() - start)
    return dict(zip(sums, (totals / images_seen).tolist(), strict=True)) | {
        "images_per_second": None if settings.deterministic else round(speed, 1)
    }


def add_gradients(
    student: nn.Module,
    loss_function: LossFunction,
    images: Tensor,
    labels: Tensor,
    settings: Settings,
) -> dict[str, Tensor]:
    """Add the gradients of a batch's mean loss, taken in `settings.accumulate` parts.

    Returns the means over the batch (float64 scalars) of the loss, its terms and the accuracy.
    """
    means: dict[str, Tensor] = {}
    # Equal parts, but for the one batch of a data set that is smaller than --batch_size.
    chunks = (x.chunk(settings.accumulate) for x in (images, labels))
    parts = list(zip(*chunks, strict=True))
    for number, (images_k, labels_k) in enumerate(parts, 1):
        share = len(labels_k) / len(labels)
        exchange_later = number < len(parts) and isinstance(student, DistributedDataParallel)
        with student.no_sync() if exchange_later else nullcontext():
            with torch.autocast(images.device.type, torch.bfloat16, enabled=settings.amp):
                logits, loss, terms = loss_function(images_k, labels_k)
            (share * loss).backward()
        correct = (logits.argmax(1) == labels_k).double().mean()
        for name, mean in (("loss", loss), *terms.items(), ("train_accuracy", correct)):
            means[name] = means.get(name, 0) + share * mean.detach().double()
    return means


@torch.no_grad()
def evaluate(
    network: nn.Module, batches: DataLoader, device: torch.device, amp: bool
) -> tuple[int, int, float]:
    """(correct images, all images, spikes per neuron and timestep) over all processes."""
    network.eval()
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    with count_spikes(network) as spikes:
        for images, labels in tqdm(batches, "test", leave=False, disable=not FIRST_PROCESS):
            images, labels = (x.to(device, non_blocking=True) for x in (images, labels))
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                logits = network(images)
            counts += torch.stack(
                [(logits.argmax(1) == labels).sum(), counts.new_tensor(len(labels))]
            )
    zero = torch.zeros(2, network.time_window, dtype=torch.float64, device=device)
    fired, neurons = add_over_processes(sum(spikes.values(), zero)).sum(dim=1)
    correct, total = add_over_processes(counts).tolist()
    return correct, total, (fired / neurons).item()


def add_over_processes(x: Tensor) -> Tensor:
    if WORLD_SIZE > 1:
        dist.all_reduce(x)
    return x


def print_accuracy(settings: Settings, device: torch.device) -> None:
    make_deterministic(settings)
    network = load_network(load_checkpoint(settings.eval_only)).to(device)
    _, test_set = data_sets(settings)
    batch_size = max(1, settings.batch_size // WORLD_SIZE)
    batches = evaluation_loader(test_set, batch_size, RANK, WORLD_SIZE, settings.workers)
    correct, total, spike_rate = evaluate(network, batches, device, settings.amp)
    if FIRST_PROCESS:
        print(
            f"accuracy {correct / total:.2%} ({correct} of {total} test images), "
            f"spike rate {spike_rate:.2%}"
        )
    if settings.integer:
        print_integer_accuracy(network, batches, device)


@torch.no_grad()
def print_integer_accuracy(network: nn.Module, batches: DataLoader, device: torch.device) -> None:
    """Evaluate with integers alone and count the spikes that differ from the network's own."""
    integer_network = IntegerNetwork(network)
    counts = torch.zeros(4, dtype=torch.int64, device=device)
    for images, labels in tqdm(batches, "integer", leave=False, disable=not FIRST_PROCESS):
        images, labels = images.to(device), labels.to(device)
        _, membranes = network(images, membranes=True)
        try:
            logits, spikes = integer_network(images)
        except OverflowError as error:
            raise UserError(f"--integer: {error}") from None
        differing = sum(
            ((u > THRESHOLD).flatten(0, 1) != s).sum()
            for u, s in zip(membranes, spikes, strict=True)
        )
        correct = (logits.argmax(1) == labels).sum()
        seen = counts.new_tensor([len(labels), sum(s.numel() for s in spikes)])
        counts += torch.stack([correct, seen[0], differing, seen[1]])
    correct, total, differing, neurons = add_over_processes(counts).tolist()
    if FIRST_PROCESS:
        print(
            f"integers alone: accuracy {correct / total:.2%} ({correct} of {total} test images), "
            f"{differing} of {neurons} spikes differ"
        )


class Log:
    """What a run leaves beside its checkpoints: settings.json, metrics.csv, TensorBoard events."""

    def __init__(self, settings: Settings):
        # Imported here: it takes seconds, and only the first process of a training needs it.
        from torch.utils.tensorboard import SummaryWriter

        folder = Path(settings.save_path)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "settings.json").write_text(json.dumps(about_run(settings), indent=2) + "\n")
        self.metrics = folder / "metrics.csv"
        with self.metrics.open("w", newline="") as file:
            csv.DictWriter(file, COLUMNS).writeheader()
        self.tensorboard = SummaryWriter(folder)

    def write(self, row: dict[str, Any]) -> None:
        with self.metrics.open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS).writerow(row)
        for name, value in row.items():
            if name != "epoch" and value is not None:
                self.tensorboard.add_scalar(name, value, row["epoch"])
        print(
            f"epoch {row['epoch']}: loss {row['loss']:.4f}, train {row['train_accuracy']:.2%}, "
            f"test {row['test_accuracy']:.2%}, spike rate {row['spike_rate']:.2%}",
            flush=True,
        )

    def close(self) -> None:
        self.tensorboard.close()


def about_run(settings: Settings) -> dict[str, Any]:
    """The contents of settings.json: what is needed to run it again."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "torchvision", "numpy", "scikit-learn", "spikingjelly"):
        with suppress(PackageNotFoundError):  # not every data set needs every one
            versions[package] = version(package)
    try:
        commit = subprocess.run(
            ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None  # not a git checkout, or no git
    return asdict(settings) | {
        "world_size": WORLD_SIZE,
        "git_commit": commit,
        "versions": versions,
    }


def save_checkpoints(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    settings: Settings,
    row: dict[str, Any],
    is_best: bool,
) -> None:
    """Write SETTING-last.pth and, where this epoch is the best so far, SETTING-best.pth."""
    checkpoint = {
        "model": dict(network.state_dict()),
        "settings": asdict(settings),
        "epoch": row["epoch"],
        "accuracy": row["test_accuracy"],
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "random_states": {
            "python": random.getstate(),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all(),
        },
    }
    for name in ("last", "best") if is_best else ("last",):
        save_whole(checkpoint, Path(settings.save_path) / f"{settings.paper_setting}-{name}.pth")


def save_whole(checkpoint: dict[str, Any], path: Path) -> None:
    """Replace the file at `path` or leave it as it was: a reader never sees half a checkpoint."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


if __name__ == "__main__":
    sys.exit(main())
