"""`--compile`: the hot functions as fused kernels of torch.compile.

The neuron, the quantizers, batch norm and the membrane loss are plain functions of flat tensors. On
a CPU each is compiled for tensors of every size; on a GPU for each size, since how a sum is shared
out over its many threads depends on that. The eager functions stay the reference, and what runs
where there is no compiler.
"""

import sys
from collections.abc import Callable
from contextlib import suppress

import torch

import quantization
from models import batch_norm, neuron

REGIONS = (
    neuron.lif_forward,
    neuron.lif_backward,
    batch_norm.affine,
    batch_norm.gradient_sums,
    batch_norm.gradient_of_input,
    quantization.integers_forward,
    quantization.integers_backward,
)


def current(function: Callable) -> Callable:
    """What stands in the place of a module-level function now."""
    return getattr(sys.modules[function.__module__], function.__name__)


def set_regions(functions: tuple[Callable, ...], replace: Callable[[Callable], Callable]) -> None:
    """Put `replace(function)` in the place of each module-level function."""
    for function in functions:
        setattr(sys.modules[function.__module__], function.__name__, replace(function))


def compile_regions(
    work: Callable[[], object], *functions: Callable, every_size: bool = True
) -> str | None:
    """Compile REGIONS and more module-level functions, for the rest of the process.

    `work` is run at once and has to call them as the program will, with tensors of its sizes, so
    that all compiling is done when this returns. Where compiling fails, everything stays eager and
    the reason is returned.
    """
    # The neuron's constants are numbers, not inputs; each T and each flag has a kernel of its own.
    torch._dynamo.config.specialize_float = True
    torch._dynamo.config.recompile_limit = 256
    with suppress(AttributeError):  # torch before 2.10
        # Triton's own division is off by the last bit, and membranes lie on ties: halves of a step.
        torch._inductor.config.eager_numerics.division_rounding = True
    regions = (*REGIONS, *functions)
    set_regions(regions, lambda f: torch.compile(f, dynamic=every_size, fullgraph=True))
    try:
        work()
    except Exception as error:  # a compiler that is missing or broken raises anything
        set_regions(regions, lambda f: f)
        return next(line for line in (*str(error).splitlines(), repr(error)) if line.strip())
    return None
