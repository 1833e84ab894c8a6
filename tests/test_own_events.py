"""--data events: a user's own recordings; --data cifar10dvs and dvs128gesture."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from spikingjelly.datasets import CIFAR10DVS, DVS128Gesture

import main
from checkpoints import load_checkpoint
from data_loader import read_sample
from loading import data_sets_of
from stand_in_data import write_nmnist
from test_prepare import files_below, frames_by_spikingjelly, prepare, refused
from test_recordings import aedat2, aedat3, five_bytes, saved, table

T = 3
PREPARE = ["prepare", "--data", "events", "--time_window", T, "--image_size", 8, "--data_path"]
SENSOR = (20, 30)


def recording(label: int, number: int, events: int = 60) -> np.ndarray:
    """Events t, x, y, p in a band of 10 columns for each class."""
    rng = np.random.default_rng((label, number))
    x, y = 10 * label + rng.integers(0, 10, events), rng.integers(0, SENSOR[0], events)
    t = np.sort(rng.integers(0, 5000, events))
    return np.stack([t, x, y, rng.integers(0, 2, events)], axis=1)


def write(path: Path, events: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        ".bin": five_bytes,
        ".npy": lambda x: saved(np.save, x),
        ".npz": lambda x: saved(np.savez, **dict(zip("txyp", x.T, strict=True))),
        ".txt": lambda x: table(x).encode(),
    }
    path.write_bytes(content[path.suffix](events))
    return path


def write_all(root: Path, parts: dict[str, int], classes: int = 3) -> Path:
    """PART/CLASS/NUMBER.ENDING, of every ending in turn; the last event of all is in the corner."""
    for part, per_class in parts.items():
        for label in range(classes):
            for number in range(per_class):
                events = recording(label, number)
                if (label, number) == (classes - 1, 0):
                    events[-1, 1:3] = 10 * classes - 1, SENSOR[0] - 1
                ending = (".bin", ".npy", ".npz", ".txt")[number % 4]
                write(root / part / f"class {label}" / f"{number:02d}{ending}", events)
    return root


@pytest.fixture
def two(tmp_path) -> Path:
    return write_all(tmp_path / "mine", {"train": 4, "val": 2})


def own(root: Path, **rest):
    return data_sets_of("events", root, T, augment="none", **{"image_size": SENSOR} | rest)


def counted(events: np.ndarray, split_by: str = "number") -> np.ndarray:
    """One by one; the last frame has the rest."""
    frames = np.zeros((T, 2, *SENSOR), int)
    start, end = events[0, 0], events[-1, 0]
    for k, (t, x, y, p) in enumerate(events):
        place, whole = (k, len(events)) if split_by == "number" else (t - start, end - start)
        frames[min(place // (whole // T), T - 1), p, y, x] += 1
    return frames


def test_every_recording_is_a_sample_of_its_class(two, capsys):
    assert prepare(*PREPARE, two) == 0
    out = capsys.readouterr().out
    assert "events: 12 training and 6 test samples of 3 classes, (3, 2, 8, 8) uint8 each" in out
    assert "camera: 20x30 pixels" in out
    train, test = own(two)
    assert train.classes == ["class 0", "class 1", "class 2"]
    assert train.sensor == SENSOR
    assert train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    for part, each in ((train, 4), (test, 2)):
        for k in range(3 if each == 4 else 6):  # the corner's event is in no file of recording()
            assert np.array_equal(part.images[k], counted(recording(k // each, k % each))) or k == 4
    assert train.images.sum() == 12 * 60


def test_frames_of_equal_time(two, capsys):
    train, _ = own(two, split_by="time")
    assert np.array_equal(train.images[1], counted(recording(0, 1), "time"))
    assert not np.array_equal(train.images[1], own(two)[0].images[1])
    assert {x.name for x in two.iterdir() if x.is_dir()} == {
        *("train", "val", "frames_T3_by_time", "frames_T3_by_number")
    }


def test_one_folder_of_classes_is_split_like_n_caltech101(tmp_path, capsys):
    root = write_all(tmp_path, {"": 21})
    for _ in range(2):  # what is made is no class
        assert prepare(*PREPARE, root) == 0
        output = capsys.readouterr()
        assert "57 training and 6 test samples of 3 classes" in output.out
        assert "not read" not in output.err
    train, test = own(root, val_share=0.2)
    assert test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert len(train.held_out) == 11
    assert len(train) == 46


@pytest.mark.parametrize("names", [("Train", "Test"), ("train", "test"), ("TRAIN", "Val")])
def test_the_two_parts_have_the_names_that_people_give_them(names, two, tmp_path):
    expected = own(two)
    for old, new in zip(("train", "val"), names, strict=True):
        os.rename(two / old, two / f"{new}.tmp")
        os.rename(two / f"{new}.tmp", two / new)
    shutil.rmtree(two / "frames_T3_by_number")
    for before, after in zip(expected, own(two), strict=True):
        assert torch.equal(before.images, after.images)


def test_n_mnist_is_the_same_as_the_named_data_set(tmp_path):
    root = write_nmnist(tmp_path / "N-MNIST")
    # Both ends of a side, and the border, which a random recording may miss.
    corners = five_bytes(np.array([(300_000, 33, 33, 1), (300_000, 0, 0, 0)]))
    path = root / "Train" / "0" / "00001.bin"
    path.write_bytes(path.read_bytes()[:-10] + corners)
    theirs = data_sets_of("events", root, T, augment="none", image_size=(34, 34))
    assert prepare("prepare", "--data", "nmnist", "--data_path", tmp_path, "--time_window", T) == 0
    for ours, named in zip(
        theirs, data_sets_of("nmnist", tmp_path, T, augment="none"), strict=True
    ):
        assert torch.equal(ours.images, named.images)
        assert torch.equal(ours.labels, named.labels)
        assert ours.classes == named.classes
        assert ours.step == named.step


def test_unsorted_recordings_are_put_in_order(two):
    expected = own(two)[0].images[1].clone()
    events = recording(0, 1)
    order = np.argsort(np.random.default_rng(0).permutation(events[:, 0]), kind="stable")
    back = np.argsort(events[order, 0], kind="stable")
    write(two / "train/class 0/01.npy", events[order])
    assert torch.equal(own(two)[0].images[1].sum(0), expected.sum(0))
    assert np.array_equal(own(two)[0].images[1], counted(events[order][back]))


def test_a_larger_camera_can_be_given_and_a_smaller_one_is_refused(two, capsys):
    given = [*PREPARE, two, "--sensor", "40x60", "--image_size", "40x60"]
    assert prepare(*given) == 0
    assert "camera: 40x60 pixels" in capsys.readouterr().out
    whole = own(two)[0].images
    train, _ = own(two, sensor="40x60", image_size=(40, 60))
    assert torch.equal(train.images[..., :20, :30], whole)
    assert train.images.sum() == whole.sum()
    text = refused(capsys, *PREPARE, two, "--sensor", "20x29")
    assert text.startswith(f"{two / 'train/class 2/00.bin'} is damaged: ")
    assert "events beyond a 29×20 camera" in text
    assert "--sensor must be" in refused(capsys, *PREPARE, two, "--sensor", "0")
    assert "no meaning" in refused(capsys, "prepare", "--data", "nmnist", "--sensor", "34")
    assert "no meaning" in refused(capsys, "prepare", "--data", "digits", "--split_by", "time")


def test_frames_follow_the_recordings(two):
    """Those of files that have stayed are kept; what SpikingJelly may have left there, too."""
    other = two / f"frames_number_{T}_split_by_number" / "train" / "class 0" / "00.npz"
    other.parent.mkdir(parents=True)
    other.touch()
    own(two)
    frames = two / f"frames_T{T}_by_number"
    made = {x: (frames / x).stat().st_ino for x in files_below(frames)}
    own(two)
    assert made == {x: (frames / x).stat().st_ino for x in files_below(frames)}
    (two / "train/class 1/03.txt").unlink()
    write(two / "train/class 0/new.npz", recording(0, 9))
    replaced = two / "train/class 0/01.npy"
    date = replaced.stat().st_mtime_ns
    write(replaced, recording(0, 8)[:-1])
    os.utime(replaced, ns=(date, date))
    train, _ = own(two)
    assert train.labels.tolist() == [0] * 5 + [1] * 3 + [2] * 4
    assert np.array_equal(train.images[4], counted(recording(0, 9)))
    assert np.array_equal(train.images[1], counted(recording(0, 8)[:-1]))
    now = {x: (frames / x).stat().st_ino for x in files_below(frames)}
    changed = {"train/class 0/01.npz", "train/class 0/new.npz", "train/class 1/03.npz"}
    assert {x for x in made | now if made.get(x) != now.get(x)} == changed
    write(two / "val/class 2/far.npy", np.array([(0, 40, 50, 1)]))  # another camera
    assert own(two)[0].sensor == (51, 41)
    assert other.exists()


@pytest.mark.parametrize("content", [b"", b"1 2 3\n", b"1 9999999 3 1\n"])
def test_a_damaged_recording_is_named_and_can_be_skipped(content, two, capsys):
    path = two / "train/class 1/03.txt"
    path.write_bytes(content)
    assert refused(capsys, *PREPARE, two).startswith(f"{path} is damaged: ")
    run = ["--data", "events", "--data_path", str(two), "--paper_setting", "original"]
    assert main.main([*run, "--save_path", str(two / "run")]) == 2
    assert f"{path} is damaged" in capsys.readouterr().err
    for number in range(2):
        assert prepare(*PREPARE, two, "--skip_damaged") == 0
        output = capsys.readouterr()
        assert output.err.count(f"skipped: {path} is damaged") == (number == 0)
        assert "11 training and 6 test samples of 3 classes" in output.out
    assert path.read_bytes() == content
    assert len(own(two)[0]) == 11  # a training goes on without it
    write(path, recording(1, 3))
    assert len(own(two)[0]) == 12


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda x: shutil.rmtree(x / "val"), "cannot read {}/val (No such file"),
        (lambda x: shutil.rmtree(x), "expects {}/CLASS/*: cannot read {}"),
        (
            lambda x: shutil.rmtree(x / "val/class 1"),
            "{}/val lacks 1 of the classes of {}/t",
        ),
        (
            lambda x: [shutil.rmtree(y) for y in x.glob("*/class [12]")],
            "with two classes or more, found 1",
        ),
        (
            lambda x: [y.unlink() for y in (x / "val/class 1").iterdir()],
            "{}/val/class 1 holds no files *.bin *.npz",
        ),
        (
            lambda x: shutil.copy(x / "val/class 1/00.bin", x / "val/class 1/00.dat"),
            "{0}/val/class 1/00.bin and {0}/val/class 1/00.dat have one name",
        ),
    ],
)
def test_a_layout_that_cannot_be_read_is_one_line(change, expected, two, capsys):
    change(two)
    assert expected.replace("{}", "{0}").format(two) in refused(capsys, *PREPARE, two)


def test_what_is_made_goes_to_the_cache_path(two, tmp_path):
    before = files_below(two)
    assert prepare(*PREPARE, two, "--cache_path", tmp_path / "made") == 0
    assert files_below(two) == before
    assert (tmp_path / "made" / f"frames_T{T}_by_number-8x8.json").exists()


def test_a_network_is_trained_distilled_tested_and_reads_recordings(two, tmp_path, capsys):
    options = ["--data", "events", "--data_path", two, "--time_window", T, "--image_size", "10x15"]
    options += ["--width", 1, "--batch_size", 6, "--epochs", 1, "--workers", 0]
    options = [*map(str, options), "--split_by", "time"]
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    assert main.main([*options, "--paper_setting", "original", "--save_path", str(teacher)]) == 0
    last = str(teacher / "original-last.pth")
    trained = load_checkpoint(last).settings
    assert (trained.sensor, trained.split_by) == ("20x30", "time")
    assert trained.classes == ("class 0", "class 1", "class 2")
    distil = [*options, "--paper_setting", "qamd", "--bits", "4", "--teacher_path", last]
    assert main.main([*distil, "--save_path", str(student)]) == 0
    capsys.readouterr()
    by_number = [x if x != "time" else "number" for x in distil]
    assert main.main([*by_number, "--save_path", str(tmp_path / "other")]) == 2
    assert "was trained with --split_by time" in capsys.readouterr().err
    last = str(student / "qamd-last.pth")
    # Elsewhere, of a part of the sensor alone: the camera stays the trained one.
    for part in ("train", "val"):
        for path in (two / part).glob("class 2/*"):
            write(path.with_suffix(".npy"), recording(0, 0))
            if path.suffix != ".npy":
                path.unlink()
    assert main.main(["--eval_only", last, "--data_path", str(two)]) == 0
    assert "of 6" in capsys.readouterr().out
    settings = load_checkpoint(last).settings
    path = write(tmp_path / "one.npz", recording(1, 7))
    expected = counted(recording(1, 7), "time")[..., ::2, ::2]
    assert np.array_equal(read_sample(path, settings), expected)
    np.savez(tmp_path / "frames.npz", frames=counted(recording(1, 7), "time"))
    assert np.array_equal(read_sample(tmp_path / "frames.npz", settings), expected)
    files = [str(path), str(tmp_path / "frames.npz")]
    assert main.main(["--eval_only", last, "--predict", *files]) == 0
    assert "one.npz" in capsys.readouterr().out
    assert main.main(["--eval_only", last, "--predict", str(tmp_path / "teacher/x.mp4")]) == 2


# SpikingJelly's own.


def write_cifar10dvs(root: Path) -> None:
    """extract/CLASS/cifar10_CLASS_N.aedat: AEDAT 2.0 of a DVS128."""
    names = "airplane automobile bird cat deer dog frog horse ship truck"
    for label, name in enumerate(names.split(" ")):
        for number in range(11):
            rng = np.random.default_rng((label, number))
            pairs = [(int(x), 40 * k) for k, x in enumerate(rng.integers(0, 1 << 15, 50))]
            path = root / "extract" / name / f"cifar10_{name}_{number}.aedat"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(aedat2(pairs))


def write_gesture(root: Path) -> None:
    """extract/DvsGesture: recordings of AEDAT 3.1 with tables of when which gesture was made."""
    folder = root / "extract" / "DvsGesture"
    folder.mkdir(parents=True)
    for part, users in (("train", (1, 2)), ("test", (24,))):
        names = [f"user{user:02d}_led" for user in users]
        (folder / f"trials_to_{part}.txt").write_text("".join(f"{x}.aedat\n" for x in names))
        for user, name in zip(users, names, strict=True):
            rng = np.random.default_rng(user)
            t = np.sort(rng.integers(0, 12_000, 600))
            events = np.stack([t, *rng.integers(0, 128, (2, 600)), rng.integers(0, 2, 600)], axis=1)
            (folder / f"{name}.aedat").write_bytes(aedat3(events))
            rows = [f"{k + 1},{1000 * k},{1000 * k + 900}\n" for k in range(11)]
            (folder / f"{name}_labels.csv").write_text("class,start,end\n" + "".join(rows))


@pytest.mark.parametrize(
    ("data", "theirs", "folder", "write_raw", "samples"),
    [
        ("cifar10dvs", CIFAR10DVS, "CIFAR10DVS", write_cifar10dvs, (100, 10)),
        ("dvs128gesture", DVS128Gesture, "DVS128Gesture", write_gesture, (22, 11)),
    ],
)
@pytest.mark.parametrize("split_by", ["number", "time"])
def test_spikingjellys_data_sets_have_its_frames(
    data, theirs, folder, write_raw, samples, split_by, tmp_path, capsys
):
    write_raw(tmp_path / folder)
    command = ["prepare", "--data", data, "--time_window", T, "--image_size", 128]
    command += ["--split_by", split_by, "--data_path", tmp_path]
    assert prepare(*command) == 0
    assert "{} training and {} test samples".format(*samples) in capsys.readouterr().out
    other = tmp_path / "other"
    (other / "download").mkdir(parents=True)
    shutil.copytree(tmp_path / folder / "extract", other / "extract")
    for train in (True, False):
        which = {} if data == "cifar10dvs" else {"train": train}
        frames_by_spikingjelly(theirs, other, split_by, **which)
    name = f"frames_number_{T}_split_by_{split_by}"
    assert files_below(tmp_path / folder / name) == files_below(other / name)
    assert files_below(other / name)
    for path in files_below(other / name):
        ours, spikingjellys = (
            np.load(x / name / path)["frames"] for x in (tmp_path / folder, other)
        )
        assert np.array_equal(ours, spikingjellys)
    test = data_sets_of(data, tmp_path, T, image_size=(128, 128), split_by=split_by)[1]
    assert test.labels.tolist() == list(range(10 if data == "cifar10dvs" else 11))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("cifar10dvs", ("CIFAR10DVS/extract (unpacked)", "airplane.zip", "https://")),
        ("dvs128gesture", ("DVS128Gesture/extract (unpacked)", "DvsGesture.tar.gz", "https://")),
    ],
)
def test_data_sets_that_are_missing_say_what_to_get(data, said, tmp_path, capsys):
    text = refused(capsys, "prepare", "--data", data, "--data_path", tmp_path)
    assert all(x in text for x in said)


def test_a_conversion_by_spikingjelly_that_fails_is_one_line_and_leaves_nothing(tmp_path, capsys):
    write_gesture(tmp_path / "DVS128Gesture")
    (tmp_path / "DVS128Gesture/extract/DvsGesture/user02_led_labels.csv").write_text("class\nX")
    text = refused(capsys, "prepare", "--data", "dvs128gesture", "--data_path", tmp_path)
    assert "spikingjelly cannot convert" in text
    assert {x.name for x in (tmp_path / "DVS128Gesture").iterdir()} == {"extract"}
