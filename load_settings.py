"""From the command line to checked settings, networks and the training recipe.

Every mistake in the arguments is found here, before data or networks are touched.
"""

import argparse
import errno
import hashlib
import math
import os
import pickletools
import re
import reprlib
import stat
import tempfile
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

from distiller import ALPHA, BETA, BETA_SCHEDULE, BETA_SCHEDULES, MEMBRANE_LOSSES, TAU
from models import MSResNet, QuanMSResNet
from models.MS_ResNet import BLOCKS


class UserError(Exception):
    """A mistake of the user's: its text is the one line that says what is wrong and what to do."""


@dataclass(frozen=True)
class DataSet:
    """What a network must know of a data set, and its recipe's defaults."""

    num_classes: int
    in_channels: int
    image_size: tuple[int, int]  # pixels, height and width
    image_step: float  # what one code of the 8-bit input stands for to the network
    time_window: int
    batch_size: int
    events: bool = False  # frames (T, C, H, W) instead of one image (C, H, W)
    any_size: bool = False  # --image_size may say another one


DATA_SETS = {
    "CIFAR10": DataSet(10, 3, (32, 32), 1 / 255, time_window=4, batch_size=256),
    "CIFAR100": DataSet(100, 3, (32, 32), 1 / 255, time_window=4, batch_size=256),
    "TinyImagenet": DataSet(200, 3, (64, 64), 1 / 255, time_window=4, batch_size=256),
    "ncaltech101": DataSet(101, 2, (48, 48), 1.0, 10, 32, events=True, any_size=True),
    "digits": DataSet(10, 1, (16, 16), 1 / 255, time_window=4, batch_size=64),
    "digits-dvs": DataSet(10, 2, (24, 24), 1.0, 10, 32, events=True, any_size=True),
    # The classes are those of the folder, in Settings.classes.
    "folder": DataSet(0, 3, (64, 64), 1 / 255, time_window=4, batch_size=256, any_size=True),
}
AUGMENTATIONS = ("basic", "auto", "none")
PAPER_SETTINGS = ("original", "student", "qamd")
OF_DISTILLATION = ("loss", "alpha", "beta", "tau", "beta_schedule")
BN_BITS = 8
SHARED_GPU = "cuda-shared"
CLIP_GRAD, CLIP_GRAD_QAMD = 1.0, 5.0
LIMITS = {  # smallest and largest value; the largest are far above any use
    "width": (1, 4096),
    "time_window": (1, 1024),
    "bits": (2, 8),
    "bn_bits": (2, 16),
    "alpha": (0, 1e6),
    "beta": (0, 1e6),
    "tau": (1e-3, 1e3),
    "batch_size": (1, 2**20),
    "accumulate": (1, 2**20),
    "epochs": (1, 10**6),
    "lr": (0, 1e3),
    "weight_decay": (0, 1e3),
    "clip_grad": (0, 1e6),
    "seed": (0, 2**63 - 1),
    "workers": (0, 256),
    "save_every": (1, 10**9),
}
MOST_TUPLES = 20_000  # in a checkpoint: four a tensor, and few besides
IMAGE_SIDES = 8, 1024  # smallest and largest side of an image, pixels


@dataclass(frozen=True)
class Settings:
    """All settings of a run, in plain types: written to settings.json and into checkpoints.

    `bits` and what belongs to the loss are None where the paper setting has no such thing.
    """

    data: str
    paper_setting: str
    model_depth: int
    width: int
    time_window: int
    bits: int | None
    bn_bits: int | None
    loss: str | None
    alpha: float | None
    beta: float | None
    tau: float | None
    beta_schedule: str | None
    init_from_teacher: bool
    teacher_path: str | None
    batch_size: int
    epochs: int
    lr: float
    weight_decay: float
    clip_grad: float
    seed: int
    data_path: str
    save_path: str
    eval_only: str | None
    integer: bool
    workers: int
    device: str
    amp: bool
    deterministic: bool
    # A setting that is added has a default, so that checkpoints of before can still be read.
    accumulate: int = 1
    compile: bool = False
    augment: str = "basic"
    image_size: str | None = None  # "HxW"; None: the data set's own
    classes: tuple | None = None  # names, of a folder; None: the data set's own
    resume: bool = False
    save_every: int | None = None
    check_numerics: bool = False
    overwrite: bool = False
    # What one code of event frames stands for, found from the training data; None: they are codes.
    input_step: float | None = None
    cache_path: str | None = None  # None: the data path


class Checkpoint(NamedTuple):
    """What `load_checkpoint` has read and checked; `model` fits `build_network(settings)`."""

    settings: Settings
    model: dict[str, Tensor]
    epoch: int
    accuracy: float
    rest: dict[str, Any]  # all of the file, not checked: --resume does that


class Parser(argparse.ArgumentParser):
    """A parser whose errors are UserErrors, without the usage."""

    def error(self, message: str) -> None:
        raise UserError(message)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="main.py",
        description="Train a full-precision teacher (original), a quantized student (student) or "
        "MD-SNN, a quantized student distilled from the teacher's membrane potentials (qamd).",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--data", choices=DATA_SETS, help="data set")
    add("--paper_setting", choices=PAPER_SETTINGS, help="what to train")
    add("--model_depth", type=int, choices=BLOCKS, help="18 or 34 (default 18)")
    add("--width", type=int, help="channels of the first stage (default 64)")
    add("--time_window", type=int, help="timesteps T (default 4; ncaltech101, digits-dvs 10)")
    add("--image_size", help="HxW or one side, for folder (64), ncaltech101 (48), digits-dvs (24)")
    add(
        "--augment",
        choices=AUGMENTATIONS,
        default="basic",
        help="basic: crop and flip, events roll, rotate or shear; auto: AutoAugment and cutout too",
    )
    add("--bits", type=int, help="width of weights and membrane potentials, 2 to 8")
    add("--bn_bits", type=int, help="width of batch norm's scale and shift, 2 to 16 (default 8)")
    add("--loss", choices=MEMBRANE_LOSSES, help="only with qamd: CLK (default), CLM or CL")
    add("--alpha", type=float, help=f"weight of the logit loss (default {ALPHA})")
    add("--beta", type=float, help=f"weight of the membrane loss (default {BETA})")
    add("--tau", type=float, help=f"temperature of the logit loss (default {TAU})")
    add(
        "--beta_schedule",
        choices=BETA_SCHEDULES,
        help=f"how beta falls over the epochs (default {BETA_SCHEDULE})",
    )
    add("--teacher_path", help="checkpoint of an original run, for qamd")
    add(
        "--init_from_teacher",
        action="store_true",
        help="start the student from the teacher's weights instead of from scratch",
    )
    add(
        "--batch_size",
        type=int,
        help="global batch, split over the processes (256; events 32, digits 64)",
    )
    add(
        "--accumulate",
        type=int,
        default=1,
        help="equal parts in which a process takes its share of a batch, for less memory (1)",
    )
    add("--epochs", type=int, default=100, help="default 100")
    add("--lr", type=float, default=0.1, help="at the start; cosine to 0 (default 0.1)")
    add("--weight_decay", type=float, default=1e-4, help="none on batch norm and steps")
    add(
        "--clip_grad",
        type=float,
        help=f"largest gradient norm (default {CLIP_GRAD}, with qamd {CLIP_GRAD_QAMD}; 0: any)",
    )
    add("--seed", type=int, default=0, help="default 0")
    add("--data_path", default="./data", help="where the data sets lie (default ./data)")
    add("--cache_path", help="where caches and converted events go (default: the data path)")
    add("--save_path", help="where checkpoints and logs go (default ./checkpoints/RUN)")
    add(
        "--resume",
        action="store_true",
        help="go on from SETTING-last.pth in the save path if there is one, else start",
    )
    add(
        "--overwrite",
        action="store_true",
        help="start anew; a run of an epoch or more that is there is moved to SAVE_PATH.1 (.2, …)",
    )
    add("--save_every", type=int, metavar="N", help="save every N steps too, not only every epoch")
    add("--eval_only", metavar="CKPT", help="print the test accuracy of a checkpoint and stop")
    add("--integer", action="store_true", help="with --eval_only: also with integers alone")
    workers = min(4, os.cpu_count() or 1)
    add(
        "--workers",
        type=int,
        default=workers,
        help="loaders of each process (4; fewer cores: less)",
    )
    add(
        "--device",
        choices=("auto", "cpu", "cuda", SHARED_GPU),
        default="auto",
        help=f"auto: a GPU where there is one; {SHARED_GPU}: more processes than GPUs, to try it",
    )
    add(
        "--amp",
        nargs="?",
        choices=("bf16",),
        const="bf16",
        help="bf16 autocast; membranes and losses stay in float32",
    )
    add("--compile", action="store_true", help="fused kernels; compiling takes up to a minute")
    add("--deterministic", action="store_true", help="same seed, same numbers")
    add(
        "--check_numerics",
        action="store_true",
        help="slow: stop at the first layer with NaN or infinite numbers, with its name",
    )
    # torch.distributed.launch passes one of these; the environment says the same.
    add("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)
    return parser


def parse_settings(argv: Sequence[str] | None = None, world_size: int = 1) -> Settings:
    """Checked settings of a command line. Raises UserError for whatever is wrong with it."""
    args = _parser().parse_args(argv)
    args.amp = args.amp is not None  # bf16 is the only narrow type there is
    settings = _training_settings(args) if args.eval_only is None else _evaluation_settings(args)
    check_settings(settings)
    if settings.eval_only is None and settings.batch_size % world_size:
        raise UserError(
            f"--batch_size {settings.batch_size} is the global batch and does not divide evenly "
            f"over {world_size} processes"
        )
    share = settings.batch_size // world_size
    if settings.eval_only is None and share % settings.accumulate:
        raise UserError(
            f"--accumulate {settings.accumulate} does not divide the {share} images that each "
            f"process takes of --batch_size {settings.batch_size}"
        )
    if settings.eval_only is None:
        refuse_single_values(settings, world_size)
    if settings.device not in ("auto", "cpu") and not torch.cuda.is_available():
        raise UserError(
            f"--device {settings.device}: this machine has no usable GPU; use --device cpu"
        )
    if settings.eval_only is None:
        if settings.teacher_path is not None:
            _check_teacher(settings)
        if not settings.save_path:
            settings = replace(settings, save_path=f"./checkpoints/{run_name(settings)}")
        check_writable(settings.save_path)
    return settings


def _training_settings(args: argparse.Namespace) -> Settings:
    if args.integer:
        raise UserError("--integer goes with --eval_only CKPT")
    for required in ("data", "paper_setting"):
        if getattr(args, required) is None:
            raise UserError(f"--{required} is required")
    quantized, distilled = args.paper_setting != "original", args.paper_setting == "qamd"

    def only_where(allowed: bool, name: str, setting: str) -> None:
        if not allowed and getattr(args, name) not in (None, False):
            raise UserError(f"--{name} has no meaning with --paper_setting {setting}: leave it out")

    for name in ("bits", "bn_bits", "init_from_teacher"):
        only_where(quantized, name, args.paper_setting)
    for name in OF_DISTILLATION:
        only_where(distilled, name, args.paper_setting)
    for name in ("beta", "beta_schedule"):
        if args.loss == "CL" and getattr(args, name) is not None:
            raise UserError(f"--{name} has no meaning with --loss CL: leave it out")
    only_where(distilled or args.init_from_teacher, "teacher_path", args.paper_setting)
    if quantized and args.bits is None:
        raise UserError(f"--paper_setting {args.paper_setting} needs --bits, 2 to 8")
    if (distilled or args.init_from_teacher) and args.teacher_path is None:
        raise UserError("--teacher_path is required: the original-best.pth of an original run")

    def default(name: str, value: Any) -> Any:
        return value if getattr(args, name) is None else getattr(args, name)

    loss = default("loss", "CLK") if distilled else None
    data_set = DATA_SETS[args.data]
    if args.augment == "auto" and data_set.in_channels != 3:
        raise UserError(f"--augment auto is made for colour images: {args.data} has none")
    is_folder = args.data == "folder"
    if args.resume and args.overwrite:
        raise UserError("--resume goes on, --overwrite starts anew: leave one of the two out")
    return Settings(
        data=args.data,
        paper_setting=args.paper_setting,
        model_depth=default("model_depth", 18),
        width=default("width", 64),
        time_window=default("time_window", data_set.time_window),
        bits=args.bits,
        bn_bits=default("bn_bits", BN_BITS) if quantized else None,
        loss=loss,
        alpha=default("alpha", ALPHA) if distilled else None,
        beta=default("beta", BETA[loss]) if distilled else None,
        tau=default("tau", TAU) if distilled else None,
        beta_schedule=default("beta_schedule", BETA_SCHEDULE) if distilled else None,
        init_from_teacher=args.init_from_teacher,
        teacher_path=args.teacher_path,
        batch_size=default("batch_size", data_set.batch_size),
        accumulate=args.accumulate,
        epochs=args.epochs,
        lr=args.lr,
        weight_decay=args.weight_decay,
        clip_grad=default("clip_grad", CLIP_GRAD_QAMD if distilled else CLIP_GRAD),
        seed=args.seed,
        data_path=args.data_path,
        save_path=args.save_path or "",  # the default needs the teacher
        eval_only=None,
        integer=False,
        workers=args.workers,
        device=args.device,
        amp=args.amp,
        compile=args.compile,
        deterministic=args.deterministic,
        augment=args.augment,
        image_size=_other_image_size(args.image_size, args.data),
        classes=tuple(classes_of_folder(args.data_path)) if is_folder else None,
        resume=args.resume,
        save_every=args.save_every,
        check_numerics=args.check_numerics,
        overwrite=args.overwrite,
        cache_path=args.cache_path,
    )


def _evaluation_settings(args: argparse.Namespace) -> Settings:
    """The settings that the checkpoint was trained with, and this command's of how to run."""
    trained = load_checkpoint(args.eval_only).settings
    size = data_set_of(trained).image_size
    if args.image_size is not None and parse_image_size(args.image_size) != size:
        raise UserError(
            f"--image_size {args.image_size} does not fit {args.eval_only}: it was trained with "
            "{}x{}".format(*size)
        )
    of_network = ("data", "paper_setting", "model_depth", "width", "time_window", "bits", "bn_bits")
    for name in of_network:
        if getattr(args, name) not in (None, getattr(trained, name)):
            raise UserError(
                f"--{name} {getattr(args, name)} does not fit {args.eval_only}: "
                f"it was trained with {getattr(trained, name)}"
            )
    here = (
        "eval_only",
        "integer",
        "data_path",
        "cache_path",
        "workers",
        "device",
        "amp",
        "compile",
        "deterministic",
    )
    known = (*of_network, *here, "image_size", "batch_size", "local_rank")
    parser = _parser()
    for name, value in vars(args).items():
        meaningless = value not in (parser.get_default(name), getattr(trained, name, None))
        if name not in known and meaningless:
            raise UserError(f"--{name} has no meaning with --eval_only: leave it out")
    if args.integer and trained.bits is None:
        raise UserError(f"--integer: {args.eval_only} is a full-precision network")
    check_classes(trained, args.data_path, args.eval_only)
    if args.cache_path is None and args.data_path == trained.data_path:
        args.cache_path = trained.cache_path
    batch_size = trained.batch_size if args.batch_size is None else args.batch_size
    return replace(
        trained,
        batch_size=batch_size,
        teacher_path=None,
        **{name: getattr(args, name) for name in here},
    )


def _other_image_size(text: str | None, data: str) -> str | None:
    """The setting image_size of an option: None where it is the data set's own size."""
    data_set = DATA_SETS[data]
    if text is None or parse_image_size(text) == data_set.image_size:
        return None
    if not data_set.any_size:
        raise UserError(
            "--image_size: the images of {} are {}x{}".format(data, *data_set.image_size)
        )
    return "{}x{}".format(*parse_image_size(text))


def run_name(settings: Settings) -> str:
    """Name of the default save path: the network, its teacher's file, and every other setting that
    is no default."""
    # One's own images are told apart by the name of their folder.
    folder = Path(settings.data_path).resolve().name if settings.data == "folder" else None
    teacher = settings.teacher_path and f"teacher{digest(settings.teacher_path)[:6]}"
    parts = [
        settings.data,
        folder,
        settings.paper_setting,
        settings.loss,
        settings.bits and f"{settings.bits}bit",
        teacher and ("from-" if settings.init_from_teacher else "") + teacher,
        f"depth{settings.model_depth}",
        f"width{settings.width}",
        f"T{settings.time_window}",
        settings.image_size,
        settings.amp and "amp",
    ]
    defaults = {
        "bn_bits": BN_BITS,
        "alpha": ALPHA,
        "beta": BETA.get(settings.loss),
        "tau": TAU,
        "beta_schedule": BETA_SCHEDULE,
        "clip_grad": CLIP_GRAD_QAMD if settings.paper_setting == "qamd" else CLIP_GRAD,
        "batch_size": DATA_SETS[settings.data].batch_size,
    }
    parser = _parser()
    for name in ("accumulate", "augment", "epochs", "lr", "weight_decay"):
        defaults[name] = parser.get_default(name)
    for name, default in defaults.items():
        if getattr(settings, name) not in (None, default):
            parts.append(f"{name.replace('_', '-')}{getattr(settings, name)}")
    return "-".join([*(part for part in parts if part), f"seed{settings.seed}"])


def check_settings(settings: Settings) -> None:
    """Raises UserError where a value is outside what the program can do."""
    for name, (low, high) in LIMITS.items():
        value = getattr(settings, name)
        if value is not None and not low <= value <= high:
            raise UserError(f"--{name} must be between {low} and {high}, got {value}")
    if settings.image_size is not None:
        parse_image_size(settings.image_size)
    for name in ("data_path", "save_path", "cache_path"):
        path = getattr(settings, name) or ""
        if any(ord(character) < 32 for character in path):
            raise UserError(f"--{name} holds a control character")
        if any("\ud800" <= character <= "\udfff" for character in path):
            raise UserError(f"--{name} {path!r} is not in UTF-8")


def refuse_single_values(
    settings: Settings, world_size: int, training_images: int | None = None
) -> None:
    """Raises UserError where a part of a training batch gives the batch norms of the last stage a
    single value per channel: that has no variance. None: as many images as a batch takes."""
    images = settings.batch_size
    if training_images is not None:
        images = min(images, training_images)
    # As training_order and add_gradients share them out: equal parts, but for the last.
    share = -(-images // world_size)
    largest = -(-share // settings.accumulate)
    smallest = (share % largest or largest) * world_size  # batch norm's part is all processes'
    size = data_set_of(settings).image_size
    last_stage = [-(-side // 8) for side in size]  # three stages halve it
    if smallest * settings.time_window * math.prod(last_stage) > 1:
        return
    batch = f"--batch_size {settings.batch_size}"
    if images < settings.batch_size:
        batch += f", of which the data set has {images}"
    if settings.accumulate > 1:
        batch += f", in {settings.accumulate} parts (--accumulate)"
    raise UserError(
        "batch norm cannot train on a single value per channel: images of {}x{} are 1x1 in the "
        "last stage, --time_window is 1, and a part of a batch holds one image ({}, on one "
        "process): take more timesteps, larger images or more images a part".format(*size, batch)
    )


def parse_image_size(text: str) -> tuple[int, int]:
    """(height, width) of "HxW", or of one number for both."""
    low, high = IMAGE_SIDES
    sides = re.fullmatch(r"(\d{1,4})(?:x(\d{1,4}))?", text, re.ASCII)
    size = sides and (int(sides[1]), int(sides[2] or sides[1]))
    if not size or not all(low <= side <= high for side in size):
        raise UserError(
            f"--image_size must be HxW or one number, {low} to {high} pixels each, got {text!r}"
        )
    return size


def classes_of_folder(data_path: str | Path) -> list[str]:
    """The classes of --data folder: the names of the folders in train/, in code-point order."""
    root = Path(data_path)
    expected = f"--data folder expects {root}/train/CLASS/* and {root}/val/CLASS/*"
    names = {}
    for part in ("train", "val"):
        try:
            folders = [x.name for x in (root / part).iterdir() if x.is_dir()]
        except OSError as error:
            raise UserError(f"{expected}: cannot read {root / part} ({error.strerror})") from None
        names[part] = sorted(name for name in folders if not name.startswith("."))
    for part, other in (("train", "val"), ("val", "train")):
        missing = sorted(set(names[other]) - set(names[part]))
        if missing:
            raise UserError(
                f"{root / part} lacks {len(missing)} of the classes of {root / other}: "
                f"{', '.join(missing[:5])}{' …' if len(missing) > 5 else ''}"
            )
    if len(names["train"]) < 2:
        raise UserError(f"{expected} with two classes or more, found {len(names['train'])}")
    return names["train"]


def data_set_of(settings: Settings) -> DataSet:
    """What the settings say of their data set, over what DATA_SETS does."""
    data_set = DATA_SETS[settings.data]
    if settings.image_size is not None:
        data_set = replace(data_set, image_size=parse_image_size(settings.image_size))
    if settings.classes is not None:
        data_set = replace(data_set, num_classes=len(settings.classes))
    return data_set


def _check_teacher(settings: Settings) -> None:
    teacher = load_checkpoint(settings.teacher_path).settings
    if teacher.paper_setting != "original":
        raise UserError(
            f"--teacher_path {settings.teacher_path} holds a quantized {teacher.paper_setting} "
            "network: a teacher comes from --paper_setting original"
        )
    for name in ("data", "model_depth", "width", "time_window", "image_size"):
        if getattr(teacher, name) != getattr(settings, name):
            raise UserError(
                f"--teacher_path {settings.teacher_path} was trained with --{name} "
                f"{getattr(teacher, name)}, this run has --{name} {getattr(settings, name)}"
            )
    check_classes(teacher, settings.data_path, settings.teacher_path)


def check_classes(trained: Settings, data_path: str | Path, path: str | Path) -> None:
    """Raises UserError where the folder has other classes than the checkpoint at `path`."""
    if trained.data != "folder":
        return
    here = classes_of_folder(data_path)
    for name in sorted(set(here) ^ set(trained.classes)):
        raise UserError(
            f"{path} was trained on {len(trained.classes)} classes, {data_path} has {len(here)}: "
            f"{name!r} is only in {'the folder' if name in here else 'the checkpoint'}"
        )


def check_writable(folder: str | Path) -> None:
    """Raises UserError where `folder` cannot be made and written into; leaves nothing behind."""
    existing = Path(folder).absolute()
    try:
        while not os.path.lexists(existing):
            existing = existing.parent
        longest = max(len(os.fsencode(part)) for part in Path(folder).absolute().parts)
        if longest > os.pathconf(existing, "PC_NAME_MAX"):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UserError(
            f"cannot write into {folder} ({error.strerror}): choose another --save_path"
        ) from None


def digest(path: str | Path) -> str:
    """SHA-256 of a file, in hex."""
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})") from None


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read and check a checkpoint of main.py, on the CPU, executing nothing that is in it.

    Raises UserError where it is missing, unreadable, truncated or another program's, or where its
    weights do not fit the network that its settings describe.
    """
    not_ours = f"{path} is not a checkpoint of this program"
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # reading a pipe may never end
            raise OSError(errno.EINVAL, "it is no file")
        _refuse_bombs(path)
        with warnings.catch_warnings(action="ignore"):
            content = _plain(torch.load(path, map_location="cpu", weights_only=True))
    except FileNotFoundError:
        raise UserError(f"checkpoint {path} does not exist") from None
    except OSError as error:
        raise UserError(f"cannot read checkpoint {path} ({error.strerror})") from None
    except Exception:  # what torch.load raises depends on where the bytes stop making sense
        raise UserError(f"{not_ours}, or it is truncated") from None

    expected_types = {"settings": dict, "model": dict, "epoch": int, "accuracy": float}
    for name, expected_type in expected_types.items():
        if not isinstance(content, dict) or not isinstance(content.get(name), expected_type):
            raise UserError(f"{not_ours}: it holds no {name}, or another type")
    settings = _settings_from(content["settings"], not_ours)
    _check_weights(content["model"], settings, path)
    return Checkpoint(settings, content["model"], content["epoch"], content["accuracy"], content)


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
        return Tensor.detach(content)
    if type(content) in (str, int, float, bool, type(None)):
        return content
    raise TypeError(f"a {type(content)}")


def _settings_from(saved: dict, not_ours: str) -> Settings:
    known = {field.name: field.default for field in fields(Settings)}
    saved = {name: value for name, value in known.items() if value is not MISSING} | saved
    if set(saved) != set(known):
        raise UserError(f"{not_ours}: its settings are not this version's")
    for field in fields(Settings):
        # type(), because True is an int too; get_args of a plain type is empty
        if type(saved[field.name]) not in (get_args(field.type) or (field.type,)):
            raise UserError(f"{not_ours}: its {field.name} is {reprlib.repr(saved[field.name])}")
    settings = Settings(**saved)
    try:
        check_settings(settings)
    except UserError as error:
        raise UserError(f"{not_ours}: {error}") from None
    quantized, distilled = settings.paper_setting != "original", settings.paper_setting == "qamd"
    if (
        settings.data not in DATA_SETS
        or settings.paper_setting not in PAPER_SETTINGS
        or settings.model_depth not in BLOCKS
        or settings.augment not in AUGMENTATIONS
        or (settings.classes is None) != (settings.data != "folder")
        or not all(type(name) is str for name in settings.classes or ())
        or len(settings.classes or "ab") < 2
        or (settings.image_size is not None and not DATA_SETS[settings.data].any_size)
        or not (settings.input_step is None or 0 < settings.input_step < math.inf)
        or (settings.input_step is not None and not DATA_SETS[settings.data].events)
        or {settings.bits is None, settings.bn_bits is None} != {not quantized}
        or {getattr(settings, name) is None for name in OF_DISTILLATION} != {not distilled}
    ):
        raise UserError(f"{not_ours}: no such network")
    return settings


def _check_weights(model: dict, settings: Settings, path: str | Path) -> None:
    with torch.device("meta"):
        network = build_network(settings).state_dict()
    expected = {name: (x.dtype, tuple(x.shape)) for name, x in network.items()}
    found = {
        name: (x.dtype, tuple(x.shape)) if is_plain_tensor(x) else None for name, x in model.items()
    }
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


def is_plain_tensor(x: Any) -> bool:
    return (
        isinstance(x, Tensor)
        and not x.is_nested
        and x.layout == torch.strided
        and x.device.type == "cpu"
    )


def build_network(settings: Settings) -> MSResNet:
    """The network of the settings, with fresh weights from torch's random state."""
    data_set = data_set_of(settings)
    shape = (
        settings.model_depth,
        data_set.num_classes,
        settings.time_window,
        data_set.in_channels,
        settings.width,
    )
    if settings.paper_setting == "original":
        return MSResNet(*shape)
    return QuanMSResNet(
        *shape, bits=settings.bits, bn_bits=settings.bn_bits, image_step=data_set.image_step
    )


def load_network(checkpoint: Checkpoint) -> MSResNet:
    """The trained network of a checkpoint, in evaluation mode."""
    network = build_network(checkpoint.settings)
    network.load_state_dict(checkpoint.model)
    return network.eval()


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


def build_scheduler(
    optimizer: torch.optim.Optimizer, steps: int, steps_done: int = 0
) -> torch.optim.lr_scheduler.LambdaLR:
    """Cosine from `initial_lr` to 0 over `steps`. The rate depends on the number of the step alone,
    so a resumed run has that of an uninterrupted one, also of one that was given more epochs."""
    cosine = BETA_SCHEDULES["cosine"]
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: cosine(step / steps), last_epoch=steps_done - 1
    )
