"""Nothing of a run is lost: checkpoints that are whole, --resume, --overwrite and signals.

SETTING-last.pth holds all that a training goes on from: it is written when the training starts,
every --save_every steps, before and after every evaluation, and when a signal ends the run. What is
read back from one may come from anywhere: all of it is checked, and a fault is one line: UserError.
"""

import io
import math
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from checkpoints import Checkpoint
from display import percent
from distiller import MEMBRANE_LOSS_VERSION, MEMBRANE_LOSSES
from engine.run_folder import (
    are_rows,
    best_row,
    checkpoints_of,
    deciding,
    last_of,
    lock,
    move_aside,
    must_move,
)
from runtime.errors import Stopped, UserError
from runtime.files import digest, temporary, write_nowhere, write_whole
from runtime.processes import (
    PATIENCE,
    SIGNALS,
    is_main_process,
    mark_started,
    of_all_processes,
    of_first_process,
    rank,
    world_size,
)
from settings import MAY_CHANGE, Settings, as_text, input_step_of

SUMS = {"loss", "ce", "logit", "membrane", "train_accuracy", "images"}  # over an epoch's steps


class Run:
    """A training between its start and its end, over all interruptions; used as a context.

    While it is open no other run can have the save path, and signals end it between two steps.

    Attributes:
        rows: metrics of the epochs that are done.
        step: steps that are done of the next epoch.
        sums: this process's sums over those steps.
        seconds: time that the next epoch has taken so far, over all interruptions.
    """

    def __init__(
        self,
        settings: Settings,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        training_images: int,
        steps_per_epoch: int,
        class_names: Sequence[str] | None = None,
    ):
        self.settings, self.network, self.optimizer = settings, network, optimizer
        self.training_images, self.steps_per_epoch = training_images, steps_per_epoch
        self.class_names = None if class_names is None else list(class_names)
        self.teacher = None if settings.teacher_path is None else digest(settings.teacher_path)
        self.laws_of_cells = None if settings.chip is None else settings.chip.technology.laws
        self.last, self.best = checkpoints_of(Path(settings.save_path), settings.paper_setting)
        self.rows: list[dict[str, Any]] = []
        self.step = 0
        self.sums: dict[str, float] = {}
        self.seconds_before, self.clock = 0.0, time.monotonic()
        self.received = 0
        self.asked: tuple[Tensor, dist.Work] | None = None
        self.group = None

    @property
    def epoch(self) -> int:
        """The epoch that runs or comes next, counted from 1."""
        return len(self.rows) + 1

    @property
    def steps_done(self) -> int:
        return len(self.rows) * self.steps_per_epoch + self.step

    @property
    def seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.clock

    def __enter__(self) -> "Run":
        if world_size() > 1:
            # For numbers that lie in main memory, also where the tensors are on GPUs.
            self.group = dist.new_group(backend="gloo", timeout=PATIENCE)
        self.lock = None
        try:
            state = of_first_process(self._open_save_path, self.group)
            if state is not None:
                self._restore(state)
        except BaseException:
            self._unlock()
            raise
        self.handlers = {number: signal.signal(number, self._receive) for number in SIGNALS}
        self.clock = time.monotonic()
        return self

    def __exit__(self, kind, *error) -> None:
        for number, handler in self.handlers.items():
            if signal.getsignal(number) != signal.SIG_IGN:  # see _receive
                signal.signal(number, handler)
        if kind is None and self.asked is not None:
            self.asked[1].wait()
        self._unlock()

    def _unlock(self) -> None:
        if self.lock is not None:
            self.lock.close()

    def _open_save_path(self) -> dict[str, Any] | None:
        """Take the save path; the checked contents of SETTING-last.pth where the run goes on. A dry
        run only looks whether it could."""
        folder = self.last.parent
        if self.settings.dry_run:
            must_move(self.settings)
            return self._read()
        with disk_errors(folder, self.settings):
            folder.mkdir(parents=True, exist_ok=True)
            self.lock = lock(folder, warn=True)
        if must_move(self.settings):
            move_aside(folder, self.settings)
            self.lock.close()
            with disk_errors(folder, self.settings):
                self.lock = lock(folder)
        with disk_errors(folder, self.settings):
            for path in (self.last, self.best):
                temporary(path).unlink(missing_ok=True)  # of a run that was killed
        state = self._read()
        if state is not None and state["rows"] and not self.best.exists():
            best = best_row(state["rows"])
            print(
                f"main.py: warning: {self.best} is missing: it held the best network so far "
                f"({percent(best[deciding(best)], 2)}), and comes back only with a better one",
                file=sys.stderr,
            )
        return state

    def _read(self) -> dict[str, Any] | None:
        checkpoint = last_of(self.settings)
        if checkpoint is None:
            return None
        rest = checkpoint.rest
        if "rows" not in rest:
            raise UserError(
                f"{self.last} is of a version without --resume: it can be evaluated and taught "
                "from, not gone on with"
            )
        self._refuse_another_run(checkpoint)
        cannot = f"cannot go on from {self.last}: its"
        rows, step, sums, random_states = (
            rest.get(name) for name in ("rows", "step", "sums", "random_states")
        )
        if not are_rows(rows, self.settings.val_share > 0) or len(rows) != checkpoint.epoch:
            raise UserError(f"{cannot} metrics of {checkpoint.epoch} epochs are damaged")
        if len(rows) > self.settings.epochs:
            raise UserError(
                f"{self.last} has already trained for {len(rows)} epochs, more than --epochs "
                f"{self.settings.epochs}"
            )
        if type(step) is not int or not 0 <= step <= self.steps_per_epoch:
            raise UserError(f"{cannot} number of steps is damaged")
        if not are_sums(sums) or (not sums[0] and step > 0):
            raise UserError(f"{cannot} sums are damaged")
        if not are_random_states(random_states) or len(random_states) != len(sums):
            raise UserError(f"{cannot} random states are damaged")
        seconds = rest.get("seconds", 0.0)  # not in a file of before
        if type(seconds) is not float or not 0 <= seconds < math.inf:
            raise UserError(f"{cannot} time is damaged")
        momentum = momentum_of(rest.get("optimizer"), parameters_of(self.optimizer))
        if momentum is None:
            raise UserError(f"{cannot} optimizer does not fit its network, or is not finite")
        compares = MEMBRANE_LOSSES.get(self.settings.loss) is not None
        if compares and rest.get("membrane_loss_version", 1) != MEMBRANE_LOSS_VERSION:
            print(
                f"main.py: warning: {self.last} was begun with an older definition of --loss "
                f"{self.settings.loss}, or before that was recorded: it goes on with today's",
                file=sys.stderr,
            )
        taken = ("model", "rows", "step", "sums", "random_states")
        return {x: rest[x] for x in taken} | {"momentum": momentum, "seconds": seconds}

    def _refuse_another_run(self, checkpoint: Checkpoint) -> None:
        before, now = asdict(checkpoint.settings), asdict(self.settings)
        differences = [
            f"--{name} {as_text(now[name])} instead of {as_text(before[name])}"
            for name in now
            if name not in MAY_CHANGE | {"input_step", "arch_digest"} and now[name] != before[name]
        ]
        if checkpoint.settings.arch_digest != self.settings.arch_digest:
            differences.append("another file of --arch")
        theirs, ours = input_step_of(checkpoint.settings), input_step_of(self.settings)
        if theirs != ours:  # found from the training data
            differences.append(f"training data of input step {ours!r} instead of {theirs!r}")
        for name, what in (
            ("teacher", "another teacher's file"),
            ("training_images", "another number of training images"),
            ("laws_of_cells", f"other device.* values of {self.settings.crossbar}"),
        ):
            theirs, ours = checkpoint.rest.get(name), getattr(self, name)
            if type(theirs) is not type(ours) or theirs != ours:
                differences.append(what)
        if differences:
            raise UserError(
                f"--resume: {self.last} is of a run with other settings, here are "
                f"{', '.join(differences)}: use the same, --overwrite instead of --resume, or "
                "another --save_path"
            )

    def _restore(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["model"])
        parameters = parameters_of(self.optimizer)
        for parameter, momentum in zip(parameters, state["momentum"], strict=True):
            if momentum is not None:
                buffer = torch.empty_like(parameter).copy_(momentum)
                self.optimizer.state[parameter]["momentum_buffer"] = buffer
        self.rows, self.step = state["rows"], state["step"]
        self.seconds_before = state["seconds"]
        if len(state["sums"]) == world_size():
            self.sums = state["sums"][rank()]
        else:  # the first process takes over all of them
            taken = state["sums"] if is_main_process() else []
            self.sums = {x: math.fsum(part[x] for part in taken) for x in state["sums"][0]}
        if rank() < len(state["random_states"]):
            set_random_state(state["random_states"][rank()])

    def _receive(self, number: int, frame: object) -> None:
        if number == self.received == signal.SIGINT:
            # Asked twice: whatever it waits for, it shall not; nor be disturbed while it ends.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            raise KeyboardInterrupt
        self.received = number

    def begin(self) -> None:
        """Find out now whether a checkpoint can be written; from here on a launcher's next attempt
        goes on with this run."""
        if self.steps_done == 0 or self.settings.dry_run:
            self.save()
        mark_started()

    def step_is_done(self, sums: Callable[[], dict[str, float]]) -> None:
        """To be called after each step, by all processes: saves and stops where it is time to.

        `sums` gives this process's sums of the epoch so far, or raises UserError where the state
        is not worth saving. Raises Stopped after a signal.
        """
        self.step += 1
        number = self._agreed_signal()
        every = self.settings.save_every
        # Also before an evaluation: no signal ends that, so a launcher may have to kill it.
        if (
            number
            or self.step == self.steps_per_epoch
            or (every is not None and self.steps_done % every == 0)
        ):
            self.sums = sums()
            self.save()
        if number:
            raise Stopped(
                f"stopped by {signal.Signals(number).name} after step {self.step} of epoch "
                f"{self.epoch}: {how_to_go_on(self.settings, self.last)}",
                number,
            )

    def _agreed_signal(self) -> int:
        """The signal on which all processes stop after this step, or 0.

        They may receive it in different steps, so each step asks all. The answer is taken a step
        later: it has then long been there, and nobody has waited for it.
        """
        if self.group is None:
            return self.received
        before, flag = self.asked, torch.tensor(self.received)
        work = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group, async_op=True)
        self.asked = flag, work
        if before is None:
            return 0
        before[1].wait()
        return int(before[0])

    def epoch_is_done(self, row: dict[str, Any]) -> None:
        """Save after an epoch with these metrics, as the best too if it is."""
        accuracy = row[deciding(row)]
        before = self.rows[-1]["best_accuracy"] if self.rows else -1.0
        row |= {"best_accuracy": max(before, accuracy)}
        self.rows.append(row | {"time": time.time(), "seconds": self.seconds})
        self.step, self.sums = 0, {}
        self.seconds_before, self.clock = 0.0, time.monotonic()
        self.save(is_best=accuracy > before)

    def save(self, is_best: bool = False) -> None:
        """Write SETTING-last.pth, and before it SETTING-best.pth; called by all processes. A dry
        run only finds out whether there is room for one."""
        momentum = (state["momentum_buffer"] for state in self.optimizer.state.values())
        tensors = [*self.network.state_dict().values(), *momentum]
        if not torch.stack([x.isfinite().all() for x in tensors]).all():
            raise UserError(not_finite("a weight", self, self.step))
        processes = of_all_processes((random_state(), self.sums), self.group)
        if is_main_process():
            last_row = self.rows[-1] if self.rows else {"test_accuracy": 0.0}
            content = {
                "model": dict(self.network.state_dict()),
                "settings": asdict(self.settings),
                "epoch": len(self.rows),
                "accuracy": last_row["test_accuracy"],  # of the last evaluation
                "optimizer": self.optimizer.state_dict(),
                "random_states": [state for state, _ in processes],
                "sums": [sums for _, sums in processes],
                "rows": self.rows,
                "step": self.step,
                "seconds": self.seconds,
                "training_images": self.training_images,
                "teacher": self.teacher,
                "laws_of_cells": self.laws_of_cells,
                "membrane_loss_version": MEMBRANE_LOSS_VERSION,
                "class_names": self.class_names,  # for whoever has the checkpoint alone
            }
            # The best one first: were it last, a run killed between the two would lack it.
            for path in (self.best, self.last) if is_best else (self.last,):
                with disk_errors(path, self.settings):
                    buffer = io.BytesIO()  # torch.save into a file would hide why the disk refuses
                    torch.save(content, buffer)
                    write = write_nowhere if self.settings.dry_run else write_whole
                    write(path, buffer.getbuffer())
        if self.group is not None:
            # The process that ends first ends the others: none before the checkpoint is there.
            dist.barrier(group=self.group)


@contextmanager
def disk_errors(path: Path, settings: Settings) -> Iterator[None]:
    """A disk that is full or refuses to write ends the run with one line."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error.strerror or error}): what is already there is whole; "
            f"with room on the disk {how_to_go_on(settings)}"
        ) from None


def not_finite(what: str, run: Run, step: int) -> str:
    settings = run.settings
    remedies = ["a lower --lr", "a smaller --clip_grad" if settings.clip_grad else "--clip_grad 1"]
    if not settings.check_numerics:
        remedies.append("--check_numerics, which names the first layer")
    *others, last = remedies
    before = "" if settings.dry_run else f"{run.last} is from before; "
    return (
        f"{what}: not finite in step {step} of epoch {run.epoch}: {before}try "
        f"{', '.join(others)}{',' * (len(others) > 1)} or {last}"
    )


def how_to_go_on(settings: Settings, last: str | Path = "") -> str:
    """What to do after the end of a run, whose checkpoint is `last`."""
    if settings.dry_run:
        return "start it again"
    place = f" from {last}" if last else ""
    return f"the same command {'' if settings.resume else 'with --resume '}goes on{place}"


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """In the order in which the optimizer's state_dict numbers them."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def momentum_of(state_dict: Any, parameters: list[Tensor]) -> list[Tensor | None] | None:
    """The momentum of each parameter in a saved optimizer; None where that is damaged.

    Nothing else is taken from it: learning rate and weight decay are the settings'.
    """
    states = state_dict.get("state") if isinstance(state_dict, dict) else None
    if not isinstance(states, dict) or not set(states) <= set(range(len(parameters))):
        return None
    momentum: list[Tensor | None] = [None] * len(parameters)
    for number, state in states.items():
        buffer = state.get("momentum_buffer") if isinstance(state, dict) else None
        expected = parameters[number].dtype, parameters[number].shape
        if not isinstance(buffer, Tensor) or (buffer.dtype, buffer.shape) != expected:
            return None
        if not buffer.isfinite().all():
            return None
        momentum[number] = buffer
    return momentum


def are_sums(sums: Any) -> bool:
    """A non-empty list of dictionaries of finite numbers, all with the same names."""
    return (
        isinstance(sums, list)
        and len(sums) > 0
        and all(isinstance(part, dict) and part.keys() == sums[0].keys() for part in sums)
        and all(type(x) is float and math.isfinite(x) for part in sums for x in part.values())
        and (not sums[0] or sum(part.get("images", 0) for part in sums) > 0)
        and (not sums[0] or {"loss", "train_accuracy"} <= sums[0].keys() <= SUMS)
    )


def random_state() -> dict[str, Any]:
    """Of this process. NumPy's global one is used nowhere."""
    return {
        "python": random.getstate(),
        "torch": torch.get_rng_state(),
        # Asked of a run on the CPU, it would open the GPU.
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])


def are_random_states(states: Any) -> bool:
    """Whether they could be set: tried on generators of their own."""
    if not isinstance(states, list) or not states:
        return False
    try:
        for state in states:
            if type(state["python"]) is not tuple or not state["torch"].is_contiguous():
                return False
            random.Random().setstate(state["python"])
            torch.Generator().set_state(state["torch"])
            if state["cuda"] is not None and torch.cuda.is_initialized():
                torch.Generator("cuda").set_state(state["cuda"])
    except Exception:  # whatever the three raise for what is not theirs
        return False
    return True
