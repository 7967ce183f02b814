"""A finished phase is kept, an interrupted one resumed, one with other settings set aside, a failed one explained."""

import io
import json
import os
import signal
import sys
import threading
import time

import pytest

from kd_plugins.errors import DistillError
from kd_plugins.lab.comparison.phases import MARKER, Display, Phase, Progress, clock, run_phases, tail

# Writes down how it was called.
SCRIPT = """
import pathlib, sys
with open(pathlib.Path(sys.argv[1]) / 'calls', 'a') as f:
    print('resumed' if '--resume' in sys.argv else 'fresh', file=f)
print('done 0.5 loss 2.5 metric 0.123')
"""


class Words(Progress):
    def update(self, line, mode, max_epochs):
        words = line.split()
        for name, value in zip(words[::2], words[1::2], strict=False):
            setattr(self, name, float(value))
        return True


def phase(folder, script=SCRIPT, **settings):
    return Phase(
        'train it',
        folder,
        [sys.executable, '-c', script, str(folder)],
        settings or {'a': 1},
        Words(),
        resume=['--resume'],
        max_epochs=1,
    )


def run(*phases, jobs=1):
    stream = io.StringIO()
    run_phases(phases, Display(stream), jobs)
    return stream.getvalue()


def calls(folder):
    return (folder / 'calls').read_text().split()


def test_done_once(tmp_path):
    folder = tmp_path / 'a'
    said = run(phase(folder))
    assert 'train it: done in' in said and 'mAP 0.123' in said
    assert json.loads((folder / MARKER).read_text())['done'] is True
    assert 'already done' in run(phase(folder))
    assert calls(folder) == ['fresh']


def test_the_metric_has_its_own_name(tmp_path):
    other = phase(tmp_path / 'a')
    other.progress.metric_name = 'mIoU'
    assert 'mIoU 0.123' in run(other)


def test_interrupted_is_resumed(tmp_path):
    folder = tmp_path / 'a'
    phase(folder).mark()
    assert 'resumed' in run(phase(folder))
    assert calls(folder) == ['resumed']
    assert 'already done' in run(phase(folder))


def test_other_settings_run_again_and_lose_nothing(tmp_path):
    folder = tmp_path / 'a'
    run(phase(folder, a=1))
    assert 'settings have changed' in run(phase(folder, a=2))
    assert calls(folder) == ['fresh']
    (kept,) = (p for p in tmp_path.iterdir() if p != folder)
    assert kept.name.startswith('a.') and calls(kept) == ['fresh']


def test_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / 'thesis.txt').write_text('mine')
    with pytest.raises(DistillError, match='no comparison wrote'):
        run(phase(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ['thesis.txt']


def test_failure_shows_the_end_of_the_log(tmp_path):
    folder = tmp_path / 'a'
    with pytest.raises(DistillError, match=r'(?s)train it failed \(exit status 3\).*train\.log.*boom'):
        run(phase(folder, "print('boom'); raise SystemExit(3)"))
    # It counts as interrupted: after the cause is mended the run goes on.
    assert phase(folder).state() == 'started'


def test_a_failure_ends_the_others(tmp_path):
    slow = phase(tmp_path / 'slow', 'import time; time.sleep(60)')
    began = time.monotonic()
    with pytest.raises(DistillError, match='failed'):
        run(slow, phase(tmp_path / 'bad', 'raise SystemExit(1)'), jobs=2)
    assert time.monotonic() - began < 55, 'it was waited for'
    assert slow.state() == 'started'


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_whoever_ends_it_ends_the_training(tmp_path, number):
    slow = phase(tmp_path / 'slow', 'import os, time; print(os.getpid(), flush=True); time.sleep(60)')

    def end():
        deadline = time.monotonic() + 50
        while not (slow.log.exists() and slow.log.read_text().endswith('\n')) and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    # A shell starts background jobs with SIGINT ignored, and Python then leaves it so.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Thread(target=end).start()
        with pytest.raises(SystemExit) as left:
            run(slow)
    finally:
        signal.signal(signal.SIGINT, before)
    assert left.value.code == 130
    with pytest.raises(ProcessLookupError):
        os.kill(int(slow.log.read_text()), 0)
    assert slow.state() == 'started'


def test_clock():
    assert [clock(s) for s in (0, 61, 3661)] == ['0:00', '1:01', '1:01:01']


def test_tail(tmp_path):
    (tmp_path / 'a.log').write_text('\n'.join(map(str, range(100))))
    assert tail(tmp_path / 'a.log', 2) == '98\n99'
    assert tail(tmp_path / 'b.log') == ''
