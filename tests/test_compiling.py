"""--compile: the fused kernels against the eager functions, and what happens without a compiler."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._inductor import cpu_vec_isa

import kernels
import main
from conftest import DIGITS
from engine import compile as compiling
from models.neuron import LIF, Neuron
from one_step import SETTINGS, results
from quantization import MembraneQuantizer
from warm import launched

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


OTHER_NEURONS = [  # and the bits of their membranes
    (Neuron(0.3, 0.75, "soft", "rect", 0.4), None),
    (Neuron(0.5, 0.5, "soft", "atan", 0.5), 4),
    (Neuron(0.25, 0.5, "hard", "sigmoid", 0.3), None),
]


@needs_compiler
@pytest.mark.device
def test_compiled_kernels_know_every_reset_and_surrogate(device):
    def run() -> list[torch.Tensor]:
        found = []
        for neuron, bits in OTHER_NEURONS:
            quantizer = None if bits is None else MembraneQuantizer(bits, neuron.threshold)
            layer, membranes = LIF(neuron, quantizer).double().to(device), {}
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(4, 3, 4, 4, generator=generator, dtype=torch.float64).to(device)
            spikes = layer(x.requires_grad_(), 2, membranes.__setitem__)
            (spikes.sum() + membranes[layer].square().sum()).backward()
            found += [spikes, membranes[layer], x.grad, *(p.grad for p in layer.parameters())]
        return found

    eager, compiled = run(), []
    reason = compiling.compile_regions(lambda: compiled.extend(run()), device.type == "cpu")
    kernels.fused.clear()
    assert reason is None
    assert len(eager) == len(compiled) == 10
    for one, other in zip(eager, compiled, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_the_widest_vectors_of_the_cpu_are_used_and_its_matrix_instructions_not_tried():
    compiling.ask_little_of_the_cpu()
    picked = cpu_vec_isa.pick_vec_isa()
    widths = {"AVX512": 512, "AVX2": 256}
    capability = torch.backends.cpu.get_cpu_capability()
    assert picked.bit_width() == widths.get(capability, picked.bit_width())
    assert not any(x in str(picked) for x in ("vnni", "amx"))


def test_a_failing_compiler_leaves_the_eager_functions_and_says_why():
    def fail() -> None:
        raise RuntimeError("\nno compiler\nhere is a long story")

    assert compiling.compile_regions(fail) == "no compiler"
    assert not kernels.fused


def test_without_a_compiler_training_goes_on_eager_with_one_warning(tmp_path, capfd):
    command = [*DIGITS, "--paper_setting", "student", "--bits", "2", "--time_window", "2"]
    command += ["--deterministic", "--save_path"]
    broken = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "CXX": "/nonexistent/g++"}
    done = subprocess.run(
        [sys.executable, ROOT / "main.py", *command, tmp_path / "compiled", "--compile"],
        env=os.environ | broken,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert main.main([*command, str(tmp_path / "eager")]) == 0
    warnings = [line for line in done.stderr.splitlines() if "warning" in line]
    assert len(warnings) == 1
    assert warnings[0].startswith("main.py: warning: --compile: ")
    assert "Traceback" not in done.stderr
    rows = [(tmp_path / name / "metrics.csv").read_text() for name in ("compiled", "eager")]
    assert rows[0] == rows[1]


BROKEN_IN_ONE = """
import os, sys
import main, torch._inductor.config
if os.environ["RANK"] == "1":
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = "cache"
    torch._inductor.config.cpp.cxx = (None, "/nonexistent/g++")
main.leave(main.main(sys.argv[1:]))
"""


@needs_compiler
def test_without_a_compiler_in_one_of_two_processes_both_go_on_eager(tmp_path):
    (tmp_path / "broken.py").write_text(BROKEN_IN_ONE)
    run = [*DIGITS, "--paper_setting", "original", "--time_window", "2", "--compile"]
    done = launched(2, tmp_path / "broken.py", *run, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("main.py: warning: --compile: going on without it") == 1
    assert "\n1/1  loss" in done.stdout


def assert_compiled(out: str, err: str) -> None:
    assert "warning: --compile" not in err
    said = out.splitlines()
    assert said[0].startswith("compiling, which takes")
    assert re.fullmatch(r"compiled in \d+ s", said[1])
    assert said[2].startswith("device")
    assert any(line.startswith("1/1  loss") for line in said)


@needs_compiler
def test_a_compiled_training_says_how_long_compiling_took_and_trains(trained, tmp_path, capfd):
    teacher = ["--teacher_path", str(trained["original"])]  # of another T
    options = ["--bits", "4", "--deterministic", "--time_windows", "2", "3", "--compile"]
    command = [*DIGITS, "--paper_setting", "qamd", *options, *teacher]
    capfd.readouterr()
    assert main.main([*command, "--save_path", str(tmp_path)]) == 0
    kernels.fused.clear()
    assert_compiled(*capfd.readouterr())


@needs_compiler
def test_two_processes_train_compiled(tmp_path):
    run = [*DIGITS, "--paper_setting", "original", "--time_window", "2", "--compile"]
    done = launched(2, ROOT / "main.py", *run, "--accumulate", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_compiled(done.stdout, done.stderr)
