"""Pyro's No-U-Turn sampler, which says of each transition what ArviZ asks of a sampler."""

from __future__ import annotations

from typing import Any

import torch
from pyro.infer.mcmc import NUTS as PyroNUTS
from torch import Tensor


class RecordingNUTS(PyroNUTS):
    """Pyro's sampler, draw for draw, that remembers its last transition.

    Attributes:
        transition: numbers of the last transition in the order of :data:`~bayesmeta.posteriors.chains.CHAIN_STATS`,
            ``[8]`` float64.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.transition = torch.zeros(8, dtype=torch.float64)
        self._nested = 0
        self._trees: list[Any] = []
        self._energy = torch.nan

    def _build_tree(self, *args: Any, **kwargs: Any) -> Any:
        """One doubling of the trajectory; a doubling builds its own parts by this method, which do not count again."""
        self._nested += 1
        try:
            tree = super()._build_tree(*args, **kwargs)
        finally:
            self._nested -= 1
        if not self._nested:
            self._trees.append(tree)
            self._energy = float(args[-1])  # the Hamiltonian of the start, with its fresh momentum
        return tree

    def sample(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """One transition."""
        self._trees = []
        z = super().sample(params)
        _, potential, _ = self._fetch_from_cache()
        steps = sum(tree.num_proposals for tree in self._trees)
        depth = sum(not (tree.turning or tree.diverging) for tree in self._trees)
        accepted = sum(float(tree.sum_accept_probs) for tree in self._trees) / max(steps, 1)
        diverging = any(bool(tree.diverging) for tree in self._trees)
        deepest = depth >= self._max_tree_depth
        parts = [accepted, diverging, self._energy, -float(potential), steps, deepest, float(self.step_size), depth]
        self.transition = torch.tensor([float(part) for part in parts], dtype=torch.float64)
        return z
