"""A run that is interrupted, wherever and however, and resumed ends as one that was not."""

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import data_loader
import main
from checkpoints import load_checkpoint
from conftest import REPOSITORY, refused
from data_loader import ImageSet
from engine.run import Run
from engine.run_folder import read_metrics
from loading import data_sets_of
from stand_in_data import write_ncaltech101
from warm import Program

MAIN = REPOSITORY / "main.py"
# Five steps an epoch.
DIGITS = ["--data", "digits", "--width", "1", "--batch_size", "240", "--workers", "0"]
DIGITS += ["--time_window", "2"]
STUDENT = [*DIGITS, "--paper_setting", "student", "--bits", "4", "--epochs", "2", "--deterministic"]


def train(folder: Path, *options: str) -> int:
    return main.main([*STUDENT, "--save_path", str(folder), *options])


def contents(folder: Path, name: str = "last") -> dict:
    return torch.load(folder / f"student-{name}.pth", weights_only=True)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) pairs of all TensorBoard curves."""
    events = EventAccumulator(str(folder)).Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def assert_same_end(folder: Path, expected: Path) -> None:
    assert (folder / "metrics.csv").read_text() == (expected / "metrics.csv").read_text()
    assert scalars(folder) == scalars(expected)
    for name in ("last", "best"):
        found, wanted = contents(folder, name), contents(expected, name)
        for key in ("epoch", "accuracy", "step", "sums"):
            assert found[key] == wanted[key], key
        assert found["model"].keys() == wanted["model"].keys()
        for key, x in wanted["model"].items():
            assert torch.equal(found["model"][key], x), (name, key)
        states = wanted["optimizer"]["state"]
        for number, state in found["optimizer"]["state"].items():
            assert torch.equal(state["momentum_buffer"], states[number]["momentum_buffer"])
        states = zip(found["random_states"], wanted["random_states"], strict=True)
        for state, wanted_state in states:
            assert state["python"] == wanted_state["python"]
            assert torch.equal(state["torch"], wanted_state["torch"])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    with suppress(ImportError):
        import rich.style  # noqa: F401  torch does on a GPU, and it asks Python's generator
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert train(folder) == 0
    torch.use_deterministic_algorithms(False)
    steps = [step for step, _ in scalars(folder)["loss"]]
    assert steps == [1, 2]
    return folder


class PowerCutError(Exception):
    pass


def cut_off_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the power go after that many steps."""
    step_is_done = Run.step_is_done

    def cut_off(run: Run, sums) -> None:
        step_is_done(run, sums)
        if run.steps_done == step:
            raise PowerCutError

    monkeypatch.setattr(Run, "step_is_done", cut_off)


@pytest.mark.device
@pytest.mark.parametrize("step", [1, 2, 3, 5, 8, 10])
def test_a_run_cut_off_after_any_step_goes_on_as_if_nothing_had_been(
    step, uninterrupted, tmp_path, monkeypatch
):
    cut_off_after(step, monkeypatch)
    # Every third step is saved, and the last of an epoch: it goes back by none, one or two steps.
    with pytest.raises(PowerCutError):
        train(tmp_path, "--save_every", "3")
    saved = contents(tmp_path)
    assert 5 * saved["epoch"] + saved["step"] == max(step - step % 3, step - step % 5)
    monkeypatch.undo()
    assert train(tmp_path, "--save_every", "3", "--resume") == 0
    assert_same_end(tmp_path, uninterrupted)
    assert train(tmp_path, "--resume") == 0  # nothing is left to do
    assert_same_end(tmp_path, uninterrupted)


def last_change(folder: Path) -> float:
    path = folder / "student-last.pth"
    return path.stat().st_mtime_ns if path.exists() else 0


KILLED_WHILE_SAVING = """\
import os, signal, sys
import main

def killed(file, saves=[]):
    saves.append(os.fstat(file).st_size)
    if len(saves) == 4:
        os.truncate(file, saves[-1] // 2)
        os.kill(os.getpid(), signal.SIGKILL)

os.fsync = killed
sys.exit(main.main(sys.argv[1:]))
"""


def test_a_kill_while_a_checkpoint_is_written_loses_nothing(uninterrupted, tmp_path):
    options = [*STUDENT, "--save_path", str(tmp_path), "--save_every", "1"]
    (tmp_path / "killed.py").write_text(KILLED_WHILE_SAVING)
    process = Program(tmp_path / "killed.py", *options)
    _, err = process.communicate()
    assert process.returncode == -signal.SIGKILL, err
    assert (tmp_path / "student-last.pth.tmp").exists()
    assert contents(tmp_path)["step"] == 2  # the start, two steps, and the half of the third
    assert train(tmp_path, "--resume") == 0
    assert not (tmp_path / "student-last.pth.tmp").exists()
    assert_same_end(tmp_path, uninterrupted)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138), (signal.SIGINT, 130)]
)
def test_a_signal_finishes_the_step_and_saves(
    number, code, uninterrupted, tmp_path, capfd, monkeypatch
):
    add = main.EpochSums.add

    def in_the_third_step(sums, *arguments) -> None:
        add(sums, *arguments)
        if sums.run.step == 2:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(main.EpochSums, "add", in_the_third_step)
    handler = signal.getsignal(number)
    assert train(tmp_path) == code
    assert signal.getsignal(number) == handler
    out, err = capfd.readouterr()
    assert "loss" not in out
    assert err == (
        f"main.py: stopped by {signal.Signals(number).name} after step 3 of epoch 1: the same "
        f"command with --resume goes on from {tmp_path / 'student-last.pth'}\n"
    )
    monkeypatch.undo()
    assert train(tmp_path, "--resume") == 0
    assert_same_end(tmp_path, uninterrupted)


@pytest.fixture(scope="module")
def events(tmp_path_factory) -> list[str]:
    """Options of a run whose batches come from two workers: digits need none."""
    data_path = tmp_path_factory.mktemp("events")
    write_ncaltech101(data_path, time_window=2, classes=2, per_class=20)
    data = ["--data", "ncaltech101", "--data_path", str(data_path), "--image_size", "16"]
    run = ["--paper_setting", "student", "--bits", "4", "--width", "1", "--time_window", "2"]
    return [*data, *run, "--batch_size", "4", "--epochs", "4", "--deterministic", "--workers", "2"]


@pytest.fixture(scope="module")
def uninterrupted_events(events, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted_events")
    assert main.main([*events, "--save_path", str(folder)]) == 0
    torch.use_deterministic_algorithms(False)
    return folder


def start_with_workers(folder: Path, events: list[str]) -> tuple[Program, list[int]]:
    """A run of events that has done its first step, and the process ids of its two workers."""
    process = Program(MAIN, *events, "--save_every", "1", "--save_path", str(folder))
    wait_for_a_step(folder, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while len(workers := children.read_text().split()) != 2:
        assert process.poll() is None
        time.sleep(0.01)
    return process, [int(worker) for worker in workers]


@pytest.mark.parametrize("to", ["the process group", "every process"])
def test_a_signal_to_all_leaves_the_loaders_alone(to, events, uninterrupted_events, tmp_path):
    process, workers = start_with_workers(tmp_path, events)
    if to == "the process group":  # as Ctrl-C in a terminal
        os.killpg(process.pid, signal.SIGTERM)
    else:  # as Slurm does, one by one
        for number in (*workers, process.pid):
            os.kill(number, signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert err.count("\n") == 1
    assert "stopped by SIGTERM" in err
    assert main.main([*events, "--resume", "--save_path", str(tmp_path)]) == 0
    assert_same_end(tmp_path, uninterrupted_events)


def test_asked_twice_to_stop_a_run_does_not_wait_for_loaders_that_hang(events, tmp_path):
    process, workers = start_with_workers(tmp_path, events)
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    time.sleep(1)  # what they had made ready is used up
    for _ in range(3):
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.2)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "main.py: interrupted\n")
    for worker in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(worker, signal.SIGCONT)


def test_a_loader_that_is_silent_ends_the_run(events, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(data_loader, "PATIENCE", timedelta(seconds=1))
    load = data_loader.ImageSet.__getitem__
    monkeypatch.setattr(
        data_loader.ImageSet, "__getitem__", lambda *item: time.sleep(3) or load(*item)
    )
    run = [*events, "--save_path", str(tmp_path)]
    line = refused(capfd, main.main, run, started=True)
    assert "the data have stopped coming (DataLoader timed out after 1" in line


@pytest.mark.parametrize("output", ["/dev/full", "a pipe without a reader"])
def test_output_that_nobody_takes_is_one_line(output, tmp_path):
    run = [*STUDENT, "--save_path", str(tmp_path)]
    if output == "/dev/full":
        process = Program(MAIN, *run, stdout=output)
        _, err = process.communicate()
    else:
        reader, taken = os.pipe()
        os.close(reader)
        command = [sys.executable, str(MAIN), *run]
        process = subprocess.run(command, stdout=taken, stderr=subprocess.PIPE, text=True)
        os.close(taken)
        err = process.stderr
    assert process.returncode == 2
    assert err.count("\n") == 1
    assert "cannot print (" in err
    assert contents(tmp_path)["epoch"] == 0  # what it would do is the first that it says


def wait_for_a_step(folder: Path, process: Program) -> None:
    """Until the first checkpoint after the one of the start is there."""
    while last_change(folder) == 0 and process.poll() is None:
        time.sleep(0.005)
    at_start = last_change(folder)
    while last_change(folder) == at_start and process.poll() is None:
        time.sleep(0.005)
    assert process.poll() is None


def test_more_epochs_and_other_ways_to_run_are_accepted(uninterrupted, tmp_path):
    assert train(tmp_path) == 0
    assert train(tmp_path, "--resume", "--epochs", "3", "--workers", "1") == 0
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    # The third of three epochs: two thirds of a cosine are done.
    assert rows[2]["lr"] == pytest.approx(0.1 * 0.25)
    assert rows[:2] == read_metrics(uninterrupted / "metrics.csv")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--lr", "0.2", "--seed", "1"], "--lr 0.2 instead of 0.1, --seed 1 instead of 0"),
        (["--width", "2"], "--width 2 instead of 1"),
        (["--bits", "2", "--bn_bits", "4"], "--bits 2 instead of 4, --bn_bits 4 instead of 8"),
        (["--batch_size", "120"], "--batch_size 120 instead of 240"),
        (["--time_window", "3"], "--time_window 3 instead of 2"),
        (["--epochs", "1"], "has already trained for 2 epochs, more than --epochs 1"),
    ],
)
def test_other_settings_are_refused(options, expected, uninterrupted, capfd):
    before = {path: path.read_bytes() for path in uninterrupted.iterdir()}
    assert expected in refused(capfd, train, uninterrupted, "--resume", *options)
    assert {path: path.read_bytes() for path in uninterrupted.iterdir()} == before


def test_another_teacher_is_refused_and_the_same_one_elsewhere_is_not(trained, tmp_path, capfd):
    teacher, other = tmp_path / "teacher.pth", tmp_path / "other.pth"
    teacher.write_bytes(trained["original"].read_bytes())
    content = torch.load(teacher, weights_only=True)
    content["model"]["linear.bias"] += 1
    torch.save(content, other)
    qamd = ["--data", "digits", "--width", "2", "--batch_size", "480", "--workers", "0"]
    qamd += ["--paper_setting", "qamd", "--bits", "4", "--save_path", str(tmp_path / "run")]
    assert main.main([*qamd, "--epochs", "1", "--teacher_path", str(teacher)]) == 0
    capfd.readouterr()
    qamd += ["--resume", "--epochs", "2"]
    assert main.main([*qamd, "--teacher_path", str(other)]) == 2
    assert "another teacher's file" in capfd.readouterr().err
    assert main.main([*qamd, "--teacher_path", str(trained["original"])]) == 0


def test_a_second_run_on_the_same_save_path_is_refused_and_a_dead_one_holds_nothing(
    events, tmp_path, capfd
):
    process, workers = start_with_workers(tmp_path, events)
    run = [*events, "--save_path", str(tmp_path)]
    for worker in workers:  # they outlive it
        os.kill(worker, signal.SIGSTOP)
    for option in ("--resume", "--overwrite"):
        line = refused(capfd, main.main, [*run, option])
        assert f"another run is writing into {tmp_path}" in line
    process.kill()
    process.join()
    assert main.main([*run, "--resume"]) == 0
    for worker in workers:
        os.kill(worker, signal.SIGKILL)


def limit_file_size(size: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))


def test_a_full_disk_leaves_the_checkpoint_of_before(uninterrupted, tmp_path, capfd):
    assert train(tmp_path, "--epochs", "1") == 0
    before = {name: (tmp_path / f"student-{name}.pth").read_bytes() for name in ("last", "best")}
    capfd.readouterr()
    try:
        limit_file_size(len(before["last"]) // 2)
        assert train(tmp_path, "--epochs", "2", "--resume") == 2
    finally:
        limit_file_size(resource.RLIM_INFINITY)
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert "-best.pth (File too large)" in err or "-last.pth (File too large)" in err
    for name, content in before.items():
        assert (tmp_path / f"student-{name}.pth").read_bytes() == content
    assert list(tmp_path.glob("*.tmp")) == []
    assert train(tmp_path, "--epochs", "2", "--resume") == 0
    assert len(scalars(tmp_path)["loss"]) == 2


@pytest.mark.parametrize("name", ["metrics.csv", "settings.json", "events.out.tfevents.md-snn"])
def test_a_full_disk_under_a_log_is_one_line(name, uninterrupted, tmp_path, capfd):
    (tmp_path / name).symlink_to("/dev/full")
    assert "No space left on device" in refused(capfd, train, tmp_path, started=True)
    (tmp_path / name).unlink()
    assert train(tmp_path, "--resume") == 0
    assert_same_end(tmp_path, uninterrupted)


def test_a_checkpoint_from_before_resume_is_read_but_not_gone_on_with(
    uninterrupted, tmp_path, capfd
):
    content = contents(uninterrupted)
    old = {key: content[key] for key in ("model", "settings", "epoch", "accuracy", "optimizer")}
    for name in ("resume", "save_every", "check_numerics"):
        del old["settings"][name]
    torch.save(old, tmp_path / "student-last.pth")
    assert load_checkpoint(tmp_path / "student-last.pth").epoch == 2
    assert "of a version without --resume" in refused(capfd, train, tmp_path, "--resume")


def dead_loader():
    raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")


def test_a_dead_loader_is_one_line(uninterrupted, tmp_path, capfd, monkeypatch):
    item, pid = ImageSet.__getitem__, os.getpid()
    data = data_sets_of("digits")
    data[0].augment = torch.nn.Identity()  # a transform that is none of batches: by workers

    def dies(data_set, index: int):
        if os.getpid() != pid and index % 500 == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return item(data_set, index)

    monkeypatch.setattr(ImageSet, "__getitem__", dies)
    arguments = [*STUDENT, "--save_path", str(tmp_path), "--workers", "1"]
    err = refused(capfd, main.main, [*arguments, "--save_every", "1"], data, started=True)
    assert "DataLoader worker (pid" in err
    assert "the same command with --resume goes on from student-last.pth" in err
    # What it has already got, or cannot use, is not recommended.
    again = refused(capfd, main.main, [*arguments, "--resume"], data, started=True)
    assert "the same command goes on from student-last.pth" in again
    last = str(tmp_path / "student-last.pth")
    monkeypatch.setattr("engine.eval_only.evaluation_loader", lambda *_: dead_loader())
    assert refused(capfd, main.main, ["--eval_only", last]).endswith("start it again\n")
    monkeypatch.undo()
    assert train(tmp_path, "--resume") == 0
    assert_same_end(tmp_path, uninterrupted)


def test_a_file_system_without_locks_is_a_warning(tmp_path, capfd, monkeypatch):
    def no_locks(*arguments) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.lockf", no_locks)
    assert train(tmp_path, "--epochs", "1") == 0
    assert train(tmp_path, "--epochs", "1", "--resume") == 0
    lines = [x for x in capfd.readouterr().err.splitlines() if "no neuron" not in x]
    assert len(lines) == 2  # one of each run
    for line in lines:
        expected = f"main.py: warning: {tmp_path} cannot be locked (No locks available)"
        assert line.startswith(expected)
