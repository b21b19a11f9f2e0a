"""Families of sinusoids: the published ranges, finite sets, seeds; and every family trains."""

import math

import pytest
import torch

import bayesmeta as bm
from bayesmeta import errors
from bayesmeta.tasks import (
    ChallengingSinusoid,
    FixedTasks,
    FunctionTasks,
    GPTasks,
    LinearGaussian,
    NonMutuallyExclusiveSinusoid,
    SineOrLine,
    Sinusoid,
)


def straight_lines(num_tasks, shots, generator):
    x = torch.randn(num_tasks, shots, 1, generator=generator, device=generator.device)
    slope = torch.randn(num_tasks, 1, generator=generator, device=generator.device)
    return x, slope * x.squeeze(-1)


def one_line(generator):
    x, y = straight_lines(1, int(torch.randint(12, 20, (), generator=generator)), generator)
    return x[0], y[0]


FAMILIES = {
    "sinusoid": lambda: Sinusoid(0.1),
    "sinusoid, finite": lambda: Sinusoid(0.1, num_tasks=30),
    "challenging": ChallengingSinusoid,
    "challenging, finite": lambda: ChallengingSinusoid(num_tasks=30),
    "memorisation, train": NonMutuallyExclusiveSinusoid,
    "memorisation, test": lambda: NonMutuallyExclusiveSinusoid("test"),
    "sine or line": SineOrLine,
    "sine or line, finite": lambda: SineOrLine(num_tasks=30),
    "eq": GPTasks,
    "matern52": lambda: GPTasks("matern52"),
    "weakly periodic": lambda: GPTasks("weakly_periodic"),
    "sawtooth": lambda: GPTasks("sawtooth"),
    "function": lambda: FunctionTasks(straight_lines),
    "function per task": lambda: FunctionTasks.per_task(one_line),
    "fixed": lambda: FixedTasks(Sinusoid(0.1).sample(30, support=8, query=8)),
}


@pytest.fixture(params=FAMILIES, ids=FAMILIES)
def family(request):
    return FAMILIES[request.param]()


def assert_mean(values, expected, what):
    """The mean of independent draws, within five standard errors."""
    values = values.double()
    error = float(values.std()) / math.sqrt(values.numel())
    assert abs(float(values.mean()) - expected) < 5 * error, what


def assert_uniform(values, low, high, what):
    """Range and moments: edges are reached to within 20/n of the width (probability of a miss e⁻²⁰ on either side)."""
    values = values.double().flatten()
    slack = 20 / values.numel() * (high - low)
    assert low - 1e-6 <= float(values.min()) < low + slack, what
    assert high - slack < float(values.max()) <= high + 1e-6, what
    middle, width = (low + high) / 2, high - low
    assert_mean(values, middle, what)
    assert_mean((values - middle) ** 2, width**2 / 12, what)


# -- what holds for all -------------------------------------------------------------------------------------------


def test_a_family_is_a_task_distribution_that_draws_the_same_for_a_seed(family):
    assert isinstance(family, bm.TaskDistribution)
    one = family.sample(6, support=3, query=4, generator=3).check()
    two = family.sample(6, support=3, query=4, generator=3)
    other = family.sample(6, support=3, query=4, generator=4)
    assert one.support.x.shape[:2] == (6, 3)
    assert one.query.y.shape == (6, 4)
    assert one.support.x.dtype == one.query.y.dtype == torch.float32
    assert one.support.x.equal(two.support.x)
    assert one.query.y.equal(two.query.y)
    assert not one.query.y.equal(other.query.y)
    assert one.population == family.num_tasks


def test_a_generator_is_used_up_and_its_state_says_what_comes(family):
    family.sample(6, support=3, query=4)  # a function's first use is over
    generator = torch.Generator().manual_seed(0)
    first = family.sample(6, support=3, query=4, generator=generator)
    state = generator.get_state()
    second = family.sample(6, support=3, query=4, generator=generator)
    generator.set_state(state)
    assert second.query.y.equal(family.sample(6, support=3, query=4, generator=generator).query.y)
    assert not second.query.y.equal(first.query.y)


def test_a_family_can_give_no_support_or_no_query(family):
    assert family.sample(4, support=0, query=3).support.x.shape[:2] == (4, 0)
    assert family.sample(4, support=3, query=0).query.x.shape[:2] == (4, 0)


@pytest.mark.parametrize(("tasks", "support", "query"), [(0, 3, 3), (2, -1, 3), (2, 3, -1), (2, 0, 0)])
def test_numbers_out_of_range_are_refused(family, tasks, support, query):
    with pytest.raises(errors.OptionError, match="expected at least"):
        family.sample(tasks, support=support, query=query)


def test_maml_trains_on_a_family(family):
    width = family.sample(1, support=1, query=1).support.num_features
    network = bm.nets.mlp(width, [8], 1, activation="tanh")
    method = bm.MAML(bm.NeuralTaskModel(network, bm.Gaussian(1.0), prior="point"), inner_steps=1, inner_lr=0.01)
    before = [p.detach().clone() for p in method.parameters()]
    result = bm.fit(method, family, steps=3, tasks_per_step=4, support=5, query=5, log_every=1, progress=False)
    assert all(math.isfinite(entry["loss"]) for entry in result.history)
    assert any(not p.equal(q) for p, q in zip(before, method.parameters()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_family_draws_on_the_device_of_the_generator(family):
    if family.num_tasks is None and getattr(family, "order", None) is not None:
        pytest.skip("one_line draws its length on the CPU")
    batch = family.sample(4, support=3, query=3, generator=torch.Generator("cuda").manual_seed(0))
    assert batch.query.y.device.type == "cuda"


# -- finite sets --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Sinusoid, ChallengingSinusoid, SineOrLine])
def test_a_finite_set_has_fixed_tasks_and_fresh_points(kind):
    family = kind(num_tasks=7, task_seed=5)
    one, truth = family.sample_with_truth(7, support=2, query=2, generator=0)
    two, again = family.sample_with_truth(7, support=2, query=2, generator=1)
    assert one.task_id.sort().values.tolist() == list(range(7)), "without replacement"
    assert not one.task_id.equal(two.task_id)
    assert one.population == 7
    for name in truth:  # the same task has the same parameters, bit by bit (NaN where it has none)
        ours, theirs = truth[name][one.task_id.argsort()], again[name][two.task_id.argsort()]
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    assert not one.support.x[one.task_id.argsort()].equal(two.support.x[two.task_id.argsort()])
    more = family.sample(500, support=1, query=1)
    assert set(more.task_id.tolist()) == set(range(7)), "with replacement where there are fewer"
    # controls: another seed has other tasks, and an endless family never repeats
    name = list(truth)[-1]
    other = kind(num_tasks=7, task_seed=6).sample_with_truth(7, support=2, query=2)[1][name]
    assert not set(other[~other.isnan()].tolist()) & set(truth[name].tolist())
    endless, free = kind().sample_with_truth(500, support=1, query=1)
    assert endless.task_id is None
    assert endless.population is None
    assert len(set(free[name][~free[name].isnan()].tolist())) > 200


@pytest.mark.parametrize("kind", [Sinusoid, ChallengingSinusoid, SineOrLine])
def test_truth_comes_with_the_batch_of_the_same_seed(kind):
    family = kind()
    batch, truth = family.sample_with_truth(5, support=3, query=2, generator=9)
    assert batch.union().y.equal(family.sample(5, support=3, query=2, generator=9).union().y)
    assert all(value.shape == (5,) for value in truth.values())


# -- the published families ---------------------------------------------------------------------------------------


def test_challenging_sinusoid_draws_the_published_family():
    batch, truth = ChallengingSinusoid().sample_with_truth(20_000, support=2, query=3, generator=1)
    assert_uniform(truth["amplitude"], 0.1, 5.0, "amplitude")
    assert_uniform(truth["phase"], 0.0, 2 * math.pi, "phase")
    assert_uniform(truth["frequency"], 0.5, 2.0, "frequency")
    x, y = batch.union().x.squeeze(-1), batch.union().y
    assert_uniform(x, -5.0, 5.0, "x")
    # independent of each other: products of centred parameters have mean 0
    centred = [truth[name] - truth[name].mean() for name in truth]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert_mean(centred[i] * centred[j], 0.0, "correlation")
    a, b, f = (truth[name].double().unsqueeze(-1) for name in ("amplitude", "phase", "frequency"))
    residual = (y.double() - a * torch.sin(f * x.double() + b)) / a
    assert_mean(residual, 0.0, "noise")
    assert_mean(residual.square() * 1e4, 1.0, "variance of the noise in units of the amplitude, 0.01²")
    with pytest.raises(AssertionError):  # control: the noise is relative, not absolute
        assert_mean((residual * a).square() * 1e4, 1.0, "absolute noise")


def test_finite_sinusoids_are_draws_of_the_same_family():
    truth = Sinusoid(num_tasks=20_000).sample_with_truth(20_000, support=1, query=0)[1]
    assert_uniform(truth["amplitude"], 0.1, 5.0, "amplitude")
    assert_uniform(truth["phase"], 0.0, math.pi, "phase")


def test_memorisation_tasks_tell_their_amplitude_in_training_alone():
    train = NonMutuallyExclusiveSinusoid()
    assert train.num_tasks == 20
    batch = train.sample(20, support=300, query=200, generator=2)
    x, y = batch.union().x, batch.union().y
    assert x.shape == (20, 500, 21)
    hint = x[..., 1:]
    assert hint.unique().tolist() == [0.0, 1.0]
    assert hint.sum(-1).eq(1).all()
    assert hint.eq(hint[:, :1]).all(), "one hint a task"
    assert hint[:, 0].argmax(-1).equal(batch.task_id)
    assert batch.task_id.sort().values.tolist() == list(range(20))
    amplitude = 0.1 + 3.9 * batch.task_id.double() / 19
    residual = y.double() - amplitude[:, None] * x[..., 0].double().sin()
    assert_mean(residual, 0.0, "noise")
    assert_mean(residual.square(), 0.01, "noise")
    assert_uniform(x[..., 0], -5.0, 5.0, "x")

    test = NonMutuallyExclusiveSinusoid("test").sample(5000, support=20, query=20, generator=2)
    assert test.task_id is None
    x, y = test.union().x, test.union().y
    # least squares of the amplitude: standard deviation 0.1 / √Σ sin² ≈ 0.02
    estimate = (x[..., 0].sin() * y).sum(-1) / x[..., 0].sin().square().sum(-1)
    assert_mean(estimate, 2.05, "amplitude")
    assert_mean((estimate - 2.05).square(), 3.9**2 / 12 + 0.01 / 20, "amplitude is continuous")
    index = x[:, 0, 1:].argmax(-1)
    assert_mean(index.double(), 9.5, "hint")
    centred = index.double() - index.double().mean()
    assert_mean(centred * (estimate - estimate.mean()), 0.0, "the hint says nothing at test time")
    told = train.sample(5000, support=1, query=0).task_id.double()
    with pytest.raises(AssertionError):  # control: in training it says all
        assert_mean((told - told.mean()) * told, 0.0, "the hint")


def test_memorisation_test_tasks_need_the_support():
    """With the hint as the amplitude the error is small in training and large at test."""

    def error(split):
        batch = NonMutuallyExclusiveSinusoid(split).sample(2000, support=0, query=10, generator=1)
        x, y = batch.query.x, batch.query.y
        amplitude = 0.1 + 3.9 * x[..., 1:].argmax(-1) / 19
        return float((y - amplitude * x[..., 0].sin()).square().mean())

    assert error("train") < 0.011
    # E (A − A')² E sin² = (3.9²/12 + variance of the grid) · E sin²
    assert error("test") > 1.0


# -- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: Sinusoid(noise=-1.0), "noise"),
        (lambda: Sinusoid(noise=math.nan), "noise"),
        (lambda: Sinusoid(num_tasks=0), "num_tasks=0"),
        (lambda: ChallengingSinusoid(-0.1), "relative_noise"),
        (lambda: ChallengingSinusoid(num_tasks=-3), "num_tasks=-3"),
        (lambda: NonMutuallyExclusiveSinusoid("validation"), "split='validation'.*train, test"),
        (lambda: NonMutuallyExclusiveSinusoid(noise=-1), "noise"),
        (lambda: NonMutuallyExclusiveSinusoid(num_amplitudes=1), "num_amplitudes=1"),
        (lambda: SineOrLine(noise=0.0), "noise must be positive"),
        (lambda: SineOrLine(num_tasks=0), "num_tasks=0"),
        (lambda: Sinusoid().sample(2, support=3, query=None), "query=None"),
        (lambda: GPTasks().sample(2, support=3, query=None), "query=None"),
    ],
)
def test_bad_options_are_refused(build, match):
    with pytest.raises(errors.OptionError, match=match):
        build()


def test_linear_gaussian_is_the_model_of_the_oracles():
    """All oracles have the same names."""
    for name in ("posterior", "predictive", "log_evidence"):
        assert callable(getattr(LinearGaussian, name))
        assert callable(getattr(GPTasks, name))
    assert callable(SineOrLine.log_evidence)
