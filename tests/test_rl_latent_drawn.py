"""Pictures of beliefs without a decoder: what is drawn is z, or the weights of the tasks, and the way that was gone."""

import math

import pytest
import torch

import bayesmeta as bm
from bayesmeta import errors
from bayesmeta.ops.random import as_generator
from bayesmeta.rl.latent import drawn
from bayesmeta.rl.latent.beliefs import BeliefPath
from bayesmeta.rl.latent.contexts import ContextSpec
from bayesmeta.rl.latent.mixture import MixtureContext, TaskLatents
from bayesmeta.rl.latent.undecoded import Undecoded
from bayesmeta.rl.rollout import Acted, collect
from bayesmeta.rl.weighed_tasks import goals_of, spread_over


def walks(tasks=3, horizon=4, episodes=2):
    env = bm.rl.TensorVectorEnv(bm.rl.Navigation(horizon=horizon), tasks, episodes_per_trial=episodes, generator=0)

    def right(moment, state, generator):
        n = len(moment.begins)
        return Acted(torch.tensor([[0.1, 0.0]]).expand(n, 2), torch.zeros(n))

    return env, collect(env, right, horizon * episodes, generator=as_generator(0))


def a_path(env, rollout, latent=8):
    """z of task t goes to t; number 3 is learned best, 5 next, and so on; the others stay at the prior."""
    context = ContextSpec.of(env).of_rollout(rollout)
    share = torch.linspace(0, 1, context.shots + 1)[:, None, None]
    loc = (share * torch.arange(3.0)[None, :, None]).expand(-1, -1, latent).contiguous()
    scale = torch.ones_like(loc)
    for rank, number in enumerate((3, 5, 0)):
        scale[..., number] = 1 - (0.9 - 0.2 * rank) * share[..., 0]
    return BeliefPath(Undecoded("nobody made one"), context, loc, scale)


def test_z_is_drawn_as_mean_and_standard_deviation_over_the_steps(tmp_path):
    env, rollout = walks()
    path = a_path(env, rollout)
    figure = drawn.plot_latents(path, rollout, env=2, goal=env.tasks.goal[2], latents=[3, 1], title="z")
    way, z, other = figure.axes
    assert [axes.get_ylabel() for axes in (z, other)] == ["z[3]", "z[1]"]
    assert z.lines[0].get_xdata().tolist() == list(range(9))
    assert z.lines[0].get_ydata().tolist() == pytest.approx(path.loc[:, 2, 3].tolist())
    band = z.collections[0].get_paths()[0].vertices  # below, and back above
    assert band[:, 1].max() == pytest.approx(float((path.loc + path.scale)[:, 2, 3].max()))
    assert band[:, 1].min() == pytest.approx(float((path.loc - path.scale)[:, 2, 3].min()))
    assert [line.get_xdata()[0] for line in z.lines if line.get_linestyle() == ":"] == [4]  # the second episode
    # the way: two episodes, the place, the goal
    first, second, now, star = way.lines
    assert first.get_xdata().tolist() == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert second.get_xdata().tolist() == pytest.approx(first.get_xdata().tolist())
    assert now.get_xydata()[0].tolist() == pytest.approx(rollout.successor[-1, 2].tolist())
    assert star.get_xydata()[0].tolist() == pytest.approx(env.tasks.goal[2].tolist())
    figure.savefig(tmp_path / "z.png")


def test_without_a_choice_what_was_learned_best_is_drawn():
    env, rollout = walks()
    path = a_path(env, rollout)
    assert drawn.learned_most(path, 1, 3) == [0, 3, 5]
    assert drawn.learned_most(path, 1, 2) == [3, 5]
    assert len(drawn.plot_latents(path, rollout).axes) == 1 + drawn.SHOWN


def test_where_there_is_no_plane_z_stands_alone():
    env = bm.rl.TensorVectorEnv(bm.rl.BernoulliBandit(arms=2, horizon=3), 2, generator=0)
    rollout = collect(
        env, lambda m, s, g: Acted(torch.zeros(2, dtype=torch.long), torch.zeros(2)), 3, generator=as_generator(0)
    )
    context = ContextSpec.of(env).of_rollout(rollout)
    path = BeliefPath(Undecoded("x"), context, torch.zeros(4, 2, 1), torch.ones(4, 2, 1))
    (axes,) = drawn.plot_latents(path, rollout).axes
    assert axes.get_xlim() == (0, 3)


def test_weights_are_areas_of_dots_where_the_goals_are(tmp_path):
    env, rollout = walks()
    weights = torch.full((9, 3, 4), 0.25)
    weights[8, 1] = torch.tensor([0.5, 0.25, 0.25, 0.0])
    places = torch.tensor([[0.1, 0.2], [0.3, 0.4], [-0.1, 0.0], [0.0, 0.5]])
    figure = drawn.plot_weights(weights, places, rollout, steps=[0, 8], env=1, goal=env.tasks.goal[1])
    start, end = figure.axes
    for axes, share in ((start, weights[0, 1]), (end, weights[8, 1])):
        dots = axes.collections[1]
        torch.testing.assert_close(torch.as_tensor(dots.get_offsets().data).float(), places)
        sizes = torch.as_tensor(dots.get_sizes()).float()
        torch.testing.assert_close(sizes / sizes.sum(), share)
    assert start.get_title() == "before anything: 4 tasks"
    assert end.get_title() == f"after 8 steps: {2 * math.sqrt(2):.3g} tasks"  # its entropy is 1.5 bits
    assert len(end.lines) == 4  # two ways, the place and the goal
    figure.savefig(tmp_path / "weights.png")


def test_weights_of_a_mixture_are_its_posterior_after_every_step():
    env, rollout = walks()
    spec = ContextSpec.of(env, inputs=("action", "successor"))
    mixture = MixtureContext.make(spec, TaskLatents(4, 2, seed=0), seed=0)
    generator = as_generator(1)
    for weight in mixture.encoder.parameters():
        weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    context = spec.of_rollout(rollout)
    weights = mixture.weights(context)
    assert weights.shape == (9, 3, 4)
    assert not weights.requires_grad
    assert torch.equal(weights[0], torch.full((3, 4), 0.25))
    torch.testing.assert_close(weights.sum(-1), torch.ones(9, 3))
    factors = mixture.encoder.factors(context)
    torch.testing.assert_close(weights[5], factors[:, :5].sum(1).softmax(-1))
    assert (weights[5] - factors[:, :4].sum(1).softmax(-1)).abs().max() > 1e-4  # control: one step less is another


def test_over_how_many_tasks_weights_are_spread():
    weights = torch.tensor([[0.25] * 4, [1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]])
    assert spread_over(weights).tolist() == pytest.approx([4.0, 1.0, 2.0])


def test_weights_that_are_none_are_refused():
    _, rollout = walks()
    places = torch.zeros(4, 2)
    for bad, kind in (
        ([0.0, 0.0, 0.0, 0.0], errors.DataError),
        ([1.5, -0.5, 0.0, 0.0], errors.DataError),
        ([0.5, math.nan, 0.5, 0.0], errors.NonFiniteDataError),
        ([0.5, math.inf, 0.5, 0.0], errors.NonFiniteDataError),
    ):
        weights = torch.full((9, 3, 4), 0.25)
        weights[8, 1] = torch.tensor(bad)
        with pytest.raises(kind, match=r"Weights of tasks at \[1\]") as told:
            drawn.plot_weights(weights, places, rollout, steps=[0, 8], env=1)
        assert type(told.value) is kind
        with pytest.raises(kind, match=r"at \[8, 1\]"):
            spread_over(weights)
        drawn.plot_weights(weights, places, rollout, steps=[0, 8], env=0)  # another task's, which are right
    whole = torch.tensor([2.0, 2.0, 0.0, 0.0])  # that add up to no 1 are shares all the same
    assert float(spread_over(whole)) == pytest.approx(2.0)


def test_goals_are_those_of_a_plane():
    env, _ = walks()
    assert torch.equal(goals_of(env), env.tasks.goal)
    assert goals_of(bm.rl.TensorVectorEnv(bm.rl.BernoulliBandit(), 2)) is None


def test_bad_input():
    env, rollout = walks()
    path, weights, places = a_path(env, rollout), torch.full((9, 3, 4), 0.25), torch.zeros(4, 2)
    for bad in ({"env": 3}, {"env": -1}, {"env": 0.5}, {"latents": []}, {"latents": [8]}, {"latents": [-1]}):
        with pytest.raises(errors.OptionError):
            drawn.plot_latents(path, rollout, **bad)
    with pytest.raises(errors.OptionError, match="those of this rollout"):
        drawn.plot_latents(path.tasks([0]), rollout)
    for bad in (
        {"steps": []}, {"steps": [9]}, {"steps": [-1]}, {"steps": [0], "env": 3}, {"steps": [0], "env": 0.5},
    ):  # fmt: skip
        with pytest.raises(errors.OptionError):
            drawn.plot_weights(weights, places, rollout, **bad)
    with pytest.raises(errors.OptionError, match="those of this rollout"):
        drawn.plot_weights(weights[1:], places, rollout, steps=[0])
    with pytest.raises(errors.ShapeError, match="one a known task"):
        drawn.plot_weights(weights, places[1:], rollout, steps=[0])
    with pytest.raises(errors.ShapeError, match="steps"):
        drawn.plot_weights(weights[0], places, rollout, steps=[0])
    for bad in (99, 3, -1, 0.5, True):
        with pytest.raises(errors.OptionError, match="0 to 2"):
            drawn.learned_most(path, bad)
    for bad in (0, -1, 1.5):
        with pytest.raises(errors.OptionError, match="at least 1"):
            drawn.learned_most(path, 1, bad)
