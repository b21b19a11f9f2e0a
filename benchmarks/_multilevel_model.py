"""The multilevel data sets, the one Pyro program that they share, and its full-rank guide.

The program is a line for each task whose intercept and slope vary together, and fixed effects beside it::

    y[i, j] = effect[i, 0] + effect[i, 1] x[i, j, 0] + fixed · x[i, j, 1:] + noise e[i, j]
    effect[i] ~ Normal(mean, diag(scale) R diag(scale))

with mean ~ Normal(0, 2), fixed ~ Normal(0, 2), scale ~ HalfNormal(1), R ~ LKJ(2) and noise ~ HalfNormal(1), in units in
which y has mean 0 and standard deviation 1 over all rows.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.nn import Parameter
from torch.nn.functional import logsigmoid, softplus

import bayesmeta as bm
from benchmarks.harness import REPOSITORY

#: Scale of the Normal priors of mean and fixed effects; concentration of the LKJ prior.
WIDE, CONCENTRATION = 2.0, 2.0


# -- data ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """Which columns of a file are what.

    Attributes:
        task, y: names of columns.
        x: makes the inputs from the table, in the units of the program; the first varies by task.
    """

    task: str
    y: str
    x: Callable[[pd.DataFrame], dict[str, pd.Series]]


def _unit(column: pd.Series) -> pd.Series:
    """Mean 0 and standard deviation 1 over all rows."""
    return (column - column.mean()) / column.std(ddof=0)


# A slope's column is scaled but never centred where its zero means something (the first floor, day 0, week 0): there
# intercept and slope are what a person would report, and correlate as they do in the literature.
SOURCES: dict[str, Source] = {
    "radon": Source("county", "log.radon", lambda t: {"basement": t["basement"], "uranium": _unit(t["uranium"])}),
    "sleepstudy": Source("Subject", "Reaction", lambda t: {"days": t["Days"] / t["Days"].std(ddof=0)}),
    "exam": Source("school", "normexam", lambda t: {"standLRT": _unit(t["standLRT"])}),
    "milk": Source(
        "Cow",
        "protein",
        lambda t: {
            "time": t["Time"] / t["Time"].std(ddof=0),
            "lupins": t["Diet"] == "lupins",
            "mixture": t["Diet"] == "barley+lupins",
        },
    ),
}


def data_folder() -> Path:
    """Where the files are: the folder that BAYESMETA_DATA names, else ``../shared/data`` beside the checkout."""
    return Path(os.environ.get("BAYESMETA_DATA") or REPOSITORY.parent / "shared" / "data")


def load(name: str) -> bm.Observations:
    """One data set in the units of the program, float64, a task for each county, subject, school or cow.

    Raises:
        DataError: when the file is not there, saying where it was looked for.
    """
    source, path = SOURCES[name], data_folder() / "multilevel" / f"{name}.csv"
    if not path.is_file():
        raise bm.errors.DataError(
            f"{path} is not there. The data are not part of this repository: set BAYESMETA_DATA to the folder that "
            "holds multilevel/radon.csv, sleepstudy.csv, exam.csv and milk.csv."
        )
    table = pd.read_csv(path)
    x = pd.DataFrame(source.x(table)).astype(float)
    columns = torch.as_tensor(x.assign(y=_unit(table[source.y])).to_numpy())
    rows = [columns[torch.as_tensor(index)] for index in table.groupby(source.task).indices.values()]
    return bm.collate([r[:, :-1] for r in rows], [r[:, -1] for r in rows])


# -- program ------------------------------------------------------------------------------------------------------


class Multilevel(PyroModule):
    """The program of the module's docstring. Global sites: mean, fixed (if x is wider than 1), scale, corr, noise."""

    def forward(self, x: Tensor, y: Tensor | None = None, mask: Tensor | None = None) -> None:
        width, one = x.shape[-1] - 1, x.new_ones(())
        mean = pyro.sample("mean", dist.Normal(x.new_zeros(2), WIDE).to_event(1))
        fixed = x.new_zeros(0)
        if width:
            fixed = pyro.sample("fixed", dist.Normal(x.new_zeros(width), WIDE).to_event(1))
        scale = pyro.sample("scale", dist.HalfNormal(x.new_ones(2)).to_event(1))
        corr = pyro.sample("corr", dist.LKJCholesky(2, CONCENTRATION * one))
        noise = pyro.sample("noise", dist.HalfNormal(one))
        with bm.task_plate(x):
            prior = dist.MultivariateNormal(mean, scale_tril=scale.unsqueeze(-1) * corr)
            effect = pyro.sample("effect", prior)  # [..., tasks, 1, 2]
            with bm.shot_plate(x, mask):
                line = effect[..., 0] + effect[..., 1] * x[..., 0] + (fixed * x[..., 1:]).sum(-1)
                pyro.sample("y", dist.Normal(line, noise), obs=y)


# -- guide --------------------------------------------------------------------------------------------------------


class FullRank(PyroModule):
    """Full-rank Gaussian over the global vector, and a full-rank Gaussian for each task's effects given it.

    - q(θ): θ = loc + L e with e standard normal. Of θ, mean and fixed effects are taken as they are, the correlation
      and the noise through their bijections, and a scale as c softplus(θ / c): from log-normal (c large) to a Normal
      cut at 0 (c small), since a scale that may be near 0 is far from log-normal.
    - q(effect[i] | θ) ∝ p(effect[i] | θ) Normal(centre_i, (B_i B_iᵀ)⁻¹): the prior at θ times a full-rank Gaussian
      factor of the task's own, whose five numbers are affine in e. (With a Gaussian that stays where it is as θ moves,
      the standard deviations would come out too small.) The factors start at each task's own ridge regression.

    Draws are made from standard normal auxiliary sites, and log q is evaluated with its parameters held fixed: the
    gradient is then that of the path alone, unbiased, and without noise where q is exact (Roeder, Wu, Duvenaud,
    "Sticking the landing", NeurIPS 2017, https://arxiv.org/abs/1703.09194, section 3).

    Args:
        data: the tasks that it will be trained on, float64; it knows no others.
        init_scale: first standard deviations of θ.
    """

    def __init__(self, data: bm.Observations, init_scale: float = 0.1) -> None:
        super().__init__()
        size = 5 + data.num_features
        start = data.x.new_zeros(size)
        self.theta_loc = Parameter(start.clone())
        self.theta_log_diagonal = Parameter(torch.full_like(start, init_scale).log())
        self.theta_lower = Parameter(start.new_zeros(size, size))  # below the diagonal, in units of it
        self.log_bend = Parameter(start.new_full((2,), 0.5).log())  # the c of each scale
        # centre (2), log diagonal (2) and lower entry of B: at e = 0, and how they move with e
        self.local_base = Parameter(_least_squares(data))
        self.local_slope = Parameter(start.new_zeros(data.num_tasks, 5, size))

    def forward(self, x: Tensor, y: Tensor | None = None, mask: Tensor | None = None) -> None:
        unit = dist.Normal(torch.zeros_like(self.theta_loc), 1.0).to_event(1)
        e = pyro.sample("_theta", unit, infer={"is_auxiliary": True})  # [E] or [particles, 1, 1, E]
        tril = self._theta_tril()
        theta: Tensor = self.theta_loc + (tril @ e.unsqueeze(-1)).squeeze(-1)
        still = dist.MultivariateNormal(self.theta_loc.detach(), scale_tril=tril.detach())
        # e again, but as a function of θ alone
        e_of_theta = torch.linalg.solve_triangular(still.scale_tril, (theta - still.loc).unsqueeze(-1), upper=False)
        sites = self._sites(theta)
        for name, (value, log_det) in sites.items():
            event_dim = {"noise": 0, "corr": 2}.get(name, 1)
            pyro.sample(name, dist.Delta(value, log_density=-log_det, event_dim=event_dim))
        # the auxiliary site has counted log N(e); the rest of log q(θ)
        pyro.factor("_log_q", still.log_prob(theta) - unit.log_prob(e), has_rsample=True)
        mean, prior = sites["mean"][0], sites["scale"][0].unsqueeze(-1) * sites["corr"][0]
        with bm.task_plate(x):
            unit = dist.Normal(theta.new_zeros(2), 1.0).to_event(1)
            f = pyro.sample("_effect", unit, infer={"is_auxiliary": True})  # [..., tasks, 1, 2]
            loc, root = _product(mean, prior, *self._factor(e))
            effect = loc + (root @ f.unsqueeze(-1)).squeeze(-1)
            loc, root = _product(mean, prior, *self._factor(e_of_theta.squeeze(-1), still=True))
            white = torch.linalg.solve(root, (effect - loc).unsqueeze(-1)).squeeze(-1)
            log_q = unit.log_prob(white) - root.det().log() - unit.log_prob(f)
            pyro.sample("effect", dist.Delta(effect, log_density=log_q, event_dim=1))

    def _sites(self, theta: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Value and log |d value / d theta| of each global site, in the order of the program."""
        width = theta.shape[-1] - 6
        mean, fixed, scale, corr, noise = theta.split([2, width, 2, 1, 1], -1)
        unchanged = torch.zeros_like(theta[..., 0])
        bend = self.log_bend.exp()
        cholesky = biject_to(constraints.corr_cholesky)
        values = {
            "mean": (mean, unchanged),
            "fixed": (fixed, unchanged),
            "scale": (bend * softplus(scale / bend), logsigmoid(scale / bend).sum(-1)),
            "corr": (cholesky(corr), cholesky.log_abs_det_jacobian(corr, cholesky(corr))),
            "noise": (noise.squeeze(-1).exp(), noise.squeeze(-1)),
        }
        return values if width else {k: v for k, v in values.items() if k != "fixed"}

    def _theta_tril(self) -> Tensor:
        scale = self.theta_log_diagonal.exp()
        return scale.unsqueeze(-1) * (self.theta_lower.tril(-1) + torch.eye(len(scale), dtype=scale.dtype))

    def _factor(self, e: Tensor, still: bool = False) -> tuple[Tensor, Tensor]:
        """Centre ``[…, tasks, 1, 2]`` and root B of the precision of the tasks' factors at e ``[…, E]``."""
        base: Tensor = self.local_base
        slope: Tensor = self.local_slope
        if still:
            base, slope = base.detach(), slope.detach()
        flat = e[..., 0, 0, :] if e.dim() > 1 else e
        moved = (base + torch.einsum("nke,...e->...nk", slope, flat)).unsqueeze(-2)
        centre, log_diagonal, lower = moved.split([2, 2, 1], -1)
        diagonal = log_diagonal.exp()
        first = torch.cat([diagonal[..., :1], torch.zeros_like(lower)], -1)
        second = torch.cat([lower, torch.ones_like(lower)], -1) * diagonal[..., 1:]
        return centre, torch.stack([first, second], -2)


def _product(mean: Tensor, prior: Tensor, centre: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Mean, and a root of the covariance, of Normal(mean, prior priorᵀ) · Normal(centre, (factor factorᵀ)⁻¹).

    In units of the prior the precision is I + A Aᵀ, A = priorᵀ factor, which is safe where either is nearly singular.
    """
    a = prior.mT @ factor
    root = torch.linalg.cholesky(torch.eye(2, dtype=a.dtype) + a @ a.mT)
    root = prior @ torch.linalg.inv(root).mT
    pull = factor @ (factor.mT @ (centre - mean).unsqueeze(-1))
    return mean + (root @ (root.mT @ pull)).squeeze(-1), root


def _least_squares(data: bm.Observations, ridge: float = 0.01) -> Tensor:
    """Where the factors start, ``[tasks, 5]``: each task's own line by ridge regression, as if noise were 1."""
    assert data.y is not None
    keep = data.full_mask().to(data.x.dtype)
    z = torch.stack([keep, data.x[..., 0] * keep], -1)
    gram = z.mT @ z + ridge * torch.eye(2, dtype=z.dtype)
    centre = torch.linalg.solve(gram, (z.mT @ (keep * data.y).unsqueeze(-1))).squeeze(-1)
    root = torch.linalg.cholesky(gram)
    diagonal = root.diagonal(dim1=-2, dim2=-1)
    return torch.cat([centre, diagonal.log(), (root[:, 1, 0] / diagonal[:, 1]).unsqueeze(-1)], -1)
