"""Train and evaluate the networks of MD-SNN (arXiv 2512.04443).

    teacher   python main.py --data digits --paper_setting original
    student   python main.py --data digits --paper_setting student --bits 4
    MD-SNN    python main.py --data digits --paper_setting qamd --bits 4 --teacher_path TEACHER.pth

On several devices: torchrun --nproc_per_node=2 main.py … (or python -m torch.distributed.launch).
"""

if __name__ == "__main__":
    import signal

    from runtime.launcher import interrupt_at_once

    # The imports below take seconds. A job in the background has Ctrl-C ignored.
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt_at_once)

import ctypes
import math
import multiprocessing
import os
import random
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from itertools import islice
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from checkpoints import Checkpoint, build_network, load_checkpoint
from data_loader import (
    ImageSet,
    Share,
    evaluation_loader,
    input_step_of,
    input_text,
    load_data_sets,
    refuse_another_fold,
    set_epoch,
    training_loader,
)
from data_sets import DATA_SETS
from display import percent
from distiller import Distiller
from engine import evaluation
from engine.compile import compile_regions
from engine.cuda_graphs import WARM_UP, Gradients, ReplayedGradients
from engine.log import (
    Log,
    ProgressBar,
    ending,
    expectation,
    expectation_text,
    figure,
    header,
    macs_of_image,
    speed,
)
from engine.metrics import EpochSums
from engine.numerics import first_bad_gradient, watch_numbers
from engine.run import Run, how_to_go_on, not_finite
from engine.run_folder import check_save_path, deciding
from kernels import at_least_float32
from load_settings import (
    build_optimizer,
    build_scheduler,
    load_network,
    parse_settings,
    refuse_single_values,
    time_window_of,
)
from models import MSResNet
from models.batch_norm import estimate_statistics
from models.integer_network import IntegerNetwork
from models.neuron import LIF, THRESHOLD, count_spikes
from runtime.command import cannot_print, run_command
from runtime.errors import UserError
from runtime.files import digest
from runtime.launcher import check_launcher, is_launched, launcher_variable
from runtime.processes import (
    all_agree,
    all_or_none,
    init_distributed,
    is_main_process,
    of_all_processes,
    of_first_process,
    rank,
    sum_over_processes,
    world_size,
)
from settings import SHARED_GPU, Settings, data_set_of

# (images, labels) -> (logits, loss, unweighted terms of the loss)
LossFunction = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]

# What may differ between the nodes of a run.
PER_PROCESS = {"data_path", "cache_path", "save_path", "teacher_path", "workers"}
RUN_STARTED = "run started"  # in the launcher's store: an attempt has taken the save path
SHARE_OF_STATISTICS = 0.05  # of an epoch's batches, without gradients: under 2 % of its time
MOST_OF_STATISTICS = 20  # batches: they stay in memory, and are little beside what a step takes
READ_EVERY = 10  # steps: reading a number waits for the GPU
TIMED = 2  # batches of a dry run, after those in which all warms up


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code: 0, 2 for what the user has to know of, and
    128 + its number after a signal."""
    settings: Settings | None = None

    def work() -> None:
        nonlocal settings
        check_launcher()
        settings = parse_settings(argv, launcher_variable("WORLD_SIZE"))
        with evaluation.output(settings) as out, processes(settings) as (device, store):
            if settings.eval_only is None:
                expected = train(settings, device, store)
                if settings.json and is_main_process():
                    print(evaluation.as_json(expected), end="", file=out)
            else:
                found = (measure if settings.predict is None else evaluation.predict)(
                    settings, device
                )
                if is_main_process():
                    print(evaluation.result_text(found, settings), file=out)

    return run_command("main.py", work, lambda error: what_to_say(error, settings))


def what_to_say(error: Exception, settings: Settings | None) -> str | None:
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


@contextmanager
def processes(settings: Settings) -> Iterator[tuple[torch.device, dist.Store | None]]:
    """Join the process group where a launcher started several processes.

    Yields the device, and the launcher's store, which all its attempts share.
    """
    use_cuda = settings.device != "cpu" and torch.cuda.is_available()
    device, backend = torch.device("cpu"), "gloo"
    if use_cuda:
        gpus, backend = torch.cuda.device_count(), "nccl"
        local_rank = launcher_variable("LOCAL_RANK")
        # Not every launcher says the first.
        here = max(launcher_variable("LOCAL_WORLD_SIZE"), local_rank + 1)
        if gpus < here and settings.device != SHARED_GPU:
            raise UserError(
                f"{here} processes need as many GPUs, this machine shows {gpus}: start "
                f"fewer, or use --device cpu (or --device {SHARED_GPU}, which is slow)"
            )
        if settings.device == SHARED_GPU:
            backend = "gloo"  # NCCL refuses two processes on one GPU
            if is_main_process():
                print(f"processes: {here}, GPUs: {gpus}: they talk by gloo, slowly", flush=True)
        device = torch.device("cuda", local_rank % gpus)
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = not settings.deterministic
    else:
        keep_freed_memory()
    with init_distributed(backend) as store:
        refuse_different_settings(settings)
        yield device, store


def refuse_different_settings(settings: Settings) -> None:
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


def compile_for(
    settings: Settings,
    device: torch.device,
    test_set: ImageSet,
    train_set: ImageSet | None = None,
    taught_by: Checkpoint | None = None,
) -> None:
    """--compile: compile the hot functions by using throwaway networks as the run will use its
    own; where that fails, warn and stay eager. `train_set`: none in an evaluation."""
    batch = max(1, settings.batch_size // world_size())
    training_images = 0 if train_set is None else len(train_set)
    share = min(batch, -(-training_images // world_size()))
    trained = -(-share // settings.accumulate)
    evaluated = [test_set]
    if train_set is not None and train_set.held_out is not None:
        evaluated.append(train_set.held_out)
    shares = [len(range(rank(), len(data_set), world_size())) for data_set in evaluated]
    batches_tested = {size for n in shares for size in (min(batch, n), n % batch)} - {0}

    def use() -> None:
        network = build_network(settings).to(device)
        image, _ = test_set[0]
        images = torch.rand(batch, *image.shape, device=device)
        labels = torch.zeros(len(images), dtype=torch.int64, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.amp), torch.no_grad():
            network.eval()
            with all_or_none():
                for size in batches_tested:
                    network(images[:size])
                    if settings.integer:
                        network(images[:size], membranes=True)
        if not trained:
            return
        teacher = None if taught_by is None else build_network(taught_by.settings).to(device)
        loss_function = build_loss(settings, network.train(), teacher)
        for T in settings.trained_at:
            with (
                network.running_for(T),
                torch.autocast(device.type, torch.bfloat16, enabled=settings.amp),
            ):
                _, loss, _ = loss_function(images[:trained], labels[:trained])
            loss.backward()
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.amp):
            estimate_statistics(network, [images[:share]], settings.trained_at)

    start = time.perf_counter()
    if is_main_process():
        print("compiling, which takes up to a minute ...", flush=True)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        error = compile_regions(use, every_size=device.type == "cpu")
    if is_main_process() and error is None:
        print(f"compiled in {time.perf_counter() - start:.0f} s", flush=True)
    elif is_main_process():
        print(f"main.py: warning: --compile: going on without it: {error}", file=sys.stderr)


def make_deterministic(settings: Settings) -> None:
    random.seed(settings.seed)
    torch.manual_seed(settings.seed)
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def data_sets(settings: Settings) -> tuple[ImageSet, ImageSet]:
    """Training and test data; for an evaluation as the checkpoint's network reads them."""
    input_step = None if settings.eval_only is None else input_step_of(settings)
    train_set, test_set = load_data_sets(settings, input_step)
    if world_size() > 1:
        # With other numbers of batches the processes would wait for each other for ever.
        all_agree(
            {
                "training images": len(train_set),
                "test images": len(test_set),
                "input step": train_set.step,
                "labels' checksum": zlib.crc32(train_set.labels.numpy(), len(test_set)),
                "training images' checksum": zlib.crc32(train_set.rows.numpy())
                if train_set.rows is not None
                else 0,
            },
            "found data",
            "give all the same --data_path, or copies of it",
        )
    if is_main_process() and (text := input_text(train_set)) is not None:
        print(text, flush=True)
    return train_set, test_set


def with_input_step(settings: Settings, step: float | None, teacher: Checkpoint | None) -> Settings:
    """The settings with what the training data have told. Raises UserError where the teacher reads
    the same frames in other steps; those of another T have other counts."""
    if step not in (None, DATA_SETS[settings.data].image_step):
        settings = replace(settings, input_step=step)
    if teacher is not None:
        theirs = input_step_of(teacher.settings)
        same_frames = teacher.settings.time_window == settings.time_window
        if same_frames and theirs != input_step_of(settings):
            of_teacher = teacher.settings  # a found step is that of the images that are used
            used = f" (it had --val_share {of_teacher.val_share} --seed {of_teacher.seed})"
            used *= of_teacher.val_share > 0 or settings.val_share > 0
            raise UserError(
                f"--teacher_path {settings.teacher_path} was trained with the input step "
                f"{theirs!r}, the training data in {settings.data_path} have {step!r}: give the "
                f"data that the teacher was trained on{used}, or train a teacher on these"
            )
    return settings


def train(
    settings: Settings, device: torch.device, store: dist.Store | None = None
) -> dict[str, float] | None:
    """Train a network, or what is left of it; of a dry run what the training will take."""
    if store is not None and store.check([RUN_STARTED]):
        # A launcher's next attempt goes on: to refuse or move away the first would lose it.
        settings = replace(settings, resume=True, overwrite=False)
    of_first_process(lambda: check_save_path(settings))
    make_deterministic(settings)
    share = Share(settings.batch_size // world_size(), rank(), world_size(), settings.workers)
    train_set, test_set = data_sets(settings)
    refuse_single_values(settings, world_size(), len(train_set))
    if train_set.held_out is not None and len(train_set.held_out) == 0:
        raise UserError(
            f"--val_share {settings.val_share} holds out none of the {len(train_set)} training "
            "images: take more"
        )
    taught_by = None
    if settings.teacher_path is not None:
        taught_by = load_checkpoint(settings.teacher_path)
        refuse_another_fold(taught_by, settings.teacher_path, settings, train_set)
    settings = with_input_step(settings, train_set.step, taught_by)
    train_batches = training_loader(train_set, share, device)
    test_batches = evaluation_loader(test_set, share, device)
    val_batches = None
    if train_set.held_out is not None:
        val_batches = evaluation_loader(train_set.held_out, share, device)
    if is_main_process():  # before --compile: it would compile for the one image of this, too
        of_data = data_set_of(settings)
        macs = macs_of_image(settings.model_depth, settings.width, settings.time_window, of_data)
    images_of_statistics = first_images(train_batches, device)
    if settings.compile:
        compile_for(settings, device, test_set, train_set, taught_by)

    network = build_network(settings)
    teacher = None if taught_by is None else load_network(taught_by).to(device)
    if settings.init_from_teacher:
        network.start_from(teacher)
    network.to(device)
    optimizer = build_optimizer(network, settings)
    student = network
    if world_size() > 1:
        # Batch norm statistics are already the same on all processes: nothing to broadcast.
        student = DistributedDataParallel(network, broadcast_buffers=False)
    loss_function = build_loss(settings, student, teacher)
    del teacher  # the loss has a faster copy
    gradients = gradients_of(settings, student, loss_function, device)

    steps = len(train_batches)
    with Run(settings, network, optimizer, len(train_set), steps, test_set.classes) as run:
        if run.steps_done == 0 or settings.dry_run:
            run.save()  # finds out now whether a checkpoint can be written
        if store is not None and is_main_process():
            store.set(RUN_STARTED, "")
        if is_main_process():
            print(
                header(run, train_set, test_set, taught_by, macs, device, world_size()), flush=True
            )
        del taught_by  # with its optimizer's state, as large as its weights
        warmup = settings.warmup * steps
        scheduler = build_scheduler(optimizer, settings.epochs * steps, run.steps_done, warmup)
        if settings.dry_run:
            # A graph is taken in the step after its warm-up.
            warm_up = WARM_UP + 1 if isinstance(gradients, ReplayedGradients) else 1
            of_each = len(settings.trained_at)  # every T is warmed up, and timed
            few = FirstBatches(train_batches, warm_up * of_each, device, max(TIMED, of_each))
            few_tests = FirstBatches(test_batches, 1, device)
            left = settings.epochs * steps - run.steps_done
            run.step, run.sums = 0, {}  # these few steps are an epoch of their own
            train_epoch(gradients, few, optimizer, scheduler, settings, device, run)
            evaluate(network, few_tests, device, settings.amp)
            evaluation = (len(test_batches) + len(val_batches or ())) * few_tests.seconds()
            expected = expectation(run, left, few.seconds(), evaluation, device)
            if is_main_process():
                print(expectation_text(expected), flush=True)
            return expected
        log = Log(settings, run.rows, world_size()) if is_main_process() else None
        for epoch in range(run.epoch, settings.epochs + 1):
            set_epoch(train_batches, epoch, run.step)
            if isinstance(loss_function, Distiller):
                loss_function.set_epoch(epoch, settings.epochs)
            network.train()
            row = {"epoch": epoch, "lr": settings.lr * scheduler.lr_lambdas[0](steps * (epoch - 1))}
            row |= train_epoch(
                gradients, train_batches, optimizer, scheduler, settings, device, run
            )
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.amp):
                estimate_statistics(network, images_of_statistics, settings.trained_at)
            tested = evaluate(network, test_batches, device, settings.amp)
            row |= {"test_accuracy": tested.accuracy, "test_loss": tested.loss}
            row["spike_rate"] = tested.spike_rate
            if val_batches is not None:
                held_out = evaluate(network, val_batches, device, settings.amp)
                row |= {"val_accuracy": held_out.accuracy, "val_loss": held_out.loss}
            row["best_accuracy"] = max(run.best_accuracy, row[deciding(row)])
            run.epoch_is_done(row)
            if log is not None:
                log.write(run.rows, tested.silent)
        if log is not None:
            print(ending(run), flush=True)
    return None


class FirstBatches:
    """The first batches of a loader, and how long the work on one takes after `warm_up` of them."""

    def __init__(self, batches: DataLoader, warm_up: int, device: torch.device, timed: int = TIMED):
        self.batches, self.warm_up, self.device = batches, warm_up, device
        self.count = min(warm_up + timed, len(batches))
        self.times: list[float] = []

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.times = [time.perf_counter()]
        for batch in islice(self.batches, self.count):
            yield batch
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.times.append(time.perf_counter())

    def seconds(self) -> float:
        timed = self.times[self.warm_up :]
        if len(timed) < 2:  # too few batches: those of the warm-up, too
            timed = self.times
        return (timed[-1] - timed[0]) / max(1, len(timed) - 1)


def first_images(batches: DataLoader, device: torch.device) -> list[Tensor]:
    """The first batches of images, of an order and an augmentation that no epoch has."""
    set_epoch(batches, 0)
    number = min(MOST_OF_STATISTICS, math.ceil(SHARE_OF_STATISTICS * len(batches)))
    return [images.to(device) for images, _ in islice(batches, number)]


def build_loss(settings: Settings, student: nn.Module, teacher: MSResNet | None) -> LossFunction:
    if settings.paper_setting != "qamd":
        return cross_entropy(student, settings.label_smoothing)
    weights = settings.alpha, settings.beta, settings.tau, settings.beta_schedule
    how = settings.label_smoothing, settings.teacher_logits
    return Distiller(teacher, student, settings.loss, *weights, *how)


def cross_entropy(network: nn.Module, label_smoothing: float = 0.0) -> LossFunction:
    """The loss of a network trained without a teacher."""

    def loss_function(images: Tensor, labels: Tensor):
        logits = network(images)
        logits32 = at_least_float32(logits)
        loss = F.cross_entropy(logits32, labels, label_smoothing=label_smoothing)
        return logits, loss, {"ce": loss}

    return loss_function


def train_epoch(
    gradients: Gradients,
    batches: DataLoader,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    settings: Settings,
    device: torch.device,
    run: Run,
) -> dict[str, float]:
    """One pass over the training data, or its rest; means over all images and processes."""
    sums = EpochSums(run, device)
    images_seen, start = 0, time.perf_counter()

    def found(what: str) -> None:
        raise UserError(not_finite(what, run, run.step + 1))

    watching = watch_numbers(run.network, found) if settings.check_numerics else nullcontext()
    epoch = f"{run.epoch}/{settings.epochs}"
    with watching, progress_bar(batches, epoch, len(batches), run.step) as bar:
        for images, labels in bar:
            images, labels = (x.to(device, non_blocking=True) for x in (images, labels))
            with run.network.running_for(time_window_of(settings, run.steps_done)):
                means = gradients(images, labels)
            if settings.check_numerics:
                sums.gradient = first_bad_gradient(run.network)
            # Surrogate gradients through many timesteps and layers now and then explode.
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            limit = settings.clip_grad or math.inf
            norm = nn.utils.clip_grad_norm_(parameters, limit)
            optimizer.step()
            scheduler.step()

            sums.add(means, norm, len(labels))
            images_seen += len(labels) * world_size()
            if run.step % READ_EVERY == 0 or settings.check_numerics:
                sums.check()
                bar.show(
                    f"loss {figure(means['loss'].item())}",
                    f"train {percent(means['train_accuracy'].item())}",
                    speed(images_seen / (time.perf_counter() - start)),
                )
            run.step_is_done(sums.read)
    row = sums.means()
    per_second = round(images_seen / (time.perf_counter() - start), 1)
    # An epoch that was stopped after its last step has only its evaluation left.
    return row | {"images_per_second": per_second if images_seen else None}


def progress_bar(batches: Iterable, name: str, total: int, done: int = 0) -> ProgressBar:
    return ProgressBar(batches, name, total, done, is_main_process())


def gradients_of(
    settings: Settings, student: nn.Module, loss_function: LossFunction, device: torch.device
) -> Gradients:
    """`add_gradients` to none; with --compile on a GPU as a CUDA graph."""

    def gradients(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        student.zero_grad()
        return add_gradients(student, loss_function, images, labels, settings)

    # Processes that exchange gradients, and hooks that look at numbers, are in no graph.
    if not settings.compile or device.type == "cpu" or world_size() > 1 or settings.check_numerics:
        return gradients
    return ReplayedGradients(gradients, student)


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


class Evaluation(NamedTuple):
    """What `evaluate` has found, over the images of all processes."""

    correct: int  # images
    total: int
    spike_rate: float  # spikes per neuron and timestep
    silent: list[str]  # layers that never fired
    loss: float  # mean cross-entropy

    @property
    def accuracy(self) -> float:
        return self.correct / self.total


@torch.no_grad()
def evaluate(
    network: nn.Module,
    batches: DataLoader,
    device: torch.device,
    amp: bool,
    pairs: list[Tensor] | None = None,
) -> Evaluation:
    """`pairs` gets labels and predictions, (2, B), of each batch of this process."""
    network.eval()
    counts = torch.zeros(3, dtype=torch.float64, device=device)  # whole up to 2^53
    with count_spikes(network) as spikes:
        for images, labels in progress_bar(batches, "test", len(batches)):
            images, labels = (x.to(device, non_blocking=True) for x in (images, labels))
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                logits = network(images)
            predictions = logits.argmax(1)
            if pairs is not None:
                pairs.append(torch.stack([labels, predictions]).cpu())
            correct = (predictions == labels).sum()
            loss = F.nll_loss(logits.double().log_softmax(1), labels, reduction="sum")
            counts += torch.stack([correct, counts.new_tensor(len(labels)), loss])
    layers = [name for name, layer in network.named_modules() if isinstance(layer, LIF)]
    zero = torch.zeros(2, network.time_window, dtype=torch.float64, device=device)
    by_layer = torch.stack([spikes.get(name, zero) for name in layers])
    fired, neurons = sum_over_processes(by_layer).sum(dim=2).unbind(dim=1)
    silent = [name for name, count in zip(layers, fired.tolist(), strict=True) if count == 0]
    correct, total, loss = sum_over_processes(counts).tolist()
    rate = (fired.sum() / neurons.sum()).item()
    return Evaluation(int(correct), int(total), rate, silent, loss / total)


def measure(settings: Settings, device: torch.device) -> dict[str, Any]:
    """What --eval_only finds on the test images of the checkpoint's data."""
    make_deterministic(settings)
    of_first_process(lambda: evaluation.check_files(settings))
    checkpoint = load_checkpoint(settings.eval_only)
    network = load_network(checkpoint, settings.time_window).to(device)
    train_set, test_set = data_sets(settings)
    refuse_another_fold(checkpoint, settings.eval_only, settings, train_set)
    if settings.compile:
        compile_for(settings, device, test_set)
    batch_size = max(1, settings.batch_size // world_size())
    share = Share(batch_size, rank(), world_size(), settings.workers)
    batches = evaluation_loader(test_set, share, device)
    pairs: list[Tensor] | None = [] if settings.per_class else None
    tested = evaluate(network, batches, device, settings.amp, pairs)
    found = evaluation.about(settings, checkpoint) | {
        "images": tested.total,
        "correct": tested.correct,
        "accuracy": tested.accuracy,
        "cross_entropy": tested.loss if math.isfinite(tested.loss) else None,
        "spike_rate": tested.spike_rate,
    }
    if settings.integer:
        found["integers"] = measure_integers(network, batches, device)
    if pairs is not None:
        add_classes(settings, found, torch.cat(pairs, 1), test_set.classes or network.class_names)
    return found


def add_classes(settings: Settings, found: dict[str, Any], pairs: Tensor, names: list[str]) -> None:
    """Add the accuracy of each class to what was found, and write the files of --per_class."""
    number = data_set_of(settings).num_classes
    names = [*names, *map(str, range(len(names), number))]
    confusion = evaluation.confusion_of(torch.cat(of_all_processes(pairs), dim=1), number)
    found["classes"] = evaluation.rows_of(confusion, names)
    of_first_process(lambda: evaluation.write_classes(settings, found, confusion, names))


@torch.no_grad()
def measure_integers(
    network: nn.Module, batches: DataLoader, device: torch.device
) -> dict[str, Any]:
    """Evaluate with integers alone and count the spikes that differ from the network's own."""
    integer_network = IntegerNetwork(network)
    counts = torch.zeros(4, dtype=torch.int64, device=device)
    for images, labels in progress_bar(batches, "integer", len(batches)):
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
    correct, total, differing, neurons = sum_over_processes(counts).tolist()
    return {
        "images": total,
        "correct": correct,
        "accuracy": correct / total,
        "differing_spikes": differing,
        "spikes": neurons,
    }


def leave(code: int) -> NoReturn:
    """End the program."""
    for worker in multiprocessing.active_children():
        worker.kill()  # one that hangs would be waited for
    if is_launched() and code != 0:
        # The process group is still there, and taking it down may hang or abort.
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) == interrupt_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    leave(main())
