"""python -m spikesim_eval compat CASE.json | report (--checkpoint A.pth | --layers NET.json) ...

compat prints the figures of the published SpikeSim tool; report estimates a network and writes
report.json, report.csv and report.md. A mistake of the user gives one line and exit code 2.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import NoReturn

from .estimate import CELLS, DELAYS, PERIPHERIES, Chip, estimate
from .layers import InputError, Network, load_layer_list, read_json
from .published import estimate_published
from .report import build_report, totals_text, write_report


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)  # one line from main() instead of a usage dump


def build_parser() -> Parser:
    parser = Parser(prog="spikesim_eval", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)

    compat = commands.add_parser("compat", help="the published tool's figures, as JSON")
    compat.add_argument("case", help="JSON with in_ch, out_ch, in_dim, out_dim, xbar_size, ...")

    report = commands.add_parser("report", help="estimate a network", allow_abbrev=False)
    source = report.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", help="checkpoint of a training run")
    source.add_argument("--layers", help="layer list, see docs/layer_list.md")
    report.add_argument("--baseline", help="checkpoint, or layer list (*.json), to compare with")
    report.add_argument("--data_path", help="data root: spike rates are measured on its test set")
    report.add_argument("--out", required=True, help="folder for the report")
    chip = Chip()
    report.add_argument("--xbar_size", type=int, default=chip.xbar_size, help="crossbar side")
    report.add_argument("--pe_per_tile", type=int, default=chip.pe_per_tile)
    report.add_argument("--cell_bits", type=int, default=chip.cell_bits, help="bits per cell")
    report.add_argument("--adc_bits", type=int, default=chip.adc_bits, help="ADC resolution")
    report.add_argument("--clk_mhz", type=float, default=chip.clk_mhz, help="clock, MHz")
    report.add_argument("--cell", choices=CELLS, default=chip.cell)
    report.add_argument("--periphery", choices=PERIPHERIES, default=chip.periphery)
    report.add_argument("--delay", choices=DELAYS, default=chip.delay)
    return parser


def trace(path: str, data_path: str | None) -> Network:
    """The network of a checkpoint; the only place that needs torch."""
    if not Path(path).is_file():
        raise InputError(f"no such checkpoint: {path!r}")
    from load_settings import UserError

    from .trace import trace_checkpoint

    try:
        return trace_checkpoint(path, data_path)
    except UserError as error:
        raise InputError(str(error)) from error


def run_report(args: argparse.Namespace) -> None:
    chip = Chip(
        xbar_size=args.xbar_size,
        pe_per_tile=args.pe_per_tile,
        cell_bits=args.cell_bits,
        adc_bits=args.adc_bits,
        clk_mhz=args.clk_mhz,
        cell=args.cell,
        periphery=args.periphery,
        delay=args.delay,
    )
    baseline_is_list = args.baseline is not None and args.baseline.lower().endswith(".json")
    only_lists = args.layers is not None and (args.baseline is None or baseline_is_list)
    if args.data_path is not None and only_lists:
        raise InputError("--data_path measures spike rates of a checkpoint, and there is none")

    if args.layers is not None:
        ours = estimate(load_layer_list(args.layers), chip)
    else:
        ours = estimate(trace(args.checkpoint, args.data_path), chip)
    if args.baseline is None:
        baseline = None
    elif baseline_is_list:
        baseline = estimate(load_layer_list(args.baseline), chip)
    else:
        baseline = estimate(trace(args.baseline, args.data_path), chip)

    report = build_report(ours, baseline)
    write_report(args.out, report)
    print(totals_text(report))


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0, or 2 after one line on stderr for a mistake of the user."""
    try:
        args = build_parser().parse_args(argv)
        if args.command == "compat":
            print(json.dumps(estimate_published(read_json(args.case)), indent=2))
        else:
            run_report(args)
    except InputError as error:
        print("spikesim_eval: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
