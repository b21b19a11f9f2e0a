"""Dependent targets: covariances and joint densities by hand, stationary factors, what training learns."""

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal, Normal

import bayesmeta as bm
from bayesmeta import errors
from tests.programs import batch_of
from tests.test_process_methods import numbers, ragged, shake

F64 = torch.float64
COVARIANCES = ("low_rank", "kernel")


def gaussian(covariance, network="attention", batch=None, **options):
    batch = ragged() if batch is None else batch
    method = bm.GaussianNeuralProcess(network=network, covariance=covariance, rank=3, width=8, **options)
    return shake(method, batch), batch


def by_hand(covariance, out, x, length=None):
    """Mean and covariance of a task's targets, entry by entry; ``length``: of the stationary factor."""
    loc, scale, rest = out[:, 0], 0.01 + nn.functional.softplus(out[:, 1]), out[:, 2:]
    total = torch.zeros(len(out), len(out), dtype=F64)
    for i in range(len(out)):
        for j in range(len(out)):
            if covariance == "low_rank":
                total[i, j] = (rest[i] * rest[j]).sum() / 3
            else:
                away = (rest[i, :3] - rest[j, :3]).square().sum()
                total[i, j] = rest[i, 3] * rest[j, 3] * torch.exp(-0.5 * away)
            if length is not None:
                total[i, j] *= torch.exp(-0.5 * ((x[i] - x[j]) / length).square().sum())
        total[i, i] += scale[i] ** 2
    return loc, total


# -- dependent targets --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("network", ["deep_set", "attention", "convolution", "transformer"])
def test_the_joint_density_by_hand(covariance, network):
    method, batch = gaussian(covariance, network)
    kernel = method.process.kernel
    length = None if kernel is None else kernel.log_length.detach().exp()
    assert (length is not None) == (network == "convolution")
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
        loc, total = by_hand(covariance, out, batch.query.x[task, batch.query.mask[task]], length)
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


def correlations(method, support, x):
    total = method.adapt(support).predictive(x, joint=True).covariance_matrix
    sd = total.diagonal(dim1=-2, dim2=-1).sqrt()
    return total / sd.unsqueeze(-1) / sd.unsqueeze(-2)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_a_stationary_factor_lets_correlations_fall_with_distance(covariance):
    """Without support a convolution is blind to x: then, but for noise, all targets are one, as the control shows."""
    method, batch = gaussian(covariance, "convolution")
    empty = bm.Observations(batch.support.x[:, :0], batch.support.y[:, :0])
    far = bm.Observations(batch.support.x - 1000.0, batch.support.y, batch.support.mask)  # beyond the receptive field
    x = torch.tensor([0.0, 0.3, 1.0, 2.5, 9.0], dtype=F64).expand(4, -1).unsqueeze(-1)
    length = method.process.kernel.log_length.detach().exp()
    share = (-0.5 * (x[0] / length).square().squeeze(-1)).exp()
    for support in (empty, far):
        found = correlations(method, support, x)
        torch.testing.assert_close(found[:, 0, 2:], found[:, :1, 1] * share[2:] / share[1], rtol=1e-6, atol=1e-9)
        assert (found[:, 0, 1:].diff() < 0).all()
        moved = correlations(method, support.with_y(support.y), x + 77.0)
        torch.testing.assert_close(moved, found, rtol=0, atol=1e-9)
    plain, _ = gaussian(covariance, "convolution", stationary=False)
    blind = correlations(plain, empty, x)[:, 0, 1:]
    torch.testing.assert_close(blind, blind[:, :1].expand_as(blind), rtol=0, atol=1e-9)


def test_what_is_stationary_by_default():
    """A convolution, by name or as a module; the others read x."""
    module = bm.processes.ConvProcess(1, outputs=5, width=8)
    for network, expected in (("convolution", True), (module, True), ("attention", False), ("deep_set", False)):
        method = bm.GaussianNeuralProcess(network=network, rank=3, width=8)
        assert method.config()["stationary"] == expected
        method.double().prepare(ragged())
        assert any("kernel" in name for name, _ in method.named_parameters()) == expected
    assert "stationary" not in bm.ConvCNP(width=8).config()
    started = bm.GaussianNeuralProcess(network="convolution", width=8, length_scale=0.3).double()
    started.prepare(ragged())
    torch.testing.assert_close(started.process.kernel.log_length.exp(), torch.full((1,), 0.3, dtype=F64))


def test_a_covariance_moves_with_its_support():
    method, batch = gaussian("kernel", "convolution")
    moved = bm.Observations(batch.support.x + 30.0, batch.support.y, batch.support.mask)
    other = correlations(method, moved, batch.query.x + 30.0)
    torch.testing.assert_close(other, correlations(method, batch.support, batch.query.x), rtol=0, atol=1e-9)


def test_a_length_for_each_feature():
    generator = torch.Generator().manual_seed(0)
    batch = bm.TaskBatch(*(batch_of(3, n, features=2, seed=n, dtype=F64) for n in (4, 5)))
    method, _ = gaussian("kernel", "attention", batch, stationary=True)
    length = method.process.kernel.log_length.detach().exp()
    assert length.shape == (2,)
    assert length[0] != length[1]
    for task in range(3):
        keep = torch.ones(5, dtype=torch.bool)
        out = method.process.network(batch.support.tasks([task]), batch.query.x[[task]])[0, 0].detach()
        loc, total = by_hand("kernel", out, batch.query.x[task, keep], length)
        y = torch.randn(5, generator=generator, dtype=F64)
        found = method.adapt(batch.support).log_joint_likelihood(batch.query.with_y(y.expand(3, 5)))[task]
        torch.testing.assert_close(found, MultivariateNormal(loc, total).log_prob(y), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_a_trained_convolution_knows_the_gp_without_support(covariance):
    """KL to the true process without support, in nats a target; without the factor it stays at what a constant gives.

    At the optimum the KL is 0: the prior of these tasks is an exponentiated quadratic. Noise variance 0.05.
    """
    tasks = bm.tasks.GPTasks()
    train, test = (tasks.sample(n, support=0, query=12, generator=s) for n, s in ((640, 1), (200, 9)))
    oracle, lost = tasks.log_evidence(test.query), {}
    for stationary in (None, False):
        method = bm.GaussianNeuralProcess(
            network="convolution",
            covariance=covariance,
            rank=2,
            stationary=stationary,
            width=8,
            subsets=False,
            depth=1,
            points_per_unit=2.0,
        )
        method.prepare(test)
        optimizer = torch.optim.Adam(method.parameters(), 5e-2)
        for step in range(80):
            optimizer.zero_grad()
            some = slice(8 * step, 8 * step + 8)
            method.loss(bm.TaskBatch(train.support.tasks(some), train.query.tasks(some))).backward()
            optimizer.step()
        each = (oracle - method.eval().adapt(test.support).log_joint_likelihood(test.query)) / 12
        lost[stationary] = each
    error = lost[None].std() / 200**0.5
    assert abs(lost[None].mean()) < 0.02 + 3 * error
    assert lost[False].mean() > 0.2 + 3 * lost[False].std() / 200**0.5


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


def test_a_covariance_that_is_none():
    batch = ragged()
    method = shake(bm.GaussianNeuralProcess(bm.Gaussian(1e-12), width=8, rank=1), batch)
    with pytest.raises(errors.DataError, match="noise may be too small"):
        method.adapt(batch.support).log_joint_likelihood(bm.union(batch.query, batch.query))
