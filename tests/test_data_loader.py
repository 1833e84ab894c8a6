"""The data sets as a user gets them, read from files in their real formats (stand_in_data)."""

import hashlib
import json
import multiprocessing
import pickle
import re
import shutil
import urllib.error
import urllib.request
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.transforms import v2

import data_loader
import main
import stand_in_data
from data_loader import (
    DeviceLoader,
    ImageSet,
    Share,
    evaluation_loader,
    load_data_sets,
    set_epoch,
    some_images,
    training_loader,
)
from data_sets import DATA_SETS, DataSet, static
from data_sets.augment import CropAndFlip, augmentation
from data_sets.sources import Samples
from engine.data import batches_of
from load_settings import parse_settings
from loading import data_sets_of, one_by_one
from runtime.errors import UserError
from runtime.processes import first_process_first

T = 4
CIFAR = {"CIFAR10": CIFAR10, "CIFAR100": CIFAR100}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No test waits for a network, or finds one."""

    def fail(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", fail)


@pytest.fixture(scope="session")
def originals(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("originals")
    stand_in_data.write_tiny_imagenet(folder)
    stand_in_data.write_ncaltech101(folder, T)
    for name in CIFAR:
        stand_in_data.write_cifar(folder, name)
    return folder


@pytest.fixture
def data_path(originals, tmp_path, monkeypatch) -> Path:
    """Stand-ins for every data set, for a test to damage; CIFAR's are accepted in this process."""
    shutil.copytree(originals, tmp_path, dirs_exist_ok=True)
    for cifar in CIFAR.values():
        for attribute, value in stand_in_data.cifar_md5_lists(cifar, tmp_path).items():
            monkeypatch.setattr(cifar, attribute, value)
    return tmp_path


def one_line_error(data: str, data_path: Path, time_window: int = T) -> str:
    with pytest.raises(UserError) as caught:
        data_sets_of(data, data_path, time_window)
    text = str(caught.value)
    assert text.isprintable()  # so it is a single line
    return text


def sources(index: Path) -> list[tuple[str, int]]:
    """(name, label) of what a cache was made of, in the order of its images."""
    return [(name, label) for name, label, *_ in json.loads(index.read_text())["files"]]


def cache_of(frames: Path) -> Path:
    return frames.with_name(f"{frames.name}-48x48.json")


@pytest.mark.parametrize(
    ("data", "shape", "classes", "sizes"),
    [
        ("CIFAR10", (3, 32, 32), 4, (100, 40)),
        ("CIFAR100", (3, 32, 32), 4, (100, 40)),
        ("TinyImagenet", (3, 64, 64), 4, (32, 16)),
        ("ncaltech101", (T, 2, 48, 48), 3, (27, 3)),
        ("digits", (1, 16, 16), 10, (1437, 360)),
    ],
)
def test_every_item_is_a_float_image_and_an_int_label(data, shape, classes, sizes, data_path):
    for part, size in zip(data_sets_of(data, data_path, T), sizes, strict=True):
        assert len(part) == size
        items = [part[i] for i in range(size)]
        assert {image.shape for image, _ in items} == {shape}
        assert {image.dtype for image, _ in items} == {torch.float32}
        assert {type(label) for _, label in items} == {int}
        assert {label for _, label in items} == set(range(classes))
        images = torch.stack([image for image, _ in items])
        if data == "ncaltech101":
            assert images.equal(images.round())
            assert images.min() == 0
            assert images.max() > 1
        else:
            assert images.min() >= 0
            assert 0.5 < images.max() <= 1
            assert images.equal((images * 255).round() / 255)  # exactly 8-bit pixels


@pytest.mark.parametrize("data", ["CIFAR10", "CIFAR100"])
def test_cifar_images_are_the_pixels_of_the_files_in_order(data, data_path):
    train, test = data_sets_of(data, data_path, T)
    folder = data_path / CIFAR[data].base_folder
    for part, files in ((train, CIFAR[data].train_list), (test, CIFAR[data].test_list)):
        batches = [pickle.loads((folder / file).read_bytes()) for file, _ in files]
        pixels = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
        assert part.images.dtype == torch.uint8
        assert torch.equal(part.images, torch.from_numpy(pixels))
        key = "labels" if data == "CIFAR10" else "fine_labels"
        assert part.labels.tolist() == [label for batch in batches for label in batch[key]]
    assert torch.equal(test[7][0], torch.from_numpy(pixels[7]) / 255)


def test_tiny_imagenet_labels_are_the_places_of_sorted_wnids(data_path):
    train, test = data_sets_of("TinyImagenet", data_path, T)
    root = data_path / "tiny-imagenet-200"
    wnids = sorted((root / "wnids.txt").read_text().split())
    names = sources(data_path / "tiny-imagenet-200-train.json")
    assert [label for _, label in names] == train.labels.tolist()
    assert all(Path(name).parent.parent.name == wnids[label] for name, label in names)
    annotated = dict(line.split("\t")[:2] for line in (root / "val" / "val_annotations.txt").open())
    names = sources(data_path / "tiny-imagenet-200-val.json")
    assert [label for _, label in names] == test.labels.tolist()
    assert all(annotated[Path(name).name] == wnids[label] for name, label in names)


@pytest.mark.parametrize("below", ["images", "."])
@pytest.mark.parametrize("left", ["nothing", "annotations", "an empty folder"])
def test_a_rearranged_val_folder_gives_the_same_test_set(below, left, data_path, tmp_path):
    _, official = data_sets_of("TinyImagenet", data_path, T)
    val = data_path / "tiny-imagenet-200" / "val"
    for line in (val / "val_annotations.txt").read_text().splitlines():
        name, wnid = line.split("\t")[:2]
        (val / wnid / below).mkdir(parents=True, exist_ok=True)
        (val / "images" / name).rename(val / wnid / below / name)
    if left != "an empty folder":
        (val / "images").rmdir()
    if left != "annotations":
        (val / "val_annotations.txt").unlink()
    _, rearranged = data_sets_of("TinyImagenet", data_path, T)

    def content(part):
        rows = zip(part.labels.tolist(), part.images, strict=True)
        return sorted((label, image.numpy().tobytes()) for label, image in rows)

    assert content(rearranged) == content(official)


def test_a_grayscale_jpeg_is_read_as_three_equal_channels(data_path):
    _, test = data_sets_of("TinyImagenet", data_path, T)
    name, _ = sources(data_path / "tiny-imagenet-200-val.json")[0]
    assert Image.open(data_path / "tiny-imagenet-200" / name).mode == "L"
    assert all(torch.equal(channel, test[0][0][0]) for channel in test[0][0])
    assert not torch.equal(*test[1][0][:2])


def test_ncaltech101_holds_out_the_last_tenth_of_each_class_in_sorted_order(tmp_path):
    folder = stand_in_data.write_ncaltech101(tmp_path, 1, classes=2, per_class=20)
    stand_in_data.write_ncaltech101(tmp_path / "few", 1, classes=3, per_class=3)
    (tmp_path / "few/N-Caltech101" / folder.name / "accordion").rename(folder / "accordion")
    train, test = data_sets_of("ncaltech101", tmp_path, 1)

    names = [(label, Path(name).stem) for name, label in sources(cache_of(folder))]
    assert names[len(train) :] == [
        (0, "image_0019"),
        (0, "image_0020"),
        (1, "image_0019"),
        (1, "image_0020"),
        (2, "image_0003"),
    ]
    assert names[: len(train)] == sorted(names[: len(train)])
    assert len(set(names)) == len(names)
    assert (len(train), len(test)) == (18 + 18 + 2, 5)


def test_ncaltech101_test_frames_are_event_counts_of_the_file(data_path):
    _, test = data_sets_of("ncaltech101", data_path, T)
    folder = data_path / "N-Caltech101" / f"frames_number_{T}_split_by_number"
    name, _ = sources(cache_of(folder))[-len(test)]
    frames = np.load(folder / name)["frames"]
    # Nearest neighbour keeps, of 180 rows and 240 columns, number ⌊i·180/48⌋ and 5·i.
    kept = frames[:, :, np.arange(48) * 180 // 48][..., np.arange(48) * 5]
    assert torch.equal(test[0][0], torch.from_numpy(kept).float())


def test_digits_are_enlarged_bilinearly_and_split_by_class():
    train, test = data_sets_of("digits", "unused", T)
    share = [torch.bincount(part.labels) for part in (train, test)]
    assert torch.allclose(share[1] / (share[0] + share[1]), torch.tensor(0.2), atol=0.01)
    # A corner pixel of the enlarged image is the corner of the 8×8 one, for align_corners=False.
    from sklearn.datasets import load_digits

    corners = {tuple(d[::7, ::7].ravel()) for d in (load_digits().images * 255 / 16).round()}
    for part in (train, test):
        assert all(tuple(image[0, ::15, ::15].ravel().tolist()) in corners for image in part.images)


@pytest.mark.parametrize("data", ["CIFAR10", "TinyImagenet", "ncaltech101"])
def test_augmentation_is_the_same_for_any_number_of_workers_and_new_in_each_epoch(data, data_path):
    train, _ = data_sets_of(data, data_path, T, seed=3)
    loaders = [training_loader(one_by_one(train), Share(4, workers=n)) for n in (0, 2)]
    seen = {}
    before = torch.get_rng_state()
    for epoch in (0, 1, 0):  # also of a loader that was used before
        for loader in loaders:
            set_epoch(loader, epoch)
            images = torch.cat([images for images, _ in loader])
            assert torch.equal(images, seen.setdefault(epoch, images))
    assert torch.equal(before, torch.get_rng_state())
    # The same images in another order would have equal sums.
    assert not torch.allclose(*(seen[x].flatten(1).sum(1).sort()[0] for x in (0, 1)))
    other_seed, _ = data_sets_of(data, data_path, T, seed=4)
    assert any(not torch.equal(train[i][0], other_seed[i][0]) for i in range(5))


def test_augmentation_treats_all_frames_of_a_sample_alike(data_path):
    train, _ = data_sets_of("ncaltech101", data_path, T)
    first = train.images[0, :1]
    train.images = first.expand(len(train), T, -1, -1, -1)
    for index in range(len(train)):
        frames, _ = train[index]
        assert all(torch.equal(frame, frames[0]) for frame in frames)


def test_ncaltech101_is_rolled_rotated_or_sheared_by_what_the_recipe_says(data_path):
    train, _ = data_sets_of("ncaltech101", data_path, T)
    point = torch.zeros(1, 1, 48, 48)
    point[..., 24, 40] = 1  # right of the centre, on its row
    seen = {"rolled": 0, "rotated": 0, "sheared": 0}
    for seed in range(300):
        torch.manual_seed(seed)
        which = int(torch.multinomial(torch.ones(3), 1))
        torch.manual_seed(seed)
        rows, columns = train.augment(point)[0, 0].nonzero(as_tuple=True)
        if len(rows) != 1:
            continue  # nearest neighbour may double or lose a single pixel
        down, right = int(rows[0]) - 24, int(columns[0]) - 40
        if which == 0:
            assert abs(down) <= 3
            assert abs(right) <= 3
        elif which == 1:
            assert abs(down) <= 16.5 * np.sin(np.radians(15)) + 1
            assert -2 <= right <= 1
        else:
            assert down == 0
            assert abs(right) <= 1
        seen[["rolled", "rotated", "sheared"][which]] += 1
    assert min(seen.values()) > 50


@pytest.mark.parametrize("size", [63, 64, 65, 100])
def test_a_global_batch_is_the_same_set_of_images_on_1_2_or_4_processes(size):
    """For a seed and an epoch: others have another order."""

    def global_batches(world_size, epoch=2, seed=0):
        data_set, shares = ImageSet(torch.zeros(size, 1, 1, 1), range(size), seed=seed), []
        for rank in range(world_size):
            loader = training_loader(data_set, Share(16 // world_size, rank, world_size))
            set_epoch(loader, epoch)
            shares.append([labels.tolist() for _, labels in loader])
        return [sorted(chain.from_iterable(parts)) for parts in zip(*shares, strict=True)]

    alone = global_batches(1)
    assert len(alone) == size // 16
    assert len(set(chain.from_iterable(alone))) == 16 * len(alone)
    assert alone == global_batches(2) == global_batches(4)
    assert alone not in (global_batches(1, epoch=3), global_batches(1, seed=1))


def test_a_data_set_below_one_global_batch_is_kept_as_one_partial_batch():
    data_set = ImageSet(torch.zeros(10, 1, 1, 1), range(10))
    for world_size in (1, 2, 4):
        seen = []
        for rank in range(world_size):
            (batch,) = training_loader(data_set, Share(16, rank, world_size))
            seen.append(batch[1].tolist())
        assert set(chain.from_iterable(seen)) == set(range(10))
        assert len({len(share) for share in seen}) == 1


def both_loaders(data_set, device, batch_size=16, rank=0, world_size=1, epoch=1):
    """(the reference, the one on the device) for training."""
    share = Share(batch_size, rank, world_size)
    reference = training_loader(one_by_one(data_set), share)
    on_device = training_loader(data_set, share, device)
    assert isinstance(on_device, DeviceLoader)
    for loader in (reference, on_device):
        set_epoch(loader, epoch)
    assert len(reference) == len(on_device)
    return reference, on_device


@pytest.mark.parametrize("data", ["CIFAR10", "CIFAR100", "TinyImagenet", "digits"])
@pytest.mark.parametrize("world_size", [1, 3, 50])  # of 50, some have nothing to do
def test_on_the_device_evaluation_is_exactly_that_of_a_data_loader_each_image_once(
    data, world_size, data_path, device
):
    _, test = data_sets_of(data, data_path, T)
    test.labels = torch.arange(len(test))
    seen = []
    for rank in range(world_size):
        share = Share(7, rank, world_size)
        on_device = evaluation_loader(test, share, device)
        assert isinstance(on_device, DeviceLoader)
        reference = evaluation_loader(one_by_one(test), share)
        assert len(on_device) == len(reference)
        for ours, theirs in zip(on_device, reference, strict=True):
            assert all(x.device.type == device.type for x in ours)
            assert all(torch.equal(a.cpu(), b) for a, b in zip(ours, theirs, strict=True))
            seen += ours[1].tolist()
    assert sorted(seen) == list(range(len(test)))


def test_a_gpu_tests_more_images_at_once_than_it_trains_on(device):
    settings = parse_settings(
        ["--data", "digits", "--batch_size", "100", "--paper_setting", "original"]
    )
    train, test = load_data_sets(settings)
    batches = batches_of(settings, train, test, device)
    trained, tested = ([len(labels) for _, labels in x] for x in (batches.train, batches.test))
    assert trained == [100] * 14
    assert tested == ([256, 104] if device.type == "cuda" else [100, 100, 100, 60])


@pytest.mark.parametrize("size", [10, 64, 70])
@pytest.mark.parametrize("world_size", [1, 4])
def test_on_the_device_training_batches_hold_the_same_images(size, world_size, device):
    images = torch.randint(256, (size, 3, 8, 8), dtype=torch.uint8)
    data_set = ImageSet(images, range(size))
    for rank in range(world_size):
        for theirs, ours in zip(*both_loaders(data_set, device, 16, rank, world_size), strict=True):
            assert all(x.device.type == device.type for x in ours)
            assert all(torch.equal(a.cpu(), b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("data", ["CIFAR10", "ncaltech101"])
def test_an_epoch_can_be_gone_on_with_at_any_batch(data, data_path):
    train, _ = data_sets_of(data, data_path, T)
    loader = training_loader(train, Share(8))
    set_epoch(loader, 1)
    whole = list(loader)
    assert len(whole) == len(loader)
    for first in (1, len(whole) - 1, len(whole)):
        set_epoch(loader, 1, first)
        assert len(loader) == len(whole)
        for ours, theirs in zip(loader, whole[first:], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_crops_and_flips_on_the_device_are_torchvisions_in_distribution(device):
    """Each of 5 · 5 crops, flipped or not, is as likely: counted on an image of distinct pixels."""
    image, size = torch.arange(1, 1 + 16 * 16).reshape(1, 16, 16), 6000
    data_set = ImageSet(image.expand(size, 1, 16, 16), range(size), CropAndFlip((16, 16)))
    crops = []
    for loader in both_loaders(data_set, device, 1000):
        # A crop is known by two pixels of its middle, where no padding reaches.
        middles = torch.cat([images[:, 0, 8, 7:9] for images, _ in loader])
        found, counts = (255 * middles).round().int().unique(dim=0, return_counts=True)
        assert len(counts) == 2 * 5 * 5
        # χ² with 49 degrees of freedom: above 95 once in 10,000
        assert ((counts - size / 50) ** 2).sum() / (size / 50) < 95
        crops.append(found.cpu())
    assert torch.equal(*crops)


@pytest.mark.parametrize(("H", "W"), [(16, 16), (8, 40)])
def test_each_image_on_the_device_is_one_of_its_crops(H, W, device):
    images = torch.randint(256, (20, 3, H, W), dtype=torch.uint8)
    augment = CropAndFlip((H, W))
    draws = augment.draw(20, seed=3)
    padded = torch.nn.functional.pad(images, [W // 8, W // 8, H // 8, H // 8])
    for i, image in enumerate(augment.of_batch(images.to(device), draws.to(device)).cpu()):
        row, column, flipped = draws[i].tolist()
        crop = padded[i, :, row : row + H, column : column + W]
        assert torch.equal(image, crop.flip(-1) if flipped else crop)


def test_augmentation_on_the_device_is_the_same_on_any_number_of_processes_and_new_in_each_epoch(
    device,
):
    images = torch.randint(256, (64, 3, 16, 16), dtype=torch.uint8)
    data_set = ImageSet(images, range(64), CropAndFlip((16, 16)), seed=7)

    def epoch_images(world_size, epoch):
        seen = {}
        for rank in range(world_size):
            _, loader = both_loaders(data_set, device, 16 // world_size, rank, world_size, epoch)
            for batch, labels in loader:
                seen |= dict(zip(labels.tolist(), batch, strict=True))
        return torch.stack([seen[label] for label in range(64)])

    alone = epoch_images(1, 1)
    assert torch.equal(alone, epoch_images(2, 1))
    assert torch.equal(alone, epoch_images(4, 1))
    assert not torch.equal(alone, epoch_images(1, 2))
    data_set.seed = 8
    assert not torch.equal(alone, epoch_images(1, 1))


def test_auto_is_autoaugment_and_a_grey_square(data_path):
    train, _ = data_sets_of("CIFAR10", data_path, T, augment="auto")
    crop, policy, cutout = train.augment.transforms
    assert isinstance(crop, CropAndFlip)
    assert crop.padding == (4, 4)
    assert policy.policy == v2.AutoAugmentPolicy.CIFAR10
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    areas = []
    for seed in range(300):
        torch.manual_seed(seed)
        cut = cutout(image)
        assert set(cut.unique().tolist()) == {0, 128}
        areas.append(int((cut[0] > 0).sum()))
    assert max(areas) == 16 * 16
    assert 8 * 8 <= min(areas) < 12 * 12  # squares reach over the border
    assert torch.equal(image, torch.zeros_like(image))
    *_, small = augmentation("auto", False, (8, 8)).transforms
    assert small.side == 4
    # Images of their own transforms: from a loader with workers.
    on_workers = training_loader(train, Share(4, workers=2))
    assert isinstance(on_workers, torch.utils.data.DataLoader)
    first = next(iter(on_workers))[0]
    assert torch.equal(first, next(iter(on_workers))[0])


@pytest.mark.parametrize("data", ["CIFAR10", "TinyImagenet", "ncaltech101"])
def test_test_images_are_not_augmented_and_with_none_no_others(data, data_path):
    for part in data_sets_of(data, data_path, T)[1], *data_sets_of(data, data_path, T, 0, "none"):
        part.epoch = 5
        whole = part.images[2].float() / (255 if part.step is None else 1)
        assert torch.equal(part[2][0], whole)


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize(
    ("data", "folder", "source"),
    [
        ("CIFAR10", "cifar-10-batches-py", "cifar-10-python.tar.gz"),
        ("CIFAR100", "cifar-100-python", "cifar-100-python.tar.gz"),
        ("TinyImagenet", "tiny-imagenet-200", "cs231n.stanford.edu/tiny-imagenet-200.zip"),
        ("ncaltech101", "N-Caltech101/frames_number_4_split_by_number", "data_loader.py prepare"),
    ],
)
@pytest.mark.parametrize("there", [True, False], ids=["empty path", "missing path"])
def test_missing_data_are_named_with_folder_and_source_and_nothing_is_left(
    data, folder, source, there, tmp_path
):
    data_path = tmp_path if there else tmp_path / "not" / "there"
    text = one_line_error(data, data_path)
    assert str(data_path / folder) in text
    assert source in text
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("data", ["CIFAR10", "CIFAR100"])
def test_a_damaged_cifar_file_is_an_error_that_leaves_the_copy_alone(data, data_path):
    folder = data_path / CIFAR[data].base_folder
    for file in (CIFAR[data].test_list[0][0], CIFAR[data].meta["filename"]):
        whole = (folder / file).read_bytes()
        (folder / file).write_bytes(whole[:-20])
        before = tree(data_path)
        assert str(folder) in one_line_error(data, data_path)
        assert tree(data_path) == before
        (folder / file).write_bytes(whole)
    data_sets_of(data, data_path, T)


@pytest.mark.parametrize("data", ["CIFAR10", "CIFAR100"])
def test_a_download_that_breaks_off_leaves_nothing(data, tmp_path, monkeypatch):
    def break_off(url, root, filename, md5):
        Path(root).mkdir(parents=True, exist_ok=True)
        (Path(root) / filename).write_bytes(b"half of")
        (Path(root) / CIFAR[data].base_folder).mkdir()
        raise RuntimeError("File not found or corrupted.")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", break_off)
    one_line_error(data, tmp_path / "new")
    assert tree(tmp_path) == {}


def test_outside_the_test_environment_the_real_md5_sums_refuse_stand_ins(tmp_path):
    for data in CIFAR:
        folder = stand_in_data.write_cifar(tmp_path, data)
        assert str(folder) in one_line_error(data, tmp_path)


def tiny_archive(data_path: Path) -> tuple[Path, str]:
    """Pack the stand-in as it is published and remove its folder; the archive and its md5."""
    archive = shutil.make_archive(
        str(data_path / "tiny-imagenet-200"), "zip", data_path, "tiny-imagenet-200"
    )
    shutil.rmtree(data_path / "tiny-imagenet-200")
    return Path(archive), hashlib.md5(Path(archive).read_bytes()).hexdigest()


@pytest.mark.parametrize("there", [True, False], ids=["archive there", "downloaded"])
def test_tiny_imagenet_is_unpacked_from_the_archive_with_its_md5(there, data_path, monkeypatch):
    expected = [part.labels.tolist() for part in data_sets_of("TinyImagenet", data_path, T)]
    archive, md5 = tiny_archive(data_path)
    for path in [*data_path.glob("tiny-imagenet-200-*.json")]:
        path.unlink()
    monkeypatch.setattr(static, "TINY_IMAGENET", static.TINY_IMAGENET._replace(md5=md5))
    if not there:
        elsewhere = archive.rename(data_path.with_name(f"{data_path.name}.zip"))

        def download(url, root, filename, md5_):
            assert md5_ == md5
            shutil.copy(elsewhere, Path(root) / filename)

        monkeypatch.setattr("torchvision.datasets.utils.download_url", download)
    found = [part.labels.tolist() for part in data_sets_of("TinyImagenet", data_path, T)]
    assert found == expected


LISTS = "wnids.txt", "val/val_annotations.txt"


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda root: (root / LISTS[0]).unlink(), "wnids.txt is missing"),
        (lambda root: (root / "train").rename(root / "elsewhere"), "train is missing"),
        (lambda root: [x.unlink() for x in root.glob("train/*/images/*")], "holds no image"),
        (
            lambda root: (root / LISTS[0]).write_text("\n".join(map("n{:08d}".format, range(201)))),
            "names 201 classes",
        ),
        (
            lambda root: (root / LISTS[1]).open("a").write("val_0.JPEG\tn99999999\t0\t0\t1\t1\n"),
            "n99999999",
        ),
        (lambda root: (root / LISTS[0]).write_text("/tmp\n"), "/tmp holds no image"),
        (
            lambda root: (root / LISTS[1]).write_text("val_0.JPEG\n"),
            "gives val_0.JPEG the class ''",
        ),
        (lambda root: (root / "val/images/val_3.JPEG").unlink(), "val_3.JPEG"),
        (lambda root: (root / LISTS[1]).write_text(""), "val_annotations.txt is empty"),
        (lambda root: (root / LISTS[0]).open("ab").write(b"\xff\n"), "holds no image"),
        (lambda root: (root / LISTS[1]).open("ab").write(b"\xff\n"), "the class ''"),
    ],
)
def test_a_damaged_tiny_imagenet_is_one_clear_line(damage, named, data_path):
    damage(data_path / "tiny-imagenet-200")
    text = one_line_error("TinyImagenet", data_path)
    assert named in text
    assert "tiny-imagenet-200.zip" in text


def frames(content: np.ndarray, name: str = "frames"):
    return lambda file: np.savez_compressed(file, **{name: content})


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def not_a_zip(file: Path) -> None:
    file.write_bytes(b"frames")


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (
            frames(np.zeros((T + 1, 2, 180, 240))),
            f"holds frames of another T: got {T + 1}, --time_window says {T}",
        ),
        (frames(np.zeros(3), "events"), "no array named frames"),
        (frames(np.zeros((T, 3, 180, 240))), f"shape ({T}, 3, 180, 240)"),
        (frames(np.full((T, 2, 1, 1), None)), "cannot be read"),
        (truncated, "cannot be read"),
        (not_a_zip, "cannot be read"),
        (frames(np.zeros((T, 2, 0, 0))), "not frames (T, 2, H, W)"),
        (frames(np.full((T, 2, 9, 9), 1j)), "holds complex128"),
    ],
)
def test_a_bad_frames_file_is_named_before_anything_is_loaded(damage, named, data_path):
    file = sorted(data_path.glob("N-Caltech101/*/*/*.npz"))[-1]
    damage(file)
    text = one_line_error("ncaltech101", data_path)
    assert str(file) in text
    assert named in text


def test_frames_of_another_time_window_are_named_with_the_way_to_convert(data_path):
    text = one_line_error("ncaltech101", data_path, time_window=10)
    assert "found there: frames_number_4_split_by_number" in text
    assert f"prepare --data ncaltech101 --data_path {data_path} --time_window 10" in text


def test_more_than_101_classes_of_events_are_refused(data_path):
    for number in range(99):
        folder = data_path / f"N-Caltech101/frames_number_4_split_by_number/c{number}"
        folder.mkdir()
        (folder / "x.npz").touch()
    assert "holds 102 classes" in one_line_error("ncaltech101", data_path)


def test_an_empty_class_or_a_test_set_without_files_is_refused(tmp_path):
    folder = stand_in_data.write_ncaltech101(tmp_path, T, classes=2, per_class=1)
    assert "no class of two files" in one_line_error("ncaltech101", tmp_path)
    (folder / "new").mkdir()
    assert f"{folder / 'new'} holds no files *.npz" in one_line_error("ncaltech101", tmp_path)


def cut_in_the_middle(file: Path) -> None:
    content = bytearray(file.read_bytes())
    half = len(content) // 2
    content[half : half + 200] = bytes(200)
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("data", "damage", "files", "cache"),
    [
        ("ncaltech101", cut_in_the_middle, "N-Caltech101/*/*/*.npz", "frames"),
        ("TinyImagenet", not_a_zip, "tiny-imagenet-200/train/*/images/*", "tiny"),
        ("TinyImagenet", truncated, "tiny-imagenet-200/val/images/*", "tiny-imagenet-200-val"),
        (
            "TinyImagenet",
            Image.new("RGB", (32, 32)).save,
            "tiny-imagenet-200/val/images/*",
            "tiny-imagenet-200-val",
        ),
    ],
)
def test_a_file_found_damaged_while_packing_is_named_and_leaves_no_cache(
    data, damage, files, cache, data_path
):
    file = sorted(data_path.glob(files))[1]
    damage(file)
    assert one_line_error(data, data_path).startswith(str(file))
    left = {path.name for path in data_path.rglob("*") if path.is_file()}
    assert not any(name.endswith((".tmp", ".building")) for name in left)
    assert not any(name.startswith(cache) and name.endswith((".json", ".npy")) for name in left)


def test_a_data_set_of_one_s_own_is_the_function_and_the_line_of_the_docs(
    tmp_path, capsys, monkeypatch
):
    """Trained, distilled and tested, with samples held out and in folds; a mistake is one line."""
    page = (Path(__file__).parent.parent / "docs/data.md").read_text().split("## A data set of")[1]
    names = {"DataSet": DataSet}
    exec(re.search("```python\n(.*?)```", page, re.DOTALL)[1], names)
    line = re.search('`"shapes": (DataSet[^`]*)`', page)[1]
    monkeypatch.setitem(DATA_SETS, "shapes", eval(line, names))

    images = torch.randint(100, (60, 1, 12, 12), dtype=torch.uint8)
    labels = torch.arange(60) % 3
    images[torch.arange(60), 0, :, 4 * labels] += 150
    np.savez(tmp_path / "shapes.npz", images=images.numpy(), labels=labels.numpy())
    where = ["--data", "shapes", "--data_path", str(tmp_path)]
    teacher = tmp_path / "teacher"
    how = [*where, "--width", "1", "--epochs", "1", "--workers", "0", "--paper_setting"]
    assert main.main([*how, "original", "--val_share", "0.25", "--save_path", str(teacher)]) == 0
    qamd = ["qamd", "--bits", "4", "--teacher_path", str(teacher / "original-best.pth")]
    assert main.main([*how, *qamd, "--save_path", str(tmp_path / "student")]) == 0
    student = str(tmp_path / "student" / "qamd-best.pth")
    assert main.main(["--eval_only", student, "--data_path", str(tmp_path), "--per_class"]) == 0
    output = capsys.readouterr().out
    assert "of 12 test images" in output
    assert "cross" in output
    train, test = data_sets_of("shapes", tmp_path, fold=3)
    assert (len(train), len(test), test.classes) == (48, 12, ["disc", "ring", "cross"])
    assert data_loader.main(["prepare", *where]) == 0
    assert "48 training and 12 test samples of 3 classes" in capsys.readouterr().out
    (tmp_path / "shapes.npz").unlink()
    assert data_loader.main(["prepare", *where]) == 2
    assert f"cannot prepare shapes in {tmp_path}: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("events", "change", "words"),
    [
        (False, lambda x: x.float() / 255, "its training images are torch.float32: give 8 bits"),
        (False, lambda x: x.long(), "are torch.int64"),
        (False, lambda x: x > 9, "are torch.bool"),
        (False, lambda x: x[:, 0], "are (8, 6, 6) with 8 labels; wanted are (N, 1, 6, 6)"),
        (False, lambda x: x[1:], "with 8 labels"),
        (False, lambda x: x[:0], "are (0, 1, 6, 6)"),
        (True, lambda x: x.long() - 1, "hold negative, infinite or undefined numbers"),
        (True, lambda x: x / torch.zeros(()), "hold negative, infinite or undefined numbers"),
        (True, lambda x: x * torch.tensor(float("inf")), "hold negative, infinite or undefined"),
        (True, lambda x: x.double() * 1e40, "hold negative, infinite or undefined"),
        (True, lambda x: x[:, :1], "are (8, 1, 2, 6, 6) with 8 labels; wanted are (N, 2, 2, 6, 6)"),
        (True, lambda x: x.double() / 255, None),
        (True, lambda x: x.to(torch.uint16), None),
        (True, lambda x: x > 9, None),
    ],
)
@pytest.mark.parametrize("part", ["training", "test"])
def test_a_data_set_of_one_s_own_gives_what_all_networks_read_alike(
    part, events, change, words, tmp_path, monkeypatch
):
    shape = (8, 2, 2, 6, 6) if events else (8, 1, 6, 6)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator())
    images[:, ..., 0, 0] = 0
    labels = torch.arange(8) % 2
    fit, other = (images, labels), (change(images), labels)
    given = (other, fit) if part == "training" else (fit, other)
    about = DataSet(lambda _: Samples(*given, ["a", "b"]), 2, 2 if events else 1, (6, 6))
    monkeypatch.setitem(DATA_SETS, "own", replace(about, events=events, augmented=False))
    if words is None:
        data_sets_of("own", tmp_path, 2)
        return
    with pytest.raises(UserError) as error:
        data_sets_of("own", tmp_path, 2)
    assert words.replace("training", part) in str(error.value)


def prepare_twice(rank: int, rendezvous: Path) -> list[str]:
    """What a process of two has said: the first fails, then succeeds."""
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    said, prepared = [], rendezvous.with_name("prepared")

    def fail() -> None:
        said.append("entered")
        raise UserError("no data")

    try:
        first_process_first(fail)
    except UserError as error:
        said.append(str(error))
    first_process_first(lambda: prepared.open("x" if rank == 0 else "r").close())
    dist.destroy_process_group()
    return said


def test_the_first_process_prepares_before_the_others_which_learn_if_it_failed(tmp_path):
    with multiprocessing.get_context("fork").Pool(2) as pool:
        both = [pool.apply_async(prepare_twice, (rank, tmp_path / "met")) for rank in (0, 1)]
        assert [x.get(60) for x in both] == [["entered", "no data"], ["no data"]]


def test_some_images_are_of_all_classes_and_always_the_same():
    class ByClass(torch.utils.data.Dataset):
        """As folders of images are read: class by class."""

        def __len__(self) -> int:
            return 1000

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return torch.tensor([index // 100, index]), index // 100

    images = some_images(ByClass(), 64)
    assert set(images[:, 0].tolist()) == set(range(10))
    assert len(set(images[:, 1].tolist())) == 64
    assert torch.equal(images, some_images(ByClass(), 64))
    assert len(some_images(ByClass(), 2000)) == 1000
