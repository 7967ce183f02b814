"""Ultralytics' tuner trains in processes of its own: what they are given, and what they tell."""

import json
import os
import subprocess
import sys

import pytest

from kd_plugins import autoload
from kd_plugins.errors import DistillError
from kd_plugins.on_import import REPORT, VARIABLE
from kd_plugins.yolo import DistillCallback
from kd_plugins.yolo.tuning import add_to_report, inherited, read_report, report


@pytest.fixture
def callback(teacher_file):
    return DistillCallback(teacher_file('wide.yaml'), box=0.5)


def test_a_child_distils_and_keeps_what_its_python_ran_before(callback, tmp_path, monkeypatch):
    """The file that Python runs at its start may hide one of the user's; the environment comes back as it was."""
    theirs = tmp_path / 'theirs'
    theirs.mkdir()
    (theirs / 'sitecustomize.py').write_text('import os; os.environ["THEIRS"] = "ran"\n')
    monkeypatch.setenv('PYTHONPATH', str(theirs))
    monkeypatch.delenv(VARIABLE, raising=False)
    before = dict(os.environ)
    code = (
        'import os, sys; from ultralytics.utils.callbacks import default_callbacks;'
        'own = [c.__self__.recipe for h in default_callbacks.values() for c in h if hasattr(c, "__self__")];'
        'print("FOUND", os.environ.get("THEIRS"), *own)'
    )
    with inherited(callback.options, tmp_path):
        done = subprocess.run([sys.executable, '-c', code], cwd='/', capture_output=True, text=True, check=True)
    recipe = str(tmp_path / 'kd.yaml')
    assert f'FOUND ran {recipe} {recipe}\n' in done.stdout  # one for each event, and once
    assert dict(os.environ) == before
    assert autoload.RecipeCallback(recipe)._build().options == callback.options


def test_an_option_that_is_an_object_is_refused(callback, tmp_path):
    terms = dict(neck=dict(loss=dict(type=dict), student='neck', teacher='neck'))
    options = callback.options.replace(terms=terms)
    with pytest.raises(DistillError, match=r'is an object; name it instead, e\.g\. loss=dict\(type='):
        with inherited(options, tmp_path):
            pass


def test_rays_processes_are_refused_before_anything_is_done(callback, build):
    from ultralytics import YOLO

    model = YOLO(build('small.yaml').yaml['yaml_file'], verbose=False)
    callback.register(model)
    with pytest.raises(DistillError, match=r"Ray's own processes.*leave it out.*yolo-kd enable.*KD_PLUGINS_YOLO=kd"):
        model.tune(use_ray=True, data='coco8.yaml')


def test_tuning_is_changed_on_this_object_only(callback, build):
    from ultralytics import YOLO

    model = YOLO(build('small.yaml').yaml['yaml_file'], verbose=False)
    plain = model.tune.__func__
    callback.register(model)
    assert model.tune.func.__self__ is callback and YOLO.tune is plain
    callback.unregister(model)
    assert model.tune.__func__ is plain


def test_what_the_trainings_told(tmp_path, monkeypatch):
    class Trainer:
        save_dir = tmp_path / 'train'

    Trainer.save_dir.mkdir()
    monkeypatch.setenv(REPORT, str(tmp_path / 'trainings.jsonl'))
    for start, end in ((1.0, 0.5), (1.0, 0.25), (None, None)):
        (Trainer.save_dir / 'kd_summary.json').write_text(json.dumps({'kd_ratio': {'start': start, 'end': end}}))
        add_to_report(Trainer)
    (Trainer.save_dir / 'kd.yaml').touch()
    found = read_report(tmp_path)
    text = report(found)
    assert text.startswith(
        'Knowledge distillation was ON in 2 training(s) of this tune(); kd_ratio at the end: 0.25 to'
    )
    assert f'cfg=.../best_hyperparameters.yaml kd={tmp_path}/train/kd.yaml' in text
    for never in ([], found[2:]):
        with pytest.raises(DistillError, match=r'No training of this tune\(\) was distilled'):
            report(never)
