"""What distillation changed in the membranes, drawn: python -m experiments.membrane_report

    python -m experiments.membrane_report --teacher original-best.pth --student student-last.pth \
        --mdsnn qamd-last.pth --out report/

Over the test set of the checkpoints: each student's distance to the teacher's membrane potentials
per LIF layer and timestep (membrane_report.csv and the first row of membrane_report.png and .pdf),
and how one layer's membrane potentials are distributed in the three networks (the second row).
Beside the students stand, for scale, the teacher's own membranes, rounded to MD-SNN's codes.
"""

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from checkpoints import load_checkpoint
from data_loader import Share, data_of, evaluation_loader
from display import COLOURS, legend_below, new_figure, save_picture
from distiller import distance_to_teacher
from experiments import as_command
from load_settings import load_network
from models import SpikingNetwork
from models.neuron import neuron_of
from runtime.command import Parser
from runtime.errors import UserError
from runtime.files import check_writable
from settings import Settings

ROUNDED = "rounded teacher"
NETWORK_COLOURS = COLOURS | {ROUNDED: "#000000"}
DISTANCES = {  # of distance_to_teacher: (what the axis says, its scale)
    "membrane_kl": ("membrane KL", 1),
    "membrane_mse": ("membrane MSE", 1),
    "differing_spikes": ("differing spikes, %", 100),
}
BINS = 80  # of a full-precision membrane's histogram
SAMPLES = 10**7  # most membrane potentials that a distribution is drawn from


class RoundedTeacher(nn.Module):
    """The teacher with its membranes rounded to a student's codes, which come no nearer."""

    def __init__(self, teacher: SpikingNetwork, student: SpikingNetwork):
        super().__init__()
        self.teacher, self.student = teacher, student

    @torch.no_grad()
    def forward(self, images: Tensor, membranes: bool = True) -> tuple[Tensor, list[Tensor]]:
        logits, exact = self.teacher(images, membranes=True)
        layers, rounded = self.student.neurons().values(), []
        for layer, u in zip(layers, exact, strict=True):
            codes, step = layer.quantizer.codes(u)
            rounded.append(codes * step)
        return logits, rounded


@torch.no_grad()
def membrane_of(network: SpikingNetwork, layer: int, batches: DataLoader) -> Tensor:
    """Membrane potentials of one LIF layer over the batches, evenly thinned to SAMPLES."""
    kept = []
    for images, _ in batches:
        u = network(images, membranes=True)[1][layer].flatten()
        every = 1 + u.numel() * len(batches) // SAMPLES
        kept.append(u[::every])
    return torch.cat(kept)


def write_csv(path: Path, names: list[str], distances: dict[str, dict[str, Tensor]]) -> None:
    """A row per network, LIF layer and timestep."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["network", "lif_layer", "timestep", *DISTANCES])
        for label, distance in distances.items():
            for i, name in enumerate(names):
                for t in range(distance["membrane_kl"].shape[1]):
                    values = (distance[key][i, t].item() for key in DISTANCES)
                    writer.writerow([label, name, t + 1, *values])


def draw_distances(axes, distances: dict[str, dict[str, Tensor]]) -> None:
    """A line per network and timestep over the layers; later timesteps are darker."""
    for axis, (key, (label, scale)) in zip(axes, DISTANCES.items(), strict=True):
        for network, distance in distances.items():
            steps = distance[key].T * scale
            for t, values in enumerate(steps):
                last = t == len(steps) - 1
                axis.plot(
                    range(1, len(values) + 1),
                    values.tolist(),
                    color=NETWORK_COLOURS[network],
                    alpha=0.25 + 0.75 * (t + 1) / len(steps),
                    marker="." if last else None,
                    label=f"{network}, t = {t + 1}" if last or t == 0 else None,
                )
        axis.set(xlabel="LIF layer, in forward order", title=f"distance to the teacher: {label}")
        axis.set_ylim(bottom=0)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def draw_distributions(axes, membranes: dict[str, Tensor], layer: str, threshold: float) -> None:
    """Densities of neurons and timesteps: a histogram, or a thin bar per code of a quantized
    membrane, its height the code's share over the distance of two codes: on the same axes."""
    low = min(u.min() for u in membranes.values()).item() - 0.5
    high = max(u.max() for u in membranes.values()).item() + 0.5
    for axis, (network, u) in zip(axes, membranes.items(), strict=True):
        values, counts = u.unique(return_counts=True)
        apart = values.diff().min().item() if len(values) > 1 else 1.0
        width = 0.3 * apart
        if len(values) > 2 * BINS:
            counts, edges = torch.histogram(u, BINS, range=(low, high))
            values, apart = (edges[1:] + edges[:-1]) / 2, (high - low) / BINS
            width = apart
        density = 100 * counts / (u.numel() * apart)
        axis.bar(values.tolist(), density.tolist(), width, color=NETWORK_COLOURS[network])
        axis.axvline(threshold, color="black", linestyle="--")
        axis.set(xlabel="membrane potential (dashed: the threshold)", xlim=(low, high))
        fires = 100 * (u > threshold).float().mean()
        axis.set_title(f"{network}, {layer}: {fires:.1f} % fire")
    axes[0].set_ylabel("neurons · timesteps, % per unit")


def networks_of(paths: dict[str, str]) -> tuple[Settings, dict[str, SpikingNetwork]]:
    """MD-SNN's settings, and the networks. Raises UserError where they cannot be compared."""
    checkpoints = {label: load_checkpoint(path) for label, path in paths.items()}
    settings = checkpoints["MD-SNN"].settings
    if settings.bits is None:
        raise UserError(f"--mdsnn {paths['MD-SNN']} is a full-precision network")
    for label, checkpoint in checkpoints.items():
        names = ["data", "network_name", "width", "fold", "leak", "threshold", "reset"]
        if label != "teacher":  # which may be of another T, and is run for theirs
            names.append("time_window")
        if checkpoint.settings.time_window == settings.time_window:
            names.append("input_step")
        for name in names:
            if getattr(checkpoint.settings, name) != getattr(settings, name):
                what = "network" if name == "network_name" else f"--{name}"
                raise UserError(f"{paths[label]} and {paths['MD-SNN']} differ in {what}")
    return settings, {label: load_network(checkpoint) for label, checkpoint in checkpoints.items()}


def draw(
    distances: dict[str, dict[str, Tensor]],
    membranes: dict[str, Tensor],
    layer: str,
    threshold: float,
    path: Path,
) -> None:
    figure, (above, below) = new_figure(13, 7.5, 2, 3)
    draw_distances(above, distances)
    draw_distributions(below, membranes, layer, threshold)
    for panel in below[1:]:
        panel.sharey(below[0])
    below[0].autoscale(axis="y")
    legend_below(figure, above)
    save_picture(figure, path)


def membrane_report(args: argparse.Namespace) -> None:
    paths = {"teacher": args.teacher, "student": args.student, "MD-SNN": args.mdsnn}
    settings, networks = networks_of(paths)
    teacher, *_ = networks.values()
    names = list(teacher.neurons())
    layer = args.layer or names[len(names) // 2]
    if layer not in names:
        raise UserError(f"--layer {layer}: the LIF layers are {', '.join(names)}")
    check_writable(args.out, "--out")
    _, test_set = data_of(settings, args.data_path)
    batches = evaluation_loader(test_set, Share(settings.batch_size, workers=settings.workers))

    with teacher.running_for(settings.time_window):
        rounded = RoundedTeacher(teacher, networks["MD-SNN"])
        compared = {x: networks[x] for x in ("student", "MD-SNN")} | {ROUNDED: rounded}
        distances = {x: distance_to_teacher(teacher, y, batches) for x, y in compared.items()}
        membranes = {x: membrane_of(y, names.index(layer), batches) for x, y in networks.items()}
    args.out.mkdir(parents=True, exist_ok=True)
    write_csv(args.out / "membrane_report.csv", names, distances)
    threshold = neuron_of(teacher).threshold
    draw(distances, membranes, layer, threshold, args.out / "membrane_report.png")
    for label, distance in distances.items():
        means = ", ".join(
            f"{text} {distance[key].mean() * scale:.4g}" for key, (text, scale) in DISTANCES.items()
        )
        print(f"{label}: {means}")
    print(f"membrane_report.csv, membrane_report.png and .pdf are in {args.out}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="experiments.membrane_report", description=__doc__.splitlines()[0])
    for network in ("teacher", "student", "mdsnn"):
        parser.add_argument(f"--{network}", required=True, metavar="CKPT")
    parser.add_argument("--layer", help="the LIF layer whose distribution is drawn, by name")
    parser.add_argument("--data_path", default="./data")
    parser.add_argument("--out", type=Path, required=True, help="folder of the report")
    return as_command(parser.prog, lambda: membrane_report(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
