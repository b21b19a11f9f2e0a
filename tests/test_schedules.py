"""Schedules: their multipliers at every step against torch's own and against lines by hand; resume."""

import math

import pytest
import torch

import bayesmeta as bm
from bayesmeta import errors
from tests.test_fit import make, same, state, train

S = torch.optim.lr_scheduler


def rates(schedule, steps, rate=0.7):
    """The rate of each step as the optimizer sees it."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], rate)
    made = schedule(optimizer)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        made.step()
    return seen


def close(a, b):
    # torch's cosine multiplies from step to step, so that rounding adds up
    return len(a) == len(b) and all(math.isclose(x, y, rel_tol=1e-9, abs_tol=1e-12) for x, y in zip(a, b, strict=True))


def test_cosine_is_torchs():
    expected = rates(lambda o: S.CosineAnnealingLR(o, 40, eta_min=0.07), 40)
    assert close(rates(bm.schedules.cosine(40, final=0.1), 40), expected)
    assert not close(rates(bm.schedules.cosine(41, final=0.1), 40), expected)


def test_cosine_warms_up_and_stays_at_its_end():
    warm = rates(bm.schedules.cosine(50, warmup=10, final=0.1), 60)
    assert close(warm[:10], [0.7 * (step + 1) / 10 for step in range(10)])
    assert close(warm[10:50], rates(bm.schedules.cosine(40, final=0.1), 40))
    assert close(warm[50:], [0.07] * 10)


def test_linear_fall():
    line = [0.7 * (1 if step <= 30 else (40 - step) / 10) for step in range(40)]
    assert close(rates(bm.schedules.linear_fall(40, last=0.25), 43), [*line, 0.0, 0.0, 0.0])
    assert not close(rates(bm.schedules.linear_fall(40, last=0.3), 40), line)
    assert close(rates(bm.schedules.linear_fall(4, last=1.0), 4), [0.7, 0.525, 0.35, 0.175])


def test_step_decay_is_torchs():
    assert close(rates(bm.schedules.step_decay(7, factor=0.5), 30), rates(lambda o: S.StepLR(o, 7, 0.5), 30))
    several = rates(bm.schedules.step_decay([3, 8, 20], factor=0.3), 30)
    assert close(several, rates(lambda o: S.MultiStepLR(o, [3, 8, 20], 0.3), 30))
    assert not close(several, rates(lambda o: S.MultiStepLR(o, [3, 9, 20], 0.3), 30))


def test_every_group_keeps_its_own_rate():
    first, second = (torch.nn.Parameter(torch.zeros(())) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [first], "lr": 1.0}, {"params": [second], "lr": 0.1}])
    schedule = bm.schedules.linear_fall(10, last=1.0)(optimizer)
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.9, 0.09])


ALL = {
    "cosine": bm.schedules.cosine(60, warmup=5, final=0.1),
    "linear_fall": bm.schedules.linear_fall(60, last=0.8),
    "step_decay": bm.schedules.step_decay([15, 40]),
}


@pytest.mark.parametrize("name", ALL)
def test_a_resumed_run_is_bit_identical(name, tmp_path):
    whole, half, resumed = make(), make(), make()
    a = train(whole, 60, schedule=ALL[name])
    train(half, 30, out=tmp_path, schedule=ALL[name])
    b = train(resumed, 60, out=tmp_path, resume=True, schedule=ALL[name])
    assert same(state(whole), state(resumed))
    assert [h["rate"] for h in a.history] == [h["rate"] for h in b.history]
    assert len({h["rate"] for h in a.history}) > 2
    # the rate in an entry is that of the next step
    assert [h["rate"] for h in a.history] == pytest.approx([1e-3 * ALL[name].multiplier(h["step"]) for h in a.history])


def test_a_run_of_another_schedule_is_not_resumed(tmp_path):
    train(make(), 10, out=tmp_path, schedule=bm.schedules.cosine(20))
    for other in (bm.schedules.cosine(40), bm.schedules.cosine(20, warmup=2), bm.schedules.linear_fall(20)):
        with pytest.raises(errors.CheckpointError, match="does not stretch"):
            train(make(), 20, out=tmp_path, resume=True, schedule=other)
    with pytest.raises(errors.CheckpointError, match="had a schedule, and here there is none"):
        train(make(), 20, out=tmp_path, resume=True)
    train(make(), 20, out=tmp_path, resume=True, schedule=bm.schedules.cosine(20))


@pytest.mark.parametrize(
    ("make_schedule", "name"),
    [
        (lambda: bm.schedules.cosine(0), "steps"),
        (lambda: bm.schedules.cosine(10.0), "steps"),
        (lambda: bm.schedules.cosine(10, warmup=10), "warmup"),
        (lambda: bm.schedules.cosine(10, warmup=-1), "warmup"),
        (lambda: bm.schedules.cosine(10, final=1.5), "final"),
        (lambda: bm.schedules.linear_fall(True), "steps"),
        (lambda: bm.schedules.linear_fall(10, last=0.0), "last"),
        (lambda: bm.schedules.linear_fall(10, last=math.nan), "last"),
        (lambda: bm.schedules.step_decay(0), "at"),
        (lambda: bm.schedules.step_decay([]), "at"),
        (lambda: bm.schedules.step_decay([5, 3]), "at"),
        (lambda: bm.schedules.step_decay("5"), "at"),
        (lambda: bm.schedules.step_decay(5, factor=0.0), "factor"),
    ],
)
def test_what_is_no_option(make_schedule, name):
    with pytest.raises(errors.OptionError, match=f"^{name} must"):
        make_schedule()


def test_a_factory_that_makes_something_else_is_refused():
    with pytest.raises(errors.OptionError, match="schedule made a ReduceLROnPlateau"):
        train(make(), 5, schedule=S.ReduceLROnPlateau)
    with pytest.raises(errors.OptionError, match="schedule made a NoneType"):
        train(make(), 5, schedule=lambda o: None)
    with pytest.raises(errors.OptionError, match="optimizer made a list"):
        train(make(), 5, optimizer=list)
