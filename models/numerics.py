"""`--check_numerics`: which layer is the first to give NaN or an infinite number."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def watch_numbers(network: nn.Module, found: Callable[[str], None]) -> Iterator[None]:
    """While open, call `found` as soon as something is not finite: with "the images", "the weights
    of LAYER" (a quantizer would clamp them, and hide it) or "the output of LAYER". Each layer waits
    for the device."""

    def hook_of(name: str):
        def check(module: nn.Module, inputs: tuple, output: object) -> None:
            if not all(x.isfinite().all() for x in module.parameters(recurse=False)):
                found(f"the weights of {name}")
            if isinstance(output, Tensor) and not output.isfinite().all():
                found(f"the output of {name}")

        return check

    def check_images(module: nn.Module, inputs: tuple) -> None:
        if not inputs[0].isfinite().all():
            found("the images")

    # The network's own output comes last: it is its linear layer's.
    layers = [(name, layer) for name, layer in network.named_modules() if name]
    handles = [layer.register_forward_hook(hook_of(name)) for name, layer in layers]
    handles.append(network.register_forward_pre_hook(check_images))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
