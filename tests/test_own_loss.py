"""A loss of one's own, from outside of the repository: the script of docs/extend.md."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

import distiller
import main
from conftest import evaluated
from distiller import Distiller
from models import MSResNet, QuanMSResNet
from spikesim_eval.__main__ import main as spikesim

PAGE = Path(__file__).parent.parent / "docs" / "extend.md"
OPTIONS = ["--data", "digits", "--arch", "vgg9", "--width", "4", "--epochs", "1"]
OPTIONS += ["--time_window", "2", "--workers", "0"]


@pytest.fixture
def script(tmp_path, monkeypatch):
    """The page's file; runs it as `python cosine.py OPTIONS` does, and returns its exit code."""
    path = tmp_path / "cosine.py"
    path.write_text(re.search(r"```python\n(# cosine\.py\n.*?)```", PAGE.read_text(), re.DOTALL)[1])

    def run(*options: object) -> int:
        losses, betas = dict(distiller.MEMBRANE_LOSSES), dict(distiller.BETA)
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, options)])
        try:
            with pytest.raises(SystemExit) as ended:
                runpy.run_path(str(path), run_name="__main__")
            return ended.value.code
        finally:  # what a process of its own leaves behind
            for table, before in ((distiller.MEMBRANE_LOSSES, losses), (distiller.BETA, betas)):
                table.clear()
                table.update(before)

    return run


def test_it_trains_and_what_it_trained_is_evaluated_without_it(script, tmp_path, capsys):
    teacher, student = tmp_path / "teacher" / "original-best.pth", tmp_path / "cos"
    original = [*OPTIONS, "--paper_setting", "original", "--save_path", str(teacher.parent)]
    assert main.main(original) == 0
    capsys.readouterr()
    options = [*OPTIONS, "--paper_setting", "qamd", "--bits", 4, "--teacher_path", teacher]
    options += ["--save_path", student]
    assert script(*options, "--loss", "COS", "--beta_schedule", "constant") == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("1/1"))
    loss, ce, logit, membrane = map(float, re.findall(r"[\d.]+", line.partition("loss")[2])[:4])
    assert 0 < membrane < 2  # 1 - cosine
    assert loss == pytest.approx(ce + logit + 5 * membrane, rel=0.02)

    path = student / "qamd-best.pth"
    assert evaluated(capsys, path, "--integer")["integers"]["differing_spikes"] == 0
    assert spikesim(["report", "--checkpoint", str(path), "--out", str(tmp_path / "report")]) == 0
    capsys.readouterr()
    assert main.main([*map(str, options), "--loss", "COS", "--resume"]) == 2
    assert "invalid choice: 'COS'" in capsys.readouterr().err


def test_it_is_given_each_layer_of_both_networks_and_has_gradients(monkeypatch):
    seen = []

    def squares(student, teacher, threshold):
        seen.append((student.shape, teacher.shape, threshold))
        assert not teacher.requires_grad
        return student.square().mean()

    monkeypatch.setitem(distiller.MEMBRANE_LOSSES, "SQ", squares)
    monkeypatch.setitem(distiller.BETA, "SQ", 3.0)
    torch.manual_seed(0)
    teacher, student = MSResNet(18, 4, 2, 1, 4), QuanMSResNet(18, 4, 2, 1, 4, bits=4)
    distil = Distiller(teacher, student, "SQ")
    images, labels = torch.rand(3, 1, 8, 8), torch.tensor([0, 1, 2])
    _, loss, terms = distil(images, labels)
    assert len(seen) == 17
    assert all(ours == theirs and threshold == 0.5 for ours, theirs, threshold in seen)
    expected = terms["ce"] + terms["logit"] + 3 * terms["membrane"]
    torch.testing.assert_close(loss, expected)
    terms["membrane"].backward()
    assert student.stem.conv.weight.grad.abs().sum() > 0
