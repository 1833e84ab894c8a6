"""A teacher, an evaluation and a training of other numbers of timesteps T, by the real commands."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import main
from checkpoints import load_checkpoint
from conftest import DIGITS, evaluated, read_csv, refused
from experiments.membrane_report import main as membrane_report
from experiments.runs import main as runs
from load_settings import load_network, parse_settings, time_window_of
from loading import data_sets_of
from models.neuron import LIF
from runtime.errors import UserError
from spikesim_eval.chip import Chip
from spikesim_eval.estimate import estimate
from spikesim_eval.report import build_report
from spikesim_eval.trace import trace_checkpoint
from stand_in_data import write_ncaltech101
from test_resume import PowerCutError, cut_off_after


@torch.no_grad()
def correct_at(path, time_window, test_set) -> int:
    """Counted independently."""
    network = load_network(path)
    network.time_window = time_window
    images, labels = zip(*test_set, strict=True)
    return (network(torch.stack(images)).argmax(1) == torch.tensor(labels)).sum().item()


def test_a_teacher_teaches_a_student_of_another_t(trained, tmp_path, capfd):
    teacher, folder = trained["original"], tmp_path / "run"
    command = [*DIGITS, "--paper_setting", "qamd", "--bits", "4", "--init_from_teacher"]
    command += ["--time_window", "6", "--teacher_path", str(teacher), "--save_path", str(folder)]
    assert main.main(command) == 0
    (said,) = (x for x in capfd.readouterr().out.splitlines() if x.startswith("teacher"))
    assert said.endswith("T 4, run for 6 timesteps")
    student = folder / "qamd-last.pth"
    assert load_checkpoint(student).settings.time_window == 6
    assert load_checkpoint(student).rest["rows"][0]["membrane"] > 0

    # The estimate of each is that of its own T.
    ours, theirs = (trace_checkpoint(str(path)) for path in (student, teacher))
    report = build_report(ours, Chip(), theirs)
    steps = [report[name]["time_steps"] for name in ("network", "baseline_network")]
    assert steps == [6, 4]
    edap = [estimate(x.network, Chip()).total["edap_pj_ns_um2"] for x in (ours, theirs)]
    assert report["ratio"]["edap"] == pytest.approx(edap[1] / edap[0], rel=1e-12)

    networks = ["--teacher", str(teacher), "--student", str(student), "--mdsnn", str(student)]
    assert membrane_report([*networks, "--out", str(tmp_path / "report")]) == 0
    rows = read_csv(tmp_path / "report" / "membrane_report.csv")
    assert len(rows) == 3 * 17 * 6
    networks[3] = str(trained["student"])
    assert membrane_report([*networks, "--out", str(tmp_path / "report")]) == 2
    assert "differ in --time_window" in capfd.readouterr().err


def test_a_checkpoint_is_evaluated_at_another_t_and_both_are_said(trained, tmp_path, capfd):
    path = trained["qamd"]
    _, test_set = data_sets_of("digits", ".", 4)
    for T in (1, 2, 6):
        found = evaluated(capfd, path, "--time_window", T, "--integer")
        assert (found["time_window"], found["trained_time_windows"]) == (T, [4])
        assert found["correct"] == correct_at(path, T, test_set)
        assert found["integers"]["correct"] == found["correct"]
        assert found["integers"]["differing_spikes"] == 0
    subject = trace_checkpoint(str(path), time_steps=6)
    assert subject.accuracy == found["accuracy"]
    assert f"{path}: run at T 6 (trained at T 4)" in build_report(subject, Chip())["notes"]
    own = evaluated(capfd, path)
    assert own == evaluated(capfd, path, "--time_window", "4")
    assert (own["time_window"], own["trained_time_windows"]) == (4, [4])
    for options, said in ([], False), (["--time_window", "4"], False), (["--time_window", "2"], 1):
        assert main.main(["--eval_only", str(path), "--workers", "0", *options]) == 0
        assert capfd.readouterr().out.endswith(", run at T 2 (trained at T 4)\n") == said

    image = tmp_path / "image.png"
    Image.fromarray(test_set.images[0, 0].numpy()).save(image)
    found = evaluated(capfd, path, "--predict", image, "--time_window", 2)
    (predicted,) = found["predictions"]
    expected = load_network(path, 2).predict(test_set.images[:1]).max().item()
    assert predicted["classes"][0]["share"] == expected
    assert main.main(["--eval_only", str(path), "--predict", str(image), "--time_window", "2"]) == 0
    assert capfd.readouterr().out.endswith(")\nrun at T 2 (trained at T 4)\n")

    # What is there of another T is not replaced.
    out = ["--per_class", "--out", str(tmp_path / "classes")]
    evaluated(capfd, path, *out)
    assert main.main(["--eval_only", str(path), "--time_window", "2", *out]) == 2
    assert "of something else than" in capfd.readouterr().err
    assert json.loads((tmp_path / "classes" / "evaluation.json").read_text())["time_window"] == 4


def test_a_t_that_is_none_is_one_line(trained, capfd):
    for T in ("0", "1025"):
        assert main.main(["--eval_only", str(trained["qamd"]), "--time_window", T]) == 2
        assert f"--time_window must be between 1 and 1024, got {T}\n" in capfd.readouterr().err
        with pytest.raises(UserError, match="--time_window must be between"):
            load_network(trained["qamd"], int(T))


def test_events_of_another_t_are_frames_of_that_t(tmp_path, capfd):
    """For the teacher of a student as for an evaluation and the hardware report."""
    for T in (2, 3):
        write_ncaltech101(tmp_path, time_window=T, classes=2, per_class=4)
    common = ["--data", "ncaltech101", "--data_path", str(tmp_path), "--image_size", "8"]
    common += ["--width", "1", "--epochs", "1", "--workers", "0"]
    teacher = tmp_path / "teacher" / "original-last.pth"
    runs = [
        ["--paper_setting", "original", "--time_window", "2", "--save_path", str(teacher.parent)],
        [
            *("--paper_setting", "qamd", "--bits", "4", "--time_window", "3"),
            *("--teacher_path", str(teacher), "--save_path", str(tmp_path / "student")),
        ],
    ]
    for options in runs:
        capfd.readouterr()
        assert main.main([*common, *options]) == 0
    (said,) = (x for x in capfd.readouterr().out.splitlines() if x.startswith("teacher"))
    assert said.endswith("T 2, run for 3 timesteps")

    where = ["--data_path", str(tmp_path)]
    found = evaluated(capfd, teacher, "--time_window", "3", *where)
    _, test_set = data_sets_of("ncaltech101", tmp_path, 3, image_size=(8, 8))
    assert test_set[0][0].shape[0] == 3
    assert found["correct"] == correct_at(teacher, 3, test_set)
    assert trace_checkpoint(str(teacher), str(tmp_path), 3).accuracy == found["accuracy"]
    assert main.main(["--eval_only", str(teacher), "--time_window", "5", *where]) == 2
    assert "frames_number_5_split_by_number" in capfd.readouterr().err


# One network for several T.

SEVERAL = ["--time_windows", "4", "1", "2"]  # in any order


def test_each_t_comes_once_in_so_many_steps_in_an_order_of_the_seed_and_the_step_alone():
    orders = {}
    for seed in (0, 1):
        options = ["--data", "digits", "--paper_setting", "original", "--seed", str(seed)]
        settings = parse_settings([*options, *SEVERAL])
        drawn = [time_window_of(settings, step) for step in range(300)]
        assert drawn == [time_window_of(settings, step) for step in range(300)]
        blocks = list(zip(*[iter(drawn)] * 3, strict=True))
        assert {tuple(sorted(block)) for block in blocks} == {(1, 2, 4)}
        assert len(set(blocks)) == 6  # all orders
        orders[seed] = drawn
    assert orders[0] != orders[1]
    alone = parse_settings(["--data", "digits", "--paper_setting", "original"])
    assert {time_window_of(alone, step) for step in range(9)} == {4}


@pytest.fixture(scope="module")
def several(trained, tmp_path_factory):
    """(folder, its command, T of each forward pass of its first LIF layer) of an MD-SNN of three T
    in ten steps, taught by a teacher of T = 4."""
    folder = tmp_path_factory.mktemp("several") / "run"
    command = [*DIGITS, "--epochs", "2", "--batch_size", "240", "--paper_setting", "qamd"]
    command += ["--bits", "4", "--teacher_path", str(trained["original"]), *SEVERAL]
    command += ["--accumulate", "2", "--save_path", str(folder)]
    seen: list[int] = []

    def watch(layer: torch.nn.Module, inputs: tuple) -> None:
        if isinstance(layer, LIF) and layer.training and layer.quantizer is not None:
            x, T = inputs[:2]
            seen.extend([T] if x.shape[-1] == 16 and not x.is_meta else [])

    watching = torch.nn.modules.module.register_module_forward_pre_hook(watch)
    assert main.main(command) == 0
    watching.remove()
    return folder, command, seen


def test_each_batch_trains_with_its_t_in_all_its_parts(several):
    folder, _, seen = several
    settings = load_checkpoint(folder / "qamd-last.pth").settings
    assert (settings.time_windows, settings.time_window) == ((1, 2, 4), 4)
    of_epochs = [[time_window_of(settings, step) for step in range(i, i + 5)] for i in (0, 5)]
    of_layers = 5  # that read 16 pixels: the first stage's, and one
    expected = []
    for steps in of_epochs:
        for T in steps:
            expected += [T] * 2 * of_layers  # parts
        for T in (1, 2, 4):  # the statistics before the evaluation
            expected += [T] * of_layers
    assert seen == expected


def test_a_training_with_several_t_that_was_cut_off_ends_as_one_that_was_not(
    several, tmp_path, monkeypatch
):
    folder, command, _ = several
    command = [*command[:-1], str(tmp_path)]
    cut_off_after(7, monkeypatch)  # in the middle of an epoch, and of a round of the three
    with pytest.raises(PowerCutError):
        main.main([*command, "--save_every", "7"])
    monkeypatch.undo()
    assert main.main([*command, "--resume"]) == 0
    found, expected = (load_checkpoint(x / "qamd-last.pth") for x in (tmp_path, folder))
    assert all(torch.equal(found.model[name], x) for name, x in expected.model.items())
    own = ("time", "seconds", "images_per_second")
    for row, wanted in zip(found.rest["rows"], expected.rest["rows"], strict=True):
        assert {x: row[x] for x in row if x not in own} == {
            x: wanted[x] for x in wanted if x not in own
        }


def test_one_network_is_evaluated_at_each_t(several, capfd):
    folder, _, _ = several
    path = folder / "qamd-last.pth"
    _, test_set = data_sets_of("digits", ".", 4)
    for T in (1, 2, 4):
        found = evaluated(capfd, path, "--time_window", T, "--integer")
        assert (found["time_window"], found["trained_time_windows"]) == (T, [1, 2, 4])
        assert found["correct"] == correct_at(path, T, test_set)
        assert found["integers"]["differing_spikes"] == 0
    assert found["accuracy"] == load_checkpoint(path).accuracy  # each epoch's: at the largest
    assert evaluated(capfd, path)["time_window"] == 4
    assert main.main(["--eval_only", str(path), "--workers", "0"]) == 0
    assert capfd.readouterr().out.endswith(", run at T 4 (trained at T 1, 2, 4)\n")
    # The options of its training may stay where they are.
    assert evaluated(capfd, path, *SEVERAL) == evaluated(capfd, path)
    assert main.main(["--eval_only", str(path), "--time_windows", "1", "2"]) == 2
    assert "--time_windows has no meaning with --eval_only" in capfd.readouterr().err


def test_header_config_resume_and_lists_of_runs_know_the_several_t(several, trained, capfd):
    folder, command, _ = several
    assert main.main([*command[:-1], str(folder.with_name("dry")), "--dry_run"]) == 0
    said = dict(x.split(maxsplit=1) for x in capfd.readouterr().out.splitlines())
    assert ", T 1, 2, 4: " in said["network"]
    assert said["network"].endswith(" MACs an image at T 4")
    assert said["teacher"].endswith(", T 4")
    assert said["time"].startswith("about ")
    config = str(folder / "settings.json")
    again = parse_settings(["--config", config])
    assert again.time_windows == (1, 2, 4)
    assert "-T4-" in again.save_path
    assert "-time-windows1-2-4-" in again.save_path
    other = parse_settings(["--config", config, "--time_windows", "2", "3"])
    assert (other.time_windows, other.time_window) == ((2, 3), 3)
    alone = parse_settings(["--config", config, "--time_window", "2"])
    assert (alone.time_windows, alone.time_window) == (None, 2)
    assert main.main([*command, "--time_windows", "2", "4", "--resume"]) == 2
    assert "--time_windows 2 4 instead of 1 2 4" in capfd.readouterr().err
    assert runs(["list", str(folder), str(trained["qamd"].parent)]) == 0
    assert "time windows 1 2 4" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--data", "digits-dvs", "--time_windows", "1", "2"], "frames of one T: leave it out"),
        (["--time_windows", "4"], "--time_windows 4: give two T or more, each once"),
        (["--time_windows", "4", "4"], "--time_windows 4 4: give two T or more, each once"),
        (["--time_windows", "0", "4"], "--time_windows must be between 1 and 1024, got 0"),
        (["--time_windows", "a", "4"], "'a'"),
        (["--time_windows", "1", "4", "--time_window", "2"], "--time_window 2 is not the largest"),
        (["--config", "[]"], "--time_windows is empty"),
        (["--config", "[1, true]"], "--time_windows cannot hold True"),
    ],
)
def test_time_windows_that_make_no_sense_are_one_line(options, expected, tmp_path, capfd):
    if options[0] == "--config":
        content = json.loads(options[1])
        options = ["--config", str(tmp_path / "settings.json")]
        Path(options[1]).write_text(json.dumps({"time_windows": content}))
    command = ["--data", "digits", "--paper_setting", "original", *options]
    assert expected in refused(capfd, main.main, command)


def test_a_single_value_per_channel_at_the_smallest_t_is_one_line(tmp_path, capfd):
    for part in ("train", "val"):
        for name in "ab":
            (tmp_path / part / name).mkdir(parents=True)
    options = ["--data", "folder", "--data_path", str(tmp_path), "--paper_setting", "original"]
    options += ["--image_size", "8", "--batch_size", "2", "--accumulate", "2"]
    assert main.main([*options, "--time_windows", "2", "1"]) == 2
    assert "1x1 in the last layers, T is 1, and" in capfd.readouterr().err


def test_a_checkpoint_with_time_windows_that_make_no_sense_is_one_line(trained, tmp_path, capfd):
    for windows in ((), (4,), (4, 1), (1, 2), (1, "4"), [1, 4]):
        checkpoint = torch.load(trained["student"], weights_only=True)
        checkpoint["settings"]["time_windows"] = windows
        torch.save(checkpoint, tmp_path / "odd.pth")
        err = refused(capfd, main.main, ["--eval_only", str(tmp_path / "odd.pth")])
        assert "is not a checkpoint of this program" in err, windows
