"""The core object: densities of a Pyro program over one flat unconstrained vector."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import bayesmeta as bm
from bayesmeta import errors
from tests.programs import LinearHierarchy, TwoSites, batch_of

LOG_2PI = math.log(2 * math.pi)


def normal(x, loc, scale):
    return -0.5 * ((x - loc) / scale) ** 2 - math.log(scale) - 0.5 * LOG_2PI


def test_log_joint_is_the_hand_written_density_with_its_jacobian():
    observations = batch_of(3, 4, dtype=torch.float64, ragged=True)
    program = bm.TaskProgram(TwoSites().double()).prepare(observations)
    assert [s.name for s in program.layout.local] == ["slope", "sigma"]
    assert [s.name for s in program.layout.theta] == ["mu"]
    u = torch.randn(3, 2, dtype=torch.float64)
    theta = torch.tensor([0.4], dtype=torch.float64)
    value = program.log_joint(u, observations, theta)
    for t in range(3):
        slope, log_sigma = u[t].tolist()
        expected = normal(slope, 0.4, 1.0) + normal(log_sigma, -1.0, 0.25)  # log-normal × e^u: the Jacobian cancels 1/σ
        for s in range(4):
            if observations.full_mask()[t, s]:
                expected += normal(
                    observations.y[t, s].item(), slope * observations.x[t, s, 0].item(), math.exp(log_sigma)
                )
        assert value[t].item() == pytest.approx(expected, rel=1e-12)
        # control: the density without its Jacobian is another number
        assert abs(value[t].item() - (expected - log_sigma)) > 1e-3


def test_particles_and_theta_broadcast_on_the_left():
    observations = batch_of(3, 4, dtype=torch.float64)
    program = bm.TaskProgram(TwoSites().double()).prepare(observations)
    u = torch.randn(6, 5, 3, 2, dtype=torch.float64)
    theta = torch.randn(5, 1, dtype=torch.float64)
    joint = program.log_joint(u, observations, theta)
    assert joint.shape == (6, 5, 3)
    for p, g in ((0, 0), (5, 4), (2, 3)):
        alone = program.log_joint(u[p, g], observations, theta[g])
        torch.testing.assert_close(joint[p, g], alone, rtol=1e-12, atol=1e-12)
    assert program.log_likelihood(u, observations, theta).shape == (6, 5, 3, 4)
    assert program.log_theta(theta, observations, jacobian=True).shape == (5,)
    assert program.log_theta(theta[0], observations, jacobian=False).shape == ()


def test_prior_draws_follow_the_prior():
    observations = batch_of(2, 3)
    program = bm.TaskProgram(TwoSites()).prepare(observations)
    n = 4000
    u, theta = program.sample_prior(n, observations, 1)
    assert u.shape == (n, 2, 2)
    assert theta.shape == (n, 1)
    # slope ~ N(mu, 1) with mu ~ N(0, 1): variance 2, and correlated with mu; log sigma ~ N(-1, 0.25)
    se = 2 * math.sqrt(2 / n)
    assert abs(u[:, :, 0].var(0) - 2).max() < 4 * se
    assert abs(u[:, :, 1].mean(0) + 1).max() < 4 * 0.25 / math.sqrt(n)
    assert abs(((u[:, 0, 0] - theta[:, 0]).var()) - 1) < 4 * math.sqrt(2 / n)
    again, _ = program.sample_prior(n, observations, 1)
    assert torch.equal(u, again)


def test_prior_moments_are_exact_for_normal_and_log_normal_sites():
    observations = batch_of(2, 3, dtype=torch.float64)
    program = bm.TaskProgram(TwoSites().double()).prepare(observations)
    loc, scale = program.prior_moments(observations, torch.tensor([0.7], dtype=torch.float64))
    torch.testing.assert_close(loc, torch.tensor([[0.7, -1.0]] * 2, dtype=torch.float64))
    torch.testing.assert_close(scale, torch.tensor([[1.0, 0.25]] * 2, dtype=torch.float64))


def test_prior_moments_of_other_sites_come_from_draws():
    def program(x, y=None, mask=None):
        with bm.task_plate(x):
            rate = pyro.sample("rate", dist.Gamma(3.0, 2.0))
            with bm.shot_plate(x, mask):
                pyro.sample("y", dist.Normal(rate * x.squeeze(-1), 1.0), obs=y)

    observations = batch_of(2, 3)
    wrapped = bm.TaskProgram(program).prepare(observations)
    loc, scale = wrapped.prior_moments(observations)
    # log of Gamma(a, b): mean ψ(a) − log b, variance ψ'(a)
    mean = torch.digamma(torch.tensor(3.0)) - math.log(2.0)
    sd = torch.polygamma(1, torch.tensor(3.0)).sqrt()
    assert (loc - mean).abs().max() < 4 * sd / math.sqrt(256)
    assert (scale - sd).abs().max() < 4 * sd / math.sqrt(2 * 256) * 2


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("task_modules", ["all", "head", "0"])
@pytest.mark.parametrize("kind", ["mlp", "module"])
def test_fast_path_equals_the_pyro_trace(dtype, tolerance, ragged, task_modules, kind):
    torch.manual_seed(0)
    network = bm.nets.mlp(2, [5, 4], 1, activation="tanh")
    if kind == "module":  # LayerNorm is no plain layer: functional_call under vmap
        network = nn.Sequential(nn.Linear(2, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 1))
    model = bm.NeuralTaskModel(network, bm.Gaussian(0.3), task_modules=task_modules).to(dtype)
    observations = batch_of(3, 4, 2, dtype=dtype, ragged=ragged)
    model.prepare(observations)
    assert model.uses_mlp_path == (kind == "mlp")
    u = torch.randn(6, 3, model.layout.dim, dtype=dtype)
    fast = model.log_joint(u, observations)
    trace = model.trace_joint(u, observations)
    slow = trace.log_prior + trace.log_likelihood.sum(-1)
    torch.testing.assert_close(fast, slow, rtol=tolerance, atol=tolerance)
    # control: other weights give another density
    assert not torch.allclose(fast, model.log_joint(u + 0.1, observations), rtol=tolerance)


def test_fast_path_is_the_network_itself():
    torch.manual_seed(0)
    network = bm.nets.mlp(2, [5], 3)
    model = bm.NeuralTaskModel(network, bm.Gaussian(0.3))
    x = torch.randn(4, 6, 2)
    start = model.prior.loc.expand(4, -1)
    torch.testing.assert_close(model.output(start, x), network(x))
    assert sum(p.numel() for p in network.parameters()) == model.flat.size, "the user's network is left as it was"


def test_several_outputs():
    torch.manual_seed(0)
    model = bm.NeuralTaskModel(bm.nets.mlp(1, [4], 2), bm.Gaussian(0.5))
    x, y = torch.randn(3, 5, 1), torch.randn(3, 5, 2)
    observations = bm.Observations(x, y)
    model.prepare(observations)
    u = torch.randn(3, model.layout.dim)
    trace = model.trace_joint(u, observations)
    torch.testing.assert_close(model.log_likelihood(u, observations), trace.log_likelihood, rtol=1e-5, atol=1e-5)
    assert model.predict(u, observations).shape == (3, 5, 2)


def test_empty_support_is_the_prior_alone():
    observations = batch_of(2, 3)
    for program in (bm.TaskProgram(TwoSites()), bm.NeuralTaskModel(bm.nets.mlp(1, [3], 1), bm.Gaussian(1.0))):
        program.prepare(observations)
        theta = torch.zeros(1) if program.has_theta_sites else None
        none = bm.Observations(observations.x[:, :0], observations.y[:, :0])
        u = torch.randn(2, program.layout.dim)
        joint = program.log_joint(u, none, theta)
        torch.testing.assert_close(joint, program.log_prior(u, observations, theta))
        assert program.log_likelihood(u, none, theta).shape == (2, 0)


def test_covariates_reach_the_prior():
    def program(x, y=None, mask=None, w=None):
        with bm.task_plate(x):
            level = pyro.sample("level", dist.Normal(2 * w[:, :1], 1.0))
            with bm.shot_plate(x, mask):
                pyro.sample("y", dist.Normal(level + 0 * x.squeeze(-1), 1.0), obs=y)

    observations = bm.Observations(torch.zeros(3, 2, 1), torch.zeros(3, 2), w=torch.tensor([[0.0], [1.0], [2.0]]))
    wrapped = bm.TaskProgram(program).prepare(observations)
    loc, _ = wrapped.prior_moments(observations)
    torch.testing.assert_close(loc, torch.tensor([[0.0], [2.0], [4.0]]))


def test_function_with_pyro_param_keeps_the_global_store_empty():
    def program(x, y=None, mask=None):
        tau = pyro.param("tau.a", torch.tensor(2.0), constraint=dist.constraints.positive)
        with bm.task_plate(x):
            slope = pyro.sample("slope", dist.Normal(0.0, tau))
            with bm.shot_plate(x, mask):
                pyro.sample("y", dist.Normal(slope * x.squeeze(-1), 1.0), obs=y)

    observations = batch_of(2, 3)
    wrapped = bm.TaskProgram(program).prepare(observations)
    assert len(pyro.get_param_store()) == 0
    (parameter,) = wrapped.parameters()
    assert wrapped.scope.constrained()["tau.a"].item() == pytest.approx(2.0)
    wrapped.log_joint(torch.ones(2, 1), observations).sum().backward()
    assert parameter.grad is not None
    assert parameter.grad.abs() > 0


# -- what is wrong with a program --------------------------------------------------------------------------------


def outside_plate(x, y=None, mask=None):
    slope = pyro.sample("slope", dist.Normal(torch.zeros(x.shape[0], 1), 1.0))
    with bm.task_plate(x):
        pyro.sample("level", dist.Normal(0.0, 1.0))
        with bm.shot_plate(x, mask):
            pyro.sample("y", dist.Normal(slope * x.squeeze(-1), 1.0), obs=y)


def no_event(x, y=None, mask=None):
    with bm.task_plate(x):
        beta = pyro.sample("beta", dist.Normal(torch.zeros(4), 1.0))
        with bm.shot_plate(x, mask):
            pyro.sample("y", dist.Normal(beta.sum(-1, keepdim=True) + x.squeeze(-1), 1.0), obs=y)


def latent_in_shots(x, y=None, mask=None):
    with bm.task_plate(x):
        pyro.sample("level", dist.Normal(0.0, 1.0))
        with bm.shot_plate(x, mask):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def no_squeeze(x, y=None, mask=None):
    with bm.task_plate(x):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with bm.shot_plate(x, mask):
            pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)


def duplicated(x, y=None, mask=None):
    with bm.task_plate(x):
        pyro.sample("slope", dist.Normal(0.0, 1.0))
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with bm.shot_plate(x, mask):
            pyro.sample("y", dist.Normal(slope * x.squeeze(-1), 1.0), obs=y)


def no_shot_plate(x, y=None, mask=None):
    with bm.task_plate(x):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(slope * x.squeeze(-1), 1.0).to_event(1), obs=y)


def no_likelihood(x, y=None, mask=None):
    with bm.task_plate(x):
        pyro.sample("slope", dist.Normal(0.0, 1.0))


def ignores_mask(x, y=None, mask=None):
    with bm.task_plate(x):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with bm.shot_plate(x):
            pyro.sample("y", dist.Normal(slope * x.squeeze(-1), 1.0), obs=y)


def discrete(x, y=None, mask=None):
    with bm.task_plate(x):
        z = pyro.sample("z", dist.Bernoulli(0.5))
        with bm.shot_plate(x, mask):
            pyro.sample("y", dist.Normal(z + x.squeeze(-1), 1.0), obs=y)


def nothing_local(x, y=None, mask=None):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with bm.task_plate(x), bm.shot_plate(x, mask):
        pyro.sample("y", dist.Normal(slope * x.squeeze(-1), 1.0), obs=y)


def no_particles(x, y=None, mask=None):
    with bm.task_plate(x):
        beta = pyro.sample("beta", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        with bm.shot_plate(x, mask):
            # reshape assumes that nothing stands left of the tasks
            pyro.sample("y", dist.Normal((x @ beta.reshape(-1, 1, 1)[: x.shape[0]]).squeeze(-1), 1.0), obs=y)


def wrong_width(x, y=None, mask=None):
    with bm.task_plate(x):
        beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with bm.shot_plate(x, mask):
            pyro.sample("y", dist.Normal((x @ torch.ones(3, 1)).squeeze(-1) + beta[..., 0], 1.0), obs=y)


@pytest.mark.parametrize(
    ("program", "error", "words"),
    [
        (outside_plate, errors.PlateError, "'slope' has batch shape .* outside the task plate"),
        (no_event, errors.PlateError, "to_event"),
        (latent_in_shots, errors.PlateError, "'z' is inside the shot plate and has no data"),
        (no_squeeze, errors.ShapeError, "squeeze"),
        (duplicated, errors.SiteError, "Two sample sites are named 'slope'"),
        (no_shot_plate, errors.LikelihoodError, "not inside the task plate and the shot plate"),
        (no_likelihood, errors.LikelihoodError, "no observed site"),
        (ignores_mask, errors.LikelihoodError, "ignores the mask"),
        (discrete, errors.SiteError, "no bijection"),
        (nothing_local, errors.ModelError, "nothing to adapt"),
        (no_particles, errors.PlateError, "does not broadcast over particles"),
        (wrong_width, errors.ShapeError, "feature width"),
        ("not callable", errors.ModelError, "callable"),
    ],
)
def test_a_wrong_program_is_told_what_is_wrong(program, error, words):
    with pytest.raises(error, match=words):
        bm.TaskProgram(program).prepare(batch_of(4, 6))


def test_other_width_than_the_first_data():
    program = bm.TaskProgram(LinearHierarchy(torch.zeros(2), torch.ones(2), 1.0)).prepare(batch_of(2, 3, 2))
    with pytest.raises(errors.ShapeError, match="first used with 2"):
        program.check(batch_of(2, 3, 5))


def test_a_target_outside_the_support_is_named():
    def counts(x, y=None, mask=None):
        with bm.task_plate(x):
            rate = pyro.sample("rate", dist.LogNormal(0.0, 1.0))
            with bm.shot_plate(x, mask):
                pyro.sample("y", dist.Poisson(rate + 0 * x.squeeze(-1)), obs=y)

    y = torch.tensor([[1.0, 2.0], [0.0, -3.0]])
    method = bm.MAML(counts)
    good = bm.Observations(torch.zeros(2, 2, 1), y.abs())
    method.adapt(good)
    with pytest.raises(errors.DataError, match="task 1, shot 1"):
        method.adapt(bm.Observations(torch.zeros(2, 2, 1), y))


def test_networks_that_mix_tasks_are_refused():
    for bad in (nn.BatchNorm1d(4), nn.Dropout(0.1)):
        with pytest.raises(errors.ModelError, match=type(bad).__name__):
            bm.NeuralTaskModel(nn.Sequential(nn.Linear(1, 4), bad, nn.Linear(4, 1)), bm.Gaussian())


def test_network_and_data_that_do_not_fit():
    for features in (2, 3):  # as many as the shots of the probe: what a product by broadcasting would let through
        model = bm.NeuralTaskModel(bm.nets.mlp(features, [3], 1), bm.Gaussian())
        with pytest.raises(errors.ShapeError, match="1 features"):
            model.prepare(batch_of(2, 3, 1))
    model = bm.NeuralTaskModel(bm.nets.mlp(1, [3], 2), bm.Gaussian())
    with pytest.raises(errors.ShapeError, match="output width"):
        model.prepare(batch_of(2, 3, 1))


@pytest.mark.parametrize(
    "make",
    [
        lambda: bm.nets.mlp(1, [2], 1, activation="step"),
        lambda: bm.Gaussian(0.0),
        lambda: bm.priors.Normal(-1.0),
        lambda: bm.NeuralTaskModel(bm.nets.mlp(1, [2], 1), bm.Gaussian(), prior="cauchy"),
        lambda: bm.NeuralTaskModel(bm.nets.mlp(1, [2], 1), bm.Gaussian(), task_modules=["7"]),
        lambda: bm.MAML(TwoSites(), objective="posterior"),
        lambda: bm.MAML(TwoSites(), inner_steps=-1),
        lambda: bm.MAML(TwoSites(), global_guide="full"),
        lambda: bm.ABML(TwoSites(), objective="predict"),
        lambda: bm.ABML(TwoSites(), num_particles=0),
        lambda: bm.BayesianLastLayer(
            bm.NeuralTaskModel(bm.nets.mlp(1, [2], 1), bm.Gaussian(), task_modules="head"), objective="elbo"
        ),
    ],
)
def test_unknown_options(make):
    with pytest.raises(errors.OptionError):
        make()
