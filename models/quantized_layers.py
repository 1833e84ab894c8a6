"""Quantized layers: weights, membranes, batch norms and inputs are integers times a scale (MD-SNN,
arXiv 2512.04443; docs/choices.md has what the paper leaves open)."""

from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.batch_norm import BatchNorm
from models.layers import Conv2d, Layers
from models.neuron import DEFAULT_NEURON, LIF, Neuron
from quantization import (
    BatchNormQuantizer,
    ImageQuantizer,
    MembraneQuantizer,
    StreamQuantizer,
    WeightQuantizer,
    membrane_step_grid,
)

STEM_BITS = LINEAR_BITS = 8


def convolve_spikes(spikes: Tensor, codes: Tensor, stride: list[int], padding: list[int]) -> Tensor:
    """Convolution of spikes (uint8) with weight codes (int8), summed in integers; float32."""
    one, zeros = torch.ones(1), torch.zeros(1, dtype=torch.int64)
    where = stride, padding, [1, 1], 1  # dilation and groups last
    packed = torch.ops.onednn.qconv_prepack(codes, one, 1.0, 0, *where, list(spikes.shape))
    return torch.ops.onednn.qconv2d_pointwise(
        *(spikes, 1.0, 0, packed, one, zeros, None, *where, 1.0, 0, torch.float32, "none", [], "")
    )


@cache
def spikes_convolve_in_integers() -> bool:
    """Whether this machine's oneDNN has the 8-bit convolution, and computes it right."""
    spikes = (torch.arange(256).view(1, 4, 8, 8) % 3 == 0).byte()
    codes = (torch.arange(144).view(4, 4, 3, 3) % 255 - 127).to(torch.int8)
    expected = F.conv2d(spikes.float(), codes.float(), None, 1, 1)
    try:
        return torch.equal(convolve_spikes(spikes, codes, [1, 1], [1, 1]), expected)
    except (AttributeError, RuntimeError):
        return False


class _SpikeConvolution(torch.autograd.Function):
    """`convolve_spikes` of floats; keeps one byte per spike and weight for backward."""

    @staticmethod
    def forward(ctx, spikes, codes, stride, padding):
        spikes, codes = spikes.to(torch.uint8), codes.to(torch.int8)
        ctx.save_for_backward(spikes, codes)
        ctx.where = stride, padding
        return convolve_spikes(spikes, codes, list(stride), list(padding))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        spikes, codes = (x.to(grad.dtype) for x in ctx.saved_tensors)
        stride, padding = ctx.where
        grads = torch.ops.aten.convolution_backward(
            *(grad, spikes, codes, None, stride, padding, (1, 1), False, (0, 0), 1),
            output_mask=[True, True, False],
        )
        return *grads[:2], None, None


# What of the gradient with respect to a layer's ideal sums does not reach (inputs, weight codes),
# because a chip clipped what it came from.
Lost = Callable[[Tensor], tuple[Tensor, Tensor]]
# What a chip makes of a layer's sums: (what the layer reads, its weight codes) -> sums, of the
# shape of the ideal ones, and what their gradient loses (None: nothing).
Crossbars = Callable[[Tensor, Tensor], tuple[Tensor, Lost | None]]


class _OnCrossbars(torch.autograd.Function):
    """The sums of crossbars with the gradient of the ideal ones (straight-through), but for what
    is lost. `x` and `codes` are what the ideal sums come from."""

    @staticmethod
    def forward(ctx, ideal: Tensor, x: Tensor, codes: Tensor, sums: Tensor, lost: Lost | None):
        ctx.lost = lost
        return torch.empty_like(ideal).copy_(sums)  # in the ideal ones' type and layout

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        if ctx.lost is None:
            return grad, None, None, None, None
        of_x, of_codes = ctx.lost(grad)
        return grad, -of_x, -of_codes, None, None


def sums_of_crossbars(ideal: Tensor, x: Tensor, codes: Tensor, crossbars: Crossbars) -> Tensor:
    """What crossbars give instead of the ideal sums of x and weight codes. Autocast is off for them
    too."""
    with torch.autocast(x.device.type, enabled=False):
        return _OnCrossbars.apply(ideal, x, codes, *crossbars(x.detach(), codes.detach()))


class QuanConv2d(Conv2d):
    """Convolution of integers with integer weights, as a crossbar computes it.

    Its output is the integer accumulator: the batch norm that follows undoes the scales of inputs
    and weights anyway, so they enter only through the codes. Autocast is off, because bfloat16
    rounds integers above 256. Of spikes, a CPU computes it in 8-bit integers. Where `crossbars` are
    put there, what they give takes the place of the accumulator.
    """

    def __init__(self, *args, bits: int, of_spikes: bool = False):
        super().__init__(*args)
        self.quantizer = WeightQuantizer(bits, self.weight)
        self.of_spikes = of_spikes
        self.crossbars: Crossbars | None = None

    def forward(self, x: Tensor) -> Tensor:
        x, codes = x.to(self.weight.dtype), self.quantizer(self.weight)
        sums = self.accumulate(x, codes)
        if self.crossbars is None:
            return sums
        return sums_of_crossbars(sums, x, codes, self.crossbars)

    def accumulate(self, x: Tensor, codes: Tensor) -> Tensor:
        fits = self.of_spikes and x.dtype == torch.float32 and x.device.type == "cpu"
        if fits and spikes_convolve_in_integers():
            return _SpikeConvolution.apply(x, codes, self.stride, self.padding)
        with torch.autocast(x.device.type, enabled=False):
            return self.convolve(x, codes)


class QuanLinear(nn.Linear):
    """Linear layer with quantized weights; scales and bias are applied digitally. `crossbars` as in
    QuanConv2d: of mean spikes they give the mean of their sums."""

    def __init__(self, *args, bits: int):
        super().__init__(*args)
        self.quantizer = WeightQuantizer(bits, self.weight)
        self.crossbars: Crossbars | None = None

    def forward(self, x: Tensor) -> Tensor:
        step = self.quantizer.positive_step(self.weight[0].numel())
        x, codes = x.to(step.dtype), self.quantizer(self.weight)
        with torch.autocast(x.device.type, enabled=False):
            if self.crossbars is None:
                return F.linear(x, codes * step, self.bias)
            sums = sums_of_crossbars(F.linear(x, codes), x, codes, self.crossbars)
            return sums * step.T + self.bias


def quantized_layers(
    bits: int,
    bn_bits: int = 8,
    image_step: float = 1 / 255,
    membrane_steps_learned: bool = True,
    neuron: Neuron = DEFAULT_NEURON,
) -> Layers:
    """The layers of a quantized network.

    Args:
        bits: width of weights, membrane potentials and the real values that a convolution reads, 2
            to 8; the weights of stem and classifier have 8.
        bn_bits: width of the folded batch norm's scale and shift, 2 to 16.
        image_step: what one code of the 8-bit input stands for: 1/255 for images in [0, 1],
            1 for event counts.
        membrane_steps_learned: whether training changes what a code of the membrane potentials
            stands for (see `distiller.within_reach`).
        neuron: the LIF neuron of all layers.

    Raises ValueError for other widths.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be 2 to 8, got {bits}")
    if not 2 <= bn_bits <= 16:
        raise ValueError(f"bn_bits must be 2 to 16, got {bn_bits}")
    of_membrane = partial(
        MembraneQuantizer,
        *(bits, neuron.threshold, membrane_steps_learned, membrane_step_grid(neuron.leak)),
    )
    return Layers(
        image=lambda: ImageQuantizer(image_step),
        stem_conv=partial(QuanConv2d, bits=STEM_BITS),
        conv=partial(QuanConv2d, bits=bits, of_spikes=True),
        stream_conv=partial(QuanConv2d, bits=bits),
        batch_norm=lambda *how: BatchNorm(*how, BatchNormQuantizer(bn_bits)),
        lif_of=lambda neuron: LIF(neuron, of_membrane()),
        # Its deviation is what batch norms start with.
        stream=lambda: StreamQuantizer(bits, deviation=neuron.threshold),
        linear=partial(QuanLinear, bits=LINEAR_BITS),
        neuron=neuron,
    )
