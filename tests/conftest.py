"""Shared by the tests that run the program: a copy of it to run in, and small trained networks."""

import os
import shutil
import sys
from pathlib import Path

import pytest

import main

REPOSITORY = Path(__file__).resolve().parent.parent
DIGITS = ["--data", "digits", "--width", "2", "--epochs", "1", "--workers", "0"]


@pytest.fixture(scope="session")
def clone(tmp_path_factory) -> Path:
    """The program without its tests, as a clone has it: commands run here leave nothing there."""
    folder = tmp_path_factory.mktemp("clone")
    for path in [
        *REPOSITORY.glob("*.py"),
        *(REPOSITORY / name for name in ("models", "spikesim_eval")),
    ]:
        copy = shutil.copytree if path.is_dir() else shutil.copy
        copy(path, folder / path.name)
    return folder


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
