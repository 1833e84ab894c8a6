"""The weights of a checkpoint as safetensors, with what it takes to build their network."""

import json
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor


def safetensors_file(weights: dict[str, Tensor], about: dict[str, Any]) -> bytes:
    """The contents of the file."""
    # It refuses channels_last, in which the weights lie.
    plain = {
        name: x.contiguous(memory_format=torch.contiguous_format) for name, x in weights.items()
    }
    return save(plain, {"about": json.dumps(about)})
