"""VERSA: the exact last layer reached by training, losses by hand, classes whose names do not count, bad input."""

import math

import pytest
import torch
from torch import nn

import bayesmeta as bm
from bayesmeta import errors
from bayesmeta.ops.random import as_generator, normal_like
from tests.programs import TwoSites, batch_of

F64 = torch.float64


def ragged(tasks=4, features=1):
    support = batch_of(tasks, 5, features, dtype=F64, ragged=True)
    return bm.TaskBatch(support, batch_of(tasks, 4, features, seed=1, dtype=F64, ragged=True), population=tasks)


def network_model(likelihood=None, features=1, outputs=1, width=5, bias=True, prior="normal", **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(features, width), nn.Tanh(), nn.Linear(width, outputs, bias=bias))
    likelihood = bm.Gaussian(0.5) if likelihood is None else likelihood
    return bm.NeuralTaskModel(network, likelihood, prior, task_modules="head", **options).double()


def stirred(method, batch, size=0.3):
    """The method with weights that are no first ones."""
    method.prepare(batch)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in method.recognition.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return method


def classes(tasks=3, shots=7, num_classes=3, features=2, seed=0, names=None):
    """Labelled points; ``names`` gives the labels other names."""
    support = batch_of(tasks, shots, features, seed=seed, dtype=F64)
    generator = torch.Generator().manual_seed(seed + 50)
    y = torch.randint(num_classes, (tasks, shots), generator=generator)
    y[:, :num_classes] = torch.arange(num_classes)  # each class has support
    y = y if names is None else torch.as_tensor(names)[y]
    return support.with_y(y.double())


def classes_model(num_classes=3, **options):
    return network_model(bm.likelihoods.Categorical(num_classes), features=2, outputs=num_classes, **options)


def classifier(num_classes=3, **options):
    return bm.Versa(classes_model(num_classes), width=16, **options)


# -- regression: the exact last layer -----------------------------------------------------------------------------


def one_weight():
    """y = φ tanh(x) + noise, φ ~ N(0, 1): one weight, so that a diagonal Gaussian is no restriction."""
    network = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Tanh(), nn.Linear(1, 1, bias=False))
    model = bm.NeuralTaskModel(network, bm.Gaussian(0.5), bm.priors.Normal(1.0), task_modules="head")
    with torch.no_grad():
        network.requires_grad_(False)
        model.network[0].weight.fill_(1.0)
        model.prior.loc.zero_()
    return model.requires_grad_(False)


def lines(num_tasks, support, query, seed):
    generator = torch.Generator().manual_seed(seed)
    x = 4 * torch.rand(num_tasks, support + query, 1, generator=generator) - 2
    phi = torch.randn(num_tasks, 1, generator=generator)
    y = phi * x.squeeze(-1).tanh() + 0.5 * torch.randn(x.shape[:2], generator=generator)
    first, rest = (bm.Observations(x[:, part], y[:, part]) for part in (slice(support), slice(support, None)))
    return bm.TaskBatch(first, rest)


def log_scores(method, batch):
    """log p(Q | S) of each task by closed form: q is Gaussian, and so is the exact posterior."""
    posterior, program = method.adapt(batch.support), method.program
    variance = posterior.scale[0].square() if isinstance(posterior, bm.NormalPosterior) else posterior.covariance[:, 0]
    loc = posterior.loc[0] if posterior.loc.dim() == 3 else posterior.loc
    design = program.last_layer_design(batch.query.x).squeeze(-1)
    covariance = variance.unsqueeze(-1) * design.unsqueeze(-1) * design.unsqueeze(-2)
    covariance = covariance + 0.25 * torch.eye(design.shape[-1])
    return torch.distributions.MultivariateNormal(loc * design, covariance).log_prob(batch.query.y)


@pytest.mark.parametrize("objective", ["marginal", "predictive"])
def test_training_reaches_the_predictive_of_the_exact_last_layer(objective):
    """Both objectives have the posterior predictive as their optimum; the differences are paired over tasks."""
    model = one_weight()
    method, exact = bm.Versa(model, objective=objective, width=16, num_particles=20), bm.BayesianLastLayer(model)
    held_out = lines(2000, 4, 3, seed=10_000)
    method.prepare(held_out)
    best = log_scores(exact, held_out)

    def short():
        gap = best - log_scores(method.eval(), held_out)
        return gap.mean().item(), gap.std().item() / len(gap) ** 0.5

    untrained, _ = short()
    assert untrained > 0.3  # control
    optimizer = torch.optim.Adam(method.recognition.parameters(), 0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=400)
    method.train()
    for step in range(400):
        optimizer.zero_grad()
        method.loss(lines(64, 4, 3, seed=step), generator=step).backward()
        optimizer.step()
        schedule.step()
    gap, error = short()
    # in expectation no predictive beats the exact one: what is left is what training has not reached
    assert -3 * error < gap < 0.02 + 3 * error


@pytest.mark.parametrize("objective", ["marginal", "predictive"])
def test_the_loss_by_hand(objective):
    """By the same draws, written out: weights from q, a linear map of the features, a Gaussian density."""
    batch = ragged()
    method = stirred(bm.Versa(network_model(), objective=objective, width=8, num_particles=6), batch)
    q = method.infer(batch.support)
    noise = normal_like(q.loc, (6, 1, 4, 6), as_generator(9, torch.device("cpu"), "loss"))
    phi = (q.loc + q.scale * noise)[:, 0]
    first = method.program.network[0]
    total = []
    for task in range(4):
        keep = batch.query.mask[task]
        x, y = batch.query.x[task, keep], batch.query.y[task, keep]
        features = torch.tanh(x @ first.weight.mT + first.bias)
        mean = phi[:, task, :5] @ features.mT + phi[:, task, 5:]
        log_p = torch.distributions.Normal(mean, method.program.noise_scale).log_prob(y)  # [6, points]
        if objective == "marginal":
            total.append(-(log_p.logsumexp(0) - math.log(6)).sum())
        else:
            total.append(-(log_p.sum(-1).logsumexp(0) - math.log(6)))
    found = method.loss(batch, generator=9)
    torch.testing.assert_close(found, torch.stack(total).mean(), rtol=1e-10, atol=1e-10)
    other = "predictive" if objective == "marginal" else "marginal"
    method.objective = other  # control: they differ
    assert abs(method.loss(batch, generator=9) - found) > 1e-3


def test_parts_of_the_support_are_for_training_alone():
    """With draws of φ that do not count (a q without width), the loss varies with the part; control: without."""
    batch = ragged()
    for subsets in (True, False):
        method = stirred(bm.Versa(network_model(), width=8, subsets=subsets), batch)
        infer = method.infer

        def narrow(observations, theta=None, infer=infer):
            q = infer(observations, theta)
            q.scale = torch.zeros_like(q.scale)
            return q

        method.infer = narrow
        for training in (True, False):
            losses = [method.train(training).loss(batch, generator=seed).item() for seed in range(6)]
            assert (max(losses) - min(losses) > 1e-3) == (subsets and training)
            if not (subsets and training):
                assert len(set(losses)) == 1


def test_the_recognition_network_reads_features_and_trains_them():
    """Two inputs with the same features are the same input; the loss has a gradient for the shared layers."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 1))
    with torch.no_grad():
        network[0].weight.fill_(1.0)
        network[0].bias.zero_()  # ReLU: all x < 0 have the features 0
    method = bm.Versa(bm.NeuralTaskModel(network, bm.Gaussian(0.5), task_modules="head").double(), width=8)
    x = torch.tensor([[[-1.0], [-2.0]], [[-3.0], [-0.5]], [[1.0], [2.0]]], dtype=F64)
    support = bm.Observations(x, torch.ones(3, 2, dtype=F64))
    q = stirred(method, support).infer(support)
    torch.testing.assert_close(q.loc[:, 0], q.loc[:, 1])
    assert (q.loc[:, 0] - q.loc[:, 2]).abs().max() > 1e-3
    method.loss(bm.TaskBatch(support, support)).backward()
    assert method.program.network[0].weight.grad.abs().sum() > 0


def test_gradients_by_finite_differences():
    batch = ragged()
    method = stirred(bm.Versa(network_model(), width=8, num_particles=3), batch)
    method.loss(batch, generator=5).backward()
    checked = 0
    for parameter in method.parameters():
        flat, values = parameter.data.view(-1), []
        for sign in (1, -1):
            flat[0] += sign * 1e-6
            values.append(method.loss(batch, generator=5).item())
            flat[0] -= sign * 1e-6
        slope = (values[0] - values[1]) / 2e-6
        found = 0.0 if parameter.grad is None else parameter.grad.view(-1)[0].item()
        assert found == pytest.approx(slope, rel=1e-5, abs=1e-6)
        checked += abs(slope) > 1e-4
    assert checked >= 8


@pytest.mark.parametrize("kind", ["regression", "classes"])
def test_order_and_padding_change_no_bit(kind):
    if kind == "regression":
        method, support = bm.Versa(network_model(features=2), width=8), batch_of(3, 7, 2, dtype=F64)
    else:
        method, support = classifier(), classes()
    q = stirred(method, support).adapt(support)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    for x, y, mask in (
        (support.x[:, order], support.y[:, order], None),
        (
            torch.cat([torch.full((3, 2, 2), 9.0, dtype=F64), support.x], 1),
            torch.cat([torch.ones(3, 2, dtype=F64), support.y], 1),
            torch.arange(9).ge(2).expand(3, 9),
        ),
    ):
        same = method.adapt(bm.Observations(x, y, mask))
        assert torch.equal(same.loc, q.loc)
        assert torch.equal(same.scale, q.scale)
    moved = method.adapt(bm.Observations(support.x.roll(1, 1), support.y))  # control: pairs count
    assert not torch.equal(moved.loc, q.loc)


def test_several_outputs_counts_and_an_exposure():
    batch = batch_of(3, 6, 2, dtype=F64)
    y = torch.stack([batch.y, -batch.y], -1)
    two = stirred(bm.Versa(network_model(features=2, outputs=2), width=8), batch.with_y(y))
    assert two.adapt(batch.with_y(y)).loc.shape == (1, 3, 12)
    x = torch.cat([batch.x, batch.x[..., :1].exp()], -1)
    counts = bm.Observations(x, (10 * batch.y.abs()).round())
    rates = stirred(bm.Versa(network_model(bm.likelihoods.Poisson(exposure=-1), features=2), width=8), counts)
    assert rates.recognition.encoder.counts
    first = rates.adapt(counts)
    longer = torch.cat([x[..., :2], 2 * x[..., 2:]], -1)  # the same counts in twice the time
    assert (first.loc - rates.adapt(bm.Observations(longer, counts.y)).loc).abs().max() > 1e-3
    assert rates.loss(bm.TaskBatch(counts, counts)).isfinite()


def test_task_covariates_reach_q():
    support = batch_of(4, 5, dtype=F64)
    w = torch.randn(4, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    with_w = bm.Observations(support.x, support.y, None, w)
    method = stirred(bm.Versa(network_model(covariates=2), width=8), with_w)
    other = method.adapt(bm.Observations(support.x, support.y, None, w.flip(0))).loc
    assert (method.adapt(with_w).loc - other).abs().min() > 1e-6


# -- classes ------------------------------------------------------------------------------------------------------


def probabilities(method, posterior, query):
    """Of each class, at the mean of q, ``[tasks, shots, classes]``."""
    return method.program.predictive(posterior.loc, query).probs[0]


def test_other_names_of_the_classes_permute_the_predictions():
    names = [2, 0, 1]
    method = stirred(classifier(), classes())
    q, renamed = method.adapt(classes()), method.adapt(classes(names=names))
    query = batch_of(3, 5, 2, seed=3, dtype=F64)
    before, after = probabilities(method, q, query), probabilities(method, renamed, query)
    torch.testing.assert_close(after[..., names], before, rtol=1e-12, atol=1e-14)
    rows, others = method._to_rows(q.scale), method._to_rows(renamed.scale)
    torch.testing.assert_close(others[..., names, :], rows, rtol=1e-12, atol=1e-14)
    assert (after - before).abs().max() > 0.01  # control: the names are read
    plain = stirred(bm.Amortised(method.program, width=16), classes())  # control: another method does depend on them
    one, two = (probabilities(plain, plain.adapt(s), query) for s in (classes(), classes(names=names)))
    assert (two[..., names] - one).abs().max() > 1e-3


def test_a_class_depends_on_its_own_support_alone():
    method, support = stirred(classifier(), classes()), classes()
    x = support.x + 3.0 * (support.y == 1).unsqueeze(-1)
    before, after = (method._to_rows(method.adapt(s).loc)[0] for s in (support, bm.Observations(x, support.y)))
    assert torch.equal(before[:, [0, 2]], after[:, [0, 2]])
    assert (before[:, 1] - after[:, 1]).abs().max() > 0.01


def test_a_class_without_support_has_the_prior_that_all_classes_share():
    support = classes()
    method = stirred(classifier(), support)
    prior = method.program.prior
    with torch.no_grad():
        prior.log_scale.add_(torch.linspace(-1, 1, len(prior.log_scale), dtype=F64))
    there = support.y != 2
    q = method.adapt(bm.Observations(support.x, support.y, there))
    weight, bias = prior.loc[:15].reshape(3, 5).mean(0), prior.loc[15:].mean()
    expected = torch.cat([weight, bias[None]]).expand(3, -1).detach()
    found = method._to_rows(q.loc)[0]
    torch.testing.assert_close(found[:, 2], expected, rtol=1e-12, atol=1e-12)
    log_scale = torch.cat([prior.log_scale[:15].reshape(3, 5).mean(0), prior.log_scale[15:].mean()[None]])
    scales = method._to_rows(q.scale)[0, :, 2]
    torch.testing.assert_close(scales, log_scale.exp().detach().expand(3, -1), rtol=1e-12, atol=1e-12)
    assert (found[:, 0] - expected).abs().max() > 0.01  # control: a class with support has moved
    # and it is a class of which nothing is known: no probability 0
    assert probabilities(method, q, support)[..., 2].min() > 1e-3


@pytest.mark.parametrize("known", ["covariates", "theta"])
def test_each_class_reads_what_is_known_of_its_own_task(known):
    """w, or a draw of θ: each task in a batch is as alone; control: another task's."""
    support = classes(4)
    generator = torch.Generator().manual_seed(2)
    if known == "covariates":
        w = torch.randn(4, 2, generator=generator, dtype=F64)
        support = bm.Observations(support.x, support.y, None, w)
        method = bm.Versa(classes_model(covariates=2), width=16)
    else:
        method = bm.Versa(classes_model(prior="horseshoe"), width=16, global_guide="normal")
    stirred(method, support)
    theta = None
    if method.theta_guide is not None:
        theta = method.theta_guide.draw(3, generator).detach()
        theta = theta + 0.3 * torch.randn(theta.shape, generator=generator, dtype=F64)
    together = method.infer(support, theta)
    for task in range(4):
        alone = method.infer(support.tasks([task]), theta)
        for one, other in ((together.loc, alone.loc), (together.scale, alone.scale)):
            torch.testing.assert_close(one[:, task : task + 1], other, rtol=1e-10, atol=1e-12)
    if known == "theta":
        for group in range(3):
            alone = method.infer(support, theta[group : group + 1])
            torch.testing.assert_close(together.loc[group : group + 1], alone.loc, rtol=1e-10, atol=1e-12)
        # of the network alone, which q adds to a prior that θ moves too
        units = [method._recognise(support, one).loc for one in (theta[:1], theta[1:2])]
        assert (units[0] - units[1]).abs().max() > 1e-4
    else:
        mixed = bm.Observations(support.x, support.y, None, w.flip(0))
        assert (method._recognise(mixed, None).loc - method._recognise(support, None).loc).abs().max() > 1e-4


def blobs(num_tasks, num_classes, shots, seed):
    """Classes are points in the plane, drawn anew for each task."""
    generator = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(num_tasks, num_classes, 2, generator=generator, dtype=F64)
    y = torch.arange(num_classes).repeat(2 * shots).expand(num_tasks, -1)
    x = centres.gather(1, y.unsqueeze(-1).expand(-1, -1, 2))
    x = x + 0.5 * torch.randn(x.shape, generator=generator, dtype=F64)
    half = shots * num_classes
    return bm.TaskBatch(
        bm.Observations(x[:, :half], y[:, :half].double()), bm.Observations(x[:, half:], y[:, half:].double())
    )


def accuracy(method, batch):
    posterior = method.adapt(batch.support)
    return (probabilities(method, posterior, batch.query).argmax(-1) == batch.query.y).double().mean().item()


def test_trained_on_three_classes_it_tells_six_apart():
    method = bm.Versa(network_model(bm.likelihoods.Categorical(3), features=2, outputs=3, width=16), width=32)
    method.prepare(blobs(4, 3, 3, seed=0))
    untrained = accuracy(method, blobs(200, 3, 3, seed=999))
    optimizer = torch.optim.Adam(method.parameters(), 0.01)
    for step in range(300):
        optimizer.zero_grad()
        method.loss(blobs(16, 3, 3, seed=step), generator=step).backward()
        optimizer.step()
    method.eval()
    assert untrained < 0.45  # control: chance is a third
    assert accuracy(method, blobs(200, 3, 3, seed=999)) > 0.85
    more = method.with_classes(6)
    assert more.num_classes == 6
    assert more.training == method.training
    assert accuracy(more, blobs(200, 6, 3, seed=999)) > 0.6  # chance is a sixth
    before = more.adapt(blobs(2, 6, 3, seed=1).support).loc
    stirred(method, None)  # a copy: it does not follow
    assert torch.equal(more.adapt(blobs(2, 6, 3, seed=1).support).loc, before)


def test_with_the_same_number_of_classes_nothing_changes():
    support = classes()
    method = stirred(classifier(), support)
    same = method.with_classes(3)
    for one, other in zip(method.adapt(support).state().values(), same.adapt(support).state().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert same.config() == method.config()


# -- bad input ----------------------------------------------------------------------------------------------------


def test_models_without_a_last_layer_of_their_own():
    for model in (
        TwoSites(),
        bm.NeuralTaskModel(bm.nets.mlp(1, [4], 1), bm.Gaussian(), "normal"),
        bm.ContextTaskModel(bm.nets.mlp(3, [4], 1), bm.Gaussian(), 2),
    ):
        with pytest.raises(errors.UnsupportedError, match="task_modules='head'"):
            bm.Versa(model)
    with pytest.raises(errors.UnsupportedError, match="Point"):
        bm.Versa(network_model(prior="point"))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"objective": "elbo"}, "Unknown objective 'elbo'"),
        ({"pool": "median"}, "Unknown pool 'median'"),
        ({"num_particles": 0}, "num_particles"),
        ({"width": 0}, "width"),
    ],
)
def test_unknown_options(options, match):
    with pytest.raises(errors.OptionError, match=match):
        bm.Versa(network_model(), **options)


def test_labels_and_widths_that_do_not_fit():
    method = stirred(classifier(), classes())
    with pytest.raises(errors.DataError, match="3"):
        method.adapt(classes().with_y(torch.full((3, 7), 3.0, dtype=F64)))
    with pytest.raises(errors.ShapeError):
        method.adapt(batch_of(3, 4, 3, dtype=F64).with_y(torch.zeros(3, 4, dtype=F64)))


def test_labels_beyond_the_classes_name_with_classes():
    method = stirred(classifier(), classes())
    five = blobs(2, 5, 3, seed=1)
    for call in (lambda: method.adapt(five.support), lambda: method.loss(five)):
        with pytest.raises(errors.DataError, match=r"at least 5 classes; this method has 3.*with_classes\(5\)"):
            call()
    assert method.with_classes(5).loss(five).isfinite()  # control


def test_with_classes_says_what_it_cannot_copy():
    with pytest.raises(errors.OptionError, match="no data yet"):
        classifier().with_classes(4)
    with pytest.raises(errors.UnsupportedError, match="Categorical"):
        stirred(bm.Versa(network_model()), ragged()).with_classes(4)
    laplace = network_model(bm.likelihoods.Categorical(3), features=2, outputs=3, prior="laplace")
    with pytest.raises(errors.UnsupportedError, match="Laplace"):
        stirred(bm.Versa(laplace), classes()).with_classes(4)
    with pytest.raises(errors.OptionError, match="at least 2"):
        stirred(classifier(), classes()).with_classes(1)
