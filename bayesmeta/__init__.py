"""bayesmeta: Bayesian meta-learning on Pyro and PyTorch.

θ is a prior over task parameters φ; every method learns θ and infers φ from a few observations of a new task. Names are
imported on first use, so that ``import bayesmeta`` is instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_MODULES = {
    "diagnostics": "bayesmeta.diagnostics",
    "encoders": "bayesmeta.models.encoders",
    "errors": "bayesmeta.errors",
    "likelihoods": "bayesmeta.models.likelihoods",
    "nets": "bayesmeta.models.nets",
    "priors": "bayesmeta.models.priors",
    "schedules": "bayesmeta.train.schedules",
    "tasks": "bayesmeta.tasks",
}

_NAMES = {
    "ABML": "bayesmeta.adapt.abml",
    "Amortised": "bayesmeta.adapt.amortised",
    "ANIL": "bayesmeta.adapt.anil",
    "BayesianLastLayer": "bayesmeta.adapt.last_layer",
    "BayesianLastLayerMixture": "bayesmeta.adapt.last_layer_mixture",
    "BMAML": "bayesmeta.adapt.bmaml",
    "BOIL": "bayesmeta.adapt.boil",
    "CAVIA": "bayesmeta.adapt.cavia",
    "ChainDiagnostics": "bayesmeta.posteriors.chains",
    "ChainsPosterior": "bayesmeta.posteriors.chains",
    "collate": "bayesmeta.data",
    "concatenate": "bayesmeta.data",
    "ConditionalNeuralProcess": "bayesmeta.adapt.neural_process",
    "ConjugateModel": "bayesmeta.models.conjugate",
    "ConjugatePosterior": "bayesmeta.posteriors.conjugate",
    "ContextTaskModel": "bayesmeta.models.context",
    "DeepKernel": "bayesmeta.adapt.deep_kernel",
    "DeepKernelModel": "bayesmeta.models.deep_kernel",
    "DeltaPosterior": "bayesmeta.posteriors.delta",
    "Draws": "bayesmeta.posteriors.base",
    "ExactLinearPosterior": "bayesmeta.posteriors.exact",
    "fit": "bayesmeta.train.fit",
    "FitResult": "bayesmeta.train.fit",
    "FlowPosterior": "bayesmeta.posteriors.flow",
    "Gaussian": "bayesmeta.models.likelihoods",
    "GPLabelsPosterior": "bayesmeta.posteriors.gp_labels",
    "GPPosterior": "bayesmeta.posteriors.gp",
    "ImplicitMAML": "bayesmeta.adapt.implicit_maml",
    "KroneckerNormalPosterior": "bayesmeta.posteriors.kronecker",
    "Laplace": "bayesmeta.adapt.laplace",
    "load_method": "bayesmeta.train.checkpoint",
    "load_netcdf": "bayesmeta.diagnostics.datatree",
    "load_posterior": "bayesmeta.posteriors.base",
    "loo": "bayesmeta.diagnostics.datatree",
    "Lookahead": "bayesmeta.train.lookahead",
    "MAML": "bayesmeta.adapt.maml",
    "MetaSGD": "bayesmeta.adapt.meta_sgd",
    "MetaSVI": "bayesmeta.train.meta_svi",
    "Method": "bayesmeta.adapt.base",
    "MethodCard": "bayesmeta.adapt.base",
    "MultiTask": "bayesmeta.adapt.multi_task",
    "MultivariateNormalPosterior": "bayesmeta.posteriors.gaussian",
    "NeuralProcess": "bayesmeta.adapt.neural_process",
    "NeuralTaskModel": "bayesmeta.models.neural",
    "noncentred": "bayesmeta.models.reparam",
    "NormalPosterior": "bayesmeta.posteriors.gaussian",
    "NUTS": "bayesmeta.adapt.nuts",
    "Observations": "bayesmeta.data",
    "ParticlesPosterior": "bayesmeta.posteriors.samples",
    "Platipus": "bayesmeta.adapt.platipus",
    "plot_forecast": "bayesmeta.diagnostics.plots",
    "PrecisionTaskModel": "bayesmeta.models.precision",
    "Reptile": "bayesmeta.adapt.reptile",
    "SamplesPosterior": "bayesmeta.posteriors.samples",
    "save_netcdf": "bayesmeta.diagnostics.datatree",
    "Scores": "bayesmeta.diagnostics.scores",
    "scores": "bayesmeta.diagnostics.scores",
    "shot_plate": "bayesmeta.models.plates",
    "Standardizer": "bayesmeta.data",
    "task_plate": "bayesmeta.models.plates",
    "TaskBatch": "bayesmeta.data",
    "TaskDistribution": "bayesmeta.protocols",
    "TaskPosterior": "bayesmeta.posteriors.base",
    "TaskProgram": "bayesmeta.models.program",
    "to_datatree": "bayesmeta.diagnostics.datatree",
    "union": "bayesmeta.data",
}

__all__ = sorted([*_MODULES, *_NAMES, "__version__"])


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = importlib.import_module(_MODULES[name])
    elif name in _NAMES:
        value = getattr(importlib.import_module(_NAMES[name]), name)
    else:
        raise AttributeError(f"module 'bayesmeta' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


if TYPE_CHECKING:
    from bayesmeta import diagnostics, errors, tasks
    from bayesmeta.adapt.abml import ABML
    from bayesmeta.adapt.amortised import Amortised
    from bayesmeta.adapt.anil import ANIL
    from bayesmeta.adapt.base import Method, MethodCard
    from bayesmeta.adapt.bmaml import BMAML
    from bayesmeta.adapt.boil import BOIL
    from bayesmeta.adapt.cavia import CAVIA
    from bayesmeta.adapt.deep_kernel import DeepKernel
    from bayesmeta.adapt.implicit_maml import ImplicitMAML
    from bayesmeta.adapt.laplace import Laplace
    from bayesmeta.adapt.last_layer import BayesianLastLayer
    from bayesmeta.adapt.last_layer_mixture import BayesianLastLayerMixture
    from bayesmeta.adapt.maml import MAML
    from bayesmeta.adapt.meta_sgd import MetaSGD
    from bayesmeta.adapt.multi_task import MultiTask
    from bayesmeta.adapt.neural_process import ConditionalNeuralProcess, NeuralProcess
    from bayesmeta.adapt.nuts import NUTS
    from bayesmeta.adapt.platipus import Platipus
    from bayesmeta.adapt.reptile import Reptile
    from bayesmeta.data import (
        Observations,
        Standardizer,
        TaskBatch,
        collate,
        concatenate,
        union,
    )
    from bayesmeta.diagnostics.datatree import load_netcdf, loo, save_netcdf, to_datatree
    from bayesmeta.diagnostics.plots import plot_forecast
    from bayesmeta.diagnostics.scores import Scores, scores
    from bayesmeta.models import encoders, likelihoods, nets, priors
    from bayesmeta.models.conjugate import ConjugateModel
    from bayesmeta.models.context import ContextTaskModel
    from bayesmeta.models.deep_kernel import DeepKernelModel
    from bayesmeta.models.likelihoods import Gaussian
    from bayesmeta.models.neural import NeuralTaskModel
    from bayesmeta.models.plates import shot_plate, task_plate
    from bayesmeta.models.precision import PrecisionTaskModel
    from bayesmeta.models.program import TaskProgram
    from bayesmeta.models.reparam import noncentred
    from bayesmeta.posteriors.base import Draws, TaskPosterior, load_posterior
    from bayesmeta.posteriors.chains import ChainDiagnostics, ChainsPosterior
    from bayesmeta.posteriors.conjugate import ConjugatePosterior
    from bayesmeta.posteriors.delta import DeltaPosterior
    from bayesmeta.posteriors.exact import ExactLinearPosterior
    from bayesmeta.posteriors.flow import FlowPosterior
    from bayesmeta.posteriors.gaussian import MultivariateNormalPosterior, NormalPosterior
    from bayesmeta.posteriors.gp import GPPosterior
    from bayesmeta.posteriors.gp_labels import GPLabelsPosterior
    from bayesmeta.posteriors.kronecker import KroneckerNormalPosterior
    from bayesmeta.posteriors.samples import ParticlesPosterior, SamplesPosterior
    from bayesmeta.protocols import TaskDistribution
    from bayesmeta.train import schedules
    from bayesmeta.train.checkpoint import load_method
    from bayesmeta.train.fit import FitResult, fit
    from bayesmeta.train.lookahead import Lookahead
    from bayesmeta.train.meta_svi import MetaSVI
