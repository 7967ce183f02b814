"""What every distilled run promises, kept by detectors, segmentors, classifiers and Ultralytics' models.

Which promises a kind of model keeps, and in which cases, is written in cases/; where a promise is not among them its
test is not collected. Runs that several promises are about are trained once, see `Lab.pair`.
"""

from __future__ import annotations

import copy
import gc
import pickle
import signal
from pathlib import Path

import pytest
import torch

from kd_plugins.errors import DistillError
from tests.integration.labs import KEEPS, LABS, kept
from tests.integration.promises import difference, is_on, part, read, restless, shapes, weighted, without


@pytest.fixture
def lab(request, labs):
    """The lab of a case."""
    return labs(request.param)


# ---------------------------------------------------------------------- weight 0, start, stop, schedules
@kept('weight_zero')
def test_weight_zero_equals_the_plain_run(lab, case):
    """Bit for bit, the average included, whatever the run draws random numbers for."""
    plain, ours = lab.once(lab.plain_of(case)), lab.once(lab.distil(case))
    assert set(case.noise) <= restless(plain.model)
    assert [step[:2] for step in ours.steps] == [step[:2] for step in plain.steps] and len(plain.steps) == 4
    assert not any(value for step in ours.steps for value in step.kd.values()) and all(s.kd for s in ours.steps)
    assert bool(ours.adapters) == bool(case.trained)
    assert difference(plain.weights, ours.weights) == {}
    assert ours.updates == plain.updates == 4
    assert ours.generators == plain.generators
    for one, other in zip(plain.files, ours.files, strict=True):
        for entry, state in lab.saved(one).items():
            assert difference(state, lab.saved(other)[entry]) == {}


@kept('first_losses')
def test_the_first_task_losses_do_not_depend_on_distillation(lab, case):
    """KD adds terms; it neither replaces nor scales the student's own, and the average follows the student."""
    plain, ours = lab.pair(case)
    first, own = ours.steps[0], plain.steps[0]
    assert first.own == own.own
    added = sum(value for name, value in first.kd.items() if 'loss' in name)
    assert is_on(first) and len(first.kd) >= len(case.terms)
    assert first.total == pytest.approx(own.total + lab.scale * added, rel=1e-6)
    ratios = [value for name, value in first.kd.items() if name == 'kd_ratio']
    assert ratios == [pytest.approx(lab.scale * added / own.total, rel=1e-5)]
    assert ours.updates > 0


@kept('pair')
def test_a_teacher_at_work_moves_no_generator(lab, case):
    """A distilled run sees the plain run's images, flipped, mixed and erased alike, and drops the same paths."""
    plain, ours = lab.pair(case)
    assert len(plain.inputs) == 4
    assert all(torch.equal(a, b) for a, b in zip(plain.inputs, ours.inputs, strict=True))
    assert ours.generators == plain.generators
    assert all(map(is_on, ours.steps))
    assert difference(plain.weights, ours.weights), 'the teacher was not at work'


@kept('start_stop')
def test_start_and_stop(lab, case):
    """KD is on from ``start`` to before ``stop``, the run is the plain one before, and there is no teacher after."""
    held = []

    def check(runner):
        held.append(len(lab.session(runner).teachers))

    plain, ours = lab.record(lab.plain_of(case), keep=True), lab.record(lab.distil(case), keep=True, check=check)
    assert [is_on(step) for step in ours.steps] == [False, False, True, True, False, False]
    for step in (0, 1):
        assert difference(plain.states[step], ours.states[step]) == {}, step
    assert difference(plain.states[2], ours.states[2]), 'distillation never started'
    assert ours.runs == [0, 0, 1, 2, 2, 2] and ours.ran == {2, 3} and held == [1, 1, 1, 1, 0, 0]


@kept('stages')
def test_stages(lab, case):
    """What a stage freezes does not move in it, statistics included, and what it does not name is off."""
    ours = lab.record(lab.distil(case), keep=True)
    assert len(ours.states) == len(case.on)
    first, *_ = case.distill['stages']
    for step, digit in enumerate(case.on):
        kd = {name for name, value in ours.steps[step].kd.items() if 'loss' in name and value}
        assert len(kd) == len(first['terms']) if digit == '0' else len(kd) >= len(case.terms), (step, kd)
        if step == 0:
            continue
        before, after = ours.states[step - 1], ours.states[step]
        keys = [k for k in before if k.removeprefix('student.').startswith(case.frozen)]
        changed = [k for k in keys if not torch.equal(before[k], after[k])]
        assert keys and bool(changed) == (digit == '1'), (step, changed[:3])
        assert difference(before, after), 'the rest goes on'


@kept('ramp')
def test_a_ramp_follows_the_iterations_of_the_run(lab, case):
    """At learning rate 0 nothing but the weight differs between two runs, to the last digit of what is logged."""
    ramp = dict(type='linear', start=0.5, end=2.5)
    constant, ramped = (
        lab.record(lab.distil(case.but(terms=weighted(case.terms, weight)))).steps for weight in (1.0, ramp)
    )
    for weight, step, other in zip((0.5, 1.0, 1.5, 2.0), ramped, constant, strict=True):
        losses = [name for name in step.kd if 'loss' in name]
        assert len(losses) == len(case.terms)
        for name in losses:
            assert other.kd[name] > 0
            assert step.kd[name] == pytest.approx(weight * other.kd[name], rel=1e-6)
        assert step.own == other.own


@kept('schedules')
def test_a_schedule_reaches_weight_and_temperature(lab, case):
    """A ramp's weight is what the logged loss was multiplied with, from its first to its last value."""
    values = []

    def check(runner):
        session = lab.session(runner)
        (only,) = session.terms.values()
        values.append((session.weight(only), only.loss.temperature))

    steps = lab.record(lab.distil(case), check=check).steps
    assert [v[0] for v in values] == [0.0, 1.0, 2.0, 3.0]
    assert [v[1] for v in values][1:] == pytest.approx([3.25, 2.5, 1.75])
    assert [is_on(step) for step in steps] == [False, True, True, True]


# ---------------------------------------------------------------------- checkpoints
@kept('pair')
def test_checkpoints_are_those_of_the_plain_student(lab, case):
    """No trace of teacher or adapters among the student's weights, a plain run's size, and it loads strictly."""
    plain, ours = lab.pair(case)
    for theirs, path in zip(plain.files, ours.files, strict=True):
        before, after = lab.saved(theirs), lab.saved(path)
        assert list(after) == list(before) and before
        for entry, state in after.items():
            assert list(state) == list(before[entry])
            assert shapes(state) == shapes(before[entry])
            assert not [k for k in state if 'teacher' in k or 'adapter' in k or 'kd' in k.split('.')[0]]
        assert lab.entries(path) - lab.entries(theirs) == (lab.EXTRA if case.trained else set())
        lab.assert_size(path, theirs)
        lab.load(path, case)


@kept('averages')
def test_what_is_saved_is_the_average(lab, case):
    """As in a plain run, and not the last weights."""
    ours = lab.pair(case)[1]
    averaged = part(ours.weights, 'ema.module.')
    assert difference(lab.load(ours.files[-1], case).state_dict(), averaged) == {}
    assert difference(averaged, ours.model.state_dict()), 'the average is the last weights'


@pytest.mark.parametrize('lab', LABS, indirect=True)
def test_nothing_in_a_file_needs_this_package(lab):
    """No class of ours is pickled, and a process that cannot import us loads the files."""
    files = [file for case in KEEPS[lab.NAME]['pair'].values() for file in lab.pair(case)[1].files]
    assert [lab.traces(file) for file in files] == [[]] * len(files)
    lab.run('-c', f"import sys\nsys.modules['kd_plugins'] = None\nfiles = sys.argv[1:]\n{lab.OPEN}", *files)


@kept('published')
def test_a_published_file_is_a_checkpoint_of_timm(lab, case):
    """Whatever taught the student; timm reads tensors only."""
    import timm

    ours = lab.pair(case)[1]
    (published,) = Path(ours.run.work_dir).glob('epoch_2-*.pth')
    assert set(read(published)) <= {'state_dict', 'meta', 'message_hub'}
    config = lab.plain_of(case)
    net = timm.create_model(config.model.model, checkpoint_path=str(published), **lab.network(config))
    assert difference(net.state_dict(), read(ours.files[-1])['state_dict']) == {}


@kept('trained')
def test_adapters_are_saved_apart_with_their_statistics(lab, case):
    """Every tensor of theirs, after the last iteration, and learned; in no state of student or average."""
    plain, ours = lab.pair(case)
    saved = lab.saved_adapters(ours)
    assert {k.split('.')[0] for k in saved} == set(case.trained)
    assert difference(saved, ours.adapters) == {}
    assert set(difference(ours.adapters, ours.untrained)) >= ours.learned > set(), 'something was not trained'
    means = [v for k, v in saved.items() if k.endswith('running_mean')]
    batches = [v for k, v in saved.items() if k.endswith('num_batches_tracked')]
    assert len(means) == len(batches) == case.normed
    assert all(mean.abs().sum() > 0 for mean in means) and all(count == 4 for count in batches)
    for model in (ours.model, ours.averaged):
        for name, _ in [*model.named_modules(), *model.named_parameters()]:
            assert 'adapter' not in name
        assert list(model.state_dict()) == list(plain.model.state_dict())


@kept('state_dicts')
def test_no_way_to_a_state_dict_finds_or_changes_adapters(lab, case):
    """Both of MMEngine's, of the model and of its EMA copy."""
    import mmengine.runner.checkpoint as mm

    ours = lab.pair(case)[1]
    for model in (ours.model, ours.averaged):
        for state in (model.state_dict(), mm.get_state_dict(model), model.state_dict(prefix='x.', keep_vars=True)):
            assert state and not [k for k in state if 'adapter' in k]
    for load in (ours.model.load_state_dict, lambda state: mm.load_state_dict(ours.model, state, strict=True)):
        load(ours.model.state_dict())
        assert difference(ours.adapters, lab.session(ours.run).bank.export_state()) == {}


@kept('load_from')
def test_load_from_starts_at_the_checkpoints_weights(lab, case):
    """Of a plain run or one that trained adapters, EMA copy included; and distillation goes on from there."""

    def learned(state):
        statistics = ('running_mean', 'running_var', 'num_batches_tracked')
        return {k: v for k, v in state.items() if not k.endswith(statistics)}

    others = [other for other in KEEPS[lab.NAME]['trained'].values() if other.family == case.family]
    for source in (lab.pair(case)[0], *(lab.pair(other)[1] for other in others)):
        start = learned(read(source.files[-1])['state_dict'])
        config = lab.plain_of(case.but(options=dict(load_from=str(source.files[-1]), optim_wrapper__optimizer__lr=0.0)))
        config.val_cfg = config.val_dataloader = config.val_evaluator = None
        ours = lab.record(lab.distil(case, config), keep=True)
        assert all(map(is_on, ours.steps))
        for state in (ours.states[0], ours.weights):
            assert difference(start, learned(part(state, 'student.'))) == {}
        # The first update copies.
        assert difference(start, learned(part(ours.states[0], 'ema.module.'))) == {}
        assert max(difference(start, learned(part(ours.weights, 'ema.module.'))).values(), default=0) < 1e-6


# ---------------------------------------------------------------------- the teacher
@kept('pair')
def test_the_teacher_stays_as_its_file_says(lab, case):
    """Bit for bit, and at rest: neither dropout nor statistics of a batch, also while the student trains."""
    ours = lab.pair(case)[1]
    assert len(ours.prints) == 4 and len(set(ours.prints)) == 1
    assert difference(lab.stored_teacher(case), ours.teacher.model.state_dict()) == {}
    assert all(p.grad is None and not p.requires_grad for p in ours.teacher.model.parameters())
    assert ours.awake == [] and ours.steady == [True] * 4


@kept('restless')
def test_a_teacher_at_rest_could_be_restless(lab, case):
    """The measure for the test above: what a teacher has that changes in training, or changes what it says."""
    assert set(case.noise) <= restless(lab.pair(case)[1].teacher.model)


@kept('pair')
def test_the_teacher_is_in_no_module_tree_optimizer_or_average(lab, case):
    plain, ours = lab.pair(case)
    theirs = {id(p) for p in ours.teacher.model.parameters()} | {id(m) for m in ours.teacher.model.modules()}
    sizes = [tuple(p.shape) for p in plain.model.parameters()]
    for model in (ours.model, ours.averaged):
        assert not theirs & ({id(p) for p in model.parameters()} | {id(m) for m in model.modules()})
        assert [tuple(p.shape) for p in model.parameters()] == sizes
    optimized = {id(p) for p in ours.optimized}
    assert not theirs & optimized and optimized == {id(p) for p in ours.model.parameters()}


@kept('pair')
def test_the_model_is_left_as_it_was_found(lab, case):
    plain, ours = (record.model for record in lab.pair(case))
    assert not [n for n, m in ours.named_modules() if 'forward' in m.__dict__]
    hooks = [[(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] for model in (plain, ours)]
    assert hooks[0] == hooks[1]
    assert type(getattr(ours, 'criterion', None)) is type(getattr(plain, 'criterion', None))


@kept('copies')
def test_copies_and_pickles_made_in_mid_training_leave_the_teacher_out(lab, case):
    from tests.integration.lab import Probe

    sizes = {}

    def teachers(width=32):
        gc.collect()
        found = [o for o in gc.get_objects() if type(o).__name__ in ('YOLOX', 'DistilledYOLOX')]
        return len([m for m in found if m.bbox_head.feat_channels == width])

    def check(runner):
        if runner.iter != 1:
            return
        before = teachers()
        assert before >= 1
        copied = copy.deepcopy(runner.model)
        assert teachers() == before, 'the copy copied the teacher'
        sizes['copy'] = sum(p.numel() for p in copied.parameters())
        # A copy trains and predicts without distilling: the hook belongs to the original.
        data = copied.data_preprocessor(next(iter(runner.train_dataloader)), True)
        assert not [k for k in copied(**data, mode='loss') if 'kd' in k]
        assert copied.eval()(data['inputs'], mode='tensor')
        stored = pickle.dumps(runner.model)
        sizes['pickle'] = len(stored)
        loaded = pickle.loads(stored)
        assert teachers() == before, 'the pickle holds the teacher'
        assert list(loaded.state_dict()) == list(runner.model.state_dict())
        assert not [k for k, _ in loaded.named_parameters() if 'adapter' in k]

    # Not as a `Record`, whose hooks are no part of a plain run either, but cannot be pickled.
    runner = lab.train(lab.distil(case), Probe(check))
    plain = lab.build(lab.plain_of(case))
    assert sizes['copy'] == sum(p.numel() for p in runner.model.parameters())
    teacher = sum(p.numel() for p in lab.session(runner).teacher.model.parameters()) * 4
    assert sizes['pickle'] < len(pickle.dumps(plain)) + 0.2 * teacher


@kept('exception')
def test_taps_are_off_after_an_exception_in_the_students_forward(lab, case):
    runner = lab.runner(lab.distil(case))
    original = runner.model.bbox_head.loss_by_feat
    seen = []

    def broken(*args, **kwargs):
        seen.append([n for n, m in runner.model.named_modules() if 'forward' in m.__dict__])
        raise RuntimeError('out of memory')

    runner.model.bbox_head.loss_by_feat = broken
    with pytest.raises(RuntimeError, match='out of memory'):
        runner.train()
    assert seen == [list(case.tapped)]
    assert not [n for n, m in runner.model.named_modules() if 'forward' in m.__dict__]
    runner.model.bbox_head.loss_by_feat = original


# ---------------------------------------------------------------------- validation and what is served
@kept('pair')
def test_validation_in_training_never_runs_the_teacher(lab, case):
    """Nor a tap; and after it distillation goes on, with one run of the teacher for every batch."""
    ours = lab.pair(case)[1]
    assert [lab.METRIC in metrics for metrics in ours.validated] == [True] * 2 and ours.ran_in_validation == 0
    assert ours.runs == [1, 2, 3, 4] and ours.dry_runs == 1 and ours.ran == {0, 1, 2, 3}
    assert ours.tapped == {True: 4 * lab.is_tapped(case), False: 0}


@kept('served')
def test_a_served_model_predicts_what_the_plain_one_predicts(lab, case):
    """Same modules, same outputs, no hook, no instance attribute on the way, and no teacher at hand."""
    ours = lab.pair(case)[1]
    with without(lab.files(lab.teacher(**case.teacher))):
        served = lab.served(case, ours)
    plain = lab.load(ours.files[-1], case)
    assert not any(m._forward_hooks or m._forward_pre_hooks or 'forward' in m.__dict__ for m in served.modules())
    image = torch.rand(2, 3, lab.SIZE, lab.SIZE)
    with torch.no_grad():
        predictions = lab.predictions(served, image), lab.predictions(plain, image)
    assert len(predictions[0]) > 0
    for one, other in zip(*predictions, strict=True):
        assert torch.equal(one, other)
    assert [n for n, _ in served.named_modules()] == [n for n, _ in plain.named_modules()]


@kept('without_teacher')
def test_training_without_the_teacher_is_refused(lab, case):
    """What test time tolerates, training does not."""
    config = lab.distil(case)
    with without(lab.files(lab.teacher(**case.teacher))), pytest.raises(DistillError, match='does not exist'):
        lab.train(config)


# ---------------------------------------------------------------------- resume
@kept('plain_resume')
def test_the_framework_itself_resumes_exactly(lab, case):
    """The measure for the next test: MMEngine restores weights, momentum, EMA and the order of the images."""
    config = lab.plain_of(case)
    whole, again = lab.record(config), lab.record(lab.interrupted(config, 5))
    assert again.steps == whole.steps[4:] and len(again.steps) >= 2
    assert difference(whole.weights, again.weights) == {}


@kept('sigkill')
def test_resume_after_sigkill_equals_the_uninterrupted_run(lab, case):
    """Adapters and their statistics, the place on the ramp, and ``stop``; the run died in mid-epoch."""
    config = lab.as_written(lab.distil(case))
    whole = lab.record(config)
    assert [str(int(is_on(step))) for step in whole.steps] == list(case.on)

    killed = lab.in_child(config, '_killed')
    resumed = copy.deepcopy(killed)
    out = Path(killed.work_dir + '_dump')
    killed.custom_hooks.append(dict(type='KillAt', iteration=5))
    resumed.custom_hooks.append(dict(type='Dump', path=str(out)))
    files = lab.dump(killed, 'killed.py'), lab.dump(resumed, 'resumed.py')
    printed = lab.run('-m', 'tests.integration.killed_run', *files).stdout
    assert f'ended with {-signal.SIGKILL}' in printed

    again = read(f'{out}0')
    assert again['iterations'] == list(range(4, len(case.on))), 'it did not continue from the last checkpoint'
    # The ramp's value enters the logged losses.
    assert [lab.step(log) for log in again['logs']] == whole.steps[4:]
    assert difference(whole.adapters, again['adapters']) == {} and whole.adapters
    assert difference(whole.weights, again['weights']) == {}
    last = read(Path(resumed.work_dir) / whole.files[-1].name)
    assert difference(whole.adapters, last['kd_plugins']['adapters']) == {}


@kept('silent_resume')
def test_a_resumed_run_of_weight_zero_is_the_resumed_plain_run(lab, case):
    """What is random restarts from the seed on resume; distillation does not move it."""
    plain, ours = (lab.record(lab.interrupted(plan, 3)) for plan in (lab.plain_of(case), lab.distil(case)))
    assert [step[:2] for step in ours.steps] == [step[:2] for step in plain.steps] and len(plain.steps) == 2
    assert difference(plain.weights, ours.weights) == {}


@kept('resume_of_another')
def test_resume_from_a_plain_checkpoint_is_refused_where_adapters_are_trained(lab, case):
    plain = lab.once(lab.plain_of(case))
    config = lab.distil(case)
    config.resume, config.load_from = True, str(plain.files[-1])
    with pytest.raises(DistillError, match=r'holds no adapters.*load_from'):
        lab.train(config)


# ---------------------------------------------------------------------- two processes
TWO = {name: case for name, keeps in KEEPS.items() for case in keeps.get('two_processes', {}).values()}


@pytest.fixture(scope='module')
def ranks(labs):
    """What both ranks of a run wrote, by lab, and what was printed; one pair of processes trains all of them."""
    outs, files = {}, []
    for name, case in TWO.items():
        lab = labs(name)
        config = lab.in_child(lab.distil(case), '_ranks')
        outs[name] = f'{config.work_dir}_dump'
        config.custom_hooks.append(dict(type='Dump', path=outs[name]))
        # MMEngine's default, but for the GPU that it names.
        config.model_wrapper_cfg = dict(
            type='MMDistributedDataParallel', find_unused_parameters=False, broadcast_buffers=False, device_ids=None
        )
        files.append(lab.dump(config))
    launch = ['-m', 'torch.distributed.run', '--nproc_per_node=2', '--standalone']
    printed = lab.run(*launch, 'tests/integration/two_ranks.py', *files, CUDA_VISIBLE_DEVICES='').stdout
    return {name: (read(f'{out}0'), read(f'{out}1')) for name, out in outs.items()}, printed


@kept('two_processes')
def test_two_processes_run_through_start_and_stop(lab, case, ranks):
    """Without unused-parameter errors where adapters are idle or what the labels teach changes."""
    both = ranks[0][lab.NAME]
    for rank in both:
        assert rank['wrapper'] == 'MMDistributedDataParallel'
        assert [str(int(log['loss_kd_features'] > 0)) for log in rank['logs']] == list(case.on)
        for log, on in zip(rank['logs'], case.on, strict=True):
            values = [log[f'loss_kd_{name}'] > 0 for name in case.terms]
            assert (case.idle or all(values)) if on == '1' else not any(values)
    assert both[0]['logs'] != both[1]['logs'], 'both ranks saw the same images'
    assert ranks[1].count('Knowledge distillation is ON') == len(TWO), 'a summary was not printed once'


@kept('idle_ranks')
def test_one_of_two_processes_may_have_nothing_to_teach(lab, case, ranks):
    """The teacher knows some of the classes, hence not all images of a rank."""
    idle = [[log['loss_kd_token'] == 0 for log in rank['logs'][4:8]] for rank in ranks[0][lab.NAME]]
    assert not all(idle[0] + idle[1]) and idle[0] != idle[1], 'both ranks had images of known classes alike'


@kept('two_processes')
def test_two_processes_hold_equal_weights(lab, case, ranks):
    """All that is trained; statistics of BatchNorm are those of a rank's own images."""

    def trained(state):
        return {k: v for k, v in state.items() if 'running_' not in k}

    first, second = both = ranks[0][lab.NAME]
    for entry in ('weights', 'adapters'):
        assert difference(trained(first[entry]), trained(second[entry])) == {} and first[entry]
    student = dict(lab.build(lab.plain_of(case)).named_parameters())
    stage, *_ = case.distill.get('stages', [None])
    per_epoch = len(case.on) // case.options.get('train_cfg__max_epochs', 1)
    for step, on in enumerate(case.on):
        gradients, others = (rank['gradients'][step] for rank in both)
        assert difference(gradients, others) == {}
        adapters = {k.removeprefix('kd_adapters.'): v for k, v in gradients.items() if k not in student}
        frozen = {k for k in student if stage and k.startswith(case.frozen) and step < stage['until'] * per_epoch}
        assert set(student) - frozen == set(gradients) - {f'kd_adapters.{k}' for k in adapters}
        assert all(gradients[name].any() for name in lab.HEADS)
        assert {k.split('.')[0] for k in adapters} == (set(case.trained) if on == '1' else set())
        for term in case.trained:
            taught = on == '1' and any(rank['logs'][step][f'loss_kd_{term}'] > 0 for rank in both)
            moved = [bool(v.any()) for k, v in adapters.items() if k.split('.')[0] == term]
            assert moved == [taught] * len(moved) and (moved or not taught)
    assert {k.split('.')[0] for k in first['adapters']} == set(case.trained)


@kept('generator')
def test_a_loss_with_weights_of_its_own_trains_them_in_two_processes(lab, case, ranks):
    """MGD's generator, which the test above finds equal on both ranks."""
    for rank in ranks[0][lab.NAME]:
        generator = {k for k in rank['adapters'] if k.startswith('mgd.losses') and 'generator' in k}
        assert generator and {f'kd_adapters.{k}' for k in generator} <= set(rank['gradients'][1])


@kept('two_processes')
def test_the_teacher_is_in_no_bucket_of_two_processes(lab, case, ranks):
    student = [tuple(p.shape) for p in lab.build(lab.plain_of(case)).parameters()]
    assert [rank['parameters'] for rank in ranks[0][lab.NAME]] == [student] * 2


@kept('joint')
def test_gradients_of_two_processes_are_those_of_one_on_the_joint_batch(lab, case, ranks):
    """Every step, adapters included, within 1e-3 of the largest gradient of the tensor (float32 summation order)."""
    from tests.integration import child_hooks  # noqa: F401  (registers Dump)

    double = 2 * case.options['train_dataloader__batch_size']
    config = lab.named(lab.distil(case.but(options=dict(train_dataloader__batch_size=double))), '_single')
    out = f'{config.work_dir}_dump'
    config.custom_hooks.append(dict(type='Dump', path=out))
    lab.train(config)
    single, both = read(f'{out}0'), ranks[0][lab.NAME][0]
    assert len(single['gradients']) == len(case.on)
    for step, on in enumerate(case.on):
        alone, joint = single['gradients'][step], both['gradients'][step]
        assert set(alone) == set(joint)
        assert any(k.startswith('kd_adapters') and v.any() for k, v in joint.items()) == (on == '1')
        for key, value in joint.items():
            scale = alone[key].abs().max().item()
            assert (value - alone[key]).abs().max().item() <= 1e-3 * scale + 1e-6, (step, key)
    for entry in ('weights', 'adapters'):
        assert max(difference(single[entry], both[entry]).values(), default=0) < 1e-4


# ---------------------------------------------------------------------- classes
@kept('other_classes')
def test_a_teacher_of_other_classes(lab, case):
    """Only what both know is compared, by name."""
    ours = lab.record(lab.distil(case))
    assert all(map(is_on, ours.steps))
    ((key, (student, teacher)),) = lab.session(ours.run).classes.items()
    names = case.teacher['names']
    common = [name for name in lab.CLASSES if name in names]
    assert [lab.CLASSES[i] for i in student] == [names[i] for i in teacher] == common and len(common) == 3
    assert key == ''


@kept('no_common_classes')
def test_features_need_no_common_classes(lab, case):
    """A backbone that was trained on other classes can teach one."""
    ours = lab.record(lab.distil(case))
    assert all(map(is_on, ours.steps))
    assert lab.session(ours.run).classes == {'': None}
