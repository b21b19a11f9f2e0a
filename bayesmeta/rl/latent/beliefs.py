"""Beliefs over time: q(z | what has happened so far) of some tasks, each of which is a posterior.

At every step a belief is a :class:`~bayesmeta.posteriors.gaussian.NormalPosterior` over the decoder's program whose
support is the context so far, so that whatever is asked of a posterior of supervised tasks can be asked of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bayesmeta.data import Observations
from bayesmeta.diagnostics.datatree_groups import library_attributes
from bayesmeta.errors import ContextError, OptionError, ShapeError
from bayesmeta.models.program import TaskProgram
from bayesmeta.ops.random import Seed, as_generator, normal_like
from bayesmeta.posteriors.gaussian import NormalPosterior
from bayesmeta.rl.latent.contexts import prefix
from bayesmeta.rl.latent.core import SITE, LatentContext

if TYPE_CHECKING:
    from xarray import DataTree

#: Variables by group and name: their dimensions and values.
_Groups = dict[str, dict[str, tuple[tuple[str, ...], np.ndarray]]]
_TAKEN = frozenset({"chain", "draw", "task", "step", "transition", "latent", "feature", "output", "loc", "scale", "kl"})


def told_apart(loc: Tensor, scale: Tensor) -> Tensor:
    """var(means) / (var(means) + mean of variances), each summed over z's dimensions, ``[…]``.

    By the law of total variance it is the mean contraction where beliefs are calibrated against the prior: then the two
    parts add up to the prior's variance.

    Args:
        loc, scale: of Gaussian beliefs, ``[…, tasks, D]``.

    Raises:
        OptionError: for one task.
    """
    if loc.shape[-2] < 2:
        raise OptionError("Tasks are told apart where there are at least two; got one.")
    between, within = loc.var(-2).sum(-1), scale.square().mean(-2).sum(-1)
    return between / (between + within)


@dataclass(frozen=True, eq=False)
class BeliefPath:
    """The beliefs about T tasks after 0, 1, …, N of their transitions.

    Attributes:
        program: the decoder, whose one local site is z.
        context: all transitions, ``[tasks, N, …]`` in the order of time; where one is masked the belief stays.
        loc, scale: mean and standard deviation of z, ``[N + 1, tasks, D]``.

    Raises:
        ShapeError: when the shapes do not fit.
        ContextError: for a context without targets.
    """

    program: TaskProgram
    context: Observations
    loc: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        if self.context.y is None:
            raise ContextError("The context of beliefs has no targets (y=None); give what happened, rewards included.")
        expected = [self.context.shots + 1, self.context.num_tasks]
        shapes = [list(value.shape) for value in (self.loc, self.scale)]
        if shapes[0] != shapes[1] or len(shapes[0]) != 3 or shapes[0][:2] != expected:
            raise ShapeError(
                f"loc and scale have shapes {shapes[0]} and {shapes[1]}; expected [{expected[0]}, {expected[1]}, D]: "
                f"one belief before the {self.context.shots} transitions and one after each of them."
            )

    @classmethod
    @torch.no_grad()
    def of(cls, latent: LatentContext, context: Observations, program: TaskProgram) -> BeliefPath:
        """The beliefs of a guide.

        Args:
            latent: with the guide.
            context: ``[tasks, N, …]`` in the order of time.
            program: the decoder's, ``decoder.program()``.

        Raises:
            ContextError: for a context of another family, or longer than memory allows.
        """
        q = latent.beliefs(context).base_dist
        return cls(program, context, q.loc, q.scale)

    @property
    def steps(self) -> int:
        """N: there are N + 1 beliefs."""
        return self.context.shots

    @property
    def num_tasks(self) -> int:
        """T."""
        return self.context.num_tasks

    def __repr__(self) -> str:
        return f"<BeliefPath: {self.num_tasks} tasks, {self.steps} steps, z [{self.loc.shape[-1]}]>"

    def _index(self, step: int) -> int:
        if not -self.steps - 1 <= step <= self.steps:
            raise OptionError(f"step={step}; there are beliefs at 0 to {self.steps}, or from the end at −1, −2, ….")
        return step % (self.steps + 1)

    def at(self, step: int) -> NormalPosterior:
        """The belief after ``step`` transitions, negative from the end, with these as its support.

        Raises:
            OptionError: for a step that there is not.
        """
        step = self._index(step)
        return NormalPosterior(self.program, prefix(self.context, step), self.loc[step][None], self.scale[step][None])

    def tasks(self, index: Tensor | slice | Sequence[int]) -> BeliefPath:
        """The beliefs about some of the tasks."""
        some = index if isinstance(index, slice | Tensor) else torch.as_tensor(index, device=self.loc.device)
        return BeliefPath(self.program, self.context.tasks(some), self.loc[:, some], self.scale[:, some])

    def draws(self, num_samples: int, generator: Seed = None) -> Tensor:
        """Draws of z ``[n, N + 1, tasks, D]``. A draw has the same noise at every step, so that its way is smooth."""
        generator = as_generator(generator, self.loc.device, "beliefs")
        noise = normal_like(self.loc, (num_samples, 1, *self.loc.shape[1:]), generator)
        return self.loc + self.scale * noise

    def contraction(self) -> Tensor:
        """1 − var(belief) / var(prior), the mean over z's dimensions, ``[N + 1, tasks]``.

        That of :func:`bayesmeta.contraction`, in closed form, as both are Gaussian: 0 at first, near 1 where a task is
        known; below 0 where a belief is wider than the prior.
        """
        return (1.0 - self.scale.square()).mean(-1)

    def told_apart(self) -> Tensor:
        """Share of z's variance that is between tasks, ``[N + 1]``: 0 where all are believed to be the same task.

        See :func:`told_apart`. Contraction says how sure beliefs are, not of what: near 1 beside a share near 0 they
        are sure of much the same z for every task.

        Raises:
            OptionError: for one task.
        """
        return told_apart(self.loc, self.scale)

    def kl(self) -> Tensor:
        """KL of each belief from the prior in nats, ``[N + 1, tasks]``: how much was learned."""
        belief = torch.distributions.Normal(self.loc, self.scale)
        prior = torch.distributions.Normal(torch.zeros_like(self.loc), torch.ones_like(self.scale))
        return torch.distributions.kl_divergence(belief, prior).sum(-1)

    # -- as a DataTree ------------------------------------------------------------------------------------------

    def to_datatree(
        self,
        *,
        num_samples: int = 1000,
        generator: Seed = None,
        tasks: Sequence[Any] | None = None,
        decoded: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    ) -> DataTree:
        """Export the beliefs to ArviZ.

        Groups: ``posterior`` has ``z`` (chain, draw, task, step, latent), ``prior`` has ``z`` (chain, draw, task,
        latent); ``observed_data`` has ``y`` (task, transition), with an ``output`` where there are several, and NaN
        where none was; ``constant_data`` ``x`` (task, transition, feature); ``beliefs`` the ``loc`` and ``scale``
        behind the draws (task, step, latent), and ``kl`` from the prior (task, step). Step k is the belief after k
        transitions, transition k what came between the steps k − 1 and k. Draws are independent: one chain.

        Args:
            num_samples: draws of z.
            generator: generator or seed; None means seed 0.
            tasks: labels of the tasks; None: 0, 1, ….
            decoded: further variables of the posterior by name, functions of z from ``[…, tasks, D]`` to
                ``[…, tasks, *shape]``: what z means, such as the means of a bandit's arms.

        Raises:
            OptionError: for fewer than 2 draws, labels of another number, and names that are taken.
        """
        import xarray

        labels = list(range(self.num_tasks)) if tasks is None else list(tasks)
        taken = sorted((_TAKEN | {SITE}) & set(decoded or {}))
        if num_samples < 2 or len(labels) != self.num_tasks or taken:
            raise OptionError(
                f"num_samples={num_samples} is to be at least 2, tasks has {len(labels)} labels for {self.num_tasks} "
                f"tasks, and decoded names {taken or 'nothing'} that is taken here."
            )
        groups = self._of_draws(num_samples, generator, decoded or {}) | self._of_data()
        coords = {"chain": [0], "draw": np.arange(num_samples), "task": labels, "step": np.arange(self.steps + 1)}
        coords |= {"transition": np.arange(1, self.steps + 1)}
        attrs = library_attributes()
        tree = {}
        for group, variables in groups.items():
            used = {dim for dims, _ in variables.values() for dim in dims}
            known = {name: value for name, value in coords.items() if name in used}
            tree[group] = xarray.Dataset(variables, known, attrs)
        root = attrs | {"posterior_kind": type(self).__name__, "num_tasks": self.num_tasks, "num_steps": self.steps}
        return xarray.DataTree.from_dict({"/": xarray.Dataset(attrs=root), **tree})

    def _of_draws(
        self, num_samples: int, generator: Seed, decoded: Mapping[str, Callable[[Tensor], Tensor]]
    ) -> _Groups:
        """``posterior`` and ``prior``."""
        z = self.draws(num_samples, generator)
        found = {SITE: z}
        for name, function in decoded.items():
            with torch.no_grad():
                found[name] = value = function(z)
            if value.shape[:3] != z.shape[:3]:
                raise ShapeError(
                    f"{name} gave shape {list(value.shape)} from z of {list(z.shape)}; expected its first three "
                    "dimensions, [draws, steps, tasks], unchanged."
                )
        sample, posterior = ("chain", "draw", "task"), {}
        for name, value in found.items():
            own = ("latent",) if name == SITE else tuple(f"{name}_dim_{i}" for i in range(value.dim() - 3))
            posterior[name] = ((*sample, "step", *own), _numpy(value.transpose(1, 2))[None])
        prior = normal_like(self.loc, z[:, 0].shape, as_generator(generator, z.device, "prior"))
        return {"posterior": posterior, "prior": {SITE: ((*sample, "latent"), _numpy(prior)[None])}}

    def _of_data(self) -> _Groups:
        """``beliefs``, ``observed_data`` and ``constant_data``."""
        mask = self.context.full_mask()

        def happened(value: Tensor) -> np.ndarray:
            keep = mask.reshape(*mask.shape, *[1] * (value.dim() - 2))
            return _numpy(torch.where(keep, value, torch.nan))

        y, x = self.context.y, self.context.x
        assert y is not None
        row, over_time = ("task", "transition"), ("task", "step")
        beliefs: dict[str, tuple[tuple[str, ...], np.ndarray]] = {
            name: ((*over_time, "latent"), _numpy(value.transpose(0, 1)))
            for name, value in (("loc", self.loc), ("scale", self.scale))
        }
        return {
            "beliefs": beliefs | {"kl": (over_time, _numpy(self.kl().T))},
            "observed_data": {"y": ((*row, "output") if y.dim() == 3 else row, happened(y))},
            "constant_data": {"x": ((*row, "feature"), happened(x))},
        }


def _numpy(value: Tensor) -> np.ndarray:
    return np.asarray(value.detach().cpu())
