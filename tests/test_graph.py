"""Any network that `graph_of` lets through is the same in integers, folded and on crossbars."""

import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from models import MSResNet, SpikingNetwork
from models.batch_norm import BatchNorm, estimate_statistics
from models.graph import graph_of
from models.integer_network import IntegerNetwork
from models.layers import FULL_PRECISION
from models.network import folded
from models.neuron import LIF
from models.quantized_layers import quantized_layers
from spikesim_eval.chip import Chip
from spikesim_eval.nonideal import on_crossbars
from spikesim_eval.trace import describe

T, SIZE = 2, 7


class Random(SpikingNetwork):
    """Layers drawn from the seed; each a (what, name, numbers of the values that it reads)."""

    seed = 0

    def build(self, channels, image_size, layers):
        draw = random.Random(self.seed)
        self.program, self.units = [], nn.ModuleDict()
        real, spikes, shapes = [0], [], [(channels, SIZE)]  # numbers of values

        def add(what: str, reads: tuple, shape: tuple, *units: nn.Module) -> int:
            name = f"unit{len(self.program)}"
            self.units[name] = nn.ModuleList(units)
            self.program.append((what, name, reads))
            shapes.append(shape)
            return len(shapes) - 1

        for what in draw.choices(("lif", "conv", "pool", "stream", "add"), k=draw.randint(3, 12)):
            if what == "lif":
                number = draw.choice(real)
                spikes.append(add("lif", (number,), shapes[number], layers.lif()))
            elif what == "pool" and spikes:
                number = draw.choice(spikes)
                side = -(-shapes[number][1] // 2)
                pool = nn.MaxPool2d(2, ceil_mode=True)
                spikes.append(add("pool", (number,), (shapes[number][0], side), pool))
            elif what == "add":
                first = draw.choice(real)
                fitting = [x for x in real if shapes[x] == shapes[first]]
                real.append(add("add", (first, draw.choice(fitting)), shapes[first]))
            elif what == "stream" or spikes:
                number = draw.choice(real if what == "stream" else spikes)
                (reads, side), writes = shapes[number], draw.choice((3, 4))
                kernel, stride = draw.choice(((1, 1), (1, 2), (3, 1), (3, 2)))
                make = layers.stream_conv if what == "stream" else layers.conv
                conv = make(reads, writes, kernel, stride)
                bn = layers.batch_norm(writes, layers.threshold)
                first = (layers.stream(),) if what == "stream" else ()
                shape = writes, -(-side // stride)
                real.append(add("conv", (number,), shape, *first, conv, bn))
        add("lif", (real[-1],), shapes[real[-1]], layers.lif())
        return shapes[-1][0]

    def spikes(self, x, time_window, watch):
        values = [x]
        for what, name, reads in self.program:
            found, *others = (values[number] for number in reads)
            for unit in self.units[name]:
                found = unit(found, time_window, watch) if what == "lif" else unit(found)
            values.append(found + others[0] if what == "add" else found)
        return values[-1]


def network_of(seed: int, bits: int | None) -> Random:
    layers = FULL_PRECISION if bits is None else quantized_layers(bits)
    kind = type("Drawn", (Random,), {"seed": seed})
    torch.manual_seed(seed)
    network = kind(5, T, 2, 3, layers, (SIZE, SIZE))
    for module in network.modules():
        if isinstance(module, BatchNorm):
            nn.init.normal_(module.bias, std=0.1)
    return network


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**20), st.sampled_from([2, 3, 4, 8]), st.booleans())
def test_whatever_it_lets_through_is_the_same_in_integers(seed, bits, static):
    network = network_of(seed, bits)
    network.input_shape = (2, SIZE, SIZE) if static else (T, 2, SIZE, SIZE)
    images = torch.rand(4, *network.input_shape)
    estimate_statistics(network, [images], (T,))
    logits, membranes = network.eval()(images, membranes=True)
    in_integers, spikes = IntegerNetwork(network)(images)
    for u, s in zip(membranes, spikes, strict=True):
        assert torch.equal((u > 0.5).flatten(0, 1), s)
    torch.testing.assert_close(logits.double(), in_integers, rtol=1e-5, atol=1e-5)
    graph = graph_of(network)
    assert [node.shape for node in graph if node.kind == "lif"] == [
        tuple(u.shape[2:]) for u in membranes
    ]
    if any(node.kind == "conv" and graph[node.reads[0]].kind in ("lif", "pool") for node in graph):
        description = describe(network)
        placed, _ = on_crossbars(network, description, Chip(xbar_size=16, adc_bits=None), seed=0)
        _, there = placed(images, membranes=True)
        assert all(map(torch.equal, membranes, there))


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**20))
def test_whatever_it_lets_through_can_be_folded_and_quantized(seed):
    network = network_of(seed, None).double()
    images = torch.rand(4, 2, SIZE, SIZE, dtype=torch.float64)
    network.input_shape = 2, SIZE, SIZE
    estimate_statistics(network, [images], (T,))
    network.eval()
    torch.testing.assert_close(folded(network)(images), network(images), rtol=1e-9, atol=1e-12)
    student = network_of(seed, 8)
    student.start_from(network.float())
    student.input_shape = network.input_shape
    kinds = [(node.kind, node.shape) for node in graph_of(student) if node.kind != "codes"]
    assert kinds == [(node.kind, node.shape) for node in graph_of(network)]
    assert list(student.neurons()) == list(network.neurons())


def test_reading_a_graph_leaves_the_network_and_its_hooks_alone():
    network, seen = MSResNet(18, 5, T, 2, 4).eval(), []
    for module in network.modules():
        if isinstance(module, LIF):
            module.register_forward_hook(lambda *_: seen.append(1))
    before = {name: dict(vars(module)) for name, module in network.named_modules()}
    random_state = torch.get_rng_state()
    graph = graph_of(network)
    assert not seen
    assert {name: dict(vars(module)) for name, module in network.named_modules()} == before
    assert torch.equal(torch.get_rng_state(), random_state)
    assert len(graph) == 1 + 2 * 20 + 17 + 8 + 1 + 3  # image, conv + bn, LIF, +, repeat, streams
    assert network(torch.rand(1, 2, 8, 8)).shape == (1, 5)
    assert len(seen) == 17


def test_a_network_is_itself_again_also_where_its_graph_is_refused():
    network = MSResNet(18, 5, T, 2, 4).eval()
    images = torch.rand(2, 2, 8, 8)
    expected, conv = network(images), network.blocks[3].conv1
    network.blocks[3].conv1 = nn.Conv2d(8, 8, 3, padding=1)
    with pytest.raises(ValueError, match="calls conv2d"):
        graph_of(network)
    network.blocks[3].conv1 = conv
    assert torch.equal(network(images), expected)


class InPlace(SpikingNetwork):
    """A sum that is taken in place is what all names of the tensor stand for."""

    def build(self, channels, image_size, layers):
        self.lif, self.last = layers.lif(), layers.lif()
        self.conv = layers.conv(channels, channels, 3)
        self.bn = layers.batch_norm(channels, layers.threshold)
        return channels

    def spikes(self, x, time_window, watch):
        total = x.clone()
        same = total
        total += self.bn(self.conv(self.lif(x, time_window, watch)))
        return self.last(same, time_window, watch)


def test_what_is_added_in_place_is_seen_by_all_names_of_it():
    graph = graph_of(InPlace(3, T, in_channels=1, width=2))
    assert [node.kind for node in graph][-2:] == ["add", "lif"]
    assert graph[graph[-1].reads[0]].kind == "add"
