"""Metrics of predictions: functions of tensors, and accumulators with torchmetrics' interface.

Accumulators merge, give and take their state as tensors, and compute over all ranks where torch.distributed is
initialised. What is not defined (an AUC of one class only) is NaN, with a RuntimeWarning that names it.
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
