"""Which method, likelihood and prior a table gets: names, defaults, and the untrained method that they make."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

import bayesmeta
from bayesmeta.adapt.base import Method
from bayesmeta.errors import OptionError
from bayesmeta.models import likelihoods
from bayesmeta.models.likelihoods import Likelihood
from bayesmeta.models.nets import mlp
from bayesmeta.models.neural import NeuralTaskModel
from bayesmeta.models.priors import PRIORS, Normal
from bayesmeta.tasks.schema import Target, did_you_mean
from bayesmeta.tasks.table import TableTasks


@dataclass(frozen=True)
class Recipe:
    """How a method is set up for a table in standard units.

    Attributes:
        task_modules, prior: of the network model; another prior can be asked for.
        prior_scale: first standard deviation of a normal prior, where it is not the prior's own default.
        options: of the method, beside its defaults.
        rate: learning rate of θ.
    """

    task_modules: str = "all"
    prior: str = "point"
    prior_scale: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    rate: float = 3e-3


_CURVATURE = 4.0
_STEPS = {"inner_steps": 5, "inner_lr": 0.05}
#: The methods that fit a table, by class name. Chosen on validation tasks, but for the five behind ABML: see
#: docs/command-line.md.
RECIPES: dict[str, Recipe] = {
    "BayesianLastLayer": Recipe("head", "normal", 0.3, {"objective": "evidence"}, rate=1e-2),
    "ABML": Recipe("all", "normal", None, _STEPS | {"num_particles": 4, "objective": "predictive"}),
    "BayesianLastLayerMixture": Recipe("head", "normal", 0.3, {"num_components": 8}, rate=5e-3),
    "DeepKernel": Recipe("head", options={"kernel": "matern52", "inputs": "both"}, rate=1e-2),
    "Laplace": Recipe("head", "normal", 0.3, {"inner_steps": 3, "inner_lr": 1.0, "solver": "newton"}, rate=1e-2),
    # particles far apart share a step: five times the rate
    "BMAML": Recipe("all", "normal", None, {"inner_steps": 5, "inner_lr": 0.25, "objective": "predictive"}),
    "Platipus": Recipe(options=_STEPS),
    "MAML": Recipe(options=_STEPS),
    "MetaSGD": Recipe(options=_STEPS),
    "ANIL": Recipe("head", options=_STEPS),
    "BOIL": Recipe(options=_STEPS),
    "CAVIA": Recipe(options=_STEPS | {"inner_lr": 0.5, "context_size": 4}),
    "Reptile": Recipe(options=_STEPS),
    "ImplicitMAML": Recipe(options={"inner_steps": 10, "inner_lr": 0.05}),
    "MultiTask": Recipe(),
}


#: Those with a closed form, and the likelihoods that it is for; and those whose prior does not depend on w.
CLOSED_FORM = {
    "BayesianLastLayer": ("gaussian",),
    "BayesianLastLayerMixture": ("gaussian",),
    "DeepKernel": ("gaussian", "categorical", "bernoulli"),
}
WITHOUT_COVARIATES = ("BayesianLastLayerMixture", "DeepKernel")


@dataclass(frozen=True)
class _LikelihoodKind:
    target: Target
    make: Callable[[int, int | None], Likelihood]


#: By name: the kind of target, and the likelihood from the number of classes and the column of the exposure.
LIKELIHOODS: dict[str, _LikelihoodKind] = {
    "gaussian": _LikelihoodKind("real", lambda k, e: likelihoods.Gaussian(0.5, learn_scale=True)),
    "heteroscedastic": _LikelihoodKind("real", lambda k, e: likelihoods.HeteroscedasticGaussian(0.01)),
    "student-t": _LikelihoodKind("real", lambda k, e: likelihoods.StudentT(4.0, 0.5, learn_df=True, learn_scale=True)),
    "poisson": _LikelihoodKind("count", lambda k, e: likelihoods.Poisson(exposure=e)),
    "negative-binomial": _LikelihoodKind(
        "count", lambda k, e: likelihoods.NegativeBinomial(5.0, learn_concentration=True, exposure=e)
    ),
    "categorical": _LikelihoodKind("class", lambda k, e: likelihoods.Categorical(k)),
    "bernoulli": _LikelihoodKind("class", lambda k, e: likelihoods.Bernoulli()),
}


@dataclass(frozen=True)
class Settings:
    """All that makes the untrained method, as plain values.

    Attributes:
        method: name of its class. likelihood, prior: names.
        hidden, activation: of the network.
        features, covariates, targets, classes: widths of x (the exposure among them), w and y; number of classes.
        exposure: whether the last column of x is one.
        start: biases of the network's last layer to begin with: the outputs at which the likelihood fits the training
            tasks as a whole.
        curvature: how large the second derivative of −log p(y | output) must be expected to be; inner rates are
            divided by it.
        seed: of the first weights.
    """

    method: str
    likelihood: str
    prior: str
    hidden: tuple[int, ...]
    activation: str
    features: int
    covariates: int
    targets: int
    classes: int
    exposure: bool
    start: tuple[float, ...]
    curvature: float
    seed: int

    def state(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"hidden": list(self.hidden), "start": list(self.start)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Settings:
        """The inverse of :meth:`state`."""
        return cls(**{**state, "hidden": tuple(state["hidden"]), "start": tuple(state["start"])})


def choose(
    table: TableTasks,
    *,
    method: str | None,
    likelihood: str,
    prior: str | None,
    hidden: Iterable[int],
    activation: str,
    seed: int,
) -> Settings:
    """The settings for a table of training tasks, with defaults where nothing was asked for.

    Raises:
        OptionError: for unknown names, and for what does not go together.
    """
    schema, kind = table.schema, LIKELIHOODS[likelihood]
    if method is None:
        method = "BayesianLastLayer" if likelihood == "gaussian" and prior in (None, "normal") else "ABML"
    recipe = RECIPES[method]
    closed = CLOSED_FORM.get(method, (likelihood,))
    if likelihood not in closed:
        raise OptionError(
            f"{method} has a closed form for the likelihood {', '.join(closed)} alone; {likelihood} was asked for. Use "
            "ABML or MAML."
        )
    if method in WITHOUT_COVARIATES and schema.w_names:
        raise OptionError(
            f"{method} does not see what is constant within a task, w={list(schema.w)}; make it an input (x), or use "
            "BayesianLastLayer or ABML."
        )
    if method == "DeepKernel" and prior not in (None, recipe.prior):
        raise OptionError(f"DeepKernel has no prior on weights; leave prior={prior!r} out, or use BayesianLastLayer.")
    if method == "ABML" and prior == "point":
        raise OptionError("ABML needs a prior with a density; expected another prior than 'point', such as normal.")
    if schema.exposure is not None and kind.target != "count":
        raise OptionError(
            f"exposure={schema.exposure!r} is for counts; with likelihood {likelihood} use it as an input (x), or give "
            "--likelihood poisson or negative-binomial."
        )
    if likelihood == "bernoulli" and len(schema.classes) != 2:
        raise OptionError(
            f"The likelihood bernoulli has two classes; {', '.join(schema.y)} has {len(schema.classes)}: "
            f"{', '.join(schema.classes[:10])}. Use categorical."
        )
    widths = tuple(hidden)
    if any(width < 1 for width in widths):
        raise OptionError(f"hidden={list(widths)}; expected widths of at least 1.")
    return Settings(
        method,
        likelihood,
        prior or recipe.prior,
        widths,
        activation,
        features=len(schema.x_names),
        covariates=len(schema.w_names),
        targets=len(schema.y),
        classes=len(schema.classes),
        exposure=schema.exposure is not None,
        start=_start(table, likelihood),
        curvature=_curvature(table),
        seed=seed,
    )


def _start(table: TableTasks, likelihood: str) -> tuple[float, ...]:
    """The outputs at the rate, or the shares of the classes, of all rows; nothing where these are 0 anyway."""
    flat, schema = table.flat(), table.schema
    y = flat.y.double().reshape(len(flat.x), -1)
    if schema.target == "count":
        exposure = flat.x[:, -1].double().sum() if schema.exposure is not None else len(y)
        return tuple(((y.sum(0) + 0.5) / exposure).log().tolist())
    if schema.target == "class":
        share = (torch.bincount(y.flatten().long(), minlength=len(schema.classes)) + 0.5).log()
        return (float(share[1] - share[0]),) if likelihood == "bernoulli" else tuple((share - share.mean()).tolist())
    return ()


def _curvature(table: TableTasks) -> float:
    """4, that of real targets with noise of half a standard deviation; with counts the largest mean of a task, where
    that is more: the mean of a Poisson count is the second derivative itself. Classes, whose is at most 1, share the 4.
    """
    if table.schema.target != "count":
        return _CURVATURE
    flat = table.flat()
    owner = torch.arange(len(flat.lengths)).repeat_interleave(flat.lengths)
    total = torch.zeros(len(flat.lengths), dtype=torch.float64)
    total.index_add_(0, owner, flat.y.double().reshape(len(owner), -1).amax(-1))
    return max(float((total / flat.lengths).max()), _CURVATURE)


def build(settings: Settings) -> Method:
    """The untrained method; torch's global random state is left as it was.

    Raises:
        OptionError, UnsupportedError, ModelError: for settings that do not go together.
    """
    recipe, kind = RECIPES[settings.method], LIKELIHOODS[settings.likelihood]
    likelihood = kind.make(settings.classes, -1 if settings.exposure else None)
    inputs = settings.features - int(settings.exposure)
    outputs = likelihood.num_outputs(settings.targets)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(settings.seed)
        network = mlp(inputs, settings.hidden, outputs or settings.targets, activation=settings.activation)
    if settings.start:
        with torch.no_grad():
            last = network[-1]
            assert isinstance(last, torch.nn.Linear)
            last.bias.copy_(torch.tensor(settings.start))
    scale = recipe.prior_scale
    prior = Normal(scale) if settings.prior == "normal" and scale is not None else settings.prior
    model = NeuralTaskModel(
        network, likelihood, prior, task_modules=recipe.task_modules, covariates=settings.covariates
    )
    options = dict(recipe.options)
    if "inner_lr" in options and options.get("solver") != "newton":  # a Newton step knows the curvature itself
        options["inner_lr"] /= settings.curvature
    made: Method = method_class(settings.method)(model, **options)
    return made


# -- names ------------------------------------------------------------------------------------------------------------


def method_class(name: str) -> type[Method]:
    """The class of a method, imported when it is needed."""
    found: type[Method] = getattr(importlib.import_module(bayesmeta._NAMES[name]), name)
    return found


def all_methods() -> list[str]:
    """Names of the public methods, those that fit a table first."""
    public = [name for name, module in bayesmeta._NAMES.items() if module.startswith("bayesmeta.adapt.")]
    methods = [name for name in public if "card" in vars(method_class(name))]
    return [name for name in RECIPES if name in methods] + sorted(set(methods) - set(RECIPES))


def pick(name: str, known: Iterable[str], what: str) -> str:
    """The known name that is meant: case, hyphens and underscores do not matter, nor a "bayesian" in front.

    Raises:
        OptionError: with the list of names and the nearest one.
    """
    known = list(known)

    def plain(text: str) -> str:
        return text.lower().replace("-", "").replace("_", "").removeprefix("bayesian")

    for candidate in known:
        if plain(candidate) == plain(name):
            return candidate
    raise OptionError(f"Unknown {what} {name!r}{did_you_mean(name, known).rstrip('?')}. Known are: {', '.join(known)}.")


def pick_likelihood(name: str) -> str:
    """The likelihood that is meant. Errors are those of :func:`pick`."""
    return pick(name, LIKELIHOODS, "likelihood")


def pick_prior(name: str) -> str:
    """The prior that is meant. Errors are those of :func:`pick`."""
    return pick(name, PRIORS, "prior")
