"""Bayesian methods on sinusoids in JAX, as peers: ``jit`` + ``vmap`` over tasks + ``scan`` over steps, optax's Adam.

The argument is JSON: the method's name and its settings. Each method is written as one would write it in JAX: a loss of
one task, mapped over tasks; inner steps and particles of their shapes are unrolled and mapped. Needs JAX and optax.

Answers on standard output: ``{"gradient": path, "into": path}`` writes the loss and the meta-gradient of the weights,
batch and noise in the first npz file, under our names; ``{"block": n}`` the CPU seconds of n steps in one ``scan``.
"""

# mypy: ignore-errors
# (it runs in the peers' environment, which has what it imports)
import itertools
import json
import math
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

WIDTH = 5.0
LOC, LOG_SCALE = "program.prior.loc", "program.prior.log_scale"


# -- networks -----------------------------------------------------------------------------------------------------


def mlp(weights, x, activation=jax.nn.relu):
    for w, b in weights[:-1]:
        x = activation(x @ w.T + b)
    w, b = weights[-1]
    return x @ w.T + b


def normal_log_prob(y, loc, scale):
    return -0.5 * ((y - loc) / scale) ** 2 - jnp.log(scale) - 0.5 * math.log(2 * math.pi)


def shapes_of(sizes):
    """Weights and biases in the order in which they lie in our flat vector."""
    return [((o, i), (o,)) for i, o in itertools.pairwise(sizes)]


def split(vector, sizes):
    """``[…, D]`` to pairs of weights and biases."""
    layers, start = [], 0
    for pair in shapes_of(sizes):
        layer = []
        for shape in pair:
            size = math.prod(shape)
            layer.append(vector[..., start : start + size].reshape(*vector.shape[:-1], *shape))
            start += size
        layers.append(tuple(layer))
    return layers


def flat(layers, lead=()):
    """The inverse of :func:`split`, with dimensions on the left as in ``lead``."""
    return jnp.concatenate([part.reshape(*lead, -1) for pair in layers for part in pair], -1)


def first_weights(key, sizes):
    keys = jax.random.split(key, len(sizes))
    uniform = [
        jax.random.uniform(k, w, jnp.float32, minval=-1, maxval=1) / w[1] ** 0.5
        for k, (w, _) in zip(keys, shapes_of(sizes))
    ]
    return [(w, jnp.zeros(b, jnp.float32)) for w, (_, b) in zip(uniform, shapes_of(sizes))]


def named(layers, prefix, numbers):
    """Weights and biases under our modules' names."""
    return {
        f"{prefix}.{n}.{part}": value
        for n, pair in zip(numbers, layers)
        for part, value in zip(("weight", "bias"), pair)
    }


def layers_of(given, prefix, numbers):
    return [(given[f"{prefix}.{n}.weight"], given[f"{prefix}.{n}.bias"]) for n in numbers]


# -- methods ------------------------------------------------------------------------------------------------------


class Method:
    """One method: ``first(key)`` its parameters, ``loss(parameters, task, noise)`` of one task."""

    def __init__(self, **options):
        self.__dict__.update(options)

    def noise(self, key, tasks):
        """What a step draws beside its tasks, ``[tasks, …]`` each."""
        return ()

    def given_noise(self, given):
        """The same from our file, where it is ``[draws, tasks, D]``, one draw after the other."""
        return ()


class Abml(Method):
    """A diagonal Gaussian over the weights by steps on the ELBO from the prior.

    The weights are one flat vector, so that all of a step's noise is one draw: with a draw for each tensor the step
    takes half as long again. (The generators ``rbg`` and ``unsafe_rbg`` are slower here than the default.)
    """

    def first(self, key):
        loc = flat(first_weights(key, self.sizes))
        return {LOC: loc, LOG_SCALE: jnp.full_like(loc, math.log(0.1))}

    def unpack(self, given):
        return {LOC: given[LOC], LOG_SCALE: given[LOG_SCALE]}

    def pack(self, parameters):
        return {name: np.asarray(value) for name, value in parameters.items()}

    def noise(self, key, tasks):
        size = sum(math.prod(shape) for pair in shapes_of(self.sizes) for shape in pair)
        return jax.random.normal(key, (tasks, self.steps + 1, self.particles, size), jnp.float32)

    def given_noise(self, given):
        return jnp.moveaxis(given["noise"], 2, 0)  # [steps + 1, particles, tasks, D] to [tasks, …]

    def elbo(self, q, prior, x, y, noise):
        (loc, log_scale), (prior_loc, prior_log_scale) = q, prior
        weights = split(loc + jnp.exp(log_scale) * noise, self.sizes)
        outputs = jax.vmap(mlp, (0, None))(weights, x)
        log_likelihood = normal_log_prob(y, outputs, self.scale).sum((1, 2)).mean()
        square = jnp.exp(2 * (log_scale - prior_log_scale)) + ((loc - prior_loc) / jnp.exp(prior_log_scale)) ** 2
        return log_likelihood - (prior_log_scale - log_scale + 0.5 * square - 0.5).sum()

    def loss(self, parameters, task, noise):
        x, y, query_x, query_y = task
        q = prior = (parameters[LOC], parameters[LOG_SCALE])
        for now in noise[:-1]:
            gradient = jax.grad(lambda q, now=now: self.elbo(q, prior, x, y, now) / len(x))(q)
            q = tuple(a + self.inner_rate * g for a, g in zip(q, gradient))
        return -self.elbo(q, prior, jnp.concatenate([x, query_x]), jnp.concatenate([y, query_y]), noise[-1])


class Bmaml(Method):
    """Particles by Stein variational gradient descent; the chaser loss, and the predictive one for the prior."""

    def first(self, key):
        key, more = jax.random.split(key)
        loc = flat(first_weights(key, self.sizes))
        particles = 0.1 * jax.random.normal(more, (self.particles, len(loc)), jnp.float32)
        return {"particles": particles, LOC: loc, LOG_SCALE: jnp.full_like(loc, math.log(0.1))}

    def unpack(self, given):
        return {name: given[name] for name in ("particles", LOC, LOG_SCALE)}

    def pack(self, parameters):
        return {name: np.asarray(value) for name, value in parameters.items()}

    def log_likelihood(self, layers, x, y):
        return normal_log_prob(y, mlp(layers, x), self.scale).sum()

    def direction(self, phi, score):
        """Of SVGD, with the median rule in each task."""
        centred = phi - jax.lax.stop_gradient(phi[:1])
        gram = centred @ centred.T
        norms = jnp.diagonal(gram)
        squared = jnp.maximum(norms[:, None] + norms[None] - 2 * gram, 0.0)
        squared = jnp.where(jnp.eye(len(phi), dtype=bool), 0.0, squared)
        pairs = squared[jnp.triu_indices(len(phi), 1)]
        median, mean = jnp.sort(pairs)[(len(pairs) - 1) // 2], pairs.mean()
        median = jnp.where(median > 100 * jnp.finfo(jnp.float32).eps * mean, median, mean)
        h = jnp.where(median > 0, median / math.log(len(phi)), 1.0)
        kernel = jnp.exp(-squared / h)
        repulsion = (2 / h) * (kernel.sum(0)[:, None] * centred - kernel @ centred)
        return (kernel @ score + repulsion) / len(phi)

    def climb(self, phi, prior, x, y, steps):
        loc, log_scale = prior
        for _ in range(steps):
            score = jax.vmap(jax.grad(self.log_likelihood), (0, None, None))(split(phi, self.sizes), x, y)
            score = flat(score, (len(phi),)) - (phi - loc) / jnp.exp(log_scale) ** 2
            phi = phi + self.inner_rate / len(x) * self.direction(phi, score)
        return phi

    def loss(self, parameters, task, noise):
        x, y, query_x, query_y = task
        constant = jax.lax.stop_gradient
        prior = (parameters[LOC], parameters[LOG_SCALE])
        start = parameters["particles"] + parameters[LOC]
        # the distance trains the starts, the predictive loss what else is learned
        phi = self.climb(start, constant(prior), x, y, self.steps)
        everything = jnp.concatenate([x, query_x]), jnp.concatenate([y, query_y])
        leader = constant(self.climb(phi, prior, *everything, self.leader_steps))
        distance = ((phi - leader) ** 2).sum()
        again = self.climb(constant(start), prior, x, y, self.steps)
        each = jax.vmap(self.log_likelihood, (0, None, None))(split(again, self.sizes), query_x, query_y)
        predictive = math.log(self.particles) - jax.nn.logsumexp(each)
        return distance + (predictive - constant(predictive))


class LastLayer(Method):
    """The exact posterior of the last layer, in double precision where ours is."""

    numbers = (0, 2)

    def first(self, key):
        layers = first_weights(key, self.sizes)
        loc = flat(layers[-1:])
        return {"trunk": layers[:-1], LOC: loc, LOG_SCALE: jnp.zeros_like(loc)}

    def unpack(self, given):
        trunk = layers_of(given, "program.network", self.numbers)
        return {"trunk": trunk, LOC: given[LOC], LOG_SCALE: given[LOG_SCALE]}

    def pack(self, parameters):
        trunk = named(parameters["trunk"], "program.network", self.numbers)
        return {name: np.asarray(v) for name, v in trunk.items()} | {n: parameters[n] for n in (LOC, LOG_SCALE)}

    def loss(self, parameters, task, noise):
        x, y, query_x, query_y = task
        given, x, y = len(x), jnp.concatenate([x, query_x]), jnp.concatenate([y, query_y])
        features = jax.nn.relu(mlp(parameters["trunk"], x))
        design = jnp.concatenate([features, jnp.ones((len(x), 1), jnp.float32)], -1).astype(self.inside)
        loc = parameters[LOC].astype(self.inside)
        whitened = design * jnp.exp(parameters[LOG_SCALE]).astype(self.inside) / self.scale
        residual = (y[:, 0].astype(self.inside) - design @ loc) / self.scale
        # the factor of the support's covariance is a part of that of all
        cholesky = jnp.linalg.cholesky(jnp.eye(len(x), dtype=self.inside) + whitened @ whitened.T)
        half = jax.scipy.linalg.solve_triangular(cholesky, residual, lower=True)
        each = 0.5 * half**2 + jnp.log(jnp.diagonal(cholesky)) + math.log(self.scale) + 0.5 * math.log(2 * math.pi)
        return each[given:].sum().astype(jnp.float32)


class Cnp(Method):
    """A conditional neural process: the mean of an encoder's vectors beside x."""

    embed, decode = (0, 2), (0, 2, 4)

    def first(self, key):
        keys = jax.random.split(key, 3)
        width, last = self.width, self.sizes[-1]
        return {
            "embed": first_weights(keys[0], [2, width, width]),
            "read": first_weights(keys[1], [width + 1, width]),
            "decoder": first_weights(keys[2], [1 + width, *self.sizes[1:-1], last]),
        }

    def unpack(self, given):
        return {
            "embed": layers_of(given, "encoder.embed", self.embed),
            "read": [(given["encoder.read.weight"], given["encoder.read.bias"])],
            "decoder": layers_of(given, "program.network", self.decode),
        }

    def pack(self, parameters):
        ((weight, bias),) = parameters["read"]
        found = named(parameters["embed"], "encoder.embed", self.embed)
        found |= named(parameters["decoder"], "program.network", self.decode)
        return found | {"encoder.read.weight": weight, "encoder.read.bias": bias}

    def loss(self, parameters, task, noise):
        x, y, query_x, query_y = task

        def gelu(a):
            return jax.nn.gelu(a, approximate=False)

        seen = mlp(parameters["embed"], jnp.concatenate([x, y], -1), gelu).mean(0)
        context = mlp(parameters["read"], jnp.concatenate([seen, jnp.full(1, math.log1p(len(x)), jnp.float32)]))
        context = jnp.broadcast_to(context, (len(query_x), len(context)))
        out = mlp(parameters["decoder"], jnp.concatenate([query_x, context], -1))
        return -normal_log_prob(query_y, out[:, :1], self.floor + jax.nn.softplus(out[:, 1:])).sum()


METHODS = {"abml": Abml, "bmaml": Bmaml, "last_layer": LastLayer, "cnp": Cnp}


# -- steps --------------------------------------------------------------------------------------------------------


def draw(key, tasks, shots, noise):
    """Sinusoids as ours: support x and y, query x and y, ``[tasks, shots, 1]``."""
    key, more = jax.random.split(key)
    uniform = jax.random.uniform(key, (tasks, 2 * shots + 2), jnp.float32)
    amplitude, phase = 0.1 + 4.9 * uniform[:, :1], jnp.pi * uniform[:, 1:2]
    x = 2 * WIDTH * uniform[:, 2:] - WIDTH
    y = amplitude * jnp.sin(x - phase) + noise * jax.random.normal(more, x.shape, jnp.float32)
    x, y = x[..., None], y[..., None]
    return x[:, :shots], y[:, :shots], x[:, shots:], y[:, shots:]


def main(method, tasks, shots, rate, task_noise, double=False, **options):
    if double:
        jax.config.update("jax_enable_x64", True)
    it = METHODS[method](**options, inside=jnp.float64 if double else jnp.float32)
    optimizer = optax.adam(rate)

    def loss(parameters, batch, noise):
        return jax.vmap(it.loss, (None, 0, 0))(parameters, batch, noise).mean()

    def step(carry, key):
        parameters, state = carry
        first, second = jax.random.split(key)
        batch = draw(first, tasks, shots, task_noise)
        value, gradient = jax.value_and_grad(loss)(parameters, batch, it.noise(second, tasks))
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(parameters, updates), state), value

    many = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys))
    parameters, key = it.first(jax.random.PRNGKey(0)), jax.random.PRNGKey(1)
    carry = parameters, optimizer.init(parameters)
    for line in sys.stdin:
        request = json.loads(line)
        if "gradient" in request:
            with np.load(request["gradient"]) as file:
                given = {name: jnp.asarray(file[name]) for name in file.files}
            batch = tuple(given[name] for name in ("x", "y", "query_x", "query_y"))
            value, gradient = jax.jit(jax.value_and_grad(loss))(it.unpack(given), batch, it.given_noise(given))
            np.savez(request["into"], loss=np.asarray(value), **it.pack(gradient))
            answer = {"version": jax.__version__}
        else:
            key, used = jax.random.split(key)
            keys = jax.block_until_ready(jax.random.split(used, request["block"]))
            begin = time.process_time()
            carry, values = jax.block_until_ready(many(carry, keys))
            answer = {"seconds": time.process_time() - begin, "loss": float(values[-1])}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
