"""What a GPU may compute otherwise than a CPU, and what not: `pytest --device cuda -m device`.

The other tests that ask for the `device` compare what it computes with equations; these compare
devices and precisions. On a CPU, what is left of them is float32 and bf16 against float64.
"""

import copy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import kernels
import main
from checkpoints import load_checkpoint
from conftest import DIGITS, REPOSITORY
from data_loader import ImageSet, Share, set_epoch, training_loader
from data_sets.augment import CropAndFlip
from distiller import Distiller, cross_entropy
from engine import compile as compiling
from engine import start
from engine.compile import ReplayedGradients
from engine.run import random_state
from load_settings import parse_settings
from models import MSResNet, QuanMSResNet
from models.batch_norm import BatchNorm
from models.integer_network import IntegerNetwork
from models.layers import Conv2d
from models.neuron import DEFAULT_NEURON, LIF
from models.quantized_layers import QuanConv2d
from one_step import SETTINGS, networks, results
from runtime.errors import UserError
from settings import SHARED_GPU
from stand_in_data import write_ncaltech101

THRESHOLD = DEFAULT_NEURON.threshold
T = 3
PRECISIONS = ("float32", "tf32", "bf16")
# Relative error, ‖y - y₆₄‖ / ‖y₆₄‖, of a layer that is given the same input. Rounding an operand
# costs 2⁻²⁴, 2⁻¹² or 2⁻⁹ of it at most, sums of random signs average that, so these are three or
# more times what is to be expected; float32 also adds up 10,000 values.
LAYER_ERROR = {"float32": 1e-5, "tf32": 1e-3, "bf16": 1e-2}
# A quantized batch norm: its statistics, in float32, may give one scale another of 127 codes.
CODE_ERROR = 1e-2
# Share of the neurons and timesteps of a whole network that fire otherwise: a rounding flips a
# spike, and all that it reaches moves. Of six networks on a CPU at most 0.03 %, 1.1 % (TF32, in
# imitation) and 3.4 % did: thrice that.
DIFFERING_SPIKES = {"float32": 1e-3, "tf32": 3e-2, "bf16": 1e-1}


@pytest.fixture(params=PRECISIONS)
def precision(request, device) -> Iterator[str]:
    """Networks are in float32: "tf32" lets a GPU round the operands of its sums of products, "bf16"
    is autocast."""
    if request.param == "tf32" and device.type == "cpu":
        pytest.skip("a CPU has no TF32: needs --device cuda")
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    tf32 = request.param == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    yield request.param
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def autocast(precision: str, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def images(number: int = 16) -> Tensor:
    return torch.rand(number, 2, 16, 16, generator=torch.Generator().manual_seed(1))


def network_of(setting: str) -> MSResNet:
    """In float32 on the CPU, with running statistics and biases as of a training."""
    torch.manual_seed(0)
    network = MSResNet(18, 5, T, 2, 8)
    if setting == "student":
        network = QuanMSResNet(18, 5, T, 2, 8, bits=4)
    for module in network.modules():
        if isinstance(module, BatchNorm):
            nn.init.normal_(module.bias, std=0.1)
    for _ in range(30):
        network(images())
    return network.eval()


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found.double().cpu() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_step_in_float64_is_the_cpus(setting, gpu, measured):
    worst = 0.0
    for found, expected in zip(results(setting, gpu), results(setting, "cpu"), strict=True):
        worst = max(worst, relative_error(found, expected))
    measured("relative error", worst)
    assert worst < 1e-9


def calls_of(network: nn.Module, x: Tensor) -> list[tuple[str, tuple]]:
    """(name, arguments) of each layer in a training step's forward pass."""
    calls = []
    for name, module in network.named_modules():
        if isinstance(module, Conv2d | BatchNorm | LIF | nn.Linear):
            module.register_forward_pre_hook(lambda _, args, name=name: calls.append((name, args)))
    network.train()(x)
    return calls


@pytest.mark.parametrize("setting", ["original", "student"])
def test_each_layer_is_float64s_but_for_its_roundings(setting, precision, device, measured):
    network = network_of(setting)
    exact = copy.deepcopy(network).double()
    tried = copy.deepcopy(network).to(device).train()
    # Under autocast a full-precision network's activations are in bf16, a quantized one's are not.
    narrow = precision == "bf16" and setting == "original"
    worst: dict[str, float] = {}
    calls = calls_of(copy.deepcopy(exact), images().double())
    assert len(calls) == 20 + 20 + 17 + 1
    for name, (x, *rest) in calls:
        x = x.to(torch.bfloat16 if narrow else torch.float32)
        layer = exact.get_submodule(name).train()
        expected = layer(x.double(), *rest).detach()
        with autocast(precision, device), torch.no_grad():
            found = tried.get_submodule(name)(x.to(device), *rest)
        kind = type(layer).__name__
        if isinstance(layer, LIF):
            error = (found.double().cpu() != expected).double().mean().item()
            # It adds in float32 whatever it is given: of 10,000 membranes none is that near to θ.
            assert error < 1e-4, name
        elif isinstance(layer, QuanConv2d):
            # Integers. A fast algorithm may leave them off by a little: the batch norm rounds.
            error = (found.double().cpu() - expected).abs().max().item()
            assert error < 0.1, name
        else:
            error = relative_error(found, expected)
            rounds = isinstance(layer, BatchNorm) and layer.quantizer is not None
            assert error < (CODE_ERROR if rounds else LAYER_ERROR[precision]), name
        worst[kind] = max(worst.get(kind, 0), error)
    for kind, error in worst.items():
        measured(f"{kind} {precision}", error)


def membranes_of(network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """(logits, whether each neuron fired at each timestep, in one row)"""
    with torch.no_grad():
        logits, membranes = network(x, membranes=True)
    return logits, torch.cat([(u > THRESHOLD).cpu().flatten() for u in membranes])


def test_a_network_fires_as_in_float64_but_for_few_spikes(precision, device, measured):
    network = network_of("original")
    _, expected = membranes_of(copy.deepcopy(network).double(), images().double())
    with autocast(precision, device):
        _, found = membranes_of(network.to(device), images().to(device))
    share = (found != expected).double().mean().item()
    measured(f"differing spikes {precision}", share)
    assert 0.02 < expected.double().mean() < 0.5
    assert share < DIFFERING_SPIKES[precision]


def test_an_evaluated_student_fires_on_every_device_and_in_every_precision_as_in_float64(
    precision, device
):
    network = network_of("student")
    exact_logits, expected = membranes_of(copy.deepcopy(network).double(), images().double())
    with autocast(precision, device):
        logits, found = membranes_of(network.to(device), images().to(device))
    assert 0.02 < expected.double().mean() < 0.5
    assert torch.equal(found, expected)
    assert relative_error(logits, exact_logits) < LAYER_ERROR[precision]


def test_compiled_quantizers_round_ties_as_the_eager_ones(gpu):
    steps = torch.rand(4096, 1, generator=torch.Generator().manual_seed(0)).to(gpu) + 1e-3
    x = (torch.arange(-9, 9, device=gpu) + 0.5) * steps  # x / step is a half, rounded or not
    found = []
    reason = compiling.compile_regions(
        lambda: found.append(kernels.integers_forward(x, steps, -8, 7)),
        every_size=False,
    )
    kernels.fused.clear()
    assert reason is None
    assert torch.equal(found[0], kernels.integers_forward(x, steps, -8, 7))


def test_a_compiled_student_fires_every_spike_of_the_integer_network(gpu):
    network, found = network_of("student").to(gpu), []
    reason = compiling.compile_regions(
        lambda: found.append(membranes_of(network, images().to(gpu))[1]),
        every_size=False,
    )
    kernels.fused.clear()
    assert reason is None
    _, spikes = IntegerNetwork(network)(images().to(gpu))
    assert torch.equal(found[0], torch.cat([s.cpu().flatten() for s in spikes]))


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_step_as_a_cuda_graph_is_the_step(setting, gpu, measured):
    found = []
    for compiled in (False, True):
        teacher, student = (network.to(gpu) for network in networks())
        network = teacher if setting == "original" else student
        loss_function = cross_entropy(network)
        if setting == "qamd":
            loss_function = Distiller(teacher, student)
        options = ["--data", "digits", "--paper_setting", "original", "--seed", "1"]
        settings = parse_settings([*options, *(["--compile"] if compiled else [])])
        gradients = main.gradients_of(settings, network, loss_function, gpu)
        assert isinstance(gradients, ReplayedGradients) is compiled
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
        generator, means = torch.Generator().manual_seed(1), []
        for epoch in range(1, 6):
            if setting == "qamd":
                loss_function.set_epoch(epoch, 5)
            # The last batch of an epoch may be smaller; of several T each has a graph.
            for size, T in ((8, 3), (8, 3), (8, 2), (3, 3)):
                x = torch.rand(size, 1, 16, 16, generator=generator, dtype=torch.float64)
                with network.running_for(T):
                    means.append(dict(gradients(x.to(gpu), torch.arange(size, device=gpu) % 4)))
                nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                optimizer.step()
                means[-1] = torch.stack(list(means[-1].values())).clone()
        if compiled:
            assert len(gradients.graphs) == 3
        found.append([*means, *network.state_dict().values()])
    worst = max(relative_error(b, a.double().cpu()) for a, b in zip(*found, strict=True))
    measured("relative error", worst)
    assert worst < 1e-9


def test_augmented_batches_are_the_cpus(gpu):
    data_set = ImageSet(
        torch.randint(256, (64, 3, 16, 16), dtype=torch.uint8), range(64), CropAndFlip((16, 16))
    )
    batches = []
    for device in (gpu, torch.device("cpu")):
        loader = training_loader(data_set, Share(16), device)
        set_epoch(loader, 1)
        batches.append([(x.cpu(), labels.cpu()) for x, labels in loader])
    for ours, theirs in zip(*batches, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


STUDENT = ["--paper_setting", "student", "--bits", "4"]
QAMD = ["--paper_setting", "qamd", "--bits", "4"]
RUNS = {
    "teacher": ["--paper_setting", "original"],
    "teacher, bf16": ["--paper_setting", "original", "--amp"],
    "teacher in parts": ["--paper_setting", "original", "--accumulate", "2"],
    "student": STUDENT,
    "student, bf16, from its teacher": [*STUDENT, "--amp", "--init_from_teacher"],
    "CLK": [*QAMD, "--loss", "CLK", "--check_numerics"],
    "CLK, bf16": [*QAMD, "--loss", "CLK", "--amp"],
    "CLM in parts": [*QAMD, "--loss", "CLM", "--accumulate", "2"],
    "CL": [*QAMD, "--loss", "CL", "--deterministic"],
    "teacher, compiled": ["--paper_setting", "original", "--compile"],
    "CLK, bf16, compiled": [*QAMD, "--loss", "CLK", "--amp", "--compile"],
}
ON_CPU = ("teacher", "student", "student, bf16, from its teacher", "CLK, bf16")


def compare_with_cpu(options: list[str], folder: Path, capfd) -> None:
    """Train and evaluate; the CPU finds the accuracy that the device has found."""
    assert main.main([*options, "--save_path", str(folder)]) == 0
    torch.use_deterministic_algorithms(False)
    assert "warning: --compile" not in capfd.readouterr().err
    (last,) = folder.glob("*-last.pth")
    checkpoint = load_checkpoint(last)
    (row,) = checkpoint.rest["rows"]
    assert row["spike_rate"] > 0.01
    data = [] if "--data_path" not in options else options[options.index("--data_path") :][:2]
    assert main.main(["--eval_only", str(last), "--device", "cpu", "--workers", "0", *data]) == 0
    correct, _, total = capfd.readouterr().out.split("(")[1].split()[:3]
    assert int(total) > 0
    # A student's evaluation is made of integers. Of a teacher's spikes some differ, and after so
    # short a training its classes are close to each other.
    allowed = 0.1 * int(total) if checkpoint.settings.bits is None else 0
    assert abs(int(correct) - round(checkpoint.accuracy * int(total))) <= allowed


@pytest.mark.device
@pytest.mark.parametrize("run", RUNS)
def test_the_cpu_finds_the_accuracy_of_a_network_trained_on_the_device(
    run, device, trained, tmp_path, capfd
):
    if run not in ON_CPU and device.type == "cpu":
        pytest.skip("other tests train so on the CPU: needs --device cuda")
    options = [*DIGITS, *RUNS[run]]
    if "qamd" in options or "--init_from_teacher" in options:
        options += ["--teacher_path", str(trained["original"])]
    compare_with_cpu(options, tmp_path, capfd)


def test_the_cpu_finds_the_accuracy_of_networks_trained_on_events_on_the_device(
    device, tmp_path, capfd
):
    write_ncaltech101(tmp_path, 4, classes=2, per_class=10)
    options = ["--data", "ncaltech101", "--data_path", str(tmp_path), "--time_window", "4"]
    options += ["--width", "2", "--epochs", "1", "--batch_size", "8", "--workers", "1"]
    teacher = tmp_path / "teacher"
    compare_with_cpu([*options, "--paper_setting", "original"], teacher, capfd)
    taught = [*QAMD, "--teacher_path", str(teacher / "original-last.pth")]
    compare_with_cpu([*options, *taught], tmp_path / "student", capfd)


def test_a_launched_process_trains_by_nccl(gpu, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    run = [*DIGITS, *STUDENT, "--device", "cuda", "--save_path", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, *launcher, str(REPOSITORY / "main.py"), *run],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "gloo" not in done.stdout
    assert load_checkpoint(tmp_path / "student-last.pth").epoch == 1


@pytest.mark.parametrize("told", ["1", "2"])  # not every launcher says how many there are
def test_processes_that_would_share_a_gpu_are_refused_with_the_ways_out_or_talk_by_gloo(
    told, monkeypatch, capsys
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for name, value in {"RANK": "0", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": told}.items():
        monkeypatch.setenv(name, value)
    for device in ("auto", "cuda"):
        settings = parse_settings([*DIGITS, *STUDENT, "--device", device])
        with pytest.raises(UserError, match=rf"2 processes .* 1: start fewer.* cpu .*{SHARED_GPU}"):
            start.device_of(settings)
    settings = parse_settings([*DIGITS, *STUDENT, "--device", SHARED_GPU])
    assert start.device_of(settings) == (torch.device("cuda", 0), "gloo")
    assert capsys.readouterr().out == "processes: 2, GPUs: 1: they talk by gloo, slowly\n"


def test_a_gpu_without_memory_left_is_one_line(monkeypatch, tmp_path, capfd):
    def train(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nGPU 0 has …")

    monkeypatch.setattr(main, "train", train)
    assert main.main([*DIGITS, *STUDENT, "--save_path", str(tmp_path)]) == 2
    err = capfd.readouterr().err
    assert err.startswith("main.py: error: the GPU has no memory left (CUDA out of memory.")
    assert "--accumulate" in err
    assert err.count("\n") == 1


def test_a_run_on_the_cpu_does_not_open_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: pytest.fail("opened the GPU"))
    assert random_state()["cuda"] is None
