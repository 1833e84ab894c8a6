"""What is on the screen, and in torchrun's error file, when a run ends. See also test_bad_input,
test_faults and test_scripts, which end runs under launchers."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import main
from conftest import REPOSITORY
from runtime import launcher


def test_ctrl_c_while_modules_are_loaded_is_one_line(tmp_path):
    path = tmp_path / "error.json"
    process = subprocess.Popen(
        # Slower than this test, which has to find it while it loads.
        ["nice", "-n", "5", sys.executable, str(REPOSITORY / "main.py"), "--data", "digits"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"TORCHELASTIC_ERROR_FILE": str(path)},
        # Tests in the background ignore it, and so would their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[0] == "main.py: interrupted\n"
    assert process.returncode == 130
    assert json.loads(path.read_text())["message"]["message"] == "interrupted"


def test_ctrl_c_that_a_job_ignores_stays_ignored_while_modules_are_loaded():
    command = f"trap '' INT; exec nice -n 5 {sys.executable} {REPOSITORY / 'main.py'} --epochs 0"
    process = subprocess.Popen(["bash", "-c", command], stderr=subprocess.PIPE, text=True)
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert "main.py: error: --data is required" in process.communicate(timeout=60)[1]
    assert process.returncode == 2


def test_a_fault_of_the_program_leaves_its_traceback_to_the_launcher(tmp_path, monkeypatch):
    def broken(*_: object) -> None:
        raise KeyError("no such thing")

    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    monkeypatch.setattr(main, "parse_settings", broken)
    with pytest.raises(KeyError):
        main.main([])
    message = json.loads(path.read_text())["message"]
    assert message["message"] == "KeyError('no such thing')"
    assert message["extraInfo"]["py_callstack"].endswith("KeyError: 'no such thing'\n")


@pytest.mark.parametrize("path", ["", "missing/error.json"])
def test_a_launcher_without_an_error_file_is_left_alone(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", path)
    launcher.leave_for_launcher("text")
    assert list(tmp_path.iterdir()) == []


SPEAK = "from runtime import launcher; launcher.say_last('the sentence', {code})"
LAUNCHER = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]]); print('x')"


@pytest.mark.parametrize(
    ("attempts", "code", "again"),
    [({}, 2, 0), ((0, 0), 2, 1), ((0, 1), 2, 0), ((1, 1), 2, 1), ((0, 1), 130, 1)],
)
def test_the_sentence_is_said_again_only_where_the_launcher_ends_with_it(attempts, code, again):
    """Not by hand or Slurm alone, and not where torchrun starts the processes again."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    if attempts:
        environment["TORCHELASTIC_RUN_ID"] = "run"
        names = ("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS")
        environment |= dict(zip(names, map(str, attempts), strict=True))
    start = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-u", "-c", LAUNCHER, SPEAK.format(code=code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        text=True,
    )
    assert result.stdout.splitlines() == ["the sentence", "x"] + ["the sentence"] * again
    assert time.monotonic() - start < 30  # nobody waits for a launcher that has gone
