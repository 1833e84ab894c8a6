"""`--compile`: the hot functions as fused kernels of torch.compile, a GPU's step as a CUDA graph.

On a CPU each region of `kernels` is compiled for tensors of every size; on a GPU for each size,
since how a sum is shared out over its many threads depends on that. The eager functions stay the
reference, and what runs where there is no compiler.
"""

import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor, nn

import kernels
from checkpoints import Checkpoint, build_network
from data_loader import ImageSet
from engine.data import share_of, tested_share_of
from load_settings import build_loss
from models.batch_norm import estimate_statistics
from runtime.processes import all_or_none, is_main_process, rank, world_size
from settings import Settings

Gradients = Callable[[Tensor, Tensor], dict[str, Tensor]]
WARM_UP = 3  # steps that are computed as they are: libraries choose their kernels in the first


def compile_regions(work: Callable[[], object], every_size: bool = True) -> str | None:
    """Compile the hot functions, for the rest of the process.

    `work` is run at once and has to call them as the program will, with tensors of its sizes, so
    that all compiling is done when this returns. Where compiling fails, everything stays eager and
    the reason is returned.
    """
    # The neuron's constants are numbers, not inputs; each T and each flag has a kernel of its own.
    torch._dynamo.config.specialize_float = True
    config = torch._dynamo.config
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    setattr(config, limit, 256)  # the second is its name in torch 2.6
    with suppress(AttributeError):  # torch before 2.10
        # Triton's own division is off by the last bit, and membranes lie on ties: halves of a step.
        torch._inductor.config.eager_numerics.division_rounding = True
    ask_little_of_the_cpu()
    for name, function in kernels.REGIONS.items():
        kernels.fused[name] = torch.compile(function, dynamic=every_size, fullgraph=True)
    try:
        work()
    except Exception as error:  # a compiler that is missing or broken raises anything
        kernels.fused.clear()
        return next(line for line in (*str(error).splitlines(), repr(error)) if line.strip())
    return None


def ask_little_of_the_cpu() -> None:
    """Let torch not try at every start, in programs of their own that each import torch, what it
    knows of a CPU's vectors from the CPU itself, and of its matrix instructions (VNNI, AMX) what no
    kernel here uses. Where torch has changed, it tries: that takes up to half a minute."""
    with suppress(ImportError, AttributeError):
        from torch._inductor import config, cpu_vec_isa

        of_matrices = "vnni", "amx"
        known = cpu_vec_isa.supported_vec_isa_list
        known[:] = [isa for isa in known if not any(x in str(isa) for x in of_matrices)]
        if config.cpp.vec_isa_ok is None:
            config.cpp.vec_isa_ok = True


def compile_for(
    settings: Settings,
    device: torch.device,
    test_set: ImageSet,
    train_set: ImageSet | None = None,
    taught_by: Checkpoint | None = None,
) -> None:
    """--compile: compile the hot functions by using throwaway networks as the run will use its
    own; where that fails, warn and stay eager. The last two are a training's."""
    batch = share_of(settings).batch_size
    training_images = 0 if train_set is None else len(train_set)
    share = min(batch, -(-training_images // world_size()))
    trained = -(-share // settings.accumulate)
    evaluated, at_once = [test_set], batch
    if train_set is not None:
        at_once = tested_share_of(settings, device).batch_size
        if train_set.held_out is not None:
            evaluated.append(train_set.held_out)
    shares = [len(range(rank(), len(data_set), world_size())) for data_set in evaluated]
    batches_tested = {size for n in shares for size in (min(at_once, n), n % at_once)} - {0}

    def use() -> None:
        network = build_network(settings).to(device)
        image, _ = test_set[0]
        images = torch.rand(at_once, *image.shape, device=device)
        labels = torch.zeros(batch, dtype=torch.int64, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.amp), torch.no_grad():
            network.eval()
            with all_or_none():
                for size in batches_tested:
                    network(images[:size])
                    if settings.integer:
                        network(images[:size], membranes=True)
        if not trained:
            return
        teacher = None if taught_by is None else build_network(taught_by.settings).to(device)
        loss_function = build_loss(settings, network.train(), teacher)
        for T in settings.trained_at:
            with (
                network.running_for(T),
                torch.autocast(device.type, torch.bfloat16, enabled=settings.amp),
            ):
                _, loss, _ = loss_function(images[:trained], labels[:trained])
            loss.backward()
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.amp):
            estimate_statistics(network, [images[:share]], settings.trained_at)

    start = time.perf_counter()
    if is_main_process():
        print("compiling, which takes up to a minute ...", flush=True)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        error = compile_regions(use, every_size=device.type == "cpu")
    if is_main_process() and error is None:
        print(f"compiled in {time.perf_counter() - start:.0f} s", flush=True)
    elif is_main_process():
        print(f"main.py: warning: --compile: going on without it: {error}", file=sys.stderr)


class ReplayedGradients:
    """`function(images, labels)`, which leaves gradients in `network`'s parameters, as a CUDA graph
    for each shape of batches and each T of the network from its fourth batch on.

    A GPU is done with a small kernel before Python has come to the next one. A graph holds all of a
    step's kernels with their addresses, and starts them with one call; the kernels are the same. It
    repeats what was on the CPU when it was taken: all that changes from step to step must
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
