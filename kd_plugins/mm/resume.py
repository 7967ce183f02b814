"""A plain run that goes on where a distilled one stopped: by mistake, or on purpose."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from typing import Any

from mmengine.config import Config
from mmengine.hooks import Hook

from kd_plugins.errors import DistillError

#: What a checkpoint holds of us, where something besides the student is trained.
STATE = 'kd_plugins'
#: What the hook logs, in MMEngine's message hub.
LOSS, RATIO = 'train/loss_kd_', 'train/kd_ratio'
OFF = '--cfg-options default_hooks.distill=None'


class ResumeGuard(Hook):
    """Stops a plain run that would silently go on where a distilled one stopped; `kd-plugins train` adds it.

    Args:
        on_purpose: The user asked for a plain run: it goes on, and what the distilled one logged is forgotten.
    """

    def __init__(self, on_purpose: bool = False) -> None:
        self.on_purpose = on_purpose

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Look at what is resumed, before anything of it is used.

        Raises:
            DistillError: It is of a distilled run.
        """
        if not getattr(runner, '_resume', False) or not was_distilled(checkpoint):
            return
        if not self.on_purpose:
            raise DistillError(
                'The checkpoint to resume from is of a distilled run, and this one would go on without distillation; '
                f'{how_to_resume(checkpoint)}, or {OFF} to go on without on purpose.'
            )
        hub = checkpoint.get('message_hub') or {}
        for kept in ('log_scalars', 'resumed_keys'):
            forget(hub.get(kept, {}))
        # It would be saved as that of this run, and inference builds models from it.
        if 'cfg' in hub.get('runtime_info', {}):
            hub['runtime_info']['cfg'] = runner.cfg.pretty_text
        runner.logger.info('The run to resume was distilled; it goes on without.')


def was_distilled(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a checkpoint of MMEngine was written by a distilled run."""
    return STATE in checkpoint or 'DistillHook' in str((checkpoint.get('meta') or {}).get('cfg', ''))


def how_to_resume(checkpoint: Mapping[str, Any]) -> str:
    """What to write to go on with distillation, as a clause."""
    try:
        config = Config.fromstring(checkpoint['meta']['cfg'], file_format='.py')
        hook = dict(config.default_hooks.distill)
    except Exception:
        hook = {}  # a config of an older form, or one that needs modules that are not here
    teacher = _teacher_words(hook.get('teacher'))
    recipes = hook.get('recipe') or []
    recipes = [recipes] if isinstance(recipes, str) else list(recipes)
    if not recipes or not all(isinstance(r, str) for r in recipes) or not teacher:
        return 'resume it with the config in its folder, in which default_hooks.distill is written'
    options = ' '.join(_pairs(hook.get('options') or {}))
    more = sorted(set(hook) - {'type', 'teacher', 'recipe', 'options'})
    rest = f' (and its {", ".join(more)})' if more else ''
    return f'add --kd {" ".join(recipes)} {teacher}{f" --kd-options {options}" if options else ""}{rest}'


def _pairs(options: Mapping[str, Any], prefix: str = '') -> Iterator[str]:
    """``key=value`` with dots for what is nested."""
    for key, value in options.items():
        if isinstance(value, Mapping):
            yield from _pairs(value, f'{prefix}{key}.')
        else:
            yield f'{prefix}{key}={value}'


def _teacher_words(teacher: Any) -> str:
    if not isinstance(teacher, Mapping):
        return ''
    for key in ('config', 'ultralytics', 'exported', 'timm', 'torchvision'):
        if isinstance(teacher.get(key), str):
            name = f'{key}::{teacher[key]}' if key in ('timm', 'torchvision') else teacher[key]
            checkpoint = teacher.get('checkpoint')
            return f'--teacher {name}' + (f' --teacher-checkpoint {checkpoint}' if checkpoint else '')
    return ''


def forget(scalars: MutableMapping[str, Any], keep: Iterable[str] = ()) -> None:
    """Take what a distilled run logged out of MMEngine's history, where it would be logged on and on.

    Args:
        scalars: The history, by name.
        keep: Names of terms that are still there; ``kd_ratio`` stays with them.
    """
    kept = {LOSS + name for name in keep}
    for key in [k for k in scalars if k.startswith(LOSS) or k == RATIO]:
        if key not in kept and (key != RATIO or not kept):
            del scalars[key]
