"""The kinds of posterior, by name, as saved files have them."""

from __future__ import annotations

from bayesmeta.posteriors.base import TaskPosterior
from bayesmeta.posteriors.chains import ChainsPosterior
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

KINDS: dict[str, type[TaskPosterior]] = {
    kind.__name__: kind
    for kind in (
        DeltaPosterior,
        NormalPosterior,
        MultivariateNormalPosterior,
        KroneckerNormalPosterior,
        FlowPosterior,
        ExactLinearPosterior,
        ConjugatePosterior,
        SamplesPosterior,
        ParticlesPosterior,
        ChainsPosterior,
        GPPosterior,
        GPLabelsPosterior,
        ProcessPosterior,
        PriorMixturePosterior,
    )
}
