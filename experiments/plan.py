"""The runs of a study: every combination of its options, each checked by main.py's own parser."""

import hashlib
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

from data_sets import DATA_SETS
from distiller import MEMBRANE_LOSSES
from engine.run_folder import checkpoints_of
from load_settings import parse_settings
from runtime.errors import UserError
from settings import OPTIONS, TYPES, Settings, before_it, build_parser, complete, is_flag

METHODS = {  # a run's name in a study: options of main.py
    "student": ("--paper_setting", "student"),
    **{
        loss: ("--paper_setting", "qamd", "--loss", loss)
        for loss in dict.fromkeys(["CL", "CLM", "CLK", *MEMBRANE_LOSSES])
    },
}
STARTS = {"scratch": (), "teacher": ("--init_from_teacher",)}
TEACHER = "teacher"
# A study has words of its own for these, or sets them itself.
OWN = {"paper_setting", "loss", "init_from_teacher", "teacher_path", "time_windows"}
OWN |= {name for name, about in OPTIONS.items() if about.has("alone")}
# These change how a run is done, and none of its numbers.
CHANGE_NO_NUMBER = {"cache_path", "workers", "save_every", "check_numerics"}
# What tells a run from another. A teacher is told by its own settings, not by where its file lies.
TELLING = [
    x
    for x in OPTIONS
    if not OPTIONS[x].has("alone") and x not in CHANGE_NO_NUMBER and x != "teacher_path"
]
COLUMNS_OF_THEIR_OWN = {"data", "paper_setting", "loss", "init_from_teacher", "bits"}
COLUMNS_OF_THEIR_OWN |= {"time_window", "seed", "fold"}
NOT_GIVEN = (None,)  # an axis that nobody has named
Given = Mapping[str, str]  # options of main.py, as words; a flag has an empty one


@dataclass(frozen=True, eq=False)
class Planned:
    """A run of main.py.

    Attributes:
        options: of main.py, but for the teacher's file and where its own files go.
        teacher: of a student, the run that teaches it or that it is compared with.
    """

    method: str
    options: tuple[str, ...]
    settings: Settings
    teacher: "Planned | None"

    @property
    def start(self) -> str:
        return "teacher" if self.settings.init_from_teacher else "scratch"

    @property
    def identity(self) -> tuple[str, str]:
        """What its numbers depend on: its own settings and its teacher's."""
        theirs = "" if self.teacher is None else telling(self.teacher.settings)
        return telling(self.settings), theirs

    @property
    def name(self) -> str:
        """Of its folder: for a person, and with digits of the identity for the program."""
        settings, code = self.settings, hashlib.sha256("|".join(self.identity).encode())
        own = DATA_SETS[settings.data].classes_of is not None
        folder = Path(os.path.abspath(settings.data_path)).name if own else ""
        parts = [settings.data, folder, f"T{settings.time_window}"]
        parts += [f"{settings.bits}bit" if settings.bits else "", self.method]
        parts += ["" if self.method == TEACHER else self.start, f"seed{settings.seed}"]
        fold = settings.fold
        parts += ["" if fold is None else f"fold{fold}", code.hexdigest()[:8]]
        return "-".join(filter(None, parts))

    @property
    def title(self) -> str:
        """For a line about it."""
        settings = self.settings
        parts = [settings.data, f"T {settings.time_window}"]
        parts += [f"{settings.bits} bits"] * (settings.bits is not None)
        parts += [self.method, *["from teacher"] * (self.start == "teacher")]
        parts += [f"seed {settings.seed}"]
        if settings.fold is not None:
            parts.append(f"fold {settings.fold}")
        return ", ".join([*parts, *filter(None, [options_text(settings)])])

    def folder(self, runs: Path) -> Path:
        return runs / self.name

    def checkpoint(self, runs: Path) -> Path:
        """Of the last epoch: the test images have chosen none of its numbers."""
        return checkpoints_of(self.folder(runs), self.settings.paper_setting)[0]

    def command(self, runs: Path) -> list[str]:
        """All options of main.py."""
        options = [*self.options, "--save_path", str(self.folder(runs)), "--resume"]
        if is_taught(self.settings):
            options += ["--teacher_path", str(self.teacher.checkpoint(runs))]
        return options


def is_taught(settings: Settings) -> bool:
    """Whether main.py reads a teacher's file for it."""
    return settings.paper_setting == "qamd" or settings.init_from_teacher


def telling(settings: Settings) -> str:
    """All settings that its numbers depend on, as name=value words of a shell. An option that an
    older version has not is left out where it has the value that older runs are taken to have."""
    words = []
    before = before_it(vars(settings))
    for name, value in sorted(told(settings).items()):
        if value is not None and (name not in before or value != before[name]):
            words.append(f"{name}={shlex.quote(str(value))}")
    return " ".join(words)


def told(settings: Settings) -> dict[str, object]:
    """The settings in TELLING. Data are told by their path from the current folder, as the study's
    own results are."""
    values = {name: value for name, value in asdict(settings).items() if name in TELLING}
    told_path = os.path.relpath(settings.data_path)
    return values | {"arch": settings.told_arch, "data_path": told_path}


def options_text(settings: Settings) -> str:
    """The options that have no column of their own and are no defaults: width=8 epochs=15."""
    values, words = asdict(settings), []
    for name, value in told(settings).items():
        default = OPTIONS[name].default_with(values)
        if name == "data_path":
            default = os.path.relpath(default)
        if name not in COLUMNS_OF_THEIR_OWN and value not in (None, default):
            words.append(f"{name}={as_word(value)}")
    return " ".join(words)


def teacher_text(planned: Planned) -> str:
    """The teacher's options that are not the student's: epochs=20."""
    if planned.teacher is None:
        return ""
    ours, theirs = asdict(planned.settings), asdict(planned.teacher.settings)
    words = []
    for name in told(planned.settings):
        default = OPTIONS[name].default_with
        both_default = ours[name] == default(ours) and theirs[name] == default(theirs)
        if OPTIONS[name].where is None and ours[name] != theirs[name] and not both_default:
            words.append(f"{name}={as_word(theirs[name])}")
    return " ".join(word for word in words if not word.startswith("paper_setting="))


def as_word(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else shlex.quote(str(value))


def plan(
    axes: Mapping[str, Sequence[str | None]],
    bits: Sequence[str],
    methods: Sequence[str],
    starts: Sequence[str],
    of_teacher: Mapping[str, str | None],
    runs: Path,
    known: Iterable[Planned] = (),
) -> list[Planned]:
    """The runs, each once, a teacher before the students that need it; all of one seed and fold
    before those of the next, so that whatever has been finished can be compared.

    axes: the options of main.py with all values of each. of_teacher: those that a teacher has
    instead, None where it has none of the students'. known: runs that come first, of another plan;
    what the two have in common is one run. Raises UserError where main.py would refuse a run.
    """
    found = {planned.identity: planned for planned in known}
    used: set[str] = set()

    def add(method: str, given: Given, more: Sequence[str], teacher: Planned | None) -> Planned:
        options = [*words_of(given), *more]
        kept = with_meaning(options, given)
        used.update(kept)
        options = (*words_of({name: given[name] for name in kept}), *more)
        taught = "qamd" in more or "--init_from_teacher" in more
        path = ["--teacher_path", str(runs / "teacher.pth")] if taught else []
        settings = parse_settings(
            [*options, *path, "--save_path", str(runs / "run")],
            teacher=None if teacher is None else teacher.settings,
        )
        planned = Planned(method, options, settings, teacher)
        return found.setdefault(planned.identity, planned)

    first = [name for name in ("seed", "fold") if name in axes]
    order = [*first, *(name for name in axes if name not in first)]
    for values in product(*(axes[name] for name in order)):
        named = zip(order, values, strict=True)
        given = {name: value for name, value in named if value is not None}
        of_this = {name: x for name, x in (given | of_teacher).items() if x is not None}
        teacher = add(TEACHER, of_this, ("--paper_setting", "original"), None)
        for width, start, method in product(bits, starts, methods):
            more = (*METHODS[method], *STARTS[start], "--bits", width)
            add(method, given, more, teacher)
    for name in axes:
        if name not in used and axes[name] != NOT_GIVEN:
            raise UserError(f"--{name} has a meaning in none of these runs: leave it out")
    return list(found.values())


def words_of(given: Given) -> list[str]:
    """The command line of these options."""
    words = []
    for name, value in given.items():
        values = value.split() if TYPES[name][0] is tuple else [value]
        words += [f"--{name}", *([] if is_flag(name) else values)]
    return words


def with_meaning(options: Sequence[str], given: Given) -> list[str]:
    """Names of the given options that have a meaning in a run with all these options."""
    values = complete(vars(build_parser().parse_args(options)))
    wheres = {name: OPTIONS[name].where for name in given}
    return [name for name in given if not (wheres[name] and wheres[name](values))]
