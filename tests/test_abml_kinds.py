"""ABML with full and low-rank covariances, a weight of the KL and its warm-up."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch.distributions import MultivariateNormal, kl_divergence

import bayesmeta as bm
from bayesmeta import errors
from bayesmeta.adapt import memory
from tests.numerics import by_finite_differences
from tests.programs import LinearHierarchy, TwoSites, batch_of
from tests.test_laplace_kronecker import Largest

F64 = torch.float64
KINDS = [{"posterior": "full"}, {"posterior": "low_rank", "rank": 2}]
each_kind = pytest.mark.parametrize("kind", KINDS, ids=["full", "low_rank"])


def correlated(features=2):
    """Tasks whose posterior is correlated: the features are nearly the same."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(2, 6, 1, generator=generator, dtype=F64)
    x = shared + 0.5 * torch.randn(2, 6, features, generator=generator, dtype=F64)
    return bm.Observations(x, torch.randn(2, 6, generator=generator, dtype=F64))


def exact_posterior(program, support):
    scale = program.scale.detach()
    precision = torch.diag(scale**-2) + support.x.mT @ support.x / program.noise**2
    right = program.mean.detach() / scale**2 + (support.x.mT @ support.y.unsqueeze(-1)).squeeze(-1) / program.noise**2
    return MultivariateNormal(torch.linalg.solve(precision, right), precision_matrix=precision)


def as_gaussian(posterior):
    covariance = getattr(posterior, "covariance", None)
    if covariance is None:
        covariance = torch.diag_embed(posterior.scale.square())
    return MultivariateNormal(posterior.loc[0], covariance[0])


def test_full_and_low_rank_reach_the_exact_posterior_and_mean_field_cannot():
    """Many small steps, on correlated features; with two parameters any covariance is of rank 1 and a diagonal."""
    program = LinearHierarchy(torch.tensor([0.3, -0.2]).double(), torch.tensor([1.0, 1.5]).double(), 0.7)
    support = correlated()
    exact = exact_posterior(program, support)
    options = {"inner_steps": 500, "inner_lr": 0.1, "inner_lr_scale": 0.5, "num_particles": 200}
    distance = {}
    for name in ("full", "low_rank", "diagonal"):
        found = as_gaussian(bm.ABML(program, posterior=name, **options).adapt(support))
        distance[name] = kl_divergence(found, exact)
    # noise of the last steps: variances of about 2 / 200, over an average of some steps
    assert distance["full"].max() < 0.02
    assert distance["low_rank"].max() < 0.02
    correlation = exact.covariance_matrix[:, 0, 1] / exact.stddev.prod(-1)
    optimum = -0.5 * (1 - correlation**2).log()  # KL of the best diagonal Gaussian
    assert (distance["diagonal"] > 0.9 * optimum).all()
    assert optimum.min() > 0.1


@each_kind
@pytest.mark.parametrize("network", [True, False], ids=["network", "program"])
def test_elbo_is_that_of_the_gaussian_that_adapt_returns(kind, network):
    """Against torch's own densities on the same draws: closed KL for a network, its estimate for a program."""
    if network:
        model = bm.NeuralTaskModel(torch.nn.Linear(2, 1), bm.Gaussian(0.5), bm.priors.Normal(0.5)).double()
        observations = batch_of(3, 5, 2, dtype=F64, ragged=True)
    else:
        model, observations = TwoSites().double(), batch_of(3, 5, dtype=F64, ragged=True)
    method = bm.ABML(model, inner_steps=4, inner_lr=0.02, **kind)
    method.prepare(observations)
    theta = None if network else torch.tensor([[0.4]], dtype=F64)
    generator = torch.Generator().manual_seed(3)
    state = [part.detach() for part in method._steps(observations, theta, generator, False)]
    posterior = method._adapt(observations, theta, generator.manual_seed(3), False)
    noise = torch.randn(6, 1, 3, posterior.root.shape[-1], dtype=F64, generator=generator)
    found = method.elbo(state[0], state[1], observations, theta, noise, state[2])
    u = posterior.loc + (posterior.root @ noise.unsqueeze(-1)).squeeze(-1)
    q = MultivariateNormal(posterior.loc, posterior.covariance)
    likelihood = method.program.log_likelihood(u, observations, theta).sum(-1).mean(0)
    if network:
        prior = MultivariateNormal(method.program.prior.loc, 0.25 * torch.eye(3, dtype=F64))
        divergence = kl_divergence(q, prior)
    else:
        divergence = -q.entropy() - method.program.log_prior(u, observations, theta).mean(0)
    torch.testing.assert_close(found, likelihood - divergence, rtol=1e-9, atol=1e-9)
    for weight in (0.0, 0.3):
        found = method.elbo(state[0], state[1], observations, theta, noise, state[2], weight)
        torch.testing.assert_close(found, likelihood - weight * divergence, rtol=1e-9, atol=1e-9)
    covariance = posterior.covariance[0, 0]  # control: there is a correlation that a diagonal would miss
    assert (covariance - torch.diag(covariance.diagonal())).abs().max() > 1e-4


@each_kind
@pytest.mark.parametrize("model", ["program", "global"])
def test_pyros_elbo_agrees_with_the_loss(kind, model):
    torch.manual_seed(0)
    tasks = 3
    batch = bm.TaskBatch(batch_of(tasks, 4, ragged=True), batch_of(tasks, 3, seed=1), population=tasks)
    program = TwoSites() if model == "global" else LinearHierarchy(torch.zeros(1), torch.ones(1), 0.7)
    method = bm.ABML(program, inner_steps=3, inner_lr=0.05, num_particles=4, global_guide="normal", **kind)
    n = 200
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        generator = torch.Generator().manual_seed(2)
        ours = torch.stack([tasks * method.loss(batch, generator=generator) for _ in range(n)])
        theirs = torch.tensor([Trace_ELBO().loss(method.model, method.guide, batch) for _ in range(n)])
        method.kl_weight = 3.0  # control: another objective
        method.inner_steps = 0
        other = torch.stack([tasks * method.loss(batch, generator=generator) for _ in range(n)])
    error = math.sqrt(float(ours.var() + theirs.var()) / n)
    assert abs(float(ours.mean() - theirs.mean())) < 4 * error
    error = math.sqrt(float(other.var() + theirs.var()) / n)
    assert abs(float(other.mean() - theirs.mean())) > 6 * error
    assert len(pyro.get_param_store()) == 0


@each_kind
@pytest.mark.parametrize("objective", ["elbo", "predictive"])
def test_meta_gradient_by_finite_differences(kind, objective):
    batch = bm.TaskBatch(batch_of(2, 4, dtype=F64, ragged=True), batch_of(2, 3, seed=1, dtype=F64), population=2)
    options = {"objective": objective, "kl_weight": 0.7, "global_guide": "normal", **kind}
    method = bm.ABML(TwoSites().double(), inner_steps=2, inner_lr=0.02, **options)
    method.prepare(batch)
    method.loss(batch, generator=5).backward()
    checked = 0
    for parameter in method.parameters():
        slope = by_finite_differences(method, batch, parameter, 0, generator=5)
        assert parameter.grad.view(-1)[0].item() == pytest.approx(slope, rel=1e-5, abs=1e-5)
        checked += abs(slope) > 1e-3
    assert checked >= 3


@each_kind
def test_it_begins_at_the_priors_variances(kind):
    observations = batch_of(2, 4, dtype=F64)
    method = bm.ABML(TwoSites().double(), inner_steps=0, **kind)
    posterior = method.adapt(observations)
    loc, scale = method.program.prior_moments(observations, posterior.theta)
    torch.testing.assert_close(posterior.loc, loc.expand_as(posterior.loc))
    variance = posterior.covariance.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(variance, scale.square().expand_as(variance))
    nothing = method.adapt(bm.Observations(observations.x[:, :0], observations.y[:, :0]))
    torch.testing.assert_close(nothing.covariance, torch.diag_embed(variance))
    has_correlation = (posterior.covariance - nothing.covariance).abs().max() > 1e-4
    assert has_correlation == (kind["posterior"] == "low_rank")


def test_a_cold_posterior_is_narrower():
    """With weight w the mean-field optimum has precision prior + data / w, in the diagonal."""
    program = LinearHierarchy(torch.zeros(2).double(), torch.ones(2).double(), 0.7)
    support = correlated()
    options = {"inner_steps": 300, "inner_lr": 0.05, "inner_lr_scale": 0.1, "num_particles": 200}
    posterior = bm.ABML(program, kl_weight=0.25, **options).adapt(support)
    data = support.x.square().sum(1) / 0.7**2
    torch.testing.assert_close(posterior.scale[0], (1 + data / 0.25).rsqrt(), rtol=0.06, atol=0.0)
    warm = bm.ABML(program, **options).adapt(support)
    assert (warm.scale / posterior.scale > 1.5).all()  # control


def test_warm_up_counts_training_losses_and_is_in_the_checkpoint():
    batch = bm.TaskBatch(batch_of(2, 4, dtype=F64), batch_of(2, 3, seed=1, dtype=F64))

    def method(**options):
        return bm.ABML(LinearHierarchy(torch.zeros(1), torch.ones(1), 0.7), inner_steps=0, **options).double()

    one, shifted = method(), method(kl_warmup=4)
    for m in (one, shifted):  # away from the prior, so that there is a divergence
        m.inner_steps, m.inner_lr, m.inner_lr_scale = 3, 0.1, 0.1
    weights = []
    for _ in range(6):
        weights.append(shifted._outer_weight())
        shifted.eval()
        assert shifted._outer_weight() == 1.0
        with torch.no_grad():
            torch.testing.assert_close(shifted.loss(batch, generator=0), one.loss(batch, generator=0))
        shifted.train()
        with torch.no_grad():
            shifted.loss(batch, generator=0)  # without gradients: not a step of training
        shifted.loss(batch, generator=0)
    assert weights == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    again = method(kl_warmup=4)
    again.load_state_dict(shifted.state_dict())
    assert again.num_losses.item() == 6
    assert "num_losses" not in one.state_dict()
    first = method(kl_warmup=4)
    first.inner_steps, first.inner_lr, first.inner_lr_scale = 3, 0.1, 0.1
    quarter = first.loss(batch, generator=0)
    last = [first.loss(batch, generator=0) for _ in range(3)][-1]
    full = one.loss(batch, generator=0)
    torch.testing.assert_close(last, full)
    assert abs(quarter - full) > 1e-3
    half = method(kl_warmup=2)
    half.inner_steps, half.inner_lr, half.inner_lr_scale = 3, 0.1, 0.1
    torch.testing.assert_close(full - quarter, 1.5 * (full - half.loss(batch, generator=0)))


def test_configuration_says_what_is_not_the_default():
    assert not {"posterior", "rank", "kl_weight", "kl_warmup"} & set(bm.ABML(TwoSites()).config())
    method = bm.ABML(TwoSites(), posterior="low_rank", rank=3, kl_weight=0.5, kl_warmup=7)
    config = method.config()
    assert (config["posterior"], config["rank"], config["kl_weight"], config["kl_warmup"]) == ("low_rank", 3, 0.5, 7)


@pytest.mark.parametrize(
    "options",
    [
        {"posterior": "lowrank"},
        {"rank": 0},
        {"rank": 1.5},
        {"kl_weight": -0.1},
        {"kl_weight": math.inf},
        {"kl_warmup": -1},
        {"kl_warmup": 0.5},
    ],
)
def test_options_out_of_range(options):
    with pytest.raises(errors.OptionError):
        bm.ABML(TwoSites(), **options)


def test_a_factor_that_diverges_is_named():
    program = LinearHierarchy(torch.zeros(2).double(), torch.ones(2).double(), 0.01)
    with pytest.raises(errors.NonFiniteDataError, match="diverged"):
        bm.ABML(program, posterior="low_rank", inner_steps=60, inner_lr=10.0).adapt(correlated())


# -- what a task without support has ---------------------------------------------------------------------------------


def two_steps(x, y=None, mask=None):
    """A random walk of two steps: the prior of (first, second) is correlated, with variances 1 and 1 + 4."""
    with bm.task_plate(x):
        first = pyro.sample("first", dist.Normal(x.new_tensor(0.5), 1.0))
        second = pyro.sample("second", dist.Normal(2 * first, 1.0))
        with bm.shot_plate(x, mask):
            pyro.sample("y", dist.Normal(second * x.squeeze(-1), 1.0), obs=y)


@pytest.mark.parametrize("kind", [{}, *KINDS], ids=["diagonal", "full", "low_rank"])
def test_without_support_it_is_the_gaussian_of_the_moments_along_the_path_of_the_means(kind):
    """Of a program: not the prior where sites depend on one another. Of a network: the prior itself."""
    nothing = bm.Observations(torch.zeros(2, 0, 1, dtype=F64), torch.zeros(2, 0, dtype=F64))
    q = as_gaussian(bm.ABML(two_steps, **kind).adapt(nothing))
    torch.testing.assert_close(q.mean, torch.tensor([0.5, 1.0], dtype=F64).expand(2, 2))
    torch.testing.assert_close(q.covariance_matrix, torch.eye(2, dtype=F64).expand(2, 2, 2))
    prior = MultivariateNormal(q.mean, torch.tensor([[1.0, 2.0], [2.0, 5.0]], dtype=F64))
    assert (kl_divergence(q, prior) > 0.5).all()  # they differ by a lot
    model = bm.NeuralTaskModel(torch.nn.Linear(1, 1), bm.Gaussian(0.5), bm.priors.Normal(0.3)).double()
    q = as_gaussian(bm.ABML(model, **kind).adapt(nothing))
    prior = MultivariateNormal(model.prior.loc.detach(), 0.09 * torch.eye(2, dtype=F64))
    assert kl_divergence(q, prior).abs().max() < 1e-12


# -- memory ----------------------------------------------------------------------------------------------------------


def wide(features):
    model = bm.NeuralTaskModel(torch.nn.Linear(features, 1), bm.Gaussian(0.5), bm.priors.Normal(0.01))
    return model, bm.TaskBatch(batch_of(3, 2, features), batch_of(3, 2, features, seed=1))


@pytest.mark.parametrize(("kind", "extra"), [(KINDS[0], 0), (KINDS[1], 2)], ids=["full", "low_rank"])
def test_a_covariance_that_is_too_large_is_refused_before_it_is_made(kind, extra):
    model, batch = wide(20_000)
    method = bm.ABML(model, inner_steps=1, num_particles=2, **kind)
    gib = 3 * 20_001 * (20_001 + extra) * 8 / 2**30
    message = rf"{kind['posterior']}' of 20001 .*{gib:.3g} GiB for 3 tasks \(.*4 GiB.*'diagonal', adapt to fewer tasks"
    with Largest() as largest:
        with pytest.raises(errors.UnsupportedError, match=message):
            method.adapt(batch.support)
        if kind["posterior"] == "full":
            with pytest.raises(errors.UnsupportedError, match=message):
                method.loss(batch)
        else:
            assert method.loss(batch).isfinite()  # no dense matrix in it
    assert largest.numbers <= 5 * 2 * 3 * 20_001  # the probe of the first data: particles, tasks, shots
    assert bm.ABML(model, inner_steps=1, num_particles=2).adapt(batch.support).scale.shape == (1, 3, 20_001)


@each_kind
def test_a_covariance_too_large_for_one_task_is_refused_at_the_first_data(kind):
    """Also where the loss would take little: it would be trained for nothing."""
    model, batch = wide(30_000)
    with pytest.raises(errors.UnsupportedError, match=r"GiB for 1 task \(.*'diagonal', or let fewer"):
        bm.ABML(model, inner_steps=1, **kind).loss(batch)
    diagonal = bm.ABML(model, inner_steps=1, num_particles=1)
    assert diagonal.loss(batch).isfinite()


@each_kind
def test_the_limit_counts_tasks_draws_of_global_sites_and_columns(kind, monkeypatch):
    observations = batch_of(3, 4, dtype=F64)
    method = bm.ABML(TwoSites(), inner_steps=1, global_guide="normal", **kind).double()
    method.prepare(observations)
    numbers = 7 * 3 * 2 * (2 + (2 if kind["posterior"] == "low_rank" else 0))
    monkeypatch.setattr(memory, "MAX_GIB", numbers * 8 / 2**30)
    assert method.adapt(observations, num_theta=7).root.numel() == numbers
    for bigger, num_theta in ((observations, 8), (batch_of(4, 4, dtype=F64), 7)):
        with pytest.raises(errors.UnsupportedError, match=f"× {num_theta} draws of the global sites"):
            method.adapt(bigger, num_theta=num_theta)
