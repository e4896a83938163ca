"""Adaptive-compute language models in JAX and Flax: a network that decides where to spend its computation.

Mixture-of-Depths (arXiv 2404.02258) decides which tokens each block computes. Start at `mod_star.config.RunConfig`,
which says what a run is, or at the command line: `mod-star --help`.
"""

__version__ = "0.1.0"
