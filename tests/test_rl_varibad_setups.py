"""Settings of VariBAD by family: what the policy of the grid reads, by hand, and that families get their own."""

import gymnasium
import pytest
import torch

import bayesmeta as bm
from bayesmeta.errors import OptionError
from bayesmeta.rl.envs.grid import CellTasks
from bayesmeta.rl.latent.checks import admissible_cells, cell_rows, compare_goals, goal_probabilities, seen_cells
from bayesmeta.rl.oracles.robot import straight_returns
from bayesmeta.rl.varibad.decoder import LinearDecoder
from bayesmeta.rl.varibad.places import PlaceDecoder
from bayesmeta.rl.varibad.policy import DecodedReadout
from bayesmeta.rl.varibad.setups import CellSight, GoalReadout, OneHotCells, robot_varibad, varibad_for
from benchmarks.grid import scale_of

GRID = bm.rl.Grid(cells=3, horizon=3)


def made(family=GRID, **options):
    env = bm.rl.TensorVectorEnv(family, 4, new_tasks=True, episodes_per_trial=2, generator=0)
    return varibad_for(env, iterations=2, **options)


def test_cells_are_numbered_column_by_column():
    cells = torch.tensor([[0.0, 0.0], [0.0, 2.0], [1.0, 0.0], [2.0, 2.0]])
    assert OneHotCells(3)(cells).argmax(-1).tolist() == [0, 2, 3, 8]
    run = made()
    rows = cell_rows(run.policy.memory.spec, GRID, torch.zeros(()))
    assert torch.equal(rows, torch.eye(9))
    seen = CellSight(3)(cells)
    assert seen.shape == (4, CellSight(3).size)
    assert seen[:, 9:].tolist() == [[0, 0], [0, 1], [0.5, 0], [1, 1]]


def test_a_decoded_belief_is_what_the_decoder_expects_at_its_mean():
    run = made()
    decoder, rows = run.decoder, torch.eye(9)
    loc, scale = torch.randn(5, 4, 24), torch.rand(5, 4, 24) + 0.1
    found = DecodedReadout(decoder, rows[:4], spread=True)
    assert found.size == 5
    got = found(loc, scale)
    expected = decoder.network(loc).softmax(-1)[..., :4]  # one cell alone has the goal
    torch.testing.assert_close(got[..., :4], expected)
    torch.testing.assert_close(got[..., 4], scale.log().mean(-1))
    assert not torch.allclose(found(loc + 1, scale)[..., :4], expected)


def test_the_readout_of_a_goal_has_chances_mean_place_and_how_sure_it_is():
    run = made()
    readout = GoalReadout.of_cells(run.decoder, 3)
    with torch.no_grad():
        run.decoder.network[-1].weight.zero_()
        run.decoder.network[-1].bias.zero_()
    flat = readout(torch.zeros(1, 24), torch.ones(1, 24))[0]
    assert len(flat) == readout.size == 12
    torch.testing.assert_close(flat, torch.tensor([1 / 9] * 9 + [0.5, 0.5, 1 / 9]))
    with torch.no_grad():
        run.decoder.network[-1].bias[5] = 50.0  # the cell (1, 2)
    sure = readout(torch.zeros(1, 24), torch.ones(1, 24))[0]
    torch.testing.assert_close(sure[9:], torch.tensor([0.5, 1.0, 1.0]), atol=1e-4, rtol=0)


def test_families_have_settings_of_their_own():
    run = made(seed=2)
    assert isinstance(run.decoder, LinearDecoder)
    assert run.decoder.one_of
    assert isinstance(run.policy.memory.readout, GoalReadout)
    assert run.policy.memory.readout.decoder is run.decoder
    told = run.train(1)[0]
    assert told["belief_kl"] >= 0
    robot = made(bm.rl.SparsePointRobot(horizon=3))
    assert isinstance(robot.decoder, PlaceDecoder)
    torch.testing.assert_close(robot.decoder.places.norm(dim=-1), torch.ones(32))
    assert robot.decoder.places[:, 1].min() > 0  # the upper half
    assert robot.policy.memory.readout.decoder is robot.bonus.potential.decoder is robot.decoder
    assert (robot.curriculum.first, robot.bonus.kind, robot.bonus.last_weight) == (0.6, "gain", 0.0)
    assert not robot.policy.trial_clock
    robot.train()
    assert robot.env.family == bm.rl.SparsePointRobot(horizon=3)
    plain = robot_varibad(robot.env, iterations=2, bonus=0.0, radius=0.2)
    assert (plain.bonus, plain.curriculum) == (None, None)
    other = made(bm.rl.GaussianBandit(arms=3, horizon=3), reward_shift=1.0, reward_scale=2.0, units=7)
    assert other.policy.memory.readout is None
    assert other.policy.memory.outputs == 7
    spec = other.policy.memory.spec
    assert (spec.reward_shift, spec.reward_scale) == (1.0, 2.0)
    assert spec.inputs == ("state", "action", "successor")
    first, again, third = (made(seed=seed).policy.memory.policy_net[0][0].weight for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, third)


def test_the_robots_belief_begins_with_weak_factors():
    """Before training a trial says little: standard deviations near the prior's, where hundreds of steps are read."""
    run = made(bm.rl.SparsePointRobot())
    bias = run.policy.latent.recognition.encoder.network[-1].bias.detach()
    assert bias[24:].eq(-4).all()
    assert bias[:24].ne(-4).all()  # the means' are as they were
    path, _ = run.belief_path(bm.rl.TensorVectorEnv(bm.rl.SparsePointRobot(), 4, episodes_per_trial=2, generator=0))
    assert path.steps == 40
    scale = path.scale[-1]
    assert scale.min() > 0.5  # 1 / √(1 + 40 softplus(−4)) = .76; with precisions of softplus(0) it would be .19
    assert scale.max() < 0.95  # and yet it says something


def returns_of_the_rule(reach):
    """Mean returns of 11 episodes on validation goals: the way that the readout tells, of beliefs by Bayes' rule."""
    family = bm.rl.SparsePointRobot()
    readout = made(family).policy.memory.readout
    places, goals = readout.decoder.places, family.goals("validation")
    log_share, returns = torch.zeros(len(goals), len(places)), []
    for _ in range(11):
        at, total = torch.zeros(len(goals), 2), 0.0
        for _ in range(family.horizon):
            way = readout.beside(at, log_share.softmax(-1))[:, 2 * reach : 2 * reach + 2]
            at = at + (5 * way).clamp(-family.max_step, family.max_step)
            away = (at - goals).norm(dim=-1)
            reward = torch.where(away <= family.radius, 1 - away, 0.0).unsqueeze(-1)
            distance = (at.unsqueeze(1) - places).norm(dim=-1)
            near = torch.sigmoid((family.radius - distance) / 0.01).clamp(1e-4, 1 - 1e-4)  # goals stand between places
            found = near.log() - 0.5 * ((reward - 1 + distance) / 0.03).square()
            log_share = log_share + torch.where(reward > 0, found, (1 - near).log())
            total = total + reward.mean().item()
        returns.append(total)
    return returns


def test_the_readout_and_bayes_rule_find_the_goal_without_learning():
    """Of robot_varibad's docstring: in the end each goal is found; the control is a reach at which the ways cancel."""
    family, returns = bm.rl.SparsePointRobot(), returns_of_the_rule(0)
    best = straight_returns(family, family.goals("validation")).mean().item()
    assert returns[0] < 0.4 * best  # a search
    assert 12 < returns[10] < best
    assert max(returns_of_the_rule(2)) < 1


def test_the_decoder_is_trained_by_the_bound_and_not_by_the_policy():
    run = made()
    names = [name for name, _ in run.policy.named_parameters()]
    decoder = {id(p) for p in run.decoder.parameters()}
    assert names
    assert not any(id(p) in decoder for p in run.policy.parameters())
    before = [p.detach().clone() for p in run.decoder.parameters()]
    run.train(1)
    assert not all(torch.equal(a, b) for a, b in zip(before, run.decoder.parameters()))


@pytest.mark.slow
def test_a_small_grid_is_explored_and_then_exploited_nearly_as_well_as_can_be():
    """Against the exact optimum and random actions; the control is the policy before it has learned."""
    family = bm.rl.Grid(cells=3, horizon=6)
    optimal, random = scale_of(family, 3).optimal, scale_of(family, 3).random
    env = bm.rl.TensorVectorEnv(family, 192, new_tasks=True, episodes_per_trial=3, generator=0)
    run = varibad_for(env, iterations=60)
    goals = family.goals()
    each = bm.rl.TensorVectorEnv(family, len(goals), tasks=CellTasks(goals), episodes_per_trial=3, generator=1)

    def reached():
        return (run.curve(each).returns.double().mean(1) - random) / (optimal - random)

    before = reached()
    run.train()
    after = reached()
    assert before.max() < 0.5
    assert after[1:].min() > 0.8
    path, rollout = run.belief_path(each)
    chance = goal_probabilities(path.program, run.policy.memory.spec, path.draws(100, 0), family)
    goal = (goals[:, 0] * 3 + goals[:, 1]).long()
    check = compare_goals(chance, seen_cells(rollout.successor, family), goal, admissible_cells(family))
    assert check.seen_share.mean < 0.05


def test_ordinary_environments_have_their_transitions_explained():
    """Nothing says that their tasks differ in rewards: of cart-poles, whose reward is always 1, they do not."""
    poles = bm.rl.GymFamily.uniform(lambda length: gymnasium.make("CartPole-v1", max_episode_steps=5), 0.2, 2.0)
    env = poles.vector(2, new_tasks=True, episodes_per_trial=2, generator=0)
    run = varibad_for(env, iterations=1)
    assert (run.belief_spec.inputs, run.belief_spec.targets) == (("state", "action"), ("reward", "change"))
    assert run.decoder.likelihood.scale.shape == (1 + 4,)
    assert run.train(1)[0]["reconstruction"] < 0
    assert bm.rl.VariBAD(env).belief_spec == run.belief_spec
    told = varibad_for(env, iterations=1, reconstruction="reward")
    assert told.belief_spec.targets == ("reward",)
    with pytest.raises(OptionError, match="has made its environments already"):
        bm.rl.VariBAD(env, iterations=1, curriculum=bm.rl.ShrinkingRadius())
    robots = bm.rl.TensorVectorEnv(bm.rl.Navigation(horizon=3), 2, new_tasks=True, generator=0)
    assert varibad_for(robots, iterations=1).belief_spec.targets == ("reward",)  # rewards are what differs there
    with pytest.raises(OptionError, match="'reward', 'transition' or None"):
        varibad_for(robots, iterations=1, reconstruction="state")


def test_what_is_no_environments_side_by_side_is_refused_with_a_way_to_make_them():
    family = bm.rl.Navigation(horizon=3)
    for learner in (bm.rl.VariBAD, bm.rl.RL2):
        for given in (gymnasium.make("CartPole-v1"), family):
            with pytest.raises(OptionError, match=r"side by side; got .* Of a family make them by"):
                learner(given)
