"""Conditional processes whose network reads support and target together: attention, convolution, transformer, GNP.

Sources: H. Kim et al., "Attentive Neural Processes", ICLR 2019, https://arxiv.org/abs/1901.05761; J. Gordon et al.,
"Convolutional Conditional Neural Processes", ICLR 2020, https://arxiv.org/abs/1910.13556; W. Bruinsma et al., "The
Gaussian Neural Process", AABI 2021, https://arxiv.org/abs/2101.03606, and S. Markou et al., "Practical Conditional
Neural Processes via Tractable Dependent Predictions", ICLR 2022, https://arxiv.org/abs/2203.08775; T. Nguyen, A.
Grover, "Transformer Neural Processes", ICML 2022, https://arxiv.org/abs/2207.04179.

    conditional: −log p(Q | S), a product over the targets, or one multivariate normal
    likelihood:  −log (1/L) Σ_l p(Q | S, z_l),   z_l ~ q(z | S)
    elbo:        −E_{q(z | S ∪ Q)} log p(Q | S, z) + KL(q(z | S ∪ Q) ‖ q(z | S))

Departures that hold for all: training shows random parts of the support (``subsets``) in place of the papers' random
contexts; q(z | S) is N(0, I) without support; losses are of the query alone, where Kim et al. count the context among
the targets, and the latent processes' ``"likelihood"`` is that of A. Foong et al., "Meta-Learning Stationary Stochastic
Process Prediction with Convolutional Neural Processes", NeurIPS 2020, https://arxiv.org/abs/2007.01332;
the standard deviation of z is the exponential of a network's output, where Kim et al. bound it between 0.1 and 1.
Those of the networks stand in :mod:`bayesmeta.processes`.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from bayesmeta.adapt.amortised import batch_distribution, part_of, rsample
from bayesmeta.adapt.base import Method, MethodCard
from bayesmeta.data import Observations, TaskBatch, union
from bayesmeta.errors import OptionError, UnsupportedError
from bayesmeta.models.likelihoods import Likelihood
from bayesmeta.models.process_covariance import Covariance
from bayesmeta.models.process_inputs import check_shots
from bayesmeta.models.process_model import ProcessModel
from bayesmeta.models.process_setup import NetworkName
from bayesmeta.models.recognition import Recognition
from bayesmeta.ops.random import Seed
from bayesmeta.ops.whole import is_whole
from bayesmeta.posteriors.process import ProcessPosterior

Objective = Literal["elbo", "likelihood"]


class ProcessMethod(Method):
    """Trains a :class:`~bayesmeta.ProcessModel`, with any network, yours included; its kinds below make their own.

    ``method.model`` and ``method.guide`` are the conditional model of a batch's query given its support: z has
    q(z | S) in the model; the guide samples it from q(z | S ∪ Q) (objective ``"elbo"``) or q(z | S), so that Pyro's
    ``Trace_ELBO`` is the ELBO above. Given observations alone, the model is that of all of them from an empty support,
    and the guide is q(z | all of them).

    Args:
        model: the model; it is not copied.
        objective: with a latent, and there alone: ``"elbo"`` (None is this) or ``"likelihood"``, see
            :mod:`bayesmeta.adapt.processes`.
        num_particles: draws of z in each estimate of the loss.
        subsets: whether training replaces the support by a random part of it, of uniform size, so that the process
            works with any number of observations, none included.

    Raises:
        UnsupportedError: for another kind of model.
        OptionError: for an unknown objective, one without a latent, or num_particles below 1.
    """

    card = MethodCard(
        assumes="a network that reads support and target together; many tasks",
        posterior="the support itself, and a Gaussian over a latent if there is one",
        cost="adapt nothing; predict one pass; train one gradient",
        source="Garnelo, Rosenbaum et al. 2018; Bruinsma et al. 2021",
    )

    def __init__(
        self, model: ProcessModel, *, objective: Objective | None = None, num_particles: int = 5, subsets: bool = True
    ) -> None:
        if not isinstance(model, ProcessModel):
            raise UnsupportedError(
                f"{type(self).__name__} needs a ProcessModel; got {type(model).__name__}. A Pyro program goes into "
                "Amortised, a NeuralTaskModel into NeuralProcess."
            )
        if objective is not None and objective not in get_args(Objective):
            raise OptionError(f"Unknown objective {objective!r}; expected 'elbo' or 'likelihood'.")
        if objective is not None and not model.latent_size:
            raise OptionError(
                f"objective={objective!r} is for a process with a latent; without one the loss is −log p(Q | S). Leave "
                "it out, or give latent_size above 0."
            )
        if not is_whole(num_particles, 1):
            raise OptionError(f"num_particles must be a whole number, 1 or more; got {num_particles!r}.")
        super().__init__(model)
        self.objective: Objective = "elbo" if objective is None else objective
        self.num_particles, self.subsets = num_particles, subsets

    @property
    def process(self) -> ProcessModel:
        """The model, as the kind that it is."""
        assert isinstance(self.program, ProcessModel)
        return self.program

    @property
    def recognition(self) -> Recognition | None:
        """What gives q(z | S); None without a latent."""
        return self.process.recognition

    def config(self) -> dict[str, Any]:
        """Options that change the result."""
        config = self.process.config() | {"subsets": self.subsets}
        if self.process.latent_size:
            config |= {"objective": self.objective, "num_particles": self.num_particles}
        return config

    def infer(self, support: Observations) -> ProcessPosterior:
        """The posterior given a support, differentiable."""
        return ProcessPosterior(self.process, support, *self.process.infer(support))

    def _start(self, support: Observations) -> Tensor:
        """u without support, ``[tasks, D]``."""
        return self.process.prior_moments(support)[0]

    def _adapt(
        self, support: Observations, theta: Tensor | None, generator: torch.Generator, create_graph: bool
    ) -> ProcessPosterior:
        check_shots(support, self.process.max_shots)
        with torch.set_grad_enabled(create_graph):
            return self.infer(support)

    def _task_loss(self, batch: TaskBatch, theta: Tensor | None, generator: torch.Generator) -> Tensor:
        support = part_of(batch.support, generator) if self.subsets and self.training else batch.support
        prior = self.infer(support)
        if prior.is_point:
            return -prior.model.log_targets(prior.loc, batch.query)[0]
        elbo = self.objective == "elbo"
        posterior = self.infer(union(support, batch.query)) if elbo else prior
        z = rsample(posterior, self.num_particles, generator)[:, 0]
        each = prior.model.log_targets(z, batch.query)
        if not elbo:
            return math.log(self.num_particles) - each.logsumexp(0)
        kl = torch.distributions.kl_divergence(batch_distribution(posterior), batch_distribution(prior))
        return kl[0] - each.mean(0)

    # -- as Pyro callables --------------------------------------------------------------------------------------

    def model(self, *args: Any, **kwargs: Any) -> Any:
        """The Pyro model of the query given the support: takes a :class:`TaskBatch`; else see the class."""
        support, asked = _sides(args, kwargs)
        self.prepare(asked)
        result = self.process.given(support)(asked.x, asked.y, asked.mask)
        self._announce_parameters()
        return result

    def guide(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The Pyro guide: samples z, where there is one; see the class."""
        support, asked = _sides(args, kwargs)
        self.prepare(asked)
        alone = not (args and isinstance(args[0], TaskBatch))
        sees_all = (alone or self.objective == "elbo") and asked.y is not None
        posterior = self.infer(union(support, asked) if sees_all else support)
        self._announce_parameters()
        return posterior()


class AttentiveNeuralProcess(ProcessMethod):
    """An attentive process (Kim et al. 2019): each target attends to the support; with a latent, a mixture of such.

    Departures: see :mod:`bayesmeta.adapt.processes` and :class:`bayesmeta.processes.AttentiveProcess`.

    Args:
        likelihood: None for a Gaussian whose mean and scale the network gives (floor 0.01), for real numbers.
        latent_size: of z; 0: the attentive **conditional** process, with its predictive in closed form.
        width, depth, heads, blocks: of the network, see :class:`bayesmeta.processes.AttentiveProcess`.
        objective, num_particles, subsets: as in :class:`ProcessMethod`.
        max_shots: more observations in a support are refused.
        seed: of the first weights; None means seed 0.

    Raises:
        OptionError: for unknown names, and sizes out of range.
        UnsupportedError: for a model in place of a likelihood.
    """

    card = MethodCard(
        assumes="a likelihood; many tasks to learn from",
        posterior="the support, by attention; a Gaussian over a latent if asked",
        cost="adapt nothing; predict targets × shots; train one gradient",
        source="Kim, Mnih, Schwarz, Garnelo, Eslami, Rosenbaum, Vinyals, Teh 2019",
    )

    def __init__(
        self,
        likelihood: Likelihood | None = None,
        *,
        latent_size: int = 0,
        width: int = 64,
        depth: int = 2,
        heads: int = 4,
        blocks: int = 0,
        objective: Objective | None = None,
        num_particles: int = 5,
        subsets: bool = True,
        max_shots: int | None = None,
        seed: Seed = None,
    ) -> None:
        options = {"depth": depth, "heads": heads, "blocks": blocks, "max_shots": max_shots, "seed": seed}
        model = _make(self, likelihood, "attention", latent_size=latent_size, width=width, **options)
        super().__init__(model, objective=objective, num_particles=num_particles, subsets=subsets)


class ConvCNP(ProcessMethod):
    """A convolutional conditional process over one input (Gordon et al. 2020): translation equivariant.

    Departures: see :mod:`bayesmeta.adapt.processes` and :class:`bayesmeta.processes.ConvProcess`.

    Args:
        likelihood: as in :class:`AttentiveNeuralProcess`.
        width, depth, points_per_unit, max_points: of the network, see :class:`bayesmeta.processes.ConvProcess`.
        subsets, max_shots, seed: as in :class:`AttentiveNeuralProcess`.

    Raises:
        OptionError, UnsupportedError: as :class:`AttentiveNeuralProcess`.
        ShapeError: at the first data, for several features.
    """

    card = MethodCard(
        assumes="one input, and laws that do not depend on where it is 0",
        posterior="the support as a function on a grid; predictive in closed form",
        cost="adapt nothing; predict one pass over a grid; train one gradient",
        source="Gordon, Bruinsma, Foong, Requeima, Dubois, Turner 2020",
    )

    def __init__(
        self,
        likelihood: Likelihood | None = None,
        *,
        width: int = 64,
        depth: int = 4,
        points_per_unit: float = 16.0,
        max_points: int = 4096,
        subsets: bool = True,
        max_shots: int | None = None,
        seed: Seed = None,
    ) -> None:
        grid = {"points_per_unit": points_per_unit, "max_points": max_points}
        model = _make(self, likelihood, "convolution", width=width, depth=depth, max_shots=max_shots, seed=seed, **grid)
        super().__init__(model, subsets=subsets)


class TransformerNeuralProcess(ProcessMethod):
    """A transformer over support and targets, after TNP-D (Nguyen, Grover 2022): a target attends to the support.

    Departures: see :mod:`bayesmeta.adapt.processes` and :class:`bayesmeta.processes.TransformerProcess`.

    Args:
        likelihood: as in :class:`AttentiveNeuralProcess`.
        width, depth, heads: of the network, see :class:`bayesmeta.processes.TransformerProcess`.
        subsets, max_shots, seed: as in :class:`AttentiveNeuralProcess`.

    Raises:
        OptionError, UnsupportedError: as :class:`AttentiveNeuralProcess`.
    """

    card = MethodCard(
        assumes="a likelihood; many tasks to learn from",
        posterior="the support, by a transformer; predictive in closed form",
        cost="adapt nothing; predict (shots + targets) × shots; train one gradient",
        source="Nguyen, Grover 2022",
    )

    def __init__(
        self,
        likelihood: Likelihood | None = None,
        *,
        width: int = 64,
        depth: int = 3,
        heads: int = 4,
        subsets: bool = True,
        max_shots: int | None = None,
        seed: Seed = None,
    ) -> None:
        options = {"depth": depth, "heads": heads, "max_shots": max_shots, "seed": seed}
        super().__init__(_make(self, likelihood, "transformer", width=width, **options), subsets=subsets)


class GaussianNeuralProcess(ProcessMethod):
    """A process with a full covariance between the targets (Bruinsma et al. 2021; Markou et al. 2022), in closed form.

    Σ = K + diag(noise²) over the targets of a task, with mean, noise and what K is made of from a network: K = F Fᵀ / R
    (``"low_rank"``) or K_ij = v_i v_j exp(−|g_i − g_j|² / 2) (``"kernel"``). Departures: the noise may differ between
    targets (the likelihood's scale); covariances are float64; K is divided by R, and multiplied by a learned stationary
    kernel where the network is a convolution (Bruinsma et al. convolve K itself); see :mod:`bayesmeta.adapt.processes`.

    Args:
        likelihood: Gaussian or HeteroscedasticGaussian: mean and noise; None for the latter (floor 0.01).
        network: ``"deep_set"``, ``"attention"``, ``"convolution"``, ``"transformer"``, or a module of your own, see
            :class:`~bayesmeta.ProcessModel`.
        covariance: ``"low_rank"`` or ``"kernel"``.
        rank: R.
        stationary: whether K is multiplied by exp(−Σ_f (x_f − x'_f)² / 2ℓ_f²) with learned ℓ, as a convolution needs;
            None: for a convolution alone. See :class:`~bayesmeta.ProcessModel`.
        length_scale: where ℓ begin, in units of x.
        width: of the network.
        subsets, max_shots, seed: as in :class:`AttentiveNeuralProcess`.
        options: of the network: ``depth``, ``heads``, ``blocks``, ``points_per_unit``, where it has them.

    Raises:
        OptionError: as :class:`AttentiveNeuralProcess`; for a diagonal covariance, which the other methods have.
        UnsupportedError: for another likelihood, or several outputs.
    """

    card = MethodCard(
        assumes="real numbers, one output; many tasks",
        posterior="the support; a multivariate normal over targets in closed form",
        cost="adapt nothing; predict one pass + targets³; train one gradient",
        source="Bruinsma, Requeima, Foong, Gordon, Turner 2021; Markou et al. 2022",
    )

    def __init__(
        self,
        likelihood: Likelihood | None = None,
        *,
        network: NetworkName | nn.Module = "attention",
        covariance: Covariance = "low_rank",
        rank: int = 32,
        stationary: bool | None = None,
        length_scale: float = 1.0,
        width: int = 64,
        subsets: bool = True,
        max_shots: int | None = None,
        seed: Seed = None,
        **options: Any,
    ) -> None:
        if covariance == "diagonal":
            raise OptionError("covariance is 'low_rank' or 'kernel' here; a diagonal one is ProcessMethod's.")
        own = {"covariance": covariance, "rank": rank, "stationary": stationary, "length_scale": length_scale}
        sizes = {"width": width, "max_shots": max_shots, "seed": seed}
        super().__init__(_make(self, likelihood, network, **own, **sizes, **options), subsets=subsets)


def _make(method: Method, likelihood: Any, network: NetworkName | nn.Module, **options: Any) -> ProcessModel:
    """The model of a method that makes its own network.

    Raises:
        UnsupportedError: for a model in place of a likelihood.
    """
    if callable(likelihood) and not isinstance(likelihood, Likelihood | type):
        raise UnsupportedError(
            f"{type(method).__name__} makes its own network and takes a likelihood alone; got "
            f"{type(likelihood).__name__}. A network of your own goes into ProcessMethod(ProcessModel(network, …)), a "
            "Pyro program into Amortised."
        )
    return ProcessModel(network, likelihood, **options)


def _sides(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Observations, Observations]:
    """Support and query of a batch, or an empty support and the observations given in one of the other forms."""
    if args and isinstance(args[0], TaskBatch):
        batch = args[0].without_padding()
        return batch.support, batch.query
    asked = args[0] if args and isinstance(args[0], Observations) else Observations(*args, **kwargs)
    y = asked.x.new_zeros(asked.num_tasks, 0) if asked.y is None else asked.y[:, :0]
    return Observations(asked.x[:, :0], y), asked
