"""The distillation study, its ablation and the membrane report, in their smallest form."""

import csv
import math
from collections import Counter
from pathlib import Path

import pytest
import torch

import main
from benchmarks import distillation_ablation as ablation
from benchmarks import distillation_study as study
from benchmarks.membrane_report import RoundedTeacher, membrane_report
from distiller import distance_to_teacher
from load_settings import UserError, load_checkpoint, load_network


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_image_is_a_test_image_of_one_fold_of_a_split_and_never_its_training_image():
    whole, _ = study.digits_of(range(1797), [])
    for split in (0, 1):
        pixels = Counter()
        for fold in range(split * study.FOLDS, (split + 1) * study.FOLDS):
            train, test = study.fold_data(fold)
            assert len(train) + len(test) == 1797
            pixels.update(bytes(image.numpy()) for image in test.images)
        assert pixels == Counter(bytes(image.numpy()) for image in whole.images)


def test_every_five_folds_are_another_split():
    assert list(study.fold_indices(0)[1]) != list(study.fold_indices(5)[1])


def test_the_ablation_never_sees_a_test_image_of_its_fold():
    def images(data_set):
        return Counter(bytes(image.numpy()) for image in data_set.images)

    for fold in range(study.FOLDS):
        train, validation = ablation.validation_data(fold)
        of_study, _ = study.fold_data(fold)
        assert images(train) + images(validation) == images(of_study)


SMALLEST = ["--folds", "0", "--width", "2", "--epochs", "1", "--teacher_epochs", "1"]


def test_a_finished_run_is_not_run_again_and_the_summary_has_all_of_them(tmp_path):
    arguments = ["--results", str(tmp_path), "--runs", str(tmp_path / "runs"), *SMALLEST]
    arguments += ["--bits", "2"]
    study.study([*arguments, "--methods", "student"])
    methods = ["student", "CLK"]
    arguments += ["--methods", *methods]
    assert len(read_csv(tmp_path / "distillation_study.csv")) == len(study.STARTS)
    study.study(arguments)
    rows = read_csv(tmp_path / "distillation_study.csv")
    assert len(rows) == len(methods) * len(study.STARTS)
    assert all(float(row["edap_ratio"]) > 1 for row in rows)
    assert all(0 <= float(row["differing_spikes"]) <= 1 for row in rows)
    summary = (tmp_path / "distillation_study.md").read_text()
    for start in study.STARTS:
        for method in methods:
            assert summary.count(f"| 2 | {start} | {method} | 1 |") == 1
    assert (tmp_path / "distillation_study.png").stat().st_size > 10_000
    assert (tmp_path / "distillation_study.pdf").read_bytes().startswith(b"%PDF")

    (log,) = tmp_path.glob("runs/*/log.txt")
    before = log.read_text()
    study.study(arguments)
    assert log.read_text() == before

    with (tmp_path / "distillation_study.csv").open("a") as file:  # another study's runs
        for row in rows:
            if row["method"] == "student":
                longer = row | {"size": row["size"].replace("epochs1", "epochs2")}
                print(*longer.values(), sep=",", file=file)
    study.study([*arguments, "--methods", "student", "--epochs", "2"])
    assert log.read_text() == before
    assert "2 epochs" in (tmp_path / "distillation_study.md").read_text()
    assert "CLK" not in (tmp_path / "distillation_study.md").read_text()


def test_a_run_that_was_stopped_is_trained_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(main, "load_data_sets", main.load_data_sets)  # which the study replaces
    teacher = (tmp_path, 0, study.fold_data, ["--width", "1", "--epochs", "2"])
    evaluate, epochs = main.evaluate, iter([True, False])

    def stopped(*arguments: object) -> tuple:
        if next(epochs):
            return evaluate(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(main, "evaluate", stopped)
        with pytest.raises(RuntimeError, match="refused"):
            study.train_teacher(*teacher)
    assert load_checkpoint(study.teacher_of(tmp_path, 0)).epoch == 1
    study.train_teacher(*teacher)
    assert load_checkpoint(study.teacher_of(tmp_path, 0)).epoch == 2


def test_the_gain_over_the_student_is_paired_by_fold():
    def row(fold, accuracy, membrane_kl, differing_spikes):
        names = ("fold", "accuracy", "membrane_kl", "differing_spikes")
        return dict(
            zip(names, map(str, (fold, accuracy, membrane_kl, differing_spikes)), strict=True)
        )

    students = [row(1, 0.8, 0.3, 0.2), row(0, 0.7, 0.1, 0.4), row(2, 0.1, 9, 9)]
    ours = [row(0, 0.8, 0.1, 0.1), row(1, 0.78, 0.1, 0.2)]
    # gains 10 and -2 points: mean 4, standard deviation 8.485, standard error 6
    assert study.against_student(ours, students) == ["+4.00 ± 6.00", "1 of 2", "0.50", "0.50"]


def test_two_studies_are_compared_run_by_run():
    def row(fold, accuracy):
        values = (fold, "4", "CLK", "scratch", accuracy)
        return dict(zip(("fold", *study.KIND, "accuracy"), values, strict=True))

    ours = [row("0", "0.8"), row("1", "0.78"), row("7", "0.1")]
    text = study.difference_table(ours, [row("1", "0.8"), row("0", "0.7"), row("2", "0.9")])
    # differences 10 and -2 points
    assert "| 4 | CLK | scratch | 2 | 79.00 ± 1.41 | 75.00 ± 7.07 | +4.00 ± 6.00 |" in text
    assert len(text.splitlines()) == 3


def test_the_ablation_runs_candidates_that_main_py_does_not_know(tmp_path):
    changes = ["student", "beta warmed up", "CLK + CLM", "Bernoulli"]
    folders = ["--results", str(tmp_path), "--runs", str(tmp_path / "runs")]
    ablation.ablation([*folders, *SMALLEST, "--changes", *changes])
    rows = read_csv(tmp_path / "distillation_ablation.csv")
    assert {(row["start"], row["change"]) for row in rows} == {
        (start, change) for start in study.STARTS for change in changes
    }
    assert "| scratch | CLK + CLM | 1 |" in (tmp_path / "distillation_ablation.md").read_text()


def test_bernoulli_kl_by_hand():
    # firing probabilities 1/2 of the student, σ(log 3) = 3/4 of the teacher
    student = torch.full((1, 1, 1, 1, 1), 0.5)
    teacher = student + 0.25 * math.log(3)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert ablation.bernoulli_kl([student], [teacher]).item() == pytest.approx(expected)


def test_the_membrane_report_has_a_row_per_network_layer_and_timestep(trained, tmp_path):
    networks = ["--teacher", str(trained["original"]), "--student", str(trained["student"])]
    networks += ["--mdsnn", str(trained["qamd"])]
    membrane_report([*networks, "--out", str(tmp_path / "report")])
    rows = read_csv(tmp_path / "report" / "membrane_report.csv")
    assert len(rows) == 3 * 17 * 4
    assert (tmp_path / "report" / "membrane_report.png").stat().st_size > 10_000
    assert (tmp_path / "report" / "membrane_report.pdf").read_bytes().startswith(b"%PDF")
    with pytest.raises(UserError, match="the LIF layers are blocks"):
        membrane_report([*networks, "--out", str(tmp_path / "other"), "--layer", "lif9"])
    assert not (tmp_path / "other").exists()


def test_the_rounded_teacher_comes_closer_with_every_bit(trained):
    teacher = load_network(load_checkpoint(trained["original"]))
    images = torch.rand(8, 1, 16, 16)
    distances = []
    for bits in (2, 4, 8):
        rounded = RoundedTeacher(teacher, bits, images)
        distances.append(distance_to_teacher(teacher, rounded, [(images, None)]))
        for u in rounded(images)[1]:
            assert len(u.unique()) <= 2**bits
    for name in ("membrane_kl", "membrane_mse"):
        two, four, eight = (distance[name].mean() for distance in distances)
        assert two > 2 * four > 4 * eight > 0
