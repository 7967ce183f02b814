"""results.csv of a run that is resumed with another set of columns."""

import sys
from types import ModuleType, SimpleNamespace

from kd_plugins import autoload, on_import
from kd_plugins.on_import import VARIABLE
from kd_plugins.yolo import log, resume

DISTILLED = (
    'epoch,time,train/box_loss,train/kdcls_loss,train/kd_ratio,metrics/mAP50(B),val/box_loss,val/kdcls_loss,lr/pg0\n'
    '1,0.3,1.5,4.4,2.9,0.1,1.6,0,0.01\n'
)
PLAIN = 'epoch,time,train/box_loss,metrics/mAP50(B),val/box_loss,lr/pg0\n1,0.3,1.5,0.1,1.6,0.01\n'


def test_columns_of_distillation_are_taken_out_and_kept_aside(tmp_path):
    file = tmp_path / 'results.csv'
    file.write_text(DISTILLED)
    for _ in range(2):
        log.drop_columns(file)
        assert file.read_text() == PLAIN
    assert (tmp_path / log.DISTILLED).read_text() == DISTILLED
    log.drop_columns(tmp_path / 'missing.csv')


def test_a_plain_log_is_set_aside_for_columns_of_distillation(tmp_path):
    file = tmp_path / 'results.csv'
    file.write_text(DISTILLED)
    log.begin_columns(file)
    assert file.read_text() == DISTILLED
    file.write_text(PLAIN)
    log.begin_columns(file)
    assert not file.exists() and (tmp_path / log.PLAIN).read_text() == PLAIN
    log.begin_columns(file)


def callbacks_module():
    module = ModuleType(on_import.MODULE)
    module.default_callbacks = {event: [] for event in (*autoload.EVENTS, 'on_train_start')}
    return module


def test_enabled_without_a_recipe_only_resumes_are_watched(monkeypatch):
    module = callbacks_module()
    monkeypatch.setitem(sys.modules, on_import.MODULE, module)
    monkeypatch.delenv(VARIABLE, raising=False)
    autoload.install()
    assert module.default_callbacks == {
        **callbacks_module().default_callbacks,
        'on_train_start': [autoload.on_train_start],
    }
    warned = []
    monkeypatch.setattr(resume, 'warn_undistilled', warned.append)
    for trainer in (SimpleNamespace(resume=False), SimpleNamespace(resume=True)):
        autoload.on_train_start(trainer)
    assert warned == [trainer]


def test_the_line_of_the_switch_looks_for_a_resume(monkeypatch):
    called = []
    monkeypatch.setattr(autoload, 'install', lambda: called.append(1))
    monkeypatch.delenv(VARIABLE, raising=False)
    for words in (['yolo', 'train'], ['yolo', 'train', 'resume', 'model=last.pt'], ['yolo', 'train', 'resume=True']):
        monkeypatch.setattr(sys, 'orig_argv', words)
        exec(autoload.LINE)
    assert len(called) == 2
