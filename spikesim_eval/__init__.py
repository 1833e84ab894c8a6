"""SpikeSim hardware estimate: energy, area and delay of a spiking network on in-memory crossbars.

`published` repeats the published tool figure by figure; `estimate` is the network model that keeps
its components and drops its limits; `layers` reads the list of layers both of them work from.
Source: Moitra et al., SpikeSim, arXiv 2210.12899. Run `python -m spikesim_eval --help`.
"""
