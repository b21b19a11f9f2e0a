"""MetaSVI is pyro.infer.SVI without the global store."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, JitTrace_ELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from torch.distributions import constraints

import bayesmeta as bm
from bayesmeta import errors
from tests.programs import TwoSites, batch_of


def model(x, y=None, mask=None):
    tau = pyro.param("tau", torch.tensor(1.5), constraint=constraints.positive)
    with bm.task_plate(x):
        slope = pyro.sample("slope", dist.Normal(0.0, tau))
        with bm.shot_plate(x, mask):
            pyro.sample("y", dist.Normal(slope * x.squeeze(-1), 0.3), obs=y)


def guide(x, y=None, mask=None):
    """Amortised: a slope estimate by least squares, scaled and shifted by learned numbers."""
    a = pyro.param("a", torch.tensor(0.2))
    s = pyro.param("s", torch.tensor(0.4), constraint=constraints.positive)
    estimate = (x.squeeze(-1) * y).sum(-1, keepdim=True) / x.squeeze(-1).square().sum(-1, keepdim=True)
    with bm.task_plate(x):
        pyro.sample("slope", dist.Normal(a * estimate, s))


def data(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 5, 1, generator=generator)
    slope = 1.2 * torch.randn(6, 1, generator=generator)
    return bm.Observations(x, slope * x.squeeze(-1) + 0.3 * torch.randn(6, 5, generator=generator))


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
@pytest.mark.parametrize("kind", ["functions", "autoguide"])
def test_equals_pyro_svi_step_by_step(elbo, kind):
    observations = data()
    args = (observations.x, observations.y)

    def make():
        if kind == "functions":
            return model, guide
        program = TwoSites()
        return program, AutoNormal(program)

    with torch.random.fork_rng(), pyro.get_param_store().scope():
        reference_model, reference_guide = make()
        pyro.set_rng_seed(3)
        svi = SVI(reference_model, reference_guide, pyro.optim.Adam({"lr": 0.05}), elbo())
        expected = [svi.step(*args) for _ in range(20)]
        evaluated = svi.evaluate_loss(*args)
    with torch.random.fork_rng():
        our_model, our_guide = make()
        pyro.set_rng_seed(3)
        ours = bm.MetaSVI(our_model, our_guide, lambda p: torch.optim.Adam(p, 0.05), elbo())
        losses = [ours.step(*args) for _ in range(20)]
        assert losses == pytest.approx(expected, rel=1e-6)
        assert ours.evaluate_loss(*args) == pytest.approx(evaluated, rel=1e-6)
        pyro.set_rng_seed(3)
        other = bm.MetaSVI(*make(), lambda p: torch.optim.Adam(p, 0.2), elbo())
        assert [other.step(*args) for _ in range(20)] != pytest.approx(expected, rel=1e-3), "control: another rate"
    assert len(pyro.get_param_store()) == 0


def test_the_users_own_store_survives():
    store = pyro.get_param_store()
    with store.scope():
        mine = pyro.param("tau", torch.tensor(7.0), constraint=constraints.positive)
        svi = bm.MetaSVI(model, guide, lambda p: torch.optim.Adam(p, 0.05), Trace_ELBO())
        observations = data()
        svi.step(observations.x, observations.y)
        assert list(store.keys()) == ["tau"]
        assert pyro.param("tau").item() == mine.item() == pytest.approx(7.0)


def test_a_task_batch_is_support_and_query_together():
    observations = data()
    batch = bm.TaskBatch(
        bm.Observations(observations.x[:, :2], observations.y[:, :2]),
        bm.Observations(observations.x[:, 2:], observations.y[:, 2:]),
    )
    values = []
    for args in ((batch,), (observations,), (observations.x, observations.y, None)):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            svi = bm.MetaSVI(model, guide, lambda p: torch.optim.Adam(p, 0.05), Trace_ELBO())
            values.append([svi.step(*args) for _ in range(3)])
    assert values[0] == values[1] == values[2]


def test_the_fit_reaches_the_exact_posterior_and_predicts():
    """With this guide family the exact posterior N(b·estimate, v) differs by task only through Σx²: use equal ones."""
    x = torch.tensor([-1.0, -0.5, 0.5, 1.0, 1.5]).expand(8, 5).unsqueeze(-1)
    generator = torch.Generator().manual_seed(1)
    slope = torch.randn(8, 1, generator=generator)
    y = slope * x.squeeze(-1) + 0.3 * torch.randn(8, 5, generator=generator)
    observations = bm.Observations(x, y)

    def fixed(x, y=None, mask=None):
        with bm.task_plate(x):
            slope = pyro.sample("slope", dist.Normal(0.0, 1.5))
            with bm.shot_plate(x, mask):
                pyro.sample("y", dist.Normal(slope * x.squeeze(-1), 0.3), obs=y)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        svi = bm.MetaSVI(fixed, guide, lambda p: torch.optim.Adam(p, 0.02), TraceMeanField_ELBO(num_particles=4))
        for step in range(600):
            if step == 400:
                svi.optimizer.param_groups[0]["lr"] = 0.002
            svi.step(observations)
    precision = 1 / 1.5**2 + float(x[0].square().sum()) / 0.3**2
    # the ELBO's gradient noise at rate 0.002 leaves about one per cent
    assert svi.param("s").item() == pytest.approx(precision**-0.5, rel=0.03)
    assert svi.param("a").item() == pytest.approx(1 - 1 / 1.5**2 / precision, rel=0.03)
    posterior = svi.posterior(observations, 400, generator=2)
    draws = posterior.sample(400)["slope"]
    assert draws.shape == (400, 8)
    exact = (x.squeeze(-1) * y).sum(-1) / 0.3**2 / precision
    assert ((draws.mean(0) - exact).abs() / (precision**-0.5 / 20)).max() < 5
    assert posterior.predict(x, 400).shape == (400, 8, 5)
    assert posterior.log_likelihood(observations, 400).shape == (400, 8, 5)


def test_posterior_uses_the_trained_parameters_of_a_function():
    observations = data()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        svi = bm.MetaSVI(model, guide, lambda p: torch.optim.Adam(p, 0.1), Trace_ELBO())
        for _ in range(30):
            svi.step(observations)
    posterior = svi.posterior(observations, 10)
    tau = posterior.program.scope.constrained()["tau"].item()
    assert tau == pytest.approx(svi.param("tau").item())
    assert tau != pytest.approx(1.5, abs=1e-3)


def test_methods_own_model_and_guide_go_in():
    batch = bm.TaskBatch(batch_of(3, 4), batch_of(3, 3, seed=1))
    method = bm.ABML(TwoSites(), inner_steps=1, inner_lr=0.01)
    before = None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        svi = bm.MetaSVI(method.model, method.guide, lambda p: torch.optim.Adam(p, 0.05), Trace_ELBO())
        for step in range(5):
            svi.step(batch)
            if step == 0:
                before = [p.detach().clone() for p in method.parameters()]
    after = list(method.parameters())
    assert len(before) == 2
    assert all(not torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_state_goes_to_a_file_without_code(tmp_path):
    observations = data()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        svi = bm.MetaSVI(model, guide, lambda p: torch.optim.Adam(p, 0.05), Trace_ELBO())
        for _ in range(5):
            svi.step(observations)
        torch.save(svi.state_dict(), tmp_path / "svi.pt")
        torch.manual_seed(1)
        expected = [svi.step(observations) for _ in range(5)]
        again = bm.MetaSVI(model, guide, lambda p: torch.optim.Adam(p, 0.05), Trace_ELBO())
        again.step(observations)
        again.load_state_dict(torch.load(tmp_path / "svi.pt", weights_only=True))
        torch.manual_seed(1)
        assert [again.step(observations) for _ in range(5)] == expected


def test_bad_use():
    with pytest.raises(errors.OptionError, match="factory"):
        bm.MetaSVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    svi = bm.MetaSVI(model, guide, lambda p: torch.optim.Adam(p, 0.05), Trace_ELBO())
    with pytest.raises(errors.SiteError, match="take a step first"):
        svi.param("tau")
    observations = data()

    def empty(x, y=None, mask=None):
        pyro.param("a", torch.tensor(0.2))

    with pytest.raises(errors.SiteError, match="does not sample the site 'slope'"):
        bm.MetaSVI(model, empty, lambda p: torch.optim.Adam(p, 0.05), Trace_ELBO()).posterior(observations, 2)


def test_a_non_finite_loss_changes_nothing():
    observations = data()
    svi = bm.MetaSVI(model, guide, lambda p: torch.optim.Adam(p, 0.05), Trace_ELBO())
    with torch.random.fork_rng():
        svi.step(observations)
        before = svi.param("a").clone()
        bad = bm.Observations(observations.x, observations.y * 1e25)
        with pytest.raises(errors.NonFiniteLossError, match="step 2"):
            svi.step(bad)
    assert torch.equal(svi.param("a"), before)


def test_nan_in_a_batch_is_named():
    observations = data()
    y = observations.y.clone()
    y[3, 2] = float("nan")
    svi = bm.MetaSVI(model, guide, lambda p: torch.optim.Adam(p, 0.05), Trace_ELBO())
    with pytest.raises(errors.NonFiniteDataError, match="task 3, shot 2"):
        svi.step(bm.Observations(observations.x, y))


def test_jit_elbo_is_an_elbo_like_any_other():
    observations = data()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        svi = bm.MetaSVI(model, guide, lambda p: torch.optim.Adam(p, 0.05), JitTrace_ELBO(ignore_jit_warnings=True))
        with pytest.warns(DeprecationWarning, match=r"torch\.jit"):
            first = svi.step(observations.x, observations.y)
        losses = [svi.step(observations.x, observations.y) for _ in range(30)]
    assert sum(losses[-5:]) / 5 < first


def test_an_autoguide_knows_only_its_own_tasks():
    observations = data()
    program = TwoSites()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        svi = bm.MetaSVI(program, AutoNormal(program), lambda p: torch.optim.Adam(p, 0.05), Trace_ELBO())
        svi.step(observations)
    assert svi.posterior(observations, 3).u.shape == (3, 6, 2)
    with pytest.raises(errors.ShapeError, match="knows only the tasks"):
        svi.posterior(observations.tasks(slice(0, 3)), 3)


def test_an_attribute_named_like_a_site_is_told():
    class Clash(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.slope = torch.nn.Parameter(torch.zeros(()))

        def forward(self, x, y=None, mask=None):
            centre = self.slope
            with bm.task_plate(x):
                pyro.sample("slope", dist.Normal(centre, 1.0))

    svi = bm.MetaSVI(model, Clash(), lambda p: torch.optim.Adam(p, 0.05), Trace_ELBO())
    with torch.random.fork_rng(), pytest.raises(errors.SiteError, match="used twice"):
        svi.step(data())
