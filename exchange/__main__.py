"""python -m exchange CKPT --to onnx | nir | integers | safetensors | torch --out FILE

Writes a trained network for other programs. Before the file is there it is read back, and every
spike compared with the network's own. A mistake of the user gives one line and exit code 2.
"""

import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from checkpoints import Checkpoint, class_names, load_checkpoint
from load_settings import load_network
from models.network import SpikingNetwork
from runtime.command import HelpFormatter, Parser, run_command
from runtime.errors import UserError
from runtime.files import check_writable, write_files
from settings import OPTIONS
from spikesim_eval.trace import evaluation_data, macs_of_image

from . import read_back
from .description import described

MOST_IMAGES, MOST_MACS = 512, 4e9  # of a comparison: the slowest reader takes seconds


class Format(NamedTuple):
    packages: tuple[str, ...]  # that it needs and nothing else here does
    reader: str  # the package that reads it back
    read: Callable[[bytes, Tensor, SpikingNetwork], read_back.Found]


FORMATS = {
    "onnx": Format(("onnx", "onnxruntime"), "onnxruntime", read_back.by_onnxruntime),
    "nir": Format(("nir", "nirtorch"), "spikingjelly", read_back.by_spikingjelly),
    "integers": Format((), "numpy", read_back.by_numpy),
    "safetensors": Format(("safetensors",), "safetensors", read_back.by_safetensors),
    "torch": Format((), "torch", read_back.by_torch_export),
}


def build_parser() -> Parser:
    parser = Parser(
        prog="exchange", description=__doc__, allow_abbrev=False, formatter_class=HelpFormatter
    )
    parser.add_argument("checkpoint", metavar="CKPT", help="checkpoint of a training run")
    parser.add_argument("--to", required=True, choices=FORMATS, help="see docs/exchange.md")
    parser.add_argument("--out", required=True, metavar="FILE", help="must not be there yet")
    text = "T, where it is not the trained one (but for safetensors, which have none)"
    parser.add_argument("--time_window", type=int, metavar="T", help=text)
    text = "where the data lie whose test images are compared on; without, random ones are"
    parser.add_argument("--data_path", metavar="FOLDER", help=text)
    return parser


def about_of(checkpoint: Checkpoint, time_window: int) -> dict[str, Any]:
    """What every file says of its network: no paths, which are of one machine; of another T than
    the trained one no accuracy, which nobody has measured, nor of a network trained for a chip,
    which was tested there."""
    settings = {
        name: value
        for name, value in vars(checkpoint.settings).items()
        if name not in OPTIONS
        or (OPTIONS[name].group != "running" and OPTIONS[name].metavar not in ("FOLDER", "CKPT"))
    }
    is_tested = (
        time_window == checkpoint.settings.time_window and checkpoint.settings.crossbar is None
    )
    return {
        "settings": settings | {"time_window": time_window},
        "class_names": class_names(checkpoint),
        "epoch": checkpoint.epoch,
        "accuracy": checkpoint.accuracy if is_tested else None,
    }


def files_of(
    to: str, name: str, checkpoint: Checkpoint, network: SpikingNetwork
) -> dict[str, bytes | str]:
    """The file by its name, and what has to stand beside it. Raises UserError for a network that
    the format cannot hold."""
    about = about_of(checkpoint, network.time_window)
    # Imported here: each needs packages that the others do not.
    if to == "safetensors":
        from .safetensors_file import safetensors_file

        return {name: safetensors_file(checkpoint.model, about)}
    description = described(network, about)
    match to:
        case "onnx":
            from .onnx_file import onnx_file

            return {name: onnx_file(description)}
        case "nir":
            from .nir_file import nir_file, nir_notes

            return {name: nir_file(description), f"{name}.md": nir_notes(description, name)}
        case "integers":
            from .integers_file import integers_file

            return {name: integers_file(description)}
    from .plain import torch_file

    return {name: torch_file(description)}


def images_for(
    checkpoint: Checkpoint, network: SpikingNetwork, data_path: str | None
) -> tuple[Tensor, str]:
    """Images to compare on, as the network reads them, and what they are."""
    most = int(max(1, min(MOST_IMAGES, MOST_MACS // macs_of_image(checkpoint.settings))))
    batches = evaluation_data(checkpoint, data_path, network.time_window)
    if batches is not None:
        enough = islice(batches, -(-most // checkpoint.settings.batch_size))
        images = torch.cat([images for images, _ in enough])[:most]
        return images, f"{len(images)} test images"
    highest = 256 if len(network.input_shape) == 3 else 4  # events are few
    codes = torch.randint(highest, (min(most, 32), *network.input_shape))
    return (codes / 255 if highest == 256 else codes.float()), f"{len(codes)} random images"


def check_out(to: str, out: Path) -> None:
    """Raises UserError, before any work, where the files cannot be written."""
    for path in (out, out.with_name(f"{out.name}.md")) if to == "nir" else (out,):
        if os.path.lexists(path):
            raise UserError(f"{path} is already there: choose another --out")
    check_writable(out.parent, "--out")


def export(args: Any) -> None:
    form, out = FORMATS[args.to], Path(args.out)
    missing = [name for name in form.packages if find_spec(name) is None]
    if missing:
        raise UserError(
            f"--to {args.to} needs {' and '.join(missing)}: pip install {' '.join(missing)}"
        )
    check_out(args.to, out)
    if args.time_window is not None and args.to == "safetensors":
        raise UserError("--time_window: weights know of no T: leave it out")
    checkpoint = load_checkpoint(args.checkpoint)
    network = load_network(checkpoint, args.time_window)
    files = files_of(args.to, out.name, checkpoint, network)
    content = files[out.name]

    images, what = images_for(checkpoint, network, args.data_path)
    own = read_back.run(network, images)
    integer = None if args.to == "safetensors" else read_back.run_in_integers(network, images)
    found = form.read(content, images, network)
    try:
        text = read_back.compare(found, integer or own, exact=integer is not None)
    except UserError as error:
        raise UserError(
            f"{form.reader} reads another network: {error} ({what}); nothing was written"
        ) from None
    write_files(out.parent, files)
    print(f"{out}: {len(content) / 1e3:,.0f} kB")
    print(f"{form.reader} {version(form.reader)} reads it: {text} ({what})")


def main(argv: Sequence[str] | None = None) -> int:
    return run_command("exchange", lambda: export(build_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
