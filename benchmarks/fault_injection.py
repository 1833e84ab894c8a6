"""What a run survives: python -m benchmarks.fault_injection

Real runs on digits meet real faults: killed at random moments and while they write a checkpoint,
signalled, on full disks, with hostile and damaged files; thousands of steps; and many starts and
ends under both launchers. "lost" counts everything that was not as it should be: a run whose end
differs from the uninterrupted one's (weights, metrics.csv), a traceback, a hang.
It must be 0. The short form of all this is in tests/test_resume.py and tests/test_faults.py.
"""

import argparse
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import main as program
from benchmarks import hostile_input
from benchmarks.timing import report, table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "fault_injection.md"
DIGITS = ["--data", "digits", "--width", "1", "--workers", "0", "--deterministic"]
STUDENT = [*DIGITS, "--paper_setting", "student", "--bits", "4", "--batch_size", "240"]
RUN = [*STUDENT, "--epochs", "3", "--save_every", "1", "--resume"]  # 15 steps
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone"],
    "launch": ["torch.distributed.launch", "--master_port=29571"],
}
HEADER = ("fault", "tried", "survived", "lost")
Row = tuple[str, int, int, int]
TIME_LIMIT = 60  # seconds; what takes longer hangs


def start(folder: Path, *options: str, launcher: Sequence[str] = ()) -> subprocess.Popen:
    module = ["-m", *launcher, "--nproc_per_node=2"] if launcher else []
    command = [sys.executable, *module, str(ROOT / "main.py"), *RUN, *options]
    return subprocess.Popen(
        [*command, "--save_path", str(folder)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen) -> tuple[int | None, list[str]]:
    """Exit code, None where it hangs; what our program wrote to stderr."""
    try:
        _, err = process.communicate(timeout=TIME_LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        _, err = process.communicate()
        return None, err.splitlines()
    return process.returncode, [x for x in err.splitlines() if "main.py: warning" not in x]


def changed(folder: Path) -> int:
    path = folder / "student-last.pth"
    return path.stat().st_mtime_ns if path.exists() else 0


def wait_for_a_checkpoint(folder: Path, process: subprocess.Popen) -> None:
    before = changed(folder)
    while changed(folder) == before and process.poll() is None:
        time.sleep(0.002)


def end(folder: Path) -> list[bytes]:
    """What has to be the same: weights, momentum, metrics."""
    kept = []
    for name in ("last", "best"):
        content = torch.load(folder / f"student-{name}.pth", weights_only=True)
        momentum = [x["momentum_buffer"] for x in content["optimizer"]["state"].values()]
        kept += [x.numpy().tobytes() for x in (*content["model"].values(), *momentum)]
    return [*kept, (folder / "metrics.csv").read_bytes()]


def kills(count: int, folder: Path, expected: list[bytes]) -> Row:
    """SIGKILL at random moments after a checkpoint, each time the run goes on; from the start again
    when it has reached its end."""
    generator, survived, done = random.Random(0), 0, 0
    while done < count:
        shutil.rmtree(folder, ignore_errors=True)
        killed = 0
        while True:
            process = start(folder)
            wait_for_a_checkpoint(folder, process)
            if done < count and process.poll() is None:
                time.sleep(generator.uniform(0, 0.4))
                process.kill()
            code, lines = finish(process)
            if code != -signal.SIGKILL:
                break
            done, killed = done + 1, killed + 1
        survived += killed if (code, lines) == (0, []) and end(folder) == expected else 0
    return "SIGKILL at a random moment", done, survived, done - survived


KILLED_WHILE_SAVING = """\
import os, random, signal, sys
import main

def killed(file):
    saves[0] += 1
    if saves[0] == int(sys.argv[1]):
        os.truncate(file, random.randrange(os.fstat(file).st_size + 1))
        os.kill(os.getpid(), signal.SIGKILL)

saves = [0]
os.fsync = killed
sys.exit(main.main(sys.argv[2:]))
"""


def kills_while_saving(count: int, folder: Path, expected: list[bytes]) -> Row:
    """Killed with a part of a checkpoint on the disk."""
    survived = 0
    for number in range(1, count + 1):
        shutil.rmtree(folder, ignore_errors=True)
        at = str(1 + number * 19 // (count + 1))  # of the 19 that a run writes
        command = [sys.executable, "-c", KILLED_WHILE_SAVING, at, *RUN, "--save_path", str(folder)]
        killed = subprocess.run(command, cwd=ROOT, capture_output=True).returncode
        with mock.patch("builtins.print"):
            code = program.main([*RUN, "--save_path", str(folder)])
        survived += (killed, code) == (-signal.SIGKILL, 0) and end(folder) == expected
    return "SIGKILL while a checkpoint is written", count, survived, count - survived


def signals(folder: Path, expected: list[bytes]) -> list[Row]:
    rows = []
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        shutil.rmtree(folder, ignore_errors=True)
        process = start(folder)
        wait_for_a_checkpoint(folder, process)
        os.killpg(process.pid, number)
        code, lines = finish(process)
        ok = code == 128 + number and len(lines) == 1
        code, _ = finish(start(folder))
        ok = ok and code == 0 and end(folder) == expected
        rows.append((f"{number.name} to the process group", 1, int(ok), int(not ok)))
    return rows


def full_disks(count: int, folder: Path, expected: list[bytes]) -> Row:
    """A limit of the size of files that cuts off a checkpoint at `count` different places."""
    survived, options = 0, [*RUN, "--save_path", str(folder)]
    step_is_done = program.Run.step_is_done

    def cut_off(run: program.Run, sums) -> None:
        step_is_done(run, sums)
        if run.steps_done == 7:
            raise KeyboardInterrupt

    for number in range(count):
        shutil.rmtree(folder, ignore_errors=True)
        with mock.patch("builtins.print"):
            with mock.patch.object(program.Run, "step_is_done", cut_off):
                program.main(options)
            before = (folder / "student-last.pth").read_bytes()
            limit = resource.getrlimit(resource.RLIMIT_FSIZE)
            size = len(before) * (number + 1) // (count + 1)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
            try:
                code = program.main(options)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limit)
            kept = (folder / "student-last.pth").read_bytes() == before
            kept = kept and not list(folder.glob("*.tmp"))
            survived += (
                code == 2 and kept and program.main(options) == 0 and end(folder) == expected
            )
    return "disk full while a checkpoint is written", count, survived, count - survived


def clean_exits(count: int, folder: Path) -> tuple[list[Row], list[str]]:
    """The rows, and what was seen of each end that was not clean."""
    rows, seen = [], []
    for name, launcher in LAUNCHERS.items():
        clean = 0
        for number in range(count):
            shutil.rmtree(folder, ignore_errors=True)
            options = ["--batch_size", "718", "--epochs", "1"]
            code, lines = finish(start(folder, *options, launcher=launcher))
            if code == 0 and not any("terminate called" in line for line in lines):
                clean += 1
            else:
                ending = "hangs" if code is None else f"exit code {code}"
                seen.append("\n".join([f"{name}, start {number + 1}: {ending}", "", *lines[-40:]]))
        rows.append((f"two processes under {name}: start and end", count, clean, count - clean))
    return rows, seen


def hostile(count: int, folder: Path) -> list[Row]:
    """The property tests, and files cut off; a failure raises."""
    run = [*STUDENT, "--epochs", "1", "--save_path", str(folder)]
    with mock.patch("builtins.print"):
        program.main(run)
    checkpoint = folder / "student-last.pth"
    shares = {"argument lists": 6, "layer lists": 3, "settings.json": 1}
    shares |= {"checkpoints, evaluated and resumed": 1}
    tries: tuple[Callable[[int], None], ...] = (
        hostile_input.try_arguments,
        lambda n: hostile_input.try_layer_lists(n, folder),
        lambda n: hostile_input.try_configs(n, folder),
        lambda n: hostile_input.try_checkpoints(n, run, checkpoint),
    )
    rows = []
    for (name, share), attempt in zip(shares.items(), tries, strict=True):
        attempt(count * share // 10)
        rows.append((f"hostile {name}", count * share // 10, count * share // 10, 0))
    with mock.patch("builtins.print"):
        readers = hostile_input.files_to_cut(folder, checkpoint)
        hostile_input.try_cut_files(100, readers)
    cut = 100 * len(readers)
    rows.append(("checkpoint, npz, layer list, cache, archive cut off anywhere", cut, cut, 0))
    return rows


def soak(steps: int, folder: Path) -> tuple[Row, str]:
    """Memory and open files of a run of `steps` steps, every hundred of them."""
    samples: list[tuple[int, float, int]] = []
    step_is_done = program.Run.step_is_done

    def sample(run: program.Run, sums) -> None:
        step_is_done(run, sums)
        if run.steps_done % 100 == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            memory = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
            samples.append((run.steps_done, memory, len(os.listdir("/proc/self/fd"))))

    epochs = -(-steps // 89)
    options = [*DIGITS, "--paper_setting", "student", "--bits", "4", "--batch_size", "16"]
    options += ["--epochs", str(epochs), "--save_path", str(folder), "--save_every", "50"]
    with mock.patch("builtins.print"), mock.patch.object(program.Run, "step_is_done", sample):
        code = program.main(options)
    warm = [x for x in samples if x[0] > steps // 4]
    slope = np.polyfit([x[0] / 100 for x in warm], [x[1] for x in warm], 1)[0]
    flat = code == 0 and slope < 1 and len({x[2] for x in warm}) == 1
    text = (
        f"Soak: {samples[-1][0]} steps, a checkpoint every 50, an evaluation every 89. After "
        f"warm-up memory grows by {slope:.3f} MB per 100 steps ({warm[0][1]:.0f} MB after "
        f"{warm[0][0]} steps, {warm[-1][1]:.0f} MB at the end); "
        f"open files: {warm[0][2]} and {warm[-1][2]}."
    )
    return (f"{samples[-1][0]} steps: memory and files flat", 1, int(flat), int(not flat)), text


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.fault_injection", description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--exits", type=int, default=200, help="of each launcher")
    parser.add_argument("--inputs", type=int, default=10_000, help="hostile inputs")
    parser.add_argument("--steps", type=int, default=2_000, help="of the soak")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        # In a process of its own, as all that are compared with it.
        finish(start(folder / "uninterrupted"))
        expected, work = end(folder / "uninterrupted"), folder / "run"
        exits, seen = clean_exits(args.exits, work)
        rows = [
            kills(args.kills, work, expected),
            kills_while_saving(max(1, args.kills // 4), work, expected),
            *signals(work, expected),
            full_disks(5, work, expected),
            *exits,
            *hostile(args.inputs, folder / "hostile"),
        ]
        row, text = soak(args.steps, folder / "soak")
        rows.append(row)
    lost = sum(row[3] for row in rows)
    total = ("**all**", sum(row[1] for row in rows), sum(row[2] for row in rows), f"**{lost}**")
    parts = [table(HEADER, [*rows, total]), text, *seen]
    report("fault_injection", argv, torch.device("cpu"), parts, args.out)
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main())
