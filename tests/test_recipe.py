"""--val_share, --label_smoothing and --warmup."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st

import main
from checkpoints import load_checkpoint
from conftest import refused
from data_loader import ImageSet, Share, data_of, evaluation_loader, training_loader
from data_sets.splits import held_out_rows
from engine.run_folder import read_metrics
from load_settings import build_loss, build_scheduler, load_network, parse_settings
from loading import data_sets_of, one_by_one
from one_step import SETTINGS, networks
from stand_in_data import write_tiny_imagenet
from test_input_step import SIDE, T, command
from test_input_step import write as write_frames
from test_resume import PowerCutError, assert_same_end, contents, cut_off_after

OPTIONS = ["--data", "digits", "--width", "1", "--batch_size", "240", "--workers", "0"]
OPTIONS += ["--paper_setting", "student", "--bits", "4", "--epochs", "3", "--deterministic"]
OPTIONS += ["--val_share", "0.1", "--label_smoothing", "0.2", "--warmup", "1"]
STEPS = 5  # an epoch, of 1,293 images

LABELS = st.lists(st.integers(0, 5), min_size=2, max_size=200)
SHARES = st.floats(0.01, 0.5)


@given(LABELS, SHARES, st.integers(0, 2**63 - 1))
@limits(deadline=None)
def test_the_share_is_held_out_of_each_class_and_every_class_keeps_an_image(labels, share, seed):
    by_class = Counter(labels)
    divisible = sum(n for n in by_class.values() if n > 1)
    expected = math.floor(divisible * share + 0.5)
    chosen = held_out_rows(torch.tensor(labels), share, seed)
    assert chosen.sum() == expected
    assert np.array_equal(chosen, held_out_rows(torch.tensor(labels), share, seed))
    for label, n in by_class.items():
        held_out = sum(chosen[i] for i, x in enumerate(labels) if x == label)
        assert held_out in (math.floor(n * share), math.ceil(n * share))
        assert held_out < n


def test_the_held_out_images_are_those_of_the_seed_on_every_machine():
    labels = torch.arange(24) % 3
    assert held_out_rows(labels, 0.25, 7).nonzero()[0].tolist() == [0, 1, 2, 4, 5, 18]
    assert held_out_rows(labels, 0.25, 8).nonzero()[0].tolist() == [1, 6, 11, 12, 17, 22]
    same = torch.zeros(40, dtype=torch.int64)
    often = sum(held_out_rows(same, 0.25, seed).astype(float) for seed in range(400)) / 400
    assert np.abs(often - 0.25).max() < 5 * math.sqrt(0.25 * 0.75 / 400)


def images_of(data_set: ImageSet) -> Counter:
    return Counter(data_set[i][0].numpy().tobytes() for i in range(len(data_set)))


@pytest.mark.parametrize("augment", ["basic", "auto"])
def test_held_out_images_are_the_other_ones_without_augmentation(augment, tmp_path):
    write_tiny_imagenet(tmp_path, classes=2, per_class=10, val_per_class=2)
    where = ("TinyImagenet", tmp_path, 4)
    (whole, test), plain = data_sets_of(*where, augment="none"), images_of
    train, same_test = data_sets_of(*where, 3, augment, val_share=0.3)
    assert (len(train), len(train.held_out), whole.held_out) == (14, 6, None)
    assert sorted(train.held_out.labels.tolist()) == [0, 0, 0, 1, 1, 1]
    assert plain(same_test) == plain(test)
    held_out = plain(train.held_out)
    train.epoch = 5
    assert not plain(train) <= plain(whole)  # it is augmented
    unchanged, _ = data_sets_of(*where, 3, "none", val_share=0.3)
    assert plain(unchanged) + held_out == plain(whole)
    # The loaders of workers and of the device have those images with their own labels.
    labels = {whole[i][0].numpy().tobytes(): whole[i][1] for i in range(len(whole))}
    for loader in (
        evaluation_loader(train.held_out, Share(4, workers=1)),
        training_loader(one_by_one(unchanged), Share(7)),
        training_loader(unchanged, Share(7)),
    ):
        found = Counter()
        for images, targets in loader:
            for image, target in zip(images, targets.tolist(), strict=True):
                found[image.numpy().tobytes()] += 1
                assert labels[image.numpy().tobytes()] == target
        assert found in (held_out, plain(unchanged))
        assert len(loader) == 2


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a run of three epochs with all three options."""
    folder = tmp_path_factory.mktemp("run")
    assert main.main([*OPTIONS, "--save_path", str(folder)]) == 0
    torch.use_deterministic_algorithms(False)
    return folder


def test_the_metrics_of_a_run_with_a_share_held_out(run):
    rows = read_metrics(run / "metrics.csv")
    best = 0.0
    for row in rows:
        best = max(best, row["val_accuracy"])
        assert row["best_accuracy"] == best
    # The learning rate at an epoch's start: one of five steps of warm-up, then a cosine.
    assert [row["lr"] for row in rows] == pytest.approx([0.1 / STEPS, 0.1, 0.05])
    checkpoint = load_checkpoint(run / "student-best.pth")
    (of_best,) = (row for row in rows if row["epoch"] == checkpoint.epoch)
    assert of_best["val_accuracy"] == best
    assert checkpoint.accuracy == of_best["test_accuracy"]
    # Accuracies and losses of both, plain, of the last network, computed here.
    last = load_checkpoint(run / "student-last.pth")
    network, (train, test) = load_network(last), data_of(last.settings, "unused")
    for name, data_set in (("val", train.held_out), ("test", test)):
        images = torch.stack([data_set[i][0] for i in range(len(data_set))])
        with torch.no_grad():
            logits = network(images).double()
        right = (logits.argmax(1) == data_set.labels).double().mean().item()
        loss = -logits.log_softmax(1)[torch.arange(len(images)), data_set.labels].mean().item()
        assert rows[-1][f"{name}_accuracy"] == right
        assert rows[-1][f"{name}_loss"] == pytest.approx(loss, rel=1e-5)


def test_without_a_share_the_columns_are_empty(trained):
    (row,) = read_metrics(trained["original"].with_name("metrics.csv"))
    assert (row["val_loss"], row["val_accuracy"]) == (None, None)
    assert row["best_accuracy"] == row["test_accuracy"]


@pytest.mark.parametrize("step", [2, 7, 13])  # in the warm-up, after it, in the last epoch
def test_a_run_with_all_three_goes_on_bit_for_bit(step, run, tmp_path, monkeypatch):
    cut_off_after(step, monkeypatch)
    with pytest.raises(PowerCutError):
        main.main([*OPTIONS, "--save_path", str(tmp_path), "--save_every", "1"])
    assert contents(tmp_path)["step"] == step % STEPS
    monkeypatch.undo()
    assert main.main([*OPTIONS, "--save_path", str(tmp_path), "--resume"]) == 0
    assert_same_end(tmp_path, run)


def test_a_run_that_goes_on_and_its_end_tell_both_accuracies(run, tmp_path, capfd):
    content = contents(run)
    for row, (held_out, test) in zip(
        content["rows"], ((0.2, 0.25), (0.7, 0.03), (0.3, 0.22)), strict=True
    ):
        row |= {"val_accuracy": held_out, "test_accuracy": test, "best_accuracy": 0.7}
    torch.save(content, tmp_path / "student-last.pth")
    assert main.main([*OPTIONS, "--save_path", str(tmp_path), "--resume"]) == 0
    out, err = capfd.readouterr()
    assert "(70.00 %), and comes back only with a better one" in err
    assert "val 70.00 %, test 3.00 % (epoch 2)" in out
    assert "1,293 training, 144 held-out and 360 test images" in out


def test_a_checkpoint_without_its_held_out_accuracies_is_not_gone_on_with(run, tmp_path, capfd):
    content = contents(run)
    for row in content["rows"]:
        del row["val_accuracy"]
    torch.save(content, tmp_path / "student-last.pth")
    assert main.main([*OPTIONS, "--save_path", str(tmp_path), "--resume"]) == 2
    assert "metrics of 3 epochs are damaged" in capfd.readouterr().err


def test_the_input_step_is_found_from_the_images_that_are_trained_on(tmp_path, capsys):
    data = write_frames(tmp_path / "data", "fractional")
    where, share = ("ncaltech101", data, T), {"image_size": (SIDE, SIDE), "val_share": 0.25}
    frames = data_sets_of(*where, augment="none", image_size=(SIDE, SIDE))[0].images.numpy()
    differing, whole = 0, float(frames.max()) / 255
    for seed in range(4):
        train, test = data_sets_of(*where, seed, "none", **share)
        chosen = held_out_rows(torch.arange(len(frames)) // (len(frames) // 2), 0.25, seed)
        assert train.step == float(frames[~chosen].max()) / 255
        assert train.step == train.held_out.step == test.step
        differing += train.step != whole
    assert differing > 0
    # Teacher and student of a split read the same codes, an evaluation too, and say nothing.
    options = ["--epochs", 1, "--seed", 1, "--val_share", 0.25]
    teacher = tmp_path / "teacher" / "original-best.pth"
    runs = command(data, teacher.parent, *options, "--paper_setting", "original")
    assert main.main(runs) == 0
    student = ["--paper_setting", "qamd", "--bits", 4, "--teacher_path", teacher]
    assert main.main(command(data, tmp_path / "student", *options, *student)) == 0
    capsys.readouterr()
    assert main.main(["--eval_only", str(teacher), "--data_path", str(data)]) == 0
    data_of(load_checkpoint(teacher).settings, data)
    assert capsys.readouterr().err == ""
    # One of another split is told what the teacher had.
    runs = command(data, tmp_path / "other", "--epochs", 1, *student)
    assert "(it had --val_share 0.25 --seed 1)" in refused(capsys, main.main, runs, started=True)


@pytest.mark.parametrize("setting", SETTINGS)
def test_label_smoothing_gives_all_classes_a_share_of_the_target(setting, tmp_path):
    """L = (1 − ε)·CE + ε·mean over the classes of −log p, in the loss and its gradient."""
    teacher, student = networks()
    network = teacher if setting == "original" else student
    options = ["--data", "digits", "--paper_setting", "original", "--label_smoothing", "0.3"]
    settings = parse_settings(options)
    if setting == "qamd":
        values = {"paper_setting": "qamd", "loss": "CL", "alpha": 0.0, "beta": 0.0, "tau": 1.0}
        settings = type(settings)(
            **vars(settings) | values | {"beta_schedule": "constant", "bits": 4, "bn_bits": 8}
        )
    loss_function = build_loss(settings, network, teacher)
    torch.manual_seed(1)
    images = torch.rand(5, 1, 16, 16, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3, 0])
    logits, loss, terms = loss_function(images, labels)
    log_p = logits - logits.exp().sum(1, keepdim=True).log()
    target = 0.7 * F.one_hot(labels, 4).double() + 0.3 / 4
    expected = -(target * log_p).sum(1).mean()
    torch.testing.assert_close(terms["ce"], expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    (found,) = torch.autograd.grad(loss, logits, retain_graph=True)
    wanted = (log_p.exp() - target) / 5
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-9, atol=1e-12)


@given(epochs=st.integers(1, 6), warmup=st.integers(0, 5), steps=st.integers(1, 7), data=st.data())
@limits(deadline=None)
def test_the_rate_rises_evenly_with_the_steps_and_then_falls_in_a_cosine(
    epochs, warmup, steps, data
):
    warmup = min(warmup, epochs - 1)
    lr, total, risen = 0.3, epochs * steps, warmup * steps
    expected = [lr / risen * k for k in range(1, risen + 1)]
    rest = total - risen
    expected += [lr / 2 * (1 + math.cos(k * math.pi / rest)) for k in range(rest)]

    def rates(first: int) -> list[float]:
        parameter = torch.nn.Parameter(torch.zeros(()))
        optimizer = torch.optim.SGD([{"params": [parameter], "initial_lr": lr}], lr=lr)
        scheduler = build_scheduler(optimizer, total, first, risen)
        found = []
        for _ in range(first, total):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        assert optimizer.param_groups[0]["lr"] == 0
        return found

    whole = rates(0)
    assert whole == pytest.approx(expected, rel=1e-12, abs=1e-15)
    first = data.draw(st.integers(0, total - 1))
    assert rates(first) == whole[first:]  # of a run that goes on, to the bit


def test_every_step_of_a_run_takes_the_rate_of_its_schedule(tmp_path, monkeypatch):
    taken, step = [], torch.optim.SGD.step

    def noting(optimizer, *rest):
        taken.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *rest)

    monkeypatch.setattr(torch.optim.SGD, "step", noting)
    options = ["--data", "digits", "--width", "1", "--batch_size", "480", "--workers", "0"]
    options += ["--paper_setting", "original", "--epochs", "4", "--warmup", "2", "--lr", "0.6"]
    assert main.main([*options, "--save_path", str(tmp_path)]) == 0
    # Two steps an epoch: four of warm-up, four of a cosine.
    cosine = [0.6 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)]
    assert taken == pytest.approx([0.15, 0.3, 0.45, 0.6, *cosine])
