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

import math
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from functools import partial
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from checkpoints import Checkpoint, build_network, load_checkpoint
from data_loader import ImageSet, set_epoch, some_images
from display import percent
from distiller import MEMBRANE_LOSSES, Distiller, LossFunction, start_membrane_steps
from engine.compile import Gradients, ReplayedGradients, compile_for
from engine.data import Batches, DataSets, batches_of, first_images, load_same_data, settings_for
from engine.dry_run import dry_run
from engine.eval_only import eval_only, result_text
from engine.evaluate import Evaluation, evaluate
from engine.log import Log, ProgressBar, ending, figure, header, speed
from engine.metrics import EpochSums, first_bad_gradient, watch_numbers
from engine.run import Run, parameters_of
from engine.run_folder import check_save_path
from engine.start import explain, leave, make_deterministic, start_processes
from load_settings import (
    build_loss,
    build_optimizer,
    build_scheduler,
    load_network,
    parse_settings,
    start_from_checkpoint,
    time_window_of,
)
from models import SpikingNetwork
from models.batch_norm import estimate_statistics
from runtime.command import run_command
from runtime.launcher import check_launcher, interrupt_at_once, launcher_variable
from runtime.processes import is_main_process, of_first_process, world_size
from settings import Settings
from spikesim_eval.trace import macs_of_image
from spikesim_eval.training import draw_cells, put_on_chip

READ_EVERY = 10  # steps: reading a number waits for the GPU
IMAGES_OF_STEPS = 64  # of the training set, that membrane steps are chosen by


def main(argv: Sequence[str] | None = None, data_sets: DataSets | None = None) -> int:
    """Run one command line, a training on `data_sets` instead of its own if given; returns the exit
    code: 0, 2 for what the user has to know of, and 128 + its number after a signal."""
    settings: Settings | None = None

    def work() -> None:
        nonlocal settings
        check_launcher()
        settings = parse_settings(argv, launcher_variable("WORLD_SIZE"))
        stdout = sys.stdout  # with --json for the result alone
        with (
            redirect_stdout(sys.stderr if settings.json else stdout),
            start_processes(settings) as (settings, device),
        ):
            trains = settings.eval_only is None
            found = train(settings, device, data_sets) if trains else eval_only(settings, device)
            if is_main_process() and (settings.json or not trains):
                print(result_text(found, settings), file=stdout)

    return run_command("main.py", work, lambda error: explain(error, settings))


def train(
    settings: Settings, device: torch.device, data_sets: DataSets | None = None
) -> dict[str, float] | None:
    """Train a network, or what is left of it, on (training, test) data; returns of a dry run what
    the training will take."""
    of_first_process(lambda: check_save_path(settings))
    make_deterministic(settings)
    train_set, test_set = data_sets or load_same_data(settings)
    taught_by = None if settings.teacher_path is None else load_checkpoint(settings.teacher_path)
    settings = settings_for(settings, train_set, taught_by)
    batches = batches_of(settings, train_set, test_set, device)
    # Before --compile: it would compile for the one image of this, too.
    macs = macs_of_image(settings) if is_main_process() else 0
    images_of_statistics = first_images(batches.train, device)
    if settings.compile:
        compile_for(settings, device, test_set, train_set, taught_by)

    network, student, teacher = build_networks(settings, taught_by, device, train_set)
    optimizer = build_optimizer(network, settings)
    loss_function = build_loss(settings, student, teacher)
    del teacher  # the loss has a faster copy
    gradients = gradients_of(settings, student, loss_function, device)

    steps = len(batches.train)
    with Run(settings, network, optimizer, len(train_set), steps, test_set.classes) as run:
        run.begin()
        if is_main_process():
            print(header(run, train_set, test_set, taught_by, macs, device), flush=True)
        del taught_by  # with its optimizer's state, as large as its weights
        warmup = settings.warmup * steps
        scheduler = build_scheduler(optimizer, settings.epochs * steps, run.steps_done, warmup)
        if settings.dry_run:
            few_steps = partial(train_epoch, run, gradients, scheduler=scheduler, device=device)
            return dry_run(run, batches, device, gradients, few_steps)
        log = Log(run) if is_main_process() else None
        for epoch in range(run.epoch, settings.epochs + 1):
            set_epoch(batches.train, epoch, run.step)
            if isinstance(loss_function, Distiller):
                loss_function.set_epoch(epoch, settings.epochs)
            row = {"epoch": epoch, "lr": settings.lr * scheduler.lr_lambdas[0](steps * (epoch - 1))}
            row |= train_epoch(run, gradients, batches.train, scheduler, device)
            draw_cells(network, settings.seed, run.steps_done)
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.amp):
                estimate_statistics(network, images_of_statistics, settings.trained_at)
            found, tested = evaluate_epoch(network, batches, device, settings.amp)
            run.epoch_is_done(row | found)
            if log is not None:
                log.write(tested.spikes, tested.silent)
        if log is not None:
            print(ending(run), flush=True)
    return None


def build_networks(
    settings: Settings, taught_by: Checkpoint | None, device: torch.device, train_set: ImageSet
) -> tuple[SpikingNetwork, nn.Module, SpikingNetwork | None]:
    """The network, the same one trained by all processes, and its teacher."""
    network = build_network(settings).to(device)
    teacher = None if taught_by is None else load_network(taught_by).to(device)
    if MEMBRANE_LOSSES.get(settings.loss) is not None:  # else steps are learned
        images = some_images(train_set, IMAGES_OF_STEPS).to(device)
        start_membrane_steps(network, teacher, images)
    if settings.init_from_teacher:
        network.start_from(teacher)
    elif settings.init_from is not None:
        start_from_checkpoint(network, settings)
    if settings.chip is not None:
        put_on_chip(network, settings.chip)
    if world_size() == 1:
        return network, network, teacher
    # Batch norm statistics are already the same on all processes: nothing to broadcast.
    return network, DistributedDataParallel(network, broadcast_buffers=False), teacher


def train_epoch(
    run: Run,
    gradients: Gradients,
    batches: DataLoader,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    device: torch.device,
) -> dict[str, float]:
    """One pass over the training data, or its rest; means over all images and processes."""
    settings, sums = run.settings, EpochSums(run, device)
    images_seen, start = 0, time.perf_counter()
    run.network.train()
    watching = watch_numbers(run.network, sums.refuse) if settings.check_numerics else nullcontext()
    epoch = f"{run.epoch}/{settings.epochs}"
    with watching, ProgressBar(batches, epoch, len(batches), run.step) as bar:
        for images, labels in bar:
            images, labels = (x.to(device, non_blocking=True) for x in (images, labels))
            draw_cells(run.network, settings.seed, run.steps_done)
            with run.network.running_for(time_window_of(settings, run.steps_done)):
                means = gradients(images, labels)
            if settings.check_numerics:
                sums.gradient = first_bad_gradient(run.network)
            # Surrogate gradients through many timesteps and layers now and then explode.
            limit = settings.clip_grad or math.inf
            norm = nn.utils.clip_grad_norm_(parameters_of(run.optimizer), limit)
            run.optimizer.step()
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


def evaluate_epoch(
    network: SpikingNetwork, batches: Batches, device: torch.device, amp: bool
) -> tuple[dict[str, float], Evaluation]:
    """What an epoch's row holds of the test images and of those that are held out; all that was
    found of the test images."""
    tested = evaluate(network, batches.test, device, amp)
    row = {"test_accuracy": tested.accuracy, "test_loss": tested.loss}
    row["spike_rate"] = tested.spike_rate
    if batches.held_out is not None:
        held_out = evaluate(network, batches.held_out, device, amp)
        row |= {"val_accuracy": held_out.accuracy, "val_loss": held_out.loss}
    return row, tested


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


def command() -> NoReturn:
    """What an installed `md-snn` runs."""
    leave(main())


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) == interrupt_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    command()
