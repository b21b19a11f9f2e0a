"""The hierarchical Bayesian neural network in NumPyro, as a peer; see ``_numpyro_svi.py``."""

# mypy: ignore-errors
# (it runs in the peers' environment, which has what it imports)
import jax.numpy as jnp
import numpyro.distributions as dist
from _numpyro_svi import serve
from numpyro import plate, sample

HIDDEN = 10


def model(x, y):
    spread = sample("spread", dist.HalfNormal(1.0))
    noise = sample("noise", dist.HalfNormal(1.0))
    with plate("groups", len(x)):
        w1 = sample("w1", dist.Normal(0.0, spread).expand([len(x), HIDDEN]).to_event(1))
        b1 = sample("b1", dist.Normal(0.0, spread).expand([len(x), HIDDEN]).to_event(1))
        w2 = sample("w2", dist.Normal(0.0, spread).expand([len(x), HIDDEN]).to_event(1))
        b2 = sample("b2", dist.Normal(0.0, spread))
        hidden = jnp.tanh(x * w1[:, None] + b1[:, None])
        mean = (hidden * w2[:, None]).sum(-1) + b2[:, None]
        sample("y", dist.Normal(mean, noise).to_event(1), obs=y)


if __name__ == "__main__":
    serve(model)
