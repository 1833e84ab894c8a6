"""bash benchmarks/gpu.sh, in miniature on the CPU."""

import re
import subprocess
import tarfile
import time
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.training_step import COMPILED, OURS, against_float32
from conftest import REPOSITORY, read_csv, refused
from experiments import study, timesteps


def run(stage: str, out: Path, environment: dict[str, str], *options: str) -> str:
    done = subprocess.run(
        ["bash", "benchmarks/gpu.sh", stage, "--dry_run", "--out", str(out), *options],
        cwd=REPOSITORY,
        env=environment | {"TORCHDYNAMO_DISABLE": "1"},  # no compiling, which others test
        capture_output=True,
        text=True,
    )
    logs = "".join(path.read_text()[-3000:] for path in out.glob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    files = [path for path in out.rglob("*") if path.is_file()]
    assert len(files) <= 8  # few enough to send to someone
    assert sum(path.stat().st_size for path in files) < 2**20
    assert done.stdout == (out / f"{stage}.md").read_text()
    return done.stdout


def test_check_runs_tests_that_compare_numbers_and_keeps_what_they_measure(
    tmp_path, shell_environment
):
    """Without a plugin of pytest."""
    (tmp_path / "xdist.py").write_text("raise ImportError")
    alone = {"PYTHONPATH": str(tmp_path), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    out = tmp_path / "out"
    text = run("check", out, shell_environment | alone)
    passed, failed, skipped = map(int, re.search(r"\| (\d+) \| (\d+) \| (\d+) \|", text).groups())
    assert passed > 10
    assert failed == 0
    assert skipped > 0
    rows = read_csv(out / "check_measured.csv")
    measured = {row["number of"]: float(row["value"]) for row in rows}
    assert 0 < measured["differing spikes bf16"] < 0.1
    assert "would compare the CPU with itself" in (out / "check.log").read_text()


def test_speed_writes_the_table_of_each_benchmark(tmp_path, shell_environment):
    text = run("speed", tmp_path, shell_environment)
    for name in ("training_step", "distillation_step"):
        assert f"| {name}.md | all of it |" in text
        assert "| MD-SNN" in (tmp_path / f"{name}.md").read_text().replace("### ", "| ")


def test_cifar10_goes_on_where_it_was_and_does_nothing_twice(tmp_path, shell_environment, capsys):
    work = ["--work", str(tmp_path / "work")]

    def here(name: str, *options: str) -> str:
        out = ["--out", str(tmp_path / name)]
        assert gpu.main(["cifar10", "--dry_run", *out, *work, *options]) == 0
        return capsys.readouterr().out

    text = here("short", "--minutes", "0.01")
    assert "| teacher | 0 of 1 | - | - | - |" in text
    assert "The same command goes on." in text
    text = run("cifar10", tmp_path / "out", shell_environment, *work)
    assert "All are trained." in text
    for name in ("teacher", "student", "CLK"):
        assert f"| {name} | 1 of 1 | " in text
        (row,) = read_csv(tmp_path / "out" / f"cifar10-{name}.csv")
        assert f"{100 * float(row['test_accuracy']):.2f} %" in text
    log = (tmp_path / "out" / "cifar10.log").read_text()
    assert "(3, 32, 32) uint8 each" in log
    assert "All are trained." in here("again")
    assert not (tmp_path / "again" / "cifar10.log").exists()


def test_a_training_that_fails_ends_the_stage_and_is_named(tmp_path, monkeypatch, capsys):
    started = []
    monkeypatch.setattr(gpu.Stage, "run", lambda _, *command, **__: started.append(command) or 2)
    assert gpu.main(["cifar10", "--dry_run", "--out", str(tmp_path)]) == 1
    assert "The training of the teacher failed: see cifar10.log." in capsys.readouterr().out
    assert [command[0] for command in started] == ["data_loader.py", "main.py"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "no usable GPU"),
        (["--dry_run", "--wheels", "."], "holds no wheels"),
    ],
)
def test_what_cannot_be_done_is_one_line(options, expected, tmp_path, capsys):
    command = ["check", "--out", str(tmp_path / "out"), *options]
    assert expected in refused(capsys, gpu.main, command)
    assert not (tmp_path / "out").exists()


def stage(folder: Path, minutes: float) -> gpu.Stage:
    arguments = Namespace(stage="cifar10", out=folder, dry_run=True, data=None, wheels=None)
    return gpu.Stage(Namespace(**vars(arguments), minutes=minutes, epochs=1), folder)


SAVES = """
import signal, sys, time
def save(*_):
    print("saved", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
time.sleep(60)
"""
HANGS = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    open("FILE", "w").write(str(os.getpid()))
time.sleep(60)
"""


def test_when_the_time_is_up_a_program_may_save_and_all_of_it_has_ended(tmp_path):
    start = time.monotonic()
    assert stage(tmp_path, 4 / 60).run("-c", SAVES, grace=2) is None
    assert "saved\n" in (tmp_path / "cifar10.log").read_text()
    child = tmp_path / "child"
    assert stage(tmp_path, 3 / 60).run("-c", HANGS.replace("FILE", str(child)), grace=0.5) is None
    assert time.monotonic() - start < 20
    time.sleep(0.2)
    state = Path("/proc", child.read_text(), "stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_a_program_that_has_no_time_left_is_not_started(tmp_path):
    assert stage(tmp_path, 1 / 60).run("-c", "print('started')", grace=2) is None
    assert not (tmp_path / "cifar10.log").exists()
    assert stage(tmp_path, 1).run("-c", "import sys; sys.exit(3)") == 3


def test_ratios_over_precisions_are_of_medians():
    steps = {
        "float32": {"loops": [4.0, 6.0, 5.0], OURS: [3.0]},
        "bf16": {COMPILED: [1.0, 9.0, 2.0]},
    }
    assert list(against_float32(steps)) == [f"loops in float32 / {COMPILED} in bf16: step 2.500"]


def test_studies_run_a_dozen_networks_and_bring_back_what_their_tables_need(
    tmp_path, shell_environment
):
    work = tmp_path / "work"
    text = run("studies", tmp_path / "out", shell_environment, "--work", str(work))
    for name in gpu.OF_DRY_RUN:
        assert re.search(rf"\| {name} \| \d+ \| all of it \|", text)
    with tarfile.open(tmp_path / "out/studies.tar.gz") as archive:
        archive.extractall(tmp_path / "here", filter="data")
    log = (tmp_path / "out/studies.log").read_text()
    command = next(x for x in log.splitlines() if "--name cifar10_45" in x)
    _, _, _, *options = command.removeprefix("$ ").split()
    options[options.index("--runs") + 1] = str(tmp_path / "here/runs")
    options[options.index("--results") + 1] = str(tmp_path / "here/results")
    assert study.main([*options, "--table"]) == 0
    assert len(read_csv(tmp_path / "here/results/cifar10_45/rows.csv")) == 2
    images = sorted(x.relative_to(work / "cifar10") for x in (work / "cifar10").rglob("*.jpg"))
    quarter = work / "cifar10_12500"  # of so few images all
    assert images == sorted(x.relative_to(quarter) for x in quarter.rglob("*.jpg"))


@pytest.mark.parametrize("name", gpu.STUDIES)
def test_the_studies_can_be_planned(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("train/cat", "train/dog", "val/cat", "val/dog"):
        (tmp_path / "data/cifar10_12500" / folder).mkdir(parents=True)
    module, options = gpu.STUDIES[name]
    module = {"study": study, "timesteps": timesteps}[module]
    parser = getattr(module, f"{module.__name__.split('.')[-1]}_parser")()
    args = parser.parse_args([*options.split(), "--workers", "0", "--compile"])
    assert len(module.planned_runs(args, tmp_path)) >= 10
