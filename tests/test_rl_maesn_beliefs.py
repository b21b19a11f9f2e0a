"""The Gaussians of MAESN's tasks, as posteriors: those learned, and those after inner steps from the prior."""

import pytest
import torch
from test_rl_maesn_truth import small

import bayesmeta as bm
from bayesmeta import errors
from bayesmeta.rl.maesn.policy import LOG_SCALES


def with_omega(loc, scale):
    learner = small()
    learner.omega = torch.cat([loc, scale.log()], -1)
    return learner


def test_the_training_tasks_have_the_gaussians_of_omega():
    loc, scale = torch.tensor([[0.5, -1.0], [0.0, 0.0], [2.0, 1.0]]), torch.tensor([[0.1, 0.5], [1.0, 1.0], [0.3, 2.0]])
    found = bm.rl.task_gaussians(with_omega(loc, scale))
    torch.testing.assert_close(found.loc[0], loc)
    torch.testing.assert_close(found.scale[0], scale)
    # KL of Normal(μ, σ) from Normal(0, 1) by hand: ½ (σ² + μ² − 1) − log σ
    expected = (0.5 * (scale.square() + loc.square() - 1) - scale.log()).sum(-1)
    torch.testing.assert_close(found.kl()[0], expected)
    assert found.kl()[0, 1] == 0  # the prior itself
    torch.testing.assert_close(found.contraction()[0], (1 - scale.square()).mean(-1))


def test_they_are_a_posterior_and_a_datatree():
    loc, scale = torch.tensor([[3.0, -1.0], [0.0, 4.0]]), torch.tensor([[0.5, 0.1], [1.0, 2.0]])
    found = bm.rl.task_gaussians(with_omega(loc, scale))
    u = found.at(0).draws(4000, generator=1).u
    z = torch.as_tensor(found.to_datatree(num_samples=4000, generator=2)["posterior"]["z"].values)[0, :, :, 0]
    for draws in (u, z):
        assert ((draws.mean(0) - loc).abs() * 4000**0.5 / scale).max() < 5
        assert ((draws.var(0) / scale.square() - 1).abs() * (4000 / 2) ** 0.5).max() < 5
        assert ((draws.mean(0) - loc.flip(0)).abs() * 4000**0.5 / scale).min() > 5  # control: another task's
    tree = found.to_datatree(num_samples=10, tasks=["left", "right"])
    assert tree["posterior"]["z"].dims == ("chain", "draw", "task", "step", "latent")
    assert tree["posterior"]["z"].coords["task"].values.tolist() == ["left", "right"]
    with pytest.raises(errors.UnsupportedError, match="no decoder"):
        found.at(0).predict(torch.zeros(2, 3, 1))


def test_sigma_is_that_which_latents_are_drawn_with():
    """log σ beyond its ends counts as the ends, here as in the policy's own draws."""
    learner = small()
    learner.omega = torch.tensor([[0.0, 0.0, -50.0, 50.0]])
    low, high = torch.tensor(LOG_SCALES).exp()
    torch.testing.assert_close(bm.rl.task_gaussians(learner).scale[0, 0], torch.stack([low, high]))


def robots(**options):
    return bm.rl.TensorVectorEnv(
        bm.rl.SparsePointRobot(horizon=5), 6, copies=30, split="validation", generator=3, **options
    )


def maesn(**options):
    torch.manual_seed(0)
    policy = bm.rl.LatentPolicy(
        bm.nets.mlp(4, [8], 2, activation="tanh"), bm.rl.GaussianHead(2, log_std=-1.0), latent=2
    )
    config = bm.rl.MAESNConfig(
        **{"credit": "raw", **options}, inner_lr=1.0, natural=True, inner_reward=None, learn_rates=False
    )
    env = bm.rl.TensorVectorEnv(bm.rl.Navigation(horizon=5), 6, copies=30, generator=0)
    return bm.rl.MAESN(env, policy, config), env


AT_MEAN = {"adapted": "mean", "credit": "standardised"}


@pytest.mark.parametrize("options", [{}, AT_MEAN], ids=["drawn", "at_mean"])
def test_a_new_task_goes_from_the_prior_by_the_inner_step(options):
    """A natural step on the score by hand: μ moves to the mean over episodes of credit × z, the prior's Fisher
    information being 1; and its return after k steps is that of ``evaluate``, which takes the same ones."""
    learner, env = maesn(**options)
    seen, episodes = [], learner.episodes
    learner.episodes = lambda *a, **k: (seen.append(episodes(*a, **k)), seen[-1])[1]
    found = bm.rl.task_gaussians(learner, env, generator=5)
    (first,) = seen
    assert (first.z.var(1) > 0.3).all()  # drawn, also where adapted policies act at the mean
    unit = torch.ones(6)
    standard = torch.allclose(first.credit.mean(1), 0 * unit, atol=1e-4) and torch.allclose(
        first.credit.var(1, unbiased=False), unit, atol=0.1
    )
    assert standard == bool(options)
    expected = (first.credit.unsqueeze(-1) * first.z).mean(1)
    torch.testing.assert_close(found.loc[0], expected, rtol=1e-4, atol=1e-5)
    assert (found.loc[0] - first.z.mean(1)).abs().max() > 0.01  # control: without credit
    before = bm.rl.task_gaussians(learner, env, inner_steps=0)
    assert float(before.kl().abs().max()) == 0
    again = bm.rl.task_gaussians(learner, env, generator=5)
    assert torch.equal(again.loc, found.loc)


@pytest.mark.parametrize("options", [{}, AT_MEAN], ids=["drawn", "at_mean"])
def test_further_steps_are_those_of_evaluate(options):
    learner, env = maesn(later_rates=0.25, **options)
    step, passed = learner.step, []

    def watched(*arguments, **options):
        passed.append((options["share"], step(*arguments, **options)))
        return passed[-1][1]

    learner.step = watched
    found = bm.rl.task_gaussians(learner, env, inner_steps=3, generator=5)
    mine = list(passed)
    passed.clear()
    learner.evaluate(env, inner_steps=3, generator=5)
    assert [share for share, _ in mine] == [1, 0.25, 0.0625] == [share for share, _ in passed]
    torch.testing.assert_close(found.loc[0], mine[-1][1][:, :2])
    # evaluate plays further episodes where policies act at the mean, and then draws otherwise from its second step on
    for (_, ours), (_, its) in list(zip(mine, passed, strict=True))[: 1 if options else 3]:
        torch.testing.assert_close(ours, its)
    assert (mine[0][1][:, :2]).abs().max() > 0.01


@pytest.mark.parametrize("bad", [-1, 1.5, True, "2"])
def test_numbers_of_steps_that_are_none_are_refused(bad):
    learner, env = maesn()
    with pytest.raises(errors.OptionError, match="whole number of at least 0"):
        bm.rl.task_gaussians(learner, env, inner_steps=bad)
    with pytest.raises(errors.OptionError, match="whole number of at least 0"):
        bm.rl.task_gaussians(learner, inner_steps=bad)


def test_the_training_tasks_take_no_steps():
    with pytest.raises(errors.OptionError, match="training tasks as they were learned"):
        bm.rl.task_gaussians(maesn()[0], inner_steps=1)


def test_environments_that_draw_new_tasks_are_refused():
    with pytest.raises(errors.OptionError, match="new_tasks"):
        bm.rl.task_gaussians(maesn()[0], robots(new_tasks=True))
