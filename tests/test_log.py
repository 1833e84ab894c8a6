"""What a training says, on terminals of any width and in a log file; what it leaves for
TensorBoard; what a dry run expects."""

import fcntl
import itertools
import os
import re
import resource
import shlex
import signal
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch import nn

import main
from checkpoints import build_network, load_checkpoint
from conftest import DIGITS, REPOSITORY
from engine.log import (
    ProgressBar,
    amount,
    duration,
    epoch_line,
    next_commands,
)
from engine.run_folder import read_metrics
from load_settings import parse_settings
from spikesim_eval.trace import macs_of_image
from warm import launched

TEACHER = [*DIGITS, "--width", "1", "--paper_setting", "original"]
FIVE_STEPS = ["--batch_size", "240"]
LINE = re.compile(
    r"(?P<epoch>\d+)/(?P<epochs>\d+)  loss [\d.]+(?P<terms> \(.*?\))?  train [\d.]+ %  "
    r"test (?P<test>[\d.]+) % \((?P<best>best.*?)\)  lr [\d.e-]+  \d+(\.\d)? img/s  "
    r"[\d.]+ s(?P<left>, [\d.]+ s left)?"
)


class Terminal:
    """A pseudo-terminal; `text` is what was written into it."""

    def __init__(self, columns: int):
        self.text, (self.master, slave) = "", os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.file = os.fdopen(slave, "w", buffering=1)
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        try:
            while part := os.read(self.master, 2**16):
                self.text += part.decode()
        except OSError:  # its other side is closed
            pass

    def close(self) -> None:
        self.file.close()
        self.reader.join()
        os.close(self.master)

    def pieces(self) -> list[str]:
        """Everything that was ever shown on a line."""
        return re.split(r"[\r\n]+", self.text)


@contextmanager
def terminal(columns: int, monkeypatch) -> Iterator[Terminal]:
    shown = Terminal(columns)
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", shown.file)
        patched.setattr(sys, "stderr", shown.file)
        try:
            yield shown
        finally:
            shown.close()


def labelled(text: str) -> dict[str, str]:
    """The aligned lines: word -> what it says."""
    return dict(re.findall(r"^([a-z]+(?: [a-z]+)?) {2,}(.*)$", text, re.MULTILINE))


def files_below(folder: Path) -> dict[Path, tuple[int, bytes]]:
    return {x: (x.stat().st_mtime_ns, x.read_bytes()) for x in folder.rglob("*") if x.is_file()}


@pytest.mark.parametrize("columns", [80, 30])
def test_a_terminal_shows_a_header_a_bar_that_fits_and_a_line_an_epoch(
    columns, trained, tmp_path, monkeypatch
):
    options = [*DIGITS, *FIVE_STEPS, "--epochs", "2", "--paper_setting", "qamd", "--bits", "4"]
    options += ["--teacher_path", str(trained["original"])]
    with terminal(columns, monkeypatch) as shown:
        assert main.main([*options, "--save_path", str(tmp_path / "run")]) == 0
    accuracy = load_checkpoint(trained["original"]).accuracy
    said = labelled("\n".join(shown.pieces()))
    threads = torch.get_num_threads()
    assert said["device"] == f"CPU ({threads} thread{'s' * (threads > 1)}), 1 process"
    assert said["data"] == "digits: 1,437 training and 360 test images, 10 classes, 1x16x16"
    assert said["batch"] == "240, 5 steps an epoch, 2 epochs"
    network = build_network(load_checkpoint(tmp_path / "run" / "qamd-last.pth").settings)
    parameters = sum(x.numel() for x in network.parameters())
    assert said["network"].startswith(f"Quan-MS-ResNet-18, width 2, T 4: {parameters:,} param")
    assert said["bits"] == "4, 8 in batch norm"
    assert said["teacher"] == f"{trained['original']}: {100 * accuracy:.1f} % (epoch 1), T 4"
    assert said["files"] == str(tmp_path / "run")
    assert said["warning"].startswith("an epoch has 5 steps, fewer than 10: ")
    assert "resume" not in said

    lines = [match for line in shown.pieces() if (match := LINE.fullmatch(line))]
    assert [line["epoch"] for line in lines] == ["1", "2"]
    for line in lines:
        assert re.fullmatch(r" \(ce [\d.]+ logit [\d.]+ membrane [\d.]+\)", line["terms"])
    assert (lines[0]["left"] is None, lines[1]["left"] is None) == (False, True)

    bars = [piece for piece in shown.pieces() if re.search(r"  \d/[52]\b", piece)]
    assert any(bar.startswith("1/2  ") for bar in bars)
    assert any(bar.startswith("test  ") for bar in bars)
    assert max(map(len, bars)) < columns
    assert any("loss" in bar for bar in bars) or columns < 80


@pytest.mark.parametrize("columns", [0, 1, 8, 30, 60, 80, 150])  # 0 and 1: not known
def test_a_bar_never_wraps_and_shows_its_figures_where_there_is_room(columns, monkeypatch):
    with (
        terminal(columns, monkeypatch),
        ProgressBar([0] * 900, "3/100", 900, done=100) as bar,
    ):
        bar.show("loss 1.23", "train 61.2 %", "412 img/s")
        bar.n, bar.start_t = 500, bar._time() - 40
        seen = str(bar)
    assert len(seen) < (columns if columns > 1 else 80)
    figures = "  500/900  40 s left  loss 1.23  train 61.2 %  412 img/s"
    assert seen.endswith(figures) == ("█" in seen) == (columns not in (8, 30, 60))


def test_a_log_file_gets_the_same_lines_without_control_characters(tmp_path, capfd):
    assert main.main([*TEACHER, "--batch_size", "140", "--save_path", str(tmp_path)]) == 0
    out, err = capfd.readouterr()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", out + err)
    assert "test  " not in err
    assert "10 steps an epoch" in labelled(out)["batch"]
    assert "warning" not in labelled(out)
    assert labelled(out)["bits"] == "full precision"
    assert len(list(filter(LINE.fullmatch, out.splitlines()))) == 1


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """A run of three epochs that a signal has ended after the second step of the second."""
    folder, add = tmp_path_factory.mktemp("stopped"), main.EpochSums.add

    def stop(sums, *arguments) -> None:
        add(sums, *arguments)
        if sums.run.steps_done == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(main.EpochSums, "add", stop)
        options = [*TEACHER, *FIVE_STEPS, "--epochs", "3", "--save_path", str(folder)]
        assert main.main(options) == 128 + signal.SIGTERM
    return folder


def test_a_resumed_run_says_where_it_goes_on_and_its_time_is_that_of_all_parts(
    stopped, tmp_path, monkeypatch
):
    last = tmp_path / "original-last.pth"
    content = torch.load(stopped / last.name, weights_only=True)
    assert 0 < content["seconds"] < 60
    content["seconds"] += 3600.0  # a long part before the signal
    torch.save(content, last)
    best = f"(best {100 * content['accuracy']:.1f} %)"
    options = [*TEACHER, *FIVE_STEPS, "--epochs", "3", "--save_path", str(tmp_path), "--resume"]
    with terminal(80, monkeypatch) as shown:
        assert main.main(options) == 0
    said = labelled("\n".join(shown.pieces()))
    assert said["resume"] == f"going on from epoch 2, step 2 {best}"
    second = next(line for line in shown.pieces() if line.startswith("2/3  loss"))
    assert re.search(r"  1 h \d min, 1 h \d min left$", second)
    assert re.search(r"\), last [\d.]+ %, in 1 h \d min$", said["best accuracy"])
    rows = torch.load(last, weights_only=True)["rows"]
    assert [3600 < row["seconds"] < 3700 for row in rows] == [False, True, False]

    with terminal(80, monkeypatch) as again:
        assert main.main(options) == 0
    said_again = labelled("\n".join(again.pieces()))
    assert said_again["resume"].startswith("3 epochs done, none left (best ")
    assert said_again["best accuracy"] == said["best accuracy"]


def test_a_run_without_times_that_has_only_an_evaluation_left_tells_no_sum_and_no_speed(
    stopped, tmp_path, capfd
):
    content = torch.load(stopped / "original-last.pth", weights_only=True)
    del content["seconds"], content["settings"]["dry_run"]  # of an older version
    for row in content["rows"]:
        del row["seconds"], row["test_loss"]
    torch.save(content | {"step": 5}, tmp_path / "original-last.pth")
    options = [*TEACHER, *FIVE_STEPS, "--epochs", "2", "--save_path", str(tmp_path), "--resume"]
    assert main.main(options) == 0
    out = capfd.readouterr().out
    assert re.search(r", last [\d.]+ %$", labelled(out)["best accuracy"])
    (line,) = (x for x in out.splitlines() if x.startswith("2/2  loss"))
    assert "img/s" not in line
    first, second = read_metrics(tmp_path / "metrics.csv")
    assert (first["test_loss"], second["images_per_second"]) == (None, None)
    assert None not in (second["test_loss"], first["images_per_second"])


def test_the_line_names_the_best_epoch_and_the_accuracy_that_decides():
    def row(epoch: int, test: float, **more: float) -> dict:
        known = {"loss": 1.2345, "ce": 1.2345, "lr": 0.095, "train_accuracy": 0.612}
        speed = {"images_per_second": 411.6, "seconds": 72.0}
        return {"epoch": epoch, "test_accuracy": test, **known, **speed, **more}

    rows = [row(1, 0.5), row(2, 0.601), row(3, 0.583)]
    assert epoch_line(rows, 100) == (
        "  3/100  loss 1.23  train 61.2 %  test 58.3 % (best 60.1 % at 2)  lr 0.095  412 img/s  "
        "1 min 12 s, 1 h 56 min left"
    )
    assert "test 60.1 % (best)  lr" in epoch_line(rows[:2], 100)
    assert "(best 60.1 % at 2)" in epoch_line([*rows, row(4, 0.601)], 100)  # the first of equals
    terms = {"loss": 1.7, "ce": 0.98, "logit": 0.12, "membrane": 0.013}
    assert "loss 1.70 (ce 0.980 logit 0.120 membrane 0.0130)" in epoch_line([row(1, 0, **terms)], 2)
    shared = [row(1, 0.7, val_accuracy=0.61), row(2, 0.6, val_accuracy=0.62)]
    assert "  val 62.0 % (best)  test 60.0 %  lr" in epoch_line(shared, 2)


def test_the_next_commands_work_when_pasted(tmp_path, monkeypatch, capfd, shell_environment):
    monkeypatch.chdir(tmp_path)
    save_path = "runs/it's my run"
    assert main.main([*TEACHER, *FIVE_STEPS, "--save_path", save_path]) == 0
    out = capfd.readouterr().out
    said = labelled(out)
    accuracy = load_checkpoint(said["checkpoint"]).accuracy
    assert said["checkpoint"] == f"{save_path}/original-best.pth"
    assert said["best accuracy"].startswith(f"{100 * accuracy:.2f} % (epoch 1), last ")
    evaluate, report = (line[15:] for line in out.splitlines()[-2:])
    python, program, *options = shlex.split(evaluate)
    assert (python, Path(program)) == ("python", REPOSITORY / "main.py")
    assert main.main(options) == 0
    assert capfd.readouterr().out.startswith(f"accuracy {100 * accuracy:.2f} % (")
    subprocess.run(["bash", "-c", report], env=shell_environment, check=True)
    assert (tmp_path / save_path / "report" / "report.html").is_file()


def test_in_the_program_s_folder_the_next_commands_are_short_and_say_how_it_ran(
    trained, monkeypatch
):
    monkeypatch.chdir(REPOSITORY)
    settings = replace(load_checkpoint(trained["qamd"]).settings, amp=True, device="cpu")
    evaluate, report = next_commands(settings, trained["qamd"])
    data = "--data_path ./data"
    where = f"--eval_only {trained['qamd']} --data digits {data} --device cpu --amp"
    assert evaluate == f"python main.py {where}"
    pair = f"--checkpoint {trained['qamd']} --baseline {trained['original']}"
    out = trained["qamd"].parent / "report"
    assert report == f"python -m spikesim_eval report {pair} {data} --out {out}"


def test_tensorboard_has_the_metrics_and_the_hyper_parameters(trained):
    for path in trained.values():
        settings = load_checkpoint(path).settings
        events = EventAccumulator(str(path.parent)).Reload()
        content = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
        start = HParamsPluginData.FromString(content).session_start_info
        found = {
            name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()
        }
        for name in ("data", "paper_setting", "width", "bits", "loss", "beta", "lr", "amp"):
            if getattr(settings, name) is None:
                assert name not in found
            else:
                assert found[name] == getattr(settings, name), name
        assert found["epochs"] == 1
        assert not {"save_path", "data_path", "workers", "resume", "device"} & found.keys()
        (row,) = read_metrics(path.parent / "metrics.csv")
        (point,) = events.Scalars("test_loss")
        assert (point.step, point.value) == (1, pytest.approx(row["test_loss"]))


def count_macs(network: nn.Module, sample: torch.Tensor) -> int:
    """By forward hooks: a product for each weight that meets an output value."""
    counts = []

    def add(layer: nn.Module, _, output: torch.Tensor) -> None:
        counts.append(output.numel() * layer.weight[0].numel())

    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(add)
    network.eval()(sample)
    return sum(counts)


@pytest.mark.parametrize(
    "options",
    [
        ["--data", "digits", "--paper_setting", "original"],
        ["--data", "digits", "--paper_setting", "student", "--bits", "2", "--time_window", "1"],
        ["--data", "digits-dvs", "--paper_setting", "student", "--bits", "4"],
    ],
)
def test_macs_are_those_that_one_image_takes(options):
    settings = parse_settings([*options, "--width", "2"])
    data_set, T = settings.data_set, settings.time_window
    network = build_network(settings)
    # A static image's stem runs once in the program, and at every timestep on the chip.
    shape = (data_set.in_channels, *data_set.image_size)
    expected = count_macs(network, torch.rand(1, *([T] if data_set.events else []), *shape))
    if not data_set.events:
        pixels = data_set.image_size[0] * data_set.image_size[1]
        expected += (T - 1) * 9 * data_set.in_channels * settings.width * pixels
    state = torch.get_rng_state()
    assert macs_of_image(settings) == expected
    assert torch.equal(torch.get_rng_state(), state)


@given(st.floats(0, 1e7))
def test_a_duration_in_words_is_right_to_its_last_unit(seconds):
    units = {"s": 1, "min": 60, "h": 3600, "d": 86400}
    words = duration(seconds).split()
    numbers, names = words[::2], words[1::2]
    told = sum(float(x) * units[name] for x, name in zip(numbers, names, strict=True))
    smallest = units[names[-1]] if "." not in numbers[-1] else 0.1
    assert abs(told - seconds) <= smallest / 2 * 1.001
    assert len(names) == (2 if seconds > 60 else len(names))
    for (larger, smaller), x in zip(itertools.pairwise(names), numbers[1:], strict=True):
        assert float(x) < units[larger] / units[smaller]


def test_large_numbers_keep_three_digits():
    cases = {999: "999", 144_464: "144,464", 999_600: "1.00 million", 8_725_120: "8.73 million"}
    cases |= {555_720_000: "556 million", 18_550_460_416: "18.6 billion", 99_960_000: "100 million"}
    assert {number: amount(number) for number in cases} == cases


def seconds_of(text: str) -> float:
    units = {"s": 1, "min": 60, "h": 3600}
    parts = re.findall(r"([\d.]+) (s|min|h)\b", text)
    return sum(float(x) * units[unit] for x, unit in parts)


def test_a_dry_run_expects_what_the_run_takes_and_leaves_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    options = [*DIGITS, "--epochs", "2", "--paper_setting", "student", "--bits", "4", *FIVE_STEPS]
    assert main.main([*options, "--dry_run"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert list(tmp_path.iterdir()) == []
    said = labelled(out)
    assert said["files"].startswith("./checkpoints/digits-student-4bit-")
    assert "nothing" in said["files"]
    assert "best accuracy" not in out
    parts = r"about (.*) for 2 epochs, (.*) each \((.*) ms a step, (.*) an evaluation\)"
    whole, epoch, step, evaluation = re.fullmatch(parts, said["time"]).groups()
    epoch, evaluation = seconds_of(epoch), seconds_of(evaluation)
    step = float(step.replace(",", "")) / 1000
    assert epoch == pytest.approx(5 * step + evaluation, abs=0.15)  # as rounded
    assert seconds_of(whole) == pytest.approx(2 * epoch, abs=0.3)
    told = float(re.match(r"about ([\d.]+) GB, in each process", said["memory"])[1])
    most = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert told == pytest.approx(most / 1e9, rel=0.15)


def test_a_dry_run_of_two_processes_looks_at_a_run_to_go_on_with_and_touches_nothing(
    stopped, tmp_path
):
    before = files_below(stopped)
    options = [*TEACHER, *FIVE_STEPS, "--epochs", "3", "--save_path", str(stopped), "--resume"]
    done = launched(2, REPOSITORY / "main.py", *options, "--dry_run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("device") == 1
    said = labelled(done.stdout)
    assert said["batch"] == "240 (2 x 120), 5 steps an epoch, 3 epochs"
    assert said["device"].endswith("2 processes")
    assert said["resume"].startswith("going on from epoch 2, step 2 (best ")
    assert " for 1.6 epochs, " in said["time"]
    assert files_below(stopped) == before
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_in_the_middle_of_an_epoch_counts_its_own_steps(stopped, monkeypatch):
    options = [*TEACHER, *FIVE_STEPS, "--epochs", "3", "--save_path", str(stopped), "--resume"]
    with terminal(80, monkeypatch) as shown:
        assert main.main([*options, "--dry_run"]) == 0
    bars = [piece for piece in shown.pieces() if piece.startswith("2/3  ")]
    assert re.search(r"  0/3$", bars[0])
    assert not any(re.search(r"  [4-9]/3|-\d", bar) for bar in bars)
    assert "Warning" not in shown.text


def test_a_dry_run_refuses_what_the_run_would_and_moves_nothing(stopped, capfd):
    before = files_below(stopped)
    command = [*TEACHER, *FIVE_STEPS, "--epochs", "3", "--save_path", str(stopped), "--dry_run"]
    assert main.main(command) == 2
    assert "already holds original-last.pth: --resume goes on with it" in capfd.readouterr().err
    assert main.main([*command, "--resume", "--lr", "0.5"]) == 2
    expected = "is of a run with other settings, here are --lr 0.5"
    assert expected in capfd.readouterr().err
    assert main.main([*command, "--overwrite"]) == 0
    assert "resume" not in labelled(capfd.readouterr().out)
    assert files_below(stopped) == before
    assert not stopped.with_name(f"{stopped.name}.1").exists()


def test_a_dry_run_finds_a_disk_without_room_for_a_checkpoint(tmp_path, capfd):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        code = main.main([*TEACHER, *FIVE_STEPS, "--save_path", str(tmp_path / "x"), "--dry_run"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert code == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "original-last.pth (File too large)" in line
    assert line.endswith("with room on the disk start it again")
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_that_is_stopped_promises_no_checkpoint(tmp_path, monkeypatch, capfd):
    def stop(sums, means, *rest) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        add(sums, means, *rest)

    add = main.EpochSums.add
    monkeypatch.setattr(main.EpochSums, "add", stop)
    options = [*TEACHER, "--batch_size", "2000", "--save_path", str(tmp_path / "x"), "--dry_run"]
    assert main.main(options) == 128 + signal.SIGINT
    out, err = capfd.readouterr()
    assert err == "main.py: stopped by SIGINT after step 1 of epoch 1: start it again\n"
    assert labelled(out)["batch"].startswith("1437, 1 step an epoch")  # all images
    assert list(tmp_path.iterdir()) == []
