"""SpikeSim hardware estimate: energy, area and delay of a spiking network on in-memory crossbars.

`Chip` describes a chip, `estimate` prices a layer list on it and `nonideal` simulates a trained
network there; `published` repeats the published tool figure by figure.
Source: Moitra et al., SpikeSim, arXiv 2210.12899. Run `python -m spikesim_eval --help`.
"""

from .chip import Chip, chips
from .estimate import estimate
from .layer_list import load_layer_list

__all__ = ["Chip", "chips", "estimate", "load_layer_list"]
