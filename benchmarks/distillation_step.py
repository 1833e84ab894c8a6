"""Time and memory of MD-SNN's training step: python -m benchmarks.distillation_step

A student of 4 bits that learns its teacher's membranes (CLK), against the plain training step of
the full-precision network, and against the same loss as it is written down: autograd through
log_softmax, every membrane of both networks kept until the end, the teacher with its batch norms.
A teacher's forward pass is a third of a training step, so 1 + 1/3 is what distillation costs if the
quantizers and the losses are free. First both losses are compared in float64.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import (
    DEVICE,
    in_turn,
    peak_megabytes,
    quartiles,
    ratios,
    report,
    table,
    with_spread,
)
from benchmarks.training_step import NUM_CLASSES, Regions, Work, parser_of_steps
from distiller import ALPHA, BETA, TAU, Distiller, within_reach
from engine.start import keep_freed_memory
from models import MSResNet, QuanMSResNet
from models.batch_norm import estimate_statistics
from models.neuron import DEFAULT_NEURON, LIF

PLAIN, NAIVE, OURS = "full precision, plain", "MD-SNN, naive loss", "MD-SNN"


class NaiveDistiller:
    """The loss of MD-SNN (CLK), written down."""

    def __init__(self, teacher: MSResNet, student: nn.Module):
        self.teacher, self.student = teacher.eval(), student

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, None]:
        logits, membranes = self.student(images, membranes=True)
        with torch.no_grad():
            teacher_logits, teacher_membranes = self.teacher(images, membranes=True)
        logit = F.kl_div(
            F.log_softmax(logits / TAU, 1),
            F.softmax(teacher_logits / TAU, 1),
            reduction="batchmean",
        )
        neurons = [layer for layer in self.student.modules() if isinstance(layer, LIF)]
        by_layer = [
            F.kl_div(
                F.log_softmax(with_threshold(u_student), 2),
                F.softmax(with_threshold(within_reach(u_teacher, neuron)), 2),
                reduction="sum",
            )
            / (u_student.shape[0] * u_student.shape[1])
            for u_student, u_teacher, neuron in zip(
                membranes, teacher_membranes, neurons, strict=True
            )
        ]
        loss = F.cross_entropy(logits, labels) + ALPHA * TAU**2 * logit
        return logits, loss + BETA["CLK"] * torch.stack(by_layer).mean(), None


def with_threshold(u: Tensor) -> Tensor:
    """(T, B, C·H·W + 1) of u (T, B, C, H, W), see `distiller.membrane_kl`."""
    rows = u.flatten(2)
    return F.pad(rows, (0, 1), value=DEFAULT_NEURON.threshold + math.log(rows.shape[2]))


def networks(width: int, time_window: int) -> tuple[MSResNet, QuanMSResNet]:
    """(teacher, student of 4 bits)"""
    torch.manual_seed(0)
    shape = 18, NUM_CLASSES, time_window, 3, width
    return MSResNet(*shape), QuanMSResNet(*shape, bits=4)


def step_of(
    name: str, width: int, time_window: int, batch: int, precision: str, compiled: bool = False
) -> Callable[[], None]:
    """One training step: plain, naive or ours; on a GPU as main.py takes it with --compile."""
    teacher, student = networks(width, time_window)
    if name == PLAIN:
        work = Work(teacher, batch, precision, DEVICE)
    else:
        work = Work(student, batch, precision, DEVICE)
        distiller = {NAIVE: NaiveDistiller, OURS: Distiller}[name](teacher.to(DEVICE), student)
        work.loss = lambda images, labels: distiller(images, labels)[1]
    if compiled:
        work.as_with_compile()
    return work.step


def difference_of_losses(device: torch.device) -> float:
    """Largest relative difference between ours and the naive one in float64: loss, gradients.

    Raises AssertionError above 1e-7.
    """
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64, device=device)
    labels = torch.tensor([0, 1], device=device)
    found = []
    for distiller in (NaiveDistiller, Distiller):
        teacher, student = (x.double().to(device) for x in networks(width=8, time_window=4))
        estimate_statistics(teacher, [images], (4,))  # membranes that no code reaches
        _, loss, _ = distiller(teacher, student.train())(images, labels)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in student.parameters())])
    worst = max(((a - b).norm() / a.norm()).item() for a, b in zip(*found, strict=True))
    assert worst < 1e-7, f"the losses differ by {worst:.1e}"
    return worst


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of_steps(__doc__, rounds=9)
    parser.add_argument("--amp", action="store_true", help="bf16 autocast")
    parser.add_argument("--no_memory", dest="memory", action="store_false")
    args = parser.parse_args(arguments)
    keep_freed_memory()
    how = args.width, args.T, args.batch, "bf16" if args.amp else "float32"
    regions = Regions()
    difference = difference_of_losses(DEVICE)
    steps = {name: step_of(name, *how) for name in (PLAIN, NAIVE, OURS)}
    seconds = regions.compile(lambda: [steps[name]() for name in (PLAIN, OURS)])
    variants = [(name, False) for name in steps] + [(PLAIN, True), (OURS, True)]
    labels = {variant: variant[0] + ", --compile" * variant[1] for variant in variants}
    compiled_steps = {name: step_of(name, *how, compiled=True) for name in (PLAIN, OURS)}
    functions = {
        labels[name, compiled]: regions.using(
            compiled, (compiled_steps if compiled else steps)[name]
        )
        for name, compiled in variants
    }
    times, repeated = in_turn(functions, args.rounds, DEVICE)
    regions.use(compiled=False)
    memory = {name: peak_megabytes(step_of, name, *how) for name in steps if args.memory}
    rows = []
    for name, compiled in variants:
        label, plain = labels[name, compiled], labels[PLAIN, compiled]
        rows.append(
            (
                label,
                f"{1e3 * quartiles(times[label])[1]:.1f}",
                with_spread(ratios(times[label], times[plain]), 3),
                with_spread(ratios(times[label], times[NAIVE]), 3),
                # a compiled step's would hold the compiler's too
                "-" if compiled or not memory else f"{memory[name]:.0f}",
                "-" if compiled or not memory else f"{memory[name] / memory[NAIVE]:.2f}",
            )
        )
    header = ("", "step, ms", "× plain step", "× naive", "peak memory, MB", "× naive")
    parts = [
        f"MS-ResNet-18, width {args.width}, 32×32, T = {args.T}, batch {args.batch}, CLK, 4 bits, "
        f"{how[-1]}; compiling took {seconds:.0f} s; {args.rounds} "
        f"rounds, {repeated} more were noisy and repeated",
        f"float64: naive and MD-SNN agree within {difference:.0e}",
        table(header, rows),
        "The plain step beside a compiled one is compiled too. Ideal: 1 + 1/3.",
    ]
    report("distillation_step", arguments, DEVICE, parts, args.out)


if __name__ == "__main__":
    main()
