"""Edges: shared modules, scales, dependent supports, padding, reused seeds, and inputs that have no answer."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import nn
from torch.func import functional_call

import bayesmeta as bm
from bayesmeta import errors
from tests.programs import TwoSites, batch_of

# -- networks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [nn.ELU, nn.Tanh, nn.ReLU])
def test_a_module_that_appears_twice_is_applied_twice(activation):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        act = activation()
        network = nn.Sequential(nn.Linear(1, 5), act, nn.Linear(5, 5), act, nn.Linear(5, 1))
        x = torch.randn(3, 4, 1)
    for task_modules in ("all", "head"):
        model = bm.NeuralTaskModel(network, bm.Gaussian(0.5), task_modules=task_modules)
        torch.testing.assert_close(model.output(model.prior.loc.expand(3, -1), x), network(x))
        u = model.prior.loc.expand(3, -1) + 0.1
        expected = functional_call(
            network, {**dict(network.named_parameters()), **{k: v[0] for k, v in model.flat.views(u).items()}}, (x,)
        )
        torch.testing.assert_close(model.output(u, x), expected)
    method = bm.BayesianLastLayer(model)
    posterior = method.adapt(bm.Observations(x, x.squeeze(-1)))
    draws = posterior.predict(x, 4000)
    predictive = posterior.predictive(x)
    assert ((draws.mean(0) - predictive.mean).abs() / (predictive.stddev / 4000**0.5)).max() < 4.5


def test_tied_weights_are_refused():
    shared = nn.Linear(3, 3)
    with pytest.raises(errors.ModelError, match="two places"):
        bm.NeuralTaskModel(nn.Sequential(shared, nn.ReLU(), shared), bm.Gaussian())
    network = bm.nets.mlp(3, [3], 3)
    network[2].weight = network[0].weight
    with pytest.raises(errors.ModelError, match="tied weights"):
        bm.NeuralTaskModel(network, bm.Gaussian())


def test_a_subclass_of_gaussian_takes_no_gaussian_shortcut():
    class Robust(bm.Gaussian):
        def distribution(self, output):
            return dist.StudentT(3.0, output.squeeze(-1), self.scale)

        def log_prob(self, output, y):
            return self.distribution(output).log_prob(y)

    model = bm.NeuralTaskModel(bm.nets.mlp(1, [4], 1), Robust(0.5))
    observations = batch_of(2, 4)
    u = torch.zeros(2, model.flat.size).requires_grad_()
    expected = torch.autograd.grad(model.log_likelihood(u, observations).sum(), u)[0]
    torch.testing.assert_close(model.log_likelihood_gradient(u, observations), expected)
    with pytest.raises(errors.UnsupportedError, match="Gaussian likelihood"):
        bm.BayesianLastLayer(bm.NeuralTaskModel(bm.nets.mlp(1, [4], 1), Robust(0.5), task_modules="head"))


# -- randomness ---------------------------------------------------------------------------------------------------


def one_and_one(x, y=None, mask=None):
    """One global and one local number, so that reused noise would line up."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with bm.task_plate(x):
        level = pyro.sample("level", dist.Normal(mu, 1.0))
        with bm.shot_plate(x, mask):
            pyro.sample("y", dist.Normal(level + 0 * x.squeeze(-1), 1.0), obs=y)


def test_one_seed_gives_independent_numbers_to_theta_and_phi():
    method = bm.ABML(one_and_one, inner_steps=0, global_guide="normal")
    observations = batch_of(1, 3)
    method.prepare(observations)
    with torch.no_grad():
        method.theta_guide.log_scale.fill_(0.0)
    u, theta = [], []
    for seed in range(200):
        draws = method.adapt(observations, generator=seed, num_theta=20).draws(20, seed)
        u.append(draws.u[:, 0, 0] - draws.theta[:, 0])
        theta.append(draws.theta[:, 0])
    correlation = torch.corrcoef(torch.stack([torch.cat(u), torch.cat(theta)]))[0, 1]
    assert abs(correlation.item()) < 4 / math.sqrt(4000)


# -- programs -----------------------------------------------------------------------------------------------------


def scaled(x, y=None, mask=None):
    with bm.task_plate(x), poutine.scale(scale=0.1):
        rate = pyro.sample("rate", dist.LogNormal(x.new_zeros(()), x.new_ones(())))
        with bm.shot_plate(x, mask):
            pyro.sample("y", dist.Normal(rate * x.squeeze(-1), 1.0), obs=y)


def test_a_scale_does_not_touch_the_jacobian():
    observations = batch_of(1, 3, dtype=torch.float64)
    program = bm.TaskProgram(scaled).prepare(observations)
    u = torch.tensor([[1.3]], dtype=torch.float64)
    density = dist.LogNormal(torch.zeros((), dtype=torch.float64), 1.0).log_prob(u.exp())
    torch.testing.assert_close(program.log_prior(u, observations), (0.1 * density + u)[:, 0])


def interval(x, y=None, mask=None):
    low = pyro.sample("low", dist.Normal(0.0, 1.0))
    with bm.task_plate(x):
        a = pyro.sample("a", dist.Uniform(low, low + 2.0))
        b = pyro.sample("b", dist.Uniform(a, a + 1.0))
        with bm.shot_plate(x, mask):
            pyro.sample("y", dist.Normal(b * x.squeeze(-1), 0.5), obs=y)


def test_an_interval_may_depend_on_another_site():
    observations = batch_of(3, 4)
    method = bm.ABML(interval, inner_steps=2, inner_lr=0.01)
    method.prepare(observations)
    assert method.program.layout.dim == 2
    sites = method.adapt(observations).sample(50)
    assert (sites["b"] > sites["a"]).all()
    assert (sites["b"] < sites["a"] + 1).all()
    batch = bm.TaskBatch(observations, observations, population=3)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        n = 300
        ours = torch.stack([3 * method.loss(batch, generator=i) for i in range(n)])
        theirs = torch.tensor([Trace_ELBO().loss(method.model, method.guide, batch) for _ in range(n)])
    assert abs(float(ours.mean() - theirs.mean())) < 4 * math.sqrt(float(ours.var() + theirs.var()) / n)


class PositiveGlobal(pyro.nn.PyroModule):
    """A positive global site, and two in a plate of their own."""

    def forward(self, x, y=None, mask=None):
        tau = pyro.sample("tau", dist.LogNormal(x.new_tensor(0.2), x.new_tensor(0.5)))
        with pyro.plate("groups", 2, dim=-1):
            shift = pyro.sample("shift", dist.LogNormal(x.new_zeros(2), x.new_ones(2)))
        with bm.task_plate(x):
            slope = pyro.sample("slope", dist.Normal(x.new_zeros(()), tau))
            with bm.shot_plate(x, mask):
                loc = slope * x.squeeze(-1) + shift[..., :1] - shift[..., 1:]
                pyro.sample("y", dist.Normal(loc, x.new_tensor(0.5)), obs=y)


@pytest.mark.parametrize("kind", ["point", "normal"])
def test_a_positive_global_site_counts_once_for_the_population_with_its_jacobian(kind):
    support, population = batch_of(3, 4, dtype=torch.float64), 50
    batch = bm.TaskBatch(support, batch_of(3, 2, seed=1, dtype=torch.float64), population=population)
    method = bm.ABML(PositiveGlobal(), inner_steps=1, inner_lr=0.01, global_guide=kind).double()
    method.prepare(batch)
    method.double()
    endless = bm.TaskBatch(batch.support, batch.query)
    penalty = (method.loss(batch, generator=3) - method.loss(endless, generator=3)) * population
    from bayesmeta.ops.random import as_generator

    theta = method.theta_guide.draw(1, as_generator(3, stream="loss"))[0].detach()
    tau, shift = theta[0].exp(), theta[1:].exp()
    f = {"dtype": torch.float64}
    log_p = dist.LogNormal(torch.tensor(0.2, **f), torch.tensor(0.5, **f)).log_prob(tau)
    log_p = log_p + dist.LogNormal(torch.zeros(2, **f), torch.ones(2, **f)).log_prob(shift).sum()
    if kind == "normal":
        guide = method.theta_guide
        log_q = torch.distributions.Normal(guide.loc, guide.log_scale.exp()).log_prob(theta).sum()
        expected = log_q - (log_p + theta.sum())
    else:
        expected = -log_p
    torch.testing.assert_close(penalty, expected.detach() + 0 * penalty, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["point", "normal"])
def test_pyros_elbo_agrees_with_positive_globals_in_a_plate(kind):
    batch = bm.TaskBatch(batch_of(3, 4), batch_of(3, 2, seed=1), population=3)
    method = bm.ABML(PositiveGlobal(), inner_steps=1, inner_lr=0.01, global_guide=kind)
    method.prepare(batch)
    n = 400
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(1)
        ours = torch.stack([3 * method.loss(batch, generator=generator) for _ in range(n)])
        theirs = torch.tensor([Trace_ELBO().loss(method.model, method.guide, batch) for _ in range(n)])
    assert abs(float(ours.mean() - theirs.mean())) < 4 * math.sqrt(float(ours.var() + theirs.var()) / n)


@pytest.mark.parametrize("kind", ["point", "normal"])
def test_the_guides_global_sites_carry_the_jacobian_of_a_gaussian_guide(kind):
    method = bm.ABML(PositiveGlobal(), inner_steps=0, global_guide=kind)
    batch = bm.TaskBatch(batch_of(3, 4), batch_of(3, 2, seed=1))
    method.prepare(batch)
    with torch.no_grad(), torch.random.fork_rng():
        method.theta_guide.loc.fill_(0.7)
        trace = poutine.trace(method.guide).get_trace(batch)
        trace.compute_log_prob()
    for name in ("tau", "shift"):
        node = trace.nodes[name]
        expected = -node["value"].log().sum() if kind == "normal" else torch.zeros(())
        torch.testing.assert_close(node["log_prob_sum"], expected, rtol=1e-5, atol=1e-5)


def test_prior_draws_come_from_the_meta_learned_theta():
    method = bm.ABML(TwoSites(), inner_steps=0, global_guide="normal")
    observations = batch_of(2, 3)
    method.prepare(observations)
    with torch.no_grad():
        method.theta_guide.loc.fill_(5.0)
        method.theta_guide.log_scale.fill_(-3.0)
    posterior = method.adapt(observations, num_theta=400)
    draws = posterior.prior_draws(400)
    assert abs(draws.theta.mean().item() - 5.0) < 4 * math.exp(-3) / 20
    assert abs(draws.u[:, :, 0].mean().item() - 5.0) < 4 * 1.01 / math.sqrt(800)


def test_predictive_objective_is_the_log_of_the_mean_likelihood():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = bm.NeuralTaskModel(bm.nets.mlp(1, [3], 1), bm.Gaussian(0.5), bm.priors.Normal(0.5)).double()
    batch = bm.TaskBatch(batch_of(3, 4, dtype=torch.float64), batch_of(3, 2, seed=1, dtype=torch.float64))
    method = bm.ABML(model, inner_steps=0, num_outer_particles=6, objective="predictive")
    value = method.loss(batch, generator=torch.Generator().manual_seed(4))
    noise = torch.randn(6, 1, 3, model.flat.size, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    loc, scale = model.prior.moments()
    each = model.log_likelihood(loc + scale * noise, batch.query).sum(-1)[:, 0]
    expected = -each.exp().mean(0).log().mean()
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
    assert abs((value + each.mean()).item()) > 1e-2, "control: the mean of the logs is another number"


@pytest.mark.parametrize("objective", ["likelihood", "joint"])
def test_ragged_tasks_adapt_as_they_do_alone(objective):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = bm.NeuralTaskModel(bm.nets.mlp(1, [4], 1), bm.Gaussian(0.5)).double()
    method = bm.MAML(model, inner_steps=3, inner_lr=0.1, objective=objective)
    observations = batch_of(4, 6, dtype=torch.float64, ragged=True)
    together = method.adapt(observations).u[0]
    for task, count in enumerate(observations.mask.sum(-1).tolist()):
        alone = bm.Observations(observations.x[task : task + 1, :count], observations.y[task : task + 1, :count])
        torch.testing.assert_close(together[task], method.adapt(alone).u[0, 0], rtol=1e-10, atol=1e-10)


def test_ragged_last_layer_with_two_outputs():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = bm.NeuralTaskModel(bm.nets.mlp(1, [4], 2), bm.Gaussian(0.5), task_modules="head").double()
        y = torch.randn(4, 6, 2, dtype=torch.float64)
    method = bm.BayesianLastLayer(model)
    observations = batch_of(4, 6, dtype=torch.float64, ragged=True).with_y(y)
    together = method.adapt(observations)
    for task, count in enumerate(observations.mask.sum(-1).tolist()):
        alone = method.adapt(bm.Observations(observations.x[task : task + 1, :count], y[task : task + 1, :count]))
        torch.testing.assert_close(together.loc[task], alone.loc[0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(together.log_evidence[task], alone.log_evidence[0], rtol=1e-9, atol=1e-9)


# -- MetaSVI ------------------------------------------------------------------------------------------------------


def positive_guide(x, y=None, mask=None):
    with bm.task_plate(x):
        pyro.sample("rate", dist.LogNormal(x.new_tensor(0.7), x.new_tensor(0.1)))


def test_meta_svi_posterior_of_a_positive_site_is_in_its_own_space():
    svi = bm.MetaSVI(scaled, positive_guide, lambda p: torch.optim.Adam(p, 0.1), Trace_ELBO())
    observations = batch_of(2, 3)
    draws = svi.posterior(observations, 400).sample(400)["rate"]
    assert (draws.log().mean() - 0.7).abs() < 4 * 0.1 / math.sqrt(800)


def test_meta_svi_leaves_out_padding_tasks():
    observations = batch_of(3, 4)
    values = []
    for batch in (
        bm.TaskBatch(observations, observations, torch.tensor([0, 1, -1])),
        bm.TaskBatch(observations, observations).tasks(slice(0, 2)),
    ):
        svi = bm.MetaSVI(scaled, positive_guide, lambda p: torch.optim.Adam(p, 0.1), Trace_ELBO())
        with torch.random.fork_rng():
            torch.manual_seed(0)
            values.append(svi.evaluate_loss(batch))
    assert values[0] == values[1]


def test_meta_svi_keeps_its_parameters_when_a_gradient_is_not_finite():
    def guide(x, y=None, mask=None):
        loc = pyro.param("loc", torch.tensor(0.0))
        with bm.task_plate(x):
            # the square root at 0 has a finite value and an infinite gradient
            pyro.sample("rate", dist.LogNormal(loc.square().sqrt(), 0.1))

    svi = bm.MetaSVI(scaled, guide, lambda p: torch.optim.Adam(p, 0.1), Trace_ELBO())
    with torch.random.fork_rng(), pytest.raises(errors.NonFiniteLossError, match="no finite gradient"):
        svi.step(batch_of(2, 3))
    assert svi.param("loc").item() == 0.0


# -- what has no answer gets a typed error ------------------------------------------------------------------------


def binary(x, y=None, mask=None):
    with bm.task_plate(x):
        logit = pyro.sample("logit", dist.Normal(0.0, 1.0))
        with bm.shot_plate(x, mask):
            pyro.sample("y", dist.Bernoulli(logits=logit + 0 * x.squeeze(-1)), obs=y)


def uniform_height(x, y=None, mask=None):
    with bm.task_plate(x):
        height = pyro.sample("height", dist.LogNormal(0.0, 2.0))
        with bm.shot_plate(x, mask):
            pyro.sample("y", dist.Uniform(0.0, height.expand(*height.shape[:-1], x.shape[-2])), obs=y)


def test_targets_outside_the_support_are_refused_everywhere():
    x = torch.zeros(2, 3, 1)
    good, bad = bm.Observations(x, torch.ones(2, 3)), bm.Observations(x, torch.full((2, 3), 2.0))
    with pytest.raises(errors.DataError, match="outside the support"):
        bm.MAML(binary).loss(bm.TaskBatch(good, bad))
    posterior = bm.ABML(binary).adapt(good)
    with pytest.raises(errors.DataError, match="outside the support"):
        bm.scores(posterior, bm.TaskBatch(good, bad))


def test_a_support_that_depends_on_a_site_is_not_judged_at_one_value():
    y = torch.tensor([[0.5, 2.0, 0.1]])
    bm.MAML(uniform_height, inner_steps=0).adapt(bm.Observations(torch.zeros(1, 3, 1), y))


@pytest.mark.parametrize("method", [bm.MAML, bm.ABML])
def test_adapt_without_targets(method):
    instance = method(TwoSites())
    observations = batch_of(2, 3)
    instance.prepare(observations)
    with pytest.raises(errors.DataError, match="needs the targets"):
        instance.adapt(observations.with_y(None))


def test_samples_are_no_guide():
    method = bm.ABML(TwoSites())
    observations = batch_of(2, 3)
    posterior = method.adapt(observations)
    draws = posterior.draws(5)
    samples = bm.SamplesPosterior(method.program, observations, draws.u, draws.theta)
    with pytest.raises(errors.UnsupportedError, match="no Pyro guide"):
        samples()


def edge(x, y=None, mask=None):
    with bm.task_plate(x):
        rate = pyro.sample("rate", dist.Gamma(0.005, 1.0))
        with bm.shot_plate(x, mask):
            pyro.sample("y", dist.Normal(rate * x.squeeze(-1), 1.0), obs=y)


def covariates(x, y=None, mask=None, w=None):
    with bm.task_plate(x):
        level = pyro.sample("level", dist.Normal(w[:, :1], 1.0))
        with bm.shot_plate(x, mask):
            pyro.sample("y", dist.Normal(level + 0 * x.squeeze(-1), 1.0), obs=y)


def test_other_degenerate_inputs_are_typed():
    observations = batch_of(2, 3)
    with pytest.raises(errors.SiteError, match="edge of its support"):
        bm.ABML(edge).adapt(observations)
    with pytest.raises(errors.DataError, match="floating"):
        bm.MAML(TwoSites()).adapt(bm.Observations(torch.zeros(2, 3, 1, dtype=torch.long), observations.y))
    with pytest.raises(errors.EmptyTaskError, match="at least one task"):
        bm.MAML(TwoSites()).adapt(observations.tasks(slice(0, 0)))
    with_w = bm.Observations(observations.x, observations.y, w=torch.zeros(2, 1))
    method = bm.MAML(covariates)
    method.adapt(with_w)
    with pytest.raises(errors.DataError, match="covariates"):
        method.adapt(observations)
    with pytest.raises(errors.DataError, match="different task-level covariates"):
        bm.TaskBatch(with_w, bm.Observations(observations.x, observations.y, w=torch.ones(2, 1))).check()
    with pytest.raises(errors.EmptyTaskError, match="padding"):
        bm.TaskBatch(observations, observations, torch.tensor([-1, -1])).check()
    svi = bm.MetaSVI(scaled, positive_guide, lambda p: torch.optim.Adam(p, 0.1), Trace_ELBO())
    with pytest.raises(errors.EmptyTaskError, match="cannot be empty"):
        svi.step(bm.Observations(observations.x[:, :0], observations.y[:, :0]))


def test_no_shots_and_two_outputs():
    def program(x, y=None, mask=None):
        with bm.task_plate(x):
            level = pyro.sample("level", dist.Normal(x.new_zeros(2), x.new_ones(2)).to_event(1))
            with bm.shot_plate(x, mask):
                pyro.sample("y", dist.Normal(level + 0 * x, x.new_ones(2)).to_event(1), obs=y)

    wrapped = bm.TaskProgram(program).prepare(bm.Observations(torch.zeros(2, 3, 1), torch.zeros(2, 3, 2)))
    empty = bm.Observations(torch.zeros(2, 0, 1))
    assert wrapped.predict(torch.zeros(7, 2, 2), empty).shape == (7, 2, 0, 2)


def test_the_usual_slips_are_told():
    observations = batch_of(2, 3)
    posterior = bm.MAML(TwoSites()).adapt(observations)
    with pytest.raises(errors.OptionError, match="TaskBatch"):
        bm.scores(posterior, observations)
    with pytest.raises(errors.OptionError, match="TaskBatch"):
        bm.plot_forecast(posterior, observations)
    with pytest.raises(errors.OptionError, match="TaskBatch"):
        bm.to_datatree(posterior, observations.x)
    with pytest.raises(errors.DataError, match="torch tensor"):
        bm.Observations(observations.x.numpy(), observations.y)
    with pytest.raises(errors.ModelError, match="give an instance"):
        bm.MAML(TwoSites)
    with pytest.raises(errors.ModelError, match="NeuralTaskModel"):
        bm.MAML(nn.Sequential(nn.Linear(1, 1)))
    with pytest.raises(errors.OptionError, match="parentheses"):
        bm.MetaSVI(scaled, positive_guide, lambda p: torch.optim.Adam(p, 0.1), Trace_ELBO)
    with pytest.raises(errors.UnsupportedError, match="prior='normal'"):
        bm.ABML(bm.NeuralTaskModel(bm.nets.mlp(1, [3], 1), bm.Gaussian(), "point"))

    def misspelt(x, y=None, mask=None):
        with bm.task_plate(x):
            pyro.sample("level", dist.Normal(0.0, scael))  # noqa: F821

    with pytest.raises(errors.ModelError, match="NameError: name 'scael'"):
        bm.MAML(misspelt).adapt(observations)


def test_a_new_unit_without_a_query_is_adapted_to_and_forecast():
    import pandas as pd

    frame = pd.DataFrame({"unit": ["new"] * 4, "time": [0.0, 1.0, 2.0, 3.0], "value": [1.0, 2.0, 2.5, 4.0]})
    table = bm.tasks.TableTasks.from_dataframe(frame, task="unit", x=["time"], y="value")
    batch = table.all(support=4, query=0)
    assert batch.query.shots == 0
    posterior = bm.ABML(TwoSites()).adapt(batch.support)
    assert posterior.predict(torch.linspace(0, 9, 10).reshape(1, 10, 1), 5).shape == (5, 1, 10)
    dated = frame.assign(time=pd.to_datetime(["2020-01-01", "2021-01-01", "2022-01-01", "2023-01-01"]))
    with pytest.raises(errors.DataError, match="dates to years"):
        bm.tasks.TableTasks.from_dataframe(dated, task="unit", x=["time"], y="value")
    with pytest.raises(errors.DataError, match="read_csv"):
        bm.tasks.TableTasks.from_dataframe("mine.csv", task="unit", x=["time"], y="value")


# -- networks that only look plain ---------------------------------------------------------------------------------


class Scaled(nn.Linear):
    def forward(self, x):
        return 10 * super().forward(x)


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


def parametrised():
    return nn.utils.parametrize.register_parametrization(nn.Linear(4, 1), "weight", Double())


def hooked():
    layer = nn.Linear(4, 1)
    layer.register_forward_hook(lambda module, args, out: out + 1.0)
    return layer


@pytest.mark.parametrize(
    "head",
    [lambda: Scaled(4, 1), hooked, parametrised],
)
def test_what_is_no_plain_linear_takes_the_general_path(head):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), head())
    model = bm.NeuralTaskModel(network, bm.Gaussian(0.5), "point")
    x = torch.randn(3, 5, 1)
    torch.testing.assert_close(model.output(model.prior.loc.expand(3, -1), x), network(x))
    assert not model.uses_mlp_path
    before = model.prior.loc.detach().clone()
    method = bm.MAML(model, inner_lr=0.05)
    bm.fit(method, bm.tasks.Sinusoid(), steps=5, progress=False)
    moved = (model.prior.loc.detach() - before).abs()
    assert all(moved[block].max() > 0 for block in model.blocks.values())
    anil = bm.ANIL(model, inner_lr=0.05).adapt(bm.tasks.Sinusoid().sample(2, support=4, query=1).support)
    assert (anil.u[0, :, :8] == model.prior.loc[:8]).all()
    assert (anil.u[0, :, 8:] != model.prior.loc[8:]).any()


def test_a_network_that_is_a_linear_is_all_head():
    model = bm.NeuralTaskModel(nn.Linear(1, 1), bm.Gaussian(0.5), "point", task_modules="head")
    assert model.flat.size == 2
    with pytest.raises(errors.ModelError, match="recurrent"):
        bm.NeuralTaskModel(nn.LSTM(1, 1), bm.Gaussian(0.5))


# -- every batch is checked ---------------------------------------------------------------------------------------


def test_later_batches_are_checked_too():
    model = bm.NeuralTaskModel(bm.nets.mlp(1, [4], 1), bm.likelihoods.Bernoulli(), "point")
    method = bm.MAML(model)
    good = bm.Observations(torch.zeros(2, 3, 1), torch.ones(2, 3))
    method.loss(bm.TaskBatch(good, good))
    bad = torch.ones(2, 3)
    bad[1, 2] = 7.0
    with pytest.raises(errors.DataError, match="task 1, shot 2"):
        method.loss(bm.TaskBatch(good, bm.Observations(good.x, bad)))
    with pytest.raises(errors.DeviceMismatchError, match="but y"):
        method.adapt(bm.Observations(good.x, good.y.double()))


def test_validation_knows_no_hyperprior():
    """The held-out loss does not depend on how many tasks were held out."""
    from dataclasses import replace

    def best(population):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = bm.NeuralTaskModel(bm.nets.mlp(1, [4], 1), bm.Gaussian(0.5), "layer_scales")
        method = bm.MAML(model, global_guide="normal")
        held_out = replace(bm.tasks.Sinusoid().sample(5, support=5, query=5), population=population)
        options = {"validation": held_out, "validate_every": 1, "progress": False}
        return bm.fit(method, bm.tasks.Sinusoid(), steps=2, support=5, query=5, **options).best_validation

    assert best(5) == best(500) == best(None)


def test_student_t_of_many_degrees_of_freedom_is_normal_also_as_a_distribution():
    z = torch.zeros(1, 1, 1)
    for df in (1e4, 1e6, 1e8):
        likelihood = bm.likelihoods.StudentT(df)
        values = likelihood.log_prob(z, z[..., 0]), likelihood.distribution(z).log_prob(z[..., 0])
        torch.testing.assert_close(*values)
        assert abs(values[1].item() + 0.5 * math.log(2 * math.pi)) < 1e-4


def test_a_count_of_zero_under_a_rate_that_underflows_is_certain():
    fn = bm.likelihoods.Poisson().distribution(torch.full((1, 1, 1), -110.0))
    assert fn.log_prob(torch.zeros(1, 1)) == 0
