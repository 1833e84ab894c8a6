"""Shared by the tests: the device, a copy of the program to run in, and small trained networks.

`pytest --device cuda -m device` runs on a GPU what compares numbers: the tests that ask for the
`device`, and marked ones that run main.py, which takes the GPU that it sees. Without it all tests
run on the CPU, and main.py in them sees no GPU.
"""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import kernels
import main
from spikesim_eval.__main__ import main as spikesim_eval
from spikesim_eval.chip import Chip, Draws
from spikesim_eval.nonideal import load_subject, report_of

REPOSITORY = Path(__file__).resolve().parent.parent
# For scripts, which set the rest: ten steps, for with fewer it warns.
QUICK = ["--epochs", "1", "--width", "2", "--batch_size", "140"]
DIGITS = ["--data", "digits", *QUICK, "--workers", "0"]
SLOW_PROGRAMS = re.compile("python|bash|torchrun|gcc|g[+][+]|c[+][+]")
FEW_STEPS = 2  # of an optimizer: more are a training
LONG = {f"test_{name}.py" for name in ("study", "scripts", "compiling", "faults", "resume")}


class Fast:
    """--fast: a test is skipped when it starts what takes seconds. Not at collection: what a test,
    its fixtures and the program below them will do shows only then."""

    def __init__(self):
        self.testing, self.steps = False, 0
        sys.addaudithook(self.on_event)
        register_optimizer_step_pre_hook(self.on_step)

    def pytest_runtest_setup(self) -> None:
        self.testing, self.steps = True, 0

    def pytest_runtest_teardown(self) -> None:
        self.testing = False

    def on_event(self, event: str, about: tuple) -> None:
        if event == "subprocess.Popen" and self.testing:
            name = os.path.basename(os.fsdecode(about[0]))
            if SLOW_PROGRAMS.match(name):
                kernels.fused.clear()  # where it is the compiler
                pytest.skip(f"starts {name}: not with --fast")

    def on_step(self, *_) -> None:
        self.steps += 1
        if self.testing and self.steps > FEW_STEPS:
            pytest.skip("trains: not with --fast")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu")
    parser.addoption("--fast", action="store_true", help="skip what starts programs or trains")
    parser.addoption("--measured", type=Path, help="add the numbers that tests measure to this CSV")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "device: compares numbers that the device computed")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # torch.compile starts no workers
    if config.getoption("--fast"):
        config.pluginmanager.register(Fast())
    if config.getoption("--device") == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    else:
        # cuBLAS reads it when it starts, long before the first test with --deterministic.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        hypothesis.settings.register_profile("gpu", deadline=None)  # the first call is slow
        hypothesis.settings.load_profile("gpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Of two workers that take a file at a time neither shall begin a long one at the end.
    items.sort(key=lambda item: item.path.name not in LONG)
    for item in items:
        if "device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.device)


@pytest.fixture(autouse=True)
def nondeterministic_again() -> Iterator[None]:
    """After a test that has run main.py with --deterministic."""
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def gpu(device) -> torch.device:
    """The device, for tests that compare it with the CPU."""
    if device.type == "cpu":
        pytest.skip("would compare the CPU with itself: needs --device cuda")
    return device


@pytest.fixture
def measured(request) -> Callable[[str, float], None]:
    """Keeps a number that says more than that the test has passed."""
    path = request.config.getoption("--measured")

    def keep(what: str, value: float) -> None:
        if path is not None:
            with path.open("a", newline="") as file:
                csv.writer(file).writerow([request.node.name, what, f"{value:.3g}"])

    return keep


@pytest.fixture(scope="session")
def clone(tmp_path_factory) -> Path:
    """The program without its tests, as a clone has it: commands run here leave nothing there."""
    folder = tmp_path_factory.mktemp("clone")
    for path in REPOSITORY.glob("*.py"):
        shutil.copy(path, folder)
    for package in {path.parent for path in REPOSITORY.glob("*/*.py")}:
        if package.name not in ("tests", "benchmarks"):
            not_its = shutil.ignore_patterns("__pycache__")
            shutil.copytree(package, folder / package.name, ignore=not_its)
    return folder


@pytest.fixture(scope="session")
def scripts_clone(clone, tmp_path_factory) -> Path:
    """A clone whose .venv is the one that scripts/environment.sh made and runs these tests."""
    environment = Path(sys.prefix)
    if not (environment / "installed").is_file():
        pytest.skip("the tests do not run in the environment that scripts/environment.sh makes")
    folder = tmp_path_factory.mktemp("scripts") / "clone"
    shutil.copytree(clone, folder, ignore=shutil.ignore_patterns("data", "teacher-*", "mdsnn-*"))
    shutil.copytree(REPOSITORY / "scripts", folder / "scripts")
    shutil.copy(REPOSITORY / "requirements.txt", folder)
    (folder / ".venv").symlink_to(environment)
    return folder


def write_programs(folder: Path, **bodies: str) -> None:
    """Scripts in `folder`, by their names."""
    for name, body in bodies.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}")
        (folder / name).chmod(0o755)


def run_script(script: str, *arguments: str, folder: Path) -> str:
    result = subprocess.run(
        ["bash", f"scripts/{script}", *arguments], cwd=folder, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="session")
def shell_environment() -> dict[str, str]:
    """Where `python` is the one that runs the tests."""
    return os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints of a teacher, a 4-bit student and a 4-bit MD-SNN trained on digits for real."""
    folder = tmp_path_factory.mktemp("trained")
    teacher = folder / "original" / "original-best.pth"
    runs = {
        "original": [],
        "student": ["--bits", "4"],
        "qamd": ["--bits", "4", "--teacher_path", str(teacher)],
    }
    for setting, options in runs.items():
        save_path = ["--save_path", str(folder / setting)]
        assert main.main([*DIGITS, "--paper_setting", setting, *options, *save_path]) == 0
    return {setting: folder / setting / f"{setting}-best.pth" for setting in runs}


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def files_below(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def refused(
    capture: Any, command: Callable[..., int], *arguments: object, started: bool = False
) -> str:
    """The one line with which a command ends, with exit code 2: all that it says, but for a run
    that has `started`. `capture` is capsys or capfd."""
    capture.readouterr()
    assert command(*arguments) == 2, arguments
    out, err = capture.readouterr()
    assert re.fullmatch(r"[\w.]+: error: .+\n", err), err
    assert started or out == ""
    return err


def evaluated(capture: Any, checkpoint: Path, *options: object) -> dict[str, Any]:
    """What `main.py --eval_only` finds: one JSON object, and nothing else on stdout."""
    capture.readouterr()
    arguments = ["--eval_only", checkpoint, "--json", "--workers", 0, *options]
    assert main.main([*map(str, arguments)]) == 0
    return json.loads(capture.readouterr().out)


def reported(out: Path, words: str) -> dict[str, Any]:
    """The report.json that `spikesim_eval report` with these words writes into a folder."""
    assert spikesim_eval(["report", *words.split(), "--out", str(out)]) == 0
    return json.loads((out / "report.json").read_text())


def nonideal_report(
    checkpoint: Path, chip: Chip, draws: Draws | None = None, **how: int
) -> dict[str, Any]:
    """`nonideal`'s report; `how` says T and the number of test images."""
    return report_of(load_subject(str(checkpoint), None, **how), chip, draws or Draws())


@pytest.fixture
def complaint(tmp_path, capfd, monkeypatch) -> Callable[[list[str]], str]:
    """The one line that main.py prints for wrong arguments, run in a folder with the test's files
    alone."""
    monkeypatch.chdir(tmp_path)

    def complain(arguments: list[str]) -> str:
        before = files_below(tmp_path)
        line = refused(capfd, main.main, arguments)
        assert files_below(tmp_path) == before
        return line

    return complain
