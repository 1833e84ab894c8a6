"""Layer lists of torch modules: what each layer really reads, or one line on what is not known.

The right values are measured here with plain hooks, or worked out by hand.
"""

from collections import namedtuple
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from spikingjelly.activation_based import functional, layer, neuron
from spikingjelly.activation_based.model import sew_resnet, spiking_resnet, spiking_vgg
from torch import nn
from torch.nn.utils import parametrizations

from conftest import refused
from models import MSResNet
from runtime.errors import UserError
from spikesim_eval.__main__ import main
from spikesim_eval.chip import Chip
from spikesim_eval.codes import Levels, common_step
from spikesim_eval.estimate import estimate
from spikesim_eval.module import dynamics, trace_network
from spikesim_eval.trace import counting_rows, describe

T, N = 4, 2


def images(T=T, N=N, C=3, side=8):
    return torch.rand(T, N, C, side, side, generator=torch.Generator().manual_seed(3))


def lif(**options):
    return neuron.LIFNode(**{"tau": 2.0, "v_threshold": 0.3} | options)


def multi_step(net):
    functional.set_step_mode(net, "m")
    return net


def trace(net, x=None, time_steps=T, bits=6):
    x = images() if x is None else x
    return trace_network(net, x, bits, time_steps)


def layers_of(net, x=None, time_steps=T, bits=6):
    return {found.name: found for found in trace(net, x, time_steps, bits).layers}


@torch.no_grad()
def inputs(net, x):
    """All that each layer reads, by name."""
    read = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: read.setdefault(name, []).append(args[0].flatten())
        )
        for name, module in net.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    functional.reset_net(net)
    net.eval()(x)
    functional.reset_net(net)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in read.items()}


def share(x):
    return (x != 0).double().mean().item()


class Between(nn.Module):
    """conv1, LIF, `between`, conv2, LIF, head."""

    def __init__(self, between=lambda s: s, channels=8, node=lif, conv2=None):
        super().__init__()
        torch.manual_seed(1)
        self.between = between
        self.conv1, self.lif1 = layer.Conv2d(3, 8, 3, padding=1), node()
        self.conv2 = conv2 or layer.Conv2d(channels, 8, 3, padding=1)
        self.lif2, self.head = lif(), nn.Linear(8, 10)
        multi_step(self)

    def forward(self, x):
        spikes = self.lif2(self.conv2(self.between(self.lif1(self.conv1(x)))))
        return self.head(spikes.mean((3, 4))).mean(0)


# Rates and widths are those of what a layer reads.


def test_behind_max_pooling_more_ones_are_read_than_fired():
    net = nn.Sequential(
        layer.Conv2d(1, 1, 1, bias=False), neuron.IFNode(v_threshold=0.5), layer.MaxPool2d(2)
    )
    net.extend([layer.Conv2d(1, 1, 1), neuron.IFNode()])
    net[0].weight.data.fill_(1)
    x = torch.zeros(1, 1, 1, 4, 4)
    x[..., ::2, ::2] = 1  # one of four pixels: every 2×2 pixels have one
    found = layers_of(multi_step(net), x, time_steps=1)
    assert (found["0"].spike_rate, found["3"].spike_rate) == (0.25, 1.0)
    assert found["3"].input_bits == 1


def hidden_half(s):
    mask = torch.ones_like(s)
    mask[..., ::2] = 0
    return s * mask


@pytest.mark.parametrize(
    ("between", "channels"),
    [
        (lambda s: s, 8),
        (lambda s: 1 - s, 8),
        (hidden_half, 8),
        (lambda s: F.dropout(s, 0.5, training=False), 8),
        (lambda s: F.max_pool2d(s.flatten(0, 1), 3, 1, 1).view_as(s), 8),
        (lambda s: F.interpolate(s.flatten(0, 1), scale_factor=2).unflatten(0, s.shape[:2]), 8),
        (lambda s: torch.cat([s, 1 - s], 2), 16),
        (lambda s: s.clone().sub_(1).neg_(), 8),
        (lambda s: 0.7 * s, 8),
        (lambda s: s.roll(1, -1).contiguous(), 8),
    ],
)
def test_one_bit_inputs_have_the_share_of_ones_that_the_layer_reads(between, channels):
    net = Between(between, channels)
    read, found = inputs(net, images())["conv2"], layers_of(net)["conv2"]
    assert found.input_bits == 1
    assert found.spike_rate == pytest.approx(share(read), abs=1e-12)
    assert 0 < found.spike_rate < 1
    assert found.after == ("conv1",)


def ones(codes, bits):
    """Share of ones in two's complement, code by code."""
    codes = [int(code) % 2**bits for code in codes]
    return sum(f"{code:b}".count("1") for code in codes) / (bits * len(codes))


@pytest.mark.parametrize(
    ("between", "step", "bits"),
    [
        (lambda s: torch.stack([s, s]).sum(0), 1, 2),  # 0 or 2
        (lambda s: s + s.roll(1, 0), 1, 2),
        (lambda s: s - s.roll(1, 0), 1, 2),  # -1, 0 or 1
        (lambda s: s.cumsum(0), 1, 3),  # up to 4
        (lambda s: F.avg_pool2d(s.flatten(0, 1), 2).unflatten(0, s.shape[:2]), 1 / 4, 3),
        (lambda s: F.avg_pool2d(s.flatten(0, 1), 3, 1).unflatten(0, s.shape[:2]), 1 / 9, 4),
        (lambda s: 1 - F.avg_pool2d(s.flatten(0, 1), 2).unflatten(0, s.shape[:2]), 1 / 4, 3),
        (lambda s: 0.3 * (s + s.flip(-1)), 0.3, 2),
    ],
)
def test_counts_of_spikes_have_the_bits_of_the_largest_and_their_own_share_of_ones(
    between, step, bits
):
    net = Between(between)
    read, found = inputs(net, images())["conv2"], layers_of(net)["conv2"]
    assert found.input_bits == bits
    assert found.spike_rate == pytest.approx(ones((read / step).round(), bits), abs=1e-12)


def test_what_two_neurons_could_add_up_to_counts_and_not_what_the_sample_shows():
    def never_together(s):
        other = torch.zeros_like(s)
        other[..., 1:] = s[..., :-1]
        return s * (other == 0) + other

    class Both(Between):
        def forward(self, x):
            a = self.lif1(self.conv1(x))
            b = self.lif1b(-self.conv1(x))  # fires only where the first does not
            return self.head(self.lif2(self.conv2(a + b)).mean((3, 4))).mean(0)

    net = Both()
    net.lif1b = multi_step(lif())
    read, found = inputs(net, images())["conv2"], layers_of(net)
    assert set(read.tolist()) == {0, 1}
    assert found["conv2"].input_bits == 2  # both could fire
    assert layers_of(Between(never_together))["conv2"].input_bits == 1


def test_an_integer_firing_neuron_gives_as_many_bits_as_it_can_fire():
    net = Between(node=lambda: neuron.ILIFNode(tau=2.0))
    net.conv1.weight.data *= 2
    read, found = inputs(net, images())["conv2"], layers_of(net)["conv2"]
    assert 1 < read.max() < 4
    assert found.input_bits == 3  # 0 to 4
    assert found.spike_rate == pytest.approx(ones(read, 3))


def test_real_values_have_the_width_of_the_image_or_of_the_membranes():
    net = Between(lambda s: s * torch.linspace(0.1, 1, 8).exp().view(8, 1, 1))
    found = layers_of(net)
    assert (found["conv1"].input_bits, found["conv1"].spike_rate) == (8, None)
    assert (found["conv2"].input_bits, found["conv2"].spike_rate) == (6, None)


def test_an_image_of_zeros_and_ones_is_read_bit_by_bit():
    x = (images() < 0.2).float()
    found = layers_of(Between(), x)["conv1"]
    assert found.input_bits == 1
    assert found.spike_rate == pytest.approx(share(x))
    assert layers_of(Between(), (5 * images()).round())["conv1"].input_bits == 8  # counts of events


def test_neurons_that_are_silent_on_the_sample_still_have_widths():
    net = Between(lambda s: F.avg_pool2d(s.flatten(0, 1), 2).unflatten(0, s.shape[:2]))
    net.lif1.v_threshold = 1e3
    found = layers_of(net)["conv2"]
    assert (found.input_bits, found.spike_rate) == (3, 0)


# spikingjelly's own networks.


def vgg():
    features = spiking_vgg.SpikingVGG.make_layers(
        [8, "M", 16, 16, "M"], batch_norm=True, neuron=neuron.LIFNode, v_threshold=0.3
    )
    return nn.Sequential(
        features, layer.Flatten(), layer.Linear(16 * 4, 32), lif(), layer.Linear(32, 5)
    )


NETWORKS = {
    "vgg": vgg,
    "sew": lambda: sew_resnet.sew_resnet18(
        cnf="ADD", spiking_neuron=neuron.IFNode, v_threshold=0.2
    ),
    "resnet": lambda: spiking_resnet.spiking_resnet18(
        spiking_neuron=neuron.IFNode, v_threshold=0.2
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_rates_of_spikingjellys_networks_are_what_plain_hooks_measure(name):
    torch.manual_seed(0)
    net = multi_step(NETWORKS[name]())
    x = images(T=2, N=1, side=8 if name == "vgg" else 32)
    read, traced = inputs(net, x), trace(net, x, time_steps=2)
    assert [found.name for found in traced.layers] == list(read)
    spiking = [
        found for found in traced.layers if found.after and set(read[found.name].tolist()) <= {0, 1}
    ]
    assert len(spiking) >= 3
    for found in spiking:
        one_bit = found.input_bits == 1
        assert one_bit or name == "sew"  # where sums of spikes are read
        if one_bit:
            assert found.spike_rate == pytest.approx(share(read[found.name]), abs=1e-12)
    for found in traced.layers:
        if found.after and name != "vgg" and found.name != "fc":
            assert read[found.name].max() < 2**found.input_bits
    assert sum(isinstance(m, neuron.BaseNode) for m in net.modules()) == len(traced.lif)
    unpaid = [found.name for found in traced.layers if not found.lif]
    assert len(traced.layers) - len(unpaid) == len(traced.lif)
    if name == "resnet":  # a shortcut that reads spikes does not pay for the addition
        assert unpaid == [*(f"layer{i}.0.downsample.0" for i in (2, 3, 4)), "fc"]
    assert estimate(traced, Chip()).total["energy_pj"] > 0


# How often a layer runs.


class Tokens(nn.Module):
    """Of (T, N, tokens, C), as transformers have them, or the same as 1×1 convolutions."""

    def __init__(self, convolutions=False):
        super().__init__()
        torch.manual_seed(1)
        self.convolutions = convolutions
        self.stem, self.lif0 = layer.Conv2d(3, 8, 2, stride=2), lif()
        make = (lambda i, o: layer.Conv2d(i, o, 1)) if convolutions else nn.Linear
        self.fc1, self.lif1 = make(8, 32), lif()
        self.fc2, self.lif2 = make(32, 8), lif()
        self.head = nn.Linear(8, 10)
        multi_step(self)

    def forward(self, x):
        x = self.lif0(self.stem(x))
        if not self.convolutions:
            x = x.flatten(3).transpose(2, 3)
        x = self.lif2(self.fc2(self.lif1(self.fc1(x))))
        return self.head(x.flatten(3).mean(3) if self.convolutions else x.mean(2)).mean(0)


def test_linear_layers_on_tokens_cost_what_1x1_convolutions_do():
    linear, convolutions = Tokens(), Tokens(convolutions=True)
    for ours, theirs in zip(linear.parameters(), convolutions.parameters(), strict=True):
        theirs.data = ours.data.view_as(theirs)
    rows = [
        {row["name"]: row for row in estimate(trace(net), Chip()).layers}
        for net in (linear, convolutions)
    ]
    assert list(rows[0]) == list(rows[1]) == ["stem", "fc1", "fc2", "head"]
    for name in rows[0]:
        for key in ("energy_pj", "cycles", "pes", "area_um2", "busy_ns", "spike_rate"):
            assert rows[0][name][key] == pytest.approx(rows[1][name][key], rel=1e-12)
    assert rows[0]["fc1"]["cycles"] == 16 * T


class Mirrored(nn.Module):
    """One stem on the image and on its mirror image, in one module or two of the same weight."""

    def __init__(self, modules):
        super().__init__()
        self.stem, self.lif0 = layer.Conv2d(3, 8, 3, padding=1), lif()
        self.again = self.stem if modules == 1 else layer.Conv2d(3, 8, 3, padding=1)
        self.again.weight = self.stem.weight
        self.head = nn.Linear(8, 10)
        multi_step(self)

    def forward(self, x):
        return self.head(self.lif0(self.stem(x) + self.again(x.flip(-1))).mean((3, 4))).mean(0)


def test_a_layer_that_runs_twice_is_charged_twice():
    class Shared(Between):  # one module in two places, side by side
        def forward(self, x):
            a = self.lif1(self.conv1(x))
            sums = self.conv2(a) + self.conv2(1 - a)
            return self.head(self.lif2(sums).mean((3, 4))).mean(0)

    net = Shared()
    found = layers_of(net)["conv2"]
    assert (found.runs, found.spike_rate) == (
        2,
        pytest.approx(share(inputs(net, images())["conv2"])),
    )


@pytest.mark.parametrize("modules", [1, 2])
def test_a_weight_that_is_used_twice_is_one_layer_that_runs_twice(modules):
    runs = {name: found.runs for name, found in layers_of(Mirrored(modules)).items()}
    assert runs == {"stem": 2, "head": 1}


class View(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.shape = shape

    def forward(self, x):
        return x.view(-1, *self.shape)


class InALoop(Between):
    """The same as multi-step, one timestep after the other."""

    def forward(self, x):
        functional.set_step_mode(self, "s")
        steps = [self.lif2(self.conv2(self.lif1(self.conv1(frame)))) for frame in x]
        return self.head(torch.stack(steps).mean((0, 3, 4)))


def test_a_loop_over_time_is_described_as_many_steps_at_once_are():
    class AtOnce(Between):
        def forward(self, x):
            return self.head(self.lif2(self.conv2(self.lif1(self.conv1(x)))).mean((0, 3, 4)))

    loop, at_once = trace(InALoop()), trace(AtOnce())
    assert loop == at_once
    assert [found.lif for found in loop.layers] == [True, True, False]
    head = loop.layers[-1]
    assert (head.linear, head.in_size, loop.input_bits(head)) == (True, (8, 8), 9)  # 0 to 4·8·8


def test_at_one_timestep_a_linear_layer_is_what_it_reads():
    net = nn.Sequential(layer.Flatten(), layer.Linear(192, 16), lif(), layer.Linear(16, 5), lif())
    found = layers_of(multi_step(net), images(T=1), time_steps=1)
    assert [(x.input_bits, x.linear) for x in found.values()] == [(8, False), (1, False)]
    head = layers_of(Between(), images(T=1), time_steps=1)["head"]
    assert (head.linear, head.in_size) == (True, (8, 8))  # averages over 8×8 spikes


def test_at_one_timestep_normalized_averages_are_real_numbers():
    net = Between()
    net.head = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 10))
    found = layers_of(net, images(T=1), time_steps=1)["head.1"]
    assert (found.linear, found.input_bits, found.spike_rate) == (False, 6, None)


def test_a_classifier_of_two_populations_reads_one_bit_more():
    class Two(Between):
        def forward(self, x):
            a = self.lif1(self.conv1(x))
            return self.head((a + self.lif2(self.conv2(a))).mean((0, 3, 4)))

    traced = trace(Two())
    head = traced.layers[-1]
    assert head.linear
    assert traced.input_bits(head) == 10  # 0 to 2·4·8·8


def test_what_runs_once_in_front_of_the_first_spikes_is_charged_at_every_timestep():
    class Repeated(Between):
        def forward(self, x):
            x = self.conv1(x[:1]).repeat(T, 1, 1, 1, 1)
            return self.head(self.lif2(self.conv2(self.lif1(x))).mean((0, 3, 4)))

    found = layers_of(Repeated())
    assert (found["conv1"].runs, found["conv1"].linear, found["head"].linear) == (1, False, True)


# Kinds of layers.


def test_grouped_depthwise_and_dilated_convolutions_are_described():
    for groups in (2, 8):
        conv2 = layer.Conv2d(8, 8, 3, padding=2, dilation=2, groups=groups)
        found = layers_of(Between(conv2=conv2))["conv2"]
        assert (found.groups, found.kernel, found.out_size) == (groups, 3, (8, 8))


def test_weights_that_are_computed_from_parameters_of_the_layer_are_the_layers():
    plain = layers_of(Between())
    for wrap in (
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        torch.nn.utils.weight_norm,
    ):
        net = Between()
        wrap(net.conv2)
        found = layers_of(net)
        assert list(found) == list(plain)
        assert found["conv2"] == plain["conv2"]


def test_lazy_layers_are_described_and_unused_parts_ignored():
    net = Between(conv2=nn.Sequential(layer.SeqToANNContainer(nn.LazyConv2d(8, 3, padding=1))))
    net.unused, net.table = nn.Linear(1000, 1000), nn.Parameter(torch.zeros(9, 9))
    net.never_made = nn.LazyLinear(7)
    found = layers_of(net)
    assert list(found) == ["conv1", "conv2.0.0", "head"]
    assert found["conv2.0.0"].in_channels == 8


class Added(nn.Module):
    """Computes `run` of the spikes of conv1's LIF, (T, N, tokens, 8), with parts of its own."""

    def __init__(self, run, **parts):
        super().__init__()
        torch.manual_seed(1)
        self.stem, self.lif0 = layer.Conv2d(3, 8, 2, stride=2), lif()
        self.lif1, self.head = lif(), nn.Linear(8, 10)
        self.run = run
        for name, part in parts.items():
            if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        multi_step(self)

    def forward(self, x):
        s = self.lif0(self.stem(x)).flatten(3).transpose(2, 3)
        return self.head(self.lif1(self.run(self, s)).mean(2)).mean(0)


def weight(*shape):
    return nn.Parameter(torch.rand(shape))


class LowRank(nn.Linear):
    """A linear layer with a second product beside its own."""

    def __init__(self):
        super().__init__(8, 8)
        self.down, self.up = weight(8, 2), weight(2, 8)

    def forward(self, x):
        return super().forward(x) + x @ self.down @ self.up


NOT_IN_A_LAYER = [
    (lambda m, s: s @ m.w, "w (8×8) used outside"),
    (lambda m, s: F.linear(s, m.w), "w (8×8)"),
    (lambda m, s: (s.double() @ m.w.t().double()).float(), "w (8×8)"),
    (lambda m, s: torch.einsum("tnlc,cd->tnld", s, m.w), "w (8×8)"),
    (lambda m, s: (s[..., None] * m.w).sum(-2), "w (8×8)"),
    (lambda m, s: F.conv1d(s.flatten(0, 1).mT, m.w[..., None]).mT.view_as(s), "w (8×8)"),
    (lambda m, s: F.embedding(s.sum(-1).long().clamp(max=7), m.w) + s, "w (8×8)"),
    (lambda m, s: s + F.linear(s, m.row), "row (1×8)"),
    (lambda m, s: F.linear(s, m.head.weight[:8]), "head.weight (10×8)"),
    (lambda m, s: s @ m.buffer, "outside of Conv2d and Linear"),
    (lambda m, s: (s @ s.mT) @ s, "multiplies two tensors that both depend on the sample"),
    (lambda m, s: m.fc(m.fc(s)), "layer fc runs in several places"),
    (lambda m, s: s + m.fc(s + m.fc(torch.zeros(8))), "layer fc runs in several places"),
    (lambda m, s: m.fc(torch.from_numpy(s.numpy() * 2)), "layer fc reads something that was not"),
    (lambda m, s: s + m.fc(torch.ones(8)), "layer fc reads something"),
    (
        lambda m, s: m.fc2((m.fc(s) > 0).float()),
        "fc2 reads spikes that were made",
    ),
    (lambda m, s: m.fc2((m.fc(s) > 0).float().mean(2, True)), "fc2 reads spikes that were made of"),
    (lambda m, s: m.fc2(m.fc(s).sign()), "fc2 reads spikes that were made of the sums of fc "),
    (lambda m, s: m.fc2(torch.where(m.fc(s) > 0, 1.0, -0.5)), "fc2 reads spikes that were made"),
    (lambda m, s: m.fc2(m.fc(s).mul(9).round().clamp(0, 4)), "fc2 reads spikes that were made"),
    (lambda m, s: m.fc2((m.fc(s) > 0) * torch.rand(8)), "fc2 reads spikes that were made of"),
    (lambda m, s: m.fc2(m.fc(s).mul(9).long().float()), "fc2 reads spikes that were made of"),
    (
        lambda m, s: s + (s[..., None, :, :] * s[..., None, :]).sum(-1).sum(-1, True),
        "multiplies two tensors",
    ),
    (lambda m, s: s + m.fc(s[0, 0, 0]), "layer fc ran on 1 images or tokens for 2 samples"),
    (lambda m, s: s + m.fc(s[-1, :, 0])[:, None], "layer fc runs once for all timesteps and reads"),
]


def on_channels(part, s):
    return part(s.flatten(0, 1).mT).mT.view_as(s)


def on_planes(part, s):
    return part(s.flatten(0, 1)[:, None])[:, 0].view_as(s)


def on_steps(part, s):
    return part(s.flatten(0, 1))[0].view_as(s)


def attends(part, s):
    return part(*[s.flatten(0, 1)] * 3, need_weights=False)[0].view_as(s)


def on_two_sizes(part, s):
    return on_planes(part, s) + part(s.flatten(0, 1)[:, None, ::2]).sum()


def on_some_steps(part, s):
    return torch.cat([on_channels(part, s[:3]), s[3:]])


PARTS = [
    (LowRank(), lambda part, s: part(s), "layer part computes 3 products"),
    (nn.MultiheadAttention(8, 2, batch_first=True), attends, "part.in_proj_weight (24×8)"),
    (
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        lambda part, s: part(s.flatten(0, 1)).view_as(s),
        "part.self_attn.in_proj_weight",
    ),
    (nn.LSTM(8, 8, batch_first=True), on_steps, "part.weight_ih_l0 (32×8)"),
    (nn.GRU(8, 8, batch_first=True), on_steps, "part.weight_ih_l0 (24×8)"),
    (nn.RNNCell(8, 8), lambda p, s: p(s.flatten(0, 2)).view_as(s), "part.weight_ih (8×8)"),
    (nn.Bilinear(8, 8, 8), lambda part, s: part(s, s), "part.weight (8×8×8)"),
    (nn.Conv2d(1, 1, (3, 1), padding=(1, 0)), on_planes, "layer part: its kernel is 3×1"),
    (nn.Conv1d(8, 8, 3, padding=1), on_channels, "layer part: its kernel is 3"),
    (nn.ConvTranspose1d(8, 8, 1), on_channels, "part.weight (8×8×1)"),
    (nn.Conv2d(1, 1, 3, padding=1), on_two_sizes, "layer part runs on inputs of different sizes"),
    (nn.Conv1d(8, 8, 1, groups=2), on_some_steps, "layer part does not run at every timestep"),
]


@pytest.mark.parametrize(
    ("part", "run", "words"),
    [
        *((None, run, words) for run, words in NOT_IN_A_LAYER),
        *((part, lambda m, s, run=run: run(m.part, s), words) for part, run, words in PARTS),
    ],
)
def test_what_the_estimate_would_miss_is_named(part, run, words):
    own = {"w": weight(8, 8), "row": weight(1, 8), "buffer": torch.rand(8, 8), "part": part}
    net = Added(run, fc=nn.Linear(8, 8), fc2=nn.Linear(8, 8), **own)
    with pytest.raises(UserError) as error:
        trace(net)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "run",
    [
        lambda m, s: m.fc2(m.fc(s) * (m.fc(s) > 0)),  # ReLU
        lambda m, s: s * (s.mean(2, True) * s.mean(3, True)),  # gates: no sum of products
        lambda m, s: (m.fc(s), m.fc(s).argmax(-1))[0],
    ],
)
def test_what_is_no_spike_and_no_product_is_not_refused(run):
    assert len(trace(Added(run, fc=nn.Linear(8, 8), fc2=nn.Linear(8, 8))).lif) == 2


def test_spikes_that_the_network_gives_are_seen_too():
    class Last(Between):
        def forward(self, x):
            mem, count = 0, 0
            for current in self.head(self.lif1(self.conv1(x)).mean((3, 4))):
                mem = 0.5 * mem + current
                spikes = (mem > 0.3).float()
                mem, count = mem - 0.3 * spikes, count + spikes
            return {"counts": count, "membrane": mem, "class": count.argmax(1)}

    with pytest.raises(UserError, match="the network gives spikes that were made of the sums of h"):
        trace(Last())


def test_a_layer_that_hides_from_hooks_is_missed_by_name():
    net = InALoop()
    net.conv2 = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(512, 512), View(8, 8, 8))
    assert len(trace(net).layers) == 4
    torch.ao.quantization.quantize_dynamic(net, {"conv2.2"}, inplace=True)
    with pytest.raises(UserError, match=r"module conv2.2 computes a product \(linear_dynamic\)"):
        trace(net)
    net = Between(conv2=layer.SeqToANNContainer(torch.jit.script(nn.Conv2d(8, 8, 1))))
    with pytest.raises(UserError, match=r"module conv2\.0 is TorchScript"):
        trace(net)


def test_a_compiled_network_is_described_as_it_is_without():
    names = [
        found.name.removeprefix("_orig_mod.") for found in trace(torch.compile(Between())).layers
    ]
    assert names == [found.name for found in trace(Between()).layers]


def test_numbers_that_are_not_finite_are_refused():
    x = images()
    x[0, 0, 0, 0, 0] = torch.nan
    with pytest.raises(UserError, match="layer conv1 reads values that are not finite"):
        trace(Between(), x)
    net = Between()
    net.conv1.bias.data[0] = torch.inf
    with pytest.raises(UserError, match="layer conv2 reads values that are not finite"):
        trace(Between(lambda s: s * torch.inf))


def test_an_encoders_noise_is_not_the_samples():
    class Encoder(nn.Module):
        def forward(self, x):
            return (torch.rand_like(x) < x).float()

    torch.manual_seed(0)
    x = torch.rand(T, N, 3, 8, 8)
    net = Between()
    net.conv1 = multi_step(nn.Sequential(Encoder(), net.conv1))
    assert layers_of(net, x)["conv1.1"].spike_rate == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(("step", "bits"), [(0.5, 8), (0.01, 8), (0.05, 6)])
def test_what_a_module_has_rounded_is_read_in_its_codes(step, bits):
    class Quantizer(nn.Module):
        def forward(self, x):
            return (x / x.abs().max() * (100 if bits == 8 else 20)).round() * step

    net = Between()
    net.between = multi_step(nn.Sequential(layer.Conv2d(8, 8, 1), Quantizer()))
    read = inputs(net, images())["conv2"]
    found = layers_of(net, bits=4)["conv2"]
    assert found.input_bits == bits
    assert found.spike_rate == pytest.approx(ones((read / step).round(), bits), abs=1e-12)


def test_a_message_of_many_pages_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "endless_net.py").write_text(
        "def net():\n    raise ValueError('many\\nlines ' * 999)"
    )
    monkeypatch.syspath_prepend(tmp_path)
    line = f"report --module endless_net:net --time_steps 2 --bits 4 --out {tmp_path}/out"
    assert len(refused(capsys, main, line.split())) < 400


# Spiking modules of other libraries.


def fire(mem, x):
    """(membrane, spikes) of a timestep."""
    mem = 0.5 * mem + x
    spikes = (mem > 0.3).float()
    return mem - 0.3 * spikes, spikes


class Stateful(nn.Module):
    """One timestep a call; its membrane is an attribute."""

    def __init__(self):
        super().__init__()
        self.mem = None

    def forward(self, x):
        self.mem, spikes = fire(0 if self.mem is None else self.mem, x)
        return spikes

    def reset_mem(self):
        self.mem = None


class Buffered(Stateful):
    """Writes into a buffer."""

    def __init__(self):
        super().__init__()
        del self.mem
        self.register_buffer("mem", torch.zeros(0))

    def forward(self, x):
        if self.mem.shape != x.shape:
            self.mem = torch.zeros_like(x)
        mem, spikes = fire(self.mem, x)
        self.mem.copy_(mem)
        return spikes

    def reset_mem(self):
        self.mem = torch.zeros(0)


State = namedtuple("State", "v i")


class Explicit(nn.Module):
    """Takes and gives its state."""

    def forward(self, x, state=None):
        v, spikes = fire(0 if state is None else state.v, x)
        return spikes, State(v, x)


class Surrogate(nn.Module):
    def forward(self, x):
        return (x > 0).float()


class Folded(nn.Module):
    """All timesteps in a call, (T·N, ...); nothing is left outside; a surrogate as a module."""

    def __init__(self):
        super().__init__()
        self.fire = Surrogate()

    def forward(self, x):
        mem, spikes = 0, []
        for current in x.view(T, -1, *x.shape[1:]):
            mem = 0.5 * mem + current
            spikes.append(self.fire(mem - 0.3))
            mem = mem - 0.3 * spikes[-1]
        return torch.cat(spikes)


class OfAnother(nn.Module):
    """conv1, spikingjelly's LIF, conv2, another library's neuron, head."""

    def __init__(self, node):
        super().__init__()
        torch.manual_seed(1)
        self.conv1, self.lif1 = nn.Conv2d(3, 8, 3, padding=1), lif()
        self.conv2, self.other, self.head = nn.Conv2d(8, 8, 3, padding=1), node, nn.Linear(8, 10)

    def forward(self, x):
        sums = torch.stack([self.conv2(self.lif1(self.conv1(frame))) for frame in x])
        if isinstance(self.other, Folded):
            spikes = self.other(sums.flatten(0, 1)).view_as(sums)
        elif isinstance(self.other, Explicit):
            spikes, state = [], None
            for current in sums:
                fired, state = self.other(current, state)
                spikes.append(fired)
            spikes = torch.stack(spikes)
        else:
            spikes = torch.stack([self.other(current) for current in sums])
        return self.head(spikes.mean((0, 3, 4)))


@pytest.mark.parametrize("node", [Stateful, Buffered, Explicit, Folded])
def test_membranes_of_other_libraries_are_counted(node):
    expected = trace(OfAnother(lif()))
    net = OfAnother(node())
    traced = trace(net)
    assert traced.lif == ((8, 8, 8), (8, 8, 8))
    assert [found.lif for found in traced.layers] == [True, True, False]
    for ours, theirs in zip(traced.layers, expected.layers, strict=True):
        assert ours.input_bits == theirs.input_bits
        assert (ours.after, ours.linear) == (theirs.after, theirs.linear)
        assert ours.in_size == theirs.in_size


def test_a_neuron_behind_a_pool_or_on_the_image_is_one_too():
    class Encoded(OfAnother):
        def forward(self, x):
            return super().forward(torch.stack([self.encoder(frame) for frame in x]))

    net = Encoded(Stateful())
    net.encoder = Stateful()
    traced = trace(net)
    assert traced.lif == ((3, 8, 8), (8, 8, 8), (8, 8, 8))
    assert traced.layers[0].input_bits == 1


def test_a_threshold_has_no_membrane():
    traced = trace(OfAnother(Surrogate()))
    assert traced.lif == ((8, 8, 8),)
    assert [found.lif for found in traced.layers] == [True, False, False]
    with pytest.raises(UserError, match="module other gives spikes and keeps no state"):
        trace(OfAnother(Surrogate()), images(T=1), time_steps=1)


def test_a_membrane_beside_the_module_that_fires_is_counted():
    class ByHand(OfAnother):
        def forward(self, x):
            mem, spikes = 0, []
            for frame in x:
                mem = 0.5 * mem + self.conv2(self.lif1(self.conv1(frame)))
                spikes.append(self.other(mem - 0.3))
                mem = mem - 0.3 * spikes[-1]
            return self.head(torch.stack(spikes).mean((0, 3, 4)))

    assert trace(ByHand(Surrogate())).lif == ((8, 8, 8), (8, 8, 8))


class Integrator(nn.Module):
    """Leaks and adds, and never fires; what it returns is its state."""

    def __init__(self):
        super().__init__()
        self.mem = None

    def forward(self, x):
        self.mem = x if self.mem is None else 0.5 * self.mem + x
        return self.mem

    reset = Stateful.reset_mem


class ExplicitIntegrator(nn.Module):
    """Takes and gives its state, as norse's LICell does; `alone`: its output is all of it."""

    def __init__(self, alone):
        super().__init__()
        self.alone = alone

    def forward(self, x, state=None):
        before = State(torch.zeros_like(x), 0) if state is None else state
        v = 0.5 * before.v + x
        return v, State(v, v if self.alone else 0.9 * before.i + x)


@pytest.mark.parametrize("alone", [False, True])
def test_an_integrator_whose_state_is_handed_around_has_a_membrane(alone):
    class Read(OfAnother):
        def forward(self, x):
            state = None
            for frame in x:
                sums = self.head(self.other(self.conv2(self.lif1(self.conv1(frame)))).mean((2, 3)))
                v, state = self.readout(sums, state)
            return v

    net = Read(Stateful())
    net.readout = ExplicitIntegrator(alone)
    traced = trace(net)
    assert traced.lif == ((8, 8, 8), (8, 8, 8), (10, 1, 1))
    assert [found.lif for found in traced.layers] == [True, True, True]
    with pytest.raises(UserError, match="module readout gives values beside its output"):
        trace(net, images(T=1), time_steps=1)


class Seen(nn.Module):
    """Keeps what it was given, to be looked at."""

    def forward(self, x):
        self.last = x
        return 2 * x


class Sum(nn.Module):
    def forward(self, a, b):
        return a + b, b


class Delayed(nn.Module):
    def __init__(self):
        super().__init__()
        self.before = None

    def forward(self, s):
        now, self.before = self.before, s.clone()
        return torch.zeros_like(s) if now is None else now

    def reset(self):
        self.before = None


def test_an_integrator_of_another_library_has_a_membrane_and_what_only_looks_on_has_none():
    class Looked(OfAnother):
        def __init__(self):
            super().__init__(lif())
            self.seen, self.sum, self.delay = Seen(), Sum(), Delayed()
            self.readout = Integrator()

        def forward(self, x):
            spikes = []
            for frame in x:
                s = self.delay(self.lif1(self.seen(self.conv1(frame))))
                sums, _ = self.sum(self.conv2(s), self.seen(self.conv2(1 - s)))
                spikes.append(self.other(sums))
            steps = [self.readout(self.head(s.mean((2, 3)))) for s in spikes]
            return torch.stack(steps).mean(0)

    traced = trace(Looked())
    assert traced.lif == ((8, 8, 8), (8, 8, 8), (10, 1, 1))
    assert [(found.runs, found.lif) for found in traced.layers] == [(1, True), (2, True), (1, True)]


class Scaled(Folded):
    """Gives averages of its spikes so far, times a scale: real values; (T, N, ...)."""

    def forward(self, x):
        spikes = super().forward(x.flatten(0, 1)).view_as(x)
        weights = torch.linspace(0.3, 1, T).exp().view(-1, *[1] * (x.dim() - 1))
        return (weights * spikes).cumsum(0)


class Unrolled(nn.Module):
    """All timesteps in a call, along `axis` of its input, each by `step`."""

    def __init__(self, axis=0, step=fire):
        super().__init__()
        self.axis, self.step = axis, step

    def forward(self, x):
        mem, spikes = 0, []
        for current in x.unbind(self.axis):
            mem, fired = self.step(mem, current)
            spikes.append(fired)
        return torch.stack(spikes, self.axis)


class Repeated(nn.Module):
    """Static images (N, C, H, W), repeated inside; timesteps along `axis`, or flattened with N."""

    def __init__(self, axis, node, flat=False, channels=8):
        super().__init__()
        torch.manual_seed(1)
        self.axis, self.flat = axis, flat
        self.conv1, self.lif1 = nn.Conv2d(3, channels, 3, padding=1), node()
        self.conv2, self.lif2 = nn.Conv2d(channels, 4, 3, padding=1), node()
        self.head = nn.Linear(4, 10)

    def forward(self, x):
        x = x.unsqueeze(self.axis).repeat_interleave(T, self.axis)
        leading = x.shape[:2]
        for conv, node in ((self.conv1, self.lif1), (self.conv2, self.lif2)):
            sums = conv(x.flatten(0, 1))
            x = node(sums if self.flat else sums.unflatten(0, leading))
            x = x.unflatten(0, leading) if self.flat else x
        return self.head(x.mean((3, 4)).mean(self.axis))


@pytest.mark.parametrize("samples", [1, 2, T])
@pytest.mark.parametrize("layout", ["T, N", "N, T", "T·N"])
def test_static_images_repeated_inside_cost_what_a_loop_over_them_does(layout, samples):
    axis = int(layout == "N, T")
    node = Folded if layout == "T·N" else lambda: Unrolled(axis)
    x = images()[0, :1].repeat(samples, 1, 1, 1)
    traced = trace(Repeated(axis, node, flat=layout == "T·N"), x)
    assert traced.lif == ((8, 8, 8), (4, 8, 8))
    looped = trace(multi_step(Repeated(0, lambda: lif(decay_input=False, v_reset=None))), x)
    assert traced == replace(looped, leak=0.25, reset="hard")  # which only the second says


def test_one_image_at_one_timestep_is_not_taken_for_its_channels():
    net = Repeated(0, Stateful, channels=3)
    net.forward = lambda x: net.head(net.lif2(net.conv2(net.lif1(net.conv1(x)))).mean((2, 3)))
    assert trace(net, images(1, 1)[0], time_steps=1).lif == ((3, 8, 8), (4, 8, 8))


def test_timesteps_that_a_network_does_not_run_are_refused():
    for net in (Repeated(0, lambda: Unrolled(0)), Repeated(1, lambda: Unrolled(1))):
        with pytest.raises(
            UserError, match=r"LIF lif1, called once on .*, does not run 2 timesteps"
        ):
            trace(net, images(N=4)[0], time_steps=2)
    once = Repeated(0, Stateful, channels=4)
    once.forward = lambda x: once.head(once.lif1(once.conv1(x)).mean((2, 3)))
    with pytest.raises(UserError, match="LIF lif1 ran 1 timestep, not 4"):
        trace(once, images(N=4)[0])


def test_fractions_of_an_integer_firing_neuron_are_its_counts():
    def graded(mem, x):
        """Fires up to 4 times, and gives them divided by 4."""
        mem = mem + 3 * x
        fired = mem.round().clamp(0, 4) / 4
        return mem - 4 * fired, fired

    net = Between(node=lambda: Unrolled(step=graded))
    traced = trace(net)
    read = 4 * inputs(net, images())["conv2"]
    ones = (read % 2 + read // 2 % 2 + read // 4).mean().item() / 3
    assert traced.lif == ((8, 8, 8), (8, 8, 8))
    assert traced.layers[1].input_bits == 3
    assert traced.layers[1].spike_rate == pytest.approx(ones)


@pytest.mark.parametrize("scale", [1.0, 0.1, 0.3])
def test_a_neuron_gives_as_many_bits_as_it_can_fire_whatever_a_spike_is_worth(scale):
    def bursts(mem, x):
        """Fires up to 15 times, which the sample does not show."""
        mem = mem + 4 * x
        fired = mem.round().clamp(0, 15) * scale
        return mem - fired / scale, fired

    net = Between(node=lambda: Unrolled(step=bursts))
    read = (inputs(net, images())["conv2"] / scale).round()
    found = trace(net).layers[1]
    assert set(read.tolist()) >= {1, 2}
    assert read.max() < 8
    assert found.input_bits == 4
    assert found.spike_rate == pytest.approx(ones(read, 4))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("kind", ["neuron", "noise", "threshold"])
def test_an_encoder_that_may_have_a_membrane_is_refused(kind, axis):
    class Encoder(nn.Module):
        """Of one image those of T timesteps."""

        def forward(self, x):
            if kind == "noise":
                return (torch.rand(T, *x.shape) < x).float().movedim(0, axis)
            mem, spikes = 0, []
            for _ in range(T):
                mem, fired = fire(mem, x) if kind == "neuron" else (0, (x > 0.5).float())
                spikes.append(fired)
            return torch.stack(spikes, axis)

    class Encoded(Between):
        def forward(self, x):
            return super().forward(self.encoder(x).movedim(axis, 0))

    net = Encoded()
    net.encoder = Encoder()
    if kind == "neuron":
        with pytest.raises(UserError, match="module encoder gives spikes of 4 timesteps for one"):
            trace(net, images()[0])
    else:
        assert trace(net, images()[0]).lif == ((8, 8, 8), (8, 8, 8))


def test_a_surrogate_that_all_neurons_share_is_none_of_them():
    fire = Surrogate()

    def node():
        folded = Folded()
        folded.fire = fire
        return folded

    x = images()[0]
    own = trace(Repeated(0, Folded, flat=True), x)
    assert trace(Repeated(0, node, flat=True), x) == own
    net = Between(node=lambda: neuron.GatedLIFNode(T=T))
    net.lif2 = neuron.GatedLIFNode(T=T)
    assert trace(net).lif == ((8, 8, 8), (8, 8, 8))


def test_at_one_timestep_averages_of_signed_spikes_are_signed_codes():
    class Signed(Stateful):
        def forward(self, x):
            self.mem = x if self.mem is None else 0.5 * self.mem + x
            return (self.mem > 0.3).float() - (self.mem < -0.3).float()

    head = trace(OfAnother(Signed()), images(T=1), time_steps=1).layers[-1]
    assert (head.linear, head.input_bits) == (False, 8)  # -64 to 64 of 64 pixels


def test_noise_is_no_membrane():
    class Noise(nn.Module):
        def forward(self, x):
            return x + 0.1 * torch.randn_like(x)

    net = Between()
    net.conv2 = nn.Sequential(net.conv2, Noise())
    assert trace(net).lif == ((8, 8, 8), (8, 8, 8))


def test_layers_whose_sums_lie_side_by_side_each_update_their_neurons():
    class Branches(Between):
        def __init__(self):
            super().__init__(channels=12)
            self.narrow, self.wide = layer.Conv2d(8, 4, 1), layer.Conv2d(8, 8, 3, padding=1)
            self.lif3 = lif()
            self.between = lambda s: self.lif3(torch.cat([self.narrow(s), self.wide(s)], 2))
            multi_step(self)

    found = layers_of(Branches())
    assert [found[name].lif for name in ("conv1", "narrow", "wide", "conv2")] == [True] * 4


def test_a_neuron_that_is_silent_and_keeps_its_state_to_itself_is_found():
    net = OfAnother(Folded())
    net.conv2.weight.data *= 1e-3
    net.conv2.bias.data.fill_(-0.01)
    traced = trace(net)
    assert traced.lif == ((8, 8, 8), (8, 8, 8))
    assert traced.layers[-1].spike_rate == 0
    assert trace(Between(node=lambda: neuron.DSRLIFNode(T=T))).lif == traced.lif


def test_a_neuron_that_gives_real_values_has_a_membrane_and_what_lies_beside_it_has_none():
    net = Between(node=Scaled)
    beside = [nn.ReLU(inplace=True), nn.SiLU(inplace=True), layer.BatchNorm2d(8), nn.Tanh()]
    net.between = multi_step(nn.Sequential(*beside, nn.Softmax(2), nn.Identity()))
    traced = trace(net)
    assert traced.lif == ((8, 8, 8), (8, 8, 8))
    assert (traced.layers[1].input_bits, traced.layers[1].spike_rate) == (6, None)


def test_one_neuron_for_several_populations_is_refused():
    class Reused(Between):
        def forward(self, x):
            spikes = self.lif1(self.conv2(self.lif1(self.conv1(x))))
            return self.head(spikes.mean((3, 4))).mean(0)

    with pytest.raises(UserError, match="lif1 ran 8 timesteps, not 4"):
        trace(Reused())


# The module is left alone.


@torch.no_grad()
def test_a_network_that_was_used_before_is_reset_and_left_as_it_was():
    for net in (InALoop(), OfAnother(Stateful()), OfAnother(Buffered())):
        fresh = trace(net)
        net.train()
        net(images(N=3))  # leaves membranes of another batch
        mode, state = net.lif1.step_mode, net.lif1.v
        kept = getattr(getattr(net, "other", None), "mem", torch.zeros(1))
        membrane, other = state.clone(), kept.clone()
        assert trace(net) == fresh
        assert net.training
        assert net.lif1.v is state
        assert torch.equal(net.lif1.v, membrane)
        assert torch.equal(getattr(getattr(net, "other", None), "mem", torch.zeros(1)), other)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
        assert net.lif1.step_mode == mode


# This project's own.


@pytest.mark.parametrize("events", [False, True])
@torch.no_grad()
def test_a_network_of_our_own_is_described_as_any_module_is(events):
    torch.manual_seed(0)
    net = MSResNet(18, 10, T, 2, 4).eval()
    net.input_shape = (T, 2, 16, 16) if events else (2, 16, 16)
    x = torch.rand(1, *net.input_shape)
    net(x)
    with counting_rows(net, describe(net)) as counted:
        net(x)
    found, own = trace(net, x, bits=32), describe(net, counted())
    assert own.lif == found.lif
    assert sorted(own.streams) == sorted(found.streams)
    assert (own.leak, own.reset) == (found.leak, found.reset)
    assert found.layers[0].static is not events
    for theirs, ours in zip(found.layers, own.layers, strict=True):
        unlike = {"spike_rate": theirs.spike_rate, "bn_bits": None}
        if ours.linear:
            unlike["silent_patches"] = None
        assert replace(ours, **unlike) == theirs
        assert ours.linear or (ours.silent_patches is None) == (ours.input_bits > 1)


def of_spikingjelly(name: str, **options) -> nn.Module:
    return getattr(pytest.importorskip("spikingjelly.activation_based.neuron"), name)(**options)


def of_snntorch(name: str, **options) -> nn.Module:
    return getattr(pytest.importorskip("snntorch"), name)(**options)


NEURONS = {  # what makes one, with or without the subtraction of the threshold
    "IF": lambda soft: of_spikingjelly("IFNode", v_reset=None if soft else 0.0),
    "LIF": lambda soft: of_spikingjelly("LIFNode", tau=3.0, v_reset=None if soft else 0.0),
    "parametric": lambda soft: of_spikingjelly(
        "ParametricLIFNode", init_tau=4.0, decay_input=False, v_reset=None if soft else 0.0
    ),
    "Leaky": lambda soft: of_snntorch(
        "Leaky", beta=0.85, reset_mechanism="subtract" if soft else "zero"
    ),
    "Lapicque": lambda soft: of_snntorch(
        "Lapicque", beta=0.7, reset_mechanism="subtract" if soft else "zero"
    ),
    "Lapicque, RC": lambda soft: of_snntorch(
        "Lapicque", R=5.0, C=1.0, reset_mechanism="subtract" if soft else "zero"
    ),
}


@pytest.mark.parametrize("soft", [True, False], ids=["soft", "hard"])
@pytest.mark.parametrize("name", NEURONS)
def test_neurons_of_other_libraries_do_what_is_read_off_them(name, soft):
    """Their membrane is charged below the threshold, leaks, and is charged above it."""
    neuron = NEURONS[name](soft)
    leak, reset = dynamics(neuron)
    assert reset == ("soft" if soft else "hard")
    spikes, membranes, mem = [], [], None
    for x in (0.5, 0.0, 0.0, 8.0, 0.0):
        with torch.no_grad():
            if hasattr(neuron, "reset_mechanism"):
                spike, mem = neuron(torch.tensor([[x]]), mem)
            else:
                spike, mem = neuron(torch.tensor([[x]])), neuron.v
        spikes.append(spike.item())
        membranes.append(mem.item())
    first, second, third, fired, last = membranes
    assert spikes[:4] == [0, 0, 0, 1]
    assert (second / first, third / second) == pytest.approx((leak, leak))
    if hasattr(neuron, "reset_mechanism"):  # that it has fired shows a timestep later
        assert last == pytest.approx(leak * fired - 1 if soft else 0, abs=1e-6)
    else:
        assert (fired > 0) == soft


@pytest.mark.parametrize(
    "neuron",
    [
        lambda: of_spikingjelly("LIFNode", v_reset=-0.5),
        lambda: of_spikingjelly("QIFNode"),
        lambda: of_spikingjelly("IzhikevichNode"),
        lambda: of_snntorch("Leaky", beta=0.9, reset_mechanism="none"),
        lambda: of_snntorch("Leaky", beta=torch.tensor([0.9, 0.5])),
        lambda: of_snntorch("Synaptic", alpha=0.5, beta=0.9),
    ],
    ids=["reset below 0", "quadratic", "Izhikevich", "no reset", "several leaks", "two states"],
)
def test_of_neurons_of_another_kind_nothing_is_read_off(neuron):
    assert dynamics(neuron()) == (None, None)


@pytest.mark.parametrize(
    ("options", "leak", "reset"),
    [({"tau": 4.0}, 0.75, "hard"), ({"tau": 4.0, "v_reset": None}, 0.75, "soft")],
)
def test_neurons_that_say_how_they_leak_and_reset_are_priced_so(options, leak, reset):
    class Added(nn.Module):
        def __init__(self, second):
            super().__init__()
            torch.manual_seed(1)
            self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.c = nn.Conv2d(8, 8, 1)
            self.first, self.second = lif(**options), second
            multi_step(self)

        def forward(self, x):  # (T, N, C, H, W)
            def each(conv, y):
                return conv(y.flatten(0, 1)).unflatten(0, y.shape[:2])

            stream = each(self.a, x)
            return each(self.c, self.second(stream + each(self.b, self.first(stream))))

    found = trace(Added(lif(**options)), images())
    assert (found.leak, found.reset) == (leak, reset)
    assert found.streams == ((8, 8, 8),)
    other = trace(Added(lif(tau=3.0)), images())
    assert (other.leak, other.reset) == (0.25, "hard")  # as nobody knows of both


def test_a_layer_that_an_image_runs_through_once_is_static_and_no_other():
    class Once(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.stem, self.deeper = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
            self.lif = lif()
            multi_step(self)

        def forward(self, x):
            return self.lif(self.deeper(self.stem(x)).expand(T, -1, -1, -1, -1)).mean((0, 3, 4))

    found = layers_of(Once(), images()[0])
    assert found["stem"].static
    assert not found["deeper"].static
    assert found["deeper"].runs == 1
    priced = estimate(trace(Once(), images()[0]), Chip())
    assert priced.energy_by_component["kept_sums"] > 0


def test_silent_patches_of_spikes_are_counted():
    net = Between(conv2=layer.Conv2d(8, 8, 2, stride=3, padding=1))
    x = images() * (torch.arange(8) > 4)
    read = inputs(net, x)["conv2"].reshape(-1, 8, 8, 8)
    silent = total = 0
    for image in read:
        for y in range(-1, 8, 3):
            for column in range(-1, 8, 3):
                patch = image[:, max(0, y) : y + 2, max(0, column) : column + 2]
                silent, total = silent + (not patch.any()), total + 1
    assert 0 < silent < total
    assert layers_of(net, x)["conv2"].silent_patches == pytest.approx(silent / total)


# Codes.


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-300, 300), min_size=2, max_size=40), st.integers(1, 2000))
def test_averages_of_n_spikes_are_multiples_of_one_over_n(counts, n):
    values = (torch.tensor([*counts, 1, 0]).float() / n).double()
    step = common_step(values)
    assert step == pytest.approx(1.0 if n == 1 else 1 / n, rel=1e-4)


@pytest.mark.parametrize(
    ("dtype", "noise", "most"),
    [(torch.float32, 6e-8, 1000), (torch.half, 0, 100), (torch.bfloat16, 0, 9)],
)
def test_rounding_does_not_hide_a_step(dtype, noise, most):
    generator = torch.Generator().manual_seed(0)
    for n in range(2, most):
        counts = torch.randint(-n, n + 1, (300,), generator=generator)
        values = counts / n + noise * (2 * torch.rand(300, generator=generator) - 1)
        levels = Levels()
        levels.add(values.to(dtype) * (counts != 0))
        most_codes = (levels.values / levels.step()).abs().max().item()
        assert most_codes == pytest.approx(counts.abs().max().item(), abs=1e-6)


def test_two_multiples_far_from_0_have_the_step_of_their_difference():
    values = torch.tensor([30, 31, 33, 34, 35, 36]).float() / 9 / 4
    values[2] += 6e-8
    assert common_step(values.double()) == pytest.approx(1 / 36, rel=1e-4)


def test_half_precision_reads_the_same_codes():
    def pooled(s):
        return F.avg_pool2d(s.flatten(0, 1), 3, 1).unflatten(0, s.shape[:2])

    single = layers_of(Between(pooled))["conv2"]
    for dtype in (torch.half, torch.bfloat16):
        net = Between(pooled)
        found = layers_of(net.to(dtype), images().to(dtype))["conv2"]
        assert found.input_bits == single.input_bits == 4
        assert found.spike_rate == pytest.approx(single.spike_rate, rel=0.1)


def test_random_numbers_have_no_common_step():
    values = torch.rand(100, generator=torch.Generator().manual_seed(0)).double()
    assert common_step(values) is None
