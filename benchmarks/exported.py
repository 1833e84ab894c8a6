"""How fast trained networks answer, in torch and exported: python -m benchmarks.exported

MS-ResNet-18 of width 8 at T = 4 on 16x16 images, teacher (its batch norms folded, and as trained)
and student of 4 bits, on one thread: in torch, as a program of torch.export, and in onnxruntime.
Times are of one call. Below stands what torch spends the student's time on.
"""

import io
import time
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from benchmarks.timing import in_turn, parser_of, quartiles, ratios, report, table, with_spread
from display import percent
from exchange.description import described
from exchange.plain import torch_file
from models import MSResNet, QuanMSResNet
from models.batch_norm import BatchNorm
from models.network import SpikingNetwork, folded
from models.neuron import LIF
from models.quantized_layers import QuanConv2d
from quantization import BatchNormQuantizer, WeightQuantizer

CPU = torch.device("cpu")
TIME_STEPS = 4
CALLS = 10  # in a row, of which one time is taken
PARTS = {
    "neurons": LIF,
    "convolutions": QuanConv2d,
    "of these, the codes of their weights": WeightQuantizer,
    "batch norms": BatchNorm,
    "of these, the codes of their scales and shifts": BatchNormQuantizer,
}


def network(bits: int | None) -> SpikingNetwork:
    torch.manual_seed(0)
    shape = 18, 10, TIME_STEPS, 1, 8
    made = MSResNet(*shape) if bits is None else QuanMSResNet(*shape, bits=bits)
    made.input_shape = (1, 16, 16)
    made(torch.rand(64, 1, 16, 16))  # running statistics
    return made.eval()


def ways(made: SpikingNetwork) -> dict[str, Callable[[Tensor], object]]:
    """Ways to get the same logits of images, the network's own first."""
    import onnxruntime  # here: who only asks for --help may not have it

    from exchange.onnx_file import onnx_file

    description = described(made)
    program = torch.export.load(io.BytesIO(torch_file(description))).module()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(onnx_file(description), options)
    found = {"torch": made}
    if not any(isinstance(module, QuanConv2d) for module in made.modules()):
        found["torch, folded"] = folded(made)
    found["torch.export"] = program
    return found | {"onnxruntime": lambda images: session.run(None, {"images": images.numpy()})}


def several(function: Callable[[Tensor], object], images: Tensor) -> Callable[[], None]:
    def call() -> None:
        for _ in range(CALLS):
            function(images)

    return call


def shares(made: SpikingNetwork, image: Tensor) -> list[list[str]]:
    """Rows of the shares of a call's time that kinds of layers and packing weights take."""
    seconds, started = Counter(), {}

    def enter(module: nn.Module, *_: object) -> None:
        started[module] = time.perf_counter()

    def leave(module: nn.Module, *_: object) -> None:
        seconds[type(module)] += time.perf_counter() - started[module]

    handles = []
    for module in made.modules():
        handles += module.register_forward_pre_hook(enter), module.register_forward_hook(leave)
    for _ in range(CALLS):
        made(image)
    for handle in handles:
        handle.remove()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        made(image)
    events = {event.key: event for event in profile.key_averages()}
    whole = sum(event.self_cpu_time_total for event in events.values())
    rows = [[name, percent(seconds[kind] / seconds[type(made)], 0)] for name, kind in PARTS.items()]
    packing = events.get("onednn::qconv_prepack")
    if packing is not None:
        rows.insert(3, ["of these, packing weights", percent(packing.cpu_time_total / whole, 0)])
    return rows


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, rounds=15)
    args = parser.parse_args(arguments)
    missing = [name for name in ("onnx", "onnxruntime") if find_spec(name) is None]
    if missing:
        parser.error(f"needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    torch.set_num_threads(1)

    def parts():
        for name, bits in (("teacher", None), ("student", 4)):
            functions = ways(network(bits))
            for number in (1, 64):
                given = torch.rand(number, 1, 16, 16)
                calls = {way: several(function, given) for way, function in functions.items()}
                times, repeated = in_turn(calls, args.rounds, CPU)
                images = f"{number} image{'s' * (number > 1)}"
                yield f"{name}, {images} a call ({repeated} rounds repeated)"
                rows = [
                    [
                        way,
                        f"{1e3 * quartiles(values)[1] / CALLS:.3g}",
                        with_spread(ratios(values, times["onnxruntime"]), 2),
                    ]
                    for way, values in times.items()
                ]
                yield table(["", "ms", "× onnxruntime"], rows)
        yield "What torch spends the student's time on, one image a call:"
        yield table(["", "share"], shares(functions["torch"], torch.rand(1, 1, 16, 16)))

    report("exported", arguments, CPU, parts(), args.out)


if __name__ == "__main__":
    main()
