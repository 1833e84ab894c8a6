"""A teacher, an evaluation and a training of other numbers of timesteps T, by the real commands."""

import pytest

import main
from conftest import DIGITS
from load_settings import load_checkpoint


@pytest.fixture(scope="module")
def taught(trained, tmp_path_factory):
    """(folder, what was printed) of a student of T = 6 that started from and was taught by the
    teacher of T = 4."""
    folder = tmp_path_factory.mktemp("taught")
    return folder, [
        *[*DIGITS, "--paper_setting", "qamd", "--bits", "4", "--init_from_teacher"],
        *["--time_window", "6", "--teacher_path", str(trained["original"])],
        *["--save_path", str(folder), "--deterministic"],
    ]


def test_a_teacher_teaches_a_student_of_another_t_and_the_header_says_how_long_it_runs(
    taught, trained, capsys
):
    folder, command = taught
    assert main.main(command) == 0
    (teacher,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith("teacher"))
    assert teacher.endswith("T 4, run for 6 timesteps")
    settings = load_checkpoint(folder / "qamd-last.pth").settings
    assert (settings.time_window, settings.teacher_path) == (6, str(trained["original"]))
