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
        self.world_size = 2

    def _setup_ddp(self):
        dist.init_process_group('gloo', rank=RANK, world_size=self.world_size)

    def _setup_train(self):
        parallel = torch.nn.parallel.DistributedDataParallel
        torch.nn.parallel.DistributedDataParallel = lambda model, device_ids, **rest: parallel(model, **rest)
        try:
            super()._setup_train()
        finally:
            torch.nn.parallel.DistributedDataParallel = parallel

    def final_eval(self):
        """Write what this rank ended with, instead of the last validation, which asks for the GPU of its rank."""
        parameters = hashlib.sha256()
        for value in self.model.module.parameters():
            parameters.update(value.detach().cpu().numpy().tobytes())
        report = dict(
            parameters=parameters.hexdigest(),
            items={k: float(v) for k, v in self.loss_items.items()},
            criterion=type(self.model.module.criterion).__name__,
        )
        with open(os.path.join(os.environ['KD_REPORT'], f'{RANK}.json'), 'w') as file:
            json.dump(report, file)
