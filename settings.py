"""Each option once: type, default, limits, help, and where it has a meaning.

The parser, its help, the refusals, --config, --resume and the file format are derived from the
fields of `Settings`. Nothing here touches a file.
"""

import argparse
import math
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import cache, partial
from typing import Any, NamedTuple, get_args

from data_sets import DATA_SETS, DataSet
from data_sets.recordings import LARGEST_SENSOR, SPLITS
from distiller import (
    ALPHA,
    BETA,
    BETA_SCHEDULE,
    BETA_SCHEDULES,
    MEMBRANE_LOSSES,
    TAU,
)
from models import NETWORKS
from models.MS_ResNet import BLOCKS
from models.neuron import DEFAULT_NEURON, RESETS, SURROGATES, Neuron
from runtime.command import HelpFormatter, Parser, wrong_choice
from runtime.errors import UserError
from runtime.processes import usable_cores
from spikesim_eval.chip import OPTIONS as CHIP_OPTIONS
from spikesim_eval.chip import Chip, about_option, chips, options_of
from spikesim_eval.technology import load_technology
from spikesim_eval.technology_keys import OF_OPTIONS

PAPER_SETTINGS = ("original", "student", "qamd")
SHARED_GPU = "cuda-shared"
MS_RESNETS = {f"resnet{depth}": depth for depth in BLOCKS}  # --arch says the same as --model_depth
OWN_NETWORK = "FILE.py:CLASS"
IMAGE_SIDES = 8, 1024  # smallest and largest side of an image, pixels
Values = Mapping[str, Any]  # settings by name


# Where an option has a meaning: None, or what to say of one that has none with these settings.


def needs(name: str, *of_these: Any) -> Callable[[Values], str | None]:
    def refusal(values: Values) -> str | None:
        if values[name] in of_these:
            return None
        return f"has no meaning with --{name} {values[name]}: leave it out"

    return refusal


quantized, distilled = needs("paper_setting", "student", "qamd"), needs("paper_setting", "qamd")


def of_ms_resnet(values: Values) -> str | None:
    if values["arch"] is None or values["arch"] in MS_RESNETS:
        return None
    return f"has no meaning with --arch {values['arch']}: leave it out"


def has_teacher(values: Values) -> str | None:
    return None if values["init_from_teacher"] else distilled(values)


def compares_membranes(values: Values) -> str | None:
    """A loss of one's own that nobody has named here, of a checkpoint, does too."""
    refusal, loss = distilled(values), values["loss"]
    if refusal is None and MEMBRANE_LOSSES.get(loss, True) is None:
        return f"has no meaning with --loss {loss}: leave it out"
    return refusal


def static_images(values: Values) -> str | None:
    if not DATA_SETS[values["data"]].events:
        return None
    return f"has no meaning with the events of {values['data']}, frames of one T: leave it out"


def of_events(values: Values) -> str | None:
    if DATA_SETS[values["data"]].events:
        return None
    return f"has no meaning with the images of {values['data']}: leave it out"


def any_size(values: Values) -> str | None:
    """Also the one size of others."""
    data_set, given = DATA_SETS[values["data"]], values["image_size"]
    if data_set.any_size or given is None or parse_image_size(given) == data_set.image_size:
        return None
    size = "{}x{}".format(*data_set.image_size)
    return f"has no meaning with --data {values['data']}, whose images are {size}: leave it out"


def for_a_chip(values: Values) -> str | None:
    return quantized(values) or (None if values["crossbar"] else "goes with --crossbar TECHNOLOGY")


def if_distilled(default: Any) -> Callable[[Values], Any]:
    return lambda values: default if values["paper_setting"] == "qamd" else None


class Option(NamedTuple):
    """What is said of an option beside its name and type, which are those of its field.

    traits: words. "resume": --resume may change it. "alone": of one run alone, --config does not
    take it over. With --eval_only it must "fit" the checkpoint, or it is the command's "own", or
    "only" there has it a meaning; others have none there. "added": there are checkpoints from
    before it, which have its default. "later": also of networks trained for a chip, which had what
    is a chip's default (`before_it`).
    name: its place in the name of a run, and its form there; None: "NAMEvalue" where it is no
    default. Runs of older versions are found by their names: both stay. What is new comes after,
    where --resume may not change it, without a word.
    """

    group: str  # of --help
    text: str  # Markdown; {limits} stands for those
    default: Any = None  # or a function of the settings that are declared before it
    traits: str = ""
    shown: str | None = None  # the default in words
    item: type = str  # of a list's values
    choices: Iterable | None = None
    limits: tuple[float, float] | None = None  # the largest are far above any use
    where: Callable[[Values], str | None] | None = None  # see above
    needed: str | None = None  # what to say where it has a meaning and no value
    metavar: str | None = None
    name: tuple[int, str | None] | None = None

    def has(self, trait: str) -> bool:
        return trait in self.traits.split()

    def default_with(self, values: Values) -> Any:
        return self.default(values) if callable(self.default) else self.default

    @property
    def constant_default(self) -> Any:
        return None if callable(self.default) else self.default

    def refusal(self, values: Values) -> str | None:
        """What to say of it where it has no meaning with these settings."""
        return None if self.where is None else self.where(values)

    def meaning(self) -> str:
        """What it is, in Markdown: its text, limits and choices."""
        low, high = self.limits or (0, 0)
        text = self.text.format(limits=f"{low:g} to {high:g}")
        choices = [f"`{choice}`" for choice in self.choices or ()]
        return text if all(x in text for x in choices) else f"{text}: {', '.join(choices)}"

    def default_text(self) -> str | None:
        default = self.shown or self.constant_default
        if default is None or default is False:
            return None
        return default if isinstance(default, str) else format(default, "g")


def option(group: str, text: str, default: Any = None, traits: str = "", **rest: Any) -> Any:
    """A field of Settings."""
    about = Option(group, text, default, traits, **rest)
    how = {"default": about.constant_default} if about.has("added") else {}
    return field(metadata={"option": about}, **how)


def of_chip(name: str, traits: str = "added") -> Any:
    """An option of the chip that a network is trained for, as `Chip` declares it; by default the
    technology's. Chip checks its values."""
    about = CHIP_OPTIONS[name]
    shown = {"": "none", math.inf: "infinite"}.get(about.default, f"{about.default}")
    return option(
        "chip",
        about_option(about).replace("%%", "%"),
        lambda values: None if for_a_chip(values) else chip_defaults(values["crossbar"])[name],
        traits,
        choices=about.metadata["choices"] or None,
        where=for_a_chip,
        shown=f"{shown}, or the technology's" if name in OF_OPTIONS else shown,
    )


@cache
def chip_defaults(technology: str) -> dict[str, Any]:
    """The options of a chip of this technology. Raises UserError where there is none of its name,
    and no file."""
    return vars(Chip(**options_of(load_technology(technology))))


of_task, of_data = partial(option, "what to train"), partial(option, "data")
of_network, of_distillation = partial(option, "network"), partial(option, "distillation")
of_recipe, of_running = partial(option, "recipe"), partial(option, "running")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings of a run, in plain types: written to settings.json and into checkpoints.

    `bits` and what belongs to the loss are None where the paper setting has no such thing.
    """

    # A table, packed by hand.
    # fmt: off
    data: str = of_task("data set", traits="fit", choices=DATA_SETS, name=(1, "{}"))
    paper_setting: str = of_task(
        "`original`: a full-precision teacher; `student`: a quantized network; `qamd` (the paper's "
        "name): MD-SNN, a quantized network distilled from the teacher's membranes",
        traits="fit", choices=PAPER_SETTINGS, metavar="SETTING", name=(3, "{}")
    )

    data_path: str = of_data(
        "where the data sets lie", "./data", "resume own", metavar="FOLDER",
        name=(2, "{}")
    )
    cache_path: str | None = of_data(
        "where caches and converted events go", None, "resume own added", shown="the data path",
        metavar="FOLDER"
    )
    image_size: str | None = of_data(  # None: the data set's own
        f"height and width, or one side, {IMAGE_SIDES[0]} to {IMAGE_SIDES[1]} pixels, of data that "
        "have several",
        traits="added", shown="folder 64, nmnist 34, digits-dvs 24, other events 48",
        where=any_size, metavar="HxW", name=(10, "{}")
    )
    sensor: str | None = of_data(
        f"height and width, or one side, up to {LARGEST_SENSOR} pixels, of the camera that "
        "recorded `events`",
        None, "added", shown="measured", where=needs("data", "events"), metavar="HxW"
    )
    split_by: str = of_data(
        "frames are T parts of a recording, of as many events (`number`) or as much time (`time`)",
        "number", "added", choices=SPLITS, where=of_events
    )
    val_share: float = of_data(
        "share of the training images, of each class, {limits}, that is not trained on: the best "
        "checkpoint is chosen on these, and never on the test images",
        0.0, "added", limits=(0, 0.5), metavar="SHARE"
    )
    fold: int | None = of_data(
        "cross-validation: test on the K-th of five parts of all images, of training and test, and "
        "train on the others; every five K are another split",
        None, "fit added", limits=(0, 10**6), metavar="K"
    )

    arch: str | None = of_network(  # None: the MS-ResNet of model_depth
        f"{', '.join(f'`{name}`' for name in NETWORKS)}, or a network of one's own, "
        f"`{OWN_NETWORK}`",
        None, "fit added", shown="resnet18", metavar="NETWORK", name=(7, "{}")
    )
    model_depth: int | None = of_network(
        "layers of the MS-ResNet, `18` or `34`: another way to say `--arch resnet18` or `resnet34`",
        lambda values: MS_RESNETS.get(values["arch"] or "resnet18"), "fit", shown="18",
        choices=BLOCKS, where=of_ms_resnet, name=(7, "depth{}")
    )
    width: int = of_network(
        "channels of the first stage, {limits}", 64, "fit", limits=(1, 4096), name=(8, "width{}")
    )
    time_windows: tuple | None = of_network(
        "train one network for several T: each batch with one of these, in an order drawn from the "
        "seed; evaluated at the largest; of static images alone",
        None, "added", item=int, limits=(1, 1024), where=static_images, metavar="T"
    )
    time_window: int = of_network(
        "timesteps T, {limits}",
        lambda values: max(values.get("time_windows") or (DATA_SETS[values["data"]].time_window,)),
        "own", shown="4; events 10", limits=(1, 1024), metavar="T", name=(9, "T{}")
    )
    bits: int | None = of_network(
        "width of weights, membrane potentials and shortcut inputs, {limits}; needed by `student` "
        "and `qamd`",
        None, "fit", limits=(2, 8), where=quantized,
        needed="--paper_setting {paper_setting} needs --bits, 2 to 8", name=(5, "{}bit")
    )
    bn_bits: int | None = of_network(
        "width of batch norm's folded scale and shift, {limits}; not with `original`",
        lambda values: 8 if values["paper_setting"] != "original" else None,
        "fit", shown="8", limits=(2, 16), where=quantized, name=(12, None)
    )
    leak: float = of_network(
        "share λ of a neuron's membrane potential that is left after a timestep, {limits}; exact "
        "in integers: 0, 1 and powers of two down to 1/64",
        DEFAULT_NEURON.leak, "fit added", limits=(0, 1)
    )
    threshold: float = of_network(
        "θ, {limits}: a neuron fires when its membrane potential is above it",
        DEFAULT_NEURON.threshold, "fit added", limits=(0.01, 100)
    )
    reset: str = of_network(
        "what a spike does to the membrane potential: `hard`, it becomes 0, or `soft`, θ is "
        "subtracted",
        DEFAULT_NEURON.reset, "fit added", choices=RESETS
    )
    surrogate: str = of_network(
        "what stands for the derivative of a spike in training",
        DEFAULT_NEURON.surrogate, "added", choices=SURROGATES
    )
    surrogate_width: float = of_network(
        "width a of the surrogate, {limits}: each has the area 1 and at θ the height 1/(2a)",
        DEFAULT_NEURON.width, "added", limits=(0.001, 1000), metavar="A"
    )

    init_from: str | None = of_network(
        "start from the weights of this checkpoint, of the same network, instead of from scratch; "
        "where its data or its classes are others, from all but the classifier's",
        None, "added", metavar="CKPT", name=(51, "{}")
    )

    init_from_teacher: bool = of_distillation(
        "start from the teacher's weights instead of from scratch", False, where=quantized,
        name=(6, "")
    )
    teacher_path: str | None = of_distillation(
        "checkpoint of an `original` run, needed by `qamd`",
        None, "resume",  # the file is compared, not its path
        where=has_teacher, metavar="CKPT",
        needed="--teacher_path is required: the original-best.pth of an original run",
        name=(6, "{}")
    )
    loss: str | None = of_distillation(
        "cross-entropy and logits, and of the membranes the KL divergence (`CLK`), the squared "
        "difference (`CLM`) or nothing (`CL`)",
        if_distilled("CLK"), shown="CLK", choices=MEMBRANE_LOSSES, where=distilled, metavar="LOSS",
        name=(4, "{}")
    )
    alpha: float | None = of_distillation(
        "weight α of the logit loss", if_distilled(ALPHA), shown=f"{ALPHA:g}", limits=(0, 1e6),
        where=distilled, name=(13, None)
    )
    beta: float | None = of_distillation(
        "weight β of the membrane loss", lambda values: BETA.get(values["loss"]),
        shown=f"CLK {BETA['CLK']:g}, CLM {BETA['CLM']:g}", limits=(0, 1e6),
        where=compares_membranes, name=(14, None)
    )
    tau: float | None = of_distillation(
        "temperature τ of the logit loss", if_distilled(TAU), shown=f"{TAU:g}", limits=(1e-3, 1e3),
        where=distilled, name=(15, None)
    )
    beta_schedule: str | None = of_distillation(
        "`cosine`: β falls to 0 over the epochs; `constant`: it stays", if_distilled(BETA_SCHEDULE),
        shown=BETA_SCHEDULE, choices=BETA_SCHEDULES, where=compares_membranes, name=(16, None)
    )

    crossbar: str | None = option(
        "chip",
        "train for a chip of this technology, a preset's name or a TOML file: the layers' sums are "
        "what its crossbars and ADCs make of them, in every step with cells drawn anew, and it is "
        "tested on such a chip",
        None, "added", where=quantized, metavar="TECHNOLOGY"
    )
    xbar_size: int | None = of_chip("xbar_size")
    cell_bits: int | None = of_chip("cell_bits")
    columns: str | None = of_chip("columns")
    crossbars_per_pe: int | None = of_chip("crossbars_per_pe")
    adc_bits: int | None = of_chip("adc_bits")
    layer_adc_bits: str | None = of_chip("layer_adc_bits")
    adc_of: str | None = of_chip("adc_of")
    adc_range: str | None = of_chip("adc_range")
    on_off_ratio: float | None = of_chip("on_off_ratio")
    sigma: float | None = of_chip("sigma")
    level_conductances: str | None = of_chip("level_conductances")
    programming: str | None = of_chip("programming")
    after: str | None = of_chip("after")
    stuck_on: float | None = of_chip("stuck_on")
    stuck_off: float | None = of_chip("stuck_off")
    read_noise: float | None = of_chip("read_noise")
    read_floor: float | None = of_chip("read_floor", "added later")

    epochs: int = of_recipe(
        "passes over the training images", 100, "resume", limits=(1, 10**6), name=(21, None)
    )
    batch_size: int = of_recipe(
        "images of a step, split over the processes",
        lambda values: DATA_SETS[values["data"]].batch_size,
        "own", shown="256; digits and nmnist 64, other events 32", limits=(1, 2**20),
        name=(18, None)
    )
    accumulate: int = of_recipe(
        "equal parts in which a process takes its share of a batch, for less memory",
        1, "added", limits=(1, 2**20), name=(19, None)
    )
    lr: float = of_recipe(
        "learning rate at its highest; it falls in a cosine to 0", 0.1, limits=(0, 1e3),
        name=(22, None)
    )
    warmup: int = of_recipe(
        "first epochs, in which the learning rate rises evenly with every step",
        0, "added", limits=(0, 10**6), metavar="EPOCHS"
    )
    weight_decay: float = of_recipe(
        "none on batch norm, biases and quantization steps", 1e-4, limits=(0, 1e3), name=(23, None)
    )
    clip_grad: float = of_recipe(
        "largest gradient norm; 0: any",
        lambda values: 5.0 if values["paper_setting"] == "qamd" else 1.0,
        shown="1; qamd 5", limits=(0, 1e6), name=(17, None)
    )
    label_smoothing: float = of_recipe(
        "share of the target, {limits}, that goes to all classes alike, in training's "
        "cross-entropy",
        0.0, "added", limits=(0, 0.9), metavar="SHARE"
    )
    augment: str = of_recipe(
        "`basic`: crop and flip, events roll, rotate or shear; `auto`: AutoAugment and cutout too; "
        "`none`",
        "basic", "added", choices=("basic", "auto", "none"), name=(20, None)
    )
    seed: int = of_recipe(
        "of weights, order, augmentation", 0, limits=(0, 2**63 - 1), name=(99, "seed{}")
    )

    save_path: str = of_running(
        "where checkpoints and logs go", "", "resume alone",
        shown="./checkpoints/RUN, named after the settings", metavar="FOLDER"
    )
    resume: bool = of_running(
        "go on from `SETTING-last.pth` in the save path if there is one, else start",
        False, "resume alone added"
    )
    overwrite: bool = of_running(
        "start anew; a run of an epoch or more that is there is moved to `SAVE_PATH.1` (`.2`, …)",
        False, "resume alone added"
    )
    save_every: int | None = of_running(
        "save every N steps too, not only every epoch", None, "resume added", limits=(1, 10**9)
    )
    dry_run: bool = of_running(
        "check all, run three steps and say what time and memory the run takes; no file of it is "
        "left (what is made of the data stays: it is needed anyway)",
        False, "resume alone added"
    )
    eval_only: str | None = of_running(
        "print the test accuracy of a checkpoint and stop", None, "resume alone own", metavar="CKPT"
    )
    integer: bool = of_running(
        "with `--eval_only`: also with integers alone", False, "resume alone only"
    )
    per_class: bool = of_running(
        "with `--eval_only`: also the accuracy of each class and the confusion matrix, as CSV, PNG "
        "and PDF",
        False, "resume alone only added"
    )
    out: str | None = of_running(
        "with `--eval_only`: folder of what `--per_class` writes", None, "resume alone only added",
        shown="CKPT without .pth, and -classes", metavar="FOLDER"
    )
    predict: tuple | None = of_running(
        "with `--eval_only`: instead of the accuracy the likeliest classes of these images, or "
        "files of events",
        None, "resume alone only added", metavar="FILE"
    )
    json: bool = of_running(
        "with `--eval_only` or `--dry_run`: print one JSON object, and nothing else",
        False, "resume alone only added"
    )
    workers: int = of_running(
        "loaders of each process", min(4, usable_cores()), "resume own",
        shown="4, or the fewer cores that it may use", limits=(0, 256)
    )
    device: str = of_running(
        f"`cpu`, `cuda`, `auto`: a GPU where there is one, or `{SHARED_GPU}`: more processes than "
        "GPUs, to try it",
        "auto", "resume own", choices=("auto", "cpu", "cuda", SHARED_GPU)
    )
    amp: bool = of_running(
        "`bf16` autocast; membranes, losses and quantized layers stay in float32", False, "own",
        choices=("bf16",), name=(11, "amp")
    )
    compile: bool = of_running(
        "fused kernels; compiling takes up to a minute", False, "resume own added"
    )
    deterministic: bool = of_running("same seed, same numbers", False, "resume own")
    check_numerics: bool = of_running(
        "slow: stop at the first layer with NaN or infinite numbers, with its name", False,
        "resume added"
    )
    # fmt: on

    # What is found, not given.
    classes: tuple | None = None  # names, of a folder; None: the data set's own
    # What one code of event frames stands for, found from the training data; None: they are codes.
    input_step: float | None = None
    arch_digest: str | None = None  # SHA-256 of the file of a network of one's own

    @classmethod
    def of(cls, data: str, paper_setting: str = "original", **given: Any) -> "Settings":
        """Settings with the default of every other option, not checked."""
        found = {name: given[name] for name in given.keys() - OPTIONS.keys()}
        return cls(**complete({"data": data, "paper_setting": paper_setting} | given), **found)

    @property
    def trained_at(self) -> tuple[int, ...]:
        """Every T that it is trained with, the largest last."""
        return self.time_windows or (self.time_window,)

    @property
    def neuron(self) -> Neuron:
        return Neuron(self.leak, self.threshold, self.reset, self.surrogate, self.surrogate_width)

    @property
    def chip(self) -> Chip | None:
        """The chip that it is trained for. Raises UserError where there can be none."""
        if self.crossbar is None:
            return None
        said = {name: getattr(self, name) for name in OF_CHIP}
        return next(chips(technology=self.crossbar, **said))

    @property
    def trained_for(self) -> str | None:
        """The chip that it is trained for: its size, its ADCs, and what other chips do not have."""
        if self.crossbar is None:
            return None
        side, bits = self.xbar_size, self.adc_bits
        said = {
            name: getattr(self, name) for name in OF_CHIP if name not in ("xbar_size", "adc_bits")
        }
        own = (f", {x} {said[x]}" for x in said if said[x] != CHIP_OPTIONS[x].default)
        return f"{self.crossbar}: crossbars of {side} x {side}, ADCs of {bits} bits{''.join(own)}"

    @property
    def told_arch(self) -> str | None:
        """`arch`; a class of one's own by its file's digest, wherever the file lies."""
        if self.arch_digest is None:
            return self.arch
        return f"{self.network_name}@{self.arch_digest[:8]}"

    @property
    def network_name(self) -> str:
        """What a reader calls the network."""
        known = self.arch or f"resnet{self.model_depth}"
        return NETWORKS[known][0] if known in NETWORKS else own_network(known)[1]

    @property
    def data_set(self) -> DataSet:
        """What they say of their data set, over what DATA_SETS does."""
        data_set = DATA_SETS[self.data]
        if self.image_size is not None:
            data_set = replace(data_set, image_size=parse_image_size(self.image_size))
        if self.classes is not None:
            data_set = replace(data_set, num_classes=len(self.classes))
        if data_set.recordings is not None:
            found = data_set.recordings._replace(split_by=self.split_by)
            if self.sensor is not None:
                found = found._replace(sensor=parse_sensor(self.sensor))
            data_set = replace(data_set, recordings=found)
        return data_set


# Options that older checkpoints and settings.json have, with the value that today's runs have.
GONE = {"teacher_logits": "own"}
OPTIONS: dict[str, Option] = {
    x.name: x.metadata["option"] for x in fields(Settings) if "option" in x.metadata
}
TYPES: dict[str, tuple[type, ...]] = {  # get_args of a plain type is empty
    x.name: get_args(x.type) or (x.type,) for x in fields(Settings)
}
OF_CHIP = tuple(name for name in OPTIONS if name in CHIP_OPTIONS)


def before_it(values: Values) -> dict[str, Any]:
    """What a run of these settings had of options that are newer than it."""
    found = {x.name: x.default for x in fields(Settings) if x.default is not MISSING}
    if values.get("crossbar") is not None:
        later = (name for name in OF_CHIP if OPTIONS[name].has("later"))
        found |= {name: CHIP_OPTIONS[name].default for name in later}
    return found


# What may differ between a run and the one that goes on with it: how it runs, how long, and where
# its files are.
MAY_CHANGE = {name for name, x in OPTIONS.items() if x.has("resume")}


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
    groups = {about.group: None for about in OPTIONS.values()}
    groups = {name: parser.add_argument_group(name) for name in groups}
    for name, about in OPTIONS.items():
        add_option(groups[about.group], name)
        if is_flag(name) and not about.has("alone"):
            hidden = {"action": "store_false", "help": argparse.SUPPRESS}
            parser.add_argument(f"--no_{name}", dest=name, **hidden)
    not_taken = ", ".join(f"--{name}" for name, about in OPTIONS.items() if about.has("alone"))
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


def add_option(parser: argparse._ActionsContainer, name: str) -> argparse.Action:
    about, kind = OPTIONS[name], TYPES[name][0]
    text, default = about.meaning().replace("`", ""), about.default_text()
    text = f"{text} (default {default})" if default is not None else text
    metavar = about.metavar or {int: "N", float: "X"}.get(kind, "NAME")
    if kind is tuple:
        how = {"nargs": "+", "type": about.item, "metavar": metavar}
    elif not is_flag(name):
        how = {"type": kind, "choices": about.choices, "metavar": metavar}
    elif about.choices:  # a flag that may say its one choice
        (choice,) = about.choices
        how = {"nargs": "?", "choices": [choice], "const": choice, "metavar": choice}
    else:
        how = {"action": "store_true"}
    return parser.add_argument(f"--{name}", help=text.replace("%", "%%"), **how)


def complete(given: Values, may_drop: Iterable[str] = ()) -> dict[str, Any]:
    """The value of each option: the given one, or its default. One of `may_drop` that has no
    meaning here is as if not given."""
    values: dict[str, Any] = {}
    for name, about in OPTIONS.items():
        values[name] = given.get(name)
        if values[name] is None or (name in may_drop and about.refusal(values)):
            values[name] = about.default_with(values)
    return values


def check_value(name: str, value: Any) -> None:
    """Raises UserError where a setting cannot have this value: of another type, none of its
    choices, a number outside what the program can do."""
    about, kinds = OPTIONS.get(name), TYPES[name]
    if type(value) not in kinds:  # True is an int too
        kind = kinds[0].__name__
        raise UserError(f"--{name} cannot be {reprlib.repr(value)}: {kind} is expected")
    if about is None or value is None:
        return
    if about.choices and not is_flag(name) and value not in about.choices:
        raise UserError(f"--{name}: {wrong_choice(value, about.choices)}")
    several, (low, high) = isinstance(value, tuple), about.limits or (None, None)
    if several and not value:  # of a file
        raise UserError(f"--{name} is empty")
    for x in value if several else (value,):
        if several and type(x) is not about.item:
            raise UserError(f"--{name} cannot hold {reprlib.repr(x)}")
        if about.limits and not low <= x <= high:
            raise UserError(f"--{name} must be between {low} and {high}, got {x}")


def as_text(value: Any) -> str:
    """A setting as it is typed."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def check_settings(settings: Settings, trained: bool = False) -> None:
    """Raises UserError where a setting cannot have its value, alone or beside others. A network
    that is `trained` already may have had a loss of one's own, which is not known here."""
    for name, value in vars(settings).items():
        if not (trained and name == "loss" and isinstance(value, str) and value.isidentifier()):
            check_value(name, value)
    if settings.warmup >= settings.epochs:
        raise UserError(
            f"--warmup {settings.warmup} leaves nothing of --epochs {settings.epochs}: it must be "
            "less"
        )
    own = own_network(settings.arch)
    if own is None and settings.arch is not None and settings.arch not in NETWORKS:
        raise UserError(f"--arch: {wrong_choice(settings.arch, [*NETWORKS, OWN_NETWORK])}")
    if (settings.arch_digest is None) != (own is None):
        raise UserError(f"--arch {settings.arch} does not fit the digest of its file")
    if settings.image_size is not None:
        parse_image_size(settings.image_size)
    if settings.sensor is not None:
        parse_sensor(settings.sensor)
    if not trained:
        _ = settings.chip  # it checks itself
    if settings.time_windows is not None:
        windows, given = settings.time_windows, as_text(settings.time_windows)
        if len(windows) < 2 or list(windows) != sorted(set(windows)):
            raise UserError(f"--time_windows {given}: give two T or more, each once")
        if settings.time_window != windows[-1]:
            raise UserError(
                f"--time_window {settings.time_window} is not the largest of --time_windows "
                f"{given}: leave it out"
            )
    for name in (name for name, about in OPTIONS.items() if about.metavar == "FOLDER"):
        path = getattr(settings, name) or ""
        if any(ord(character) < 32 for character in path):
            raise UserError(f"--{name} holds a control character")
        if any("\ud800" <= character <= "\udfff" for character in path):
            raise UserError(f"--{name} {path!r} is not in UTF-8")


def own_network(arch: str | None) -> tuple[str, str] | None:
    """(file, class) of a network of one's own; None for others."""
    found = re.fullmatch(r"(.+\.py):(\w+)", arch or "", re.DOTALL)
    return None if found is None else (found[1], found[2])


def describes_a_network(settings: Settings) -> bool:
    """Whether settings of a file, each of them checked, fit each other."""
    values = asdict(settings)
    for name, about in OPTIONS.items():
        if about.where is None:
            continue
        refused = about.refusal(values) is not None
        if name in OF_CHIP:  # whether or not its technology's file is here
            if refused != (values[name] is None):
                return False
            continue
        if about.default_with(values) is not None or (about.needed and not refused):
            if values[name] is None:
                return False
        elif refused and values[name] is not None:
            return False
    classes, step = settings.classes, settings.input_step
    return (
        (classes is None) == (DATA_SETS[settings.data].classes_of is None)
        and all(type(name) is str for name in classes or ())
        and len(classes or "ab") >= 2
        and (step is None or (DATA_SETS[settings.data].events and 0 < step < math.inf))
    )


def parse_image_size(text: str) -> tuple[int, int]:
    return _parse_size(text, "image_size", IMAGE_SIDES)


def parse_sensor(text: str) -> tuple[int, int]:
    return _parse_size(text, "sensor", (1, LARGEST_SENSOR))


def _parse_size(text: str, option: str, limits: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of "HxW", or of one number for both."""
    low, high = limits
    sides = re.fullmatch(r"(\d{1,4})(?:x(\d{1,4}))?", text, re.ASCII)
    size = sides and (int(sides[1]), int(sides[2] or sides[1]))
    if not size or not all(low <= side <= high for side in size):
        raise UserError(
            f"--{option} must be HxW or one number, {low} to {high} pixels each, got {text!r}"
        )
    return size


def input_step_of(settings: Settings) -> float | None:
    """What one code of event frames stands for in a trained network; None of images."""
    data_set = DATA_SETS[settings.data]
    return (settings.input_step or data_set.image_step) if data_set.events else None
