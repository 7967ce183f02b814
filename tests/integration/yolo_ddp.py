"""A trainer that runs Ultralytics' multi-GPU path on CPU processes: what a GPU machine does, with gloo."""

import hashlib
import json
import os

import torch
from torch import distributed as dist
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils import RANK


class CPUTrainer(DetectionTrainer):
    """Two ranks on the CPU. Only what needs a GPU is replaced: devices and the backend."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.world_size, self.steps = 2, 0

    def _setup_ddp(self):
        dist.init_process_group('gloo', rank=RANK, world_size=self.world_size)

    def _setup_train(self):
        parallel = torch.nn.parallel.DistributedDataParallel
        torch.nn.parallel.DistributedDataParallel = lambda model, device_ids, **rest: parallel(model, **rest)
        try:
            super()._setup_train()
        finally:
            torch.nn.parallel.DistributedDataParallel = parallel

    def adapters(self):
        """The trained adapters of a distilled run, as this rank has them."""
        handlers = [getattr(h, '__self__', None) for h in self.callbacks['teardown']]
        callback = next((h for h in handlers if hasattr(h, 'session')), None)
        if callback is None or callback.session.optimizer is None:
            return {}
        digest = hashlib.sha256()
        for value in callback.session.bank.export_state().values():
            digest.update(value.numpy().tobytes())
        steps = callback.session.optimizer.steps
        return dict(adapters=digest.hexdigest(), adapter_steps=steps, steps=self.steps)

    def optimizer_step(self):
        self.steps += 1
        super().optimizer_step()

    def final_eval(self):
        """Write what this rank ended with, instead of the last validation, which asks for the GPU of its rank."""
        parameters = hashlib.sha256()
        for value in self.model.module.parameters():
            parameters.update(value.detach().cpu().numpy().tobytes())
        own = self.adapters()
        report = dict(
            parameters=parameters.hexdigest(),
            items={k: float(v) for k, v in self.loss_items.items()},
            **own,
            criterion=type(self.model.module.criterion).__name__,
        )
        with open(os.path.join(os.environ['KD_REPORT'], f'{RANK}.json'), 'w') as file:
            json.dump(report, file)
