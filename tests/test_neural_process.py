"""Neural processes: the loss by hand, the KL in closed form, what training learns, FiLM, bad input."""

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn
from torch.distributions import MultivariateNormal, Normal

import bayesmeta as bm
from bayesmeta import errors
from bayesmeta.models.film import FiLMNetwork
from tests.programs import TwoSites, batch_of
from tests.test_amortised import by_finite_differences, stirred

F64 = torch.float64


def ragged(tasks=4, dtype=F64):
    support = batch_of(tasks, 5, dtype=dtype, ragged=True)
    return bm.TaskBatch(support, batch_of(tasks, 4, seed=1, dtype=dtype, ragged=True))


def decoder(size=2, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        inputs = 1 if options.get("decoder") == "film" else 1 + size
        network = bm.nets.mlp(inputs, [6, 6], 1, activation="tanh")
    return bm.ContextTaskModel(network, bm.Gaussian(0.5), size, **options).double()


def conditional(**options):
    """A conditional neural process whose encoder has no first weights any more."""
    method, batch = bm.ConditionalNeuralProcess(decoder(3), width=8, **options), ragged()
    method.prepare(batch)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for parameter in method.encoder.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return method, batch


# -- the latent process -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["diagonal", "full"])
def test_the_elbo_by_hand(family):
    """−E_{q(z | S ∪ Q)} log p(Q | z) + KL(q(z | S ∪ Q) ‖ q(z | S)), the KL from means and covariances."""
    batch = ragged()
    method = stirred(bm.NeuralProcess(decoder(), posterior=family, width=8, num_particles=3000), batch, 0.35).eval()
    prior, posterior = method.adapt(batch.support), method.adapt(batch.union())

    def moments(q):
        if family == "full":
            return q.loc[0], q.covariance[0]
        return q.loc[0], q.scale[0].square().diag_embed()

    (m0, c0), (m1, c1) = moments(prior), moments(posterior)
    away = (m0 - m1).unsqueeze(-1)
    trace = torch.linalg.solve(c0, c1).diagonal(dim1=-2, dim2=-1).sum(-1)
    square = (away.mT @ torch.linalg.solve(c0, away))[..., 0, 0]
    kl = 0.5 * (trace + square - 2 + torch.logdet(c0) - torch.logdet(c1))  # Rasmussen & Williams 2006, eq. A.23
    draws = posterior.draws(20_000, generator=7)
    expected = posterior.log_likelihood(batch.query, draws=draws).sum(-1)
    total, error = (
        (kl - expected.mean(0)).mean().item(),
        (expected.mean(-1).std() * (1 / 20_000 + 1 / 3000) ** 0.5).item(),
    )
    assert abs(method.loss(batch, generator=0).item() - total) < 5 * error
    assert kl.mean() > 10 * error  # control: without it, or with the wrong sign, the test would fail


def test_the_likelihood_objective_by_hand_on_a_decoder_linear_in_z():
    network = nn.Linear(3, 1)
    model = bm.ContextTaskModel(network, bm.Gaussian(0.7), 2).double()
    batch = ragged()
    method = stirred(bm.NeuralProcess(model, objective="likelihood", width=8, num_particles=8000), batch).eval()
    q = method.adapt(batch.support)
    weight, bias = model.network.weight.detach()[0], model.network.bias.detach()
    total = []
    for task in range(4):
        keep = batch.query.mask[task]
        x, y = batch.query.x[task, keep, 0], batch.query.y[task, keep]
        mean = weight[0] * x + weight[1:] @ q.loc[0, task] + bias
        spread = (weight[1:].square() * q.scale[0, task].square()).sum()
        covariance = spread + 0.49 * torch.eye(len(x), dtype=F64)
        total.append(-MultivariateNormal(mean, covariance).log_prob(y))
    # Monte Carlo error of a log mean of 8000 draws whose logs have standard deviations of order 1
    assert method.loss(batch, generator=0).item() == pytest.approx(torch.stack(total).mean().item(), abs=0.02)


@pytest.mark.parametrize("objective", ["elbo", "likelihood"])
def test_gradients_by_finite_differences(objective):
    batch = ragged()
    method = stirred(bm.NeuralProcess(decoder(), objective=objective, width=8, num_particles=2), batch)
    method.loss(batch, generator=5).backward()  # in training too: the same random parts
    checked = 0
    for parameter in (p for p in method.parameters() if p.requires_grad):
        for index in (0, parameter.numel() - 1):
            slope = by_finite_differences(method, batch, parameter, index)
            found = 0.0 if parameter.grad is None else parameter.grad.view(-1)[index].item()
            assert found == pytest.approx(slope, rel=1e-5, abs=1e-5)
            checked += abs(slope) > 1e-4
    assert checked >= 8


def test_an_elbo_of_pyro_takes_its_model_and_guide():
    """method.model has the prior N(0, I), so that this ELBO is Amortised's, by the same q."""
    batch = ragged()
    method = stirred(bm.NeuralProcess(decoder(), width=8), batch)
    amortised = bm.Amortised(method.program, width=8, num_particles=1)
    amortised.prepare(batch)
    amortised.recognition = method.recognition
    everything, n = batch.union(), 200
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = torch.tensor([Trace_ELBO().loss(method.model, method.guide, everything) for _ in range(n)])
        ours = torch.stack([4 * amortised.loss(batch, generator=i) for i in range(n)])
    error = float((ours.var() + theirs.var()) / n) ** 0.5
    assert abs(float(ours.mean() - theirs.mean())) < 4 * error
    assert len(pyro.get_param_store()) == 0


@pytest.mark.parametrize("film", ["concatenate", "film"])
def test_training_beats_the_prior_and_knows_more_with_more_shots(film):
    """Levels: y = a + noise, a ~ N(0, 1). Coverage, and an error that falls as the exact one does."""
    tasks = bm.tasks.LinearGaussian(torch.zeros(1), torch.eye(1), 0.5)
    size = 2 if film == "concatenate" else 1
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = bm.nets.mlp(size, [16], 1)
    model = bm.ContextTaskModel(network, bm.Gaussian(0.5), 1, decoder=film)
    method = bm.NeuralProcess(model, width=16, num_particles=8)
    bm.fit(
        method,
        tasks,
        steps=500,  # what it says without support comes last: after 300, one seed in five misses
        tasks_per_step=64,
        support=4,
        query=4,
        optimizer=lambda p: torch.optim.Adam(p, 0.02),
        progress=False,
        device="cpu",
    )
    method.eval()
    for shots in (0, 1, 4):
        batch = tasks.sample(300, support=shots, query=1, generator=99)
        draws = method.adapt(batch.support).predict(batch.query, 400)[..., 0]
        exact = tasks.predictive(batch.support, batch.query.x)
        error = (draws.mean(0) - exact.mean[:, 0]).square().mean()
        assert error < 0.06  # beside a variance of the level of 1
        ratio = draws.var(0).mean() / exact.covariance_matrix[:, 0, 0].mean()
        assert 0.75 < ratio < 1.3


# -- the conditional process --------------------------------------------------------------------------------------


def test_a_conditional_process_is_the_likelihood_at_the_encoders_vector():
    method, batch = conditional()
    method.eval()
    r = method.encoder(batch.support)
    mean = method.program.output(r, batch.query.x).squeeze(-1)
    each = torch.where(batch.query.mask, Normal(mean, method.program.likelihood.scale).log_prob(batch.query.y), 0.0)
    torch.testing.assert_close(method.loss(batch), -each.sum(-1).mean(), rtol=1e-10, atol=1e-12)
    posterior = method.adapt(batch.support)
    torch.testing.assert_close(posterior.u[0], r.detach(), rtol=0, atol=0)
    torch.testing.assert_close(posterior.predictive(batch.query).mean, mean.detach(), rtol=1e-10, atol=1e-12)
    assert posterior.is_point
    other = method.adapt(batch.support.with_y(batch.support.y + 1.0))  # control
    assert (other.u - posterior.u).abs().min() > 1e-4


def test_gradients_of_a_conditional_process_by_finite_differences():
    method, batch = conditional()
    method.loss(batch, generator=5).backward()
    checked = 0
    for parameter in (p for p in method.parameters() if p.requires_grad):
        for index in (0, parameter.numel() - 1):
            slope = by_finite_differences(method, batch, parameter, index)
            found = 0.0 if parameter.grad is None else parameter.grad.view(-1)[index].item()
            assert found == pytest.approx(slope, rel=1e-5, abs=1e-5)
            checked += abs(slope) > 1e-4
    assert checked >= 6


def test_without_support_a_conditional_process_has_a_vector_of_its_own_that_is_learned():
    method, batch = conditional()
    empty = bm.Observations(batch.support.x[:, :0], batch.support.y[:, :0])
    assert torch.equal(method.adapt(empty).u[0], method.encoder.empty.detach().expand(4, 3))
    method.eval().loss(bm.TaskBatch(empty, batch.query)).backward()
    assert method.encoder.empty.grad.abs().min() > 0
    method.zero_grad()
    method.loss(batch).backward()  # in evaluation every task has its support
    assert not method.encoder.empty.grad.any()
    method.zero_grad()
    for seed in range(10):  # in training a random part may be none
        method.train().loss(batch, generator=seed).backward()
    assert method.encoder.empty.grad.any()


# -- FiLM ---------------------------------------------------------------------------------------------------------


def test_film_scales_and_shifts_the_hidden_layers():
    torch.manual_seed(0)
    layers = bm.nets.mlp(2, [5, 4], 3, activation="tanh").double()
    film = FiLMNetwork(layers, 2, torch.Generator().manual_seed(0))
    x, z = torch.randn(4, 6, 2, dtype=F64), torch.randn(3, 4, 2, dtype=F64)
    torch.testing.assert_close(film(x, torch.zeros(4, 2, dtype=F64)), layers(x), rtol=1e-12, atol=1e-12)
    out = film(x, z)
    assert out.shape == (3, 4, 6, 3)
    both = z[1, 2] @ film.modulation.T
    scale, shift = both[:9], both[9:]
    h = torch.tanh((1 + scale[:5]) * layers[0](x[2]) + shift[:5])
    h = torch.tanh((1 + scale[5:]) * layers[2](h) + shift[5:])
    torch.testing.assert_close(out[1, 2], layers[4](h), rtol=1e-12, atol=1e-12)
    wide = FiLMNetwork(bm.nets.mlp(1, [2000], 1), 3, torch.Generator().manual_seed(0), spread=0.5)
    first = torch.ones(1, 3) @ wide.modulation.T  # its spread over the units, where |z|² is the length of z
    assert abs(first.std().item() - 0.5) < 5 * 0.5 / (2 * 4000) ** 0.5


def test_a_film_decoder_is_a_model_like_any_other():
    model, batch = decoder(decoder="film"), ragged()
    model.prepare(batch.support)
    u = torch.randn(3, 4, 2, dtype=F64)
    trace = model.trace_joint(u, batch.support)
    expected = trace.log_likelihood.sum(-1) + trace.log_prior
    torch.testing.assert_close(model.log_joint(u, batch.support), expected, rtol=1e-10, atol=1e-10)
    for method in (bm.CAVIA(model), bm.ABML(model, inner_steps=1), bm.NeuralProcess(model), bm.Amortised(model)):
        assert method.loss(batch).isfinite()
    network = bm.NeuralTaskModel(bm.nets.mlp(1, [6], 1, activation="tanh"), bm.Gaussian(0.5), "point").double()
    wide = bm.ContextTaskModel.widen(network, 3, decoder="film")
    zero = wide.output(torch.zeros(4, 3, dtype=F64), batch.support.x)
    expected = network.output(network.prior.loc.expand(4, -1), batch.support.x)
    torch.testing.assert_close(zero, expected, rtol=1e-12, atol=1e-12)
    again = bm.ContextTaskModel.widen(network, 3, decoder="film")
    assert torch.equal(wide.network.modulation, again.network.modulation)
    other = bm.ContextTaskModel.widen(network, 3, decoder="film", seed=1)
    assert not torch.equal(wide.network.modulation, other.network.modulation)


# -- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [bm.NeuralProcess, bm.ConditionalNeuralProcess])
def test_models_that_have_no_latent(make):
    network = bm.NeuralTaskModel(bm.nets.mlp(1, [4], 1), bm.Gaussian(), "point")
    with pytest.raises(errors.UnsupportedError, match="goes into Amortised"):
        make(TwoSites())
    with pytest.raises(errors.UnsupportedError, match=r"NeuralTaskModel\(network, likelihood"):
        make(bm.nets.mlp(1, [4], 1))
    with pytest.raises(errors.UnsupportedError, match=r"give its model, method\.program"):
        make(bm.MAML(network))
    with pytest.raises(errors.ShapeError, match=r"stands beside x.*has that of x alone"):
        make(bm.NeuralTaskModel(bm.nets.mlp(3, [4], 1), bm.Gaussian(), "point").double()).loss(ragged())
    with pytest.raises(errors.ShapeError, match=r"\(of x alone"):
        make(bm.NeuralTaskModel(bm.nets.mlp(3, [4], 1), bm.Gaussian(), "point").double(), decoder="film").loss(ragged())
    for size in (0, 1.5, True, "2"):
        with pytest.raises(errors.OptionError, match="latent_size must be a whole number"):
            make(network, latent_size=size)
    for number in (0, 1.5, True):
        with pytest.raises(errors.OptionError, match="max_shots must be a whole number"):
            make(network, max_shots=number)
    with pytest.raises(errors.OptionError, match="size 0"):
        make(bm.ContextTaskModel(bm.nets.mlp(1, [4], 1), bm.Gaussian(), 0))
    with pytest.raises(errors.OptionError, match="has 2; leave it out"):
        make(decoder(), latent_size=3)
    with pytest.raises(errors.OptionError, match="has 'concatenate'"):
        make(decoder(), decoder="film")
    with pytest.raises(errors.OptionError, match="'median'"):
        make(network, "median")
    with pytest.raises(errors.UnsupportedError, match="begins with a Linear"):
        make(bm.NeuralTaskModel(nn.Sequential(nn.Tanh(), nn.Linear(1, 1)), bm.Gaussian(), "point"))
    with pytest.raises(errors.ShapeError, match="max_shots=4"):
        make(decoder(), "transformer", max_shots=4).loss(ragged())
    with pytest.raises(errors.ShapeError, match=r"reads 2 feature\(s\)"):
        make(decoder(), bm.encoders.PooledEncoder(2, 1, 2)).loss(ragged())
    assert make(network).config()["latent_size"] == (16 if make is bm.NeuralProcess else 64)


def test_options_that_do_not_go_together():
    with pytest.raises(errors.OptionError, match="no closed form for flows"):
        bm.NeuralProcess(decoder(), posterior="flow")
    batch = ragged()
    flow = bm.NeuralProcess(decoder(), posterior="flow", objective="likelihood", width=8)
    assert flow.loss(batch).isfinite()
    with pytest.raises(errors.OptionError, match="'predictive'"):
        bm.NeuralProcess(decoder(), objective="predictive")
    with pytest.raises(errors.OptionError, match="product"):
        bm.ConditionalNeuralProcess(decoder(), "product")
    with pytest.raises(errors.ShapeError, match="takes a context of 2"):
        bm.ConditionalNeuralProcess(decoder(), bm.encoders.PooledEncoder(1, 1, 5)).loss(batch)
    with pytest.raises(errors.OptionError, match="'gate'"):
        decoder(decoder="gate")
    with pytest.raises(errors.OptionError, match="at least 1"):
        decoder(size=0, decoder="film")
    with pytest.raises(errors.ModelError, match="FiLM modulates"):
        bm.ContextTaskModel(nn.Linear(1, 1), bm.Gaussian(), 2, decoder="film")
    with pytest.raises(errors.ModelError, match="FiLM modulates"):
        bm.ContextTaskModel(nn.Sequential(nn.Linear(1, 4), nn.Tanh()), bm.Gaussian(), 2, decoder="film")
