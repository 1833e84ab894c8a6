"""What others' programs read of an exported network: in each layer the spikes that it fires itself.

Teacher and student on the whole digits test set, others on less. Their weights are random, and
their batch norms have the statistics of these images, so that every layer fires.
"""

import io
import re
import shutil
from collections.abc import Callable
from contextlib import chdir, redirect_stderr, redirect_stdout
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from checkpoints import load_checkpoint
from conftest import REPOSITORY, files_below, refused
from data_loader import load_data_sets
from exchange import __main__ as exchange
from exchange import read_back, read_integers
from exchange.description import Description, described
from exchange.integers_file import integers_file
from exchange.plain import torch_file
from exchange.read_back import Found, compare, differing, run, run_in_integers
from load_settings import load_network
from models import NETWORKS
from models.batch_norm import BatchNorm, estimate_statistics
from models.layers import Layers
from models.network import SpikingNetwork, folded
from models.neuron import DEFAULT_NEURON, Neuron
from models.quantized_layers import quantized_layers
from runtime.errors import UserError
from settings import Settings

CHECKPOINTS = REPOSITORY / "tests" / "data"
PAGE = REPOSITORY / "docs" / "exchange.md"
T = 3
SOFT = Neuron(leak=0.5, reset="soft")
ABOUT = {"class_names": list("0123456789")}


def needs(*packages: str) -> pytest.MarkDecorator:
    missing = [name for name in packages if find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {' and '.join(missing)}")


needs_onnx, needs_nir = needs("onnx", "onnxruntime"), needs("nir", "nirtorch")


@cache
def digits() -> Tensor:
    """All 360 test images."""
    _, test_set = load_data_sets(Settings.of("digits"))
    return torch.stack([image for image, _ in test_set])


def one_of_ones_own() -> type[SpikingNetwork]:
    """The network of docs/extend.md, which is none of this repository's."""
    page = (REPOSITORY / "docs" / "extend.md").read_text()
    names: dict[str, Any] = {}
    exec(
        re.search(r"^```python\n(.*?class Small.*?)^```$", page, re.MULTILINE | re.DOTALL)[1], names
    )
    return names["Small"]


def frames(number: int) -> Tensor:
    """Codes of events, (number, T, 2, 16, 16)."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(4, (number, T, 2, 16, 16), generator=generator).float()


@cache
@torch.no_grad()
def network(
    bits: int | None,
    neuron: Neuron = DEFAULT_NEURON,
    events: bool = False,
    arch: str = "resnet18",
) -> SpikingNetwork:
    torch.manual_seed(0)
    layers = Layers(neuron=neuron)
    if bits is not None:
        layers = quantized_layers(bits, image_step=1.0 if events else 1 / 255, neuron=neuron)
    how = {"width": 8 if arch == "resnet18" else 4, "layers": layers, "image_size": (16, 16)}
    make = one_of_ones_own() if arch == "Small" else NETWORKS[arch][1]
    made = make(10, T, 2 if events else 1, **how)
    for module in made.modules():
        if isinstance(module, BatchNorm):
            nn.init.normal_(module.bias, std=0.1)
    made.input_shape = (T, 2, 16, 16) if events else (1, 16, 16)
    estimate_statistics(made, [frames(32) if events else digits()[:64]], (T,))
    return made.eval()


def images_of(*which: object) -> Tensor:
    if True in which:
        return frames(20)
    return digits() if which in TEACHER_AND_STUDENT else digits()[:60]


@cache
def own(*which: object) -> Found:
    """What the network itself says of its images."""
    made, images = network(*which), images_of(*which)
    found = run(made, images)
    assert all(0.001 < spikes.mean() < 0.999 for spikes in found.spikes.values())
    integer = run_in_integers(made, images)
    if integer is not None:
        assert not any(differing(integer, found).values())
    return integer or found


TEACHER_AND_STUDENT = [(None,), (2,)]
EVERY = [*TEACHER_AND_STUDENT, (None, SOFT), (8, SOFT), (4, DEFAULT_NEURON, True)]
EVERY += [(None, DEFAULT_NEURON, True), (4, Neuron(threshold=0.3))]
VGG = [(None, DEFAULT_NEURON, False, "vgg9"), (2, DEFAULT_NEURON, False, "vgg9")]
EVERY += [*VGG, (4, DEFAULT_NEURON, False, "vgg16"), (3, SOFT, False, "Small")]


def check(read: Callable, content: Any, which: tuple) -> None:
    found = read(content, images_of(*which), network(*which))
    compare(found, own(*which), exact=which[0] is not None)


def onnx_of(description: Description) -> bytes:
    from exchange.onnx_file import onnx_file

    return onnx_file(description)


@needs_onnx
@pytest.mark.parametrize("which", EVERY)
def test_onnxruntime_fires_every_spike_and_a_student_has_every_bit_of_its_logits(which):
    check(read_back.by_onnxruntime, onnx_of(described(network(*which))), which)


@pytest.mark.parametrize("which", [(None, SOFT), (2,), (4, DEFAULT_NEURON, True)])
def test_a_program_of_torch_export_fires_every_spike(which):
    check(read_back.by_torch_export, torch_file(described(network(*which))), which)


@pytest.mark.parametrize("which", [which for which in EVERY if which[0] is not None])
def test_a_reader_in_numpy_fires_every_spike_and_has_every_bit_of_the_logits(which):
    check(read_back.by_numpy, integers_file(described(network(*which))), which)


def test_the_reader_in_numpy_needs_nothing_else():
    text = (REPOSITORY / "exchange" / "read_integers.py").read_text()
    assert {*re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE)} == {"json", "numpy"}


@needs_onnx
def test_onnxruntime_fires_every_spike_of_a_leak_that_integers_have_not():
    which = 4, Neuron(leak=0.3)
    found = read_back.by_onnxruntime(
        onnx_of(described(network(*which))), images_of(*which), network(*which)
    )
    assert not any(differing(found, own(*which)).values())


@needs_onnx
@pytest.mark.parametrize("which", [(2,), (4, DEFAULT_NEURON, True)])
def test_onnx_takes_any_number_of_images(which):
    content = onnx_of(described(network(*which)))
    for number in (1, 7):
        found = read_back.by_onnxruntime(content, images_of(*which)[:number], network(*which))
        np.testing.assert_array_equal(found.logits, own(*which).logits[:number])


# NIR: three readers.


def by_snntorch(graph: Any, images: Tensor, made: SpikingNetwork) -> Found:
    from snntorch.import_nir import import_from_nir

    with redirect_stdout(io.StringIO()):  # it tells of every layer
        module = import_from_nir(graph)
    return read_back.run_nir(module, images, made)


def by_norse(graph: Any, images: Tensor, made: SpikingNetwork, dt: float = 1e-4) -> Found:
    import nir
    import nirtorch
    from norse.torch.utils.import_nir import _import_norse_module

    mapper = dict.fromkeys(
        (nir.Conv2d, nir.LIF, nir.SumPool2d), partial(_import_norse_module, dt=dt)
    )
    return read_back.run_nir(nirtorch.nir_to_torch(graph, mapper), images, made)


def by_spikingjelly(graph: Any, images: Tensor, made: SpikingNetwork) -> Found:
    from spikingjelly.activation_based.nir_exchange import import_from_nir

    return read_back.run_nir(import_from_nir(graph), images, made)


READERS = [
    pytest.param(by_spikingjelly, id="spikingjelly"),
    pytest.param(by_snntorch, marks=needs("snntorch"), id="snnTorch"),
    pytest.param(by_norse, marks=needs("norse"), id="norse"),
]


def graph_of(description: Description) -> Any:
    import nir

    from exchange.nir_file import nir_file

    return nir.read(io.BytesIO(nir_file(description)))


@needs_nir
@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    "which", [(None,), (None, Neuron(0.5, 0.75)), (None, DEFAULT_NEURON, True)]
)
def test_every_reader_of_nir_fires_every_spike(read, which):
    graph = graph_of(described(network(*which), ABOUT))
    check(read, graph, which)


@cache
@torch.no_grad()
def with_ties() -> SpikingNetwork:
    """Few binary digits in every weight: float32 adds exactly in any order, and many membranes lie
    at the threshold itself."""
    made = folded(network(None))
    for name, layer in made.named_modules():
        if isinstance(layer, nn.Conv2d):
            digits = 4 if name == "stem.conv" else 2 if "shortcut" in name else 6
            for numbers in (layer.weight, layer.bias):
                numbers.copy_((numbers * 2**digits).round() / 2**digits)
    return made


def coarse_digits() -> Tensor:
    return (digits() * 16).round() / 16


@needs_onnx
@pytest.mark.parametrize("which", [(2,), (8, SOFT)])
@pytest.mark.parametrize("time_window", [1, T])
def test_an_onnx_file_holds_no_constant_that_nothing_reads(which, time_window):
    import onnx

    with network(*which).running_for(time_window):
        graph = onnx.load_from_string(onnx_of(described(network(*which)))).graph
    read = {name for node in graph.node for name in node.input}
    assert {x.name for x in graph.initializer} < read


@needs_onnx
def test_onnxruntime_fires_no_membrane_at_the_threshold():
    made, images = with_ties(), coarse_digits()
    found = read_back.by_onnxruntime(onnx_of(described(made)), images, made)
    assert not any(differing(found, run(made, images)).values())


@needs_nir
@pytest.mark.parametrize("read", READERS)
def test_a_membrane_at_the_threshold_fires_in_no_reader(read):
    made, images = with_ties(), coarse_digits()
    membranes = made(images, membranes=True)[1]
    assert sum((u == DEFAULT_NEURON.threshold).sum() for u in membranes) > 1000
    found = read(graph_of(described(made, ABOUT)), images, made)
    assert not any(differing(found, run(made, images)).values())


@needs_nir
def test_without_the_larger_threshold_spikingjelly_fires_other_spikes():
    made, images = with_ties(), coarse_digits()
    graph = graph_of(described(made, ABOUT))
    for node in graph.nodes.values():
        if hasattr(node, "v_threshold"):
            node.v_threshold = np.full_like(node.v_threshold, 0.375)
    found = by_spikingjelly(graph, images, made)
    assert sum(differing(found, run(made, images)).values()) > 1000


@needs_nir
@needs("norse")
def test_another_timestep_than_the_files_is_another_network():
    found = by_norse(graph_of(described(network(None), ABOUT)), digits(), network(None), dt=1e-3)
    assert sum(differing(found, own(None)).values()) > 10**5


@needs_nir
@pytest.mark.parametrize("removed", ["blocks.2.shortcut.conv", "blocks.0.conv2"])
def test_a_lost_edge_of_a_sum_is_found(removed):
    graph = graph_of(described(network(None), ABOUT))
    edges = [edge for edge in graph.edges if edge[0] != removed]
    assert len(edges) == len(graph.edges) - 1
    graph.edges = edges
    found = by_spikingjelly(graph, digits(), network(None))
    with pytest.raises(UserError, match="first in blocks"):
        compare(found, own(None), exact=False)


@needs_nir
@needs("snntorch")
def test_a_state_that_is_kept_from_the_batch_before_is_found():
    from snntorch.import_nir import import_from_nir

    with redirect_stdout(io.StringIO()):
        module = import_from_nir(graph_of(described(network(None), ABOUT)))
    first = read_back.run_nir(module, digits(), network(None))
    assert not any(differing(first, own(None)).values())
    again = read_back.run_nir(module, digits(), network(None))
    assert sum(differing(again, own(None)).values()) > 1000


@needs_nir
@pytest.mark.parametrize(
    ("which", "reason"),
    [
        ((2,), "membranes of a few bits"),
        ((None, SOFT), "soft reset"),
        ((None, Neuron(leak=1.0)), "leak of 1"),
        ((None, Neuron(leak=0.0)), "leak of 0"),
        ((None, DEFAULT_NEURON, False, "vgg16"), "beyond its plane of 1x1"),
    ],
)
def test_nir_refuses_what_it_cannot_say(which, reason):
    with pytest.raises(UserError, match=reason):
        graph_of(described(network(*which), ABOUT))


# What must not pass for the same network.


def test_a_single_spike_or_bit_of_a_logit_is_found():
    whole = own(2)
    compare(whole, whole, exact=True)
    for name in whole.spikes:
        spikes = whole.spikes[name].copy()
        spikes.flat[7] ^= True
        with pytest.raises(UserError, match=f"^1 of .* differ, first in {name}$"):
            compare(Found(whole.logits, whole.spikes | {name: spikes}), whole, exact=True)
    logits = whole.logits.copy()
    logits[3, 2] = np.nextafter(logits[3, 2], np.inf)
    with pytest.raises(UserError, match="the logits alone"):
        compare(Found(logits, whole.spikes), whole, exact=True)
    without = dict(list(whole.spikes.items())[1:])
    with pytest.raises(UserError, match="other layers"):
        compare(Found(whole.logits, without), whole, exact=True)


@pytest.mark.parametrize("name", ["step", "threshold", "leak_divisor", "weight", "divisor"])
def test_another_number_in_the_file_of_integers_is_another_network(name):
    file = read_integers.load(io.BytesIO(integers_file(described(network(8, SOFT)))))
    layer = [layer for layer in file["layers"] if name in layer][3]
    if name == "weight":
        layer[name][0, 0, 1, 1] += 1
    else:
        layer[name] += layer["step"] if name == "threshold" else layer[name]
    codes = (images_of(8, SOFT) * 255).round().numpy()
    with pytest.raises(UserError, match="first in"):
        compare(Found(*read_integers.run(file, codes)), own(8, SOFT), exact=True)


@pytest.mark.parametrize(
    ("which", "reason"),
    [((None,), "full-precision"), ((4, Neuron(leak=0.3)), "a leak of 0.3 is no shift")],
)
def test_integers_are_refused_where_they_are_not_exact(which, reason):
    with pytest.raises(UserError, match=reason):
        integers_file(described(network(*which)))


# The command.


def exports(name: str, to: str, *options: str) -> int:
    checkpoint = str(CHECKPOINTS / f"{name}-last.pth")
    return exchange.main([checkpoint, "--to", to, "--out", f"made.{to}", *options])


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Callable[[str], tuple[Path, str, str]]:
    """What the command writes in a format, once: the folder, and what it has said."""

    @cache
    def write(to: str) -> tuple[Path, str, str]:
        folder, out, err = tmp_path_factory.mktemp(to), io.StringIO(), io.StringIO()
        with chdir(folder), redirect_stdout(out), redirect_stderr(err):
            assert exports("original" if to == "nir" else "qamd", to) == 0
        return folder, out.getvalue(), err.getvalue()

    return write


@pytest.mark.parametrize("to", exchange.FORMATS)
def test_the_command_writes_what_its_reader_has_read(to, written):
    if missing := [name for name in exchange.FORMATS[to].packages if find_spec(name) is None]:
        pytest.skip(f"needs {' and '.join(missing)}")
    folder, out, err = written(to)
    reader = exchange.FORMATS[to].reader
    assert re.fullmatch(
        rf"made.{to}: \d+ kB\n{reader} [\d.]+\S* reads it: 0 of 3,133,440 spikes differ, "
        r"the logits (in no bit|by rounding) \(360 test images\)\n",
        out,
    )
    assert err == ""
    notes = {"made.nir.md"} if to == "nir" else set()
    assert {path.name for path in folder.iterdir()} == {f"made.{to}"} | notes
    for name in notes:
        text = (folder / name).read_text()
        assert "are the mean of 4" in text
        assert "fires above" in text
        assert "0.0001 s" in text
    settings = load_checkpoint(CHECKPOINTS / "qamd-last.pth").settings
    content = (folder / f"made.{to}").read_bytes()
    for path in (settings.save_path, settings.teacher_path):
        assert path.encode() not in content


def test_a_missing_package_is_one_line_before_any_work(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(exchange, "find_spec", lambda name: None)
    monkeypatch.delattr(exchange, "load_checkpoint")
    for to in ("onnx", "nir", "safetensors"):
        line = refused(capfd, exports, "qamd", to)
        packages = " ".join(exchange.FORMATS[to].packages)
        assert f"--to {to} needs" in line
        assert line.endswith(f"pip install {packages}\n")


def test_nothing_is_overwritten_and_nothing_left_where_it_cannot_be_written(
    tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "made.integers").write_text("mine")
    assert "already there" in refused(capfd, exports, "qamd", "integers")
    assert (tmp_path / "made.integers").read_text() == "mine"
    assert "cannot write" in refused(capfd, exports, "qamd", "torch", "--out", "made.integers/x")
    assert "full-precision" in refused(capfd, exports, "original", "integers", "--out", "new")
    (tmp_path / "made.nir.md").write_text("mine too")
    monkeypatch.setattr(exchange, "find_spec", lambda name: True)
    assert "made.nir.md is already there" in refused(capfd, exports, "original", "nir")
    assert {path.name for path in tmp_path.iterdir()} == {"made.integers", "made.nir.md"}


def test_a_file_that_is_read_otherwise_is_not_left(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)

    def read(content: bytes, images: Tensor, made: SpikingNetwork) -> Found:
        found = read_back.by_numpy(content, images, made)
        next(iter(found.spikes.values())).flat[0] ^= True
        return found

    form = exchange.FORMATS["integers"]
    monkeypatch.setitem(exchange.FORMATS, "integers", form._replace(read=read))
    line = refused(capfd, exports, "qamd", "integers")
    assert "1 of 3,133,440 spikes differ, first in blocks.0.lif1 (360 test images)" in line
    assert files_below(tmp_path) == set()


def test_another_t_and_random_images_where_no_data_are_at_hand(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(exchange, "evaluation_data", lambda *_: None)
    assert exports("qamd", "integers", "--time_window", "2") == 0
    assert "(32 random images)" in capfd.readouterr().out
    made = read_integers.load("made.integers")
    assert made["time_window"] == made["about"]["settings"]["time_window"] == 2
    assert made["about"]["accuracy"] is None  # 4 timesteps had another
    pytest.importorskip("safetensors")
    assert "--time_window" in refused(capfd, exports, "qamd", "safetensors", "--time_window", "2")


# The page.


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return [block for block in found if language in block]


@pytest.mark.parametrize(
    ("setting", "to", "word", "packages"),
    [
        ("qamd", "onnx", "onnxruntime", ["onnx", "onnxruntime"]),
        ("qamd", "integers", "read_integers", []),
        ("qamd", "safetensors", "safetensors", ["safetensors"]),
        ("qamd", "torch", "torch.export", []),
        ("original", "nir", "spikingjelly", ["nir", "nirtorch"]),
        ("original", "nir", "snntorch", ["nir", "nirtorch", "snntorch"]),
        ("original", "nir", "norse", ["nir", "nirtorch", "norse"]),
    ],
)
def test_the_lines_of_the_page_read_the_file(
    setting, to, word, packages, written, tmp_path, monkeypatch
):
    if missing := [name for name in packages if find_spec(name) is None]:
        pytest.skip(f"needs {' and '.join(missing)}")
    monkeypatch.chdir(tmp_path)
    command = re.search(rf"python -m exchange \S+ --to {to} --out (\S+)", PAGE.read_text())
    shutil.copy(written(to)[0] / f"made.{to}", command[1])
    (block,) = blocks(word)
    if to == "nir":
        block += blocks("range(")[0]
    codes = (digits() * 255).round().byte()
    names = {"images": digits(), "codes": codes.numpy()}
    if word == "onnxruntime":
        names["images"] = digits().numpy()
    with redirect_stdout(io.StringIO()), torch.no_grad():
        exec(block, names)
    logits = run(load_network(CHECKPOINTS / f"{setting}-last.pth"), digits()).logits
    np.testing.assert_allclose(np.asarray(names["logits"]), logits, rtol=1e-4, atol=1e-4)
