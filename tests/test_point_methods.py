"""The point estimates beside MAML against expansions, closed forms and finite differences, each with a control."""

import gc
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.func import grad, jacrev

import bayesmeta as bm
from bayesmeta import errors
from bayesmeta.ops.linear_solve import conjugate_gradient
from tests.numerics import by_finite_differences
from tests.programs import batch_of
from tests.test_maml import LR, nll, quartic, setting

F64 = torch.float64


def network(seed=0, inputs=1, hidden=(4,), activation="tanh"):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return bm.nets.mlp(inputs, list(hidden), 1, activation=activation)


def neural(task_modules="all", likelihood=None, **options):
    return bm.NeuralTaskModel(
        network(**options), likelihood or bm.Gaussian(0.5), "point", task_modules=task_modules
    ).double()


def a_batch(tasks=3, seed=0, ragged=False):
    return bm.TaskBatch(
        batch_of(tasks, 5, seed=seed, dtype=F64, ragged=ragged), batch_of(tasks, 6, seed=seed + 50, dtype=F64)
    )


# -- Reptile and FOMAML: their expansions -------------------------------------------------------------------------


def direction(kind, rate, steps):
    """Reptile's (θ − φ_K)/α, or FOMAML's gradient at φ_K, with the same four observations everywhere."""
    data = batch_of(1, 4, 2, seed=3, dtype=F64)
    batch = bm.TaskBatch(data, data)
    if kind == "reptile":
        # support and query hold the same rows: their mean is that of the four
        method = bm.Reptile(quartic, inner_steps=steps, inner_lr=rate).double()
        scale = 1 / rate
    else:
        method = bm.MAML(quartic, inner_steps=steps, inner_lr=rate, first_order=True).double()
        scale = 1 / 4  # the outer loss sums over four observations
    method.prepare(batch)
    start = torch.tensor([0.8, -0.5], dtype=F64)
    with torch.no_grad():
        method.start.copy_(start)
    method.loss(batch).backward()

    def mean_loss(p):
        return nll(2, p, data.x[0], data.y[0]) / 4

    return method.start.grad * scale, grad(mean_loss)(start), jacrev(grad(mean_loss))(start)


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("kind", ["reptile", "fomaml"])
def test_first_order_directions_match_their_expansions(kind, steps):
    def remainder(rate, curvature):
        found, g, hessian = direction(kind, rate, steps)
        main = steps * g if kind == "reptile" else g
        return (found - (main - curvature * rate * hessian @ g)).norm().item()

    right = steps * (steps - 1) / 2 if kind == "reptile" else steps
    halves = [remainder(rate, right) for rate in (2e-3, 1e-3)]
    if halves[0] < 1e-12:  # exact: Reptile with one step
        assert (kind, steps) == ("reptile", 1)
    else:  # O(α²): half the rate, a quarter of the remainder
        assert halves[0] / halves[1] == pytest.approx(4.0, rel=0.1)
    wrong = [remainder(rate, right + 1.0) for rate in (2e-3, 1e-3)]  # control: another coefficient leaves O(α)
    assert wrong[0] / wrong[1] == pytest.approx(2.0, rel=0.1)


def test_reptile_with_sgd_moves_to_the_mean_of_the_tasks_ends():
    batch = a_batch()
    method = bm.Reptile(neural(), inner_steps=3, inner_lr=0.05)
    theta = method.program.prior.loc
    before = theta.detach().clone()
    maml = bm.MAML(neural(), inner_steps=3, inner_lr=0.05)
    ends = maml.adapt(batch.union()).u[0]
    optimizer = torch.optim.SGD([theta], lr=0.3)
    method.loss(batch).backward()
    optimizer.step()
    torch.testing.assert_close(theta.detach(), before + 0.3 * (ends.mean(0) - before), rtol=1e-12, atol=1e-12)
    assert (ends.std(0) > 1e-4).any()  # the tasks do lead to different places


def test_reptile_with_sgd_on_one_task_is_lookahead():
    batch = a_batch(1)
    method = bm.Reptile(neural(), inner_steps=4, inner_lr=0.05)
    outer = torch.optim.SGD(method.parameters(), lr=0.5)
    multi = bm.MultiTask(neural())
    shots = batch.union().shots
    together = bm.TaskBatch(batch.support, batch.union())
    fast = bm.Lookahead(torch.optim.SGD(multi.parameters(), lr=0.05 / shots), sync_every=4, rate=0.5)
    for _ in range(3):
        outer.zero_grad()
        method.loss(batch).backward()
        outer.step()
        for _ in range(4):
            fast.zero_grad()
            multi.loss(together).backward()
            fast.step()
    torch.testing.assert_close(method.program.prior.loc, multi.program.prior.loc, rtol=1e-12, atol=1e-12)


def test_reptile_trains_what_is_no_task_parameter_on_the_query():
    batch = a_batch()
    method = bm.Reptile(neural(likelihood=bm.Gaussian(0.5, learn_scale=True)), inner_steps=2, inner_lr=0.05)
    method.loss(batch).backward()
    posterior = method.adapt(batch.support)
    residual = batch.query.y - posterior.predictive(batch.query).mean
    # d/d log σ of Σ ½ r²/σ² + log σ
    expected = (1 - residual.square() / 0.25).sum(-1).mean()
    torch.testing.assert_close(method.program.likelihood.log_scale.grad, expected.detach())
    # and the start's gradient is Reptile's alone
    ends = method.adapt(batch.union()).u[0]
    torch.testing.assert_close(method.program.prior.loc.grad, method.program.prior.loc.detach() - ends.mean(0))


def test_reptile_judges_by_the_query_in_evaluation_mode():
    batch = a_batch()
    reptile = bm.Reptile(neural(), inner_steps=2, inner_lr=0.05)
    maml = bm.MAML(neural(), inner_steps=2, inner_lr=0.05)
    torch.testing.assert_close(reptile.eval().loss(batch), maml.loss(batch))
    assert abs(reptile.train().loss(batch).item() - maml.loss(batch).item()) > 1


def test_reptile_on_mini_batches_averages_to_the_full_step():
    batch = a_batch(2, ragged=True)
    start = neural().prior.loc.detach()

    def move(seed=0, **options):
        method = bm.Reptile(neural(), inner_steps=1, inner_lr=0.05, **options)
        method.loss(batch, generator=seed).backward()
        return start - method.program.prior.loc.grad

    full = move()
    parts = torch.stack([move(seed, shots_per_step=2) for seed in range(400)])
    error = parts.std(0) / 20
    assert ((parts.mean(0) - full).abs() < 5 * error).all()
    assert (parts.std(0) > 0).any()
    torch.testing.assert_close(move(shots_per_step=1000), full, rtol=0, atol=0)


# -- Meta-SGD -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_meta_sgd_gradient_is_the_product_with_its_rates(steps):
    batch = setting(quartic, 1)[1]
    method = bm.MetaSGD(quartic, inner_steps=steps, inner_lr=LR).double()
    method.prepare(batch)
    rates = torch.tensor([0.07, 0.02], dtype=F64)
    with torch.no_grad():
        method.start.copy_(torch.tensor([0.8, -0.5]))
        method.factors.copy_(rates / LR)
    method.loss(batch).backward()
    x, y, phi = batch.support.x[0], batch.support.y[0], method.start.detach()

    def inner(p):
        return nll(2, p, x, y) / len(y)

    eye, product, alpha = torch.eye(2, dtype=F64), torch.eye(2, dtype=F64), torch.zeros(2, 2, dtype=F64)
    for _ in range(steps):
        slope, hessian = grad(inner)(phi), jacrev(grad(inner))(phi)
        # row i: how φ_j moves with rate i and start i; (I − H diag α) from the left in turn
        factor = eye - hessian @ torch.diag(rates)
        alpha = alpha @ factor - torch.diag(slope)
        product = product @ factor
        phi = phi - rates * slope
    outer = grad(lambda p: nll(2, p, batch.query.x[0], batch.query.y[0]))(phi)
    torch.testing.assert_close(method.start.grad, product @ outer, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(method.factors.grad, LR * (alpha @ outer), rtol=1e-12, atol=1e-12)
    wrong = eye - torch.diag(rates) @ jacrev(grad(inner))(method.start.detach())  # control: α on the other side
    right = eye - jacrev(grad(inner))(method.start.detach()) @ torch.diag(rates)
    assert ((wrong - right) @ outer).norm() > 1e-3 * outer.norm()


@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize("learn", ["parameter", "tensor"])
def test_meta_sgd_at_equal_rates_is_maml_and_learns_each(learn, per_step):
    batch = a_batch(ragged=True)
    maml = bm.MAML(neural(), inner_steps=3, inner_lr=0.05)
    method = bm.MetaSGD(neural(), inner_steps=3, inner_lr=0.05, learn=learn, per_step=per_step)
    loss = method.loss(batch)
    torch.testing.assert_close(loss, maml.loss(batch), rtol=1e-12, atol=1e-12)
    loss.backward()
    width = 13 if learn == "parameter" else 4
    assert method.rates.shape == ((3, width) if per_step else (width,))
    for index in (0, method.factors.numel() - 1):
        slope = by_finite_differences(method, batch, method.factors, index)
        assert method.factors.grad.view(-1)[index].item() == pytest.approx(slope, rel=1e-6, abs=1e-6)
    method.inner_steps = 5  # more steps than were trained take the last rates
    assert method.adapt(batch.support).u.isfinite().all()


# -- ANIL and BOIL ------------------------------------------------------------------------------------------------


def test_anil_on_all_weights_is_maml_on_the_head():
    batch = a_batch(ragged=True)
    whole = bm.ANIL(neural("all"), inner_steps=3, inner_lr=0.1)
    head = bm.MAML(neural("head"), inner_steps=3, inner_lr=0.1)
    named = bm.ANIL(neural("head"), inner_steps=3, inner_lr=0.1)
    losses = [method.loss(batch) for method in (whole, head, named)]
    for loss in losses:
        loss.backward()
        torch.testing.assert_close(loss, losses[0], rtol=1e-12, atol=1e-12)
    theta = whole.program.prior.loc.grad
    torch.testing.assert_close(theta[8:], head.program.prior.loc.grad, rtol=1e-10, atol=1e-12)
    body = torch.cat([p.grad.flatten() for p in head.program.network.parameters()])
    torch.testing.assert_close(theta[:8], body, rtol=1e-10, atol=1e-12)
    control = bm.MAML(neural("all"), inner_steps=3, inner_lr=0.1).loss(batch)
    assert abs(control.item() - losses[0].item()) > 1e-3


def test_boil_moves_the_body_alone():
    batch = a_batch()
    method = bm.BOIL(neural("all"), inner_steps=2, inner_lr=0.1)
    moved = method.adapt(batch.support).u[0] - method.program.prior.loc
    assert (moved[:, 8:] == 0).all()
    assert (moved[:, :8].abs().sum(-1) > 1e-4).all()
    named = bm.MAML(neural(["0"]), inner_steps=2, inner_lr=0.1)
    torch.testing.assert_close(method.loss(batch), named.loss(batch), rtol=1e-12, atol=1e-12)


def test_anil_and_boil_say_what_they_cannot_do():
    with pytest.raises(errors.UnsupportedError, match="has no head"):
        bm.ANIL(quartic)
    with pytest.raises(errors.UnsupportedError, match="nothing to adapt"):
        bm.ANIL(neural(["0"]))
    with pytest.raises(errors.UnsupportedError, match="nothing to adapt"):
        bm.BOIL(neural("head"))


# -- implicit MAML ------------------------------------------------------------------------------------------------


def ridge(x, y=None, mask=None):
    """Linear regression with unit noise, whose inner optimum has a closed form."""
    with bm.task_plate(x):
        phi = pyro.sample("phi", dist.Normal(x.new_zeros(3), x.new_ones(3)).to_event(1))
        with bm.shot_plate(x, mask):
            pyro.sample("y", dist.Normal((x * phi).sum(-1), x.new_ones(())), obs=y)


def test_implicit_gradient_of_a_ridge_problem_is_exact():
    proximal = 0.7
    batch = bm.TaskBatch(batch_of(4, 6, 3, dtype=F64, ragged=True), batch_of(4, 5, 3, seed=9, dtype=F64))
    method = bm.ImplicitMAML(ridge, inner_steps=2000, inner_lr=0.1, proximal=proximal, solve_steps=3).double()
    method.prepare(batch)
    start = torch.tensor([0.5, -1.0, 0.2], dtype=F64)
    with torch.no_grad():
        method.start.copy_(start)
    loss = method.loss(batch)
    loss.backward()
    theta = start.clone().requires_grad_()
    total = 0.0
    for i in range(4):
        keep = batch.support.full_mask()[i]
        x, y = batch.support.x[i][keep], batch.support.y[i][keep]
        precision = x.T @ x / len(y) + proximal * torch.eye(3, dtype=F64)
        phi = torch.linalg.solve(precision, x.T @ y / len(y) + proximal * theta)
        density = torch.distributions.Normal(batch.query.x[i] @ phi, 1.0)
        total = total - density.log_prob(batch.query.y[i]).sum() / 4
    total.backward()
    torch.testing.assert_close(loss, total.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(method.start.grad, theta.grad, rtol=1e-9, atol=1e-9)
    # control: with fewer solve steps than dimensions the gradient is not exact
    method.solve_steps = 1
    method.zero_grad()
    method.loss(batch).backward()
    assert (method.start.grad - theta.grad).norm() > 1e-4 * theta.grad.norm()


def test_implicit_gradient_reaches_all_of_theta():
    model = neural("head", likelihood=bm.Gaussian(0.8, learn_scale=True))
    method = bm.ImplicitMAML(model, inner_steps=4000, inner_lr=0.15, proximal=0.5, solve_steps=20)
    batch = a_batch()
    method.loss(batch).backward()
    for parameter in method.parameters():
        for index in (0, parameter.numel() - 1):
            slope = by_finite_differences(method, batch, parameter, index, 1e-5)
            # the inner optimum is reached to about 1e-9
            assert parameter.grad.view(-1)[index].item() == pytest.approx(slope, rel=1e-5, abs=1e-6)


class Kept:
    """What autograd holds on to, as long as it does."""

    def __init__(self, tensor):
        self.tensor = tensor


def kept_numbers(method, batch):
    """Numbers that autograd keeps for the backward pass of one loss."""
    alive = weakref.WeakSet()

    def pack(tensor):
        kept = Kept(tensor)
        alive.add(kept)
        return kept

    with saved_tensors_hooks(pack, lambda kept: kept.tensor):
        loss = method.loss(batch)
        gc.collect()
        assert loss.requires_grad
        return sum(kept.tensor.numel() for kept in alive)


def test_memory_of_implicit_maml_does_not_grow_with_inner_steps():
    batch = a_batch()
    few, many = (kept_numbers(bm.ImplicitMAML(ridge1, inner_steps=k).double(), batch) for k in (2, 40))
    assert many == few
    few, many = (kept_numbers(bm.MAML(ridge1, inner_steps=k).double(), batch) for k in (2, 40))
    assert many > 5 * few  # control


def ridge1(x, y=None, mask=None):
    """A curve with curvature that depends on φ, so that each step has something to keep."""
    with bm.task_plate(x):
        phi = pyro.sample("phi", dist.Normal(x.new_zeros(1), x.new_ones(1)).to_event(1))
        with bm.shot_plate(x, mask):
            pyro.sample("y", dist.Normal((x * phi).sum(-1).sin(), x.new_ones(())), obs=y)


def test_conjugate_gradient_solves_each_system_and_stops_where_it_cannot():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(5, 4, 4, generator=generator, dtype=F64)
    matrix = root @ root.mT + torch.eye(4, dtype=F64)
    right = torch.randn(5, 4, generator=generator, dtype=F64)
    right[2] = 0.0

    def product(v):
        return (matrix @ v.unsqueeze(-1)).squeeze(-1)

    found = conjugate_gradient(product, right, 20)
    torch.testing.assert_close(found, torch.linalg.solve(matrix, right), rtol=1e-9, atol=1e-10)
    assert (found[2] == 0).all()
    assert (conjugate_gradient(product, right, 2) - found).norm() > 1e-3  # control: not yet there
    assert conjugate_gradient(lambda v: -v, right, 5).abs().max() == 0  # not positive: stays


# -- multi-task and multi-step ------------------------------------------------------------------------------------


def test_multi_task_does_not_adapt_and_is_maml_without_steps():
    batch = a_batch()
    method, maml = bm.MultiTask(neural()), bm.MAML(neural(), inner_steps=0)
    torch.testing.assert_close(method.loss(batch), maml.loss(batch), rtol=0, atol=0)
    posterior = method.adapt(batch.support)
    assert (posterior.u == method.program.prior.loc).all()
    method.loss(batch).backward()
    assert method.program.prior.loc.grad.abs().sum() > 0


def test_step_weights_mix_the_losses_of_shorter_runs():
    batch = a_batch(ragged=True)

    def loss(steps, weights="last"):
        return bm.MAML(neural(), inner_steps=steps, inner_lr=0.1, step_weights=weights).loss(batch)

    each = torch.stack([loss(k) for k in (1, 2, 3)])
    torch.testing.assert_close(loss(3, "uniform"), each.mean(), rtol=1e-12, atol=1e-12)
    mixed = loss(3, [1.0, 0.0, 3.0])
    torch.testing.assert_close(mixed, 0.25 * each[0] + 0.75 * each[2], rtol=1e-12, atol=1e-12)
    assert abs(loss(3, "uniform").item() - each[2].item()) > 1e-3
    nothing = bm.TaskBatch(bm.Observations(torch.zeros(3, 0, 1, dtype=F64), torch.zeros(3, 0, dtype=F64)), batch.query)
    method = bm.MAML(neural(), inner_steps=3, step_weights="uniform")
    method.prepare(batch)
    torch.testing.assert_close(method.loss(nothing), bm.MultiTask(neural()).loss(batch))


@pytest.mark.parametrize(
    "make",
    [
        lambda: bm.MAML(quartic, step_weights="first"),
        lambda: bm.MAML(quartic, inner_steps=2, step_weights=[1.0]),
        lambda: bm.MAML(quartic, inner_steps=2, step_weights=[1.0, -1.0]),
        lambda: bm.MAML(quartic, inner_steps=2, step_weights=[0.0, 0.0]),
        lambda: bm.MetaSGD(quartic, learn="layer"),
        lambda: bm.MetaSGD(quartic, inner_steps=0, per_step=True),
        lambda: bm.Reptile(quartic, shots_per_step=0),
        lambda: bm.Reptile(quartic, shots_per_step=2, objective="joint"),
        lambda: bm.ImplicitMAML(quartic, proximal=0.0),
        lambda: bm.ImplicitMAML(quartic, solve_steps=0),
        lambda: bm.ImplicitMAML(quartic, inner_steps=-1),
    ],
)
def test_options_out_of_range(make):
    with pytest.raises(errors.OptionError):
        make()


def test_an_adaptation_that_diverged_is_named():
    batch = a_batch()
    posterior = bm.MAML(neural(), inner_steps=60, inner_lr=1e4).adapt(batch.support)
    with pytest.raises(errors.NonFiniteDataError, match="diverged"):
        posterior.predictive(batch.query)
    with pytest.raises(errors.NonFiniteDataError, match="task 0"):
        posterior.predict(batch.query)


def test_each_inner_step_takes_its_own_rates():
    batch = a_batch()
    method = bm.MetaSGD(neural(), inner_steps=2, inner_lr=0.05, per_step=True)
    method.prepare(batch)
    with torch.no_grad():
        method.factors[1] = 3.0
    first = bm.MAML(neural(), inner_steps=1, inner_lr=0.05)
    middle = first.adapt(batch.support).u
    second = bm.MAML(neural(), inner_steps=1, inner_lr=0.15)
    u = middle.clone().requires_grad_()
    step = second.inner_gradient(u, batch.support, None, False) * 0.15 / batch.support.shots
    torch.testing.assert_close(method.adapt(batch.support).u, middle + step, rtol=1e-10, atol=1e-12)
    method.inner_steps = 3  # beyond those trained: the last rates
    u = method.adapt(batch.support).u
    method.factors.data[1] = 2.0
    assert not torch.equal(method.adapt(batch.support).u, u)


def test_without_support_a_task_stays_also_away_from_the_priors_mode():
    batch = a_batch(ragged=True)
    mask = batch.support.mask.clone()
    mask[1] = False
    support = bm.Observations(batch.support.x, batch.support.y, mask)
    model = bm.NeuralTaskModel(network(), bm.Gaussian(0.5), bm.priors.Mixture(2, 0.3, spread=1.0)).double()
    for objective in ("joint", "likelihood"):
        moved = bm.MAML(model, inner_steps=3, inner_lr=0.1, objective=objective).adapt(support).u[0]
        assert torch.equal(moved[1], model.prior.loc)  # where the mixture has a slope
        assert (moved[0] != model.prior.loc).any()


def test_reptiles_mini_batches_leave_padding_out():
    observations = batch_of(2, 6, dtype=F64)
    mask = torch.arange(6) < torch.tensor([[2], [5]])
    wild = torch.where(mask, observations.y, 1e6)
    batch = bm.TaskBatch(bm.Observations(observations.x, wild, mask), a_batch(2).query.tasks(slice(0, 2)))
    batch = bm.TaskBatch(batch.support, bm.Observations(batch.query.x[:, :0], batch.query.y[:, :0]))
    method = bm.Reptile(neural(), inner_steps=2, inner_lr=0.05, shots_per_step=2)
    for seed in range(20):
        assert method.loss(batch, generator=seed) < 1e3
    # more than there are: both real ones, each step, as without mini-batches
    alone = bm.Reptile(neural(), inner_steps=2, inner_lr=0.05).loss(batch.tasks([0]))
    torch.testing.assert_close(method.loss(batch.tasks([0])), alone, rtol=1e-10, atol=1e-12)


def test_fit_judges_reptile_by_the_query_and_trains_it_by_its_move():
    batch = a_batch()
    method = bm.Reptile(neural(), inner_steps=2, inner_lr=0.05)
    method.eval()  # as after an earlier evaluation
    result = bm.fit(
        method,
        bm.tasks.FixedTasks(batch),
        steps=1,
        tasks_per_step=3,
        support=5,
        query=6,
        optimizer=lambda p: torch.optim.SGD(p, 1e-12),
        validation=batch,
        validate_every=1,
        log_every=1,
        progress=False,
    )
    maml = bm.MAML(neural(), inner_steps=2, inner_lr=0.05)
    assert result.history[0]["validation"] == pytest.approx(maml.loss(batch).item(), rel=1e-6)
    assert result.history[0]["loss"] < 1.0 < maml.loss(batch).item()


def with_a_global(x, y=None, mask=None):
    """A global shift in what the support says of φ."""
    shift = pyro.sample("shift", dist.Normal(x.new_zeros(()), 1.0))
    with bm.task_plate(x):
        phi = pyro.sample("phi", dist.Normal(x.new_zeros(()), 1.0))
        with bm.shot_plate(x, mask):
            pyro.sample("y", dist.Normal(phi + shift * x.squeeze(-1), x.new_ones(())), obs=y)


def test_implicit_gradient_reaches_global_sites_and_says_how_far_it_is_exact():
    batch = a_batch(ragged=True)
    method = bm.ImplicitMAML(with_a_global, inner_steps=300, inner_lr=0.3, proximal=0.5, solve_steps=2).double()
    method.prepare(batch)
    with torch.no_grad():
        method.theta_guide.loc.fill_(0.4)
        method.start.fill_(-0.3)
    method.loss(batch).backward()
    slope = by_finite_differences(method, batch, method.theta_guide.loc, 0)
    assert method.theta_guide.loc.grad.item() == pytest.approx(slope, rel=1e-6)
    assert method.stationarity(batch.support).max() < 1e-10
    method.inner_steps = 1
    assert (method.stationarity(batch.support) > 0.3).all()
    nothing = bm.Observations(batch.support.x[:, :0], batch.support.y[:, :0])
    assert (method.stationarity(nothing) == 0).all()


def test_a_program_starts_at_the_mean_of_its_prior():
    def shifted(x, y=None, mask=None):
        with bm.task_plate(x):
            a = pyro.sample("a", dist.Normal(x.new_tensor(2.0), 0.5))
            b = pyro.sample("b", dist.LogNormal(x.new_tensor(-1.0), 0.5))
            with bm.shot_plate(x, mask):
                pyro.sample("y", dist.Normal(a + b * x.squeeze(-1), x.new_ones(())), obs=y)

    method = bm.MAML(shifted).double()
    method.prepare(batch_of(3, 4, dtype=F64))
    torch.testing.assert_close(method.start.detach(), torch.tensor([2.0, -1.0], dtype=F64))


@pytest.mark.parametrize("inner_steps", [2.5, -1])
def test_inner_steps_are_whole(inner_steps):
    with pytest.raises(errors.OptionError, match="whole"):
        bm.MAML(quartic, inner_steps=inner_steps)
    with pytest.raises(errors.OptionError, match="finite"):
        bm.MAML(quartic, inner_lr=float("inf"))
    with pytest.raises(errors.OptionError, match="not all 0"):
        bm.MAML(quartic, inner_steps=1, step_weights=[float("inf")])
