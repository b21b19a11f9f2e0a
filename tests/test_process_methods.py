"""Process methods: densities and losses by hand, covariances, the latent, what training learns, Pyro, bad input."""

import math

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn
from torch.distributions import MultivariateNormal, Normal

import bayesmeta as bm
from bayesmeta import errors
from bayesmeta.adapt.amortised import part_of
from tests.programs import TwoSites, batch_of
from tests.test_amortised import by_finite_differences

F64 = torch.float64
COVARIANCES = ("low_rank", "kernel")


def ragged(tasks=4):
    support = batch_of(tasks, 5, dtype=F64, ragged=True)
    return bm.TaskBatch(support, batch_of(tasks, 4, seed=1, dtype=F64, ragged=True))


def shake(method, batch, scale=0.3):
    """Prepare, and move all weights away from the first ones, of which some are 0."""
    method.double().prepare(batch)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for parameter in method.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return method.eval()


def numbers(method, batch, task):
    """Network outputs at a task's real targets, and these targets."""
    keep = batch.query.full_mask()[task]
    support = batch.support.tasks([task])
    with torch.no_grad():
        out = method.process.network(support, batch.query.x[task : task + 1, keep])[0, 0]
    return out, batch.query.y[task, keep]


# -- independent targets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [bm.AttentiveNeuralProcess, bm.ConvCNP, bm.TransformerNeuralProcess])
def test_independent_targets_by_hand(make):
    batch = ragged()
    method = shake(make(width=8), batch)
    posterior = method.adapt(batch.support)
    assert posterior.is_point
    total = []
    for task in range(4):
        out, y = numbers(method, batch, task)
        each = Normal(out[:, 0], 0.01 + nn.functional.softplus(out[:, 1])).log_prob(y)
        total.append(each.sum())
        found = posterior.log_likelihood(batch.query, 3)[2, task]
        torch.testing.assert_close(found[batch.query.mask[task]], each, rtol=1e-9, atol=1e-9)
        assert (found[~batch.query.mask[task]] == 0).all()
    torch.testing.assert_close(posterior.log_joint_likelihood(batch.query), torch.stack(total), rtol=1e-9, atol=1e-9)
    assert method.loss(batch).item() == pytest.approx(-torch.stack(total).mean().item(), rel=1e-9)
    scored = bm.scores(posterior, batch)
    counts = batch.query.mask.sum(-1)
    torch.testing.assert_close(scored.per_task["nll_joint"], -torch.stack(total) / counts, rtol=1e-9, atol=1e-9)
    assert scored.num_samples == 0


@pytest.mark.parametrize("likelihood", ["classes", "binary", "counts", "outputs", "student"])
def test_other_likelihoods(likelihood):
    batch, generator = ragged(), torch.Generator().manual_seed(0)

    def targets(observations):
        shape = observations.y.shape
        if likelihood in ("classes", "binary"):
            top = 3 if likelihood == "classes" else 2
            y = torch.randint(top, shape, generator=generator)
            return observations.with_y(y if likelihood == "classes" else y.double())
        if likelihood == "counts":
            return observations.with_y(torch.randint(9, shape, generator=generator).double())
        return observations.with_y(
            torch.stack([observations.y, -observations.y], -1) if likelihood == "outputs" else observations.y
        )

    batch = bm.TaskBatch(targets(batch.support), targets(batch.query))
    given = {
        "classes": bm.likelihoods.Categorical(3),
        "binary": bm.likelihoods.Bernoulli(),
        "counts": bm.likelihoods.Poisson(),
        "outputs": None,
        "student": bm.likelihoods.StudentT(),
    }[likelihood]
    method = shake(bm.AttentiveNeuralProcess(given, width=8), batch)
    posterior = method.adapt(batch.support)
    kinds = {"classes": "class", "binary": "class", "counts": "count"}
    assert posterior.target_kind == kinds.get(likelihood, "real")
    assert method.loss(batch).isfinite()
    found = posterior.log_likelihood(batch.query, 2)[1]
    expected = posterior.predictive(batch.query).log_prob(batch.query.y)
    torch.testing.assert_close(found, torch.where(batch.query.mask, expected, 0.0), rtol=1e-6, atol=1e-8)
    assert bm.scores(posterior, batch, num_samples=20)["nll"] > -10
    assert posterior.predict(batch.query, 5).shape == (5, *batch.query.y.shape)
    if likelihood in ("classes", "binary"):
        p = posterior.class_probabilities(batch.query)
        torch.testing.assert_close(p.sum(-1), torch.ones(4, 4, dtype=F64))
        torch.testing.assert_close(p, posterior.class_probabilities(batch.query, draws=posterior.draws(3)))


@pytest.mark.parametrize("kind", ["classes", "counts"])
def test_a_latent_reads_classes_and_counts_as_what_they_are(kind):
    """What gives z is fed classes as one-hot and counts as their logarithm, as the network is."""
    generator = torch.Generator().manual_seed(0)
    top = 3 if kind == "classes" else 40
    sides = [o.with_y(torch.randint(top, o.y.shape, generator=generator)) for o in (ragged().support, ragged().query)]
    likelihood = bm.likelihoods.Categorical(3) if kind == "classes" else bm.likelihoods.Poisson()
    method = shake(bm.AttentiveNeuralProcess(likelihood, width=8, latent_size=2), bm.TaskBatch(*sides))
    rows, mask = method.recognition.encoder.rows(sides[0])
    y = sides[0].y[0, sides[0].mask[0]]
    expected = nn.functional.one_hot(y, 3).double() if kind == "classes" else y.double().log1p().unsqueeze(-1)
    found = rows[0, mask[0], 1:]
    torch.testing.assert_close(found.sort(0).values, expected.sort(0).values)
    assert method.loss(bm.TaskBatch(*sides)).isfinite()


@pytest.mark.parametrize("slices", [1, 3, 4])
def test_slices_of_draws_keep_their_order(slices, monkeypatch):
    """Draws of z go through the network a few at a time; each has its own outputs."""
    from bayesmeta.models import process_model

    method, batch = latent("elbo")
    posterior = method.adapt(batch.support)
    draws = posterior.draws(10, generator=1)
    whole = posterior.log_likelihood(batch.query, draws=draws)
    numbers_of_one = 4 * 4 * 8  # tasks × targets × width
    monkeypatch.setattr(process_model, "MAX_ELEMENTS", numbers_of_one * slices)
    torch.testing.assert_close(posterior.log_likelihood(batch.query, draws=draws), whole, rtol=0, atol=1e-12)
    assert (whole[1:] - whole[:-1]).abs().amax((1, 2)).min() > 1e-3  # control: draws differ


def test_the_exposure_goes_past_the_network():
    batch = ragged()
    with_exposure = [
        bm.Observations(torch.cat([o.x, 1.0 + o.x.abs()], -1), o.y.abs().round(), o.mask)
        for o in (batch.support, batch.query)
    ]
    batch = bm.TaskBatch(*with_exposure)
    method = shake(bm.ConvCNP(bm.likelihoods.Poisson(exposure=-1), width=8), batch)  # one input is left
    double = bm.Observations(batch.query.x * torch.tensor([1.0, 2.0]), batch.query.y, batch.query.mask)
    posterior = method.adapt(batch.support)
    first, second = posterior.predictive(batch.query), posterior.predictive(double)
    torch.testing.assert_close(second.mean[batch.query.mask], 2 * first.mean[batch.query.mask])
    with pytest.raises(errors.DataError, match="exposure"):
        method.adapt(bm.Observations(-batch.support.x, batch.support.y))


# -- the latent ---------------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """Linear in z, so that the likelihood has a closed form: mean of the support's targets + z ᵀ [1, x]."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(1.0))

    def forward(self, support, x, z):
        keep = support.full_mask()
        mean = torch.where(keep, support.y, 0.0).sum(-1) / keep.sum(-1).clamp(min=1)
        basis = torch.cat([torch.ones_like(x), self.slope * x], -1)
        return mean[None, :, None, None] + (z.unsqueeze(-2) * basis).sum(-1, keepdim=True)


def latent(objective, scale=3.0, **options):
    model = bm.ProcessModel(Linear(), bm.Gaussian(scale), latent_size=2, width=8)
    batch = ragged()
    return shake(bm.ProcessMethod(model, objective=objective, **options), batch, 0.35), batch


def exact(method, batch, q):
    """−log p(Q | S) of each task under q, by the multivariate normal."""
    values = []
    for task in range(4):
        keep = batch.query.mask[task]
        x, y = batch.query.x[task, keep], batch.query.y[task, keep]
        basis = torch.cat([torch.ones_like(x), method.process.network.slope.detach() * x], -1)
        mean = batch.support.y[task, batch.support.mask[task]].mean() + basis @ q.loc[0, task]
        total = basis @ q.scale[0, task].square().diag() @ basis.T + 9.0 * torch.eye(len(x), dtype=F64)
        values.append(-MultivariateNormal(mean, total).log_prob(y))
    return torch.stack(values)


def test_the_likelihood_objective_by_hand():
    method, batch = latent("likelihood", num_particles=20_000)
    q = method.adapt(batch.support)
    expected = exact(method, batch, q)
    # Monte Carlo error of a log mean of 20 000 draws whose logs have standard deviations of order 1
    assert method.loss(batch).item() == pytest.approx(expected.mean().item(), abs=0.015)
    found = q.log_joint_likelihood(batch.query, 20_000, generator=3)
    torch.testing.assert_close(-found, expected, rtol=0, atol=0.03)
    scored = bm.scores(q, batch, num_samples=20_000, generator=4).per_task["nll_joint"] * batch.query.mask.sum(-1)
    torch.testing.assert_close(scored, expected, rtol=0, atol=0.03)
    with pytest.raises(errors.NoClosedFormError):
        q.predictive(batch.query.x)


def test_the_elbo_by_hand_and_by_pyro():
    """−E_{q(z | S ∪ Q)} log p(Q | S, z) + KL(q(z | S ∪ Q) ‖ q(z | S)), both in closed form; the network reads S."""
    scale, n = 6.0, 40_000
    method, batch = latent("elbo", scale, num_particles=n)
    prior, q = method.adapt(batch.support), method.adapt(batch.union())

    def divergence(a, b):
        ratio = (a.scale / b.scale).square()
        return 0.5 * (ratio + ((a.loc - b.loc) / b.scale).square() - 1 - ratio.log()).sum(-1)[0]

    basis = torch.cat([torch.ones_like(batch.query.x), method.process.network.slope.detach() * batch.query.x], -1)
    keep = batch.support.mask
    mean = torch.where(keep, batch.support.y, 0.0).sum(-1) / keep.sum(-1) + torch.einsum("tmd,td->mt", basis, q.loc[0])
    spread = torch.einsum("tmd,td->tm", basis.square(), q.scale[0].square())
    square = ((batch.query.y - mean.T).square() + spread) / (2 * scale**2)
    expected = torch.where(batch.query.mask, square + math.log(scale) + 0.5 * math.log(2 * math.pi), 0.0).sum(-1)
    each = expected + divergence(q, prior)
    noise = prior.log_likelihood(batch.query, draws=q.draws(2000)).sum(-1).std(0)
    error = 5 * noise / n**0.5
    with torch.no_grad():
        found = method._task_loss(batch, None, torch.Generator().manual_seed(0))
    assert ((found - each).abs() < error).all()
    assert method.loss(batch).item() == pytest.approx(each.mean().item(), abs=error.mean().item())
    # controls: neither the reversed divergence nor the likelihood at the mean of z would pass
    assert ((divergence(q, prior) - divergence(prior, q)).abs() > 2 * error).any()
    assert (torch.where(batch.query.mask, spread, 0.0).sum(-1) / (2 * scale**2) > 2 * error).any()
    total = each.mean().item()
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = torch.tensor([Trace_ELBO().loss(method.model, method.guide, batch) for _ in range(200)]) / 4
    assert abs(theirs.mean().item() - total) < 4 * theirs.std().item() / 200**0.5


def test_without_support_the_latent_is_the_prior():
    method, batch = latent("elbo")
    nothing = bm.Observations(batch.support.x[:, :0], batch.support.y[:, :0])
    q = method.adapt(nothing)
    assert (q.loc == 0).all()
    assert (q.scale == 1).all()
    before = method.adapt(batch.support)
    draws = before.prior_draws(7, generator=2)
    found = before.predict(batch.query.x, draws=draws, generator=5)  # as if there were no support
    torch.testing.assert_close(found, q.predict(batch.query.x, draws=bm.Draws(draws.u), generator=5))
    like = before.log_likelihood(batch.query, draws=draws)
    torch.testing.assert_close(like, q.log_likelihood(batch.query, draws=bm.Draws(draws.u)))
    assert (found - before.predict(batch.query.x, draws=bm.Draws(draws.u), generator=5)).abs().min() > 1e-6


@pytest.mark.parametrize("options", [{}, {"latent_size": 2}, {"latent_size": 2, "objective": "likelihood"}])
def test_gradients_by_finite_differences(options):
    batch = ragged()
    method = shake(bm.AttentiveNeuralProcess(width=4, heads=2, depth=1, num_particles=2, **options), batch).train()
    method.loss(batch, generator=5).backward()  # in training: random parts of the support, the same each time
    checked = 0
    for parameter in method.parameters():
        for index in (0, parameter.numel() - 1):
            slope = by_finite_differences(method, batch, parameter, index)
            found = 0.0 if parameter.grad is None else parameter.grad.view(-1)[index].item()
            assert found == pytest.approx(slope, rel=1e-4, abs=1e-5)
            checked += abs(slope) > 1e-4
    assert checked >= 8


@pytest.mark.parametrize(
    "make",
    [
        lambda: bm.AttentiveNeuralProcess(width=8, latent_size=2, blocks=1),
        lambda: bm.ConvCNP(width=8),
        lambda: bm.TransformerNeuralProcess(width=8),
        lambda: bm.GaussianNeuralProcess(width=8, network="deep_set"),
        lambda: bm.GaussianNeuralProcess(width=8, network="convolution", covariance="kernel"),
    ],
)
def test_gradients_reach_all_parameters(make):
    batch = ragged()
    support = batch.support
    mask = support.mask.clone()
    mask[0] = False  # one task without support, for what is learned of those
    batch = bm.TaskBatch(bm.Observations(support.x, support.y, mask), batch.query)
    method = shake(make(), batch)
    method.loss(batch).backward()
    # without observations q(z | S) is the prior, whatever its encoder says of none
    dead = [n for n, p in method.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert [n for n in dead if n != "program.recognition.encoder.empty"] == []


# -- parts of the support -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"latent_size": 2}])
def test_training_shows_parts_of_the_support(options):
    """In training the loss is that of a part, drawn by the generator; in evaluation, and without subsets, of all."""
    batch = ragged()
    methods = [shake(bm.AttentiveNeuralProcess(width=8, subsets=s, **options), batch) for s in (True, False)]
    for seed in (1, 2, 3):
        generator = torch.Generator().manual_seed(seed)
        part = part_of(batch.support, generator)  # what is drawn first
        expected = methods[1].eval().loss(bm.TaskBatch(part, batch.query), generator=generator)
        found = methods[0].train().loss(batch, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        whole = methods[0].eval().loss(batch, generator=seed)
        assert abs(found - whole) > 1e-3
        for method in (methods[1].train(), methods[1].eval()):
            torch.testing.assert_close(method.loss(batch, generator=seed), whole, rtol=0, atol=0)


# -- Pyro ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("covariance", ["diagonal", *COVARIANCES])
def test_the_pyro_model_has_the_density_of_the_query(covariance):
    batch = ragged()
    method = shake(bm.ProcessMethod(bm.ProcessModel("attention", width=8, covariance=covariance, rank=3)), batch)
    assert method.guide(batch) == {}
    trace = pyro.poutine.trace(method.model).get_trace(batch)
    expected = method.adapt(batch.support).log_joint_likelihood(batch.query).sum()
    torch.testing.assert_close(trace.log_prob_sum(), expected, rtol=1e-9, atol=1e-9)
    nothing = bm.Observations(batch.query.x[:, :0], batch.query.y[:, :0])
    alone = pyro.poutine.trace(method.model).get_trace(batch.query)  # observations: from an empty support
    expected = method.adapt(nothing).log_joint_likelihood(batch.query).sum()
    torch.testing.assert_close(alone.log_prob_sum(), expected, rtol=1e-9, atol=1e-9)
    with torch.random.fork_rng():
        drawn = method.model(batch.query.with_y(None))
    assert drawn.shape == (4, 4)


@pytest.mark.parametrize("objective", ["likelihood", "elbo"])
def test_what_the_guide_has_seen(objective):
    """z has q(z | S) in the model; the guide's is that, or with the ELBO q(z | S ∪ Q); of observations, q(z | Q)."""
    method, batch = latent(objective)
    for asked, seen in ((batch, batch.support), (batch, batch.union()), (batch.query, batch.query)):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            guide = pyro.poutine.trace(method.guide).get_trace(asked)
            model = pyro.poutine.trace(pyro.poutine.replay(method.model, trace=guide)).get_trace(asked)
        z, q = guide.nodes["z"], method.adapt(seen)
        same = torch.allclose(z["fn"].base_dist.loc.squeeze(-2), q.loc[0], rtol=1e-9, atol=1e-9)
        assert same == (asked is batch.query or (seen is not batch.support) == (objective == "elbo"))
        prior = method.adapt(batch.support) if asked is batch else None
        expected = torch.zeros(4, 2, dtype=F64) if prior is None else prior.loc[0]
        torch.testing.assert_close(model.nodes["z"]["fn"].base_dist.loc.squeeze(-2), expected, rtol=1e-9, atol=1e-9)


def test_nothing_goes_into_the_parameter_store_and_training_by_svi_works():
    from pyro.infer import SVI
    from pyro.optim import Adam

    batch = ragged()
    method = shake(bm.AttentiveNeuralProcess(width=8, latent_size=2), batch)
    with torch.random.fork_rng(), pyro.get_param_store().scope():
        torch.manual_seed(0)
        before = method.loss(batch).item()
        svi = SVI(method.model, method.guide, Adam({"lr": 5e-3}), Trace_ELBO())
        for _ in range(30):
            svi.step(batch)
    assert method.loss(batch).item() < before - 0.5


# -- files, pictures, tables --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 2])
def test_saved_and_loaded(size, tmp_path):
    batch = ragged()
    method = shake(bm.AttentiveNeuralProcess(width=8, latent_size=size), batch)
    posterior = method.adapt(batch.support)
    posterior.save(tmp_path / "posterior.pt")
    loaded = bm.load_posterior(tmp_path / "posterior.pt", method.program)
    assert isinstance(loaded, bm.ProcessPosterior)
    assert torch.equal(loaded.predict(batch.query, 4), posterior.predict(batch.query, 4))
    torch.save(method.state_dict(), tmp_path / "method.pt")
    other = bm.AttentiveNeuralProcess(width=8, latent_size=size, seed=5).double()
    other.prepare(batch)
    other.load_state_dict(torch.load(tmp_path / "method.pt", weights_only=True))
    assert torch.equal(other.adapt(batch.support).predict(batch.query, 4), posterior.predict(batch.query, 4))


@pytest.mark.parametrize("size", [0, 2])
def test_the_datatree(size):
    batch = ragged()
    posterior = shake(bm.AttentiveNeuralProcess(width=8, latent_size=size), batch).adapt(batch.support)
    tree = bm.to_datatree(posterior, batch, num_samples=8)
    assert tree["predictions"].to_dataset()["y"].shape[:2] == (1, 8)
    assert ("z" in tree["posterior"].to_dataset()) == bool(size) if "posterior" in tree else size == 0
    with pytest.raises(errors.UnsupportedError, match="predicts from the support itself"):
        bm.loo(posterior, batch, num_samples=100)


def test_without_a_latent_there_is_no_density_over_it():
    batch = ragged()
    point = shake(bm.AttentiveNeuralProcess(width=8), batch).adapt(batch.support)
    with pytest.raises(errors.UnsupportedError, match="log_joint_likelihood"):
        point.log_prob(point.draws(3).u)
    latent = shake(bm.AttentiveNeuralProcess(width=8, latent_size=2), batch).adapt(batch.support)
    u = latent.draws(3).u
    expected = Normal(latent.loc, latent.scale).log_prob(u).sum(-1)  # control: with one there is
    torch.testing.assert_close(latent.log_prob(u), expected, rtol=1e-12, atol=1e-12)


# -- bad input ----------------------------------------------------------------------------------------------------


def test_options_that_are_refused():
    for make in (bm.AttentiveNeuralProcess, bm.ConvCNP, bm.TransformerNeuralProcess, bm.GaussianNeuralProcess):
        with pytest.raises(errors.UnsupportedError, match="makes its own network"):
            make(TwoSites())
    with pytest.raises(errors.UnsupportedError, match="needs a ProcessModel"):
        bm.ProcessMethod(TwoSites())
    with pytest.raises(errors.OptionError, match="likelihood is 'normal'"):
        bm.ConvCNP("normal")
    with pytest.raises(errors.OptionError, match="diagonal"):
        bm.GaussianNeuralProcess(covariance="diagonal")
    with pytest.raises(errors.OptionError, match="Unknown covariance 'full'"):
        bm.GaussianNeuralProcess(covariance="full")
    with pytest.raises(errors.OptionError, match="stationary=True is for a covariance"):
        bm.ProcessModel("convolution", stationary=True)
    for length in (0.0, math.inf):
        with pytest.raises(errors.OptionError, match="length_scale must be positive"):
            bm.GaussianNeuralProcess(length_scale=length)
    with pytest.raises(errors.OptionError, match="Unknown network"):
        bm.GaussianNeuralProcess(network="recurrent")
    with pytest.raises(errors.OptionError, match="no such option"):
        bm.GaussianNeuralProcess(network="deep_set", heads=3)
    with pytest.raises(errors.OptionError, match="one of the two"):
        bm.ProcessModel("deep_set", latent_size=2, covariance="kernel")
    with pytest.raises(errors.OptionError, match="multiple of heads"):
        bm.AttentiveNeuralProcess(width=10)
    numbers = ("latent_size", "rank", "width", "depth", "max_shots")
    for name in numbers:
        for value in (-1, 1.5, True, "2"):
            with pytest.raises(errors.OptionError, match=f"{name} must be a whole number"):
                bm.ProcessModel("deep_set", **{name: value})
    for name in numbers[1:]:
        with pytest.raises(errors.OptionError, match=f"{name} must be a whole number, 1 or more.*got 0"):
            bm.ProcessModel("deep_set", **{name: 0})
    for objective in ("elbo", "likelihood"):
        assert bm.AttentiveNeuralProcess(latent_size=2, objective=objective).objective == objective
        with pytest.raises(errors.OptionError, match="is for a process with a latent"):
            bm.AttentiveNeuralProcess(objective=objective)
    with pytest.raises(errors.OptionError, match="objective"):
        bm.AttentiveNeuralProcess(latent_size=2, objective="vi")
    with pytest.raises(errors.OptionError, match="num_particles"):
        bm.AttentiveNeuralProcess(latent_size=2, num_particles=0)
    with pytest.raises(errors.OptionError, match="options itself"):
        bm.ProcessModel(Linear(), bm.Gaussian(0.5), depth=3)
    with pytest.raises(errors.OptionError, match="hidden noise"):
        bm.ProcessModel(nn.Sequential(nn.Dropout(0.5)), bm.Gaussian(0.5))


def test_data_that_do_not_fit():
    batch = ragged()
    labels = batch.support.with_y(batch.support.y.long())
    with pytest.raises(errors.OptionError, match="give a likelihood"):
        bm.ConvCNP().double().adapt(labels)
    two = bm.Observations(batch.support.x, batch.support.y.unsqueeze(-1).expand(-1, -1, 2))
    with pytest.raises(errors.UnsupportedError, match="one output"):
        bm.GaussianNeuralProcess().double().adapt(two)
    with pytest.raises(errors.UnsupportedError, match="Normal"):
        bm.GaussianNeuralProcess(bm.likelihoods.StudentT()).double().adapt(batch.support)
    with pytest.raises(errors.ShapeError, match="one input"):
        bm.ConvCNP().double().adapt(bm.Observations(batch.support.x.expand(-1, -1, 2), batch.support.y))
    with pytest.raises(errors.UnsupportedError, match="covariates"):
        bm.ConvCNP().double().adapt(bm.Observations(batch.support.x, batch.support.y, w=torch.zeros(4, 1, dtype=F64)))
    method = shake(bm.AttentiveNeuralProcess(width=8, max_shots=5), batch)
    longer = batch_of(4, 9, dtype=F64)
    with pytest.raises(errors.ShapeError, match="max_shots=5"):
        method.adapt(longer)
    with pytest.raises(errors.ShapeError, match="max_shots=5"):
        method.loss(bm.TaskBatch(longer, batch.query))
    posterior = method.adapt(batch.support)
    for asked in (posterior.predictive, posterior.predict):
        with pytest.raises(errors.NonFiniteDataError, match="x is not finite at task 0, shot 0"):
            asked(batch.query.x / 0)
    nothing = torch.where(batch.query.mask, batch.query.y, math.nan)  # padding may hold anything
    assert posterior.log_joint_likelihood(batch.query.with_y(nothing)).isfinite().all()
    with pytest.raises(errors.NonFiniteDataError, match="y is not finite"):
        posterior.log_joint_likelihood(batch.query.with_y(nothing / 0))
    with pytest.raises(errors.ShapeError, match="tasks"):
        posterior.predictive(batch.query.x[:2])
    with pytest.raises(errors.ShapeError, match="features"):
        posterior.predictive(batch.query.x.expand(-1, -1, 3))


@pytest.mark.parametrize("make", [bm.ConvCNP, bm.GaussianNeuralProcess, lambda: latent("elbo")[0]])
def test_without_targets_a_density_is_1(make):
    batch = ragged()
    method = shake(make(), batch)
    nothing = bm.Observations(batch.query.x, batch.query.y, torch.zeros_like(batch.query.mask))
    assert (method.adapt(batch.support).log_joint_likelihood(nothing, 7) == 0).all()
    single = method.float().adapt(batch.support.to(dtype=torch.float32))  # where log 7 − log 7 would leave rounding
    assert (single.log_joint_likelihood(nothing.to(dtype=torch.float32), 7) == 0).all()
    method.double()
    assert (bm.autoregressive(method, batch.support).log_likelihood(nothing) == 0).all()


def test_max_shots_bounds_the_support_alone():
    """q(z | S ∪ Q) reads more, and holds its mean alone."""
    batch = ragged()
    method = shake(bm.AttentiveNeuralProcess(width=8, latent_size=2, max_shots=5), batch)
    assert batch.union().full_mask().sum(-1).max() > 5
    assert method.loss(batch).isfinite()
    with torch.random.fork_rng():
        assert method.guide(batch)["z"].isfinite().all()


def test_a_network_of_ones_own_with_other_outputs():
    class Wide(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.layer = nn.Linear(1, width)

        def forward(self, support, x, z=None):
            return self.layer(x).unsqueeze(0)

    batch = ragged()
    method = bm.GaussianNeuralProcess(network=Wide(5), rank=3).double()
    assert method.loss(batch).isfinite()
    with pytest.raises(errors.ShapeError, match=r"gave \[1, 4, 2, 4\]; expected a tensor \[1, 4, 2, 5\]"):
        bm.GaussianNeuralProcess(network=Wide(4), rank=3).double().adapt(batch.support)
    two_features = bm.Observations(batch.support.x.expand(-1, -1, 2), batch.support.y)
    with pytest.raises(errors.ShapeError, match="cannot take x"):
        bm.ProcessMethod(bm.ProcessModel(Wide(2))).double().adapt(two_features)


def test_other_methods_refuse_the_model():
    batch = ragged()
    for make in (lambda m: bm.MAML(m, inner_lr=0.1), lambda m: bm.ABML(m, inner_lr=0.1), bm.Amortised, bm.NUTS):
        model = bm.ProcessModel("deep_set", width=8).double()
        with pytest.raises(errors.UnsupportedError):
            make(model).adapt(batch.support)
    with pytest.raises(errors.UnsupportedError, match="prepare"):
        bm.ProcessModel("deep_set", width=8).given(batch.support)
    model = bm.ProcessModel("deep_set", width=8).double().prepare(batch.support)
    with pytest.raises(errors.UnsupportedError, match="given"):
        model.predictive(torch.zeros(4, 0), batch.query)


def test_the_default_is_reproducible_and_a_seed_changes_it():
    batch = ragged()
    losses = []
    for seed in (None, 0, 1):
        before = torch.get_rng_state()
        method = bm.ConvCNP(width=8, seed=seed).double()
        losses.append(method.loss(batch).item())
        assert torch.equal(before, torch.get_rng_state())
    assert losses[0] == losses[1] != losses[2]
    assert math.isfinite(losses[2])
