"""--init_from: fine-tuning, from a network of other classes too."""

import numpy as np
import pytest
import torch
from PIL import Image

import main
from checkpoints import load_checkpoint
from conftest import refused
from load_settings import load_network
from runtime.errors import UserError

OPTIONS = ["--width", "4", "--time_window", "2", "--workers", "0", "--batch_size", "64"]


def run(*options: object) -> int:
    return main.main([*map(str, (*options, *OPTIONS))])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A network of ten digits, of 16x16 grey pixels."""
    folder = tmp_path_factory.mktemp("digits")
    options = "--data digits --arch vgg9 --paper_setting original --epochs 1"
    assert run(*options.split(), "--save_path", folder) == 0
    return folder / "original-last.pth"


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Three classes of one's own, in colour."""
    root, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for part in ("train", "val"):
        for label, name in enumerate(("red", "green", "blue")):
            (root / part / name).mkdir(parents=True)
            for number in range(6):
                image = random.integers(0, 100, (16, 16, 3))
                image[..., label] += 120
                path = root / part / name / f"{number}.png"
                Image.fromarray(image.astype(np.uint8)).save(path)
    return root


ON_DIGITS = ["--data", "digits", "--arch", "vgg9", "--epochs", "1", "--lr", "0"]


def test_a_network_of_the_same_classes_is_copied_with_its_classifier(teacher, tmp_path, capsys):
    start = "--paper_setting", "original", "--init_from", teacher, "--save_path", tmp_path
    assert run(*ON_DIGITS, *start, "--seed", 5) == 0
    said = capsys.readouterr().out
    assert f"start     {teacher}: " in said
    assert "all but the classifier" not in said
    theirs, ours = load_checkpoint(teacher), load_checkpoint(tmp_path / "original-last.pth")
    assert ours.settings.init_from == str(teacher)
    for name, x in ours.model.items():
        if "running" not in name and "num_batches" not in name:
            assert torch.equal(x, theirs.model[name]), name


def test_a_student_and_its_fine_tuning_keep_what_was_learned(teacher, tmp_path):
    student = "--paper_setting", "student", "--bits", 8
    first, second = tmp_path / "first", tmp_path / "second"
    assert run(*ON_DIGITS, *student, "--init_from", teacher, "--save_path", first) == 0
    path = first / "student-last.pth"
    assert run(*ON_DIGITS, *student, "--init_from", path, "--save_path", second) == 0
    weights, taught = load_checkpoint(path).model, load_checkpoint(teacher).model
    for name, x in load_checkpoint(second / "student-last.pth").model.items():
        if "running" not in name and "num_batches" not in name:
            assert torch.equal(x, weights[name]), name  # steps too
            assert name not in taught or torch.equal(x, taught[name]), name
    distilled = "--paper_setting", "qamd", "--bits", 8, "--teacher_path", teacher
    third = tmp_path / "third"
    assert run(*ON_DIGITS, *distilled, "--init_from", path, "--save_path", third) == 0
    steps = {name: x for name, x in weights.items() if name.endswith("quantizer.step")}
    ours = load_checkpoint(third / "qamd-last.pth").model
    assert all(torch.equal(ours[name], x) for name, x in steps.items())


def test_steps_that_are_learned_start_as_those_of_a_plain_student(teacher, tmp_path):
    taught = "--paper_setting", "qamd", "--bits", 8, "--teacher_path", teacher, "--loss"
    steps = {}
    for loss in ("CL", "CLK"):
        assert run(*ON_DIGITS, *taught, loss, "--save_path", tmp_path / loss) == 0
        network = load_network(tmp_path / loss / "qamd-last.pth")
        steps[loss] = [x.quantizer.step.item() for x in network.neurons().values()]
    assert steps["CL"] == [pytest.approx(2 * 0.5 / 127)] * len(steps["CL"])
    assert all(step > 2 * 0.5 / 127 for step in steps["CLK"])


def test_other_classes_get_a_classifier_of_their_own(teacher, colours, tmp_path, capsys):
    three = tmp_path / "three"
    shape = "--data", "folder", "--data_path", colours, "--image_size", 16, "--arch", "vgg9"
    options = *shape, "--paper_setting", "original", "--epochs", 1, "--lr", 0, "--batch_size", 6
    assert run(*options, "--save_path", three) == 0
    four = tmp_path / "four"
    for part in ("train", "val"):
        for number in range(4):
            (four / part / f"class{number}").mkdir(parents=True)
            picture = colours / part / "red" / f"{number}.png"
            for copy in range(3):
                target = four / part / f"class{number}" / f"{copy}.png"
                target.write_bytes(picture.read_bytes())
    options = [four if x is colours else x for x in options]
    start = "--init_from", three / "original-last.pth", "--save_path", tmp_path / "fine"
    capsys.readouterr()
    assert run(*options, *start) == 0
    assert "all but the classifier" in capsys.readouterr().out
    theirs = load_checkpoint(three / "original-last.pth").model
    ours = load_checkpoint(tmp_path / "fine" / "original-last.pth").model
    assert ours["linear.weight"].shape[0] == 4
    assert theirs["linear.weight"].shape[0] == 3
    for name, x in ours.items():
        if name.endswith(("conv.weight", "bn.weight", "bn.bias")):
            assert torch.equal(x, theirs[name]), name


def test_a_run_that_was_stopped_goes_on_from_its_own_weights(teacher, tmp_path, monkeypatch):
    options = [*ON_DIGITS[:-4], "--paper_setting", "original", "--init_from", teacher]
    options += ["--epochs", 2]
    assert run(*options, "--save_path", tmp_path / "a") == 0

    def stop(*_: object) -> None:
        raise UserError("stopped before the first evaluation")

    with monkeypatch.context() as stopped:
        stopped.setattr(main, "evaluate_epoch", stop)
        assert run(*options, "--save_path", tmp_path / "b") == 2
    assert run(*options, "--save_path", tmp_path / "b", "--resume") == 0
    a, b = (load_checkpoint(tmp_path / x / "original-last.pth") for x in "ab")
    assert a.epoch == b.epoch == 2
    assert all(torch.equal(x, b.model[name]) for name, x in a.model.items())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--arch vgg16", "is of VGG-9, this network of VGG-16: a network starts from one of the"),
        ("--arch vgg9 --width 8", "is of width 4, this network of width 8"),
        ("--arch vgg9 --leak 0.5", "is of leak 0.25, this network of leak 0.5"),
        ("--arch vgg9 --fold 1", "was trained without --fold: on test images of this run"),
        (
            "--arch vgg9 --data digits-dvs",
            "does not fit images of digits-dvs of 24x24 in 2 channels, it was trained on digits of "
            "16x16 in 1 channels: stem.conv.weight is 4 x 1 x 3 x 3 there, and 4 x 2 x 3 x 3 here",
        ),
        (
            "--arch vgg9 --paper_setting student --bits 4 --teacher_path T --init_from_teacher",
            "leave one of the two out",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(options, said, teacher, tmp_path, capsys):
    words = [teacher if word == "T" else word for word in options.split()]
    given = "--data", "digits", "--paper_setting", "original", "--init_from", teacher
    where = "--width", "4", *words, "--save_path", tmp_path / "run"
    assert said in refused(capsys, main.main, [*map(str, (*given, *where))])


def test_a_quantized_network_starts_those_of_the_same_widths_alone(teacher, tmp_path, capsys):
    student = "--paper_setting", "student", "--init_from", teacher, "--save_path", tmp_path / "a"
    assert run(*ON_DIGITS, *student, "--bits", 4) == 0
    start = "--init_from", tmp_path / "a" / "student-last.pth", "--save_path", tmp_path / "b"
    for others in (
        ["original"],
        ["student", "--bits", 3],
        ["student", "--bits", 4, "--bn_bits", 9],
    ):
        assert run(*ON_DIGITS, "--paper_setting", *others, *start) == 2
        assert "is a network of 4 bits, 8 in batch norm" in capsys.readouterr().err


def test_what_a_network_has_at_another_size_alone_is_one_line(tmp_path, capsys):
    """A network of one's own may have other layers for other images: none may stay at random."""
    file = tmp_path / "nets.py"
    file.write_text(
        """
from torch import nn

from models import SpikingNetwork


class BySize(SpikingNetwork):
    def build(self, channels, image_size, layers):
        self.lifs = nn.ModuleList([layers.lif() for _ in range(image_size[0] // 12)])
        convs = [layers.conv(channels, channels, 3) for _ in self.lifs[1:]]
        self.convs = nn.ModuleList(convs)
        self.bns = nn.ModuleList([layers.batch_norm(channels, 0.5) for _ in convs])
        return channels

    def spikes(self, x, time_window, watch):
        x = self.lifs[0](x, time_window, watch)
        for conv, bn, lif in zip(self.convs, self.bns, self.lifs[1:], strict=True):
            x = lif(bn(conv(x)), time_window, watch)
        return x
"""
    )
    pictures = tmp_path / "pictures"
    for number, path in enumerate(("train/a", "train/b", "val/a", "val/b")):
        (pictures / path).mkdir(parents=True)
        for copy in range(4):
            Image.new("RGB", (30, 30), (60 * number, 90, 0)).save(pictures / path / f"{copy}.png")
    data = "--data", "folder", "--data_path", pictures, "--epochs", 1, "--batch_size", 4
    network = "--arch", f"{file}:BySize", "--paper_setting", "original"
    starts = {}
    for side in (24, 36):
        assert run(*data, *network, "--image_size", side, "--save_path", tmp_path / str(side)) == 0
        starts[side] = tmp_path / str(side) / "original-last.pth"
    for side, other in ((24, 36), (36, 24)):
        start = "--image_size", side, "--init_from", starts[other], "--save_path", tmp_path / "run"
        error = refused(capsys, run, *data, *network, *start)
        assert "convs.1.weight is " in error
        assert "missing" in error
        assert not (tmp_path / "run").exists()
