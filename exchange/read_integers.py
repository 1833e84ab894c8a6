"""Reads what `python -m exchange CKPT --to integers` writes, and runs it with integers alone.

    network = load("student.npz")
    logits, spikes = run(network, codes)

It needs numpy and nothing else, and stands here to be read: this is all that a chip has to do.
Every spike, and every bit of the logits, is the trained network's (models/integer_network.py).
"""

import json

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view


def load(path: str) -> dict:
    """The contents of a file (docs/exchange.md), each layer with its arrays."""
    with np.load(path, allow_pickle=False) as file:
        network = json.loads(str(file["network"]))
        layers = {layer["name"]: layer for layer in network["layers"]}
        for name in file.files[1:]:
            layer, _, number = name.partition("/")
            array = file[name]
            layers[layer][number] = array if array.dtype.kind == "f" else array.astype(np.int64)
    return network


def run(network: dict, codes: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits (B, classes) float64, and of each layer of neurons, by name, its spikes (T·B, C, H, W)
    bool, timestep 1 of all images first.

    codes: of images (B, C, H, W), of event frames (B, T, C, H, W), whole numbers from 0 to 255.
    """
    T, spikes = network["time_window"], {}
    x = codes.astype(np.int64)
    values = {"image": x if x.ndim == 4 else np.concatenate(list(x.swapaxes(0, 1)))}
    for layer in network["layers"]:
        x, *more = (values[name] for name in layer["reads"])
        match layer["kind"]:
            case "conv":
                x = windows(x, layer["weight"].shape[2:], layer["stride"], layer["padding"])
                x = np.tensordot(x, layer["weight"], axes=((1, 4, 5), (1, 2, 3)))
                x = x.transpose(0, 3, 1, 2)
            case "norm":
                x = divide(x * layer["scale"] + layer["shift"], layer["divisor"])
            case "codes":
                x = np.clip(divide(x, layer["step"]), layer["low"], layer["high"])
            case "repeat":
                x = np.concatenate([x] * T)
            case "add":
                x = x + more[0]
            case "pool":
                x = windows(x, layer["kernel"], layer["stride"], layer["padding"]).max(axis=(4, 5))
            case "lif":
                x = lif(layer, x.reshape(T, -1, *x.shape[1:]))
                spikes[layer["name"]] = x.astype(bool)
            case "head":
                counts = x.reshape(T, -1, *x.shape[1:]).sum(axis=(0, 3, 4))
                products = (counts @ layer["weight"].T) * layer["step"]
                x = products / layer["positions"] + layer["bias"]
        values[layer["name"]] = x
    return x, spikes


def divide(x: np.ndarray, divisor: int) -> np.ndarray:
    """x / divisor, rounded to the nearest whole number, halves to even."""
    quotient, rest = np.divmod(2 * x + divisor, 2 * divisor)
    return quotient - ((rest == 0) & (quotient % 2 == 1))


def windows(x: np.ndarray, kernel: list, stride: list, padding: list) -> np.ndarray:
    """(N, C, H', W', *kernel): what each output of a convolution or a pool reads."""
    top, left, bottom, right = padding
    x = np.pad(x, [(0, 0), (0, 0), (top, bottom), (left, right)])
    return sliding_window_view(x, kernel, axis=(2, 3))[:, :, :: stride[0], :: stride[1]]


def lif(layer: dict, currents: np.ndarray) -> np.ndarray:
    """Spikes (T·B, ...), 0 or 1, of input currents (T, B, ...). Between two timesteps a neuron
    keeps a code of few bits; step, threshold and currents have one unit."""
    u, fired = 0, []
    for x in currents:
        if fired:
            left = u * (1 - fired[-1])
            if layer["reset"] == "soft":
                left = u - layer["threshold"] * fired[-1]
            x = x + left * layer["leak"] // layer["leak_divisor"]
        u = np.clip(divide(x, layer["step"]), layer["low"], layer["high"]) * layer["step"]
        fired.append((u > layer["threshold"]).astype(np.int64))
    return np.concatenate(fired)
