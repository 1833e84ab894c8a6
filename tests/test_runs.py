"""experiments.runs on runs of main.py that are finished, stopped, going on, broken or foreign."""

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.colors import same_color

from conftest import REPOSITORY, refused, reported
from display import COLOURS
from engine.run_folder import is_locked, read_metrics
from experiments import curves, runs
from experiments.found_runs import compared, find_runs, names_of
from runtime.files import digest
from settings import Settings, complete


def output(arguments: list[str], capfd) -> tuple[str, str]:
    capfd.readouterr()
    assert runs.main(arguments) == 0
    return capfd.readouterr()


def csv_of(folders: list[Path], capfd) -> tuple[str, str]:
    return output(["table", *map(str, folders), "--format", "csv"], capfd)


def change(run: Path, of_settings: dict[str, Any], rows: Callable[[list], None]) -> None:
    """Change the settings and the metrics of a real run's checkpoints and files."""
    for path in run.glob("*.pth"):
        content = torch.load(path, weights_only=True)
        content["settings"] |= of_settings
        rows(content["rows"])
        content["accuracy"] = content["rows"][-1]["test_accuracy"]
        content["epoch"] = len(content["rows"])
        torch.save(content, path)
    settings = json.loads((run / "settings.json").read_text()) | of_settings
    (run / "settings.json").write_text(json.dumps(settings, indent=2))
    metrics = read_metrics(run / "metrics.csv")
    rows(metrics)
    with (run / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [x for x in metrics[0] if x != "time"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(metrics)


def with_accuracy(accuracy: float) -> Callable[[list], None]:
    def change_rows(rows: list[dict]) -> None:
        rows[-1] |= {"test_accuracy": accuracy, "best_accuracy": accuracy}

    return change_rows


def two_epochs(rows: list[dict]) -> None:
    rows.append(rows[0] | {"epoch": 2})


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory) -> Path:
    """Two teachers, two students and two MD-SNN, of seeds 0 and 1, with a report of one; the first
    ones are real, the others have other accuracies."""
    folder = tmp_path_factory.mktemp("runs") / "all"
    for setting, path in trained.items():
        run = Path(shutil.copytree(path.parent, folder / f"{setting}-0"))
        shutil.copytree(run, folder / f"{setting}-1")
    for setting, zero, one in (("original", 0.9, 0.8), ("student", 0.5, 0.7), ("qamd", 0.8, 0.75)):
        for seed, accuracy in enumerate((zero, one)):
            change(folder / f"{setting}-{seed}", {"seed": seed}, with_accuracy(accuracy))
    for seed in (0, 1):
        teacher = folder / f"original-{seed}" / "original-best.pth"
        for path in (folder / f"qamd-{seed}").glob("*.pth"):
            content = torch.load(path, weights_only=True)
            torch.save(content | {"teacher": digest(teacher)}, path)
    return folder


@pytest.fixture
def copied(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "runs"))


def column(text: str, name: str) -> dict[str, str]:
    """A column of the CSV by the names of the groups."""
    return {row["name"]: row[name] for row in csv.DictReader(text.splitlines())}


def test_list_has_a_line_for_each_run_with_its_state_epochs_and_best(folder, capfd):
    out, err = output(["list", str(folder)], capfd)
    header, *lines = out.splitlines()
    assert header.split() == ["run", "state", "epoch", "best", "last", "time", "folder"]
    assert err == ""
    by_folder = {line.split()[-1]: line for line in lines}
    assert set(by_folder) == {str(path) for path in folder.iterdir()}
    line = by_folder[str(folder / "qamd-1")]
    assert line.startswith("MD-SNN, 4 bits, seed 1 ")
    assert "finished" in line
    assert "1/1  75.00 % (epoch 1)  75.00 %" in line


def test_a_run_that_goes_on_is_told_from_one_that_was_stopped(copied, capfd):
    run = copied / "student-0"
    change(run, {"epochs": 3}, lambda rows: rows.append(rows[0] | {"epoch": 2, "seconds": 60.0}))
    hold = "import sys; from pathlib import Path; from engine.run_folder import lock; "
    hold += "file = lock(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    command, pipe = [sys.executable, "-c", hold, str(run)], subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, cwd=REPOSITORY)
    assert process.stdout.readline() == b"held\n"
    assert is_locked(run)
    out, _ = output(["list", str(run)], capfd)
    assert "going on" in out
    assert "2/3" in out
    assert " left" in out
    process.communicate()
    assert not is_locked(run)
    out, _ = output(["list", str(run)], capfd)
    assert "stopped" in out
    assert " left" not in out


def test_what_is_broken_or_foreign_is_named_and_the_rest_is_shown(copied, capfd):
    (copied / "qamd-1" / "qamd-last.pth").write_bytes(b"half")  # its metrics.csv is whole
    with (copied / "qamd-1" / "metrics.csv").open("a") as file:
        file.write("2,0.1,1.")  # just being written
    for name in ("last", "best"):
        (copied / "student-1" / f"student-{name}.pth").unlink()
    (copied / "student-1" / "metrics.csv").write_text("epoch,test_accuracy\none,0.5\n")
    broken = {
        "foreign/settings.json": b'{"editor.fontSize": 12}',
        "not-json/settings.json": b"\xff{",
        "list/settings.json": b"[" * 100_000,
        "empty/settings.json": b"",
        "alone/metrics.csv": b"epoch\n1\n",
        "binary/metrics.csv": b"\0\xff\n\0",
        "checkpoint/qamd-last.pth": b"PK",
        ".hidden/settings.json": b"{",
    }
    for name, content in broken.items():
        (copied / name).parent.mkdir()
        (copied / name).write_bytes(content)
    (copied / "qamd-0").rename(copied / "a\nb\udcff")
    (copied / "circle").symlink_to(copied)
    (copied / "nowhere").symlink_to("nowhere")
    out, err = output(["list", str(copied), str(copied / "original-0")], capfd)
    assert len(out.splitlines()) == 1 + 5
    assert "a\N{REPLACEMENT CHARACTER}b" in out
    assert "qamd-last.pth is not a checkpoint" in err
    assert "metrics.csv was read instead" in err
    assert f"{copied / 'student-1' / 'metrics.csv'} is not the metrics.csv of a run" in err
    for name in broken:
        assert (f"{copied / name.split('/')[0]}" in err) == (not name.startswith(".")), name
    assert all(line.startswith("experiments.runs: warning: ") for line in err.splitlines())
    for command in (["table"], ["curves", "--out", str(copied / "curves")]):
        output([*command, str(copied)], capfd)
    assert runs.main(["list", str(copied / "empty")]) == 2
    assert "there is no run below" in capfd.readouterr().err.splitlines()[-1]
    refused(capfd, runs.main, ["list", str(copied / "missing")])


def test_a_run_of_which_only_text_or_only_the_best_checkpoint_is_left_is_read(copied):
    for path in (copied / "original-0").glob("*.pth"):
        path.unlink()
    for name in ("original-last.pth", "settings.json", "metrics.csv"):
        (copied / "original-1" / name).unlink()
    text, best = find_runs([copied / "original-0", copied / "original-1"])
    assert (text.rows[-1]["test_accuracy"], text.settings.seed) == (0.9, 0)
    assert (best.rows[-1]["test_accuracy"], best.settings.seed) == (0.8, 1)


def test_table_gives_means_standard_errors_and_the_drop_to_each_run_s_own_teacher(folder, capfd):
    out, err = csv_of([folder], capfd)
    assert err == ""
    names = ["teacher", "student, 4 bits", "MD-SNN, 4 bits"]
    mean = column(out, "accuracy_last_epoch_percent_mean")
    assert list(mean) == names
    assert [float(x) for x in mean.values()] == pytest.approx([85, 60, 77.5])
    # s / √n of two values is half their distance
    errors = column(out, "accuracy_last_epoch_percent_standard_error")
    assert [float(x) for x in errors.values()] == pytest.approx([5, 10, 2.5])
    # 90 − 80 and 80 − 75 points; the student has no teacher
    drop = column(out, "drop_to_teacher_last_epoch_points_mean")
    assert float(drop["MD-SNN, 4 bits"]) == pytest.approx(7.5)
    assert drop["student, 4 bits"] == drop["teacher"] == ""
    drop_error = column(out, "drop_to_teacher_last_epoch_points_standard_error")
    assert float(drop_error["MD-SNN, 4 bits"]) == pytest.approx(2.5)

    out, _ = output(["table", str(folder)], capfd)
    (line,) = (line for line in out.splitlines() if line.startswith("| MD-SNN"))
    assert line.startswith("| MD-SNN, 4 bits | 2 | 77.50 ± 2.50 | 77.50 ± 2.50 | 7.50 ± 2.50 |")
    assert "The drop is of the last epoch, to the very file that taught the run." in out
    out, _ = output(["table", str(folder), "--format", "latex"], capfd)
    lines = [line for line in out.splitlines() if line.endswith(r" \\")]
    assert len({line.count(" & ") for line in lines}) == 1
    assert r"MD-SNN, 4 bits & 2 & 77.50 $\pm$ 2.50" in out
    assert not any(x in line for line in lines for x in "±×µ·²")


def test_a_group_counts_finished_runs_once_a_seed_and_says_what_it_leaves_out(copied, capfd):
    shutil.copytree(copied / "student-1", copied / "student-1.1")  # as --overwrite moves it
    change(copied / "student-1.1", {}, lambda rows: rows[-1].update(time=0.0, test_accuracy=0.1))
    shutil.copytree(copied / "student-1", copied / "student-2")
    change(copied / "student-2", {"seed": 2, "epochs": 2}, lambda rows: None)
    for seed in (0, 1):
        change(copied / f"student-{seed}", {"epochs": 2}, two_epochs)
    change(copied / "student-1.1", {"epochs": 2}, two_epochs)
    out, err = output(["table", str(copied)], capfd)
    assert "| student, 4 bits, epochs 2 | 2 (+ 1 unfinished) | 60.00 ± 10.00 |" in out
    assert f"{copied / 'student-1.1'} has the settings and the seed of" in err


def test_other_settings_are_other_groups_and_paths_are_not_settings(copied, capfd):
    change(copied / "student-1", {"lr": 0.05}, lambda rows: None)
    change(copied / "qamd-1", {"workers": 3, "data_path": "elsewhere"}, lambda rows: None)
    out, _ = csv_of([copied], capfd)
    finished = column(out, "runs_finished")
    assert finished["student, 4 bits, lr 0.05"] == finished["student, 4 bits, lr 0.1"] == "1"
    change(copied / "student-1", {"lr": 1.0}, lambda rows: None)
    out, _ = csv_of([copied], capfd)
    assert "student, 4 bits, lr 1" in column(out, "runs_finished")
    assert finished["MD-SNN, 4 bits, lr 0.1"] == "2"


def test_no_drop_is_shown_to_a_teacher_s_file_that_is_another_now(copied, capfd):
    change(copied / "original-1", {}, with_accuracy(0.99))
    out, err = csv_of([copied], capfd)
    assert f"{copied / 'qamd-1'}: the file that taught it" in err
    assert "no drop to it is shown" in err
    # the two differ in what taught them now
    means = column(out, "drop_to_teacher_last_epoch_points_mean")
    assert means["MD-SNN, 4 bits, taught by an unknown teacher"] == ""
    assert float(means["MD-SNN, 4 bits, taught by teacher"]) == pytest.approx(10)


def test_a_teacher_is_found_by_the_run_s_name_or_path_where_the_checkpoint_is_gone(copied, capfd):
    teacher = copied / "original-1" / "original-best.pth"
    run = copied / "qamd-1"
    for path in run.glob("*.pth"):
        path.unlink()
    name = f"digits-qamd-CLK-4bit-teacher{digest(teacher)[:6]}-depth18-width2-T4-seed1"
    named = run.rename(copied / name)
    drop = "drop_to_teacher_last_epoch_points_mean"
    out, _ = csv_of([named, teacher.parent], capfd)
    assert float(column(out, drop)["MD-SNN, 4 bits"]) == pytest.approx(5)
    bare = named.rename(copied / "bare")
    settings = json.loads((bare / "settings.json").read_text())
    settings["teacher_path"] = str(teacher)
    (bare / "settings.json").write_text(json.dumps(settings))
    out, _ = csv_of([bare], capfd)
    assert float(column(out, drop)["MD-SNN, 4 bits"]) == pytest.approx(5)


def test_the_best_epoch_is_chosen_by_the_validation_accuracy_where_there_is_one(copied, capfd):
    def rows(rows: list[dict]) -> None:
        first = rows[0] | {"test_accuracy": 0.6, "val_accuracy": 0.9, "val_loss": 0.3}
        second = first | {"epoch": 2, "test_accuracy": 0.7, "val_accuracy": 0.8, "test_loss": 0.4}
        rows[:] = [first, second]

    run = copied / "original-0"
    change(run, {"epochs": 2, "val_share": 0.1}, rows)
    out, _ = output(["list", str(run)], capfd)
    assert "validation 90.00 % (epoch 1), test 60.00 %  70.00 %" in out
    out, _ = output(["table", str(run)], capfd)
    assert "| teacher | 1 | 70.00 | 60.00 | 90.00 | 0.400 |" in out
    assert "the best epoch is chosen by it" in out
    assert "on the test set" not in out


def test_edap_is_taken_from_the_report_of_the_run_s_own_network(copied, trained, capfd):
    run = copied / "student-0"
    shutil.copytree(trained["student"].parent, run, dirs_exist_ok=True)
    last = run / "student-last.pth"
    report = reported(run / "edap", f"--checkpoint {last}")
    total = report["total"]
    out, err = csv_of([run], capfd)
    expected = total["energy_pj"] * 1e-6 * total["delay_ns"] * 1e-6 * total["area_um2"] * 1e-6
    assert float(column(out, "edap_uj_ms_mm2_mean")["student, 4 bits"]) == pytest.approx(expected)
    assert err == ""

    for change_report, said in (
        ({"name": "other.pth"}, "is of another network"),
        ({"accuracy": 0.99}, "is of another network"),
        ({"network": report["network"] | {"time_steps": 2}}, "is of another network"),
        ({"total": None}, "is no report of spikesim_eval"),
        ({"total": {}}, "is no report of spikesim_eval"),
    ):
        (run / "edap" / "report.json").write_text(json.dumps(report | change_report))
        out, err = csv_of([run], capfd)
        assert said in err
        assert "edap" not in out
    (run / "report.json").write_text(json.dumps(report))
    other = report | {"chip": report["chip"] | {"xbar_size": 128}}
    (run / "edap" / "report.json").write_text(json.dumps(other))
    out, err = csv_of([run], capfd)
    assert "reports of 2 chips: no EDAP is shown" in err


def test_curves_have_a_panel_a_measure_and_a_line_a_run_in_its_own_colour(folder, tmp_path, capfd):
    out, _ = output(["curves", str(folder), "--out", str(tmp_path / "new" / "c.png")], capfd)
    png, pdf = map(Path, out.splitlines())
    assert (png.name, pdf.name) == ("c.png", "c.pdf")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert pdf.read_bytes().startswith(b"%PDF")

    figure = curves.picture(find_runs([folder / f"{x}-0" for x in ("original", "student", "qamd")]))
    shown = [
        "test_accuracy",
        "train_accuracy",
        "loss",
        "ce",
        "logit",
        "membrane",
        "test_loss",
        "lr",
    ]
    assert [panel.get_title() for panel in figure.axes] == [curves.PANELS[x][0] for x in shown]
    accuracy = figure.axes[0]
    kinds = {"teacher": "teacher", "student, 4 bits": "student", "MD-SNN, 4 bits": "MD-SNN"}
    for line in accuracy.lines:
        assert same_color(line.get_color(), COLOURS[kinds[line.get_label()]])
    values = {line.get_label(): [*line.get_ydata()] for line in accuracy.lines}
    assert values == {"teacher": [90], "student, 4 bits": [50], "MD-SNN, 4 bits": [80]}
    assert figure.axes[1].get_ylim() == accuracy.get_ylim()
    training = find_runs([folder / "original-0"])[0].rows[0]["train_accuracy"]
    assert accuracy.get_ylim()[0] < 100 * training  # no panel cuts the other's lines


def test_curves_of_runs_without_an_epoch_are_refused_in_one_line(copied, tmp_path, capfd):
    run = copied / "student-0"
    for path in run.glob("*.pth"):
        content = torch.load(path, weights_only=True)
        torch.save(content | {"rows": [], "epoch": 0}, path)
    out, _ = output(["list", str(run)], capfd)
    assert "0/1" in out
    for folder, name in ((run, "c"), (copied / "qamd-0", "qamd-0.txt/c")):
        (tmp_path / "qamd-0.txt").touch()
        capfd.readouterr()
        assert runs.main(["curves", str(folder), "--out", str(tmp_path / name)]) == 2
        assert capfd.readouterr().err.splitlines()[-1].startswith("experiments.runs: error: ")


def test_a_network_of_one_s_own_is_told_by_its_file_wherever_that_lies():
    given = complete({"data": "digits", "paper_setting": "original", "arch": "nets.py:Tiny"})
    here, there, other = (
        Settings(**given | {"arch": f"/{folder}/nets.py:Tiny"}, arch_digest=2 * digest)
        for folder, digest in (("here", "a" * 32), ("there", "a" * 32), ("there", "b" * 32))
    )
    assert compared(here) == compared(there) != compared(other)
    assert names_of([here, other]) == ["teacher, arch Tiny@aaaaaaaa", "teacher, arch Tiny@bbbbbbbb"]
