"""What the peers in NumPyro share: the jitted ``SVI.update`` and its ``lax.fori_loop``. Needs NumPyro alone.

The arguments are an npz file and Adam's rate. The file has the model's arguments in their order, and under
``init_NAME`` the values at which the guide (AutoNormal) begins. Answers on standard output: ``{"update": n}`` and
``{"scan": n}`` the CPU seconds of n steps; ``{"train": n, "repeats": r, "draws": d}`` the losses that r trainings
reach, means over d draws; ``{"at": path, "draws": d}`` mean and standard error of the loss of the guide whose
``loc_NAME`` and ``scale_NAME`` are in that file.
"""

# mypy: ignore-errors
# (it runs in the peers' environment, which has what it imports)
import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.initialization import init_to_value
from numpyro.optim import Adam


def serve(model):
    """Answer lines of JSON until there are no more."""
    with np.load(sys.argv[1]) as file:
        given = [jnp.asarray(file[name]) for name in file.files if not name.startswith("init_")]
        first = {name.removeprefix("init_"): file[name] for name in file.files if name.startswith("init_")}
    guide, elbo = AutoNormal(model, init_loc_fn=init_to_value(values=first)), Trace_ELBO()
    svi = SVI(model, guide, Adam(float(sys.argv[2])), elbo)
    start = state = svi.init(random.PRNGKey(0), *given)
    update = jax.jit(svi.update)
    steps = jax.jit(lambda state, n: lax.fori_loop(0, n, lambda _, s: svi.update(s, *given)[0], state))
    each = jax.jit(jax.vmap(lambda key, parameters: elbo.loss(key, parameters, model, guide, *given), (0, None)))

    def losses(parameters, draws):
        return np.asarray(each(random.split(random.PRNGKey(7), draws), parameters), np.float64)

    for line in sys.stdin:
        request = json.loads(line)
        if "at" in request:
            with np.load(request["at"]) as file:
                parts = [name.split("_", 1) for name in file.files]
                parameters = {f"{name}_auto_{part}": jnp.asarray(file[f"{part}_{name}"]) for part, name in parts}
            assert parameters.keys() == svi.get_params(start).keys()
            values = losses(parameters, request["draws"])
            answer = {"loss": values.mean(), "standard_error": values.std() / len(values) ** 0.5}
        elif "train" in request:
            reached = []
            for i in range(request["repeats"]):
                state = steps(start._replace(rng_key=random.PRNGKey(100 + i)), request["train"])
                reached.append(losses(svi.get_params(state), request["draws"]).mean())
            answer = {"losses": reached}
        else:
            begin = time.process_time()
            if "scan" in request:
                state = jax.block_until_ready(steps(state, request["scan"]))
            else:
                for _ in range(request["update"]):
                    state, loss = update(state, *given)
                    float(loss)  # as the other sides' steps, which return their loss
            answer = {"seconds": time.process_time() - begin}
        print(json.dumps(answer), flush=True)
