"""Ctrl-C in a meta-RL training: it is heard at once, the iteration is saved, and a second one loses that alone."""

import json
import os
import select
import signal
import subprocess
import sys
import time

import pytest

import bayesmeta as bm
from bayesmeta.rl.setups import Setup
from bayesmeta.train import checkpoint, signals
from tests.faults.driver import difference

#: An environment that takes its time as soon as there is a file of that name.
SLOW = """
import time
from dataclasses import dataclass
from pathlib import Path
from bayesmeta.rl.envs import BernoulliBandit

@dataclass(frozen=True)
class Slow(BernoulliBandit):
    def advance(self, *arguments):
        if Path("slow").exists():
            time.sleep(2)
        return super().advance(*arguments)

def make():
    return Slow(arms=2, horizon=10)
"""
FOR_EVER = ("--iterations", "100000", "--validate-every", "100000", "--checkpoint-every", "100000")
TINY = ("--tasks", "3", "--units", "4", "--validation-tasks", "2", "--episodes", "1")


def learner_of(method, iterations=6):
    if method == "pearl":
        env = bm.rl.TensorVectorEnv(bm.rl.Navigation(horizon=3), 3, episodes_per_trial=2, generator=0)
        config = bm.rl.PEARLConfig(sac=bm.rl.SACConfig(hidden=(4,)), latent=2, meta_batch=3, batch=4, updates=2)
        return bm.rl.PEARL(env, config, seed=0)
    setup = Setup("navigation", method, horizon=3, tasks=3, units=4, iterations=iterations).filled()
    return setup.learner(setup.family())


def within(seconds, condition):
    """Wait for a condition."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it took too long"
        time.sleep(0.05)


def test_two_interrupts_of_the_command(tmp_path):
    """Two signals to a process of its own: an answer while the iteration goes on, then the end, with a checkpoint."""
    (tmp_path / "slow_env.py").write_text(SLOW)
    command = [sys.executable, "-m", "bayesmeta", "rl", "train", "--env", "slow_env:make", "--out", "a run"]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    log = tmp_path / "a run" / "log.jsonl"
    process = subprocess.Popen(
        [*command, *TINY, *FOR_EVER], cwd=tmp_path, env=alone, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        assert process.stderr is not None
        within(120, lambda: process.poll() is not None or (log.exists() and len(log.read_text().splitlines()) > 3))
        assert process.poll() is None, process.stderr.read().decode()
        (tmp_path / "slow").touch()
        time.sleep(0.3)  # into an iteration of twenty seconds
        begun = len(log.read_text().splitlines())
        process.send_signal(signal.SIGINT)
        assert select.select([process.stderr], [], [], 2.0)[0], "nothing was said"
        assert b"Ctrl-C: the iteration is finished and saved first" in os.read(process.stderr.fileno(), 1000)
        assert process.poll() is None
        assert len(log.read_text().splitlines()) == begun  # the iteration goes on
        time.sleep(signals.APART + 0.1)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    step = json.loads(log.read_text().splitlines()[-1])["step"]
    assert checkpoint.load(log.with_name("checkpoint.pt"))["step"] == step
    assert told.decode().splitlines()[-1] == (
        f"bayesmeta: interrupted within iteration {step + 1}. All up to iteration {step} is saved in a run: go on "
        "with: bayesmeta rl train --out 'a run' --resume"
    )


def test_one_interrupt_is_told_with_how_to_go_on(tmp_path, capfd, monkeypatch):
    from bayesmeta import cli

    train = bm.rl.RL2.train
    monkeypatch.setattr(bm.rl.RL2, "train", lambda self, n: (os.kill(os.getpid(), signal.SIGINT), train(self, n))[1])
    arguments = ["rl", "train", "--env", "navigation", "--horizon", "3", *TINY, "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as caught:
        cli.main([*arguments, "--no-progress"])
    assert caught.value.code == 130
    heard, told = [line for line in capfd.readouterr().err.splitlines() if line]
    assert heard.startswith("Ctrl-C: the iteration is finished and saved first.")
    assert told == (
        f"bayesmeta: interrupted after iteration 1; its checkpoint is in {tmp_path}/run: go on with: "
        f"bayesmeta rl train --out {tmp_path}/run --resume"
    )
    assert checkpoint.load(tmp_path / "run" / "checkpoint.pt")["step"] == 1


@pytest.mark.parametrize("method", ["rl2", "maml", "pearl", "maesn"])
def test_what_is_cut_off_within_an_iteration_goes_on_bit_for_bit(method, tmp_path):
    """What the broken iteration did to networks, environments and buffers is not in the checkpoint."""
    whole, broken, resumed = learner_of(method), learner_of(method), learner_of(method)
    train = broken.train

    def cut(number):
        train(number)
        if broken.iteration == 3:  # all but the end of the third is done, and nothing of it was kept
            raise KeyboardInterrupt
        return []

    broken.train = cut
    with pytest.raises(KeyboardInterrupt, match=r"within iteration 3\. All up to iteration 2 is saved in .*resume\.$"):
        bm.rl.fit(broken, iterations=4, out=tmp_path, progress=False)
    assert checkpoint.load(tmp_path / "checkpoint.pt")["step"] == 2
    bm.rl.fit(resumed, iterations=4, out=tmp_path, resume=True, progress=False)
    bm.rl.fit(whole, iterations=4, progress=False)
    assert difference(whole.state_dict(), resumed.state_dict()) is None
    assert difference(whole.state_dict(), broken.state_dict()) is not None


def test_without_a_folder_it_says_that_nothing_is_kept():
    learner = learner_of("rl2")

    def cut(number):
        raise KeyboardInterrupt

    learner.train = cut
    with pytest.raises(KeyboardInterrupt, match=r"within iteration 1\. There is no folder, so nothing was saved"):
        bm.rl.fit(learner, iterations=2, progress=False)


def test_an_interrupt_in_the_first_validation_stops_before_the_first_iteration(tmp_path):
    learner = learner_of("rl2")
    curve = learner.curve
    learner.curve = lambda *a, **k: (os.kill(os.getpid(), signal.SIGINT), curve(*a, **k))[1]
    held_out = bm.rl.TensorVectorEnv(
        bm.rl.Navigation(horizon=3), 3, episodes_per_trial=2, split="validation", generator=1
    )
    with pytest.raises(KeyboardInterrupt, match="after iteration 0; its checkpoint is in"):
        bm.rl.fit(learner, iterations=2, validation=held_out, out=tmp_path, progress=False)
    found = checkpoint.load(tmp_path / "checkpoint.pt")
    assert (found["step"], len(found["curves"])) == (0, 1)


def test_what_is_being_saved_is_not_cut_off(monkeypatch):
    """After hold a second Ctrl-C changes nothing; without it (the control) it stops at once."""
    monkeypatch.setattr(signals, "APART", 0.0)
    with signals.Signals() as held:
        signal.raise_signal(signal.SIGINT)
        held.hold()
        signal.raise_signal(signal.SIGINT)
        assert held.received is signal.SIGINT
        held.received = None
    with signals.Signals() as cut:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt, match="before the step was finished"):
            signal.raise_signal(signal.SIGINT)
        cut.received = None
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(("name", "said"), [("SIGINT", "Ctrl-C: wait"), ("SIGTERM", "SIGTERM: wait")])
def test_signals_are_answered_once_and_at_once(name, said, capfd):
    with signals.Signals("wait") as heard:
        for _ in range(2):
            signal.raise_signal(signal.Signals[name])
        assert capfd.readouterr().err == f"\n{said}\n"
        heard.received = None
    with signals.Signals() as silent:  # the control
        signal.raise_signal(signal.Signals[name])
        silent.received = None
    assert capfd.readouterr().err == ""


def test_a_second_interrupt_during_the_save_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(signals, "APART", 0.0)
    learner, save = learner_of("rl2"), checkpoint.save_last
    train = learner.train
    learner.train = lambda n: (train(n), signal.raise_signal(signal.SIGINT))[0]
    monkeypatch.setattr(checkpoint, "save_last", lambda *a: (signal.raise_signal(signal.SIGINT), save(*a))[1])
    with pytest.raises(KeyboardInterrupt, match="after iteration 1; its checkpoint is in"):
        bm.rl.fit(learner, iterations=4, out=tmp_path, checkpoint_every=100, progress=False)
    assert checkpoint.load(tmp_path / "checkpoint.pt")["step"] == 1
