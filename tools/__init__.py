"""The science: pure functions on tensors, without files, printing or global random state.

Conventions: images are (N, C, H, W) float32 in [0, 1]; labels (N,) int64; logits (N, K); eps and step sizes are in
units of [0, 1] pixels, L2 norms are of the whole image. Device and dtype are those of the inputs. Every random number
is a function of (seed, purpose, example id, draw), see `rbkit.tools.random`.
"""
