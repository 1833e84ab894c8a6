"""Batch norm over (T, B, H, W) and over all processes, optionally quantized.

torch's SyncBatchNorm needs a GPU; this one runs wherever torch.distributed does, so that one
process and many with the same global batch train the same network.
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import kernels
from kernels import as_pixels, at_least_float32, from_rows
from quantization import GRID, BatchNormQuantizer
from runtime.processes import world_size

ROWS = 256  # values that are added up one after the other


@torch.no_grad()
def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Means (C,) of x (N, C, H, W) and of its square, in float64: there they can be combined
    without losing the variance to cancellation.

    On a CPU torch adds up channels_last values one after the other, and the variance of a million
    is off by 5e-4. Of ROWS values each it is not (`python -m benchmarks.numerics`).
    """
    x = at_least_float32(x)
    if x.device.type != "cpu":
        mean, var = torch.batch_norm_update_stats(x, None, None, 0.0)
        mean = mean.double()
        return mean, torch.addcmul(var.double(), mean, mean)
    pixels = as_pixels(x)
    count, C = pixels.shape
    rows = min(count, ROWS)
    whole = count - count % rows
    # A column of this view is a sample of the pixels: rows values, far from each other.
    first, second = _moments_of_columns(pixels[:whole].reshape(rows, -1), C)
    if whole < count:
        rest, share = _moments_of_columns(pixels[whole:], C), 1 - whole / count
        first, second = first.lerp(rest[0], share), second.lerp(rest[1], share)
    return first, second


def _moments_of_columns(x: Tensor, C: int) -> tuple[Tensor, Tensor]:
    """`moments` of (rows, columns · C), added up row by row, then column by column in float64."""
    mean, var = torch.batch_norm_update_stats(x, None, None, 0.0)
    mean, var = mean.view(-1, C).double(), var.view(-1, C).double()
    return mean.mean(dim=0), var.addcmul_(mean, mean).mean(dim=0)


@torch.no_grad()
def global_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor | int]:
    """Mean and biased variance (C,) of x (N, C, H, W) over all processes, at least in float32, and
    the count of values: a float64 tensor where there are several processes.

    Raises ValueError where there is a single value per channel, which has no variance.
    """
    dtype, count = torch.promote_types(x.dtype, torch.float32), x.numel() // x.shape[1]
    first, second = moments(x)
    if world_size() > 1:
        count = torch.full_like(first[:1], count)
        sums = torch.cat([count * first, count * second, count])
        dist.all_reduce(sums)
        count = sums[-1:]
        first, second = (sums[:-1] / count).chunk(2)
    elif count == 1:
        raise ValueError("batch norm cannot train on a single value per channel")
    return first.to(dtype), torch.addcmul(second, first, first, value=-1).to(dtype), count


class _BatchNorm(torch.autograd.Function):
    """x·scale + shift, whose backward knows that both depend on the batch of all processes.

    Gradients are those of weight·normalized(x) + bias, straight-through where scale and shift are
    quantized.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, folded, statistics, grid):
        mean, inverse_std, ctx.count = statistics
        ctx.save_for_backward(x, weight, mean, inverse_std)
        return from_rows(kernels.affine(as_pixels(x), *folded, grid), x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, mean, inverse_std = ctx.saved_tensors
        pixels, grad_pixels = as_pixels(x), as_pixels(grad)
        grad_bias, sum_products = kernels.gradient_sums(grad_pixels, pixels, mean)
        sums = torch.stack([grad_bias, sum_products]).double()
        if world_size() > 1:
            dist.all_reduce(sums)
        mean_grad, mean_product = (sums / ctx.count).to(mean)
        slope = mean_product * inverse_std.square()
        scale = weight * inverse_std
        grad_x = kernels.gradient_of_input(grad_pixels, pixels, mean, scale, mean_grad, slope)
        grad_weight = sum_products * inverse_std
        return from_rows(grad_x, x), grad_weight, grad_bias, None, None, None


class _PlainBatchNorm(torch.autograd.Function):
    """`_BatchNorm` of one process, without rounding, by torch's own kernels: they are faster."""

    @staticmethod
    def forward(ctx, x, weight, bias, mean, var, eps):
        ctx.save_for_backward(x, weight, mean, torch.rsqrt(var + eps))
        ctx.eps = eps
        return F.batch_norm(x, mean, var, weight, bias, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, mean, inverse_std = ctx.saved_tensors
        grads = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, None, None, mean, inverse_std, True, ctx.eps, [True] * 3
        )
        return *grads, None, None, None


class BatchNorm(nn.BatchNorm2d):
    """y = scale·x + shift per channel, with scale = weight/√(var + eps), shift = bias - scale·mean.

    With a quantizer both folded numbers are quantized and y is rounded to multiples of GRID, in
    training (batch statistics) as in evaluation (running ones), so that both see the same rounding.
    """

    def __init__(self, channels: int, weight: float, quantizer: BatchNormQuantizer | None = None):
        # A quantized one reads integer accumulators. Its scales share a step, so a channel that
        # hardly varies must not get a scale beside which all others round to nothing.
        super().__init__(channels, eps=1e-5 if quantizer is None else 0.25)
        self.quantizer = quantizer
        nn.init.constant_(self.weight, weight)

    def forward(self, x: Tensor, repeats: int = 1) -> Tensor:
        """Normalize x (N, C, H, W), each image standing for `repeats` equal timesteps."""
        grid = None if self.quantizer is None else GRID
        plain = grid is None and repeats == 1 and world_size() == 1
        if grid is None and (not self.training or (plain and x.device.type != "cpu")):
            return super().forward(x)
        if not self.training:
            folded = self.fold(*self.running_statistics())
            # The products of wide layers are exact in float64 only.
            return from_rows(kernels.affine(as_pixels(x), *folded, grid), x)
        mean, var, count = global_statistics(x)
        self._update_running_statistics(mean, var, count * repeats)
        if plain:
            return _PlainBatchNorm.apply(x, self.weight, self.bias, mean, var, self.eps)
        statistics = mean, torch.rsqrt(var + self.eps), count
        return _BatchNorm.apply(x, self.weight, self.bias, self.fold(mean, var), statistics, grid)

    def running_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and variance (C,), in float64: a device's float32 square root may differ from
        another's in its last bit, and now and then a folded scale gets another code for it."""
        return self.running_mean.double(), self.running_var.double()

    @torch.no_grad()
    def _fold(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        scale = self.weight * torch.rsqrt(var + self.eps)
        return scale, self.bias - scale * mean

    def fold(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift (C,) for the given statistics, quantized where there is a quantizer.

        Without gradients: training goes through `_BatchNorm`, whose backward has its own.
        """
        folded = self._fold(mean, var)
        return folded if self.quantizer is None else self.quantizer(*folded)

    def codes(self, mean: Tensor, var: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        """The quantizer's integer codes and steps of scale and shift for the given statistics."""
        return self.quantizer.codes(*self._fold(mean, var))

    @torch.no_grad()
    def _update_running_statistics(self, mean: Tensor, var: Tensor, count: Tensor | int) -> None:
        self.num_batches_tracked += 1
        ratio = count / (count - 1)
        unbiased = var * (ratio.to(var) if isinstance(ratio, Tensor) else ratio)
        self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
        self.running_var.lerp_(unbiased.to(self.running_var), self.momentum)


@torch.no_grad()
def estimate_statistics(
    network: nn.Module, batches: Sequence[Tensor], time_windows: Sequence[int]
) -> None:
    """Set the running statistics of all batch norms to the means of those of `batches` of images,
    as they are with the weights of now; of each T of `time_windows` in turn, equally often.

    Those gathered while training are means over weights of before: where steps are large, a network
    of 2 bits evaluates with them at two thirds of the accuracy that its weights have.
    """
    layers = [module for module in network.modules() if isinstance(module, BatchNorm)]
    momenta = [layer.momentum for layer in layers]
    network.train()
    rounds = math.ceil(len(batches) / len(time_windows))
    for number in range(rounds * len(time_windows)):
        for layer in layers:
            layer.momentum = 1 / (number + 1)
        with network.running_for(time_windows[number % len(time_windows)]):
            network(batches[number % len(batches)])
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum


class FoldedBatchNorm(nn.Module):
    """In the place of a batch norm that the convolution before it contains."""

    def forward(self, x: Tensor, repeats: int = 1) -> Tensor:
        return x
