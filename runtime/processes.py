"""Which process of a run this is, and what all of them do together.

torchrun, Slurm or a user starts the processes; `init_distributed` lets them meet. With one process
each function here is as short as it can be.
"""

import gc
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from runtime.errors import UserError
from runtime.launcher import is_launched, launcher_variable

# End a run, but not its loaders. Windows has no SIGUSR1.
SIGNALS = tuple(getattr(signal, x) for x in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, x))
# With another process that says nothing, or a loader. One that dies is noticed at once; a
# checkpoint may take its time on a slow disk.
PATIENCE = timedelta(minutes=10)
STARTED = "run started"  # in the launcher's store
_launcher_store: dist.Store | None = None  # all attempts of a launcher share it
LONGEST_PREPARATION = timedelta(days=1)  # such as a download


def world_size() -> int:
    """Processes that have met; 1 without a launcher."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process; before they have met, the launcher's."""
    return dist.get_rank() if dist.is_initialized() else launcher_variable("RANK")


def usable_cores() -> int:
    """Cores that this process may use: a cluster or a container may leave it few of a machine's."""
    if hasattr(os, "sched_getaffinity"):  # of Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def is_main_process() -> bool:
    """Whether this is the process that prints and writes."""
    return rank() == 0


@contextmanager
def init_distributed(backend: str) -> Iterator[None]:
    """While open, the processes that a launcher has started are one group."""
    global _launcher_store
    if not is_launched():
        yield
        return
    store = _join(backend)
    _launcher_store = store.underlying_store
    try:
        yield
    except Exception as error:
        # Of all processes one tells the user, the one that meets the trouble first. The group
        # stays: while a DistributedDataParallel is alive, destroying it may abort.
        error.said_first = launcher_variable("LOCAL_RANK") == 0
        with suppress(RuntimeError):  # the store has gone with the process that kept it
            error.said_first = store.add("said", 1) == 1
        raise
    # gloo's threads abort now and then if a DistributedDataParallel outlives the group.
    gc.collect()
    with suppress(RuntimeError):  # the store has gone with the first process: all are done
        # No connection shall end beneath a process that still waits for its last message.
        store.set(f"done {rank()}", "")
        store.wait([f"done {other}" for other in range(world_size())], PATIENCE)
    dist.destroy_process_group()


def _join(backend: str) -> dist.Store:
    """Start the process group; returns the store that all processes of this attempt share."""
    number, count = launcher_variable("RANK"), launcher_variable("WORLD_SIZE")
    # After a restart torchrun's store still holds what the processes of before have told each
    # other, and the new ones would wait for those.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        if number >= count:
            raise ValueError(f"RANK is {number}")
        store, _, _ = next(rendezvous("env://", timeout=PATIENCE))
        store = dist.PrefixStore(f"attempt {attempt}", store)
        dist.init_process_group(
            backend, store=store, rank=number, world_size=count, timeout=PATIENCE
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(f"the {count} processes cannot meet: {error}") from None
    return store


def mark_started() -> None:
    """Tell the launcher's later attempts that this one has begun to write."""
    if _launcher_store is not None and is_main_process():
        _launcher_store.set(STARTED, "")


def has_started_before() -> bool:
    """Whether an earlier attempt of this launcher has begun to write."""
    return _launcher_store is not None and _launcher_store.check([STARTED])


def of_all_processes(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """The `value` of each process, in order."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value, group=group)
    return values


def sum_over_processes(x: Tensor, how: dist.ReduceOp = dist.ReduceOp.SUM) -> Tensor:
    """x, replaced by its sum (or what else) over all processes."""
    if world_size() > 1:
        dist.all_reduce(x, how)
    return x


def all_agree(ours: Mapping[str, Any], how: str, remedy: str) -> None:
    """Raises UserError, in all processes, where one has other values than the first."""
    of_all = of_all_processes(dict(ours))
    for number, theirs in enumerate(of_all):
        for name, value in theirs.items():
            if value != of_all[0][name]:
                raise UserError(
                    f"process {number} {how} with {name} {value}, process 0 with "
                    f"{of_all[0][name]}: {remedy}"
                )


@contextmanager
def all_or_none() -> Iterator[None]:
    """What fails in one process fails in all: alone it would go on, and the others wait for it."""
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    if world_size() > 1:
        texts = of_all_processes(failure and (str(failure) or repr(failure)))
        text = next(filter(None, texts), None)
        failure = None if text is None else RuntimeError(text)
    if failure is not None:
        raise failure


def of_first_process(function: Callable[[], Any], group: dist.ProcessGroup | None = None) -> Any:
    """What `function` returns in the first process; a UserError of it is raised in all."""
    if world_size() == 1:
        return function()
    outcome = [None, None]
    if is_main_process():
        try:
            outcome[0] = function()
        except UserError as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome, src=0, group=group)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]


def first_process_first(function: Callable[[], Any]) -> Any:
    """What `function` returns, run in process 0 and then in the others, where it finds the files
    that process 0 has prepared. A UserError of process 0 is raised in all."""
    if world_size() == 1:
        return function()
    # A group of its own: a preparation may take longer than PATIENCE.
    group = dist.new_group(backend="gloo", timeout=LONGEST_PREPARATION)
    ours: list[Any] = []
    of_first_process(lambda: ours.append(function()), group)
    return ours[0] if ours else function()
