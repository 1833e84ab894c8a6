"""What CUDA graphs save: python -m benchmarks.cuda_graphs

A GPU may be done with a small kernel before the CPU has started the next. A CUDA graph starts all
kernels of a training step at once. Each network's step is timed in turn, eager and with --compile,
as it is and as one CUDA graph; and with the hot functions under torch.compile's own
mode="reduce-overhead". First a step as a graph is compared in float64 with the step as it is.

Here a graph holds the whole step with the optimizer's. main.py's, with --compile, holds what leads
to the gradients (`cuda_graphs.ReplayedGradients`), and the learning rate may change.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence

import torch

import kernels
from benchmarks import distillation_step
from benchmarks.distillation_step import parser_of_steps
from benchmarks.timing import in_turn, quartiles, ratios, report, table, with_spread
from benchmarks.training_step import (
    LIMIT,
    OURS,
    STUDENT,
    Regions,
    Work,
    network_of,
    number_of_kernels,
    set_precision,
    work_of,
)
from engine.start import keep_freed_memory

Step = Callable[[], object]
EAGER, COMPILED = "eager", "--compile"
AS_GRAPH = ", one CUDA graph"
REDUCED = "--compile, reduce-overhead"
WARM_UP = 3


def as_graph(step: Step) -> Step:
    """`step`, taken down as one CUDA graph after WARM_UP steps: what replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()  # is only taken down
    return graph.replay


def difference_of_graph(device: torch.device) -> float:
    """Largest relative difference between the weights after five steps as they are, and after
    WARM_UP of these and the rest as a graph, in float64. Raises AssertionError above 1e-9."""
    found = []
    for replayed in (False, True):
        torch.manual_seed(1)
        work = Work(network_of(OURS, 18, 4, width=8).double(), 4, "float32", device)
        work.images = work.images.double()
        step = as_graph(work.step) if replayed else work.step
        for _ in range(5 - WARM_UP if replayed else 5):
            step()
        found.append([p.detach() for p in work.network.parameters()])
    worst = max(((a - b).norm() / a.norm()).item() for a, b in zip(*found, strict=True))
    assert worst < 1e-9, f"a graph's weights differ by {worst:.1e}"
    return worst


def reduced(step: Step) -> Step:
    """`step` with the hot functions under mode="reduce-overhead"."""
    options = {"mode": "reduce-overhead", "dynamic": False, "fullgraph": True}
    compiled = {name: torch.compile(f, **options) for name, f in kernels.REGIONS.items()}

    def run() -> None:
        kernels.fused.update(compiled)
        torch.compiler.cudagraph_mark_step_begin()
        step()

    return run


def ways(step: Step, regions: Regions, device: torch.device) -> tuple[dict[str, Step], list[str]]:
    """(ways to do the same step, by name; what could not be done, and why)"""
    found = {EAGER: regions.using(False, step), COMPILED: regions.using(True, step)}
    failed = []
    if device.type == "cpu":
        return found, ["without a GPU there are no CUDA graphs"]
    for name in (EAGER, COMPILED):
        regions.use(name == COMPILED)
        found[name + AS_GRAPH] = as_graph(step)
    reduce_overhead = reduced(step)
    try:
        for _ in range(WARM_UP):
            reduce_overhead()
        found[REDUCED] = reduce_overhead
    except Exception as error:  # whatever inductor raises where a region cannot be a graph
        failed.append(f"{REDUCED}: {next(iter(str(error).splitlines()), repr(error))}")
    return found, failed


def table_of(step: Step, args: argparse.Namespace, regions: Regions, device: torch.device) -> str:
    """Markdown of one network's step."""
    functions, failed = ways(step, regions, device)
    times, repeated = in_turn(functions, args.rounds, device)
    rows = []
    for name, function in functions.items():
        count = "-"
        if device.type == "cuda" and name in (EAGER, COMPILED):
            count = number_of_kernels(function)
        ratio = with_spread(ratios(times[name], times[EAGER]), 3)
        rows.append((name, f"{1e3 * quartiles(times[name])[1]:.2f}", ratio, count))
    regions.use(compiled=False)
    text = table(("", "step, ms", "× eager", "kernels"), rows)
    return "\n\n".join([text, f"{args.rounds} rounds, {repeated} repeated", *failed])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of_steps(__doc__.splitlines()[0], rounds=9)
    parser.add_argument("--precision", choices=("float32", "tf32", "bf16"), default="bf16")
    args = parser.parse_args(arguments)
    keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    regions = Regions()
    how = args.width, args.T, args.batch

    def parts() -> Iterator[str]:
        if device.type == "cuda":
            worst = difference_of_graph(device)
            yield f"float64: a step and its graph leave weights that agree within {worst:.0e}"
        set_precision(args.precision)
        steps = {
            name: work_of(name, 18, args.T, args.width, args.batch, args.precision).step
            for name in (LIMIT, OURS, STUDENT)
        }
        amp = args.precision == "bf16"
        taught = distillation_step.step_of(distillation_step.OURS, *how, amp, device)
        steps["MD-SNN, CLK, 4 bits"] = taught
        seconds = regions.compile(lambda: [step() for step in steps.values()])
        yield (
            f"MS-ResNet-18, width {args.width}, 32×32, T = {args.T}, batch {args.batch}, "
            f"{args.precision}; compiling took {seconds:.0f} s"
        )
        for name, step in steps.items():
            yield f"### {name}\n\n{table_of(step, args, regions, device)}"

    report("cuda_graphs", arguments, device, parts(), args.out)


if __name__ == "__main__":
    main()
