"""An exported file read back by its reader's code, and compared spike for spike, layer by layer."""

import io
import json
import warnings
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from checkpoints import build_network
from models.integer_network import IntegerNetwork, why_not_integers
from models.network import SpikingNetwork, folded
from models.neuron import neuron_of
from models.quantized_layers import QuanLinear
from runtime.errors import UserError
from settings import Settings

from . import read_integers

# Spikes of float32 networks whose membrane lies at the threshold but for rounding: another order of
# additions may move them, and those that follow from them.
ROUNDING = 1e-4


class Found(NamedTuple):
    """What a reader says of images: logits (B, K), and spikes (T·B, C, H, W) of each LIF layer."""

    logits: np.ndarray
    spikes: dict[str, np.ndarray]


@torch.no_grad()
def run(network: SpikingNetwork, images: Tensor) -> Found:
    """What the network itself says; of a full-precision one with its batch norms folded."""
    if not isinstance(network.linear, QuanLinear):
        network = folded(network)
    spikes: dict[str, np.ndarray] = {}

    def keep(_: nn.Module, inputs: tuple, fired: Tensor, name: str) -> None:
        spikes[name] = fired.numpy()

    with ExitStack() as hooks:
        for name, layer in network.neurons().items():
            hooks.enter_context(layer.register_forward_hook(partial(keep, name=name)))
        return Found(network.eval()(images).numpy(), spikes)


def run_in_integers(network: SpikingNetwork, images: Tensor) -> Found | None:
    """The same of a quantized network, in integers; None where they are not exact."""
    is_quantized = isinstance(network.linear, QuanLinear)
    if not is_quantized or why_not_integers(neuron_of(network)) is not None:
        return None
    try:
        logits, spikes = IntegerNetwork(network)(images)
    except OverflowError:
        return None
    return Found(logits.numpy(), dict(zip(network.neurons(), map(np.asarray, spikes), strict=True)))


def by_onnxruntime(content: bytes, images: Tensor, network: SpikingNetwork) -> Found:
    import onnx
    import onnxruntime

    model, layers = onnx.load_from_string(content), list(network.neurons())
    model.graph.output.extend(map(onnx.helper.make_empty_tensor_value_info, layers))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    logits, *spikes = session.run(["logits", *layers], {"images": images.numpy()})
    return Found(logits, dict(zip(layers, spikes, strict=True)))


def by_numpy(content: bytes, images: Tensor, network: SpikingNetwork) -> Found:
    file = read_integers.load(io.BytesIO(content))
    return Found(*read_integers.run(file, (images / file["image_step"]).round().numpy()))


def by_spikingjelly(content: bytes, images: Tensor, network: SpikingNetwork) -> Found:
    import nir
    from spikingjelly.activation_based.nir_exchange import import_from_nir

    module = import_from_nir(nir.read(io.BytesIO(content)))
    return run_nir(module, images, network)


@torch.no_grad()
def run_nir(module: nn.Module, images: Tensor, network: SpikingNetwork) -> Found:
    """What a module that nirtorch has made of a file says, run once a timestep with the state of
    the one before; the mean over time is taken here."""
    T, layers = network.time_window, network.neurons()
    frames = images.unbind(1) if images.dim() == 5 else [images] * T
    spikes: dict[str, list[Tensor]] = {name: [] for name in layers}

    def keep(name: str, result: Tensor | tuple[Tensor, ...]) -> None:
        spikes[name].append(result[0] if isinstance(result, tuple) else result)

    for name in layers:
        layer = module.get_submodule(name.replace(".", "_"))
        layer.register_forward_hook(lambda _, inputs, result, name=name: keep(name, result))
    outputs, state = [], None
    for frame in frames:
        output, state = module(frame, state)
        outputs.append(output.flatten(1))
    logits = torch.stack(outputs).mean(dim=0)
    return Found(logits.numpy(), {name: torch.cat(x).numpy() for name, x in spikes.items()})


@torch.no_grad()
def by_torch_export(content: bytes, images: Tensor, network: SpikingNetwork) -> Found:
    with warnings.catch_warnings(action="ignore"):  # of torch about its own buffers
        program = torch.export.load(io.BytesIO(content))
    logits, spikes = program.module()(images)
    return Found(logits.numpy(), {name: x.numpy() for name, x in spikes.items()})


def by_safetensors(content: bytes, images: Tensor, network: SpikingNetwork) -> Found:
    """The weights in a network that is built of the settings beside them."""
    from safetensors.torch import load

    length = int.from_bytes(content[:8], "little")  # of the header, JSON
    about = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["about"])
    built = build_network(Settings.of(**about["settings"]))
    built.load_state_dict(load(content))
    return run(built.eval(), images)


def differing(found: Found, expected: Found) -> dict[str, int]:
    """Of each layer the spikes that differ. Raises UserError where a layer is not there."""
    if found.spikes.keys() != expected.spikes.keys():
        raise UserError(
            f"other layers fire: {sorted(found.spikes.keys() ^ expected.spikes.keys())}"
        )
    return {
        name: np.count_nonzero(found.spikes[name].astype(bool) != spikes.astype(bool))
        for name, spikes in expected.spikes.items()
    }


def compare(found: Found, expected: Found, exact: bool) -> str:
    """What is to be said of a reader's numbers beside the network's own.

    Raises UserError where they differ: `exact`, in any spike or bit of a logit; else by more than
    rounding explains.
    """
    counts = differing(found, expected)
    total = sum(spikes.size for spikes in expected.spikes.values())
    wrong = sum(counts.values())
    equal = np.array_equal(found.logits, expected.logits)
    close = np.abs(found.logits - expected.logits).max() <= 1e-3 * np.abs(expected.logits).max()
    text = f"{wrong:,} of {total:,} spikes differ"
    if (wrong or not equal) if exact else (wrong > ROUNDING * total or not (wrong or close)):
        first = next((name for name, count in counts.items() if count), "the logits alone")
        raise UserError(f"{text}, first in {first}")
    return f"{text}, {'the logits in no bit' if equal else 'the logits by rounding'}"
