"""Write the embedded data set into a folder: complete, or not at all; never over somebody else's files."""

from __future__ import annotations

import json
import operator
import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from kd_plugins.errors import DistillError
from kd_plugins.lab.data.formats import IGNORE_INDEX, SplitWriter, write_scans, write_yolo_yaml
from kd_plugins.lab.data.preview import contact_sheet
from kd_plugins.lab.data.scans import CLASSES, load_scans, split_scans
from kd_plugins.lab.data.scenes import Scene, render_scene

MANIFEST = 'kd_digits.json'
FORMAT = 'kd_plugins scenes of handwritten digits'
VERSION = 2  # raise it when the same settings give other files: folders of an older version are then rewritten
_UNFINISHED = 'UNFINISHED'  # marks a folder that is being written
# Scenes that a process renders at a time; so few parts that starting processes would take longer than they save; and
# writing, which one process does, takes about as long as rendering in one.
_TOGETHER, _ALONE, _MOST_JOBS = 20, 10, 2
_STALE_SECONDS = 3600  # far longer than any write takes: older unfinished siblings belong to killed processes
MIN_SIZE, MAX_SIZE, MAX_COUNT = 64, 1024, 999_999


def prepare_digits(
    out: str | os.PathLike = 'data/digits',
    *,
    train: int = 1000,
    val: int = 250,
    size: int = 128,
    seed: int = 0,
    force: bool = False,
    progress: bool = True,
) -> Path:
    """Build the scenes of real handwritten digits, or reuse them when they are there already.

    The same arguments give the same bytes (for the same versions of NumPy and Pillow). Scene ``i`` of a split depends
    on ``size``, ``seed`` and ``i`` only, so a smaller set is the beginning of a bigger one. No scan is used in both
    splits, background fragments included. The layout is described in :mod:`kd_plugins.lab.data.formats`.

    Args:
        out: Folder to write. A folder with these settings is reused, one that this function wrote with other settings
            is rewritten, any other non-empty folder is refused.
        train: Number of training scenes, at least 1.
        val: Number of validation scenes, at least 1.
        size: Image side in pixels, a multiple of 32 from 64 to 1024.
        seed: Seed of split and scenes, >= 0.
        force: Rewrite an own folder even when nothing changed or when its files were edited.
        progress: Show progress on stderr and the outcome on stdout.

    Returns:
        The absolute path of the folder.

    Raises:
        DistillError: A bad argument, a folder that is not ours, a missing package, or a disk that cannot be written.
    """
    settings = {
        'version': VERSION,
        'train': _integer('train', train, 1, MAX_COUNT),
        'val': _integer('val', val, 1, MAX_COUNT),
        'size': _image_side(size),
        'seed': _integer('seed', seed, 0, 2**63 - 1),
    }
    root = Path(out).expanduser().resolve()
    if _reusable(root, settings, force):
        _say(progress, f'{root}: already there with these settings, reused')
        return root

    scans, labels = load_scans()
    start = time.perf_counter()
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(root)
        partial = root.with_name(f'.{root.name}.{uuid.uuid4().hex[:8]}.partial')
        partial.mkdir()
        try:
            (partial / _UNFINISHED).touch()
            _write(partial, settings, scans, labels, progress)
            (partial / _UNFINISHED).unlink()
            _put_in_place(partial, root, settings, force)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise DistillError(f'cannot write the data set to {root}: {error}') from error
    _say(progress, f'{root}: {train} train and {val} val scenes written in {time.perf_counter() - start:.1f} s')
    return root


def _write(root: Path, settings: dict, scans: np.ndarray, labels: np.ndarray, progress: bool) -> None:
    pools = split_scans(labels, settings['seed'])
    used = {}
    write_scans(root, scans, labels, pools)
    for number, (split, pool) in enumerate(pools.items(), start=1):
        writer, total = SplitWriter(root, split), settings[split]
        seeds = [[settings['seed'], number, i] for i in range(total)]
        for i, scene in enumerate(_rendered(seeds, scans, labels, pool, settings['size'])):
            writer.add(scene)
            _progress(progress, split, i + 1, total)
        writer.close()
        used[split] = sorted(writer.used_scans)
    write_yolo_yaml(root)
    contact_sheet(root, root / 'preview.png')
    manifest = {
        'format': FORMAT,
        'settings': settings,
        'classes': list(CLASSES),
        'ignore_index': IGNORE_INDEX,
        'scans': {split: pool.tolist() for split, pool in pools.items()},
        'scans_used': used,
        'files': {name: length for name, length in _files(root).items() if name != _UNFINISHED},
    }
    (root / MANIFEST).write_text(json.dumps(manifest, indent=1), newline='\n')


def _rendered(
    seeds: Sequence[Sequence[int]], scans: np.ndarray, labels: np.ndarray, pool: np.ndarray, size: int
) -> Iterator[Scene]:
    """The scene of each seed, in their order; many are rendered in processes beside this one, which writes them."""
    import joblib  # lazy: it comes with scikit-learn, whose absence `load_scans` explains

    parts = [seeds[i : i + _TOGETHER] for i in range(0, len(seeds), _TOGETHER)]
    work = (joblib.delayed(_render)(part, scans, labels, pool, size) for part in parts)
    jobs = 1 if len(parts) <= _ALONE else min(joblib.cpu_count(), _MOST_JOBS)
    for scenes in joblib.Parallel(n_jobs=jobs, return_as='generator')(work):
        yield from scenes


def _render(
    seeds: Sequence[Sequence[int]], scans: np.ndarray, labels: np.ndarray, pool: np.ndarray, size: int
) -> list[Scene]:
    return [render_scene(scans, labels, pool, size, np.random.default_rng(seed)) for seed in seeds]


def _reusable(root: Path, settings: dict, force: bool) -> bool:
    """Whether the folder can be used as it is; raises when it may not be replaced either."""
    if not root.exists():
        return False
    if not root.is_dir():
        raise DistillError(f'{root} is a file; give a new or empty folder to write the data set to')
    if not any(root.iterdir()):
        return False
    manifest = _read_manifest(root)
    if manifest is None:
        raise DistillError(
            f'{root} is not empty and was not written by prepare_digits, so it is left untouched; give another folder'
        )
    found = {name: length for name, length in _files(root).items() if name != MANIFEST}
    expected = manifest['files']
    # Ultralytics leaves labels/*.cache and cls/*.cache behind; they are derived from our files.
    foreign = sorted(name for name in found.keys() - expected.keys() if not name.endswith('.cache'))
    edited = sorted(name for name in found.keys() & expected.keys() if found[name] != expected[name])
    missing = expected.keys() - found.keys()
    if manifest['settings'] == settings and not edited and not missing and not force:
        return True
    if foreign:
        raise DistillError(
            f'{root} would be rewritten, but holds {_some(foreign)} that prepare_digits did not write; '
            f'move that away or give another folder'
        )
    if edited and not force:
        raise DistillError(
            f'{root} would be rewritten, but {_some(edited)} was changed since it was written; '
            f'give another folder, or force the rewrite (--force)'
        )
    return False


def _put_in_place(partial: Path, root: Path, settings: dict, force: bool) -> None:
    """Rename the finished folder to its name; the old one goes only after its replacement is complete."""
    if _reusable(root, settings, force):
        return  # another process was faster with the same settings
    if not root.exists():
        partial.rename(root)
        return
    old = root.with_name(f'.{root.name}.{uuid.uuid4().hex[:8]}.partial')
    root.rename(old)
    (old / _UNFINISHED).touch()  # lets a later call clean up, should this process be killed now
    partial.rename(root)
    shutil.rmtree(old, ignore_errors=True)


def _remove_stale(root: Path) -> None:
    for folder in root.parent.glob(f'.{root.name}.????????.partial'):
        marker = folder / _UNFINISHED
        if marker.is_file() and time.time() - marker.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)


def _read_manifest(root: Path) -> dict | None:
    try:
        manifest = json.loads((root / MANIFEST).read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(manifest, dict) or manifest.get('format') != FORMAT:
        return None
    return manifest if isinstance(manifest.get('files'), dict) and 'settings' in manifest else None


def _files(root: Path) -> dict[str, int]:
    """Relative posix path and byte length of every file below a folder, sorted."""
    found = {}
    for folder, _, names in os.walk(root):
        for name in names:
            path = os.path.join(folder, name)
            found[Path(os.path.relpath(path, root)).as_posix()] = os.lstat(path).st_size
    return dict(sorted(found.items()))


def _integer(name: str, value: object, low: int, high: int) -> int:
    try:
        number = operator.index(value)  # refuses 1.5 and '3', takes NumPy integers
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or not low <= number <= high:
        raise DistillError(f'{name} must be a whole number from {low} to {high}, not {value!r}')
    return number


def _image_side(value: object) -> int:
    side = _integer('size', value, MIN_SIZE, MAX_SIZE)
    if side % 32:
        below = side // 32 * 32
        raise DistillError(f'size must be a multiple of 32, not {side}: did you mean {below} or {below + 32}?')
    return side


def _some(names: list[str]) -> str:
    return names[0] + (f' and {len(names) - 1} more' if len(names) > 1 else '')


def _progress(show: bool, split: str, done: int, total: int) -> None:
    if not show:
        return
    if sys.stderr.isatty():
        if done % 10 == 0 or done == total:
            print(f'\r{split}: {done}/{total} scenes', end='\n' if done == total else '', file=sys.stderr, flush=True)
    elif done * 4 // total != (done - 1) * 4 // total:  # a log file gets four lines, not hundreds
        print(f'{split}: {done}/{total} scenes', file=sys.stderr, flush=True)


def _say(show: bool, text: str) -> None:
    if show:
        print(text, flush=True)
