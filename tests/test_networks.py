"""The two networks against a naive float64 implementation, and the paper's sizes and starts."""

import subprocess
import sys
from functools import partial

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import reference
from conftest import REPOSITORY
from models import MSResNet, QuanMSResNet
from models.batch_norm import BatchNorm, estimate_statistics
from models.integer_network import IntegerNetwork, why_not_integers
from models.layers import Conv2d, Layers
from models.network import folded
from models.neuron import DEFAULT_NEURON, LIF, Neuron
from models.quantized_layers import QuanConv2d, QuanLinear
from quantization import GRID, BatchNormQuantizer
from spikesim_eval.trace import describe

T = 3


def small(depth: int = 18, neuron: Neuron = DEFAULT_NEURON) -> MSResNet:
    torch.manual_seed(0)
    layers = Layers(neuron=neuron)
    return MSResNet(depth, 5, T, in_channels=2, width=4, layers=layers).double()


def small_quantized(
    depth: int, bits: int, bn_bits: int, neuron: Neuron = DEFAULT_NEURON
) -> QuanMSResNet:
    torch.manual_seed(0)
    how = {"bits": bits, "bn_bits": bn_bits, "neuron": neuron}
    network = QuanMSResNet(depth, 5, T, 2, 4, **how).double()
    for module in network.modules():
        if isinstance(module, BatchNorm):  # otherwise all shifts come from the means alone
            torch.nn.init.normal_(module.bias, std=0.1)
    return network


def images(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize(
    ("depth", "bits", "bn_bits"),
    [
        (18, None, None),
        (34, None, None),
        (18, 2, 8),
        (18, 3, 4),
        (18, 4, 8),
        (18, 8, 16),
        (34, 2, 8),
    ],
)
def test_the_whole_network_equals_the_naive_one_in_values_and_gradients(
    depth, bits, bn_bits, static, device
):
    assert_equal_to_the_naive_one(depth, bits, bn_bits, static, DEFAULT_NEURON, device)


@pytest.mark.parametrize("bits", [None, 4])
def test_with_another_neuron_too(bits, device):
    neuron = Neuron(0.5, 0.75, "soft", "atan", 0.4)
    assert_equal_to_the_naive_one(18, bits, 8, True, neuron, device)


def assert_equal_to_the_naive_one(depth, bits, bn_bits, static, neuron, device) -> None:
    network = (
        small(depth, neuron) if bits is None else small_quantized(depth, bits, bn_bits, neuron)
    )
    x = images(3, 2, 8, 8) if static else images(3, T, 2, 8, 8)
    steps = [x] * T if static else list(x.unbind(dim=1))
    weights = {name: p.detach().clone().requires_grad_() for name, p in network.named_parameters()}
    layers = reference.FullPrecision(weights, T, neuron)
    if bits is not None:
        layers = reference.Quantized(weights, T, bits, bn_bits, neuron)

    logits, membranes = network.to(device)(x.to(device), membranes=True)
    logits, membranes = logits.cpu(), [u.cpu() for u in membranes]
    naive_logits, naive_membranes = reference.ms_resnet(layers, depth, steps)
    torch.testing.assert_close(logits, naive_logits, rtol=1e-7, atol=1e-9)
    for u, naive in zip(membranes, naive_membranes, strict=True):
        assert u.shape == naive.shape
        torch.testing.assert_close(u, naive, rtol=1e-7, atol=1e-9)

    for z, us in ((logits, membranes), (naive_logits, naive_membranes)):
        (z.square().sum() + sum(u.square().mean() for u in us)).backward()
    for name, parameter in network.named_parameters():
        grad, naive = parameter.grad.cpu(), weights[name].grad
        torch.testing.assert_close(grad, naive, rtol=1e-7, atol=1e-10, msg=f"gradient of {name}")


def test_a_static_image_gives_what_the_same_frame_repeated_gives(device):
    x = images(3, 2, 8, 8).to(device)
    static, frames = small().to(device), small().to(device)
    torch.testing.assert_close(static(x), frames(x[:, None].repeat(1, T, 1, 1, 1)))
    for one, other in zip(static.buffers(), frames.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)  # running statistics too
    static.eval(), frames.eval()
    torch.testing.assert_close(static(x), frames(x[:, None].repeat(1, T, 1, 1, 1)))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weights_have_the_bits_asked_for_but_in_the_first_and_the_last_layer(bits):
    network, widths = QuanMSResNet(18, 5, T, 2, 4, bits=bits), {}
    for name, module in network.named_modules():
        if isinstance(module, QuanConv2d | QuanLinear):
            codes, _ = module.quantizer.codes(module.weight)
            widths[name] = module.quantizer.bits
            assert codes.abs().max() <= 2 ** (widths[name] - 1) - 1
    assert widths.pop("stem.conv") == widths.pop("linear") == 8
    assert set(widths.values()) == {bits}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("bn_bits", [2, 8, 12, 14, 16])
@pytest.mark.parametrize("static", [True, False])
def test_the_integer_network_fires_every_spike_as_the_network_does(bits, bn_bits, static, device):
    x = images(16, 2, 16, 16) if static else images(16, T, 2, 16, 16)
    spikes = spikes_in_integers_too(
        QuanMSResNet(18, 5, T, 2, 8, bits=bits, bn_bits=bn_bits), x, device
    )
    assert bn_bits == 2 or all(0.02 < s.float().mean() < 0.7 for s in spikes)


LEAKS = [0.0, *(2.0**-n for n in range(7))]


def strategy_of(reset: str, thresholds: st.SearchStrategy[float]) -> st.SearchStrategy[Neuron]:
    return st.builds(Neuron, st.sampled_from(LEAKS), thresholds, st.just(reset))


@hypothesis.settings(max_examples=25, deadline=None)
@given(
    # What a soft reset subtracts is on the grid; a hard one may compare with any threshold.
    neuron=strategy_of("soft", st.integers(2, 128).map(lambda n: n / 64))
    | strategy_of("hard", st.floats(0.03, 2)),
    bits=st.integers(2, 8),
)
def test_it_does_so_with_every_neuron_that_is_exact_in_integers(neuron, bits, device):
    assert why_not_integers(neuron) is None
    network = QuanMSResNet(18, 5, T, 2, 4, bits=bits, neuron=neuron)
    spikes = spikes_in_integers_too(network, images(4, 2, 8, 8), device)
    assert 0.01 < torch.cat([s.flatten() for s in spikes]).float().mean() < 0.9


def test_a_membrane_just_above_a_threshold_between_two_integers_fires_in_both():
    neuron = Neuron(threshold=0.5 - GRID / 4)
    network = QuanMSResNet(18, 5, T, 2, 4, bits=4, neuron=neuron)
    lif = network.lif
    with torch.no_grad():
        lif.quantizer.step.fill_(0.25)
    current = torch.tensor([0.25, 0.5, 0.75]).view(3, 1, 1, 1)
    spikes: list[torch.Tensor] = []
    IntegerNetwork(network)._lif(lif, spikes, (current / GRID).long(), 1)
    assert spikes[0].flatten().tolist() == [False, True, True]
    assert torch.equal(lif(current, 1).bool(), spikes[0])


@pytest.mark.parametrize(
    ("neuron", "reason"),
    [
        (Neuron(leak=0.3), "a leak of 0.3 is no shift: in integers only 0, 1 and powers of two"),
        (Neuron(leak=2**-7), "down to 1/64 are exact"),
        (Neuron(threshold=0.3, reset="soft"), "a threshold such as 0.296875 is exact"),
    ],
)
def test_another_neuron_is_refused_in_integers(neuron, reason):
    with pytest.raises(ValueError, match=reason):
        IntegerNetwork(QuanMSResNet(18, 5, T, 2, 4, bits=4, neuron=neuron))


def spikes_in_integers_too(
    network: QuanMSResNet, x: torch.Tensor, device: torch.device
) -> list[torch.Tensor]:
    """The network's spikes, after they are those of the integer network."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, BatchNorm):
            torch.nn.init.normal_(module.bias, std=0.1)
    x = x.float().to(device)
    network.to(device)
    estimate_statistics(network, [x], (T,))
    network.eval()
    spikes = []
    for module in network.modules():
        if isinstance(module, LIF):
            module.register_forward_hook(lambda m, x, s: spikes.append(s.bool()))
    logits = network(x)
    integer_logits, integer_spikes = IntegerNetwork(network)(x)
    assert len(spikes) == len(integer_spikes) == 17
    for ours, theirs in zip(spikes, integer_spikes, strict=True):
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(logits.double(), integer_logits, rtol=1e-5, atol=1e-5)
    return spikes


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_reported_accumulators_hold_the_worst_case_of_the_integer_network(bits):
    torch.manual_seed(0)
    network = QuanMSResNet(18, 5, T, 2, 8, bits=bits, bn_bits=6).eval()
    network.input_shape = (T, 2, 16, 16)
    report = describe(network)
    for layer in report.layers:
        assert layer.bn_bits == (None if layer.linear else 6)
        conv = network.get_submodule(layer.name)
        codes = conv.quantizer.codes(conv.weight)[0].double()
        worst = torch.full_like(codes, conv.quantizer.high).flatten(1).sum(dim=1).max()
        largest_input = 2 ** report.input_bits(layer) - 1
        if "shortcut" in layer.name:
            largest_input = 2 ** (bits - 1)  # two's complement of the stream's codes
        width = report.accumulator_bits(layer)
        assert worst * largest_input <= 2 ** (width - 1) - 1, layer.name
        assert worst * largest_input > 2 ** (width - 3), (
            layer.name
        )  # and not much wider than needed


def test_a_network_without_data_loads_no_compiler():
    """It takes a second, in every command that reads a checkpoint."""
    code = (
        "import sys, torch; from models import QuanMSResNet; torch.set_default_device('meta'); "
        "QuanMSResNet(18, 5, 3, bits=4); assert 'torch._dynamo' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True)
    assert (result.returncode, result.stderr) == (0, b"")


def test_a_student_that_starts_from_its_teacher_evaluates_like_it():
    torch.manual_seed(0)
    teacher = MSResNet(18, 5, T, 2, 8)
    x = images(16, 2, 16, 16).float()
    for _ in range(30):
        teacher(x)
    student = QuanMSResNet(18, 5, T, 2, 8, bits=8, bn_bits=16)
    student.start_from(teacher.eval())
    _, u_teacher = teacher(x, membranes=True)
    _, u_student = student.eval()(x, membranes=True)
    # The first layer reads the 8-bit stem, so it differs by rounding, and by its smallest code -2θ.
    differing = ((u_teacher[0] > 0.5) != (u_student[0] > 0.5)).float().mean()
    assert differing < 0.03
    # One integer of a batch norm's input stands for a weight step times an input step.
    theirs = dict(teacher.named_modules())
    for name, module in student.named_modules():
        if not isinstance(module, BatchNorm):
            continue
        conv = student.get_submodule(name.replace("bn", "conv"))
        one = conv.quantizer.used_step().flatten()
        if name == "stem.bn":
            one = one / 255
        if "shortcut" in name:
            one = one * student.get_submodule(name.replace("bn", "stream")).used_step()
        torch.testing.assert_close(module.running_mean * one, theirs[name].running_mean)
        torch.testing.assert_close(module.running_var * one**2, theirs[name].running_var)


def test_a_quantized_batch_norm_rounds_alike_in_training_and_evaluation(device):
    torch.manual_seed(0)
    bn = BatchNorm(6, 0.5, BatchNormQuantizer(8)).double()
    with torch.no_grad():
        bn.weight.uniform_(0.2, 1.5), bn.bias.uniform_(-1, 1)
    x = torch.round(torch.randn(8, 6, 5, 5, dtype=torch.float64) * 30 + 10).to(device)
    bn.to(device)
    trained = bn(x)
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    bn.running_mean.copy_(mean), bn.running_var.copy_(var)
    torch.testing.assert_close(bn.eval()(x), trained, rtol=1e-9, atol=1e-9)
    scale, shift = bn.fold(mean, var)
    by_hand = x * scale[:, None, None] + shift[:, None, None]
    assert torch.equal(trained, torch.round(by_hand / GRID) * GRID)


@pytest.mark.parametrize("shape", [(256, 16, 32, 32), (7, 3, 45, 60), (1, 4, 1, 2), (5, 2, 16, 16)])
@pytest.mark.parametrize("repeats", [1, 4])
def test_float32_batch_norm_has_the_statistics_of_float64(shape, repeats):
    torch.manual_seed(0)
    x = (2 * torch.randn(shape) + 1).to(memory_format=torch.channels_last).requires_grad_()
    bn = BatchNorm(shape[1], 0.5)
    y = bn(x, repeats)
    exact, upstream = x.detach().double().requires_grad_(), torch.randn_like(x)
    var, mean = torch.var_mean(exact, (0, 2, 3), correction=0)
    count = exact[:, 0].numel() * repeats
    unbiased = 0.9 + 0.1 * var * count / (count - 1)
    torch.testing.assert_close(bn.running_var.double(), unbiased, rtol=1e-6, atol=0)
    torch.testing.assert_close(bn.running_mean.double(), 0.1 * mean, rtol=0, atol=1e-7)
    expected = 0.5 * F.batch_norm(exact, None, None, training=True)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    y.backward(upstream), expected.backward(upstream.double())
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)


def test_a_batch_norm_refuses_to_train_on_a_single_value():
    for quantizer in (None, BatchNormQuantizer(8)):
        bn = BatchNorm(3, 0.5, quantizer)
        with pytest.raises(ValueError, match="single value"):
            bn(torch.ones(1, 3, 1, 1))
        assert bn.eval()(torch.ones(1, 3, 1, 1)).isfinite().all()
        assert all(x.isfinite().all() for x in bn.state_dict().values())


@pytest.mark.parametrize("network", [MSResNet, partial(QuanMSResNet, bits=4)])
def test_narrow_networks_train_on_large_planes(network):
    # oneDNN's weight gradient of a strided 1×1 convolution crashes on these
    network = network(18, 5, T, 2, 2)
    network(images(4, 2, 48, 48).float()).sum().backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())


def test_under_autocast_a_quantized_network_still_adds_integers(device):
    torch.manual_seed(0)
    network = QuanMSResNet(18, 5, T, 2, 4, bits=4).eval().to(device)
    x = images(3, 2, 16, 16).float().to(device)
    with torch.autocast(device.type, torch.bfloat16):
        logits = network(x)
    assert torch.equal(logits, network(x))


def test_batch_norms_start_as_designed():
    network = small()
    for name, module in network.named_modules():
        if isinstance(module, BatchNorm):
            start = 0.1 if name.endswith("bn2") else 0.5
            assert module.weight.tolist() == pytest.approx([start] * len(module.weight)), name
            assert (module.bias == 0).all()


def test_sizes_of_the_published_networks():
    def parameters(depth):
        return sum(p.numel() for p in MSResNet(depth, 100, 4).parameters())

    # ResNet-18 and -34 of CIFAR size: 11.2 and 21.3 million
    assert parameters(18) == pytest.approx(11.22e6, rel=0.01)
    assert parameters(34) == pytest.approx(21.33e6, rel=0.01)


@pytest.mark.parametrize(
    "build",
    [
        lambda: MSResNet(50, 10, 4),
        lambda: QuanMSResNet(18, 10, 4, bits=1),
        lambda: QuanMSResNet(18, 10, 4, bits=9),
        lambda: QuanMSResNet(18, 10, 4, bits=4, bn_bits=1),
        lambda: small()(images(3, T + 1, 2, 8, 8)),
    ],
)
def test_a_network_that_cannot_be_is_a_value_error(build):
    with pytest.raises(ValueError, match=r"must be|expected"):
        build()


@pytest.mark.parametrize("depth", [18, 34])
def test_a_folded_network_is_the_evaluated_one(depth, device):
    network, x = small(depth).to(device), images(3, T, 2, 8, 8).to(device)
    for module in network.modules():
        if isinstance(module, BatchNorm):
            torch.nn.init.uniform_(module.weight, 0.2, 1.0)
            torch.nn.init.normal_(module.bias, std=0.2)
    estimate_statistics(network, [x], (T,))
    fast = folded(network.eval())
    logits, membranes = network(x, membranes=True)
    fast_logits, fast_membranes = fast(x, membranes=True)
    torch.testing.assert_close(logits, fast_logits, rtol=1e-9, atol=1e-12)
    for u, other in zip(membranes, fast_membranes, strict=True):
        torch.testing.assert_close(u, other, rtol=1e-9, atol=1e-12)
    assert not any(p.requires_grad for p in fast.parameters())
    assert not any(isinstance(module, BatchNorm) for module in fast.modules())
    assert all(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("stride", [1, 2])
def test_spikes_convolved_in_integers_are_the_floats_to_the_last_bit(bits, stride):
    torch.manual_seed(0)
    conv = QuanConv2d(6, 5, 3, stride, bits=bits, of_spikes=True)
    spikes = (torch.rand(2, 6, 8, 8) < 0.3).float().to(memory_format=torch.channels_last)
    found = []
    for dtype in (torch.float32, torch.float64):  # only of float32 in integers
        x = spikes.to(dtype, copy=True).requires_grad_()
        conv = conv.to(dtype=dtype, memory_format=torch.channels_last)
        conv.zero_grad()
        y = conv(x)
        (y.square().sum() / y.numel()).backward()
        found.append((y, x.grad, conv.weight.grad, conv.quantizer.step.grad))
    assert torch.equal(found[0][0], found[1][0].float())
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("amp", [False, True])
def test_gradients_keep_the_layout_of_the_activations(amp, device):
    # Where one does not, every layer before it copies its tensors from one layout to the other.
    network, layouts = MSResNet(18, 5, T, in_channels=2, width=4).to(device), []

    def watch(module, inputs, y):
        y.register_hook(
            lambda g: layouts.append(g.is_contiguous(memory_format=torch.channels_last))
        )

    for module in network.modules():
        if isinstance(module, Conv2d | BatchNorm):
            module.register_forward_hook(watch)
    with torch.autocast(device.type, torch.bfloat16, enabled=amp):
        logits = network(torch.rand(2, 2, 16, 16, device=device))
    logits.square().sum().backward()
    assert len(layouts) == 40
    assert all(layouts)
