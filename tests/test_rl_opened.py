"""From the folder of a command back to its learner; what a run says of its length; what beliefs must foretell."""

import json

import pytest
import torch

import bayesmeta as bm
from bayesmeta import errors
from bayesmeta.rl import run_record
from bayesmeta.rl.command import length, train_setup
from bayesmeta.rl.evaluation import evaluate_folder, table
from bayesmeta.rl.plan import read_setup
from bayesmeta.rl.setups import Setup
from bayesmeta.rl.setups_latent import varibad_for
from bayesmeta.rl_settings import METHODS

SMALL = {"horizon": 3, "episodes": 2, "tasks": 4, "units": 4, "iterations": 1}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("opened") / "run"
    return train_setup(Setup("navigation", "varibad", **SMALL), out, validation_tasks=3, progress=False)


def test_the_opened_learner_is_the_one_that_was_trained(run):
    opened = bm.rl.open_run(run.out, device="cpu")
    assert isinstance(opened, bm.rl.OpenedRun)
    assert opened.iterations == 1
    assert isinstance(opened.family, bm.rl.Navigation)
    found, expected = opened.learner.state_dict()["policy"], run.learner.state_dict()["policy"]
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    untrained = opened.setup.learner(opened.family).state_dict()["policy"]
    assert any(not torch.equal(untrained[name], expected[name]) for name in expected)  # the control
    held_out, same = (opened.held_out(5, seed=3) for _ in range(2))
    assert (held_out.num_tasks, held_out.episodes_per_trial) == (5, 2)
    assert torch.equal(held_out.tasks.goal, same.tasks.goal)
    assert not torch.equal(held_out.tasks.goal, opened.held_out(5, seed=3, split="validation").tasks.goal)
    path, rollout = opened.learner.belief_path(held_out)
    assert path.steps == len(rollout.reward) == 6
    assert len(opened.learner.curve(same).mean()) == 2


def test_what_is_no_run_is_refused(run, tmp_path):
    with pytest.raises(errors.CheckpointError, match="holds no run"):
        bm.rl.open_run(tmp_path)
    with pytest.raises(errors.CheckpointError, match="is a file"):
        bm.rl.open_run(run.out / "config.json")
    (tmp_path / "config.json").write_text(json.dumps({"settings": {}}))  # of bm.rl.fit
    with pytest.raises(errors.CheckpointError, match=r"bm\.rl\.load_learner"):
        bm.rl.open_run(tmp_path)
    (tmp_path / "config.json").write_text((run.out / "config.json").read_text())
    with pytest.raises(errors.CheckpointError):
        bm.rl.open_run(tmp_path)  # without a checkpoint
    with pytest.raises(errors.OptionError):
        bm.rl.open_run(run.out, device="abacus")


def test_the_table_has_one_number_of_iterations(tmp_path):
    """That of the checkpoint: a run may go on for longer than it began with."""
    setup = Setup("navigation", "maml", horizon=3, tasks=2, copies=2, units=4, iterations=1)
    for number in (1, 2):
        given = Setup(**{**vars(setup), "iterations": number})
        train_setup(given, tmp_path, validation_tasks=2, progress=False, resume=number > 1)
    first = table(evaluate_folder(tmp_path, tasks=2, steps=1)).splitlines()[0]
    assert first.count("iterations") == 1
    assert "; 2 iterations;" in first


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("snail", "rl2-lstm", "fomaml", "e-maml")])
def test_the_environment_steps_that_are_told_are_those_that_are_done(method):
    more = {} if Setup("navigation", method).remembers else {"copies": 2}
    size = {name: value for name, value in SMALL.items() if name != "episodes" or not more}
    setup = Setup("navigation", method, **{**size, "iterations": 4}, **more).filled()
    learner = setup.learner(setup.family())
    if method in ("maml", "meta-sgd"):  # whose first iterations are joint training
        learner.iteration = learner.config.joint_iterations
    if method == "distilled":  # whose chains begin later
        learner.iteration = learner.config.warmup
    done, step = [], learner.env.step

    def counted(actions):
        done.append(len(actions))
        return step(actions)

    learner.env.step = counted
    iterations = learner.config.chain_every if method == "distilled" else 1
    learner.train(iterations)
    told = length(setup, learner)
    each = round(sum(done) / iterations)
    assert f"4 iterations of about {each:,} environment steps" in told
    assert f"{4 * each:,} in all" in told


class Clock:
    """A clock that goes by a number of seconds an iteration."""

    def __init__(self, each):
        self.now, self.each = 0.0, each

    def monotonic(self):
        self.now += self.each
        return self.now


@pytest.mark.parametrize(
    ("each", "progress", "told"),
    [(3.0, True, "iteration 3 of 30; about 81 seconds to go"), (0.1, True, ""), (0.75, True, ""), (3.0, False, "")],
)
def test_a_run_says_once_how_long_the_rest_takes(each, progress, told, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_record, "time", Clock(each))
    grid = bm.rl.TensorVectorEnv(bm.rl.Grid(), 2, new_tasks=True, generator=0)
    bm.rl.fit(bm.rl.RL2(grid, iterations=30, units=2, steps=1), progress=progress)
    said = [line for line in capsys.readouterr().err.splitlines() if "to go at this pace" in line]
    assert len(said) == bool(told)
    assert told in "".join(said)


def test_times_in_words():
    assert [run_record.spoken(s) for s in (30, 119, 150, 1500, 9000, 90_000)] == [
        "30 seconds", "119 seconds", "2.5 minutes", "25 minutes", "2.5 hours", "25 hours",
    ]  # fmt: skip


# -- what a belief must foretell --------------------------------------------------------------------------------------


def made(env, method, **options):
    size = {name: value for name, value in SMALL.items() if name != "horizon" or ":" not in env}
    setup = Setup(env, method, **size, **options).filled()
    return setup.learner(setup.family())


def test_what_a_belief_foretells_can_be_chosen():
    assert made("navigation", "pearl").policy.decoder is None
    for what, inputs, targets in (
        ("reward", ("state", "action", "successor"), ("reward",)),
        ("transition", ("state", "action"), ("reward", "change")),
    ):
        for method in ("pearl", "varibad"):
            learner = made("navigation", method, reconstruction=what)
            decoder = learner.policy.decoder if method == "pearl" else learner.decoder
            assert (decoder.spec.inputs, decoder.spec.targets) == (inputs, targets)
            learner.train(1)
    rewards = made("navigation", "varibad", reconstruction="reward")
    assert rewards.decoder.spec == made("navigation", "varibad").decoder.spec  # which is its default


def test_in_an_environment_of_ones_own_next_states_are_foretold_too():
    own = "rl_small:Constant"
    assert made(own, "varibad").decoder.spec.targets == ("reward", "change")
    assert made(own, "varibad", reconstruction="reward").decoder.spec.targets == ("reward",)


def test_a_run_of_before_there_was_a_choice_is_opened_as_what_it_was(tmp_path):
    saved = {"env": "rl_small:Constant", "method": "varibad"}
    for more, what in (({}, "reward"), ({"reconstruction": "transition"}, "transition"), ({"method": "pearl"}, None)):
        (tmp_path / "config.json").write_text(json.dumps({"settings": {"setup": saved | more}}))
        assert read_setup(tmp_path).reconstruction == what


def test_a_bandits_rewards_are_foretold_as_what_they_are():
    learner = made("bandit", "varibad")
    assert learner.decoder.spec.binary
    assert learner.decoder.spec.inputs == ("action",)
    assert not made("gaussian-bandit", "varibad").decoder.spec.binary
    setup = Setup("bandit", "varibad", **SMALL)
    env = setup.vector(setup.family(), 4, new_tasks=True, episodes_per_trial=2)
    assert not varibad_for(env, iterations=1).decoder.spec.binary  # the control: general settings


def test_where_it_cannot_be_chosen_it_is_refused():
    for env, method in (("navigation", "rl2"), ("grid", "varibad"), ("bandit", "varibad"), ("point-robot", "varibad")):
        with pytest.raises(errors.OptionError, match="reconstruction='reward' is not an option of"):
            Setup(env, method, reconstruction="reward")
    with pytest.raises(errors.OptionError, match="settings have a decoder of their own"):
        Setup("half-cheetah-velocity", "pearl", reconstruction="reward")
    with pytest.raises(errors.OptionError, match="expected 'reward' or 'transition'"):
        Setup("navigation", "pearl", reconstruction="all")
