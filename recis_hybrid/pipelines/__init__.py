"""Training in stages, evaluation, prediction, and callbacks.

Scripts and ``app`` import it. It builds on all rooms below.
"""

from __future__ import annotations

from recis_hybrid.pipelines.callback import Callback as Callback, CallbackError as CallbackError, Record as Record
from recis_hybrid.pipelines.callbacks.checkpoint import PeriodicCheckpoint as PeriodicCheckpoint
from recis_hybrid.pipelines.callbacks.early_stop import EarlyStop as EarlyStop, PlateauSchedule as PlateauSchedule
from recis_hybrid.pipelines.callbacks.ema import EMA as EMA
from recis_hybrid.pipelines.callbacks.eviction import PeriodicEviction as PeriodicEviction
from recis_hybrid.pipelines.callbacks.json_log import JsonLog as JsonLog
from recis_hybrid.pipelines.callbacks.mlflow import MLflow as MLflow
from recis_hybrid.pipelines.callbacks.profile import Profile as Profile
from recis_hybrid.pipelines.callbacks.progress_bar import ProgressBar as ProgressBar
from recis_hybrid.pipelines.callbacks.tensorboard import TensorBoard as TensorBoard
from recis_hybrid.pipelines.callbacks.wandb import WandB as WandB
from recis_hybrid.pipelines.data.mixture import Mixture as Mixture
from recis_hybrid.pipelines.data.window_stages import WindowStages as WindowStages
from recis_hybrid.pipelines.evaluate import evaluate as evaluate
from recis_hybrid.pipelines.predict import predict as predict, write_predictions as write_predictions
from recis_hybrid.pipelines.rng import seed_everything as seed_everything
from recis_hybrid.pipelines.scores import write_scores as write_scores
from recis_hybrid.pipelines.stages import (
    Evaluate as Evaluate,
    Evict as Evict,
    Run as Run,
    SaveCheckpoint as SaveCheckpoint,
    Stage as Stage,
    Train as Train,
)
from recis_hybrid.pipelines.steps.gradient_guard import NonFiniteGradientError as NonFiniteGradientError
from recis_hybrid.pipelines.steps.loss_guard import NonFiniteLossError as NonFiniteLossError
from recis_hybrid.pipelines.steps.objective import Objective as Objective, UncertaintyWeights as UncertaintyWeights
from recis_hybrid.pipelines.steps.schedules import LrSchedule as LrSchedule
from recis_hybrid.pipelines.steps.step import (
    NoObserver as NoObserver,
    Observer as Observer,
    Predictions as Predictions,
    Replicated as Replicated,
    Step as Step,
)
from recis_hybrid.pipelines.steps.torch_step import TorchStep as TorchStep
from recis_hybrid.pipelines.trainer import Trainer as Trainer
