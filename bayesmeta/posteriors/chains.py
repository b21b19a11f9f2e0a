"""Draws of several Markov chains, with what says whether they have met."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesmeta.data import Observations
from bayesmeta.errors import OptionError, ShapeError
from bayesmeta.models.program import TaskProgram
from bayesmeta.posteriors.samples import SamplesPosterior

#: What is kept of each transition, by ArviZ's names: the mean acceptance along the trajectory; whether it diverged; the
#: Hamiltonian that it began with; log p(S, u) (with θ's prior where θ is sampled) at the draw, summed over the tasks;
#: leapfrog steps; whether the tree was as deep as it may be; step size; doublings of the trajectory.
CHAIN_STATS = (
    "acceptance_rate", "diverging", "energy", "lp", "n_steps", "reached_max_treedepth", "step_size", "tree_depth",
)  # fmt: skip


#: R-hat above this says that chains have not met, by the strict rule of Vehtari et al. (2021).
_STRICT = 1.01


@dataclass(frozen=True, eq=False)
class ChainDiagnostics:
    """Convergence of chains, of each number of u and of θ.

    With several draws of θ that φ was sampled given, the worst of them.

    Attributes:
        rhat: rank-normalised split R-hat of u, ``[tasks, D]``; near 1 when the chains have met (1.01 is strict). NaN
            with fewer than 4 draws a chain.
        ess: bulk effective sample size of u, ``[tasks, D]``, over all chains.
        rhat_theta, ess_theta: likewise of sampled global sites, ``[E]``; None where θ was given.
        divergences: number of diverging transitions of each chain, ``[chains]``.
        step_size: the step size of each chain after warm-up, ``[chains]``.
    """

    rhat: Tensor
    ess: Tensor
    rhat_theta: Tensor | None
    ess_theta: Tensor | None
    divergences: Tensor
    step_size: Tensor

    @property
    def max_rhat(self) -> float:
        """The largest R-hat of all."""
        values = [self.rhat.flatten()] + ([] if self.rhat_theta is None else [self.rhat_theta])
        return float(torch.cat(values).max())

    @property
    def min_ess(self) -> float:
        """The smallest effective sample size of all."""
        values = [self.ess.flatten()] + ([] if self.ess_theta is None else [self.ess_theta])
        return float(torch.cat(values).min())

    def __str__(self) -> str:
        chains, diverged = len(self.divergences), int(self.divergences.sum())
        tasks, size = self.rhat.shape
        theta = "" if self.rhat_theta is None else f" and {len(self.rhat_theta)} numbers of θ"
        high = int((self.rhat > _STRICT).sum()) + (
            0 if self.rhat_theta is None else int((self.rhat_theta > _STRICT).sum())
        )
        steps = ", ".join(f"{step:.3g}" for step in self.step_size.tolist())
        return (
            f"{chains} chain{'' if chains == 1 else 's'}, {tasks} tasks of {size} numbers{theta}: R-hat up to "
            f"{self.max_rhat:.3f} ({high} above {_STRICT}), bulk effective sample size from {self.min_ess:.0f}; "
            f"{diverged} transition{'' if diverged == 1 else 's'} diverged; step size {steps}"
        )

    def __repr__(self) -> str:
        return f"<ChainDiagnostics: {self}>"


class ChainsPosterior(SamplesPosterior):
    """Draws of φ (and θ) from several chains of one length, chain after chain.

    R-hat and effective sample size follow A. Vehtari, A. Gelman, D. Simpson, B. Carpenter, P.-C. Bürkner,
    "Rank-normalization, folding, and localization", Bayesian Analysis 16, 2021, https://arxiv.org/abs/1903.08008, as in
    arviz_stats.

    Args:
        program: the model.
        support: what was conditioned on.
        u: unconstrained draws, ``[chains × n × G, tasks, D]``, G draws of the given θ fastest.
        theta: unconstrained global sites, ``[chains × n × G, E]``.
        divergences: diverging transitions of each chain, ``[chains]``.
        step_size: step size of each chain after warm-up, ``[chains]``.
        given: G, how many draws of θ φ was sampled given; 0 where θ was sampled itself, or where there is none. An
            integer or a tensor with one.
        stats: of each transition, ``[chains, n, 8]`` in the order of :data:`CHAIN_STATS`; None where nobody kept them.

    Raises:
        OptionError: for draws that do not part into the chains.
        ShapeError: for stats of another shape.
    """

    def __init__(
        self,
        program: TaskProgram,
        support: Observations,
        u: Tensor,
        theta: Tensor | None = None,
        *,
        divergences: Tensor,
        step_size: Tensor,
        given: int | Tensor = 0,
        stats: Tensor | None = None,
    ) -> None:
        super().__init__(program, support, u, theta)
        self.divergences, self.step_size, self.given = divergences, step_size, int(given)
        per_chain = len(divergences) * max(self.given, 1)
        if len(u) % per_chain:
            raise OptionError(f"{len(u)} draws do not part into {len(divergences)} chains of {max(self.given, 1)} θ.")
        expected = (len(divergences), len(u) // per_chain, len(CHAIN_STATS))
        if stats is not None and stats.shape != expected:
            raise ShapeError(
                f"stats has shape {list(stats.shape)}; expected [chains, draws, {len(CHAIN_STATS)}] = {list(expected)}."
            )
        self.transitions = stats
        self.theta_is_inferred = theta is not None and not self.given

    @property
    def num_chains(self) -> int:  # type: ignore[override]  # the chains of a sampler are counted
        """Number of chains."""
        return len(self.divergences)

    def _stats(self) -> Mapping[str, Tensor] | None:
        """Of the transition that each draw of φ comes from, ``[chains × n × G]``."""
        if self.transitions is None:
            return None
        each = self.transitions.flatten(0, 1).repeat_interleave(max(self.given, 1), 0)
        kinds = {"diverging": torch.bool, "reached_max_treedepth": torch.bool}
        kinds |= {"n_steps": torch.int64, "tree_depth": torch.int64}
        return {
            name: part.to(kinds.get(name, part.dtype)) for name, part in zip(CHAIN_STATS, each.unbind(-1), strict=True)
        }

    def chains(self) -> Tensor:
        """The draws of u by chain, ``[chains, n, tasks, D]``, or ``[chains, n, G, tasks, D]`` with G given θ."""
        lead = (self.num_chains, -1) + ((self.given,) if self.given else ())
        return self.u.reshape(*lead, *self.u.shape[1:])

    def diagnostics(self) -> ChainDiagnostics:
        """R-hat and effective sample size of every number, divergences and step sizes."""
        rhat, ess = _convergence(self.chains())
        if self.given:
            rhat, ess = rhat.amax(0), ess.amin(0)
        rhat_theta = ess_theta = None
        if self.theta is not None and not self.given:
            rhat_theta, ess_theta = _convergence(self.theta.reshape(self.num_chains, -1, self.theta.shape[-1]))
        return ChainDiagnostics(rhat, ess, rhat_theta, ess_theta, self.divergences, self.step_size)

    def state(self) -> dict[str, Tensor]:
        """u, theta where there is one, and what is known of the chains."""
        given = torch.tensor(self.given)
        known = {"divergences": self.divergences, "step_size": self.step_size, "given": given}
        return super().state() | known | ({} if self.transitions is None else {"stats": self.transitions})


def _convergence(draws: Tensor) -> tuple[Tensor, Tensor]:
    """R-hat and bulk effective sample size of draws ``[chains, n, …]``, each ``[…]`` in float64."""
    from arviz_stats.base import array_stats

    values = draws.double().cpu().numpy()
    if values.shape[1] < 4:  # not defined: half a chain has one draw
        nan = torch.full(draws.shape[2:], torch.nan, dtype=torch.float64)
        return nan, nan.clone()
    rhat = array_stats.rhat(values, chain_axis=0, draw_axis=1, method="rank")
    ess = array_stats.ess(values, chain_axis=0, draw_axis=1, method="bulk")
    return torch.as_tensor(rhat, dtype=torch.float64), torch.as_tensor(ess, dtype=torch.float64)
