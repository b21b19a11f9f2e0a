"""The benchmark of PEARL's speed: both sides are the same functions, and it compares what it counts."""

import argparse

import pytest
import torch

from benchmarks import pearl_speed

SMALL = pearl_speed.Size(2, 3, 4, (8, 8), (6,), (2, 1))


@pytest.fixture
def both():
    return pearl_speed.sides(SMALL, 0, tasks=3, episodes=2)


def test_both_sides_are_the_same_functions(both):
    ours, plain = both
    networks, latent = ours.policy.networks, ours.policy.latent
    steps = ours.replay.sample(5, ours.generator)
    states, z = steps.observation[1], torch.randn(5)
    inputs = networks.inputs(steps.observation[1:2], z[None])
    assert torch.allclose(plain.actor(torch.cat([states, z.expand(5, 5)], -1)), networks.actor(inputs)[0], atol=1e-6)
    actions = networks.from_box(steps.action[1:2])
    expected = networks.critics(torch.cat([inputs, actions], -1))[:, 0]
    found = torch.stack(plain.value(plain.critics, states, z, steps.action[1] / plain.half))
    assert torch.allclose(found, expected, atol=1e-6)
    q = latent.posterior(ours.spec.transitions(steps.observation, steps.action, steps.reward, steps.successor))
    rows = torch.cat([steps.observation[1], steps.action[1], steps.reward[1, :, None]], -1)
    loc, scale = plain.belief(rows)
    assert torch.allclose(loc, q.base_dist.loc[1], atol=1e-6)
    assert torch.allclose(scale, q.base_dist.scale[1], atol=1e-6)
    plain.generator.manual_seed(0)
    action, log_prob = plain.draw(states, z)
    assert torch.allclose(networks.policy(inputs).log_prob(action)[0], log_prob, atol=1e-3)
    plain.actor[0].bias.data.add_(0.1)  # control: other weights are another function
    assert not torch.allclose(
        plain.actor(torch.cat([states, z.expand(5, 5)], -1)), networks.actor(inputs)[0], atol=1e-6
    )


def test_both_sides_collect_as_much_and_learn(both):
    ours, plain = both
    assert [len(known) for known in plain.recent] == ours.replay.sizes.tolist() == [40] * 3
    assert plain.collect() == ours.collect().reward.numel() == 120
    assert [len(known) for known in plain.replay] == [80] * 3
    assert [len(known) for known in plain.recent] == [40] * 3
    before = [p.clone() for p in plain.actor.parameters()], plain.log_alpha.clone(), plain.targets[1][0].weight.clone()
    encoder = [p.clone() for p in plain.encoder.parameters()]
    plain.update()
    assert all(not torch.equal(p, q) for p, q in zip(plain.actor.parameters(), before[0]))
    assert plain.log_alpha != before[1]
    assert not torch.equal(plain.targets[1][0].weight, before[2])
    assert any(not torch.equal(p, q) for p, q in zip(plain.encoder.parameters(), encoder))


def test_rows_compare_steps_per_second(monkeypatch):
    class Fake:
        def collect(self, side):
            return {"ours": 300.0, "plain": 20.0}[side]

        def update(self, side, updates):
            return {"ours": 50.0, "plain": 10.0}[side]

    monkeypatch.setattr(pearl_speed, "sides", lambda size, seed, **options: Fake())
    monkeypatch.setattr(pearl_speed, "one_core", lambda: None)
    rows = pearl_speed.run(argparse.Namespace(sizes=["all_tasks", "released"], rounds=3, quick=False, seed=0))
    assert [(row.name, row.ratio, row.passes) for row in rows] == [
        ("environment_steps", 15.0, True), ("gradient_steps_all_tasks", 5.0, False),
        ("gradient_steps_released", 5.0, None),
    ]  # fmt: skip
    quick = pearl_speed.run(argparse.Namespace(sizes=["meta_batch"], rounds=3, quick=True, seed=0))
    assert [row.bar for row in quick] == [None, None]
    with pytest.raises(SystemExit, match="unknown size all"):
        pearl_speed.run(argparse.Namespace(sizes=["all"], rounds=3, quick=True, seed=0))
