"""Lookahead against its algorithm by hand, against the inner optimizer, and against Reptile's update through adapt."""

import copy
import math

import pytest
import torch

import bayesmeta as bm
from bayesmeta import errors
from tests.test_fit import TASKS, make, same, state, train

SCALE = torch.tensor([0.5, 1.0, 3.0, 7.0], dtype=torch.float64)
START = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64)
RATE = 0.05


def quadratic(p):
    return 0.5 * (SCALE * p.square()).sum()


def gradient(p):
    """By hand."""
    return SCALE * p


def run(optimizer, p, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        quadratic(p).backward()
        optimizer.step()
    return p.detach()


def sgd_by_hand():
    return lambda p: p - RATE * gradient(p)


def adam_by_hand():
    """Kingma and Ba, algorithm 1; its moments go on through a synchronisation."""
    m, v, t = torch.zeros_like(START), torch.zeros_like(START), 0

    def update(p):
        nonlocal m, v, t
        t += 1
        m, v = 0.9 * m + 0.1 * gradient(p), 0.999 * v + 0.001 * gradient(p).square()
        return p - RATE * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)

    return update


def lookahead_by_hand(update, steps, sync_every, rate):
    """Zhang et al. 2019, algorithm 1."""
    slow = fast = START
    for step in range(1, steps + 1):
        fast = update(fast)
        if step % sync_every == 0:
            slow = slow + rate * (fast - slow)
            fast = slow
    return fast


CASES = {"sgd": (torch.optim.SGD, sgd_by_hand), "adam": (torch.optim.Adam, adam_by_hand)}


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("steps", [3, 5, 23, 40])
def test_it_is_the_algorithm_of_the_paper(kind, steps):
    inner, by_hand = CASES[kind]
    p = torch.nn.Parameter(START.clone())
    ours = run(bm.Lookahead(inner([p], RATE), sync_every=5, rate=0.3), p, steps)
    torch.testing.assert_close(ours, lookahead_by_hand(by_hand(), steps, 5, 0.3), rtol=1e-11, atol=1e-13)
    if steps >= 5:  # control: the wrong rate, the wrong round, and slow and fast exchanged are far off
        for wrong in ((5, 0.7), (5, 0.31), (4, 0.3)):
            assert (ours - lookahead_by_hand(by_hand(), steps, *wrong)).abs().max() > 1e-4


@pytest.mark.parametrize(
    "inner",
    [
        lambda p: torch.optim.SGD(p, RATE, momentum=0.9),
        lambda p: torch.optim.Adam(p, RATE),
        lambda p: torch.optim.AdamW(p, RATE, amsgrad=True),
    ],
)
def test_at_rate_one_it_is_the_inner_optimizer_bit_for_bit(inner):
    alone, within, half = (torch.nn.Parameter(START.clone()) for _ in range(3))
    expected = run(inner([alone]), alone, 23)
    assert torch.equal(run(bm.Lookahead(inner([within]), sync_every=4, rate=1.0), within, 23), expected)
    assert not torch.equal(run(bm.Lookahead(inner([half]), sync_every=4, rate=0.5), half, 23), expected)


@pytest.mark.parametrize("rate", [0.25, 1.0])
def test_a_round_of_sgd_on_one_task_is_reptiles_update(rate):
    """θ + rate·(φ_K − θ), with φ_K from MAML's adapt, which takes the steps by another road."""
    inner_lr, steps = 0.01, 4
    batch = TASKS.sample(1, support=10, query=10, generator=5).to(dtype=torch.float64)
    batch = bm.TaskBatch(batch.support, batch.support)
    reptile, adapted = make().to(torch.float64), make().to(torch.float64)
    reptile.inner_steps, adapted.inner_steps, adapted.inner_lr = 0, steps, inner_lr
    reptile.prepare(batch)
    theta = reptile.program.prior.loc.detach().clone()
    # the loss sums over the task's points, where an inner step takes their mean
    optimizer = bm.Lookahead(torch.optim.SGD(reptile.parameters(), inner_lr / 10), sync_every=steps, rate=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        reptile.loss(batch, generator=0).backward()
        optimizer.step()
    phi = adapted.adapt(batch.support).draws(1).u[0, 0]
    ours = reptile.program.prior.loc.detach()
    torch.testing.assert_close(ours, theta + rate * (phi - theta), rtol=1e-10, atol=1e-12)
    adapted.inner_steps = steps - 1
    short = adapted.adapt(batch.support).draws(1).u[0, 0]
    assert (ours - theta - rate * (short - theta)).abs().max() > 1e-4


def slow_adam(params):
    return bm.Lookahead(torch.optim.Adam(params, 1e-2), sync_every=7, rate=0.5)


@pytest.mark.parametrize("kind", ["maml", "last_layer", "abml"])
@pytest.mark.parametrize("half", [30, 35])  # within a round, and at the end of one
def test_a_resumed_run_is_bit_identical(kind, half, tmp_path):
    options = {"optimizer": slow_adam, "schedule": bm.schedules.cosine(60, warmup=5), "checkpoint_every": 10}
    whole, first, resumed = make(kind), make(kind), make(kind)
    train(whole, 60, **options)
    train(first, half, out=tmp_path, **options)
    train(resumed, 60, out=tmp_path, resume=True, **options)
    assert same(state(whole), state(resumed))


def test_a_resumed_run_needs_the_slow_weights(tmp_path):
    """Control: without them a run that goes on within a round is another run."""
    whole, resumed = torch.nn.Parameter(START.clone()), torch.nn.Parameter(START.clone())
    expected = run(slow_adam([whole]), whole, 14)
    before = slow_adam([resumed])
    run(before, resumed, 10)
    content = before.state_dict()
    torch.save(content, tmp_path / "state.pt")
    content = torch.load(tmp_path / "state.pt", weights_only=True)
    middle = resumed.detach().clone()

    def go_on(content):
        p = torch.nn.Parameter(middle.clone())
        optimizer = slow_adam([p])
        optimizer.load_state_dict(content)
        return run(optimizer, p, 4)

    assert torch.equal(go_on(content), expected)
    assert not torch.equal(go_on(content | {"slow": [middle]}), expected)
    copied = copy.deepcopy({"p": resumed, "optimizer": before})
    assert copied["optimizer"].param_groups is copied["optimizer"].inner.param_groups
    assert torch.equal(run(copied["optimizer"], copied["p"], 4), expected)


def test_schedules_move_the_inner_rate():
    alone, within = torch.nn.Parameter(START.clone()), torch.nn.Parameter(START.clone())
    sgd = torch.optim.SGD([alone], RATE)
    ours = bm.Lookahead(torch.optim.SGD([within], RATE), sync_every=3, rate=1.0)
    schedules = [torch.optim.lr_scheduler.StepLR(o, 4, 0.5) for o in (sgd, ours)]
    for _ in range(12):
        run(sgd, alone, 1)
        run(ours, within, 1)
        for schedule in schedules:
            schedule.step()
        assert ours.inner.param_groups[0]["lr"] == sgd.param_groups[0]["lr"]
    assert torch.equal(alone, within)
    ours.load_state_dict(ours.state_dict())
    ours.param_groups[0]["lr"] = 0.0
    before = within.detach().clone()
    assert torch.equal(run(ours, within, 1), before)


def test_a_closure_goes_to_the_inner_optimizer():
    found = []
    for wrap in (lambda o: o, lambda o: bm.Lookahead(o, sync_every=2, rate=1.0)):
        p = torch.nn.Parameter(START.clone())
        optimizer = wrap(torch.optim.LBFGS([p], lr=0.5, max_iter=3))

        def closure(p=p, optimizer=optimizer):
            optimizer.zero_grad()
            loss = quadratic(p)
            loss.backward()
            return loss

        losses = [optimizer.step(closure).item() for _ in range(4)]
        found.append((losses, p.detach()))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


def test_parameters_can_be_added_within_a_round():
    first, second = torch.nn.Parameter(START.clone()), torch.nn.Parameter(START.clone())
    optimizer = bm.Lookahead(torch.optim.SGD([first], RATE), sync_every=5, rate=0.3)
    run(optimizer, first, 3)
    optimizer.add_param_group({"params": [second], "lr": 2 * RATE})
    assert len(optimizer.param_groups) == len(optimizer.inner.param_groups) == 2
    assert optimizer.state_dict()["slow"][1].equal(START)
    for _ in range(2):
        optimizer.zero_grad()
        (quadratic(first) + quadratic(second)).backward()
        optimizer.step()
    torch.testing.assert_close(first.detach(), lookahead_by_hand(sgd_by_hand(), 5, 5, 0.3), rtol=1e-12, atol=0.0)
    two = START * (1 - 2 * RATE * SCALE) ** 2
    torch.testing.assert_close(second.detach(), START + 0.3 * (two - START), rtol=1e-12, atol=0.0)


def test_weights_loaded_between_rounds_are_where_the_next_one_starts():
    p = torch.nn.Parameter(START.clone())
    optimizer = bm.Lookahead(torch.optim.SGD([p], RATE), sync_every=5, rate=0.3)
    run(optimizer, p, 5)
    with torch.no_grad():
        p.copy_(START)
    torch.testing.assert_close(run(optimizer, p, 5), lookahead_by_hand(sgd_by_hand(), 5, 5, 0.3), rtol=1e-12, atol=0.0)


def test_states_that_do_not_fit_are_refused(tmp_path):
    p = torch.nn.Parameter(START.clone())
    optimizer = slow_adam([p])
    run(optimizer, p, 3)
    content = optimizer.state_dict()
    adam = torch.optim.Adam([p], 1e-2)
    with pytest.raises(errors.CheckpointError, match="no state of Lookahead"):
        optimizer.load_state_dict(adam.state_dict())
    for other in ({"sync_every": 5}, {"rate": 0.9}):
        with pytest.raises(errors.CheckpointError, match=next(iter(other))):
            bm.Lookahead(adam, **({"sync_every": 7, "rate": 0.5} | other)).load_state_dict(content)
    with pytest.raises(errors.CheckpointError, match="shapes of the parameters"):
        slow_adam([torch.nn.Parameter(torch.zeros(3))]).load_state_dict(content)
    with pytest.raises(errors.CheckpointError, match="inner optimizer"):
        optimizer.load_state_dict(content | {"inner": {"state": {}, "param_groups": []}})
    train(make(), 5, out=tmp_path / "a", optimizer=slow_adam)
    with pytest.raises(errors.CheckpointError, match="does not fit the optimizer"):
        train(make(), 10, out=tmp_path / "a", resume=True)
    train(make(), 5, out=tmp_path / "b")
    with pytest.raises(errors.CheckpointError, match="no state of Lookahead"):
        train(make(), 10, out=tmp_path / "b", resume=True, optimizer=slow_adam)


@pytest.mark.parametrize(
    "options", [{"sync_every": 0}, {"sync_every": 2.0}, {"sync_every": True}, {"rate": 0.0}, {"rate": 1.1}]
)
def test_what_is_no_option(options):
    with pytest.raises(errors.OptionError, match=next(iter(options))):
        bm.Lookahead(torch.optim.SGD([torch.nn.Parameter(START)], 0.1), **options)
    with pytest.raises(errors.OptionError, match="rate"):
        bm.Lookahead(torch.optim.SGD([torch.nn.Parameter(START)], 0.1), rate=math.nan)
    with pytest.raises(errors.OptionError, match="expected a torch optimizer"):
        bm.Lookahead([torch.nn.Parameter(START)])
