"""NUTS: draws from the posterior of φ itself, the reference that other methods are held against.

Source: M. Hoffman, A. Gelman, "The No-U-Turn Sampler", JMLR 15, 2014, https://arxiv.org/abs/1111.4246, in Pyro's
implementation (multinomial sampling along the trajectory, after M. Betancourt, 2017, https://arxiv.org/abs/1701.02434).

The tasks' u form one flat vector with the potential −Σ_t log p(S_t, u_t | θ), by the same batched density as all other
methods. The mass matrix is diagonal over that vector, hence each task's own; the step size and the length of a
trajectory are shared by the tasks. So the law of a task's draws does not depend on the others in the batch, but their
noise does, and one hard task shortens the steps of all.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from tqdm import tqdm

from bayesmeta.adapt.base import Method, MethodCard
from bayesmeta.adapt.recording import RecordingNUTS
from bayesmeta.data import Observations, TaskBatch
from bayesmeta.errors import NonFiniteDataError, OptionError, ShapeError, UnsupportedError
from bayesmeta.models.theta import GlobalKind
from bayesmeta.ops.random import Seed, forked_rng, normal_like
from bayesmeta.posteriors.base import TaskPosterior
from bayesmeta.posteriors.chains import ChainsPosterior


class NUTS(Method):
    """The posterior of φ given θ by the No-U-Turn sampler; with ``infer_theta`` of the global sites too.

    It trains nothing: train θ by another method and give its program, ``NUTS(method.program)``, which shares θ's
    parameters. Where the program has global sites, ``NUTS(method.program).share_theta(method)`` shares q(θ) too;
    without it, or ``infer_theta``, they stand where a ``global_guide`` of NUTS's own begins.

    A task without support has draws from its prior, by the sampler.

    Args:
        model: a :class:`~bayesmeta.TaskProgram` or a Pyro program; a network needs a prior with a density.
        num_samples: draws kept of each chain.
        warmup: steps of each chain before, in which step size and mass matrix adapt. At least 1.
        num_chains: chains, run one after the other.
        target_accept: average acceptance that the step size is tuned to.
        max_tree_depth: a trajectory has at most 2 to this power steps.
        spread: the chains start at the prior's mean plus this many standard deviations of noise; 0: at the mean.
        infer_theta: sample the program's global sites together with all φ, as one posterior given all tasks of
            ``adapt`` together: then the tasks do depend on one another. For small models.
        progress: show a progress bar.
        global_guide: for global sites, where they are not sampled.

    Raises:
        OptionError: for numbers out of range.
    """

    card = MethodCard(
        assumes="a density of φ: any prior but a Point",
        posterior="draws of several chains: asymptotically exact",
        cost="adapt some thousand gradients; it does not train θ",
        source="Hoffman, Gelman 2014",
    )

    def __init__(
        self,
        model: Any,
        *,
        num_samples: int = 500,
        warmup: int = 500,
        num_chains: int = 4,
        target_accept: float = 0.8,
        max_tree_depth: int = 10,
        spread: float = 0.5,
        infer_theta: bool = False,
        progress: bool = False,
        global_guide: GlobalKind = "point",
    ) -> None:
        super().__init__(model, global_guide=global_guide)
        if min(num_samples, warmup, num_chains, max_tree_depth) < 1:
            raise OptionError(
                "num_samples, warmup, num_chains and max_tree_depth must be at least 1; got "
                f"{num_samples}, {warmup}, {num_chains} and {max_tree_depth}."
            )
        if not 0 < target_accept < 1 or not 0 <= spread < math.inf:
            raise OptionError(
                f"target_accept must lie between 0 and 1, spread be ≥ 0; got {target_accept} and {spread}."
            )
        self.num_samples, self.warmup, self.num_chains = num_samples, warmup, num_chains
        self.target_accept, self.max_tree_depth, self.spread = target_accept, max_tree_depth, spread
        self.infer_theta, self.progress = infer_theta, progress

    def config(self) -> dict[str, Any]:
        """Options that change the result."""
        names = ["num_samples", "warmup", "num_chains", "target_accept", "max_tree_depth", "spread", "infer_theta"]
        return {name: getattr(self, name) for name in names} | {"global_guide": self.global_kind}

    def _create(self, observations: Observations) -> None:
        if self.program.layout.dim == 0:
            raise UnsupportedError("The program has no task parameters, so there is nothing to sample.")
        theta = None if self.theta_guide is None else self.theta_guide.centre().detach()
        self.program.prior_moments(observations, theta)  # a prior without a density is refused
        if self.infer_theta and not self.program.has_theta_sites:
            raise UnsupportedError(
                "infer_theta=True, but the program has no global sites. Its parameters are no random variables; write "
                "those of θ that should be inferred as pyro.sample outside the task plate."
            )

    def share_theta(self, method: Method) -> NUTS:
        """Use another method's posterior over the global sites, now and as it goes on to be trained.

        Raises:
            OptionError: for a method of another program, or one that has seen no data yet.
        """
        if method.program is not self.program:
            raise OptionError(
                "share_theta takes a method of the same program: NUTS(method.program).share_theta(method)."
            )
        if not method._created:
            raise OptionError("The method has not seen data yet, so it has no posterior over θ; train it first.")
        self.theta_guide, self._created = method.theta_guide, True
        self.global_guide, self.global_kind = method.global_guide, method.global_kind
        return self

    # -- adapt --------------------------------------------------------------------------------------------------

    def adapt(
        self,
        support: Observations,
        *,
        generator: Seed = None,
        num_theta: int = 20,
        start: TaskPosterior | None = None,
    ) -> ChainsPosterior:
        """Sample φ given the support of each task.

        Args:
            support: what adaptation may see, ``[tasks, shots, …]``.
            generator: generator or seed; None means seed 0.
            num_theta: draws of θ that φ is sampled given, where the global sites have a Gaussian guide: so many times
                the tasks in one run.
            start: a posterior of the same tasks, by any method, from whose draws the chains start (a warm start).

        Returns:
            A :class:`~bayesmeta.ChainsPosterior`.

        Raises:
            ShapeError: for a start with other tasks or another program's φ.
            NonFiniteDataError: when a chain cannot start, as the density there is not finite.
            NonFiniteDataError, DeviceMismatchError, DataError: as other methods.
        """
        self._warm = start
        try:
            return super().adapt(support, generator=generator, num_theta=num_theta)
        finally:
            self._warm = None

    _warm: TaskPosterior | None = None

    def _adapt(
        self, support: Observations, theta: Tensor | None, generator: torch.Generator, create_graph: bool
    ) -> ChainsPosterior:
        starts = self._starts(support, theta, generator)
        run: list[dict[str, Tensor]] = []
        divergences, step_sizes, stats = [], [], []
        for chain in range(self.num_chains):
            first = {name: value[chain] for name, value in starts.items()}
            draws, diverged, step_size, transitions = self._chain(chain, first, support, theta, generator)
            run.append(draws)
            divergences.append(diverged)
            step_sizes.append(step_size)
            stats.append(transitions)
        u = torch.cat([draws["u"] for draws in run])  # [chains × n, G, tasks, D]
        given = 0 if self.infer_theta or theta is None else theta.shape[0]
        sampled = torch.cat([draws["theta"] for draws in run]).squeeze(1) if self.infer_theta else theta
        if given and sampled is not None:
            sampled = sampled.repeat(len(u), 1)
        like = support.x
        return ChainsPosterior(
            self.program,
            support,
            u.flatten(0, 1),
            sampled,
            divergences=torch.tensor(divergences, device=like.device),
            step_size=torch.tensor(step_sizes, device=like.device, dtype=u.dtype),
            given=given,
            stats=torch.stack(stats),
        )

    def _starts(self, support: Observations, theta: Tensor | None, generator: torch.Generator) -> dict[str, Tensor]:
        """Where each chain starts: u ``[chains, G, tasks, D]``, and theta ``[chains, 1, E]`` where it is sampled."""
        chains, warm, starts = self.num_chains, self._warm, {}
        if self.infer_theta:
            theta = self._theta_starts(support, generator)
            starts["theta"] = theta.unsqueeze(1)
        groups = 1 if theta is None or self.infer_theta else theta.shape[0]
        if warm is not None:
            expected = (support.num_tasks, self.program.layout.dim)
            draws = warm.draws(chains * groups, generator)
            if draws.u.shape[1:] != expected:
                raise ShapeError(
                    f"start has draws of shape {list(draws.u.shape[1:])} (tasks, D); expected {list(expected)}: a "
                    "posterior of the same tasks under the same program."
                )
            starts["u"] = draws.u.detach().to(support.x).reshape(chains, groups, *expected)
            if self.infer_theta and draws.theta is not None:
                starts["theta"] = draws.theta.detach().to(support.x).unsqueeze(1)
            return starts
        with torch.no_grad():
            loc, scale = self.program.prior_moments(support, theta)
        shape = (chains, groups, support.num_tasks, self.program.layout.dim)
        if self.infer_theta:
            loc, scale = loc.unsqueeze(1), scale.unsqueeze(1)
        noise = normal_like(loc, shape, generator)
        starts["u"] = (loc + self.spread * scale * noise).detach()
        return starts

    def _theta_starts(self, support: Observations, generator: torch.Generator) -> Tensor:
        """Starts of the global sites ``[chains, E]``: the prior's median, and noise."""
        _, draws = self.program.sample_prior(100, support, generator)
        assert draws is not None
        loc = draws.median(0).values
        scale = 1.4826 * (draws - loc).abs().median(0).values
        noise = normal_like(loc, (self.num_chains, loc.shape[-1]), generator)
        return loc + self.spread * scale * noise

    def _potential(self, support: Observations, theta: Tensor | None) -> Any:
        def potential(z: dict[str, Tensor]) -> Tensor:
            sites = z["theta"] if self.infer_theta else theta
            value = self.program.log_joint(z["u"], support, sites).sum()
            if self.infer_theta:
                value = value + self.program.log_theta(z["theta"], support, jacobian=True).sum()
            return -value

        return potential

    def _chain(
        self,
        chain: int,
        start: dict[str, Tensor],
        support: Observations,
        theta: Tensor | None,
        generator: torch.Generator,
    ) -> tuple[dict[str, Tensor], int, float, Tensor]:
        """One chain: its draws ``[n, …]`` by name, its diverging transitions, its step size, and all transitions."""
        potential = self._potential(support, theta)
        with torch.no_grad():
            energy = potential(start)
        if not bool(torch.isfinite(energy)):
            raise NonFiniteDataError(
                f"Chain {chain} cannot start: the log-density there is {-float(energy)}. Take a smaller spread, give a "
                "start, or standardise the data."
            )
        sampler = RecordingNUTS(
            potential_fn=potential, target_accept_prob=self.target_accept, max_tree_depth=self.max_tree_depth
        )
        sampler.initial_params = start
        total = self.warmup + self.num_samples
        kept: dict[str, list[Tensor]] = {name: [] for name in start}
        transitions = []
        # blocked: Pyro's sampler draws its momenta as sample sites
        with forked_rng(generator), poutine.block():
            sampler.setup(self.warmup)
            z = start
            for step in tqdm(range(total), desc=f"NUTS, chain {chain}", disable=not self.progress):
                z = sampler.sample(z)
                if step >= self.warmup:
                    for name, value in z.items():
                        kept[name].append(value.detach().clone())
                    transitions.append(sampler.transition)
            diverged = len(sampler.diagnostics()["divergences"])
        draws = {name: torch.stack(values) for name, values in kept.items()}
        return draws, diverged, float(sampler.step_size), torch.stack(transitions)

    def _task_loss(self, batch: TaskBatch, theta: Tensor | None, generator: torch.Generator) -> Tensor:
        raise _no_loss()

    def loss(self, batch: TaskBatch, *, generator: Seed = None) -> Tensor:
        """Refused: NUTS trains nothing.

        Raises:
            UnsupportedError: always.
        """
        raise _no_loss()

    def guide(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Refused: draws have no density.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            "Draws have no density, so NUTS has no Pyro guide; read its posterior with sample or draws."
        )


def _no_loss() -> UnsupportedError:
    return UnsupportedError(
        "NUTS samples φ given θ and has no loss. Train θ with another method, such as ABML, and give its program: "
        "NUTS(method.program) shares θ."
    )
