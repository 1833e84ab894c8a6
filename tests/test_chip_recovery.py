"""The study of networks trained for the chip that they run on."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from checkpoints import load_checkpoint
from conftest import refused
from experiments import chip_recovery
from experiments.chip_recovery import (
    OneChip,
    cells_of,
    cheapest_of,
    chips_of,
    csv_of,
    leads_of,
    on_chips,
    planned_runs,
    read_chips,
)
from experiments.chip_recovery import (
    test_on_chips as run_on_chips,
)
from runtime.errors import UserError
from spikesim_eval.calibration import calibration_of
from spikesim_eval.chip import Chip
from spikesim_eval.nonideal import on_chip
from spikesim_eval.trace import trace_checkpoint

ROW = OneChip(
    *("digits", 4, "student", "scratch", 1, "run", None, "spikesim-65nm", 0.1, 4, 0, 64),
    *(0.9, 0.91, 0.95, 2e6, 3e6, 4e6),
)


def planned(words: str, tmp_path: Path):
    start = ["--data", "digits", "--results", str(tmp_path)]
    args = chip_recovery.recovery_parser().parse_args([*start, *words.split()])
    return args, planned_runs(args, tmp_path)


def test_each_network_is_planned_without_the_chip_and_with_each_of_its_adcs(tmp_path):
    args, runs = planned("--seeds 1 --epochs 2 --teacher_epochs 3", tmp_path)
    assert [(x.method, x.settings.crossbar, x.settings.adc_bits) for x in runs] == [
        ("teacher", None, None),
        ("student", None, None),
        ("CLK", None, None),
        ("student", "spikesim-65nm", 3),
        ("CLK", "spikesim-65nm", 3),
        ("student", "spikesim-65nm", 4),
        ("CLK", "spikesim-65nm", 4),
    ]
    assert {x.settings.sigma for x in runs[3:]} == {0.2}
    assert {x.teacher for x in runs[1:]} == {runs[0]}
    tested = [[(x.sigma, x.adc_bits) for x in chips_of(one, args, runs[-1])] for one in runs[1:5]]
    every = [(sigma, bits) for sigma in (0.1, 0.2, 0.4) for bits in (3, 4)]
    assert tested[:2] == [every, every]  # what knows no chip is tested on all
    assert tested[2] == [x for x in every if x[1] == 3]
    _, (_, control, *_) = planned("--seeds 1 --methods CL", tmp_path)
    assert (control.method, control.settings.loss) == ("CL", "CL")
    with pytest.raises(UserError, match="one technology"):
        planned("--crossbar isaac-32nm puma-32nm", tmp_path)


def test_rows_are_read_as_they_were_written(tmp_path):
    rows = [ROW, replace(ROW, trained_sigma=0.2, draw=1)]
    path = tmp_path / "chips.csv"
    assert read_chips(path) == []
    path.write_text(csv_of(rows))
    assert read_chips(path) == rows
    path.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="is not the chips"):
        read_chips(path)


def test_the_tables_say_accuracy_yield_and_the_cheapest_adc():
    chips = [
        ROW,  # 5 points below what it has on none: still good
        replace(ROW, draw=1, accuracy=0.8),
        replace(ROW, trained_sigma=0.2, digital_accuracy=0.5, accuracy=0.94),
        replace(ROW, trained_sigma=0.2, digital_accuracy=0.5, accuracy=0.96, draw=1),
    ]
    header, plain, trained = cells_of(chips, 5)
    assert header[-5:-1] == ["as made, %", "yield, %", "calibrated, %", "yield, %"]
    assert plain[4:] == ["student", "1", "95.00", "85.00", "50", "91.00", "100", "24"]
    assert trained[4:] == [
        "student, for the chip",
        "1",
        "50.00",
        *("95.00", "100", "91.00", "100", "24"),
    ]
    # half of the chips of one are good, all of the other
    for min_yield, adc_bits in ((50, "4"), (51, "-")):
        _, plain, trained = cheapest_of(chips, 5, min_yield)
        edap = "24" if adc_bits == "4" else "-"
        assert plain[3:] == ["student", adc_bits, edap, "4", "24"]
        assert trained[3:] == ["student, for the chip", "4", "24", "4", "24"]


def test_leads_are_paired_by_seed_and_by_hand():
    chips = [
        replace(ROW, seed=seed, draw=draw, method=method, trained_sigma=sigma, accuracy=accuracy)
        for method, sigma, accuracies in (
            ("student", None, [(0.5, 0.7), (0.8, 0.8), (0.1, 0.1)]),
            ("CLK", None, [(0.7, 0.7), (0.8, 0.9)]),
            ("CLK", 0.2, [(0.8, 0.8)]),
        )
        for seed, both in enumerate(accuracies, start=1)
        for draw, accuracy in enumerate(both)
    ]
    header, methods, training = leads_of(chips)
    assert header[4:] == ["network", "over", "seeds", "digital", "as made", "calibrated"]
    # 70 - 60 and 85 - 80 points; seed 3 has no partner
    same = "+0.0 ± 0.0"
    assert methods[4:] == ["CLK", "student", "2", same, "+7.5 ± 2.5", same]
    assert training[4:] == ["CLK, for the chip", "CLK", "1", "+0.0", "+10.0", "+0.0"]


def test_a_network_is_tested_on_chips_as_made_and_calibrated(trained, tmp_path):
    args, (_, student, *_) = planned("--seeds 1 --chips 2 --images 32", tmp_path)
    path, chip = str(trained["student"]), Chip(sigma=0.2, adc_bits=3)
    calibrate = calibration_of(load_checkpoint(path), None, 32)
    subject = trace_checkpoint(path, test_images=90)
    rows = on_chips(student, subject, chip, "it", args, calibrate, [0, 1])
    as_made, _ = on_chip(subject, chip, [0, 1])
    calibrated, _ = on_chip(subject, chip, [0, 1], prepare=calibrate)
    assert [x.accuracy for x in rows] == as_made
    assert [x.calibrated_accuracy for x in rows] == calibrated
    assert rows[0].calibrated_accuracy != rows[0].accuracy
    assert {x.images for x in rows} == {32}
    assert on_chips(student, subject, chip, "it", args, calibrate, [1]) == rows[1:]
    never_random = replace(chip, sigma=0.0)
    first, second = on_chips(student, subject, never_random, "it", args, calibrate, [0, 1])
    assert replace(second, draw=0) == first  # nothing is random


def test_what_chips_give_goes_to_chips_csv_and_leaves_checkpoints_as_they_are(trained, tmp_path):
    words = "--seeds 1 --sigma 0.2 0 --adc_bits 3 --chips 1 --images 8"
    args, (_, student, *others) = planned(words, tmp_path)
    for folder in (student.folder(tmp_path), tmp_path / args.name):
        folder.mkdir()
    (student.folder(tmp_path) / "measured.json").write_text('{"accuracy": 0.9}')
    checkpoint = shutil.copy(trained["student"], student.checkpoint(tmp_path))
    before = checkpoint.read_bytes()
    run_on_chips(args, tmp_path, [student, *others])
    assert checkpoint.read_bytes() == before
    path = tmp_path / args.name / "chips.csv"
    rows = read_chips(path)
    assert [(x.run, x.sigma) for x in rows] == [(student.name, 0.2), (student.name, 0.0)]
    # of more chips those that are there are not computed again
    marked = [replace(rows[0], accuracy=2.0, draw=draw) for draw in (1, 5)]
    path.write_text(csv_of(marked))
    args.chips = 2
    run_on_chips(args, tmp_path, [student, *others])
    more = read_chips(path)
    assert [(x.sigma, x.draw) for x in more] == [(0.2, 0), (0.2, 1), (0.2, 5), (0, 0), (0, 1)]
    assert more[:3] == [rows[0], *marked]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--sigma much", "--sigma must be numbers"),
        ("--sigma 0.1 -1", "sigma must be"),
        ("--max_drop -1", "max_drop must be"),
        ("--min_yield 101", "min_yield must be"),
        ("--xbar_size 32 64", "--xbar_size: a study is of one chip"),
        ("--epochs 1 2", "would not tell"),
        ("--folds 0 1", "would not tell"),
    ],
)
def test_what_the_tables_cannot_tell_apart_is_refused_before_training(words, reason, tmp_path):
    with pytest.raises(UserError, match=reason):
        planned(f"--seeds 1 {words}", tmp_path)


def test_rows_of_other_chips_or_runs_are_not_taken_for_these(tmp_path):
    words, path = "--seeds 1", tmp_path / "chip_recovery" / "chips.csv"
    path.parent.mkdir()
    _, runs = planned(words, tmp_path)
    path.write_text(csv_of([replace(ROW, run=runs[1].name)]))
    planned(words, tmp_path)
    for other, reason in (
        (
            "--xbar_size 32",
            "is of spikesim-65nm, --images 64, and not spikesim-65nm, xbar_size 32, --images 64",
        ),
        (
            "--crossbar isaac-32nm",
            "is of spikesim-65nm, --images 64, and not isaac-32nm, --images 64",
        ),
        ("--images 8", "spikesim-65nm, --images 64, and not spikesim-65nm, --images 8:"),
        ("--epochs 3", "would not tell"),
    ):
        with pytest.raises(UserError, match=reason):
            planned(f"{words} {other}", tmp_path)
    path.write_text(csv_of([ROW]).replace("calibrated_accuracy", "other"))
    with pytest.raises(UserError, match="move it away, or choose another"):
        planned(words, tmp_path)


def test_tables_are_of_the_drop_that_is_asked_for_and_of_rows_with_a_bar(tmp_path, capsys):
    path = tmp_path / "chip_recovery" / "chips.csv"
    path.parent.mkdir()
    path.write_text(csv_of([ROW]))
    command = ["--table", "--results", str(tmp_path), "--max_drop"]
    for drop, share in (("5", "100"), ("3", "0")):
        assert chip_recovery.main([*command, drop]) == 0
        said = capsys.readouterr().out
        assert f"at most {drop} points" in said
        assert f"| 90.00 | {share} |" in said
    path.write_text(csv_of([replace(ROW, trained_sigma=0.2)]))
    assert "trained without the chip" in refused(capsys, chip_recovery.main, [*command, "5"])
