"""Beliefs of learners, and what ``bayesmeta rl evaluate`` says, writes and draws of them."""

import json
import math

import pytest
import torch
from torch import nn

import bayesmeta as bm
from bayesmeta import errors
from bayesmeta.ops.random import as_generator
from bayesmeta.rl import evaluated_beliefs as told
from bayesmeta.rl.command import read_setup, train_setup
from bayesmeta.rl.evaluation import evaluate_folder
from bayesmeta.rl.latent.beliefs import BeliefPath
from bayesmeta.rl.latent.contexts import ContextSpec, prefix
from bayesmeta.rl.latent.decoder import TransitionDecoder
from bayesmeta.rl.latent.undecoded import Undecoded
from bayesmeta.rl.learner import HasBeliefs
from bayesmeta.rl.off_policy.sac import SACConfig
from bayesmeta.rl.rollout import Acted, collect
from bayesmeta.rl.runs import load_learner
from bayesmeta.rl.setups import Setup
from tests.rl_small import Coin

TINY = {"horizon": 4, "tasks": 4, "units": 4, "iterations": 2}


def robots(tasks=3, episodes=3, **options):
    family = bm.rl.SparsePointRobot(horizon=4)
    return bm.rl.TensorVectorEnv(family, tasks, episodes_per_trial=episodes, generator=0, **options)


def pearl(encoder="product", **options):
    config = bm.rl.PEARLConfig(
        sac=SACConfig(hidden=(8,)), latent=2, meta_batch=2, batch=4, context_batch=3, updates=2, **options
    )
    learner = bm.rl.PEARL(robots(), config, encoder=encoder, width=8)
    learner.train(2)
    return learner


def distilled(posterior):
    config = bm.rl.DistilledConfig(
        sac=SACConfig(hidden=(8,)), batch=4, updates=2, distill_steps=2, distill_batch=3, posterior=posterior,
        train_reward="dense_reward",
    )  # fmt: skip
    learner = bm.rl.DistilledLatents(robots(), config, iterations=2)
    learner.train(2)
    return learner


def played(env, action, steps):
    """A rollout in which all do the same."""

    def actor(moment, state, generator):
        return Acted(action.expand(len(moment.begins), *action.shape), torch.zeros(len(moment.begins)))

    return collect(env, actor, steps, generator=as_generator(0))


# -- learners ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", ["product", "recurrent", "mean"])
def test_pearl_tells_its_belief_after_every_step_of_the_trial_that_it_plays(encoder):
    learner = pearl(encoder)
    generator = as_generator(0)
    for weights in learner.policy.latent.parameters():  # first ones say little
        weights.data += 0.3 * torch.randn(weights.shape, generator=generator)
    env = robots(5, split="validation")
    path, rollout = learner.belief_path(env, generator=3)
    again = learner.evaluate(robots(5, split="validation"), generator=3)
    assert torch.equal(rollout.action, again.action)
    assert (path.steps, path.num_tasks) == (12, 5)
    assert torch.equal(path.loc[0], torch.zeros(5, 2))
    assert torch.equal(path.scale[0], torch.ones(5, 2))
    context = learner.spec.of_rollout(rollout)
    for step in (1, 6, 12):
        q = learner.policy.latent.posterior(prefix(context, step)).base_dist
        torch.testing.assert_close(path.loc[step], q.loc, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(path.scale[step], q.scale, rtol=1e-5, atol=1e-6)
    assert (path.loc[12] - path.loc[6]).abs().max() > 1e-4  # of another step it is another


@pytest.mark.parametrize("what", ["reward", "transition"])
def test_pearls_decoder_gives_its_beliefs_a_meaning(what):
    learner = pearl(reconstruction=what)
    path, rollout = learner.belief_path(robots(4))
    assert path.program is learner.policy.decoder.program()
    assert torch.equal(path.context.x, learner.belief_spec.of_rollout(rollout).x)
    few = path.context.points(slice(4, 7))
    y = path.at(4).predict(few, 50)
    assert y.shape[1:] == few.y.shape
    assert torch.isfinite(bm.surprise(path.at(4), num_samples=50).scores).all()
    with pytest.raises(errors.OptionError, match="there are beliefs at"):
        path.at(13)


def test_beliefs_without_a_decoder_say_so_where_one_is_needed():
    learner = pearl()
    path, _ = learner.belief_path(robots(4))
    assert isinstance(path.program, Undecoded)
    assert path.at(4).draws(5).u.shape == (5, 4, 2)
    assert path.to_datatree(num_samples=3)["posterior"]["z"].dims == ("chain", "draw", "task", "step", "latent")
    for ask in (
        lambda: path.at(4).predict(path.context, 5),
        lambda: bm.surprise(path.at(4)),
        lambda: bm.NUTS(path.program, num_samples=5, warmup=5, num_chains=1).adapt(path.at(4).support),
        lambda: path.program(path.context.x),
    ):
        with pytest.raises(errors.UnsupportedError, match=r"no decoder.*reconstruction='reward'"):
            ask()


def test_a_distilled_gaussian_is_a_belief_path_and_a_mixture_is_none():
    learner = distilled("gaussian")
    path, rollout = learner.belief_path(robots(5), generator=1)
    q = learner.policy.belief.posterior(learner.spec.of_rollout(rollout)).base_dist
    torch.testing.assert_close(path.loc[-1], q.loc)
    torch.testing.assert_close(path.scale[-1], q.scale)
    with pytest.raises(errors.UnsupportedError, match=r"mixture.*posterior='gaussian'"):
        distilled("mixture").belief_path(robots(5))


def test_who_has_beliefs():
    grids = bm.rl.TensorVectorEnv(bm.rl.Grid(horizon=3), 2, new_tasks=True, generator=0)
    for learner in (bm.rl.VariBAD(grids, iterations=1), pearl(), distilled("mixture")):
        assert isinstance(learner, HasBeliefs)
    assert not isinstance(bm.rl.RL2(grids, iterations=1), HasBeliefs)


# -- figures -----------------------------------------------------------------------------------------------------------


def test_an_episode_is_over_where_it_ended_for_each_environment():
    """Episodes that end by chance: the steps until then, counted one by one, of the first trial alone."""
    env = bm.rl.TensorVectorEnv(Coin(), 40, episodes_per_trial=2, generator=0)
    rollout = played(env, torch.tensor([0.5]), 24)
    spec = ContextSpec.of(env)
    context = spec.of_rollout(rollout)
    path = BeliefPath(Undecoded("x"), context, torch.zeros(25, 40, 1), torch.ones(25, 40, 1))
    ends = told.episode_ends(path, rollout, 2)
    for index in range(40):
        over = rollout.ended[:, index].nonzero().flatten().add(1).tolist()
        assert ends[:, index].tolist() == [0, *over[:2]]
    assert len(ends[1].unique()) > 2  # they did differ
    assert rollout.trial_ended[:20].any()  # and next trials did begin


def test_the_figures_by_episode_are_those_of_the_episodes_ends():
    """A belief of which mean and width are known at each step: KL and contraction by hand."""
    env = bm.rl.TensorVectorEnv(bm.rl.Navigation(horizon=4), 3, copies=2, episodes_per_trial=2, generator=0)
    rollout = played(env, torch.tensor([0.1, 0.0]), 8)
    loc = torch.arange(6.0).repeat_interleave(2).view(6, 2) * torch.arange(9.0).view(9, 1, 1) / 8
    scale = (1 - torch.arange(9.0) / 10).view(9, 1, 1).expand(9, 6, 2)
    path = BeliefPath(Undecoded("x"), ContextSpec.of(env).of_rollout(rollout), loc, scale)
    found = told.by_episode(path, rollout, 2)

    def kl(env, step):
        s, m = 1 - step / 10, env * step / 8
        return 2 * (0.5 * (s * s + m * m - 1) - math.log(s))

    for point, step in enumerate((0, 4, 8)):
        tasks = torch.tensor([(kl(2 * t, step) + kl(2 * t + 1, step)) / 2 for t in range(3)])  # two copies of each
        assert found["kl"][point] == pytest.approx(float(tasks.mean()), abs=1e-5)
        assert found["kl_standard_error"][point] == pytest.approx(float(tasks.std()) / 3**0.5, abs=1e-5)
        assert found["contraction"][point] == pytest.approx(1 - (1 - step / 10) ** 2, abs=1e-6)
        means = torch.tensor([(4 * t + 1) / 2 * step / 8 for t in range(3)])  # of the two copies, in both dimensions
        share = float(means.var() / (means.var() + (1 - step / 10) ** 2))
        assert found["told_apart"][point] == pytest.approx(share, abs=1e-6)
    assert abs(kl(1, 4) - kl(1, 3)) > 0.05  # one step earlier it is another
    assert found["told_apart"][0] == found["told_apart_standard_error"][0] == 0
    assert 0 < found["told_apart_standard_error"][2] < 0.3


class _Cell(nn.Module):
    """The logit of a goal: z is its cell."""

    def forward(self, row):
        return 40.0 * (0.5 - (row[..., :2] - row[..., 2:]).abs().amax(-1, keepdim=True))


@pytest.mark.parametrize(("believed", "share"), [("goal", 0.0), ("start", 6 / 7)])
def test_the_share_on_cells_seen_empty(believed, share):
    """Who stays at the start and believes the goal there is wrong at each step but the first: 6 of 7."""
    family = bm.rl.Grid(horizon=3)
    env = bm.rl.TensorVectorEnv(family, 5, episodes_per_trial=2, generator=0)
    rollout = played(env, torch.tensor(0), 6)
    spec = ContextSpec.of(
        env, inputs=("successor",), binary=True, reward_shift=family.other_reward,
        reward_scale=family.goal_reward - family.other_reward,
    )  # fmt: skip
    program = TransitionDecoder(spec, 2, network=_Cell()).program()
    loc = env.tasks.goal if believed == "goal" else torch.zeros(5, 2)
    loc = loc.expand(7, 5, 2)
    path = BeliefPath(program, spec.of_rollout(rollout), loc, torch.full_like(loc, 1e-3))
    check = told.goals_check(path, spec, rollout, env, 0)
    assert check.seen_share.mean == pytest.approx(share, abs=1e-4)
    assert (env.tasks.goal[:, 0] != env.tasks.goal[:, 1]).any()
    assert (check.log_score.mean > -1e-3) == (believed == "goal")  # the true cell, not its mirror image
    assert told.goals_check(path, spec, rollout, robots(), 0) is None


def test_the_columns_of_the_table_stay_apart():
    figures = {
        f"{name}{error}": [0.0, 12345.678] for name in ("kl", "contraction") for error in ("", "_standard_error")
    }
    lines = told._table(figures).splitlines()
    assert lines[0].split("  ")[-1].strip() == "after episode 1"
    assert lines[1].split() == [
        "KL", "from", "the", "prior,", "nats", "0.000", "±", "0.000", "12345.678", "±", "12345.678",
    ]  # fmt: skip
    assert len({len(line) for line in lines}) == 1


def test_which_steps_are_drawn():
    assert told.shown_steps([0, 15, 30, 45, 60]) == [0, 5, 10, 15, 30, 45, 60]
    assert told.shown_steps([0, 1]) == [0, 1]
    many = told.shown_steps(list(range(0, 1100, 100)))
    assert len(many) == told.PANELS
    assert (many[0], many[-1]) == (0, 1000)


# -- the command -------------------------------------------------------------------------------------------------------


def trained(folder, env, method, **options):
    train_setup(Setup(env, method, **(TINY | options)), folder, validation_tasks=2, progress=False)
    return folder


def test_evaluate_leaves_the_beliefs_of_the_learner_that_was_trained(tmp_path, capsys):
    folder = trained(tmp_path / "run", "grid", "varibad", episodes=2)
    capsys.readouterr()
    found = evaluate_folder(folder, tasks=25, seed=3)
    printed = capsys.readouterr().out
    for words in (
        "KL from the prior, nats",
        "before any",
        "after episode 2",
        "belief on cells seen empty",
        "beliefs.nc",
    ):
        assert words in printed
    setup = read_setup(folder)
    learner = load_learner(folder, setup.learner(setup.family()))
    path, _ = learner.belief_path(setup.held_out(setup.family(), 25, split="test", seed=3), generator=3)
    beliefs = json.loads((folder / "evaluation.json").read_text())["beliefs"]
    assert beliefs == found["beliefs"]
    assert beliefs["files"] == ["beliefs.nc", "beliefs.png"]
    assert beliefs["kl"] == pytest.approx([float(path.kl()[step].mean()) for step in (0, 4, 8)], rel=1e-5)
    assert beliefs["kl"][0] == 0.0
    tree = bm.load_netcdf(folder / "beliefs.nc")
    assert tree["posterior"]["z"].dims == ("chain", "draw", "task", "step", "latent")
    assert dict(tree["posterior"].sizes) == {"chain": 1, "draw": 100, "task": 20, "step": 9, "latent": 24}
    loc = torch.as_tensor(tree["beliefs"]["loc"].values)
    torch.testing.assert_close(loc, path.loc[:, :20].transpose(0, 1))
    assert (folder / "beliefs.png").read_bytes()[:4] == b"\x89PNG"
    untrained, _ = setup.learner(setup.family()).belief_path(  # control: what was not trained believes something else
        setup.held_out(setup.family(), 25, split="test", seed=3), generator=3
    )
    assert beliefs["kl"] != pytest.approx([float(untrained.kl()[step].mean()) for step in (0, 4, 8)], rel=1e-2)


def test_the_point_robots_belief_is_drawn_where_its_goals_are(tmp_path, monkeypatch):
    from bayesmeta.diagnostics import plots

    drawn = {}
    monkeypatch.setattr(plots, "save_figure", lambda figure, file: drawn.setdefault(file.name, figure))
    folder = trained(tmp_path / "run", "point-robot", "varibad", episodes=2)
    assert evaluate_folder(folder, tasks=12)["beliefs"]["files"] == ["beliefs.nc", "beliefs.png"]
    goals = read_setup(folder).held_out(bm.rl.SparsePointRobot(horizon=4), 12, split="test", seed=0).tasks.goal
    axes = drawn["beliefs.png"].axes[0]
    left, right, bottom, top = axes.images[0].get_extent()
    assert left < goals[:, 0].min()
    assert goals[:, 0].max() < right < 2
    assert bottom < goals[:, 1].min()
    assert goals[:, 1].max() < top < 2
    star = next(line for line in axes.lines if line.get_marker() == "*")
    assert star.get_xydata()[0].tolist() == pytest.approx(goals[0].tolist())


def test_what_has_no_decoder_or_no_gaussian_says_so_and_is_drawn_as_what_it_is(tmp_path, capsys, monkeypatch):
    from bayesmeta.diagnostics import plots

    drawn = {}
    monkeypatch.setattr(
        plots, "save_figure", lambda figure, file: drawn.setdefault((file.parent.name, file.name), figure)
    )
    for method, files, words in (
        ("pearl", ["beliefs.nc", "beliefs.png"], "beliefs.png shows z itself. This belief has no decoder: train PEARL"),
        ("distilled", ["beliefs.png"], "The belief is a mixture"),
    ):
        folder = trained(tmp_path / method, "navigation", method, episodes=2)
        capsys.readouterr()
        found = evaluate_folder(folder, tasks=3)["beliefs"]
        assert words in capsys.readouterr().out
        assert found["files"] == files
        assert words in found["note"]
    way, z, *_ = drawn["pearl", "beliefs.png"].axes
    goal = read_setup(tmp_path / "pearl").held_out(bm.rl.Navigation(horizon=4), 3, split="test", seed=0).tasks.goal[0]
    assert way.lines[-1].get_xydata()[0].tolist() == pytest.approx(goal.tolist())
    assert z.get_ylabel() == "z[0]"
    assert z.get_xlim() == (0, 8)
    # of the mixture: over how many of the 4 training tasks it is spread, whose goals are the dots
    assert len(found["spread_over_tasks"]) == len(found["spread_over_tasks_standard_error"]) == 3
    assert found["spread_over_tasks"][0] == pytest.approx(4.0)
    setup = read_setup(tmp_path / "distilled")
    goals = setup.learner(setup.family()).env.tasks.goal
    dots = torch.as_tensor(drawn["distilled", "beliefs.png"].axes[0].collections[1].get_offsets().data).float()
    torch.testing.assert_close(dots, goals)
    folder = trained(tmp_path / "rl2", "navigation", "rl2", episodes=2)
    assert "beliefs" not in evaluate_folder(folder, tasks=3)


def test_weights_of_training_tasks_are_those_of_the_trial_that_is_played():
    learner = distilled("mixture")
    weights, rollout = learner.belief_weights(robots(5, split="validation"), generator=3)
    again = learner.evaluate(robots(5, split="validation"), generator=3)
    assert torch.equal(rollout.action, again.action)
    assert weights.shape == (13, 5, 3)
    torch.testing.assert_close(weights, learner.policy.belief.weights(learner.spec.of_rollout(again)))
    assert not torch.equal(weights, learner.belief_weights(robots(5, split="validation"), generator=4)[0])
    with pytest.raises(errors.UnsupportedError, match="ask belief_path"):
        distilled("gaussian").belief_weights(robots(5))


def test_a_bandits_belief_has_no_plane_and_is_drawn_as_what_it_is(tmp_path, monkeypatch):
    from bayesmeta.diagnostics import plots

    drawn = {}
    monkeypatch.setattr(plots, "save_figure", lambda figure, file: drawn.setdefault(file.name, figure))
    folder = trained(tmp_path / "run", "bandit", "varibad", episodes=2)
    found = evaluate_folder(folder, tasks=3)["beliefs"]
    assert found["files"] == ["beliefs.nc", "beliefs.png"]
    assert found["note"] == "beliefs.png shows z itself. These environments are no plane with goals."
    assert drawn["beliefs.png"].axes[0].get_ylabel() == "z[0]"


def test_beliefs_that_cannot_be_written_are_refused(tmp_path):
    learner, env = pearl(), robots(3)
    (tmp_path / told.TREE).mkdir()
    with pytest.raises(errors.RunFolderError, match="could not be written"):
        told.evaluate_beliefs(learner, env, seed=0, folder=tmp_path)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"inputs": ("action",)}, "told ('action',) and no place"),
        ({"inputs": ("state", "action"), "targets": ("change",)}, "foretells ('change',) and no reward"),
        ({"inputs": ("state", "action"), "targets": ("reward", "change")}, ""),
    ],
)
def test_a_decoder_that_says_nothing_of_rewards_at_places_draws_z(options, why, tmp_path):
    env = robots(3)
    rollout = played(env, torch.tensor([0.1, 0.0]), 12)
    spec = ContextSpec.of(env, **options)
    program = TransitionDecoder(spec, 2).program()
    path = BeliefPath(program, spec.of_rollout(rollout), torch.zeros(13, 3, 2), torch.ones(13, 3, 2))
    said = told.draw(path, spec, rollout, env, seed=0, file=tmp_path / "x.png")
    assert (why in said) if why else said == ""
    assert (tmp_path / "x.png").exists()
