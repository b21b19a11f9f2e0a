"""VariBAD's bound: what a belief at each step of a trial is worth, as pure functions of ``[prefixes, steps, batch]``.

Source: L. Zintgraf et al., "VariBAD: A Very Good Method for Bayes-Adaptive Deep RL via Meta-Learning", ICLR 2020,
https://arxiv.org/abs/1910.08348, eqs. 8 to 10. With τ the whole trial and τ_{:t} what was seen until step t,

    ELBO_t = E_{q(z | τ_{:t})} [log p(τ | z)] − KL(q(z | τ_{:t}) ‖ p_t(z)).

``decode`` says which steps of τ are decoded: those of the whole ``"trial"``, past and future (the paper's), those of
the ``"past"`` alone, or the ``"new"`` one that the belief has just read. ``kl`` says what p_t is: the belief one step
``"before"`` (the paper's, its section 3.2) or the ``"prior"``.

What is a bound on what, and when is it tight?

* ``"past"`` with ``"prior"`` is a bound on log p(τ_{:t}) for each t, tight at the exact posterior.
* ``"new"`` with ``"before"``, summed over t, is a bound on the evidence log p(τ) if the beliefs before are exact, and
  tight where all are (Bayes' rule, one step at a time).
* ``"trial"`` with ``"prior"`` is a bound on log p(τ) for each t, which no belief that has not seen the end makes tight;
  its best q is that of somebody who has seen an average of the possible ends, and so too sure. The decoder makes
  up for that: what it gives at one z is then a mixture over tasks (:doc:`meta-rl-latents`).
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from bayesmeta.errors import OptionError, ShapeError

Decode = Literal["trial", "past", "new"]
Against = Literal["before", "prior"]


class Bound(NamedTuple):
    """The parts of the bound, ``[prefixes, batch]`` each, in nats.

    Attributes:
        value: ``reconstruction − kl``.
        reconstruction: the log-density of what was decoded, at a draw of z.
        kl: with the weight and the free bits that it was given with.
    """

    value: Tensor
    reconstruction: Tensor
    kl: Tensor


def trial_numbers(begins: Tensor) -> Tensor:
    """Which trial each step of a rollout belongs to, counted from 0 in each environment.

    Args:
        begins: whether a trial begins with the step, booleans ``[steps, batch]``.

    Returns:
        ``[steps, batch]`` int64.
    """
    numbers = begins.long().cumsum(0)
    return numbers - numbers[:1]


def decoded_steps(trials: Tensor, prefixes: Tensor, decode: Decode = "trial") -> Tensor:
    """Which steps the belief after each prefix is asked to decode: only ever steps of its own trial.

    Args:
        trials: which trial each step belongs to, ``[steps, batch]``.
        prefixes: how many steps of the rollout the beliefs have read, ``[prefixes]`` in 0 … steps. A belief belongs to
            the trial of the last step that it has read; after none, to that of the first step.
        decode: the ``"trial"``, the ``"past"`` or the ``"new"`` step.

    Returns:
        Booleans ``[prefixes, steps, batch]``.

    Raises:
        OptionError: for another ``decode``.
        ShapeError: for prefixes that are none, or longer than the rollout.
    """
    if decode not in get_args(Decode):
        raise OptionError(f"Unknown decode {decode!r}; expected one of {', '.join(map(repr, get_args(Decode)))}.")
    steps = len(trials)
    if prefixes.dim() != 1 or not len(prefixes) or int(prefixes.min()) < 0 or int(prefixes.max()) > steps:
        raise ShapeError(f"Prefixes of a rollout of {steps} steps read 0 to {steps} of them; got {prefixes.tolist()}.")
    mine = trials[(prefixes - 1).clamp_min(0)].unsqueeze(1) == trials.unsqueeze(0)
    at = torch.arange(steps, device=trials.device).unsqueeze(0)
    read = prefixes.unsqueeze(-1)
    if decode == "past":
        mine = mine & (at < read).unsqueeze(-1)
    elif decode == "new":
        mine = mine & (at == read - 1).unsqueeze(-1)
    return mine


def bound(log_likelihood: Tensor, which: Tensor, kl: Tensor) -> Bound:
    """The bound at each prefix.

    Args:
        log_likelihood: log p(step | z) at a draw z of each prefix's belief, ``[prefixes, steps, batch]``.
        which: the steps that count, booleans of that shape; what stands elsewhere is not read.
        kl: ``[prefixes, batch]``.

    Raises:
        ShapeError: for shapes that do not fit together.
    """
    if log_likelihood.shape != which.shape or kl.shape != (len(which), which.shape[-1]):
        raise ShapeError(
            f"Expected log-likelihoods and which [prefixes, steps, batch] and kl [prefixes, batch]; got "
            f"{list(log_likelihood.shape)}, {list(which.shape)} and {list(kl.shape)}."
        )
    reconstruction = torch.where(which, log_likelihood, 0.0).sum(1)
    return Bound(reconstruction - kl, reconstruction, kl)
