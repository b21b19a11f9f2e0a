"""One contract for every method: a new one is a row in METHODS.

What a method cannot do it says by a typed error, and the test is skipped by that error's words.
"""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import bayesmeta as bm
from bayesmeta import errors
from tests.programs import TwoSites, batch_of

F32, F64 = torch.float32, torch.float64
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"))]


@dataclass
class Case:
    """A method, its options here, and what its posterior is like.

    Attributes:
        make: the class.
        options: for a network on sinusoids with noise of scale 0.5.
        program: other options for a user's program.
        prior, task_modules: of the network model.
        is_point: whether the posterior is a Delta.
        learns: whether adapting to ten points must beat the start on the query after a short training; None where
            that takes longer, and the method's own tests see to it.
        steps, rate: of that training; a recognition network begins with nothing.
        own: for a method that makes its own network, what it takes in place of a network model.
        noisy: whether its loss has noise in it, though not that of all of its class.
        embedded: whether the inputs go through an embedding first, which all tasks share.
    """

    make: Any
    options: dict[str, Any] = field(default_factory=dict)
    program: dict[str, Any] = field(default_factory=dict)
    prior: str = "point"
    task_modules: str = "all"
    is_point: bool = True
    learns: bool | None = True
    steps: int = 150
    rate: float = 3e-3
    own: Any = None
    noisy: bool = False
    embedded: bool = False


def predicted_scale():
    return bm.likelihoods.HeteroscedasticGaussian(0.05)


METHODS = {
    "multi_task": Case(bm.MultiTask, learns=False),
    "maml": Case(bm.MAML, {"inner_lr": 0.01}),
    "fomaml": Case(bm.MAML, {"inner_lr": 0.01, "first_order": True}),
    "maml_joint": Case(bm.MAML, {"inner_lr": 0.01, "objective": "joint"}, prior="normal"),
    "maml_multi_step": Case(bm.MAML, {"inner_lr": 0.01, "inner_steps": 3, "step_weights": "uniform"}),
    "meta_sgd": Case(bm.MetaSGD, {"inner_lr": 0.01}),
    "anil": Case(bm.ANIL, {"inner_lr": 0.01}),
    "boil": Case(bm.BOIL, {"inner_lr": 0.01}),
    "reptile": Case(bm.Reptile, {"inner_lr": 0.01}),
    "cavia": Case(bm.CAVIA, {"inner_lr": 0.1}),
    "implicit_maml": Case(bm.ImplicitMAML, {"inner_lr": 0.01, "inner_steps": 5}),
    "bmaml": Case(
        bm.BMAML, {"inner_lr": 0.05, "inner_steps": 3, "objective": "predictive"}, prior="normal", is_point=False
    ),
    "bmaml_chaser": Case(bm.BMAML, {"inner_lr": 0.05}, is_point=False),
    "platipus": Case(bm.Platipus, {"inner_lr": 0.01, "learn": "parameter"}, is_point=False),
    "platipus_prior": Case(bm.Platipus, {"inner_lr": 0.01, "bound": "prior"}, is_point=False),
    "abml": Case(bm.ABML, {"inner_lr": 0.01, "num_particles": 2}, prior="normal", is_point=False),
    "abml_local": Case(
        bm.ABML, {"inner_lr": 0.01, "num_particles": 2, "noise": "local"}, prior="normal", is_point=False
    ),
    "abml_laplace": Case(bm.ABML, {"inner_lr": 0.01, "num_particles": 2}, prior="laplace", is_point=False),
    "abml_horseshoe": Case(
        bm.ABML, {"inner_lr": 0.01, "num_particles": 2, "global_guide": "normal"}, prior="horseshoe", is_point=False
    ),
    "abml_full": Case(
        bm.ABML,
        {"inner_lr": 0.01, "num_particles": 2, "posterior": "full"},
        prior="normal",
        task_modules="0",
        is_point=False,
    ),
    "abml_low_rank": Case(
        bm.ABML,
        {"inner_lr": 0.01, "num_particles": 2, "posterior": "low_rank", "rank": 2, "kl_weight": 0.5},
        prior="normal",
        is_point=False,
    ),
    "laplace": Case(
        bm.Laplace,
        {"inner_steps": 1, "inner_lr": 1.0, "solver": "newton"},
        {"inner_lr": 0.5},
        prior="normal",
        task_modules="head",
        is_point=False,
    ),
    "laplace_evidence": Case(
        bm.Laplace,
        {"inner_steps": 1, "inner_lr": 1.0, "solver": "newton", "curvature": "full", "objective": "evidence"},
        {"inner_steps": 5, "inner_lr": 0.05, "solver": "gradient", "curvature": "diagonal_ggn"},
        prior="normal",
        task_modules="head",
        is_point=False,
    ),
    "laplace_kronecker": Case(
        bm.Laplace,
        {"inner_steps": 1, "inner_lr": 0.5, "solver": "newton", "curvature": "kronecker"},
        prior="normal",
        is_point=False,
    ),
    "last_layer": Case(bm.BayesianLastLayer, prior="normal", task_modules="head", is_point=False),
    "last_layer_low_rank": Case(bm.BayesianLastLayer, prior="low_rank", task_modules="head", is_point=False),
    "last_layer_gamma": Case(
        bm.BayesianLastLayer, {"noise": "inverse_gamma"}, prior="normal", task_modules="head", is_point=False
    ),
    "last_layer_mixture": Case(
        bm.BayesianLastLayerMixture, {"num_components": 3}, prior="normal", task_modules="head", is_point=False
    ),
    "last_layer_mixture_gamma": Case(
        bm.BayesianLastLayerMixture,
        {"num_components": 3, "noise": "inverse_gamma"},
        prior="normal",
        task_modules="head",
        is_point=False,
    ),
    "deep_kernel": Case(bm.DeepKernel, is_point=False),
    "deep_kernel_both": Case(bm.DeepKernel, {"inputs": "both", "kernel": "matern52"}, is_point=False),
    "pacoh": Case(
        bm.PACOH,
        {"base_learner": "gp", "num_particles": 2, "num_tasks": 20, "hyper_prior_weight": 1e-3},
        is_point=False,
    ),
    "pacoh_map": Case(
        bm.PACOH,
        {"base_learner": "gp", "hyper_posterior": "map", "num_tasks": 20, "hyper_prior_weight": 1e-3},
        is_point=False,
    ),
    "pacoh_network": Case(
        bm.PACOH,
        {"num_particles": 2, "num_tasks": 20, "posterior_particles": 5, "posterior_steps": 30},
        prior="normal",
        is_point=False,
        learns=None,
        steps=40,
        rate=0.02,
    ),
    # the mean of single observations learns more slowly: tests/test_amortised.py
    "amortised": Case(
        bm.Amortised,
        {"width": 32, "encoder": "attention"},
        prior="normal",
        task_modules="head",
        is_point=False,
        steps=200,
        rate=0.01,
    ),
    "amortised_full": Case(
        bm.Amortised,
        {"width": 32, "posterior": "full", "objective": "predictive", "encoder": "transformer"},
        prior="normal",
        task_modules="head",
        is_point=False,
    ),
    "amortised_flow": Case(
        bm.Amortised,
        {"width": 16, "posterior": "flow"},
        prior="normal",
        task_modules="head",
        is_point=False,
        learns=None,
    ),
    "neural_process": Case(bm.NeuralProcess, {"width": 32, "latent_size": 4}, is_point=False, learns=None),
    "neural_process_product": Case(
        bm.NeuralProcess,
        {"width": 32, "latent_size": 4, "encoder": "product", "objective": "likelihood", "decoder": "film"},
        is_point=False,
        steps=300,
        rate=0.01,
    ),
    "versa": Case(bm.Versa, {"width": 32}, prior="normal", task_modules="head", is_point=False, steps=300, rate=0.01),
    "semi_amortised": Case(
        bm.SemiAmortised,
        {"inner_steps": 2, "num_particles": 2},
        prior="normal",
        task_modules="head",
        is_point=False,
        learns=None,
    ),
    "semi_amortised_first_order": Case(
        bm.SemiAmortised,
        {"inner_steps": 3, "first_order": True},
        prior="normal",
        task_modules="head",
        is_point=False,
        learns=None,
    ),
    "mr_maml_weights": Case(
        bm.MAML, {"inner_lr": 0.01, "meta_regularization": bm.MetaRegularization("weights", 1e-3)}, embedded=True
    ),
    "mr_maml_activations": Case(
        bm.MAML, {"inner_lr": 0.01, "meta_regularization": bm.MetaRegularization("activations", 1e-3)}, embedded=True
    ),
    "mr_amortised": Case(
        bm.Amortised,
        {"width": 32, "meta_regularization": bm.MetaRegularization("weights", 1e-3, scale=0.03)},
        prior="normal",
        task_modules="head",
        is_point=False,
        learns=None,
        embedded=True,
    ),
    "mr_neural_process": Case(
        bm.NeuralProcess,
        {"width": 32, "latent_size": 4, "meta_regularization": bm.MetaRegularization("activations", 1e-3)},
        is_point=False,
        learns=None,
        embedded=True,
    ),
    "mr_conditional_neural_process": Case(
        bm.ConditionalNeuralProcess,
        {"width": 32, "latent_size": 16, "meta_regularization": bm.MetaRegularization("weights", 1e-3, scale=0.03)},
        learns=None,
        embedded=True,
    ),
    "conditional_neural_process": Case(bm.ConditionalNeuralProcess, {"width": 32, "latent_size": 16}),
    "process": Case(bm.ProcessMethod, own=lambda: bm.ProcessModel("deep_set", width=32)),
    "attentive": Case(bm.AttentiveNeuralProcess, {"width": 16, "blocks": 1}, own=predicted_scale),
    "attentive_latent": Case(
        bm.AttentiveNeuralProcess,
        {"width": 16, "latent_size": 3},
        own=predicted_scale,
        is_point=False,
        noisy=True,
    ),
    "conv_cnp": Case(bm.ConvCNP, {"width": 16, "points_per_unit": 8.0}, own=predicted_scale),
    "gaussian_process_network": Case(bm.GaussianNeuralProcess, {"width": 16, "rank": 8}, own=predicted_scale),
    "gaussian_process_kernel": Case(
        bm.GaussianNeuralProcess,
        {"width": 16, "rank": 4, "network": "deep_set", "covariance": "kernel"},
        own=predicted_scale,
    ),
    "transformer_process": Case(bm.TransformerNeuralProcess, {"width": 16, "depth": 2}, own=predicted_scale),
}
#: they give posteriors and train nothing; and what one task draws depends on how the others' chains move
REFERENCES = {
    "nuts": Case(
        bm.NUTS, {"num_samples": 4, "warmup": 3, "num_chains": 2, "max_tree_depth": 2}, prior="normal", is_point=False
    ),
    "semi_amortised_nuts": Case(
        bm.SemiAmortised,
        {"refine": "nuts", "num_samples": 4, "warmup": 3, "num_chains": 2, "max_tree_depth": 2},
        prior="normal",
        task_modules="head",
        is_point=False,
    ),
}
#: their loss has noise in it
NOISY = (bm.ABML, bm.Amortised, bm.Laplace, bm.NeuralProcess, bm.Platipus, bm.SemiAmortised, bm.Versa)
each_method = pytest.mark.parametrize("name", METHODS)


def is_noisy(name):
    case = METHODS[name]
    return case.noisy or case.make in NOISY or "meta_regularization" in METHODS[name].options


def embed(model, case):
    """The model behind an embedding of one feature, if the case has one."""
    if not case.embedded:
        return model
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return bm.EmbeddedModel(model, bm.nets.mlp(1, [16], 1, activation="tanh"))


def on_network(name, dtype=F32, device="cpu"):
    case = (METHODS | REFERENCES)[name]
    if case.own is not None:
        return case.make(case.own(), **case.options).to(device=device, dtype=dtype)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = bm.nets.mlp(1, [16, 16], 1, activation="tanh")
    model = bm.NeuralTaskModel(network, bm.Gaussian(0.5), case.prior, task_modules=case.task_modules)
    return case.make(embed(model, case), **case.options).to(device=device, dtype=dtype)


def on_program(name, dtype=F32):
    """The method on a user's program; a typed refusal is a skip."""
    case = (METHODS | REFERENCES)[name]
    if case.prior not in ("point", "normal"):
        pytest.skip("another prior of the network is no other method for a program")
    try:
        return case.make(embed(TwoSites(), case), **(case.options | case.program)).to(dtype)
    except errors.UnsupportedError as error:
        pytest.skip(f"{name}: {error}")


def sinusoids(tasks=6, support=10, query=8, dtype=F32, device="cpu", seed=0):
    return bm.tasks.Sinusoid(noise=0.1).sample(tasks, support=support, query=query, generator=seed).to(device, dtype)


def ragged_batch(dtype=F64, tasks=5):
    support, query = batch_of(tasks, 6, dtype=dtype, ragged=True), batch_of(tasks, 5, seed=1, dtype=dtype, ragged=True)
    return bm.TaskBatch(support, query, population=tasks)


def stir(method, batch):
    """Move a recognition network away from its first weights, with which it gives the prior whatever it reads."""
    method.prepare(batch)
    if getattr(method, "recognition", None) is not None:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in method.recognition.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=F64).to(p))


def numbers(posterior):
    """The posterior's defining tensors, in one vector."""
    return torch.cat([value.flatten() for value in posterior.state().values()])


def gradient(method, batch, generator=0):
    method.zero_grad()
    method.loss(batch, generator=generator).backward()
    return torch.cat([p.grad.flatten() for p in method.parameters() if p.grad is not None])


# -- sinusoids ----------------------------------------------------------------------------------------------------


@each_method
def test_sinusoids(name):
    """A short training lowers the held-out loss; adapting beats not adapting, for all but the baseline."""
    method, held_out = on_network(name), sinusoids(60, query=40, seed=99)
    method.prepare(held_out)

    def held_out_loss():
        method.eval()
        with torch.no_grad():
            value = method.loss(held_out, generator=0).item()
        method.train()
        return value

    before = held_out_loss()
    rate, steps = 0.5 if name == "reptile" else METHODS[name].rate, METHODS[name].steps
    optimizer = torch.optim.SGD if name == "reptile" else torch.optim.Adam
    tasks = bm.tasks.Sinusoid(noise=0.1)
    bm.fit(method, tasks, steps=steps, optimizer=lambda p: optimizer(p, rate), progress=False, device="cpu", dtype=F32)
    assert held_out_loss() < before
    scored = bm.scores(method.adapt(held_out.support), held_out, num_samples=100)
    nothing = bm.TaskBatch(sinusoids(60, 0, 1).support, held_out.query)
    unadapted = bm.scores(method.adapt(nothing.support), nothing, num_samples=100)
    gain = unadapted.per_task["nll"] - scored.per_task["nll"]
    error = gain.std() / len(gain) ** 0.5
    if METHODS[name].learns:
        assert gain.mean() > 2 * error
    elif METHODS[name].learns is False:
        assert gain.abs().max() == 0


@each_method
def test_posterior_on_a_network(name):
    method, batch = on_network(name), sinusoids()
    posterior = method.adapt(batch.support, generator=3)
    assert posterior.is_point == METHODS[name].is_point
    assert posterior.num_tasks == 6
    assert posterior.predict(batch.query, 7).shape == (7, 6, 8)
    assert posterior.log_likelihood(batch.query, draws=posterior.draws(3)).shape == (3, 6, 8)
    assert all(value.shape[:2] == (4, 6) and value.isfinite().all() for value in posterior.sample(4).values())
    assert not numbers(posterior).requires_grad
    assert torch.equal(numbers(posterior), numbers(method.adapt(batch.support, generator=3)))  # one seed, one result
    assert method.loss(batch, generator=1).shape == ()
    assert torch.equal(method.loss(batch, generator=1), method.loss(batch, generator=1))
    assert method.card.assumes
    assert method.card.source


@each_method
def test_no_task_sees_another(name):
    """Other targets in the last task change neither posterior nor prediction of the others."""
    method, batch = on_network(name, F64), sinusoids(dtype=F64)
    stir(method, batch)
    y = batch.support.y.clone()
    y[-1] += 3.0
    first = method.adapt(batch.support, generator=3).predict(batch.query, 5, generator=1)
    second = method.adapt(batch.support.with_y(y), generator=3).predict(batch.query, 5, generator=1)
    assert torch.equal(first[:, :-1], second[:, :-1])
    assert name == "multi_task" or not torch.equal(first[:, -1], second[:, -1])


# -- a user's program ---------------------------------------------------------------------------------------------


@each_method
def test_a_program_with_a_global_and_two_local_sites(name):
    method, batch = on_program(name, F64), ragged_batch()
    loss = method.loss(batch, generator=0)
    assert loss.isfinite()
    assert gradient(method, batch).abs().sum() > 0
    posterior = method.adapt(batch.support)
    sites = posterior.sample(6)
    assert set(sites) == {"slope", "sigma"}
    assert all(value.shape == (6, 5) for value in sites.values())
    assert (sites["sigma"] > 0).all()
    assert posterior.named_theta(posterior.draws(6))["mu"].shape == (6,)
    assert posterior.predict(batch.query, 4).shape == (4, 5, 5)
    with torch.no_grad():
        before = method.eval().loss(batch, generator=0).item()
    method.train()
    optimizer = torch.optim.Adam(method.parameters(), 0.02)
    for step in range(60):
        optimizer.zero_grad()
        method.loss(batch, generator=step).backward()
        optimizer.step()
    with torch.no_grad():
        values = torch.stack([method.eval().loss(batch, generator=i) for i in range(20)])
    assert values.mean() < before + 2 * values.std()


@each_method
def test_model_and_guide_are_pyro_callables(name):
    import pyro

    method, batch = on_program(name, F64), ragged_batch()
    method.prepare(batch)
    with torch.random.fork_rng():
        try:
            guide = pyro.poutine.trace(method.guide).get_trace(batch)
        except errors.UnsupportedError as error:
            pytest.skip(f"{name}: {error}")
        model = pyro.poutine.trace(pyro.poutine.replay(method.model, trace=guide)).get_trace(batch)
    assert {"mu", "slope", "sigma"} <= set(guide.nodes)
    assert torch.isfinite(torch.as_tensor(model.log_prob_sum()))


# -- ragged tasks, one task, no support ---------------------------------------------------------------------------


def with_other_padding(observations):
    """The same observations with other (finite) numbers where the mask is False."""
    mask = observations.mask
    x = torch.where(mask.unsqueeze(-1), observations.x, 7.0)
    return bm.Observations(x, torch.where(mask, observations.y, -5.0), mask, observations.w)


def on_either(name, kind, dtype=F64):
    return on_network(name, dtype) if kind == "network" else on_program(name, dtype)


@pytest.mark.parametrize("kind", ["network", "program"])
@each_method
def test_padding_never_counts(name, kind):
    method, batch = on_either(name, kind), ragged_batch()
    other = bm.TaskBatch(
        with_other_padding(batch.support), with_other_padding(batch.query), population=batch.population
    )
    assert torch.equal(numbers(method.adapt(batch.support)), numbers(method.adapt(other.support)))
    # sums over shots may associate otherwise: rounding only
    torch.testing.assert_close(gradient(method, batch), gradient(method, other), rtol=1e-9, atol=1e-9)
    y = torch.where(batch.query.mask, batch.query.y + 1.0, batch.query.y)  # control: what is real does count
    moved = bm.TaskBatch(batch.support, batch.query.with_y(y), population=5)
    assert not torch.equal(gradient(method, batch), gradient(method, moved))


@each_method
def test_padding_tasks_never_count(name):
    method, batch = on_network(name, F64), ragged_batch()
    ids = torch.tensor([0, 1, 2, 3, -1])
    padded = bm.TaskBatch(batch.support, batch.query, ids, population=5)
    y = batch.query.y.clone()
    y[-1] += 9.0
    other = bm.TaskBatch(batch.support, batch.query.with_y(y), ids, population=5)
    torch.testing.assert_close(gradient(method, padded), gradient(method, other), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["network", "program"])
@each_method
def test_one_task_alone(name, kind):
    method, batch = on_either(name, kind), ragged_batch()
    method.prepare(batch)
    alone = batch.tasks([2])
    posterior = method.adapt(alone.support)
    assert posterior.predict(alone.query, 3).shape == (3, 1, 5)
    assert method.loss(alone).isfinite()
    if is_noisy(name):
        return  # draws its noise in the shape of the batch
    each = {key: value for key, value in posterior.state().items() if key != "theta"}
    together = method.adapt(batch.support).state()
    # particles under each of several priors have two dimensions before the tasks'
    dim = 2 if name == "pacoh_network" else 0 if "last_layer" in name or "deep_kernel" in name else 1
    # a point and a Normal have a dimension for draws of θ first
    for key, value in each.items():
        torch.testing.assert_close(value, together[key].index_select(dim, torch.tensor([2])), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("how", ["no shots", "all masked"])
@pytest.mark.parametrize("kind", ["network", "program"])
@each_method
def test_no_support_is_the_methods_own_beginning(name, kind, how):
    """The posterior is the start (a point) or the prior (a density), exactly, and training on such tasks works."""
    method, batch = on_either(name, kind), ragged_batch()
    method.prepare(batch)
    if how == "no shots":
        empty = bm.Observations(torch.zeros(5, 0, 1, dtype=F64), torch.zeros(5, 0, dtype=F64))
    else:
        support = batch.support
        empty = bm.Observations(support.x, support.y, torch.zeros_like(support.mask))
    posterior = method.adapt(empty)
    theta = getattr(posterior, "theta", None)
    if isinstance(posterior, bm.ConjugatePosterior):  # no one Gaussian: its density is the prior's everywhere
        u, _ = method.program.sample_prior(4, empty, 1)
        with torch.no_grad():
            expected = method.program.log_prior(u, empty)
        torch.testing.assert_close(posterior.log_prob(u), expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(posterior.log_evidence, torch.zeros(5, dtype=F64))
        assert gradient(method, bm.TaskBatch(empty, batch.query, population=5)).isfinite().all()
        return
    if METHODS[name].is_point:
        start = method._start(empty).expand_as(posterior.u)
        torch.testing.assert_close(posterior.u, start.detach(), rtol=1e-12, atol=1e-12)
    elif METHODS[name].make is bm.BMAML:
        assert torch.equal(posterior.u, method._start(empty).detach())
    elif METHODS[name].make is bm.Platipus:  # draws of the start
        z = ((posterior.u - method._start(empty)) / method.log_scale.exp()).detach()
        assert z.mean().abs() < 4 / z.numel() ** 0.5
        assert (z.square().mean() - 1).abs() < 4 * (2 / z.numel()) ** 0.5
    elif name == "pacoh_network":  # draws of each prior
        loc, log_scale = theta[:, None, None].tensor_split(2, -1)
        z = (posterior.u - loc) / log_scale.exp()
        assert z.mean().abs() < 4 / z[:, :, 0].numel() ** 0.5  # the same in every task
        assert (z.square().mean() - 1).abs() < 4 * (2 / z[:, :, 0].numel()) ** 0.5
    else:
        loc, scale = method.program.prior_moments(empty, theta)
        torch.testing.assert_close(posterior.loc, loc.detach().expand_as(posterior.loc), rtol=1e-9, atol=1e-12)
        found = (
            posterior.scale if hasattr(posterior, "scale") else posterior.covariance.diagonal(dim1=-2, dim2=-1).sqrt()
        )
        torch.testing.assert_close(found, scale.detach().expand_as(found), rtol=1e-9, atol=1e-12)
    assert gradient(method, bm.TaskBatch(empty, batch.query, population=5)).isfinite().all()


# -- dtypes and devices -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["network", "program"])
@each_method
def test_dtypes_and_devices(name, kind, device):
    """Both dtypes give the same loss and gradient up to single precision, in their own dtype and on the device."""
    results = {}
    for dtype in (F32, F64):
        method, batch = on_either(name, kind, dtype).to(device), ragged_batch(F64).to(device, dtype)
        method.prepare(batch)
        posterior = method.adapt(batch.support)
        assert numbers(posterior).dtype == dtype
        assert posterior.predict(batch.query, 3).dtype == dtype
        assert posterior.predict(batch.query, 3).device.type == device
        assert all(p.dtype == dtype for p in method.parameters())
        if is_noisy(name):
            assert method.loss(batch).dtype == dtype  # noise of another dtype is other noise
            continue
        results[dtype] = method.loss(batch).double(), gradient(method, batch).double()
    if results:
        (loss, slope), (exact, expected) = results[F32], results[F64]
        torch.testing.assert_close(loss, exact, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(slope, expected, rtol=5e-3, atol=5e-3 * expected.abs().max().item())


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("kind", ["network", "program"])
@pytest.mark.parametrize("name", REFERENCES)
def test_a_reference_posterior(name, kind, dtype):
    """What holds of a method without a loss: shapes, seeds, dtype, padding, and a refusal to train."""
    method, batch = on_either(name, kind, dtype), ragged_batch().to(dtype=dtype)
    posterior = method.adapt(batch.support, generator=3)
    assert posterior.is_point == REFERENCES[name].is_point
    assert {value.dtype for name, value in posterior.state().items() if name in ("u", "theta")} == {dtype}
    assert not numbers(posterior).requires_grad
    assert torch.equal(numbers(posterior), numbers(method.adapt(batch.support, generator=3)))
    assert torch.equal(posterior.u, method.adapt(with_other_padding(batch.support), generator=3).u)
    y = torch.where(batch.support.mask, batch.support.y + 1.0, batch.support.y)  # control: what is real does count
    assert not torch.equal(posterior.u, method.adapt(batch.support.with_y(y), generator=3).u)
    assert posterior.predict(batch.query, 7).shape == (7, 5, 5)
    assert posterior.log_likelihood(batch.query, draws=posterior.draws(3)).shape == (3, 5, 5)
    assert all(value.shape[:2] == (4, 5) and value.isfinite().all() for value in posterior.sample(4).values())
    with pytest.raises(errors.UnsupportedError, match="has no loss"):
        method.loss(batch)
    assert method.card.assumes
    assert method.card.source


def test_every_method_is_in_the_table():
    from bayesmeta import _NAMES

    objects = {name: getattr(bm, name) for name, module in _NAMES.items() if module.startswith("bayesmeta.adapt.")}
    there = {name for name, value in objects.items() if isinstance(value, type) and issubclass(value, bm.Method)}
    assert there - {"Method"} == {case.make.__name__ for case in (METHODS | REFERENCES).values()}
