"""--data nmnist: N-MNIST as published, with a training and a test set of its own."""

import shutil
from pathlib import Path

import numpy as np
import pytest

import main
from checkpoints import load_checkpoint
from data_loader import read_sample
from data_sets import DATA_SETS
from loading import data_sets_of
from stand_in_data import write_nmnist
from test_fold import images_of
from test_prepare import cut, expect_archives, files_below, prepare, refused, zipped

T = 3
PREPARE = ["prepare", "--data", "nmnist", "--time_window", T, "--data_path"]
FRAMES = f"N-MNIST/frames_number_{T}_split_by_number"


@pytest.fixture
def raw(tmp_path) -> Path:
    write_nmnist(tmp_path / "N-MNIST")
    return tmp_path


def counted(path: Path) -> np.ndarray:
    """Event counts (T, 2, 34, 34) of a file of events, one by one; the last frame has the rest."""
    content, frames = path.read_bytes(), np.zeros((T, 2, 34, 34), int)
    number = len(content) // 5
    for k in range(number):
        x, y, p = content[5 * k], content[5 * k + 1], content[5 * k + 2] >> 7
        frames[min(k // (number // T), T - 1), p, y, x] += 1
    return frames


def test_training_and_test_files_are_the_published_ones_and_every_event_is_counted(raw, capsys):
    assert prepare(*PREPARE, raw) == 0
    assert "30 training and 20 test samples of 10 classes, (3, 2, 34, 34) uint8" in (
        capsys.readouterr().out
    )
    for part, data_set in zip(("Train", "Test"), data_sets_of("nmnist", raw, T), strict=True):
        files = sorted((raw / "N-MNIST" / part).glob("*/*.bin"))
        assert data_set.labels.tolist() == [int(path.parent.name) for path in files]
        assert data_set.classes == list("0123456789")
        for path, image in zip(files, data_set.images.numpy(), strict=True):
            assert np.array_equal(image, counted(path))


def test_the_cache_alone_is_enough_and_keeps_the_two_parts_apart(raw):
    assert prepare(*PREPARE, raw) == 0
    before = [images_of(part) for part in data_sets_of("nmnist", raw, T, augment="none")]
    for name in ("Train", "Test", Path(FRAMES).name):
        shutil.rmtree(raw / "N-MNIST" / name)
    after = [images_of(part) for part in data_sets_of("nmnist", raw, T, augment="none")]
    assert before == after
    folds = [data_sets_of("nmnist", raw, T, augment="none", fold=k) for k in range(5)]
    for train, test in folds:
        assert images_of(train) + images_of(test) == before[0] + before[1]
        assert test.labels.bincount().tolist() == [1] * 10


@pytest.mark.parametrize("where", ["", "download/"])
def test_the_published_archives_become_frames_and_stay(where, tmp_path, monkeypatch):
    folder, parts = write_nmnist(tmp_path / "events"), {}
    for part, archive in DATA_SETS["nmnist"].recordings.parts.items():
        path = tmp_path / part / archive.name
        parts[part] = archive._replace(md5=zipped(folder / part, path))
        (tmp_path / "N-MNIST" / where).mkdir(parents=True, exist_ok=True)
        shutil.move(path, tmp_path / "N-MNIST" / where / archive.name)
    expect_archives(monkeypatch, "nmnist", parts)
    test = tmp_path / "N-MNIST" / where / "Test.zip"
    away = shutil.move(test, tmp_path / "Test.zip")
    assert prepare(*PREPARE, tmp_path) == 2  # before the first is unpacked
    assert not (tmp_path / "N-MNIST" / "extract").exists()
    shutil.move(away, test)
    assert prepare(*PREPARE, tmp_path) == 0
    assert test.exists()
    assert len(files_below(tmp_path / FRAMES)) == 50


def remove(*names: str):
    def change(root: Path) -> None:
        for name in names:
            shutil.rmtree(root / "N-MNIST" / name)

    return change


def without_files(root: Path) -> None:
    for path in (root / "N-MNIST/Test/4").iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            remove(""),
            "is expected in {0}/N-MNIST/Train/CLASS/*.bin or in {0}/N-MNIST/download/Train.zip, "
            "and neither is there: get Train.zip from https://www.garrickorchard.com/datasets/n-m",
        ),
        (remove("Train"), "N-MNIST/Train/CLASS/*.bin or in"),
        (
            remove("Test"),
            "N-MNIST/Test/CLASS/*.bin or in {0}/N-MNIST/download/Test.zip, and neither",
        ),
        (remove("Train/3", "Train/7"), "{0}/N-MNIST/Train lacks 3, 7: unpack Train.zip of https"),
        (remove("Test/0"), "{0}/N-MNIST/Test lacks 0: unpack Test.zip of"),
        (without_files, "{0}/N-MNIST/Test/4 holds no files *.bin: unpack Test.zip of"),
        (remove(f"{Path(FRAMES).name}/test"), "/test is missing: remove {0}/"),
        (remove(f"{Path(FRAMES).name}/train/5"), "/train lacks 5: remove {0}/"),
    ],
)
def test_a_layout_that_is_not_the_published_one_is_one_line(change, expected, raw, capsys):
    of_frames = "remove {0}" in expected
    if of_frames:
        assert prepare(*PREPARE, raw) == 0
    change(raw)
    text = refused(capsys, *PREPARE, raw)
    assert expected.format(raw) in text
    again = f"run python data_loader.py prepare --data nmnist --data_path {raw}"
    assert (again in text) == of_frames == bool(list(raw.rglob("*.npz")))


def test_a_training_without_frames_says_how_to_make_them(raw, capfd):
    options = ["--data", "nmnist", "--paper_setting", "original", "--data_path", str(raw)]
    assert main.main([*options, "--save_path", str(raw / "run")]) == 2
    err = capfd.readouterr().err
    assert "--data nmnist" in err
    assert "--time_window 10" in err
    assert err.count("\n") == 1


def outside(x: int, y: int):
    return lambda path: path.write_bytes(bytes([x, y, 0, 0, 1]) * 20)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, empty, outside(34, 3), outside(3, 34)])
def test_a_damaged_file_is_named_and_can_be_skipped(damage, raw, capsys):
    path = raw / "N-MNIST/Test/6/00007.bin"
    damage(path)
    text = refused(capsys, *PREPARE, raw)
    assert text.startswith(f"{path} is damaged")
    assert ("beyond a 34×34 camera" in text) == (damage not in (cut, empty))
    assert prepare(*PREPARE, raw, "--skip_damaged") == 0
    output = capsys.readouterr()
    assert f"skipped: {path} is damaged" in output.err
    assert "30 training and 19 test samples" in output.out


def test_damaged_frames_are_set_aside_in_both_parts(raw, capsys):
    assert prepare(*PREPARE, raw) == 0
    files = [raw / FRAMES / name for name in ("train/2/00003.npz", "test/9/00010.npz")]
    for path in files:
        cut(path)
    assert prepare(*PREPARE, raw, "--skip_damaged") == 0
    assert "29 training and 19 test samples" in capsys.readouterr().out
    assert all(path.with_name(f"{path.name}.damaged").exists() for path in files)


def test_a_network_is_trained_tested_and_reads_a_recording(raw, capsys):
    assert prepare(*PREPARE, raw) == 0
    run = raw / "run"
    options = ["--data", "nmnist", "--data_path", raw, "--time_window", T, "--width", 1]
    options += ["--batch_size", 10, "--epochs", 1, "--workers", 0, "--save_path", run]
    assert main.main([*map(str, options), "--paper_setting", "original", "--fold", "2"]) == 0
    assert "nmnist, fold 2: 40 training and 10 test images" in capsys.readouterr().out
    last = run / "original-last.pth"
    assert main.main(["--eval_only", str(last), "--data_path", str(raw)]) == 0
    assert "of 10" in capsys.readouterr().out
    recording = raw / "N-MNIST" / "Test" / "3" / "00004.bin"
    assert np.array_equal(
        read_sample(recording, load_checkpoint(last).settings), counted(recording)
    )
    assert main.main(["--eval_only", str(last), "--predict", str(recording)]) == 0
    assert "00004.bin" in capsys.readouterr().out
