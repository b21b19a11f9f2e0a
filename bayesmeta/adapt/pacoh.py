"""PACOH: a hyper-posterior over priors, in closed form up to its normalisation, by MAP or by SVGD.

Source: J. Rothfuss, V. Fortuin, M. Josifoski, A. Krause, "PACOH: Bayes-Optimal Meta-Learning with PAC-Guarantees",
ICML 2021, https://arxiv.org/abs/2002.05551; J. Rothfuss, M. Josifoski, V. Fortuin, A. Krause, "Scalable PAC-Bayesian
Meta-Learning via the PAC-Optimal Hyper-Posterior", JMLR 24, 2023, https://arxiv.org/abs/2211.07206.

Of n tasks, task i has m_i observations S_i; P_θ is a prior over functions h with parameters θ, P(θ) the hyper-prior,
and L̂ the mean over observations of the loss −log p(y | x, h). With λ, β_i > 0 and B = Σ_i β_i, the hyper-posterior that
minimises the PAC-Bayesian bound (:mod:`bayesmeta.adapt.pac_bound`) is

    Q*(θ) ∝ P(θ) exp( λ / (B + λ) · Σ_i log Z_i(θ) ),    Z_i(θ) = E_{h ~ P_θ} exp(−β_i L̂(h, S_i)).

For one m, λ = √n and β = √m, the factor is the paper's 1 / (√(n m) + 1). With β_i = m_i, Z_i is the marginal
likelihood and the posterior of a task the ordinary one; a smaller β tempers the likelihood. The number n comes from the
batches (:attr:`~bayesmeta.TaskBatch.population`), and B is n times the mean of β_i over the batch.

    loss = mean_i −log Z_i(θ) − η (B + λ) / (λ n) · log P(θ)          −1 / (n λ / (B + λ)) of log Q*, so in nats a task

- ``hyper_posterior="map"``: one θ, by gradient descent of that loss.
- ``"svgd"``: K particles θ_k by Stein variational gradient descent. ``loss`` is the mean of the above over particles,
  its gradient −φ*(θ_k) (B + λ) / (λ n), φ* the direction of :mod:`bayesmeta.ops.svgd` for log Q*: any optimizer of
  :func:`~bayesmeta.fit` takes it as it takes a gradient.

Base learners: a Gaussian process with mean and kernel networks, Z_i its exact evidence; or a Bayesian network with
prior N(μ, diag σ²) over weights, θ = (μ, log σ, log noise), Z_i estimated by L draws (the JMLR paper's log-mean-exp, by
Jensen's inequality below log Z_i on average), each task's posterior by SVGD. A new task's posterior is the equally
weighted mixture of those under the K priors.

Departures:

- m_i may differ, with β_i their own; the papers take the harmonic mean of m_i.
- S_i is all of a task, support and query together: nothing is held out, as in the papers.
- The first particles are new networks, not draws of the hyper-prior, from which training is slow; SVGD forgets them.
- η, ``hyper_prior_weight``, is 1 in the theory. The authors' released code for GPs has such a factor on log P(θ) too,
  tuned between 1e-6 and 0.2, beside the data's factor 1 / (m + n): with thousands of weights and few tasks the
  hyper-prior of the theory drowns the data.
- Particles of a task's network posterior move in whitened coordinates (u − μ) / σ, by Adam, from the same first draws
  in every task.
- Not here: a Gaussian hyper-posterior (PACOH-VI).
"""

from __future__ import annotations

import copy
import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import vmap

from bayesmeta.adapt.base import Method, MethodCard
from bayesmeta.adapt.pac_bound import PACBound, meta_bound
from bayesmeta.data import Observations, TaskBatch
from bayesmeta.errors import DataError, OptionError, UnsupportedError
from bayesmeta.models.deep_kernel import DeepKernelModel, Inputs
from bayesmeta.models.hyper_prior import HyperPrior
from bayesmeta.models.kernels import KernelName, kernels
from bayesmeta.models.neural import NeuralTaskModel
from bayesmeta.models.priors import Normal
from bayesmeta.ops.random import Seed, as_generator, normal_like
from bayesmeta.ops.svgd import svgd_direction
from bayesmeta.posteriors.gp import GPPosterior
from bayesmeta.posteriors.prior_mixture import PriorMixturePosterior

HyperPosterior = Literal["map", "svgd"]
BaseLearner = Literal["gp", "network"]
TaskFactor = Literal["tasks", "sqrt_tasks"]
ShotFactor = Literal["shots", "sqrt_shots"]


class PACOH(Method):
    """PAC-optimal hyper-posterior over priors (Rothfuss et al. 2021), for few training tasks.

    Training needs a finite number n of tasks, which the batches carry, as of :class:`~bayesmeta.tasks.FixedTasks`, or
    ``num_tasks``. All of a task's observations count, support and query together.

    Args:
        model: a :class:`~bayesmeta.DeepKernelModel` with a Gaussian likelihood (a GP), or a
            :class:`~bayesmeta.NeuralTaskModel` with a ``Normal`` prior (a Bayesian network; any likelihood). Copied.
        base_learner: ``"gp"`` makes a GP of a network model with a Gaussian likelihood: its mean is the whole network,
            its kernel is on a copy of all but the last layer. None: what the model is.
        hyper_posterior: ``"svgd"``: K particles; ``"map"``: one.
        num_particles: K; None: 10 for SVGD, and always 1 for MAP.
        weight_scale: standard deviation of the hyper-prior over networks' weights, around 0.
        bias_scale: over their biases.
        other_scale: over everything else (log noise, raw kernel parameters, log scales), around its first value.
        hyper_prior_weight: η, the power of the hyper-prior; 1 is the theory's.
        task_factor: λ: ``"tasks"``, n, or ``"sqrt_tasks"``, √n.
        shot_factor: β_i: ``"shots"``, m_i, or ``"sqrt_shots"``, √m_i (networks only).
        kernel, inputs: as in :class:`~bayesmeta.DeepKernelModel`; only with ``base_learner="gp"`` and a network model.
        prior_draws: L, of a network: draws a task that estimate Z_i.
        posterior_particles: of a network: particles of a task under each of the K priors, at least 2.
        posterior_steps, posterior_lr: SVGD steps by Adam, and its rate in prior standard deviations.
        num_tasks: n, where the batches do not say; None: theirs. In evaluation mode the loss of a batch that does not
            say is without the hyper-prior.

    Raises:
        OptionError: for unknown names, numbers out of range, or options that do not apply.
        UnsupportedError: for another model, likelihood or prior.
    """

    card = MethodCard(
        assumes="a GP with Gaussian noise, or a network with a Normal prior; a finite number of tasks",
        posterior="K priors, equally weighted: exact GPs, or SVGD particles",
        cost="K evidences a task to train; adapt shots³ (GP), or SVGD steps",
        source="Rothfuss, Fortuin, Josifoski, Krause 2021",
    )

    def __init__(
        self,
        model: Any,
        *,
        base_learner: BaseLearner | None = None,
        hyper_posterior: HyperPosterior = "svgd",
        num_particles: int | None = None,
        weight_scale: float = 0.5,
        bias_scale: float = 1.0,
        other_scale: float = 1.0,
        hyper_prior_weight: float = 1.0,
        task_factor: TaskFactor = "tasks",
        shot_factor: ShotFactor = "shots",
        kernel: KernelName | kernels.Kernel | None = None,
        inputs: Inputs | None = None,
        prior_draws: int = 10,
        posterior_particles: int = 10,
        posterior_steps: int = 100,
        posterior_lr: float = 0.05,
        num_tasks: int | None = None,
    ) -> None:
        program = _program(model, base_learner, kernel, inputs)
        super().__init__(program)
        self.hyper_posterior, self.task_factor, self.shot_factor = hyper_posterior, task_factor, shot_factor
        self.hyper_prior_weight, self.num_tasks = hyper_prior_weight, num_tasks
        self.weight_scale, self.bias_scale, self.other_scale = weight_scale, bias_scale, other_scale
        self.prior_draws, self.posterior_particles = prior_draws, posterior_particles
        self.posterior_steps, self.posterior_lr = posterior_steps, posterior_lr
        self.num_particles = (10 if hyper_posterior == "svgd" else 1) if num_particles is None else num_particles
        self._check_options()
        self.hyper_prior = HyperPrior(self.program, weight_scale, bias_scale, other_scale)
        self.particles = nn.Parameter(self.hyper_prior.first_draws(self.num_particles))

    def _check_options(self) -> None:
        choices = {"hyper_posterior": HyperPosterior, "task_factor": TaskFactor, "shot_factor": ShotFactor}
        for name, kind in choices.items():
            if getattr(self, name) not in get_args(kind):
                expected = " or ".join(map(repr, get_args(kind)))
                raise OptionError(f"Unknown {name} {getattr(self, name)!r}; expected {expected}.")
        if (self.hyper_posterior == "map") != (self.num_particles == 1) or self.num_particles < 1:
            raise OptionError(
                f"num_particles={self.num_particles} with hyper_posterior={self.hyper_posterior!r}: MAP is one "
                "particle, SVGD at least two."
            )
        weight = self.hyper_prior_weight
        if not (weight >= 0 and math.isfinite(weight)) or (self.num_tasks is not None and self.num_tasks < 1):
            raise OptionError(
                "hyper_prior_weight must be a finite number ≥ 0 and num_tasks at least 1; got "
                f"{self.hyper_prior_weight} and {self.num_tasks}."
            )
        if (
            self.prior_draws < 1
            or self.posterior_particles < 2
            or self.posterior_steps < 0
            or not self.posterior_lr > 0
        ):
            raise OptionError(
                "prior_draws must be ≥ 1, posterior_particles ≥ 2, posterior_steps ≥ 0, posterior_lr > 0; got "
                f"{self.prior_draws}, {self.posterior_particles}, {self.posterior_steps}, {self.posterior_lr}."
            )
        if self.is_gp and self.shot_factor != "shots":
            raise UnsupportedError("A GP has its evidence in closed form for shot_factor='shots'; use a network model.")

    @property
    def is_gp(self) -> bool:
        """Whether the base learner is a Gaussian process."""
        return isinstance(self.program, DeepKernelModel)

    def config(self) -> dict[str, Any]:
        """Options that change the result."""
        names = ["hyper_posterior", "num_particles", "weight_scale", "bias_scale", "other_scale", "hyper_prior_weight"]
        names += ["task_factor", "shot_factor", "num_tasks"]
        if not self.is_gp:
            names += ["prior_draws", "posterior_particles", "posterior_steps", "posterior_lr"]
        options = {name: getattr(self, name) for name in names}
        gp = self.program
        return options | ({"kernel": gp.kernel_name, "inputs": gp.inputs} if isinstance(gp, DeepKernelModel) else {})

    def draw_program(self, generator: torch.Generator) -> Any:
        """The program at a particle of the hyper-posterior, each equally likely: a copy, with its values."""
        k = torch.randint(len(self.particles), (), generator=generator, device=generator.device)
        return self.hyper_prior.at(self.particles[int(k)])

    # -- the objective ------------------------------------------------------------------------------------------

    def _shot_weights(self, counts: Tensor) -> Tensor:
        """β_i of tasks with ``counts`` observations."""
        return counts if self.shot_factor == "shots" else counts.sqrt()

    def _share(self, counts: Tensor) -> Tensor:
        """β_i / m_i, the power of the likelihood; 0 of a task without observations."""
        return self._shot_weights(counts) / counts.clamp(min=1.0)

    def log_evidence(self, theta: Tensor, observations: Observations, generator: Seed = None) -> Tensor:
        """log Z_i(θ) of each task: exact for a GP; of a network by ``prior_draws`` draws, from the generator.

        Args:
            theta: parameters of one prior, ``[E]``.
            observations: all of the tasks' observations, with targets.
            generator: generator or seed; None means seed 0.

        Returns:
            ``[tasks]``, differentiable in θ; 0 for a task without observations.
        """
        if self.is_gp:
            return self.hyper_prior.call(theta, "log_evidence", observations)
        loc, scale = self.hyper_prior.call(theta, "prior_moments", observations)
        generator = as_generator(generator, observations.device, "evidence")
        # drawn in double precision whatever the model's: one seed gives the same draws in both
        noise = normal_like(loc.double(), (self.prior_draws, *loc.shape), generator).to(loc)
        each = self.hyper_prior.call(theta, "log_likelihood", loc + scale * noise, observations).sum(-1)
        tempered = self._share(observations.counts().to(each)) * each
        return tempered.logsumexp(0) - math.log(self.prior_draws)

    def log_evidences(self, theta: Tensor, observations: Observations, generator: Seed = None) -> Tensor:
        """:meth:`log_evidence` under several priors: ``[K, tasks]`` for θ ``[K, E]``."""
        gp = self.program
        if not isinstance(gp, DeepKernelModel) or not gp.dense.is_plain_rbf or len(theta) == 1:
            return torch.stack([self.log_evidence(one, observations, generator) for one in theta])
        gp.check_targets(observations)
        joint = vmap(lambda one: self.hyper_prior.call(one, "noisy_joint", observations))
        covariance, residual = joint(theta)
        return gp.density(covariance, residual, observations)

    def _population(self, batch: TaskBatch) -> int | None:
        if batch.population is None and not self.training:
            return None  # held-out tasks of an endless distribution: n is the number of training tasks, not of these
        known = self.num_tasks or batch.population
        if known is None:
            raise DataError(
                "PACOH needs the number of tasks n, which weighs the hyper-prior against them; this batch is of an "
                "endless distribution. Train on a finite set, bm.tasks.FixedTasks(tasks.sample(20, …)), or give "
                "num_tasks."
            )
        return known

    def _prior_rate(self, batch: TaskBatch, observations: Observations, population: int) -> Tensor:
        """(B + λ) / (λ n): the weight of −log P(θ) beside a mean over tasks of −log Z."""
        total = population * batch.mean(self._shot_weights(observations.counts().to(self.particles)))
        factor = population if self.task_factor == "tasks" else population**0.5
        return (total + factor) / (factor * population)

    def _task_loss(self, batch: TaskBatch, theta: Tensor | None, generator: torch.Generator) -> Tensor:
        population = self._population(batch)
        observations, particles = batch.union(), self.particles
        each = -self.log_evidences(particles, observations, generator)
        if population is None:
            return each.mean(0)
        rate = self._prior_rate(batch, observations, population)
        if self.hyper_prior_weight:
            each = each - self.hyper_prior_weight * rate * self.hyper_prior.log_prob(particles).unsqueeze(-1)
        value = each.mean(0)
        if len(particles) == 1 or not particles.requires_grad:
            return value
        objective = torch.stack([batch.mean(one) for one in each])
        (slope,) = torch.autograd.grad(objective.sum(), particles)
        # log Q* is −1 / rate of the objective
        direction = svgd_direction(particles.detach(), -slope / rate)
        line = rate * (particles * direction).sum()
        return value.detach() - (line - line.detach())

    # -- adapt --------------------------------------------------------------------------------------------------

    def _adapt(
        self, support: Observations, theta: Tensor | None, generator: torch.Generator, create_graph: bool
    ) -> PriorMixturePosterior:
        priors = self.particles.detach()
        programs = [self.hyper_prior.at(one) for one in priors]
        if self.is_gp:
            with torch.no_grad():
                states = [GPPosterior.condition(program, support).state() for program in programs]
            state = {name: torch.stack([each[name] for each in states]) for name in states[0]}
        else:
            state = {"u": torch.stack([self._network_posterior(program, support, generator) for program in programs])}
        return PriorMixturePosterior(self.program, support, priors, **state)

    def _network_posterior(self, program: NeuralTaskModel, support: Observations, generator: torch.Generator) -> Tensor:
        """Particles of each task's tempered posterior under one prior, ``[M, tasks, D]``."""
        with torch.no_grad():
            loc, scale = program.prior_moments(support)
        shape = (self.posterior_particles, 1, loc.shape[-1])
        z = normal_like(loc.double(), shape, generator).to(loc).expand(-1, support.num_tasks, -1)
        share = self._share(support.counts().to(loc))
        there = support.full_mask().any(-1).unsqueeze(-1)
        first, second = torch.zeros_like(z), torch.zeros_like(z)
        for step in range(1, self.posterior_steps + 1 if support.shots else 1):
            with torch.enable_grad():
                z = z.detach().requires_grad_()
                likelihood = share * program.log_likelihood(loc + scale * z, support).sum(-1)
                (slope,) = torch.autograd.grad(likelihood.sum(), z)
            with torch.no_grad():
                # a task without support stays at the prior's draws
                direction = torch.where(there, svgd_direction(z, slope - z), 0.0)
                first, second = 0.9 * first + 0.1 * direction, 0.999 * second + 0.001 * direction.square()
                size = (second / (1 - 0.999**step)).sqrt() + 1e-8
                z = z + self.posterior_lr * first / (1 - 0.9**step) / size
        return (loc + scale * z).detach()

    # -- the bound ----------------------------------------------------------------------------------------------

    def pac_bound(
        self,
        tasks: TaskBatch,
        *,
        delta: float = 0.05,
        loss_range: tuple[float, float] | None = None,
        variance: tuple[float, float] | None = None,
        smoothing: float = 0.1,
        num_samples: int = 16,
        generator: Seed = None,
    ) -> PACBound:
        """The PAC-Bayesian bound on the loss in new tasks, from all n training tasks; see :class:`~bayesmeta.PACBound`.

        A hyper-posterior of particles is infinitely far from the hyper-prior. So the bound is for a smoothed one,
        (1/K) Σ_k N(θ_k, (smoothing · scale)²), and grows to infinity as ``smoothing`` goes to 0. For networks it is
        vacuous in practice, since the divergence grows with the number of weights; the result says what each term is.
        E_Q log Z is a Monte Carlo mean (of a network's Z an estimate that lies below it on average), and the Gibbs
        posterior of a network is the exact one, not the particles of :meth:`adapt`.

        Args:
            tasks: all n training tasks; support and query together are S_i.
            delta: the bound holds with probability 1 − delta over the draw of tasks and observations.
            loss_range: (a, b): the loss −log p(y | x, h), in nats an observation, is assumed to lie in it.
            variance: instead of a range: sub-Gaussian variance factors of the loss within tasks and between tasks.
            smoothing: see above; ≥ 0.
            num_samples: draws of the smoothed hyper-posterior that estimate its mean log Z, rounded up to a multiple
                of K.
            generator: generator or seed; None means seed 0.

        Raises:
            OptionError: for numbers out of range, or both or none of ``loss_range`` and ``variance``.
            DataError: for fewer tasks than the population has, or a task without observations.
        """
        if num_samples < 1 or not 0 <= smoothing < math.inf:
            raise OptionError(f"num_samples must be ≥ 1 and smoothing ≥ 0; got {num_samples} and {smoothing}.")
        self.prepare(tasks)
        tasks = tasks.without_padding()
        if tasks.population is not None and tasks.population != tasks.num_tasks:
            raise DataError(
                f"The bound is for all training tasks at once; got {tasks.num_tasks} of {tasks.population}."
            )
        observations = tasks.union()
        generator = as_generator(generator, observations.device, "bound")
        hyper, particles = self.hyper_prior, self.particles.detach()
        with torch.no_grad():
            z = (particles - hyper.centre) / hyper.scale
            terms = smoothing**2 + z.square() - 1.0 - (2.0 * math.log(smoothing) if smoothing else -math.inf)
            divergence = float(0.5 * terms.double().sum(-1).mean())  # at least that of the mixture: KL is convex
            total = torch.zeros((), dtype=torch.float64, device=observations.device)
            rounds = -(-num_samples // len(particles)) * len(particles)
            for i in range(rounds):
                noise = normal_like(particles.double(), particles.shape[1:], generator).to(particles)
                theta = particles[i % len(particles)] + smoothing * hyper.scale * noise
                total += self.log_evidence(theta, observations, generator).double().sum() / rounds
        counts = observations.counts().double()
        factor = float(tasks.num_tasks if self.task_factor == "tasks" else tasks.num_tasks**0.5)
        return meta_bound(
            float(total), divergence, counts, self._shot_weights(counts), factor, delta, loss_range, variance
        )

    # -- Pyro ---------------------------------------------------------------------------------------------------

    def model(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: there are K priors, so no one Pyro model.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            "PACOH has a distribution over priors, so no one Pyro model; method.hyper_prior.at(method.particles[k]) is "
            "the program of prior k."
        )

    def guide(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Refused, as :meth:`model`.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError("PACOH's posterior is a mixture over priors, or particles: no Pyro guide. Use adapt.")


def _program(model: Any, base_learner: str | None, kernel: Any, inputs: Any) -> Any:
    """A copy of the model, as the base learner asks."""
    if base_learner not in (None, *get_args(BaseLearner)):
        raise OptionError(f"Unknown base_learner {base_learner!r}; expected 'gp', 'network' or None.")
    options = {name: value for name, value in (("kernel", kernel), ("inputs", inputs)) if value is not None}
    is_network = isinstance(model, NeuralTaskModel)
    if is_network and base_learner == "gp":
        return DeepKernelModel.of(model, mean_network=model.central_network(), **options)
    if options:
        raise OptionError(
            f"{', '.join(options)} make a GP of a network model: give base_learner='gp' and such a model."
        )
    if is_network:
        if type(model.prior) is not Normal:
            raise UnsupportedError(
                f"PACOH learns a Normal prior over weights; this model has {type(model.prior).__name__}. Use "
                "prior='normal', or base_learner='gp'."
            )
        return copy.deepcopy(model)
    if isinstance(model, DeepKernelModel) and base_learner != "network":
        if model.link is not None:
            raise UnsupportedError("PACOH takes a GP with a Gaussian likelihood, or a network with any likelihood.")
        return copy.deepcopy(model)
    raise UnsupportedError(
        f"PACOH takes a DeepKernelModel (a GP) or a NeuralTaskModel (a Bayesian network); got {type(model).__name__}"
        + (f" with base_learner={base_learner!r}." if base_learner else ".")
    )
