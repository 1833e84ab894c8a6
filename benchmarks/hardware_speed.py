"""Speed and memory of the hardware estimate: python -m benchmarks.hardware_speed

A sweep of 100,000 chips for MS-ResNet-18 of width 64 against one estimate, and a digits test set on
crossbars against the digital network (`evaluate` of the torch network, as main.py evaluates it);
medians and quartiles of interleaved rounds in one process.
"""

from collections.abc import Iterable, Sequence
from functools import partial

import torch

from benchmarks.timing import (
    in_turn,
    parser_of,
    quartiles,
    ratios,
    resident_peak,
    seconds,
    with_spread,
)
from data_loader import Share, evaluation_loader, load_data_sets
from engine.evaluate import evaluate
from models import QuanMSResNet
from settings import Settings
from spikesim_eval.chip import Chip
from spikesim_eval.estimate import estimate
from spikesim_eval.layer_list import Subject
from spikesim_eval.nonideal import on_crossbars
from spikesim_eval.sweep import sweep
from spikesim_eval.trace import describe

CPU = torch.device("cpu")
AXES = {  # 10 · 5 · 10 · 5 · 2 · 20 = 100,000 points
    "xbar_size": [16, 32, 48, 64, 96, 128, 192, 256, 384, 512],
    "cell_bits": [1, 2, 3, 4, 8],
    "adc_bits": list(range(3, 13)),
    "pe_per_tile": [2, 4, 6, 8, 12],
    "crossbars_per_pe": [9, 16],
    "clk_mhz": [50.0 * i for i in range(1, 21)],
}


def sweep_speed(rounds: int) -> None:
    network = QuanMSResNet(18, 100, 4, 3, 64, bits=4)
    network.input_shape = (3, 32, 32)
    subject = Subject("", describe(network))
    before = resident_peak()
    points = len(sweep([subject], Chip(), AXES)["pareto"])
    memory = resident_peak() - before
    functions = {
        "20 estimates": lambda: [estimate(subject.network, Chip()) for _ in range(20)],
        "sweep": lambda: sweep([subject], Chip(), AXES),
    }
    times, _ = in_turn(functions, rounds, CPU)
    twenty, grid = (quartiles(times[name])[1] for name in functions)
    one = twenty / 20
    print(
        f"sweep of {points} points: {grid / one:.0f} times one estimate "
        f"({1e3 * grid:.0f} ms, {1e3 * one:.2f} ms), {memory:.0f} MB more memory"
    )


CHIPS = {
    "ideal wires and cells, 5-bit ADCs": {},
    "cells that vary": {"sigma": 0.1, "on_off_ratio": 10},
    "the same, offset columns": {"sigma": 0.1, "on_off_ratio": 10, "columns": "offset"},
    "the same, an ADC a PE": {"sigma": 0.1, "on_off_ratio": 10, "adc_of": "pe"},
    "cells that vary from read to read": {"read_noise": 0.05},
}
WIRES = Chip(wire_ohm=2.0)


@torch.no_grad()
def a_network(bits: int, width: int, batches: Iterable) -> QuanMSResNet:
    """Untrained, with the running statistics of the first batch."""
    torch.manual_seed(0)
    network = QuanMSResNet(18, 10, 4, 1, width, bits=bits)
    network.input_shape = (1, 16, 16)
    network(next(iter(batches))[0])
    return network.eval()


def nonideal_speed(rounds: int, width: int) -> None:
    _, test_set = load_data_sets(Settings.of("digits"))
    batches = evaluation_loader(test_set, Share(64))
    for bits in (2, 4, 8):
        network = a_network(bits, width, batches)
        description = describe(network)
        functions = {"digital": lambda network=network: evaluate(network, batches, CPU)}
        for name, options in CHIPS.items():
            placed, _ = on_crossbars(network, description, Chip(**options), seed=0)
            functions[name] = lambda placed=placed: evaluate(placed, batches, CPU)
        times, _ = in_turn(functions, rounds, CPU)
        digital = quartiles(times["digital"])[1]
        print(
            f"digits test set, MS-ResNet-18, width {width}, T = 4, {bits} bits, on all crossbars,"
        )
        print(f"in times of the digital evaluation ({digital:.2f} s):")
        for name in CHIPS:
            print(f"  {name}: {with_spread(ratios(times[name], times['digital']), 1)}")
        place = partial(on_crossbars, network, description, WIRES, 0)
        first = seconds(place, CPU)
        again = quartiles([seconds(place, CPU) for _ in range(rounds)])[1]
        print(f"  64 x 64 wires: solved in {first:.1f} s, placed again in {again:.2f} s")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, rounds=5)
    parser.add_argument("--width", type=int, default=8, help="of the network on crossbars")
    args = parser.parse_args(arguments)
    sweep_speed(args.rounds)
    nonideal_speed(args.rounds, args.width)


if __name__ == "__main__":
    main()
