"""A description as a torch module of plain operations: what `torch.export` is given."""

import io
import json

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .description import Description, Operation


class Plain(nn.Module):
    """Computes what the network computes, with its numbers as constants and T unrolled.

    All is float: whole numbers below 2^24 are exact in float32; batch norm's products and the
    classifier's sums are taken in float64.
    """

    def __init__(self, description: Description):
        super().__init__()
        self.description = description
        for operation in description.operations:
            wide = operation.kind in ("norm", "head")
            for name, value in operation.numbers.items():
                if hasattr(value, "dtype"):
                    tensor = torch.tensor(value).to(torch.float64 if wide else torch.float32)
                    self.register_buffer(self._buffer(operation, name), tensor)

    def _buffer(self, operation: Operation, name: str) -> str:
        return f"{operation.name}.{name}".replace(".", "_")

    def _number(self, operation: Operation, name: str) -> Tensor:
        return self.get_buffer(self._buffer(operation, name))

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (B, K) float64, and the spikes (T·B, C, H, W) of each LIF layer by its name."""
        values: dict[str, Tensor] = {}
        spikes: dict[str, Tensor] = {}
        for operation in self.description.operations:
            inputs = [values[name] for name in operation.reads] or [images]
            x = getattr(self, f"_{operation.kind}")(operation, *inputs)
            values[operation.name] = x
            if operation.kind == "lif":
                spikes[operation.name] = x
        return x, spikes

    def _image(self, operation: Operation, x: Tensor) -> Tensor:
        return x.transpose(0, 1).flatten(0, 1) if self.description.takes_frames else x

    def _codes(self, operation: Operation, x: Tensor) -> Tensor:
        step, low, high = (operation.numbers[name] for name in ("step", "low", "high"))
        return torch.round(x / step).clamp(low, high)

    def _conv(self, operation: Operation, x: Tensor) -> Tensor:
        numbers = operation.numbers
        bias = self._number(operation, "bias") if "bias" in numbers else None
        weight = self._number(operation, "weight")
        return F.conv2d(x, weight, bias, numbers["stride"], numbers["padding"][:2])

    def _norm(self, operation: Operation, x: Tensor) -> Tensor:
        scale, shift = self._number(operation, "scale"), self._number(operation, "shift")
        return torch.round((x.double() * scale + shift) / operation.numbers["divisor"]).float()

    def _repeat(self, operation: Operation, x: Tensor) -> Tensor:
        return torch.cat([x] * self.description.time_window)

    def _add(self, operation: Operation, x: Tensor, y: Tensor) -> Tensor:
        return x + y

    def _pool(self, operation: Operation, x: Tensor) -> Tensor:
        top, left, bottom, right = operation.numbers["padding"]
        padded = F.pad(x, (left, right, top, bottom))
        return F.max_pool2d(padded, operation.numbers["kernel"], operation.numbers["stride"])

    def _lif(self, operation: Operation, x: Tensor) -> Tensor:
        numbers = operation.numbers
        leak, threshold, hard = numbers["leak"], numbers["threshold"], numbers["reset"] == "hard"
        fired: list[Tensor] = []
        kept = x[:0]
        for u in x.unflatten(0, (self.description.time_window, -1)).unbind(0):
            if fired:
                left = kept * (1 - fired[-1]) if hard else kept - threshold * fired[-1]
                u = u + leak * left
            if "step" in numbers:
                u = self._codes(operation, u) * numbers["step"]
            fired.append((u > threshold).float())
            kept = u
        return torch.cat(fired)

    def _head(self, operation: Operation, spikes: Tensor) -> Tensor:
        counts = spikes.unflatten(0, (self.description.time_window, -1)).sum(dim=(0, 3, 4))
        products = counts.double() @ self._number(operation, "weight").T
        if "step" in operation.numbers:
            products = products * self._number(operation, "step")
        return products / operation.numbers["positions"] + self._number(operation, "bias")


def torch_file(description: Description) -> bytes:
    """The contents of a file of `torch.export`: the program, for any number of images."""
    sample = torch.zeros(2, *description.input_shape)
    how = {"dynamic_shapes": ({0: torch.export.Dim("batch")},), "strict": False}
    program = torch.export.export(Plain(description), (sample,), **how)
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={"about.json": json.dumps(description.about)})
    return buffer.getvalue()
