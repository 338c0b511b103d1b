"""Metrics of predictions: functions of tensors, and accumulators with torchmetrics' interface."""

from recis_hybrid.metrics.auc import AUC as AUC, auc as auc
from recis_hybrid.metrics.logloss import LogLoss as LogLoss, logloss as logloss
