"""What `test_optimizer.py` runs as two processes, and itself as one: ``two_ranks.py FOLDER RANK``."""

import sys

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from kd_plugins.distiller import AdapterBank, AdapterOptimizer

STEPS = 8
#: A term that only rank 0 has anything for; all terms off; a gradient that overflows on rank 1 alone.
ONE_SIDED, OFF, OVERFLOW = 2, (3, 4), 5


def train(rank=None):
    """The adapters, the student and the loss scale after some steps: of two ranks, or of one process for both."""
    # Each rank would start with adapters of its own.
    torch.manual_seed(rank or 0)
    bank = AdapterBank()
    for name in ('neck', 'head'):
        bank.add_module(name, nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))
    for module in bank.modules():
        if isinstance(module, nn.BatchNorm1d):
            # Its statistics would be those of half the batch.
            module.eval().running_mean.add_(rank or 0)
    torch.manual_seed(5)
    student = nn.Linear(2, 4)
    data = torch.randn(STEPS, 4, 2)
    model = student if rank is None else DistributedDataParallel(student)
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.05, weight_decay=0.1)
    scaler = torch.amp.GradScaler('cpu', init_scale=16.0)
    own = AdapterOptimizer(bank, optimizer, clip=0.5, scaler=scaler)
    for step, batch in enumerate(data):
        for half in range(2):
            if rank not in (None, half):
                continue
            feature = model(batch[2 * half : 2 * half + 2])
            live = () if step in OFF else ('neck', 'head')
            bank.mark(live)
            used = [n for n in live if not (n == 'head' and step == ONE_SIDED and half)]
            loss = feature.square().mean() + sum((bank._modules[n](feature) - 1).square().mean() for n in used)
            scaler.scale(loss / 2 if rank is None else loss).backward()
            if step == OVERFLOW and half:
                bank.neck[0].weight.grad[0, 0] = float('inf')
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return dict(state=own.state(), student=student.state_dict(), scale=scaler.get_scale())


if __name__ == '__main__':
    folder, rank = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(1)
    distributed.init_process_group('gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=2)
    torch.save(train(rank), f'{folder}/{rank}')
    distributed.destroy_process_group()
