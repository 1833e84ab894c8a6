"""`--compile`: turn the hot functions into fused kernels of torch.compile, one each.

The neuron, the quantizers, batch norm and the membrane loss are plain functions of a few flat
tensors, whose sizes may change: each is compiled once for all layers. The eager functions stay the
reference, and what runs where no compiler is.
"""

import sys
from collections.abc import Callable

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


def compile_regions(*functions: Callable) -> None:
    """Compile REGIONS and more functions, module-level ones, in place of the eager ones.

    Compilation itself happens at the first call of each.
    """
    # The constants of the neuron are numbers, not inputs; T and flags give a kernel each.
    torch._dynamo.config.specialize_float = True
    torch._dynamo.config.recompile_limit = 64
    for function in (*REGIONS, *functions):
        compiled = torch.compile(function, dynamic=True, fullgraph=True)
        setattr(sys.modules[function.__module__], function.__name__, compiled)
