"""What was trained is not lost: a save path that holds an epoch is refused, or moved as a whole."""

import errno
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import main
from checkpoints import load_checkpoint
from conftest import refused
from engine import run_folder
from runtime.errors import UserError

TINY = ["--data", "digits", "--width", "1", "--batch_size", "240", "--workers", "0"]
TINY += ["--epochs", "1"]
STUDENT = [*TINY, "--paper_setting", "student", "--bits", "4"]
ORIGINAL = [*TINY, "--paper_setting", "original"]
FILES = {"student-last.pth", "student-best.pth", "student-best.md", "metrics.csv", "settings.json"}
FILES |= {".lock", run_folder.EVENTS}


@pytest.fixture(scope="module")
def one_epoch(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert main.main([*STUDENT, "--save_path", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def no_epoch(tmp_path_factory) -> Path:
    """What a run leaves that is stopped in its first epoch."""
    folder = tmp_path_factory.mktemp("stopped") / "run"

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(main, "train_epoch", stop)
        assert main.main([*STUDENT, "--save_path", str(folder)]) == 130
    of_an_epoch = {"student-best.pth", "student-best.md"}
    assert {path.name for path in folder.iterdir()} == FILES - of_an_epoch
    return folder


@pytest.fixture
def run(one_epoch, tmp_path) -> Path:
    return Path(shutil.copytree(one_epoch, tmp_path / "run"))


def contents(folder: Path) -> dict[str, bytes | None]:
    """All files below the folder, and the empty folders."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def refusal(options: list[str], folder: Path, capfd, monkeypatch) -> str:
    """The line with which main.py refuses the folder, before it reads data and changing nothing."""

    def never(*_: object) -> None:
        raise AssertionError("data are read")

    before = contents(folder.parent)
    monkeypatch.setattr(main, "load_same_data", never)
    line = refused(capfd, main.main, [*options, "--save_path", str(folder)])
    monkeypatch.undo()
    assert contents(folder.parent) == before
    return line


def test_forgotten_options_cost_nothing_however_often(run, trained, capfd, monkeypatch):
    qamd = [*TINY, "--width", "2", "--paper_setting", "qamd", "--bits", "4"]
    qamd += ["--teacher_path", str(trained["original"])]
    for options in (STUDENT, STUDENT, [*STUDENT, "--seed", "5"], ORIGINAL, qamd):
        line = refusal(options, run, capfd, monkeypatch)
        assert f"{run} already holds student-last.pth: " in line
        assert f"--overwrite moves all to {run}.1 and starts anew" in line
        assert ("--resume goes on with it" in line) == ("student" in options)
    for setting, options in (("original", ORIGINAL), ("qamd", qamd)):
        line = refusal([*options, "--resume"], run, capfd, monkeypatch)
        assert f"holds student-last.pth but no {setting}-last.pth to go on from" in line


def test_a_run_does_not_go_on_over_another_run_in_its_folder(run, no_epoch, capfd, monkeypatch):
    other = run.with_name("other")
    shutil.copytree(no_epoch, other)
    for name in ("last", "best"):
        shutil.copy(run / f"student-{name}.pth", other / f"original-{name}.pth")
    line = refusal([*STUDENT, "--resume"], other, capfd, monkeypatch)
    assert "holds original-last.pth of another run than student-last.pth" in line


@pytest.mark.parametrize("kept", ["student-last.pth", "student-best.pth", *run_folder.LOGS])
def test_any_part_of_a_run_is_kept(kept, one_epoch, tmp_path, capfd, monkeypatch):
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(one_epoch / kept, folder)
    assert f"already holds {kept}: " in refusal(STUDENT, folder, capfd, monkeypatch)
    if kept != "student-last.pth":
        line = refusal([*STUDENT, "--resume"], folder, capfd, monkeypatch)
        assert f"holds {kept} but no student-last.pth to go on from: --overwrite instead" in line


def test_what_cannot_be_read_is_kept(no_epoch, tmp_path, capfd, monkeypatch):
    for name, content in (
        ("student-last.pth", (no_epoch / "student-last.pth").read_bytes()[:-100]),
        ("qamd-last.pth", b""),
    ):
        folder = Path(shutil.copytree(no_epoch, tmp_path / name.split(".")[0] / "run"))
        (folder / name).write_bytes(content)
        assert f"already holds {name}: " in refusal(STUDENT, folder, capfd, monkeypatch)


def test_no_message_recommends_what_would_be_refused(run, trained, capfd, monkeypatch):
    qamd = [*TINY, "--width", "2", "--paper_setting", "qamd", "--bits", "4", "--teacher_path"]
    shutil.copy(trained["original"], run)
    for options in ([*qamd, str(run / "original-best.pth")], [*STUDENT, "--data_path", str(run)]):
        line = refusal(options, run, capfd, monkeypatch)
        assert line.endswith("already holds original-best.pth: choose another --save_path\n")
    (run / "original-best.pth").unlink()
    last = run / "student-last.pth"
    last.write_bytes(last.read_bytes()[:-100])
    assert "--resume" not in refusal(STUDENT, run, capfd, monkeypatch)
    line = refusal([*STUDENT, "--resume"], run, capfd, monkeypatch)
    assert f"{last} is not a checkpoint of this program, or it is truncated: " in line
    assert f"--overwrite instead of --resume moves all to {run}.1 and starts anew; or" in line


def test_a_run_that_goes_on_without_its_best_checkpoint_says_so(run, capfd):
    (run / "student-best.pth").unlink()
    assert main.main([*STUDENT, "--resume", "--save_path", str(run)]) == 0
    assert f"warning: {run / 'student-best.pth'} is missing" in capfd.readouterr().err
    assert main.main([*STUDENT, "--overwrite", "--save_path", str(run)]) == 0
    assert "is missing" not in capfd.readouterr().err


@pytest.mark.parametrize("option", [[], ["--overwrite"]])
def test_a_run_without_an_epoch_is_replaced_and_other_files_stay(option, no_epoch, tmp_path, capfd):
    folder = Path(shutil.copytree(no_epoch, tmp_path / "run"))
    (folder / "settings.json").write_text('{\n  "da')  # the disk was full
    (folder / "notes.txt").write_text("mine")
    (folder / "events.out.tfevents.of-another-program").write_text("theirs")
    assert main.main([*STUDENT, *option, "--save_path", str(folder)]) == 0
    assert load_checkpoint(folder / "student-last.pth").epoch == 1
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "events.out.tfevents.of-another-program").read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [folder]
    assert "is now in" not in capfd.readouterr().out


def test_overwrite_moves_the_whole_folder_bit_for_bit_and_again(run, one_epoch, capfd):
    (run / "edap").mkdir()
    (run / "edap" / "report.json").write_text("{}")
    (run / "finished").touch()
    (run / "empty").mkdir()
    run.chmod(0o750)
    first = contents(run)
    taken = run.with_name("run.2")
    taken.write_text("a file of the user's")
    assert main.main([*ORIGINAL, "--overwrite", "--save_path", str(run)]) == 0
    assert capfd.readouterr().out.splitlines()[0] == f"what was in {run} is now in {run}.1"
    second = contents(run)
    assert second.keys() == {name.replace("student", "original") for name in FILES}
    assert run.stat().st_mode & 0o777 == 0o750
    assert main.main([*STUDENT, "--overwrite", "--save_path", f"{run}/"]) == 0
    assert contents(run.with_name("run.1")) == first
    assert taken.read_text() == "a file of the user's"
    assert contents(run.with_name("run.3")) == second
    assert load_checkpoint(run / "student-last.pth").epoch == 1


def test_a_link_goes_on_pointing_where_it_did(run, tmp_path):
    before = contents(run)
    (tmp_path / "here").mkdir()
    link = tmp_path / "here" / "link"
    link.symlink_to(run)
    assert main.main([*STUDENT, "--overwrite", "--save_path", str(link)]) == 0
    assert link.readlink() == run
    assert contents(run.with_name("run.1")) == before
    assert contents(run).keys() == FILES


@contextmanager
def being_written(folder: Path) -> Iterator[None]:
    """Another process holds the folder's lock. (This one's own would not keep it out.)"""
    code = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); "
    code += "print(flush=True); sys.stdin.read()"
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-c", code, str(folder / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        yield
        process.stdin.close()


def test_a_run_that_is_being_written_is_not_moved(run, capfd, monkeypatch):
    with being_written(run):
        line = refusal([*STUDENT, "--overwrite"], run, capfd, monkeypatch)
        assert f"another run is writing into {run}: " in line
        before = contents(run.parent)
        assert run_folder.main([str(run)]) == 2
    nested = run / "nested"
    nested.mkdir()
    with being_written(nested):
        before = contents(run.parent)
        assert main.main([*STUDENT, "--overwrite", "--save_path", str(run)]) == 2
        assert f"another run is writing into {nested}: " in capfd.readouterr().err
        assert contents(run.parent) == before


def test_a_run_is_refused_whose_folder_moved_before_it_had_the_lock(run, monkeypatch):
    lockf = fcntl.lockf

    def moved(*arguments: object) -> None:
        run.rename(run.with_name("run.1"))
        run.mkdir()
        lockf(*arguments)

    monkeypatch.setattr(fcntl, "lockf", moved)
    with pytest.raises(UserError, match="another run is writing"):
        run_folder.lock(run)
    assert list(run.iterdir()) == []


NEEDED = ["the current folder", "--data_path", "--cache_path", "--teacher_path"]


@pytest.mark.parametrize("in_it", NEEDED)
def test_a_folder_that_the_command_needs_is_not_moved(in_it, run, trained, capfd, monkeypatch):
    options, folder = [*STUDENT, "--overwrite"], run
    if in_it == "the current folder":
        (run / "below").mkdir()
        monkeypatch.chdir(run / "below")
        folder = Path("..")
    elif in_it != "--teacher_path":
        options += [in_it, str(run / "data")]
    else:
        shutil.copy(trained["original"], run)
        options = [*TINY, "--width", "2", "--paper_setting", "qamd", "--bits", "4", "--overwrite"]
        options += ["--teacher_path", str(run / "original-best.pth")]
    before = contents(run.parent)
    assert f"{folder} cannot be moved to {run}.1 ({in_it} is in it): choose another" in refused(
        capfd, main.main, [*options, "--save_path", str(folder)]
    )
    assert contents(run.parent) == before


def test_a_folder_that_the_system_does_not_move_stays_as_it_is(run, capfd, monkeypatch):
    long = run.rename(run.with_name("x" * 254))
    assert "File name too long" in refusal([*STUDENT, "--overwrite"], long, capfd, monkeypatch)
    run = long.rename(run)
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == run)
    before = contents(run.parent)
    assert main.main([*STUDENT, "--overwrite", "--save_path", str(run)]) == 2
    assert "(it is a mount point)" in capfd.readouterr().err
    monkeypatch.undo()

    def busy(*_: object) -> None:  # a bind mount, which cannot be told from a folder
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr(Path, "rename", busy)
    assert f"{run} cannot be moved to {run}.1 (Device or resource busy)" in refused(
        capfd, main.main, [*STUDENT, "--overwrite", "--save_path", str(run)]
    )
    assert contents(run.parent) == before


def test_a_folder_of_runs_is_moved_from_the_command_line(run, one_epoch, tmp_path, capfd):
    assert run_folder.main([str(tmp_path / "missing")]) == 0
    assert list(tmp_path.iterdir()) == [run]
    assert run_folder.main([str(run)]) == 0
    assert capfd.readouterr().out == f"what was in {run} is now in {run}.1\n"
    assert contents(run.with_name("run.1")) == contents(one_epoch)
    assert run_folder.main([str(run)]) == 0  # empty
    assert {path.name for path in tmp_path.iterdir()} == {"run", "run.1"}
    for wrong in ([], ["--help"], [str(run), "x"], [str(run.with_name("run.1") / "metrics.csv")]):
        refused(capfd, run_folder.main, wrong)


def test_a_folder_of_runs_stays_where_the_trainings_to_come_are_refused_or_go_on(run, capfd):
    before = contents(run)
    best = str(run / "student-best.pth")
    for wrong in (
        ["--bits", "4"],
        ["--epoch", "5"],
        ["--epochs", "many"],
        ["--dry_run"],
        ["--eval_only", best, "--paper_setting", "student"],
    ):
        options = ["--data", "digits", "--paper_setting", "original", *wrong]
        assert wrong[0] in refused(capfd, run_folder.main, [str(run), *options])
    assert run_folder.main([str(run), *STUDENT, "--resume"]) == 0
    assert contents(run) == before
    assert run_folder.main([str(run), *STUDENT]) == 0
    assert contents(run.with_name("run.1")) == before


def test_a_checkpoint_says_that_its_run_was_started_anew_and_goes_on_without(run, capfd):
    assert main.main([*STUDENT, "--overwrite", "--save_path", str(run)]) == 0
    assert torch.load(run / "student-last.pth", weights_only=True)["settings"]["overwrite"] is True
    assert main.main([*STUDENT, "--resume", "--epochs", "2", "--save_path", str(run)]) == 0
    assert load_checkpoint(run / "student-last.pth").epoch == 2
