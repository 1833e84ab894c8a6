"""Mistakes of the user: one line on stderr, exit code 2, no traceback, nothing written."""

import itertools
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import main
from checkpoints import load_checkpoint
from conftest import REPOSITORY
from data_loader import ImageSet, Share, training_loader
from load_settings import parse_settings, refuse_single_values
from runtime.errors import UserError
from runtime.files import check_writable
from stand_in_data import write_image_folder, write_ncaltech101, write_tiny_imagenet

QAMD = ["--data", "digits", "--width", "2", "--paper_setting", "qamd", "--bits", "4"]
STUDENT = ["--data", "digits", "--width", "2", "--paper_setting", "student", "--bits", "4"]
ORIGINAL = ["--data", "digits", "--width", "2", "--paper_setting", "original"]

TINY = ["--data", "digits-dvs", "--image_size", "8", "--time_window", "1", "--width", "2"]
TINY += ["--paper_setting", "original"]

# Not at the launcher's usual port: another test may be there.
TWO_PROCESSES = ["--standalone", "--nproc_per_node=2"]


def files_below(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def complaint(arguments: list[str], folder: Path, capfd, monkeypatch) -> str:
    """The one line that main.py prints for wrong arguments, run in an otherwise empty folder."""
    monkeypatch.chdir(folder)
    before = files_below(folder)
    code = main.main(arguments)
    out, err = capfd.readouterr()
    assert code == 2
    assert out == ""
    assert err.startswith("main.py: error: ")
    assert err.count("\n") == 1
    assert files_below(folder) == before
    return err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "--data"),
        (["--data", "MNIST", "--paper_setting", "original"], "MNIST"),
        (["--data", "digits", "--paper_setting", "teacher"], "teacher"),
        (["--data", "digits"], "--paper_setting"),
        ([*ORIGINAL, "--learning_rate", "1"], "--learning_rate"),
        ([*ORIGINAL, "--model_depth", "50"], "50"),
        ([*ORIGINAL, "--width", "0"], "--width"),
        ([*ORIGINAL, "--time_window", "0"], "--time_window"),
        ([*ORIGINAL, "--time_window", "four"], "four"),
        ([*ORIGINAL, "--batch_size", "0"], "--batch_size"),
        ([*ORIGINAL, "--batch_size", "-64"], "--batch_size"),
        ([*ORIGINAL, "--accumulate", "0"], "--accumulate"),
        ([*ORIGINAL, "--batch_size", "32", "--accumulate", "5"], "does not divide the 32 images"),
        ([*TINY, "--batch_size", "1"], "a single value per channel: images of 8x8 are 1x1"),
        ([*TINY, "--batch_size", "1", "--bits", "4", "--paper_setting", "student"], "single value"),
        ([*TINY, "--batch_size", "4", "--accumulate", "4"], "in 4 parts (--accumulate)"),
        ([*ORIGINAL, "--epochs", "0"], "--epochs"),
        ([*ORIGINAL, "--lr", "-1"], "--lr"),
        ([*ORIGINAL, "--lr", "nan"], "--lr"),
        ([*ORIGINAL, "--weight_decay", "-1"], "--weight_decay"),
        ([*ORIGINAL, "--clip_grad", "inf"], "--clip_grad"),
        ([*ORIGINAL, "--seed", "-1"], "--seed"),
        ([*ORIGINAL, "--workers", "-1"], "--workers"),
        ([*ORIGINAL, "--amp", "fp16"], "choose from 'bf16'"),
        ([*ORIGINAL, "--bits", "4"], "--bits"),
        ([*ORIGINAL, "--bn_bits", "8"], "--bn_bits"),
        ([*ORIGINAL, "--loss", "CLK"], "--loss"),
        ([*ORIGINAL, "--init_from_teacher"], "--init_from_teacher"),
        (["--data", "digits", "--paper_setting", "student"], "--bits"),
        ([*STUDENT[:-1], "1"], "--bits"),
        ([*STUDENT[:-1], "9"], "--bits"),
        ([*STUDENT, "--bn_bits", "1"], "--bn_bits"),
        ([*STUDENT, "--loss", "CLK"], "--loss"),
        ([*STUDENT, "--alpha", "1"], "--alpha"),
        ([*STUDENT, "--beta_schedule", "cosine"], "--beta_schedule"),
        ([*QAMD, "--loss", "CL", "--beta", "5"], "--beta has no meaning with --loss CL"),
        ([*STUDENT, "--teacher_path", "t.pth"], "--teacher_path"),
        ([*STUDENT, "--init_from_teacher"], "--teacher_path"),
        ([*STUDENT, "--integer"], "--eval_only"),
        (QAMD, "--teacher_path"),
        ([*QAMD, "--loss", "KL"], "KL"),
        ([*QAMD, "--teacher_path", "absent.pth"], "absent.pth does not exist"),
        ([*QAMD, "--teacher_path", "."], "cannot read"),
        (["--eval_only", "absent.pth"], "absent.pth does not exist"),
        (["--data", "TinyImagenet", "--paper_setting", "original"], "tiny-imagenet-200"),
        (["--data", "ncaltech101", "--paper_setting", "original"], "N-Caltech101"),
        (["--data", "CIFAR10", "--paper_setting", "original", "--data_path", "d"], "cifar-10"),
        (["--data", "CIFAR100", "--paper_setting", "original", "--data_path", "d"], "cifar-100"),
        ([*ORIGINAL, "--save_path", "/proc/runs"], "/proc/runs"),
        ([*ORIGINAL, "--save_path", f"{__file__}/run"], "cannot write"),
        ([*ORIGINAL, "--save_path", "a" * 300], "cannot write"),
        ([*ORIGINAL, "--save_path", "a\0b"], "--save_path"),
        ([*ORIGINAL, "--save_path", "a\nb"], "--save_path"),
        ([*ORIGINAL, "--data_path", "a\0b"], "--data_path"),
        ([*ORIGINAL, "--save_path", "a\udcff"], "is not in UTF-8"),
        ([*ORIGINAL, "--two\nlines"], "--two"),
        ([*ORIGINAL, "--seed", str(2**64)], "--seed"),
        ([*ORIGINAL, "--width", "1000000"], "--width"),
        ([*ORIGINAL, "--time_window", str(10**20)], "--time_window"),
        ([*ORIGINAL, "--epochs", str(10**400)], "--epochs"),
        ([*ORIGINAL, "--workers", "1000000000"], "--workers"),
    ],
)
def test_a_wrong_argument_is_one_line(arguments, expected, tmp_path, capfd, monkeypatch):
    assert expected in complaint(arguments, tmp_path, capfd, monkeypatch)


@pytest.mark.parametrize("setting", [["original"], ["student", "--bits", "4"]])
def test_too_few_images_for_batch_norm_are_one_line_and_one_more_trains(setting, tmp_path, capfd):
    """Three 8×8 images make one batch, in parts of two and one."""
    write_image_folder(tmp_path / "data", classes=2, per_class=4, size=8)
    next((tmp_path / "data" / "train").glob("*/7.jpg")).unlink()
    arguments = ["--data", "folder", "--data_path", str(tmp_path / "data"), "--image_size", "8"]
    arguments += ["--time_window", "1", "--batch_size", "4", "--width", "2", "--epochs", "1"]
    arguments += ["--paper_setting", *setting, "--save_path", str(tmp_path / "run")]
    assert main.main([*arguments, "--accumulate", "2"]) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "single value per channel" in err
    assert "--batch_size 4, of which the data set has 3, in 2 parts (--accumulate)" in err
    assert not (tmp_path / "run").exists()
    assert main.main(arguments) == 0
    checkpoint = load_checkpoint(tmp_path / "run" / f"{setting[0]}-last.pth")  # checks the numbers
    assert checkpoint.epoch == 1


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_what_batch_norm_is_given_is_foreseen(world_size):
    """Against the parts that the loaders and the training step really make."""
    for images, share, accumulate, T in itertools.product(
        range(1, 9), (1, 2, 3, 4), (1, 2, 3), (1, 2)
    ):
        if share % accumulate:
            continue
        batch_size = share * world_size
        data_set = ImageSet(torch.zeros(images, 1, 1, 1, dtype=torch.uint8), [0] * images)
        parts = []
        for rank in range(world_size):
            loader = training_loader(data_set, Share(share, rank, world_size))
            batches = [batch for batch, _ in loader]
            parts.append([len(part) for x in batches for part in x.chunk(accumulate)])
        smallest = min(map(sum, zip(*parts, strict=True)))
        for size, pixels in (("8x8", 1), ("8x9", 2), ("16x16", 4)):
            settings = parse_settings(
                ["--data", "digits-dvs", "--paper_setting", "original", "--time_window", "16"]
            )
            changes = {"batch_size": batch_size, "accumulate": accumulate, "time_window": T}
            settings = replace(settings, image_size=size, **changes)
            refusal = pytest.raises(UserError, match="single value")
            with refusal if smallest * T * pixels == 1 else nullcontext():
                refuse_single_values(settings, world_size, images)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda-shared"])
def test_asking_for_a_gpu_where_there_is_none_is_one_line(device, tmp_path, capfd, monkeypatch):
    line = complaint([*ORIGINAL, "--device", device], tmp_path, capfd, monkeypatch)
    assert f"--device {device}: this machine has no usable GPU" in line


def broken_teachers(trained: dict[str, Path]) -> dict[str, object]:
    """What a file given as teacher may hold, by the words that say what is wrong with it."""
    whole = trained["original"].read_bytes()
    good = torch.load(trained["original"], weights_only=True)

    def changed(**settings) -> dict:
        return good | {"settings": good["settings"] | settings}

    def weights(**changed_weights) -> dict:
        return good | {"model": good["model"] | changed_weights}

    linear = good["model"]["linear.weight"]
    variance = good["model"]["stem.bn.running_var"]
    return {
        "truncated": whole[: len(whole) // 2],
        "is not a checkpoint": b"not a checkpoint",
        "or it is truncated": b"",
        "this program, or it is truncated": b"\x80\x02.",
        "it holds no settings": torch.zeros(3),
        "it holds no epoch": {key: good[key] for key in ("settings", "model", "accuracy")},
        "it holds no accuracy": good | {"accuracy": None},
        "it holds no model": good | {"model": [1, 2]},
        "its settings are not": good | {"settings": {"data": "digits"}},
        "its width is 'two'": changed(width="two"),
        "its width is True": changed(width=True),
        "--width must be between": changed(width=10**20),
        "--time_window must be between": changed(time_window=10**20),
        "no such network": changed(data="MNIST"),
        "program: no such network": changed(loss="CLK"),
        "does not fit its own settings": changed(width=4),
        "'stem.conv.weight' should be": good | {"model": {"weight": torch.zeros(3)}},
        "'linear.weight' should be": weights(**{"linear.weight": linear[:5]}),
        "found (torch.float64": weights(**{"linear.weight": linear.double()}),
        "found None": weights(**{"linear.weight": linear.to_sparse()}),
        "'two\\nlines' should be None": weights(**{"two\nlines": linear}),
        "numbers in linear.weight": weights(**{"linear.weight": linear * float("nan")}),
        "numbers in stem.bn.running_var": weights(**{"stem.bn.running_var": -1 - variance}),
    }


BROKEN = (
    *("truncated", "is not a checkpoint", "or it is truncated", "this program, or it is truncated"),
    *("it holds no settings", "it holds no epoch", "it holds no accuracy", "it holds no model"),
    *("its settings are not", "its width is 'two'", "its width is True", "--width must be between"),
    *("--time_window must be between", "no such network", "program: no such network"),
    *("does not fit its own settings", "'stem.conv.weight' should be"),
    *("'linear.weight' should be", "found (torch.float64", "found None"),
    *("'two\\nlines' should be None", "numbers in linear.weight", "numbers in stem.bn.running_var"),
)


@pytest.mark.parametrize("expected", BROKEN)
def test_a_broken_checkpoint_is_one_line(expected, trained, tmp_path, capfd, monkeypatch):
    content = broken_teachers(trained)[expected]
    path = tmp_path / "broken.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    for arguments in ([*QAMD, "--teacher_path", "broken.pth"], ["--eval_only", "broken.pth"]):
        line = complaint(arguments, tmp_path, capfd, monkeypatch)
        assert "broken.pth" in line
        assert expected in line


def test_numbers_too_large_for_an_integer_evaluation_are_one_line(
    trained, tmp_path, capfd, monkeypatch
):
    content = torch.load(trained["student"], weights_only=True)
    content["model"]["blocks.0.bn2.bias"] += 1100  # float32 adds multiples of 2^-14 up to 1024
    torch.save(content, tmp_path / "large.pth")
    monkeypatch.chdir(tmp_path)
    assert main.main(["--eval_only", "large.pth", "--integer"]) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
    assert errors == [
        "main.py: error: --integer: a number needs more than 24 bits, "
        "which float32 does not hold exactly"
    ]


@pytest.mark.parametrize(
    ("option", "value"),
    [("--model_depth", "34"), ("--width", "4"), ("--data", "CIFAR10")],
)
def test_a_teacher_of_another_network_is_one_line(
    option, value, trained, tmp_path, capfd, monkeypatch
):
    arguments = [*QAMD, option, value, "--teacher_path", str(trained["original"])]
    line = complaint(arguments, tmp_path, capfd, monkeypatch)
    assert f"this run has {option} {value}" in line


@pytest.mark.parametrize("setting", ["student", "qamd"])
def test_a_student_given_as_teacher_is_one_line(setting, trained, tmp_path, capfd, monkeypatch):
    arguments = [*QAMD, "--teacher_path", str(trained[setting])]
    assert "holds a quantized" in complaint(arguments, tmp_path, capfd, monkeypatch)


def test_an_option_that_contradicts_the_evaluated_checkpoint_is_one_line(
    trained, tmp_path, capfd, monkeypatch
):
    arguments = ["--eval_only", str(trained["original"]), "--integer"]
    assert "full-precision" in complaint(arguments, tmp_path, capfd, monkeypatch)
    arguments = ["--eval_only", str(trained["student"]), "--bits", "8"]
    assert "was trained with 4" in complaint(arguments, tmp_path, capfd, monkeypatch)
    for foreign in (
        *(["--loss", "CLM"], ["--lr", "nan"], ["--save_path", "x"], ["--seed", "5"]),
        ["--accumulate", "2"],
    ):
        arguments = ["--eval_only", str(trained["student"]), *foreign]
        line = complaint(arguments, tmp_path, capfd, monkeypatch)
        assert f"{foreign[0]} has no meaning with --eval_only" in line
    arguments = ["--eval_only", str(trained["student"]), "--batch_size", "0"]
    assert "--batch_size" in complaint(arguments, tmp_path, capfd, monkeypatch)


@pytest.mark.parametrize("damage", ["other T", "other T inside", "no frames", "truncated"])
def test_frames_that_cannot_be_used_are_one_line(damage, tmp_path, capfd, monkeypatch):
    folder = write_ncaltech101(tmp_path, time_window=4, classes=2, per_class=3)
    file = sorted(folder.rglob("*.npz"))[-1]
    time_window = "10" if damage == "other T" else "4"
    if damage == "other T inside":
        np.savez(file, frames=np.zeros((3, 2, 180, 240)))
    elif damage == "no frames":
        np.savez(file, images=np.zeros((4, 2, 180, 240)))
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    arguments = ["--data", "ncaltech101", "--paper_setting", "original", "--data_path", "."]
    line = complaint([*arguments, "--time_window", time_window], tmp_path, capfd, monkeypatch)
    expected = {"other T": "frames_number_4", "no frames": "named frames"}
    assert expected.get(damage, file.name) in line


def test_a_process_with_a_mistake_of_its_own_says_so(tmp_path, monkeypatch, capsys):
    waited = []
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("time.sleep", waited.append)  # nobody ends it
    assert main.main([*ORIGINAL, "--epochs", "0"]) == 2
    assert waited == [10]
    assert capsys.readouterr().err.startswith("main.py: error: --epochs must be")


LATE_FIRST = """
import os, sys, time
time.sleep(3 if os.environ["RANK"] == "0" else 0)
import main
main.leave(main.main(sys.argv[1:]))
"""


def test_two_processes_complain_once_and_the_last_line_is_theirs(tmp_path, tmp_path_factory):
    error = tmp_path_factory.mktemp("launcher") / "error.json"
    (tmp_path / "late.py").write_text(LATE_FIRST)
    for launcher, wrong, expected in (
        ("run", ["--batch_size", "33"], "does not divide evenly"),
        ("launch", ["--batch_size", "36", "--accumulate", "4"], "does not divide the 18 images"),
        ("launch", ["--data", "TinyImagenet"], "tiny-imagenet-200"),
    ):
        launch = [sys.executable, "-m", f"torch.distributed.{launcher}", *TWO_PROCESSES]
        arguments = [*ORIGINAL, *wrong, "--save_path", str(tmp_path / "run")]
        result = subprocess.run(
            [*launch, str(tmp_path / "late.py"), *arguments],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY), "TORCHELASTIC_ERROR_FILE": str(error)},
            capture_output=True,
            text=True,
        )
        lines = result.stderr.splitlines()
        ours = [line for line in lines if "main.py: error:" in line]
        # Once at once, and once more after the launcher's last line.
        assert ours == [lines[-1]] * 2, result.stderr
        assert expected in ours[0]
        assert files_below(tmp_path) == {tmp_path / "late.py"}
        # Also as the cause at the end of the launcher's own lines.
        assert lines[-3] == f"  traceback : {ours[0].removeprefix('main.py: error: ')}"
        if launcher == "run":  # torchrun, which has an error file of its own
            message = json.loads(error.read_text())["message"]
            assert f"main.py: error: {message['message']}" == ours[0]
            assert message["errorCode"] == 2


def test_the_command_itself_exits_with_2_and_prints_no_traceback(tmp_path):
    result = subprocess.run(
        [sys.executable, str(REPOSITORY / "main.py"), *ORIGINAL, "--bits", "4"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("setting", ["truncated", "other"])
def test_the_hardware_report_refuses_what_is_not_our_checkpoint(setting, trained, tmp_path):
    path = tmp_path / "net.pth"
    if setting == "truncated":
        path.write_bytes(trained["qamd"].read_bytes()[:1000])
    else:
        torch.save({"state_dict": {"conv.weight": torch.zeros(3)}}, path)
    source = ["--checkpoint", str(path), "--out", str(tmp_path / "out")]
    result = subprocess.run(
        [sys.executable, "-m", "spikesim_eval", "report", *source],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "net.pth is not a checkpoint of this program" in result.stderr
    assert files_below(tmp_path) == {path}


def test_the_process_that_meets_a_damaged_image_says_so(tmp_path):
    folder = write_tiny_imagenet(tmp_path, classes=2, per_class=2, val_per_class=2)
    damaged = folder / "val" / "images" / "val_1.JPEG"  # test image 1 is the second process's
    damaged.write_bytes(damaged.read_bytes()[:100])
    launch = [sys.executable, "-m", "torch.distributed.launch", *TWO_PROCESSES]
    arguments = ["--data", "TinyImagenet", "--paper_setting", "original", "--width", "2"]
    paths = ["--data_path", str(tmp_path), "--save_path", str(tmp_path / "run"), "--workers", "0"]
    result = subprocess.run(
        [*launch, str(REPOSITORY / "main.py"), *arguments, *paths], capture_output=True, text=True
    )
    lines = result.stderr.splitlines()
    ours = [line for line in lines if "main.py: error:" in line]
    assert ours == [lines[-1]] * 2
    assert "val_1.JPEG cannot be read" in ours[0]
    assert any(line.startswith("  traceback : ") and "val_1.JPEG" in line for line in lines)


def test_checking_a_save_path_leaves_nothing(tmp_path):
    check_writable(tmp_path / "a" / "b")
    assert files_below(tmp_path) == set()
    (tmp_path / "file").touch()
    with pytest.raises(UserError):
        check_writable(tmp_path / "file" / "b")
