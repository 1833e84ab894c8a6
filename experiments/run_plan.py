"""Runs of a plan in processes, several at a time, teachers before their students."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from display import percent
from engine.log import duration
from engine.run_folder import is_locked, move_aside, read_metrics, trained_in
from experiments.plan import Planned, is_taught
from runtime.errors import Stopped, UserError
from runtime.files import write_whole
from runtime.processes import usable_cores

HERE = Path(__file__).resolve().parent.parent
RUN, FOUND, LOG = "run.json", "measured.json", "log.txt"
POLL = 0.1  # seconds
STARTING = 5.0  # seconds of a run besides training: imports, data
MEASURING = 4  # times an evaluation: the network, then two with all membranes
STOPS = [getattr(signal, x) for x in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, x)]
# Options that do not change how long a step or an evaluation takes.
TIMELESS = {"seed", "fold", "epochs", "lr", "warmup", "weight_decay", "clip_grad", "alpha", "beta"}
TIMELESS |= {"tau", "beta_schedule", "label_smoothing", "init_from_teacher", "bn_bits"}


@dataclass
class Plan:
    """What is left to do.

    Attributes:
        todo: the runs, each after its teacher.
        runs: the folder of their folders.
        places: the environment of each process that may run at a time.
    """

    todo: list[Planned]
    runs: Path
    places: list[dict[str, str]]
    seconds: dict[Planned, float] = field(default_factory=dict)


def places(parallel: int | None, gpus: int | None) -> list[dict[str, str]]:
    """An environment for each process that runs at a time. Raises UserError where there are fewer
    GPUs."""
    number = gpus or parallel or 1
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, usable_cores() // number)))
    common = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    common["PYTHONPATH"] = os.pathsep.join([str(HERE), *filter(None, [os.getenv("PYTHONPATH")])])
    if gpus is None:
        return [common] * number
    import torch

    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if there < gpus:
        raise UserError(f"--gpus {gpus}: this machine shows {there}")
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = shown.split(",") if shown else list(map(str, range(there)))
    return [common | {"CUDA_VISIBLE_DEVICES": name.strip()} for name in names[:gpus]]


def environment(place: dict[str, str]) -> dict[str, str]:
    """Of a process that ends when this one does."""
    return os.environ | place | {"MD_SNN_STUDY": str(os.getpid())}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "experiments.one_run", *arguments]


# How long.


def kind(planned: Planned) -> tuple[str, str]:
    """Runs of a kind take equally long an epoch."""
    ours, theirs = (without(text, TIMELESS) for text in planned.identity)
    return ours, theirs if is_taught(planned.settings) else ""


def without(telling: str, names: Iterable[str]) -> str:
    """The words of `plan.telling` that are not about these options."""
    return re.sub(rf"(^| )({'|'.join(names)})=('[^']*'|\S)*", "", telling).strip()


def measure_times(plan: Plan) -> None:
    """Fill in how long each run will take, without compiling, of which each kind would need a
    minute. Raises UserError where one cannot start."""
    kinds: dict[tuple[str, str], Planned] = {}
    for planned in plan.todo:
        kinds.setdefault(kind(planned), planned)
    jobs = [
        {
            "options": not_compiled(x),
            "teacher": not_compiled(x.teacher) if is_taught(x.settings) else None,
        }
        for x in kinds.values()
    ]
    done = subprocess.run(
        command("--times"),
        env=environment(plan.places[0]),
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise UserError(f"cannot measure how long the runs take: {lines[-1]}")
    found = dict(zip(kinds, json.loads(done.stdout.splitlines()[-1]), strict=True))
    for key, planned in kinds.items():
        if "error" in found[key]:
            raise UserError(f"{planned.title}: {found[key]['error']}")
    for planned in plan.todo:
        expected = found[kind(planned)]
        plan.seconds[planned] = (
            STARTING
            + epochs_left(planned, plan.runs) * expected["seconds_an_epoch"]
            + MEASURING * expected["seconds_an_evaluation"]
        )


def not_compiled(planned: Planned) -> list[str]:
    return [x for x in planned.options if x != "--compile"]


def epochs_left(planned: Planned, runs: Path) -> int:
    return planned.settings.epochs - epochs_done(planned.folder(runs))


def learn_time(plan: Plan, waiting: Sequence[Planned], done: Planned, took: float) -> None:
    """A run has ended that had all its epochs before it: those of its kind that still wait take as
    long, by their epochs."""
    for planned in waiting:
        if kind(planned) == kind(done):
            share = epochs_left(planned, plan.runs) / done.settings.epochs
            plan.seconds[planned] = share * took


def epochs_done(folder: Path) -> int:
    try:
        return len(read_metrics(folder / "metrics.csv"))
    except UserError:
        return 0


# Running.


@dataclass
class Going:
    """A run in its process."""

    planned: Planned
    process: subprocess.Popen
    place: int
    started: float
    epochs: int  # that were left of it


def run_all(
    plan: Plan, finished: Callable[[Planned, dict[str, Any]], None]
) -> list[tuple[Planned, str]]:
    """Run all; `finished` is given each run with what was measured, as soon as it is. Returns those
    that failed, with the reason. Raises Stopped after a signal, when all have ended."""
    waiting, going, failed = list(plan.todo), [], []
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)

    # A job in the background has Ctrl-C ignored, and nohup the end of its terminal.
    heard = [number for number in STOPS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, receive) for number in heard}
    asked = 0
    try:
        while going or (waiting and not received):
            if received and len(received) > asked:
                stop(going, kill=asked > 0)
                asked = len(received)
            for one in [one for one in going if one.process.poll() is not None]:
                going.remove(one)
                reason = what_ended(one, plan.runs)
                if reason is None:
                    finished(one.planned, measured(one.planned.folder(plan.runs)))
                    if one.epochs == one.planned.settings.epochs:
                        took = time.monotonic() - one.started
                        learn_time(plan, waiting, one.planned, took)
                elif not received:
                    failed.append((one.planned, reason))
                    say(f"failed    {one.planned.title}: {reason}")
                say_left(plan, waiting, going, one.planned)
            failed += without_teacher(waiting, failed)
            while not received and len(going) < len(plan.places):
                if (planned := next_ready(waiting, going, plan.runs)) is None:
                    break
                waiting.remove(planned)
                place = min(set(range(len(plan.places))) - {one.place for one in going})
                going.append(start(planned, plan, place))
            time.sleep(POLL)
    finally:
        for one in going:  # an error of the study itself
            one.process.terminate()
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        name = signal.Signals(received[0]).name
        raise Stopped(f"stopped by {name}: the same command goes on", received[0])
    return failed


def without_teacher(waiting: list[Planned], failed: Sequence[tuple[Planned, str]]) -> list:
    """Those that can no longer start, taken out of `waiting`."""
    gone = {planned for planned, _ in failed}
    stuck = [planned for planned in waiting if planned.teacher in gone]
    for planned in stuck:
        waiting.remove(planned)
    return [(planned, "its teacher failed") for planned in stuck]


def next_ready(waiting: list[Planned], going: list[Going], runs: Path) -> Planned | None:
    """The first whose teacher is there, and that no other process, of a study that was killed,
    still saves."""
    for planned in waiting:
        teacher = planned.teacher
        busy = teacher is not None and (
            teacher in waiting or any(one.planned is teacher for one in going)
        )
        if not busy and not is_locked(planned.folder(runs)):
            return planned
    return None


def start(planned: Planned, plan: Plan, place: int) -> Going:
    folder = planned.folder(plan.runs)
    write_run(planned, plan.runs)
    epochs = epochs_left(planned, plan.runs)
    with (folder / LOG).open("a") as log:
        process = subprocess.Popen(
            command(str(folder)),
            env=environment(plan.places[place]),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C is for the study, which tells them
        )
    say(f"started   {planned.title}")
    return Going(planned, process, place, time.monotonic(), epochs)


def write_run(planned: Planned, runs: Path) -> None:
    """What experiments.one_run reads in the run's folder. What a run has left there whose last
    checkpoint is gone is moved aside: nothing can go on with it."""
    folder, teacher = planned.folder(runs), planned.teacher
    if not os.path.lexists(planned.checkpoint(runs)) and trained_in(folder):
        move_aside(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = None if teacher is None else str(teacher.checkpoint(runs))
    content = {"options": planned.command(runs), "teacher": path}
    write_json(folder / RUN, content)


def write_json(path: Path, content: Any) -> None:
    write_whole(path, (json.dumps(content, indent=2) + "\n").encode())


def stop(going: list[Going], kill: bool) -> None:
    text = "killing" if kill else "stopping: saving"
    say(f"{text} {len(going)} run{'s' * (len(going) != 1)}")
    for one in going:
        one.process.kill() if kill else one.process.terminate()


def what_ended(one: Going, runs: Path) -> str | None:
    """Why it has failed; None where it has not."""
    code, folder = one.process.returncode, one.planned.folder(runs)
    if code == 0:
        return None if measured(folder) else f"it has left no {FOUND}"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return last_line(folder) or f"exit code {code}"


def last_line(folder: Path) -> str:
    """What a run has said last; nothing where it has no log."""
    try:
        lines = (folder / LOG).read_text(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1] if lines else ""


def why_missing(folder: Path) -> str:
    """Of a run that has no row."""
    if not (folder / RUN).is_file():
        return "it was not started"
    return f"it is not finished: {last_line(folder) or 'it has said nothing'}"


def measured(folder: Path) -> dict[str, Any] | None:
    """What was measured of a run; None where it is not finished."""
    try:
        return json.loads((folder / FOUND).read_bytes())
    except (OSError, ValueError):
        return None


# What is said.


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def say_finished(planned: Planned, found: dict[str, Any]) -> None:
    of_teacher = ""
    if found.get("teacher_accuracy") is not None:
        of_teacher = f", teacher {percent(found['teacher_accuracy'], 2)}"
    took = duration(found["seconds"])
    say(f"finished  {planned.title}: {percent(found['accuracy'], 2)}{of_teacher}, in {took}")


def say_left(plan: Plan, waiting: list[Planned], going: list[Going], done: Planned) -> None:
    left = len(waiting) + len(going)
    text = f"{len(plan.todo) - left} of {len(plan.todo)} runs have ended"
    if left:
        text += f", about {duration(seconds_left(plan, waiting, going))} left"
    say(f"          {text}")


def seconds_left(plan: Plan, waiting: Sequence[Planned], going: Sequence[Going] = ()) -> float:
    """Until all have ended, if all places are always in use."""
    now = time.monotonic()
    rest = [max(0.0, plan.seconds.get(one.planned, 0.0) - (now - one.started)) for one in going]
    rest += [plan.seconds.get(planned, 0.0) for planned in waiting]
    return max([*rest, sum(rest) / len(plan.places)], default=0.0)
