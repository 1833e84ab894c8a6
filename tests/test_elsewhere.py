"""Where a system has no Unix (fcntl, resource, some signals), and where one core may be used."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from conftest import DIGITS, QUICK, REPOSITORY
from data_sets.sources import in_threads
from engine.run_folder import is_locked, lock
from experiments import rows
from runtime import files
from runtime.errors import UserError
from runtime.processes import usable_cores
from test_own_events import write_all

# What Windows has not, before anything is imported.
HIDE = """
import os, signal, sys
for name in ("fcntl", "resource"):
    sys.modules[name] = None
for module, names in (
    (os, ("sched_getaffinity", "pathconf", "pwrite")), (signal, ("SIGUSR1", "SIGHUP"))
):
    for name in names:
        delattr(module, name)
"""


def run(code: str, *arguments: object, **how) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", HIDE + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        **how,
    )


@pytest.fixture(params=["fcntl", "filelock"])
def both(request, monkeypatch) -> str:
    """Unix's locks, and those of other systems."""
    if request.param == "filelock":
        monkeypatch.setattr(files, "fcntl", None)
    return request.param


def test_what_is_made_is_made_by_one_at_a_time_and_others_say_that_they_wait(both, tmp_path, capfd):
    inside, most = [], []

    def make(number: int) -> None:
        with files.file_lock(tmp_path / "made"):
            inside.append(number)
            most.append(len(inside))
            if len(most) == 1:
                started.wait(10)
            inside.remove(number)

    started = threading.Event()
    threads = [threading.Thread(target=make, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    while capfd.readouterr().out.count("waiting for the process that makes") == 0:
        pass
    started.set()
    for thread in threads:
        thread.join(30)
    assert most == [1] * 4


@pytest.mark.parametrize("look", [1, 2])
def test_a_lock_whose_file_goes_when_it_is_looked_at_is_taken_anew(look, tmp_path, monkeypatch):
    stat, looks = Path.stat, []

    def gone(path: Path, **how: bool) -> os.stat_result:
        if path.name == ".made.lock":
            looks.append(path)
            if len(looks) == look:  # its owner ends
                path.unlink()
        return stat(path, **how)

    monkeypatch.setattr(Path, "stat", gone)
    with files.file_lock(tmp_path / "made"):
        assert ".made.lock" in os.listdir(tmp_path)
    assert looks


def test_a_file_that_a_dead_process_has_left_is_no_lock(both, tmp_path):
    (tmp_path / ".made.lock").touch()
    with files.file_lock(tmp_path / "made"):
        pass


def test_a_run_s_folder_is_another_process_s_until_that_ends(both, tmp_path):
    hide = "from runtime import files\nfiles.fcntl = None\n" if both == "filelock" else ""
    code = "import sys; from pathlib import Path; from engine.run_folder import lock\n"
    code += "file = lock(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    assert not is_locked(tmp_path)
    other = subprocess.Popen(
        [sys.executable, "-c", hide + code, tmp_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=REPOSITORY,
    )
    with other:
        assert other.stdout.readline() == b"held\n"
        assert is_locked(tmp_path)
        with pytest.raises(UserError, match="another run is writing"):
            lock(tmp_path)
        other.stdin.close()
        other.wait(30)
    assert not is_locked(tmp_path)
    lock(tmp_path).close()
    lock(tmp_path).close()


def test_rows_are_written_by_one_study_at_a_time(both, tmp_path):
    path = tmp_path / "rows.csv"
    order = []

    def write(number: int) -> None:
        file = os.open(path, os.O_RDWR | os.O_CREAT)
        with files.writing_alone(file, path):
            order.extend([number] * 2)
            rows._write(file, b"x" * len(order), 0)
        os.close(file)

    threads = [threading.Thread(target=write, args=[number]) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert order[::2] == order[1::2]
    assert path.read_bytes() == b"x" * 10


def test_a_training_and_what_follows_work_without_unix(tmp_path):
    write_all(tmp_path / "mine", {"train": 2, "val": 1})
    prepare = ["prepare", "--data", "events", "--data_path", str(tmp_path / "mine")]
    train = [*DIGITS, "--paper_setting", "original", "--save_path", str(tmp_path / "run")]
    dry, resumed = [*train, "--dry_run"], [*train, "--resume", "--epochs", "2"]
    test = ["--eval_only", str(tmp_path / "run/original-best.pth")]
    code = "import data_loader, json, main\n"
    code += f"assert data_loader.main({prepare}) == 0\n"
    code += f"for x in {[dry, train, resumed, test]}: assert main.main(x) == 0, x"
    result = run(code)
    assert result.returncode == 0, result.stderr[-2000:]
    dry, rest = result.stdout.split("best accuracy", 1)
    assert "about" in dry
    assert "\nmemory" not in dry
    assert "of 360" in rest


def test_every_command_starts_without_unix(tmp_path):
    modules = [
        *(x.stem for x in REPOSITORY.glob("*.py")),
        *(
            f"{path.parent.name}.{path.stem}"
            for folder in ("engine", "experiments", "spikesim_eval", "runtime", "data_sets")
            for path in (REPOSITORY / folder).glob("*.py")
            if path.stem not in ("__main__", "__init__")
        ),
    ]
    code = "import importlib\nfor name in sys.argv[1:]: importlib.import_module(name)"
    result = run(code, *modules)
    assert result.returncode == 0, result.stderr[-2000:]


def test_one_core_is_enough(monkeypatch, tmp_path):
    if hasattr(os, "sched_getaffinity"):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
        assert usable_cores() == 1
    assert list(in_threads(lambda x: x + 1, range(20), "counting")) == list(range(1, 21))
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores() == 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores cannot be chosen here")
def test_a_training_on_one_core_takes_one_loader(tmp_path):
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    code += "import sys, main; sys.exit(main.main(sys.argv[1:]))"
    options = ["--data", "digits", *QUICK, "--paper_setting", "original"]
    result = subprocess.run(
        [sys.executable, "-c", code, *options, "--save_path", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert '"workers": 1' in Path(tmp_path / "run/settings.json").read_text()
