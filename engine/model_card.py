"""SETTING-best.md, the model card: what is known of the network, for whoever has it alone.

Markdown, without paths of this machine. What is not known is left out: a card that is written after
an interruption does not say how often each layer fired, and with which versions.
"""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from display import percent
from engine.run import Run
from engine.run_folder import deciding
from settings import MAY_CHANGE, OPTIONS, Settings, as_text

KINDS = {"original": "a full-precision teacher", "student": "a quantized student"}
KINDS |= {"qamd": "an MD-SNN, distilled from a full-precision teacher"}


def path_of(run: Run) -> Path:
    return run.best.with_suffix(".md")


def is_of(path: Path, row: Mapping[str, Any]) -> bool:
    """Whether there is a card of this epoch."""
    return path.is_file() and f"\n| epoch | {row['epoch']} |\n" in path.read_text(errors="replace")


def model_card(
    run: Run,
    row: Mapping[str, Any],
    about: Mapping[str, Any],
    spikes: Mapping[str, Tensor],
) -> str:
    """The card of the epoch of `row`. about: settings.json, where this process has trained it.
    spikes: of each LIF layer (2, T), as `engine.evaluate` counts them."""
    settings, data_set = run.settings, run.settings.data_set
    bits = "" if settings.bits is None else f" of {settings.bits} bits"
    head = f"{settings.network_name}{bits}, {KINDS[settings.paper_setting]}."
    size = "x".join(map(str, data_set.input_shape(settings.time_window)))
    facts = {
        "epoch": row["epoch"],
        "data": f"{settings.data}, {data_set.num_classes} classes, {size}",
        "training images": f"{run.training_images:,}",
        "classes": ", ".join(run.class_names or []),
        "parameters": f"{sum(x.numel() for x in run.network.parameters()):,}",
        "timesteps": as_text(settings.trained_at),
        "chip": settings.trained_for
        and f"{settings.trained_for}; trained for it, and tested on it",
        **accuracies(row),
        "spikes per neuron and timestep": percent(row["spike_rate"], 2),
        "teacher": run.teacher and f"SHA-256 {run.teacher}",
        "command": f"`{command_of(settings)}`",
        "processes": about.get("world_size"),
        "versions": ", ".join(f"{name} {x}" for name, x in about.get("versions", {}).items()),
        "commit": about.get("git_commit"),
    }
    lines = [f"# {run.best.name}", "", head, "", "| | |", "|---|---|"]
    lines += [f"| {name} | {cell(value)} |" for name, value in facts.items() if value]
    if spikes:
        lines += ["", "## Spikes per neuron", "", *table_of(spikes)]
    lines += ["", "## Settings", "", "| | |", "|---|---|"]
    lines += [f"| `{name}` | {cell(as_text(value))} |" for name, value in told(settings).items()]
    return "\n".join(lines) + "\n"


def accuracies(row: Mapping[str, Any]) -> dict[str, str]:
    """Of the test images, and of those that have chosen the epoch."""
    chosen = " (these images have chosen the epoch)"
    found = {}
    for name, images in (("val", "held-out"), ("test", "test")):
        if (accuracy := row.get(f"{name}_accuracy")) is not None:
            text = percent(accuracy, 2) + chosen * (deciding(row) == f"{name}_accuracy")
            found[f"accuracy on {images} images"] = text
            if (loss := row.get(f"{name}_loss")) is not None:
                found[f"cross-entropy on {images} images"] = f"{loss:.4g}"
    return found


def table_of(spikes: Mapping[str, Tensor]) -> list[str]:
    timesteps = range(1, next(iter(spikes.values())).shape[1] + 1)
    lines = [
        f"| layer | {' | '.join(f't = {t}' for t in timesteps)} |",
        "|---" * (len(timesteps) + 1) + "|",
    ]
    for name, (fired, seen) in spikes.items():
        lines.append(f"| {name} | {' | '.join(percent(x, 2) for x in (fired / seen).tolist())} |")
    return lines


def told(settings: Settings) -> dict[str, Any]:
    """The settings that the network depends on, and no path but that of a network's own file."""
    names = (name for name in OPTIONS if name == "epochs" or name not in MAY_CHANGE)
    values = {name: getattr(settings, name) for name in names}
    values = {name: x for name, x in values.items() if x is not None and x is not False}
    return {
        name: Path(x).name if OPTIONS[name].metavar == "CKPT" else x for name, x in values.items()
    }


def command_of(settings: Settings) -> str:
    """What trains it again, where the data lie at their default place; a teacher by its name."""
    words = ["python", "main.py"]
    told_settings = told(settings)
    if settings.teacher_path is not None:
        told_settings["teacher_path"] = Path(settings.teacher_path).name
    for name, value in told_settings.items():
        if name in ("data", "paper_setting") or value != OPTIONS[name].default_with(vars(settings)):
            values = value if isinstance(value, tuple) else () if value is True else (value,)
            words += [f"--{name}", *map(str, values)]
    return shlex.join(words)


def cell(text: Any) -> str:
    """As it can stand in a table of Markdown."""
    return " ".join(str(text).replace("|", "\\|").split())
