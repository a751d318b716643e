"""Optimizers that update a live model one parameter at a time, inside backward."""

from hogwild.gpu_worker.config import TrainConfig
from hogwild.gpu_worker.optim.adamw import AdamW
from hogwild.gpu_worker.optim.apollo import Apollo, ApolloMini
from hogwild.gpu_worker.optim.base import Optimizer, StepStats
from hogwild.gpu_worker.optim.sgd import SGD

__all__ = ["SGD", "AdamW", "Apollo", "ApolloMini", "Optimizer", "StepStats", "build_optimizer"]


def build_optimizer(config: TrainConfig) -> Optimizer:
    """A fresh optimizer of the kind that the job asks for."""
    match config.optimizer:
        case "sgd":
            return SGD(weight_decay=config.weight_decay)
        case "adamw":
            return AdamW(weight_decay=config.weight_decay)
        case "apollo":
            return Apollo(rank=config.projection_rank, weight_decay=config.weight_decay)
        case _:
            return ApolloMini(weight_decay=config.weight_decay)
