"""Networks f(x, S, z) that read a set of observations and a point together; see :class:`bayesmeta.ProcessModel`."""

from bayesmeta.models.convolution import ConvProcess
from bayesmeta.models.process_networks import AttentiveProcess, DeepSetProcess, ProcessNetwork, TransformerProcess

__all__ = ["AttentiveProcess", "ConvProcess", "DeepSetProcess", "ProcessNetwork", "TransformerProcess"]
