"""One run of a study, in a process of its own: trained by main.py, or what is left of it, and then
measured against its teacher on the test images.

    python -m experiments.one_run FOLDER         do what FOLDER/run.json says, write measured.json
    python -m experiments.one_run --times        how long those on stdin take, by main.py's dry run

The study starts it; so can you, to see a run by itself.
"""

import ctypes
import io
import json
import os
import platform
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

import main as training
from checkpoints import Checkpoint, build_network, load_checkpoint
from data_loader import Share, data_of, evaluation_loader
from distiller import distance_to_teacher
from engine.evaluate import evaluate
from engine.log import git_commit
from engine.run_folder import best_row, checkpoints_of
from experiments import as_command
from experiments.run_plan import FOUND, RUN, write_json
from load_settings import load_network, parse_settings
from models import SpikingNetwork
from models.graph import graph_of
from runtime.errors import UserError
from runtime.files import digest
from spikesim_eval.chip import PRESETS, Chip
from spikesim_eval.estimate import estimate
from spikesim_eval.trace import counting_rows, describe

COMMITS = "commits.txt"
BATCH = 64  # images: the membranes of two networks are in memory


def run(folder: Path) -> int:
    """Train and measure what FOLDER/run.json says; the exit code."""
    about = json.loads((folder / RUN).read_text())
    settings = parse_settings(about["options"])
    last, _ = checkpoints_of(folder, settings.paper_setting)
    if (folder / FOUND).is_file() and last.is_file():
        return 0
    commits = note_commit(folder / COMMITS, anew=not last.is_file())
    print("main.py", *about["options"], flush=True)
    code = training.main(about["options"])
    if code == 0:
        teacher = None if about["teacher"] is None else Path(about["teacher"])
        write_json(folder / FOUND, measure(last, teacher, commits))
    return code


def note_commit(path: Path, anew: bool) -> str:
    """Add the program's commit to those that have trained a run before, or to none, and return
    all, the first first."""
    before = [] if anew or not path.is_file() else path.read_text().splitlines()
    commits = [*dict.fromkeys([*before, git_commit() or "unknown"])]
    path.write_text("\n".join(commits) + "\n")
    return ", then ".join(commits)


def measure(path: Path, teacher_path: Path | None, commit: str | None = None) -> dict[str, Any]:
    """The numbers of a row: of the last epoch, on all test images. Of a network that was trained
    for several T those of the largest, and under "at" those of the others."""
    checkpoint = load_checkpoint(path)
    settings, rows = checkpoint.settings, checkpoint.rest["rows"]
    use_cuda = settings.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if use_cuda else "cpu")
    _, test_set = data_of(settings, settings.data_path)
    workers = min(settings.workers, os.cpu_count() or 1)
    batches = evaluation_loader(test_set, Share(min(BATCH, settings.batch_size), workers=workers))
    about = {
        "seconds": round(sum(row.get("seconds") or 0.0 for row in rows), 1),
        "commit": commit,
        "hardware": hardware(device),
    }
    network = load_network(checkpoint).to(device)
    teacher = None if teacher_path is None else load_checkpoint(teacher_path)
    of_teacher = None if teacher is None else load_network(teacher).to(device)

    def at(time_window: int) -> dict[str, Any]:
        with network.running_for(time_window):
            found, rates = over_images(network, of_teacher, batches, device)
            found |= costs(network.cpu(), rates)
            network.to(device)
        if time_window == settings.time_window:  # main.py has tested it
            found |= {"accuracy": checkpoint.accuracy, "spike_rate": rows[-1].get("spike_rate")}
            found["best_accuracy"] = best_row(rows)["test_accuracy"]
        return about | found | against(found, teacher, teacher_path)

    others = [T for T in settings.trained_at if settings.time_window != T]
    found = at(settings.time_window)
    return found | ({"at": {T: at(T) for T in others}} if others else {})


def against(
    found: dict[str, Any], teacher: Checkpoint | None, teacher_path: Path | None
) -> dict[str, Any]:
    """What the teacher, run at its own T, and a network are to each other."""
    if teacher is None:
        return {"edap_ratio": 1.0}
    baseline = json.loads((teacher_path.parent / FOUND).read_text())
    return {
        "teacher_accuracy": teacher.accuracy,
        "drop_to_teacher": teacher.accuracy - found["accuracy"],
        "edap_ratio": edap(baseline) / edap(found),
        "teacher_file": digest(teacher_path)[:12],
    }


def over_images(
    network: SpikingNetwork,
    teacher: SpikingNetwork | None,
    batches: DataLoader,
    device: torch.device,
) -> tuple[dict[str, float], dict[str, float]]:
    """Accuracy, spike rate and, with a teacher, the distances to it; and what share of spikes each
    convolution reads."""
    graph = graph_of(network)
    pools = any(node.kind == "pool" for node in graph)
    with counting_rows(network, describe(network)) if pools else nullcontext(dict) as shares:
        seen = evaluate(network, batches, device)
    measured, rates = shares(), {}
    for node in graph:
        source = graph[node.reads[0]] if node.kind == "conv" else node
        if node.kind == "conv" and source.kind == "pool":
            rates[node.name] = measured[node.name]["spike_rate"]
        elif node.kind == "conv" and source.kind == "lif":
            fired, neurons = seen.spikes[source.name]
            rates[node.name] = (fired.sum() / neurons.sum()).item()
    found = {"accuracy": seen.accuracy, "spike_rate": seen.spike_rate}
    if teacher is not None:
        on_device = ((images.to(device), labels) for images, labels in batches)
        distances = distance_to_teacher(teacher, network, on_device)
        found |= {name: by_layer.mean().item() for name, by_layer in distances.items()}
    return found, rates


def costs(network: SpikingNetwork, rates: dict[str, float]) -> dict[str, float]:
    """Energy, delay and area as the published tool charges them, so that rows of a study stay
    comparable, at these rates of spikes."""
    measured = {name: {"spike_rate": rate} for name, rate in rates.items()}
    total = estimate(describe(network, measured), Chip(**PRESETS["published"])).total
    return {name: total[name] for name in ("energy_pj", "delay_ns", "area_um2")}


def edap(costs: dict[str, Any]) -> float:
    return costs["energy_pj"] * costs["delay_ns"] * costs["area_um2"]


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    models: list[str] = []
    with suppress(OSError):  # not Linux
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    threads = torch.get_num_threads()
    return f"{models[0] if models else platform.processor()}, {threads} thread" + "s" * (
        threads > 1
    )


# How long runs will take.


def times(jobs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each job ({"options": of main.py, "teacher": its teacher's options or None}) what
    main.py's dry run expects, or {"error": its line}. A teacher need not be trained for that."""
    with tempfile.TemporaryDirectory() as folder:
        return [expected(job, Path(folder)) for job in jobs]


def expected(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    options = (*job["options"], "--save_path", str(folder / "run"))
    if job["teacher"] is None:
        return of_teacher(options)
    theirs = (*job["teacher"], "--save_path", str(folder / "run"))
    found = of_teacher(theirs)  # it finds of the data what the two must share
    if "error" in found:
        return found
    path = folder / "teacher.pth"
    of_data = {name: found[name] for name in ("input_step", "sensor")}
    settings = replace(parse_settings(theirs), **of_data)
    untrained = {"settings": asdict(settings), "model": build_network(settings).state_dict()}
    torch.save(untrained | {"epoch": 0, "accuracy": 0.0}, path)
    return dry_run((*options, "--teacher_path", str(path)))


def dry_run(options: tuple[str, ...]) -> dict[str, Any]:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = training.main([*options, "--dry_run", "--json"])
    if code != 0:
        return {"error": (err.getvalue().strip().splitlines() or ["no word"])[-1]}
    return json.loads(out.getvalue())


of_teacher = cache(dry_run)  # who has many students


def end_with(parent: int) -> None:
    """Be told to end when the study that started this process is gone, however it went."""
    PR_SET_PDEATHSIG = 1
    with suppress(OSError, AttributeError, TypeError):  # not Linux, or Windows
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit(128 + signal.SIGTERM)


def main(argv: Sequence[str]) -> int:
    if parent := os.environ.pop("MD_SNN_STUDY", ""):
        end_with(int(parent))
    return as_command("experiments.one_run", lambda: work(argv))


def work(argv: Sequence[str]) -> int:
    if [*argv] == ["--times"]:
        print(json.dumps(times(json.load(sys.stdin))))
        return 0
    if len(argv) != 1 or argv[0].startswith("-"):
        raise UserError("expected one folder of a study's run")
    return run(Path(argv[0]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
