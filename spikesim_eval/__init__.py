from .chip import Chip, chips
from .estimate import estimate
from .layer_list import load_layer_list

__all__ = ["Chip", "chips", "estimate", "load_layer_list"]
