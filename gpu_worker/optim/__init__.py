"""Optimizers that update a live model one parameter at a time, inside backward."""

from collections.abc import Collection
from typing import Any

from hogwild.gpu_worker.config import TrainConfig
from hogwild.gpu_worker.optim.adamw import AdamW
from hogwild.gpu_worker.optim.apollo import Apollo, ApolloMini
from hogwild.gpu_worker.optim.base import Optimizer, StepStats
from hogwild.gpu_worker.optim.sgd import SGD

__all__ = ["SGD", "AdamW", "Apollo", "ApolloMini", "Optimizer", "StepStats", "build_optimizer"]


def build_optimizer(config: TrainConfig, token_params: Collection[str] = ()) -> Optimizer:
    """A fresh optimizer of the kind that the job asks for; `token_params` names the embeddings and heads."""
    options: dict[str, Any] = {"weight_decay": config.weight_decay, "token_params": token_params}
    match config.optimizer:
        case "sgd":
            return SGD(**options)
        case "adamw":
            return AdamW(**options)
        case "apollo":
            return Apollo(rank=config.projection_rank, scale=config.scale, **options)
        case _:
            return ApolloMini(scale=config.scale, **options)
