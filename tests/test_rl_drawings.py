"""Pictures of trajectories: what stands around the paths, and that nothing hides anything else."""

import pytest
import torch
from matplotlib.patches import Arc, Circle

import bayesmeta as bm
from bayesmeta.rl.learner import AdaptationCurve
from bayesmeta.rl.reference_policies import Reference
from bayesmeta.rl.watching import Watching

HALF_AND_WHOLE = (bm.rl.SparsePointRobot(), bm.rl.Navigation())


def seen(family, *, tasks=2, points=3, steps=4):
    """Ways that are the same at each point of the adaptation, one step of 1 along the first axis at a time."""
    path = torch.zeros(steps + 1, 2)
    path[:, 0] = torch.arange(steps + 1.0).clamp(max=4)
    drawn = family.sample_tasks(tasks, generator=0, split="test")
    rewards = [[torch.arange(float(steps))] * points] * tasks
    return Watching([[path] * points] * tasks, rewards, drawn.as_dict(), "episode", [], family)


def patches(axes, kind):
    return [patch for patch in axes.patches if isinstance(patch, kind)]


def ways(axes, points=3):
    return [torch.tensor(line.get_xydata()) for line in axes.get_lines()[:points]]


def test_the_legend_stands_clear_of_the_labels():
    """Also where the lowest row has empty panels. A label of the whole figure (the control) lies under the legend."""
    watched = seen(bm.rl.GaussianBandit(arms=2), tasks=4)
    figure = bm.rl.plot_trajectories(watched)
    figure.draw_without_rendering()
    legend = figure.legends[0].get_window_extent()
    labelled = [axes for axes in figure.axes if axes.get_xlabel()]
    assert [axes.get_title() for axes in labelled] == ["task 1", "task 2", "task 3"]
    for axes in labelled:
        assert not legend.overlaps(axes.xaxis.label.get_window_extent())
        assert any(tick.label1.get_visible() for tick in axes.xaxis.get_major_ticks())
    across = figure.supxlabel("step of the episode")
    figure.draw_without_rendering()
    assert figure.legends[0].get_window_extent().overlaps(across.get_window_extent())


def test_the_grid_has_its_cells_and_ways_that_are_the_same_are_all_seen():
    axes = bm.rl.plot_trajectories(seen(bm.rl.Grid(cells=4))).axes[0]
    first, second, third = ways(axes)
    assert (second - seen(bm.rl.Grid(cells=4)).paths[0][1]).abs().max() == 0  # the middle one, on the cells' centres
    for one, other in ((first, second), (second, third)):
        assert (other - one).min() > 0.1  # apart, and
    assert (third - first).max() < 0.5  # each within its cells
    edges = [line for line in axes.get_lines() if len(set(line.get_xdata())) == 1 and len(line.get_xdata()) == 2]
    assert [line.get_xdata()[0] for line in edges] == [-0.5, 0.5, 1.5, 2.5, 3.5]
    one = bm.rl.plot_trajectories(seen(bm.rl.Grid(), points=1)).axes[0]
    assert ways(one, 1)[0][0].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("family", [bm.rl.Navigation(radius=0.3), bm.rl.SparsePointRobot(radius=0.15)])
def test_points_have_the_disc_of_their_goal(family):
    """The robot has the half circle too, navigation (the control) has none; ways stay where they are."""
    watched = seen(family)
    figure = bm.rl.plot_trajectories(watched)
    robot = isinstance(family, bm.rl.SparsePointRobot)
    for task in range(2):
        axes = figure.axes[task]
        (disc,) = patches(axes, Circle)
        assert disc.radius == family.radius
        assert list(disc.center) == watched.tasks["goal"][task].tolist()
        halves = patches(axes, Arc)
        assert [(arc.width, arc.theta1, arc.theta2, arc.center) for arc in halves] == [(2, 0, 180, (0, 0))] * robot
        assert torch.equal(ways(axes)[0], watched.paths[task][0].double())
    if robot:
        (low, high), (bottom, top) = axes.get_xlim(), axes.get_ylim()
        assert low <= -1 - family.radius
        assert high >= 1 + family.radius
        assert bottom < 0
        assert top >= 1 + family.radius


def test_without_a_family_there_are_paths_and_goals_alone():
    axes = bm.rl.plot_trajectories(seen(bm.rl.Navigation())._replace(family=None)).axes[0]
    assert not axes.patches
    assert len(axes.get_lines()) == 3 + 2  # ways, goal, start


def test_watching_knows_the_family():
    grid = bm.rl.Grid(cells=3, horizon=3)
    env = bm.rl.TensorVectorEnv(grid, 2, episodes_per_trial=2, generator=1)
    assert bm.rl.watch(bm.rl.RL2(env, iterations=1, units=4), env).family is grid


def test_of_learning_curves_that_coincide_all_are_seen():
    """What is drawn later is narrower than what it covers, and broken where its neighbour is not."""
    curves = [{"step": s, **{f"return_{n}": float(s) for n in range(4)}} for s in (0, 1)]
    lines = bm.rl.plot_learning_curve(curves, unit="episode").axes[0].get_lines()
    widths = [line.get_linewidth() for line in lines]
    assert len(lines) == 4
    assert widths == sorted(widths, reverse=True)
    assert widths[0] > widths[-1] + 1
    assert [line.is_dashed() for line in lines] == [False, True, False, True]


def test_the_point_robots_half_plane_has_low_panels():
    high = {family: bm.rl.plot_trajectories(seen(family)).get_figheight() for family in HALF_AND_WHOLE}
    half, whole = high.values()
    assert half < 0.8 * whole


def test_adaptation_is_drawn_with_references_where_they_belong():
    """One that learns is a curve over its own episodes, beside gradient steps a point; the others are lines across."""

    def curve(*values):
        return AdaptationCurve(torch.tensor([[v, v + 2.0] for v in values]), "episode")

    learner = curve(1.0, 2.0, 3.0)
    references = [
        Reference("best", curve(5.0), knows_task=True, optimum=True),
        Reference("learns", curve(0.0, 1.0, 4.0), learns=True),
        Reference("random", curve(0.0, 0.5, 1.0)),
    ]
    for unit, shown, name in (("episode", [1.0, 2.0, 5.0], "episode 1"), ("step", [1.0], "before")):
        figure = bm.rl.plot_adaptation(learner._replace(unit=unit), references, name="rl2", title="of tasks")
        (axes,) = figure.axes
        lines = {line.get_label(): line for line in axes.get_lines()}
        assert lines["rl2 (± 2 standard errors)"].get_ydata().tolist() == [2.0, 3.0, 4.0]
        assert list(lines["learns"].get_ydata()) == shown
        for label, height in (("best (knows the task)", 6.0), ("random", 1.5)):
            assert list(lines[label].get_ydata()) == [height, height]
            assert list(lines[label].get_xdata()) == [0, 1]  # of the axes' width
        assert axes.get_xticklabels()[0].get_text() == name
        assert axes.get_title() == "of tasks"
    (band,) = axes.collections
    assert band.get_paths()[0].vertices[:, 1].min() == pytest.approx(2.0 - 2 * 1.0)  # two values 2 apart: s.e. 1
    alone = AdaptationCurve(torch.tensor([[1.0], [2.0]]), "episode")  # one task has no standard error
    assert bm.rl.plot_adaptation(alone).axes[0].get_lines()[0].get_ydata().tolist() == [1.0, 2.0]
