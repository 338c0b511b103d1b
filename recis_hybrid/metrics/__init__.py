"""Metrics of predictions: functions of tensors, and accumulators with the interface of torchmetrics.

Accumulators can be merged and saved, and compute over all ranks if torch.distributed is initialized. An undefined
value, such as the AUC of a single class, is NaN, with a RuntimeWarning that gives the reason.
"""

from __future__ import annotations

from recis_hybrid.metrics._metric import Metric as Metric
from recis_hybrid.metrics.auc import AUC as AUC, auc as auc
from recis_hybrid.metrics.binned_auc import BinnedAUC as BinnedAUC
from recis_hybrid.metrics.calibration import Calibration as Calibration
from recis_hybrid.metrics.gauc import GAUC as GAUC, gauc as gauc
from recis_hybrid.metrics.logloss import (
    LogLoss as LogLoss,
    NormalizedEntropy as NormalizedEntropy,
    logloss as logloss,
    normalized_entropy as normalized_entropy,
)
from recis_hybrid.metrics.mse import MSE as MSE
from recis_hybrid.metrics.ranking import (
    HitRateAtK as HitRateAtK,
    NDCGAtK as NDCGAtK,
    PrecisionAtK as PrecisionAtK,
    RecallAtK as RecallAtK,
)
