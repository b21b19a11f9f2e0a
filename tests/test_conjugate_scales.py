"""Last layers with unknown noise: where their priors begin, and outputs that are nearly proportional."""

import pytest
import torch

import bayesmeta as bm
from bayesmeta import errors

F32, F64 = torch.float32, torch.float64


def network(outputs):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return bm.nets.mlp(2, [4], outputs, activation="tanh")


def inputs(tasks=2, shots=5, dtype=F64):
    return torch.randn(tasks, shots, 2, generator=torch.Generator().manual_seed(0), dtype=F64).to(dtype)


def prior_scale(model, x):
    """Scale of the predictive without a support."""
    nothing = bm.Observations(x[:, :0], x.new_zeros(len(x), 0, model.outputs).squeeze(-1))
    method = bm.BayesianLastLayer(model) if model.num_components == 1 else bm.BayesianLastLayerMixture(model)
    fn = method.adapt(nothing).predictive(x)
    fn = fn.base_dist if isinstance(fn, torch.distributions.Independent) else fn
    if isinstance(fn, torch.distributions.Normal | torch.distributions.StudentT):
        return fn.scale
    return (fn.scale_tril @ fn.scale_tril.mT).diagonal(dim1=-2, dim2=-1).sqrt()


# -- where the prior begins ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("outputs", "noise_scale"), [(1, 0.2), (3, 0.2), (3, [0.2, 0.5, 4.0])])
@pytest.mark.parametrize("made", ["scale", "of"])
@pytest.mark.parametrize("noise", ["inverse_gamma", "inverse_wishart"])
def test_inferred_noise_begins_where_known_noise_does(noise, made, outputs, noise_scale):
    """The prior of the weights is in units of the noise, so that whatever the noise their own scale is that asked for.

    So the first predictive has the same scale as with the noise known; an inverse-Wishart, whose first scatter is
    (P + 5) σ² with P + 5 degrees of freedom, has (P + 5) / 6 of its square.
    """
    if noise == "inverse_wishart" and (outputs == 1 or isinstance(noise_scale, list)):
        pytest.skip("one scale of the weights for all outputs: equal only for equal noise")

    def model(kind):
        likelihood = bm.Gaussian(noise_scale)
        if made == "scale":
            return bm.ConjugateModel(network(outputs), likelihood, noise=kind, scale=1.7).double()
        prior = bm.priors.Normal(0.6)
        start = bm.NeuralTaskModel(network(outputs), likelihood, prior, task_modules="head").double()
        return bm.ConjugateModel.of(start, noise=kind).double()

    x = inputs()
    with torch.no_grad():
        found, known = prior_scale(model(noise), x), prior_scale(model("known"), x)
        factor = ((outputs + 5) / 6) ** 0.5 if noise == "inverse_wishart" else 1.0
        torch.testing.assert_close(found, factor * known, rtol=1e-5, atol=0)  # parameters begin in float32
        other = model(noise)
        other.log_scale.add_(1e-3)  # control: the check can see a thousandth
        assert (prior_scale(other, x) / known / factor - 1).abs().max() > 1e-4


# -- outputs that are nearly proportional -------------------------------------------------------------------------


def proportional(scale, dtype):
    """Two outputs, the second exactly twice the first, and the same numbers in any dtype."""
    x, generator = inputs(2, 8, F32), torch.Generator().manual_seed(1)
    first = scale * torch.randn(2, 8, generator=generator)
    y = torch.stack([first, 2 * first], -1)
    model = bm.ConjugateModel(network(2), bm.Gaussian(0.1), noise="inverse_wishart").to(dtype)
    x, y = x.to(dtype), y.to(dtype)
    return bm.BayesianLastLayer(model), bm.Observations(x[:, :5], y[:, :5]), bm.Observations(x[:, 5:], y[:, 5:])


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e4, 1e6])
def test_proportional_outputs_in_single_precision(scale):
    """As in float64: predictive, evidence, update; draws have a covariance with a Cholesky factor of its own."""
    found, exact = [], []
    for dtype, into in ((F32, found), (F64, exact)):
        method, support, query = proportional(scale, dtype)
        posterior = method.adapt(support)
        for after in (posterior, posterior.update(query)):
            fn = after.predictive(query.x)
            assert fn.scale_tril.dtype == dtype
            assert after.log_evidence.dtype == after.draws(2, 1).u.dtype == dtype
            small = fn.scale_tril[..., 1, 1]  # how far the second output may be from twice the first
            into.append([part.double() for part in (after.log_evidence, small, fn.scale_tril[..., 0, 0] / scale)])
        draws = posterior.draws(3, 1)
        assert posterior.log_prob(draws.u).isfinite().all()
        assert posterior.predict(query.x, 3, generator=1).isfinite().all()
        assert all(value.isfinite().all() for value in posterior.sample(3, 1).values())
    for one, other in zip(found, exact, strict=True):
        for a, b in zip(one, other, strict=True):
            # Ψ has a condition near 500 scale², and half of the digits that it takes are lost in its smaller root
            rounding = 0.5 * 500 * scale**2 * torch.finfo(F64).eps
            torch.testing.assert_close(a, b, rtol=max(1e-4, rounding), atol=1e-4)
    assert exact[0][1].max() < 2.0  # control: the outputs are nearly proportional…
    scatter = posterior.belief.scatter.float()
    if scale >= 1e4:  # … so that float32 cannot hold their scatter
        assert (torch.linalg.cholesky_ex(scatter).info > 0).any()


def test_a_scatter_that_float64_cannot_hold_is_named():
    method, support, query = proportional(1.0, F32)
    posterior = method.adapt(support)
    tensors = dict(posterior.belief.tensors)
    tensors["scatter"] = tensors["scatter"].clone()
    tensors["scatter"][1] = torch.tensor([[1.0, 2.0], [2.0, 4.0]])
    broken = bm.ConjugatePosterior(method.program, support, posterior.log_joint_component, **tensors)
    for act in (
        lambda: broken.predictive(query.x),
        lambda: broken.draws(2),
        lambda: broken.log_prob(torch.zeros(2, 13)),
    ):
        with pytest.raises(errors.DataError, match=r"1 task\(s\), counted from 0: 1\. Outputs may be linear"):
            act()
    assert posterior.predictive(query.x).scale_tril.isfinite().all()  # control
    for scale in (1e7, 1e9, 1e12):  # found by adapt itself, or else by who needs the factor
        method, support, query = proportional(scale, F64)
        with pytest.raises(errors.DataError, match="to working precision"):
            method.adapt(support).predictive(query.x)
