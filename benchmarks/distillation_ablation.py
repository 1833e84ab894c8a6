"""What each choice in distillation is worth: python -m benchmarks.distillation_ablation

One change at a time to the defaults of main.py, at 2 bits, from scratch and from the teacher. A
fold's training images are split again into training and validation, so that its own test images
choose nothing; other folds of the study test on some of the validation images. Candidates that
lost stay in this file and out of the program.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold
from torch import Tensor

from benchmarks import distillation_study as study
from benchmarks.timing import table
from data_loader import digits_of
from distiller import (
    BETA,
    BETA_SCHEDULES,
    MEMBRANE_LOSSES,
    mean_over_layers,
    membrane_kl,
    membrane_mse,
)
from models.neuron import THRESHOLD

BITS = "2"
KEYS = ("fold", "start", "change")
CLK = study.METHODS["CLK"]
CHANGES = {  # to the defaults: options of main.py
    "student": study.STUDENT,
    "student, clip_grad 5": [*study.STUDENT, "--clip_grad", "5"],
    "CLK": CLK,
    "alpha 0.1": [*CLK, "--alpha", "0.1"],
    "tau 1": [*CLK, "--tau", "1"],
    "beta 10": [*CLK, "--beta", "10"],
    "beta 30": [*CLK, "--beta", "30"],
    "beta 300": [*CLK, "--beta", "300"],
    "constant beta": [*CLK, "--beta_schedule", "constant"],
    "beta warmed up": [*CLK, "--beta_schedule", "warm-up"],
    "beta for one half": [*CLK, "--beta_schedule", "half"],
    "beta to three quarters": [*CLK, "--beta_schedule", "three quarters"],
    "clip_grad 1": [*CLK, "--clip_grad", "1"],
    "no clipping": [*CLK, "--clip_grad", "0"],
    "CLM": study.METHODS["CLM"],
    "CLM, beta 100": [*study.METHODS["CLM"], "--beta", "100"],
    "CLK + CLM": ["--paper_setting", "qamd", "--loss", "both"],
    "Bernoulli": ["--paper_setting", "qamd", "--loss", "Bernoulli"],
}


def bernoulli_kl(student: list[Tensor], teacher: list[Tensor], width: float = 0.25) -> Tensor:
    """KL between firing probabilities σ((u - THRESHOLD) / width), mean over all neurons."""

    def of_layer(u_student: Tensor, u_teacher: Tensor) -> Tensor:
        z_student, z_teacher = ((u - THRESHOLD) / width for u in (u_student, u_teacher))
        p = torch.sigmoid(z_teacher)
        cross_entropy, entropy = (
            F.binary_cross_entropy_with_logits(z, p) for z in (z_student, z_teacher)
        )
        return cross_entropy - entropy

    return mean_over_layers(map(of_layer, student, teacher))


def with_candidates(log: Path) -> None:
    """A worker in which main.py knows the candidates too."""
    study.quiet_worker(log)
    BETA.update({"both": 100.0, "Bernoulli": 10.0})
    MEMBRANE_LOSSES["both"] = lambda s, t: membrane_kl(s, t) + membrane_mse(s, t)
    MEMBRANE_LOSSES["Bernoulli"] = bernoulli_kl
    BETA_SCHEDULES["warm-up"] = lambda done: min(1.0, 5 * done)
    BETA_SCHEDULES["half"] = lambda done: float(done < 0.5)
    BETA_SCHEDULES["three quarters"] = lambda done: BETA_SCHEDULES["cosine"](min(1.0, done / 0.75))


def validation_data(fold: int) -> study.DataSets:
    """The training images of a fold of the study, split into training and validation images."""
    train, _ = study.fold_indices(fold)
    labels = load_digits().target[train]
    splits = StratifiedKFold(study.FOLDS, shuffle=True, random_state=0).split(train, labels)
    return digits_of(*(train[share] for share in next(iter(splits))))


def ablation(arguments: Sequence[str] | None = None) -> None:
    parser = study.parser_of(__doc__.splitlines()[0], "distillation_ablation", folds=3)
    parser.add_argument("--changes", nargs="+", default=list(CHANGES), choices=CHANGES)
    args = parser.parse_args(arguments)

    width = ["--width", args.width]
    todo = {
        (fold, start, change): [
            *(*CHANGES[change], *study.STARTS[start], "--bits", BITS),
            *(*width, "--epochs", args.epochs),
        ]
        for fold in args.folds
        for change in args.changes
        for start in study.STARTS
    }
    path = args.results / "distillation_ablation.csv"
    rows = study.run_missing(
        path,
        KEYS,
        study.size_of(args),
        todo,
        args.runs,
        validation_data,
        [*width, "--epochs", args.teacher_epochs],
        with_candidates,
    )

    groups = study.grouped(rows, KEYS[1:])
    shown = ("accuracy", "membrane_kl", "membrane_mse", "differing_spikes")
    lines = []
    for start in study.STARTS:
        for change in CHANGES:
            if runs := groups.get((start, change)):
                cells = [study.measured(runs, name) for name in shown]
                students = groups.get((start, "student"), runs)
                cells += study.against_student(runs, students)
                lines.append([start, change, str(len(runs)), *cells])
    header = ["start", "change", "folds", *(study.MEASURES[name][0] for name in shown)]
    text = (
        f"digits, validation images of {len(args.folds)} folds, MS-ResNet-18, width {args.width}, "
        f"T = 4, {BITS} bits, {args.epochs} epochs; mean ± standard deviation, gains ± standard "
        "error\n\n" + table([*header, *study.AGAINST_STUDENT], lines) + "\n"
    )
    path.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    ablation()
