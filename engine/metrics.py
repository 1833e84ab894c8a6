"""The sums of a running epoch; `--check_numerics`: the first NaN or infinity in a network."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine.run import Run, not_finite
from runtime.errors import UserError
from runtime.processes import sum_over_processes

NO_TERMS = ("loss", "train_accuracy", "images")  # among an epoch's sums


class EpochSums:
    """This process's sums over the images of an epoch: the loss, its terms and the accuracy.

    They stay on the device, and so does the first step in which one was NaN or infinite: all in one
    tensor each, since a GPU is asked for every sum in turn.
    """

    def __init__(self, run: Run, device: torch.device):
        self.run, self.gradient = run, "the gradient"
        self.names = list(run.sums)
        self.sums = torch.tensor(list(run.sums.values()), dtype=torch.float64, device=device)
        self.first_bad: Tensor | None = None

    def add(self, means: dict[str, Tensor], gradient_norm: Tensor, images: int) -> None:
        """Add a batch's means; `gradient_norm` is only looked at."""
        means = means | {"images": torch.ones_like(means["loss"])}
        values = torch.stack([*means.values(), gradient_norm.double()])
        if not self.names:
            self.names, self.sums = list(means), torch.zeros_like(values[:-1])
        self.sums.add_(values[:-1], alpha=images)
        bad_step = torch.full_like(values, math.inf).where(values.isfinite(), self.run.step + 1)
        before = bad_step if self.first_bad is None else self.first_bad
        self.first_bad = torch.minimum(before, bad_step)

    def refuse(self, what: str) -> NoReturn:
        """Raise UserError: `what` is not finite in the step that runs."""
        raise UserError(not_finite(what, self.run, self.run.step + 1))

    def check(self) -> None:
        """Raise UserError, in all processes, where a number was not finite in one."""
        if self.first_bad is not None:
            first = sum_over_processes(self.first_bad.clone(), dist.ReduceOp.MIN).tolist()
            steps = dict(zip((*self.names, "gradient"), first, strict=True))
            # Of those that go wrong in the same step, terms are named before their sum.
            terms = [name for name in self.names if name not in NO_TERMS]
            name = min((*terms, "loss", "gradient"), key=steps.__getitem__)
            if steps[name] < math.inf:
                what = self.gradient if name == "gradient" else f"the loss term {name}"
                raise UserError(not_finite(what, self.run, int(steps[name])))

    def read(self) -> dict[str, float]:
        """The sums of this process."""
        self.check()
        return dict(zip(self.names, self.sums.tolist(), strict=True))

    def means(self) -> dict[str, float]:
        """Means over the images of all processes."""
        self.check()
        totals = sum_over_processes(self.sums.clone()).tolist()
        means = dict(zip(self.names, totals, strict=True))
        images = means.pop("images")
        return {name: total / images for name, total in means.items()}


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
    with ExitStack() as hooks:
        for name, layer in layers:
            if name:
                hooks.enter_context(layer.register_forward_hook(hook_of(name)))
        hooks.enter_context(network.register_forward_pre_hook(check_layers))
        yield


def first_bad_gradient(network: nn.Module) -> str:
    """ "the gradient of PARAMETER" of the parameter nearest to the loss whose gradient is not
    finite; "the gradient" where all are."""
    for name, x in reversed(list(network.named_parameters())):
        if x.grad is not None and not x.grad.isfinite().all():
            return f"the gradient of {name}"
    return "the gradient"
