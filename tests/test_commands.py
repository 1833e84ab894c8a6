"""The paper's commands as users type them, on tiny data in the real formats, and what they leave on
disk."""

import hashlib
import json
import math
import shutil
import statistics
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from torchvision.datasets import CIFAR100

import main
from checkpoints import build_network, load_checkpoint
from conftest import DIGITS, REPOSITORY, read_csv, reported
from data_loader import load_data_sets, some_images
from distiller import start_membrane_steps
from load_settings import load_network, parse_settings
from stand_in_data import (
    cifar_environment,
    cifar_md5_lists,
    write_cifar,
    write_ncaltech101,
    write_tiny_imagenet,
)

RUNS = ("teacher-cifar", "teacher-tiny", "teacher-ncaltech")
RUNS += ("mdsnn-cifar", "mdsnn-ncaltech", "student-cifar")  # save paths
TYPED = "mdsnn-ncaltech"


def published_commands() -> dict[str, str]:
    """The commands of the paper's README as the docs show them, by save path."""
    page = (REPOSITORY / "docs/several_machines.md").read_text()
    section = page.split("## The paper's commands")[1].replace("\\\n", " ")
    shown = [" ".join(line.split()) for line in section.splitlines() if line.startswith("    ")]
    return {
        name: command.replace("/path/to/teacher", f"teacher-{name.split('-')[1]}")
        for name, command in zip(RUNS, shown, strict=True)
    }


def run(command: str, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess:
    result = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result


@pytest.fixture(scope="module")
def published_runs(clone, shell_environment) -> dict[str, dict]:
    """All six commands, one epoch each of narrow networks, one of them as it is typed: the others
    in this process. The written settings and metrics by save path."""
    data = clone / "data"
    write_cifar(data, "CIFAR100", train=12, test=5)
    write_tiny_imagenet(data, classes=2, per_class=4, val_per_class=2)
    write_ncaltech101(data, time_window=10, classes=2, per_class=5)
    environment = shell_environment | {
        name: value
        for name, value in cifar_environment(data).items()
        if name in ("CIFAR_STAND_IN", "PYTHONPATH")
    }
    written = {}
    for save_path, command in published_commands().items():
        command += f" --epochs 1 --width 4 --workers 0 --save_path {save_path}"
        if save_path == TYPED:
            run(command, clone, environment)
        else:
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(clone)
                for name, value in cifar_md5_lists(CIFAR100, data).items():
                    patch.setattr(CIFAR100, name, value)
                assert main.main(command.partition("main.py ")[2].split()) == 0
        folder = clone / save_path
        written[save_path] = {
            "settings": json.loads((folder / "settings.json").read_text()),
            "rows": read_csv(folder / "metrics.csv"),
            "files": {path.name for path in folder.iterdir()},
        }
    return written


def test_all_six_published_commands_train_evaluate_and_write_their_files(published_runs):
    for save_path, run_ in published_runs.items():
        setting = run_["settings"]["paper_setting"]
        assert {f"{setting}-best.pth", f"{setting}-last.pth", "metrics.csv"} < run_["files"]
        assert any(name.startswith("events.out.tfevents") for name in run_["files"])
        assert run_["settings"]["world_size"] == (2 if save_path == TYPED else 1)
        assert run_["settings"]["versions"]["spikingjelly"] == version("spikingjelly")
        (row,) = run_["rows"]
        terms = {"original": ("ce",), "student": ("ce",), "qamd": ("ce", "logit", "membrane")}
        for name in ("loss", *terms[setting], "images_per_second"):
            assert float(row[name]) > 0, (save_path, name)
        for name in ("train_accuracy", "test_accuracy", "spike_rate"):
            assert 0 <= float(row[name]) <= 1


def report_of(checkpoint: str | Path, out: Path, *options: str) -> dict:
    report = reported(out, " ".join(["--checkpoint", str(checkpoint), *options]))
    files = {f"report.{kind}" for kind in ("json", "csv", "md", "html")}
    assert {path.name for path in out.iterdir()} == files | {"layers.json"}
    return report


def test_the_hardware_report_reads_their_checkpoints(published_runs, clone, tmp_path, monkeypatch):
    monkeypatch.chdir(clone)
    for student, teacher in (
        ("mdsnn-cifar/qamd-best.pth", "teacher-cifar/original-best.pth"),
        ("student-cifar/student-best.pth", "teacher-cifar/original-best.pth"),
        ("mdsnn-ncaltech/qamd-best.pth", "teacher-ncaltech/original-best.pth"),
    ):
        report = report_of(student, tmp_path / student.split("/")[0], "--baseline", teacher)
        assert all(report["ratio"][name] > 1 for name in ("edap", "energy", "area", "delay"))
        assert not any(layer["rate_is_measured"] for layer in report["layers"])
    teacher = "teacher-tiny/original-best.pth"
    report = report_of(teacher, tmp_path / "tiny", "--data_path", "./data")
    # stem, 2 convolutions in 16 blocks, 3 shortcuts, the linear layer
    assert len(report["layers"]) == 1 + 32 + 3 + 1
    measured = [layer for layer in report["layers"] if layer["rate_is_measured"]]
    assert len(measured) == 32 + 1  # all that read spikes, or count them
    assert all(0 <= layer["spike_rate"] < 1 for layer in measured)


def test_the_report_measures_the_spike_rate_that_the_training_logged(trained, tmp_path):
    report = report_of(trained["qamd"], tmp_path, "--baseline", str(trained["original"]))
    by_name = {layer["name"]: layer for layer in report["layers"]}
    assert by_name["stem.conv"]["input_bits"] == 8
    assert by_name["stem.conv"]["weight_bits"] == by_name["linear"]["weight_bits"] == 8
    assert by_name["blocks.0.conv1"]["weight_bits"] == 4
    assert by_name["blocks.0.conv1"]["input_bits"] == 1
    assert by_name["blocks.2.shortcut.conv"]["input_bits"] == 4
    assert by_name["blocks.3.conv1"]["after"] == ["blocks.2.conv2", "blocks.2.shortcut.conv"]
    assert by_name["linear"]["input_bits"] == 5  # counts up to T·H·W = 4·2·2
    # main.py logged the spike rate of the same network: over all neurons, the last layer included.
    layers = report["layers"]
    assert all(layer["rate_is_measured"] for layer in layers)
    read_by = [x for x in layers if x["input_bits"] == 1] + [by_name["linear"]]
    neurons = [math.prod(layer["in_size"]) * layer["in_channels"] for layer in read_by]
    rates = [statistics.mean(x) for x in report["spike_rates_by_timestep"].values()]
    spikes = sum(n * rate for n, rate in zip(neurons, rates, strict=True))
    (row,) = read_csv(trained["qamd"].parent / "metrics.csv")
    logged = float(row["spike_rate"])
    assert logged > 0.01
    assert spikes / sum(neurons) == pytest.approx(logged)


def test_a_checkpoint_is_evaluated_to_the_accuracy_of_its_training(trained, capfd):
    accuracy = load_checkpoint(trained["original"]).accuracy
    assert main.main(["--eval_only", str(trained["original"])]) == 0
    assert f"({round(accuracy * 360)} of 360 test images)" in capfd.readouterr().out


def test_runs_on_different_folders_of_images_have_different_names(tmp_path):
    names = set()
    for data in ("cats", "dogs"):
        for name in ("train/a", "train/b", "val/a", "val/b"):
            (tmp_path / data / name).mkdir(parents=True)
        options = ["--data", "folder", "--paper_setting", "original", "--data_path"]
        names.add(parse_settings([*options, str(tmp_path / data)], 1).save_path)
    expected = "./checkpoints/folder-{}-original-depth18-width64-T4-seed0"
    assert names == {expected.format("cats"), expected.format("dogs")}


def test_runs_that_differ_in_the_teacher_s_file_have_different_names(trained, tmp_path):
    copy, other = tmp_path / "copy.pth", tmp_path / "other.pth"
    shutil.copy(trained["original"], copy)
    content = torch.load(copy, weights_only=True)
    content["model"]["linear.bias"] += 1
    torch.save(content, other)
    for options, named in (
        (["--paper_setting", "qamd"], "qamd-CLK-4bit-teacher"),
        (["--paper_setting", "student", "--init_from_teacher"], "student-4bit-from-teacher"),
    ):
        names = []
        for teacher in (trained["original"], copy, other):
            command = [*DIGITS, *options, "--bits", "4", "--teacher_path", str(teacher)]
            digest = hashlib.sha256(teacher.read_bytes()).hexdigest()
            names.append(parse_settings(command).save_path)
            assert f"digits-{named}{digest[:6]}-depth18-" in names[-1]
        assert names[0] == names[1] != names[2]


def test_a_checkpoint_holds_plain_types_and_the_student_alone(trained):
    for setting, path in trained.items():
        content = torch.load(path, weights_only=True)
        assert content["settings"]["paper_setting"] == setting
        assert {"model", "epoch", "accuracy", "optimizer", "random_states"} < set(content)
        assert set(content["model"]) == set(load_network(load_checkpoint(path)).state_dict())


def test_membrane_steps_of_a_distilled_network_are_chosen_by_64_drawn_training_images(trained):
    checkpoint = load_checkpoint(trained["qamd"])
    student, teacher = build_network(checkpoint.settings), load_network(trained["original"])
    train_set, _ = load_data_sets(checkpoint.settings)
    start_membrane_steps(student, teacher, some_images(train_set, 64))
    for name, layer in student.neurons().items():
        assert torch.equal(checkpoint.model[f"{name}.quantizer.step"], layer.quantizer.step)


@pytest.mark.device
def test_training_for_some_epochs_on_digits_learns_them(tmp_path):
    options = [*DIGITS, "--time_window", "2", "--batch_size", "32", "--epochs", "5"]
    options += ["--paper_setting", "original", "--save_path", str(tmp_path)]
    assert main.main(options) == 0
    assert load_checkpoint(tmp_path / "original-best.pth").accuracy > 0.8


@pytest.mark.device
def test_a_student_can_start_from_its_teacher(trained, tmp_path):
    # a learning rate of next to nothing: the weights stay the teacher's
    options = [*DIGITS, "--paper_setting", "student", "--bits", "8", "--lr", "1e-9"]
    start = ["--init_from_teacher", "--teacher_path", str(trained["original"])]
    assert main.main([*options, *start, "--save_path", str(tmp_path)]) == 0
    teacher = load_checkpoint(trained["original"])
    student = load_checkpoint(tmp_path / "student-last.pth").model
    for name in ("stem.conv.weight", "blocks.3.bn2.weight", "linear.bias"):
        torch.testing.assert_close(student[name], teacher.model[name], atol=1e-6, rtol=1e-4)


@pytest.mark.device
def test_deterministic_runs_of_one_seed_are_bitwise_the_same_with_any_number_of_workers(tmp_path):
    written = []
    for run_, workers in enumerate(("0", "2")):
        folder = tmp_path / str(run_)
        options = [*DIGITS, "--deterministic", "--workers", workers, "--save_path", str(folder)]
        assert main.main([*options, "--paper_setting", "student", "--bits", "4"]) == 0
        written.append((load_checkpoint(folder / "student-last.pth").model, folder / "metrics.csv"))
    (one, one_csv), (other, other_csv) = written
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert one_csv.read_text() == other_csv.read_text()


@pytest.mark.device
def test_bfloat16_autocast_trains_and_the_default_save_path_names_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = [*DIGITS, "--amp", "--paper_setting", "student", "--bits", "4"]
    assert main.main(options) == 0
    (folder,) = (tmp_path / "checkpoints").iterdir()
    assert folder.name == "digits-student-4bit-depth18-width2-T4-amp-batch-size140-epochs1-seed0"
    checkpoint = load_checkpoint(folder / "student-last.pth")
    assert checkpoint.settings.amp is True
    model = checkpoint.model
    assert all(x.isfinite().all() and x.dtype != torch.bfloat16 for x in model.values())
    options.insert(options.index("--amp") + 1, "bf16")
    assert parse_settings(options) == checkpoint.settings


@pytest.mark.device
@pytest.mark.parametrize("bits", ["2", "3", "4", "8"])
def test_a_trained_student_fires_the_same_spikes_with_integers_alone(
    bits, trained, tmp_path, capfd
):
    options = [*DIGITS, "--width", "4", "--time_window", "2", "--paper_setting", "student"]
    options += ["--bits", bits]
    assert main.main([*options, "--save_path", str(tmp_path)]) == 0
    capfd.readouterr()
    checkpoint = str(tmp_path / "student-last.pth")
    assert main.main(["--eval_only", checkpoint, "--integer"]) == 0
    network, integers = capfd.readouterr().out.splitlines()
    # all 360 test images, at 17 layers and 2 timesteps
    assert network.split("(")[1].split(")")[0] in integers
    spikes = 360 * 2 * 4 * (5 * 16 * 16 + 4 * 2 * 8 * 8 + 4 * 4 * 4 * 4 + 4 * 8 * 2 * 2)
    assert f" 0 of {spikes} spikes differ" in integers
