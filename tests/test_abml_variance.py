"""ABML with noise for each observation: the same in expectation, with less variance."""

import copy
import math

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn

import bayesmeta as bm
from bayesmeta import errors
from bayesmeta.ops.batched import FlatParameters
from bayesmeta.ops.point_noise import PointNoise
from tests.numerics import by_finite_differences
from tests.programs import TwoSites, batch_of

F64 = torch.float64
KINDS = ["weights", "local", "flipout"]
each_kind = pytest.mark.parametrize("noise", KINDS)
each_point_kind = pytest.mark.parametrize("noise", KINDS[1:])


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def mlp_model(prior=None, task_modules="all", bias=True):
    layers = seeded(lambda: (nn.Linear(1, 6, bias=bias), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)))
    prior = bm.priors.Normal(0.4) if prior is None else prior
    return bm.NeuralTaskModel(nn.Sequential(*layers), bm.Gaussian(0.5), prior, task_modules=task_modules).double()


def abml(model=None, **options):
    options = {"inner_steps": 3, "inner_lr": 0.02, "num_particles": 3} | options
    return bm.ABML(mlp_model() if model is None else model, **options)


def sines(tasks=2, shots=10, ragged=False):
    """Inputs that lie close together, as those of one task do."""
    observations = batch_of(tasks, shots, dtype=F64, ragged=ragged)
    x = torch.linspace(-1, 1, shots, dtype=F64).expand(tasks, shots).unsqueeze(-1) + 0.05 * observations.x
    return bm.Observations(x, torch.sin(2 * x.squeeze(-1)) + 0.3 * observations.y, observations.mask)


def estimates(method, observations, draws, seed=0):
    """Values of the ELBO ``[draws, tasks]`` and its gradients ``[draws, tasks, 2 D]`` at one q, a particle a draw.

    Draws are tasks here: the same task many times over, in one batch.
    """
    method.prepare(observations)
    loc, scale = method.program.prior_moments(observations)
    generator = torch.Generator().manual_seed(seed)
    many = observations.tasks(torch.arange(observations.num_tasks).repeat(draws))
    state = [t.detach()[None].repeat(1, draws, 1).requires_grad_() for t in (loc, scale.log())]
    noise = method._noise(state[0], 1, many.shots, generator)
    value = method.elbo(state[0], state[1], many, None, noise)
    gradients = torch.cat(torch.autograd.grad(value.sum(), state), -1)
    shape = (draws, observations.num_tasks)
    return value.detach().reshape(shape), gradients.reshape(*shape, -1)


def z_scores(first, second):
    """Differences of means in standard errors."""
    error = (first.var(0) / len(first) + second.var(0) / len(second)).sqrt()
    return (first.mean(0) - second.mean(0)).abs() / error


# -- truth: one layer, where everything is known ------------------------------------------------------------------


def linear_case():
    x = torch.tensor([[0.9, 0.2], [1.1, -0.3], [1.0, 0.4], [-0.7, 1.2]], dtype=F64)
    y = torch.tensor([0.3, 1.4, -0.5, 0.8], dtype=F64)
    loc, scale = torch.tensor([0.4, -0.6, 0.2], dtype=F64), torch.tensor([0.5, 0.8, 0.3], dtype=F64)
    return x, y, loc, scale


def linear_estimates(noise, draws=40_000):
    """log-likelihoods of all shots, summed: ``[draws]``, for y = w·x + b with noise 0.7."""
    x, y, loc, scale = linear_case()
    network = nn.Linear(2, 1).double()
    method = bm.ABML(bm.NeuralTaskModel(network, bm.Gaussian(0.7), bm.priors.Normal(1.0)).double(), noise=noise)
    observations = bm.Observations(x[None], y[None])
    method.prepare(observations)
    loc, scale = (t.expand(1, 1, -1).clone().requires_grad_() for t in (loc, scale))
    drawn = method._noise(loc, draws, len(y), torch.Generator().manual_seed(1))
    if noise == "weights":
        u = loc + method._spread(scale.log(), None, drawn)
        return method.program.log_likelihood(u, observations).sum(-1)[:, 0, 0], (loc, scale)
    return method._log_likelihood(loc, scale.log(), observations, drawn).sum(-1)[:, 0, 0], (loc, scale)


@each_kind
def test_one_layer_has_the_mean_gradient_and_variance_of_the_closed_form(noise):
    """f_i ~ N(m_i, v_i). Cov(f_i, f_j) = c_ij for weights drawn, 0 for local noise and flipout; of squares, flipout
    keeps 2 Σ_k (x_ik x_jk)² s_k⁴, since the size of a draw is shared and its sign is not."""
    x, y, loc, scale = linear_case()
    design = torch.cat([x, torch.ones(4, 1, dtype=F64)], -1)
    mean, covariance = design @ loc, design * scale.square() @ design.mT
    gap, v = mean - y, covariance.diagonal()
    expected = (-(gap.square() + v) / (2 * 0.49) - 0.5 * math.log(2 * math.pi * 0.49)).sum()
    of_loc = -(gap[:, None] * design).sum(0) / 0.49
    of_scale = -(design.square() * scale).sum(0) / 0.49
    shared = 2 * covariance.square() + 4 * covariance * gap[:, None] * gap
    alone = torch.diag(shared.diagonal())
    sizes = 2 * design.square() * scale**4 @ design.square().mT
    variances = {
        "weights": shared.sum(),
        "local": alone.sum(),
        "flipout": alone.sum() + sizes.sum() - sizes.diagonal().sum(),
    }
    variances = {name: value / (2 * 0.49) ** 2 for name, value in variances.items()}
    values, state = linear_estimates(noise)
    gradients = torch.autograd.grad(values.mean(), state)
    values = values.detach()
    assert abs(values.mean() - expected) < 4 * values.std() / math.sqrt(len(values))
    deviation = (values - values.mean()).square()
    error = deviation.std() / math.sqrt(len(values))  # of the variance, heavy tails included
    for name, variance in variances.items():
        is_own = name == noise
        assert (abs(deviation.mean() - variance) < 4 * error) == is_own, name
    # each derivative is linear in squares of normal numbers: its standard error is at most its size here
    torch.testing.assert_close(gradients[0].flatten(), of_loc, rtol=0.03, atol=0.03)
    torch.testing.assert_close(gradients[1].flatten(), of_scale, rtol=0.03, atol=0.03)


# -- a deep network: the same mean, less variance -----------------------------------------------------------------

DRAWS = 12_000
#: Lowest ratio of variances, weights' to the other's, for value and gradient (sum over its entries) with ten shots.
FACTORS = {"local": (3.0, 3.0), "flipout": (3.0, 2.0)}


@pytest.fixture(scope="module")
def weights_estimates():
    return estimates(abml(), sines(ragged=True), DRAWS, seed=9)


def too_large(count):
    """Bound on the largest of ``count`` z-scores: 1 in 1000 under the hypothesis, Bonferroni."""
    return torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(1 - 0.001 / 2 / count, dtype=F64))


@each_point_kind
def test_a_deep_network_keeps_the_mean_and_has_less_variance(noise, weights_estimates):
    value, gradient = estimates(abml(noise=noise), sines(ragged=True), DRAWS)
    plain_value, plain_gradient = weights_estimates
    assert z_scores(value, plain_value).max() < too_large(value[0].numel())
    assert z_scores(gradient, plain_gradient).max() < too_large(gradient[0].numel())
    longest = sines(ragged=True).counts().argmax()
    factor, of_gradient = FACTORS[noise]
    # ratio of variances from 12000 draws each: an F statistic, within 10 % also with tails of kurtosis 15
    assert (plain_value.var(0) / value.var(0))[longest] > 1.1 * factor
    assert (plain_gradient.var(0).sum(-1) / gradient.var(0).sum(-1))[longest] > 1.1 * of_gradient


class Wrong(PointNoise):
    """Local noise with a mistake."""

    mistake = ""

    def draw(self, loc, particles, shots, generator):
        (normal,) = super().draw(loc, particles, shots, generator)
        if self.mistake == "shared by outputs":
            normal = normal[..., :1].expand_as(normal)
        if self.mistake == "shared by shots":
            normal = normal[..., :1, :].expand_as(normal)
        return (normal,)

    def __call__(self, loc, scale, x, noise):
        return super().__call__(loc, scale.sqrt() if self.mistake == "no square" else scale, x, noise)


@pytest.mark.parametrize("mistake", ["shared by outputs", "no square", "shared by shots"])
def test_mistakes_are_seen(mistake, weights_estimates):
    """The control of the test above: two bias the mean; noise shared by shots does not, but has the old variance."""
    method = abml(noise="local")
    wrong = Wrong(method.program.network, method.program.flat, "local")
    wrong.mistake = mistake
    method._point_noise = wrong
    value, gradient = estimates(method, sines(ragged=True), DRAWS)
    plain_value, plain_gradient = weights_estimates
    biased = z_scores(value, plain_value).max() > too_large(value[0].numel())
    biased |= z_scores(gradient, plain_gradient).max() > too_large(gradient[0].numel())
    longest = sines(ragged=True).counts().argmax()
    lower = (plain_value.var(0) / value.var(0))[longest] > FACTORS["local"][0]
    assert biased == (mistake != "shared by shots")
    assert biased or not lower


def test_one_shot_has_no_one_to_share_with():
    """The value then has the same law for all kinds; its gradient has less variance by local noise alone."""
    found = {noise: estimates(abml(noise=noise), sines(tasks=1, shots=1), DRAWS) for noise in KINDS}
    variance = {noise: float(value.var()) for noise, (value, _) in found.items()}
    spread = {noise: float(gradient.var(0).sum()) for noise, (_, gradient) in found.items()}
    for noise in ("local", "flipout"):
        assert variance[noise] == pytest.approx(variance["weights"], rel=0.15)
    assert spread["flipout"] == pytest.approx(spread["weights"], rel=0.15)
    assert spread["weights"] / spread["local"] > 1.3


# -- the network --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task_modules", ["all", "head", ["0"], ["2", "4"]])
@each_point_kind
def test_without_noise_it_is_the_network(noise, task_modules):
    """Shared layers, a layer without bias, several groups: at scale 0 the outputs are those at the mean."""
    model = mlp_model(task_modules=task_modules, bias=False)
    x = sines(tasks=3, shots=4).x
    generator = torch.Generator().manual_seed(0)
    loc = torch.randn(2, 3, model.flat.size, generator=generator, dtype=F64)
    drawer = PointNoise(model.network, model.flat, noise)
    drawn = drawer.draw(loc, 5, 4, generator)
    found = drawer(loc, torch.zeros_like(loc), x, drawn)
    assert found.shape == (5, 2, 3, 4, 1)
    torch.testing.assert_close(found, model.output(loc, x).expand_as(found), atol=1e-8, rtol=0.0)
    noisy = drawer(loc, torch.full_like(loc, 0.1), x, drawn)
    assert (noisy - found).abs().min() > 1e-12  # control
    assert not torch.equal(noisy[0], noisy[1])


def test_flipout_is_a_draw_of_weights_with_signs():
    """Against weights made one by one: W_n = mean + ΔW ∘ r_n s_nᵀ, b_n = mean + Δb ∘ r_n."""
    generator = torch.Generator().manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    flat = FlatParameters({n: p.shape for n, p in network.named_parameters()})
    drawer = PointNoise(network, flat, "flipout")
    loc, scale = torch.randn(2, 1, 1, flat.size, generator=generator, dtype=F64)
    x = torch.randn(1, 4, 2, generator=generator, dtype=F64)
    normal, signs = drawer.draw(loc, 1, 4, generator)
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    found = drawer(loc, scale.exp(), x, (normal, signs))[0, 0, 0]
    mean, delta = flat.views(loc[0, 0]), flat.views((scale.exp() * normal[:, :, 0])[0, 0])
    for shot in range(4):
        s1, r1, s2, r2 = signs[0, 0, 0, shot].split([2, 3, 3, 2])
        w1 = mean["0.weight"] + delta["0.weight"] * torch.outer(r1, s1)
        w2 = mean["2.weight"] + delta["2.weight"] * torch.outer(r2, s2)
        h = (w1 @ x[0, shot] + mean["0.bias"] + delta["0.bias"] * r1).tanh()
        torch.testing.assert_close(found[shot], w2 @ h + mean["2.bias"] + delta["2.bias"] * r2)


def test_a_layer_of_zeros_has_finite_second_derivatives():
    """No bias and dead inputs: the variance of the pre-activation is 0, where a root has no derivative."""
    network = nn.Sequential(nn.Linear(1, 4, bias=False), nn.ReLU(), nn.Linear(4, 1, bias=False))
    model = bm.NeuralTaskModel(network, bm.Gaussian(0.5), bm.priors.Normal(0.3))
    observations = bm.Observations(torch.zeros(2, 3, 1), torch.ones(2, 3))
    method = bm.ABML(model, inner_steps=3, inner_lr=0.05, noise="local")
    method.loss(bm.TaskBatch(observations, observations)).backward()
    assert all(bool(p.grad.isfinite().all()) for p in method.parameters())


# -- the method ---------------------------------------------------------------------------------------------------


@each_point_kind
def test_it_reaches_the_mean_field_optimum(noise):
    """One layer, many small steps: mean of the exact posterior, precision the diagonal of its precision."""
    x, y, _, _ = linear_case()
    observations = bm.Observations(x[None], y[None])
    network = seeded(lambda: nn.Linear(2, 1))
    model = bm.NeuralTaskModel(network, bm.Gaussian(0.7), bm.priors.Normal(1.0)).double()
    options = {"inner_steps": 500, "inner_lr": 0.1, "inner_lr_scale": 0.1, "num_particles": 100, "noise": noise}
    posterior = bm.ABML(model, **options).adapt(observations)
    assert isinstance(posterior, bm.NormalPosterior)
    design = torch.cat([x, torch.ones(4, 1, dtype=F64)], -1)
    precision = torch.eye(3, dtype=F64) + design.mT @ design / 0.49
    right = model.prior.loc.detach() + design.mT @ y / 0.49
    torch.testing.assert_close(posterior.loc[0, 0], torch.linalg.solve(precision, right), atol=0.05, rtol=0.0)
    torch.testing.assert_close(posterior.scale[0, 0], precision.diagonal().rsqrt(), atol=0.0, rtol=0.05)
    start = bm.ABML(model, **(options | {"inner_steps": 0})).adapt(observations)  # control
    assert (start.scale - posterior.scale).abs().min() > 0.3


@each_point_kind
@pytest.mark.parametrize("objective", ["elbo", "predictive"])
def test_meta_gradient_by_finite_differences(noise, objective):
    batch = bm.TaskBatch(sines(2, 4, ragged=True), sines(2, 3), population=2)
    method = abml(mlp_model(bm.priors.LayerScales(0.3)), noise=noise, objective=objective, global_guide="normal")
    method.loss(batch, generator=5).backward()
    checked = 0
    for parameter in method.parameters():
        slope = by_finite_differences(method, batch, parameter, 0, generator=5)
        assert parameter.grad.view(-1)[0].item() == pytest.approx(slope, rel=1e-5, abs=1e-5)
        checked += abs(slope) > 1e-3
    assert checked >= 3


@each_point_kind
def test_pyros_elbo_agrees_with_the_loss(noise):
    """The guide draws weights, the loss does not: the same in expectation, after the same inner steps."""
    tasks, n = 3, 60
    batch = bm.TaskBatch(sines(tasks, 5), sines(tasks, 4), population=tasks)
    method = abml(noise=noise)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        generator = torch.Generator().manual_seed(2)
        ours = torch.stack([tasks * method.loss(batch, generator=generator) for _ in range(n)])
        theirs = torch.tensor([Trace_ELBO().loss(method.model, method.guide, batch) for _ in range(n)])
        shifted = bm.TaskBatch(batch.support, batch.query.with_y(batch.query.y + 3))  # control: other data
        other = torch.stack([tasks * method.loss(shifted, generator=generator) for _ in range(n)])
    assert abs(float(ours.mean() - theirs.mean())) < 4 * math.sqrt(float(ours.var() + theirs.var()) / n)
    assert abs(float(other.mean() - theirs.mean())) > 6 * math.sqrt(float(other.var() + theirs.var()) / n)
    assert len(pyro.get_param_store()) == 0


def test_the_predictive_loss_draws_weights():
    """Its product over shots needs one function a draw: from one q, the loss is the same number for all kinds."""
    batch = bm.TaskBatch(sines(2, 4), sines(2, 3))
    options = {"inner_steps": 0, "num_outer_particles": 4}
    losses = {
        objective: [
            abml(noise=noise, objective=objective, **options).loss(batch, generator=3).item() for noise in KINDS
        ]
        for objective in ("predictive", "elbo")
    }
    assert losses["predictive"][0] == losses["predictive"][1] == losses["predictive"][2]
    assert len(set(losses["elbo"])) == 3  # control


@each_point_kind
def test_masks_padding_and_tasks_without_support(noise):
    """What is masked does not count, with the same noise; a task without support stays at the prior."""
    observations = sines(3, 5)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[0, 3:], mask[2] = False, False
    first = bm.Observations(observations.x, observations.y, mask)
    other = bm.Observations(
        torch.where(mask[..., None], observations.x, 7.0), torch.where(mask, observations.y, -9.0), mask
    )
    method = abml(noise=noise)
    one, two = method.adapt(first, generator=1), method.adapt(other, generator=1)
    torch.testing.assert_close(one.loc, two.loc)
    torch.testing.assert_close(one.scale, two.scale)
    loc, scale = method.program.prior_moments(first)
    torch.testing.assert_close(one.loc[0, 2], loc[2])
    torch.testing.assert_close(one.scale[0, 2], scale[2])
    assert (one.loc[0, 1] - loc[1]).abs().max() > 1e-3
    nothing = method.adapt(bm.Observations(observations.x[:, :0], observations.y[:, :0]))
    torch.testing.assert_close(nothing.loc[0], loc)


def test_exposure_and_two_outputs():
    x = batch_of(2, 6, 2, dtype=F64).x
    x = torch.cat([x[..., :1], x[..., 1:].exp()], -1)
    counts = bm.Observations(x, torch.ones(2, 6, dtype=F64))
    poisson = bm.likelihoods.Poisson(exposure=-1)
    rates = bm.NeuralTaskModel(nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1)), poisson)
    two = bm.NeuralTaskModel(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)), bm.Gaussian(0.5))
    pairs = bm.Observations(x, x.flip(-1))
    for model, data in ((rates, counts), (two, pairs)):
        value, gradient = estimates(abml(model.double(), noise="local"), data, 4000)
        plain_value, plain_gradient = estimates(abml(model), data, 4000, seed=4)
        assert z_scores(value, plain_value).max() < too_large(value[0].numel())
        assert z_scores(gradient, plain_gradient).max() < too_large(gradient[0].numel())
        wrong, _ = estimates(abml(model, noise="local"), bm.Observations(2 * data.x, data.y), 4000)  # control
        assert z_scores(wrong, plain_value).max() > too_large(value[0].numel())


def test_a_copy_and_the_configuration():
    batch = bm.TaskBatch(sines(2, 4), sines(2, 3))
    method = abml(noise="local")
    assert method.config()["noise"] == "local"
    assert "noise" not in abml().config()
    twin = copy.deepcopy(method)
    assert twin.loss(batch, generator=0).item() == method.loss(batch, generator=0).item()
    single = copy.deepcopy(method).float()
    assert single.loss(batch.to(dtype=torch.float32), generator=0).dtype == torch.float32


def test_what_it_cannot_draw_for_is_told():
    with pytest.raises(errors.OptionError, match="Unknown noise 'dropout'"):
        abml(noise="dropout")
    for noise in KINDS[1:]:
        for posterior in ("full", "low_rank"):
            with pytest.raises(errors.OptionError, match="correlations"):
                abml(noise=noise, posterior=posterior)
        with pytest.raises(errors.UnsupportedError, match="NeuralTaskModel"):
            bm.ABML(TwoSites(), noise=noise)
        with pytest.raises(errors.UnsupportedError, match="Laplace has none"):
            abml(mlp_model(bm.priors.Laplace(0.3)), noise=noise)
        normed = bm.NeuralTaskModel(nn.Sequential(nn.Linear(1, 4), nn.LayerNorm(4), nn.Linear(4, 1)), bm.Gaussian(0.5))
        with pytest.raises(errors.UnsupportedError, match="elementwise"):
            bm.ABML(normed, noise=noise)
