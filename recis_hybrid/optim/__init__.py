"""Sparse optimizers: torch.optim.Optimizer subclasses over an EmbeddingEngine's parameters."""

from recis_hybrid.optim.adagrad import Adagrad as Adagrad
from recis_hybrid.optim.adam import Adam as Adam
from recis_hybrid.optim.sgd import SGD as SGD
