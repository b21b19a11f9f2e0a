"""A mixture of known tasks' latents with weights read from a context: against Bayes' rule by enumeration."""

import math

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from bayesmeta import errors
from bayesmeta.data import Observations
from bayesmeta.rl.envs import Navigation
from bayesmeta.rl.latent.contexts import ContextSpec
from bayesmeta.rl.latent.core import LatentContext
from bayesmeta.rl.latent.mixture import FactorEncoder, MixtureContext, TaskLatents
from bayesmeta.rl.off_policy.chains import Chains, distillation_loss

WIDE = Observations(torch.zeros(1, 2, 9), torch.zeros(1, 2))
SPEC = ContextSpec(Navigation().observation_space, Navigation().action_space)


def mixture(tasks=4, latent=2, *, dtype=torch.float64, random=True, seed=0):
    latents = TaskLatents(tasks, latent, spread=1.0, scale=0.3, seed=seed).to(dtype)
    found = MixtureContext.make(SPEC, latents, seed=seed, width=8, waves=8)
    if random:  # an untrained encoder says nothing
        with torch.no_grad():
            found.encoder.network[-1].weight.normal_(0.0, 1.0, generator=torch.Generator().manual_seed(seed))
    return found


def context(tasks=3, shots=5, *, dtype=torch.float64, seed=0, mask=None):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tasks, shots, SPEC.features, generator=g, dtype=dtype)
    return Observations(x, torch.randn(tasks, shots, generator=g, dtype=dtype), mask)


# -- the distribution ------------------------------------------------------------------------------------------------


def test_its_density_is_the_mixtures():
    latent, seen = mixture(), context()
    q = latent.posterior(seen)
    z = torch.randn(7, 3, 2, dtype=torch.float64)
    logits = latent.encoder.factors(seen).sum(1)
    weights = logits.exp() / logits.exp().sum(-1, keepdim=True)
    loc, scale = latent.latents.loc.detach(), latent.latents.scale.detach()
    gaps = (z[..., None, :] - loc) / scale
    densities = (-0.5 * gaps.square() - scale.log() - 0.5 * math.log(2 * math.pi)).sum(-1).exp()
    assert torch.allclose(q.log_prob(z), (weights * densities).sum(-1).log(), atol=1e-12, rtol=0)
    uniform = densities.mean(-1).log()  # control: weights that read nothing
    assert not torch.allclose(q.log_prob(z), uniform, atol=1e-2)
    assert torch.allclose(q.mean, weights @ loc, atol=1e-12)


def test_draws_are_of_the_mixture():
    latent, seen = mixture(), context()
    q = latent.posterior(seen)
    draws = latent.sample(q, 40_000, 1)
    assert draws.shape == (40_000, 3, 2)
    assert not draws.requires_grad
    error = q.variance.sqrt() / 40_000**0.5
    assert ((draws.mean(0) - q.mean).abs() < 5 * error).all()
    # the second moment tells a mixture from a Gaussian at its mean
    expected = q.variance + q.mean.square()
    squares = draws.square()
    assert ((squares.mean(0) - expected).abs() < 5 * squares.std(0) / 40_000**0.5).all()
    assert torch.equal(draws, latent.sample(q, 40_000, 1))
    assert not torch.equal(draws, latent.sample(q, 40_000, 2))


def test_draws_of_each_task_are_by_its_own_weights():
    """Each of six beliefs is sure of another known task, whose Gaussians stand far apart."""
    latent = mixture()
    sure = torch.tensor([[2, 0, 1], [1, 2, 0]])
    with torch.no_grad():
        latent.latents.loc.copy_(10.0 * torch.arange(latent.latents.tasks).unsqueeze(1))
        latent.latents.log_scale.fill_(math.log(0.1))
    q = latent.of_state(100.0 * torch.nn.functional.one_hot(sure, latent.latents.tasks).double())
    draws = latent.sample(q, 5)
    assert draws.shape == (5, 2, 3, 2)
    assert ((draws - 10.0 * sure.unsqueeze(-1)).abs() < 1).all()


def test_without_context_it_is_the_prior_exactly():
    latent = mixture()
    z = torch.randn(3, 2, dtype=torch.float64)
    prior = latent.prior(3).log_prob(z)
    alone = torch.stack([dist.Normal(m, s).to_event(1).log_prob(z) for m, s in zip(*parts(latent))])
    assert torch.allclose(prior, alone.exp().mean(0).log(), atol=1e-12)
    assert torch.equal(latent.posterior(SPEC.empty(3, z)).log_prob(z), prior)
    nothing = context(mask=torch.zeros(3, 5, dtype=torch.bool))
    assert torch.equal(latent.posterior(nothing).log_prob(z), prior)
    untrained = mixture(random=False)
    assert torch.equal(untrained.posterior(context()).log_prob(z), untrained.prior(3).log_prob(z))


def parts(latent):
    return latent.latents.loc.detach(), latent.latents.scale.detach()


def test_order_and_padding_do_not_count():
    latent, seen = mixture(), context()
    weights = latent.encoder(seen)
    shuffled = Observations(seen.x[:, [3, 0, 4, 1, 2]], seen.y[:, [3, 0, 4, 1, 2]])
    assert torch.allclose(latent.encoder(shuffled), weights, atol=1e-12)
    mask = torch.tensor([True] * 5 + [False] * 2).expand(3, 7)
    x, y = (torch.cat([v, torch.full_like(v[:, :2], 9.0)], 1) for v in (seen.x, seen.y))
    assert torch.allclose(latent.encoder(Observations(x, y, mask)), weights, atol=1e-12)
    assert not torch.allclose(latent.encoder(Observations(x, y)), weights, atol=1e-3)  # control: rows that count


def test_steps_are_the_same_as_all_at_once():
    latent, seen = mixture(), context()
    whole = latent.beliefs(seen)
    state = latent.first_state(3)
    z = torch.randn(3, 2, dtype=torch.float64)
    for step in range(6):
        assert torch.allclose(latent.of_state(state).log_prob(z), whole.log_prob(z)[step], atol=1e-12)
        if step < 5:
            state = latent.step(state, Observations(seen.x[:, step : step + 1], seen.y[:, step : step + 1]))
    assert torch.allclose(whole.log_prob(z)[5], latent.posterior(seen).log_prob(z), atol=1e-12)
    some = latent.beliefs(seen, torch.tensor([0, 3]))
    assert torch.allclose(some.log_prob(z), whole.log_prob(z)[[0, 3]], atol=1e-12)


def test_it_is_a_pair_of_pyro_programs():
    latent, seen = mixture(), context()
    with torch.random.fork_rng():
        guide, model = poutine.trace(latent.guide).get_trace(seen), poutine.trace(latent.model).get_trace(seen)
    z = guide.nodes["z"]["value"]
    assert z.shape == (3, 1, 2)
    assert [f.name for f in guide.nodes["z"]["cond_indep_stack"]] == [
        f.name for f in model.nodes["z"]["cond_indep_stack"]
    ]
    expected = latent.posterior(seen).log_prob(z.squeeze(1))
    assert torch.allclose(guide.nodes["z"]["fn"].log_prob(z).squeeze(-1), expected)
    prior = model.nodes["z"]["fn"].log_prob(z).squeeze(-1)
    assert torch.allclose(prior, latent.prior(3).log_prob(z.squeeze(1)))


def test_the_tasks_latents_have_the_closed_kl_and_gradients():
    latents = TaskLatents(3, 2, spread=0.7, scale=0.4, seed=1).double()
    loc, scale = latents.loc, latents.scale
    closed = 0.5 * (loc.square() + scale.square() - 1 - 2 * scale.log()).sum(-1)
    assert torch.allclose(latents.kl(), closed, atol=1e-12)
    assert not torch.allclose(latents.kl(), closed / 2, atol=1e-3)
    latents.rsample(torch.Generator().manual_seed(0)).square().sum().backward()
    assert (latents.loc.grad != 0).all()
    assert (latents.log_scale.grad != 0).all()


# -- distillation: the posterior over tasks --------------------------------------------------------------------------

#: Probability of a reward by task and place.
CHANCES = torch.tensor([[0.9, 0.1, 0.5], [0.1, 0.9, 0.5], [0.1, 0.1, 0.8], [0.5, 0.5, 0.1]])


def played(batch, generator, shots=6):
    """Tasks drawn alike, and what happens at random places of them."""
    task = torch.randint(4, (batch,), generator=generator)
    place = torch.randint(3, (batch, shots), generator=generator)
    chance = CHANCES[task].gather(1, place)
    reward = (torch.rand(batch, shots, generator=generator) < chance).float()
    return task, Observations(torch.nn.functional.one_hot(place, 3).float(), reward)


def enumerated(seen):
    """p(task | context) by Bayes' rule."""
    place = seen.x.argmax(-1)
    chance = CHANCES[:, place].movedim(0, -1)  # [batch, shots, tasks]
    likelihood = torch.where(seen.y.unsqueeze(-1) > 0.5, chance, 1 - chance)
    return likelihood.log().sum(1).softmax(-1)


def distilled(labels, steps=100):
    """Weights that a distilled mixture gives to fresh contexts, and the exact ones."""
    latents = TaskLatents(4, 1, scale=0.1)
    with torch.no_grad():
        latents.loc.copy_(torch.arange(4.0)[:, None])  # they do not overlap: weights are beliefs about tasks
    with torch.random.fork_rng():
        torch.manual_seed(0)
        latent = MixtureContext(latents, FactorEncoder(3, 1, 4, waves=8, frequency=1.0, width=32))
    optimizer = torch.optim.Adam(latent.encoder.parameters(), 2e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps)
    g = torch.Generator().manual_seed(0)
    before = latents.loc.clone()
    for _ in range(steps):
        task, seen = played(128, g)
        task = labels(task, g)
        z = latents.rsample(g)[task]
        loss = distillation_loss(latent, seen, z, torch.arange(1, 7))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    assert torch.equal(latents.loc, before)
    assert latents.loc.grad is None
    _, seen = played(2000, g)
    with torch.no_grad():
        return latent.posterior(seen).mixture_distribution.probs, enumerated(seen)


def test_a_distilled_mixture_is_the_bayesian_belief():
    found, exact = distilled(lambda task, g: task)
    assert float((found - exact).abs().mean()) < 0.02
    # control: labels that have nothing to do with the context
    wrong, exact = distilled(lambda task, g: task[torch.randperm(len(task), generator=g)], steps=40)
    assert float((wrong - exact).abs().mean()) > 0.15


@pytest.mark.parametrize("encoder", ["product", "recurrent", "mean"])
def test_the_loss_of_a_gaussian_belief_is_its_density_at_each_prefix(encoder):
    latent = LatentContext.make(SPEC, 2, encoder, width=8, dtype=torch.float64)
    seen = context()
    z, steps = torch.randn(3, 2, dtype=torch.float64), torch.tensor([0, 2, 5])
    expected = [latent.posterior(Observations(seen.x[:, :n], seen.y[:, :n])).log_prob(z) for n in (0, 2, 5)]
    loss = distillation_loss(latent, seen, z, steps)
    assert torch.allclose(loss, -torch.stack(expected).mean(), atol=1e-10)


# -- chains ----------------------------------------------------------------------------------------------------------


def test_chains_keep_order_and_tasks_and_forget_the_oldest():
    chains = Chains(2)
    for number in range(3):
        x = torch.arange(2.0)[:, None, None] * 100 + number * 10 + torch.arange(3.0)[None, :, None]
        chains.add(Observations(x, torch.zeros(2, 3)))
    assert len(chains) == 2
    seen, which = chains.sample(200, torch.Generator().manual_seed(0))
    assert (seen.x[:, 0, 0] // 100 == which).all()
    assert (seen.x[:, :, 0] % 10 == torch.arange(3.0)).all()
    assert set((seen.x[:, 0, 0] % 100 // 10).tolist()) == {1.0, 2.0}  # trial 0 is gone
    again = Chains(2)
    again.load_state_dict(chains.state_dict())
    assert torch.equal(
        again.sample(9, torch.Generator().manual_seed(1))[0].x, chains.sample(9, torch.Generator().manual_seed(1))[0].x
    )
    again.add(Observations(torch.full((2, 3, 1), 70.0), torch.zeros(2, 3)))  # in the place of the oldest, trial 1
    seen, _ = again.sample(200, torch.Generator().manual_seed(0))
    assert set((seen.x[:, 0, 0] % 100 // 10).tolist()) == {2.0, 7.0}


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: TaskLatents(0, 2), errors.OptionError, "tasks and latent must be whole numbers"),
        (lambda: TaskLatents(3, 0), errors.OptionError, "a latent of size 0 says nothing"),
        (lambda: TaskLatents(3, 2, scale=0.0), errors.OptionError, "scale positive"),
        (lambda: FactorEncoder(3, 1, 4, frequency=0.0), errors.OptionError, "frequency and gain positive"),
        (lambda: MixtureContext(TaskLatents(3, 2), FactorEncoder(3, 1, 4)), errors.ShapeError, "weights of 4 tasks"),
        (lambda: mixture().posterior(WIDE), errors.ContextError, "9 input"),
        (lambda: Chains(0), errors.OptionError, "capacity of chains"),
        (lambda: Chains(1).sample(2, torch.Generator()), errors.ReplayError, "no trials"),
        (lambda: Chains(2).load_state_dict(Chains(1).state_dict()), errors.CheckpointError, "keeps 1 trials"),
    ],
)  # fmt: skip
def test_bad_input(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_trials_of_another_length_are_refused():
    chains = Chains(2)
    chains.add(context())
    with pytest.raises(errors.ShapeError, match="Trials must be of one length"):
        chains.add(context(shots=4))
