"""--eval_only: what it measures, prints and writes: its lines or its JSON, the accuracy of each
class, the confusion matrix, and the likeliest classes of single files."""

import csv
import io
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from checkpoints import Checkpoint, load_checkpoint, names_of_labels
from data_loader import evaluation_loader, read_sample
from display import (
    SHADING,
    new_figure,
    percent,
    picture_files,
    plain,
    printable,
    run_at,
    text_table,
)
from engine.compile import compile_for
from engine.data import load_same_data, share_of
from engine.evaluate import evaluate, evaluate_integers
from engine.start import make_deterministic
from load_settings import load_network, refuse_another_fold
from runtime.errors import UserError
from runtime.files import check_writable, write_files
from runtime.processes import of_all_processes, of_first_process
from settings import Settings

FEW = 3  # classes that are named of a file
SHOWN = 20  # classes, in a terminal and with numbers in the picture
MOST_CLASSES = 4096  # of a confusion matrix
FILES = ("evaluation.json", "classes.csv", "confusion.csv", "confusion.png", "confusion.pdf")


def about(settings: Settings, checkpoint: Checkpoint) -> dict[str, Any]:
    """What was evaluated: the beginning of every result."""
    names = ("data", "fold", "paper_setting", "loss", "bits", "time_window")
    return {
        "checkpoint": settings.eval_only,
        "epoch": checkpoint.epoch,
        **{name: getattr(settings, name) for name in names},
        "trained_time_windows": list(checkpoint.settings.trained_at),
        "trained_for": checkpoint.settings.trained_for,
    }


def eval_only(settings: Settings, device: torch.device) -> dict[str, Any]:
    """What --eval_only finds: of single files with --predict, else of the test images."""
    return (measure if settings.predict is None else predict)(settings, device)


def measure(settings: Settings, device: torch.device) -> dict[str, Any]:
    """What --eval_only finds on the test images of the checkpoint's data."""
    make_deterministic(settings)
    of_first_process(lambda: check_files(settings))
    checkpoint = load_checkpoint(settings.eval_only)
    network = load_network(checkpoint, settings.time_window).to(device)
    train_set, test_set = load_same_data(settings)
    refuse_another_fold(checkpoint, settings.eval_only, settings, len(train_set))
    if settings.compile:
        compile_for(settings, device, test_set)
    batches = evaluation_loader(test_set, share_of(settings), device)
    pairs: list[Tensor] | None = [] if settings.per_class else None
    tested = evaluate(network, batches, device, settings.amp, pairs)
    found = about(settings, checkpoint) | {
        "images": tested.total,
        "correct": tested.correct,
        "accuracy": tested.accuracy,
        "cross_entropy": tested.loss if math.isfinite(tested.loss) else None,
        "spike_rate": tested.spike_rate,
    }
    if settings.integer:
        found["integers"] = evaluate_integers(network, batches, device)
    if pairs is not None:
        add_classes(settings, found, torch.cat(pairs, 1), test_set.classes or network.class_names)
    return found


# The accuracy of each class.


def folder_of(settings: Settings) -> Path:
    """Where --per_class writes to."""
    return Path(settings.out or settings.eval_only.removesuffix(".pth") + "-classes")


def check_files(settings: Settings) -> None:
    """Raises UserError, before any work, where --per_class cannot write, or would replace what it
    has not written about this checkpoint."""
    if not settings.per_class:
        return
    if settings.data_set.num_classes > MOST_CLASSES:
        raise UserError(f"--per_class is for {MOST_CLASSES} classes at most")
    folder = folder_of(settings)
    taken = next((name for name in FILES if os.path.lexists(folder / name)), None)
    if taken is not None and not _is_of(settings, folder / FILES[0]):
        raise UserError(
            f"{folder} holds {taken} of something else than {settings.eval_only} at T "
            f"{settings.time_window}: choose another folder with --out"
        )
    check_writable(folder, "--out")


def _is_of(settings: Settings, path: Path) -> bool:
    try:
        theirs = json.loads(path.read_bytes())
        same_file = Path(theirs["checkpoint"]).resolve() == Path(settings.eval_only).resolve()
        return same_file and theirs["time_window"] == settings.time_window
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False


def add_classes(settings: Settings, found: dict[str, Any], pairs: Tensor, names: list[str]) -> None:
    """Add the accuracy of each class to what was found, and write the files of --per_class."""
    number = settings.data_set.num_classes
    names = names_of_labels(names, number)
    labels, predictions = torch.cat(of_all_processes(pairs), dim=1)
    # A row a true class, a column what it was taken for.
    counts = torch.bincount(number * labels + predictions, minlength=number**2)
    confusion = counts.view(number, number).numpy()
    found["classes"] = rows_of(confusion, names)
    of_first_process(lambda: write_classes(settings, found, confusion, names))


def rows_of(confusion: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
    """Of each class its test images, those that were right, and what most others were taken for."""
    rows = []
    for label, name in enumerate(names):
        images, correct = int(confusion[label].sum()), int(confusion[label, label])
        others = confusion[label].copy()
        others[label] = 0
        most = int(others.argmax())
        rows.append(
            {
                "class": name,
                "images": images,
                "correct": correct,
                "accuracy": correct / images if images else None,
                "most_often_taken_for": names[most] if others[most] else None,
                "images_taken_for_it": int(others[most]),
            }
        )
    return rows


def write_classes(
    settings: Settings, found: dict[str, Any], confusion: np.ndarray, names: Sequence[str]
) -> None:
    """Write FILES, all or none. Raises UserError where that fails."""
    contents = {
        FILES[0]: as_json(found),
        "classes.csv": csv_of([[*found["classes"][0]], *(x.values() for x in found["classes"])]),
        "confusion.csv": csv_of(
            [["true / predicted", *names]]
            + [[name, *row] for name, row in zip(names, confusion.tolist(), strict=True)]
        ),
        **picture_files(picture(confusion, names), "confusion"),
    }
    write_files(folder_of(settings), contents)


def csv_of(rows: Sequence[Sequence[Any]]) -> bytes:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue().encode(errors="backslashreplace")  # names of folders may be any bytes


def picture(confusion: np.ndarray, names: Sequence[str]) -> Any:
    """The figure of a confusion matrix: shares of each true class, so scaled that rare confusions
    are seen too."""
    from matplotlib.colors import PowerNorm

    number = len(names)
    side = min(12.0, max(4.0, 0.42 * number + 1.5))  # inches
    figure, panel = new_figure(side + 1, side)
    shares = 100 * confusion / np.maximum(1, confusion.sum(axis=1, keepdims=True))
    image = panel.imshow(shares, norm=PowerNorm(0.5, vmin=0, vmax=100), cmap=SHADING)
    places = range(0, number, math.ceil(number / 50))  # more names would lie on each other
    shown = [plain(names[i][:24]) for i in places]
    room = 10 * side / len(shown)  # characters
    panel.set_xticks(places, shown, fontsize=8, rotation=90 if max(map(len, shown)) > room else 0)
    panel.set_yticks(places, shown, fontsize=8)
    panel.set(xlabel="taken for", ylabel="true class")
    if number <= SHOWN:
        for (row, column), count in np.ndenumerate(confusion):
            colour = "black" if shares[row, column] > 40 else "white"
            style = {"ha": "center", "va": "center", "fontsize": 8, "color": colour}
            panel.text(column, row, count or "", **style)
    figure.colorbar(image, label="share of the true class, %", shrink=0.8)
    return figure


# Single files.


def predict(settings: Settings, device: torch.device) -> dict[str, Any]:
    """The likeliest classes of the files of --predict. Raises UserError, before the network has
    seen one, for a file that cannot be read."""
    samples = [read_sample(path, settings) for path in settings.predict]
    checkpoint = load_checkpoint(settings.eval_only)
    network = load_network(checkpoint, settings.time_window).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=settings.amp):
        shares = network.predict(np.stack(samples))
    best = shares.topk(min(FEW, shares.shape[1]))
    predictions = []
    for path, values, labels in zip(settings.predict, *(x.tolist() for x in best), strict=True):
        named = zip(labels, values, strict=True)
        classes = [{"class": network.class_names[i], "share": share} for i, share in named]
        predictions.append({"file": path, "classes": classes})
    return about(settings, checkpoint) | {"predictions": predictions}


# Text.


def result_text(found: dict[str, Any], settings: Settings) -> str:
    """What is printed of a result."""
    if settings.json:
        return as_json(found).rstrip("\n")
    other_t = run_at(found["time_window"], found["trained_time_windows"])
    digital = [f"digital, but trained for a chip of {settings.crossbar}"] * bool(settings.crossbar)
    if settings.predict is not None:
        lines = [
            f"{printable(one['file'])}: "
            + ", ".join(f"{printable(x['class'])} ({percent(x['share'])})" for x in one["classes"])
            for one in found["predictions"]
        ]
        return "\n".join([*lines, *digital, *other_t])
    rate = f"spike rate {percent(found['spike_rate'], 2)}"
    of_fold = "" if found["fold"] is None else f" of fold {found['fold']}"
    lines = [", ".join([_accuracy(found, of_fold), rate, *digital, *other_t])]
    if "integers" in found:
        differ = "{differing_spikes} of {spikes} spikes differ".format_map(found["integers"])
        lines.append(f"integers alone: {_accuracy(found['integers'], of_fold)}, {differ}")
    if "classes" in found:
        lines += _class_lines(found["classes"])
        lines.append(f"{', '.join(FILES)} are in {folder_of(settings)}")
    return "\n".join(lines)


def _accuracy(found: dict[str, Any], of_fold: str) -> str:
    share = percent(found["accuracy"], 2)
    return f"accuracy {share} ({found['correct']} of {found['images']} test images{of_fold})"


def _class_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A table; of many classes those with the lowest accuracy."""
    lines, shown = [], rows
    if len(rows) > SHOWN:
        tested = [row for row in rows if row["images"]]
        shown = sorted(tested, key=lambda row: row["accuracy"])[:SHOWN]
        lines = [f"the {len(shown)} classes with the lowest accuracy, of {len(rows)}:"]
    cells = []
    for row in shown:
        accuracy = "-" if row["accuracy"] is None else percent(row["accuracy"])
        taken = ""
        if row["most_often_taken_for"] is not None:
            taken = f"{printable(row['most_often_taken_for'])} ({row['images_taken_for_it']})"
        cells.append([printable(row["class"]), str(row["images"]), accuracy, taken])
    return [*lines, *text_table(["class", "images", "accuracy", "most often taken for"], cells)]


def as_json(found: dict[str, Any]) -> str:
    return json.dumps(found, indent=2, allow_nan=False) + "\n"
