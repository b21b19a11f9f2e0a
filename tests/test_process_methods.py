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


def gaussian(covariance, network="attention", batch=None, **options):
    batch = ragged() if batch is None else batch
    method = bm.GaussianNeuralProcess(network=network, covariance=covariance, rank=3, width=8, **options)
    return shake(method, batch), batch


def numbers(method, batch, task):
    """Network outputs at a task's real targets, and these targets."""
    keep = batch.query.full_mask()[task]
    support = batch.support.tasks([task])
    with torch.no_grad():
        out = method.process.network(support, batch.query.x[task : task + 1, keep])[0, 0]
    return out, batch.query.y[task, keep]


def by_hand(covariance, out):
    """Mean and covariance of a task's targets, entry by entry."""
    loc, scale, rest = out[:, 0], 0.01 + nn.functional.softplus(out[:, 1]), out[:, 2:]
    total = torch.zeros(len(out), len(out), dtype=F64)
    for i in range(len(out)):
        for j in range(len(out)):
            if covariance == "low_rank":
                total[i, j] = (rest[i] * rest[j]).sum() / 3
            else:
                away = (rest[i, :3] - rest[j, :3]).square().sum()
                total[i, j] = rest[i, 3] * rest[j, 3] * torch.exp(-0.5 * away)
        total[i, i] += scale[i] ** 2
    return loc, total


# -- dependent targets --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("network", ["deep_set", "attention", "convolution", "transformer"])
def test_the_joint_density_by_hand(covariance, network):
    method, batch = gaussian(covariance, network)
    posterior = method.adapt(batch.support)
    found = posterior.log_joint_likelihood(batch.query)
    marginals = posterior.predictive(batch.query.x)
    each = posterior.log_likelihood(batch.query, draws=posterior.draws(2))
    scored = bm.scores(posterior, batch)
    assert scored.num_samples == 0  # all in closed form
    joint = posterior.predictive(batch.query.x, joint=True)
    losses = []
    for task in range(4):
        out, y = numbers(method, batch, task)
        loc, total = by_hand(covariance, out)
        expected = MultivariateNormal(loc, total).log_prob(y)
        losses.append(-expected)
        torch.testing.assert_close(found[task], expected, rtol=1e-9, atol=1e-9)
        keep = batch.query.mask[task]
        torch.testing.assert_close(joint.covariance_matrix[task][keep][:, keep], total, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(marginals.scale[task, keep], total.diagonal().sqrt(), rtol=1e-9, atol=1e-12)
        single = Normal(loc, total.diagonal().sqrt()).log_prob(y)
        torch.testing.assert_close(each[1, task, keep], single, rtol=1e-9, atol=1e-9)
        assert scored.per_task["nll_joint"][task].item() == pytest.approx(-expected.item() / len(y), rel=1e-6)
        if len(y) > 1:  # control: the sum of the marginals is another number
            assert abs(single.sum() - expected) > 1e-3
    assert method.loss(batch).item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-9)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_covariances_are_positive_definite(covariance):
    """With 60 targets of which some coincide, more than the rank, the least eigenvalue is at least the least noise."""
    method, batch = gaussian(covariance)
    x = torch.linspace(-2, 2, 60, dtype=F64).expand(4, -1).unsqueeze(-1).clone()
    x[:, 1] = x[:, 0]
    model = method.adapt(batch.support).model
    asked = bm.Observations(x)
    with torch.no_grad():
        loc, total = model._normal(model.outputs(torch.zeros(4, 0), asked), asked)
        noise = model._likelihood(model.outputs(torch.zeros(4, 0), asked), asked).scale
    least = torch.linalg.eigvalsh(total)[:, 0]
    assert (least >= noise.amin(-1).square() * (1 - 1e-9)).all()
    assert torch.linalg.eigvalsh(total - noise.square().diag_embed())[:, 0].abs().max() < 1e-9  # control: without it, 0
    drawn = method.adapt(batch.support).predict(x, 4000)
    variance = total.diagonal(dim1=-2, dim2=-1)
    # standard error of a covariance of Gaussian draws
    error = 5 * ((total.square() + variance.unsqueeze(-1) * variance.unsqueeze(-2)) / 4000).sqrt()
    centred = drawn - loc
    assert ((torch.einsum("nti,ntj->tij", centred, centred) / 4000 - total).abs() < error).all()


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_padded_targets_leave_no_trace(covariance):
    method, batch = gaussian(covariance, "convolution")
    query = batch.query
    x = torch.where(query.mask[..., None], query.x, 300.0)
    other = bm.TaskBatch(batch.support, bm.Observations(x, torch.where(query.mask, query.y, 7.0), query.mask))
    gradients = []
    for one in (batch, other):
        method.zero_grad()
        method.loss(one).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in method.parameters()]))
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
    empty = bm.TaskBatch(batch.support, bm.Observations(query.x, query.y, torch.zeros_like(query.mask)))
    assert method.loss(empty).item() == 0.0


def test_a_gaussian_process_beats_a_diagonal_one_on_dependent_targets():
    """Same network, data and budget; the joint score of new tasks, paired. A GP's functions are smooth: few points say
    little of where the function is, and much of where it is together."""
    tasks = bm.tasks.GPTasks("eq", length_scale=1.0)
    train, test = (
        tasks.sample(800, support=3, query=8, generator=1),
        tasks.sample(200, support=3, query=8, generator=99),
    )
    scores = {}
    for name in ("diagonal", *COVARIANCES):
        method = bm.ProcessMethod(bm.ProcessModel("deep_set", width=32, covariance=name, rank=4), subsets=False)
        method.prepare(test)
        optimizer = torch.optim.Adam(method.parameters(), 5e-3)
        for start in range(0, 800, 16):
            optimizer.zero_grad()
            some = slice(start, start + 16)
            method.loss(bm.TaskBatch(train.support.tasks(some), train.query.tasks(some))).backward()
            optimizer.step()
        scores[name] = bm.scores(method.eval().adapt(test.support), test).per_task["nll_joint"]
    for name in COVARIANCES:
        gain = scores["diagonal"] - scores[name]
        assert gain.mean() > 4 * gain.std() / len(gain) ** 0.5


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
    with pytest.raises(errors.UnsupportedError, match=r"leave-one-out|point"):
        bm.loo(posterior, batch, num_samples=100)


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
    with pytest.raises(errors.OptionError, match="Unknown network"):
        bm.GaussianNeuralProcess(network="recurrent")
    with pytest.raises(errors.OptionError, match="no such option"):
        bm.GaussianNeuralProcess(network="deep_set", heads=3)
    with pytest.raises(errors.OptionError, match="one of the two"):
        bm.ProcessModel("deep_set", latent_size=2, covariance="kernel")
    with pytest.raises(errors.OptionError, match="multiple of heads"):
        bm.AttentiveNeuralProcess(width=10)
    for options in ({"latent_size": -1}, {"rank": 0}, {"width": 0}):
        with pytest.raises(errors.OptionError):
            bm.ProcessModel("deep_set", **options)
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
    longer = method.adapt(batch_of(4, 9, dtype=F64))
    with pytest.raises(errors.ShapeError, match="max_shots=5"):
        longer.predictive(batch.query.x)
    posterior = method.adapt(batch.support)
    with pytest.raises(errors.ShapeError, match="tasks"):
        posterior.predictive(batch.query.x[:2])
    with pytest.raises(errors.ShapeError, match="features"):
        posterior.predictive(batch.query.x.expand(-1, -1, 3))


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
