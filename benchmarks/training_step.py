"""Time and memory of a training step and of evaluation: python -m benchmarks.training_step

MS-ResNet on random 32×32 images, computed by this project, eager and with --compile (on a GPU as
the CUDA graph that this makes there, too); by loops over
timesteps, as in the public MS-ResNet code; by spikingjelly; and the limit, the same convolutions
and batch norms with ReLU, in channels_last; and the convolutions alone. First all are compared in
float64. All are then timed in turn, in one process that keeps freed memory, as main.py does; on a
CPU those of others also "as it comes", in processes that do not. The table holds medians (and
quartiles) of ratios within a round.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from benchmarks import reference_networks
from benchmarks.timing import (
    DEVICE,
    OwnProcess,
    in_turn,
    parser_of,
    peak_megabytes,
    quartiles,
    ratios,
    report,
    table,
    with_spread,
)
from display import percent
from engine.compile import ReplayedGradients, compile_regions
from engine.start import keep_freed_memory
from models import MSResNet, QuanMSResNet
from models.neuron import DEFAULT_NEURON

LIMIT, CONVOLUTIONS = "ReLU limit", "convolutions alone"
OURS, COMPILED = "MD-SNN", "MD-SNN --compile"
STUDENT, COMPILED_STUDENT = "student, 4 bits", "student, 4 bits, --compile"
PRECISIONS = ("float32", "tf32", "bf16")
NUM_CLASSES = 100


def network_of(name: str, depth: int, time_window: int, width: int) -> nn.Module:
    shape = depth, NUM_CLASSES, time_window, 3, width
    torch.manual_seed(0)
    reference = MSResNet(*shape)
    if name in (OURS, COMPILED):
        return reference
    if name in (STUDENT, COMPILED_STUDENT):
        return QuanMSResNet(*shape, bits=4)
    if name == CONVOLUTIONS:
        return reference_networks.ConvolutionsAlone(*shape)
    build = {
        "loops": reference_networks.loops,
        "spikingjelly Rect": partial(reference_networks.spikingjelly, surrogate="Rect"),
        "spikingjelly ATan": partial(reference_networks.spikingjelly, surrogate="ATan"),
        LIMIT: reference_networks.ReLUNetwork,
    }[name]
    network = reference_networks.copy_parameters(reference, build(*shape))
    # channels_last is spikingjelly's faster layout, and the slower one of the loops.
    layout = torch.contiguous_format if name == "loops" else torch.channels_last
    return network.to(memory_format=layout)


OTHERS = "loops", "spikingjelly Rect", "spikingjelly ATan"
HAS_SPIKINGJELLY = find_spec("spikingjelly") is not None
NAMES = (LIMIT, CONVOLUTIONS, OURS, COMPILED, STUDENT, COMPILED_STUDENT, *OTHERS)
THERE = tuple(x for x in NAMES if HAS_SPIKINGJELLY or not x.startswith("spikingjelly"))
AS_IT_COMES = ", as it comes"  # in a process of its own, which keeps no freed memory


class Regions:
    """Switches the hot functions between eager and compiled in one process."""

    def __init__(self):
        self.compiled: dict[str, Callable] = {}

    def compile(self, work: Callable[[], object]) -> float:
        """Compile by running `work`; returns the seconds that it took."""
        start = time.perf_counter()
        error = compile_regions(work, every_size=not torch.cuda.is_available())
        if error is not None:
            raise SystemExit(f"no compiler: {error}")
        self.compiled = dict(kernels.fused)
        return time.perf_counter() - start

    def use(self, compiled: bool) -> None:
        kernels.fused.clear()
        kernels.fused.update(self.compiled if compiled else {})

    def using(self, compiled: bool, function: Callable[[], object]) -> Callable[[], None]:
        """`function`, run with the compiled or with the eager functions."""

        def run() -> None:
            self.use(compiled)
            function()

        return run


def reset(network: nn.Module) -> None:
    """spikingjelly's neurons keep their membranes until told."""
    for module in network.modules():
        if hasattr(module, "reset") and hasattr(module, "v_threshold"):
            module.reset()


class Work:
    """A network with its images: `step()` trains it, `evaluate()` runs it."""

    def __init__(self, network: nn.Module, batch: int, precision: str, device: torch.device):
        set_precision(precision)
        self.network = network.to(device)
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
        self.images = torch.rand(batch, 3, 32, 32, device=device)
        self.labels = torch.arange(batch, device=device) % NUM_CLASSES
        self.optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.network(images).float(), labels)

    def gradients(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.optimizer.zero_grad()
        with self.autocast:
            loss = self.loss(images, labels)
        loss.backward()
        return {}

    def as_with_compile(self) -> None:
        """Compute gradients as main.py does with --compile."""
        if self.images.is_cuda:
            self.gradients = ReplayedGradients(self.gradients, self.network)

    def step(self) -> None:
        self.network.train()
        self.gradients(self.images, self.labels)
        self.optimizer.step()
        reset(self.network)

    @torch.no_grad()
    def evaluate(self) -> None:
        self.network.eval()
        with self.autocast:
            self.network(self.images)
        reset(self.network)


EQUAL = tuple(x for x in ("loops", "spikingjelly Rect", OURS, COMPILED) if x in THERE)


def check_equality(regions: Regions, depth: int, time_window: int, device: torch.device) -> float:
    """Largest relative difference of logits and gradients from the loops', in float64.

    Raises AssertionError above 1e-7.
    """
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64, device=device)
    labels = torch.tensor([0, 1], device=device)
    found: dict[str, list[Tensor]] = {}
    for name in EQUAL:
        network = network_of(name, depth, time_window, width=8).to(device).double()
        regions.use(name == COMPILED)
        logits = network(images)
        F.cross_entropy(logits, labels).backward()
        found[name] = [logits.detach(), *(p.grad for p in network.parameters())]
        reset(network)
    worst = 0.0
    for name, values in found.items():
        for ours, theirs in zip(values, found["loops"], strict=True):
            difference = ((ours - theirs).norm() / theirs.norm()).item()
            assert difference < 1e-7, f"{name} differs from the loops by {difference:.1e}"
            worst = max(worst, difference)
    return worst


def work_of(
    name: str, depth: int, time_window: int, width: int, batch: int, precision: str
) -> Work:
    """One variant, for a process of its own."""
    work = Work(network_of(name, depth, time_window, width), batch, precision, DEVICE)
    if name in (COMPILED, COMPILED_STUDENT):
        work.as_with_compile()
    return work


def step_of(*variant: object) -> Callable[[], None]:
    return work_of(*variant).step


def set_precision(precision: str) -> None:
    """On a GPU. What bf16 leaves in float32 is computed in TF32, as by main.py: to a quantized
    network's forward pass that is the same, since spikes and codes need few bits."""
    tf32 = precision != "float32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = True


def timings(
    args: argparse.Namespace, precision: str, regions: Regions
) -> tuple[str, dict[str, list[float]]]:
    """(Markdown of one precision: every variant against the limit; the steps' seconds)"""
    how = args.depth, args.T, args.width, args.batch, precision
    lines, memory = [], {}
    for name in args.variants if args.memory else ():
        compiled = name in (COMPILED, COMPILED_STUDENT)
        if not compiled or DEVICE.type == "cuda":  # on a CPU it would hold the compiler's too
            regions.use(compiled)
            memory[name] = peak_megabytes(step_of, name, *how)
    works = {name: work_of(name, *how) for name in args.variants}
    apart = {}
    if DEVICE.type == "cpu":
        apart = {n + AS_IT_COMES: OwnProcess(work_of, n, *how) for n in OTHERS if n in works}
    found = {}
    for what in ("step", "evaluate"):
        functions = {
            name: regions.using(name in (COMPILED, COMPILED_STUDENT), getattr(work, what))
            for name, work in works.items()
        }
        functions |= {name: partial(process.call, what) for name, process in apart.items()}
        found[what], repeated = in_turn(functions, args.rounds, DEVICE)
        lines.append(f"{what}: {args.rounds} rounds, {repeated} more were noisy and repeated")
    rows = []
    for name in (*works, *apart):
        step, evaluation = found["step"][name], found["evaluate"][name]
        rows.append(
            (
                name,
                f"{1e3 * quartiles(step)[1]:.1f}",
                f"{args.batch / quartiles(step)[1]:.1f}",
                with_spread(ratios(step, found["step"][LIMIT]), 3),
                f"{1e3 * quartiles(evaluation)[1]:.1f}",
                with_spread(ratios(evaluation, found["evaluate"][LIMIT]), 3),
                f"{memory[name]:.0f}" if name in memory else "-",
            )
        )
    header = ("", "step, ms", "img/s", "× limit", "evaluation, ms", "× limit", "peak memory, MB")
    pairs = [(other, ours) for ours in (OURS, COMPILED) for other in (*OTHERS, *apart)]
    pairs += [(STUDENT, OURS), (COMPILED_STUDENT, COMPILED), ("spikingjelly Rect", CONVOLUTIONS)]
    for one, other in pairs:
        if one in found["step"] and other in works:
            step, evaluation = (with_spread(ratios(t[one], t[other]), 3) for t in found.values())
            lines.append(f"{one} / {other}: step {step}, evaluation {evaluation}")
    return "\n\n".join([f"### {precision}", table(header, rows), *lines]), found["step"]


def against_float32(steps: dict[str, dict[str, list[float]]]) -> Iterator[str]:
    """Others' steps in float32, as their users run them, against ours in other precisions: ratios
    of medians, since they were not timed in turn. `steps`: seconds by precision and variant."""
    plain = steps.get("float32", {})
    for precision in (name for name in steps if name != "float32"):
        for other, ours in ((other, ours) for ours in (OURS, COMPILED) for other in OTHERS):
            if other in plain and ours in steps[precision]:
                one, two = (quartiles(t)[1] for t in (plain[other], steps[precision][ours]))
                yield f"{other} in float32 / {ours} in {precision}: step {one / two:.3f}"


def sweep_of_time(args: argparse.Namespace, regions: Regions) -> str:
    """Training step over T, and T = 8 against twice T = 4."""
    regions.use(bool(regions.compiled))
    works = {
        f"{T}": work_of(OURS, args.depth, T, args.width, args.batch, "float32") for T in args.sweep
    }
    times, _ = in_turn({T: work.step for T, work in works.items()}, args.rounds, DEVICE)
    text = table(
        ("T", *works), [("step, ms", *(f"{1e3 * quartiles(t)[1]:.0f}" for t in times.values()))]
    )
    if "4" in times and "8" in times:
        double = ratios(times["8"], [2 * t for t in times["4"]])
        text += f"\n\nT = 8 / (2 · T = 4): {with_spread(double, 3)}"
    return text


def bandwidth_of_lif(args: argparse.Namespace, regions: Regions) -> str:
    """Bytes that the first stage's LIF must read and write per second, against a copy's."""
    on_gpu = DEVICE.type == "cuda"
    calls = 50 if on_gpu else 1  # in a row: alone, a kernel is shorter than its start
    x = torch.randn(args.T, args.batch * args.width * 32 * 32, device=DEVICE)
    x = x.to(torch.bfloat16) if on_gpu else x
    spikes, grad_x = torch.empty_like(x), torch.empty_like(x)
    saved = x.new_empty(-(-args.T // kernels.PER_BYTE), x.shape[1], dtype=torch.uint8)
    moved = x.nbytes

    def forward() -> None:
        kernels.lif_forward(x, spikes.unbind(), None, saved.unbind(), DEFAULT_NEURON, None)

    def backward() -> None:
        kernels.lif_backward((x, None), spikes, saved, grad_x.unbind(), DEFAULT_NEURON, None, False)

    functions = {"copy": lambda: grad_x.copy_(x), "LIF forward": forward, "LIF backward": backward}
    repeated = {n: lambda f=f: [f() for _ in range(calls)] for n, f in functions.items()}
    bits = saved.nbytes / moved
    needed = {"copy": 2, "LIF forward": 2 + bits, "LIF backward": 3 + bits}
    rows = []
    for compiled in (False, True):
        regions.use(compiled)
        times, _ = in_turn(repeated, 5 * args.rounds, DEVICE)
        speed = {n: calls * needed[n] * moved / quartiles(t)[1] / 1e9 for n, t in times.items()}
        rows += [
            (f"{n}{', compiled' if compiled else ''}", f"{s:.0f}", percent(s / speed["copy"], 0))
            for n, s in speed.items()
        ]
    return table(("", "GB/s", "of the copy"), rows)


def number_of_kernels(step: Callable[[], object]) -> int:
    """Kernels, copies and fillings that a GPU is asked for in one run of `step`."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    on_gpu = (x for x in profile.events() if x.device_type == torch.autograd.DeviceType.CUDA)
    return sum(not event.is_user_annotation for event in on_gpu)


def parser_of_steps(docstring: str, rounds: int) -> argparse.ArgumentParser:
    """The options of a benchmark that times training steps."""
    parser = parser_of(docstring, rounds)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--T", type=int, default=4)
    parser.add_argument("--batch", type=int, default=128 if DEVICE.type == "cuda" else 32)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    on_gpu = DEVICE.type == "cuda"
    parser = parser_of_steps(__doc__, rounds=9)
    add = parser.add_argument
    add("--depth", type=int, default=18)
    add("--variants", nargs="+", choices=NAMES, default=THERE)
    precisions = PRECISIONS if on_gpu else PRECISIONS[:1]
    add("--precisions", nargs="+", choices=PRECISIONS, default=precisions)
    sweep = range(1, 11) if on_gpu else [4, 8]
    add("--sweep", type=int, nargs="*", help="timesteps", default=sweep)
    add("--no_memory", dest="memory", action="store_false")
    args = parser.parse_args(arguments)
    keep_freed_memory()
    if LIMIT not in args.variants:
        parser.error(f"--variants must have {LIMIT!r}: all others are compared with it")
    regions = Regions()

    def work() -> None:
        # For other precisions it happens in the first rounds, which are not counted: the first
        # table shall not wait for that.
        for name in (OURS, STUDENT):
            tried = work_of(name, args.depth, args.T, args.width, args.batch, args.precisions[0])
            tried.step(), tried.evaluate()

    def parts() -> Iterator[str]:
        yield (
            f"MS-ResNet-{args.depth}, width {args.width}, 32×32, T = {args.T}, "
            f"batch {args.batch}; compiling for {args.precisions[0]} took "
            f"{regions.compile(work):.0f} s"
        )
        if not HAS_SPIKINGJELLY:
            yield "Without spikingjelly: it is not installed."
        equal = check_equality(regions, args.depth, args.T, DEVICE)
        yield f"float64: {', '.join(EQUAL[:-1])} and {EQUAL[-1]} agree within {equal:.0e}"
        steps = {}
        for precision in args.precisions:
            text, steps[precision] = timings(args, precision, regions)
            yield text
        yield from against_float32(steps)
        yield "### LIF of the first stage\n\n" + bandwidth_of_lif(args, regions)
        for name in (LIMIT, OURS, COMPILED, STUDENT, COMPILED_STUDENT) if on_gpu else ():
            regions.use(name in (COMPILED, COMPILED_STUDENT))
            tried = work_of(name, args.depth, args.T, args.width, args.batch, "bf16")
            tried.step()
            yield f"{name}, bf16: {number_of_kernels(tried.step)} kernels a step"
        if args.sweep:
            yield "### Timesteps\n\n" + sweep_of_time(args, regions)

    report("training_step", arguments, DEVICE, parts(), args.out)
    regions.use(compiled=False)


if __name__ == "__main__":
    main()
