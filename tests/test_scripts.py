"""The scripts that train and report: what they start, and a way through all of them."""

import csv
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import pytest
from sklearn.datasets import load_digits

from checkpoints import load_checkpoint
from conftest import QUICK, REPOSITORY, read_csv, run_script
from data_sets.event_camera import as_atis, digit_events
from experiments import quickstart_table, same_seed
from load_settings import parse_settings
from settings import Settings

SCRIPTS = REPOSITORY / "scripts"


def stop_after_a_step(script: str, *arguments: str, folder: Path, last: Path) -> tuple[int, list]:
    """Exit code, and lines of both outputs, of a script stopped as by Ctrl-C in a terminal."""
    process = subprocess.Popen(
        ["bash", f"scripts/{script}", *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    while not last.exists():  # written before the first step
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    return process.returncode, output.splitlines()


def test_the_training_scripts_lead_from_nothing_to_the_hardware_report(scripts_clone):
    """On the way a training is stopped, and the same command goes on."""
    options = [*QUICK, "--seed", "7"]
    teacher = scripts_clone / "checkpoints" / "digits-teacher-seed7"
    training = ("train_teacher.sh", "digits", *options)
    last = teacher / "original-last.pth"
    code, lines = stop_after_a_step(*training, folder=scripts_clone, last=last)
    assert code == 130
    assert lines[-1].startswith("main.py: stopped by SIGINT after step ")
    distillation = ("distill_student.sh", "digits", "2", *options, "--beta", "5")
    assert "has done 0 of 1 epochs: the command that trains it goes on" in refused(
        *distillation, folder=scripts_clone
    )
    run_script(*training, folder=scripts_clone)
    student = scripts_clone / "checkpoints" / "digits-mdsnn-CLK-4bit-seed7"
    run_script(*distillation, folder=scripts_clone)
    settings = json.loads((student / "settings.json").read_text())
    assert (settings["world_size"], settings["seed"], settings["beta"]) == (2, 7, 5.0)
    assert settings["teacher_path"] == "checkpoints/digits-teacher-seed7/original-best.pth"
    options = ["--xbar_size", "128", "--test_images", "60"]
    printed = run_script("edap_report.sh", str(student), *options, folder=scripts_clone)
    assert "times better" in printed
    report = json.loads((student / "edap" / "report.json").read_text())
    assert report["chip"]["xbar_size"] == 128


# The rest looks at what the scripts would start: their Python writes that down.
RECORD = f"""#!/usr/bin/env bash
[[ $1 != - ]] || exec {sys.executable} "$@"
echo "${{0##*/}} $*" >> started
"""


def refused(script: str, *arguments: str, folder: Path) -> str:
    """The one line with which the script ends."""
    result = subprocess.run(
        ["bash", f"scripts/{script}", *arguments], cwd=folder, capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"{script}: error: ")
    return result.stderr


@pytest.fixture
def recorder(tmp_path) -> Path:
    """The scripts, and an environment that trains nothing."""
    shutil.copytree(REPOSITORY / "scripts", tmp_path / "scripts")
    shutil.copy(REPOSITORY / "requirements.txt", tmp_path)
    for name in ("python", "torchrun"):
        program = tmp_path / ".venv" / "bin" / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(RECORD)
        program.chmod(0o755)
    wanted = [tmp_path / "requirements.txt", tmp_path / "scripts" / "tested_versions.txt"]
    (tmp_path / ".venv" / "installed").write_text("".join(path.read_text() for path in wanted))
    return tmp_path


def started(script: str, *arguments: str, folder: Path) -> list[str]:
    """The commands that the script starts."""
    (folder / "started").write_text("")
    run_script(script, *arguments, folder=folder)
    return (folder / "started").read_text().splitlines()


def settings_of(command: str) -> Settings:
    """What main.py understands of a training that a script starts."""
    _, _, options = command.partition("main.py ")
    return parse_settings(options.split())


@pytest.mark.parametrize("script", sorted(path.name for path in SCRIPTS.glob("*.sh")))
def test_help_of_every_script_prints_its_first_lines_and_does_nothing(script, recorder):
    before = set(recorder.rglob("*"))
    printed = run_script(script, "--epochs", "1", "--help", folder=recorder).splitlines()
    comments = [line for line in (SCRIPTS / script).read_text().splitlines() if line[:2] == "# "]
    assert printed == [line[2:] for line in comments[: len(printed)]]
    assert len(printed) >= 2
    assert set(recorder.rglob("*")) == before


def test_one_process_is_plain_python_and_several_are_torchrun_s(recorder):
    one = started("train_teacher.sh", "digits", folder=recorder)
    assert one == [
        "python main.py --data digits --model_depth 18 --seed 1234 "
        "--save_path checkpoints/digits-teacher-seed1234 --resume --paper_setting original"
    ]
    (two,) = started("train_teacher.sh", "digits", "2", folder=recorder)
    assert two == one[0].replace("python", "torchrun --standalone --nproc_per_node=2")
    (tiny,) = started("train_teacher.sh", "TinyImagenet", folder=recorder)
    assert "--model_depth 34 " in tiny


@pytest.mark.parametrize(
    ("script", "own", "name"),
    [
        ("train_teacher.sh", "", "teacher"),
        ("train_student.sh", "--bits 3", "student-3bit"),
        ("distill_student.sh", "--bits 3,--loss=CLM,--beta 5,--width 2", "mdsnn-CLM-3bit"),
    ],
)
def test_an_option_says_the_same_in_any_order_and_names_the_folder(
    script, own, name, recorder, trained
):
    """Also what the script would set itself, and in both ways to write it."""
    parts = [x.split() for x in ("--seed=7", "--epochs 3", "--data digits", *own.split(","))]
    if script == "distill_student.sh":
        parts.append(["--teacher_path", str(trained["original"])])

    def settings_of_start(*options: list[str]) -> Settings:
        (command,) = started(script, *chain(*options), folder=recorder)
        return settings_of(command)

    (settings,) = {
        settings_of_start(*order) for order in (parts, parts[::-1], parts[1:] + parts[:1])
    }
    assert (settings.data, settings.seed, settings.epochs) == ("digits", 7, 3)
    assert settings.save_path == f"checkpoints/digits-{name}-seed7"
    assert settings.resume
    assert settings.bits == (3 if own else None)
    if script == "distill_student.sh":
        assert (settings.loss, settings.beta) == ("CLM", 5)
    anew = settings_of_start(*parts, ["--overwrite"])
    assert (anew.overwrite, anew.resume) == (True, False)
    assert settings_of_start(*parts, ["--save_path", "mine"]).save_path == "mine"


@pytest.mark.parametrize("script", ["train_student.sh", "distill_student.sh"])
def test_students_of_several_t_have_folders_of_their_own(script, recorder, trained):
    options = ["--width", "2"]
    if script == "distill_student.sh":  # the one teacher, of T = 4, of all of them
        options += ["--teacher_path", str(trained["original"])]
    paths = []
    for T in ([], ["--time_window", "2"], ["--time_window=6"]):
        (command,) = started(script, "digits", *options, *T, folder=recorder)
        paths.append(settings_of(command).save_path)
    assert [path.split("bit")[1] for path in paths] == ["-seed1234", "-T2-seed1234", "-T6-seed1234"]


def test_a_student_is_not_distilled_from_a_teacher_that_is_missing_or_half_trained(recorder):
    distillation = ("distill_student.sh", "digits", "2", "--seed", "7")
    text = refused(*distillation, folder=recorder)
    assert "there is no teacher in checkpoints/digits-teacher-seed7" in text
    assert "bash scripts/train_teacher.sh digits 2 --seed 7 (and more options) trains it" in text
    teacher = recorder / "checkpoints" / "digits-teacher-seed7"
    teacher.mkdir(parents=True)
    (teacher / "original-last.pth").touch()
    about = json.dumps({"data": "digits", "epochs": 12, "save_path": "x"}, indent=2)
    (teacher / "settings.json").write_text(about)
    for rows, done in (("", 0), ("1,0.1\n", 1), ("1,0.1\n2,0.1\n", 2)):
        (teacher / "metrics.csv").write_text("epoch,lr\n" + rows)
        assert f"has done {done} of 12 epochs" in refused(*distillation, folder=recorder)
    (teacher / "metrics.csv").write_text("epoch,lr\n12,0.1\n")
    text = refused(*distillation, folder=recorder)
    assert "original-best.pth is missing: --teacher_path checkpoints/digits-teacher-seed7/" in text
    assert "bash scripts/train_teacher.sh digits 2 --seed 7 --overwrite" in text
    # Both ways out.
    last = "checkpoints/digits-teacher-seed7/original-last.pth"
    (command,) = started(*distillation, "--teacher_path", last, folder=recorder)
    assert f"--teacher_path {last}" in command
    (teacher / "original-best.pth").touch()
    (command,) = started(*distillation, folder=recorder)
    assert "--teacher_path checkpoints/digits-teacher-seed7/original-best.pth" in command


def test_the_report_takes_teacher_and_data_from_the_run(recorder):
    folder = recorder / "run é"
    folder.mkdir()
    about = {"paper_setting": "qamd", "data_path": "my data", "teacher_path": "é/best.pth"}
    (folder / "settings.json").write_text(json.dumps(about))
    (command,) = started("edap_report.sh", "run é", "--cell_bits", "2", folder=recorder)
    assert command == (
        "python -m spikesim_eval report --checkpoint run é/qamd-best.pth --data_path my data "
        "--baseline é/best.pth --out run é/edap --cell_bits 2"
    )
    about |= {"paper_setting": "student", "teacher_path": None}
    (folder / "settings.json").write_text(json.dumps(about))
    (command,) = started("edap_report.sh", "run é", folder=recorder)
    assert "student-best.pth" in command
    assert "--baseline" not in command


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["train_teacher.sh", "digits", "two"], "PROCESSES is a number, got two"),
        (["train_teacher.sh", "digits", "0"], "PROCESSES is a number, got 0"),
        (["train_student.sh", "--paper_setting=qamd"], "--paper_setting is set by this script"),
        (["train_student.sh", "digits", "--config=x"], "--config goes with python main.py"),
        (["quickstart.sh", "--save_path", "x"], "--save_path is set by this script"),
        (["quickstart_dvs.sh", "--save_path=x"], "--save_path is set by this script"),
        (["edap_report.sh"], "RUN is a folder with the settings.json of a run, got ''"),
        (["edap_report.sh", "digits", "2"], "got 'digits'"),
        (["edap_report.sh", "run", "--checkpoint", "x"], "--checkpoint is set by this script"),
    ],
)
def test_a_script_refuses_in_one_line_what_it_cannot_do(command, expected, recorder):
    assert expected in refused(*command, folder=recorder)
    assert not (recorder / "started").exists()


def test_the_quickstart_s_table_names_what_is_missing(capsys):
    for argument, expected in (
        ("missing", "checkpoint missing/teacher/original-best.pth"),
        ("--out", "unrecognized arguments: --out"),
    ):
        assert quickstart_table.main([argument]) == 2
        error = f"experiments.quickstart_table: error: {expected}"
        assert capsys.readouterr().err.startswith(error)


@pytest.mark.parametrize("script", ["quickstart.sh", "quickstart_dvs.sh"])
def test_a_quickstart_asks_for_its_options_before_it_moves_or_prepares_anything(script, recorder):
    first, *rest = started(script, "--epochs", "3", folder=recorder)
    assert first.startswith(f"python -m engine.run_folder runs/{script[:-3]} --data digits")
    assert first.endswith("--paper_setting original --epochs 3")
    trainings = [command for command in rest if "main.py" in command]
    assert len(trainings) == {"quickstart.sh": 3, "quickstart_dvs.sh": 4}[script]
    assert all(command.endswith(" --epochs 3") for command in trainings)


def run_here(command: str) -> int:
    """A command that a script starts, in this process."""
    _, program, *arguments = command.split()
    module = program.removesuffix(".py") if program != "-m" else arguments.pop(0)
    module = {"spikesim_eval": "spikesim_eval.__main__"}.get(module, module)
    return importlib.import_module(module).main(arguments)


def last_accuracy(folder: Path) -> str:
    return f"{100 * float(read_csv(folder / 'metrics.csv')[-1]['test_accuracy']):.2f}"


def test_the_quickstart_prints_its_table_and_writes_it_with_plots(recorder, monkeypatch, capfd):
    out, runs = recorder / "runs" / "quickstart", ("teacher", "student", "mdsnn")
    (out / "teacher").mkdir(parents=True)
    (out / "teacher" / "settings.json").write_text("of a quickstart before")
    monkeypatch.chdir(recorder)
    for command in started("quickstart.sh", *QUICK, folder=recorder):
        few = " --test_images 60" * ("spikesim_eval" in command)
        assert run_here(command + few) == 0
    printed = capfd.readouterr().out
    moved = out.with_name("quickstart.1")
    assert f"what was in {out} is now in {moved}" in printed
    assert (moved / "teacher" / "settings.json").read_text() == "of a quickstart before"
    with (out / "table.csv").open(newline="") as file:
        table = {row[0]: row[1:] for row in csv.reader(file)}
    assert table["bits"] == ["32 (float)", "2", "2"]
    assert table["accuracy, last epoch, %"] == [last_accuracy(out / x) for x in runs]
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
    for run_ in runs:
        report = json.loads((out / run_ / "edap" / "report.json").read_text())
        assert any(layer["rate_is_measured"] for layer in report["layers"])


def test_the_quickstart_of_events_trains_on_them_at_two_widths(recorder, monkeypatch, capfd):
    """On thirty digits: data_loader.py takes what lies in the folder and makes the rest of it."""
    digits = load_digits()
    events = recorder / "data" / "Digits-DVS" / "extract" / "Caltech101"
    for number, (digit, label) in enumerate(zip(digits.images[:30], digits.target, strict=False)):
        path = events / str(label) / f"image_{number:04d}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(as_atis(*digit_events(digit)))
    monkeypatch.chdir(recorder)
    for command in started("quickstart_dvs.sh", *QUICK, "--batch_size", "8", folder=recorder):
        assert run_here(command) == 0
    assert (
        "20 training and 10 test samples of 10 classes, (10, 2, 24, 24)" in capfd.readouterr().out
    )
    with Path("runs", "quickstart_dvs", "table.csv").open(newline="") as file:
        table = {row[0]: row[1:] for row in csv.reader(file)}
    assert table[""][1:] == ["student", "MD-SNN, 4 bits", "MD-SNN, 8 bits"]
    assert table["bits"] == ["32 (float)", "4", "4", "8"]
    edap = [float(x) for x in table["EDAP, × better"]]
    assert edap[2] > edap[3] > 1


def test_the_best_epoch_is_that_of_the_validation_accuracy_where_there_is_one(trained):
    metrics = [
        {"epoch": 1, "test_accuracy": 0.5, "val_accuracy": 0.9, "spike_rate": 0.2},
        {"epoch": 2, "test_accuracy": 0.75, "val_accuracy": 0.8, "spike_rate": 0.2},
    ]
    report = {"total": dict.fromkeys(quickstart_table.FILE_UNITS, 1.0), "layers": [{"adc_bits": 5}]}
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
            "epoch,test_accuracy\n" + "1,0.1\n" * (epochs - 1) + f"1,{accuracy}\n"
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
    (tmp_path / "setting1" / "student" / "metrics.csv").write_text("epoch,test_accuracy\n1,0.1\n")
    same_seed.main(arguments)
    assert commands[-1] == ("setting1", "student", "1")
    assert len(commands) == 3 * (len(same_seed.SETTINGS) + 1) + 1
