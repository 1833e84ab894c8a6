"""Each option once: type, default, limits, help, and where it has a meaning.

The parser, its help, the refusals, --config, --resume and the file format are derived from the
fields of `Settings`. Nothing here touches a file.
"""

import argparse
import math
import os
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, NamedTuple, get_args

from data_sets import DATA_SETS, DataSet
from distiller import (
    ALPHA,
    BETA,
    BETA_SCHEDULE,
    BETA_SCHEDULES,
    MEMBRANE_LOSSES,
    TAU,
    TEACHER_LOGITS,
)
from models.MS_ResNet import BLOCKS
from runtime.command import HelpFormatter, Parser
from runtime.errors import UserError

PAPER_SETTINGS = ("original", "student", "qamd")
SHARED_GPU = "cuda-shared"
IMAGE_SIDES = 8, 1024  # smallest and largest side of an image, pixels
GROUPS = ("what to train", "data", "network", "distillation", "recipe", "running")
Values = Mapping[str, Any]  # settings by name


# Where an option has a meaning: None, or what to say of one that has none with these settings.


def quantized(values: Values) -> str | None:
    return None if values["paper_setting"] != "original" else no_meaning(values)


def distilled(values: Values) -> str | None:
    return None if values["paper_setting"] == "qamd" else no_meaning(values)


def has_teacher(values: Values) -> str | None:
    return None if values["init_from_teacher"] else distilled(values)


def compares_membranes(values: Values) -> str | None:
    if values["loss"] == "CL":
        return "has no meaning with --loss CL: leave it out"
    return distilled(values)


def static_images(values: Values) -> str | None:
    if not DATA_SETS[values["data"]].events:
        return None
    return f"has no meaning with the events of {values['data']}, frames of one T: leave it out"


def no_meaning(values: Values) -> str:
    return f"has no meaning with --paper_setting {values['paper_setting']}: leave it out"


def of_data_set(name: str) -> Callable[[Values], Any]:
    return lambda values: getattr(DATA_SETS[values["data"]], name)


def largest_time_window(values: Values) -> int:
    return max(values.get("time_windows") or (DATA_SETS[values["data"]].time_window,))


def if_distilled(default: Any) -> Callable[[Values], Any]:
    return lambda values: default if values["paper_setting"] == "qamd" else None


class Option(NamedTuple):
    """What is said of an option beside its name and type, which are those of its field.

    default: a value, or a function of the settings that are declared before it; shown: the default
    in words. item: type of a list's values. where: see above. resume: whether --resume may change
    it. config: whether --config takes it over. evaluation: with --eval_only it must "fit" the
    checkpoint, or it is the command's "own", or there "only" has it a meaning; others have none
    there.
    """

    group: str
    help: str
    default: Any = None
    shown: str | None = None
    item: type = str
    choices: Iterable | None = None
    limits: tuple[float, float] | None = None  # the largest are far above any use
    where: Callable[[Values], str | None] | None = None
    resume: bool = False
    config: bool = True
    evaluation: str | None = None
    metavar: str | None = None

    def default_with(self, values: Values) -> Any:
        return self.default(values) if callable(self.default) else self.default

    @property
    def constant_default(self) -> Any:
        return None if callable(self.default) else self.default


def option(group: str, help: str, default: Any = None, *, added: bool = False, **rest: Any) -> Any:
    """A field of Settings. added: there are checkpoints from before it, which have its default."""
    about = {"option": Option(group, help, default, **rest)}
    return field(default=default, metadata=about) if added else field(metadata=about)


def of_evaluation(help: str, default: Any = None, **rest: Any) -> Any:
    """A field that has a meaning with --eval_only alone."""
    help = f"with --eval_only: {help}"
    rest |= {"resume": True, "config": False, "evaluation": "only"}
    return option("running", help, default, **rest)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings of a run, in plain types: written to settings.json and into checkpoints.

    `bits` and what belongs to the loss are None where the paper setting has no such thing.
    """

    data: str = option(
        "what to train", "data set", choices=DATA_SETS, metavar="NAME", evaluation="fit"
    )
    paper_setting: str = option(
        "what to train",
        "original: a full-precision teacher; student: a quantized network; qamd: MD-SNN, a student "
        "distilled from the teacher's membranes",
        choices=PAPER_SETTINGS,
        metavar="SETTING",
        evaluation="fit",
    )

    data_path: str = option(
        "data", "where the data sets lie", "./data", resume=True, evaluation="own", metavar="FOLDER"
    )
    cache_path: str | None = option(
        "data",
        "where caches and converted events go",
        shown="the data path",
        resume=True,
        evaluation="own",
        metavar="FOLDER",
        added=True,
    )
    image_size: str | None = option(  # None: the data set's own
        "data",
        "height and width in pixels, or one side, of data that have several",
        shown="folder 64, ncaltech101 48, nmnist 34, digits-dvs 24",
        metavar="HxW",
        added=True,
    )
    val_share: float = option(
        "data",
        "share of the training images, of each class, that is not trained on: the best checkpoint "
        "is chosen on these, and never on the test images",
        0.0,
        limits=(0, 0.5),
        metavar="SHARE",
        added=True,
    )
    fold: int | None = option(
        "data",
        "cross-validation: test on the K-th of five parts of all images, of training and test, and "
        "train on the others; every five K are another split",
        limits=(0, 10**6),
        evaluation="fit",
        metavar="K",
        added=True,
    )

    model_depth: int = option(
        "network", "layers of the MS-ResNet", 18, choices=BLOCKS, metavar="N", evaluation="fit"
    )
    width: int = option(
        "network",
        "channels of the first stage",
        64,
        limits=(1, 4096),
        metavar="N",
        evaluation="fit",
    )
    time_windows: tuple | None = option(
        "network",
        "train one network for several T: each batch with one of these, in an order drawn from the "
        "seed; evaluated at the largest; of static images alone",
        item=int,
        limits=(1, 1024),
        where=static_images,
        metavar="T",
        added=True,
    )
    time_window: int = option(
        "network",
        "timesteps T",
        largest_time_window,
        shown="4; events 10",
        limits=(1, 1024),
        metavar="T",
        evaluation="own",
    )
    bits: int | None = option(
        "network",
        "width of weights and membrane potentials, 2 to 8; needed by student and qamd",
        limits=(2, 8),
        where=quantized,
        metavar="N",
        evaluation="fit",
    )
    bn_bits: int | None = option(
        "network",
        "width of batch norm's scale and shift, 2 to 16",
        lambda values: 8 if values["paper_setting"] != "original" else None,
        shown="8",
        limits=(2, 16),
        where=quantized,
        metavar="N",
        evaluation="fit",
    )

    init_from_teacher: bool = option(
        "distillation",
        "start from the teacher's weights instead of from scratch",
        False,
        where=quantized,
    )
    teacher_path: str | None = option(
        "distillation",
        "checkpoint of an original run, needed by qamd",
        where=has_teacher,
        resume=True,  # the file is compared, not its path
        metavar="CKPT",
    )
    loss: str | None = option(
        "distillation",
        "cross-entropy and logits, and of the membranes the KL divergence (CLK), the squared "
        "difference (CLM) or nothing (CL)",
        if_distilled("CLK"),
        shown="CLK",
        choices=MEMBRANE_LOSSES,
        where=distilled,
        metavar="LOSS",
    )
    alpha: float | None = option(
        "distillation",
        "weight of the logit loss",
        if_distilled(ALPHA),
        shown=f"{ALPHA:g}",
        limits=(0, 1e6),
        where=distilled,
        metavar="X",
    )
    beta: float | None = option(
        "distillation",
        "weight of the membrane loss",
        lambda values: BETA.get(values["loss"]),
        shown=f"CLK {BETA['CLK']:g}, CLM {BETA['CLM']:g}",
        limits=(0, 1e6),
        where=compares_membranes,
        metavar="X",
    )
    tau: float | None = option(
        "distillation",
        "temperature of the logit loss",
        if_distilled(TAU),
        shown=f"{TAU:g}",
        limits=(1e-3, 1e3),
        where=distilled,
        metavar="X",
    )
    beta_schedule: str | None = option(
        "distillation",
        "how beta goes over the epochs",
        if_distilled(BETA_SCHEDULE),
        shown=BETA_SCHEDULE,
        choices=BETA_SCHEDULES,
        where=compares_membranes,
        metavar="NAME",
    )

    teacher_logits: str = option(
        "distillation",
        "timesteps of a static image that the teacher's logits are the mean of: its own T or the "
        "student's",
        TEACHER_LOGITS,
        choices=("own", "student"),
        where=lambda values: distilled(values) or static_images(values),
        metavar="NAME",
        added=True,
    )

    epochs: int = option(
        "recipe",
        "passes over the training images",
        100,
        limits=(1, 10**6),
        resume=True,
        metavar="N",
    )
    batch_size: int = option(
        "recipe",
        "images of a step, split over the processes",
        of_data_set("batch_size"),
        shown="256; digits and nmnist 64, other events 32",
        limits=(1, 2**20),
        evaluation="own",
        metavar="N",
    )
    accumulate: int = option(
        "recipe",
        "equal parts in which a process takes its share of a batch, for less memory",
        1,
        limits=(1, 2**20),
        metavar="N",
        added=True,
    )
    lr: float = option(
        "recipe",
        "learning rate at its highest; it falls in a cosine to 0",
        0.1,
        limits=(0, 1e3),
        metavar="X",
    )
    warmup: int = option(
        "recipe",
        "first epochs, in which the learning rate rises evenly with every step",
        0,
        limits=(0, 10**6),
        metavar="EPOCHS",
        added=True,
    )
    weight_decay: float = option(
        "recipe", "none on batch norm and steps", 1e-4, limits=(0, 1e3), metavar="X"
    )
    clip_grad: float = option(
        "recipe",
        "largest gradient norm; 0: any",
        lambda values: 5.0 if values["paper_setting"] == "qamd" else 1.0,
        shown="1; qamd 5",
        limits=(0, 1e6),
        metavar="X",
    )
    label_smoothing: float = option(
        "recipe",
        "share of the target that goes to all classes alike, in training's cross-entropy",
        0.0,
        limits=(0, 0.9),
        metavar="SHARE",
        added=True,
    )
    augment: str = option(
        "recipe",
        "basic: crop and flip, events roll, rotate or shear; auto: AutoAugment and cutout too; "
        "none",
        "basic",
        choices=("basic", "auto", "none"),
        metavar="NAME",
        added=True,
    )
    seed: int = option(
        "recipe", "of weights, order, augmentation", 0, limits=(0, 2**63 - 1), metavar="N"
    )

    save_path: str = option(
        "running",
        "where checkpoints and logs go",
        shown="./checkpoints/RUN, named after the settings",
        resume=True,
        config=False,
        metavar="FOLDER",
    )
    resume: bool = option(
        "running",
        "go on from SETTING-last.pth in the save path if there is one, else start",
        False,
        resume=True,
        config=False,
        added=True,
    )
    overwrite: bool = option(
        "running",
        "start anew; a run of an epoch or more that is there is moved to SAVE_PATH.1 (.2, …)",
        False,
        resume=True,
        config=False,
        added=True,
    )
    save_every: int | None = option(
        "running",
        "save every N steps too, not only every epoch",
        limits=(1, 10**9),
        resume=True,
        metavar="N",
        added=True,
    )
    dry_run: bool = option(
        "running",
        "check all, run three steps and say what time and memory the run takes; no file of it is "
        "left (what is made of the data stays: it is needed anyway)",
        False,
        resume=True,
        config=False,
        added=True,
    )
    eval_only: str | None = option(
        "running",
        "print the test accuracy of a checkpoint and stop",
        resume=True,
        config=False,
        evaluation="own",
        metavar="CKPT",
    )
    integer: bool = of_evaluation("also with integers alone", False)
    per_class: bool = of_evaluation(
        "also the accuracy of each class and the confusion matrix, as CSV, PNG and PDF",
        False,
        added=True,
    )
    out: str | None = of_evaluation(
        "folder of what --per_class writes",
        shown="CKPT without .pth, and -classes",
        metavar="FOLDER",
        added=True,
    )
    predict: tuple | None = of_evaluation(
        "instead of the accuracy the likeliest classes of these images, or files of events",
        metavar="FILE",
        added=True,
    )
    json: bool = option(
        "running",
        "with --eval_only or --dry_run: print one JSON object, and nothing else",
        False,
        resume=True,
        config=False,
        evaluation="only",
        added=True,
    )
    workers: int = option(
        "running",
        "loaders of each process",
        min(4, os.cpu_count() or 1),
        shown="4, or a machine's fewer cores",
        limits=(0, 256),
        resume=True,
        evaluation="own",
        metavar="N",
    )
    device: str = option(
        "running",
        f"cpu, cuda, auto: a GPU where there is one, or {SHARED_GPU}: more processes than GPUs, to "
        "try it",
        "auto",
        choices=("auto", "cpu", "cuda", SHARED_GPU),
        resume=True,
        evaluation="own",
        metavar="NAME",
    )
    amp: bool = option(
        "running",
        "bf16 autocast; membranes and losses stay in float32",
        False,
        choices=("bf16",),
        evaluation="own",
    )
    compile: bool = option(
        "running",
        "fused kernels; compiling takes up to a minute",
        False,
        resume=True,
        evaluation="own",
        added=True,
    )
    deterministic: bool = option(
        "running", "same seed, same numbers", False, resume=True, evaluation="own"
    )
    check_numerics: bool = option(
        "running",
        "slow: stop at the first layer with NaN or infinite numbers, with its name",
        False,
        resume=True,
        added=True,
    )

    # What is found, not given.
    classes: tuple | None = None  # names, of a folder; None: the data set's own
    # What one code of event frames stands for, found from the training data; None: they are codes.
    input_step: float | None = None

    @classmethod
    def of(cls, data: str, paper_setting: str = "original", **given: Any) -> "Settings":
        """Settings with the default of every other option, not checked."""
        return cls(**complete({"data": data, "paper_setting": paper_setting} | given))

    @property
    def trained_at(self) -> tuple[int, ...]:
        """Every T that it is trained with, the largest last."""
        return self.time_windows or (self.time_window,)


OPTIONS: dict[str, Option] = {
    x.name: x.metadata["option"] for x in fields(Settings) if "option" in x.metadata
}
TYPES: dict[str, tuple[type, ...]] = {  # get_args of a plain type is empty
    x.name: get_args(x.type) or (x.type,) for x in fields(Settings)
}
LIMITS = {name: x.limits for name, x in OPTIONS.items() if x.limits is not None}
# What may differ between a run and the one that goes on with it: how it runs, how long, and where
# its files are.
MAY_CHANGE = {name for name, x in OPTIONS.items() if x.resume}


def is_flag(name: str) -> bool:
    return TYPES[name] == (bool,)


EXAMPLES = """\
examples:
  python main.py --data digits --paper_setting original --save_path teacher
  torchrun --nproc_per_node=2 main.py --data digits --paper_setting qamd \\
      --bits 4 --teacher_path teacher/original-best.pth --save_path md-snn
  python main.py --eval_only md-snn/qamd-best.pth --integer
"""


def build_parser() -> Parser:
    """Its result holds what was given, and nothing else."""
    parser = Parser(
        prog="main.py",
        usage="main.py --data NAME --paper_setting SETTING [options]\n"
        "       main.py --config settings.json [options]\n"
        "       main.py --eval_only CKPT [options]",
        description="Train and evaluate spiking networks: teacher, quantized student, MD-SNN.",
        epilog=EXAMPLES,
        formatter_class=HelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        add_help=False,
    )
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    for name, about in OPTIONS.items():
        add = groups[about.group].add_argument
        text, default = about.help, about.shown or about.constant_default
        if about.choices and not is_flag(name) and not all(str(x) in text for x in about.choices):
            text += f": {', '.join(map(str, about.choices))}"
        if default is not None and default is not False:
            text += f" (default {default if isinstance(default, str) else format(default, 'g')})"
        text = text.replace("%", "%%")
        if TYPES[name][0] is tuple:
            add(f"--{name}", nargs="+", type=about.item, metavar=about.metavar, help=text)
        elif not is_flag(name):
            kind, choices, metavar = TYPES[name][0], about.choices, about.metavar
            add(f"--{name}", type=kind, choices=choices, metavar=metavar, help=text)
        elif about.choices:  # a flag that may say its one choice
            (choice,) = about.choices
            add(f"--{name}", nargs="?", choices=[choice], const=choice, metavar=choice, help=text)
        else:
            add(f"--{name}", action="store_true", help=text)
        if is_flag(name) and about.config:
            hidden = {"action": "store_false", "help": argparse.SUPPRESS}
            parser.add_argument(f"--no_{name}", dest=name, **hidden)
    not_taken = ", ".join(f"--{name}" for name, about in OPTIONS.items() if not about.config)
    groups["what to train"].add_argument(
        "--config",
        metavar="settings.json",
        help="take over the options of the run that left this file; what is given on the command "
        f"line goes first, and --no_X takes a flag X back. Of that run alone are {not_taken}",
    )
    groups["running"].add_argument("-h", "--help", action="help", help="print this")
    # torch.distributed.launch passes one of these; the environment says the same.
    parser.add_argument("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)
    return parser


def complete(given: Values, may_drop: Iterable[str] = ()) -> dict[str, Any]:
    """The value of each option: the given one, or its default. One of `may_drop` that has no
    meaning here is as if not given."""
    values: dict[str, Any] = {}
    for name, about in OPTIONS.items():
        values[name] = given.get(name)
        if name in may_drop and about.where is not None and about.where(values) is not None:
            values[name] = None
        if values[name] is None:
            values[name] = about.default_with(values)
    return values


def check_value(name: str, value: Any) -> None:
    """Raises UserError where a number, or one of a list, is outside what the program can do."""
    if name in LIMITS and value is not None:
        low, high = LIMITS[name]
        several = isinstance(value, tuple)
        if several and not value:  # of a file, as are other types
            raise UserError(f"--{name} is empty")
        for x in value if several else (value,):
            if several and type(x) is not OPTIONS[name].item:
                raise UserError(f"--{name} cannot hold {reprlib.repr(x)}")
            if not low <= x <= high:
                raise UserError(f"--{name} must be between {low} and {high}, got {x}")


def as_text(value: Any) -> str:
    """A setting as it is typed."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def check_settings(settings: Settings) -> None:
    """Raises UserError where a value is outside what the program can do."""
    for name, value in asdict(settings).items():
        check_value(name, value)
    if settings.warmup >= settings.epochs:
        raise UserError(
            f"--warmup {settings.warmup} leaves nothing of --epochs {settings.epochs}: it must be "
            "less"
        )
    if settings.image_size is not None:
        parse_image_size(settings.image_size)
    if settings.time_windows is not None:
        windows, given = settings.time_windows, as_text(settings.time_windows)
        if len(windows) < 2 or list(windows) != sorted(set(windows)):
            raise UserError(f"--time_windows {given}: give two T or more, each once")
        if settings.time_window != windows[-1]:
            raise UserError(
                f"--time_window {settings.time_window} is not the largest of --time_windows "
                f"{given}: leave it out"
            )
    for name in ("data_path", "save_path", "cache_path", "out"):
        path = getattr(settings, name) or ""
        if any(ord(character) < 32 for character in path):
            raise UserError(f"--{name} holds a control character")
        if any("\ud800" <= character <= "\udfff" for character in path):
            raise UserError(f"--{name} {path!r} is not in UTF-8")


def describes_a_network(settings: Settings) -> bool:
    """Whether settings of a file, whose types and limits are checked, fit each other."""
    values = asdict(settings)
    for name, about in OPTIONS.items():
        value = values[name]
        if about.choices and not is_flag(name) and value is not None and value not in about.choices:
            return False
    dependent = [name for name, x in OPTIONS.items() if callable(x.default) and x.where]
    data_set, step = DATA_SETS[settings.data], settings.input_step
    return (
        all((values[x] is None) == (OPTIONS[x].default_with(values) is None) for x in dependent)
        and (settings.bits is None) == (settings.bn_bits is None)
        and (settings.classes is None) == (settings.data != "folder")
        and all(type(name) is str for name in settings.classes or ())
        and len(settings.classes or "ab") >= 2
        and (settings.image_size is None or data_set.any_size)
        and (settings.time_windows is None or not data_set.events)
        and (step is None or (data_set.events and 0 < step < math.inf))
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


def input_step_of(settings: Settings) -> float | None:
    """What one code of event frames stands for in a trained network; None of images."""
    data_set = DATA_SETS[settings.data]
    return (settings.input_step or data_set.image_step) if data_set.events else None


def data_set_of(settings: Settings) -> DataSet:
    """What the settings say of their data set, over what DATA_SETS does."""
    data_set = DATA_SETS[settings.data]
    if settings.image_size is not None:
        data_set = replace(data_set, image_size=parse_image_size(settings.image_size))
    if settings.classes is not None:
        data_set = replace(data_set, num_classes=len(settings.classes))
    return data_set
