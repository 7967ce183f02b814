"""One step of a comparison as a process of its own: skipped when done, resumed when interrupted."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_plugins.errors import DistillError

MARKER = 'phase.json'  # beside what the phase writes: its settings, and when it is done what it took
_LINE_EVERY = 20.0  # seconds between lines where the output is not a terminal


@dataclass
class Progress:
    """Where a run is, as far as its output tells.

    Attributes:
        done: Fraction done in [0, 1].
        epoch: Current epoch, or None.
        loss: Last logged loss, or None.
        metric: Last logged accuracy in [0, 1], or None.
        metric_name: What it is called.
    """

    done: float = 0.0
    epoch: int | None = None
    loss: float | None = None
    metric: float | None = None
    metric_name: str = 'mAP'

    def update(self, line: str, mode: str, max_epochs: int | None) -> bool:
        """Read one line of the output.

        Args:
            line: The line.
            mode: ``'train'`` or ``'test'``: what the fraction is of.
            max_epochs: Length of the run in epochs; None for a loop over iterations.

        Returns:
            Whether it said something new.
        """
        raise NotImplementedError


@dataclass
class Phase:
    """A training or an evaluation.

    Attributes:
        title: What a reader calls it.
        folder: Where it writes everything.
        command: The command, without what resumes it.
        progress: Reads where it is from what it prints.
        resume: What to add to the command after an interruption; None begins again.
        settings: All that its outcome depends on; another value means another run.
        mode: ``'train'`` or ``'test'``.
        max_epochs: Length in epochs; None for a loop over iterations.
        threads: OpenMP threads of the process.
    """

    title: str
    folder: Path
    command: Sequence[str]
    settings: Mapping[str, Any]
    progress: Progress
    resume: Sequence[str] | None = None
    mode: str = 'train'
    max_epochs: int | None = None
    threads: int = 1

    @property
    def fingerprint(self) -> str:
        """Hash of the settings."""
        text = json.dumps(self.settings, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def log(self) -> Path:
        """The file with all that the process printed."""
        return self.folder / f'{self.mode}.log'

    def state(self) -> str:
        """``'new'``, ``'started'`` (with these settings), ``'done'`` or ``'other'`` (settings have changed)."""
        if not self.folder.is_dir() or not any(self.folder.iterdir()):
            return 'new'
        try:
            found = json.loads((self.folder / MARKER).read_text())
            known = found['fingerprint']
        except (OSError, ValueError, KeyError, TypeError):
            raise DistillError(
                f'{self.folder} holds files that no comparison wrote; give another --work-dir or move them away.'
            ) from None
        if known != self.fingerprint:
            return 'other'
        return 'done' if found.get('done') else 'started'

    def mark(self, **outcome: Any) -> None:
        """Write the marker so that a kill leaves the old or the new one, never half of one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / (MARKER + '.partial')
        content = dict(title=self.title, fingerprint=self.fingerprint, settings=self.settings, **outcome)
        partial.write_text(json.dumps(content, indent=1, default=str))
        os.replace(partial, self.folder / MARKER)

    def set_aside(self) -> Path:
        """Rename the folder of a run with other settings, so that nothing is lost."""
        known = json.loads((self.folder / MARKER).read_text())['fingerprint']
        target = self.folder.with_name(f'{self.folder.name}.{known}')
        number = 1
        while target.exists():
            number += 1
            target = self.folder.with_name(f'{self.folder.name}.{known}.{number}')
        self.folder.rename(target)
        return target


class Display:
    """Progress of the phases that run: lines that are rewritten on a terminal, lines now and then elsewhere.

    Args:
        stream: Where to; default standard output.
    """

    def __init__(self, stream: Any = None) -> None:
        self.stream = stream or sys.stdout
        self.live = self.stream.isatty() and os.environ.get('TERM') != 'dumb'
        self._shown = 0
        self._last = 0.0

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self._clear()
        print(text, file=self.stream, flush=True)

    def show(self, lines: Sequence[str]) -> None:
        """Show where things are, one line for each."""
        if self.live:
            # A line that wraps could not be taken back.
            columns = shutil.get_terminal_size().columns - 1
            self._clear()
            self.stream.write(''.join(f'{line[:columns]}\n' for line in lines))
            self.stream.flush()
            self._shown = len(lines)
        elif time.monotonic() - self._last >= _LINE_EVERY:
            self._last = time.monotonic()
            print('\n'.join(lines), file=self.stream, flush=True)

    def _clear(self) -> None:
        if self._shown:
            self.stream.write(f'\x1b[{self._shown}A\x1b[J')
            self._shown = 0


class _Running:
    """A phase whose process runs."""

    def __init__(self, phase: Phase, resume: bool, width: int) -> None:
        self.phase = phase
        self.width = width
        self.began = time.monotonic()
        self.first: tuple[float, float] | None = None  # (seconds, fraction) when it first said where it is
        phase.mark(started=time.time())
        self._read_from = phase.log.stat().st_size if phase.log.exists() else 0
        self._rest = ''
        self._output = phase.log.open('a')
        environment = {
            **os.environ,
            'OMP_NUM_THREADS': str(phase.threads),
            # Idle threads that spin slow everything else down many times over when the cores are shared.
            'OMP_WAIT_POLICY': 'PASSIVE',
            'PYTHONUNBUFFERED': '1',
        }
        command = [*phase.command, *(phase.resume or () if resume else ())]
        # A group of its own: loaders are ended with it, and Ctrl-C reaches it through us alone.
        self.process = subprocess.Popen(
            command, stdout=self._output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )

    def read(self) -> None:
        with self.phase.log.open(errors='replace') as file:
            file.seek(self._read_from)
            text = self._rest + file.read()
            self._read_from = file.tell()
        *lines, self._rest = text.split('\n')
        progress = self.phase.progress
        for line in lines:
            progress.update(line, self.phase.mode, self.phase.max_epochs)
        if progress.done and self.first is None:
            self.first = (time.monotonic() - self.began, progress.done)

    def text(self) -> str:
        progress, elapsed = self.phase.progress, time.monotonic() - self.began
        parts = [f'{self.phase.title:<{self.width}} {progress.done:4.0%}']
        if progress.epoch:
            parts.append(f'epoch {progress.epoch}/{self.phase.max_epochs}')
        if progress.loss is not None:
            parts.append(f'loss {progress.loss:.2f}')
        if progress.metric is not None:
            parts.append(f'{progress.metric_name} {progress.metric:.3f}')
        left = ''
        if self.first and progress.done > self.first[1]:
            # From the first sign on: start-up is not part of the pace, and a resumed run did not start at 0.
            pace = (elapsed - self.first[0]) / (progress.done - self.first[1])
            left = f', {clock(pace * (1 - progress.done))} left'
        parts.append(clock(elapsed) + left)
        return '  '.join(parts)

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
        self._output.close()


def run_phases(phases: Sequence[Phase], display: Display, jobs: int = 1) -> None:
    """Run phases that do not depend on each other.

    Args:
        phases: The phases; those that are done already are skipped, interrupted ones resumed.
        display: Where progress goes.
        jobs: How many run at once.

    Raises:
        DistillError: A phase failed; its message ends with the tail of its log.
    """
    waiting, running = list(phases), list[_Running]()
    # Whoever ends us ends the trainings too: they run in groups of their own.
    before = signal.signal(signal.SIGTERM, _stop) if threading.current_thread() is threading.main_thread() else None
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                phase = waiting.pop(0)
                started = _start(phase, display, max(len(p.title) for p in phases))
                if started:
                    running.append(started)
            for item in list(running):
                code = item.process.poll()
                item.read()
                if code is None:
                    continue
                running.remove(item)
                item.stop()
                if code:
                    raise DistillError(
                        f'{item.phase.title} failed (exit status {code}); the end of {item.phase.log}:\n'
                        f'{tail(item.phase.log)}'
                    )
                seconds = time.monotonic() - item.began
                item.phase.mark(done=True, seconds=seconds)
                display.say(f'{item.phase.title}: done in {clock(seconds)}{_closing(item.phase)}')
            if running:
                display.show([item.text() for item in running])
                time.sleep(0.5)
    except KeyboardInterrupt:
        display.say('interrupted; the same command goes on from the last checkpoint')
        raise SystemExit(130) from None
    finally:
        for item in running:
            item.stop()
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _stop(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _start(phase: Phase, display: Display, width: int) -> _Running | None:
    state = phase.state()
    if state == 'done':
        display.say(f'{phase.title}: already done, kept ({phase.folder})')
        return None
    if state == 'other':
        display.say(f'{phase.title}: settings have changed, earlier run kept in {phase.set_aside()}')
    elif state == 'started' and phase.mode == 'train':
        display.say(f'{phase.title}: interrupted earlier, resumed')
    return _Running(phase, state == 'started' and phase.mode == 'train', width)


def _closing(phase: Phase) -> str:
    progress = phase.progress
    return f', {progress.metric_name} {progress.metric:.3f}' if progress.metric is not None else ''


def clock(seconds: float) -> str:
    """``mm:ss``, with hours when there are some."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02d}:{rest:02d}' if hours else f'{minutes:d}:{rest:02d}'


def tail(path: Path, lines: int = 25) -> str:
    """The end of a log."""
    return '\n'.join(path.read_text(errors='replace').splitlines()[-lines:]) if path.is_file() else ''
