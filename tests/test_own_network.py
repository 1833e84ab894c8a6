"""A network of one's own, from a file outside of the repository, through all that there is."""

import os
import re
from pathlib import Path

import pytest

import main
from checkpoints import OWN
from conftest import evaluated, refused, reported
from load_settings import load_network, parse_settings
from runtime.errors import UserError

TINY = """
from torch import nn

from models import SpikingNetwork


class Tiny(SpikingNetwork):
    def build(self, channels, image_size, layers):
        self.last = layers.lif()  # not in the order in which they run
        self.lif, self.pool = layers.lif(), nn.MaxPool2d(2)
        self.conv = layers.conv(channels, 2 * channels, 3)
        self.bn = layers.batch_norm(2 * channels, layers.threshold)
        return 2 * channels

    def spikes(self, x, time_window, watch):
        x = self.pool(self.lif(x, time_window, watch))
        return self.last(self.bn(self.conv(x)), time_window, watch)
"""
PAGE = Path(__file__).parent.parent / "docs" / "extend.md"
OPTIONS = ["--data", "digits", "--width", "4", "--epochs", "1", "--time_window", "2"]
OPTIONS += ["--workers", "0", "--batch_size", "128"]


@pytest.fixture(autouse=True)
def nothing_named_yet():
    OWN.clear()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "nets.py"
    path.write_text(TINY)
    return path


def run(*options: object) -> int:
    return main.main([*map(str, options)])


def train(setting: str, arch: str, folder, *more: object) -> int:
    return run(*OPTIONS, "--paper_setting", setting, "--arch", arch, "--save_path", folder, *more)


def test_it_is_trained_distilled_evaluated_in_integers_and_reported(tmp_path, capsys):
    file = tmp_path / "nets.py"
    code = re.search(r"```python\n(# nets\.py\n.*?)```", PAGE.read_text(), re.DOTALL)[1]
    file.write_text(code)
    arch = f"{file}:Small"
    teacher, clk = tmp_path / "teacher" / "original-best.pth", tmp_path / "clk" / "qamd-best.pth"
    assert train("original", arch, teacher.parent) == 0
    taught = "--bits", 4, "--teacher_path", teacher, "--init_from_teacher"
    assert train("qamd", arch, clk.parent, *taught) == 0
    assert "Quan-Small, width 4" in capsys.readouterr().out
    OWN.clear()  # another process: the file is found by the checkpoint alone
    integers = evaluated(capsys, clk, "--integer")["integers"]
    assert integers["differing_spikes"] == 0 < integers["spikes"]
    layers = reported(tmp_path / "report", f"--checkpoint {clk} --baseline {teacher}")["layers"]
    assert [layer["name"] for layer in layers] == ["stem.conv", "conv2", "conv3", "linear"]

    assert train("qamd", arch, clk.parent, *taught, "--resume", "--epochs", 2) == 0
    file.write_text(code + "\n")
    OWN.clear()
    assert train("qamd", arch, clk.parent, *taught, "--resume", "--epochs", 2) == 2
    assert "another file of --arch" in capsys.readouterr().err


def test_a_checkpoint_runs_no_file_but_its_own(file, tmp_path, capsys):
    arch, path = f"{file}:Tiny", tmp_path / "run" / "original-last.pth"
    assert train("original", arch, path.parent) == 0
    ran = tmp_path / "ran"
    file.write_text(TINY + f"\nopen({str(ran)!r}, 'w')\n")
    OWN.clear()
    assert "Tiny of" in (said := refused(capsys, run, "--eval_only", path))
    assert "has changed since: put the file back, or name it with main.py's --arch" in said
    assert not ran.exists()
    assert run("--eval_only", path, "--arch", arch) == 0  # who names it says that it may run
    assert "is not the file that" in capsys.readouterr().err
    assert ran.exists()
    file.unlink()
    OWN.clear()
    with pytest.raises(UserError, match=r"Tiny of .*nets\.py, which is not there"):
        load_network(path)

    there = tmp_path / "there" / "mine.py"
    there.parent.mkdir()
    there.write_text(TINY)
    assert run("--eval_only", path, "--arch", f"{there}:Tiny") == 0
    taught = "--bits", 2, "--teacher_path", path
    assert train("qamd", f"{there}:Tiny", tmp_path / "student", *taught) == 0


def test_a_copied_folder_and_a_relative_path_are_enough(file, tmp_path, monkeypatch):
    monkeypatch.chdir(file.parent)
    settings = parse_settings([*OPTIONS, "--paper_setting", "original", "--arch", "nets.py:Tiny"])
    assert settings.arch == f"{file}:Tiny"
    assert os.path.basename(settings.save_path).split("-")[:3] == ["digits", "original", "Tiny"]


BROKEN = {
    "class Other": ("class Tiny", "no class Tiny of SpikingNetwork in the file: it has Other"),
    "import nothing_there": ("from torch import nn", "running the file fails: ModuleNotFoundError"),
    "raise SystemExit(3)": ("from torch import nn", "running the file fails: SystemExit: 3"),
    "nn.AvgPool2d(2)": ("nn.MaxPool2d(2)", "calls avg_pool2d"),
    "layers.lif(), nn.Conv2d(4, 4, 3)": ("layers.lif(), nn.MaxPool2d(2)", "it calls conv2d"),
    "return self.bn(self.conv(x))": (
        "return self.last(self.bn(self.conv(x)), time_window, watch)",
        "the last layer of a network must be a LIF layer",
    ),
    "self.last(self.conv(x)": ("self.last(self.bn(self.conv(x))", "conv needs a batch norm"),
    "self.pool(x)\n        self.lif(x, time_window, watch)": (
        "self.pool(self.lif(x, time_window, watch))",
        "pool reads the real values behind a batch norm, and should read spikes",
    ),
    "x = x\n": ("x = self.pool(self.lif(x, time_window, watch))\n", "conv reads no spikes"),
    "self.conv(x + x)": ("self.conv(x)", "an addition reads spikes, and should read"),
    "x, s = self.lif(x, time_window, watch), x\n        x = self.pool(x) + self.pool(x)": (
        "x = self.pool(self.lif(x, time_window, watch))",
        "pool is used twice",
    ),
    "x = self.lif(x, time_window, watch) + x": (
        "x = self.pool(self.lif(x, time_window, watch))",
        "an addition reads spikes, and should read the real values behind a batch norm",
    ),
    "layers.conv(channels, 3": (
        "layers.conv(channels, 2 * channels",
        "bn is for 8 channels, and reads 3",
    ),
    "return 7": ("return 2 * channels", "spikes of 8 channels, and `build` returned 7"),
    "layers.nothing(": ("layers.conv(", "line 11: AttributeError: 'Layers' object"),
    "self.conv(self.last(x, time_window, watch))": ("self.conv(x)", "last reads spikes, and"),
    "y = self.bn(self.conv(x))\n        return self.last(y.add(y, alpha=2), time_window, watch)": (
        "return self.last(self.bn(self.conv(x)), time_window, watch)",
        "it calls add",
    ),
    # Nobody would be told of these: they train, and mean something else.
    "self.lif(x, time_window)": ("self.lif(x, time_window, watch)", "lif is not given `watch`"),
    "self.lif(x, 2, watch)": (
        "self.lif(x, time_window, watch)",
        "lif is not given the time_window",
    ),
    "nn.MaxPool2d(2, dilation=3)": ("nn.MaxPool2d(2)", "pool has a dilation"),
    "__import__('models.layers').layers.Conv2d(": ("layers.conv(", "conv is not made by `layers`"),
    "__import__('models.neuron').neuron.LIF()": ("layers.lif()", "last is not made by `layers`"),
    "__import__('models.batch_norm').batch_norm.BatchNorm(": (
        "layers.batch_norm(",
        "bn is not made by `layers`",
    ),
}


@pytest.mark.parametrize("new", BROKEN)
def test_what_is_no_network_for_a_chip_is_one_line_before_any_work(new, file, tmp_path, capsys):
    old, said = BROKEN[new]
    assert old in TINY
    file.write_text(TINY.replace(old, new))
    line = refused(capsys, train, "original", f"{file}:Tiny", tmp_path / "run")
    assert f"--arch {file}:Tiny: " in line
    assert said in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--arch vgg11", "invalid choice: 'vgg11': did you mean vgg16?"),
        ("--arch vgg9 --model_depth 18", "--model_depth has no meaning with --arch vgg9"),
        ("--arch resnet18 --model_depth 34", "--arch resnet18 is no --model_depth 34"),
        ("--arch nowhere.py:Tiny", "there is no file"),
        ("--arch vgg9 --data folder --image_size 16x8 --data_path DATA", "images must be square"),
    ],
)
def test_a_wrong_arch_is_one_line(options, said, tmp_path, capsys):
    for part in "train/a", "train/b", "val/a", "val/b":
        (tmp_path / "DATA" / part).mkdir(parents=True)
    words = options.replace("DATA", str(tmp_path / "DATA")).split()
    assert said in refused(capsys, run, "--data", "digits", "--paper_setting", "original", *words)
