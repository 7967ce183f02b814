"""Promise 17: two processes are one process on the joint batch."""

import os

import pytest
import torch

from tests.integration import child_hooks  # noqa: F401  (registers Dump)
from tests.integration.lab import FEATURES, GROUP_NORM, LOGITS, difference

STEPS, START, STOP = 6, 2, 4


def config_of(lab, batch, out):
    """Same images and order for any number of processes; group norm, so that only the gradient counts."""
    config = lab.plain(
        steps=STEPS,
        extra=GROUP_NORM,
        model__data_preprocessor__pad_size_divisor=96,
        train_dataloader__batch_size=batch,
        train_dataloader__sampler__shuffle=False,
        env_cfg__dist_cfg__backend='gloo',
        optim_wrapper__optimizer__lr=1e-4,  # rounding must not grow from step to step
    )
    config.train_dataloader.dataset.pipeline[3].prob = 0.0
    config.custom_imports = dict(imports=['tests.integration.child_hooks'], allow_failed_imports=False)
    config.custom_hooks.append(dict(type='Dump', path=out))
    # MMEngine's default, but for the GPU that it names.
    config.model_wrapper_cfg = dict(
        type='MMDistributedDataParallel', find_unused_parameters=False, broadcast_buffers=False, device_ids=None
    )
    config = lab.model_form(config, lab.teacher(), dict(features=FEATURES, logits=LOGITS), start=START, stop=STOP)
    return config


@pytest.fixture(scope='module')
def runs(lab):
    """What both ranks and a single process on the joint batch wrote, and what the two printed."""
    folder = str(lab.root)
    single = config_of(lab, 4, os.path.join(folder, 'single'))
    lab.train(single)
    joint = config_of(lab, 2, os.path.join(folder, 'rank'))
    launch = ['-m', 'torch.distributed.run', '--nproc_per_node=2', '--standalone']
    done = lab.run(*launch, 'tools/train.py', lab.dump(joint), '--launcher', 'pytorch', CUDA_VISIBLE_DEVICES='')
    read = [torch.load(os.path.join(folder, n), weights_only=False) for n in ('single0', 'rank0', 'rank1')]
    return (*read, done.stdout)


def test_it_ran_in_ddp_through_start_and_stop(runs):
    """No unused-parameter error before ``start`` and after ``stop``, although the adapters are idle there."""
    single, zero, _, _ = runs
    assert zero['wrapper'] == 'MMDistributedDataParallel'
    for run in (single, zero):
        on = [log['loss_kd_features'] > 0 and log['loss_kd_logits'] > 0 for log in run['logs']]
        assert on == [False, False, True, True, False, False]


def test_both_ranks_hold_the_same_weights(runs):
    _, zero, one, _ = runs
    assert difference(zero['weights'], one['weights']) == {}
    assert difference(zero['adapters'], one['adapters']) == {}
    assert zero['logs'] != one['logs'], 'both ranks saw the same images'


def test_gradient_is_that_of_one_process_on_the_joint_batch(runs):
    """Every step, adapters included, within 1e-3 of the largest gradient of the tensor (float32 summation order)."""
    single, zero, one, _ = runs
    adapters = {k for step in zero['gradients'] for k in step if k.startswith('kd_adapters')}
    assert adapters
    for step in range(STEPS):
        alone, both, other = (r['gradients'][step] for r in (single, zero, one))
        assert difference(both, other) == {}
        for key in set(both) - (set() if key_active(step) else adapters):
            scale = alone[key].abs().max().item()
            assert (both[key] - alone[key]).abs().max().item() <= 1e-3 * scale + 1e-6, (step, key)
        idle = not any(k in both and both[k].any() for k in adapters)
        assert idle == (not key_active(step))


def key_active(step):
    return START <= step < STOP


def test_teacher_is_in_no_ddp_bucket(lab, runs):
    _, zero, _, _ = runs
    student = [tuple(p.shape) for p in lab.build(lab.plain(extra=GROUP_NORM)).parameters()]
    assert zero['parameters'] == student and zero['adapters']


def test_summary_is_printed_once(runs):
    assert runs[3].count('Knowledge distillation is ON') == 1
