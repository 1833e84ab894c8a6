"""--dry_run: how long a training will take and how much memory, from a few of its steps."""

import time
from collections.abc import Callable, Iterator
from itertools import islice

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from engine.compile import WARM_UP, Gradients, ReplayedGradients
from engine.data import Batches
from engine.evaluate import evaluate
from engine.log import aligned, count, duration
from engine.run import Run
from runtime.processes import is_main_process

try:
    import resource
except ImportError:  # Windows: the memory stays unknown
    resource = None

TIMED = 2  # batches, after those in which all warms up


def dry_run(
    run: Run,
    batches: Batches,
    device: torch.device,
    gradients: Gradients,
    train_on: Callable[["FirstBatches"], object],
) -> dict[str, float]:
    """The seconds that the training will take, and the bytes of memory: found by `train_on` its
    first batches and an evaluation of one. The first steps of each T are not timed."""
    settings = run.settings
    # A graph is taken in the step after its warm-up.
    warm_up = WARM_UP + 1 if isinstance(gradients, ReplayedGradients) else 1
    of_each = len(settings.trained_at)  # every T is warmed up, and timed
    few = FirstBatches(batches.train, warm_up * of_each, device, max(TIMED, of_each))
    few_tests = FirstBatches(batches.test, 1, device)
    epochs = settings.epochs - run.steps_done / run.steps_per_epoch
    run.step, run.sums = 0, {}  # these few steps are an epoch of their own
    train_on(few)
    evaluate(run.network, few_tests, device, settings.amp)
    tested = len(batches.test) + len(batches.held_out or ())
    evaluation = tested * few_tests.seconds()
    epoch = run.steps_per_epoch * few.seconds() + evaluation
    found = {
        "epochs": epochs,
        "seconds": epochs * epoch,
        "seconds_an_epoch": epoch,
        "seconds_a_step": few.seconds(),
        "seconds_an_evaluation": evaluation,
    }
    if resource is not None:
        found["memory"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if device.type == "cuda":
        found["memory_of_gpu"] = torch.cuda.max_memory_reserved(device)
        found["largest_memory_of_gpu"] = torch.cuda.get_device_properties(device).total_memory
    if is_main_process():
        print(expectation_text(found), flush=True)
    return found | {"input_step": settings.input_step, "sensor": settings.sensor}


class FirstBatches:
    """The first batches of a loader, and how long the work on one takes after `warm_up` of them."""

    def __init__(self, batches: DataLoader, warm_up: int, device: torch.device, timed: int = TIMED):
        self.batches, self.warm_up, self.device = batches, warm_up, device
        self.count = min(warm_up + timed, len(batches))
        self.times: list[float] = []

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.times = [time.perf_counter()]
        for batch in islice(self.batches, self.count):
            yield batch
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.times.append(time.perf_counter())

    def seconds(self) -> float:
        timed = self.times[self.warm_up :]
        if len(timed) < 2:  # too few batches: those of the warm-up, too
            timed = self.times
        return (timed[-1] - timed[0]) / max(1, len(timed) - 1)


def expectation_text(found: dict[str, float]) -> str:
    size = {name: f"{x / 1e9:.3g} GB" for name, x in found.items() if "memory" in name}
    memory = size.get("memory")
    if "memory_of_gpu" in size:
        of_main = f", main memory {memory}" if memory else ""
        memory = f"{size['memory_of_gpu']} of the GPU's {size['largest_memory_of_gpu']}{of_main}"
    step = float(f"{1000 * found['seconds_a_step']:.3g}")
    lines = [
        (
            "time",
            f"about {duration(found['seconds'])} for {count(found['epochs'], 'epoch')}, "
            f"{duration(found['seconds_an_epoch'])} each "
            f"({step:,g} ms a step, "
            f"{duration(found['seconds_an_evaluation'])} an evaluation)",
        ),
    ]
    if memory:
        about = f"about {memory}, in each process, its loaders not counted"
        lines.append(("memory", about))
    return aligned(lines)
