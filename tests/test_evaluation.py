"""--eval_only beyond one accuracy: each class, JSON, single files, and the network from Python."""

import csv
import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import main
from checkpoints import class_names, load_checkpoint
from conftest import DIGITS, REPOSITORY, evaluated, refused
from data_loader import ImageSet, read_sample
from data_sets.event_camera import as_atis
from engine import eval_only
from load_settings import load_network
from loading import data_sets_of
from models import MSResNet
from stand_in_data import write_image_folder, write_ncaltech101, write_tiny_imagenet
from warm import launched


@pytest.fixture(scope="module")
def test_set() -> ImageSet:
    return data_sets_of("digits", ".", 4)[1]


@pytest.fixture(scope="module")
def checkpoint(trained, tmp_path_factory) -> Path:
    """A student's, in a folder of its own."""
    return Path(shutil.copy(trained["student"], tmp_path_factory.mktemp("evaluated") / "s.pth"))


def rows_of(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_per_class_counts_each_test_image_once_and_its_files_say_what_json_says(
    checkpoint, test_set, capfd
):
    found = evaluated(capfd, checkpoint, "--per_class", "--integer")
    folder = checkpoint.with_name("s-classes")
    assert {path.name for path in folder.iterdir()} == set(eval_only.FILES)
    assert json.loads((folder / "evaluation.json").read_text()) == found

    # an independent count
    expected = np.zeros((10, 10), int)
    with torch.no_grad():
        logits = load_network(checkpoint)(torch.stack([image for image, _ in test_set]))
    for (_, label), prediction in zip(test_set, logits.argmax(1), strict=True):
        expected[label, prediction] += 1
    header, *lines = rows_of(folder / "confusion.csv")
    assert header[1:] == [line[0] for line in lines] == list("0123456789")
    assert np.array_equal(np.array(lines)[:, 1:].astype(int), expected)
    assert [x["images"] for x in found["classes"]] == expected.sum(axis=1).tolist()
    assert [x["correct"] for x in found["classes"]] == expected.diagonal().tolist()
    for row, counts in zip(found["classes"], expected, strict=True):  # changes `expected`
        assert row["accuracy"] == row["correct"] / row["images"]
        counts[int(row["class"])] = 0
        assert row["images_taken_for_it"] == counts.max()
        if counts.max():
            assert counts[int(row["most_often_taken_for"])] == counts.max()
    header, *lines = rows_of(folder / "classes.csv")
    assert header == list(found["classes"][0])
    assert [line[0] for line in lines] == list("0123456789")

    assert found["correct"] == sum(x["correct"] for x in found["classes"])
    assert (found["images"], found["accuracy"]) == (360, found["correct"] / 360)
    assert found["integers"]["differing_spikes"] == 0
    assert found["integers"]["correct"] == found["correct"]
    assert Image.open(folder / "confusion.png").size > (300, 300)
    assert (folder / "confusion.pdf").read_bytes().startswith(b"%PDF")


def test_without_json_the_same_is_said_in_lines(checkpoint, tmp_path, capfd):
    folder = tmp_path / "new" / "folder"
    out = ["--per_class", "--out", str(folder)]
    assert main.main(["--eval_only", str(checkpoint), "--workers", "0", *out]) == 0
    accuracy, header, *lines, where = capfd.readouterr().out.splitlines()
    assert accuracy.startswith("accuracy ")
    assert "of 360 test images), spike rate" in accuracy
    assert header.split()[:3] == ["class", "images", "accuracy"]
    assert [line.split()[0] for line in lines] == list("0123456789")
    files, _, named = where.partition(" are in ")
    assert named == str(folder)
    assert set(files.split(", ")) == {path.name for path in folder.iterdir()}


def test_what_per_class_has_not_written_itself_is_not_overwritten(
    checkpoint, trained, tmp_path, capfd, monkeypatch
):
    (tmp_path / "confusion.png").write_text("mine")
    (tmp_path / "notes.txt").write_text("mine")
    arguments = ["--eval_only", str(checkpoint), "--per_class", "--out", str(tmp_path)]
    assert f"{tmp_path} holds confusion.png of something else than" in refused(
        capfd, main.main, arguments
    )
    assert (tmp_path / "confusion.png").read_text() == "mine"
    (tmp_path / "confusion.png").unlink()
    assert main.main([*arguments, "--workers", "0"]) == 0
    capfd.readouterr()
    monkeypatch.setattr(eval_only, "load_same_data", None)  # refused before anything is read
    other = ["--eval_only", str(trained["qamd"]), *arguments[2:]]
    assert "holds evaluation.json of something else" in refused(capfd, main.main, other)
    monkeypatch.undo()
    first = (tmp_path / "evaluation.json").read_bytes()
    assert main.main([*arguments, "--workers", "0"]) == 0  # its own result, anew
    capfd.readouterr()
    assert (tmp_path / "evaluation.json").read_bytes() == first
    assert (tmp_path / "notes.txt").read_text() == "mine"
    (tmp_path / "file").touch()
    inside = [*arguments[:-1], str(tmp_path / "file" / "x")]
    assert "choose another --out" in refused(capfd, main.main, inside)


def test_with_json_nothing_else_is_on_stdout(checkpoint, capfd, monkeypatch):
    monkeypatch.setattr("engine.data.input_text", lambda _: "what is told of the data")
    assert main.main(["--eval_only", str(checkpoint), "--json", "--workers", "0"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["checkpoint"] == str(checkpoint)
    assert "what is told of the data" in err


def test_two_processes_find_what_one_finds(checkpoint, capfd, tmp_path):
    options = ["--per_class", "--amp", "--out"]
    one = evaluated(capfd, checkpoint, *options, tmp_path / "one")
    json_too = ["--eval_only", str(checkpoint), *options, str(tmp_path / "two"), "--json"]
    two = launched(2, REPOSITORY / "main.py", *json_too, cwd=tmp_path)
    assert two.returncode == 0, two.stderr[-3000:]
    two = json.loads(two.stdout)
    assert two.pop("cross_entropy") == pytest.approx(one.pop("cross_entropy"), rel=1e-6)
    assert two == one
    for name in ("classes.csv", "confusion.csv"):
        assert (tmp_path / "one" / name).read_text() == (tmp_path / "two" / name).read_text()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--out", "x"], "--out goes with --per_class"),
        (["--per_class", "--out", "a\0b"], "--out holds a control character"),
        (["--predict", "x.png", "--integer"], "leave --integer out"),
        (["--predict", "x.png", "--per_class"], "leave --per_class out"),
        (["--predict", "x.png", "--compile"], "leave --compile out"),
        (["--predict"], "expected at least one argument"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, expected, checkpoint, capfd):
    assert expected in refused(capfd, main.main, ["--eval_only", str(checkpoint), *options])


@pytest.mark.parametrize("option", ["--per_class", "--json", "--predict x.png", "--out x"])
def test_they_have_no_meaning_for_a_training(option, capfd):
    line = refused(capfd, main.main, [*DIGITS, "--paper_setting", "original", *option.split()])
    assert f"{option.split()[0]} goes with --eval_only CKPT" in line


@pytest.fixture(scope="module")
def images(test_set, tmp_path_factory) -> list[Path]:
    """The first test images as files of several kinds."""
    folder = tmp_path_factory.mktemp("images")
    paths = [folder / name for name in ("a.png", "b.bmp", "c.tif", "d.png")]
    for path, image in zip(paths, test_set.images, strict=False):
        Image.fromarray(image[0].numpy()).save(path)
    return paths


def test_predict_reads_a_file_as_the_data_set_s_images_are_read(
    checkpoint, images, test_set, capfd
):
    settings = load_checkpoint(checkpoint).settings
    for path, image in zip(images, test_set.images, strict=False):
        assert np.array_equal(read_sample(path, settings), image.numpy())
    options = ["--eval_only", str(checkpoint), "--predict", *map(str, images)]
    found = evaluated(capfd, checkpoint, *options[2:], "--data_path", "not there")["predictions"]
    inputs = torch.stack([test_set[i][0] for i in range(len(images))])
    with torch.no_grad():
        expected = load_network(checkpoint)(inputs).softmax(1)
    assert [one["file"] for one in found] == list(map(str, images))
    for one, shares in zip(found, expected, strict=True):
        assert [int(x["class"]) for x in one["classes"]] == shares.topk(3).indices.tolist()
        assert [x["share"] for x in one["classes"]] == pytest.approx(shares.topk(3).values.tolist())
    assert main.main(options) == 0
    first = capfd.readouterr().out.splitlines()[0]
    best = found[0]["classes"][0]
    assert first.startswith(f"{images[0]}: {best['class']} ({100 * best['share']:.1f} %), ")
    assert main.main([*options, "--amp"]) == 0


def test_predict_scales_images_and_names_the_classes_of_a_folder(tmp_path, capfd):
    data = write_image_folder(tmp_path / "pictures")
    options = ["--data", "folder", "--data_path", str(data), "--image_size", "16", "--width", "1"]
    options += ["--paper_setting", "original", "--epochs", "1", "--workers", "0"]
    assert main.main([*options, "--save_path", str(tmp_path / "run")]) == 0
    last = tmp_path / "run" / "original-last.pth"
    test = data_sets_of("folder", data, 4, image_size=(16, 16))[1]
    file = sorted((data / "val").glob("*/*"))[0]
    settings = load_checkpoint(last).settings
    assert np.array_equal(read_sample(file, settings), test.images[0].numpy())
    shutil.rmtree(data / "train")  # the network alone is enough
    capfd.readouterr()
    found = evaluated(capfd, last, "--predict", file)
    names = {x["class"] for x in found["predictions"][0]["classes"]}
    assert names <= {path.name for path in (data / "val").iterdir()}


def test_predict_refuses_what_it_cannot_read(checkpoint, images, tmp_path, capfd):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "image.png").symlink_to("nowhere")
    for file, expected in (
        (images[0].with_name("a.pgn"), f"a.pgn is no file: did you mean {images[0]}?"),
        (images[0].parent, "is a folder, not a file"),
        (tmp_path / "text.png", "text.png cannot be read (it is no image): "),
        (tmp_path / "image.png", "is no file"),
        ("a\0b", "is no file"),
        ("\udcff", "is no file"),
    ):
        options = ["--eval_only", str(checkpoint), "--predict", str(images[0]), str(file)]
        assert expected in refused(capfd, main.main, options)


def test_predict_reads_frames_and_raw_events(tmp_path, capfd, monkeypatch):
    """A network for events that was never trained: what it reads is what counts."""
    options = ["--data", "ncaltech101", "--paper_setting", "original", "--width", "1"]
    options += ["--time_window", "2", "--epochs", "1", "--workers", "0", "--image_size", "18x24"]
    write_ncaltech101(tmp_path, time_window=2, classes=2, per_class=3)
    options += ["--data_path", str(tmp_path), "--save_path", str(tmp_path / "run")]
    assert main.main(options) == 0
    last = tmp_path / "run" / "original-last.pth"
    settings, network = load_checkpoint(last).settings, load_network(last)
    test = data_sets_of("ncaltech101", tmp_path, 2, image_size=(18, 24))[1]
    frames = sorted((tmp_path / "N-Caltech101").glob("frames_number_2*/*/*.npz"))
    (file,) = [
        path for path in frames if np.array_equal(read_sample(path, settings), test.images[0])
    ]
    assert test.classes == class_names(load_checkpoint(last))[:2]
    with torch.no_grad():
        expected = network(torch.stack([test[0][0]])).softmax(1)
    assert torch.equal(network.predict(read_sample(file, settings)[None]), expected)

    t, x, y, p = np.arange(40), np.arange(40) * 5, np.arange(40) * 4, np.arange(40) % 2
    (tmp_path / "raw.bin").write_bytes(as_atis(t, x, y, p))
    counts = read_sample(tmp_path / "raw.bin", settings)
    assert counts.shape == (2, 2, 18, 24)
    # every tenth row and column of the camera is read
    seen = (x % 10 == 0) & (y % 10 == 0)
    assert counts.sum() == seen.sum() > 0
    found = evaluated(capfd, last, "--predict", file, tmp_path / "raw.bin")
    assert len(found["predictions"]) == 2
    (tmp_path / "x.png").touch()
    options = ["--eval_only", str(last), "--predict", str(tmp_path / "x.png")]
    line = refused(capfd, main.main, options)
    assert "is no file of events (.bin, .npz, " in line
    assert ") or of 2 frames" in line


def test_a_network_predicts_from_python_what_main_py_evaluates(checkpoint, test_set, capfd):
    network = load_network(str(checkpoint))
    shares = network.predict(test_set.images)

    found = evaluated(capfd, checkpoint)
    assert (shares.argmax(1) == test_set.labels).sum() == found["correct"]
    assert shares.shape == (360, 10)
    torch.testing.assert_close(shares.sum(1), torch.ones(360))
    assert not shares.requires_grad
    assert network.class_names == list("0123456789")

    pixels = test_set.images.numpy()
    for same in (
        pixels,
        pixels[:, :, ::-1].copy()[:, :, ::-1],  # negative strides
        (pixels / 255).astype(np.float32),
        (test_set.images / 255).double(),
        (pixels / 255).astype(">f8"),
    ):
        assert torch.equal(network.predict(same), shares)
    network.train()
    assert torch.equal(network.predict(pixels[:3]), shares[:3])
    assert network.training


@pytest.mark.parametrize(
    ("images", "error", "expected"),
    [
        (np.zeros((16, 16), np.uint8), ValueError, "(B, C, H, W) = (B, 1, 16, 16), got (16, 16)"),
        (np.zeros((2, 16, 16, 1), np.uint8), ValueError, "got (2, 16, 16, 1)"),
        (torch.zeros(2, 3, 16, 16), ValueError, "got (2, 3, 16, 16)"),
        (torch.zeros(2, 1, 32, 32), ValueError, "got (2, 1, 32, 32)"),
        (torch.zeros(2, 4, 1, 16, 16), ValueError, "got (2, 4, 1, 16, 16)"),
        (torch.zeros(0, 1, 16, 16), ValueError, "got (0, 1, 16, 16)"),
        (torch.zeros(2, 1, 16, 16, dtype=torch.int64), TypeError, "got torch.int64"),
        (np.zeros((2, 1, 16, 16), bool), TypeError, "got torch.bool"),
        (np.zeros((2, 1, 16, 16), object), TypeError, "an array of numbers"),
        ([[0.0]], TypeError, "got <class 'list'>"),
        (torch.full((1, 1, 16, 16), 255.0), ValueError, "floats from 0 to 1 (or uint8 from 0"),
        (torch.full((1, 1, 16, 16), torch.nan), ValueError, "got values from nan"),
        (torch.full((1, 1, 16, 16), -0.1), ValueError, "got values from -0.1"),
    ],
)
def test_predict_says_what_it_expects(images, error, expected, checkpoint):
    with pytest.raises(error) as raised:
        load_network(checkpoint).predict(images)
    assert expected in str(raised.value)


def test_a_network_that_no_checkpoint_describes_predicts_too():
    torch.manual_seed(0)
    network = MSResNet(18, 3, 2, in_channels=2, width=1).eval()
    frames = torch.randint(0, 3, (300, 2, 2, 9, 11))  # more than are predicted at once
    with torch.no_grad():
        expected = network(frames.float()).softmax(1)
    torch.testing.assert_close(network.predict(frames), expected)
    with pytest.raises(ValueError, match="got \\(1, 3, 2, 9, 11\\)"):
        network.predict(torch.zeros(1, 3, 2, 9, 11))


def test_tiny_imagenet_s_classes_have_their_words(tmp_path):
    root = write_tiny_imagenet(tmp_path, classes=2, per_class=2, val_per_class=1)
    wnids = sorted((root / "wnids.txt").read_text().split())
    (root / "words.txt").write_text(f"{wnids[0]}\tgoldfish, Carassius auratus\nn1\tother\n")
    for part in data_sets_of("TinyImagenet", tmp_path, 4):
        assert part.classes == ["goldfish", wnids[1]]


def test_an_older_checkpoint_has_numbers_for_names(trained, tmp_path):
    content = torch.load(trained["original"], weights_only=True)
    assert content["class_names"] == list("0123456789")
    for names in (None, [1, 2], "ab"):
        torch.save(content | {"class_names": names}, tmp_path / "old.pth")
        assert load_network(tmp_path / "old.pth").class_names == list("0123456789")
    torch.save(content | {"class_names": ["zero", "one"]}, tmp_path / "old.pth")
    assert load_network(tmp_path / "old.pth").class_names == ["zero", "one", *"23456789"]


def test_a_picture_of_many_classes_with_any_names_is_drawn():
    names = [f"a_long name {i} $x$ \\" * 2 for i in range(120)]
    confusion = np.diag(np.arange(120))
    figure = eval_only.picture(confusion, names)
    figure.canvas.draw()
    (panel, _) = figure.axes
    labels = [x.get_window_extent() for x in panel.get_yticklabels()]
    assert not any(a.overlaps(b) for a, b in pairwise(labels))
