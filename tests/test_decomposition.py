"""Parts of the predictive uncertainty, against closed forms, quadrature and sums by hand."""

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from forecast_cases import Labels, Linear, Phi, label_tasks, linear_tasks
from scipy.integrate import quad
from scipy.stats import norm

import bayesmeta as bm
from bayesmeta.errors import (
    EmptyTaskError,
    NoClosedFormError,
    NonFiniteDataError,
    OptionError,
    ShapeError,
    UnsupportedError,
)

F64 = torch.float64


class Particles:
    """y ~ N(loc_k, scale_k) under particle k, the same at every input; one task."""

    is_point, target_kind, num_tasks = False, "real", 1

    def __init__(self, loc, scale):
        self.loc, self.scale = (torch.tensor(v, dtype=F64).reshape(-1, 1, 1) for v in (loc, scale))
        self.num_draws = len(loc)
        self.support = bm.Observations(torch.zeros(1, 1, 1, dtype=F64), torch.zeros(1, 1, dtype=F64))

    def draws(self, num_samples, generator=None):
        assert num_samples == self.num_draws, "each particle once"
        return Phi(self.loc)

    def predictive(self, x, *, joint=False):
        raise NoClosedFormError("particles")

    def _distribution(self, x):
        return dist.Normal(self.loc.expand(-1, 1, x.shots), self.scale)

    def predict(self, x, num_samples=0, *, draws=None, generator=None):
        d = self._distribution(x)
        return d.loc + d.scale * torch.randn(d.batch_shape, generator=generator, dtype=F64)

    def log_likelihood(self, observations, *, draws):
        return self._distribution(observations).log_prob(observations.y)


def points(shots):
    return bm.Observations(torch.zeros(1, shots, 1, dtype=F64))


def test_mixture_of_two_by_quadrature():
    loc, scale = [0.0, 1.5], [0.5, 1.0]

    def density(y):
        return 0.5 * (norm.pdf(y, loc[0], scale[0]) + norm.pdf(y, loc[1], scale[1]))

    entropy = quad(lambda y: -density(y) * np.log(density(y)), -8, 10, limit=200)[0]
    given = 0.5 * sum(0.5 * math.log(2 * math.pi * math.e * s**2) for s in scale)
    found = bm.decompose(Particles(loc, scale), points(400), num_outcomes=50)
    for name, truth in (
        ("entropy", entropy),
        ("aleatoric_entropy", given),
        ("mutual_information", entropy - given),
        ("aleatoric_variance", (0.25 + 1.0) / 2),
        ("epistemic_variance", 0.75**2),
        ("variance", (0.25 + 1.0) / 2 + 0.75**2),
    ):
        value = getattr(found, name)
        assert value.mean().item() == pytest.approx(truth, abs=5 * value.std().item() / 20), name
    assert 0.1 < entropy - given < math.log(2)
    assert found.num_draws == 2
    assert found.per_task("entropy").item() == pytest.approx(found.entropy.mean().item())


def test_one_particle_and_points_have_nothing_epistemic():
    found = bm.decompose(Particles([0.3], [0.5]), points(50))
    assert (found.mutual_information == 0).all()
    assert (found.epistemic_variance == 0).all()
    assert found.variance.mean().item() == pytest.approx(0.25, rel=0.1)
    same = bm.decompose(Particles([0.3] * 5, [0.5] * 5), points(2000), num_outcomes=20)
    assert same.mutual_information.abs().max() < 1e-12
    error = same.epistemic_variance.std().item() / math.sqrt(2000)
    assert abs(same.epistemic_variance.mean().item()) < 5 * error, "the noise of the means is taken off"
    network = torch.nn.Linear(1, 1)
    maml = bm.MAML(bm.NeuralTaskModel(network, bm.Gaussian(0.3), "point"), inner_steps=1, inner_lr=0.1)
    batch = bm.tasks.Sinusoid().sample(3, support=4, query=5, generator=0)
    found = bm.decompose(maml.adapt(batch.support), batch.query)
    assert (found.mutual_information == 0).all()
    assert found.aleatoric_variance.mean().item() == pytest.approx(0.09, rel=0.2)


def test_linear_gaussian_in_closed_form():
    family, batch = linear_tasks(60, seed=1, shots=2)
    posterior = Linear(family, batch.support)
    found = bm.decompose(posterior, batch.query, num_samples=300, num_outcomes=60)
    epistemic = torch.einsum("tsd,tde,tse->ts", batch.query.x, posterior.covariance, batch.query.x)
    for name, truth in (
        ("epistemic_variance", epistemic),
        ("aleatoric_variance", torch.full_like(epistemic, 0.16)),
        ("mutual_information", 0.5 * torch.log1p(epistemic / 0.16)),
        ("entropy", 0.5 * torch.log(2 * math.pi * math.e * (epistemic + 0.16))),
    ):
        value = getattr(found, name)
        error = (value - truth).mean(-1)
        assert abs(error.mean()) < 5 * error.std() / math.sqrt(60) + 0.01, name  # of 300 draws: of order MI / 300
        assert torch.corrcoef(torch.stack([value.flatten(), truth.flatten()]))[0, 1] > 0.9 or name[0] == "a"
    narrow = bm.decompose(Linear(family, batch.support, 0.5), batch.query, num_samples=300)
    assert narrow.epistemic_variance.mean() < 0.4 * found.epistemic_variance.mean(), "control"


def test_classes_by_hand():
    batch, logits = label_tasks(5, classes=3)
    both = torch.stack([logits, -logits])

    class Two(Labels):
        num_draws = 2

        def log_likelihood(self, observations, *, draws):
            index = observations.x.long().expand(*observations.y.shape, 3)
            each = both.gather(2, index.expand(2, *index.shape))
            return dist.Categorical(logits=each).log_prob(observations.y)

    found = bm.decompose(Two(batch.support, logits), batch.query)
    p = both.softmax(-1)

    def entropy(q):
        return -(q * q.log()).sum(-1)

    torch.testing.assert_close(found.entropy, entropy(p.mean(0)))
    torch.testing.assert_close(found.aleatoric_entropy, entropy(p).mean(0))
    assert (found.mutual_information > 0).all()
    assert found.variance is None
    one = bm.decompose(Labels(batch.support, logits), batch.query, num_samples=4)
    assert one.mutual_information.abs().max() < 1e-12
    with pytest.raises(OptionError, match="no part 'variance'"):
        found.per_task("variance")


def test_padding_is_nan_and_does_not_count():
    family, batch = linear_tasks(4)
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[1, 2:] = False
    query = bm.Observations(batch.query.x, batch.query.y, mask)
    found = bm.decompose(Linear(family, batch.support), query, num_samples=10)
    for name in ("entropy", "mutual_information", "epistemic_variance"):
        assert getattr(found, name).isnan().equal(~mask)
        assert found.per_task(name).isfinite().all()


def test_errors_are_typed():
    family, batch = linear_tasks(4)
    posterior = Linear(family, batch.support)
    with pytest.raises(OptionError, match="num_samples=1"):
        bm.decompose(posterior, batch.query, num_samples=1)
    with pytest.raises(ShapeError, match="3 tasks"):
        bm.decompose(posterior, batch.query.tasks([0, 1, 2]))
    with pytest.raises(EmptyTaskError):
        bm.decompose(posterior, bm.Observations(batch.query.x, None, torch.zeros(4, 6, dtype=torch.bool)))
    corrected = bm.recalibrate(posterior, batch)(posterior)
    with pytest.raises(UnsupportedError, match="recalibrated"):
        bm.decompose(corrected, batch.query)
    posterior.mean[1] = math.nan
    with pytest.raises(NonFiniteDataError):
        bm.decompose(posterior, batch.query)


# -- closed forms -------------------------------------------------------------------------------------------------


def test_of_a_gaussian_process_the_function_is_what_there_is_to_learn():
    """Far from the support its values there say nothing, and all but the noise is epistemic."""
    torch.manual_seed(0)
    network = bm.NeuralTaskModel(bm.nets.mlp(1, [4], 1), bm.Gaussian(0.1), "point")
    method = bm.DeepKernel(network.double(), kernel="rbf", inputs="raw").eval()
    support = bm.Observations(torch.zeros(3, 1, 1, dtype=F64), torch.ones(3, 1, dtype=F64))
    posterior = method.adapt(support)
    x = torch.tensor([0.0, 50.0], dtype=F64).reshape(1, 2, 1).expand(3, -1, -1)
    found = bm.decompose(posterior, bm.Observations(x))
    noise = float(method.program.noise_variance)
    predictive = posterior.predictive(x)
    torch.testing.assert_close(found.variance, predictive.variance.double())
    torch.testing.assert_close(found.aleatoric_variance, torch.full((3, 2), noise, dtype=F64), rtol=1e-6, atol=1e-9)
    expected = 0.5 * (predictive.variance / noise).log()
    torch.testing.assert_close(found.mutual_information, expected, rtol=1e-5, atol=1e-6)
    assert (found.epistemic_variance[:, 1] > 10 * found.epistemic_variance[:, 0]).all()
    assert found.num_draws == 0


def test_closed_forms_and_draws_agree():
    tasks, batch = linear_tasks(40)
    exact = bm.decompose(Linear(tasks, batch.support), batch.query)
    drawn = bm.decompose(Linear(tasks, batch.support, closed=False), batch.query, num_samples=500, num_outcomes=500)
    assert exact.num_draws == 0
    assert drawn.num_draws == 500
    for name in ("entropy", "mutual_information", "epistemic_variance"):
        gap = (getattr(drawn, name) - getattr(exact, name)).mean(-1)  # the points of a task share its draws
        assert abs(gap.mean().item()) < 4 * gap.std().item() / math.sqrt(40) + 2e-3, name


def test_the_entropy_of_a_mixture_by_quadrature():
    from bayesmeta.diagnostics.information import Elliptical

    loc = torch.tensor([0.0, 1.5], dtype=F64).reshape(2, 1, 1).expand(2, 1, 200)
    scale = torch.tensor([0.25, 1.0], dtype=F64).reshape(2, 1, 1, 1) * torch.eye(200, dtype=F64)
    weights = torch.tensor([[0.3], [0.7]], dtype=F64).log()
    joint = Elliptical(weights, loc, scale, None, scale.diagonal(dim1=-2, dim2=-1))

    def density(y):
        return 0.3 * norm.pdf(y, 0.0, 0.5) + 0.7 * norm.pdf(y, 1.5, 1.0)

    truth = quad(lambda y: -density(y) * np.log(density(y)), -8, 10, limit=200)[0]
    found = joint.entropy(100, torch.Generator().manual_seed(0))
    assert found.mean().item() == pytest.approx(truth, abs=4 * found.std().item() / math.sqrt(200))
    assert joint.noise_entropy()[0, 0].item() < truth - 0.1, "control: given the component it is less"
