"""Sparse optimizers: torch.optim.Optimizer subclasses over an EmbeddingEngine's parameters."""

from __future__ import annotations

from recis_hybrid.optim.adagrad import Adagrad as Adagrad
from recis_hybrid.optim.adagrad_sum import AdagradSum as AdagradSum
from recis_hybrid.optim.clip import clip_row_norm_ as clip_row_norm_
from recis_hybrid.optim.custom import Custom as Custom
from recis_hybrid.optim.ftrl import FTRL as FTRL
from recis_hybrid.optim.lion import Lion as Lion
from recis_hybrid.optim.moments.adam import Adam as Adam
from recis_hybrid.optim.moments.adam_l2 import AdamL2 as AdamL2
from recis_hybrid.optim.moments.adamw import AdamW as AdamW
from recis_hybrid.optim.moments.adamw_tf import AdamWTF as AdamWTF
from recis_hybrid.optim.moments.amsgrad import AMSGrad as AMSGrad
from recis_hybrid.optim.moments.lamb import LAMB as LAMB
from recis_hybrid.optim.moments.rowwise_adam import RowwiseAdam as RowwiseAdam
from recis_hybrid.optim.rmsprop import RMSprop as RMSprop
from recis_hybrid.optim.rowwise_adagrad import RowwiseAdagrad as RowwiseAdagrad
from recis_hybrid.optim.sgd import SGD as SGD
