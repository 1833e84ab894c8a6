"""The data sets as pairs (train, test), and the loaders that share them out over processes.

| name | read from (below --data_path) | image, float32 | classes |
|---|---|---|---|
| CIFAR10 | cifar-10-batches-py, downloaded when missing | (3, 32, 32) | 10 |
| CIFAR100 | cifar-100-python, downloaded when missing | (3, 32, 32) | 100 |
| TinyImagenet | tiny-imagenet-200 | (3, 64, 64) | 200 |
| ncaltech101 | N-Caltech101/frames_number_T_split_by_number | (T, 2, 48, 48) | 101 |
| digits | scikit-learn itself | (1, 16, 16) | 10 |

Static images are pixel values / 255, so they lie in [0, 1] and are **not** normalised by a mean and
a standard deviation: the network's first batch norm does that, and the image that enters the
quantized network is then exactly an 8-bit integer times 1/255. N-Caltech101 gives event counts per
frame and polarity.
"""

import os
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from http.client import HTTPException
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.transforms import v2

from load_settings import UserError


class DamagedFileError(UserError):
    """A file that turns out to be unreadable while images are being loaded.

    A loader's worker hands an exception to the main process as type(error)(its whole traceback),
    and a traceback ends with "data_loader.DamagedFileError: text". Keeping what follows the name
    makes the text the same one line either way.
    """

    def __init__(self, text: str):
        super().__init__(" ".join(text.rpartition("DamagedFileError: ")[2].splitlines()))


class ImageSet(Dataset):
    """Pairs (image, label): augment(read(items[index])) as float32 (uint8 pixels / 255), an int.

    The augmentation of an image depends on (seed, epoch, index) alone: neither the number of
    processes nor of loader workers changes it. `augment` may therefore draw from torch's CPU
    generator only, as torchvision's v2 transforms do.
    """

    def __init__(
        self,
        items: Sequence | Tensor,
        labels: Sequence[int],
        read: Callable[..., Tensor],
        augment: Callable[[Tensor], Tensor] | None = None,
        seed: int = 0,
    ):
        self.items, self.labels, self.read, self.augment = items, labels, read, augment
        self.seed, self.epoch = seed, 0

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.read(self.items[index])
        if self.augment is not None:
            entropy = (self.seed, self.epoch, index)
            sample_seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
            with torch.random.fork_rng(devices=[]):
                # torch.manual_seed would reseed the GPU's generators too, and for good.
                torch.default_generator.manual_seed(sample_seed)
                image = self.augment(image)
        if image.dtype == torch.uint8:
            image = image / 255  # v2.ToDtype multiplies by 1/255, which is not always the same
        return image, self.labels[index]


def load_data_sets(
    data: str, data_path: str | Path, time_window: int, seed: int = 0
) -> tuple[ImageSet, ImageSet]:
    """The data sets (train, test) of `data`; training images are augmented, from `seed` ≥ 0.

    `time_window` (T) is used by ncaltech101 alone: static images are repeated by the network, not
    here. Under torch.distributed every process must call this, since the first one reads (and
    downloads) before the others. Raises UserError, one line, where data are missing or damaged; it
    names the expected folder and how to fill it.
    """
    data_path = Path(data_path)
    with first_process_first():
        try:
            match data:
                case "CIFAR10":
                    return _cifar(CIFAR10, data_path, seed)
                case "CIFAR100":
                    return _cifar(CIFAR100, data_path, seed)
                case "TinyImagenet":
                    return _tiny_imagenet(data_path, seed)
                case "ncaltech101":
                    return _ncaltech101(data_path, time_window, seed)
                case "digits":
                    return _digits()
                case _:
                    raise UserError(f"there is no data set {data!r}")
        except OSError as error:  # no permission, a disk that fails
            raise UserError(f"cannot read {data} in {data_path}: {error}") from error


def train_loader(
    data_set: ImageSet,
    batch_size: int,
    rank: int,
    world_size: int,
    workers: int,
    seed: int,
    pin_memory: bool = False,
) -> DataLoader:
    """Shuffled batches (images, labels int64) of process `rank`, `batch_size` images per process.

    Batch k of all processes together is the same set of images for any `world_size` with the same
    global batch batch_size · world_size. Images left over after the last global batch are dropped
    for this epoch. A data set smaller than one global batch gives one partial batch per process, of
    equal sizes: up to world_size − 1 images come twice.
    """
    # The sampler must drop too: padded to equal shares, two processes could get one batch more than
    # a single process.
    drop_last = len(data_set) >= batch_size * world_size
    sampler = Shuffled(data_set, world_size, rank, shuffle=True, seed=seed, drop_last=drop_last)
    # Workers start anew each epoch (not persistent): they get their copy of the data set, with its
    # epoch, at their start.
    return DataLoader(
        data_set,
        batch_size,
        sampler=sampler,
        num_workers=workers,
        pin_memory=pin_memory,
        drop_last=drop_last,
        worker_init_fn=leave_process_group,
        generator=torch.Generator(),  # leaves the global one alone: --resume restores its state
    )


class Shuffled(DistributedSampler):
    """A process's share of an epoch, from its image number `first` on; its length is the whole."""

    first = 0

    def __iter__(self) -> Iterator[int]:
        return islice(super().__iter__(), self.first, None)


def leave_process_group(worker: int) -> None:
    """A signal to the process group, as of Ctrl-C, is for the main process: it finishes its step,
    and needs its workers for that."""
    os.setpgid(0, 0)


def evaluation_loader(
    data_set: ImageSet,
    batch_size: int,
    rank: int,
    world_size: int,
    workers: int,
    pin_memory: bool = False,
) -> DataLoader:
    """Batches of images rank, rank + world_size, …: each exactly once over all processes.

    Without padding the processes may get different numbers of batches, even none: sum over
    processes after the loop.
    """
    share = Subset(data_set, range(rank, len(data_set), world_size))
    return DataLoader(
        share,
        batch_size,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=leave_process_group,
        generator=torch.Generator(),
    )


def set_epoch(loader: DataLoader, epoch: int, first_batch: int = 0) -> None:
    """Give the next pass over a train_loader the order and the augmentation of `epoch`, from its
    batch number `first_batch` on. The loader's length stays that of a whole epoch."""
    loader.sampler.set_epoch(epoch)
    loader.sampler.first = first_batch * loader.batch_size
    loader.dataset.epoch = epoch


@contextmanager
def first_process_first() -> Iterator[None]:
    """Run the block in process 0, then in the others; where it fails in process 0, all raise.

    For preparing files that all processes read afterwards. Without a process group it does nothing.
    After a failure the others do not enter their blocks: they raise UserError with the text of
    process 0's error.
    """
    if not (dist.is_available() and dist.is_initialized()):
        yield
        return
    # A group of its own: a download may take longer than training's time-out (NCCL: 10 minutes).
    group = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    failure = [None]
    if dist.get_rank() != 0:
        dist.broadcast_object_list(failure, src=0, group=group)
        if failure[0] is not None:
            raise UserError(failure[0])
        yield
        return
    try:
        yield
    except BaseException as error:
        failure = [str(error) or repr(error)]
        raise
    finally:
        dist.broadcast_object_list(failure, src=0, group=group)


def _cifar(
    cifar: type[CIFAR10] | type[CIFAR100], data_path: Path, seed: int
) -> tuple[ImageSet, ImageSet]:
    """CIFAR-10/100 (Krizhevsky 2009), checked by md5; a failed download leaves nothing behind."""
    folder, archive = data_path / cifar.base_folder, data_path / cifar.filename
    ours = [p for p in (folder, archive, data_path, *data_path.parents) if not p.exists()]
    try:
        parts = cifar(data_path, train=True, download=True), cifar(data_path, train=False)
    except (OSError, HTTPException, RuntimeError) as error:  # RuntimeError: a wrong md5
        for path in ours:
            if path == folder:
                shutil.rmtree(path, ignore_errors=True)
            elif path == archive:
                path.unlink(missing_ok=True)
            else:
                with suppress(OSError):  # never made, or no longer empty
                    path.rmdir()
        reason = " ".join(str(error).split())
        raise UserError(
            f"{cifar.__name__} is expected in {folder}, which is missing or damaged, and "
            f"downloading it failed ({reason}): remove what is there and unpack {cifar.url} "
            f"in {data_path}"
        ) from error
    augment = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()])
    train, test = (torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in parts)
    return (
        ImageSet(train, parts[0].targets, torch.nn.Identity(), augment, seed),
        ImageSet(test, parts[1].targets, torch.nn.Identity()),
    )


def _tiny_imagenet(data_path: Path, seed: int) -> tuple[ImageSet, ImageSet]:
    """Tiny ImageNet with val/ as the test set; label = place of the WNID in sorted order."""
    root = data_path / "tiny-imagenet-200"
    remedy = f"unpack http://cs231n.stanford.edu/tiny-imagenet-200.zip in {data_path}"
    annotations, val_images = root / "val" / "val_annotations.txt", root / "val" / "images"
    for needed in (root / "wnids.txt", root / "train", annotations, val_images):
        if not needed.exists():
            raise UserError(
                f"TinyImagenet is expected in {root}, but {needed} is missing: {remedy}"
            )
    wnids = sorted((root / "wnids.txt").read_text().split())
    if not 1 <= len(wnids) <= 200:
        raise UserError(f"{root / 'wnids.txt'} names {len(wnids)} classes, not 200: {remedy}")

    train = []
    for label, wnid in enumerate(wnids):
        images = root / "train" / wnid / "images"
        files = sorted(str(path) for path in images.glob("*.JPEG"))
        if not files:
            raise UserError(f"{images} holds no training image (*.JPEG): {remedy}")
        train += [(file, label) for file in files]

    test = []
    labels = {wnid: label for label, wnid in enumerate(wnids)}
    present = set(os.listdir(val_images))
    for line in annotations.read_text().splitlines():
        name, wnid = [*line.split("\t"), ""][:2]  # then a box: x, y, width, height
        if wnid not in labels:
            raise UserError(
                f"{annotations} gives {name} the class {wnid!r}, which wnids.txt lacks: {remedy}"
            )
        if name not in present:
            raise UserError(f"{annotations} names {name}, which is not in {val_images}: {remedy}")
        test.append((str(val_images / name), labels[wnid]))
    if not test:
        raise UserError(f"{annotations} is empty: {remedy}")

    augment = v2.Compose([v2.RandomCrop(64, padding=8), v2.RandomHorizontalFlip()])
    return (
        ImageSet(*zip(*train, strict=True), _read_jpeg, augment, seed),
        ImageSet(*zip(*test, strict=True), _read_jpeg),
    )


def _read_jpeg(path: str) -> Tensor:
    """A 64×64 image as uint8 (3, 64, 64); some of Tiny ImageNet's are grayscale."""
    try:
        with Image.open(path, formats=["JPEG"]) as image:
            pixels = v2.functional.pil_to_tensor(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise DamagedFileError(f"{path} cannot be read ({error}): fetch it again") from error
    if pixels.shape != (3, 64, 64):
        height, width = pixels.shape[1:]
        raise DamagedFileError(f"{path} is {height}×{width} pixels, not 64×64: fetch it again")
    return pixels


def _ncaltech101(data_path: Path, time_window: int, seed: int) -> tuple[ImageSet, ImageSet]:
    """N-Caltech101 (Orchard et al. 2015) as event frames that SpikingJelly wrote, T per sample.

    The split, the same on every machine: of a class's n file names in code-point order, the last
    max(1, ⌊n/10⌋) are test files and those before them training files; a class with a single file
    has it in the training set. Label = place of the class's folder name in code-point order.
    """
    root = data_path / "N-Caltech101"
    folder = root / f"frames_number_{time_window}_split_by_number"
    remedy = (
        "convert the events (https://www.garrickorchard.com/datasets/n-caltech101) with "
        f"spikingjelly.datasets.NCaltech101({str(root)!r}, data_type='frame', "
        f"frames_number={time_window}, split_by='number')"
    )
    if not folder.is_dir():
        found = sorted(path.name for path in root.glob("frames_number_*_split_by_number"))
        raise UserError(
            f"ncaltech101 with --time_window {time_window} is expected in {folder}, which is "
            f"missing (found there: {', '.join(found) or 'no frames'}): {remedy}"
        )
    unfinished = folder.with_name(f"{folder.name}.building")
    if unfinished.exists():  # SpikingJelly's own marker
        raise UserError(
            f"the conversion into {folder} was not finished: remove it and {unfinished}, "
            f"then {remedy}"
        )
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if len(classes) > 101:
        raise UserError(f"{folder} holds {len(classes)} classes, N-Caltech101 has 101: {remedy}")

    train, test = [], []
    for label, name in enumerate(classes):
        files = sorted(str(path) for path in (folder / name).glob("*.npz"))
        if not files:
            raise UserError(f"{folder / name} holds no frames (*.npz): {remedy}")
        for file in files:
            _check_frames(file, time_window)
        first_test = len(files) - max(1, len(files) // 10) if len(files) > 1 else 1
        train += [(file, label) for file in files[:first_test]]
        test += [(file, label) for file in files[first_test:]]
    if not test:
        raise UserError(f"{folder} holds no class of two files or more: {remedy}")

    nearest = v2.InterpolationMode.NEAREST
    augment = v2.RandomChoice(
        [
            _roll,
            v2.RandomRotation(15, interpolation=nearest),
            v2.RandomAffine(degrees=0, shear=15, interpolation=nearest),
        ]
    )
    return (
        ImageSet(*zip(*train, strict=True), _read_frames, augment, seed),
        ImageSet(*zip(*test, strict=True), _read_frames),
    )


def _check_frames(path: str, time_window: int) -> None:
    """Refuse a file that cannot hold (T, 2, H, W) frames; header only, as there are 8,709 files."""
    try:
        with zipfile.ZipFile(path) as arrays, arrays.open("frames.npy") as file:
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    except KeyError:
        raise UserError(f"{path} holds no array named frames: convert its events again") from None
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): convert its events again") from error
    if len(shape) != 4 or shape[1] != 2 or dtype.kind != "f":
        raise UserError(
            f"{path} holds {dtype} of shape {shape}, not float frames (T, 2, H, W): "
            "convert its events again"
        )
    if shape[0] != time_window:
        raise UserError(
            f"{path} holds frames of another T: got {shape[0]}, --time_window says {time_window}"
        )


def _read_frames(path: str) -> Tensor:
    """Event counts float32 (T, 2, 48, 48): nearest neighbour keeps them whole numbers."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            frames = torch.from_numpy(arrays["frames"]).float()
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, KeyError) as error:
        raise DamagedFileError(
            f"{path} cannot be read ({error}): convert its events again"
        ) from error
    return F.interpolate(frames, size=(48, 48), mode="nearest")


def _roll(frames: Tensor) -> Tensor:
    """Shift (…, H, W) frames by −3 … 3 pixels along each axis, cyclically."""
    return frames.roll(torch.randint(-3, 4, (2,)).tolist(), dims=(-2, -1))


def digits_of(*shares: Sequence[int]) -> tuple[ImageSet, ...]:
    """Data sets of the given indices into scikit-learn's 1,797 digits, enlarged from 8×8 to 16×16.

    The values 0 … 16 become uint8 pixels 0 … 255.
    """
    # Imported here because it takes more than a second, which no other data set should pay.
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = torch.from_numpy(digits.images).unsqueeze(1)
    enlarged = F.interpolate(small, size=(16, 16), mode="bilinear", align_corners=False)
    images = (enlarged * 255 / 16).round().to(torch.uint8)
    return tuple(
        ImageSet(images[share], digits.target[share].tolist(), torch.nn.Identity())
        for share in shares
    )


def _digits() -> tuple[ImageSet, ImageSet]:
    """All digits, split 80/20, stratified, random_state 0."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    labels = load_digits().target
    shares = train_test_split(
        np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0
    )
    train, test = digits_of(*shares)
    return train, test
