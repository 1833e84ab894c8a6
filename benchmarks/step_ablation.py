"""What each idea is worth in a training step: python -m benchmarks.step_ablation

One idea at a time is taken back, and the step is timed in turn with the step as it is (--compile),
in one process. The table holds medians (and quartiles) of the ratios: 1.10 is 10 % slower without.
All but two save time: statistics in sums of 256 values are there to be exact (benchmarks.numerics),
window bits to save memory, which is measured beside them.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from unittest import mock

import torch
from torch import Tensor, nn

import distiller
import kernels
from benchmarks.distillation_step import OURS
from benchmarks.distillation_step import step_of as taught_step_of
from benchmarks.timing import DEVICE, in_turn, peak_megabytes, ratios, report, table, with_spread
from benchmarks.training_step import (
    COMPILED,
    COMPILED_STUDENT,
    Regions,
    parser_of_steps,
    step_of,
    work_of,
)
from engine.start import keep_freed_memory
from models import batch_norm, layers, quantized_layers
from models.neuron import LIF, lif, unfold_time

FULL_PRECISION, STUDENT, EVALUATION = "full precision", "student", "student, evaluation"


def autograd_kl(student: Tensor, teacher: Tensor, anchor: float = -math.inf) -> Tensor:
    last = student.new_full((), anchor)
    log_student, log_teacher = (
        x.logsumexp(1, keepdim=True).logaddexp(last) for x in (student, teacher)
    )
    products = (teacher - log_teacher).exp() * (teacher - student)
    return (products.sum(1, keepdim=True) + log_student - log_teacher).mean()


def moments_by_var_mean(x: Tensor) -> tuple[Tensor, Tensor]:
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    return mean.double(), torch.addcmul(var.double(), mean.double(), mean.double())


def moments_in_one_sum(x: Tensor) -> tuple[Tensor, Tensor]:
    mean, var = torch.batch_norm_update_stats(x, None, None, 0.0)
    return mean.double(), torch.addcmul(var.double(), mean.double(), mean.double())


def torch_batch_norm(self: nn.BatchNorm2d, x: Tensor, repeats: int = 1) -> Tensor:
    return nn.BatchNorm2d.forward(self, x)


def pick(x: Tensor, stride: int) -> Tensor:
    return x[:, :, ::stride, ::stride].contiguous(memory_format=torch.channels_last)


def defined_lif(self: LIF, x: Tensor, time_window: int, watch: None) -> Tensor:
    spikes, _ = lif(unfold_time(x, time_window), neuron=self.neuron)
    return spikes.flatten(0, 1).contiguous(memory_format=torch.channels_last)


def our_batch_norm(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float
) -> Tensor:
    scale = weight.detach() * (inverse_std := torch.rsqrt(var + eps))
    folded = scale, bias.detach() - mean * scale
    statistics = mean, inverse_std, x.numel() // len(mean)
    return batch_norm._BatchNorm.apply(x, weight, bias, folded, statistics, None)


def without_window_bits(*variant: object) -> Callable[[], None]:
    step = step_of(*variant)

    def run() -> None:
        with mock.patch.object(kernels, "PER_BYTE", 1):
            step()

    return run


def ideas() -> list[tuple[str, str, Callable[[], AbstractContextManager]]]:
    """(idea, the work that it speeds up, what takes it back while open)"""

    def eager(*names: str) -> Callable[[], AbstractContextManager]:
        functions = {name: kernels.REGIONS[name] for name in names}
        return lambda: mock.patch.dict(kernels.fused, functions)

    def patch(owner: object, name: str, value: object) -> Callable[[], AbstractContextManager]:
        return lambda: mock.patch.object(owner, name, value)

    in_integers = patch(quantized_layers, "spikes_convolve_in_integers", lambda: False)
    unfolded = patch(distiller, "folded", lambda teacher: teacher.eval().requires_grad_(False))
    return [
        ("one autograd function for the LIF", FULL_PRECISION, patch(LIF, "forward", defined_lif)),
        ("window bits, eight in a byte", FULL_PRECISION, patch(kernels, "PER_BYTE", 1)),
        ("fused kernels of the LIF", FULL_PRECISION, eager("lif_forward", "lif_backward")),
        ("fused kernels of all functions", STUDENT, eager(*kernels.REGIONS)),
        ("fused kernels of all functions", OURS, eager(*kernels.REGIONS)),
        ("fused kernel of the membrane KL", OURS, eager("softmax_kl_forward")),
        ("KL with its gradient in one pass", OURS, patch(distiller, "softmax_kl", autograd_kl)),
        ("teacher's batch norms folded", OURS, unfolded),
        ("spikes convolved in 8-bit integers", STUDENT, in_integers),
        ("spikes convolved in 8-bit integers", EVALUATION, in_integers),
        (
            "statistics by batch_norm_update_stats, not var_mean",
            STUDENT,
            patch(batch_norm, "moments", moments_by_var_mean),
        ),
        (
            "statistics in sums of 256 values",
            FULL_PRECISION,
            patch(batch_norm.BatchNorm, "forward", torch_batch_norm),
        ),
        (
            "statistics in sums of 256 values",
            STUDENT,
            patch(batch_norm, "moments", moments_in_one_sum),
        ),
        (
            "torch's own batch norm in one process",
            FULL_PRECISION,
            patch(batch_norm._PlainBatchNorm, "apply", our_batch_norm),
        ),
        (
            "channels_last gradient of the shortcut's pixels",
            FULL_PRECISION,
            patch(layers._PickPixels, "apply", pick),
        ),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    args = parser_of_steps(__doc__, rounds=5).parse_args(arguments)
    keep_freed_memory()
    regions = Regions()

    plain, student = (
        work_of(name, 18, args.T, args.width, args.batch, "float32")
        for name in (COMPILED, COMPILED_STUDENT)
    )
    functions = {
        FULL_PRECISION: plain.step,
        STUDENT: student.step,
        EVALUATION: student.evaluate,
        OURS: taught_step_of(OURS, args.width, args.T, args.batch, "float32"),
    }
    regions.compile(lambda: [work() for work in functions.values()])
    todo = ideas()
    for number, (_, work, without) in enumerate(todo):
        run = functions[work]
        if work == OURS:
            with without():  # the distiller folds its teacher when it is made
                run = taught_step_of(OURS, args.width, args.T, args.batch, "float32")

        def taken_back(run: Callable[[], None] = run, without=without) -> None:
            with without():
                run()

        functions[f"{number}"] = taken_back
    times, repeated = in_turn(functions, args.rounds, DEVICE)
    regions.use(compiled=False)
    rows = [
        (idea, work, with_spread(ratios(times[f"{number}"], times[work]), 3))
        for number, (idea, work, _) in enumerate(todo)
    ]
    how = COMPILED, 18, args.T, args.width, args.batch, "float32"
    with_bits, without_bits = (
        peak_megabytes(make, *how) for make in (step_of, without_window_bits)
    )
    parts = [
        f"MS-ResNet-18, width {args.width}, 32×32, T = {args.T}, batch {args.batch}, float32, 4 "
        f"bits, CLK; {args.rounds} rounds, {repeated} more were noisy and repeated",
        table(("idea", "work", "time without it / with it"), rows),
        f"Window bits: full precision's peak memory without them / with them is "
        f"{without_bits:.0f} / {with_bits:.0f} MB = {without_bits / with_bits:.3f}",
    ]
    report("step_ablation", arguments, DEVICE, parts, args.out)


if __name__ == "__main__":
    main()
