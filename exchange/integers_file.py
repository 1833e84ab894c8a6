"""A quantized network as integers in a `.npz` file, for whoever builds a chip or an emulator.

The layout is described in docs/exchange.md; `read_integers.py` reads it in numpy.
"""

import io
import json
import math
from typing import Any

import numpy as np

from models.integer_network import why_not_integers
from runtime.errors import UserError

from .description import Description, Operation

FORMAT = "md-snn integers 1"


def integers_file(description: Description) -> bytes:
    """The contents of the file. Raises UserError for what is not exact in integers."""
    if not description.is_quantized:
        raise UserError("--to integers: a full-precision network has none; export a quantized one")
    if (reason := why_not_integers(description.neuron)) is not None:
        raise UserError(f"--to integers: {reason}")
    codes = next(x for x in description.operations if x.reads == ("image",))
    arrays: dict[str, np.ndarray] = {}
    layers = []
    for operation in description.operations:
        if operation.kind == "image" or operation is codes:
            continue  # whoever reads the file begins with codes
        reads = ["image" if name == codes.name else name for name in operation.reads]
        about = {"name": operation.name, "kind": operation.kind, "reads": reads}
        layers.append(about | plain_numbers(operation))
        for name, value in operation.numbers.items():
            if isinstance(value, np.ndarray):
                arrays[f"{operation.name}/{name}"] = narrowest(value)
    network = {
        "format": FORMAT,
        "time_window": description.time_window,
        "input_shape": list(description.input_shape),
        "image_step": codes.numbers["step"],
        "layers": layers,
        "about": description.about,
    }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, network=np.array(json.dumps(network)), **arrays)
    return buffer.getvalue()


def plain_numbers(operation: Operation) -> dict[str, Any]:
    """Those that are no arrays, whole."""
    numbers = {x: y for x, y in operation.numbers.items() if not isinstance(y, np.ndarray)}
    if operation.kind == "lif":
        leak, divisor = numbers["leak"].as_integer_ratio()
        # What is above it is a whole number: a threshold between two is as good as the lower one.
        threshold = math.floor(numbers["threshold"])
        numbers |= {"leak": leak, "leak_divisor": divisor, "threshold": threshold}
    return numbers


def narrowest(x: np.ndarray) -> np.ndarray:
    """The same whole numbers in as few bytes as hold them; what is not whole as it is."""
    if x.dtype.kind == "f":
        return x
    kinds = (np.int8, np.int16, np.int32, np.int64)
    return x.astype(next(kind for kind in kinds if np.array_equal(x.astype(kind), x)))
