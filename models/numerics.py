"""`--check_numerics`: which layer is the first to give NaN or an infinite number."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def watch_numbers(network: nn.Module, found: Callable[[str], None]) -> Iterator[None]:
    """While open, call `found` with the name of a layer whose output is not finite as soon as it is
    there; "the images" where it is the network's input. Each layer waits for the device."""

    def hook_of(name: str):
        def check(module: nn.Module, inputs: tuple, output: object) -> None:
            if isinstance(output, Tensor) and not output.isfinite().all():
                found(name)

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
