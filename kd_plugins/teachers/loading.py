"""Loading weights completely, or not at all."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kd_plugins.errors import DistillError, in_words
from kd_plugins.teachers.checkpoints import versions_of, with_versions

#: BatchNorm's did not exist before torch 0.4.1 and is not used in evaluation.
_COUNTER = 'num_batches_tracked'


@dataclass
class LoadReport:
    """What a strict load found.

    Attributes:
        missing: Accepted: keys of the model that the file lacks.
        unexpected: Accepted: keys of the file that the model lacks.
        converted: Keys of the file that the model has under other names, brought there by its own loading code.
    """

    missing: Sequence[str] = field(default_factory=list)
    unexpected: Sequence[str] = field(default_factory=list)
    converted: Sequence[str] = field(default_factory=list)

    def notes(self) -> list[str]:
        """For the summary."""
        found = (
            ('teacher keys missing as allowed', self.missing),
            ('keys of the file unused as allowed', self.unexpected),
            ("old names of the file converted by the model's own code", self.converted),
        )
        return [f'{len(keys)} {what}: {", ".join(keys[:3])}' for what, keys in found if keys]


#: Some functions of `torch.nn.init` are announced to a mode as a whole, the others by what they call.
_DRAWING = {
    Tensor.normal_,
    Tensor.uniform_,
    nn.init.normal_,
    nn.init.uniform_,
    nn.init.kaiming_normal_,
    nn.init.kaiming_uniform_,
}


class _Unfilled(TorchFunctionMode):
    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function in _DRAWING:
            weight = args[0] if args else (kwargs or {}).get('tensor')
            if isinstance(weight, nn.Parameter):
                with torch.no_grad():
                    return weight.fill_(torch.nan)
        return function(*args, **(kwargs or {}))


@contextmanager
def unfilled() -> Iterator[None]:
    """Around building a network whose weights are all loaded afterwards: none are drawn, which takes most of the time.

    They are NaN, so that one which is not loaded after all can never be taken for a weight.
    """
    with _Unfilled():
        yield


def is_named(key: str, patterns: Iterable[str]) -> bool:
    """Whether a key is one of the given ones or lies below a given module."""
    return any(key == p or key.startswith(p.rstrip('.') + '.') for p in patterns)


def load_strictly(
    model: nn.Module,
    state: Mapping[str, Tensor],
    source: str,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
    architecture: str = 'teacher.config',
    where: str = 'teacher.checkpoint',
) -> LoadReport:
    """Load weights and refuse anything but a complete load.

    The modules load them by their own code, which knows what their parameters were called in older versions; what it
    leaves over is judged.

    Args:
        model: The model; unchanged when the load is refused.
        state: Its weights.
        source: Where they come from, for the message.
        allow_missing: Keys or module paths whose absence is accepted.
        allow_unexpected: Keys or module paths whose presence is accepted.
        architecture: The option that says what the model is, for the message.
        where: The option that the weights came from, for the message.

    Returns:
        The accepted deviations.

    Raises:
        DistillError: Keys are missing, unexpected or of another shape.
    """
    before = {k: v.clone() for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    try:
        missing, unexpected, misshapen = _load(model, state)
    except Exception as error:
        _restore(model, before)
        raise DistillError(
            f'{where} {source!r} cannot be loaded into {type(model).__name__} ({in_words(error)}); check '
            f'{architecture}.'
        ) from error
    missing = [k for k in missing if not k.endswith(_COUNTER)]
    refused_missing = [k for k in missing if not is_named(k, allow_missing)]
    refused_unexpected = [k for k in unexpected if not is_named(k, allow_unexpected)]
    if misshapen or refused_missing or refused_unexpected:
        _restore(model, before)
        wrong = _in_figures(len(before), len(state), refused_missing, refused_unexpected, list(misshapen.values()))
        if len(missing) + len(misshapen) == sum(not k.endswith(_COUNTER) for k in before):
            advice = f'it belongs to another architecture: check {architecture} and {where}.'
        elif misshapen:
            advice = f'check that {architecture} is the one it was trained with (width, number of classes).'
        elif architecture == 'teacher.config':
            advice = f'check {architecture}, or name what may differ in teacher.allow_missing / allow_unexpected.'
        else:
            advice = f'check that {architecture} is the one it was trained with.'
        raise DistillError(f'{where} {source!r} does not fit {type(model).__name__}: {wrong}; {advice}')
    converted = [k for k in state if k not in before and k not in unexpected]
    return LoadReport(missing, unexpected, converted)


def _load(model: nn.Module, state: Mapping[str, Tensor]) -> tuple[list[str], list[str], dict[str, str]]:
    """Load what fits; keys that are missing, unexpected, and of another shape (with a clause that says so)."""
    misshapen: dict[str, str] = {}

    def take_out(module: nn.Module, held: dict[str, Any], prefix: str, *rest: Any) -> None:
        # Called with the names that the module itself goes by: its own conversion of older ones comes before.
        for name, own in (*module._parameters.items(), *module._buffers.items()):
            found = held.get(prefix + name)
            if own is None or not isinstance(found, Tensor) or found.shape == own.shape:
                continue
            if own.dim() == 0 and found.shape == (1,):
                continue  # torch takes these for each other
            key = prefix + name
            misshapen[key] = f'{key} is {tuple(found.shape)} in the file and {tuple(own.shape)} in the model'
            del held[key]

    own, versions = model.state_dict(), versions_of(state)
    if versions is None and own.keys() <= state.keys():
        # Without versions modules take weights for very old ones; these have today's names.
        versions = versions_of(own)
    given = with_versions(OrderedDict(state), versions)
    handles = [m._register_load_state_dict_pre_hook(take_out, with_module=True) for m in model.modules()]
    try:
        # Not strict=True: it would refuse the keys that may be missing.
        result = model.load_state_dict(given, strict=False)
    finally:
        for handle in handles:
            handle.remove()
    missing = [k for k in result.missing_keys if k not in misshapen]
    return missing, list(result.unexpected_keys), misshapen


def _in_figures(
    ours: int, theirs: int, missing: Sequence[str], unexpected: Sequence[str], misshapen: Sequence[str]
) -> str:
    """How many keys of the model's and of the file's are wrong in which way, with examples."""
    parts = []
    for count, label, keys in (
        (ours, 'missing', missing),
        (theirs, 'unexpected', unexpected),
        (ours, 'of another shape', misshapen),
    ):
        if keys:
            first = keys[: 2 if len(keys[0]) < 36 and not misshapen else 1]
            more = ', ...' if len(keys) > len(first) else ''
            # One sentence: where shapes differ, theirs is the example.
            names = '' if misshapen and keys is not misshapen else f' ({", ".join(first)}{more})'
            parts.append(f'{len(keys)} of {count} keys {label}{names}')
    return '; '.join(parts)


def _restore(model: nn.Module, before: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if key in before and before[key].shape == value.shape:
                value.copy_(before[key])
