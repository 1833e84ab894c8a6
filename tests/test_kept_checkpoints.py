"""Checkpoints of an older version, of two epochs on digits, kept in tests/data."""

import shutil

import pytest

import main
from checkpoints import load_checkpoint
from conftest import REPOSITORY, evaluated
from settings import PAPER_SETTINGS

KEPT = REPOSITORY / "tests" / "data"


@pytest.mark.parametrize("setting", PAPER_SETTINGS)
def test_a_kept_checkpoint_has_its_accuracy_still_and_is_gone_on_with(setting, tmp_path, capsys):
    kept = KEPT / f"{setting}-last.pth"
    checkpoint = load_checkpoint(kept)
    found = evaluated(capsys, kept)
    # Another machine's rounding may move an image.
    assert found["accuracy"] == pytest.approx(checkpoint.accuracy, abs=2 / found["images"])
    assert checkpoint.accuracy > 0.15

    for name in ("best", "last"):
        shutil.copy(kept, tmp_path / f"{setting}-{name}.pth")
    options = ["--data", "digits", "--width", "1", "--epochs", "3", "--paper_setting", setting]
    options += [] if setting == "original" else ["--bits", "4"]
    if setting == "qamd":
        options += ["--teacher_path", str(KEPT / "original-last.pth")]
    where = ["--save_path", str(tmp_path), "--resume", "--workers", "0"]
    capsys.readouterr()
    for known in (False, True):  # what its loss was
        assert main.main([*options, *where]) == 0
        said = "an older definition of --loss CLK" in capsys.readouterr().err
        assert said == (setting == "qamd" and not known)
    last = load_checkpoint(tmp_path / f"{setting}-last.pth")
    assert (checkpoint.epoch, last.epoch) == (2, 3)
    assert last.rest["rows"][:2] == checkpoint.rest["rows"]
