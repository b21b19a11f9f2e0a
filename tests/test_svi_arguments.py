"""What MetaSVI gives a program: as much of (x, y, mask) and w as it takes; programs whose arguments are their own."""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal

import bayesmeta as bm
from bayesmeta import errors
from bayesmeta.train.arguments import as_arguments
from tests.programs import batch_of


def meta_svi(model, guide=None, **options):
    return bm.MetaSVI(model, guide or AutoNormal(model), lambda p: torch.optim.Adam(p, 0.05), Trace_ELBO(), **options)


def body(x, y, mask=None, shift=0.0):
    with bm.task_plate(x):
        phi = pyro.sample("phi", dist.Normal(x.new_zeros(()), x.new_ones(())))
        with bm.shot_plate(x, mask):
            pyro.sample("y", dist.Normal(x[..., 0] * phi + shift, 0.5), obs=y)


def without_mask(x, y):
    body(x, y)


def with_mask(x, y=None, mask=None):
    body(x, y, mask)


def keyword_mask(x, y=None, *, mask=None):
    body(x, y, mask)


def covariates(x, y, w=None):
    assert w is None or w.dim() == 2
    body(x, y, shift=0.0 if w is None else w[:, :1])


def losses(model, *given, steps=4, **options):
    with torch.random.fork_rng():
        pyro.set_rng_seed(2)
        svi = meta_svi(model, **options)
        return [svi.step(*given) for _ in range(steps)]


def pyro_losses(model, *given, steps=4):
    with torch.random.fork_rng(), pyro.get_param_store().scope():
        pyro.set_rng_seed(2)
        svi = SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
        return [svi.step(*given) for _ in range(steps)]


class Module(torch.nn.Module):
    def forward(self, x, y):
        return without_mask(x, y)


@pytest.mark.parametrize(
    "model",
    [without_mask, with_mask, keyword_mask, covariates, Module(), functools.partial(with_mask), lambda *a: body(*a)],
)
@pytest.mark.parametrize("mask", [None, "whole"])
@pytest.mark.parametrize("kind", ["tensors", "observations", "batch"])
def test_a_program_is_given_what_it_takes(model, mask, kind):
    """The losses are those of pyro.infer.SVI on (x, y)."""
    data = batch_of(4, 5)
    if mask is not None:
        data = bm.Observations(data.x, data.y, torch.ones(4, 5, dtype=torch.bool))
    given = {
        "tensors": (data.x, data.y),
        "observations": (data,),
        "batch": (bm.TaskBatch(data.points(slice(3)), data.points(slice(3, 5)), torch.arange(4)),),
    }[kind]
    expected = pyro_losses(without_mask, data.x, data.y)
    assert losses(model, *given) == pytest.approx(expected, rel=1e-5)
    other = pyro_losses(without_mask, data.x, data.y.roll(1, 0))
    assert other != pytest.approx(expected, rel=1e-3), "control: the data decide"


@pytest.mark.parametrize("model", [with_mask, keyword_mask])
def test_padding_is_handed_on(model):
    data = batch_of(4, 5, ragged=True)
    y = torch.where(data.full_mask(), data.y, data.y + 7)
    seen = losses(model, data)
    assert seen == losses(model, data.with_y(y)), "what the mask hides does not count"
    assert seen != losses(model, bm.Observations(data.x, data.y)), "control: all of it counts"


def test_covariates_by_name_and_in_no_other_place():
    data = batch_of(4, 5)
    covered = bm.Observations(data.x, data.y, None, torch.randn(4, 2))
    moved = pyro_losses(lambda x, y: covariates(x, y, covered.w), data.x, data.y)
    assert losses(covariates, covered) == pytest.approx(moved, rel=1e-5)
    assert moved != pytest.approx(losses(covariates, data), rel=1e-3), "control"
    # a mask that hides nothing is no w
    masked = bm.Observations(data.x, data.y, torch.ones(4, 5, dtype=torch.bool))
    assert as_arguments(masked, [covariates]) == ((data.x, data.y), {})
    assert as_arguments(covered, [without_mask]) == ((data.x, data.y), {}), "as a TaskProgram without w"
    with pytest.raises(errors.ModelError, match=r"mask hides \d+ observations"):
        as_arguments(batch_of(4, 5, ragged=True), [covariates])


def nothing(x):
    body(x, None)


def more(x, y, mask, extra):
    body(x, y, mask)


@pytest.mark.parametrize(
    ("model", "data", "match"),
    [
        (
            without_mask,
            batch_of(4, 5, ragged=True),
            r"hides \d+ observations; model and guide are without_mask\(x, y\)",
        ),
        (nothing, batch_of(4, 5), r"\(x, y, mask\); model and guide are nothing\(x\)"),
        (more, batch_of(4, 5), r"more\(x, y, mask, extra\)"),
    ],
)
def test_a_program_that_takes_other_arguments_is_told(model, data, match):
    with pytest.raises(errors.ModelError, match=match):
        meta_svi(model).step(data)
    with pytest.raises(errors.ModelError, match=r"Both must take"):
        meta_svi(with_mask, model).step(data)


@pytest.mark.parametrize("model", [without_mask, keyword_mask, more])
def test_a_posterior_and_methods_need_a_task_program(model):
    data = batch_of(4, 5)
    with pytest.raises(errors.ModelError, match=rf"{model.__name__}\(.*cannot be called with a mask as the third"):
        bm.TaskProgram(model)
    if model is not more:
        svi = meta_svi(model)
        with torch.random.fork_rng():
            assert svi.step(data) > 0
        with pytest.raises(errors.ModelError, match="with a mask as the third"):
            svi.posterior(data, 3)


def test_known_tasks_in_another_order_without_a_mask():
    data = batch_of(4, 5)
    batch = bm.TaskBatch(data.points(slice(3)), data.points(slice(3, 5)), torch.arange(4))
    with torch.random.fork_rng():
        svi = meta_svi(without_mask)
        svi.step(batch)

        def loss(of):
            torch.manual_seed(0)
            return svi.evaluate_loss(of)

        assert loss(batch.tasks([2, 0, 3, 1])) == loss(batch)
        with pytest.raises(errors.DataError):
            svi.step(data.x, data.y.roll(1, 0))


# -- a plate of the user's own that happens to be called "tasks" ---------------------------------------------------


def rows(x, y):
    with pyro.plate("tasks", len(x)):
        phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(phi * x, 0.5), obs=y)


def grouped(group, x, y):
    with pyro.plate("tasks", 3):
        phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(phi[group] * x, 0.5), obs=y)


def columns(x, y):
    """A plate at the tasks' dimension, around other data."""
    with pyro.plate("tasks", x.shape[0], dim=-2):
        phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", x.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(phi * x, 0.5), obs=y)


X, Y = torch.linspace(-1, 1, 6), torch.linspace(0, 1, 6)


@pytest.mark.parametrize(("model", "given"), [(rows, (X, Y)), (grouped, (torch.arange(6) % 3, X, Y))])
def test_a_plate_of_ones_own_is_plain_svi(model, given):
    expected = pyro_losses(model, *given)
    assert losses(model, *given) == pytest.approx(expected, rel=1e-5)
    with torch.random.fork_rng():
        svi = meta_svi(model)
        svi.step(*given)
        svi.step(*given[:-1], given[-1].flip(0))  # no account is kept


def test_a_task_plate_around_other_data_is_told():
    x = torch.linspace(-1, 1, 12).reshape(3, 4)
    with pytest.raises(errors.OptionError, match=r"needs \(x, y, mask, w\).*x has shape \[3, 4\].*another name"):
        meta_svi(columns).step(x, x)
    assert losses(renamed, x, x) == pytest.approx(pyro_losses(renamed, x, x), rel=1e-5)


def renamed(x, y):
    with pyro.plate("groups", x.shape[0], dim=-2):
        phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", x.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(phi * x, 0.5), obs=y)
