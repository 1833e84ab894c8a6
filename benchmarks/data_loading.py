"""How fast samples come: the packed cache against .npz files, the device against loader workers.

    python -m benchmarks.data_loading

Events: frames of N-Caltech101's size as SpikingJelly writes them (of random events, as many as the
real ones have), read from their .npz files and from the cache, with the same transforms and the
same number of workers; how much memory of its own a worker takes for a small and a large data set.
Images: a CIFAR-10 of random pixels through torchvision's transforms in workers, and on the device.
"""

import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks import timing
from data_loader import ImageSet, Share, load_data_sets, training_loader
from data_sets.augment import CropAndFlip, augmentation
from data_sets.events import read_frames
from settings import Settings

SIZE = 48, 48
EVENTS = 115_000  # of a sample of N-Caltech101, about


class FrameFiles(Dataset):
    """As ImageSet, but every sample is read from its own file."""

    step, seed = 1.0, 0

    def __init__(self, files: list[Path], time_window: int, augment: Callable[[Tensor], Tensor]):
        self.files, self.time_window, self.augment = files, time_window, augment

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        frames = torch.from_numpy(read_frames(self.files[index], self.time_window, SIZE)).float()
        return self.augment(frames), 0


def write_frames(root: Path, samples: int, time_window: int) -> None:
    """Samples of three classes; the events lie around random centres, as those of edges do."""
    rng = np.random.default_rng(0)
    for number in range(samples):
        centres = rng.integers((40, 30), (200, 150), (30, 2))
        places = rng.choice(centres, EVENTS) + rng.normal(0, 12, (EVENTS, 2)).astype(int)
        x, y = np.clip(places, 0, (239, 179)).T
        frames = np.zeros((time_window, 2, 180, 240))
        t = np.arange(EVENTS) * time_window // EVENTS
        np.add.at(frames, (t, rng.integers(0, 2, EVENTS), y, x), 1)
        folder = root / "N-Caltech101" / f"frames_number_{time_window}_split_by_number"
        path = folder / f"class_{number % 3}" / f"image_{number:04d}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, frames=frames)


def go_through(batches: Iterable) -> None:
    for images, _ in batches:
        images.sum().item()  # on a GPU: until the last one is there


def speed(
    data_sets: dict[str, tuple[Iterable, int]], rounds: int, device: torch.device
) -> tuple[list[tuple[str, ...]], int]:
    """Rows (name, samples/s, ratio to the first) of loaders with so many samples each."""
    functions = {name: partial(go_through, loader) for name, (loader, _) in data_sets.items()}
    times, repeated = timing.in_turn(functions, rounds, device)
    per_sample = {
        name: [second / data_sets[name][1] for second in seconds] for name, seconds in times.items()
    }
    reference = per_sample[next(iter(per_sample))]
    rows = [
        (
            name,
            timing.with_spread(timing.quartiles([1 / second for second in seconds]), 0),
            timing.with_spread(timing.ratios(reference, seconds), 2),
        )
        for name, seconds in per_sample.items()
    ]
    return rows, repeated


class OwnMemory(ImageSet):
    """Gives, instead of a sample, the megabytes that the worker has written and nobody else has."""

    def __getitem__(self, index: int) -> tuple[float, int]:
        super().__getitem__(index)
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        (dirty,) = (line for line in lines if line.startswith("Private_Dirty"))
        return int(dirty.split()[1]) / 1024, 0


def memory_of_a_worker(samples: int) -> float:
    """MB of a worker's own after it has read a mapped data set of so many samples once."""
    with tempfile.NamedTemporaryFile(suffix=".npy") as file:
        shape = (samples, 10, 2, *SIZE)
        array = np.lib.format.open_memmap(file.name, "w+", np.uint8, shape)
        array[:] = 1
        del array
        images = torch.from_numpy(np.load(file.name, mmap_mode="c"))
        data_set = OwnMemory(images, [0] * samples, step=1.0)
        loader = DataLoader(data_set, 32, num_workers=1)
        *_, (megabytes, _) = loader
        return megabytes[-1].item()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = timing.parser_of(__doc__, rounds=5)
    add = parser.add_argument
    add("--samples", type=int, default=600, help="of events")
    add("--time_window", type=int, default=10)
    add("--images", type=int, default=50_000)
    add("--batch_size", type=int, default=128)
    add("--workers", type=int, default=2)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    device = torch.device(args.device)

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_frames(root, args.samples, args.time_window)
        train, _ = load_data_sets(
            Settings.of("ncaltech101", data_path=str(root), time_window=args.time_window)
        )
        files = sorted(root.glob("N-Caltech101/*/*/*.npz"))[: len(train)]
        from_files = FrameFiles(files, args.time_window, augmentation("basic", True, SIZE))
        share = Share(args.batch_size // 4, workers=args.workers)
        events = {
            ".npz files": (training_loader(from_files, share), len(files)),
            "packed cache": (training_loader(train, share), len(train)),
        }
        events_rows, events_repeated = speed(events, args.rounds, device)

    sizes = (args.samples, 10 * args.samples)
    memory = [(n, f"{memory_of_a_worker(n):.1f}", f"{n * 20 * 48 * 48 / 2**20:.0f}") for n in sizes]

    pixels = torch.randint(256, (args.images, 3, 32, 32), dtype=torch.uint8)
    data_set = ImageSet(pixels, torch.randint(10, (args.images,)), CropAndFlip((32, 32)))
    share = Share(args.batch_size, workers=args.workers)
    on_device = training_loader(data_set, share, device)
    one_by_one = ImageSet(pixels, data_set.labels, CropAndFlip((32, 32)).of_one)
    in_workers = training_loader(one_by_one, share, device)
    images = {
        "torchvision's transforms in workers": (in_workers, args.images),
        f"on the device ({device.type})": (on_device, args.images),
    }
    images_rows, images_repeated = speed(images, args.rounds, device)

    header = ("", "samples/s", "times the first")
    parts = [
        f"Events, T = {args.time_window}, 48×48, {args.samples} samples, {args.workers} workers, "
        f"batch {args.batch_size // 4}, rounds repeated for noise: {events_repeated}",
        timing.table(header, events_rows),
        "Memory that a worker shares with nobody, after a pass over the cache:",
        timing.table(("samples", "worker, MB", "data set, MB"), memory),
        f"Images, 32×32, {args.images} of them, {args.workers} workers, batch {args.batch_size}, "
        f"rounds repeated for noise: {images_repeated}",
        timing.table(header, images_rows),
    ]
    timing.report("data_loading", arguments, device, parts, args.out)


if __name__ == "__main__":
    main()
