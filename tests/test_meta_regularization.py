"""Meta-regularisation: penalties by hand, gradients by finite differences, and learners that use their supports."""

import math

import pytest
import torch

import bayesmeta as bm
from bayesmeta import errors
from tests.programs import TwoSites, batch_of

F64 = torch.float64
KINDS = ["weights", "activations"]


def batch(tasks=4, support=5, query=3, features=2, seed=0, **options):
    return bm.TaskBatch(
        batch_of(tasks, support, features, seed, F64, **options),
        batch_of(tasks, query, features, seed + 1, F64, **options),
    )


def embedded(width=3, hidden=(4,), seed=0, embedding=None):
    """A small network behind an embedding of two features."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = bm.nets.mlp(width, list(hidden), 1, activation="tanh")
        embedding = bm.nets.mlp(2, [6], width, activation="tanh") if embedding is None else embedding
    model = bm.NeuralTaskModel(network, bm.Gaussian(0.5), "point")
    return bm.EmbeddedModel(model, embedding).to(F64)


def maml(option=None, **options):
    return bm.MAML(embedded(**options), inner_steps=2, inner_lr=0.05, meta_regularization=option)


def cnp(option=None, **options):
    return bm.ConditionalNeuralProcess(embedded(**options), latent_size=4, width=8, meta_regularization=option).to(F64)


def process(option=None, **options):
    return bm.NeuralProcess(embedded(**options), latent_size=2, width=8, meta_regularization=option).to(F64)


def amortised(option=None):
    model = bm.NeuralTaskModel(torch.nn.Linear(3, 1), bm.Gaussian(0.5), "normal")
    embedding = bm.nets.mlp(2, [6], 3, activation="tanh")
    return bm.Amortised(bm.EmbeddedModel(model, embedding), width=8, meta_regularization=option).to(F64)


METHODS = {"maml": maml, "cnp": cnp, "neural_process": process, "amortised": amortised}
each_method = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
each_kind = pytest.mark.parametrize("kind", KINDS)


def silence(method):
    """Set the noise to exactly 0."""
    noise = method.embedding_noise
    with torch.no_grad():
        (noise.log_scale if noise.options.kind == "weights" else noise.spread.bias).fill_(-math.inf)


# -- an embedded model is the model at what the embedding gives -------------------------------------------------------


def test_an_embedded_model_is_the_model_at_embedded_inputs():
    model, data = embedded(), batch(ragged=True)
    inside, raw = model.model, data.support
    seen = bm.Observations(model.embedding(raw.x), raw.y, raw.mask)
    model.prepare(raw)
    u = torch.randn(2, 4, model.layout.dim, dtype=F64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    torch.testing.assert_close(model.log_likelihood(u, raw), inside.log_likelihood(u, seen), rtol=0, atol=0)
    assert not torch.equal(
        model.log_likelihood(u, raw), inside.log_likelihood(u, bm.Observations(seen.x + 1, raw.y, raw.mask))
    )
    for create_graph in (False, True):
        ours = model.log_likelihood_gradient(u, raw, create_graph=create_graph)
        theirs = inside.log_likelihood_gradient(u, seen, create_graph=create_graph)
        torch.testing.assert_close(ours, theirs)
    second = [
        torch.autograd.grad(g.square().sum(), model.embedding[0].weight, retain_graph=True) for g in (ours, theirs)
    ]
    torch.testing.assert_close(*second)
    torch.testing.assert_close(model.predictive(u, raw).mean, inside.predictive(u, seen).mean, rtol=0, atol=0)
    drawn, expected = model.predict(u, raw, 3), inside.predict(u, seen, 3)
    assert torch.equal(drawn, expected)
    with model.embedded():
        torch.testing.assert_close(model.log_likelihood(u, seen), inside.log_likelihood(u, seen), rtol=0, atol=0)


def test_the_first_layers_of_a_network_may_be_the_embedding():
    """MAML on a Sequential whose first layers are shared, and on the same layers as an embedding, are one method."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        whole = bm.nets.mlp(2, [6, 5], 1, activation="tanh").to(F64)
    likelihood, data = bm.Gaussian(0.5), batch(ragged=True)
    one = bm.MAML(bm.NeuralTaskModel(whole, likelihood, "point", task_modules=["2", "4"]), inner_steps=3, inner_lr=0.1)
    parts = bm.EmbeddedModel(bm.NeuralTaskModel(whole[2:], likelihood, "point"), whole[:2])
    two = bm.MAML(parts, inner_steps=3, inner_lr=0.1)
    losses = [method.loss(data) for method in (one, two)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(one.program.network[0].weight.grad, two.program.embedding[0].weight.grad)
    predicted = [method.adapt(data.support).predictive(data.query).mean for method in (one, two)]
    torch.testing.assert_close(*predicted)
    assert not torch.allclose(
        predicted[0], bm.MAML(parts, inner_lr=0.1).adapt(data.support).predictive(data.query).mean
    )


def test_a_pyro_program_behind_an_embedding():
    """Pyro's own trace, with global sites, has the density that the model says."""
    import pyro

    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = bm.EmbeddedModel(TwoSites(), bm.nets.mlp(2, [4], 1)).to(F64)
    data = batch_of(3, 4, 2, dtype=F64)
    model.prepare(data)
    u, theta = torch.randn(3, 2, dtype=F64), torch.randn(1, dtype=F64)
    trace = pyro.poutine.trace(pyro.poutine.condition(model, {"mu": theta[0], **_sites(model, u, data, theta)}))
    found = trace.get_trace(data.x, data.y)
    found.compute_log_prob()
    torch.testing.assert_close(found.nodes["y"]["log_prob"], model.log_likelihood(u, data, theta))


def _sites(model, u, data, theta):
    return {name: value.unsqueeze(-1) for name, value in model.named(u, data, theta).items()}


# -- the penalty --------------------------------------------------------------------------------------------------


def by_hand(loc, scale, prior):
    """KL(N(loc, scale²) ‖ N(0, prior²)) of each number, from the definition in full."""
    return torch.log(torch.as_tensor(prior, dtype=F64)) - scale.log() + (scale**2 + loc**2) / (2 * prior**2) - 0.5


@each_method
def test_the_penalty_on_weights_by_hand(make):
    """The loss under two weights differs by that of the KL, once a batch: it does not grow with the tasks."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        plain, heavy = (make(bm.MetaRegularization("weights", w, scale=0.3, prior_scale=1.7)) for w in (0.0, 2.5))
    for tasks in (2, 7):
        data = batch(tasks)
        for method in (plain, heavy):
            method.prepare(data)
        heavy.load_state_dict(plain.state_dict())
        weights = torch.cat([p.detach().flatten() for p in plain.program.embedding.parameters()])
        expected = 2.5 * by_hand(weights, torch.full_like(weights, 0.3), 1.7).sum()
        difference = heavy.loss(data, generator=4) - plain.loss(data, generator=4)
        torch.testing.assert_close(difference.detach(), expected)


@each_method
def test_the_penalty_on_activations_by_hand(make):
    """It is summed over the real points that the loss scores, and averaged over tasks.

    Those of the query; under Amortised's ELBO those of the support too.
    """
    with torch.random.fork_rng():
        torch.manual_seed(2)
        plain, heavy = (make(bm.MetaRegularization("activations", w, scale=0.3, prior_scale=0.7)) for w in (0.0, 2.5))
    data = batch(5, 6, 4, ragged=True)
    for method in (plain, heavy):
        method.prepare(data)
    with torch.no_grad():
        plain.embedding_noise.spread.weight.normal_(generator=torch.Generator().manual_seed(0))
    heavy.load_state_dict(plain.state_dict())
    embedding, spread = plain.program.embedding, plain.embedding_noise.spread
    scored = data.union() if make is amortised else data.query
    hidden = embedding[:-1](scored.x)
    scale = torch.log1p(spread(hidden).exp())
    each = by_hand(embedding(scored.x), scale, 0.7).sum(-1) * scored.mask
    difference = heavy.loss(data, generator=4) - plain.loss(data, generator=4)
    torch.testing.assert_close(difference.detach(), 2.5 * each.sum(-1).mean().detach())
    assert difference != 2.5 * each.mean()


def cut(everything, shots):
    """Support and query: the first observations and the rest."""
    parts = (slice(shots), slice(shots, None))
    masks = [None if everything.mask is None else everything.mask[:, part] for part in parts]
    return bm.TaskBatch(
        *(bm.Observations(everything.x[:, p], everything.y[:, p], m) for p, m in zip(parts, masks, strict=True))
    )


@each_kind
@pytest.mark.parametrize("refined", [False, True])
@pytest.mark.parametrize("objective", ["elbo", "predictive"])
def test_under_an_elbo_of_everything_the_split_does_not_count(kind, refined, objective):
    """Noise, loss and penalty of one union, cut at 1, 3 or 6 of 7; control: an objective that scores the query."""
    option, everything = bm.MetaRegularization(kind, 3.0, scale=0.3), batch_of(4, 7, 2, 0, F64, ragged=True)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        method = amortised(option)
    method.objective = objective
    if refined:
        method = bm.SemiAmortised(method, inner_steps=2, inner_lr=0.01)
    losses = [method.loss(cut(everything, shots), generator=4).detach() for shots in (1, 3, 6)]
    apart = max(abs(loss - losses[0]) for loss in losses)
    assert (apart < 1e-9) if objective == "elbo" else (apart > 0.1)


def test_noise_on_weights_has_its_mean_and_covariance():
    """Of a linear embedding: outputs at two points of one task share a draw, those of two tasks do not."""
    linear = torch.nn.Linear(2, 1, bias=False)
    noise = bm.MAML(
        bm.EmbeddedModel(
            bm.NeuralTaskModel(torch.nn.Linear(1, 1), bm.Gaussian(1.0), "point"), torch.nn.Sequential(linear)
        ).to(F64),
        meta_regularization=bm.MetaRegularization("weights", 0.0, scale=0.4),
    )
    n = 20_000
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=F64)
    tiled = bm.Observations(x.expand(n, 2, 2), torch.zeros(n, 2, dtype=F64))
    data = bm.TaskBatch(tiled, tiled)
    seen, penalty = noise.embedding_noise(noise.program, data, torch.Generator().manual_seed(0))
    assert penalty is None
    assert torch.equal(seen.support.x, seen.query.x), "one draw for support and query"
    e = seen.support.x.squeeze(-1)
    covariance = 0.16 * x @ x.T
    centred = e - (x @ noise.program.embedding[0].weight.T).squeeze(-1)
    error = 5 * covariance.diagonal().max() / n**0.5
    assert (centred.mean(0).abs() < 5 * (covariance.diagonal() / n).sqrt()).all()
    assert ((centred.T @ centred / n) - covariance).abs().max() < 2 * error
    assert ((centred[: n // 2].T @ centred[n // 2 :]) / (n // 2)).abs().max() < 2 * error
    assert covariance.abs().max() > 10 * error, "the check can see a difference"


# -- against the plain method -----------------------------------------------------------------------------------------


@each_kind
@each_method
def test_without_noise_and_weight_it_is_the_plain_method(make, kind):
    with torch.random.fork_rng():
        torch.manual_seed(2)
        noisy, plain = make(bm.MetaRegularization(kind, 0.0)), make()
    data = batch(ragged=True)
    for method in (noisy, plain):
        method.prepare(data)
    noisy.load_state_dict(plain.state_dict(), strict=False)
    before = noisy.loss(data, generator=plain_generator()).detach()
    silence(noisy)

    def outcome(method, generator):
        method.zero_grad()
        loss = method.loss(data, generator=generator)
        loss.backward()
        slopes = [p.grad for n, p in method.named_parameters() if p.grad is not None and "embedding_noise" not in n]
        return torch.cat([loss.detach()[None], *(s.flatten() for s in slopes)])

    # the noise is drawn first, and what the method itself draws comes after it
    generator = plain_generator()
    noisy.embedding_noise(noisy.program, data, generator)
    torch.testing.assert_close(outcome(noisy, plain_generator()), outcome(plain, generator), rtol=1e-12, atol=1e-12)
    assert not torch.isclose(before, plain.loss(data, generator=generator)), "control: noise counts"


def plain_generator():
    return torch.Generator().manual_seed(5)


@each_kind
@each_method
def test_evaluation_has_neither_noise_nor_penalty(make, kind):
    with torch.random.fork_rng():
        torch.manual_seed(2)
        noisy, plain = make(bm.MetaRegularization(kind, 3.0, scale=0.5)), make()
    data = batch(ragged=True)
    for method in (noisy, plain):
        method.prepare(data)
        method.eval()
    noisy.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(noisy.loss(data), plain.loss(data))
    means = [m.adapt(data.support).predict(data.query, 3, generator=1) for m in (noisy, plain)]
    assert torch.equal(*means)
    noisy.train()
    assert not torch.isclose(noisy.loss(data), plain.loss(data))
    adapted = noisy.adapt(data.support).predict(data.query, 3, generator=1)
    assert torch.equal(adapted, means[1]), "adapt uses the mean, also of a method that is in training"


@each_kind
@each_method
def test_gradients_by_finite_differences(make, kind):
    """Of embedding, noise and all else, on frozen noise."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        method = make(bm.MetaRegularization(kind, 0.3, scale=0.2))
    if make is amortised:
        method.subsets = False  # they move the encoder by another gradient than the value's
    data = batch(ragged=True)
    method.prepare(data)
    parameters = [p for p in method.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # away from first values such as 0
        for p in parameters:
            p.add_(0.1 * torch.randn(p.shape, dtype=F64, generator=generator))
    method.loss(data, generator=4).backward()
    checked = {n for n, p in method.named_parameters() if p.grad is not None}
    assert any("embedding_noise" in n for n in checked)
    assert any("program.embedding" in n for n in checked)
    direction = [torch.randn(p.shape, dtype=F64, generator=generator) for p in parameters]
    slope = sum((p.grad * d).sum() for p, d in zip(parameters, direction, strict=True) if p.grad is not None)
    values = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(step * d)
            values.append(method.loss(data, generator=4))
    torch.testing.assert_close(slope, (values[0] - values[1]) / 2e-5, rtol=1e-6, atol=1e-6)


def test_the_encoders_subsets_do_not_move_the_embedding():
    """The gradient of the embedding is that of the ELBO of everything, with and without subsets."""
    data, slopes = batch(), []
    for subsets in (False, True):
        with torch.random.fork_rng():
            torch.manual_seed(2)
            method = amortised(bm.MetaRegularization("weights", 0.1))
        method.subsets = subsets
        method.loss(data, generator=4).backward()
        slopes.append(method.program.embedding[0].weight.grad)
    torch.testing.assert_close(*slopes, rtol=1e-12, atol=1e-12)
    assert slopes[0].abs().max() > 0


# -- that it helps ------------------------------------------------------------------------------------------------


def learners(kind, weight):
    """MAML and a conditional process that were trained on four amplitudes, which the input tells."""
    tasks = bm.tasks.NonMutuallyExclusiveSinusoid(num_amplitudes=4)
    made = {}
    for name in ("maml", "cnp"):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            likelihood = bm.Gaussian(0.7)
            model = bm.NeuralTaskModel(bm.nets.mlp(4, [32], 1, activation="tanh"), likelihood, "point")
            model = bm.EmbeddedModel(model, bm.nets.mlp(5, [32], 4, activation="tanh"))
        option = None if kind is None else bm.MetaRegularization(kind, weight)
        if name == "maml":
            method = bm.MAML(model, inner_steps=3, inner_lr=0.05, meta_regularization=option)
        else:
            method = bm.ConditionalNeuralProcess(
                model, latent_size=8, width=32, subsets=False, meta_regularization=option
            )
        bm.fit(
            method, tasks, steps=600, optimizer=lambda p: torch.optim.Adam(p, 5e-3), tasks_per_step=4, support=10,
            query=10, progress=False, device="cpu", dtype=torch.float32,
        )  # fmt: skip
        made[name] = method.eval()
    return made


def use_of_support(method):
    """Loss a point on the training amplitudes with another task's support, less that with its own, and its error."""
    tasks = bm.tasks.NonMutuallyExclusiveSinusoid(num_amplitudes=4).sample(4, support=10, query=200, generator=7)
    others = tasks.support.tasks([3, 2, 1, 0])
    x = torch.cat([others.x[..., :1], tasks.support.x[..., 1:]], -1)  # the hint stays the task's own
    wrong = bm.TaskBatch(bm.Observations(x, others.y), tasks.query)
    with torch.no_grad():
        return float(method.loss(wrong) - method.loss(tasks)) / 200


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "weight"), [("weights", 0.03), ("activations", 0.5)])
def test_a_regularised_learner_uses_its_support_and_the_plain_one_does_not(kind, weight):
    """Another support costs a regularised process a nat a point, the plain one nothing; MAML steps in any case."""
    plain, regularised = learners(None, 0.0), learners(kind, weight)
    assert use_of_support(plain["cnp"]) < 0.05
    assert use_of_support(regularised["cnp"]) > 0.5
    assert use_of_support(regularised["maml"]) > 1.5 * use_of_support(plain["maml"])


# -- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "inputs", "weight": 1.0}, "'weights' or 'activations'; got 'inputs'"),
        ({"kind": "weights", "weight": -1.0}, "weight must be 0 or more, and finite; got -1"),
        ({"kind": "weights", "weight": math.inf}, "weight must be 0 or more"),
        ({"kind": "weights", "weight": math.nan}, "weight must be 0 or more"),
        ({"kind": "weights", "weight": 1.0, "scale": 0.0}, "scale must be positive"),
        ({"kind": "weights", "weight": 1.0, "prior_scale": -2.0}, "prior_scale must be positive"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(errors.OptionError, match=message):
        bm.MetaRegularization(**options)


def test_models_that_cannot_be_regularised():
    option = bm.MetaRegularization("weights", 1.0)
    plain = bm.NeuralTaskModel(bm.nets.mlp(2, [4], 1), bm.Gaussian(0.5), "point")
    for make in (bm.MAML, bm.ConditionalNeuralProcess, bm.NeuralProcess):
        with pytest.raises(errors.UnsupportedError, match=r"bm\.EmbeddedModel\(model, embedding\)"):
            make(plain, meta_regularization=option)
    with pytest.raises(errors.OptionError, match=r"bm\.MetaRegularization or None; got 'weights'"):
        maml("weights")
    activations = bm.MetaRegularization("activations", 1.0)
    for embedding in (torch.nn.Linear(2, 3), torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh())):
        with pytest.raises(errors.UnsupportedError, match="a Sequential and ends in a Linear"):
            maml(activations, embedding=embedding)
        assert maml(option, embedding=embedding).loss(batch()).isfinite()


def test_embeddings_that_cannot_be():
    model = bm.NeuralTaskModel(bm.nets.mlp(2, [4], 1), bm.Gaussian(0.5), "point")
    with pytest.raises(errors.OptionError, match="embedding is a module"):
        bm.EmbeddedModel(model, 3)
    with pytest.raises(errors.OptionError, match="has an embedding already"):
        bm.EmbeddedModel(embedded(), torch.nn.Linear(2, 2))
    with pytest.raises(errors.ModelError, match="no parameters"):
        bm.EmbeddedModel(model, torch.nn.Tanh())
    with pytest.raises(errors.ModelError, match="hidden noise: 1"):
        bm.EmbeddedModel(model, torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.1)))
    data = batch(features=5)
    with pytest.raises(errors.ShapeError, match="cannot take x with 5 features"):
        maml().loss(data)
    with pytest.raises(errors.ShapeError, match="it gave"):
        maml(embedding=torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Flatten())).loss(batch())
    with pytest.raises(errors.ShapeError, match="network cannot take x with 4 features"):
        maml(embedding=torch.nn.Linear(2, 4)).loss(batch())
    trained = maml()
    trained.loss(batch())
    with pytest.raises(errors.ShapeError, match="x has 5 features; this model was first used with 2"):
        trained.adapt(data.support)


def test_pyros_svi_is_refused():
    import pyro

    data = batch()
    for option, refused in ((None, False), (bm.MetaRegularization("weights", 0.1), True)):
        method = amortised(option)
        svi = pyro.infer.SVI(method.model, method.guide, pyro.optim.Adam({"lr": 1e-3}), pyro.infer.Trace_ELBO())
        with torch.random.fork_rng(), pyro.get_param_store().scope():
            if not refused:
                assert math.isfinite(svi.step(data))
                continue
            with pytest.raises(errors.UnsupportedError, match="without the noise and penalty"):
                svi.step(data)


# -- state --------------------------------------------------------------------------------------------------------


@each_kind
def test_options_are_in_the_configuration_and_noise_in_the_state(kind):
    option = bm.MetaRegularization(kind, 0.25, scale=0.2)
    method = maml(option)
    assert method.config()["meta_regularization"] == {"kind": kind, "weight": 0.25, "scale": 0.2, "prior_scale": 1.0}
    assert "meta_regularization" not in maml().config()
    assert any(name.startswith("embedding_noise.") for name in method.state_dict())
    before = torch.cat([p.detach().flatten() for p in method.embedding_noise.parameters()])
    method.loss(batch()).backward()
    torch.optim.Adam(method.parameters(), 0.1).step()
    after = torch.cat([p.detach().flatten() for p in method.embedding_noise.parameters()])
    assert not torch.equal(before, after), "the noise is learned"
    other = maml(option)
    other.prepare(batch())
    other.load_state_dict(method.state_dict())
    assert torch.equal(other.loss(batch()), method.loss(batch()))
