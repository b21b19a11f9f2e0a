"""The mixture of last layers: against one last layer, brute force, Bayes' rule, and tasks of two kinds."""

import math

import pytest
import torch
from torch import nn

import bayesmeta as bm
from bayesmeta import errors
from bayesmeta.models.film import FiLMTrunk
from tests.programs import TwoSites

F64 = torch.float64


def head_model(outputs=1, scale=0.4, hidden=(5, 3)):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = bm.nets.mlp(2, list(hidden), outputs, activation="tanh")
    return bm.NeuralTaskModel(network, bm.Gaussian(scale), bm.priors.Normal(0.7), task_modules="head").double()


def observations(tasks=4, shots=8, outputs=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tasks, shots, 2, generator=generator, dtype=F64)
    y = torch.randn(tasks, shots, outputs, generator=generator, dtype=F64)
    return bm.Observations(x, y.squeeze(-1) if outputs == 1 else y)


def some_components(count=4, outputs=1):
    """A mixture whose components differ in everything."""
    method = bm.BayesianLastLayerMixture(head_model(outputs), num_components=count, spread=0.8, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in (method.program.logits, method.program.loc, method.program.log_scale):
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=F64))
    return method


# -- against other ways -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", [1, 2])
def test_one_component_is_the_bayesian_last_layer(outputs):
    model, data = head_model(outputs), observations(outputs=outputs)
    one = bm.BayesianLastLayer(model).adapt(data)
    # components that nothing tells apart are one component as well
    for count in (1, 3):
        mixture = bm.BayesianLastLayerMixture(model, num_components=count, spread=0.0).adapt(data)
        close = {"rtol": 1e-10, "atol": 1e-10}
        torch.testing.assert_close(mixture.log_evidence, one.log_evidence, **close)
        a, b = mixture.predictive(data), one.predictive(data)
        torch.testing.assert_close(a.mean, b.mean, **close)
        torch.testing.assert_close(a.variance, b.variance, **close)
        torch.testing.assert_close(a.log_prob(data.y), b.log_prob(data.y), **close)
        joint = mixture.predictive(data, joint=True).log_prob(data.y.flatten(1))
        torch.testing.assert_close(joint, one.predictive(data, joint=True).log_prob(data.y.flatten(1)), **close)
    other = bm.BayesianLastLayerMixture(model, num_components=3, spread=0.5).adapt(data)  # control
    assert (other.log_evidence - one.log_evidence).abs().max() > 1e-2


def component_features(method, k, x):
    """Features of one component by a plain network whose weights are modulated by hand."""
    trunk = method.program.trunk
    modulation = trunk.latent[k] @ trunk.modulation.mT
    scale, shift = modulation.chunk(2)
    h, start = x, 0
    for layer in trunk.layers:
        h = layer(h)
        if isinstance(layer, nn.Linear):
            part = slice(start, start + layer.out_features)
            h, start = (1 + scale[part]) * h + shift[part], part.stop
    return torch.cat([h, torch.ones_like(h[..., :1])], -1)


@torch.no_grad()
def test_evidence_and_predictive_by_brute_force():
    """Σ_k π_k N(y; A_k m_k, A_k S_k A_kᵀ + σ²) with dense covariances; the predictive by Bayes' rule."""
    method, data = some_components(), observations(shots=9)
    model = method.program
    support, query = bm.Observations(data.x[:, :5], data.y[:, :5]), bm.Observations(data.x[:, 5:], data.y[:, 5:])

    def log_evidence(x, y):
        each = []
        for k in range(4):
            design = component_features(method, k, x)
            covariance = design @ torch.diag((2 * model.log_scale[k, 0]).exp()) @ design.mT
            covariance = covariance + model.likelihood.scale**2 * torch.eye(x.shape[1], dtype=F64)
            normal = torch.distributions.MultivariateNormal(design @ model.loc[k, 0], covariance)
            each.append(normal.log_prob(y) + model.logits.log_softmax(0)[k])
        return torch.stack(each, -1)

    posterior = method.adapt(support)
    each = log_evidence(support.x, support.y)
    torch.testing.assert_close(posterior.log_evidence, each.logsumexp(-1), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(posterior.component_probabilities, each.softmax(-1), rtol=1e-9, atol=1e-10)
    joint = log_evidence(data.x, data.y).logsumexp(-1) - each.logsumexp(-1)
    found = posterior.predictive(query, joint=True).log_prob(query.y)
    torch.testing.assert_close(found, joint, rtol=1e-9, atol=1e-9)
    for i in range(4):
        x, y = torch.cat([support.x, query.x[:, i : i + 1]], 1), torch.cat([support.y, query.y[:, i : i + 1]], 1)
        expected = log_evidence(x, y).logsumexp(-1) - each.logsumexp(-1)
        found = posterior.predictive(query).log_prob(query.y)[:, i]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    # control: weights that stay at the prior's
    prior = bm.ConjugatePosterior(
        model, support, (posterior.log_joint_component * 0 + model.log_probabilities), **posterior.belief.tensors
    )
    assert (prior.predictive(query, joint=True).log_prob(query.y) - joint).abs().max() > 1e-2


@torch.no_grad()
def test_given_components_have_the_features_of_all():
    method, x = some_components(), observations(tasks=3).x
    every = method.program.features(x)
    assert every.shape == (3, 4, 8, 4)
    for k in range(4):
        torch.testing.assert_close(every[:, k], component_features(method, k, x), rtol=1e-12, atol=1e-12)
    chosen = torch.tensor([[0, 3, 1], [2, 2, 0]])
    for index in (chosen, chosen.repeat(4, 1)):  # few choices are computed one by one, many are taken from all
        expected = torch.stack([every[torch.arange(3), row] for row in index])
        torch.testing.assert_close(method.program.features(x, index), expected, rtol=1e-12, atol=1e-12)


# -- tasks of two kinds -------------------------------------------------------------------------------------------


def two_kinds(tasks, shots, seed, slope=2.0, noise=0.3, spread=0.2):
    """y = φ x + noise, φ ~ ½ N(slope, spread²) + ½ N(−slope, spread²)."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.rand(tasks, 1, generator=generator) < 0.5
    phi = torch.where(kind, slope, -slope) + spread * torch.randn(tasks, 1, generator=generator)
    x = torch.randn(tasks, shots, 1, generator=generator, dtype=F64)
    y = phi * x.squeeze(-1) + noise * torch.randn(tasks, shots, generator=generator, dtype=F64)
    return kind.squeeze(-1), bm.Observations(x, y)


def test_two_kinds_of_tasks_need_two_components():
    """Evidence training finds both kinds, and then the evidence is the truth's; one component cannot."""
    _, data = two_kinds(400, 6, 0)
    batch = bm.TaskBatch(*(bm.Observations(data.x[:, i], data.y[:, i]) for i in (slice(0, 3), slice(3, 6))))
    kind, fresh = two_kinds(1000, 3, 1)

    def model(count, noise=1.0, scale=1.0):
        network = nn.Sequential(nn.Linear(1, 1, bias=False))
        return bm.ConjugateModel(network, bm.Gaussian(noise, learn_scale=True), count, scale=scale, seed=3).double()

    truth = model(2, 0.3, 0.2)
    with torch.no_grad():
        truth.loc.copy_(torch.tensor([[[2.0]], [[-2.0]]]))
    expected = bm.BayesianLastLayerMixture(truth).adapt(fresh).log_evidence
    gap = {}
    for count in (1, 2):
        method = bm.BayesianLastLayerMixture(model(count))
        optimizer = torch.optim.LBFGS(
            [p for p in method.parameters() if p.requires_grad], max_iter=60, line_search_fn="strong_wolfe"
        )

        def closure(method=method, optimizer=optimizer):
            optimizer.zero_grad()
            loss = method.loss(batch)
            loss.backward()
            return loss

        optimizer.step(closure)
        posterior = method.adapt(fresh)
        gap[count] = expected - posterior.log_evidence
        if count == 2:
            first = posterior.component_probabilities.argmax(-1) == method.program.loc.flatten().argmax()
            sure = posterior.component_probabilities.amax(-1) > 0.99
            assert sure.double().mean() > 0.8
            assert (first[sure] == kind[sure]).double().mean() > 0.98
    error = {count: value.std() / len(value) ** 0.5 for count, value in gap.items()}
    # 6 parameters learned from 400 tasks: about 6 / (2 · 400) nats a task are lost
    assert gap[2].mean() < 6 / 800 + 4 * error[2]
    assert gap[1].mean() > 0.3
    assert gap[1].mean() > 10 * error[1]


def test_an_ambiguous_support_gives_two_modes():
    network = nn.Sequential(nn.Linear(1, 1, bias=False))
    model = bm.ConjugateModel(network, bm.Gaussian(0.1), 2, scale=0.1).double()
    with torch.no_grad():
        model.loc.copy_(torch.tensor([[[2.0]], [[-2.0]]]))
    method = bm.BayesianLastLayerMixture(model)
    nothing = bm.Observations(torch.zeros(1, 1, 1, dtype=F64), torch.zeros(1, 1, dtype=F64))
    posterior = method.adapt(nothing)  # a point at x = 0 tells nothing about the slope
    torch.testing.assert_close(posterior.component_probabilities, torch.full((1, 2), 0.5, dtype=F64))
    far = posterior.predictive(torch.ones(1, 1, 1, dtype=F64))
    density = (
        far.log_prob(torch.tensor([[-2.0]])),
        far.log_prob(torch.tensor([[0.0]])),
        far.log_prob(torch.tensor([[2.0]])),
    )
    assert density[0] > density[1] + 50
    assert density[0].item() == pytest.approx(density[2].item(), rel=1e-6)
    phi = posterior.sample(4000, 0)["phi"].flatten()
    assert abs((phi > 0).double().mean().item() - 0.5) < 4 * 0.5 / 4000**0.5
    assert phi.abs().sub(2).std().item() == pytest.approx(0.1, rel=0.05)  # 4 standard errors
    told = posterior.update(bm.Observations(torch.ones(1, 1, 1, dtype=F64), torch.full((1, 1), 1.9, dtype=F64)))
    assert told.component_probabilities[0, 0] > 1 - 1e-12


# -- draws --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_draws_choose_components_by_their_probability(dtype):
    method = some_components().to(dtype)
    data = observations(shots=2).to(dtype=dtype)
    posterior, n = method.adapt(data), 20_000
    draws = posterior.draws(n, 3)
    component = method.program.component(draws.u[..., 0])
    probability = posterior.component_probabilities.double()
    share = torch.nn.functional.one_hot(component, 4).double().mean(0)
    error = (probability * (1 - probability) / n).sqrt()
    assert ((share - probability).abs() / error).max() < 4.5
    assert ((share - method.program.log_probabilities.exp()).abs() / error).max() > 20, "control: not the prior's"
    # within a component the weights are its own Gaussian, and the selector is a normal cut at its edges
    for k in range(4):
        mine = component[:, 0] == k
        phi, loc = draws.u[mine, 0, 1:].double(), posterior.belief.loc[0, k, 0].double()
        assert ((phi.mean(0) - loc).abs() / (phi.std(0) / mine.sum() ** 0.5)).max() < 4.5
        edges = method.program.edges()[k : k + 2]
        selector = torch.special.ndtr(draws.u[mine, 0, 0].double())
        low, high = torch.special.ndtr(edges)
        uniform = ((selector - low) / (high - low)).clamp(0, 1)
        assert abs(uniform.mean() - 0.5) < 4.5 * (1 / 12 / mine.sum()) ** 0.5
    # draws of y have the mean and the spread of the closed form
    y = posterior.predict(data, n, generator=5).double()
    fn = posterior.predictive(data)
    assert ((y.mean(0) - fn.mean).abs() / (y.std(0) / n**0.5)).max() < 4.5
    square = (y - fn.mean).square()
    assert ((square.mean(0) - fn.variance).abs() / (square.std(0) / n**0.5)).max() < 4.5


def test_the_prior_selects_components_with_their_probability():
    method, data = some_components(), observations(tasks=3)
    method.prepare(data)
    u, _ = method.program.sample_prior(20_000, data, 1)
    share = torch.nn.functional.one_hot(method.program.component(u[..., 0]), 4).double().mean((0, 1))
    probability = method.program.log_probabilities.detach().exp()
    assert ((share - probability).abs() / (probability / 60_000) ** 0.5).max() < 4.5


# -- training, checkpoints, scores --------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_learns_what_one_last_layer_cannot():
    """Sinusoids of unknown frequency from 8 points: the evidence of held-out tasks is far better, trained alike."""
    tasks = bm.tasks.ChallengingSinusoid(relative_noise=0.05)
    held_out = tasks.sample(100, support=8, query=10, generator=9)
    nll = {}
    for count in (1, 8):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = bm.nets.sine_features(1, [24, 8], 1, frequency=1.5)
        model = bm.ConjugateModel(network, bm.Gaussian(0.3, learn_scale=True), count)
        method = bm.BayesianLastLayerMixture(model)
        bm.fit(
            method, tasks, steps=600, tasks_per_step=8, support=8, query=8, seed=1, device="cpu", progress=False,
            optimizer=lambda p: torch.optim.Adam(p, 0.01),
        )  # fmt: skip
        method.eval()
        nll[count] = bm.scores(method.adapt(held_out.support), held_out, num_samples=20).per_task["nll"]
    gain = nll[1] - nll[8]
    assert gain.mean() > max(0.5, 5 * gain.std() / 100**0.5)


def test_save_and_load_of_the_method(tmp_path):
    tasks = bm.tasks.ChallengingSinusoid()
    model = bm.ConjugateModel(bm.nets.sine_features(1, [6], 1), bm.Gaussian(0.3), 3)
    method = bm.BayesianLastLayerMixture(model)
    bm.fit(method, tasks, steps=3, device="cpu", progress=False, out=tmp_path / "run")
    other = bm.BayesianLastLayerMixture(
        bm.ConjugateModel(bm.nets.sine_features(1, [6], 1), bm.Gaussian(0.3), 3, seed=8)
    )
    batch = tasks.sample(3, support=5, query=4, generator=0)
    before = other.adapt(batch.support).log_evidence
    bm.load_method(tmp_path / "run", other, batch)
    expected = method.adapt(batch.support).log_evidence
    torch.testing.assert_close(other.adapt(batch.support).log_evidence, expected, rtol=0, atol=0)
    assert not torch.equal(before, expected)
    small = bm.BayesianLastLayerMixture(bm.ConjugateModel(bm.nets.sine_features(1, [6], 1), bm.Gaussian(0.3), 2))
    with pytest.raises(errors.CheckpointError):
        bm.load_method(tmp_path / "run", small, batch)


# -- networks -----------------------------------------------------------------------------------------------------


def test_sine_features_begin_as_random_fourier_features():
    """2 E[sin(ωx + b) sin(ωx' + b)] is a Gaussian kernel with length scale 1 / frequency."""
    width, frequency = 40_000, 1.7
    first = bm.nets.sine_features(1, [width], 1, frequency=frequency, seed=0)[:2]
    x = torch.linspace(-2, 2, 9).unsqueeze(-1)
    with torch.no_grad():
        features = first(x)
    products = 2 * features.unsqueeze(0) * features.unsqueeze(1)
    expected = (-0.5 * (frequency * (x - x.mT)) ** 2).exp()
    error = products.std(-1) / width**0.5
    assert ((products.mean(-1) - expected).abs() / error).max() < 4.5
    other = (-0.5 * (1.3 * (x - x.mT)) ** 2).exp()
    assert ((products.mean(-1) - other).abs() / error).max() > 10, "control"


def test_sine_networks_go_into_any_method():
    tasks = bm.tasks.ChallengingSinusoid()
    batch = tasks.sample(4, support=5, query=4, generator=0)
    network = bm.nets.sine_features(1, [8, 8], 1, seed=3)
    assert torch.equal(network[0].weight, bm.nets.sine_features(1, [8, 8], 1, seed=3)[0].weight)
    assert not torch.equal(network[0].weight, bm.nets.sine_features(1, [8, 8], 1, seed=4)[0].weight)
    model = bm.NeuralTaskModel(network, bm.Gaussian(0.5))
    assert model.uses_mlp_path
    u = model.prior.loc.detach().expand(4, -1)
    torch.testing.assert_close(model.output(u, batch.query.x), network(batch.query.x))
    assert bm.MAML(model, inner_lr=0.01).loss(batch).isfinite()


def test_film_without_modulation_is_the_trunk():
    layers = bm.nets.mlp(1, [4, 3], 2, activation="tanh")
    x = torch.randn(2, 5, 1, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        still = FiLMTrunk(layers, 3, 2, 0.0, torch.Generator())
        torch.testing.assert_close(still(x), layers(x).unsqueeze(1).expand(-1, 3, -1, -1))
        moved = FiLMTrunk(layers, 3, 2, 0.5, torch.Generator())
        assert (moved(x) - still(x)).abs().amax((0, 2, 3)).min() > 1e-2


# -- bad input ----------------------------------------------------------------------------------------------------


def test_bad_input():
    model = head_model()
    with pytest.raises(errors.UnsupportedError, match="NeuralTaskModel"):
        bm.BayesianLastLayerMixture(TwoSites())
    with pytest.raises(errors.UnsupportedError, match="task_modules"):
        bm.BayesianLastLayerMixture(bm.NeuralTaskModel(bm.nets.mlp(1, [3], 1), bm.Gaussian()))
    with pytest.raises(errors.OptionError, match="num_components=0"):
        bm.BayesianLastLayerMixture(model, num_components=0)
    with pytest.raises(errors.OptionError, match="Unknown objective 'elbo'"):
        bm.BayesianLastLayerMixture(model, objective="elbo")
    with pytest.raises(errors.OptionError, match="leave them out"):
        bm.BayesianLastLayerMixture(bm.ConjugateModel.of(model, 3), num_components=4)
    with pytest.raises(errors.OptionError, match="at least one hidden"):
        bm.nets.sine_features(1, [], 1)
    for frequency in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(errors.OptionError, match="frequency"):
            bm.nets.sine_features(1, [3], 1, frequency=frequency)
    method = bm.BayesianLastLayerMixture(bm.ConjugateModel(bm.nets.mlp(1, [3], 1), bm.Gaussian(0.5), 2))
    data = observations()
    with pytest.raises(errors.ShapeError, match=r"cannot take|failed"):
        method.adapt(data.to(dtype=torch.float32))
