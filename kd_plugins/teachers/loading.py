"""Loading weights completely, or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from kd_plugins.errors import DistillError


@dataclass
class LoadReport:
    """What a strict load found."""

    missing: Sequence[str] = field(default_factory=list)
    unexpected: Sequence[str] = field(default_factory=list)
    mismatched: Sequence[str] = field(default_factory=list)


def _allowed(key: str, patterns: Iterable[str]) -> bool:
    return any(key == p or key.startswith(p.rstrip('.') + '.') for p in patterns)


def load_strictly(
    model: nn.Module,
    state: Mapping[str, Tensor],
    source: str,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
    architecture: str = 'teacher.config',
) -> LoadReport:
    """Load a teacher's weights and refuse anything but a complete load.

    Args:
        model: The teacher.
        state: Its weights.
        source: Where they come from, for the message.
        allow_missing: Keys or module paths whose absence is accepted.
        allow_unexpected: Keys or module paths whose presence is accepted.
        architecture: The option that says what the model is, for the message.

    Returns:
        The accepted deviations.

    Raises:
        DistillError: Keys are missing, unexpected or of another shape.
    """
    own = model.state_dict()
    # BatchNorm's step counter did not exist before torch 0.4.1 and is not used in evaluation.
    missing = [k for k in own if k not in state and not k.endswith('num_batches_tracked')]
    unexpected = [k for k in state if k not in own]
    mismatched = [
        f'{k} is {tuple(state[k].shape)} in the file and {tuple(own[k].shape)} in the model'
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    refused_missing = [k for k in missing if not _allowed(k, allow_missing)]
    refused_unexpected = [k for k in unexpected if not _allowed(k, allow_unexpected)]
    if mismatched or refused_missing or refused_unexpected:
        parts = []
        for count, label, keys in (
            (len(own), 'missing', refused_missing),
            (len(state), 'unexpected', refused_unexpected),
            (len(own), 'of another shape', mismatched),
        ):
            if keys:
                shown = ', '.join(keys[:3]) + (', ...' if len(keys) > 3 else '')
                parts.append(f'{len(keys)} of {count} keys {label} ({shown})')
        if not any(k in state and state[k].shape == own[k].shape for k in own):
            advice = f'it belongs to another architecture: check {architecture} and teacher.checkpoint.'
        elif mismatched:
            advice = f'check that {architecture} is the one it was trained with (width, number of classes).'
        elif architecture == 'teacher.config':
            advice = (
                'check that teacher.config is the one it was trained with, or name modules that may differ in '
                'teacher.allow_missing / teacher.allow_unexpected.'
            )
        else:
            advice = f'check that {architecture} is the one it was trained with.'
        raise DistillError(
            f'Teacher checkpoint {source!r} does not fit {type(model).__name__}: {"; ".join(parts)}; {advice}'
        )
    # Not strict=True: it would refuse the keys that may be missing.
    result = model.load_state_dict({k: v for k, v in state.items() if k in own}, strict=False)
    left = [k for k in result.missing_keys if k not in missing and not k.endswith('num_batches_tracked')]
    if left or result.unexpected_keys:
        raise DistillError(
            f'Teacher checkpoint {source!r} was not loaded completely: {[*left, *result.unexpected_keys][:3]}.'
        )
    return LoadReport(missing, unexpected, mismatched)
