"""`--check_numerics`: what is the first in a network to be NaN or infinite."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def watch_numbers(network: nn.Module, found: Callable[[str], None]) -> Iterator[None]:
    """While open, call `found` as soon as something is not finite.

    It is called with "the images", "the weights of LAYER" or "the BUFFER of LAYER" (a quantizer
    would clamp them, and hide it) before the layer runs, and with "the BUFFER of LAYER" (batch
    norm's running statistics) or "the output of LAYER" after that. Each layer waits for the device.
    """
    layers = list(network.named_modules())

    def check_buffers(name: str, layer: nn.Module) -> None:
        for buffer, x in layer.named_buffers(recurse=False):
            if not x.isfinite().all():
                found(f"the {buffer} of {name}")

    def check_layers(module: nn.Module, inputs: tuple) -> None:
        # All of them here: some quantizers are read from, but never run.
        for name, layer in layers:
            if not all(x.isfinite().all() for x in layer.parameters(recurse=False)):
                found(f"the weights of {name}")
            check_buffers(name, layer)
        if not inputs[0].isfinite().all():
            found("the images")

    def hook_of(name: str):
        def check(module: nn.Module, inputs: tuple, output: object) -> None:
            check_buffers(name, module)
            if isinstance(output, Tensor) and not output.isfinite().all():
                found(f"the output of {name}")

        return check

    # The network's own output comes last: it is its linear layer's.
    handles = [layer.register_forward_hook(hook_of(name)) for name, layer in layers if name]
    handles.append(network.register_forward_pre_hook(check_layers))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def first_bad_gradient(network: nn.Module) -> str:
    """ "the gradient of PARAMETER" of the parameter nearest to the loss whose gradient is not
    finite; "the gradient" where all are."""
    for name, x in reversed(list(network.named_parameters())):
        if x.grad is not None and not x.grad.isfinite().all():
            return f"the gradient of {name}"
    return "the gradient"
