"""Pipelines: training and evaluation over batches."""

from recis_hybrid.pipelines.evaluate import Metric as Metric, evaluate as evaluate
from recis_hybrid.pipelines.fit import FitFigures as FitFigures, fit as fit
from recis_hybrid.pipelines.step import Step as Step, TorchStep as TorchStep
