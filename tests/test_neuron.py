"""The LIF neuron: its definition by hand, the layer against the definition and spikingjelly."""

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
from models.neuron import DEFAULT_NEURON, LIF, RESETS, SURROGATES, Neuron, count_spikes, lif
from quantization import MembraneQuantizer, membrane_step_grid

THRESHOLD = DEFAULT_NEURON.threshold
T = 5


def currents(device: torch.device | str = "cpu", seed: int = 0, timesteps: int = T) -> torch.Tensor:
    """Input (T·B, C, H, W) in float64, strong enough to fire and to leave the window."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(timesteps * 2, 3, 4, 4, generator=generator, dtype=torch.float64)
    return x.to(device, memory_format=torch.channels_last).requires_grad_()


def run(layer: LIF, x: torch.Tensor, timesteps: int = T) -> tuple[torch.Tensor, torch.Tensor]:
    """(spikes, membrane potentials), both (T, ...)"""
    membranes: dict[LIF, torch.Tensor] = {}
    spikes = layer(x, timesteps, membranes.__setitem__)
    return spikes.unflatten(0, (timesteps, -1)), membranes[layer]


def test_the_definition_by_hand():
    # 0.4; 0.1 + 0.5 fires; nothing is left of it for the last, which is outside of the window
    x = torch.tensor([0.4, 0.5, -0.25], dtype=torch.float64, requires_grad=True)
    spikes, membranes = lif(x)
    assert spikes.tolist() == [0, 1, 0]
    assert membranes.tolist() == pytest.approx([0.4, 0.6, -0.25])
    spikes.sum().backward()
    assert x.grad.tolist() == [1.25, 1, 0]


def assert_equal_to_the_definition(neuron, bits, timesteps, learned, device) -> torch.Tensor:
    """The layer's spikes, after they, its membranes and all gradients are those of `lif`."""
    x, x_defined = (currents(where, timesteps=timesteps) for where in (device, "cpu"))
    quantizer = quantize = None
    if bits is not None:
        grid = membrane_step_grid(neuron.leak)
        quantizer = MembraneQuantizer(bits, neuron.threshold, learned, grid)
        # LSQ scales the step's gradient by 1/√(N·high), N the values of one sample.
        low, high = quantizer.low, quantizer.high
        step = quantizer.double().used_step().clone().requires_grad_()
        scale = 1 / (x[0].numel() * timesteps * high) ** 0.5

        def quantize(u):
            return reference.quantize(u, step, low, high)

    spikes, membrane = run(LIF(neuron, quantizer).to(device), x, timesteps)
    defined, defined_membrane = lif(x_defined.unflatten(0, (timesteps, -1)), quantize, neuron)
    assert torch.equal(spikes.cpu(), defined)
    torch.testing.assert_close(membrane.cpu(), defined_membrane, rtol=1e-12, atol=1e-12)
    if x.device.type == "cpu":
        assert bits is not None or torch.equal(membrane, defined_membrane)

    weight = torch.randn(spikes.shape, generator=torch.Generator().manual_seed(1)).double()
    for s, u in ((spikes.cpu(), membrane.cpu()), (defined, defined_membrane)):
        (torch.sum(s * weight) + torch.sum(u.square() * weight.flip(0))).backward()
    torch.testing.assert_close(x.grad.cpu(), x_defined.grad, rtol=1e-9, atol=1e-12)
    if bits is not None and learned:
        found = quantizer.step.grad.cpu()
        torch.testing.assert_close(found, step.grad * scale, rtol=1e-9, atol=1e-12)
    elif bits is not None:
        assert quantizer.step.grad is None
    return spikes


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize(
    ("bits", "timesteps"),
    [*((None, n) for n in (1, 5, 8, 9, 17)), *((n, 5) for n in (2, 3, 4, 8)), (4, 1), (4, 9)],
)
def test_spikes_membranes_and_gradients_equal_the_definitions(bits, timesteps, learned, device):
    spikes = assert_equal_to_the_definition(DEFAULT_NEURON, bits, timesteps, learned, device)
    assert 0.05 < spikes.mean() < 0.6


NEURONS = st.builds(
    Neuron,
    leak=st.sampled_from([0.0, 1 / 64, 0.25, 0.5, 1.0]) | st.floats(0, 1),
    threshold=st.floats(0.01, 4),
    reset=st.sampled_from(RESETS),
    surrogate=st.sampled_from(list(SURROGATES)),
    width=st.floats(0.01, 4),
)


@hypothesis.settings(max_examples=200, deadline=None)
@given(neuron=NEURONS, bits=st.none() | st.integers(2, 8), timesteps=st.sampled_from([1, 2, 9]))
def test_every_neuron_equals_its_definition(neuron, bits, timesteps, device):
    assert_equal_to_the_definition(neuron, bits, timesteps, True, device)


def test_a_soft_reset_by_hand():
    # 1.2 fires and leaves 0.7, of which half is there in the next step: 0.35 + 0.25 fires again
    neuron = Neuron(leak=0.5, reset="soft")
    x = torch.tensor([1.2, 0.25, 0.0], dtype=torch.float64, requires_grad=True)
    spikes, membranes = lif(x, neuron=neuron)
    assert spikes.tolist() == [1, 1, 0]
    assert membranes.tolist() == pytest.approx([1.2, 0.6, 0.05])
    membranes.sum().backward()  # the reset has no gradient: each step hands half of its own back
    assert x.grad.tolist() == [1.75, 1.5, 1]


@pytest.mark.parametrize("width", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_a_surrogate_has_the_area_1_and_its_height_says_the_width(surrogate, width):
    v = torch.linspace(-2000, 2000, 2_000_001, dtype=torch.float64) * width
    found = SURROGATES[surrogate](v, width)
    assert found.max().item() == pytest.approx(1 / (2 * width))
    torch.testing.assert_close(found, found.flip(0))
    # What an arctangent leaves out beyond: 2/π² of width/v at both ends.
    assert torch.trapezoid(found, v).item() == pytest.approx(1, abs=1e-3)


# Ours by theirs: what spikingjelly calls alpha, of our width a.
OF_SPIKINGJELLY = {
    "rect": ("Rect", lambda a: 1 / (2 * a)),
    "atan": ("ATan", lambda a: 1 / a),
    "sigmoid": ("Sigmoid", lambda a: 2 / a),
    "triangle": ("PiecewiseQuadratic", lambda a: 1 / (2 * a)),
}


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize(
    "how", [{}, {"reset": "soft", "leak": 0.5}, {"threshold": 0.75, "leak": 0.625, "width": 0.3}]
)
def test_spikes_and_gradients_equal_spikingjelly(how, surrogate, device):
    pytest.importorskip("spikingjelly", reason="needs spikingjelly")
    from spikingjelly.activation_based import neuron as theirs
    from spikingjelly.activation_based import surrogate as surrogates

    neuron = Neuron(surrogate=surrogate, **how)
    name, alpha_of = OF_SPIKINGJELLY[surrogate]
    oracle = theirs.LIFNode(
        tau=1 / (1 - neuron.leak),
        decay_input=False,
        v_threshold=neuron.threshold,
        v_reset=0.0 if neuron.reset == "hard" else None,
        surrogate_function=getattr(surrogates, name)(alpha=alpha_of(neuron.width)),
        detach_reset=True,
        step_mode="m",
    )
    x, x_oracle = currents(device, seed=3), currents(device, seed=3)
    spikes, _ = run(LIF(neuron), x)
    their_spikes = oracle(x_oracle.unflatten(0, (T, -1)))
    assert torch.equal(spikes, their_spikes)
    weight = torch.linspace(-1, 1, spikes.numel(), dtype=torch.float64).view_as(spikes).to(device)
    torch.sum(spikes * weight).backward()
    torch.sum(their_spikes * weight).backward()
    torch.testing.assert_close(x.grad, x_oracle.grad, rtol=1e-9, atol=1e-12)


def test_a_membrane_exactly_at_the_threshold_does_not_fire(device):
    # u = θ, then θ/4 + 3θ/4 = θ again
    x = torch.tensor([[THRESHOLD], [THRESHOLD * 0.75]], device=device)
    assert LIF()(x, 2).sum() == 0
    assert LIF()(x + 1e-6, 2)[0] == 1


def test_the_input_is_left_as_it_was():
    x = currents()
    before = x.detach().clone()
    run(LIF(), x)
    assert torch.equal(x, before)


def test_bfloat16_inputs_are_integrated_in_float32(device):
    # 0.4375 · 1/4 + 0.39257… fires only if the sum is not rounded to bf16's 8 bits.
    x = torch.tensor([[0.4375], [0.390869140625]], dtype=torch.bfloat16, device=device)
    _, membrane = run(LIF(), x, 2)
    assert membrane.dtype == torch.float32
    exact = x.float()[1] + 0.25 * x.float()[0]
    assert torch.equal(membrane[1, 0], exact)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_bfloat16_inputs_give_the_gradients_of_float32_rounded(surrogate, bits, device):
    neuron, found = Neuron(0.5, 0.75, "soft", surrogate), []
    x = currents(device).detach().bfloat16()
    for dtype in (torch.bfloat16, torch.float32):
        layer = LIF(neuron, None if bits is None else MembraneQuantizer(bits, 0.75)).to(device)
        given = x.to(dtype, copy=True).requires_grad_()
        spikes, membrane = run(layer, given)
        weight = torch.linspace(-1, 1, spikes.numel(), device=device).view_as(spikes).bfloat16()
        torch.sum(spikes * weight).backward()
        found.append((spikes.float(), membrane, given.grad.bfloat16()))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_spikes_are_counted_per_layer_and_only_while_asked(device):
    layers = torch.nn.ModuleDict({"a": LIF()})
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0]], device=device)
    with count_spikes(layers) as counts:
        layers["a"](x, 2)
        layers["a"](x, 2)
    layers["a"](x, 2)
    assert counts["a"].tolist() == [[2, 2], [4, 4]]  # spikes and neurons of each timestep
