"""Using tables with DistributedDataParallel, which averages the gradients of towers."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from recis_hybrid.embedding.engine import EmbeddingEngine
from recis_hybrid.embedding.table.hash_table import Anchor
from recis_hybrid.validation import check_type


def leave_out_of_ddp(model: nn.Module) -> None:
    """Make DistributedDataParallel ignore the tables of a model, which exchange their own gradients.

    Call it before wrapping the model. It is not needed if only the towers are wrapped.

    Args:
        model: The model to wrap.
    """
    check_type("leave_out_of_ddp", "model", model, nn.Module, "a torch.nn.Module")
    anchors = [name for name, parameter in model.named_parameters() if isinstance(parameter, Anchor)]
    anchors += [f"_orig_mod.{name}" for name in anchors]  # if torch.compile wraps the model before DDP
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, anchors)


def mean_over_samples(
    engine: EmbeddingEngine,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[Tensor]:
    """Average the towers' gradients over samples, whereas DistributedDataParallel averages them over ranks.

    The two agree if all ranks have the same number of samples. Otherwise, this is the gradient of the mean loss over
    all samples, which tables built with ``reduce="mean"`` also apply. Register it as a communication hook::

        ddp.register_comm_hook(engine, mean_over_samples)

    Args:
        engine: The engine, which knows this rank's share of the samples of the last batch.
        bucket: Gradients from DistributedDataParallel.

    Raises:
        ValueError: If the engine is not shared with other ranks.
    """
    expected = "an EmbeddingEngine, e.g. ddp.register_comm_hook(engine, mean_over_samples)"
    check_type("mean_over_samples", "engine", engine, EmbeddingEngine, expected)
    group = engine.group
    if group is None:
        raise ValueError("mean_over_samples: the engine is not shared with other ranks; DDP needs no hook then")
    share = engine.share
    # The mean over zero samples is NaN; send zeros instead.
    shares = bucket.buffer().mul_(share) if share > 0 else bucket.buffer().zero_()
    work = dist.all_reduce(shares, group=group, async_op=True)
    assert work is not None
    return work.get_future().then(lambda done: done.value()[0])  # type: ignore[no-any-return]


# DistributedDataParallel compares a hook's annotations with these objects, but in this file annotations are strings.
mean_over_samples.__annotations__.update({"bucket": dist.GradBucket, "return": torch.futures.Future[Tensor]})  # type: ignore[attr-defined]
