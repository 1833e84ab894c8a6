"""Non-ideal inference: a trained quantized network computed by memristor crossbars (SpikeSim, arXiv
2210.12899, calls its engine NICE).

Integer weights become columns of c-bit cells, inputs drive rows bit by bit, and every crossbar's
column is read by its own ADC:

    weight code -> differential or offset columns -> c-bit slices -> conductances with an off-state
    and Gaussian variation -> wire resistance -> partial sum of at most `xbar_size` rows -> ADC
    -> shift-add over slices, input bits and crossbars -> digital correction

and the rest of the network, the LIF neurons' state included, is the digital one. As in the
estimate, each of a convolution's k² kernel positions has crossbars of its own. Conductances and
partial sums are in units of one cell step, the difference between neighbouring levels of a cell.
"""

import copy
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from display import percent, run_at
from load_settings import load_checkpoint, load_network

from .crossbar import Crossbar, check_weight_fits, weights_per_row
from .layers import InputError, Layer, Network, check_int
from .trace import describe, evaluation_data

LARGEST_WORKSPACE = 2**25  # partial sums held at once
MOST_TRIALS = 10**6
SMALL_BIAS = 1e-3  # of the mean conductance, not worth a word


def slices_of(codes: Tensor, bits: int, cell_bits: int) -> Tensor:
    """Base-2^c digits of non-negative integers: (..., slices), least significant first."""
    digits = [(codes >> shift) & (2**cell_bits - 1) for shift in range(0, bits, cell_bits)]
    return torch.stack(digits, dim=-1)


def ladder(conductance: Tensor, wire: float) -> Tensor:
    """What each row's voltage adds to each column's current, with resistive wires.

    `conductance` (..., rows, columns) of the cells; `wire` is the conductance of one wire segment,
    in the same unit. Rows are driven from the left, columns are sensed at the bottom by virtual
    grounds: one segment from driver to first cell, one between neighbours, one to the ground. The
    result, of the same shape, is linear in the voltages, so it takes the place of the conductances.

    Nodes of a row are eliminated first, which leaves a block-tridiagonal system over the column
    nodes; of its solution only the last block, at the sensing end, is needed. In float64.
    """
    g = conductance.double()
    rows, columns = g.shape[-2:]
    identity = torch.eye(columns, dtype=g.dtype, device=g.device)
    along_row = 2 * wire * identity
    along_row[-1, -1] = wire  # the last cell of a row has no neighbour to its right
    neighbours = torch.ones(columns - 1, dtype=g.dtype, device=g.device)
    along_row = along_row - wire * (neighbours.diag(1) + neighbours.diag(-1))
    drive = torch.zeros(columns, 1, dtype=g.dtype, device=g.device)
    drive[0] = wire

    blocks = right_sides = None
    for i in range(rows):
        cells = g[..., i, :]
        # row nodes = A⁻¹ (cells · column nodes + drive), put into the column nodes' equations
        a = along_row + torch.diag_embed(cells)
        through = cells[..., None] * torch.linalg.solve(
            a, torch.cat([torch.diag_embed(cells), drive.expand(*cells.shape, 1)], dim=-1)
        )
        segments = 1 if i == 0 else 2  # every column node has one below, all but the first above
        block = torch.diag_embed(cells) + segments * wire * identity - through[..., :-1]
        right = torch.zeros_like(g.mT)
        right[..., i] = through[..., -1]
        if i > 0:
            both = torch.cat([wire * identity.expand_as(blocks), right_sides], dim=-1)
            solved = wire * torch.linalg.solve(blocks, both)
            block = block - solved[..., :columns]
            right = right + solved[..., columns:]
        blocks, right_sides = block, right
    return wire * torch.linalg.solve(blocks, right_sides).mT


class CrossbarLayer:
    """One convolution or linear layer on crossbars; called with integer inputs, it returns what the
    digital side takes for the integer sums.

    Args:
        codes: integer weights (O, I, k, k), at least 2 bits.
        weight_bits, input_bits: their width, and that of an input value, fed bit by bit.
        signed_input: whether inputs are in two's complement, as the residual stream's codes.
        stride, padding: of the convolution.
        crossbar: the options.
        generator: for the cells' variation.
    """

    def __init__(
        self,
        codes: Tensor,
        weight_bits: int,
        input_bits: int,
        signed_input: bool,
        stride: tuple[int, int],
        padding: tuple[int, int],
        crossbar: Crossbar,
        generator: torch.Generator | None = None,
    ):
        self.crossbar, self.stride, self.padding = crossbar, stride, padding
        self.codes, self.input_bits, self.signed_input = codes.double(), input_bits, signed_input
        out_channels, in_channels, *self.kernel = codes.shape
        self.in_channels = in_channels
        self.rows = min(crossbar.xbar_size, in_channels)
        self.groups = math.ceil(in_channels / self.rows)

        largest = 2 ** (weight_bits - 1) - 1
        codes = codes.long()
        if crossbar.columns == "differential":
            stored, bits, self.offset = (
                [codes.clamp_min(0), (-codes).clamp_min(0)],
                weight_bits - 1,
                0,
            )
        else:
            stored, bits, self.offset = [codes + largest], weight_bits, largest
        self.cell_bits = min(crossbar.cell_bits, bits)
        self.levels = 2**self.cell_bits - 1  # the highest; the lowest is 0
        self.off_conductance = self.levels / (crossbar.on_off_ratio - 1)  # in cell steps
        check_weight_fits("a layer", bits, self.cell_bits, crossbar.xbar_size)
        self.per_row = weights_per_row(bits, self.cell_bits, crossbar.xbar_size)
        self.cells = [self._cells(x, bits, generator) for x in stored]
        slices = self.cells[0].shape[-1] // out_channels
        self.slice_weights = 2.0 ** (self.cell_bits * torch.arange(slices)).double()

        self.largest_sum = self.clipped = self.partial_sums = 0
        self.squared_error = self.squared_output = 0.0

    def _cells(self, codes: Tensor, bits: int, generator: torch.Generator | None) -> Tensor:
        """Conductances (k²·groups, rows, O·slices) in cell steps, as the ADCs see them."""
        crossbar = self.crossbar
        digits = slices_of(codes, bits, self.cell_bits)  # (O, I, k, k, slices)
        columns = self.per_row * digits.shape[-1]  # of a crossbar that is full
        digits = digits.permute(2, 3, 1, 0, 4).flatten(3)  # (k, k, I, O·slices)
        cells = digits.float() + self.off_conductance
        if crossbar.sigma:
            noise = torch.randn(cells.shape, generator=generator)
            cells = (cells * (1 + crossbar.sigma * noise)).clamp_min(0)
        missing = self.groups * self.rows - self.in_channels
        cells = F.pad(cells, (0, 0, 0, missing))  # rows that no channel uses stay unselected
        cells = cells.flatten(0, 1).unflatten(1, (self.groups, self.rows)).flatten(0, 1)
        if crossbar.wire_ohm:
            highest = (2**crossbar.cell_bits - 1) / crossbar.on_ohm  # of the cell's own levels
            cell_step = highest / (self.levels + self.off_conductance)
            wire = 1 / (crossbar.wire_ohm * cell_step)
            arrays = cells.split(columns, dim=-1)
            cells = torch.cat([ladder(array, wire) for array in arrays], dim=-1).float()
        return cells

    @property
    def adc_step(self) -> float:
        """What one code of the ADC stands for, in cell steps."""
        crossbar = self.crossbar
        if crossbar.adc_range == "unit":
            return 1.0
        full = self.rows * (self.levels + self.off_conductance)
        return max(1.0, full / (2**crossbar.adc_bits - 1))

    def _read(self, active: Tensor) -> Tensor:
        """(O, columns of active) of 0/1 row inputs `active` (k²·groups, rows, columns)."""
        result: Tensor | float = 0.0
        for cells, sign in zip(self.cells, (1, -1), strict=False):
            sums = cells.mT @ active
            self.largest_sum = max(self.largest_sum, sums.max().item())
            self.partial_sums += sums.numel()
            if self.crossbar.adc_bits is not None:
                step, largest_code = self.adc_step, 2**self.crossbar.adc_bits - 1
                sums = sums.div_(step).round_()
                self.clipped += (sums > largest_code).sum().item()
                sums = sums.clamp_(max=largest_code).mul_(step)
            # beyond 24 bits float32 would round what shift-add keeps
            by_slice = sums.sum(dim=0).double().unflatten(0, (-1, len(self.slice_weights)))
            result = result + sign * torch.einsum("osl,s->ol", by_slice, self.slice_weights)
        if self.crossbar.columns == "offset":
            # every stored weight is Q too large, and every active cell leaks its off-state
            leak = self.off_conductance * self.slice_weights.sum().item()
            result = result - (self.offset + leak) * active.sum(dim=(0, 1))
        return result

    def __call__(self, x: Tensor) -> Tensor:
        """Sums (N, O, H', W') of integer inputs x (N, I, H, W), in the dtype of x."""
        ideal = F.conv2d(x.double(), self.codes, None, self.stride, self.padding)
        per_image = self.cells[0].numel() // self.rows * ideal[0, 0].numel()
        chunk = max(1, LARGEST_WORKSPACE // per_image)
        sums = torch.cat([self._sums(part, ideal.shape[2:]) for part in x.split(chunk)])
        self.squared_error += (sums - ideal).square().sum().item()
        self.squared_output += ideal.square().sum().item()
        return sums.to(x.dtype)

    def _sums(self, x: Tensor, size: torch.Size) -> Tensor:
        patches = F.unfold(x.float(), self.kernel, padding=self.padding, stride=self.stride)
        patches = patches.unflatten(1, (self.in_channels, -1)).permute(2, 1, 0, 3).flatten(2)
        missing = self.groups * self.rows - self.in_channels
        patches = F.pad(patches, (0, 0, 0, missing))
        patches = patches.unflatten(1, (self.groups, self.rows)).flatten(0, 1)
        if self.input_bits == 1:
            sums = self._read(patches)
        else:
            codes, sums = patches.long(), 0.0
            for bit in range(self.input_bits):
                is_sign = self.signed_input and bit == self.input_bits - 1
                value = -(2.0**bit) if is_sign else 2.0**bit
                sums = sums + value * self._read(((codes >> bit) & 1).float())
        return sums.unflatten(1, (len(x), -1)).permute(1, 0, 2).unflatten(2, size)

    @property
    def relative_error(self) -> float:
        """Root mean square of what the sums are off, relative to that of the sums."""
        return math.sqrt(self.squared_error / self.squared_output) if self.squared_output else 0.0

    @property
    def unclipped_adc_bits(self) -> int:
        """ADC bits that, a code being one cell step, would have clipped none of these sums."""
        return max(1, math.ceil(self.largest_sum)).bit_length()


def on_crossbars(
    network: nn.Module,
    description: Network,
    crossbar: Crossbar,
    seed: int,
    only: Iterable[str] | None = None,
) -> tuple[nn.Module, dict[str, CrossbarLayer]]:
    """A copy of a trained quantized network whose layers run on crossbars, and these layers by
    name; with `only`, no others than those. `description` is the network's own layer list.
    """
    network = copy.deepcopy(network).eval()
    layers: dict[str, CrossbarLayer] = {}
    bar = tqdm(description.layers, "wires", leave=False, disable=not crossbar.wire_ohm or None)
    for index, layer in enumerate(bar):
        if only is not None and layer.name not in only:
            continue
        module = network.get_submodule(layer.name)
        generator = torch.Generator().manual_seed(seed * len(description.layers) + index)
        layers[layer.name] = _place(module, layer, description, crossbar, generator)
    return network, layers


def _place(
    module: nn.Module,
    layer: Layer,
    description: Network,
    crossbar: Crossbar,
    generator: torch.Generator,
) -> CrossbarLayer:
    """Let crossbars compute what `module` computes."""
    codes, step = module.quantizer.codes(module.weight)
    placed = CrossbarLayer(
        codes[..., None, None] if layer.linear else codes,
        description.weight_bits_of(layer),
        description.input_bits(layer),
        description.reads_stream(layer),
        (1, 1) if layer.linear else module.stride,
        (0, 0) if layer.linear else module.padding,
        crossbar,
        generator,
    )
    if not layer.linear:
        module.forward = placed
        return placed
    positions = description.time_steps * math.prod(layer.in_size)

    def linear(mean_spikes: Tensor) -> Tensor:
        counts = (mean_spikes * positions).round()[..., None, None]
        return placed(counts).flatten(1) / positions * step.T + module.bias

    module.forward = linear
    return placed


@torch.no_grad()
def accuracy_of(network: nn.Module, batches: DataLoader, label: str) -> float:
    """Share of the test images."""
    correct = total = 0
    for images, labels in tqdm(batches, label, leave=False, disable=None):
        correct += (network(images).argmax(1) == labels).sum().item()
        total += len(labels)
    return correct / total


def nonideal_report(
    path: str,
    data_path: str | None,
    crossbar: Crossbar,
    seed: int = 0,
    trials: int = 1,
    each_layer: bool = False,
    time_steps: int | None = None,
) -> dict[str, Any]:
    """Accuracy of a checkpoint on such crossbars, over `trials` draws of its cells, and where it is
    lost; with `each_layer` also the accuracy with a single layer on them. `time_steps` is T, where
    it is not the trained one.

    Raises InputError for a full-precision checkpoint, missing data and numbers that make no sense,
    load_settings.UserError where checkpoint or data cannot be read.
    """
    check_int(trials, "trials", MOST_TRIALS)
    if not 0 <= seed <= 10**9:
        raise InputError(f"seed must be a whole number from 0 to {10**9}, got {seed}")
    if time_steps is not None:
        check_int(time_steps, "time_steps", 1024)
    checkpoint = load_checkpoint(path)
    settings, network = checkpoint.settings, load_network(checkpoint, time_steps)
    if settings.bits is None:
        raise InputError(f"{path} is a full-precision network: crossbars hold integers")
    batches = evaluation_data(checkpoint, data_path, time_steps)
    if batches is None:
        raise InputError(f"accuracy on {settings.data} is measured: give --data_path")
    description = describe(network, settings, {})
    digital = accuracy_of(network, batches, "digital")

    # What an ADC must reach to is what the digital network's sums are, not those of a broken one.
    ideal = replace(crossbar, adc_bits=None, sigma=0.0, wire_ohm=0.0)
    placed, needed = on_crossbars(network, description, ideal, seed)
    accuracy_of(placed, batches, "ADC range")

    trials = trials if crossbar.is_random else 1  # without variation all are the same
    first_draw = seed * MOST_TRIALS
    accuracies, runs = [], []
    for trial in range(trials):
        placed, layers = on_crossbars(network, description, crossbar, first_draw + trial)
        accuracies.append(accuracy_of(placed, batches, f"trial {trial + 1} of {trials}"))
        runs.append(layers)
    rows = [layer_row(name, [layers[name] for layers in runs], needed[name]) for name in needed]
    if each_layer:  # with the first draw
        for row in rows:
            placed, _ = on_crossbars(
                network, description, crossbar, first_draw, only=[row["layer"]]
            )
            row["accuracy_alone"] = accuracy_of(placed, batches, row["layer"])
    return {
        "checkpoint": str(path),
        "crossbar": asdict(crossbar) | {"on_off_ratio": str(crossbar.on_off_ratio)},
        "variation_bias": crossbar.variation_bias,
        "seed": seed,
        "time_steps": network.time_window,
        "trained_time_steps": settings.trained_at,
        "digital_accuracy": digital,
        "accuracy_mean": statistics.mean(accuracies),
        "accuracy_std": statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0,
        "accuracies": accuracies,
        "unclipped_adc_bits": max(row["unclipped_adc_bits"] for row in rows),
        "layers": rows,
    }


def layer_row(name: str, runs: Sequence[CrossbarLayer], needed: CrossbarLayer) -> dict[str, Any]:
    """One layer over all trials; sums, in cell steps, are those of the digital network."""
    return {
        "layer": name,
        "relative_error": statistics.mean(layer.relative_error for layer in runs),
        "clipped_share": statistics.mean(layer.clipped / layer.partial_sums for layer in runs),
        "largest_sum_cell_steps": needed.largest_sum,
        "unclipped_adc_bits": needed.unclipped_adc_bits,
    }


def nonideal_text(report: dict[str, Any]) -> str:
    """For the terminal."""
    lost = 100 * (report["digital_accuracy"] - report["accuracy_mean"])
    lines = [
        f"digital accuracy {percent(report['digital_accuracy'], 2)}; on crossbars "
        f"{100 * report['accuracy_mean']:.2f} ± {percent(report['accuracy_std'], 2)} "
        f"({len(report['accuracies'])} trials, {lost:.2f} points lost)",
        *run_at(report["time_steps"], report["trained_time_steps"]),
        "layers that hurt most (root mean square error, relative to their sums):",
    ]
    by_error = sorted(report["layers"], key=lambda row: -row["relative_error"])
    worst = sorted(by_error, key=lambda row: row.get("accuracy_alone", 0.0))[:5]
    for row in worst:
        alone = f", alone {percent(row['accuracy_alone'], 2)}" if "accuracy_alone" in row else ""
        lines.append(
            f"  {row['layer']}: {percent(row['relative_error'])}, "
            f"{percent(row['clipped_share'])} of partial sums clipped{alone}"
        )
    if report["variation_bias"] > SMALL_BIAS:
        lines.append(
            f"sigma {report['crossbar']['sigma']:g} would make some conductances negative: they "
            "are set to 0, which raises the mean conductance by "
            f"{percent(report['variation_bias'])}"
        )
    if report["crossbar"]["adc_bits"] is not None and lost > 0:
        lines.append(
            "an ADC that clips none of the digital network's sums: --adc_bits "
            f"{report['unclipped_adc_bits']} --adc_range unit"
        )
    return "\n".join(lines)
