"""Faults of several processes, hostile files, and numbers gone wrong: one line, never a hang."""

import itertools
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import hostile_input
import main
from checkpoints import load_checkpoint
from conftest import DIGITS, REPOSITORY, refused
from data_loader import load_data_sets
from engine.metrics import watch_numbers
from engine.run_folder import read_metrics
from load_settings import parse_settings
from models.batch_norm import BatchNorm
from stand_in_data import write_ncaltech101
from warm import Program, launched

WORKER = Path(__file__).with_name("train_in_float64.py")
ORIGINAL = ["--paper_setting", "original", "--epochs", "2", "--save_every", "1"]
TRAIN = ["--width", "2", "--epochs", "1", "--workers", "0"]  # as the checkpoint was
EVENTS = ["--data", "ncaltech101", "--time_window", "2", "--image_size", "16"]
EVENTS += ["--batch_size", "2", "--workers", "0", "--data_path"]
ROW = {"epoch": 1, "test_accuracy": 0.5, "best_accuracy": 0.5, "time": 0.0}
NO_TIMES = (float("nan"), -1.0, float("inf"), 1, "1")
SUMS = {"images": 240.0, "loss": 1.0, "train_accuracy": 120.0}
LAUNCHER = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29561"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def launch(
    processes: int, folder: Path, *options: str, fault: str = "", restarts: int | None = None
) -> subprocess.CompletedProcess:
    """Six steps of 16 digits each in float64, two epochs of three; with `restarts` by torchrun."""
    environment = os.environ | ({"FAULT": fault} if fault else {})
    command = [str(WORKER), *ORIGINAL, "--save_path", str(folder), *options]
    if restarts is None:
        return launched(processes, *command, env=environment)
    launcher = [*TORCHRUN, f"--nproc_per_node={processes}", f"--max-restarts={restarts}"]
    how = {"capture_output": True, "text": True, "env": environment, "timeout": 120}
    return subprocess.run([*launcher, *command], **how)


def lines_of_ours(result: subprocess.CompletedProcess) -> list[str]:
    """What our program has said, without its last line under torchrun: that repeats the one
    before."""
    lines = result.stderr.splitlines()
    ours = [line for line in lines if line.startswith(("main.py: error:", "main.py: stopped"))]
    if "torch.distributed.run" not in result.args:
        return ours
    assert ours[-2:] == [lines[-1]] * 2
    return ours[:-1]


def outcome(folder: Path, setting: str = "original") -> tuple[dict[str, torch.Tensor], list[dict]]:
    """Last weights and metrics."""
    model = torch.load(folder / f"{setting}-last.pth", weights_only=True)["model"]
    return model, read_metrics(folder / "metrics.csv")


def assert_close(found: tuple, expected: tuple) -> None:
    for name, x in expected[0].items():
        torch.testing.assert_close(found[0][name], x, rtol=1e-9, atol=1e-9, msg=name)
    for row, wanted in zip(found[1], expected[1], strict=True):
        for name in wanted.keys() - {"images_per_second"}:
            assert row[name] == (wanted[name] and pytest.approx(wanted[name], rel=1e-9)), name


@pytest.fixture(scope="module")
def folder_of_one(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    assert launch(1, folder).returncode == 0
    return folder


@pytest.fixture(scope="module")
def one_process(folder_of_one) -> tuple:
    return outcome(folder_of_one)


def test_a_signal_to_one_of_two_processes_stops_both_after_the_same_step(one_process, tmp_path):
    result = launch(2, tmp_path, fault="SIGTERM 1 2", restarts=0)
    assert result.returncode != 0
    (line,) = lines_of_ours(result)
    assert "stopped by SIGTERM after step 3 of epoch 1" in line
    assert result.stderr.count("Traceback") == 1  # the launcher's own
    # One process goes on from what two have done.
    assert launch(1, tmp_path, "--resume").returncode == 0
    assert_close(outcome(tmp_path), one_process)


def test_a_killed_process_ends_the_run_with_one_line_and_two_go_on(one_process, tmp_path):
    result = launch(2, tmp_path, fault="SIGKILL 1 5")
    assert result.returncode != 0
    (line,) = lines_of_ours(result)
    assert "another process of this run has died" in line
    assert launch(2, tmp_path, "--resume").returncode == 0
    assert_close(outcome(tmp_path), one_process)


def test_a_restart_goes_on_with_what_overwrite_has_started_and_refused_it_stays_so(
    one_process, folder_of_one, tmp_path
):
    folder = Path(shutil.copytree(folder_of_one, tmp_path / "run"))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    result = launch(2, folder, "--overwrite", fault="SIGKILL 0 5", restarts=1)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count("is now in") == 1
    assert_close(outcome(folder), one_process)
    first = tmp_path / "run.1"
    assert {path.name: path.read_bytes() for path in first.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"run", "run.1"}

    result = launch(1, first, restarts=1)
    assert result.returncode != 0
    lines = lines_of_ours(result)
    assert len(lines) == 2  # one of each attempt
    assert all(f"{first} already holds original-last.pth" in line for line in lines)
    assert {path.name: path.read_bytes() for path in first.iterdir()} == before


def start_process(rank: int, folder: Path, *options: str) -> Program:
    """A process of two as a launcher would start it."""
    run = ["--data", "digits", "--width", "1", "--paper_setting", "original"]
    run = [] if "--eval_only" in options else [*run, "--save_path", str(folder)]
    environment = os.environ | LAUNCHER | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    return Program(REPOSITORY / "main.py", *run, *options, env=environment)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (
            TRAIN,
            [*TRAIN, "--lr", "0.2"],
            "process 1 was started with lr 0.2, process 0 with 0.1: start all with the same",
        ),
        (TRAIN, ["--eval_only", "CHECKPOINT"], "process 1 was started with"),
        (
            [*EVENTS, "ours"],
            [*EVENTS, "theirs"],
            "found data with training images 4, process 0 with 8",
        ),
    ],
)
def test_processes_that_would_wait_for_each_other_or_train_differently_are_refused(
    first, second, expected, trained, tmp_path
):
    for name, per_class in (("ours", 5), ("theirs", 3)):
        write_ncaltech101(tmp_path / name, 2, classes=2, per_class=per_class)
    names = {"CHECKPOINT": str(trained["original"])}
    names |= {name: str(tmp_path / name) for name in ("ours", "theirs")}
    processes = [
        start_process(rank, tmp_path / "run", *(names.get(x, x) for x in options))
        for rank, options in enumerate((first, second))
    ]
    try:
        outputs = [process.communicate(timeout=60)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [2, 2]
    (line,) = [x for err in outputs for x in err.splitlines() if x.startswith("main.py")]
    assert expected in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("RANK", "first", "RANK makes no sense: 'first'"),
        ("WORLD_SIZE", "", "WORLD_SIZE makes no sense: ''"),
        ("LOCAL_RANK", "0.5", "LOCAL_RANK makes no sense: '0.5'"),
        ("RANK", "-1", "RANK makes no sense: '-1'"),
        ("RANK", "2", "the 2 processes cannot meet: RANK is 2"),
        ("WORLD_SIZE", "0", "WORLD_SIZE makes no sense: '0'"),
        ("MASTER_ADDR", "", "MASTER_ADDR"),
        ("MASTER_PORT", "port", "'port'"),
        ("MASTER_PORT", "99999", "99999"),
    ],
)
def test_a_broken_environment_of_a_launcher_is_one_line(
    name, value, expected, complaint, monkeypatch
):
    for variable, good in (LAUNCHER | {"RANK": "0", "LOCAL_RANK": "0", name: value}).items():
        monkeypatch.setenv(variable, good)
    assert expected in complaint([*DIGITS, "--paper_setting", "original"])


class Bomb:
    """Runs a command where it is unpickled."""

    def __init__(self, sign: Path):
        self.sign = sign

    def __reduce__(self):
        return os.system, (f"touch {self.sign}",)


def test_nothing_in_a_checkpoint_or_in_frames_is_executed(trained, tmp_path, capfd):
    sign, checkpoint = tmp_path / "exploded", tmp_path / "bomb.pth"
    good = torch.load(trained["original"], weights_only=True)
    bombs = {
        "in place of the checkpoint": lambda: torch.save(Bomb(sign), checkpoint),
        "in it": lambda: torch.save(good | {"rows": [Bomb(sign)]}, checkpoint),
        "a bare pickle": lambda: checkpoint.write_bytes(pickle.dumps(Bomb(sign))),
    }
    for plant in bombs.values():
        plant()
        refused(capfd, main.main, ["--eval_only", str(checkpoint)])
    frames = write_ncaltech101(tmp_path, time_window=4, classes=2, per_class=3)
    file = sorted(frames.rglob("*.npz"))[0]
    np.savez(file, frames=np.array([Bomb(sign)], dtype=object))
    ncaltech101 = ["--data", "ncaltech101", "--time_window", "4", "--data_path", str(tmp_path)]
    refused(capfd, main.main, [*ncaltech101, "--paper_setting", "original"])
    assert not sign.exists()


def pickle_of_deep_tuples() -> bytes:
    """{((((…)))): 1}, which overflows the stack where it is hashed."""
    return b"\x80\x02})" + 10**6 * pickle.TUPLE1 + b"K\x01s."


@pytest.mark.parametrize("kind", ["deep", "compressed", "pipe"])
def test_a_checkpoint_that_would_end_the_program_is_one_line(kind, trained, tmp_path, capfd):
    path = tmp_path / "student-last.pth"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        with zipfile.ZipFile(trained["student"]) as good, zipfile.ZipFile(path, "w") as file:
            for name in good.namelist():
                content = good.read(name)
                if kind == "deep" and name.endswith("data.pkl"):
                    content = pickle_of_deep_tuples()
                packed = zipfile.ZIP_DEFLATED if kind == "compressed" else zipfile.ZIP_STORED
                file.writestr(name, content + b"\0" * 2**20 * (kind == "compressed"), packed)
    student = [*DIGITS, "--paper_setting", "student", "--bits", "4", "--save_path", str(tmp_path)]
    for options in (["--eval_only", str(path)], [*student, "--resume"]):
        assert str(path) in refused(capfd, main.main, options)


def test_a_checkpoint_s_own_kind_of_dictionary_is_not_used(trained, tmp_path):
    content = torch.load(trained["student"], weights_only=True)
    bias = torch.nn.Parameter(content["model"]["linear.bias"])
    bias.isfinite = 5
    content["model"]["linear.bias"] = bias
    for name in ("model", "settings", "optimizer"):
        content[name] = hostile_input.Disguised(content[name])
    torch.save(content, tmp_path / "student-last.pth")
    assert main.main(["--eval_only", str(tmp_path / "student-last.pth")]) == 0
    student = [*DIGITS, "--paper_setting", "student", "--bits", "4", "--save_path", str(tmp_path)]
    assert main.main([*student, "--epochs", "2", "--resume"]) == 0


def test_hostile_arguments_layer_lists_and_checkpoints_are_refused_or_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = [*DIGITS, "--width", "1", "--paper_setting", "student", "--bits", "4"]
    run += ["--batch_size", "240", "--save_path", str(tmp_path)]
    assert main.main(run) == 0
    hostile_input.try_arguments(50)
    hostile_input.try_layer_lists(50, tmp_path)
    hostile_input.try_configs(50, tmp_path)
    hostile_input.try_checkpoints(25, run, tmp_path / "student-last.pth")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rows": [{}]}, "metrics of 1 epochs are damaged"),
        ({"rows": [{"epoch": torch.zeros(3)}]}, "metrics of 1 epochs are damaged"),
        ({"rows": [ROW | {"loss": 10**400}]}, "metrics of 1 epochs are damaged"),
        ({"rows": [ROW | {"epoch": 1.0}]}, "metrics of 1 epochs are damaged"),
        ({"rows": []}, "metrics of 1 epochs are damaged"),
        *(({"seconds": x}, "time is damaged") for x in NO_TIMES),
        *(({"rows": [ROW | {"seconds": x}]}, "metrics of 1 epochs are damaged") for x in NO_TIMES),
        ({"step": 6}, "number of steps is damaged"),
        ({"step": 2, "sums": [{}]}, "sums are damaged"),
        ({"step": 2, "sums": [{"images": 0.0}]}, "sums are damaged"),
        ({"sums": [{"loss": float("nan")}]}, "sums are damaged"),
        ({"sums": [SUMS | {"epoch": 1.0}]}, "sums are damaged"),
        ({"random_states": []}, "random states are damaged"),
        ({"random_states": [{"python": (3, (1,), None)}]}, "random states are damaged"),
        *(
            ({"optimizer": {"state": {0: {"momentum_buffer": x}}}}, "optimizer does not fit its")
            for x in (
                torch.zeros(3),
                torch.full((1, 1, 3, 3), float("nan")),
                torch.zeros(1, 1, 3, 3, dtype=torch.float64),
            )
        ),
        ({"optimizer": {"state": {10**6: {}}}}, "optimizer does not"),
        ({"optimizer": {}}, "optimizer does not"),
    ],
)
def test_a_damaged_state_to_resume_is_one_line(changes, expected, resumable, tmp_path, capfd):
    options, content = resumable
    torch.save(content | changes, tmp_path / "original-last.pth")
    assert expected in refused(
        capfd, main.main, [*options, "--resume", "--save_path", str(tmp_path)]
    )


@pytest.fixture(scope="module")
def resumable(tmp_path_factory) -> tuple[list[str], dict]:
    """Options of a short run, and the checkpoint it left."""
    folder = tmp_path_factory.mktemp("resumable")
    options = [*DIGITS, "--width", "1", "--batch_size", "240", "--paper_setting", "original"]
    assert main.main([*options, "--save_path", str(folder)]) == 0
    return options, torch.load(folder / "original-last.pth", weights_only=True)


def spoil(monkeypatch, step: int, change) -> None:
    """Let `change(run)` happen after the given step."""
    add = main.EpochSums.add

    def add_and_spoil(sums, *arguments) -> None:
        add(sums, *arguments)
        if sums.run.steps_done + 1 == step:
            change(sums.run)

    monkeypatch.setattr(main.EpochSums, "add", add_and_spoil)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
    resumable, tmp_path, capfd, monkeypatch
):
    options, _ = resumable
    cross_entropy, steps = torch.nn.functional.cross_entropy, itertools.count(1)

    def diverges(logits, labels, **options):
        loss = cross_entropy(logits, labels, **options)
        return loss * float("nan") if next(steps) == 8 else loss

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", diverges)
    options = [*options, "--epochs", "2", "--save_path", str(tmp_path)]
    err = refused(capfd, main.main, options, started=True)
    last = tmp_path / "original-last.pth"
    assert err.splitlines()[-1] == (
        f"main.py: error: the loss term ce: not finite in step 3 of epoch 2: {last} is from "
        "before; try a lower --lr, a smaller --clip_grad, or --check_numerics, which names the "
        "first layer"
    )
    content = torch.load(last, weights_only=True)
    assert (content["epoch"], content["step"]) == (1, 0)
    assert load_checkpoint(last).epoch == 1  # which checks that all weights are finite


@pytest.mark.parametrize("setting", [["original"], ["student", "--bits", "4"]])
def test_weights_that_are_not_finite_are_never_saved_and_the_first_layer_is_found(
    setting, tmp_path, capfd, monkeypatch
):
    options = [*DIGITS, "--width", "1", "--batch_size", "240", "--paper_setting", *setting]
    options += ["--save_path", str(tmp_path), "--save_every", "2"]

    def break_a_layer(run) -> None:
        with torch.no_grad():
            run.network.blocks[3].conv1.weight.fill_(float("inf"))

    spoil(monkeypatch, 3, break_a_layer)
    assert "not finite in step 4 of epoch 1" in refused(capfd, main.main, options, started=True)
    content = torch.load(tmp_path / f"{setting[0]}-last.pth", weights_only=True)
    assert content["step"] == 2
    err = refused(capfd, main.main, [*options, "--check_numerics"], started=True)
    assert "the weights of blocks.3.conv1" in err
    assert "in step 4 of epoch 1" in err


@pytest.mark.parametrize(
    ("name", "clip", "remedies"),
    [
        ("blocks.3.bn1.running_var", "1", "a lower --lr or a smaller --clip_grad"),
        ("blocks.1.lif1.quantizer.smallest_step", "0", "a lower --lr or --clip_grad 1"),
        ("blocks.2.conv1.weight", "1", "a lower --lr or a smaller --clip_grad"),
    ],
)
def test_check_numerics_names_buffers_and_gradients_and_not_itself(
    name, clip, remedies, tmp_path, capfd, monkeypatch
):
    options = [*DIGITS, "--width", "1", "--batch_size", "240", "--paper_setting", "student"]
    options += ["--bits", "4", "--check_numerics", "--clip_grad", clip]

    def break_it(run) -> None:
        layer, _, kind = name.rpartition(".")
        if kind == "weight":  # its gradient alone
            run.network.get_parameter(name).register_hook(lambda grad: grad * float("nan"))
            return
        getattr(run.network.get_submodule(layer), kind).fill_(float("inf"))

    spoil(monkeypatch, 2, break_it)
    err = refused(capfd, main.main, [*options, "--save_path", str(tmp_path)], started=True)
    layer, _, kind = name.rpartition(".")
    what = f"gradient of {name}" if kind == "weight" else f"{kind} of {layer}"
    assert f"the {what}: not finite in step 3 of epoch 1" in err
    assert err.endswith(f"is from before; try {remedies}\n")


def test_statistics_that_overflow_are_named_though_the_output_is_finite():
    network, found = torch.nn.Sequential(BatchNorm(2, 0.5)), []
    with watch_numbers(network, found.append):
        assert network(1e30 * torch.randn(4, 2, 3, 3)).isfinite().all()
    assert found == ["the running_var of 0"]


def test_images_that_are_not_finite_are_named(resumable, tmp_path, capfd):
    options, _ = resumable
    options = [*options, "--batch_size", "1437", "--save_path", str(tmp_path), "--check_numerics"]
    train_set, test_set = load_data_sets(parse_settings(options))
    train_set.images = train_set.images.float()
    train_set.images[3] = float("nan")
    assert main.main(options, (train_set, test_set)) == 2
    assert "the images: not finite in step 1" in capfd.readouterr().err


def test_a_layer_that_never_fires_is_a_warning_with_its_name(
    resumable, tmp_path, capfd, monkeypatch
):
    def silence(run) -> None:
        with torch.no_grad():
            run.network.blocks[2].bn1.weight.zero_()
            run.network.blocks[2].bn1.bias.fill_(-1)

    options, _ = resumable
    spoil(monkeypatch, 5, silence)
    assert main.main([*options, "--save_path", str(tmp_path)]) == 0
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("main.py: warning: no neuron of ")
    assert "blocks.2.lif2" in line
