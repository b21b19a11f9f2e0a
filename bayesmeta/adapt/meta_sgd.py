"""Meta-SGD: MAML with learned step sizes.

Source: Z. Li, F. Zhou, F. Chen, H. Li, "Meta-SGD: Learning to Learn Quickly for Few-Shot Learning", 2017,
https://arxiv.org/abs/1707.09835, eqs. 1–3. Rates of each tensor and step: A. Antoniou, H. Edwards, A. Storkey, "How to
train your MAML", ICLR 2019, https://arxiv.org/abs/1810.09502, section 4 (LSLR).

Departures: those of MAML; the rates begin equal rather than random, and what is learned are multiples of
``inner_lr``, so that the outer optimizer's steps are relative to it (the paper learns the rates themselves: by Adam at
1e-3 a rate of 0.01 then changes by a tenth in each step). They are not kept positive, nor are the paper's.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from bayesmeta.adapt.base import MethodCard
from bayesmeta.adapt.gradient import GradientMethod, Objective, StepWeights
from bayesmeta.data import Observations
from bayesmeta.errors import OptionError
from bayesmeta.models.theta import GlobalKind

Rates = Literal["parameter", "tensor"]


class MetaSGD(GradientMethod):
    """MAML whose step sizes are part of θ (Li et al. 2017).

    Attributes:
        factors: the learned multiples of ``inner_lr``, ``[D]`` or one for each tensor (a network's weights and biases,
            a program's sites); with ``per_step``, one such row for each inner step. They exist after the first batch.

    Args:
        model: a :class:`~bayesmeta.NeuralTaskModel`, or any Pyro program.
        inner_steps: gradient steps on the support.
        inner_lr: first value of every rate, for an objective that is a mean over the support's observations.
        learn: ``"parameter"``: one rate for each task parameter, the paper's; ``"tensor"``: one for each tensor.
        per_step: learn other rates for each inner step (LSLR); steps beyond those trained take the last step's.
        objective, first_order, step_weights, global_guide: as in :class:`~bayesmeta.MAML`.

    Raises:
        OptionError: for unknown or ill-fitting options.
    """

    card = MethodCard(
        assumes="any model; a start point is enough",
        posterior="a point: K gradient steps, each parameter at a learned rate",
        cost="as MAML; θ has up to twice as many numbers",
        source="Li, Zhou, Chen, Li 2017",
    )

    def __init__(
        self,
        model: Any,
        *,
        inner_steps: int = 1,
        inner_lr: float = 0.01,
        learn: Rates = "parameter",
        per_step: bool = False,
        objective: Objective = "likelihood",
        first_order: bool = False,
        step_weights: StepWeights = "last",
        global_guide: GlobalKind = "point",
    ) -> None:
        super().__init__(
            model,
            inner_steps=inner_steps,
            inner_lr=inner_lr,
            objective=objective,
            first_order=first_order,
            step_weights=step_weights,
            global_guide=global_guide,
        )
        if learn not in get_args(Rates):
            raise OptionError(f"Unknown learn={learn!r}; expected 'parameter' or 'tensor'.")
        if per_step and inner_steps < 1:
            raise OptionError("per_step=True learns rates for each inner step; it needs inner_steps ≥ 1.")
        self.learn: Rates = learn
        self.per_step = per_step

    def config(self) -> dict[str, Any]:
        """Options that change the result."""
        return super().config() | {"learn": self.learn, "per_step": self.per_step}

    def _create(self, observations: Observations) -> None:
        super()._create(observations)
        blocks = self.program.blocks
        sizes = torch.tensor([block.stop - block.start for block in blocks.values()], device=observations.device)
        owner = torch.repeat_interleave(torch.arange(len(blocks), device=observations.device), sizes)
        self.register_buffer("_owner", owner, persistent=False)
        width = self.program.layout.dim if self.learn == "parameter" else len(blocks)
        shape = (self.inner_steps, width) if self.per_step else (width,)
        self.factors = nn.Parameter(observations.x.new_ones(shape))

    @property
    def rates(self) -> Tensor:
        """The step sizes, ``inner_lr`` times the factors."""
        return self.inner_lr * self.factors

    def _rate(self, step: int) -> Tensor:
        rates = self.rates
        rates = rates[min(step, len(rates) - 1)] if self.per_step else rates
        owner = self._owner
        assert isinstance(owner, Tensor)
        return rates if self.learn == "parameter" else rates[owner]
