"""The quickstarts, run in a copy of the repository with the environment of the tests."""

import csv
import json
from pathlib import Path

from checkpoints import load_checkpoint
from conftest import QUICK, read_csv, run_script
from experiments import quickstart_table, same_seed

RUNS = "teacher", "student", "mdsnn"


def last_accuracy(folder: Path) -> str:
    return f"{100 * float(read_csv(folder / 'metrics.csv')[-1]['test_accuracy']):.2f}"


def test_the_quickstart_prints_its_table_and_writes_it_with_plots(scripts_clone):
    out = scripts_clone / "runs" / "quickstart"
    (out / "teacher").mkdir(parents=True)
    (out / "teacher" / "settings.json").write_text("of a quickstart before")
    printed = run_script("quickstart.sh", *QUICK, folder=scripts_clone)
    assert "installing" not in printed
    moved = out.with_name("quickstart.1")
    assert f"what was in {out} is now in {moved}" in printed
    assert (moved / "teacher" / "settings.json").read_text() == "of a quickstart before"
    with (out / "table.csv").open(newline="") as file:
        table = {row[0]: row[1:] for row in csv.reader(file)}
    assert table["bits"] == ["32 (float)", "2", "2"]
    assert table["accuracy, last epoch, %"] == [last_accuracy(out / x) for x in RUNS]
    best = load_checkpoint(out / "teacher" / "original-best.pth")
    assert table["accuracy, best epoch, %"][0] == f"{100 * best.accuracy:.2f}"
    assert table["best epoch"][0] == str(best.epoch)
    named = f"{100 * best.accuracy:.2f} % (epoch {best.epoch})"
    assert named in next(x for x in printed.splitlines() if x.startswith("accuracy, best"))
    assert f"of its best epoch ({best.epoch}, {100 * best.accuracy:.2f} %): membrane KL" in printed
    for name in ("accuracy, best epoch, %", "EDAP, µJ·ms·mm²", "TOPS/mm², × better"):
        assert len(table[name]) == 3
    for name in ("accuracy, best epoch", "EDAP", "TOPS/mm², × better", "OPS/mm²"):
        assert name in printed  # where each value has a unit of its own
    assert table["membrane KL to teacher"][0] == "-"
    assert float(table["membrane KL to teacher"][1]) > 0
    assert float(table["EDAP, × better"][2]) > 1
    assert (out / "table.md").read_text().count("\n") > len(table)
    assert (out / "quickstart.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "quickstart.pdf").read_bytes().startswith(b"%PDF")
    for run_ in RUNS:
        report = json.loads((out / run_ / "edap" / "report.json").read_text())
        assert any(layer["rate_is_measured"] for layer in report["layers"])


def test_the_best_epoch_is_that_of_the_validation_accuracy_where_there_is_one(trained):
    metrics = [
        {"epoch": 1, "test_accuracy": 0.5, "val_accuracy": 0.9, "spike_rate": 0.2},
        {"epoch": 2, "test_accuracy": 0.75, "val_accuracy": 0.8, "spike_rate": 0.2},
    ]
    report = {"total": dict.fromkeys(quickstart_table.FILE_UNITS, 1.0)}
    checkpoint = load_checkpoint(trained["original"])
    run = quickstart_table.Run("teacher", {}, checkpoint, metrics, report)
    assert ["accuracy, best epoch", "50.00 % (epoch 1)"] in quickstart_table.table([run], {})
    for_programs = quickstart_table.table([run], {}, for_programs=True)
    assert ["accuracy, best epoch, %", "50.00"] in for_programs
    assert ["best epoch", "1"] in for_programs
    assert not any("%" in cell for _, *cells in for_programs for cell in cells)


def test_same_seed_runs_what_is_missing_and_tells_settings_from_seeds(tmp_path, monkeypatch):
    commands = []

    def train(command, env, **_) -> None:
        folder = command[command.index("--save_path") + 1]
        commands.append((folder.parent.name, folder.name, env["OMP_NUM_THREADS"]))
        epochs = int(command[command.index("--epochs") + 1])
        accuracy = 0.9 if folder.name == "MD-SNN" else 0.8 + ("1235" in command) / 100
        folder.mkdir(parents=True, exist_ok=True)
        folder.joinpath("metrics.csv").write_text(
            "test_accuracy\n" + "0.1\n" * (epochs - 1) + f"{accuracy}\n"
        )

    monkeypatch.setattr(same_seed.subprocess, "run", train)
    out = tmp_path / "same_seed.md"
    arguments = ["--runs", str(tmp_path), "--seeds", "1235", "--out", str(out)]
    same_seed.main(arguments)
    assert len(commands) == 3 * (len(same_seed.SETTINGS) + 1)
    assert [x for x in commands if x[2] == "2"] == [
        ("setting2", name, "2") for name in same_seed.TRAININGS
    ]
    assert "| 2 threads | 80.00 | 80.00 | 90.00 | 10.00 |" in out.read_text()
    (tmp_path / "setting1" / "student" / "metrics.csv").write_text("test_accuracy\n0.1\n")
    same_seed.main(arguments)
    assert commands[-1] == ("setting1", "student", "1")
    assert len(commands) == 3 * (len(same_seed.SETTINGS) + 1) + 1
