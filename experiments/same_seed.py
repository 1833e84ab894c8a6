"""How far the quickstart's numbers move with the same seed: python -m experiments.same_seed

Trains the quickstart's teacher, student and MD-SNN again under what differs between machines: the
number of threads and processes, the CPU's instructions, eager and --compile; and, for scale, with
other seeds. The accuracies are those of the last epoch. Runs that are there are not run again, so
the command can be stopped and continued.
"""

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from engine.run_folder import read_metrics
from experiments.one_run import hardware
from experiments.run_plan import epochs_done
from spikesim_eval.render import markdown_table

REPOSITORY = Path(__file__).resolve().parent.parent
SEED = 1234
# As scripts/quickstart.sh: (folder, options), in this order.
TRAININGS = {
    "teacher": ["--paper_setting", "original", "--epochs", "12"],
    "student": ["--paper_setting", "student", "--bits", "2", "--epochs", "6"],
    "MD-SNN": ["--paper_setting", "qamd", "--bits", "2", "--loss", "CLK", "--epochs", "6"],
}
OPTIONS = ["--data", "digits", "--model_depth", "18", "--width", "8", "--workers", "0"]


def threads(number: int) -> dict[str, str]:
    """The environment; where both are set, torch goes by MKL's."""
    return {name: str(number) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}


AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2"}
SSE = {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}
# (environment, processes, options of main.py); the environment is above one thread a process.
SETTINGS: dict[str, tuple[dict[str, str], int, list[str]]] = {
    "1 thread": ({}, 1, []),
    "the same again": ({}, 1, []),
    "2 threads": (threads(2), 1, []),
    "2 processes": ({}, 2, []),
    "`--compile`": ({}, 1, ["--compile"]),
    "oneDNN, torch and MKL as on a CPU with AVX2": (AVX2, 1, []),
    "oneDNN, torch and MKL as on a CPU with SSE4.1": (SSE, 1, []),
}


def train(folder: Path, setting: str, seed: int) -> dict[str, float]:
    """Accuracy of the last epoch of each of TRAININGS, run where it has not been to its end."""
    environment, processes, more = SETTINGS[setting]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    found = {}
    for name, options in TRAININGS.items():
        epochs = int(options[options.index("--epochs") + 1])
        metrics = folder / name / "metrics.csv"
        if epochs_done(metrics.parent) < epochs:
            command = [sys.executable, *(launcher if processes > 1 else []), "main.py", *OPTIONS]
            command += [*options, *more, "--seed", str(seed), "--save_path", metrics.parent]
            if "qamd" in options:
                command += ["--teacher_path", folder / "teacher" / "original-best.pth"]
            print(f"{folder.name}: {name}", file=sys.stderr, flush=True)
            subprocess.run(
                [*command, "--resume"],
                cwd=REPOSITORY,
                env=os.environ | threads(1) | environment,
                stdout=subprocess.DEVNULL,
                check=True,
            )
        found[name] = 100 * read_metrics(metrics)[-1]["test_accuracy"]
    return found | {"gain": found["MD-SNN"] - found["student"]}


def spread(name: str, rows: list[dict[str, float]]) -> list[list[str]]:
    """Smallest and largest value, and the standard deviation, of each column."""
    columns = [[row[key] for row in rows] for key in rows[0]]
    return [
        [f"**{name}**, from … to", *(f"{min(x):.2f} … {max(x):.2f}" for x in columns)],
        [f"**{name}**, standard deviation", *(f"{statistics.stdev(x):.2f}" for x in columns)],
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/same_seed"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1235, 1236])
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    args = parser.parse_args(arguments)
    runs = args.runs.absolute()

    same = {
        setting: train(runs / f"setting{number}", setting, SEED)
        for number, setting in enumerate(SETTINGS)
    }
    first, again, *_ = same
    seeds = {
        f"{first}, seed {seed}": train(runs / f"seed{seed}", first, seed) for seed in args.seeds
    }
    lines = [[name, *(f"{x:.2f}" for x in row.values())] for name, row in (same | seeds).items()]
    one_seed = [row for name, row in same.items() if name != again]
    lines += spread(f"seed {SEED}, {len(one_seed)} settings", one_seed)
    other_seeds = [same[first], *seeds.values()]
    lines += spread(f"{len(other_seeds)} seeds, {first}", other_seeds)
    words = sys.argv[1:] if arguments is None else arguments
    text = "\n\n".join(
        [
            f"`{' '.join(['python -m experiments.same_seed', *words])}`",
            f"{hardware(torch.device('cpu'))}; torch {torch.__version__}",
            f"digits, MS-ResNet-18, width 8, T = 4, 2 bits, the quickstart's epochs; seed {SEED} "
            "where no other is named; accuracy of the last epoch, %, and MD-SNN minus student, "
            "points",
            "\n".join(markdown_table(["", *TRAININGS, "gain"], lines)),
        ]
    )
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
