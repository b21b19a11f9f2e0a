"""Beliefs as posteriors: what can be asked of any posterior, held against the known one of a Gaussian bandit."""

import math

import numpy as np
import pytest
import torch

import bayesmeta as bm
from bayesmeta import errors
from bayesmeta.rl.latent.beliefs import BeliefPath, told_apart
from bayesmeta.rl.latent.checks import next_calibration
from bayesmeta.rl.latent.contexts import ContextSpec, prefix
from bayesmeta.rl.latent.core import LatentContext
from bayesmeta.rl.latent.decoder import TransitionDecoder
from tests import rl_latent_truth as truth

TIGHT = {"rtol": 1e-9, "atol": 1e-11}


def a_path(tasks=6, steps=8, seed=0, wrong=1.0, **options):
    means, context = truth.pulls(tasks, steps, seed, **options)
    return means, BeliefPath.of(truth.exact(wrong), context, truth.exact_decoder().program())


def test_a_belief_at_a_step_is_the_posterior_of_the_prefix():
    _, path = a_path()
    for step in (0, 3, 8):
        belief = path.at(step)
        loc, covariance = truth.closed_form(prefix(path.context, step))
        assert belief.support.shots == step
        draws = belief.draws(20_000, 1).u
        assert ((draws.mean(0) - loc).abs() < 4.5 * belief.scale[0] / math.sqrt(20_000)).all()
        torch.testing.assert_close(belief.scale[0].square().diag_embed(), covariance, **TIGHT)
    assert torch.equal(path.at(-1).loc, path.at(8).loc)
    whole = truth.exact().belief(path.context, path.program)
    torch.testing.assert_close(whole.loc, path.at(-1).loc, **TIGHT)
    assert not whole.loc.requires_grad
    assert set(path.at(2).sample(5)) == {"z"}
    for bad in (9, -10):
        with pytest.raises(errors.OptionError, match="0 to 8"):
            path.at(bad)


def test_predictions_of_a_belief_are_those_of_linear_algebra():
    _, path = a_path()
    step, n = 5, 20_000
    following = path.context.points(slice(step, step + 1))
    y = path.at(step).predict(following, n, generator=2).squeeze(-1)
    loc, covariance = truth.closed_form(prefix(path.context, step))
    arm = following.x[:, 0]
    mean = (loc * arm).sum(-1)
    deviation = (torch.einsum("ta,tab,tb->t", arm, covariance, arm) + truth.NOISE**2).sqrt()
    assert ((y.mean(0) - mean).abs() < 4.5 * deviation / math.sqrt(n)).all()
    assert ((y.std(0) / deviation - 1).abs() < 4.5 / math.sqrt(2 * n)).all()


def test_contraction_is_that_of_the_diagnostics():
    _, path = a_path(tasks=30)
    exact = path.contraction()
    assert (exact[0] == 0).all()
    assert (exact.diff(dim=0) > 0).all()  # every pull says something of one arm
    for shots, found in bm.contraction(lambda s: path.at(s.shots), path.context, (2, 8), num_samples=4000).items():
        mean, _ = found["z"]
        # the variance of n draws has a relative error of √(2 / n), here of posterior and prior, in 90 components
        assert abs(mean - exact[shots].mean().item()) < 4.5 * 2 * math.sqrt(2 / 4000 / 90)


def test_kl_over_time_is_that_of_the_latent_context():
    _, path = a_path()
    torch.testing.assert_close(path.kl()[-1], truth.exact().kl(path.context), **TIGHT)
    assert (path.kl()[0] == 0).all()


def test_draws_keep_their_noise_along_the_way():
    _, path = a_path()
    z = path.draws(7, 3)
    assert z.shape == (7, 9, 6, 3)
    noise = (z - path.loc) / path.scale
    torch.testing.assert_close(noise, noise[:, :1].expand_as(noise), rtol=1e-9, atol=1e-9)


def test_some_tasks():
    _, path = a_path()
    some = path.tasks([4, 1])
    assert torch.equal(some.at(3).loc[0], path.at(3).loc[0, [4, 1]])
    assert some.num_tasks == 2
    assert repr(some) == "<BeliefPath: 2 tasks, 8 steps, z [3]>"


def test_surprise_is_the_evidence_and_finds_tasks_of_another_kind():
    _, inside = a_path(tasks=80, seed=1)
    _, outside = a_path(tasks=80, seed=2, mean=2.0)
    found = []
    for path in (inside, outside):
        told = bm.surprise(path.at(-1), num_samples=2000, generator=0)
        exact = -truth.log_evidence(path.context)
        assert ((told.scores - exact).abs() <= 4.5 * told.errors + 1e-9).all()
        assert told.effective_draws.min() > 100
        found.append((told, exact))
    (told_in, exact_in), (told_out, exact_out) = found
    area = bm.roc(told_in, told_out).auroc
    assert abs(area - bm.roc(exact_in, exact_out).auroc) < 0.01
    assert area > 0.8
    _, more = a_path(tasks=80, seed=3)  # control: of the same kind there is nothing to find
    same = bm.roc(told_in, bm.surprise(more.at(-1), num_samples=2000))
    assert abs(same.auroc - 0.5) < 4.5 * same.standard_error


def test_exact_beliefs_are_calibrated_and_narrow_ones_are_not():
    means, path = a_path(tasks=300, seed=4)
    x = torch.eye(3, dtype=torch.float64).expand(300, 3, 3)
    noise = torch.randn(means.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    batch = bm.TaskBatch(path.context, bm.Observations(x, means + truth.NOISE * noise))
    found = bm.calibration(path.at(-1), batch)
    assert found.finding == "calibrated"
    narrow = BeliefPath.of(truth.exact(wrong=6.0), path.context, path.program)
    assert bm.calibration(narrow.at(-1), batch).finding == "over-confident"


def test_what_comes_next_is_foreseen():
    _, path = a_path(tasks=300, seed=5)
    found = next_calibration(path)
    assert found.finding == "calibrated"
    assert abs(found["coverage_90"] - 0.9) < 4.5 * found.standard_errors["coverage_90"]
    assert found.pit.shape == (300, 8)
    _, narrow = a_path(tasks=300, seed=5, wrong=20.0)
    wrong = next_calibration(narrow)
    assert wrong.finding == "over-confident"
    assert wrong["coverage_90"] < 0.9 - 4.5 * wrong.standard_errors["coverage_90"]
    one = next_calibration(path, [7], num_samples=50)
    assert one.pit.shape == (300, 1)
    for bad in ({"steps": [8]}, {"steps": []}, {"steps": [-1]}, {"num_samples": 1}):
        with pytest.raises(errors.OptionError):
            next_calibration(path, **bad)
    nothing = bm.Observations(path.context.x, path.context.y, torch.zeros(300, 8, dtype=torch.bool))
    with pytest.raises(errors.EmptyTaskError):
        next_calibration(BeliefPath.of(truth.exact(), nothing, path.program))


def test_several_targets_are_foreseen_one_by_one():
    env = bm.rl.TensorVectorEnv(bm.rl.Navigation(horizon=4), 1, generator=0)
    spec = ContextSpec.of(env, targets=("reward", "change"))
    latent, decoder = (kind(spec, 2, dtype=torch.float64) for kind in (LatentContext.make, TransitionDecoder))
    for parameter in decoder.network.parameters():
        parameter.data.zero_()  # it foresees N(0, 1) three times
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 4, spec.features, generator=generator, dtype=torch.float64)
    y = torch.randn(300, 4, 3, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 3.0, 1.0])
    path = BeliefPath.of(latent, bm.Observations(x, y), decoder.program())
    found = next_calibration(path, num_samples=200)
    assert found.pit.shape == (300, 4, 3)
    far = ((found.pit - 0.5).abs() > 0.45).double().mean((0, 1))  # outside of the interval of 90%
    expected = torch.tensor([0.1, 2 * (1 - torch.distributions.Normal(0.0, 3.0).cdf(torch.tensor(1.6449))), 0.1])
    assert ((far - expected).abs() < 4.5 * (expected * (1 - expected) / 1200).sqrt() + 0.01).all()  # of 200 draws
    assert found.finding == "over-confident"


def test_ranks_among_few_draws_are_uniform():
    """Among three draws of its own law, y lies in each of four places as often, up to both ends of (0, 1)."""
    from bayesmeta.rl.latent.checks import _pit

    normal = torch.randn(4, 40_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pit = _pit(normal[:3], normal[3], torch.Generator().manual_seed(1)).squeeze(-1)
    steps = torch.linspace(0, 1, 21, dtype=torch.float64)
    below = (pit.unsqueeze(-1) < steps).double().mean(0)
    assert ((below - steps).abs() < 4.5 * (steps * (1 - steps) / 40_000).sqrt() + 1e-12).all()


def test_targets_of_few_values_have_uniform_ranks_too():
    """Fair coins whose belief says so: half of the PIT values lie below a half, and not three quarters."""
    from bayesmeta.rl.latent.checks import _pit

    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(2, (400, 5000, 1), generator=generator).double()
    y = torch.randint(2, (5000, 1), generator=generator).double()
    pit = _pit(draws, y, generator)
    assert abs(pit.mean().item() - 0.5) < 4.5 * math.sqrt(1 / 12 / 5000)
    assert abs((pit < 0.25).double().mean().item() - 0.25) < 4.5 * math.sqrt(0.1875 / 5000)


@pytest.mark.parametrize(("tasks", "draws", "worth"), [(2, 60, 25), pytest.param(4, 500, 200, marks=pytest.mark.slow)])
def test_nuts_over_the_same_program_is_the_reference(tasks, draws, worth):
    """``worth``: how many independent ones so many draws of a chain are taken for."""
    _, path = a_path(tasks=tasks, steps=6)
    mask = torch.ones(tasks, 6, dtype=torch.bool)
    mask[1, 2:] = False  # contexts may be of different lengths
    context = bm.Observations(path.context.x, path.context.y, mask)
    belief = BeliefPath.of(truth.exact(), context, path.program).at(-1)
    nuts = bm.NUTS(path.program, num_samples=draws, warmup=draws // 4, num_chains=1, max_tree_depth=4)
    found = nuts.adapt(context, generator=0, start=belief).sample(draws)["z"]
    loc, covariance = truth.closed_form(context)
    deviation = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    assert ((found.mean(0) - loc).abs() < 4.5 * deviation / math.sqrt(worth)).all()
    assert ((found.std(0) / deviation - 1).abs() < 4.5 / math.sqrt(2 * worth)).all()
    wrong, _ = truth.closed_form(path.context)  # control: with all of its rewards the second task is another
    assert ((found.mean(0) - wrong)[1].abs() > 4.5 * deviation[1] / math.sqrt(4 * worth)).any()


# -- as a DataTree --------------------------------------------------------------------------------------------------


def test_datatree_of_beliefs():
    _, path = a_path(tasks=3, steps=4)
    context = bm.Observations(
        path.context.x, path.context.y, torch.tensor([[True] * 4, [True] * 3 + [False], [True] * 4])
    )
    path = BeliefPath.of(truth.exact(), context, path.program)
    tree = path.to_datatree(num_samples=300, tasks=["a", "b", "c"], decoded={"best": lambda z: z.amax(-1)})
    z = tree["posterior"]["z"]
    assert z.dims == ("chain", "draw", "task", "step", "latent")
    assert z.shape == (1, 300, 3, 5, 3)
    np.testing.assert_allclose(z.sel(task="b", step=2)[0], path.draws(300)[:, 2, 1])
    np.testing.assert_allclose(tree["posterior"]["best"].sel(task="b"), z.sel(task="b").max("latent"))
    assert tree["prior"]["z"].dims == ("chain", "draw", "task", "latent")
    np.testing.assert_allclose(tree["beliefs"]["loc"].sel(task="c", step=4), path.loc[4, 2])
    np.testing.assert_allclose(tree["beliefs"]["kl"], path.kl().T)
    y = tree["observed_data"]["y"]
    assert y.dims == ("task", "transition")
    assert np.isnan(y.sel(task="b", transition=4))
    assert float(y.sel(task="a", transition=4)) == context.y[0, 3].item()
    assert tree["constant_data"]["x"].dims == ("task", "transition", "feature")
    assert tree.attrs["num_steps"] == 4
    spread = tree["posterior"]["z"].var("draw").mean(["chain", "task", "latent"])
    assert (np.diff(spread) < 0).all()  # what is known grows


def test_a_datatree_of_beliefs_is_saved_and_read_by_arviz(tmp_path):
    import arviz_stats

    _, path = a_path(tasks=2, steps=3)
    tree = path.to_datatree(num_samples=200)
    back = bm.load_netcdf(bm.save_netcdf(tree, tmp_path / "beliefs.nc"))
    np.testing.assert_array_equal(back["posterior"]["z"], tree["posterior"]["z"])
    table = arviz_stats.summary(tree["posterior"].to_dataset(), var_names=["z"], kind="stats")
    assert len(table) == 2 * 4 * 3


def test_a_belief_at_a_step_has_the_datatree_of_any_posterior():
    _, path = a_path(tasks=3, steps=4)
    tree = bm.to_datatree(path.at(2), prefix(path.context, 2), num_samples=100)
    assert tree["posterior"]["z"].dims[:3] == ("chain", "draw", "task")
    assert tree["log_likelihood"]["y"].shape == (1, 100, 6)


def test_bad_input():
    _, path = a_path(tasks=3, steps=4)
    with pytest.raises(errors.EmptyTaskError, match="nothing to be surprised"):
        bm.surprise(path.at(0))
    with pytest.raises(errors.ShapeError, match="one belief before the 4"):
        BeliefPath(path.program, path.context, path.loc[1:], path.scale[1:])
    with pytest.raises(errors.ContextError, match="y=None"):
        BeliefPath(path.program, path.context.with_y(None), path.loc, path.scale)
    for bad in (
        {"num_samples": 1},
        {"tasks": ["a"]},
        {"decoded": {"kl": lambda z: z}},
        {"decoded": {"z": lambda z: z}},
    ):
        with pytest.raises(errors.OptionError):
            path.to_datatree(**bad)
    with pytest.raises(errors.ShapeError, match="unchanged"):
        path.to_datatree(num_samples=5, decoded={"mean": lambda z: z.mean(0)})
    with pytest.raises(errors.ContextError, match="another task family"):
        BeliefPath.of(truth.exact(), bm.Observations(torch.zeros(2, 3, 4), torch.zeros(2, 3)), path.program)


def test_calibrated_beliefs_tell_tasks_apart_as_far_as_they_contract():
    """z ~ N(0, 1) seen with noise of variance 3: contraction ¼, and a quarter of the variance lies between tasks."""
    generator = torch.Generator().manual_seed(0)
    tasks, noise = 200_000, 3.0
    z = torch.randn(tasks, 1, generator=generator)
    seen = z + noise**0.5 * torch.randn(tasks, 1, generator=generator)
    loc, scale = seen / (1 + noise), torch.full((tasks, 1), (noise / (1 + noise)) ** 0.5)
    error = 0.25 * 0.75 * (2 / tasks) ** 0.5  # of a variance's share, by the delta method
    assert abs(float(told_apart(loc, scale)) - 0.25) < 4 * error
    assert float(told_apart(0.01 * loc, 0.1 * scale)) < 0.01  # control: sure, of much the same z for every task
    with pytest.raises(errors.OptionError, match="at least two"):
        told_apart(loc[:1], scale[:1])
