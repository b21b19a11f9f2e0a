"""Pictures of beliefs: what is drawn is what the belief says, and where the agent has been."""

import pytest
import torch
from torch import nn

import bayesmeta as bm
from bayesmeta import errors
from bayesmeta.ops.random import as_generator
from bayesmeta.rl.latent import pictures
from bayesmeta.rl.latent.beliefs import BeliefPath
from bayesmeta.rl.latent.contexts import ContextSpec
from bayesmeta.rl.latent.decoder import TransitionDecoder
from bayesmeta.rl.rollout import Acted, collect


class _Near(nn.Module):
    """The reward is how near s′ is to z."""

    def forward(self, row):
        place, z = row[..., 2:4], row[..., 4:6]
        return -(place - z).norm(dim=-1, keepdim=True)


def right(moment, state, generator):
    n = len(moment.begins)
    return Acted(torch.tensor([[0.1, 0.0]]).expand(n, 2).double(), torch.zeros(n, dtype=torch.float64))


def a_plane(tasks=3, horizon=4, episodes=2):
    """Beliefs that know the goals of navigation tasks ever better, two episodes of going right."""
    env = bm.rl.TensorVectorEnv(
        bm.rl.Navigation(horizon=horizon), tasks, episodes_per_trial=episodes, generator=0, dtype=torch.float64
    )
    rollout = collect(env, right, horizon * episodes, generator=as_generator(0))
    spec = ContextSpec.of(env, inputs=("action", "successor"))
    program = TransitionDecoder(spec, 2, bm.Gaussian(0.1), network=_Near(), dtype=torch.float64).program()
    context = spec.of_rollout(rollout)
    steps = context.shots + 1
    goal = env.tasks.goal
    share = torch.linspace(0, 1, steps, dtype=torch.float64)[:, None, None]
    path = BeliefPath(program, context, share * goal, (1.0 - 0.999 * share).expand(steps, tasks, 2).contiguous())
    return path, spec, rollout, goal


def test_a_map_is_the_mean_predicted_reward():
    path, spec, _, goal = a_plane()
    points = torch.cat([goal, torch.zeros(1, 2)])
    found = pictures.belief_maps(path, spec, points, [0, 8], num_samples=4000)
    assert found.shape == (2, 3, 4)
    distance = torch.cdist(goal, points.double())
    torch.testing.assert_close(found[1], -distance, rtol=0, atol=0.01)  # at last z is the goal
    # before anything z ~ N(0, I), whose distance from 0 is √(π / 2) on average
    torch.testing.assert_close(found[0, :, 3], torch.full((3,), -1.2533, dtype=torch.float64), rtol=0, atol=0.05)


def test_the_way_is_that_of_the_rollout_and_begins_anew_with_each_episode():
    _, _, rollout, _ = a_plane()
    places, begins = pictures.walked(rollout, 1)
    assert places.shape == (8, 2, 2)
    assert begins.nonzero().flatten().tolist() == [0, 4]
    torch.testing.assert_close(places[:3, 1], places[1:4, 0])
    torch.testing.assert_close(places[3, 1], rollout.successor[3, 1])


def test_a_picture_has_a_panel_a_step_with_the_belief_the_way_and_the_goal(tmp_path):
    path, spec, rollout, goal = a_plane()
    figure = pictures.plot_beliefs(
        path, spec, rollout, steps=[0, 2, 6, 8, 8], env=1, extent=(-0.5, 0.5, -0.5, 0.5), resolution=11,
        goal=goal[1], title="where it is good",
    )  # fmt: skip
    panels = [axes for axes in figure.axes if axes.images]
    assert len(panels) == 5
    assert not panels[0].xaxis.get_tick_params()["labelbottom"]
    assert panels[1].xaxis.get_tick_params()["labelbottom"]  # below it there is no other
    image = torch.as_tensor(panels[3].images[0].get_array())  # [rows, columns] from below
    row, column = divmod(int(image.argmax()), 11)
    side = torch.linspace(-0.5, 0.5, 11)
    assert abs(side[column] - goal[1, 0]) <= 0.05 + 1e-6
    assert abs(side[row] - goal[1, 1]) <= 0.05 + 1e-6
    left, right, _, _ = panels[3].images[0].get_extent()
    assert left + 0.05 == pytest.approx(-0.5)  # the middle of the first pixel
    assert right - 0.05 == pytest.approx(0.5)
    lines = [len(axes.lines) for axes in panels]
    assert lines == [2, 3, 4, 4, 4]  # ways of 0, 1 and 2 episodes, the agent and the goal
    way = panels[1].lines[0].get_xdata()
    assert len(way) == 3
    assert way[2] > way[0]
    figure.savefig(tmp_path / "beliefs.png")


def test_a_grid_is_drawn_by_its_cells():
    from tests.test_rl_latent_checks import _Cells, _one_hot, walks

    family, _, goal, rollout = walks(tasks=3)
    env = bm.rl.TensorVectorEnv(family, 1, generator=0)
    spec = ContextSpec.of(
        env, inputs=("successor",), encode=_one_hot, encoded=25, reward_shift=-0.1, reward_scale=1.1, binary=True
    )
    program = TransitionDecoder(spec, 25, network=_Cells(), dtype=torch.float64).program()
    context = spec.of_rollout(rollout)
    loc = torch.nn.functional.one_hot(goal, 25).double().expand(16, 3, 25)
    path = BeliefPath(program, context, loc, torch.full_like(loc, 1e-3))
    figure = pictures.plot_beliefs(path, spec, rollout, steps=[0, 15], env=2, family=family)
    image = torch.as_tensor(figure.axes[0].images[0].get_array())
    assert image.shape == (5, 5)
    row, column = divmod(int(image.argmax()), 5)
    assert column * 5 + row == goal[2]
    assert image.sum().item() == pytest.approx(1.0, abs=1e-6)


def test_a_half_plane_has_low_panels():
    path, spec, rollout, _ = a_plane()
    heights = []
    for top in (1.0, 0.0):
        figure = pictures.plot_beliefs(path, spec, rollout, steps=[0, 1, 2, 3, 4], extent=(-1.0, 1.0, -1.0, top))
        heights.append(figure.get_figheight())
    assert heights[1] < 0.75 * heights[0]


def test_bad_input():
    path, spec, rollout, _ = a_plane()
    whole = {"steps": [0], "extent": (-1.0, 1.0, -1.0, 1.0)}
    for bad in (
        {"steps": []},
        {"steps": [9]},
        {"steps": [-1]},
        {"env": 3},
        {"extent": None},
        {"family": bm.rl.Grid()},
        {"resolution": 1},
    ):
        with pytest.raises(errors.OptionError, match="plot_latents draws z" if "extent" in bad else "expected|Give"):
            pictures.plot_beliefs(path, spec, rollout, **{**whole, **bad})
    with pytest.raises(errors.OptionError, match="those of this rollout"):
        pictures.plot_beliefs(path.tasks([0]), spec, rollout, **whole)
    bandits = bm.rl.TensorVectorEnv(bm.rl.BernoulliBandit(), 2, generator=0)
    from tests.rl_latent_truth import Uniform

    with pytest.raises(errors.ShapeError, match="no positions"):
        pictures.walked(collect(bandits, Uniform(5), 3, generator=as_generator(0)), 0)
