"""From the command line to checked settings, networks and the training recipe.

Every mistake in the arguments is found here, before data or networks are touched.
"""

import copy
import json
import math
import os
import reprlib
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from checkpoints import (
    Checkpoint,
    build_network,
    check_network,
    class_names,
    load_checkpoint,
    same_classes,
    use_own_network,
)
from data_sets import DATA_SETS
from distiller import BETA_SCHEDULES, Distiller, LossFunction, cross_entropy
from models import SpikingNetwork
from models.graph import graph_of
from models.integer_network import why_not_integers
from runtime.command import did_you_mean, similar_path
from runtime.errors import UserError
from runtime.files import check_writable, digest, must_be_file
from settings import (
    GONE,
    MS_RESNETS,
    OPTIONS,
    TYPES,
    Settings,
    as_text,
    build_parser,
    check_settings,
    check_value,
    complete,
    own_network,
    parse_image_size,
    parse_sensor,
)

TIME_WINDOWS = 2  # beside the seed: other random numbers than those of held-out images
OF_EVALUATION = [name for name, x in OPTIONS.items() if x.has("own") or x.has("only")]
RECORDED = {  # what a settings.json holds beside options: what was found, and where it ran
    *("world_size", "git_commit", "versions"),
    *("classes", "input_step", "arch_digest"),
    "num_classes",  # in those of older versions
}


def parse_settings(
    argv: Sequence[str] | None = None, world_size: int = 1, teacher: Settings | None = None
) -> Settings:
    """Checked settings of a command line. Raises UserError for whatever is wrong with it.

    teacher: the settings of the teacher, where its file is yet to come."""
    given = vars(build_parser().parse_args(argv))
    given.pop("local_rank", None)
    if "amp" in given:
        given["amp"] = bool(given["amp"])  # bf16 is the only narrow type there is
    given |= {name: tuple(x) for name, x in given.items() if isinstance(x, list)}
    training = given.get("eval_only") is None
    settings = _training_settings(given) if training else _evaluation_settings(given)
    check_settings(settings, trained=not training)
    if training and settings.arch is not None:
        check_network(settings)
    if settings.device not in ("auto", "cpu") and not torch.cuda.is_available():
        raise UserError(
            f"--device {settings.device}: this machine has no usable GPU; use --device cpu"
        )
    if training:
        _refuse_batches(settings, world_size)
        if settings.teacher_path is not None:
            _check_teacher(settings, teacher or load_checkpoint(settings.teacher_path).settings)
        if settings.init_from is not None:
            _check_start(settings, load_checkpoint(settings.init_from))
        if not settings.save_path:  # the default needs the teacher
            settings = replace(settings, save_path=f"./checkpoints/{run_name(settings)}")
        check_writable(settings.save_path)
    return settings


def _training_settings(given: dict[str, Any]) -> Settings:
    config = given.pop("config", None)
    taken = {} if config is None else _of_config(config, given)
    for name in given:
        if OPTIONS[name].has("only") and not (name == "json" and "dry_run" in given):
            or_dry_run = " or --dry_run" * (name == "json")
            raise UserError(f"--{name} goes with --eval_only CKPT{or_dry_run}")
    for required in ("data", "paper_setting"):
        if required not in taken | given:
            raise UserError(f"--{required} is required")
    depth = MS_RESNETS.get(given.get("arch"))
    if depth is not None:
        if given.get("model_depth", depth) != depth:
            raise UserError(
                f"--arch {given['arch']} is no --model_depth {given['model_depth']}: leave one out"
            )
        given |= {"arch": None, "model_depth": depth}  # as it is stored
    if "time_windows" in given:
        taken.pop("time_window", None)  # it was the largest of others
    elif "time_window" in given:
        taken.pop("time_windows", None)  # one T instead of those
    values = complete(taken | given, may_drop=taken.keys() - given.keys())
    for name, value in given.items():
        if value is not False and (refusal := OPTIONS[name].refusal(values)):
            raise UserError(f"--{name} {refusal}")
    for name, about in OPTIONS.items():
        if about.needed and values[name] is None and not about.refusal(values):
            raise UserError(about.needed.format(**values))
    data = values["data"]
    if values["augment"] == "auto" and DATA_SETS[data].in_channels != 3:
        raise UserError(f"--augment auto is made for colour images: {data} has none")
    if values["resume"] and values["overwrite"]:
        raise UserError("--resume goes on, --overwrite starts anew: leave one of the two out")
    if values["init_from"] is not None and values["init_from_teacher"]:
        raise UserError(
            "--init_from_teacher starts from the weights of --teacher_path, --init_from from "
            "another checkpoint's: leave one of the two out"
        )
    if values["time_windows"] is not None:
        values["time_windows"] = tuple(sorted(values["time_windows"]))
    _say_what_config_keeps(taken, given, values)
    if values["image_size"] is not None:
        size = parse_image_size(values["image_size"])
        own = size == DATA_SETS[data].image_size
        values["image_size"] = None if own else "{}x{}".format(*size)
    if values["sensor"] is not None:
        size = parse_sensor(values["sensor"])
        values["sensor"] = "{}x{}".format(*size)
    find = DATA_SETS[data].classes_of
    classes = None if find is None else tuple(find(values["data_path"]))
    found = None
    if own_network(values["arch"]) is not None:
        values["arch"], found = use_own_network(values["arch"])
    return Settings(**values, classes=classes, arch_digest=found)


def _evaluation_settings(given: dict[str, Any]) -> Settings:
    """The settings that the checkpoint was trained with, and this command's of how to run."""
    path = given["eval_only"]
    if "config" in given:
        raise UserError("--config has no meaning with --eval_only: the checkpoint has its settings")
    own, network_file = own_network(given.get("arch")), None
    if own is not None:
        given["arch"], network_file = use_own_network(given["arch"])
    trained = load_checkpoint(path).settings
    if own is not None and own[1] == trained.network_name:
        if network_file != trained.arch_digest:
            _warn(f"{own[0]} is not the file that {path} was trained with")
        trained = replace(trained, arch=given["arch"], arch_digest=network_file)
    elif given.get("arch") == f"resnet{trained.model_depth}":
        del given["arch"]  # stored as its depth
    if "time_windows" in given:  # in any order, as in a training
        given["time_windows"] = tuple(sorted(given["time_windows"]))
    for name, value in given.items():
        about, theirs = OPTIONS[name], getattr(trained, name)
        if name == "image_size":
            size = trained.data_set.image_size
            if parse_image_size(value) != size:
                raise UserError(
                    f"--image_size {value} does not fit {path}: it was trained with "
                    "{}x{}".format(*size)
                )
        elif about.has("fit") and value != theirs:
            raise UserError(
                f"--{name} {value} does not fit {path}: it was trained {_with(name, theirs)}"
            )
        elif name not in OF_EVALUATION and value not in (about.constant_default, theirs):
            raise UserError(f"--{name} has no meaning with --eval_only: leave it out")
    if given.get("integer") and trained.bits is None:
        raise UserError(f"--integer: {path} is a full-precision network")
    if given.get("integer") and (reason := why_not_integers(trained.neuron)) is not None:
        raise UserError(f"--integer: {path} is not exact in integers: {reason}")
    if "out" in given and "per_class" not in given:
        raise UserError("--out goes with --per_class")
    for name in ("integer", "per_class", "compile") if "predict" in given else ():
        if name in given:
            raise UserError(f"--predict looks at its files alone: leave --{name} out")
    own = {name: given.get(name, OPTIONS[name].constant_default) for name in OF_EVALUATION}
    for name in ("batch_size", "time_window"):
        own[name] = given.get(name, getattr(trained, name))
    if own["predict"] is None:
        check_classes(trained, own["data_path"], path)
    if own["cache_path"] is None and own["data_path"] == trained.data_path:
        own["cache_path"] = trained.cache_path
    return replace(trained, teacher_path=None, time_windows=None, **own)


def _of_config(path: str, given: dict[str, Any]) -> dict[str, Any]:
    """The options that --config takes over: those of the file that had a meaning in its run."""
    found = read_config(path)
    run = {name: given[name] for name in ("data", "paper_setting") if name in given} | found
    if not {"data", "paper_setting"} <= run.keys():
        return found  # the caller says what is missing
    values = complete(run)
    return {name: value for name, value in found.items() if not OPTIONS[name].refusal(values)}


def read_config(path: str | Path, option: str = "--config ") -> dict[str, Any]:
    """The options in a settings.json that --config takes over. What a run of an older version has
    not written is left out. Raises UserError where the file is missing or not such a one."""
    expected = f"{option}{path}: it should be the settings.json of a run"
    try:
        if Path(path).is_dir():
            inside = Path(path) / "settings.json"
            meant = f": did you mean {inside}?" if inside.is_file() else ""
            raise UserError(f"{expected}, not a folder{meant}")
        must_be_file(path)
        text = Path(path).read_bytes()
    except FileNotFoundError:
        raise UserError(f"{option}{path} does not exist{similar_path(path)}") from None
    except (OSError, ValueError) as error:  # ValueError: a null character
        raise UserError(f"cannot read {option}{path} ({error})") from None
    try:
        content = json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        raise UserError(f"{expected}, and is no JSON, or damaged") from None
    if not isinstance(content, dict):
        raise UserError(f"{expected}, and holds no names with values")
    found = {}
    for name, value in content.items():
        if name in GONE and value == GONE[name]:
            continue
        if name not in OPTIONS and name not in RECORDED:
            meant = did_you_mean(name, OPTIONS)
            raise UserError(f"{option}{path}: there is no option {reprlib.repr(name)}{meant}")
        if name not in OPTIONS or OPTIONS[name].has("alone") or value is None:
            continue
        value = tuple(value) if isinstance(value, list) else value
        if TYPES[name][0] is float and type(value) is int and abs(value) < 2**53:
            value = float(value)
        try:
            check_value(name, value)
        except UserError as error:
            raise UserError(f"{option}{path}: {error}") from None
        found[name] = value
    return found


def read_settings(path: str | Path) -> Settings:
    """The settings of the run that has left a settings.json; what an older version has not written
    is today's default. Raises UserError where the file is missing or not such a one."""
    found = read_config(path, option="")
    if not {"data", "paper_setting"} <= found.keys():
        raise UserError(f"{path} is not the settings.json of a run")
    return Settings(**complete(found) | {"save_path": str(Path(path).parent)})


def _say_what_config_keeps(
    taken: dict[str, Any], given: dict[str, Any], values: dict[str, Any]
) -> None:
    """Tell of values that --config keeps though they were defaults and would be others here."""
    if not taken:
        return
    before = complete({"data": values["data"], "paper_setting": values["paper_setting"]} | taken)
    kept = []
    for name in sorted(taken.keys() - given.keys()):
        default = OPTIONS[name].default_with
        if default(values) != values[name] == default(before):
            kept.append(f"--{name} {values[name]} (the default is {default(values)} here)")
    if kept:
        _warn(f"--config keeps {', '.join(kept)}")


def _warn(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"main.py: warning: {text}", file=sys.stderr, flush=True)


def run_name(settings: Settings) -> str:
    """Name of the default save path: what each option has there, of which most are no defaults.
    Data of one's own are told by their folder's name, a teacher's file by its digest."""
    values = asdict(settings)
    own = DATA_SETS[settings.data].classes_of is not None
    values["data_path"] = Path(settings.data_path).resolve().name if own else None
    if settings.arch_digest is not None:
        values["arch"] = settings.network_name
    if settings.teacher_path is not None:
        start = "from-" * settings.init_from_teacher
        values["teacher_path"] = f"{start}teacher{digest(settings.teacher_path)[:6]}"
    if settings.init_from is not None:
        values["init_from"] = f"init{digest(settings.init_from)[:6]}"
    shown = values | {"crossbar": settings.crossbar and Path(settings.crossbar).stem}
    parts = []
    for name, about in OPTIONS.items():
        value, (place, form) = shown[name], about.name or (50, None)
        if value is None or value is False or (about.name is None and about.has("resume")):
            continue
        if form is not None:
            parts.append((place, form.format(value)))
        elif value != about.default_with(values):
            parts.append((place, f"{name}{as_text(value)}".replace("_", "-").replace(" ", "-")))
    return "-".join(text for _, text in sorted(parts, key=lambda part: part[0]) if text)


def _refuse_batches(settings: Settings, world_size: int) -> None:
    """Raises UserError for batches that the processes cannot share out or train on."""
    share, rest = divmod(settings.batch_size, world_size)
    if rest:
        raise UserError(
            f"--batch_size {settings.batch_size} is the global batch and does not divide evenly "
            f"over {world_size} processes"
        )
    if share % settings.accumulate:
        raise UserError(
            f"--accumulate {settings.accumulate} does not divide the {share} images that each "
            f"process takes of --batch_size {settings.batch_size}"
        )
    refuse_single_values(settings, world_size)


def refuse_single_values(
    settings: Settings, world_size: int, training_images: int | None = None
) -> None:
    """Raises UserError where a part of a training batch gives a batch norm a single value per
    channel: that has no variance. None: as many images as a batch takes."""
    images = settings.batch_size
    if training_images is not None:
        images = min(images, training_images)
    # As training_loader and add_gradients share them out: equal parts, but for the last.
    share = -(-images // world_size)
    largest = -(-share // settings.accumulate)
    smallest = (share % largest or largest) * world_size  # batch norm's part is all processes'
    if smallest * min(settings.trained_at) == 1 and smallest_plane(settings) == 1:
        size = settings.data_set.image_size
        raise UserError(
            "batch norm cannot train on a single value per channel: images of {}x{} are 1x1 in the "
            "last layers, T is 1, and of a batch of {} (--batch_size, or all that there are), in "
            "{} parts (--accumulate), one holds a single image: take more timesteps, larger images "
            "or more images a part".format(*size, images, settings.accumulate)
        )


def smallest_plane(settings: Settings) -> int:
    """Pixels of the smallest plane that a batch norm reads."""
    with torch.device("meta"):
        graph = graph_of(build_network(settings))
    return min(math.prod(node.shape[1:]) for node in graph if node.kind == "batch_norm")


def _check_teacher(settings: Settings, teacher: Settings) -> None:
    if teacher.paper_setting != "original":
        raise UserError(
            f"--teacher_path {settings.teacher_path} holds a quantized {teacher.paper_setting} "
            "network: a teacher comes from --paper_setting original"
        )
    # Of another fold, it was trained on test images of this run. Of a neuron that leaks, fires or
    # is reset otherwise, no student can have its membranes and fire as it does. Surrogates are of
    # the training alone.
    of_neuron = "leak", "threshold", "reset"
    if {teacher.arch, settings.arch} != {None} and teacher.network_name != settings.network_name:
        raise UserError(
            f"--teacher_path {settings.teacher_path} is a {teacher.network_name}, and this run "
            f"trains a {settings.network_name}: a teacher and its students need the same"
        )
    for name in ("data", "model_depth", "width", "image_size", "split_by", "fold", *of_neuron):
        theirs, ours = getattr(teacher, name), getattr(settings, name)
        if theirs != ours:
            raise UserError(
                f"--teacher_path {settings.teacher_path} was trained {_with(name, theirs)}, this "
                f"run {_with(name, ours)}: a teacher and its students need the same"
            )
    check_classes(teacher, settings.data_path, settings.teacher_path)


def _check_start(settings: Settings, start: Checkpoint) -> None:
    """Raises UserError for a checkpoint of --init_from that this network cannot start from."""
    here, theirs = f"--init_from {settings.init_from}", start.settings
    widths = theirs.bits, theirs.bn_bits
    if theirs.bits is not None and widths != (settings.bits, settings.bn_bits):
        raise UserError(
            f"{here} is a network of {theirs.bits} bits, {theirs.bn_bits} in batch norm: those of "
            "the same widths start from it, and any from one of full precision"
        )
    for name in ("network_name", "width", "leak", "threshold", "reset"):
        if (x := getattr(theirs, name)) != (ours := getattr(settings, name)):
            what = "" if name == "network_name" else f"{name} "
            raise UserError(
                f"{here} is of {what}{x}, this network of {what}{ours}: a network starts from one "
                "of the same"
            )
    if theirs.data == settings.data and theirs.fold != settings.fold:
        fold = _with("fold", theirs.fold)
        raise UserError(f"{here} was trained {fold}: on test images of this run")
    of_their_kind = {name: getattr(theirs, name) for name in ("paper_setting", "bits", "bn_bits")}
    with torch.device("meta"):
        network = build_network(replace(settings, **of_their_kind)).state_dict()
    stays = not same_classes(settings, theirs)  # the classifier, see start_from_checkpoint
    shapes = [
        {name: " x ".join(map(str, x.shape)) for name, x in model.items()}
        for model in (start.model, network)
    ]
    for name in shapes[0] | shapes[1]:
        there, ours = (x.get(name, "missing") for x in shapes)
        if there != ours and not (stays and name.startswith("linear.")):
            raise UserError(
                f"{here} does not fit images of {about_images(settings)}, it was trained on "
                f"{about_images(theirs)}: {name} is {there} there, and {ours} here"
            )


def about_images(settings: Settings) -> str:
    data_set = settings.data_set
    return "{} of {}x{} in {} channels".format(
        settings.data, *data_set.image_size, data_set.in_channels
    )


def start_from_checkpoint(network: SpikingNetwork, settings: Settings) -> None:
    """Give a fresh network the weights of --init_from; a classifier of other classes stays."""
    checkpoint = load_checkpoint(settings.init_from)
    start = load_network(checkpoint)
    if not same_classes(settings, checkpoint.settings):
        start.linear = copy.deepcopy(network.linear)
    network.start_from(start)


def _with(name: str, value: Any) -> str:
    return f"without --{name}" if value is None else f"with --{name} {value}"


def check_classes(trained: Settings, data_path: str | Path, path: str | Path) -> None:
    """Raises UserError where the folder has other classes than the checkpoint at `path`."""
    find = DATA_SETS[trained.data].classes_of
    if find is None:
        return
    here = find(data_path)
    for name in sorted(set(here) ^ set(trained.classes)):
        raise UserError(
            f"{path} was trained on {len(trained.classes)} classes, {data_path} has {len(here)}: "
            f"{name!r} is only in {'the folder' if name in here else 'the checkpoint'}"
        )


def refuse_another_fold(
    trained: Checkpoint, path: str | Path, settings: Settings, training_images: int
) -> None:
    """Raises UserError where the network at `path` was trained on another number of images than
    these of its fold: the data were others, and so was the fold."""
    theirs = trained.rest.get("training_images")
    same_share = trained.settings.val_share == settings.val_share
    if settings.fold is not None and same_share and theirs not in (None, training_images):
        raise UserError(
            f"{path} was trained on {theirs} images of its --fold {settings.fold}, the data here "
            f"have {training_images} there: it may have been trained on the test images, give the "
            "data that it was trained on"
        )


def load_network(
    checkpoint: Checkpoint | str | Path, time_window: int | None = None
) -> SpikingNetwork:
    """The trained network of a checkpoint, or of the file at a path, on the CPU and in evaluation
    mode: `load_network("qamd-best.pth").predict(images)`. Its `class_names` are those of its data.
    `time_window` is T, where it is not the trained one.
    Raises UserError as load_checkpoint does, and for a T that is out of range."""
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = load_checkpoint(checkpoint)
    settings = checkpoint.settings
    if time_window is not None:
        check_value("time_window", int(time_window))
        settings = replace(settings, time_window=time_window)
    network = build_network(settings)
    network.load_state_dict(checkpoint.model)
    network.class_names = class_names(checkpoint)
    return network.eval()


def build_loss(
    settings: Settings, student: nn.Module, teacher: SpikingNetwork | None
) -> LossFunction:
    """What is minimized: cross-entropy, and of an MD-SNN the distance to its teacher too."""
    if settings.paper_setting != "qamd":
        return cross_entropy(student, settings.label_smoothing)
    weights = settings.alpha, settings.beta, settings.tau, settings.beta_schedule
    return Distiller(teacher, student, settings.loss, *weights, settings.label_smoothing)


def build_optimizer(network: nn.Module, settings: Settings) -> torch.optim.SGD:
    """SGD with momentum 0.9; no weight decay on batch norm, biases and quantization steps."""
    decayed, free = [], []
    for name, parameter in network.named_parameters():
        is_free = parameter.dim() <= 1 or name.endswith("quantizer.step")
        (free if is_free else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay, "initial_lr": settings.lr},
        {"params": free, "weight_decay": 0.0, "initial_lr": settings.lr},
    ]
    return torch.optim.SGD(groups, lr=settings.lr, momentum=0.9)


def time_window_of(settings: Settings, step: int) -> int:
    """T of a training step, counted from 0 over all epochs. Each of K different T comes once in
    every K steps, in an order that depends on the seed and the number of these steps alone: it is
    the same in all processes, and in a resumed run."""
    windows = settings.trained_at
    block, place = divmod(step, len(windows))
    # NumPy promises that a bit generator's raw numbers stay the same in all its versions.
    drawn = np.random.PCG64([settings.seed, TIME_WINDOWS, block]).random_raw(len(windows))
    return windows[np.argsort(drawn)[place]]


def build_scheduler(
    optimizer: torch.optim.Optimizer, steps: int, steps_done: int = 0, warmup: int = 0
) -> torch.optim.lr_scheduler.LambdaLR:
    """In step k of the first `warmup` ones (k/warmup)·`initial_lr`, over the rest a cosine from
    `initial_lr` to 0. The rate depends on the number of the step alone, so a resumed run has that
    of an uninterrupted one, also of one that was given more epochs."""
    cosine = BETA_SCHEDULES["cosine"]

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return cosine((step - warmup) / (steps - warmup))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor, last_epoch=steps_done - 1)
