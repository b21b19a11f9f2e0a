"""The radon hierarchy in NumPyro, as a peer: the jitted ``SVI.update`` and its ``lax.scan``. Needs NumPyro alone.

The argument is an npz file of county, floor, uranium and y. Answers on standard output: ``{"update": n}`` and
``{"scan": n}`` the CPU seconds of n steps, ``{"loss": n}`` the mean loss of n draws at the parameters as they are.
"""

# mypy: ignore-errors
# (it runs in the peers' environment, which has what it imports)
import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import lax, random
from numpyro import plate, sample
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from numpyro.optim import Adam


def model(county, floor, uranium, y):
    mean = sample("mean", dist.Normal(0.0, 10.0))
    slope = sample("slope", dist.Normal(0.0, 10.0))
    gain = sample("gain", dist.Normal(0.0, 10.0))
    spread = sample("spread", dist.HalfNormal(1.0))
    noise = sample("noise", dist.HalfNormal(1.0))
    with plate("counties", len(uranium)):
        level = sample("level", dist.Normal(mean + gain * uranium, spread))
    with plate("houses", len(y)):
        sample("y", dist.Normal(level[county] + slope * floor, noise), obs=y)


def main(path, rate):
    with np.load(path) as file:
        given = [jnp.asarray(file[name]) for name in ("county", "floor", "uranium", "y")]
    svi = SVI(model, AutoNormal(model), Adam(rate), Trace_ELBO())
    state = svi.init(random.PRNGKey(0), *given)
    update = jax.jit(svi.update)
    steps = jax.jit(lambda state, n: lax.fori_loop(0, n, lambda _, s: svi.update(s, *given)[0], state))
    evaluate = jax.jit(lambda state, key: svi.evaluate(state._replace(rng_key=key), *given))
    for line in sys.stdin:
        request = json.loads(line)
        if "loss" in request:
            keys = random.split(random.PRNGKey(7), request["loss"])
            print(json.dumps({"loss": float(np.mean([float(evaluate(state, key)) for key in keys]))}), flush=True)
            continue
        begin = time.process_time()
        if "scan" in request:
            state = jax.block_until_ready(steps(state, request["scan"]))
        else:
            for _ in range(request["update"]):
                state, loss = update(state, *given)
                float(loss)  # as the other sides' steps, which return their loss
        print(json.dumps({"seconds": time.process_time() - begin}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
