"""Tiny data sets in the real ones' layout on disk: tests run the loaders that users run.

The content is deterministic and learnable: every class has a coarse pattern of its own, plus noise.
Labels go round the classes: 0, 1, …, 0, 1, …

torchvision refuses CIFAR files whose md5 sums are not those of the real ones, and the shipped code
leaves it at that. Only a test's environment accepts stand-ins: `cifar_environment` for a command in
a subprocess, `cifar_md5_lists` with monkeypatch in this process.
"""

import hashlib
import os
import pickle
from pathlib import Path

import numpy as np
from PIL import Image

TESTS = Path(__file__).parent


def write_cifar(root: Path, name: str, train: int = 100, test: int = 40, classes: int = 4) -> Path:
    """CIFAR10 or CIFAR100 (python version), labels from the first `classes`; returns its folder."""
    folder = root / {"CIFAR10": "cifar-10-batches-py", "CIFAR100": "cifar-100-python"}[name]
    folder.mkdir(parents=True)
    pixels, labels = _images(train + test, classes, 32, seed=int(name[5:]))
    rows = pixels.transpose(0, 3, 1, 2).reshape(train + test, 3 * 32 * 32)  # planes R, G, B

    def write_batch(file: str, title: str, part: np.ndarray) -> None:
        batch = {
            "batch_label": title,
            "filenames": [f"{file}_s_{i:06d}.png" for i in part],
            "data": rows[part],
        }
        if name == "CIFAR10":
            batch["labels"] = labels[part].tolist()
        else:
            batch |= {"fine_labels": labels[part].tolist(), "coarse_labels": [0] * len(part)}
        _pickle(batch, folder / file)

    train_part, test_part = np.split(np.arange(train + test), [train])
    if name == "CIFAR10":
        for number, part in enumerate(np.array_split(train_part, 5), 1):
            write_batch(f"data_batch_{number}", f"training batch {number} of 5", part)
        write_batch("test_batch", "testing batch 1 of 1", test_part)
        names = [f"class {label}" for label in range(10)]
        meta = {"num_cases_per_batch": train // 5, "label_names": names, "num_vis": 3072}
        _pickle(meta, folder / "batches.meta")
    else:
        write_batch("train", "training batch 1 of 1", train_part)
        write_batch("test", "testing batch 1 of 1", test_part)
        fine, coarse = ([f"class {label}" for label in range(n)] for n in (100, 20))
        _pickle({"fine_label_names": fine, "coarse_label_names": coarse}, folder / "meta")
    return folder


def cifar_md5_lists(cifar: type, root: str | Path) -> dict:
    """Attributes that make torchvision's CIFAR10 or CIFAR100 accept the stand-in below `root`."""

    def md5(file: str) -> str:
        return hashlib.md5((Path(root) / cifar.base_folder / file).read_bytes()).hexdigest()

    return {
        "train_list": [[file, md5(file)] for file, _ in cifar.train_list],
        "test_list": [[file, md5(file)] for file, _ in cifar.test_list],
        "meta": cifar.meta | {"md5": md5(cifar.meta["filename"])},
    }


def cifar_environment(root: Path) -> dict[str, str]:
    """An environment in which a Python command also accepts the CIFAR stand-ins below `root`."""
    paths = [TESTS / "cifar_stand_in", TESTS, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    python_path = os.pathsep.join(str(path) for path in paths if str(path))
    return os.environ | {"CIFAR_STAND_IN": str(root), "PYTHONPATH": python_path}


def write_tiny_imagenet(
    root: Path, classes: int = 4, per_class: int = 8, val_per_class: int = 4
) -> Path:
    """Tiny ImageNet's tree of JPEG files, each part's first one grayscale; returns its folder."""
    folder = root / "tiny-imagenet-200"
    wnids = [f"n{1443537 + 1000 * label:08d}" for label in range(classes)]
    (folder / "val" / "images").mkdir(parents=True)
    (folder / "wnids.txt").write_text("".join(f"{wnid}\n" for wnid in reversed(wnids)))
    (folder / "words.txt").write_text("".join(f"{wnid}\ta thing\n" for wnid in wnids))

    pixels, labels = _images(classes * per_class, classes, 64, seed=200)
    for i, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        wnid, number = wnids[label], i // classes
        images = folder / "train" / wnid / "images"
        images.mkdir(parents=True, exist_ok=True)
        _save_jpeg(image, images / f"{wnid}_{number}.JPEG", grayscale=i == 0)
        with (folder / "train" / wnid / f"{wnid}_boxes.txt").open("a") as boxes:
            boxes.write(f"{wnid}_{number}.JPEG\t0\t0\t63\t63\n")

    pixels, labels = _images(classes * val_per_class, classes, 64, seed=200, noise_seed=1)
    with (folder / "val" / "val_annotations.txt").open("w") as annotations:
        for i, (image, label) in enumerate(zip(pixels, labels, strict=True)):
            name = f"val_{i}.JPEG"
            _save_jpeg(image, folder / "val" / "images" / name, grayscale=i == 0)
            annotations.write(f"{name}\t{wnids[label]}\t0\t0\t63\t63\n")
    return folder


def write_ncaltech101(root: Path, time_window: int, classes: int = 3, per_class: int = 10) -> Path:
    """Event frames as SpikingJelly's NCaltech101 lays them out; returns the folder of the classes.

    Files are written in an order that is not their sorted one.
    """
    folder = root / "N-Caltech101" / f"frames_number_{time_window}_split_by_number"
    rng = np.random.default_rng(101)
    for label in range(classes):
        name = ["BACKGROUND_Google", "Faces_easy", "accordion"][label] if label < 3 else f"c{label}"
        (folder / name).mkdir(parents=True)
        # A class's events lie in a vertical band of its own.
        left = 240 * label // classes
        for number in range(per_class, 0, -1):
            frames = np.zeros((time_window, 2, 180, 240))
            band = frames[..., left : left + 240 // classes]
            band += rng.poisson(0.2, size=band.shape)
            np.savez_compressed(folder / name / f"image_{number:04d}.npz", frames=frames)
    return folder


def write_events(root: Path, classes: int = 2, per_class: int = 5, events: int = 400) -> Path:
    """Raw events Caltech101/CLASS/*.bin as N-Caltech101's archive has them; returns the folder."""
    folder = root / "Caltech101"
    rng = np.random.default_rng(5)
    for label in range(classes):
        (folder / f"class_{label}").mkdir(parents=True)
        for number in range(per_class):
            band = 240 * label // classes, 240 * (label + 1) // classes
            path = folder / f"class_{label}" / f"image_{number:04d}.bin"
            path.write_bytes(_events_in_a_band(rng, band, 180, events))
    return folder


def write_nmnist(root: Path, train: int = 3, test: int = 2, events: int = 200) -> Path:
    """Raw events Train|Test/DIGIT/NNNNN.bin as N-MNIST's archives have them; returns `root`.

    Numbers go on through the digits, as in the real ones.
    """
    rng = np.random.default_rng(34)
    for part, per_class in (("Train", train), ("Test", test)):
        for label in range(10):
            (root / part / str(label)).mkdir(parents=True)
            for number in range(per_class):
                path = root / part / str(label) / f"{10 * number + label + 1:05d}.bin"
                path.write_bytes(_events_in_a_band(rng, (3 * label, 3 * label + 6), 34, events))
    return root


def _events_in_a_band(
    rng: np.random.Generator, band: tuple[int, int], height: int, events: int
) -> bytes:
    """Five bytes an event: x, y, p and the 23 bits of t; x lies in the band."""
    x = rng.integers(*band, events)
    y, p = rng.integers(0, height, events), rng.integers(0, 2, events)
    t = np.sort(rng.integers(0, 300_000, events))
    rows = np.stack([x, y, p << 7 | t >> 16, t >> 8 & 255, t & 255], axis=1)
    return rows.astype(np.uint8).tobytes()


def write_image_folder(root: Path, classes: int = 3, per_class: int = 6, size: int = 40) -> Path:
    """train/CLASS/* and val/CLASS/* of images of several kinds and sizes; returns `root`."""
    pixels, labels = _images(classes * per_class, classes, size, seed=3)
    for i, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        part = "val" if i // classes < 2 else "train"
        kind = ("png", "jpg", "bmp")[i % 3]
        (root / part / f"kind {label}").mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(image).crop((0, 0, size, size - 4 * (i % 2)))
        picture.save(root / part / f"kind {label}" / f"{i}.{kind}")
    return root


def _images(
    number: int, classes: int, size: int, seed: int, noise_seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (number, size, size, 3) images of 4×4 coloured tiles plus noise, and their labels."""
    tiles = np.random.default_rng(seed).integers(40, 216, size=(classes, 4, 4, 3))
    patterns = tiles.repeat(size // 4, axis=1).repeat(size // 4, axis=2)
    labels = np.arange(number) % classes
    noise = np.random.default_rng((seed, noise_seed)).integers(
        -40, 40, size=(number, size, size, 3)
    )
    return (patterns[labels] + noise).astype(np.uint8), labels


def _save_jpeg(image: np.ndarray, path: Path, grayscale: bool) -> None:
    Image.fromarray(image).convert("L" if grayscale else "RGB").save(path, "JPEG")


def _pickle(content: dict, path: Path) -> None:
    with path.open("wb") as file:
        pickle.dump(content, file, protocol=2)  # the real files were written by Python 2
