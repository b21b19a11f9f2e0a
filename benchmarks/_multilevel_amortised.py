"""The amortised guide of the multilevel program, and its posteriors for tasks that it was not trained on.

The hierarchy is fitted once, by NUTS on the training tasks: q(θ) is the Gaussian of its draws. The encoder is then
trained by SVI on tasks simulated from those draws alone (effects and targets from the program, inputs from
:class:`ResampledInputs`); that takes no more data, and it can see as many tasks as it likes.

The program is taken in its non-centred form, where given θ each observation is a Gaussian factor over ε, and the prior
is N(0, I): a product of such factors (PEARL's encoder, with the prior) can be exact. Tried first, on another split or
on this one: θ learned together with a pooled encoder by the ELBO on the training tasks (it settled at spreads of the
slopes that were far too small; means off by up to 1.0 standard deviations), and factors from a network of [x, y, θ]
trained with one θ a step (off by up to 0.3–0.6, and not better for longer training).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from pyro.infer.autoguide import AutoMultivariateNormal
from torch import Tensor

import bayesmeta as bm
from bayesmeta.ops.random import Seed, as_generator, forked_rng
from benchmarks._multilevel_model import Multilevel
from benchmarks._multilevel_reference import Moments

#: simulated tasks have up to so many rows
LONGEST = 150


def hold_out(num_tasks: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the tasks to train on, and of a random fifth that is held out, both in order."""
    order = torch.randperm(num_tasks, generator=as_generator(seed, stream="multilevel held out"))
    count = max(num_tasks // 5, 1)
    return order[count:].sort().values, order[:count].sort().values


@dataclass(frozen=True)
class ResampledInputs:
    """Tasks of 1 to :data:`LONGEST` rows whose inputs are like those of given tasks, as a distribution of tasks.

    The number of rows is log-uniform. The first column's values are drawn with replacement from one random task, the
    others are those of another random task's first row, plus normal noise of ``jitter``. Targets are 0.
    """

    data: bm.Observations
    jitter: float = 0.2
    num_tasks: int | None = None

    def sample(self, num_tasks: int, *, support: int, query: int | None = None, generator: Seed = None) -> bm.TaskBatch:
        """All rows are in the query: ``support`` is 0 and ``query`` None."""
        assert support == 0
        assert query is None
        generator = as_generator(generator, stream="tasks")
        x = self.data.x

        def task() -> Tensor:
            return torch.randint(self.data.num_tasks, (num_tasks,), generator=generator)

        lengths = (
            torch.rand(num_tasks, generator=generator, dtype=torch.float64) * torch.tensor(LONGEST + 1.0).log()
        ).exp()
        lengths = lengths.long().clamp(max=LONGEST)
        source = task()
        rows = torch.rand(num_tasks, LONGEST, generator=generator) * self.data.counts()[source].unsqueeze(-1)
        first = x[source].gather(1, rows.long().unsqueeze(-1).expand(-1, -1, x.shape[-1]))[..., :1]
        noise = torch.randn(num_tasks, x.shape[-1] - 1, generator=generator, dtype=x.dtype)
        others = x[task(), 0, 1:] + self.jitter * noise
        made = torch.cat([first, others.unsqueeze(1).expand(-1, LONGEST, -1)], -1)
        mask = torch.arange(LONGEST) < lengths.unsqueeze(-1)
        made, mask = made[:, : int(lengths.max())], mask[:, : int(lengths.max())]
        zeros = made.new_zeros(made.shape[:2])
        nothing = bm.Observations(made[:, :0], zeros[:, :0], mask[:, :0])
        return bm.TaskBatch(nothing, bm.Observations(made, zeros, mask))


@dataclass(frozen=True)
class Plan:
    """Steps of training; tasks, draws of θ and of ε for each; Adam's first rate; the encoder's width; a seed."""

    steps: int = 1000
    tasks: int = 16
    num_theta: int = 16
    num_particles: int = 4
    rate: float = 1e-2
    width: int = 64
    seed: int = 0


class LineFactors(bm.encoders.ProductEncoder):
    """A product of Gaussian factors over ε whose A and t are affine in [x, y], with coefficients from a network of θ.

    That is all that a line with Gaussian noise needs (see :class:`bayesmeta.encoders.ProductEncoder`): how the
    coefficients depend on θ is what is left to learn. θ is read in units of its draws: some of its numbers hardly vary.
    """

    centre: Tensor
    unit: Tensor

    def __init__(self, features: int, theta: Tensor, width: int) -> None:
        super().__init__(features, latent=2, covariance="full", given=theta.shape[-1], hidden=[width], sort=False)
        del self.affine
        self.network = bm.nets.mlp(theta.shape[-1], [width, width], 3 * (features + 1) + 1, activation="tanh")
        self.register_buffer("centre", theta.mean(0))
        self.register_buffer("unit", theta.std(0))

    def factors(self, observations: bm.Observations, given: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """As of the base class, of rank 1; the order of rows may show in the last bits."""
        self.check(observations, given)
        assert given is not None
        assert observations.y is not None
        line = torch.cat([torch.ones_like(observations.x[..., :1]), observations.x], -1)
        size = line.shape[-1]
        numbers = self.network((given - self.centre) / self.unit)  # [..., tasks, 3 size + 1]
        factor = line @ numbers[..., : 2 * size].unflatten(-1, (size, 2))
        target = torch.cat([line, observations.y.unsqueeze(-1)], -1) @ numbers[..., 2 * size :].unsqueeze(-1)
        return factor * target, factor.unsqueeze(-1), observations.full_mask()


def fit_amortised(train: bm.Observations, theta: Tensor, plan: Plan) -> bm.Amortised:
    """The guide, in the dtype of the training tasks.

    Args:
        train: the training tasks; of their targets nothing is used but the width.
        theta: draws of θ given them, ``[n, E]``.
        plan: of the training.
    """
    theta = theta.to(train.x)
    with forked_rng(as_generator(plan.seed, stream="multilevel encoder")):
        encoder = LineFactors(train.num_features, theta, plan.width)
    method = bm.Amortised(
        bm.noncentred(Multilevel()),
        encoder,
        posterior="full",
        num_particles=plan.num_particles,
        subsets=False,
        global_guide=AutoMultivariateNormal,
    )
    method.prepare(train)
    set_theta(method, theta)
    assert method.recognition is not None
    method.requires_grad_(False)
    method.recognition.requires_grad_(True)
    tasks = bm.SimulatedTasks(ResampledInputs(train), method, theta=theta)
    optimizer = torch.optim.Adam(method.recognition.parameters(), plan.rate)
    schedule = bm.schedules.cosine(plan.steps)(optimizer)
    generator = as_generator(plan.seed, stream="multilevel amortised")
    # fit shows one θ a step; how q depends on θ is what is to be learned, so many at once here
    for _ in range(plan.steps):
        batch = tasks.sample(plan.tasks, support=0, generator=generator)
        rows = torch.randint(len(theta), (plan.num_theta,), generator=generator)
        optimizer.zero_grad()
        loss = -method.elbo(batch.query, theta[rows], generator).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(method.recognition.parameters(), 100.0)
        optimizer.step()
        schedule.step()
    method.eval()
    return method


def set_theta(method: bm.Amortised, theta: Tensor) -> None:
    """Give q(θ) the mean and covariance of draws ``[n, E]``."""
    guide = method.theta_guide
    assert guide is not None
    assert isinstance(guide.auto, AutoMultivariateNormal)
    root = torch.linalg.cholesky(theta.T.cov())
    diagonal = root.diagonal()
    with torch.no_grad():
        guide.auto.loc.copy_(theta.mean(0))
    guide.auto.scale = diagonal.clone()
    guide.auto.scale_tril = root / diagonal.unsqueeze(-1)


def amortised_moments(method: bm.Amortised, data: bm.Observations, theta: Tensor) -> Moments:
    """Of the effects ``[N, 2]``: moments of the mixture of Gaussians over draws of θ ``[n, E]``, without more draws."""
    theta = theta.to(data.x)
    with torch.no_grad():
        posterior = method.infer(data, theta)
        assert isinstance(posterior, bm.MultivariateNormalPosterior)

        def effect(u: Tensor) -> Tensor:
            return method.program.named(u, data, theta)["effect"]

        # an effect is affine in ε, so that differences give its root
        loc = effect(posterior.loc)
        root = torch.stack([effect(posterior.loc + column) - loc for column in posterior.root.unbind(-1)], -1).double()
        return Moments.of_mixture(loc.double(), root @ root.mT)


def microseconds(adapt: Callable[[], object], repeats: int = 20) -> float:
    """Median wall time of a call, after three that do not count."""
    times = []
    for _ in range(repeats + 3):
        begin = time.perf_counter()
        adapt()
        times.append(time.perf_counter() - begin)
    return 1e6 * float(torch.tensor(times[3:]).median())
