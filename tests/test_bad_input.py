"""Mistakes of the user: one line on stderr, exit code 2, no traceback, nothing written."""

import itertools
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import main
from checkpoints import load_checkpoint
from conftest import REPOSITORY, files_below, refused
from data_loader import ImageSet, Share, training_loader
from load_settings import parse_settings, refuse_single_values
from runtime.errors import UserError
from stand_in_data import write_image_folder, write_tiny_imagenet

QAMD = ["--data", "digits", "--width", "2", "--paper_setting", "qamd", "--bits", "4"]
STUDENT = ["--data", "digits", "--width", "2", "--paper_setting", "student", "--bits", "4"]
ORIGINAL = ["--data", "digits", "--width", "2", "--paper_setting", "original"]

TINY = ["--data", "digits-dvs", "--image_size", "8", "--time_window", "1", "--width", "2"]
TINY += ["--paper_setting", "original"]

# Not at the launcher's usual port: another test may be there.
TWO_PROCESSES = ["--standalone", "--nproc_per_node=2"]


def named(base: list[str], *options: str) -> list[tuple[list[str], str]]:
    """Command lines that the first of their own options is refused for, by its name."""
    return [([*base, *option.split(" ")], option.split(" ")[0]) for option in options]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "--data"),
        (["--data", "MNIST", "--paper_setting", "original"], "MNIST"),
        (["--data", "digits", "--paper_setting", "teacher"], "teacher"),
        (["--data", "digits"], "--paper_setting"),
        *named(ORIGINAL, "--learning_rate 1", "--width 0", "--time_window 0"),
        *named(ORIGINAL, "--batch_size 0", "--batch_size -64", "--accumulate 0", "--epochs 0"),
        *named(ORIGINAL, "--lr -1", "--lr nan", "--weight_decay -1", "--clip_grad inf"),
        *named(ORIGINAL, "--seed -1", "--workers -1", "--bits 4", "--bn_bits 8", "--loss CLK"),
        *named(ORIGINAL, "--init_from_teacher", f"--seed {2**64}", "--width 1000000"),
        *named(ORIGINAL, f"--time_window {10**20}", f"--epochs {10**400}", "--workers 1000000000"),
        *named(ORIGINAL, "--save_path a\0b", "--save_path a\nb", "--data_path a\0b"),
        *named(ORIGINAL, "--val_share 0.6", "--val_share nan", "--label_smoothing 1"),
        *named(ORIGINAL, "--warmup -1", "--warmup 1.5"),
        *named(ORIGINAL, "--fold -1", "--fold 1.5", "--fold 1000001", "--fold x"),
        *named(ORIGINAL, "--leak 1.1", "--leak nan", "--threshold 0", "--surrogate_width 0"),
        *named(ORIGINAL, "--reset none", "--surrogate gauss", "--threshold inf"),
        *named(STUDENT[:-2], "--bits 1", "--bits 9"),
        *named(STUDENT, "--bn_bits 1", "--loss CLK", "--alpha 1", "--beta_schedule cosine"),
        *named(STUDENT, "--teacher_path t.pth"),
        ([*ORIGINAL, "--val_share", "0.0001"], "holds out none of the 1437 training images"),
        ([*ORIGINAL, "--warmup", "3", "--epochs", "3"], "leaves nothing of --epochs 3"),
        ([*ORIGINAL, "--resume", "--overwrite"], "leave one of the two out"),
        ([*ORIGINAL, "--two\nlines"], "--two"),
        ([*ORIGINAL, "--model_depth", "50"], "50"),
        ([*ORIGINAL, "--time_window", "four"], "four"),
        ([*ORIGINAL, "--batch_size", "32", "--accumulate", "5"], "does not divide the 32 images"),
        ([*TINY, "--batch_size", "1"], "a single value per channel: images of 8x8 are 1x1"),
        ([*TINY, "--batch_size", "1", "--bits", "4", "--paper_setting", "student"], "single value"),
        ([*TINY, "--batch_size", "4", "--accumulate", "4"], "in 4 parts (--accumulate)"),
        ([*ORIGINAL, "--amp", "fp16"], "choose from 'bf16'"),
        (["--data", "digits", "--paper_setting", "student"], "--bits"),
        ([*QAMD, "--loss", "CL", "--beta", "5"], "--beta has no meaning with --loss CL"),
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
        ([*ORIGINAL, "--save_path", "a\udcff"], "is not in UTF-8"),
    ],
)
def test_a_wrong_argument_is_one_line(arguments, expected, complaint):
    assert expected in complaint(arguments)


@pytest.mark.parametrize("setting", [["original"], ["student", "--bits", "4"]])
def test_too_few_images_for_batch_norm_are_one_line_and_one_more_trains(setting, tmp_path, capfd):
    """Three 8×8 images make one batch, in parts of two and one; those held out are not counted."""
    write_image_folder(tmp_path / "data", classes=2, per_class=4, size=8)
    (fourth,) = (tmp_path / "data" / "train").glob("*/7.jpg")
    arguments = ["--data", "folder", "--data_path", str(tmp_path / "data"), "--image_size", "8"]
    arguments += ["--time_window", "1", "--batch_size", "4", "--width", "2", "--epochs", "1"]
    arguments += ["--paper_setting", *setting, "--save_path", str(tmp_path / "run")]
    for held_out in (["--val_share", "0.25"], []):
        err = refused(capfd, main.main, [*arguments, "--accumulate", "2", *held_out])
        assert "single value per channel" in err
        assert "of a batch of 3 (--batch_size, or all that there are), in 2 parts" in err
        assert not (tmp_path / "run").exists()
        fourth.unlink(missing_ok=True)
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
def test_asking_for_a_gpu_where_there_is_none_is_one_line(device, complaint):
    line = complaint([*ORIGINAL, "--device", device])
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
        "program: --width cannot be 'two'": changed(width="two"),
        "--width cannot be True": changed(width=True),
        "--width must be between": changed(width=10**20),
        "--time_window must be between": changed(time_window=10**20),
        "invalid choice: 'MNIST'": changed(data="MNIST"),
        "program: no such network": changed(loss="CLK"),
        "does not fit its own settings": changed(width=4),
        "'stem.conv.weight' should be": good | {"model": {"weight": torch.zeros(3)}},
        "'linear.weight' should be": weights(**{"linear.weight": linear[:5]}),
        "found (torch.float64": weights(**{"linear.weight": linear.double()}),
        "checkpoint of this program": weights(**{"linear.weight": linear.to_sparse()}),
        "found <class 'NoneType'>": weights(**{"more": None}),
        "'two\\nlines' should be None": weights(**{"two\nlines": linear}),
        "numbers in linear.weight": weights(**{"linear.weight": linear * float("nan")}),
        "numbers in stem.bn.running_var": weights(**{"stem.bn.running_var": -1 - variance}),
    }


def test_a_broken_checkpoint_is_one_line(trained, tmp_path, complaint):
    path = tmp_path / "broken.pth"
    for expected, content in broken_teachers(trained).items():
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        for arguments in ([*QAMD, "--teacher_path", "broken.pth"], ["--eval_only", "broken.pth"]):
            line = complaint(arguments)
            assert "broken.pth" in line
            assert expected in line, line


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
    ("teacher", "options", "expected"),
    [
        ("original", ["--model_depth", "34"], "this run with --model_depth 34"),
        ("original", ["--width", "4"], "this run with --width 4"),
        ("original", ["--data", "CIFAR10"], "this run with --data CIFAR10"),
        ("student", [], "holds a quantized"),
        ("qamd", [], "holds a quantized"),
    ],
)
def test_a_teacher_of_another_network_is_one_line(teacher, options, expected, trained, complaint):
    arguments = [*QAMD, *options, "--teacher_path", str(trained[teacher])]
    assert expected in complaint(arguments)


@pytest.mark.parametrize(
    ("evaluated", "options", "expected"),
    [
        ("original", "--integer", "full-precision"),
        ("student", "--bits 8", "was trained with --bits 4"),
        ("student", "--batch_size 0", "--batch_size"),
        *(
            ("student", option, f"{option.split()[0]} has no meaning with --eval_only")
            for option in ("--loss CLM", "--lr nan", "--save_path x", "--seed 5", "--accumulate 2")
        ),
    ],
)
def test_an_option_that_contradicts_the_evaluated_checkpoint_is_one_line(
    evaluated, options, expected, trained, complaint
):
    arguments = ["--eval_only", str(trained[evaluated]), *options.split()]
    assert expected in complaint(arguments)


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


@pytest.mark.parametrize(
    ("launcher", "wrong", "expected"),
    [
        ("run", ["--batch_size", "33"], "does not divide evenly"),
        (
            "launch",
            ["--data", "TinyImagenet", "--data_path", "images"],
            "val_1.JPEG cannot be read",
        ),
    ],
)
def test_two_processes_complain_once_and_the_last_line_is_theirs(
    launcher, wrong, expected, tmp_path, tmp_path_factory
):
    error = tmp_path_factory.mktemp("launcher") / "error.json"
    (tmp_path / "late.py").write_text(LATE_FIRST)
    if "images" in wrong:
        folder = write_tiny_imagenet(tmp_path / "images", classes=2, per_class=2, val_per_class=2)
        damaged = folder / "val" / "images" / "val_1.JPEG"  # test image 1: the second process's
        damaged.write_bytes(damaged.read_bytes()[:100])
    before = files_below(tmp_path)
    launch = [sys.executable, "-m", f"torch.distributed.{launcher}", *TWO_PROCESSES]
    arguments = [*ORIGINAL, *wrong, "--workers", "0", "--save_path", str(tmp_path / "run")]
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
    assert "images" in wrong or files_below(tmp_path) == before
    # Also as the cause at the end of the launcher's own lines.
    cause = ours[0].removeprefix("main.py: error: ")
    assert any(line == f"  traceback : {cause}" for line in lines), result.stderr
    if launcher == "run":  # torchrun, which has an error file of its own
        message = json.loads(error.read_text())["message"]
        assert f"main.py: error: {message['message']}" == ours[0]
        assert message["errorCode"] == 2


def test_parts_of_a_process_s_share_are_equal():
    arguments = [*ORIGINAL, "--batch_size", "36", "--accumulate", "4"]
    with pytest.raises(UserError, match="does not divide the 18 images"):
        parse_settings(arguments, world_size=2)
