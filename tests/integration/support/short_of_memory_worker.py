"""The real worker, on a device whose memory runs out: jobs with `seed` NO_MEMORY_SEED find none in backward of step 2.

    celery -A short_of_memory_worker:app worker -c 1
"""

from celery import signals

from hogwild.tasks.worker import app

__all__ = ["NO_MEMORY_SEED", "app"]

NO_MEMORY_SEED = 1234

app.conf.include = (*app.conf.include, __name__)  # the spawned child imports what is named here


@signals.worker_process_init.connect
def _child_starts(**_: object) -> None:
    import torch

    from hogwild.gpu_worker.engine import Trainer

    run = Trainer.run

    def short(self, plan, control=None, first_step=0):
        if plan.config.seed != NO_MEMORY_SEED:
            return run(self, plan, control, first_step)
        calls = 0

        def allocate(gradient):
            nonlocal calls
            calls += 1  # once for each backward pass
            if calls == 3:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        # Of the first layer: by then the others are written.
        handle = self.model.model.layers[0].mlp.up_proj.weight.register_hook(allocate)
        try:
            return run(self, plan, control, first_step)
        finally:
            handle.remove()

    Trainer.run = short
