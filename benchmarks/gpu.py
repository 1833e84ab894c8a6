"""What can only be shown on a GPU, in stages: bash benchmarks/gpu.sh STAGE --out DIR

check    the tests that compare numbers, with `pytest --device cuda`
speed    training_step and distillation_step
cifar10  a teacher, a 4-bit student and a 4-bit CLK of full size, trained by main.py
studies  what STUDIES below lists, a dozen small networks at a time

A stage ends by itself within --minutes. What it finds is written into DIR at once, in few small
files. Everything else stays in --work (of studies in data/ and runs/), checkpoints too: from them
the same command goes on with cifar10 and studies. --dry_run does a stage in miniature on a CPU.
"""

import argparse
import csv
import io
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.timing import machine, table
from benchmarks.training_step import COMPILED, LIMIT, OURS
from data_sets.sources import whole_folder
from display import percent

ROOT = Path(__file__).resolve().parent.parent
TESTS = (
    *("neuron", "quantization", "distiller", "networks", "device", "accumulate", "data_loader"),
    *("processes", "commands", "compiling", "resume"),
)
TESTS_OF_DRY_RUN = ("neuron", "distiller", "device")
SOME_TESTS = "naive_loop or by_hand or float64"
TRAININGS = {  # options of main.py
    "teacher": ["--paper_setting", "original"],
    "student": ["--paper_setting", "student", "--bits", "4"],
    "CLK": ["--paper_setting", "qamd", "--bits", "4", "--loss", "CLK"],
}
QUARTER = "--data folder --data_path data/cifar10_12500 --image_size 32 --width 8 --batch_size 64"
STUDIES = {  # by --name: the study's module in experiments/, and its options
    "cifar10_45": (
        "study",
        f"{QUARTER} --epochs 45 --bits 4 2 --methods CLK student --starts scratch teacher "
        "--seeds 1 2 3",
    ),
    "cifar10_timesteps": (
        "timesteps",
        f"{QUARTER} --epochs 15 --teacher_epochs 20 --bits 4 --seeds 1 2 "
        "--teacher_time_window 4 --time_windows 1 2 4",
    ),
}
OF_DRY_RUN = {"cifar10_45": "--methods student"}
OF_A_CLASS = 1250  # training images of cifar10_12500
AT_A_TIME = 12  # small networks that share a GPU: it waits for each one's Python
KEPT = ("run.json", "measured.json", "metrics.csv", "settings.json", "commits.txt", "log.txt")
WORKERS = 8  # processes that run tests: most wait for Python, or compile
GRACE = 40  # seconds that a training gets to finish its step, or an evaluation, and to save


class Stage:
    """What a stage needs: where its files go, how long it has, how its programs are started."""

    def __init__(self, args: argparse.Namespace, work: Path):
        self.name, self.out, self.work = args.stage, args.out, work
        self.dry_run, self.data, self.epochs = args.dry_run, args.data, args.epochs
        self.deadline = time.monotonic() + 60 * args.minutes
        self.device = torch.device("cpu" if args.dry_run else "cuda")
        self.quarter = (work if args.dry_run else ROOT / "data") / "cifar10_12500"
        self.runs = work / "runs" if args.dry_run else ROOT / "runs"  # of studies: their default
        self.environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        if args.dry_run:
            # Compiling takes a CPU minutes: torch.compile gives the eager functions here.
            self.environment |= {"CUDA_VISIBLE_DEVICES": "", "TORCH_COMPILE_DISABLE": "1"}
        if args.wheels is not None:
            self.install(args.wheels)

    def install(self, wheels: Path) -> None:
        site, old = self.work / "site", os.environ.get("PYTHONPATH", "")
        offline = ["--no-index", "--no-deps", "--no-compile", "--upgrade", "--target", str(site)]
        files = [str(path) for path in sorted(wheels.glob("*.whl"))]
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "--quiet", *offline, *files], check=True
        )
        self.environment["PYTHONPATH"] = os.pathsep.join([str(site), *filter(None, [old])])

    def run(self, *command: str, share: float = 1.0, grace: float = 0.0) -> int | None:
        """Run Python with these arguments, its output appended to the log; returns its exit code.

        None where a `share` of the stage's time left was not enough: the last `grace` seconds of it
        are the program's own, from being asked to stop to being killed.
        """
        seconds = share * (self.deadline - time.monotonic()) - grace
        if seconds <= 0:
            return None
        with (self.out / f"{self.name}.log").open("a") as log:
            print("$ python", *command, file=log, flush=True)
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                return process.wait(seconds)
            except subprocess.TimeoutExpired:
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(grace)
                print("the time is up", file=log)
                return None
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def write(self, *parts: str) -> None:
        """The stage's table: STAGE.md."""
        text = "\n\n".join([f"`bash benchmarks/gpu.sh {self.name}`", machine(self.device), *parts])
        (self.out / f"{self.name}.md").write_text(text + "\n")


def check(stage: Stage) -> bool:
    """Whether all tests have passed; those that were skipped say why in the log."""
    tests = TESTS_OF_DRY_RUN if stage.dry_run else TESTS
    measured = stage.out / "check_measured.csv"
    measured.write_text("test,number of,value\n")
    code = stage.run(
        *("-m", "pytest", "-v", "-ra", "--tb=short", "--color=no", "--durations=10"),
        *("-m", "device", "--device", stage.device.type, "--measured", str(measured)),
        *side_by_side(stage),
        *(("-k", SOME_TESTS) if stage.dry_run else ()),
        *(f"tests/test_{name}.py" for name in tests),
    )
    log = (stage.out / "check.log").read_text()
    words = "(PASSED|FAILED|ERROR|SKIPPED)"
    line = rf"^\[gw\d+\] \[ *\d+%\] {words} (tests/.+?) *$"
    outcome = {name: x for x, name in re.findall(line, log, re.MULTILINE)}
    alone = rf"^(tests/.+?) {words}(?: \(.*)? +\[ *\d+%\]$"  # in one process
    outcome |= dict(re.findall(alone, log, re.MULTILINE))
    counts = Counter(outcome.values())
    parts = [table(("passed", "failed", "skipped"), [_counts(counts)])]
    parts += [f"- {x}: {name}" for name, x in outcome.items() if x in ("FAILED", "ERROR")]
    if code is None:
        parts.append("The time was up: the tests that are not in the log did not run.")
    stage.write(*parts, "Numbers beside pass and fail: check_measured.csv")
    return code == 0


def side_by_side(stage: Stage) -> list[str]:
    """pytest's options for several processes, where there is pytest-xdist."""
    there = [sys.executable, "-c", "import xdist"]
    if subprocess.run(there, env=stage.environment, capture_output=True).returncode:
        return []
    return ["-n", "1" if stage.dry_run else str(WORKERS), "--dist", "worksteal"]


def _counts(counts: Counter) -> tuple[int, int, int]:
    return counts["PASSED"], counts["FAILED"] + counts["ERROR"], counts["SKIPPED"]


def speed(stage: Stage) -> bool:
    """Whether all benchmarks came to their ends; each writes its own file."""
    full = ["--precisions", "bf16", "float32", "tf32", "--sweep", "4", "8"]
    size = []
    if stage.dry_run:
        size = ["--width", "2", "--T", "2", "--batch", "2", "--rounds", "1"]
        full = ["--no_memory", "--sweep", "2", "--variants", LIMIT, OURS, COMPILED]
    rows = []
    for name, share, options in (
        ("training_step", 0.6, full),
        ("distillation_step", 1.0, ["--no_memory"] if stage.dry_run else ["--amp"]),
    ):
        out = ["--out", str(stage.out / f"{name}.md")]
        code = stage.run("-m", f"benchmarks.{name}", *size, *options, *out, share=share)
        ends = {0: "all of it", None: "the time was up"}
        rows.append((f"{name}.md", ends.get(code, "failed: see speed.log")))
        stage.write(table(("file", "holds"), rows))
    return all(end == "all of it" for _, end in rows)


def cifar10(stage: Stage) -> bool:
    """Whether no training failed; one that was stopped goes on at the next call."""
    size = ["--width", "64", "--time_window", "4", "--batch_size", "256"]
    if stage.dry_run:
        size = ["--width", "2", "--time_window", "2", "--batch_size", "8"]
    data = images_of(stage)
    folder = stage.work / f"cifar10-{stage.epochs}-epochs"
    rows, succeeded = [], True
    for name, options in TRAININGS.items():
        if name == "CLK":
            teacher = folder / "teacher" / "original-best.pth"
            options = [*options, "--teacher_path", str(teacher)]
        metrics, start, code = folder / name / "metrics.csv", time.monotonic(), 0
        if len(epochs_in(metrics)) < stage.epochs:
            code = stage.run(
                *("main.py", "--data", "folder", "--data_path", str(data), "--image_size", "32"),
                *(*options, *size, "--model_depth", "18", "--amp", "--compile", "--seed", "1234"),
                *("--epochs", str(stage.epochs), "--save_path", str(folder / name), "--resume"),
                *("--device", stage.device.type),
                grace=GRACE,
            )
        done = epochs_in(metrics)
        if done:
            shutil.copy(metrics, stage.out / f"cifar10-{name}.csv")
        rows.append((name, f"{len(done)} of {stage.epochs}", *figures(done)))
        rows[-1] += (f"{time.monotonic() - start:.0f}",)
        state = "The same command goes on."
        if code not in (0, None):
            state = f"The training of the {name} failed: see cifar10.log."
        elif code == 0 and name == "CLK":
            state = "All are trained."
        stage.write(
            f"MS-ResNet-18 on CIFAR-10 as JPEG, {' '.join(size)}, bf16, --compile, 4 bits, from "
            "scratch; img/s of training, median of the epochs",
            table(("", "epochs", "test, last", "test, best", "img/s", "s in this call"), rows),
            state,
        )
        if code != 0:
            succeeded = code is None
            break
    return succeeded


def studies(stage: Stage) -> bool:
    """Whether no run failed. The runs' small files come back as studies.tar.gz: unpacked here, they
    give the same studies their rows (--table)."""
    quarter_of(stage)
    rows, succeeded = [], True
    for name in OF_DRY_RUN if stage.dry_run else STUDIES:
        module, options = STUDIES[name]
        if stage.dry_run:
            images = f"--data folder --data_path {stage.quarter} --image_size 16 --batch_size 8"
            options = f"{images} --width 1 --epochs 1 --bits 4 --seeds 1 {OF_DRY_RUN[name]}"
        code = stage.run(
            *("-m", f"experiments.{module}", *options.split(), "--workers", "0", "--compile"),
            *("--parallel", "2" if stage.dry_run else str(AT_A_TIME), "--name", name),
            *("--runs", str(stage.runs), "--results", str(stage.work / "results")),
            grace=GRACE,
        )
        done = len(list((stage.runs / name).glob("*/measured.json")))
        ends = {0: "all of it", None: "the time was up: the same command goes on"}
        rows.append((name, str(done), ends.get(code, "failed: see studies.log")))
        succeeded &= code in (0, None)
        with tarfile.open(stage.out / "studies.tar.gz", "w:gz") as archive:
            for path in sorted(stage.runs.glob("*/*/*")):
                if path.name in KEPT and path.parts[-3] in STUDIES:
                    archive.add(path, Path("runs", *path.parts[-3:]))
        stage.write(table(("study", "runs done", "holds"), rows))
    return succeeded


def quarter_of(stage: Stage) -> None:
    """Make data/cifar10_12500 where it is missing: a quarter for training, all test images."""
    folder = stage.quarter
    if folder.is_dir():
        return
    images = unpacked(stage)
    with whole_folder(folder) as unfinished:
        for part, most in (("train", OF_A_CLASS), ("val", None)):
            for of_class in sorted((images / part).iterdir()):
                to = unfinished / part / of_class.name
                to.mkdir(parents=True)
                for path in sorted(of_class.iterdir())[:most]:
                    shutil.copy(path, to)


def epochs_in(metrics: Path) -> list[dict[str, str]]:
    """The rows of a run's metrics.csv."""
    return list(csv.DictReader(metrics.open(newline=""))) if metrics.exists() else []


def figures(epochs: list[dict[str, str]]) -> tuple[str, str, str]:
    """(last accuracy, best accuracy, median of the images per second)"""
    if not epochs:
        return "-", "-", "-"
    last, best = (float(epochs[-1][f"{name}_accuracy"]) for name in ("test", "best"))
    speed = statistics.median(float(row["images_per_second"]) for row in epochs)
    return percent(last, 2), percent(best, 2), f"{speed:.0f}"


def unpacked(stage: Stage) -> Path:
    """The folder that the archive was unpacked into; made where it is missing."""
    folder = stage.work / "cifar10"
    if not folder.is_dir():
        archive = stage.work / "tiny.tar" if stage.dry_run else stage.data
        if stage.dry_run:
            write_tiny_archive(archive)
        with whole_folder(folder) as unfinished, tarfile.open(archive) as files:
            files.extractall(unfinished, filter="data")
    return folder


def images_of(stage: Stage) -> Path:
    """The same folder, packed."""
    folder = unpacked(stage)
    packed = stage.work / "packed"
    if not packed.exists():
        # The first training would do it too, in its time.
        prepare = ["prepare", "--data", "folder", "--image_size", "32"]
        if stage.run("data_loader.py", *prepare, "--data_path", str(folder)) == 0:
            packed.touch()
    return folder


def write_tiny_archive(path: Path) -> None:
    """Two classes of noisy JPEGs, a bright and a dark one, laid out as the real archive's."""
    generator = np.random.default_rng(0)
    with tarfile.open(path, "w") as files:
        for number in range(24):
            part = "train" if number < 16 else "val"
            noise = generator.integers(0, 100, (32, 32, 3)) + 120 * (number % 2)
            image = io.BytesIO()
            Image.fromarray(noise.astype(np.uint8)).save(image, "JPEG")
            member = tarfile.TarInfo(f"{part}/class {number % 2}/{number}.jpg")
            member.size = image.tell()
            image.seek(0)
            files.addfile(member, image)


NEED_IMAGES = ("cifar10", "studies")
STAGES = {"check": check, "speed": speed, "cifar10": cifar10, "studies": studies}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu.sh", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("stage", choices=STAGES)
    add("--out", type=Path, metavar="DIR", help="for the results (dry: a temporary one)")
    add("--dry_run", action="store_true", help="in miniature, on the CPU")
    add("--minutes", type=float, default=9.0, help="after which the stage has ended (9)")
    add("--work", type=Path, help="for what does not come back (runs/gpu; dry: a temporary one)")
    add("--wheels", type=Path, help="folder of wheels to install there first, for spikingjelly")
    add("--data", type=Path, default=Path("data/cifar10_jpeg.tar.xz"), help="archive of the JPEGs")
    add("--epochs", type=int, help="of each training of cifar10 (10; dry: 1)")
    args = parser.parse_args(arguments)
    args.epochs = args.epochs or (1 if args.dry_run else 10)
    problem = None
    if args.out is None and not args.dry_run:
        problem = "give --out DIR, for the results"
    elif not args.dry_run and not torch.cuda.is_available():
        problem = "there is no usable GPU: --dry_run tries a stage in miniature on the CPU"
    elif args.wheels is not None and not any(args.wheels.glob("*.whl")):
        problem = f"--wheels {args.wheels} holds no wheels (*.whl)"
    elif args.stage in NEED_IMAGES and not args.dry_run and not args.data.is_file():
        problem = f"--data {args.data} is missing: copy the archive of the JPEGs there"
    if problem is not None:
        print(f"gpu.sh: error: {problem}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or (Path(temporary) if args.dry_run else Path("runs/gpu"))
        args.out, work = (args.out or Path(temporary) / "out").resolve(), work.resolve()
        args.out.mkdir(parents=True, exist_ok=True)
        work.mkdir(parents=True, exist_ok=True)
        succeeded = STAGES[args.stage](Stage(args, work))
        print((args.out / f"{args.stage}.md").read_text(), end="")
    return 0 if succeeded else 1


if __name__ == "__main__":
    sys.exit(main())
