"""A network with latent precisions, against its density by hand."""

import math

import pytest
import torch
from torch.distributions import Gamma, Normal

import bayesmeta as bm
from bayesmeta import errors
from tests.programs import batch_of

F64 = torch.float64


def model(outputs=1, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return bm.PrecisionTaskModel(bm.nets.mlp(1, [3], outputs, activation="tanh"), **options).double()


def observations(outputs=1, tasks=3):
    obs = batch_of(tasks, 5, dtype=F64, ragged=True)
    if outputs == 1:
        return obs
    y = torch.randn(tasks, 5, outputs, generator=torch.Generator().manual_seed(2), dtype=F64)
    return bm.Observations(obs.x, y, obs.mask)


def gamma(shape, rate):
    return Gamma(torch.tensor(shape, dtype=F64), torch.tensor(rate, dtype=F64))


@pytest.mark.parametrize("outputs", [1, 2])
def test_density_by_hand(outputs):
    """Gamma on both precisions with the Jacobians of their logarithms, Normal on weights and targets."""
    program = model(outputs, weight_prior=(3.0, 0.5), noise_prior=(2.5, 0.4))
    obs = observations(outputs)
    program.prepare(obs)
    blocks = program.blocks
    size = len(program.centre)
    u = torch.randn(4, 3, size + 2, generator=torch.Generator().manual_seed(1), dtype=F64)
    log_lam, log_gam = u[..., blocks["weight_precision"]], u[..., blocks["noise_precision"]]
    phi = u[..., blocks["phi"]]
    expected = torch.zeros(4, 3, dtype=F64)
    for draw in range(4):
        for task in range(3):
            lam, gam = log_lam[draw, task].exp(), log_gam[draw, task].exp()
            value = gamma(3.0, 0.5).log_prob(lam) + lam.log() + gamma(2.5, 0.4).log_prob(gam) + gam.log()
            value = value + Normal(program.centre, lam**-0.5).log_prob(phi[draw, task]).sum()
            w1, b1, w2, b2 = phi[draw, task].split([3, 3, 3 * outputs, outputs])
            hidden = torch.tanh(obs.x[task] * w1 + b1)
            mean = hidden @ w2.reshape(outputs, 3).T + b2
            y = obs.y[task].reshape(5, outputs)
            each = Normal(mean, gam**-0.5).log_prob(y).sum(-1)
            expected[draw, task] = (value + each[obs.mask[task]].sum()).item()
    torch.testing.assert_close(program.log_joint(u, obs).detach(), expected, rtol=1e-11, atol=1e-11)
    shifted = program.log_joint(u + 0.01, obs).detach()
    assert (shifted - expected).abs().min() > 1e-6


@pytest.mark.parametrize("make", [bm.BMAML, bm.MAML, bm.ABML, bm.Platipus])
def test_methods_adapt_the_precisions_with_the_weights(make):
    obs = observations()
    method = make(model(), inner_steps=2, inner_lr=0.005)
    batch = bm.TaskBatch(obs, batch_of(3, 4, seed=1, dtype=F64))
    method.loss(batch).backward()
    sites = method.adapt(obs).sample(5)
    assert {name: tuple(value.shape) for name, value in sites.items()} == {
        "weight_precision": (5, 3),
        "noise_precision": (5, 3),
        "phi": (5, 3, 10),
    }
    assert (sites["noise_precision"] > 0).all()
    assert sites["noise_precision"].flatten().unique().numel() >= 3  # each task its own


def test_first_precisions_are_the_priors():
    """Prior draws within 4 standard errors: mean a / b, standard deviation √a / b."""
    n = 4000
    program = model(weight_prior=(3.0, 0.5), noise_prior=(2.5, 0.4))
    obs = observations(tasks=1)
    program.prepare(obs)
    u, _ = program.sample_prior(n, obs, 0)
    for name, (a, b) in (("weight_precision", (3.0, 0.5)), ("noise_precision", (2.5, 0.4))):
        value = program.named(u, obs)[name]
        assert abs(value.mean().item() - a / b) < 4 * math.sqrt(a) / b / n**0.5
    # E[(φ − centre)²] = E[1/λ] = b / (a − 1); 1/λ has heavy tails, so compare medians of the standardised weights
    lam = program.named(u, obs)["weight_precision"]
    z = (program.named(u, obs)["phi"] - program.centre).detach() * lam.unsqueeze(-1).sqrt()
    assert abs(z.square().mean().item() - 1) < 4 * (2 / z.numel()) ** 0.5


def test_centre():
    learned, fixed = model(), model(centre=0.0, learn_centre=False)
    assert learned.centre.requires_grad
    assert learned.centre.abs().max() > 0.1  # the network's weights
    assert not fixed.centre.requires_grad
    assert (fixed.centre == 0).all()
    head = model(task_modules="head")
    assert len(head.centre) == 4


def test_options_out_of_range():
    for options in ({"weight_prior": (0.0, 1.0)}, {"noise_prior": (1.0, -1.0)}, {"noise_prior": (1.0,)}):
        with pytest.raises(errors.OptionError, match=f"{next(iter(options))} is the shape and the rate"):
            model(**options)
