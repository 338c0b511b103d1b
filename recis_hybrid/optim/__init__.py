"""Sparse optimizers: torch.optim.Optimizer subclasses over an EmbeddingEngine's parameters."""

from __future__ import annotations

from recis_hybrid.optim.adagrad import Adagrad as Adagrad, RowwiseAdagrad as RowwiseAdagrad
from recis_hybrid.optim.adam import Adam as Adam, AdamW as AdamW
from recis_hybrid.optim.clip import clip_row_norm_ as clip_row_norm_
from recis_hybrid.optim.sgd import SGD as SGD
