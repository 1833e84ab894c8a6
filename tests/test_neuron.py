"""The LIF neuron against the equations, written as a loop, and against spikingjelly."""

import pytest
import torch

import reference
from models.neuron import LIF, THRESHOLD, count_spikes
from quantization import MembraneQuantizer

T = 5


def currents(device: torch.device | str = "cpu", seed: int = 0) -> torch.Tensor:
    """Input (T·B, C, H, W) in float64, strong enough to fire and to leave the window."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(T * 2, 3, 4, 4, generator=generator, dtype=torch.float64)
    return x.to(device, memory_format=torch.channels_last).requires_grad_()


def run(lif: LIF, x: torch.Tensor):
    membranes: list[torch.Tensor] = []
    spikes = lif(x, T, membranes.append)
    return spikes.unflatten(0, (T, -1)), membranes[0]


@pytest.mark.parametrize("bits", [None, 2, 3, 4, 8])
def test_spikes_membranes_and_gradients_equal_a_naive_loop(bits, device):
    x, x_naive = currents(device), currents()
    lif = LIF(None if bits is None else MembraneQuantizer(bits, THRESHOLD)).double().to(device)
    quantizer = None
    if bits is not None:
        # LSQ scales the step's gradient by 1/√(N·high), N the values of one sample.
        low, high = lif.quantizer.low, lif.quantizer.high
        step = lif.quantizer.used_step().cpu().requires_grad_()
        scale = 1 / (x[0].numel() * T * high) ** 0.5

        def quantizer(u):
            return reference.quantize(u, step, low, high)

    spikes, membrane = run(lif, x)
    naive_spikes, naive_membrane = reference.lif(list(x_naive.unflatten(0, (T, -1))), quantizer)
    naive_spikes, naive_membrane = torch.stack(naive_spikes), torch.stack(naive_membrane)
    assert torch.equal(spikes.cpu(), naive_spikes)
    assert 0.05 < spikes.mean() < 0.6
    torch.testing.assert_close(membrane.cpu(), naive_membrane, rtol=1e-12, atol=1e-12)

    weight = torch.randn(spikes.shape, generator=torch.Generator().manual_seed(1)).double()
    for s, u in ((spikes.cpu(), membrane.cpu()), (naive_spikes, naive_membrane)):
        (torch.sum(s * weight) + torch.sum(u.square() * weight.flip(0))).backward()
    torch.testing.assert_close(x.grad.cpu(), x_naive.grad, rtol=1e-9, atol=1e-12)
    if bits is not None:
        found = lif.quantizer.step.grad.cpu()
        torch.testing.assert_close(found, step.grad * scale, rtol=1e-9, atol=0)


@pytest.mark.parametrize("timesteps", [1, 8, 9, 17])
def test_the_bits_kept_for_backward_hold_any_number_of_timesteps(timesteps, device):
    generator = torch.Generator().manual_seed(0)
    shape = timesteps * 2, 3, 4, 4
    x_naive = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    x = x_naive.detach().to(device, copy=True).requires_grad_()
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    torch.sum(LIF()(x, timesteps).cpu() * weight).backward()
    naive = torch.cat(reference.lif(list(x_naive.unflatten(0, (timesteps, 2))))[0])
    torch.sum(naive * weight).backward()
    torch.testing.assert_close(x.grad.cpu(), x_naive.grad, rtol=1e-9, atol=1e-12)
    assert (x.grad != 0).any()


def test_spikes_and_gradients_equal_spikingjelly(device):
    pytest.importorskip("spikingjelly", reason="needs spikingjelly")
    from spikingjelly.activation_based import neuron, surrogate

    oracle = neuron.LIFNode(
        tau=4 / 3,
        decay_input=False,
        v_threshold=THRESHOLD,
        v_reset=0.0,
        surrogate_function=surrogate.Rect(alpha=1.0),
        detach_reset=True,
        step_mode="m",
    )
    x, x_oracle = currents(device, seed=3), currents(device, seed=3)
    spikes, _ = run(LIF(), x)
    theirs = oracle(x_oracle.unflatten(0, (T, -1)))
    assert torch.equal(spikes, theirs)
    weight = torch.linspace(-1, 1, spikes.numel(), dtype=torch.float64).view_as(spikes).to(device)
    torch.sum(spikes * weight).backward()
    torch.sum(theirs * weight).backward()
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
    _, membrane = run_two_steps(x)
    assert membrane.dtype == torch.float32
    exact = x.float()[1] + 0.25 * x.float()[0]
    assert torch.equal(membrane[1, 0], exact)


def run_two_steps(x: torch.Tensor):
    membranes: list[torch.Tensor] = []
    return LIF()(x, 2, membranes.append), membranes[0]


def test_spikes_are_counted_per_layer_and_only_while_asked(device):
    layers = torch.nn.ModuleDict({"a": LIF()})
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0]], device=device)
    with count_spikes(layers) as counts:
        layers["a"](x, 2)
        layers["a"](x, 2)
    layers["a"](x, 2)
    assert counts["a"].tolist() == [[2, 2], [4, 4]]  # spikes and neurons of each timestep
