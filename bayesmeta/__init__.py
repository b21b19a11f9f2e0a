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
    "metrics": "bayesmeta.diagnostics.metrics",
    "nets": "bayesmeta.models.nets",
    "priors": "bayesmeta.models.priors",
    "processes": "bayesmeta.models.processes",
    "rl": "bayesmeta.rl",
    "schedules": "bayesmeta.train.schedules",
    "tasks": "bayesmeta.tasks",
}

_NAMES = {
    "ABML": "bayesmeta.adapt.abml",
    "Amortised": "bayesmeta.adapt.amortised",
    "ANIL": "bayesmeta.adapt.anil",
    "autoregressive": "bayesmeta.adapt.autoregressive",
    "Autoregressive": "bayesmeta.adapt.autoregressive",
    "AttentiveNeuralProcess": "bayesmeta.adapt.processes",
    "BayesianLastLayer": "bayesmeta.adapt.last_layer",
    "BayesianLastLayerMixture": "bayesmeta.adapt.last_layer_mixture",
    "BMAML": "bayesmeta.adapt.bmaml",
    "BOIL": "bayesmeta.adapt.boil",
    "CAVIA": "bayesmeta.adapt.cavia",
    "calibration": "bayesmeta.diagnostics.calibration",
    "Calibration": "bayesmeta.diagnostics.calibration",
    "ChainDiagnostics": "bayesmeta.posteriors.chains",
    "ChainsPosterior": "bayesmeta.posteriors.chains",
    "Choice": "bayesmeta.diagnostics.active",
    "choose": "bayesmeta.diagnostics.active",
    "ClassCalibration": "bayesmeta.diagnostics.calibration",
    "collate": "bayesmeta.data",
    "compare": "bayesmeta.diagnostics.compare",
    "Comparison": "bayesmeta.diagnostics.compare",
    "concatenate": "bayesmeta.data",
    "ConditionalNeuralProcess": "bayesmeta.adapt.neural_process",
    "ConjugateModel": "bayesmeta.models.conjugate",
    "ConjugatePosterior": "bayesmeta.posteriors.conjugate",
    "ContextTaskModel": "bayesmeta.models.context",
    "contraction": "bayesmeta.diagnostics.contraction",
    "ConvCNP": "bayesmeta.adapt.processes",
    "decompose": "bayesmeta.diagnostics.decomposition",
    "Decomposition": "bayesmeta.diagnostics.decomposition",
    "DeepKernel": "bayesmeta.adapt.deep_kernel",
    "DeepKernelModel": "bayesmeta.models.deep_kernel",
    "DeltaPosterior": "bayesmeta.posteriors.delta",
    "Draws": "bayesmeta.posteriors.base",
    "EmbeddedModel": "bayesmeta.models.embedding",
    "ExactLinearPosterior": "bayesmeta.posteriors.exact",
    "fit": "bayesmeta.train.fit",
    "FitResult": "bayesmeta.train.fit",
    "FlowPosterior": "bayesmeta.posteriors.flow",
    "Gaussian": "bayesmeta.models.likelihoods",
    "GaussianNeuralProcess": "bayesmeta.adapt.processes",
    "GPLabelsPosterior": "bayesmeta.posteriors.gp_labels",
    "GPPosterior": "bayesmeta.posteriors.gp",
    "ImplicitMAML": "bayesmeta.adapt.implicit_maml",
    "KroneckerNormalPosterior": "bayesmeta.posteriors.kronecker",
    "Laplace": "bayesmeta.adapt.laplace",
    "learning_curve": "bayesmeta.diagnostics.learning_curve",
    "LearningCurve": "bayesmeta.diagnostics.learning_curve",
    "load_method": "bayesmeta.train.checkpoint",
    "load_netcdf": "bayesmeta.diagnostics.datatree",
    "load_posterior": "bayesmeta.posteriors.base",
    "loo": "bayesmeta.diagnostics.datatree",
    "loo_kfold": "bayesmeta.diagnostics.kfold",
    "Lookahead": "bayesmeta.train.lookahead",
    "MAML": "bayesmeta.adapt.maml",
    "MetaRegularization": "bayesmeta.adapt.meta_regularization",
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
    "PACBound": "bayesmeta.adapt.pac_bound",
    "PACOH": "bayesmeta.adapt.pacoh",
    "ParticlesPosterior": "bayesmeta.posteriors.samples",
    "Platipus": "bayesmeta.adapt.platipus",
    "plot_calibration": "bayesmeta.diagnostics.plots_calibration",
    "plot_compare": "bayesmeta.diagnostics.plots_compare",
    "plot_forecast": "bayesmeta.diagnostics.plots",
    "plot_ranks": "bayesmeta.diagnostics.plots_calibration",
    "PrecisionTaskModel": "bayesmeta.models.precision",
    "PriorMixturePosterior": "bayesmeta.posteriors.prior_mixture",
    "ProcessMethod": "bayesmeta.adapt.processes",
    "ProcessModel": "bayesmeta.models.process_model",
    "ProcessPosterior": "bayesmeta.posteriors.process",
    "profile": "bayesmeta.train.profiling.profile",
    "Profile": "bayesmeta.train.profiling.profiled",
    "psis": "bayesmeta.diagnostics.pareto",
    "PSIS": "bayesmeta.diagnostics.pareto",
    "recalibrate": "bayesmeta.diagnostics.recalibration",
    "RecalibratedPosterior": "bayesmeta.diagnostics.recalibrated",
    "Recalibration": "bayesmeta.diagnostics.corrections",
    "Reptile": "bayesmeta.adapt.reptile",
    "ROC": "bayesmeta.diagnostics.surprise",
    "roc": "bayesmeta.diagnostics.surprise",
    "SamplesPosterior": "bayesmeta.posteriors.samples",
    "save_netcdf": "bayesmeta.diagnostics.datatree",
    "sbc": "bayesmeta.diagnostics.simulation",
    "SBC": "bayesmeta.diagnostics.simulation",
    "sbc_method": "bayesmeta.diagnostics.simulation_method",
    "Scores": "bayesmeta.diagnostics.scores",
    "scores": "bayesmeta.diagnostics.scores",
    "SemiAmortised": "bayesmeta.adapt.semi_amortised",
    "sensitivity": "bayesmeta.diagnostics.sensitivity",
    "Sensitivity": "bayesmeta.diagnostics.sensitivity",
    "shot_plate": "bayesmeta.models.plates",
    "SimulatedTasks": "bayesmeta.train.simulated",
    "Standardizer": "bayesmeta.data",
    "Surprise": "bayesmeta.diagnostics.surprise",
    "surprise": "bayesmeta.diagnostics.surprise",
    "tarp": "bayesmeta.diagnostics.tarp",
    "TARP": "bayesmeta.diagnostics.tarp",
    "task_plate": "bayesmeta.models.plates",
    "TaskBatch": "bayesmeta.data",
    "TaskDistribution": "bayesmeta.protocols",
    "TaskPosterior": "bayesmeta.posteriors.base",
    "TaskProgram": "bayesmeta.models.program",
    "to_datatree": "bayesmeta.diagnostics.datatree",
    "TransformerNeuralProcess": "bayesmeta.adapt.processes",
    "union": "bayesmeta.data",
    "Versa": "bayesmeta.adapt.versa",
    "write_report": "bayesmeta.report.build",
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
    from bayesmeta import diagnostics, errors, rl, tasks
    from bayesmeta.adapt.abml import ABML
    from bayesmeta.adapt.amortised import Amortised
    from bayesmeta.adapt.anil import ANIL
    from bayesmeta.adapt.autoregressive import Autoregressive, autoregressive
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
    from bayesmeta.adapt.meta_regularization import MetaRegularization
    from bayesmeta.adapt.meta_sgd import MetaSGD
    from bayesmeta.adapt.multi_task import MultiTask
    from bayesmeta.adapt.neural_process import ConditionalNeuralProcess, NeuralProcess
    from bayesmeta.adapt.nuts import NUTS
    from bayesmeta.adapt.pac_bound import PACBound
    from bayesmeta.adapt.pacoh import PACOH
    from bayesmeta.adapt.platipus import Platipus
    from bayesmeta.adapt.processes import (
        AttentiveNeuralProcess,
        ConvCNP,
        GaussianNeuralProcess,
        ProcessMethod,
        TransformerNeuralProcess,
    )
    from bayesmeta.adapt.reptile import Reptile
    from bayesmeta.adapt.semi_amortised import SemiAmortised
    from bayesmeta.adapt.versa import Versa
    from bayesmeta.data import (
        Observations,
        Standardizer,
        TaskBatch,
        collate,
        concatenate,
        union,
    )
    from bayesmeta.diagnostics import metrics
    from bayesmeta.diagnostics.active import Choice, choose
    from bayesmeta.diagnostics.calibration import Calibration, ClassCalibration, calibration
    from bayesmeta.diagnostics.compare import Comparison, compare
    from bayesmeta.diagnostics.contraction import contraction
    from bayesmeta.diagnostics.corrections import Recalibration
    from bayesmeta.diagnostics.datatree import load_netcdf, loo, save_netcdf, to_datatree
    from bayesmeta.diagnostics.decomposition import Decomposition, decompose
    from bayesmeta.diagnostics.kfold import loo_kfold
    from bayesmeta.diagnostics.learning_curve import LearningCurve, learning_curve
    from bayesmeta.diagnostics.pareto import PSIS, psis
    from bayesmeta.diagnostics.plots import plot_forecast
    from bayesmeta.diagnostics.plots_calibration import plot_calibration, plot_ranks
    from bayesmeta.diagnostics.plots_compare import plot_compare
    from bayesmeta.diagnostics.recalibrated import RecalibratedPosterior
    from bayesmeta.diagnostics.recalibration import recalibrate
    from bayesmeta.diagnostics.scores import Scores, scores
    from bayesmeta.diagnostics.sensitivity import Sensitivity, sensitivity
    from bayesmeta.diagnostics.simulation import SBC, sbc
    from bayesmeta.diagnostics.simulation_method import sbc_method
    from bayesmeta.diagnostics.surprise import ROC, Surprise, roc, surprise
    from bayesmeta.diagnostics.tarp import TARP, tarp
    from bayesmeta.models import encoders, likelihoods, nets, priors, processes
    from bayesmeta.models.conjugate import ConjugateModel
    from bayesmeta.models.context import ContextTaskModel
    from bayesmeta.models.deep_kernel import DeepKernelModel
    from bayesmeta.models.embedding import EmbeddedModel
    from bayesmeta.models.likelihoods import Gaussian
    from bayesmeta.models.neural import NeuralTaskModel
    from bayesmeta.models.plates import shot_plate, task_plate
    from bayesmeta.models.precision import PrecisionTaskModel
    from bayesmeta.models.process_model import ProcessModel
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
    from bayesmeta.posteriors.prior_mixture import PriorMixturePosterior
    from bayesmeta.posteriors.process import ProcessPosterior
    from bayesmeta.posteriors.samples import ParticlesPosterior, SamplesPosterior
    from bayesmeta.protocols import TaskDistribution
    from bayesmeta.report.build import write_report
    from bayesmeta.train import schedules
    from bayesmeta.train.checkpoint import load_method
    from bayesmeta.train.fit import FitResult, fit
    from bayesmeta.train.lookahead import Lookahead
    from bayesmeta.train.meta_svi import MetaSVI
    from bayesmeta.train.profiling.profile import profile
    from bayesmeta.train.profiling.profiled import Profile
    from bayesmeta.train.simulated import SimulatedTasks
