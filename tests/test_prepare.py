"""`data_loader.py prepare`, what it leaves on disk, and trainings that read it."""

import hashlib
import json
import os
import re
import resource
import shutil
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.datasets
import torch
from PIL import Image
from spikingjelly import configure
from spikingjelly.datasets import NMNIST, NCaltech101
from spikingjelly.datasets.utils import load_ATIS_bin

import data_loader
import main
from data_sets import DATA_SETS, cache, event_camera, events
from data_sets.event_camera import as_atis, digit_events
from data_sets.sources import Archive
from data_sets.static import read_image
from loading import data_sets_of
from runtime.errors import UserError
from stand_in_data import (
    write_events,
    write_image_folder,
    write_ncaltech101,
    write_nmnist,
    write_tiny_imagenet,
)
from warm import Program

T = 3
FRAMES = f"N-Caltech101/frames_number_{T}_split_by_number"
PREPARE = ["prepare", "--data", "ncaltech101", "--time_window", str(T), "--data_path"]


def prepare(*arguments: object) -> int:
    return data_loader.main([str(argument) for argument in arguments])


def refused(capsys, *arguments: object) -> str:
    """The one line with which `prepare` ends."""
    assert prepare(*arguments) == 2
    lines = [x for x in re.split(r"[\r\n]+", capsys.readouterr().err) if "error" in x]
    assert len(lines) == 1, lines
    return lines[0].strip().removeprefix("data_loader.py: error: ")


def files_below(folder: Path) -> set[str]:
    return {str(x.relative_to(folder)) for x in folder.rglob("*") if x.is_file()}


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def frames_by_spikingjelly(data_set: type, root: Path, split_by: str, **rest: Any) -> None:
    """Of the raw events below a root, nothing downloaded.

    By one thread: several may disturb each other in numpy's header (see recordings.read_array).
    """

    class Local(data_set):
        @classmethod
        def resource_url_md5(cls) -> list:
            return []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(configure, "max_threads_number_for_datasets_preprocess", 1)
        Local(str(root), data_type="frame", frames_number=T, split_by=split_by, **rest)


@pytest.fixture
def raw(tmp_path) -> Path:
    write_events(tmp_path / "N-Caltech101" / "extract")
    return tmp_path


@pytest.mark.parametrize(
    ("data", "theirs", "folder", "write"),
    [
        ("ncaltech101", NCaltech101, "N-Caltech101", write_events),
        ("nmnist", NMNIST, "N-MNIST", write_nmnist),
    ],
)
def test_frames_are_those_of_spikingjelly_and_its_own_are_used_as_they_are(
    data, theirs, folder, write, tmp_path
):
    found = {}
    for name in ("ours", "other"):
        root = tmp_path / name / folder
        (root / "download").mkdir(parents=True)
        write(root / "extract")
        if name == "other":
            frames_by_spikingjelly(theirs, root, "number")
        command = ["prepare", "--data", data, "--time_window", T, "--data_path", root.parent]
        before = {x: x.stat().st_mtime_ns for x in root.rglob("*.npz")}
        assert prepare(*command) == 0
        frames = root / Path(FRAMES).name
        found[name] = {x: np.load(frames / x)["frames"] for x in files_below(frames)}
        assert all(x.stat().st_mtime_ns == time for x, time in before.items())
        found[f"{name} packed"] = [part.images for part in data_sets_of(data, root.parent, T)]
    assert found["ours"].keys() == found["other"].keys()
    for name, mine in found["ours"].items():
        assert mine.dtype == found["other"][name].dtype
        assert np.array_equal(mine, found["other"][name])
    assert all(map(np.array_equal, found["ours packed"], found["other packed"]))


def zipped(folder: Path, archive: Path) -> str:
    """Pack `folder` with its own name as the top; returns the md5."""
    archive.parent.mkdir(parents=True)
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(folder.rglob("*")):
            file.write(path, path.relative_to(folder.parent))
    return hashlib.md5(archive.read_bytes()).hexdigest()


def expect_archives(monkeypatch, data: str, parts: dict[str, Archive]) -> None:
    recordings = DATA_SETS[data].recordings._replace(parts=parts)
    monkeypatch.setitem(DATA_SETS, data, replace(DATA_SETS[data], recordings=recordings))


def expect_md5(monkeypatch, md5: str) -> None:
    archive = DATA_SETS["ncaltech101"].recordings.parts["Caltech101"]._replace(md5=md5)
    expect_archives(monkeypatch, "ncaltech101", {"Caltech101": archive})


def test_another_zip_is_named_with_its_md5_and_never_deleted(tmp_path, capsys):
    archive = tmp_path / "N-Caltech101" / "download" / "Caltech101.zip"
    md5 = zipped(write_events(tmp_path / "events"), archive)
    text = refused(capsys, *PREPARE, tmp_path)
    assert str(archive) in text
    assert md5 in text
    assert "66201824eabb0239c7ab992480b50ba3" in text
    assert files_below(tmp_path / "N-Caltech101") == {"download/Caltech101.zip"}


def cut(path: Path, at: int = -2) -> None:
    path.write_bytes(path.read_bytes()[:at])


def test_a_damaged_events_file_stops_with_its_path_and_the_rest_is_not_done_twice(raw, capsys):
    events = sorted(raw.glob("N-Caltech101/extract/Caltech101/*/*.bin"))
    whole = events[-1].read_bytes()
    cut(events[-1])
    assert refused(capsys, *PREPARE, raw).startswith(f"{events[-1]} is damaged")
    assert not (raw / FRAMES).exists()
    done = {x: x.stat().st_mtime_ns for x in raw.glob(f"{FRAMES}.unfinished/*/*.npz")}
    assert len(done) == len(events) - 1
    events[-1].write_bytes(whole)
    assert prepare(*PREPARE, raw) == 0
    now = {x.name: x.stat().st_mtime_ns for x in raw.glob(f"{FRAMES}/class_0/*.npz")}
    assert now == {x.name: time for x, time in done.items() if x.parent.name == "class_0"}
    assert not list(raw.rglob(".*.lock")) + list(raw.rglob("*.tmp"))


def test_an_empty_class_of_events_is_refused(raw, capsys):
    (raw / "N-Caltech101/extract/Caltech101/class_2").mkdir()
    assert "class_2 holds no files *.bin" in refused(capsys, *PREPARE, raw)


def test_spikingjellys_marker_is_left_and_refused_and_a_lock_of_a_dead_process_is_none(raw, capsys):
    marker = raw / f"{FRAMES}.building"
    marker.touch()
    assert str(marker) in refused(capsys, *PREPARE, raw)
    assert marker.exists()
    marker.unlink()
    frames = raw / FRAMES
    frames.with_name(f".{frames.name}.lock").touch()
    frames.with_name(f".{frames.name}-48x48.json.lock").touch()
    assert prepare(*PREPARE, raw) == 0
    assert not list(raw.rglob(".*.lock"))


def test_frames_of_files_that_are_gone_or_were_replaced_are_not_kept(raw, capsys):
    extracted = raw / "N-Caltech101/extract/Caltech101"
    last = extracted / "class_1" / "image_0004.bin"
    whole = last.read_bytes()
    cut(last)
    refused(capsys, *PREPARE, raw)
    last.write_bytes(whole)
    shutil.move(extracted / "class_0", extracted / "class_2")
    replaced = extracted / "class_1" / "image_0000.bin"
    replaced.write_bytes(whole)
    os.utime(replaced, (0, 0))  # as of an archive, older than the frames
    assert prepare(*PREPARE, raw) == 0
    assert {x.name for x in (raw / FRAMES).iterdir()} == {"class_1", "class_2"}
    first, same = (
        np.load(raw / FRAMES / "class_1" / f"image_000{n}.npz")["frames"] for n in (0, 4)
    )
    assert np.array_equal(first, same)


def test_a_class_of_damaged_files_alone_is_left_out_and_stray_folders_are_not_seen(raw, capsys):
    write_events(raw / "more", classes=3)
    extracted = raw / "N-Caltech101/extract/Caltech101"
    shutil.move(raw / "more/Caltech101/class_2", extracted / "class_2")
    for path in (extracted / "class_1").iterdir():
        cut(path)
    (extracted / ".ipynb_checkpoints").mkdir()
    assert prepare(*PREPARE, raw, "--skip_damaged") == 0
    (raw / FRAMES / ".ipynb_checkpoints").mkdir()
    output = capsys.readouterr()
    assert output.err.count("warning: skipped") == 5
    assert "8 training and 2 test samples of 2 classes" in output.out
    assert prepare(*PREPARE, raw) == 0


def test_skip_damaged_sets_frames_aside_that_cannot_be_read(tmp_path, capsys):
    folder = write_ncaltech101(tmp_path, T, classes=2, per_class=3)
    file = min(folder.rglob("*.npz"))
    cut(file)
    assert str(file) in refused(capsys, *PREPARE, tmp_path)
    assert prepare(*PREPARE, tmp_path, "--skip_damaged") == 0
    assert f"skipped: {file} cannot be read" in capsys.readouterr().err
    assert file.with_name(f"{file.name}.damaged").exists()
    wrong = ["prepare", "--data", "ncaltech101", "--data_path", tmp_path, "--time_window", "2"]
    shutil.copytree(folder, folder.with_name("frames_number_2_split_by_number"))
    assert "frames of another T" in refused(capsys, *wrong, "--skip_damaged")


def test_a_terminal_shows_the_progress(raw):
    """And a file does not: other tests look for what stands there."""
    with redirect_stderr(Terminal()) as shown:
        assert prepare(*PREPARE, raw) == 0
    assert "converting events to 3 frames" in shown.getvalue()


def test_an_interrupted_prepare_is_one_line(raw, capsys, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(events, "convert_file", interrupt)
    assert prepare(*PREPARE, raw) == 130
    assert capsys.readouterr().err.strip() == (
        "data_loader.py: interrupted: the same command goes on"
    )


def test_processes_that_prepare_at_once_make_it_once_and_all_go_on(tmp_path, monkeypatch):
    """Also for other numbers of frames, which share the unpacked events."""
    archive = tmp_path / "N-Caltech101" / "download" / "Caltech101.zip"
    md5 = zipped(write_events(tmp_path / "events"), archive)
    code = (
        "import sys, data_loader as d\n"
        "from test_prepare import expect_md5, pytest\n"
        f"expect_md5(pytest.MonkeyPatch(), {md5!r})\n"
        "sys.exit(d.main(sys.argv[1:]))"
    )
    (tmp_path / "prepare.py").write_text(code)
    started = [
        Program(tmp_path / "prepare.py", *PREPARE, tmp_path, "--time_window", time_window)
        for time_window in "332"
    ]
    outputs = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0]
    assert all("8 training and 2 test samples" in output for output in outputs)
    assert len(list((tmp_path / "N-Caltech101").glob("*.npy"))) == 2
    assert not list(tmp_path.rglob(".*.lock"))


def packed_array(index: Path) -> Path:
    (array,) = index.parent.glob(f"{index.stem}-*.npy")
    return array


@pytest.fixture
def cached(tmp_path) -> Path:
    """The index of a cache beside its frames."""
    write_ncaltech101(tmp_path, T, classes=2, per_class=3)
    data_sets_of("ncaltech101", tmp_path, T)
    return tmp_path / f"{FRAMES}-48x48.json"


def test_the_cache_is_made_once_and_anew_where_its_source_has_changed(cached, tmp_path):
    before = packed_array(cached)
    made = before.stat().st_mtime_ns
    data_sets_of("ncaltech101", tmp_path, T)
    assert packed_array(cached).stat().st_mtime_ns == made
    file = min((tmp_path / FRAMES).rglob("*.npz"))
    np.savez_compressed(file, frames=np.load(file)["frames"] + 1)
    train, _ = data_sets_of("ncaltech101", tmp_path, T)
    assert train.images[0].min() == 1
    assert packed_array(cached) != before
    max((tmp_path / FRAMES).rglob("*.npz")).unlink()
    train, test = data_sets_of("ncaltech101", tmp_path, T)
    assert len(train) + len(test) == 5


@pytest.mark.parametrize(
    ("peak", "dtype", "code"), [(255, "uint8", 255), (256, "uint16", 255), (1.5, "float32", 2)]
)
def test_counts_are_kept_exactly_in_the_smallest_type(peak, dtype, code, tmp_path):
    folder = write_ncaltech101(tmp_path, T, classes=2, per_class=3)
    file = max(folder.rglob("*.npz"))
    np.savez_compressed(file, frames=np.full((T, 2, 180, 240), float(peak)))
    _, test = data_sets_of("ncaltech101", tmp_path, T)
    assert str(test.images.dtype) == f"torch.{dtype}"
    assert test.images[-1].float().unique().tolist() == [peak]
    image, _ = test[len(test) - 1]  # of a test file: the step is the training files', 1
    assert image.unique().tolist() == [code]


@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf, -np.inf, 1e-50])
def test_numbers_that_are_no_counts_are_refused(value, tmp_path, capsys):
    """In a pixel that is left out at this size, too; too small ones are not taken for zeros."""
    named = "too small" if value == 1e-50 else "holds negative, infinite or undefined"
    folder = write_ncaltech101(tmp_path, T, classes=2, per_class=3)
    file = max(folder.rglob("*.npz"))
    frames = np.zeros((T, 2, 180, 240))
    frames[(0, 0, 179, 239) if value != 1e-50 else 0] = value
    np.savez_compressed(file, frames=frames)
    text = refused(capsys, *PREPARE, tmp_path)
    assert str(file) in text
    assert named in text
    assert prepare(*PREPARE, tmp_path, "--skip_damaged") == 0
    assert "(3, 2, 48, 48)" in capsys.readouterr().out
    assert not file.exists()


def write_frames(root: Path, frames_of, files: int = 12) -> Path:
    """Two classes of small frames, frames_of(class, number); returns the folder of the classes."""
    for label in (0, 1):
        (root / FRAMES / "ab"[label]).mkdir(parents=True)
        for i in range(files):
            path = root / FRAMES / "ab"[label] / f"{i:02d}.npz"
            np.savez_compressed(path, frames=frames_of(label, i))
    return root / FRAMES


def counts(label: int, i: int) -> np.ndarray:
    return np.random.default_rng((label, i)).poisson(0.7, (T, 2, 9, 9))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", ["u1", "i2", ">i4", "i8", "f2", ">f4", "f8", "g", "?"])
def test_frames_of_any_dtype_are_the_same_codes(dtype, tmp_path):
    def frames(label: int, i: int) -> np.ndarray:
        return np.minimum(counts(label, i), 1 if dtype == "?" else 100)

    write_frames(tmp_path, lambda *which: frames(*which).astype(dtype))
    train, test = data_sets_of("ncaltech101", tmp_path, T, augment="none", image_size=(9, 9))
    assert (train.step, train.clipped) == (1, 0)
    for part, which in ((train[1], (0, 1)), (test[1], (1, 11))):
        assert np.array_equal(part[0].numpy(), frames(*which))


@pytest.mark.parametrize(
    ("scale", "step"),
    [(1 / 7, None), (1e-30, None), (1e30, None), (2**40, None), (100, None), (20, 1.0)],
)
def test_the_largest_training_value_is_the_highest_code(scale, step, tmp_path, capsys):
    """Of fractions, of tiny and huge numbers and of counts above 255; whatever the test holds."""
    write_frames(tmp_path, lambda label, i: counts(label, i) * (scale if i < 11 else 1000 * scale))
    largest = max(counts(label, i).max() for label in (0, 1) for i in range(11))
    expected = float(np.float32(largest * scale)) / 255 if step is None else step
    train, test = data_sets_of("ncaltech101", tmp_path, T, augment="none", image_size=(9, 9))
    assert train.step == test.step == expected
    assert train.clipped == 0
    for part, index, which, factor in ((train, 1, (0, 1), 1), (test, 1, (1, 11), 1000)):
        values = np.float32(counts(*which) * (scale * factor)).astype(float)
        codes = np.clip(np.round(values / expected), 0, 255)
        assert np.array_equal(part[index][0].numpy(), codes)
    assert prepare(*PREPARE, tmp_path, "--image_size", "9") == 0
    assert ("input step" in capsys.readouterr().out) == (step is None)


def make_older(index: Path, name: str) -> None:
    """The cache as of a version that did not write `name` into its index."""
    contents, array = json.loads(index.read_text()), packed_array(index)
    del contents["crc32"], contents[name]
    crc = zlib.crc32(json.dumps(contents).encode(), zlib.crc32(np.load(array)))
    index.write_text(json.dumps({"crc32": crc, **contents}))
    array.rename(array.with_name(f"{index.stem}-{crc:08x}.npy"))


def test_the_step_is_found_for_a_cache_of_an_older_version(tmp_path):
    write_frames(tmp_path, lambda *which: counts(*which) * 0.01)
    first = data_sets_of("ncaltech101", tmp_path, T, image_size=(9, 9))
    shutil.rmtree(tmp_path / FRAMES)
    make_older(tmp_path / f"{FRAMES}-9x9.json", "input")
    again = data_sets_of("ncaltech101", tmp_path, T, image_size=(9, 9))
    assert first[0].step < 1
    for part, same in zip(first, again, strict=True):
        assert (part.step, part.clipped) == (same.step, same.clipped)
        assert torch.equal(part.images, same.images)


def test_a_truncated_or_altered_cache_is_named_and_never_used(cached, tmp_path):
    array = packed_array(cached)
    rng = np.random.default_rng(0)
    for path in (cached, array):
        whole = path.read_bytes()
        for offset in rng.integers(0, len(whole), 100).tolist():
            altered = bytearray(whole)
            altered[offset] ^= 0x55
            for content in (whole[:offset], bytes(altered)):
                path.write_bytes(content)
                with pytest.raises(UserError, match=f"cache {cached} is damaged: remove it"):
                    data_sets_of("ncaltech101", tmp_path, T)
        path.write_bytes(whole)
    data_sets_of("ncaltech101", tmp_path, T)


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        "[]",
        '{"classes": ["a"], "files": [["a", -1, 1, 1]], "crc32": 0}',
        '{"files": [], "crc32": 0}',
        '{"files": 5, "crc32": "../x"}',
        "{}",
    ],
)
def test_a_hostile_index_is_one_line(content, cached, tmp_path):
    cached.write_text(content)
    with pytest.raises(UserError, match="is damaged: remove it"):
        data_sets_of("ncaltech101", tmp_path, T)


def test_a_label_that_the_data_set_lacks_is_refused(cached, tmp_path, monkeypatch):
    shutil.rmtree(tmp_path / FRAMES)
    with_one_class = replace(DATA_SETS["ncaltech101"], num_classes=1)
    monkeypatch.setitem(DATA_SETS, "ncaltech101", with_one_class)
    with pytest.raises(UserError, match=r"has 1 classes, .* a label 1: remove the cache"):
        data_sets_of("ncaltech101", tmp_path, T)


def test_an_empty_folder_of_frames_is_refused(tmp_path, capsys):
    (tmp_path / FRAMES).mkdir(parents=True)
    assert "holds 0 classes" in refused(capsys, *PREPARE, tmp_path)


@contextmanager
def full_disk(largest: int) -> Iterator[None]:
    """No file may be larger than so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("data", ["ncaltech101", "TinyImagenet", "raw events", "no room at all"])
def test_a_full_disk_while_preparing_is_one_line_and_leaves_no_cache(data, tmp_path, capsys):
    if data == "raw events":
        write_events(tmp_path / "N-Caltech101" / "extract", events=40_000)
        limit = 20_000
    elif data != "TinyImagenet":
        write_ncaltech101(tmp_path, T, classes=2, per_class=3)
        limit = 50_000 if data == "ncaltech101" else 0
    else:
        write_tiny_imagenet(tmp_path)
        limit = 50_000
    before = files_below(tmp_path)
    name = "TinyImagenet" if data == "TinyImagenet" else "ncaltech101"
    with full_disk(limit):
        text = refused(capsys, *PREPARE, tmp_path, "--data", name)
    assert "File too large" in text
    # Frames that are whole stay for the next time, in a folder that nobody reads.
    assert {x for x in files_below(tmp_path) - before if ".unfinished/" not in x} == set()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ([], "prepare"),
        (["prepare"], "--data"),
        (["prepare", "--data", "ncaltech101", "--time_window", "0"], "--time_window"),
        (["prepare", "--data", "CIFAR10", "--image_size", "64"], "--image_size"),
        (["prepare", "--data", "ncaltech101", "--image_size", "4"], "8 to 1024"),
        (["prepare", "--data", "digits", "--skip_damaged"], "--skip_damaged"),
    ],
)
def test_bad_options_are_one_line(options, named, capsys):
    assert named in refused(capsys, *options)


def test_a_folder_of_images_is_trained_on_and_evaluated(tmp_path, capsys):
    data = write_image_folder(tmp_path / "data")
    common = f"--data folder --data_path {data} --image_size 24 --width 2 --workers 1 --epochs 1"
    for setting, augment in (("original", "basic"), ("student --bits 4", "auto")):
        how = f"--paper_setting {setting} --augment {augment} --batch_size 4"
        save_path = ["--save_path", str(tmp_path / setting.split()[0])]
        assert main.main([*common.split(), *how.split(), *save_path]) == 0
    checkpoint = str(tmp_path / "student" / "student-best.pth")
    assert main.main(["--eval_only", checkpoint, "--data_path", str(data)]) == 0
    assert "of 6 test images" in capsys.readouterr().out
    for size in ("32", "64"):  # 64 is the default
        assert main.main(["--eval_only", checkpoint, "--image_size", size]) == 2
        assert f"--image_size {size} does not fit" in capsys.readouterr().err
    for part in ("train", "val"):
        (data / part / "kind 0").rename(data / part / "kind 3")
    assert main.main(["--eval_only", checkpoint, "--data_path", str(data)]) == 2
    assert "'kind 0' is only in the checkpoint" in capsys.readouterr().err
    teacher = ["--teacher_path", f"{tmp_path}/original/original-best.pth"]
    options = [*common.split(), "--paper_setting", "qamd", "--bits", "4", *teacher]
    assert main.main([*options, "--save_path", str(tmp_path / "new")]) == 2
    assert "'kind 0' is only in the checkpoint" in capsys.readouterr().err


def test_images_of_a_folder_are_scaled_and_cropped_in_the_middle(tmp_path):
    write_image_folder(tmp_path, classes=2)
    image = np.zeros((20, 60, 3), np.uint8)
    image[:, 20:40] = 200
    Image.fromarray(image).save(tmp_path / "val" / "kind 0" / "0.png")
    _, test = data_sets_of("folder", tmp_path, 4, image_size=(10, 10))
    assert test.images[0, :, 2:8, 2:8].unique().tolist() == [200]


def test_sixteen_bits_become_eight_and_what_is_no_image_is_not_seen(tmp_path):
    write_image_folder(tmp_path, classes=2)
    ramp = np.linspace(0, 65535, 64).astype(np.uint16)[None].repeat(64, 0)
    Image.fromarray(ramp).save(tmp_path / "val" / "kind 0" / "0.png")
    (tmp_path / "val" / "kind 0" / "._0.png").write_bytes(b"of a Mac")
    (tmp_path / "val" / "kind 0" / "thumbs.png").mkdir()
    _, test = data_sets_of("folder", tmp_path, 4, image_size=(64, 64))
    assert len(test) == 4
    assert test.images[0, 0, 0].tolist() == (ramp[0] // 256).tolist()


def said(capsys) -> list[str]:
    return capsys.readouterr().err.splitlines()


def files_packed(index: Path) -> list[str]:
    return [name for name, *_ in json.loads(index.read_text())["files"]]


def test_links_are_followed_once_and_what_is_not_read_is_counted(tmp_path, capsys):
    data = write_image_folder(tmp_path / "data", classes=2, size=16)
    train, elsewhere = data / "train", tmp_path / "elsewhere"
    for part in (elsewhere, elsewhere / "deep", tmp_path / "links" / "c", data / "val" / "linked"):
        part.mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(part / "one.JPG", "JPEG")
    before = sorted(str(x.relative_to(train)) for x in train.rglob("*.*"))
    (train / "linked").symlink_to(tmp_path / "links" / "c")  # a class
    a, b = train / "kind 0", train / "kind 1"
    (a / "more").symlink_to(elsewhere)
    (a / "up").symlink_to(train)
    (a / "top").symlink_to(data)  # val lies there
    (a / "itself").symlink_to(a)
    (a / "again").symlink_to(a / "more")
    (a / "other").symlink_to(b)
    (elsewhere / "back").symlink_to(a)
    (b / "x").symlink_to(b / "y")
    (b / "y").symlink_to(b / "x")
    (b / "gone.png").symlink_to(tmp_path / "nothing")
    (b / "notes.txt").touch()
    (b / "moving.gif").touch()
    (train / "README").touch()
    (train / "above.png").touch()
    (train / ".DS_Store").touch()
    for hidden in (a / ".ipynb_checkpoints", elsewhere / ".thumbnails"):
        hidden.mkdir()
        Image.new("RGB", (9, 9)).save(hidden / "x.png")
    os.mkfifo(b / "pipe.png")
    assert prepare("prepare", "--data", "folder", "--data_path", data) == 0
    found = ["kind 0/again/deep/one.JPG", "kind 0/again/one.JPG", "linked/one.JPG"]
    assert sorted(files_packed(data / "train-64x64.json")) == sorted(before + found)
    (line,) = said(capsys)
    assert line.startswith(f"folder: 17 of the files and folders in {train} are not read (")
    for counted in (
        *("links to folders that are read already 6", "hidden 3", "broken links 3"),
        *("pipes or devices 1", ".txt 1", ".gif 1", "no ending 1", ".png 1"),
    ):
        assert counted in line


def test_a_class_that_is_a_link_keeps_its_images_from_links_deeper_down(tmp_path, capsys):
    data, elsewhere = write_image_folder(tmp_path / "data", classes=2, size=16), tmp_path / "there"
    linked = data / "train" / "kind 1"
    before = sorted(str(x.relative_to(data / "train")) for x in linked.parent.rglob("*.*"))
    linked.rename(elsewhere)
    linked.symlink_to(elsewhere)
    (data / "train" / "kind 0" / "again").symlink_to(elsewhere)
    (data / "test").mkdir()
    assert prepare("prepare", "--data", "folder", "--data_path", data) == 0
    assert sorted(files_packed(data / "train-64x64.json")) == before
    err = capsys.readouterr().err
    assert "links to folders that are read already 1" in err
    assert f"{data / 'test'} is not read: {data / 'val'} holds the test images" in err


def test_stray_files_beside_frames_events_and_tiny_images_are_counted(tmp_path, raw, capsys):
    events = raw / "N-Caltech101" / "extract" / "Caltech101"
    (events / "class_0" / "deep").mkdir()
    shutil.copy(events / "class_0" / "image_0001.bin", events / "class_0" / "deep")
    (events / "class_0" / "._image_0001.bin").touch()
    (events / "labels.csv").touch()
    assert prepare(*PREPARE, raw) == 0
    (line,) = said(capsys)
    assert line.endswith(
        f"3 of the files and folders in {events} are not read (hidden 1, .bin 1, .csv 1)"
    )
    (raw / FRAMES / "class_1" / "deep").mkdir()
    np.savez(raw / FRAMES / "class_1" / "deep" / "x.npz", frames=1)
    np.save(raw / FRAMES / "class_1" / "x.npy", 1)
    (raw / FRAMES / "class_1" / "._image_0001.npz").touch()
    assert prepare(*PREPARE, raw) == 0
    (line,) = said(capsys)
    assert line.endswith(
        f"3 of the files and folders in {raw / FRAMES} are not read (hidden 1, .npz 1, .npy 1)"
    )

    tiny = write_tiny_imagenet(raw, classes=2, per_class=3)
    assert prepare("prepare", "--data", "TinyImagenet", "--data_path", raw) == 0
    assert said(capsys) == []
    shutil.copytree(next((tiny / "train").iterdir()), tiny / "train" / "n99999999")
    assert prepare("prepare", "--data", "TinyImagenet", "--data_path", raw) == 0
    (line,) = said(capsys)
    assert f"3 of the files and folders in {tiny / 'train'} are not read (.jpeg 3)" in line


HALVES = np.zeros((4, 6, 3), np.uint8)
HALVES[:, :3, 0], HALVES[:2, :, 1] = 200, 100


def turned(number: int = 6) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


@pytest.mark.parametrize(("ending", "tolerance"), [("png", 0), ("tif", 0), ("jpg", 2)])
def test_images_are_turned_as_their_exif_orientation_says(ending, tolerance, tmp_path):
    path, options = tmp_path / f"image.{ending}", {"quality": 100, "subsampling": 0}
    for number, upright in ((1, HALVES), (4, HALVES[::-1]), (6, np.rot90(HALVES, -1))):
        Image.fromarray(HALVES).save(path, exif=turned(number), **options if tolerance else {})
        read = read_image(path).astype(int)
        assert np.allclose(read, upright.transpose(2, 0, 1), rtol=0, atol=tolerance), number


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16"])
def test_tiffs_of_every_mode_are_turned_whole(mode, tmp_path):
    if mode == "I;16":
        image = Image.fromarray((np.arange(24) * 1000).astype(np.uint16).reshape(4, 6))
    else:
        image = Image.fromarray(HALVES).convert(mode)
    image.save(tmp_path / "as_it_lies.tif")
    lying = read_image(tmp_path / "as_it_lies.tif").transpose(1, 2, 0)
    image.save(tmp_path / "turned.tif", exif=turned())
    read = read_image(tmp_path / "turned.tif")
    assert np.array_equal(read, np.rot90(lying, -1).transpose(2, 0, 1))


def test_sixteen_bits_are_turned_too_and_a_damaged_orientation_is_none(tmp_path):
    ramp = (np.arange(24) * 1000).astype(np.uint16).reshape(4, 6)
    Image.fromarray(ramp).save(tmp_path / "16.png", exif=turned())
    read = read_image(tmp_path / "16.png")
    assert np.array_equal(read[0], np.rot90(ramp // 256, -1))
    Image.fromarray(HALVES).save(tmp_path / "damaged.png", exif=b"Exif\0\0XX*\0\xff\xff\xff\xff")
    read = read_image(tmp_path / "damaged.png")
    assert np.array_equal(read, HALVES.transpose(2, 0, 1))


def test_a_cache_made_before_images_were_turned_is_made_anew(tmp_path):
    write_image_folder(tmp_path, classes=2, size=16)
    data_sets_of("folder", tmp_path, 4, image_size=(8, 8))
    index = tmp_path / "val-8x8.json"
    make_older(index, "reading")
    data_sets_of("folder", tmp_path, 4, image_size=(8, 8))
    assert json.loads(index.read_text())["reading"] == 2


def saved(pixels: list, dtype: str = "u1", mode: str | None = None, **options):
    """What writes these pixels, a list of rows, to a path."""
    return lambda path: Image.fromarray(np.array(pixels, dtype), mode).save(path, **options)


def palette(path: Path) -> None:
    image = Image.fromarray(np.array([[1, 0]], np.uint8), "P")
    image.putpalette([7, 8, 9, 200, 100, 50])
    image.save(path, transparency=1)


def two_pages(path: Path) -> None:
    first, second = (Image.new("L", (2, 1), grey) for grey in (30, 90))
    first.save(path, save_all=True, append_images=[second], format="TIFF")


def tiff(pixels: list, dtype: str, mode: str | None = None, **tags):
    """What writes a TIFF with these pixels and other values of some tags."""

    def write(path: Path) -> None:
        saved(pixels, dtype, mode, format="TIFF")(path)
        content = bytearray(path.read_bytes())
        for place in range(len(content) - 12):  # a tag: its number, type, count and value
            number, kind, count = struct.unpack_from("<HHI", content, place)
            if f"tag{number}" in tags and (kind, count) == (3, 1):
                struct.pack_into("<H", content, place + 8, tags[f"tag{number}"])
        path.write_bytes(content)

    return write


def raw_pixels(header: bytes, values: list, dtype: str):
    return lambda path: path.write_bytes(header + np.array(values, dtype).tobytes())


@pytest.mark.parametrize(
    ("write", "first", "second"),
    [
        (saved([[[10, 0], [250, 255]]], mode="LA"), (10, 10, 10), (250, 250, 250)),
        (tiff([[[10, 0], [100, 128]]], "u1", "LA", tag338=1), (10, 10, 10), (199, 199, 199)),
        (palette, (200, 100, 50), (7, 8, 9)),
        (
            saved([[[0, 255, 0, 0], [255] * 4]], mode="CMYK", format="TIFF"),
            (255, 0, 255),
            (0, 0, 0),
        ),
        (two_pages, (30, 30, 30), (30, 30, 30)),
        (raw_pixels(b"P5 2 1 4095\n", [4095, 2048], ">u2"), (255, 255, 255), (128, 128, 128)),
        (saved([[True, False]], "?"), (255, 255, 255), (0, 0, 0)),
        (saved([[65535, 300]], ">u2", format="TIFF"), (255, 255, 255), (1, 1, 1)),
    ],
)
def test_images_of_every_kind_are_the_colours_they_show(write, first, second, tmp_path):
    path = tmp_path / "image.png"  # what it is, its first bytes say
    write(path)
    assert read_image(path)[:, 0].T.tolist() == [list(first), list(second)]


TWO = [[3, 200]]


@pytest.mark.parametrize(
    ("write", "named"),
    [
        (tiff(TWO, "f4"), "floating-point numbers"),
        (raw_pixels(b"Pf\n2 1\n-1.0\n", [1, 0.5], "<f4"), "floating-point numbers"),
        (tiff(TWO, "i4"), "signed numbers"),
        (tiff(TWO, "i4", tag339=1), "numbers of 32 bits"),
        (tiff(TWO, "u2", tag258=12), "numbers of 12 bits"),
        (tiff(TWO, "u2", tag262=0), "16-bit numbers with 0 for white"),
    ],
)
def test_an_image_that_would_be_misread_is_refused_by_name(write, named, tmp_path, capsys):
    data = write_image_folder(tmp_path, classes=2, size=16)
    path = data / "train" / "kind 1" / "7.png"
    write(path)
    text = refused(capsys, "prepare", "--data", "folder", "--data_path", data)
    assert text == (
        f"{path} holds {named}, which would be misread: save it with 8 or 16 bits, black 0, white "
        "the largest number"
    )
    assert not list(data.glob("*.json"))


def test_what_is_made_goes_to_the_cache_path_and_the_data_stay_as_they_are(
    raw, tmp_path, capsys, monkeypatch
):
    caches = tmp_path / "made" / "here"
    data = write_image_folder(tmp_path / "images", classes=2, size=16)
    tiny = write_tiny_imagenet(raw / "tiny", classes=2, per_class=3).parent
    before = files_below(raw) - files_below(caches)
    options = ("--cache_path", caches)
    assert prepare(*PREPARE, raw, *options) == 0
    assert prepare("prepare", "--data", "folder", "--data_path", data, *options) == 0
    assert prepare("prepare", "--data", "TinyImagenet", "--data_path", tiny, *options) == 0
    made = {str(Path("made/here") / x) for x in files_below(caches)}
    assert files_below(raw) - made == before
    assert len(list((caches / FRAMES).glob("*/*.npz"))) == 10
    kinds = ("train-64x64", "val-64x64", "tiny-imagenet-200-train", f"{FRAMES}-48x48")
    assert all((caches / f"{name}.json").exists() for name in kinds)
    monkeypatch.setenv("MD_SNN_CACHE_PATH", str(caches))  # what every command looks at
    monkeypatch.setattr(cache, "_write_packed", lambda *_: 1 / 0)
    for name, path in (("folder", data), ("TinyImagenet", tiny), ("ncaltech101", raw)):
        data_sets_of(name, path, T)


def test_a_folder_that_cannot_be_written_says_where_caches_can_go(tmp_path, capsys):
    data = write_image_folder(tmp_path / "data", classes=2, size=16)
    events = tmp_path / "events"
    write_events(events / "N-Caltech101" / "extract")
    for folder in (data, events, events / "N-Caltech101"):
        folder.chmod(0o555)
    if os.access(data, os.W_OK):
        pytest.skip("this user may write everywhere")
    for options in (["prepare", "--data", "folder", "--data_path", data], [*PREPARE, events]):
        text = refused(capsys, *options)
        assert "cannot be written" in text
        assert "--cache_path" in text
        assert prepare(*options, "--cache_path", tmp_path / "caches") == 0


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda root: shutil.rmtree(root / "val"), "cannot read {}/val"),
        (
            lambda root: (root / "val" / "kind 2").rename(root / "val" / "kind 3"),
            "{}/train lacks 1 of the classes of {}/val: kind 3",
        ),
        (
            lambda root: [shutil.rmtree(x) for x in root.glob("*/kind [12]")],
            "two classes or more, found 1",
        ),
        (
            lambda root: [x.unlink() for x in root.glob("train/kind 1/*")],
            "{}/train/kind 1 holds no image",
        ),
        (lambda root: cut(min(root.glob("train/kind 1/*")), -200), "{}/train/kind 1/"),
        (  # which is only another class
            lambda root: [(x / "again").symlink_to(x / "kind 1") for x in root.iterdir()],
            "{}/train/again holds no image",
        ),
    ],
)
def test_a_bad_folder_is_one_line(damage, named, tmp_path, capsys):
    damage(write_image_folder(tmp_path))
    text = refused(capsys, "prepare", "--data", "folder", "--data_path", tmp_path)
    assert named.replace("{}", str(tmp_path)) in text


def test_a_digit_s_events_are_the_log_intensity_that_the_camera_sees(tmp_path):
    t, x, y, p = digit_events(sklearn.datasets.load_digits().images[3])
    assert (np.diff(t) >= 0).all()
    assert 0 <= t[0] <= t[-1] <= 300_000
    assert abs(p.mean() - 0.5) < 0.01  # the camera is back where it started
    for path, part in ((tmp_path / "whole.bin", slice(None)), (tmp_path / "cut.bin", slice(100))):
        path.write_bytes(as_atis(t[part], x[part], y[part], p[part]))
        read = load_ATIS_bin(path)
        for name, column in (("t", t), ("x", x), ("y", y), ("p", p)):
            assert np.array_equal(read[name], column[part])
    # Each pixel's signed sum of events stays within one threshold of its log intensity: after the
    # round trip nothing may be left, and at the first corner it is the difference of two pictures.
    total = np.zeros((180, 240), int)
    np.add.at(total, (y, x), np.where(p, 1, -1))
    assert np.abs(total).max() <= 1
    half = np.zeros((180, 240), int)
    first = t <= 100_000
    np.add.at(half, (y[first], x[first]), np.where(p[first], 1, -1))
    assert half.max() * event_camera.THRESHOLD <= np.log(1 / event_camera.DARK)
    assert half.max() * event_camera.THRESHOLD > 0.5 * np.log(1 / event_camera.DARK)


def test_digits_dvs_is_made_converted_and_trained_on(tmp_path, monkeypatch):
    """Of forty digits: all 1,797 take a minute (scripts/quickstart_dvs.sh)."""
    digits = sklearn.datasets.load_digits()
    digits.images, digits.target = digits.images[:40], digits.target[:40]
    monkeypatch.setattr(sklearn.datasets, "load_digits", lambda: digits)
    options = "--data digits-dvs --paper_setting original --width 2 --epochs 1 --batch_size 8"
    options += " --image_size 24x32"
    where = ["--data_path", str(tmp_path), "--save_path", str(tmp_path / "run")]
    assert main.main([*options.split(), *where, "--workers", "1", "--augment", "none"]) == 0
    root = tmp_path / "Digits-DVS"
    assert len(list(root.glob("extract/Caltech101/*/image_*.bin"))) == 40
    assert len(list(root.glob("frames_number_10_split_by_number/*/*.npz"))) == 40
    assert not list(root.rglob("*.unfinished"))
