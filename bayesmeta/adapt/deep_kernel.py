"""Deep kernels: a Gaussian process for each task, its kernel on shared features learned by the evidence.

Source: M. Patacchiola, J. Turner, E. Crowley, M. O'Boyle, A. Storkey, "Bayesian Meta-Learning for the Few-Shot Setting
via Deep Kernels", NeurIPS 2020, https://arxiv.org/abs/1910.05199, eqs. 2–6 and algorithm 1; classification by
regression on labels ±1, one class against the rest: section 3.2. (Of one task, with probabilities: C. E. Rasmussen,
C. K. I. Williams, "Gaussian Processes for Machine Learning", 2006, section 6.5, least-squares classification.)

Departures: the kernel may also see x itself, alone or beside the features; the objective may be the predictive of the
query; θ is a mean over a batch of tasks, where the paper takes one task a step; covariances are float64; no kernel is
normalised by batch norm, which would let tasks see each other. Of classes: kernel, mean and
noise are one for all classes (the released code has hyper-parameters for each, which would make the order of the
classes matter), the mean begins at 2 / K − 1 rather than 0, and the noise is learned, where the code fixes its variance
at 0.1. Probabilities are by default those of the largest noisy target, ``link="probit"``; ``link="sigmoid"`` has the
paper's sigmoids of the means, normalised as in the released code for calibration, without its temperature.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from bayesmeta.adapt.base import Method, MethodCard
from bayesmeta.data import Observations, TaskBatch
from bayesmeta.errors import OptionError
from bayesmeta.models.deep_kernel import DeepKernelModel, Inputs
from bayesmeta.models.kernels import KernelName, kernels
from bayesmeta.models.labels import Link
from bayesmeta.models.neural import NeuralTaskModel
from bayesmeta.ops.random import Seed
from bayesmeta.posteriors.gp import GPPosterior
from bayesmeta.posteriors.gp_labels import GPLabelsPosterior

Objective = Literal["evidence", "predictive"]


class DeepKernel(Method):
    """Deep kernel transfer (Patacchiola et al. 2020): exact GP regression in each task under a learned kernel.

    Classes (a Categorical or Bernoulli likelihood) are regressed on as ±1, one against the rest; the posterior is a
    :class:`~bayesmeta.GPLabelsPosterior`, whose predictive is of the classes. The loss is then of the ±1 targets: a
    density, no probability of classes; :func:`~bayesmeta.scores` has that.

    Args:
        model: a :class:`~bayesmeta.NeuralTaskModel` with a Gaussian, Categorical or Bernoulli likelihood, of whose
            network all but the last Linear gives the features (copied; its prior is not used), or a
            :class:`~bayesmeta.DeepKernelModel`.
        kernel, inputs, num_mixtures, max_frequency, learn_mean, link, noise, learn_noise: as in
            :class:`~bayesmeta.DeepKernelModel`, which is made with them; only with a network model.
        objective: ``"evidence"``: −log p(y_S, y_Q), the paper's; ``"predictive"``: −log p(y_Q | y_S).

    Raises:
        UnsupportedError: for another model or likelihood, or several outputs.
        OptionError: for an unknown objective, kernel or inputs, or options beside a DeepKernelModel.
    """

    card = MethodCard(
        assumes="Gaussian noise, one output, or classes as ±1; a Sequential network",
        posterior="exact: a Gaussian process, predictive and evidence in closed form",
        cost="shots³ a task, to adapt and to train",
        source="Patacchiola, Turner, Crowley, O'Boyle, Storkey 2020",
    )

    def __init__(
        self,
        model: NeuralTaskModel | DeepKernelModel,
        *,
        kernel: KernelName | kernels.Kernel | None = None,
        inputs: Inputs | None = None,
        num_mixtures: int | None = None,
        max_frequency: float | None = None,
        learn_mean: bool | None = None,
        link: Link | None = None,
        noise: float | None = None,
        learn_noise: bool | None = None,
        objective: Objective = "evidence",
    ) -> None:
        if objective not in get_args(Objective):
            raise OptionError(f"Unknown objective {objective!r}; expected 'evidence' or 'predictive'.")
        given: dict[str, Any] = {
            "kernel": kernel,
            "inputs": inputs,
            "num_mixtures": num_mixtures,
            "max_frequency": max_frequency,
            "learn_mean": learn_mean,
            "link": link,
            "noise": noise,
            "learn_noise": learn_noise,
        }
        options = {name: value for name, value in given.items() if value is not None}
        if isinstance(model, DeepKernelModel):
            if options:
                raise OptionError(f"A DeepKernelModel has its kernel; leave out {', '.join(options)}.")
        else:
            model = DeepKernelModel.of(model, **options)
        super().__init__(model)
        self.objective: Objective = objective

    @property
    def gp(self) -> DeepKernelModel:
        """The program, as the kind that it is."""
        assert isinstance(self.program, DeepKernelModel)
        return self.program

    def config(self) -> dict[str, Any]:
        """Options that change the result."""
        options = {"kernel": self.gp.kernel_name, "inputs": self.gp.inputs, "objective": self.objective}
        return options if self.gp.link is None else options | {"link": self.gp.link, "columns": self.gp.columns}

    def _adapt(
        self, support: Observations, theta: Tensor | None, generator: torch.Generator, create_graph: bool
    ) -> GPPosterior:
        kind = GPPosterior if self.gp.link is None else GPLabelsPosterior
        with torch.set_grad_enabled(create_graph):
            return kind.condition(self.gp, support)

    def _task_loss(self, batch: TaskBatch, theta: Tensor | None, generator: Seed) -> Tensor:
        joint = self.gp.log_evidence(batch.union())
        return -joint if self.objective == "evidence" else self.gp.log_evidence(batch.support) - joint

    def guide(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The Pyro guide: nothing to sample, as the program integrates the function out; its ELBO is the evidence."""
        return {}
