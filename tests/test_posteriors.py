"""Posteriors with correlations and of particles, and the mixture by which particles predict."""

import math

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import MultivariateNormal

import bayesmeta as bm
from bayesmeta import errors
from bayesmeta.posteriors.mixture import LeftMixture
from tests.programs import LinearHierarchy, TwoSites, batch_of

F64 = torch.float64


def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return bm.NeuralTaskModel(bm.nets.mlp(1, [3], 1), bm.Gaussian(0.5)).double()


@pytest.mark.parametrize("width", [3, 5])
def test_gaussian_with_correlations(width):
    observations = batch_of(4, 3, 3, dtype=F64)
    program = LinearHierarchy(torch.zeros(3, dtype=F64), torch.ones(3, dtype=F64), 0.5)
    program = bm.TaskProgram(program).prepare(observations)
    generator = torch.Generator().manual_seed(0)
    loc = torch.randn(1, 4, 3, generator=generator, dtype=F64)
    root = torch.randn(1, 4, 3, width, generator=generator, dtype=F64)
    posterior = bm.MultivariateNormalPosterior(program, observations, loc, root)
    exact = MultivariateNormal(loc[0], root[0] @ root[0].mT)
    u = torch.randn(7, 4, 3, generator=generator, dtype=F64)
    torch.testing.assert_close(posterior.log_prob(u), exact.log_prob(u), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(posterior.u_distribution().log_prob(u.unsqueeze(-2)).squeeze(-1), exact.log_prob(u))
    draws = posterior.draws(40_000, 1).u - loc
    covariance = torch.einsum("nti,ntj->tij", draws, draws) / 40_000
    variance = exact.variance
    error = ((variance.unsqueeze(-1) * variance.unsqueeze(-2) + exact.covariance_matrix**2) / 40_000).sqrt()
    assert ((covariance - exact.covariance_matrix).abs() < 5 * error).all()
    assert ((covariance - torch.diag_embed(variance)).abs() > 5 * error).any()  # control: correlations are seen


def test_gaussian_over_draws_of_theta_is_a_mixture_and_saves(tmp_path):
    observations = batch_of(3, 4, dtype=F64)
    program = bm.TaskProgram(TwoSites()).double().prepare(observations)
    loc, root = torch.randn(5, 3, 2, dtype=F64), torch.eye(2, dtype=F64).expand(5, 3, 2, 2)
    theta = torch.randn(5, 1, dtype=F64)
    posterior = bm.MultivariateNormalPosterior(program, observations, loc, root, theta)
    u = torch.randn(6, 3, 2, dtype=F64)
    each = torch.stack([MultivariateNormal(loc[g], torch.eye(2, dtype=F64)).log_prob(u) for g in range(5)])
    torch.testing.assert_close(posterior.log_prob(u), each.logsumexp(0) - math.log(5), rtol=1e-6, atol=1e-6)
    draws = posterior.draws(10)
    assert torch.equal(draws.theta[:5], theta)
    posterior.save(tmp_path / "posterior.pt")
    again = bm.load_posterior(tmp_path / "posterior.pt", program)
    assert torch.equal(again.draws(10).u, draws.u)


def test_particles_take_turns_and_predict_by_their_mixture(tmp_path):
    observations, program = batch_of(4, 3, dtype=F64), model()
    program.prepare(observations)
    u = torch.randn(3, 4, program.flat.size, dtype=F64)
    posterior = bm.ParticlesPosterior(program, observations, u)
    assert torch.equal(posterior.draws(7).u, torch.cat([u, u, u])[:7])
    predictive = posterior.predictive(observations)
    each = program.log_likelihood(u, observations)
    torch.testing.assert_close(predictive.log_prob(observations.y), each.logsumexp(0) - math.log(3))
    joint = posterior.predictive(observations, joint=True)
    torch.testing.assert_close(joint.log_prob(observations.y), each.sum(-1).logsumexp(0) - math.log(3))
    assert joint.batch_shape == (4,)
    means = program.output(u, observations.x).squeeze(-1)
    torch.testing.assert_close(predictive.mean, means.mean(0))
    expected = program.noise_scale**2 + means.var(0, correction=0)
    torch.testing.assert_close(predictive.variance, expected, check_dtype=False)
    for refused in (lambda: posterior.log_prob(u), posterior.u_distribution):
        with pytest.raises(errors.UnsupportedError, match="no density"):
            refused()
    posterior.save(tmp_path / "posterior.pt")
    assert torch.equal(bm.load_posterior(tmp_path / "posterior.pt", program).u, u)
    scored = bm.scores(posterior, bm.TaskBatch(observations, observations), num_samples=300)
    nll = -predictive.log_prob(observations.y).mean()
    assert scored["nll"] == pytest.approx(nll.item(), rel=1e-6)


def test_left_mixture_is_torchs_mixture():
    generator = torch.Generator().manual_seed(0)
    logits, loc = torch.randn(4, 5, generator=generator), torch.randn(4, 5, generator=generator)
    scale = torch.rand(4, 5, generator=generator) + 0.5
    ours = LeftMixture(logits, dist.Normal(loc, scale))
    theirs = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(logits=logits.T), torch.distributions.Normal(loc.T, scale.T)
    )
    value = torch.randn(5, generator=generator)
    for name in ("log_prob", "cdf"):
        torch.testing.assert_close(getattr(ours, name)(value), getattr(theirs, name)(value))
    torch.testing.assert_close(ours.mean, theirs.mean)
    torch.testing.assert_close(ours.variance, theirs.variance)
    many = torch.randn(6, 5, generator=generator)
    torch.testing.assert_close(ours.log_prob(many), theirs.log_prob(many))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draws = ours.sample((40_000,))
        vectors = LeftMixture(logits, dist.Normal(loc.unsqueeze(-1), 1.0).expand([4, 5, 3]).to_event(1))
        assert vectors.sample((2, 7)).shape == (2, 7, 5, 3)
    # draws have the right distribution: their ranks are uniform
    ranks = ours.cdf(draws).sort(0).values
    grid = (torch.arange(40_000) + 0.5).unsqueeze(-1) / 40_000
    assert (ranks - grid).abs().max() < 2.0 / 40_000**0.5  # Kolmogorov–Smirnov, p about 1e-3 for each of 5
    shifted = ours.cdf(draws + 0.1).sort(0).values  # control
    assert (shifted - grid).abs().max() > 2.0 / 40_000**0.5
