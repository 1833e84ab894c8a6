"""When each layer runs: a pipeline over rows of output pixels and timesteps, through the graph.

A layer has its own PEs and computes its rows in order, timestep after timestep. It starts a row
when it is done with the one before and every row that its kernel reads has arrived, as with line
buffers. With τ the time of a row and ready_i when its inputs are there,

    finish_i = τ + max(finish_{i-1}, ready_i) = (i + 1)·τ + max_{j ≤ i} (ready_j - j·τ)

Rows of timesteps are numbered on: row y of timestep t is i = t·H + y.

Layers whose weights come from DRAM (dram.py) run one after the other, by depth, in the same PEs:
each is loaded when the one before it is done, and starts no row before.
"""

from collections.abc import Iterator, Mapping
from math import prod
from typing import NamedTuple

import numpy as np

from runtime.errors import UserError

from .chip import Value, ceil_div
from .layer_list import Layer, LayerList, show

MOST_ROWS = 2**20  # of pixels in an inference: the schedule holds a number for each
MOST_NUMBERS = 2**28  # 2 GiB


class Times(NamedTuple):
    """Of a layer in one inference: its first start, its last finish, and how long its PEs are busy,
    which is also how soon after this image it can begin with the next. All in one unit.

    Of layers that share PEs, busy is from the loading of the first, as late as its inputs allow, to
    the end of the last.
    """

    start: Value
    finish: Value
    busy: Value
    rows: np.ndarray | None = None  # when each of its rows is finished, (..., timesteps · rows)
    loaded: Value = 0.0  # when its weights are there
    behind: str | None = None  # the layer that had its PEs before


def rows_of(layer: Layer) -> int:
    """Rows of output pixels at a timestep."""
    return layer.out_size[0] * layer.runs


def needed_rows(layer: Layer) -> np.ndarray:
    """For each row of outputs the last row of the plane that it reads, (rows,)."""
    height, outputs = layer.in_size[0], layer.out_size[0]
    stride, padding = layer.stride_and_padding(0)
    last = np.arange(outputs) * stride + layer.kernel - 1 - padding
    return last.clip(0, height - 1)


def arrived(layer: Layer, steps: int, before: Layer, steps_before: int) -> np.ndarray:
    """For each row of a layer, over all timesteps, the last row of a layer before it that must be
    done, (steps · rows,).

    A linear layer reads spike counts: it waits for all timesteps. What ran once is there at each.
    Of layers that run several times in a timestep the last runs belong together, and so on.
    """
    if layer.linear:
        return np.full(rows_of(layer), steps_before * rows_of(before) - 1)
    share = (needed_rows(layer) + 1) / layer.in_size[0]  # of the plane; pooling may lie between
    row = np.ceil(share * before.out_size[0] - 1e-9).astype(int) - 1
    run = ceil_div(np.arange(1, layer.runs + 1) * before.runs, layer.runs) - 1
    step = np.minimum(np.arange(steps), steps_before - 1) * rows_of(before)
    return (step[:, None, None] + run[:, None] * before.out_size[0] + row).ravel()


def check_rows(network: LayerList) -> None:
    """Raise UserError for a layer of more pixels along a side than can be scheduled."""
    for layer in network.layers:
        rows = network.time_steps_of(layer) * max(layer.out_size) * layer.runs
        if rows > MOST_ROWS:
            raise UserError(
                f"layer {show(layer.name)} has {rows} rows of pixels in an inference, more than "
                f"the {MOST_ROWS} that are scheduled (--costs published has no schedule)"
            )


def schedule(
    network: LayerList, row_times: Mapping[str, Value], loads: Mapping[str, float] | None = None
) -> dict[str, Times]:
    """When every layer runs whose rows take so long, each a number or arrays of one shape. `loads`
    says how long it takes to load those whose weights come from DRAM."""
    times: dict[str, Times] = {}
    loads = loads or {}
    behind, free = None, 0.0  # the last layer in the shared PEs, and when it is done
    chips = prod(np.broadcast_shapes(*(np.shape(x) for x in row_times.values())))
    rows = sum(network.time_steps_of(layer) * rows_of(layer) for layer in network.layers)
    if chips * rows > MOST_NUMBERS:
        raise MemoryError(f"{chips} chips of {rows} rows")
    for layer in network.in_order():
        count = network.time_steps_of(layer) * rows_of(layer)
        row_time = np.asarray(row_times[layer.name], dtype=np.float64)[..., None]
        ready = np.zeros(count)
        for name, index in waited_for(network, layer):
            ready = np.maximum(ready, times[name].rows[..., index])
        if layer.name in loads:
            loaded = free + loads[layer.name]
            ready = np.maximum(ready, loaded)
        earlier = row_time * np.arange(count)
        start = np.maximum.accumulate(ready - earlier, axis=-1) + earlier
        rows = start + row_time
        first, last, busy = (
            x[()] for x in (start[..., 0], rows[..., -1], count * row_time[..., 0])
        )
        times[layer.name] = Times(first, last, busy, rows)
        if layer.name in loads:
            times[layer.name] = Times(first, last, busy, rows, loaded, behind)
            behind, free = layer.name, last
    if behind is None:
        return times
    begun = min(times[name].start - load for name, load in loads.items())
    return times | {name: times[name]._replace(busy=free - begun) for name in loads}


def waited_for(network: LayerList, layer: Layer) -> Iterator[tuple[str, np.ndarray]]:
    """The layers that a layer waits for, each with the row that each of its own rows needs."""
    by_name = {other.name: other for other in network.layers}
    steps = network.time_steps_of(layer)
    for name in layer.after:
        before = by_name[name]
        yield name, arrived(layer, steps, before, network.time_steps_of(before))


def critical_path(network: LayerList, times: Mapping[str, Times]) -> tuple[str, ...]:
    """The layers that decide the delay, first to last: from the last row finished back to the row
    that it waited for, of several the last by name."""
    by_name = {layer.name: layer for layer in network.layers}
    name = max(times, key=lambda name: (times[name].finish, name))
    path, row = [name], len(times[name].rows) - 1
    while True:
        rows = times[name].rows
        waits = dict(waited_for(network, by_name[name]))
        ready = np.full(len(rows), times[name].loaded)
        for x, index in waits.items():
            ready = np.maximum(ready, times[x].rows[index])
        # A row that began behind the one before it, and not as soon as its inputs came.
        while row > 0 and ready[row] < rows[row - 1]:
            row -= 1
        came = {x: times[x].rows[index[row]] for x, index in waits.items()}
        if times[name].loaded > max(came.values(), default=-1.0) and times[name].behind:
            name = times[name].behind
            row = len(times[name].rows) - 1
        elif came and times[name].loaded <= max(came.values()):
            name = max(came, key=lambda x: (came[x], x))
            row = waits[name][row]
        else:  # it waited for nothing, or for DRAM alone
            return tuple(reversed(path))
        path.append(name)
