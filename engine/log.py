"""What a training says and writes: its header, a line an epoch, the progress bar, its end, and the
files beside its checkpoints."""

import csv
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoints import Checkpoint, load_checkpoint, same_classes
from data_loader import ImageSet
from display import percent, significant
from distiller import teacher_steps
from engine.model_card import is_of, model_card, path_of
from engine.run import Run, disk_errors
from engine.run_folder import EVENTS, PROGRAM, best_row, deciding
from runtime.files import write_whole
from runtime.processes import is_main_process, world_size
from settings import MAY_CHANGE, OF_CHIP, Settings, as_text, chip_defaults

COLUMNS = (
    *("epoch", "lr", "loss", "ce", "logit", "membrane", "train_accuracy"),
    *("val_accuracy", "val_loss", "test_accuracy", "test_loss", "best_accuracy"),
    *("spike_rate", "images_per_second"),
)
FEW_STEPS = 10  # of an epoch: below it a warning


def duration(seconds: float) -> str:
    """In the two largest units: 0.4 s, 12 s, 1 min 12 s, 1 h 52 min, 3 d 4 h."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return "{} min {} s".format(*divmod(whole, 60))
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return "{} h {} min".format(*divmod(minutes, 60))
    return "{} d {} h".format(*divmod(round(seconds / 3600), 24))


def amount(number: int) -> str:
    """Three digits of a large number: 8.73 million."""
    for unit, name in ((1e9, "billion"), (1e6, "million")):
        if number >= 0.9995 * unit:
            return f"{significant(number / unit)} {name}"
    return f"{number:,}"


def count(number: float, word: str) -> str:
    """1 step, 22 steps, 1.6 epochs."""
    text = f"{number:,}" if isinstance(number, int) else f"{number:.3g}"
    return f"{text} {word}{'s' * (text != '1')}"


def figure(x: float) -> str:
    """Three digits of a loss: 1.70, 0.0131."""
    return f"{x:#.3g}".removesuffix(".")


def speed(images_per_second: float) -> str:
    return f"{images_per_second:.{0 if images_per_second >= 9.95 else 1}f} img/s"


def aligned(lines: Iterable[tuple[str, str]], width: int = 10) -> str:
    """One line each: a word, and what there is to say."""
    return "\n".join(f"{word:<{width}}{text}" for word, text in lines)


def header(
    run: Run,
    train_set: ImageSet,
    test_set: ImageSet,
    teacher: Checkpoint | None,
    macs: int,
    device: torch.device,
) -> str:
    """What is about to run: a few lines."""
    settings, steps, processes = run.settings, run.steps_per_epoch, world_size()
    data_set, image = settings.data_set, test_set[0][0]
    name = f"CPU ({count(torch.get_num_threads(), 'thread')})"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    name += f", {processes} process{'es' * (processes > 1)}" + ", bfloat16" * settings.amp
    data = settings.data + ("" if settings.fold is None else f", fold {settings.fold}")
    data += f": {run.training_images:,} training"
    if train_set.held_out is not None:
        data += f", {len(train_set.held_out):,} held-out"
    data += f" and {len(test_set):,} test images, {data_set.num_classes} classes, "
    data += f"{len(image)} frames of " * data_set.events + "x".join(map(str, image.shape[-3:]))
    size = min(settings.batch_size, run.training_images)
    batch = f"{size}" + f" ({processes} x {-(-size // processes)})" * (processes > 1)
    batch += f" in {settings.accumulate} parts" * (settings.accumulate > 1)
    batch += f", {count(steps, 'step')} an epoch, {count(settings.epochs, 'epoch')}"
    quantized = settings.bits is not None
    network = f"{'Quan-' * quantized}{settings.network_name}, "
    network += f"width {settings.width}, T {', '.join(map(str, settings.trained_at))}: "
    network += f"{sum(x.numel() for x in run.network.parameters()):,} parameters, "
    network += f"{amount(macs)} MACs an image"
    network += f" at T {settings.time_window}" * (settings.time_windows is not None)
    bits = f"{settings.bits}, {settings.bn_bits} in batch norm" if quantized else "full precision"
    lines = {"device": name, "data": data, "batch": batch, "network": network, "bits": bits}
    if settings.crossbar is not None:
        lines["chip"] = f"{settings.trained_for}; trained for it, and tested on it"
    if teacher is not None:
        lines["teacher"] = about_teacher(settings, teacher)
    if settings.init_from is not None:
        start = load_checkpoint(settings.init_from, weights=False)
        but = "" if same_classes(settings, start.settings) else ", all but the classifier"
        lines["start"] = f"{settings.init_from}: {percent(start.accuracy)} on "
        lines["start"] += f"{start.settings.data} (epoch {start.epoch}){but}"
    lines["files"] = settings.save_path + " (a dry run writes nothing)" * settings.dry_run
    if run.steps_done:
        lines["resume"] = going_on(run)
    if steps < FEW_STEPS:
        few = f"an epoch has {count(steps, 'step')}, fewer than {FEW_STEPS}: a smaller "
        lines["warning"] = few + "--batch_size or more --epochs train longer"
    return aligned(lines.items())


def about_teacher(settings: Settings, teacher: Checkpoint) -> str:
    own = teacher.settings.time_window
    text = f"{settings.teacher_path}: {percent(teacher.accuracy)} (epoch {teacher.epoch}), T {own}"
    if settings.loss is None:
        return text
    how = settings.loss, settings.data_set.events
    longest = [teacher_steps(T, own, *how)[0] for T in settings.trained_at]
    if {*longest} != {own}:
        up_to = "up to " * (longest[0] != longest[-1])
        text += f", run for {up_to}{count(longest[-1], 'timestep')}"
    return text


def going_on(run: Run) -> str:
    """Where a resumed run stands."""
    if len(run.rows) == run.settings.epochs:
        text = f"{count(len(run.rows), 'epoch')} done, none left"
    else:
        text = f"going on from epoch {run.epoch}" + (f", step {run.step}" if run.step else "")
    return text + (f" (best {percent(run.rows[-1]['best_accuracy'])})" if run.rows else "")


def epoch_line(rows: Sequence[dict[str, Any]], epochs: int) -> str:
    """The line about the last of `rows`."""
    row, best = rows[-1], best_row(rows)
    terms = [f"{x} {figure(row[x])}" for x in ("ce", "logit", "membrane") if row.get(x) is not None]
    is_best = "best" if best is row else f"best {percent(best[deciding(row)])} at {best['epoch']}"
    parts = [f"{row['epoch']:>{len(str(epochs))}}/{epochs}"]
    parts.append(f"loss {figure(row['loss'])}" + f" ({' '.join(terms)})" * (len(terms) > 1))
    for name in ("train_accuracy", "val_accuracy", "test_accuracy"):
        if row.get(name) is not None:
            text = f"{name.removesuffix('_accuracy')} {percent(row[name])}"
            parts.append(text + f" ({is_best})" * (name == deciding(row)))
    left = epochs - row["epoch"]
    parts.append(f"lr {row['lr']:.3g}")
    if row["images_per_second"] is not None:
        parts.append(speed(row["images_per_second"]))
    time_left = f", {duration(left * row['seconds'])} left" * (left > 0)
    parts.append(duration(row["seconds"]) + time_left)
    return "  ".join(parts)


def ending(run: Run) -> str:
    """How the run ended, and the commands that come next, to be pasted into a shell."""
    best, last = best_row(run.rows), run.rows[-1]

    def accuracies(row: dict[str, Any]) -> str:
        test = percent(row["test_accuracy"], 2)
        if deciding(row) == "test_accuracy":
            return test
        return f"val {percent(row['val_accuracy'], 2)}, test {test}"

    text = f"{accuracies(best)} (epoch {best['epoch']}), last {accuracies(last)}"
    if all(row.get("seconds") is not None for row in run.rows):  # not of an older version
        text += f", in {duration(sum(row['seconds'] for row in run.rows))}"
    checkpoint = run.best if run.best.exists() else run.last
    evaluation, report = next_commands(run.settings, checkpoint)
    lines = [("best accuracy", text), ("checkpoint", str(checkpoint))]
    return aligned([*lines, ("next", evaluation), ("", report)], 15)


def next_commands(settings: Settings, checkpoint: Path) -> list[str]:
    """Commands for a shell in the current folder: the accuracy again, and the hardware report."""
    program, path = "main.py", ""
    if not os.path.samefile(PROGRAM, os.curdir):
        program, path = str(PROGRAM / "main.py"), f"PYTHONPATH={shlex.quote(str(PROGRAM))} "
    data = ["--data_path", settings.data_path]
    how = ["--device", settings.device] if settings.device != "auto" else []
    how += ["--amp"] * settings.amp
    evaluate = [program, "--eval_only", str(checkpoint), "--data", settings.data, *data, *how]
    report = ["-m", "spikesim_eval", "report", "--checkpoint", str(checkpoint)]
    if settings.teacher_path is not None:
        report += ["--baseline", settings.teacher_path]
    if settings.crossbar is not None:
        usual = chip_defaults(settings.crossbar)
        own = {x: getattr(settings, x) for x in OF_CHIP if getattr(settings, x) != usual[x]}
        report += ["--technology", settings.crossbar, "--on_chip"]
        report += [text for name, value in own.items() for text in (f"--{name}", str(value))]
    report += [*data, "--out", str(checkpoint.parent / "report")]
    return [f"python {shlex.join(evaluate)}", f"{path}python {shlex.join(report)}"]


class ProgressBar(tqdm):
    """One line of a terminal, for a person who watches; nothing where the output is no terminal."""

    def __init__(self, batches: Iterable, name: str, total: int, done: int = 0):
        self.figures = ""
        super().__init__(
            batches,
            name,
            total,
            leave=False,
            initial=done,
            dynamic_ncols=True,
            disable=None if is_main_process() else True,  # None: where the output is no terminal
            bar_format="{desc}  {bar}  {n}/{total}{left}{figures}",
        )

    def show(self, *figures: str) -> None:
        """Figures to show from now on."""
        self.figures = "".join(f"  {x}" for x in figures)

    @property
    def format_dict(self) -> dict[str, Any]:
        state, left = super().format_dict, ""
        if (done := state["n"] - state["initial"]) > 0:
            seconds = (state["total"] - state["n"]) * state["elapsed"] / done
            left = f"  {duration(seconds)} left"
        columns = state["ncols"] or 0  # less than 1: a terminal that does not know its width
        known = {"ncols": columns if columns > 0 else 79}
        return state | known | {"left": left, "figures": self.figures}


class Log:
    """What a run leaves beside its checkpoints: settings.json, metrics.csv, TensorBoard events, and
    the best one's model card.

    A resumed run writes them anew, from the rows of its checkpoint: nothing is there twice, and
    nothing of an epoch that was lost.
    """

    def __init__(self, run: Run):
        self.run, self.settings, self.folder = run, run.settings, Path(run.settings.save_path)
        self.metrics, self.events = self.folder / "metrics.csv", self.folder / EVENTS
        self.about = about_run(self.settings)
        with disk_errors(self.folder, self.settings):
            (self.folder / "settings.json").write_text(json.dumps(self.about, indent=2) + "\n")
            with self.metrics.open("w", newline="") as file:
                csv.DictWriter(file, COLUMNS).writeheader()
            self.events.write_bytes(b"")
            self.record(wall_time=time.time(), file_version="brain.Event:2")
            for row in run.rows:
                self.append(row)
            if run.rows and run.best.exists() and not is_of(path_of(run), best_row(run.rows)):
                self.write_card({}, {})

    def append(self, row: dict[str, Any]) -> None:
        """Add an epoch to metrics.csv and to the curves."""
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb

        when = {"wall_time": row["time"], "step": row["epoch"]}
        if self.settings.deterministic:  # the same numbers in the same file, and no times
            row = row | {"images_per_second": None}
        with self.metrics.open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS, extrasaction="ignore").writerow(row)
        if row["epoch"] == 1:
            of_run = hyper_parameters(self.settings)
            self.record(**when, summary=hparams_pb(of_run, start_time_secs=row["time"]))
        known = {name: row[name] for name in COLUMNS[1:] if row.get(name) is not None}
        values = [Summary.Value(tag=name, simple_value=x) for name, x in known.items()]
        self.record(**when, summary=Summary(value=values))

    def record(self, **event: Any) -> None:
        """Add to the events. A SummaryWriter would write in a thread, which dies with a traceback
        when the disk is full. Imported here: only the first process of a training needs it."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        with self.events.open("ab") as file:
            RecordWriter(file).write(Event(**event).SerializeToString())

    def write_card(self, about: dict[str, Any], spikes: dict[str, Tensor]) -> None:
        card = model_card(self.run, best_row(self.run.rows), about, spikes)
        write_whole(path_of(self.run), card.encode())

    def write(self, spikes: dict[str, Tensor], silent: list[str]) -> None:
        """Log the run's last epoch and print it; `spikes` are those of its evaluation, and `silent`
        the layers that had none."""
        rows = self.run.rows
        with disk_errors(self.folder, self.settings):
            self.append(rows[-1])
            if best_row(rows) is rows[-1]:
                self.write_card(self.about, spikes)
        print(epoch_line(rows, self.settings.epochs), flush=True)
        if silent:
            print(
                f"main.py: warning: no neuron of {', '.join(silent)} fired for any test image",
                file=sys.stderr,
            )


def hyper_parameters(settings: Settings) -> dict[str, str | int | float | bool]:
    """The settings that make a run what it is, for TensorBoard's table of runs."""
    values = asdict(settings)
    if settings.time_windows is not None:
        values["time_windows"] = as_text(settings.time_windows)
    return {
        name: x
        for name, x in values.items()
        if isinstance(x, str | int | float) and (name == "epochs" or name not in MAY_CHANGE)
    }


def about_run(settings: Settings) -> dict[str, Any]:
    """The contents of settings.json: what is needed to run it again."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "torchvision", "numpy", "scikit-learn", "spikingjelly"):
        with suppress(PackageNotFoundError):  # not every data set needs every one
            versions[package] = version(package)
    return asdict(settings) | {
        "world_size": world_size(),
        "git_commit": git_commit(),
        "versions": versions,
    }


def git_commit(folder: Path = PROGRAM) -> str | None:
    """The last commit that has changed the program, and "-dirty" behind it where its files were
    changed since: results that are committed leave it the same. None where this is no git checkout,
    or there is no git."""

    def git(*words: str) -> str:
        command = ["git", "-C", folder, *words, "--", "*.py"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("log", "-1", "--format=%H")
        return commit + "-dirty" * bool(git("diff", "--name-only", "HEAD")) if commit else None
    except (OSError, subprocess.CalledProcessError):
        return None
