"""The benchmarks of training and distillation steps, in their smallest form."""

import pytest
import torch

import kernels
from benchmarks import distillation_step, numerics, step_ablation, timing, training_step

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_compiling(monkeypatch) -> None:
    """test_compiling.py does it."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")


def test_loops_spikingjelly_and_ours_are_the_same_network():
    regions = training_step.Regions()
    assert training_step.check_equality(regions, 18, 3, CPU) < 1e-12


def test_the_naive_loss_is_ours():
    assert distillation_step.difference_of_losses(CPU) < 1e-10


def test_the_training_step_benchmark_prints_and_writes_its_tables(tmp_path, capsys):
    out = tmp_path / "steps.md"
    size = "--width 4 --batch 2 --T 2 --rounds 1 --no_memory --sweep 4 8"
    training_step.main([*size.split(), "--out", str(out)])
    text = out.read_text()
    assert text in capsys.readouterr().out
    for name in (*training_step.NAMES, "loops, as it comes", "spikingjelly Rect, as it comes"):
        assert f"| {name} |" in text
    assert "loops / MD-SNN --compile: step" in text
    assert "spikingjelly Rect, as it comes / MD-SNN --compile: step" in text
    assert "T = 8 / (2 · T = 4):" in text
    assert "| LIF backward, compiled |" in text


def test_the_distillation_step_benchmark_measures_time_and_memory(tmp_path, capsys):
    out = tmp_path / "distillation.md"
    distillation_step.main(f"--width 4 --batch 2 --T 2 --rounds 1 --out {out}".split())
    rows = [line.split(" | ") for line in out.read_text().splitlines() if line.startswith("| ")]
    by_name = {row[0].removeprefix("| "): row for row in rows}
    assert set(by_name) >= {distillation_step.PLAIN, distillation_step.NAIVE, "MD-SNN, --compile"}
    assert float(by_name["MD-SNN"][4]) > 1  # MB
    assert "agree within" in capsys.readouterr().out


def test_a_round_on_a_noisy_machine_is_repeated_but_not_for_ever(monkeypatch):
    for noisy_until, repeated_at_most in ((60, 4), (10**6, 5)):
        calls = iter(range(10**6))

        def seconds(function, device, calls=calls, noisy_until=noisy_until):
            function()
            return 0.2 if 40 <= next(calls) < noisy_until else 0.1

        monkeypatch.setattr(timing, "seconds", seconds)
        runs = []
        times, repeated = timing.in_turn({"a": lambda: runs.append(1)}, rounds=5, device=CPU)  # noqa: B023
        assert 0 < repeated <= repeated_at_most
        assert len(runs) == 2 + 5 + repeated  # two to warm up
        assert times["a"] == [0.1] * 5 or noisy_until == 10**6


def test_ratios_are_taken_within_a_round():
    # The machine was twice as slow in the second round: that is no difference between the two.
    assert timing.ratios([2.0, 4.0, 2.0], [1.0, 2.0, 1.0]) == (2.0, 2.0, 2.0)


def test_the_step_ablation_takes_back_one_idea_at_a_time(tmp_path):
    out = tmp_path / "ablation.md"
    step_ablation.main(f"--width 4 --batch 2 --T 2 --rounds 1 --out {out}".split())
    rows = [line for line in out.read_text().splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + 15
    assert all(float(row.split(" | ")[2].split()[0]) > 0 for row in rows[2:])
    assert not kernels.fused


def test_the_numerics_benchmark_shows_torch_s_error_and_that_ours_is_smaller(tmp_path, monkeypatch):
    monkeypatch.setattr(numerics, "SHAPES", [(256, 4, 32, 32)])
    numerics.main(["--out", str(tmp_path / "numerics.md")])
    row = (tmp_path / "numerics.md").read_text().splitlines()[-1].split(" | ")
    theirs, ours, _, theirs_on_two, ours_on_two = (float(x.strip(" |")) for x in row[2:])
    assert max(ours, ours_on_two) < 1e-6 < min(theirs, theirs_on_two)
