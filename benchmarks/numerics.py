"""How exact float32 batch statistics are on a CPU: python -m benchmarks.numerics

The largest relative error of the variances, over the channels, of normal numbers of mean 1 and
deviation 2 in channels_last, against float64: by torch's own batch norm, by ours, and by torch's of
the same numbers in another layout. "1 and 2 processes" is the largest relative difference between
the variance of a batch and that of its two halves, put together as several processes do.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.timing import parser_of, report, table
from models.batch_norm import moments

SHAPES = [  # N (timesteps · batch), C, H, W
    (128, 128, 4, 4),
    (128, 64, 8, 8),
    (128, 32, 16, 16),
    (256, 8, 16, 16),
    (128, 64, 32, 32),
    (1024, 16, 32, 32),
    (77, 24, 45, 60),
]


def by_torch(x: Tensor) -> tuple[Tensor, Tensor]:
    mean, var = (y.double() for y in torch.batch_norm_update_stats(x, None, None, 0.0))
    return mean, var + mean.square()


def variance(first: Tensor, second: Tensor) -> Tensor:
    return (second - first.square()).float().double()


def variance_of_halves(moments_of: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor) -> Tensor:
    halves = [torch.stack(moments_of(half)) * len(half) for half in x.tensor_split(2)]
    return variance(*(sum(halves) / len(x)))


def difference(x: Tensor, expected: Tensor) -> float:
    return ((x - expected).abs() / expected).max().item()


def errors(shape: Sequence[int]) -> list[float]:
    """torch's error, ours, torch's in the other layout; 1 and 2 processes by torch, by ours."""
    x = (2 * torch.randn(shape) + 1).to(memory_format=torch.channels_last)
    exact = x.double().var((0, 2, 3), correction=0)
    theirs, ours = variance(*by_torch(x)), variance(*moments(x))
    other_layout = variance(*by_torch(x.contiguous()))
    return [
        *(difference(y, exact) for y in (theirs, ours, other_layout)),
        difference(variance_of_halves(by_torch, x), theirs),
        difference(variance_of_halves(moments, x), ours),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    args = parser_of(__doc__).parse_args(arguments)
    torch.manual_seed(0)
    rows = []
    for N, C, H, W in SHAPES:
        cells = (f"{error:.0e}" for error in errors((N, C, H, W)))
        rows.append([f"{N}×{C}×{H}×{W}", N * H * W, *cells])
    header = ["N×C×H×W", "values a channel", "torch", "ours", "torch, contiguous"]
    header += ["1 and 2 processes, torch", "1 and 2 processes, ours"]
    report("numerics", arguments, torch.device("cpu"), [table(header, rows)], args.out)


if __name__ == "__main__":
    main()
