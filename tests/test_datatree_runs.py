"""Whole runs as DataTrees against closed forms: MetaSVI with its losses and weights, NUTS with its transitions."""

from dataclasses import replace

import arviz_stats
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from pyro.infer.mcmc import NUTS as PyroNUTS

import bayesmeta as bm
from bayesmeta import errors
from bayesmeta.adapt.recording import RecordingNUTS
from bayesmeta.diagnostics.importance import log_ratios
from tests.hierarchy import F64, evidence, exact, flat, hierarchy, joint_guide, observations, only, task_guide
from tests.programs import TwoSites, batch_of


def svi_of(model, guide, steps=1, data=None, lr=0.0):
    """Trained; a rate of 0 leaves a guide as it was written."""
    svi = bm.MetaSVI(model, guide, lambda p: torch.optim.SGD(p, lr), Trace_ELBO())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        svi.returned = [svi.step(data) for _ in range(steps)]
    return svi


def stat(tree, name):
    return tree["sample_stats"][name].values


# -- MetaSVI: weights, densities, losses --------------------------------------------------------------------------


@pytest.mark.parametrize("ragged", [False, True])
def test_weights_of_an_exact_guide_are_the_evidence(ragged):
    """log p(θ, φ, y) − log q(θ, φ) = log p(y) at every draw. Control: half the scale."""
    data = observations(ragged=ragged)
    distribution, y = evidence(data)
    tree = svi_of(hierarchy, joint_guide(data), data=data).to_datatree(data, num_samples=50)
    assert tree["sample_stats"]["log_weights"].dims == ("chain", "draw")
    np.testing.assert_allclose(stat(tree, "log_weights"), distribution.log_prob(y).item(), rtol=1e-9)
    np.testing.assert_allclose(stat(tree, "log_p") - stat(tree, "log_q"), stat(tree, "log_weights"), rtol=1e-12)
    half = svi_of(hierarchy, joint_guide(data, 0.5), data=data).to_datatree(data, num_samples=50)
    assert stat(half, "log_weights").std() > 0.5


def test_weights_of_tasks_that_are_independent():
    """By task where the guide's tasks are independent: each task's own evidence. Control: half the scale."""
    data = observations(ragged=True)
    tree = svi_of(flat, task_guide(), data=data).to_datatree(data, num_samples=40)
    assert tree["sample_stats"]["log_weights"].dims == ("chain", "draw", "task")
    for task in range(3):
        distribution, y = evidence(data.tasks([task]), between_tasks=0.0)
        np.testing.assert_allclose(stat(tree, "log_weights")[..., task], distribution.log_prob(y).item(), rtol=1e-9)
    half = svi_of(flat, task_guide(0.5), data=data).to_datatree(data, num_samples=40)
    assert (stat(half, "log_weights").std((0, 1)) > 0.2).all()


def trained(guide, steps=3):
    """TwoSites under an AutoGuide after a few steps, so that its parameters differ from one another."""
    program, data = TwoSites(), batch_of(4, 6, ragged=True)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return svi_of(program, guide(program), steps, data, lr=0.01), data


def unconstrained(posterior):
    """slope, log sigma and mu."""
    return posterior["slope"].values[0], np.log(posterior["sigma"].values[0]), posterior["mu"].values[0]


def test_an_autonormals_density_is_that_of_its_normals():
    """In unconstrained space, over θ and all φ: by hand from the guide's own parameters."""
    svi, data = trained(AutoNormal)
    tree = svi.to_datatree(data, num_samples=30)
    guide = svi.guide
    parts = [(guide.locs.slope, guide.scales.slope), (guide.locs.sigma, guide.scales.sigma)]
    slope, log_sigma, mu = unconstrained(tree["posterior"])
    total = dist.Normal(guide.locs.mu, guide.scales.mu).log_prob(torch.as_tensor(mu))
    for value, (loc, scale) in zip((slope, log_sigma), parts, strict=True):
        total = total + dist.Normal(loc.squeeze(-1), scale.squeeze(-1)).log_prob(torch.as_tensor(value)).sum(-1)
    np.testing.assert_allclose(stat(tree, "log_q")[0], total.detach().numpy(), rtol=1e-4, atol=1e-4)


def test_an_automultivariatenormals_density_is_of_all_sites_together():
    svi, data = trained(AutoMultivariateNormal)
    tree = svi.to_datatree(data, num_samples=30)
    guide = svi.guide
    slope, log_sigma, mu = unconstrained(tree["posterior"])
    latent = torch.as_tensor(np.concatenate([mu[:, None], slope, log_sigma], -1))
    tril = guide.scale[:, None] * guide.scale_tril
    total = dist.MultivariateNormal(guide.loc, scale_tril=tril).log_prob(latent)
    np.testing.assert_allclose(stat(tree, "log_q")[0], total.detach().numpy(), rtol=1e-4, atol=1e-3)


def test_the_likelihood_and_the_priors_are_pyros():
    """Of each draw, against a trace of the model at it: pointwise, φ's prior by task, θ's prior, and all of it."""
    svi, data = trained(AutoNormal)
    tree = svi.to_datatree(data, num_samples=5)
    sites = {name: torch.as_tensor(tree["posterior"][name].values[0]) for name in ("slope", "sigma", "mu")}
    keep = data.full_mask()
    for i in range(5):
        values = {"mu": sites["mu"][i], "slope": sites["slope"][i, :, None], "sigma": sites["sigma"][i, :, None]}
        with pyro.get_param_store().scope():
            trace = poutine.trace(poutine.condition(svi.model, values)).get_trace(data.x, data.y, data.mask)
        trace.compute_log_prob()
        found = {name: trace.nodes[name]["log_prob"].detach() for name in ("y", "mu", "slope", "sigma")}
        like = tree["log_likelihood"]["y"].values[0, i]
        np.testing.assert_allclose(like, found["y"][keep].numpy(), rtol=1e-5, atol=1e-6)
        prior = (found["slope"] + found["sigma"])[:, 0].numpy()
        np.testing.assert_allclose(tree["log_prior"]["phi"].values[0, i], prior, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(tree["log_prior"]["global_sites"].values[0, i], found["mu"].item(), rtol=1e-5)
        total = trace.log_prob_sum().item() + values["sigma"].log().sum().item()  # dσ / d log σ
        np.testing.assert_allclose(stat(tree, "log_p")[0, i], total, rtol=1e-5)


def positive(x, y=None, mask=None):
    """A global site that must be positive."""
    tau = pyro.sample("tau", dist.LogNormal(torch.zeros((), dtype=F64), 1.0))
    with bm.task_plate(x):
        beta = pyro.sample("beta", dist.Normal(torch.zeros((), dtype=F64), tau))
        with bm.shot_plate(x, mask):
            pyro.sample("y", dist.Normal(beta, 0.5), obs=y)


def test_the_prior_of_theta_is_a_density_of_its_own_sites():
    """log p(τ) in the tree; in unconstrained space, with the Jacobian, for the weights."""
    data = observations()
    svi = svi_of(positive, AutoNormal(positive), 2, data, lr=0.01)
    posterior = svi.posterior(data, 30)
    draws, log_tau = posterior.draws(30), posterior.theta[:, 0]
    tree = bm.to_datatree(posterior, only(data))
    expected = dist.LogNormal(0.0, 1.0).log_prob(log_tau.exp())
    np.testing.assert_allclose(tree["log_prior"]["global_sites"].values[0], expected.numpy(), rtol=1e-9)
    expected = dist.Normal(0.0, 1.0).log_prob(log_tau)
    np.testing.assert_allclose(posterior.log_theta(draws).numpy(), expected.numpy(), rtol=1e-9)
    total = posterior.log_joint(draws).sum(-1) + expected
    np.testing.assert_allclose(stat(tree, "log_p")[0], total.numpy(), rtol=1e-9)


def test_losses_are_those_that_the_steps_returned():
    data = observations()
    guide = joint_guide(data, 0.7)
    svi = svi_of(hierarchy, guide, 6, data, lr=1e-3)
    tree = svi.to_datatree(data, num_samples=10)
    np.testing.assert_array_equal(tree["fit_stats"]["loss"].values, svi.returned)
    assert len(set(svi.returned)) == 6
    assert tree["fit_stats"]["loss"].dims == ("step",)
    np.testing.assert_array_equal(tree["fit_stats"]["step"].values, [1, 2, 3, 4, 5, 6])
    again = svi_of(hierarchy, joint_guide(data, 0.7), 1, data)
    again.load_state_dict(svi.state_dict())
    assert again.losses == svi.returned


def test_the_prior_of_a_whole_run_is_the_models():
    """μ from p(μ), β from p(β | μ): moments within 4 standard errors. Of a posterior for new tasks: μ from q(μ)."""
    data = observations()
    svi = svi_of(hierarchy, joint_guide(data), data=data)
    prior = svi.to_datatree(data, num_samples=1000)["prior"]
    n = 1000
    assert abs(prior["mu"].values.std() / 1.5 - 1) < 4 / (2 * n) ** 0.5
    assert abs(prior["beta"].values[..., 0].std() / (1.5**2 + 0.8**2) ** 0.5 - 1) < 4 / (2 * n) ** 0.5
    learned = bm.to_datatree(svi.posterior(data, 200), only(data))
    assert learned["prior"]["mu"].values.std() < 0.6
    assert "sample_stats" not in learned.children  # of θ that may come from other tasks, these cannot weigh it


def test_a_batch_is_what_the_steps_were_given():
    """Support and query together, padding out, names and order kept, whatever the order of the guide's tasks."""
    data = observations(tasks=4, shots=6)
    parts = [bm.Observations(data.x[:, i], data.y[:, i]) for i in (slice(0, 4), slice(4, 6))]
    batch = bm.TaskBatch(*parts, task_id=torch.tensor([3, 7, 1, 5]), names=("a", "b", "c", "d"))
    svi = svi_of(flat, AutoNormal(flat), 3, batch, lr=0.02)
    guide, order = svi.guide, [2, 0, 3, 1]
    tree = svi.to_datatree(batch.tasks(order), num_samples=20)
    assert list(tree["posterior"]["task"].values) == ["c", "a", "d", "b"]
    assert tree["log_likelihood"]["y"].shape == (1, 20, 24)
    assert "predictions" not in tree.children
    beta = torch.as_tensor(tree["posterior"]["beta"].values[0])
    loc, scale = (part.squeeze(-1)[order] for part in (guide.locs.beta, guide.scales.beta))
    expected = dist.Normal(loc, scale).log_prob(beta).detach().numpy()
    np.testing.assert_allclose(stat(tree, "log_q")[0], expected, rtol=1e-5)
    some = svi.to_datatree(batch.tasks([3, 1]), num_samples=20)
    beta = torch.as_tensor(some["posterior"]["beta"].values[0])
    loc, scale = (part.squeeze(-1)[[3, 1]] for part in (guide.locs.beta, guide.scales.beta))
    np.testing.assert_allclose(stat(some, "log_q")[0], dist.Normal(loc, scale).log_prob(beta).detach(), rtol=1e-5)
    np.testing.assert_array_equal(some["observed_data"]["y"].values, data.y[[3, 1]].flatten().numpy())


def test_an_unknown_query_is_predicted():
    data = observations()
    batch = bm.TaskBatch(data, bm.Observations(data.x[:, :2], None))
    svi = svi_of(flat, task_guide(), data=data)
    tree = svi.to_datatree(batch, num_samples=20)
    assert tree["predictions"]["y"].shape == (1, 20, 6)
    assert tree["observed_data"]["y"].shape == (24,)


@pytest.mark.filterwarnings("ignore:Estimated shape parameter")
def test_loo_of_a_whole_run():
    """Of the exact guide the closed form; a wrong guide is corrected by the weights of the joint draw, plain is not."""
    data = observations()
    distribution, y = evidence(data)
    inverse = torch.linalg.inv(distribution.covariance_matrix)
    variance = 1 / inverse.diagonal()
    truth = dist.Normal(y - variance * (inverse @ y), variance.sqrt()).log_prob(y).sum().item()

    def scores(guide):
        run = svi_of(hierarchy, guide, data=data)
        batch, n = only(data), 1000
        posterior = run.posterior(data, n, generator=3, whole=True)
        return bm.loo(posterior, batch, num_samples=n), arviz_stats.loo(bm.to_datatree(posterior, batch))

    found, plain = scores(joint_guide(data))
    assert found.approx_posterior
    assert abs(found.elpd - truth) < 0.1
    assert abs(plain.elpd - truth) < 0.1
    found, plain = scores(joint_guide(data, 1.5, 0.1))
    assert abs(found.elpd - truth) < 0.5
    assert abs(plain.elpd - truth) > 1.0


def test_an_autodelta_is_a_point():
    data = observations()
    svi = svi_of(hierarchy, AutoDelta(hierarchy), 3, data, lr=0.01)
    tree = svi.to_datatree(data, num_samples=10)
    assert not {"log_likelihood", "sample_stats"} & set(tree.children)
    assert "point estimate" in tree.attrs["log_likelihood_note"]
    with pytest.raises(errors.UnsupportedError, match="point estimate"):
        bm.loo(svi.posterior(data, 200), only(data))


# -- NUTS -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nuts_run():
    data = observations(ragged=True)
    method = bm.NUTS(hierarchy, num_samples=120, warmup=50, num_chains=2, max_tree_depth=5, infer_theta=True).to(F64)
    posterior = method.adapt(data, generator=3)
    return data, posterior, bm.to_datatree(posterior, only(data))


def test_a_nuts_tree_has_the_exact_moments(nuts_run):
    """Means and variances of μ and β within 4 standard errors by ArviZ's own effective sizes; control: no data."""
    data, _, tree = nuts_run
    mean, covariance = exact(data)
    parts = [tree["posterior"]["mu"].values[..., None], tree["posterior"]["beta"].values]
    values = torch.as_tensor(np.concatenate(parts, -1))
    assert values.shape == (2, 120, 4)
    truth = covariance.diagonal()
    ess = arviz_stats.ess(tree)
    sizes = torch.as_tensor(np.concatenate([ess["mu"].values[None], ess["beta"].values]))
    errors_of_mean = (truth / sizes).sqrt()
    assert ((values.mean((0, 1)) - mean) / errors_of_mean).abs().max() < 4
    spread = (values - mean).square().mean((0, 1)) / truth - 1
    assert (spread / (2 / (sizes / 2)).sqrt()).abs().max() < 4
    assert (mean / errors_of_mean).abs().max() > 6
    assert abs(tree["prior"]["mu"].values.std() / 1.5 - 1) < 4 / 480**0.5


def test_transitions_of_nuts(nuts_run):
    """lp is the log joint density at the draw; the rest keeps ArviZ's names, types and bounds."""
    _, posterior, tree = nuts_run
    stats = tree["sample_stats"]
    names = {"acceptance_rate", "diverging", "energy", "lp", "n_steps", "reached_max_treedepth", "step_size"}
    assert set(stats.data_vars) == names | {"tree_depth"}
    assert all(stats[name].dims == ("chain", "draw") and stats[name].shape == (2, 120) for name in stats.data_vars)
    assert stats["diverging"].dtype == stats["reached_max_treedepth"].dtype == bool
    draws = posterior.draws(240)
    lp = posterior.log_joint(draws).sum(-1) + posterior.log_theta(draws)
    np.testing.assert_allclose(stats["lp"].values.flatten(), lp.numpy(), rtol=1e-9)
    assert (stats["energy"] > -stats["lp"].shift(draw=1)).values[:, 1:].all()  # kinetic energy is positive
    assert ((stats["n_steps"] >= 2 ** stats["tree_depth"] - 1) & (stats["n_steps"] <= 31)).all()
    np.testing.assert_array_equal(stats["reached_max_treedepth"], stats["tree_depth"] == 5)
    assert ((stats["acceptance_rate"] > 0) & (stats["acceptance_rate"] <= 1)).all()
    np.testing.assert_allclose(stats["step_size"].values, posterior.step_size.numpy()[:, None].repeat(120, 1))


class Funnel:
    """Neal's funnel: v ~ N(0, 3), z | v ~ N(0, exp(v / 2)); steps that suit its mouth diverge in its neck."""

    @staticmethod
    def potential(values):
        v, z = values["v"], values["z"]
        return -(dist.Normal(0.0, 3.0).log_prob(v).sum() + dist.Normal(0.0, (v / 2).exp()).log_prob(z).sum())


def test_recording_is_pyros_own_sampler():
    """The same draws as Pyro's kernel; divergences where Pyro has them; the acceptance whose mean Pyro keeps."""
    start = {"v": torch.zeros(1, dtype=F64), "z": torch.zeros(5, dtype=F64)}

    def run(kind):
        kernel = kind(potential_fn=Funnel.potential, step_size=1.5, adapt_step_size=False, max_tree_depth=5)
        kernel.initial_params = start
        draws, transitions, z = [], [], start
        with torch.random.fork_rng():
            torch.manual_seed(5)
            kernel.setup(10)
            for step in range(60):
                z = kernel.sample(z)
                if step >= 10:
                    draws.append(z["v"].clone())
                    transitions.append(getattr(kernel, "transition", None))
        return kernel, torch.cat(draws), transitions

    plain, expected, _ = run(PyroNUTS)
    _, draws, transitions = run(RecordingNUTS)
    torch.testing.assert_close(draws, expected, rtol=0, atol=0)
    stats = torch.stack(transitions)
    where = stats[:, 1].nonzero().flatten().tolist()
    assert where == plain.diagnostics()["divergences"]
    assert len(where) > 0
    assert stats[:, 0].mean().item() == pytest.approx(float(plain._mean_accept_prob), rel=1e-6)


def funnel(x, y=None, mask=None):
    with bm.task_plate(x):
        v = pyro.sample("v", dist.Normal(torch.zeros((), dtype=F64), 3.0))
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), (v / 2).exp()))
        with bm.shot_plate(x, mask):
            pyro.sample("y", dist.Normal(z, 20.0), obs=y)


def test_divergences_of_a_run(nuts_run):
    """Counted by chain as the posterior counts them: some in a funnel, none in a Gaussian."""
    data = observations(tasks=3, shots=2)
    options = {"num_samples": 60, "warmup": 30, "num_chains": 2, "max_tree_depth": 5, "target_accept": 0.5}
    posterior = bm.NUTS(funnel, **options).to(F64).adapt(data, generator=1)
    tree = bm.to_datatree(posterior, only(data))
    counts = tree["sample_stats"]["diverging"].sum("draw").values
    np.testing.assert_array_equal(counts, posterior.divergences.numpy())
    assert counts.sum() > 0
    assert not nuts_run[2]["sample_stats"]["diverging"].any()


def test_a_run_given_draws_of_theta():
    """G draws of θ: each transition moves G draws of φ, which share what is known of it."""
    data = observations()
    method = bm.NUTS(hierarchy, num_samples=10, warmup=8, num_chains=2, max_tree_depth=3, global_guide="normal").to(F64)
    posterior = method.adapt(data, num_theta=3, generator=0)
    tree = bm.to_datatree(posterior, only(data))
    assert tree["posterior"]["mu"].shape == (2, 30)
    assert tree["posterior"]["beta"].shape == (2, 30, 3)
    lp = stat(tree, "lp").reshape(2, 10, 3)
    np.testing.assert_array_equal(lp, lp[..., :1].repeat(3, -1))
    draws = posterior.draws(60)
    np.testing.assert_allclose(posterior.log_joint(draws).sum(-1).reshape(2, 10, 3).sum(-1), lp[..., 0], rtol=1e-9)


def test_a_run_goes_to_a_file_and_back(nuts_run, tmp_path):
    """The posterior with its transitions, and both trees as netCDF."""
    data, posterior, tree = nuts_run
    posterior.save(tmp_path / "nuts.pt")
    again = bm.to_datatree(bm.load_posterior(tmp_path / "nuts.pt", posterior.program), only(data))
    xarray.testing.assert_equal(again["sample_stats"].to_dataset(), tree["sample_stats"].to_dataset())
    svi = svi_of(hierarchy, joint_guide(data), 3, data).to_datatree(data, num_samples=20)
    for one in (tree, svi):
        xarray.testing.assert_identical(bm.load_netcdf(bm.save_netcdf(one, tmp_path / "run.nc")), one)
    own = svi_of(hierarchy, joint_guide(data), 1, data).posterior(data, 20, whole=True)
    own.save(tmp_path / "svi.pt")
    torch.testing.assert_close(bm.load_posterior(tmp_path / "svi.pt", own.program).log_q, own.log_q)


# -- any posterior --------------------------------------------------------------------------------------------------


def test_weights_of_a_posterior_with_a_density():
    """log p − log q by task of ABML's Gaussian, from the posterior's own calls; of particles there are none."""
    data = observations(ragged=True)
    posterior = bm.ABML(flat, inner_lr=0.05).to(F64).adapt(data)
    tree = bm.to_datatree(posterior, only(data), num_samples=30, generator=2)
    u = torch.as_tensor(tree["posterior"]["beta"].values[0]).unsqueeze(-1)
    expected = posterior.log_joint(bm.Draws(u)) - posterior.log_prob(u)
    np.testing.assert_allclose(stat(tree, "log_weights")[0], expected.detach().numpy(), rtol=1e-6, atol=1e-6)
    particles = bm.ParticlesPosterior(posterior.program, data, u)
    assert "sample_stats" not in bm.to_datatree(particles, only(data), num_samples=30).children
    # padding tasks are left out of the weights too
    padded = bm.to_datatree(posterior, replace(only(data), task_id=torch.tensor([4, -1, 6])), num_samples=30)
    assert padded["sample_stats"]["log_weights"].shape == (1, 30, 2)


# -- bad input ------------------------------------------------------------------------------------------------------


def test_bad_input_of_a_run(nuts_run):
    data, posterior, _ = nuts_run
    svi = bm.MetaSVI(hierarchy, AutoNormal(hierarchy), lambda p: torch.optim.Adam(p, 0.01), Trace_ELBO())
    with pytest.raises(errors.UnsupportedError, match="no step"):
        svi.to_datatree(data)
    svi.step(data)
    with pytest.raises(errors.OptionError, match="num_samples=1"):
        svi.to_datatree(data, num_samples=1)
    with pytest.raises(errors.OptionError, match="num_samples=0"):
        svi.posterior(data, 0)
    with pytest.raises(errors.DataError):
        svi.to_datatree(observations(seed=9))
    with pytest.raises(errors.ShapeError):
        svi.to_datatree(observations(tasks=2))
    nan = replace(data, y=torch.where(torch.arange(8) == 1, torch.nan, data.y))
    with pytest.raises(errors.NonFiniteDataError, match="task"):
        svi.to_datatree(nan)
    with pytest.raises(errors.OptionError, match="chains=7"):
        bm.to_datatree(posterior, only(data), chains=7)
    with pytest.raises(errors.OptionError, match="random choice"):
        bm.to_datatree(posterior, only(data), num_samples=100, chains=2)
    assert bm.to_datatree(posterior, only(data), num_samples=100)["posterior"].sizes["chain"] == 1
    with pytest.raises(errors.OptionError, match="num_samples=1"):
        bm.to_datatree(posterior, only(data), num_samples=1)
    for losses in ([], [[1.0, 2.0]]):
        with pytest.raises(errors.DataError, match="losses"):
            bm.to_datatree(posterior, only(data), losses=losses)


def test_nan_in_the_draws_is_named():
    data = observations()
    svi = svi_of(hierarchy, AutoNormal(hierarchy), 1, data, lr=0.01)
    with torch.no_grad():
        svi.guide.locs.beta.fill_(torch.nan)
    with pytest.raises(errors.NonFiniteDataError, match="1 of 4 trained parameters"):
        svi.to_datatree(data, num_samples=5)
    program = svi._trained().program().prepare(data)
    draws = torch.zeros(6, 3, 1, dtype=F64)
    draws[2] = torch.nan
    given = bm.SamplesPosterior(program, data, draws, torch.zeros(6, 1, dtype=F64))
    with pytest.raises(errors.NonFiniteDataError, match="beta are NaN in 3 of 18"):
        bm.to_datatree(given, only(data))


def test_bad_input_of_draws():
    data = observations()
    program = bm.NUTS(flat).to(F64).program.prepare(data)
    u = torch.randn(6, 3, 1, dtype=F64)
    with pytest.raises(errors.ShapeError, match="log_q"):
        bm.SamplesPosterior(program, data, u, log_q=torch.zeros(5))
    chains = {"divergences": torch.zeros(2), "step_size": torch.ones(2)}
    with pytest.raises(errors.ShapeError, match="stats"):
        bm.ChainsPosterior(program, data, u, **chains, stats=torch.zeros(2, 2, 8))
    posterior = bm.SamplesPosterior(program, data, u, log_q=torch.full((6, 3), torch.nan))
    with pytest.raises(errors.DataError, match="18 of 18"):
        log_ratios(posterior, data, posterior.draws(6))
    with pytest.raises(errors.DataError, match="y=None"):
        log_ratios(posterior, data.with_y(None), posterior.draws(6))
