"""VariBAD's bound: which steps are decoded, by hand, and the bound on a linear-Gaussian task of known posterior."""

import math

import pyro.distributions as dist
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from torch import nn

from bayesmeta.data import Observations
from bayesmeta.errors import OptionError, ShapeError
from bayesmeta.models.likelihoods import Bernoulli, Gaussian
from bayesmeta.rl.latent.contexts import ContextSpec
from bayesmeta.rl.latent.core import LatentContext
from bayesmeta.rl.latent.decoder import TransitionDecoder
from bayesmeta.rl.varibad.decoder import LinearDecoder
from bayesmeta.rl.varibad.loss import bound, decoded_steps, trial_numbers

LINE = Box(-10.0, 10.0, (1,))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# -- which steps are decoded -------------------------------------------------------------------------------------------


def test_each_belief_decodes_steps_of_its_own_trial_by_hand():
    """Five steps of two environments; in the first a trial begins at step 2, in the second at step 0 alone."""
    begins = torch.tensor([[1, 1], [0, 0], [1, 0], [0, 0], [0, 0]], dtype=torch.bool)
    trials = trial_numbers(begins)
    assert trials.T.tolist() == [[0, 0, 1, 1, 1], [0, 0, 0, 0, 0]]
    whole = decoded_steps(trials, torch.arange(6), "trial")
    assert whole.shape == (6, 5, 2)
    first, second = [1, 1, 0, 0, 0], [0, 0, 1, 1, 1]
    assert whole[..., 0].int().tolist() == [first, first, first, second, second, second]
    assert whole[..., 1].all()
    past = decoded_steps(trials, torch.arange(6), "past")[..., 0].int().tolist()
    assert past == [
        [0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1],
    ]  # fmt: skip
    new = decoded_steps(trials, torch.tensor([0, 2, 3]), "new")[..., 0].int().tolist()
    assert new == [[0, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0]]


def test_a_rollout_that_goes_on_with_a_trial_begins_in_trial_0():
    begins = torch.tensor([[0, 1], [0, 0], [1, 0]], dtype=torch.bool)
    assert trial_numbers(begins).T.tolist() == [[0, 0, 1], [0, 0, 0]]


def test_what_is_not_decoded_is_not_read_and_gets_no_gradient():
    values = torch.tensor([[[1.0], [math.nan]], [[2.0], [3.0]]], requires_grad=True)
    which = torch.tensor([[[True], [False]], [[True], [True]]])
    found = bound(values, which, torch.tensor([[0.5], [1.0]]))
    assert found.reconstruction.flatten().tolist() == [1.0, 5.0]
    assert found.value.flatten().tolist() == [0.5, 4.0]
    found.value.sum().backward()
    assert values.grad.flatten().tolist() == [1.0, 0.0, 1.0, 1.0]


def test_names_and_shapes_that_do_not_fit_are_refused():
    trials = torch.zeros(3, 2, dtype=torch.long)
    with pytest.raises(OptionError, match="'future'"):
        decoded_steps(trials, torch.arange(4), "future")
    for wrong in (torch.arange(5), torch.tensor([-1]), torch.zeros(0, dtype=torch.long)):
        with pytest.raises(ShapeError, match="0 to 3"):
            decoded_steps(trials, wrong)
    with pytest.raises(ShapeError, match="prefixes, steps, batch"):
        bound(torch.zeros(2, 3, 4), torch.ones(2, 3, 4, dtype=torch.bool), torch.zeros(2, 5))


# -- a task whose posterior is known -----------------------------------------------------------------------------------


class Line(nn.Module):
    """y = x z."""

    def forward(self, both):
        return both[..., :1] * both[..., 1:]


class Known:
    """z ~ N(0, 1), y_t = x_t z + 0.7 ε: exact beliefs and evidence after each step, of 4 tasks, in float64."""

    steps, tasks = 6, 4

    def __init__(self):
        self.spec = ContextSpec(LINE, Discrete(2), inputs=("state",))
        self.decoder = TransitionDecoder(self.spec, 1, Gaussian(0.7), network=Line(), dtype=torch.float64)
        self.noise = self.decoder.likelihood.scale.item()  # 0.7 up to the rounding of its logarithm
        like = {"dtype": torch.float64, "generator": seeded(3)}
        x = torch.randn(self.tasks, self.steps, 1, **like)
        z = torch.randn(self.tasks, 1, **like)
        y = x[..., 0] * z + self.noise * torch.randn(self.tasks, self.steps, **like)
        self.context = Observations(x, y)
        none = x.new_zeros(self.tasks, 1)
        precision = 1 + torch.cat([none, (x[..., 0].square() / self.noise**2).cumsum(1)], 1)
        information = torch.cat([none, (x[..., 0] * y / self.noise**2).cumsum(1)], 1)
        #: exact beliefs after 0 … steps, [steps + 1, tasks, 1]
        self.loc = (information / precision).T.unsqueeze(-1)
        self.scale = precision.rsqrt().T.unsqueeze(-1)
        self.evidence = torch.stack([self._evidence(t) for t in range(self.steps + 1)])

    def _evidence(self, t):
        """log p(y_1 … y_t) from the joint Gaussian, without any belief."""
        if t == 0:
            return torch.zeros(self.tasks, dtype=torch.float64)
        x = self.context.x[:, :t]
        covariance = x @ x.mT + self.noise**2 * torch.eye(t, dtype=torch.float64)
        normal = torch.distributions.MultivariateNormal(torch.zeros(t, dtype=torch.float64), covariance)
        return normal.log_prob(self.context.y[:, :t])

    def bounds(self, loc, scale, decode, against):
        """The bound of each belief. log p is a parabola in z, whose mean under q is that of loc ± scale, exactly."""
        core, normal = LatentContext.make(self.spec, 1), dist.Normal
        q = normal(loc, scale).to_event(1)
        if against == "before":
            earlier = torch.arange(self.steps + 1).sub(1).clamp_min(0)
            p = normal(loc[earlier], scale[earlier]).to_event(1)
        else:
            p = normal(torch.zeros_like(loc), torch.ones_like(scale)).to_event(1)
        each = [self.decoder.log_prob(z, self.context).transpose(1, 2) for z in (loc - scale, loc + scale)]
        trials = torch.zeros(self.steps, self.tasks, dtype=torch.long)
        which = decoded_steps(trials, torch.arange(self.steps + 1), decode)
        return bound((each[0] + each[1]) / 2, which, core.kl(q, p)).value


KNOWN = Known()
#: beliefs that are not the exact ones
WRONG = {
    "shifted": lambda loc, scale: (loc + 0.1 * (scale < 0.999), scale),
    "too sure": lambda loc, scale: (loc, torch.where(scale < 0.999, 0.9 * scale, scale)),
    "not sure enough": lambda loc, scale: (loc, torch.where(scale < 0.999, 1.1 * scale, scale)),
}


def test_decoding_the_past_is_a_bound_on_its_evidence_tight_at_the_exact_posterior():
    exact = KNOWN.bounds(KNOWN.loc, KNOWN.scale, "past", "prior")
    torch.testing.assert_close(exact, KNOWN.evidence, rtol=0, atol=1e-10)
    for change in WRONG.values():
        below = KNOWN.bounds(*change(KNOWN.loc, KNOWN.scale), "past", "prior")
        assert (below[1:] < KNOWN.evidence[1:] - 1e-4).all()


def test_new_steps_against_the_belief_before_add_up_to_the_evidence_at_the_exact_beliefs():
    """Bayes' rule one step at a time: log p(y_t | y_:t−1) = E_q_t log p(y_t | z) − KL(q_t ‖ q_t−1)."""
    exact = KNOWN.bounds(KNOWN.loc, KNOWN.scale, "new", "before")
    torch.testing.assert_close(exact.cumsum(0), KNOWN.evidence, rtol=0, atol=1e-10)
    for change in WRONG.values():
        loc, scale = KNOWN.loc.clone(), KNOWN.scale.clone()
        loc[-1], scale[-1] = (x[-1] for x in change(loc, scale))  # exact until the last
        below = KNOWN.bounds(loc, scale, "new", "before")
        assert (below[-1] < exact[-1] - 1e-4).all()


def test_decoding_the_whole_trial_is_a_bound_that_only_the_last_belief_makes_tight():
    exact = KNOWN.bounds(KNOWN.loc, KNOWN.scale, "trial", "prior")
    torch.testing.assert_close(exact[-1], KNOWN.evidence[-1], rtol=0, atol=1e-10)
    assert (exact[:-1] < KNOWN.evidence[-1]).all()
    assert (exact[:3] < KNOWN.evidence[-1] - 0.1).all()
    # the belief before the last is best when it is surer than the exact one: it is held to steps it has not seen
    surer = KNOWN.bounds(KNOWN.loc, 0.95 * KNOWN.scale, "trial", "prior")[1:-1].mean()
    assert surer > exact[1:-1].mean()


def test_the_wrong_kl_breaks_the_equality():
    """Control: against the prior where it should be the belief before, and the other way round."""
    assert (KNOWN.bounds(KNOWN.loc, KNOWN.scale, "past", "before")[2:] - KNOWN.evidence[2:]).abs().min() > 1e-3
    assert (KNOWN.bounds(KNOWN.loc, KNOWN.scale, "new", "prior").cumsum(0)[2:] - KNOWN.evidence[2:]).abs().min() > 1e-3


# -- the linear decoder ------------------------------------------------------------------------------------------------


def cells(observation):
    return nn.functional.one_hot(observation.squeeze(-1).long(), 4).to(observation.dtype)


def test_a_linear_decoder_of_one_hot_cells_is_a_table_that_the_task_fills():
    spec = ContextSpec(LINE, Discrete(2), inputs=("successor",), binary=True, encode=cells, encoded=4)
    decoder = LinearDecoder(spec, 3, offset=False, seed=1)
    assert isinstance(decoder.likelihood, Bernoulli)
    z = torch.randn(5, 2, 3, generator=seeded())
    at = torch.tensor([[0.0, 3.0, 3.0], [1.0, 2.0, 0.0]])
    context = spec.transitions(at.unsqueeze(-1), at.long() % 2, torch.ones(2, 3), at.unsqueeze(-1))
    table = decoder.network(z)  # [5, 2, 4]
    got = decoder.output(z, context.x)
    assert got.shape == (5, 2, 3, 1)
    for task in range(2):
        for step in range(3):
            torch.testing.assert_close(got[:, task, step, 0], table[:, task, int(at[task, step])])
    log_prob = decoder.log_prob(z, context)
    torch.testing.assert_close(log_prob, nn.functional.logsigmoid(got[..., 0]))
    assert not torch.allclose(decoder.output(z.flip(0), context.x), got)


def test_one_place_alone_has_the_reward():
    spec = ContextSpec(LINE, Discrete(2), inputs=("successor",), binary=True, encode=cells, encoded=4)
    decoder = LinearDecoder(spec, 3, offset=False, one_of=True, seed=1)
    z = torch.randn(5, 2, 3, generator=seeded())
    p = decoder.distribution(z, torch.eye(4).expand(2, 4, 4)).mean
    torch.testing.assert_close(p, decoder.network(z).softmax(-1))
    torch.testing.assert_close(p.sum(-1), torch.ones(5, 2))
    plain = LinearDecoder(spec, 3, offset=False, seed=1)
    assert (plain.distribution(z, torch.eye(4).expand(2, 4, 4)).mean.sum(-1) - 1).abs().min() > 0.1  # control
    with torch.no_grad():  # a place that is sure has a large and finite log-odds
        decoder.network[-1].bias[0] = 1e4
    logits = decoder.output(z, torch.eye(4).expand(2, 4, 4)).squeeze(-1)
    assert torch.isfinite(logits).all()
    assert logits[..., 0].min() > 10
    for wrong in ({"offset": True}, {"offset": False, "spec": ContextSpec(LINE, Discrete(2))}):
        with pytest.raises(OptionError, match="one_of"):
            LinearDecoder(**{"spec": spec, "latent": 3, "one_of": True} | wrong)


def test_a_linear_decoder_of_changes_is_a_matrix_and_an_offset():
    spec = ContextSpec(Box(-1.0, 1.0, (3,)), Box(-1.0, 1.0, (2,)), inputs=("action",), targets=("reward", "change"))
    decoder = LinearDecoder(spec, 2, hidden=(5,), dtype=torch.float64)
    z = torch.randn(4, 2, dtype=torch.float64, generator=seeded())
    x = torch.randn(4, 6, 2, dtype=torch.float64, generator=seeded(1))
    matrix, offset = decoder.matrix(z)
    assert matrix.shape == (4, 4, 2)
    assert offset.shape == (4, 4)
    expected = torch.stack([x[n] @ matrix[n].T + offset[n] for n in range(4)])
    torch.testing.assert_close(decoder.output(z, x), expected)
    # and as a Pyro program, whose densities posteriors and NUTS take
    y = torch.randn(4, 6, 4, dtype=torch.float64, generator=seeded(2))
    data = Observations(x, y)
    program = decoder.program().log_likelihood(z.unsqueeze(0), data)[0]
    torch.testing.assert_close(program, decoder.log_prob(z, data))
    with pytest.raises(ShapeError, match="this decoder takes 2 and 2"):
        decoder.output(z, x[..., :1])
