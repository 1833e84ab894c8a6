"""The scaling benchmark in its smallest form, and its shares by hand."""

import subprocess
import sys

from benchmarks.scaling import HEADER, table_row
from conftest import REPOSITORY


def test_the_scaling_benchmark_measures_one_and_two_processes_and_writes_its_table(tmp_path):
    smallest = ["--processes", "2", "--width", "2", "--batch", "1", "--rounds", "1"]
    out = tmp_path / "scaling.md"
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.scaling", *smallest, "--out", str(out)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    written = out.read_text()
    assert written in result.stdout
    assert written.startswith("`python -m benchmarks.scaling --processes 2 --width 2 --batch 1")
    rows = [line.strip("| ").split(" | ") for line in written.splitlines() if line[:1] == "|"]
    header, _, one, two = rows
    assert tuple(header) == HEADER
    assert (one[:2], two[:2]) == (["2", "1"], ["2", "2"])
    assert float(one[2]) > 0
    assert float(two[2]) > 0
    assert one[3] == "100"
    assert all("…" in cell for cell in two[4:])


def test_shares_of_a_step_are_taken_round_by_round():
    seconds = {
        "all": [1.0, 2.0],
        "after backward": [1.1, 2.0],
        "batch norm": [0.8, 1.6],
        "nothing": [0.5, 1.0],
        "one process": [0.4, 0.8],
        "messages": [0.01, 0.01],
    }
    cells = table_row(16, 2, batch=3, seconds=seconds, alone=0.75)
    assert cells[:5] == ["16", "2", "4.0", "50", "1500 (1250 … 1750)"]
    assert cells[5:10] == [
        "50 (50 … 50)",
        "30 (30 … 30)",
        "20 (20 … 20)",
        "10 (10 … 10)",
        "5 (3 … 8)",  # 10 and 0 %
    ]
    assert cells[10] == "10 (10 … 10)"
