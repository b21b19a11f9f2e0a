"""MAML on sinusoids in JAX, as a peer: ``jit`` + ``vmap`` over tasks + ``scan`` over steps. Needs JAX and optax alone.

Answers on standard output: ``{"gradient": path}`` the meta-gradient of the weights and batch in that npz file;
``{"block": n}`` the CPU seconds of n steps in one ``scan``.
"""

# mypy: ignore-errors
# (it runs in the peers' environment, which has what it imports)
import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

WIDTH = 5.0


def network(weights, x):
    for w, b in weights[:-1]:
        x = jax.nn.relu(x @ w.T + b)
    w, b = weights[-1]
    return x @ w.T + b


def squared(weights, x, y):
    return (network(weights, x) - y) ** 2


def task_loss(weights, task, steps, rate):
    x, y, query_x, query_y = task
    phi = weights
    for _ in range(steps):
        gradient = jax.grad(lambda p: squared(p, x, y).mean())(phi)
        phi = jax.tree_util.tree_map(lambda a, g: a - rate * g, phi, gradient)
    return squared(phi, query_x, query_y).sum()


def loss(weights, batch, steps, rate):
    return jax.vmap(lambda *task: task_loss(weights, task, steps, rate))(*batch).mean()


def draw(key, tasks, shots):
    uniform = jax.random.uniform(key, (tasks, 2 * shots + 2))
    amplitude, phase = 0.1 + 4.9 * uniform[:, :1], jnp.pi * uniform[:, 1:2]
    x = 2 * WIDTH * uniform[:, 2:] - WIDTH
    y = amplitude * jnp.sin(x - phase)
    x, y = x[..., None], y[..., None]
    return x[:, :shots], y[:, :shots], x[:, shots:], y[:, shots:]


def main(steps, tasks, shots, hidden, inner_rate, rate):
    sizes = [1, *hidden, 1]
    keys = jax.random.split(jax.random.PRNGKey(0), len(sizes))
    weights = [
        (jax.random.uniform(k, (o, i), minval=-1, maxval=1) / i**0.5, jnp.zeros(o))
        for k, i, o in zip(keys, sizes[:-1], sizes[1:])
    ]
    optimizer = optax.adam(rate)

    def step(carry, key):
        weights, state = carry
        value, gradient = jax.value_and_grad(loss)(weights, draw(key, tasks, shots), steps, inner_rate)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(weights, updates), state), value

    many = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys))
    carry, key = (weights, optimizer.init(weights)), jax.random.PRNGKey(1)
    for line in sys.stdin:
        request = json.loads(line)
        if "gradient" in request:
            given = np.load(request["gradient"])
            theirs = [(given[f"w{i}"], given[f"b{i}"]) for i in range(len(sizes) - 1)]
            batch = tuple(given[name] for name in ("x", "y", "query_x", "query_y"))
            value, gradient = jax.value_and_grad(loss)(theirs, batch, steps, inner_rate)
            flat = np.concatenate([np.asarray(part).ravel() for pair in gradient for part in pair])
            np.savez(request["into"], gradient=flat)
            answer = {"loss": float(value), "version": jax.__version__}
        else:
            key, used = jax.random.split(key)
            keys = jax.block_until_ready(jax.random.split(used, request["block"]))
            begin = time.process_time()
            carry, values = jax.block_until_ready(many(carry, keys))
            answer = {"seconds": time.process_time() - begin, "loss": float(values[-1])}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
