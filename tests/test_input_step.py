"""Teacher and student read the same 8-bit input, also where event frames are no small counts."""

import gc
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import data_loader
import main
from checkpoints import load_checkpoint
from conftest import refused, reported
from data_loader import data_of
from data_sets import events
from data_sets.events import input_of, read_frames
from load_settings import load_network
from loading import data_sets_of
from quantization import ImageQuantizer, codes_of

T, SIDE = 2, 12


def write(root: Path, kind: str, factor: float = 1.0) -> Path:
    """Frames as other tools leave them, of two classes that differ in how large they are."""
    rng = np.random.default_rng(0)
    for label, (scale, low) in {"a": (0.15, 300), "b": (0.45, 900)}.items():
        folder = root / f"N-Caltech101/frames_number_{T}_split_by_number" / label
        folder.mkdir(parents=True)
        for i in range(60):
            if kind == "fractional":
                frames = rng.random((T, 2, SIDE, SIDE)) * scale
            else:
                frames = rng.integers(low, low + 200, (T, 2, SIDE, SIDE))
            np.savez(folder / f"{i:03d}.npz", frames=frames * factor)
    return root


def command(data: Path, save_path: Path, *options: object) -> list[str]:
    shape = f"--data ncaltech101 --time_window {T} --image_size {SIDE} --width 2 --batch_size 8"
    how = "--workers 0 --augment none --lr 0.05"
    paths = ["--data_path", data, "--save_path", save_path]
    paths += ["--cache_path", save_path.parent / "made"]
    return [*shape.split(), *how.split(), *map(str, (*paths, *options))]


@pytest.fixture(scope="module", params=["fractional", "large"])
def networks(request, tmp_path_factory) -> tuple[Path, dict[str, Path]]:
    """A folder of data and a teacher and a 4-bit student, each trained alone on it."""
    folder = tmp_path_factory.mktemp(request.param)
    data, paths = write(folder / "data", request.param), {}
    for name, options in (
        ("teacher", ("--paper_setting", "original")),
        ("student", ("--paper_setting", "student", "--bits", 4)),
    ):
        assert main.main(command(data, folder / name, "--epochs", 3, *options)) == 0
        paths[name] = next((folder / name).glob("*-last.pth"))
    # An evaluation of the same data uses the training's cache, and makes none beside the data.
    assert main.main(["--eval_only", str(paths["teacher"]), "--data_path", str(data)]) == 0
    assert {x.suffix for x in data.rglob("*") if x.is_file()} == {".npz"}
    assert len(list((folder / "made").rglob("*.npy"))) == 1
    return data, paths


def test_teacher_and_students_learn_frames_that_are_no_small_counts(networks, tmp_path, capsys):
    data, paths = networks
    train, _ = data_sets_of("ncaltech101", data, T, augment="none", image_size=(SIDE, SIDE))
    assert train.step == float(train.images.float().max()) / 255
    codes = train[5][0]
    assert len(codes.unique()) > 40
    assert torch.equal(ImageQuantizer(1.0)(codes), codes)  # the student's stem reads these
    for path in paths.values():
        checkpoint = load_checkpoint(path)
        assert checkpoint.accuracy == 1, path
        assert checkpoint.settings.input_step == train.step
        assert json.loads((path.parent / "settings.json").read_text())["input_step"] == train.step
        assert main.main(["--eval_only", str(path), "--data_path", str(data)]) == 0
        out = capsys.readouterr().out.splitlines()
        assert out[0].startswith(f"input step {train.step:.4g}: code 255 of the 8-bit input")
        assert out[1].startswith("accuracy 100.00 % (12 of 12")
    index = next((data.parent / "made").rglob("*.json"))
    made = index.stat().st_mtime_ns
    report = reported(tmp_path, f"--checkpoint {paths['student']} --data_path {data}")
    assert report["accuracy"] == 1
    assert index.stat().st_mtime_ns == made


def test_other_data_are_read_in_the_checkpoint_s_steps_with_a_warning(networks, tmp_path, capsys):
    data, paths = networks
    kind = data.parent.name.rstrip("0123456789")
    other = write(tmp_path, kind, factor=2)
    settings = load_checkpoint(paths["student"]).settings
    _, test = data_of(settings, other)
    assert test.step == settings.input_step
    expected = (test.images[3].double() / settings.input_step).round().clamp(max=255)
    assert torch.equal(test[3][0].double(), expected)
    warning = capsys.readouterr().err
    assert f"was trained with the input step {settings.input_step:.4g}" in warning
    assert warning.count("\n") == 1
    report = reported(tmp_path, f"--checkpoint {paths['student']} --data_path {other}")
    assert warning == capsys.readouterr().err
    assert main.main(["--eval_only", str(paths["student"]), "--data_path", str(other)]) == 0
    out, err = capsys.readouterr()
    assert (err, f"accuracy {100 * report['accuracy']:.2f} %" in out) == (warning, True)
    # A teacher of these data does not fit those.
    options = ("--paper_setting", "qamd", "--bits", 4, "--teacher_path", paths["teacher"])
    text = refused(capsys, main.main, command(other, tmp_path / "run", *options), started=True)
    assert f"was trained with the input step {settings.input_step!r}" in text
    assert f"the training data in {other} have " in text
    assert not (tmp_path / "run").exists()
    # Nor can its run go on with them.
    same = command(other, paths["teacher"].parent, "--paper_setting", "original", "--resume")
    assert main.main([*same, "--epochs", "4"]) == 2
    assert f"instead of {settings.input_step!r}" in capsys.readouterr().err


def test_a_checkpoint_from_before_steps_reads_whole_counts_as_it_did(networks, tmp_path):
    data, paths = networks
    content = torch.load(paths["student"], weights_only=True)
    for name in ("input_step", "cache_path"):
        del content["settings"][name]
    torch.save(content, tmp_path / "old.pth")
    old = load_checkpoint(tmp_path / "old.pth")
    now = load_checkpoint(paths["student"]).settings
    assert old.settings == replace(now, input_step=None, cache_path=None)
    _, test = data_of(old.settings, data)
    values = test.images[-1].float()
    assert torch.equal(test[len(test) - 1][0], values.round().clamp(max=255))
    load_network(old)


@pytest.mark.parametrize("step", [0.0, -1.0, float("nan"), float("inf"), 1, "0.5"])
def test_a_checkpoint_with_an_impossible_step_is_refused(step, networks, tmp_path, capsys):
    content = torch.load(networks[1]["teacher"], weights_only=True)
    content["settings"]["input_step"] = step
    torch.save(content, tmp_path / "bad.pth")
    assert main.main(["--eval_only", str(tmp_path / "bad.pth")]) == 2
    assert "is not a checkpoint of this program" in capsys.readouterr().err


@given(arrays(np.uint16, (7, 2, 3, 3), elements=st.integers(0, 255)), st.sampled_from("HBf"))
def test_whole_numbers_of_at_most_255_are_their_own_codes(counts, kind):
    frames = counts.astype(kind)
    assert input_of(frames) == (1, 0)
    assert torch.equal(codes_of(torch.from_numpy(frames), 1.0), torch.from_numpy(frames).float())


VALUES = st.one_of(
    st.just(0.0), st.floats(2**-20, 2**20, width=32), st.integers(0, 2000).map(float)
)


@given(arrays(np.float32, (5, 2, 2, 3), elements=VALUES))
def test_the_step_follows_its_rule(frames):
    values = np.sort(frames[frames > 0]).astype(float)
    whole = bool((frames == np.round(frames)).all())
    step, clipped = input_of(frames)
    if whole and frames.max() <= 255:
        assert (step, clipped) == (1, 0)
        return
    # The smallest value that so many per cent of them do not exceed.
    high, median = (
        next(x for x in values if 100 * (values <= x).sum() >= percent * len(values))
        for percent in (99, 50)
    )
    assert step == max(min(values[-1], 2 * high, 64 * median) / 255, 1 if whole else 0)
    codes = np.round(frames.astype(float) / step)
    assert np.array_equal(codes_of(torch.from_numpy(frames), step), codes.clip(0, 255))
    assert clipped == (frames > 255.5 * step).sum() / len(values)


def test_a_hot_pixel_rounds_nobody_else_to_nothing():
    rng = np.random.default_rng(0)
    fractions = rng.random((40, 2, 10, 10)).astype(np.float32)
    fractions[:, 0, 3, 4] = 60_000  # 0.5 % of the values
    step, clipped = input_of(fractions)
    assert step == pytest.approx(2 / 255, rel=0.02)
    assert clipped == 40 / np.count_nonzero(fractions)
    sparse = np.where(rng.random(fractions.shape) < 0.1, fractions, 0)
    sparse[:, 0, 3, 4] = 60_000  # 5 % of the values that are not zero
    assert 0.1 < input_of(sparse).step < 1  # half of the others are not rounded to nothing
    counts = rng.integers(0, 9, (40, 2, 10, 10)).astype(np.uint16)
    counts[:, 0, 3, 4] = 60_000
    assert input_of(counts) == (1, 40 / np.count_nonzero(counts))
    text = data_loader.input_text(
        data_loader.ImageSet(torch.from_numpy(counts), range(40), step=1.0, clipped=0.00567)
    )
    assert text == "input step 1: 0.0057 of the non-zero training values are above and clipped"


@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_training_frames_without_any_event_are_refused(kind, tmp_path, capsys):
    frames = np.zeros((T, 2, SIDE, SIDE), kind)
    folder = write(tmp_path, "large") / f"N-Caltech101/frames_number_{T}_split_by_number"
    for i in range(54):  # those for training
        for label in "ab":
            np.savez(folder / label / f"{i:03d}.npz", frames=frames)
    options = command(tmp_path, tmp_path / "run", "--paper_setting", "original")
    text = refused(capsys, main.main, options)
    assert f"the training frames in {folder} are all 0 (at --image_size {SIDE}x{SIDE})" in text


def test_an_array_larger_than_is_read_at_once_gives_the_same_step(monkeypatch):
    frames = np.random.default_rng(0).exponential(1, (50, 2, 5, 5)).astype(np.float32)
    frames[49, 1, 4, 4] = 1000  # the largest is looked for everywhere
    whole = input_of(frames)
    monkeypatch.setattr(events, "MOST_VALUES", 50 * 25)
    in_parts = input_of(frames)  # the quantile of every other sample
    values = np.sort(frames[::2].ravel())
    assert in_parts.step == 2 * float(values[-(-99 * values.size // 100) - 1]) / 255
    assert in_parts.step == pytest.approx(whole.step, rel=0.2)


def test_threads_that_read_frames_do_not_disturb_each_other(tmp_path):
    """Before Python 3.13 they do where NumPy parses headers in several threads at once."""
    file, frames = tmp_path / "frames.npz", np.ones((2, 2, 4, 4), np.uint8)
    np.savez_compressed(file, frames=frames)

    def another_thread(phase, info):
        for _ in range(20):
            pass

    seldom, thresholds = sys.getswitchinterval(), gc.get_threshold()
    gc.callbacks.append(another_thread)
    try:
        sys.setswitchinterval(1e-6)
        gc.set_threshold(3, 2, 2)
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: read_frames(file, 2, (4, 4)), range(1000)))
    finally:
        gc.callbacks.remove(another_thread)
        sys.setswitchinterval(seldom)
        gc.set_threshold(*thresholds)
    assert all(np.array_equal(each, frames) for each in found)
