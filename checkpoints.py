"""What is read back from a checkpoint may come from anywhere: all of it is checked."""

import math
import random
from typing import Any

import torch
from torch import Tensor

from load_settings import is_plain_tensor

SUMS = {"loss", "ce", "logit", "membrane", "train_accuracy", "images"}  # over an epoch's steps


def momentum_of(state_dict: Any, parameters: list[Tensor]) -> list[Tensor | None] | None:
    """The momentum of each parameter in a saved optimizer; None where that is damaged.

    Nothing else is taken from it: learning rate and weight decay are the settings'.
    """
    states = state_dict.get("state") if isinstance(state_dict, dict) else None
    if not isinstance(states, dict) or not set(states) <= set(range(len(parameters))):
        return None
    momentum: list[Tensor | None] = [None] * len(parameters)
    for number, state in states.items():
        buffer = state.get("momentum_buffer") if isinstance(state, dict) else None
        expected = parameters[number].dtype, parameters[number].shape
        if not is_plain_tensor(buffer) or (buffer.dtype, buffer.shape) != expected:
            return None
        if not buffer.isfinite().all():
            return None
        momentum[number] = buffer
    return momentum


def are_random_states(states: Any) -> bool:
    """Whether they could be set: tried on generators of their own."""
    if not isinstance(states, list) or not states:
        return False
    try:
        for state in states:
            if type(state["python"]) is not tuple:
                return False
            random.Random().setstate(state["python"])
            if not (is_plain_tensor(state["torch"]) and state["torch"].is_contiguous()):
                return False
            torch.Generator().set_state(state["torch"])
            if state["cuda"] is not None and torch.cuda.is_initialized():
                torch.Generator("cuda").set_state(state["cuda"])
    except Exception:  # whatever the three raise for what is not theirs
        return False
    return True


def are_sums(sums: Any) -> bool:
    """A non-empty list of dictionaries of finite numbers, all with the same names."""
    return (
        isinstance(sums, list)
        and len(sums) > 0
        and all(isinstance(part, dict) and part.keys() == sums[0].keys() for part in sums)
        and all(type(x) is float and math.isfinite(x) for part in sums for x in part.values())
        and (not sums[0] or sum(part.get("images", 0) for part in sums) > 0)
        and (not sums[0] or {"loss", "train_accuracy"} <= sums[0].keys() <= SUMS)
    )


def are_rows(rows: Any, held_out: bool) -> bool:
    """A list of metrics, one dictionary of numbers an epoch; of held-out images too, or not."""
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        return False
    numbers = ["test_accuracy", "best_accuracy", "time"] + ["val_accuracy"] * held_out
    return all(
        all(type(name) is str for name in row)
        and all(type(x) in (float, type(None)) for name, x in row.items() if name != "epoch")
        and type(row.get("epoch")) is int
        and row["epoch"] == epoch
        and all(type(row.get(name)) is float and math.isfinite(row[name]) for name in numbers)
        and (held_out or row.get("val_accuracy") is None)
        and 0 <= (row.get("seconds") or 0.0) < math.inf
        for epoch, row in enumerate(rows, 1)
    )
