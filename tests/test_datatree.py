"""The ArviZ export: groups, dimensions and values; leave-one-out; netCDF."""

from dataclasses import replace

import arviz_stats
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray
from pyro.nn import PyroModule, PyroParam
from torch.distributions import constraints

from bayesmeta.adapt.abml import ABML
from bayesmeta.adapt.bmaml import BMAML
from bayesmeta.adapt.last_layer import BayesianLastLayer
from bayesmeta.adapt.maml import MAML
from bayesmeta.adapt.platipus import Platipus
from bayesmeta.data import Observations, Standardizer, TaskBatch
from bayesmeta.diagnostics.datatree import load_netcdf, loo, save_netcdf, to_datatree
from bayesmeta.errors import DataError, OptionError, ShapeError, UnsupportedError
from bayesmeta.models.likelihoods import Gaussian
from bayesmeta.models.nets import mlp
from bayesmeta.models.neural import NeuralTaskModel
from bayesmeta.models.plates import shot_plate, task_plate
from bayesmeta.ops.random import as_generator
from bayesmeta.posteriors.gaussian import NormalPosterior
from bayesmeta.posteriors.samples import ParticlesPosterior, SamplesPosterior
from bayesmeta.tasks.linear import LinearGaussian

GROUPS = {
    "posterior",
    "posterior_predictive",
    "prior",
    "prior_predictive",
    "log_likelihood",
    "log_prior",
    "sample_stats",
    "observed_data",
    "constant_data",
    "predictions",
    "predictions_constant_data",
}


def linear_batch(tasks=3, support=12, query=5, ragged=False):
    batch = LinearGaussian(torch.tensor([0.5, -1.0]), torch.eye(2), 0.5).sample(tasks, support=support, query=query)
    if not ragged:
        return batch
    lengths = torch.tensor([support - i for i in range(tasks)])
    mask = torch.arange(support) < lengths[:, None]
    return replace(batch, support=replace(batch.support, mask=mask))


def network(width, task_modules="all"):
    generator = torch.Generator().manual_seed(0)
    net = (
        mlp(2, [3], width, activation="tanh")
        if task_modules == "all"
        else torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False))
    )
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return net


def abml(batch, width=1):
    return ABML(NeuralTaskModel(network(width), Gaussian(0.8)), inner_lr=0.05).adapt(batch.support)


def last_layer(batch, prior_scale=1.0):
    model = NeuralTaskModel(network(1, "head"), Gaussian(0.5), "normal", task_modules="head")
    with torch.no_grad():
        model.prior.log_scale.fill_(prior_scale).log_()
    return BayesianLastLayer(model).adapt(batch.support)


def maml(batch):
    return MAML(NeuralTaskModel(network(1), Gaussian(0.5), "point")).adapt(batch.support)


class Sites(PyroModule):
    """A global site beside local ones; names that a DataTree cannot take as they are."""

    def __init__(self):
        super().__init__()
        self.tau = PyroParam(torch.tensor(1.0), constraint=constraints.positive)

    def forward(self, x, y=None, mask=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        tau = self.tau
        with task_plate(x):
            slope = pyro.sample("task", dist.Normal(mu, tau))
            sigma = pyro.sample("noise/scale", dist.LogNormal(-1.0, 0.3))
            with shot_plate(x, mask):
                return pyro.sample("y", dist.Normal(slope * x[..., 0], sigma), obs=y)


# -- groups, dimensions, values -----------------------------------------------------------------------------------


def test_groups_and_dimensions():
    batch = linear_batch(ragged=True)
    batch = replace(batch, names=("ada", "bob", "eve"))
    tree = to_datatree(abml(batch), batch, num_samples=20)
    assert set(tree.children) == GROUPS
    posterior = tree["posterior"]
    assert posterior["0.weight"].dims == ("chain", "draw", "task", "0.weight_dim_0", "0.weight_dim_1")
    assert posterior["0.weight"].shape == (1, 20, 3, 3, 2)
    assert list(posterior["task"].values) == ["ada", "bob", "eve"]
    for group in ("posterior_predictive", "prior_predictive", "log_likelihood"):
        assert tree[group]["y"].dims == ("chain", "draw", "obs_id")
        assert tree[group]["y"].shape == (1, 20, 12 + 11 + 10)
    assert tree["log_prior"]["phi"].dims == ("chain", "draw", "task")
    assert tree["constant_data"]["x"].dims == ("obs_id", "feature")
    assert tree["predictions"]["y"].shape == (1, 20, 15)
    owners = ["ada"] * 12 + ["bob"] * 11 + ["eve"] * 10
    for group in ("observed_data", "constant_data", "log_likelihood", "posterior_predictive"):
        assert list(tree[group]["task_of_obs"].values) == owners
    assert list(tree["predictions"]["task_of_query"].values) == ["ada"] * 5 + ["bob"] * 5 + ["eve"] * 5
    assert tree.attrs["inference_library"] == "bayesmeta"
    assert tree.attrs["posterior_kind"] == "NormalPosterior"
    assert tree.attrs["num_tasks"] == 3


def test_values_are_those_of_the_posterior():
    batch = linear_batch(ragged=True)
    posterior = abml(batch)
    tree = to_datatree(posterior, batch, num_samples=20, generator=7)
    draws = posterior.draws(20, as_generator(7, stream="predictions"))
    mask = batch.support.mask
    for name, value in posterior.named(draws).items():
        np.testing.assert_array_equal(tree["posterior"][name].values[0], value.numpy())
    expected = posterior.log_likelihood(batch.support, draws=draws)
    np.testing.assert_allclose(tree["log_likelihood"]["y"].values[0], expected[:, mask].numpy(), rtol=1e-6)
    np.testing.assert_array_equal(tree["log_prior"]["phi"].values[0], posterior.log_prior(draws).numpy())
    np.testing.assert_array_equal(tree["observed_data"]["y"].values, batch.support.y[mask].numpy())
    np.testing.assert_array_equal(tree["constant_data"]["x"].values, batch.support.x[mask].numpy())
    np.testing.assert_array_equal(tree["predictions_constant_data"]["y"].values, batch.query.y.flatten().numpy())
    second = tree["observed_data"].to_dataset().where(tree["observed_data"]["task_of_obs"] == 1, drop=True)
    np.testing.assert_array_equal(second["y"].values, batch.support.y[1, :11].numpy())


def test_the_seed_decides():
    batch = linear_batch()
    posterior = abml(batch)
    first, same, other = (to_datatree(posterior, batch, num_samples=10, generator=s) for s in (1, 1, 2))
    xarray.testing.assert_equal(first, same)
    assert not first.equals(other)


def test_padding_tasks_are_left_out():
    batch = linear_batch()
    tree = to_datatree(abml(batch), replace(batch, task_id=torch.tensor([5, -1, 9])), num_samples=10)
    assert list(tree["posterior"]["task"].values) == [5, 9]
    assert set(tree["observed_data"]["task_of_obs"].values) == {5, 9}
    np.testing.assert_array_equal(tree["observed_data"]["y"].values, batch.support.y[[0, 2]].flatten().numpy())
    with pytest.raises(DataError, match="padding"):
        to_datatree(abml(batch), replace(batch, task_id=torch.tensor([-1, -1, -1])), num_samples=10)


def test_global_sites_and_awkward_names():
    batch = linear_batch()
    method = ABML(Sites(), inner_lr=0.01, global_guide="normal")
    posterior = method.adapt(batch.support, num_theta=5)
    tree = to_datatree(posterior, batch, num_samples=20)
    assert tree["posterior"]["mu"].dims == ("chain", "draw")
    assert tree["posterior"]["task_"].dims == ("chain", "draw", "task")
    assert tree["posterior"]["noise.scale"].dims == ("chain", "draw", "task")
    assert bool((tree["posterior"]["noise.scale"] > 0).all())
    assert set(tree["prior"].data_vars) == {"mu", "task_", "noise.scale"}
    arviz_stats.summary(tree)


def test_several_outputs():
    batch = linear_batch()
    wide = TaskBatch(*(replace(o, y=torch.stack([o.y, -o.y], -1)) for o in (batch.support, batch.query)))
    tree = to_datatree(abml(wide, width=2), wide, num_samples=10)
    assert tree["posterior_predictive"]["y"].dims == ("chain", "draw", "obs_id", "output")
    assert tree["predictions"]["y"].dims == ("chain", "draw", "query_id", "output")
    assert tree["log_likelihood"]["y"].dims == ("chain", "draw", "obs_id")
    assert tree["predictions_constant_data"]["y"].dims == ("query_id", "output")


def test_raw_units_by_hand():
    batch = linear_batch()
    scaling = Standardizer(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]), torch.tensor(10.0), torch.tensor(5.0))
    batch = replace(batch, standardizer=scaling)
    posterior = abml(batch)
    raw = to_datatree(posterior, batch, num_samples=10)
    standard = to_datatree(posterior, batch, num_samples=10, raw_units=False)
    for group in ("posterior_predictive", "prior_predictive", "predictions", "observed_data"):
        np.testing.assert_allclose(raw[group]["y"], standard[group]["y"] * 5 + 10, rtol=1e-5)
    np.testing.assert_allclose(raw["constant_data"]["x"], standard["constant_data"]["x"] * [3, 4] + [1, 2], rtol=1e-5)
    np.testing.assert_allclose(raw["log_likelihood"]["y"], standard["log_likelihood"]["y"] - np.log(5), rtol=1e-5)
    xarray.testing.assert_equal(raw["posterior"].to_dataset(), standard["posterior"].to_dataset())
    assert (raw.attrs["units"], standard.attrs["units"]) == ("raw", "standard")


def test_what_is_missing_is_left_out():
    batch = linear_batch()
    posterior = abml(batch)
    unknown = replace(batch, query=batch.query.with_y(None))
    tree = to_datatree(posterior, unknown, num_samples=10)
    assert set(tree["predictions_constant_data"].data_vars) == {"x"}
    empty = Observations(batch.query.x[:, :0], batch.query.y[:, :0])
    tree = to_datatree(posterior, replace(batch, query=empty), num_samples=10)
    assert set(tree.children) == {g for g in GROUPS if not g.startswith("predictions")}
    none = replace(batch, support=empty)
    tree = to_datatree(abml(none), none, num_samples=10)
    assert set(tree.children) == {"posterior", "prior", "log_prior", "predictions", "predictions_constant_data"}


def test_covariates_of_tasks():
    batch = linear_batch()
    w = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    batch = TaskBatch(replace(batch.support, w=w), replace(batch.query, w=w))
    tree = to_datatree(abml(batch), batch, num_samples=10)
    assert tree["constant_data"]["w"].dims == ("task", "covariate")
    np.testing.assert_array_equal(tree["constant_data"]["w"].values, w.numpy())


def test_chains():
    batch = linear_batch()
    posterior = abml(batch)
    tree = to_datatree(posterior, batch, num_samples=20, chains=4)
    flat = to_datatree(posterior, batch, num_samples=20)
    for group in ("posterior", "log_likelihood"):
        for name, value in tree[group].data_vars.items():
            assert value.sizes["chain"] == 4
            np.testing.assert_array_equal(value.values.reshape(1, 20, *value.shape[2:]), flat[group][name].values)
    with pytest.raises(OptionError, match="chains=3"):
        to_datatree(posterior, batch, num_samples=20, chains=3)


def test_other_tasks_are_an_error():
    batch = linear_batch()
    with pytest.raises(ShapeError, match="2 tasks"):
        to_datatree(abml(batch), batch.tasks([0, 1]))


# -- ArviZ on the tree --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [abml, last_layer])
def test_summary_and_loo_work_without_warnings(make):
    batch = linear_batch(support=15)
    tree = to_datatree(make(batch), batch, num_samples=2000)
    table = arviz_stats.summary(tree)
    assert len(table) == sum(int(np.prod(v.shape[2:])) for v in tree["posterior"].data_vars.values())
    result = arviz_stats.loo(tree)
    assert result.n_data_points == 45


def test_loo_of_the_exact_posterior_is_exact():
    batch = linear_batch(support=15)
    posterior = last_layer(batch)
    n = 20_000
    result = loo(posterior, batch, num_samples=n, pointwise=True)
    assert result.approx_posterior
    plain = arviz_stats.loo(to_datatree(posterior, batch, num_samples=n), pointwise=True)
    np.testing.assert_allclose(result.elpd_i, plain.elpd_i, atol=1e-2)  # nothing to correct
    expected = torch.stack([leave_one_out(batch, i) for i in range(15)], -1)
    # the importance weights are 1 / p(y_i | φ): the Monte Carlo error of the log of their mean
    log_weights = -posterior.log_likelihood(batch.support, n).double()
    weights = (log_weights - log_weights.amax(0)).exp()
    error = weights.std(0) / weights.mean(0) / n**0.5
    assert ((torch.as_tensor(np.asarray(result.elpd_i)).reshape(expected.shape) - expected).abs() / error).max() < 5


def leave_one_out(batch, shot):
    """log p(y_i | y_{−i}) of each task, by conditioning on the others."""
    keep = [i for i in range(batch.support.shots) if i != shot]
    rest = Observations(batch.support.x[:, keep], batch.support.y[:, keep])
    posterior = last_layer(TaskBatch(rest, batch.query))
    return posterior.predictive(batch.support.x[:, [shot]]).log_prob(batch.support.y[:, [shot]])[:, 0]


@pytest.mark.filterwarnings("ignore:Estimated shape parameter")
def test_loo_corrects_a_wrong_approximation():
    batch = linear_batch(support=15)
    exact = last_layer(batch)
    scale = exact.covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    wide = NormalPosterior(exact.program, batch.support, exact.loc[None] + 0.1, 1.5 * scale[None])
    reference = torch.stack([leave_one_out(batch, i) for i in range(15)], -1).sum().item()
    corrected = loo(wide, batch, num_samples=4000)
    plain = arviz_stats.loo(to_datatree(wide, batch, num_samples=4000))
    assert corrected.approx_posterior
    assert abs(corrected.elpd - reference) < 0.5
    assert abs(plain.elpd - reference) > 1.0


def test_loo_with_padding_is_that_of_the_real_observations():
    batch = linear_batch(support=15, ragged=True)
    garbage = replace(batch.support, y=torch.where(batch.support.mask, batch.support.y, 1e3))
    posterior = last_layer(batch)
    first = loo(posterior, batch, num_samples=2000)
    second = loo(posterior, replace(batch, support=garbage), num_samples=2000)
    assert first.n_data_points == 15 + 14 + 13
    assert first.elpd == pytest.approx(second.elpd)


def test_loo_with_global_sites_is_plain():
    batch = linear_batch(support=15)
    posterior = ABML(Sites(), inner_lr=0.01, global_guide="normal").adapt(batch.support)
    posterior.loc[..., 1] = 0.3  # noise: wide enough that no observation weighs too much
    posterior.scale.mul_(0.05)
    assert not loo(posterior, batch, num_samples=400).approx_posterior


def test_a_point_estimate_refuses_loo():
    batch = linear_batch()
    posterior = maml(batch)
    tree = to_datatree(posterior, batch, num_samples=10)
    assert set(tree.children) == GROUPS - {"log_likelihood", "sample_stats"}
    assert "point estimate" in tree.attrs["log_likelihood_note"]
    with pytest.raises(TypeError, match="log likelihood"):
        arviz_stats.loo(tree)
    with pytest.raises(UnsupportedError, match="point estimate"):
        loo(posterior, batch)
    arviz_stats.summary(tree, kind="stats")


def made_of_draws(kind, n, batch):
    """Draws of the exact posterior, without its density."""
    exact = last_layer(batch)
    return kind(exact.program, batch.support, exact.draws(n, 3).u)


@pytest.mark.filterwarnings("ignore:Estimated shape parameter")  # 100 are few all the same
@pytest.mark.parametrize("kind", [ParticlesPosterior, SamplesPosterior])
def test_few_draws_without_a_density_refuse_loo(kind):
    batch = linear_batch(support=15)
    for n in (5, 99):
        with pytest.raises(UnsupportedError, match=rf"{n} draws without a density.* 100 .*NUTS.*ABML or Laplace"):
            loo(made_of_draws(kind, n, batch), batch)
    assert np.isfinite(loo(made_of_draws(kind, 100, batch), batch).elpd)


@pytest.mark.parametrize("method", [BMAML, Platipus])
def test_particle_methods_refuse_loo(method):
    batch = linear_batch()
    posterior = method(NeuralTaskModel(network(1), Gaussian(0.5), "point"), inner_lr=0.05).adapt(batch.support)
    with pytest.raises(UnsupportedError, match=f"{len(posterior.u)} draws without a density"):
        loo(posterior, batch)


@pytest.mark.filterwarnings("ignore:Estimated shape parameter")
@pytest.mark.parametrize("kind", [ParticlesPosterior, SamplesPosterior])
def test_loo_asks_for_no_more_draws_than_there_are(kind):
    batch = linear_batch(support=15)
    posterior = made_of_draws(kind, 2000, batch)
    result = loo(posterior, batch, num_samples=5000)
    assert result.n_samples == 2000
    assert not result.approx_posterior
    exact = sum(float(leave_one_out(batch, i).sum()) for i in range(15))
    assert abs(result.elpd - exact) < 0.3
    fewer = loo(posterior, batch, num_samples=500)
    assert fewer.n_samples == 500


def test_loo_needs_targets():
    batch = linear_batch()
    posterior = abml(batch)
    with pytest.raises(DataError, match="support with targets"):
        loo(posterior, replace(batch, support=batch.support.with_y(None)))


# -- files --------------------------------------------------------------------------------------------------------


def test_netcdf_round_trip(tmp_path):
    batch = replace(linear_batch(ragged=True), names=("ada", "bob", "Zoë"))
    tree = to_datatree(abml(batch), batch, num_samples=10)
    path = save_netcdf(tree, tmp_path / "new" / "posterior.nc")
    again = load_netcdf(path)
    xarray.testing.assert_identical(tree, again)
    assert [p.name for p in path.parent.iterdir()] == ["posterior.nc"]
    arviz_stats.summary(again)
    save_netcdf(again, path)  # not locked by the reader


def test_a_failed_write_leaves_the_old_file(tmp_path):
    batch = linear_batch()
    tree = to_datatree(abml(batch), batch, num_samples=10)
    path = save_netcdf(tree, tmp_path / "posterior.nc")
    before = path.read_bytes()
    tree.attrs["bad"] = object()
    with pytest.raises(TypeError):
        save_netcdf(tree, path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1
