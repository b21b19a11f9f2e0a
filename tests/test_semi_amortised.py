"""Semi-amortised inference: from a bad start to the posterior by steps and by NUTS; gradients through the steps."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal, kl_divergence

import bayesmeta as bm
from bayesmeta import errors
from bayesmeta.adapt.amortised import batch_distribution
from bayesmeta.ops.random import as_generator, normal_like
from bayesmeta.posteriors.gaussian import MultivariateNormalPosterior
from tests.programs import LinearHierarchy, TwoSites, batch_of

F64 = torch.float64


def ragged(tasks=4, features=1):
    support = batch_of(tasks, 5, features, dtype=F64, ragged=True)
    return bm.TaskBatch(support, batch_of(tasks, 4, features, seed=1, dtype=F64, ragged=True), population=tasks)


def stirred(method, batch, size=0.2):
    """The method with a recognition network of no first weights."""
    method.prepare(batch)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in method.recognition.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return method


def head_model(prior="normal"):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = bm.nets.mlp(1, [4], 1, activation="tanh")
    return bm.NeuralTaskModel(network, bm.Gaussian(0.5), prior, task_modules="head").double()


# -- the truth: linear-Gaussian tasks, far from those of training -------------------------------------------------


def level_and_slope(num_tasks, shots, seed, reach=1.0):
    """y = φ · [1, x] + noise of scale 0.5, φ ~ N(0, I), x ~ U(−reach, reach)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.cat([torch.ones(num_tasks, shots, 1), 2 * torch.rand(num_tasks, shots, 1, generator=generator) - 1], -1)
    x[..., 1] *= reach
    phi = torch.randn(num_tasks, 2, 1, generator=generator)
    y = (x @ phi).squeeze(-1) + 0.5 * torch.randn(num_tasks, shots, generator=generator)
    return bm.Observations(x.double(), y.double())


def linear_model():
    model = bm.NeuralTaskModel(nn.Linear(2, 1, bias=False), bm.Gaussian(0.5), bm.priors.Normal(1.0)).double()
    with torch.no_grad():
        model.prior.loc.zero_()
    return model.requires_grad_(False)


def exact(support):
    precision = torch.eye(2, dtype=F64) + support.x.mT @ support.x / 0.25
    loc = torch.linalg.solve(precision, support.x.mT @ support.y.unsqueeze(-1) / 0.25).squeeze(-1)
    return MultivariateNormal(loc, precision_matrix=precision)


def kl_to_exact(posterior, support):
    """KL(q ‖ exact) of each task."""
    q = batch_distribution(posterior)
    if not isinstance(q, MultivariateNormal):
        q = MultivariateNormal(q.mean, scale_tril=q.stddev.diag_embed())
    return kl_divergence(q, exact(support))[0]


def mean_field_optimum(support):
    """The least KL of a diagonal Gaussian: the exact means, and the precision's diagonal."""
    precision = exact(support).precision_matrix
    return 0.5 * (precision.diagonal(dim1=-2, dim2=-1).log().sum(-1) - torch.logdet(precision))


@pytest.fixture(scope="module")
def trained():
    """By posterior: an encoder that has seen inputs up to 1."""
    found = {}
    for posterior in ("diagonal", "full"):
        method = bm.Amortised(linear_model(), "mean", posterior=posterior, width=16)
        method.prepare(level_and_slope(2, 6, seed=0))
        optimizer = torch.optim.Adam(method.recognition.parameters(), 0.01)
        for step in range(150):
            everything = level_and_slope(32, 6, seed=step)
            batch = bm.TaskBatch(
                *(bm.Observations(everything.x[:, i], everything.y[:, i]) for i in (slice(3), slice(3, 6)))
            )
            optimizer.zero_grad()
            method.loss(batch, generator=step).backward()
            optimizer.step()
        found[posterior] = method.eval()
    return found


@pytest.mark.parametrize("posterior", ["diagonal", "full"])
def test_steps_close_the_gap_far_from_the_training_tasks(trained, posterior):
    """Down to the family's best: the mean-field optimum by closed form, or 0 with correlations."""
    support = level_and_slope(30, 6, seed=999, reach=3.0)

    def kl(steps):
        # a rate below 2 / (largest curvature of the mean log-density), which is about 0.25 + 9 / 0.25
        method = bm.SemiAmortised(trained[posterior], inner_steps=steps, inner_lr=0.02, num_particles=32)
        return kl_to_exact(method.adapt(support), support)

    gaps = [kl(steps) for steps in (0, 10, 50, 300)]
    best = mean_field_optimum(support) if posterior == "diagonal" else torch.zeros(30, dtype=F64)
    means = [gap.mean().item() for gap in gaps]
    assert means[0] > best.mean() + 1.0  # control: the encoder alone is off
    assert means[0] > means[1] > means[2] > means[3]
    assert all((gap > best - 1e-9).all() for gap in gaps)  # no q of the family is better
    # noise that is left: Σ_i ρ Λ_i / (4 · 32) nats or less for a step of ρ on the mean, below 0.02 here
    assert means[3] - best.mean() < 0.05


@pytest.mark.parametrize(
    "family", ["diagonal", pytest.param("full", marks=pytest.mark.slow), pytest.param("flow", marks=pytest.mark.slow)]
)
def test_nuts_from_a_bad_start_is_exact(trained, family):
    """Means and variances within 4 Monte Carlo standard errors; control: q itself, from which the chains start."""
    support = level_and_slope(4, 6, seed=998, reach=2.0)
    amortised = trained.get(family)
    if amortised is None:
        amortised = stirred(bm.Amortised(linear_model(), posterior="flow", width=8), support, 0.1)
    method = bm.SemiAmortised(amortised, "nuts", num_samples=100, warmup=40, num_chains=2, max_tree_depth=5)
    posterior, truth = method.adapt(support, generator=1), exact(support)
    found = posterior.diagnostics()
    assert posterior.u.shape == (200, 4, 2)
    assert found.max_rhat < 1.1
    assert found.min_ess > 40

    def z_scores(u, ess):
        z = (u.mean(0) - truth.mean) / (u.std(0) / ess.sqrt())
        square = (u - truth.mean).square()
        return z, (square.mean(0) - truth.variance) / (square.std(0) / (ess / 2).sqrt())

    assert all(z.abs().max() < 4 for z in z_scores(posterior.u, found.ess))
    start = amortised.adapt(support).draws(300).u
    assert max(z.abs().max() for z in z_scores(start, torch.full((4, 2), 300.0))) > 10


def test_in_units_of_a_good_q_steps_are_long_at_once():
    """Two weights with posterior standard deviations 100 apart: NUTS on the weights takes the steps of the smaller."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 8, 2, generator=generator, dtype=F64) * torch.tensor([1.0, 0.01], dtype=F64)
    support = bm.Observations(x, torch.randn(3, 8, generator=generator, dtype=F64))
    program = LinearHierarchy(torch.zeros(2), torch.tensor([1.0, 100.0]), 0.1).double()
    options = {"num_samples": 40, "warmup": 10, "num_chains": 1, "max_tree_depth": 3}
    method = bm.SemiAmortised(bm.Amortised(program, posterior="full", width=8), "nuts", **options)
    method.prepare(support)
    precision = torch.diag(torch.tensor([1.0, 1e-4], dtype=F64)) + x.mT @ x / 0.01
    root = torch.linalg.cholesky(torch.linalg.inv(precision))
    loc = torch.linalg.solve(precision, x.mT @ support.y.unsqueeze(-1) / 0.01).squeeze(-1)
    q = MultivariateNormalPosterior(method.program, support, loc[None], root[None])
    found = method.nuts.sample_from(q, support, None, torch.Generator().manual_seed(0))
    plain = bm.NUTS(method.program, **options).adapt(support, start=q)
    assert found.diagnostics().step_size.min() > 10 * plain.diagnostics().step_size.max()
    z = (found.u - loc).mean(0) / (found.u.std(0) / found.diagnostics().ess.sqrt())
    assert z.abs().max() < 4


# -- no steps, and what a step is ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["elbo", "predictive", "full", "versa", "likelihood"])
def test_without_steps_it_is_the_amortised_method(kind):
    """Posterior, loss and gradients, equal to the last bit under one seed."""
    batch = ragged()
    if kind == "versa":
        amortised = bm.Versa(head_model(), width=8, subsets=True)
    elif kind == "likelihood":
        amortised = bm.NeuralProcess(head_model(), latent_size=2, width=8, objective="likelihood")
    else:
        options = {"posterior": "full"} if kind == "full" else {"objective": kind}
        amortised = bm.Amortised(TwoSites().double(), width=8, global_guide="normal", **options)
    stirred(amortised, batch)
    method = bm.SemiAmortised(amortised, inner_steps=0)

    def result(m):
        m.zero_grad()
        loss = m.loss(batch, generator=3)
        loss.backward()
        state = m.adapt(batch.support, generator=4, num_theta=3).state()
        return [loss, *state.values(), *(p.grad for p in amortised.parameters() if p.grad is not None)]

    for one, other in zip(result(amortised), result(method), strict=True):
        assert torch.equal(one, other)
    method.vi.inner_steps = 1  # control
    assert not torch.equal(result(amortised)[0], result(method)[0])


def test_a_step_by_hand():
    """One weight: the gradient of the ELBO in mean and log standard deviation, written out for the same draws."""
    x = torch.tensor([[[1.0], [-2.0], [0.5]]], dtype=F64)
    support = bm.Observations(x, torch.tensor([[0.3, -1.0, 0.8]], dtype=F64))
    program = LinearHierarchy(torch.zeros(1), torch.ones(1), 0.7).double()
    method = bm.SemiAmortised(bm.Amortised(program, width=8), inner_steps=1, inner_lr=0.05, num_particles=4)
    stirred(method, support)
    q = method.amortised.adapt(support)
    m, s = q.loc.item(), q.scale.item()
    noise = normal_like(q.loc, (4, 1, 1, 1), as_generator(8, "cpu", "adapt")).flatten()
    phi = m + s * noise
    slope = ((support.y - phi[:, None] * x[..., 0]) * x[..., 0]).sum(-1) / 0.49 - phi  # of log p(S, φ)
    expected = (m + 0.05 * slope.mean() / 3, math.log(s) + 0.05 * ((slope * s * noise).mean() + 1) / 3)
    found = method.adapt(support, generator=8)
    assert found.loc.item() == pytest.approx(float(expected[0]), rel=1e-6)
    assert found.scale.log().item() == pytest.approx(float(expected[1]), rel=1e-6)
    assert abs(found.loc.item() - m) > 1e-3


def test_no_step_is_longer_than_its_bound():
    batch = ragged()
    amortised = stirred(bm.Amortised(TwoSites().double(), width=8), batch)
    q = amortised.adapt(batch.support)
    _, prior_scale = amortised.program.prior_moments(batch.support, amortised.theta_guide.centre().detach())
    for bound in (0.1, 1.0):
        method = bm.SemiAmortised(amortised, inner_steps=1, inner_lr=100.0, max_step=bound)
        found = method.adapt(batch.support)
        assert ((found.loc - q.loc).abs() / prior_scale).max().item() == pytest.approx(bound)
        assert (found.scale.log() - q.scale.log()).abs().max().item() == pytest.approx(bound)
    free = bm.SemiAmortised(amortised, inner_steps=1, inner_lr=100.0, max_step=math.inf).adapt(batch.support)
    assert ((free.loc - q.loc).abs() / prior_scale).max() > 2  # control


@pytest.mark.parametrize("posterior", ["diagonal", "full"])
def test_from_a_q_that_is_far_too_wide_gradients_stay_finite(posterior):
    """In single precision, through the steps; they begin at e standard deviations of the prior. Control: unbounded."""
    batch = ragged()
    parts = [bm.Observations(o.x.float(), o.y.float(), o.mask) for o in (batch.support, batch.query)]
    batch = bm.TaskBatch(*parts, population=4)
    amortised = stirred(bm.Amortised(TwoSites(), posterior=posterior, width=8, objective="predictive"), batch)
    infer = amortised.infer

    def wide(observations, theta=None):
        q = infer(observations, theta)
        if posterior == "diagonal":
            q.scale = 200.0 * q.scale
        else:
            q.root = 200.0 * q.root
        return q

    def gradient(method):
        method.zero_grad()
        method.loss(batch, generator=1).backward()
        return torch.cat([p.grad.flatten() for p in method.parameters() if p.grad is not None])

    amortised.infer = wide
    method = bm.SemiAmortised(amortised, inner_steps=3, inner_lr=0.01)
    assert gradient(method).isfinite().all()
    still = bm.SemiAmortised(amortised, inner_steps=1, inner_lr=1e-30).adapt(batch.support)
    spread = still.scale if posterior == "diagonal" else still.root.square().sum(-1).sqrt()
    _, prior_scale = amortised.program.prior_moments(batch.support, amortised.theta_guide.centre().detach())
    torch.testing.assert_close(spread, (math.e * prior_scale).expand_as(spread), rtol=1e-4, atol=1e-5)
    method.vi.climb = lambda *args: bm.ABML.climb(method.vi, *args)
    assert not gradient(method).isfinite().all()


def test_the_square_root_of_a_covariance_goes_into_steps_and_back():
    batch = ragged()
    amortised = stirred(bm.Amortised(TwoSites().double(), posterior="full", width=8), batch)
    q = amortised.adapt(batch.support)
    found = bm.SemiAmortised(amortised, inner_steps=1, inner_lr=1e-12).adapt(batch.support)
    torch.testing.assert_close(found.root, q.root, rtol=1e-8, atol=1e-8)
    assert q.root.tril(-1).abs().max() > 1e-3


# -- training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("posterior", ["diagonal", "full"])
@pytest.mark.parametrize("objective", ["elbo", "predictive", "marginal"])
def test_gradients_through_the_steps_by_finite_differences(posterior, objective):
    batch = ragged()
    amortised = bm.Amortised(TwoSites().double(), posterior=posterior, width=8, global_guide="normal", num_particles=2)
    options = {"inner_steps": 3, "inner_lr": 0.02, "objective": objective, "num_particles": 2}
    method = stirred(bm.SemiAmortised(amortised, **options), batch).eval()
    first_order = bm.SemiAmortised(amortised, first_order=True, **options).eval()

    def gradients(m):
        m.zero_grad()
        m.loss(batch, generator=5).backward()
        return [None if p.grad is None else p.grad.clone() for p in amortised.parameters()]

    exact_ones, others = gradients(method), gradients(first_order)
    checked, differ = 0, 0.0
    for parameter, gradient, other in zip(amortised.parameters(), exact_ones, others, strict=True):
        flat = parameter.data.view(-1)
        values = []
        for sign in (1, -1):
            flat[0] += sign * 1e-6
            values.append(method.loss(batch, generator=5).item())
            flat[0] -= sign * 1e-6
        slope = (values[0] - values[1]) / 2e-6
        found = 0.0 if gradient is None else gradient.view(-1)[0].item()
        assert found == pytest.approx(slope, rel=1e-4, abs=1e-5)
        differ = max(differ, 0.0 if other is None else abs(other.view(-1)[0].item() - slope))
        checked += abs(slope) > 1e-3
    assert checked >= 8
    assert differ > 1e-2  # control: without the derivative of the steps it is another gradient
    assert torch.equal(method.loss(batch, generator=5), first_order.loss(batch, generator=5))


def test_training_through_the_steps_lowers_the_loss():
    held_out = level_and_slope(100, 6, seed=999)
    batch = bm.TaskBatch(*(bm.Observations(held_out.x[:, i], held_out.y[:, i]) for i in (slice(3), slice(3, 6))))
    method = bm.SemiAmortised(bm.Amortised(linear_model(), width=16), inner_steps=2, inner_lr=0.01)
    method.prepare(batch)
    before = method.eval().loss(batch, generator=0).item()
    optimizer = torch.optim.Adam(method.parameters(), 0.01)
    method.train()
    for step in range(80):
        everything = level_and_slope(16, 6, seed=step)
        part = bm.TaskBatch(*(bm.Observations(everything.x[:, i], everything.y[:, i]) for i in (slice(3), slice(3, 6))))
        optimizer.zero_grad()
        method.loss(part, generator=step).backward()
        optimizer.step()
    after = method.eval().loss(batch, generator=0).item()
    assert after < before - 1.0
    evidence = MultivariateNormal(
        torch.zeros(6, dtype=F64), held_out.x @ held_out.x.mT + 0.25 * torch.eye(6, dtype=F64)
    ).log_prob(held_out.y)
    assert after > -evidence.mean().item() - 0.2  # a bound


def test_theta_is_the_wrapped_methods():
    batch = ragged()
    method = bm.SemiAmortised(bm.Amortised(TwoSites().double(), width=8, global_guide="normal"))
    method.prepare(batch)
    assert method.theta_guide is method.amortised.theta_guide
    assert method.adapt(batch.support, num_theta=3).loc.shape == (3, 4, 2)
    names = {id(p) for p in method.amortised.parameters()}
    assert {id(p) for p in method.parameters()} == names
    nuts = bm.SemiAmortised(method.amortised, "nuts", num_samples=3, warmup=2, num_chains=2, max_tree_depth=2)
    posterior = nuts.adapt(batch.support, num_theta=3)
    assert posterior.u.shape == (2 * 3 * 3, 4, 2)
    assert posterior.theta.shape[0] == len(posterior.u)


# -- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"refine": "svgd"}, "Unknown refine 'svgd'"),
        ({"objective": "likelihood"}, "Unknown objective 'likelihood'"),
        ({"inner_steps": 1.5}, "whole number"),
        ({"inner_steps": -1}, "≥ 0"),
        ({"inner_lr": math.nan}, "inner_lr finite"),
        ({"inner_lr": 0.0}, "rates > 0"),
        ({"max_step": 0.0}, "max_step above 0"),
        ({"num_particles": 0}, "particles ≥ 1"),
        ({"refine": "nuts", "num_samples": 0}, "num_samples"),
    ],
)
def test_unknown_options(options, match):
    with pytest.raises(errors.OptionError, match=match):
        bm.SemiAmortised(bm.Amortised(TwoSites()), **options)


def test_what_cannot_be_refined_or_trained():
    flow = bm.Amortised(TwoSites().double(), posterior="flow", width=8)
    with pytest.raises(errors.UnsupportedError, match="refine='nuts'"):
        bm.SemiAmortised(flow)
    with pytest.raises(errors.UnsupportedError, match="Point"):
        bm.SemiAmortised(head_model("point"))
    of_a_process = bm.NeuralTaskModel(bm.nets.mlp(1, [4], 1), bm.Gaussian(0.5), "point")
    for other in (bm.SemiAmortised(TwoSites()), bm.ConditionalNeuralProcess(of_a_process), bm.ABML(TwoSites())):
        name = type(other).__name__
        with pytest.raises(errors.UnsupportedError, match=f"Amortised, NeuralProcess or Versa; got a {name}"):
            bm.SemiAmortised(other)
    method = bm.SemiAmortised(flow, "nuts")
    for name in ("inner_steps", "inner_lr", "inner_lr_scale"):
        with pytest.raises(errors.OptionError, match=f"no gradient steps; got {name}=1"):
            bm.SemiAmortised(flow, "nuts", **{name: 1})
    with pytest.raises(errors.UnsupportedError, match="has no loss"):
        method.loss(ragged())
    with pytest.raises(errors.UnsupportedError, match="no Pyro guide"):
        method.guide(ragged())
