"""The one loop that evaluates: any network, over all processes."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.log import ProgressBar
from models import SpikingNetwork
from models.integer_network import IntegerNetwork
from models.neuron import LIF, count_spikes, neuron_of
from runtime.errors import UserError
from runtime.processes import sum_over_processes


class Evaluation(NamedTuple):
    """What `evaluate` has found, over the images of all processes."""

    correct: int  # images
    total: int
    loss: float  # mean cross-entropy
    spikes: dict[str, Tensor]  # of each LIF layer (2, T): its spikes, and how many there could be

    @property
    def accuracy(self) -> float:
        return self.correct / self.total

    @property
    def spike_rate(self) -> float:
        """Spikes per neuron and timestep."""
        fired, neurons = torch.stack(list(self.spikes.values())).sum(dim=2).unbind(dim=1)
        return (fired.sum() / neurons.sum()).item()

    @property
    def silent(self) -> list[str]:
        """Layers that never fired."""
        return [name for name, (fired, _) in self.spikes.items() if not fired.any()]


@torch.no_grad()
def evaluate(
    network: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    amp: bool = False,
    pairs: list[Tensor] | None = None,
    name: str = "test",
) -> Evaluation:
    """Accuracy, loss and spikes over `batches` of (images, labels), this process's share.

    network: a module, which is put into evaluation mode and whose LIF layers' spikes are counted,
    or any function from images to logits (B, classes), such as a network on crossbars or one that
    keeps what it sees on the way. pairs: gets labels and predictions, (2, B), of each batch of
    this process. name: of the progress bar.
    """
    module = network if isinstance(network, nn.Module) else nn.Module()
    module.eval()
    counts = torch.zeros(3, dtype=torch.float64, device=device)  # whole up to 2^53
    with count_spikes(module) as spikes:
        for images, labels in ProgressBar(batches, name, len(batches)):
            images, labels = (x.to(device, non_blocking=True) for x in (images, labels))
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                logits = network(images)
            predictions = logits.argmax(1)
            if pairs is not None:
                pairs.append(torch.stack([labels, predictions]).cpu())
            correct = (predictions == labels).sum()
            loss = F.nll_loss(logits.double().log_softmax(1), labels, reduction="sum")
            counts += torch.stack([correct, counts.new_tensor(len(labels)), loss])
    layers = [name for name, layer in module.named_modules() if isinstance(layer, LIF)]
    if layers:  # a process may have had no batch
        zero = torch.zeros(2, module.time_window, dtype=torch.float64, device=device)
        by_layer = torch.stack([spikes.get(name, zero) for name in layers])
        spikes = dict(zip(layers, sum_over_processes(by_layer), strict=True))
    correct, total, loss = sum_over_processes(counts).tolist()
    return Evaluation(int(correct), int(total), loss / total, spikes)


def evaluate_integers(
    network: SpikingNetwork, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device
) -> dict[str, Any]:
    """Evaluate with integers alone and count the spikes that differ from the network's own."""
    integer_network, threshold = IntegerNetwork(network), neuron_of(network).threshold
    counts = torch.zeros(2, dtype=torch.int64, device=device)

    def with_integers(images: Tensor) -> Tensor:
        _, membranes = network(images, membranes=True)
        try:
            logits, spikes = integer_network(images)
        except OverflowError as error:
            raise UserError(f"--integer: {error}") from None
        for u, s in zip(membranes, spikes, strict=True):
            differing = ((u > threshold).flatten(0, 1) != s).sum()
            counts.add_(torch.stack([differing, counts.new_tensor(s.numel())]))
        return logits

    found = evaluate(with_integers, batches, device, name="integer")
    differing, neurons = sum_over_processes(counts).tolist()
    return {
        "images": found.total,
        "correct": found.correct,
        "accuracy": found.accuracy,
        "differing_spikes": differing,
        "spikes": neurons,
    }
