"""The scripts of the README, run in a copy of the repository with the environment of the tests."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from sklearn.datasets import load_digits

from conftest import REPOSITORY
from data_loader import as_atis, digit_events
from load_settings import load_checkpoint

ENVIRONMENT = Path(sys.prefix)
RUNS = "teacher", "student", "mdsnn"
QUICK = ["--epochs", "1", "--width", "2"]


@pytest.fixture(scope="module")
def copy(clone, tmp_path_factory) -> Path:
    """A clone whose .venv is the one that scripts/environment.sh made and runs these tests."""
    if not (ENVIRONMENT / "installed").is_file():
        pytest.skip("the tests do not run in the environment that scripts/environment.sh makes")
    folder = tmp_path_factory.mktemp("scripts") / "clone"
    shutil.copytree(clone, folder, ignore=shutil.ignore_patterns("data", "teacher-*", "mdsnn-*"))
    shutil.copytree(REPOSITORY / "scripts", folder / "scripts")
    shutil.copy(REPOSITORY / "requirements.txt", folder)
    (folder / ".venv").symlink_to(ENVIRONMENT)
    return folder


def last_accuracy(folder: Path) -> str:
    with (folder / "metrics.csv").open(newline="") as file:
        return f"{float(list(csv.DictReader(file))[-1]['test_accuracy']):.2%}"


def run(script: str, *arguments: str, folder: Path) -> str:
    result = subprocess.run(
        ["bash", f"scripts/{script}", *arguments], cwd=folder, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_the_quickstart_prints_its_table_and_writes_it_with_plots(copy):
    out = copy / "runs" / "quickstart"
    (out / "teacher").mkdir(parents=True)
    (out / "teacher" / "settings.json").write_text("of a quickstart before")
    printed = run("quickstart.sh", *QUICK, folder=copy)
    assert "installing" not in printed
    moved = out.with_name("quickstart.1")
    assert f"what was in {out} is now in {moved}" in printed
    assert (moved / "teacher" / "settings.json").read_text() == "of a quickstart before"
    with (out / "table.csv").open(newline="") as file:
        table = {row[0]: row[1:] for row in csv.reader(file)}
    assert table["bits"] == ["32 (float)", "2", "2"]
    assert table["accuracy, last epoch"] == [last_accuracy(out / x) for x in RUNS]
    best = load_checkpoint(out / "teacher" / "original-best.pth")
    named = f"{best.accuracy:.2%} (epoch {best.epoch})"
    assert table["accuracy, best epoch"][0] == named
    assert f"of its best epoch ({best.epoch}, {best.accuracy:.2%}): membrane KL" in printed
    for name in ("accuracy, best epoch", "EDAP, µJ·ms·mm²", "TOPS/mm², × better"):
        assert name.split(", µJ")[0] in printed  # where each value has a unit of its own
        assert len(table[name]) == 3
    assert "OPS/mm²" in printed
    kl = table["membrane KL to teacher"]
    assert kl[0] == "-"
    assert float(kl[1]) > 0
    assert float(table["EDAP, × better"][2]) > 1
    assert (out / "table.md").read_text().count("\n") > len(table)
    assert (out / "quickstart.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "quickstart.pdf").read_bytes().startswith(b"%PDF")
    for run_ in RUNS:
        report = json.loads((out / run_ / "edap" / "report.json").read_text())
        assert any(layer["rate_is_measured"] for layer in report["layers"])


def test_the_quickstart_of_events_trains_on_them_at_two_widths(copy):
    """On thirty digits: data_loader.py takes what lies in the folder and makes the rest of it."""
    digits = load_digits()
    events = copy / "data" / "Digits-DVS" / "extract" / "Caltech101"
    for number, (digit, label) in enumerate(zip(digits.images[:30], digits.target, strict=False)):
        path = events / str(label) / f"image_{number:04d}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(as_atis(*digit_events(digit)))
    printed = run("quickstart_dvs.sh", *QUICK, "--batch_size", "8", folder=copy)
    assert "20 training and 10 test samples of 10 classes, (10, 2, 24, 24)" in printed
    with (copy / "runs" / "quickstart_dvs" / "table.csv").open(newline="") as file:
        table = {row[0]: row[1:] for row in csv.reader(file)}
    assert table[""][1:] == ["student", "MD-SNN, 4 bits", "MD-SNN, 8 bits"]
    assert table["bits"] == ["32 (float)", "4", "4", "8"]
    edap = [float(x) for x in table["EDAP, × better"]]
    assert edap[2] > edap[3] > 1


def test_the_training_scripts_lead_from_nothing_to_the_hardware_report(copy):
    teacher = copy / "checkpoints" / "digits-teacher"
    run("train_teacher.sh", "digits", "1", *QUICK, folder=copy)
    (teacher / "finished").unlink()  # as if it had been stopped
    run("distill_student.sh", "digits", "1", *QUICK, folder=copy)  # with the rest of the teacher
    assert (teacher / "finished").exists()
    before = (teacher / "original-last.pth").stat().st_mtime_ns
    run("distill_student.sh", "digits", "1", *QUICK, folder=copy)  # all is there
    assert (teacher / "original-last.pth").stat().st_mtime_ns == before
    run("train_student.sh", "digits", "2", *QUICK, folder=copy)
    printed = run("edap_report.sh", "digits", "2", "--xbar_size", "128", folder=copy)
    assert "times better" in printed
    report = json.loads(
        (copy / "checkpoints" / "digits-mdsnn-CLK-4bit" / "edap" / "report.json").read_text()
    )
    assert report["chip"]["xbar_size"] == 128
    assert (copy / "checkpoints" / "digits-student-4bit" / "student-best.pth").is_file()
