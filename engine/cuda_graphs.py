"""A training step's kernels, started all at once: what `--compile` adds on a GPU.

A GPU is done with a small kernel before Python has come to the next one. A CUDA graph holds all of
a step's kernels with their addresses, and starts them with one call; the kernels are the same.
"""

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

Gradients = Callable[[Tensor, Tensor], dict[str, Tensor]]
WARM_UP = 3  # steps that are computed as they are: libraries choose their kernels in the first


class ReplayedGradients:
    """`function(images, labels)`, which leaves gradients in `network`'s parameters, as a CUDA graph
    for each shape of batches and each T of the network from its fourth batch on.

    A graph repeats what was on the CPU when it was taken: all that changes from step to step must
    be in tensors that stay where they are, such as weights, running statistics and beta. The
    results stay valid until the next call. Nothing in `function` may wait for the GPU.
    """

    def __init__(self, function: Gradients, network: nn.Module):
        self.function, self.network = function, network
        self.parameters = list(network.parameters())
        self.seen: Counter[tuple] = Counter()
        self.graphs: dict[tuple, tuple] = {}
        self.memory = torch.cuda.graph_pool_handle()

    def __call__(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        kind = images.shape, self.network.time_window
        self.seen[kind] += 1
        if self.seen[kind] <= WARM_UP:
            return self.function(images, labels)
        if kind not in self.graphs:
            self.graphs[kind] = self.take(images, labels)
        graph, inputs, gradients, results = self.graphs[kind]
        for kept, x in zip(inputs, (images, labels), strict=True):
            kept.copy_(x)
        graph.replay()
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        return results

    def take(self, images: Tensor, labels: Tensor) -> tuple:
        """(graph, its inputs, the gradients that it writes, its results); computes nothing."""
        inputs = images.clone(), labels.clone()
        for parameter in self.parameters:
            parameter.grad = None  # the graph's own come to lie in its memory
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as the one that pins batches, go on meanwhile.
        with torch.cuda.graph(graph, pool=self.memory, capture_error_mode="thread_local"):
            results = self.function(*inputs)
        return graph, inputs, [parameter.grad for parameter in self.parameters], results
