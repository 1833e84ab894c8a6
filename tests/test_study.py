"""The distillation study, in its smallest form."""

import csv
from collections import Counter

from benchmarks import distillation_study as study


def test_every_image_is_a_test_image_of_one_fold_and_never_its_training_image():
    pixels = Counter()
    for fold in range(study.FOLDS):
        train, test = study.fold_data(fold)
        assert len(train) + len(test) == 1797
        pixels.update(bytes(image.numpy()) for image in test.items)
    whole, _ = study.digits_of(range(1797), [])
    assert pixels == Counter(bytes(image.numpy()) for image in whole.items)


def test_a_finished_run_is_not_run_again_and_the_summary_has_every_method(tmp_path):
    arguments = ["--results", str(tmp_path), "--runs", str(tmp_path / "runs"), "--folds", "0"]
    arguments += ["--bits", "2", "--width", "2", "--epochs", "1", "--teacher_epochs", "1"]
    study.study(arguments)
    with (tmp_path / "distillation_study.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(study.METHODS) * len(study.STARTS)
    assert all(float(row["edap_ratio"]) > 1 for row in rows)
    assert all(0 <= float(row["differing_spikes"]) <= 1 for row in rows)
    table = (tmp_path / "distillation_study.md").read_text()
    assert table.count("\n") == 2 + len(rows)

    before = (tmp_path / "runs" / "log.txt").read_text()
    study.study(arguments)
    assert (tmp_path / "runs" / "log.txt").read_text() == before
