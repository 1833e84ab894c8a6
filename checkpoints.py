"""A checkpoint: what is in the file, the network that it describes, and the checks.

What is read back may come from anywhere: all of it is checked, and a fault is one line: UserError.
Before anything is unpacked the armour at the end looks at the bytes.
"""

import importlib.util
import math
import os
import pickletools
import reprlib
import sys
import traceback
import warnings
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distiller import MEMBRANE_LOSSES
from models import NETWORKS, SpikingNetwork
from models.graph import graph_of, layers_of
from models.layers import Layers, Stream
from models.quantized_layers import quantized_layers
from runtime.command import similar_path
from runtime.errors import UserError
from runtime.files import digest, must_be_file
from settings import (
    GONE,
    TYPES,
    Settings,
    before_it,
    check_settings,
    describes_a_network,
    input_step_of,
    own_network,
)

MOST_TEXT = 300  # characters of what is said of a network of one's own
MOST_TUPLES = 20_000  # four a tensor, and few besides


class Checkpoint(NamedTuple):
    """What `load_checkpoint` has read and checked; `model` fits `build_network(settings)`."""

    settings: Settings
    model: dict[str, Tensor]
    epoch: int
    accuracy: float
    rest: dict[str, Any]  # all of the file, not checked: --resume does that


def load_checkpoint(path: str | Path, weights: bool = True) -> Checkpoint:
    """Read and check a checkpoint of main.py, on the CPU, executing nothing that is in it.

    Without `weights` neither they nor the optimizer's state are read from the disk, and `model` is
    empty: the rest comes many times faster. Raises UserError where the file is missing, unreadable,
    truncated or another program's, or where its weights do not fit the network that its settings
    describe.
    """
    not_ours = f"{path} is not a checkpoint of this program"
    try:
        must_be_file(path)
        _refuse_bombs(path)
        with warnings.catch_warnings(action="ignore"):
            content = _plain(
                torch.load(path, map_location="cpu", weights_only=True, mmap=not weights)
            )
    except FileNotFoundError:
        raise UserError(f"checkpoint {path} does not exist{similar_path(path)}") from None
    except OSError as error:
        raise UserError(f"cannot read checkpoint {path} ({error.strerror})") from None
    except Exception:  # what torch.load raises depends on where the bytes stop making sense
        raise UserError(f"{not_ours}, or it is truncated") from None

    expected_types = {"settings": dict, "model": dict, "epoch": int, "accuracy": float}
    for name, expected_type in expected_types.items():
        if not isinstance(content, dict) or not isinstance(content.get(name), expected_type):
            raise UserError(f"{not_ours}: it holds no {name}, or another type")
    settings = _settings_from(content["settings"], not_ours)
    if weights:
        _check_weights(content["model"], settings, path)
    model = content["model"] if weights else {}
    return Checkpoint(settings, model, content["epoch"], content["accuracy"], content)


def build_network(settings: Settings) -> SpikingNetwork:
    """The network of the settings, with fresh weights from torch's random state."""
    data_set, layers = settings.data_set, Layers(neuron=settings.neuron)
    if settings.paper_setting != "original":
        layers = quantized_layers(
            settings.bits,
            settings.bn_bits,
            data_set.image_step,
            membrane_steps_learned=MEMBRANE_LOSSES.get(settings.loss) is None,
            neuron=settings.neuron,
        )
    make = network_class(settings)
    try:
        network = make(
            data_set.num_classes,
            settings.time_window,
            data_set.in_channels,
            settings.width,
            layers,
            data_set.image_size,
        )
    except Exception as error:  # of a network of one's own anything
        raise _unfit(settings, error) from None
    network.input_shape = data_set.input_shape(settings.time_window)
    network.input_step = input_step_of(settings)
    return network


def check_network(settings: Settings) -> None:
    """Raises UserError where the network cannot be built for these data, or is none that a chip
    knows (`graph_of`), in full precision or quantized; holds no weights."""
    in_both = (
        replace(settings, paper_setting="original"),
        replace(
            settings,
            paper_setting="student",
            bits=settings.bits or 4,
            bn_bits=settings.bn_bits or 8,
        ),
    )
    for one in in_both:
        with torch.device("meta"):
            network = build_network(one)
        try:
            graph_of(network)
            for name, module, kind in layers_of(network):
                is_plain = type(module) is Stream or (
                    kind in ("conv", "batch_norm", "lif")
                    and getattr(module, "quantizer", None) is None
                )
                other_neuron = getattr(module, "neuron", settings.neuron) != settings.neuron
                if (one.paper_setting == "student" and is_plain) or other_neuron:
                    raise ValueError(f"{name} is not made by `layers`, and no option reaches it")
        except Exception as error:  # see above
            raise _unfit(settings, error) from None


def _unfit(settings: Settings, error: Exception) -> UserError:
    """What to say of a network that fails, and in which line of the user's file."""
    reason, own = str(error), own_network(settings.arch)
    if own is not None:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == own[0]]
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        reason = f"{f'line {lines[-1]}: ' if lines else ''}{kind}{reason}"
    reason = " ".join(reason.split())[:MOST_TEXT]
    return UserError(f"--arch {settings.arch or settings.network_name}: {reason}")


# Networks of one's own that have been run, by class and digest of their file; of one class the one
# that the command line has named last is the last.
OWN: dict[tuple[str, str], type[SpikingNetwork]] = {}


def network_class(settings: Settings) -> Callable[..., SpikingNetwork]:
    """What makes the network, of `SpikingNetwork`'s arguments.

    A file of one's own is run where the command line has named it (`use_own_network`), or where it
    is the one, to the last byte, that the network was trained with: settings come from a
    checkpoint, and a checkpoint from anywhere.
    """
    own = own_network(settings.arch)
    if own is None:
        return NETWORKS[settings.arch or f"resnet{settings.model_depth}"][1]
    (path, name), found = own, settings.arch_digest
    if (name, found) not in OWN:
        known = [network for (of_name, _), network in OWN.items() if of_name == name]
        if known:
            return known[-1]
        is_there = os.path.isfile(path)
        if not is_there or digest(path) != found:
            what = "has changed since" if is_there else "is not there"
            raise UserError(
                f"it holds a network of one's own, {name} of {path}, which {what}: put the file "
                f"back, or name it with main.py's --arch FILE.py:{name}"
            )
        use_own_network(settings.arch)
    return OWN[name, found]


def use_own_network(arch: str) -> tuple[str, str]:
    """Run the file of FILE.py:CLASS, and take the class for every network of this name; returns the
    same with the file's whole path, and the file's digest. Raises UserError where that fails."""
    path, name = own_network(arch)
    path = os.path.abspath(path)
    try:
        must_be_file(path)
    except OSError:
        raise UserError(f"--arch {arch}: there is no file {path}{similar_path(path)}") from None
    found = digest(path)
    if (name, found) in OWN:
        OWN[name, found] = OWN.pop((name, found))  # named last
        return f"{path}:{name}", found
    spec = importlib.util.spec_from_file_location(f"own_network_{found[:12]}", path)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, os.path.dirname(path))  # as of a script
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:MOST_TEXT]
        raise UserError(f"--arch {arch}: running the file fails: {reason}") from None
    finally:
        sys.path.pop(0)
    classes = {
        x: y
        for x, y in vars(module).items()
        if isinstance(y, type) and issubclass(y, SpikingNetwork) and y is not SpikingNetwork
    }
    if name not in classes:
        inside = f"it has {', '.join(classes)}" if classes else "it has none"
        raise UserError(f"--arch {arch}: no class {name} of SpikingNetwork in the file: {inside}")
    OWN[name, found] = classes[name]
    return f"{path}:{name}", found


def class_names(checkpoint: Checkpoint) -> list[str]:
    """The names that the data set had when it was trained on, else the labels' numbers."""
    names = checkpoint.settings.classes or checkpoint.rest.get("class_names")
    number = checkpoint.settings.data_set.num_classes
    if not (isinstance(names, list | tuple) and all(type(name) is str for name in names)):
        names = []
    return names_of_labels(names, number)


def same_classes(ours: Settings, theirs: Settings) -> bool:
    """Whether a classifier of one is one of the other."""
    return (ours.data, ours.classes) == (theirs.data, theirs.classes)


def names_of_labels(names: Sequence[str], number: int) -> list[str]:
    """The names of so many classes: where there are fewer, the rest are called by their labels."""
    return [*names[:number], *map(str, range(len(names), number))]


def _refuse_bombs(path: str | Path) -> None:
    """Raises ValueError for a file that torch.load would blow up on: one that is larger unpacked
    than packed, which torch.save's are not, or tuples so deep in each other that hashing them, in
    C, overflows the stack."""
    with zipfile.ZipFile(path) as file:
        if sum(member.file_size for member in file.infolist()) > os.stat(path).st_size:
            raise ValueError("larger unpacked than packed")
        (pickled,) = (name for name in file.namelist() if name.endswith("/data.pkl"))
        codes = (code.name for code, _, _ in pickletools.genops(file.read(pickled)))
        if sum(name.startswith("TUPLE") for name in codes) > MOST_TUPLES:
            raise ValueError("too many tuples")


def _plain(content: Any) -> Any:
    """`content` in the exact types that a checkpoint is made of: torch.load also makes subclasses
    of them, whose attributes and methods the file may have replaced. Raises TypeError for others.
    """
    if isinstance(content, dict):
        return {_plain(name): _plain(value) for name, value in dict.items(content)}
    if type(content) in (list, tuple):
        return type(content)(map(_plain, content))
    if isinstance(content, Tensor):
        if content.is_nested or content.layout != torch.strided or content.device.type != "cpu":
            raise TypeError("a tensor of another kind")
        return Tensor.detach(content)
    if type(content) in (str, int, float, bool, type(None)):
        return content
    raise TypeError(f"a {type(content)}")


def _settings_from(saved: dict, not_ours: str) -> Settings:
    # of versions that had others
    saved = before_it(saved) | {name: value for name, value in saved.items() if name not in GONE}
    if saved.keys() != TYPES.keys():
        raise UserError(f"{not_ours}: its settings are not this version's")
    settings = Settings(**saved)
    try:
        check_settings(settings, trained=True)
    except UserError as error:
        raise UserError(f"{not_ours}: {error}") from None
    if not describes_a_network(settings):
        raise UserError(f"{not_ours}: no such network")
    return settings


def _check_weights(model: dict, settings: Settings, path: str | Path) -> None:
    try:
        with torch.device("meta"):
            network = build_network(settings).state_dict()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    expected, found = (
        {
            name: (x.dtype, tuple(x.shape)) if isinstance(x, Tensor) else type(x)
            for name, x in tensors.items()
        }
        for tensors in (network, model)
    )
    for name in expected | found:
        if expected.get(name) != found.get(name):
            raise UserError(
                f"{path} does not fit its own settings: {reprlib.repr(name)} should be "
                f"{expected.get(name)}, found {found.get(name)}"
            )
    for name, x in model.items():
        smallest = 0 if name.endswith("running_var") else -math.inf
        if not (x.isfinite().all() and (x >= smallest).all()):
            raise UserError(
                f"{path} holds NaN, infinite or impossible numbers in {name}: did it diverge?"
            )
