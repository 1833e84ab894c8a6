"""--compile: the fused kernels against the eager functions, and what happens without a compiler."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels
from engine import compile as compiling
from models.neuron import LIF
from one_step import SETTINGS, results

ROOT = Path(__file__).parent.parent
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def eager_and_compiled(device):
    """Results of each setting, eager and compiled, and the reason why compiling failed."""
    eager = {setting: results(setting, device) for setting in SETTINGS}
    compiled = {}

    def work() -> None:
        compiled.update({setting: results(setting, device) for setting in SETTINGS})

    every_size = device.type == "cpu"
    reason = compiling.compile_regions(work, every_size=every_size)
    kernels.fused.clear()
    return eager, compiled, reason


@needs_compiler
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.device
def test_compiled_kernels_agree_with_the_eager_functions(eager_and_compiled, setting):
    eager, compiled, reason = eager_and_compiled
    assert reason is None
    assert len(eager[setting]) > 50
    for one, other in zip(eager[setting], compiled[setting], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-12)


@needs_compiler
def test_compiled_kernels_take_tensors_of_all_sizes():
    currents = [torch.randn(4, n, 3, 3, dtype=torch.float64) for n in (2, 5, 7)]
    expected = [LIF()(x, 2) for x in currents]
    found: list[torch.Tensor] = []
    reason = compiling.compile_regions(lambda: found.extend(LIF()(x, 2) for x in currents))
    kernels.fused.clear()
    assert reason is None
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one, other)


def test_a_failing_compiler_leaves_the_eager_functions_and_says_why():
    def fail() -> None:
        raise RuntimeError("\nno compiler\nhere is a long story")

    assert compiling.compile_regions(fail) == "no compiler"
    assert not kernels.fused


def train(folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "main.py", "--data", "digits", "--paper_setting", "student"]
    size = ["--bits", "2", "--width", "4", "--epochs", "1", "--time_window", "2", "--workers", "0"]
    paths = {"PATH": "/usr/bin:/bin", "HOME": str(folder.parent)}
    return subprocess.run(
        [*command, *size, "--deterministic", "--save_path", folder, *options],
        env=paths | environment,
        capture_output=True,
        text=True,
    )


def test_without_a_compiler_training_goes_on_eager_with_one_warning(tmp_path):
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "CXX": "/nonexistent/g++"}
    compiled = train(tmp_path / "compiled", "--compile", **cache)
    eager = train(tmp_path / "eager")
    assert (compiled.returncode, eager.returncode) == (0, 0), compiled.stderr + eager.stderr
    warnings = [line for line in compiled.stderr.splitlines() if "warning" in line]
    assert len(warnings) == 1
    assert warnings[0].startswith("main.py: warning: --compile: ")
    assert "Traceback" not in compiled.stderr
    rows = [(tmp_path / name / "metrics.csv").read_text() for name in ("compiled", "eager")]
    assert rows[0] == rows[1]


BROKEN_IN_ONE = """
import os, sys
if os.environ["RANK"] == "1":
    os.environ["CXX"] = "/nonexistent/g++"
import main
main.leave(main.main(sys.argv[1:]))
"""


@needs_compiler
def test_without_a_compiler_in_one_of_two_processes_both_go_on_eager(tmp_path):
    (tmp_path / "broken.py").write_text(BROKEN_IN_ONE)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run = ["--data", "digits", "--paper_setting", "original", "--width", "2", "--epochs", "1"]
    done = subprocess.run(
        [sys.executable, *launcher, "broken.py", *run, "--workers", "0", "--compile"],
        cwd=tmp_path,
        env=os.environ
        | {"PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("main.py: warning: --compile: going on without it") == 1
    assert "\n1/1  loss" in done.stdout


@needs_compiler
@pytest.mark.parametrize(
    ("processes", "options"),
    [
        (1, "--paper_setting qamd --bits 4 --deterministic --time_windows 3 6 --width 2"),
        (2, "--paper_setting original --accumulate 2"),
    ],
)
def test_a_compiled_training_says_how_long_compiling_took_and_trains(
    processes, options, trained, tmp_path
):
    teacher = ["--teacher_path", trained["original"]] if "qamd" in options else []  # of another T
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    run = ["--data", "digits", "--width", "4", "--epochs", "1", "--workers", "0", "--compile"]
    done = subprocess.run(
        [sys.executable, *launcher, ROOT / "main.py", *run, *options.split(), *teacher],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "warning: --compile" not in done.stderr
    said = done.stdout.splitlines()
    assert said[0].startswith("compiling, which takes")
    assert re.fullmatch(r"compiled in \d+ s", said[1])
    assert said[2].startswith("device")
    assert any(line.startswith("1/1  loss") for line in said)
