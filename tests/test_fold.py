"""--fold: cross-validation on all images of a data set."""

import json
import math
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold
from torchvision.datasets import CIFAR10

import main
import stand_in_data
from checkpoints import load_checkpoint
from conftest import refused
from data_loader import ImageSet, data_of
from data_sets import static
from data_sets.splits import FOLDS, held_out_rows
from load_settings import parse_settings
from loading import data_sets_of
from spikesim_eval.__main__ import main as spikesim_eval
from test_input_step import SIDE, T
from test_input_step import write as write_frames

DIGITS = ["--data", "digits", "--width", "1", "--batch_size", "480", "--workers", "0"]
DIGITS += ["--epochs", "1", "--paper_setting"]


def images_of(data_set: ImageSet) -> Counter:
    """How often each pair of an image and its label is there."""
    pairs = (data_set[i] for i in range(len(data_set)))
    return Counter((image.numpy().tobytes(), label) for image, label in pairs)


@pytest.mark.parametrize("fold", [0, 4, 7])
def test_the_folds_of_digits_are_those_of_the_committed_studies_on_every_machine(fold):
    labels = load_digits().target
    parts = StratifiedKFold(5, shuffle=True, random_state=fold // 5).split(labels, labels)
    images, _ = static.digits(None).whole
    for found, rows in zip(data_sets_of("digits", fold=fold), list(parts)[fold % 5], strict=True):
        assert found.labels.tolist() == labels[rows].tolist()
        assert torch.equal(torch.stack([x for x, _ in found]), images[rows].float() / 255)
    if fold == 7:
        assert found.rows[:8].tolist() == [2, 11, 15, 21, 29, 31, 39, 40]


WRITE = {
    "CIFAR10": lambda root: stand_in_data.write_cifar(root, "CIFAR10"),
    "TinyImagenet": lambda root: stand_in_data.write_tiny_imagenet(root, 2, 8, 5),
    "ncaltech101": lambda root: stand_in_data.write_ncaltech101(root, T, 2, 11),
    "folder": lambda root: stand_in_data.write_image_folder(root, 2, 12),
}


@pytest.mark.parametrize("data", WRITE)
def test_every_image_is_tested_once_in_a_split_and_never_by_a_network_that_saw_it(
    data, tmp_path, monkeypatch
):
    WRITE[data](tmp_path)
    if data == "CIFAR10":
        for name, value in stand_in_data.cifar_md5_lists(CIFAR10, tmp_path).items():
            monkeypatch.setattr(CIFAR10, name, value)
    where = {"time_window": T, "augment": "none"}
    sets = data_sets_of(data, tmp_path, **where)
    everything = images_of(sets[0]) + images_of(sets[1])
    caches = {x: x.stat().st_mtime_ns for x in tmp_path.rglob("*.npy")}
    splits = []
    for split in (0, 1):
        tested = []
        for fold in range(split * FOLDS, (split + 1) * FOLDS):
            train, test = data_sets_of(data, tmp_path, **where, fold=fold)
            assert images_of(train) + images_of(test) == everything
            assert train.classes == test.classes == sets[0].classes
            for label, number in Counter(y for _, y in everything.elements()).items():
                assert (test.labels == label).sum().item() in (number // 5, -(-number // 5))
            tested.append(images_of(test))
        assert sum(tested, Counter()) == everything
        splits.append(tested)
    assert splits[0] != splits[1]
    assert caches == {x: x.stat().st_mtime_ns for x in tmp_path.rglob("*.npy")}


def test_a_share_is_held_out_of_the_training_images_of_the_fold():
    whole, test = data_sets_of("digits", ".", 4, fold=3)
    train, same_test = data_sets_of("digits", ".", 4, 9, fold=3, val_share=0.25)
    assert images_of(same_test) == images_of(test)
    assert images_of(train) + images_of(train.held_out) == images_of(whole)
    assert len(train.held_out) == math.floor(0.25 * len(whole) + 0.5)
    assert torch.equal(train.rows, whole.rows[~held_out_rows(whole.labels, 0.25, 9)])


def test_the_input_step_is_that_of_the_training_images_of_the_fold(tmp_path):
    data = write_frames(tmp_path, "fractional")
    where = {"augment": "none", "image_size": (SIDE, SIDE)}
    sets = data_sets_of("ncaltech101", data, T, **where)
    frames = np.concatenate([part.images.numpy() for part in sets])
    steps = set()
    for fold in range(5):
        train, test = data_sets_of("ncaltech101", data, T, **where, fold=fold)
        assert train.step == test.step == float(frames[train.rows].max()) / 255
        steps.add(train.step)
    assert len(steps) > 1


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fold") / "teacher"
    assert main.main([*DIGITS, "original", "--fold", "6", "--save_path", str(folder)]) == 0
    return folder / "original-last.pth"


def test_a_run_on_a_fold_is_taught_tested_and_told_of_on_that_fold(teacher, tmp_path, capsys):
    options = ["qamd", "--bits", "4", "--teacher_path", str(teacher), "--fold", "6"]
    assert main.main([*DIGITS, *options, "--save_path", str(tmp_path)]) == 0
    assert "digits, fold 6: 1,437 training and 360 test images" in capsys.readouterr().out
    assert json.loads((tmp_path / "settings.json").read_text())["fold"] == 6
    checkpoint = load_checkpoint(tmp_path / "qamd-last.pth")
    for again in ([], ["--fold", "6"]):
        assert main.main(["--eval_only", str(tmp_path / "qamd-last.pth"), *again]) == 0
        right = round(360 * checkpoint.accuracy)
        assert f"({right} of 360 test images of fold 6)" in capsys.readouterr().out
    _, test = data_of(checkpoint.settings, ".")
    assert images_of(test) == images_of(data_sets_of("digits", ".", 4, fold=6)[1])
    config = parse_settings(["--config", str(tmp_path / "settings.json")])
    assert config.fold == 6
    assert "-fold6-" in config.save_path
    assert "-fold0-" in parse_settings([*DIGITS, "original", "--fold", "0"]).save_path


@pytest.mark.parametrize("fold", [None, "1", "5"])
def test_a_teacher_of_another_fold_is_refused(fold, teacher, complaint):
    options = ["student", "--init_from_teacher"] if fold == "1" else ["qamd"]
    options += ["--bits", "4", "--teacher_path", str(teacher)]
    options += [] if fold is None else ["--fold", fold]
    line = complaint([*DIGITS, *options])
    assert "was trained with --fold 6" in line
    assert f"this run {'without --fold' if fold is None else f'with --fold {fold}'}" in line


def test_with_a_network_of_no_fold_there_is_none(trained, teacher, tmp_path, capfd, complaint):
    no_fold = str(trained["original"])
    options = ["--data", "digits", "--width", "2", "--paper_setting", "qamd", "--bits", "4"]
    options += ["--teacher_path", no_fold, "--fold", "0"]
    assert "was trained without --fold" in complaint(options)
    assert main.main(["--eval_only", no_fold, "--fold", "1"]) == 2
    assert "it was trained without --fold" in capfd.readouterr().err
    paths = ["--checkpoint", str(teacher), "--baseline", no_fold]
    assert spikesim_eval(["report", *paths, "--out", str(tmp_path / "report")]) == 2
    assert "are not compared: fold None against 6" in capfd.readouterr().err


def test_neither_a_resumed_run_nor_an_evaluation_changes_the_fold(teacher, tmp_path, capfd):
    options = [*DIGITS, "original", "--save_path", str(teacher.parent), "--resume"]
    for command, said in (
        ([*options, "--epochs", "2", "--fold", "1"], "--fold 1 instead of 6"),
        ([*options, "--epochs", "2"], "--fold None instead of 6"),
        (["--eval_only", str(teacher), "--fold", "1"], "--fold 1 does not fit"),
    ):
        assert said in refused(capfd, main.main, command)


OF_FOLDER = "--data folder --image_size 8 --width 1 --epochs 1 --batch_size 4 --workers 0 "
OF_FOLDER += "--paper_setting original"


def test_a_fold_of_data_that_have_changed_is_not_tested_on(tmp_path, capfd):
    data, last = tmp_path / "data", str(tmp_path / "run" / "original-last.pth")
    stand_in_data.write_image_folder(data, classes=2, per_class=6, size=8)
    where, others = ["--data_path", str(data)], ["--data_path", str(data / "more")]
    options = [*OF_FOLDER.split(), "--fold", "1", "--save_path", str(tmp_path / "run")]
    assert main.main([*options, *where]) == 0
    for part in ("train", "val"):
        shutil.copytree(data / part, data / "more" / part)
    kind = data / "more" / "train" / "kind 0"
    for name in "abcdef":
        shutil.copy(kind / "4.jpg", kind / f"{name}.jpg")
    student = ["--paper_setting", "student", "--bits", "4", "--init_from_teacher"]
    student += ["--teacher_path", last, "--save_path", str(tmp_path / "student")]
    for command in (
        lambda: main.main(["--eval_only", last, *others]),
        lambda: spikesim_eval(["report", "--checkpoint", last, *others, "--out", str(tmp_path)]),
        lambda: main.main([*options, *student, *others]),
    ):
        capfd.readouterr()
        assert "trained on 9 images of its --fold 1" in refused(capfd, command)
    assert main.main(["--eval_only", last, *where]) == 0


def test_a_class_of_fewer_images_than_folds_is_one_line(tmp_path, capfd):
    stand_in_data.write_image_folder(tmp_path / "data", classes=2, per_class=4, size=8)
    where = ["--data_path", str(tmp_path / "data"), "--save_path", str(tmp_path / "run")]
    line = refused(capfd, main.main, [*OF_FOLDER.split(), *where, "--fold", "0"])
    assert "--fold needs 5 images of every class" in line
    assert "kind 0 has 4" in line
    assert not (tmp_path / "run").exists()
