"""Tensor mathematics without Pyro: randomness, Gaussian algebra, batched networks."""
