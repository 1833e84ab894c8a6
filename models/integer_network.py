"""A quantized network evaluated with integers alone: the proof that a chip can."""

import math
from functools import partial

import torch
from torch import Tensor, nn

from models.graph import computed_by, graph_of, layers_of
from models.network import SpikingNetwork
from models.neuron import Neuron, neuron_of
from quantization import GRID, SMALLEST_LEAK, Quantizer, leak_stays_on_grid


def round_shift(x: Tensor, divisor: int) -> Tensor:
    """x / divisor of int64 x, rounded to the nearest integer, halves to even."""
    quotient = torch.div(2 * x + divisor, 2 * divisor, rounding_mode="floor")
    is_half = (2 * x + divisor) % (2 * divisor) == 0
    return quotient - (is_half & (quotient % 2 == 1)).long()


def in_grid_units(x: float) -> int:
    units = x / GRID
    if units != round(units):
        raise ValueError(f"{x} is no multiple of the grid {GRID}")
    return round(units)


def leaked(x: Tensor, leak: float) -> Tensor:
    """leak · x of int64 x, the leak 0 or a power of two: a shift, of multiples of 1 / leak."""
    numerator, divisor = leak.as_integer_ratio()
    return torch.div(numerator * x, divisor, rounding_mode="floor")


def in_24_bits(x: Tensor) -> Tensor:
    if x.abs().max() >= 2**24:
        raise OverflowError("a number needs more than 24 bits, which float32 does not hold exactly")
    return x


def why_not_integers(neuron: Neuron) -> str | None:
    """Why a quantized network of these neurons is not exact in integers; None: it is.

    What is left of a membrane for the next timestep has to be a multiple of GRID. A hard reset only
    compares with the threshold; a soft one subtracts it.
    """
    leak, threshold = neuron.leak, neuron.threshold
    if not leak_stays_on_grid(leak):
        smallest = round(1 / SMALLEST_LEAK)
        return (
            f"a leak of {leak:g} is no shift: in integers only 0, 1 and powers of two down to "
            f"1/{smallest} are exact"
        )
    if neuron.reset == "soft" and leak * threshold % GRID:
        return (
            f"a soft reset subtracts {leak:g} times the threshold {threshold:g}, which is no "
            f"multiple of 1/{round(1 / GRID)}: a threshold such as "
            f"{round(threshold * 64) / 64 or 1 / 64:g} is exact in integers"
        )
    return None


class IntegerNetwork:
    """A trained quantized network evaluated with integers alone, as a chip would: every spike is
    the same as in the network's own evaluation.

    It runs the network's own `last_spikes`, with each layer computed in int64: weights,
    accumulators, membrane codes and real-valued streams (in units of GRID); batch norm is an
    integer multiply and add, and a shift with rounding. Only the classifier's scales and bias,
    after its integer sums, are float64. Raises ValueError for a network whose layers a chip does
    not know (`graph_of`), and where its neuron is not exact in integers (`why_not_integers`).
    """

    def __init__(self, network: SpikingNetwork):
        graph_of(network)
        self.network, self.neuron = network.eval(), neuron_of(network)
        reason = why_not_integers(self.neuron)
        if reason is not None:
            raise ValueError(reason)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(logits (B, K) float64, spikes (T·B, C, H, W) bool of each LIF layer), as the network's.

        Raises OverflowError where a number leaves the 24 bits that float32 holds exactly.
        """
        net, spikes = self.network, []
        integers = {
            "conv": lambda conv: partial(self._conv, conv),
            "batch_norm": lambda bn: partial(self._batch_norm, bn),
            "stream": lambda quantizer: partial(self._requantize, quantizer),
            "lif": lambda lif: partial(self._lif, lif, spikes),
            # A GPU knows no maximum of int64.
            "pool": lambda pool: lambda x: type(pool).forward(pool, x.double()).long(),
        }
        layers = ((module, kind) for _, module, kind in layers_of(net) if kind in integers)
        functions = {module: integers[kind](module) for module, kind in layers}
        with computed_by(net, functions):
            counts = net.last_spikes(net.fold_time(images), None, frames=images.dim() == 5)
        counts = counts.unflatten(0, (net.time_window, -1))
        per_image = counts.sum(dim=(0, 3, 4))
        codes, step = net.linear.quantizer.codes(net.linear.weight)
        products = (per_image.double() @ codes.double().T) * step.double().T
        positions = counts[:, 0, 0].numel()  # T·H·W
        return products / positions + net.linear.bias.double(), spikes

    def _conv(self, conv: nn.Module, x: Tensor) -> Tensor:
        """Integer accumulators: float64 adds integers below 2^53 exactly, faster than int64."""
        weight = conv.quantizer.codes(conv.weight)[0].double()
        return in_24_bits(conv.convolve(x.double(), weight).round().long())

    def _batch_norm(self, bn: nn.Module, accumulator: Tensor, repeats: int = 1) -> Tensor:
        """scale · accumulator + shift, in units of the scale's step and then shifted to GRID."""
        (scale, scale_step), (shift, shift_step) = bn.codes(*bn.running_statistics())
        scale, shift = (x.long()[:, None, None] for x in (scale, shift))
        shift = shift * in_grid_units(shift_step.item())
        ratio = scale_step.item() / GRID  # a power of two
        if ratio >= 1:
            return in_24_bits(scale * accumulator * round(ratio) + shift)
        divisor = round(1 / ratio)
        return in_24_bits(round_shift(scale * accumulator + shift * divisor, divisor))

    def _requantize(self, quantizer: Quantizer, x: Tensor) -> Tensor:
        """Codes of a stream that is in grid units."""
        step = in_grid_units(quantizer.used_step().item())
        return round_shift(in_24_bits(x), step).clamp(quantizer.low, quantizer.high)

    def _lif(
        self,
        lif: nn.Module,
        spikes: list[Tensor],
        current: Tensor,
        time_window: int,
        watch: None = None,
    ) -> Tensor:
        """Spikes, 0 or 1; their bool is appended to `spikes`."""
        step = in_grid_units(lif.quantizer.used_step().item())
        neuron = self.neuron
        threshold = math.floor(neuron.threshold / GRID)  # a hard reset's may lie between multiples
        fired, membrane = [], None
        for x in in_24_bits(current).unflatten(0, (time_window, -1)):
            if membrane is not None:
                u = membrane * step
                left = u - threshold * fired[-1] if neuron.reset == "soft" else u * (1 - fired[-1])
                x = x + leaked(left, neuron.leak)
            membrane = self._requantize(lif.quantizer, x)  # the b-bit state
            fired.append((membrane * step > threshold).long())
        fired = torch.cat(fired)
        spikes.append(fired.bool())
        return fired
