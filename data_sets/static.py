"""Data sets of images: CIFAR, Tiny ImageNet, a folder of one's own, scikit-learn's digits."""

import re
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError

from data_sets.cache import Source, packed
from data_sets.sources import (
    Archive,
    Request,
    Samples,
    classes_below,
    files_of_classes,
    getting,
)
from runtime.errors import UserError
from runtime.processes import is_main_process


def cifar(request: Request) -> Samples:
    """CIFAR-10/100 (Krizhevsky 2009), checked by md5; a failed download leaves nothing behind."""
    from torchvision import datasets  # here, as only this needs it

    data_path, kind = request.data, getattr(datasets, request.name)
    folder, archive = data_path / kind.base_folder, data_path / kind.filename
    remedy = f"remove what is there and unpack {kind.url} in {data_path}"
    with getting(request, folder, archive, remedy):
        parts = kind(data_path, train=True, download=True), kind(data_path, train=False)
    train, test = (
        (torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), part.targets)
        for part in parts
    )
    return Samples(train, test, parts[0].classes)


TINY_IMAGENET = Archive(
    "tiny-imagenet-200",
    "90528d7ca1a48142e341f4ef8d21d0de",
    "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
)


def tiny_imagenet(request: Request) -> Samples:
    """Tiny ImageNet with val/ as the test set; label = place of the WNID in sorted order.

    Missing, it is unpacked from the archive, which is downloaded if that is missing too.
    """
    data_path = request.data
    root, archive = data_path / TINY_IMAGENET.top, data_path / TINY_IMAGENET.name
    remedy = f"unpack {TINY_IMAGENET.url} in {data_path}"
    indexes = {part: request.caches / f"{root.name}-{part}.json" for part in ("train", "val")}
    if not root.is_dir() and not all(index.exists() for index in indexes.values()):
        with getting(request, root, archive, remedy):
            if not (root.exists() or archive.exists()):
                from torchvision.datasets.utils import download_url

                download_url(TINY_IMAGENET.url, data_path, archive.name, TINY_IMAGENET.md5)
            if not root.exists():
                TINY_IMAGENET.unpack(archive, root)
    train, test = (
        packed(index, root, partial(_find_tiny, root, part, remedy), _read_tiny, (3, 64, 64))
        for part, index in indexes.items()
    )
    return Samples(train[:2], test[:2], _words(root, train.classes))


def _words(root: Path, wnids: list[str]) -> list[str]:
    """The first word for each class, where words.txt says one."""
    try:
        text = (root / "words.txt").read_text(errors="replace")
    except OSError:  # trained from the cache alone
        return wnids
    words = dict(line.split("\t")[:2] for line in text.splitlines() if "\t" in line)
    return [words.get(wnid, wnid).split(",")[0] for wnid in wnids]


def _find_tiny(root: Path, part: str, remedy: str) -> Source:
    annotations = root / "val" / "val_annotations.txt"
    rearranged = not any((root / "val" / "images").glob("[!.]*.JPEG"))
    val = root / "val" if rearranged else annotations
    for needed in (root / "wnids.txt", root / "train", val):
        if not needed.exists():
            raise UserError(
                f"TinyImagenet is expected in {root}, but {needed} is missing: {remedy}"
            )
    wnids = sorted((root / "wnids.txt").read_text(errors="replace").split())
    if not 1 <= len(wnids) <= 200:
        raise UserError(f"{root / 'wnids.txt'} names {len(wnids)} classes, not 200: {remedy}")

    folders = ["images"] if part == "val" and not rearranged else wnids
    lists = re.compile(r"val_annotations\.txt|\w+/\w+_boxes\.txt")
    images = files_of_classes("TinyImagenet", root / part, folders, (".jpeg",), True, lists)
    if folders != wnids:
        return Source(wnids, _annotated(annotations, wnids, {*images["images"]}, remedy), READING)
    for wnid in wnids:
        if not images[wnid]:
            raise UserError(f"{root / part / wnid} holds no image (*.JPEG): {remedy}")
    found = [(f"{part}/{x}", label) for label, wnid in enumerate(wnids) for x in images[wnid]]
    return Source(wnids, found, READING)


def _annotated(
    annotations: Path, wnids: list[str], present: set[str], remedy: str
) -> list[tuple[str, int]]:
    """(name, label) of the images that val_annotations.txt names."""
    labels, found = {wnid: label for label, wnid in enumerate(wnids)}, []
    for line in annotations.read_text(errors="replace").splitlines():
        name, wnid = [*line.split("\t"), ""][:2]  # then a box: x, y, width, height
        if wnid not in labels:
            raise UserError(
                f"{annotations} gives {name} the class {wnid!r}, which wnids.txt lacks: {remedy}"
            )
        if f"images/{name}" not in present:
            raise UserError(
                f"{annotations} names {name}, which is not in {annotations.parent / 'images'}: "
                f"{remedy}"
            )
        found.append((f"val/images/{name}", labels[wnid]))
    if not found:
        raise UserError(f"{annotations} is empty: {remedy}")
    return found


READING = 2  # of images: 1 left them as they lay, 2 turns them upright


def _read_tiny(path: Path) -> np.ndarray:
    pixels = read_image(path)
    if pixels.shape != (3, 64, 64):
        height, width = pixels.shape[1:]
        raise UserError(f"{path} is {height}×{width} pixels, not 64×64: fetch it again")
    return pixels


def read_image(path: Path, size: tuple[int, int] | None = None, gray: bool = False) -> np.ndarray:
    """uint8 (3, H, W), upright, or (1, H, W) of `gray` images; with `size` scaled and cropped in
    the middle to fit.

    16 bits become 8 (their upper ones), transparency is dropped, and of several frames or pages the
    first is read. Raises UserError for a damaged file, and where nothing says what is black and
    what white: numbers of 32 bits, signed or floating-point ones.
    """
    try:
        with Image.open(path) as image:
            # From a name Pillow (13.0) maps a TIFF, and mixes up the rows of one on its side.
            image.filename = ""
            image.info.pop("transparency", None)  # a palette's gives a warning
            kind = _unclear(image)
            if kind is not None:
                raise UserError(
                    f"{path} holds {kind}, which would be misread: save it with 8 or 16 bits, "
                    "black 0, white the largest number"
                )
            image.load()  # of a TIFF this turns it, and removes the mark
            with suppress(Exception):  # a damaged EXIF: the image stays as it is
                ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith("I"):  # 16 bits: convert would clip them
                image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
            if image.mode == "La":  # multiplied by its opacity
                image = image.convert("LA")
            image = image.convert("RGB")
            if gray:
                image = image.convert("L")
            if size is not None:
                image = ImageOps.fit(image, size[::-1], Image.Resampling.BILINEAR)
            return np.atleast_3d(image).transpose(2, 0, 1)
    except UserError:
        raise
    except Exception as error:  # what Pillow raises depends on where the bytes stop making sense
        why = "it is no image" if isinstance(error, UnidentifiedImageError) else error
        raise UserError(f"{path} cannot be read ({why}): fetch it again or remove it") from error


def _unclear(image: Image.Image) -> str | None:
    """What an image holds whose numbers Pillow would read wrongly as 8 or 16 bits, or None."""
    if image.mode == "F":
        return "floating-point numbers"
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    if set(np.ravel(tags.get(339, 1))) - {1, 4}:  # SampleFormat: unsigned, unspecified
        return "signed numbers"
    bits = np.max(tags.get(258, 1))  # BitsPerSample
    if bits > 16 or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        return "numbers of 32 bits"  # of PNG and PPM, older Pillows give 16 bits as these
    if 8 < bits < 16:
        return f"numbers of {bits} bits"
    if bits == 16 and image.mode.startswith("I") and tags.get(262) == 0:
        return "16-bit numbers with 0 for white"  # which Pillow does not turn round
    return None


def folder(request: Request) -> Samples:
    """A user's own images, val/ as the test set; label = place of the folder in sorted order."""
    classes, size = classes_of_folder(request.data), request.about.image_size
    unread = request.data / "test"
    if unread.is_dir() and is_main_process():
        text = f"folder: {unread} is not read: {request.data / 'val'} holds the test images"
        print(text, file=sys.stderr)
    train, test = (
        packed(
            request.caches / "{}-{}x{}.json".format(part, *size),
            request.data / part,
            partial(_find_images, request.data / part, classes),
            partial(read_image, size=size),
            (3, *size),
        )
        for part in ("train", "val")
    )
    return Samples(train[:2], test[:2], train.classes)


def classes_of_folder(data_path: str | Path) -> list[str]:
    """The classes of --data folder."""
    return classes_below("folder", Path(data_path), ("train", "val"))


def _find_images(root: Path, classes: list[str]) -> Source:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    found = []
    of_class = files_of_classes("folder", root, classes, IMG_EXTENSIONS, deep=True)
    for label, (name, images) in enumerate(of_class.items()):
        if not images:
            kinds = " ".join(IMG_EXTENSIONS)
            raise UserError(
                f"{root / name} holds no image ({kinds}) of its own: add some or remove it"
            )
        found += [(image, label) for image in images]
    return Source(classes, found, READING)


def digits(request: Request) -> Samples:
    """scikit-learn's 1,797 digits, enlarged from 8×8 to 16×16, the values 0 … 16 to 0 … 255, and
    split 80/20, stratified, random_state 0."""
    # Imported here because it takes more than a second, which no other data set should pay.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    found = load_digits()
    small, labels = torch.from_numpy(found.images).unsqueeze(1), torch.from_numpy(found.target)
    enlarged = F.interpolate(small, size=(16, 16), mode="bilinear", align_corners=False)
    images = (enlarged * 255 / 16).round().to(torch.uint8)
    rows = np.arange(len(labels))
    train, test = train_test_split(rows, test_size=0.2, stratify=labels, random_state=0)
    parts = ((images[part], labels[part]) for part in (train, test))
    return Samples(*parts, [*map(str, found.target_names)], whole=(images, labels))
