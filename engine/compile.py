"""`--compile`: the hot functions as fused kernels of torch.compile.

On a CPU each region of `kernels` is compiled for tensors of every size; on a GPU for each size,
since how a sum is shared out over its many threads depends on that. The eager functions stay the
reference, and what runs where there is no compiler.
"""

from collections.abc import Callable
from contextlib import suppress

import torch

import kernels


def compile_regions(work: Callable[[], object], every_size: bool = True) -> str | None:
    """Compile the hot functions, for the rest of the process.

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
    for name, function in kernels.REGIONS.items():
        kernels.fused[name] = torch.compile(function, dynamic=every_size, fullgraph=True)
    try:
        work()
    except Exception as error:  # a compiler that is missing or broken raises anything
        kernels.fused.clear()
        return next(line for line in (*str(error).splitlines(), repr(error)) if line.strip())
    return None
