"""The spiking VGG against a naive one, SpikeSim's own figures of it, and integers."""

import json
from pathlib import Path

import pytest
import torch

import reference
from models import NETWORKS, VGG
from models.batch_norm import BatchNorm, estimate_statistics
from models.graph import graph_of, outputs
from models.integer_network import IntegerNetwork
from models.layers import FULL_PRECISION
from models.network import folded
from models.quantized_layers import quantized_layers
from spikesim_eval.chip import Chip
from spikesim_eval.nonideal import on_crossbars
from spikesim_eval.trace import describe

GOLDEN = Path(__file__).parent / "data/spikesim_golden.json"
T = 3


def small(depth: int, bits: int | None, size: int = 18, channels: int = 2) -> VGG:
    """18 pixels: two of the poolings see an odd side."""
    torch.manual_seed(0)
    layers = FULL_PRECISION if bits is None else quantized_layers(bits)
    network = VGG(depth, 5, T, channels, 3, layers, (size, size))
    for module in network.modules():
        if isinstance(module, BatchNorm):
            torch.nn.init.normal_(module.bias, std=0.1)
    return network


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize(("depth", "bits"), [(9, None), (9, 2), (9, 4), (16, None), (16, 8)])
def test_it_equals_the_naive_one_in_values_and_gradients(depth, bits, static):
    network = small(depth, bits).double()
    x = torch.rand(3, *(() if static else (T,)), 2, 18, 18, dtype=torch.float64)
    steps = [x] * T if static else list(x.unbind(dim=1))
    weights = {name: p.detach().clone().requires_grad_() for name, p in network.named_parameters()}
    layers = reference.FullPrecision(weights, T)
    if bits is not None:
        layers = reference.Quantized(weights, T, bits, 8)
    found, expected = network(x, membranes=True), reference.vgg(layers, depth, steps)
    for (logits, membranes), (naive, naive_membranes) in ((found, expected),):
        torch.testing.assert_close(logits, naive, rtol=1e-7, atol=1e-9)
        for u, naive_u in zip(membranes, naive_membranes, strict=True):
            torch.testing.assert_close(u, naive_u, rtol=1e-7, atol=1e-9)
    for logits, membranes in (found, expected):
        (logits.square().sum() + sum(u.square().mean() for u in membranes)).backward()
    for name, parameter in network.named_parameters():
        grad, naive = parameter.grad, weights[name].grad
        torch.testing.assert_close(grad, naive, rtol=1e-7, atol=1e-10, msg=f"gradient of {name}")


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("depth", [9, 16])
@pytest.mark.parametrize("static", [True, False])
def test_integers_and_ideal_crossbars_fire_every_spike(depth, bits, static, device):
    network = small(depth, bits)
    network.input_shape = (2, 18, 18) if static else (T, 2, 18, 18)
    x = torch.rand(8, *network.input_shape).to(device)
    network.to(device)
    estimate_statistics(network, [x], (T,))
    logits, membranes = network.eval()(x, membranes=True)
    in_integers, spikes = IntegerNetwork(network)(x)
    assert len(spikes) == (8 if depth == 9 else 15)
    for u, s in zip(membranes, spikes, strict=True):
        assert torch.equal((u > 0.5).flatten(0, 1), s)
        assert 0.01 < s.float().mean() < 0.8
    torch.testing.assert_close(logits.double(), in_integers, rtol=1e-5, atol=1e-5)
    if depth == 9 and device.type == "cpu":
        chip = Chip(xbar_size=16, adc_bits=None)
        placed, _ = on_crossbars(network, describe(network), chip, seed=0)
        on_chip, membranes_there = placed(x, membranes=True)
        assert all(map(torch.equal, membranes, membranes_there))
        torch.testing.assert_close(on_chip, logits)


def test_vgg_9_has_the_layers_that_the_published_tool_prices():
    case = json.loads(GOLDEN.read_text())["cases"][0]["inputs"]
    name, make = NETWORKS["vgg9"]
    with torch.device("meta"):
        network = make(10, case["time_steps"])
    network.input_shape = 3, 32, 32
    described = describe(network)
    *convolutions, hidden, classifier = described.layers
    assert name == "VGG-9"
    assert [layer.in_channels for layer in convolutions] == case["in_ch"]
    assert [layer.out_channels for layer in convolutions] == case["out_ch"]
    assert [layer.in_size for layer in convolutions] == [(x, x) for x in case["in_dim"]]
    # The tool knows a layer's plane behind the pooling alone; ours has the convolution's own.
    pooled = [layer.in_size for layer in (*convolutions[1:], hidden)]
    assert pooled == [(x, x) for x in case["out_dim"]]
    assert all(layer.out_size == layer.in_size for layer in convolutions)
    assert hidden.in_channels * hidden.kernel**2 == 4096  # its code's first linear layer
    assert hidden.out_channels == classifier.in_channels == 1024
    assert [layer.input_bits for layer in described.layers] == [8, *[1] * 7, None]
    assert all(layer.lif for layer in described.layers[:-1])
    assert described.lif[0] == (64, 32, 32)
    assert described.streams == ()


def test_vgg_16_has_the_published_sizes():
    with torch.device("meta"):
        network = VGG(16, 10, 4)
    weights = [p for name, p in network.named_parameters() if name.endswith("weight")]
    weights = [p for p in weights if p.dim() > 1]
    assert len(weights) == 16
    # Configuration D's 14,710,464 of the convolutions; of a plane of one pixel 4,096 read 512.
    assert sum(p.numel() for p in weights[:13]) == 14_710_464
    assert [tuple(p.shape[:2]) for p in weights[13:]] == [(4096, 512), (4096, 4096), (10, 4096)]


@pytest.mark.parametrize("depth", [9, 16])
def test_a_folded_one_is_the_evaluated_one(depth):
    network, x = small(depth, None).double(), torch.rand(4, 2, 18, 18, dtype=torch.float64)
    estimate_statistics(network, [x], (T,))
    fast = folded(network.eval())
    torch.testing.assert_close(fast(x), network(x), rtol=1e-9, atol=1e-12)
    assert not any(isinstance(module, BatchNorm) for module in fast.modules())
    same = [(node.kind, node.shape) for node in graph_of(network) if node.kind != "batch_norm"]
    assert [(node.kind, node.shape) for node in graph_of(fast)] == same


@pytest.mark.parametrize("size", range(1, 12))
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(2, 2, 0), (3, 2, 1), (3, 1, 1)])
@pytest.mark.parametrize("ceil", [True, False])
def test_sizes_behind_a_pooling_are_torchs(size, kernel, stride, padding, ceil):
    if size + 2 * padding < kernel:
        return
    pool = torch.nn.MaxPool2d(kernel, stride, padding, ceil_mode=ceil)
    assert (
        outputs(size, kernel, stride, padding, ceil) == pool(torch.zeros(1, 1, size, size)).shape[2]
    )


def test_other_depths_and_images_that_are_not_square_are_refused():
    for how, said in (((11, 10, 4), "depth must be"), ((9, 10, 4, 3, 8), "must be square")):
        with pytest.raises(ValueError, match=said):
            VGG(*how, image_size=(16, 8))
