"""Taps: what a module computes during one forward pass, recorded by module path.

Forward hooks are not enough here. MMSegmentation's decode heads and MMDetection's heads in tensor mode are
called through ``.forward``, which bypasses hooks. A tap therefore replaces ``forward`` on the *instance* while
a capture is open and takes it off again when the capture closes, also after an exception.

Attention probabilities are a special case: timm computes them only where fused attention is off, which a tap on
``attn_drop``, the dropout behind them, therefore switches for as long.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from kd_plugins.errors import DistillError, nearest

# The dropout behind the softmax of an attention module, in timm's spelling.
_ATTENTION = 'attn_drop'
_ABSENT = object()
#: The owner of a tap that is in every teacher.
ALL = '*'
_PATH = re.compile(r'^(?:(?P<owner>[A-Za-z_]\w*|\*):)?(?P<module>[A-Za-z_0-9.]+)(?:\[(?P<index>-?\d+)\])?$')


@dataclass(frozen=True)
class Tap:
    """A place in a model: a dotted module path and, optionally, which of its outputs.

    Written ``'neck'`` (all outputs), ``'neck[1]'`` (the second one) or ``'backbone.layer3'``; a teacher that is one of
    several stands in front, ``'big:neck'``, or ``'*:neck'`` for all of them. What a name means (``head``, ``neck``,
    ``backbone``, ``logits``, ``stages[i]``) is for the host of the model to say, which returns another tap.

    Attributes:
        module: Dotted path of the module.
        index: Which of its outputs; None: all of them.
        owner: Name of the teacher, ``''`` for the only one, ``'*'`` for every one.
        part: Which branch of a head that has several, or None.
        also: Further modules whose outputs follow, where a name means several.
        written: How the user wrote it, for messages.
    """

    module: str
    index: int | None = None
    owner: str = ''
    part: str | None = None
    also: tuple[str, ...] = ()
    written: str = field(default='', compare=False)

    @classmethod
    def parse(cls, text: object, where: str) -> Tap:
        """Read a tap from its spelling in a config.

        Args:
            text: The spelling.
            where: Who asks, for the error message, e.g. ``"term 'logits': student"``.

        Raises:
            DistillError: ``text`` is not a path.
        """
        match = _PATH.match(text) if isinstance(text, str) else None
        if match is None:
            raise DistillError(f"{where} must be a module path like 'neck' or 'neck[1]', got {text!r}.")
        index = match['index']
        return cls(match['module'], None if index is None else int(index), match['owner'] or '')

    @property
    def modules(self) -> tuple[str, ...]:
        """Paths of all its modules."""
        return (self.module, *self.also)

    def means(self, module: str, *also: str, index: int | None = None, part: str | None = None) -> Tap:
        """What it stands for, remembering how it was written."""
        return replace(self, module=module, also=also, index=index, part=part, written=str(self))

    def __str__(self) -> str:
        if self.written:
            return self.written
        owner = f'{self.owner}:' if self.owner else ''
        return owner + (self.module if self.index is None else f'{self.module}[{self.index}]')


@dataclass(frozen=True)
class Call:
    """One recorded forward call of a tapped module.

    Attributes:
        output: What ``forward`` returned, tensors cloned, so that an in-place activation that follows cannot
            overwrite them. At a tap on attention probabilities what it was given: dropout would thin them out.
        training: The module's ``training`` flag during the call; some heads return other tuples in evaluation.
    """

    output: Any
    training: bool


def find_module(model: nn.Module, path: str, where: str) -> nn.Module:
    """The sub-module at a dotted path.

    Args:
        model: The model to search.
        path: Dotted path; numbers index ``ModuleList`` and ``Sequential``.
        where: Who asks, for the error message.

    Raises:
        DistillError: There is no such module; the nearest paths and the children of the last valid part are named.
    """
    module = model
    walked: list[str] = []
    for part in path.split('.'):
        # What an exported file holds are no layers any more, and it says so.
        opaque = getattr(module, 'opaque', None)
        if isinstance(opaque, str):
            raise DistillError(f'{where} {path!r} cannot be tapped: {opaque}.')
        child = module._modules.get(part)
        if child is None:
            place = '.'.join(walked) or type(model).__name__
            children = [name for name, value in module._modules.items() if value is not None]
            hint = nearest(path, [name for name, _ in model.named_modules() if name])
            below = f'{place} has the children {", ".join(map(repr, children))}.' if children else ''
            # Where nothing is close, the children alone say more than the first of hundreds of paths.
            hints = [below] if below and hint.startswith('choose') else [hint, below]
            raise DistillError(
                f'{where}: {type(model).__name__} has no module {path!r}; {" ".join(h for h in hints if h)}'
            )
        module = child
        walked.append(part)
    return module


def map_tensors(value: Any, function: Callable[[Tensor], object]) -> Any:
    """Apply a function to every tensor in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, '_fields'):
        return type(value)(*(map_tensors(v, function) for v in value))
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(v, function) for v in value)
    if isinstance(value, Mapping):
        return {k: map_tensors(v, function) for k, v in value.items()}
    return value


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor in nested tuples, lists and dicts, in order."""
    found: list[Tensor] = []
    map_tensors(value, found.append)
    return found


def image_size_of(inputs: Any) -> tuple[int, int] | None:
    """``(H, W)`` in pixels of a batch ``(B, C, H, W)``; None where it is no tensor of images."""
    return (inputs.shape[-2], inputs.shape[-1]) if isinstance(inputs, Tensor) and inputs.dim() > 1 else None


class Capture:
    """Records the calls of some modules while it is open.

    Use it as a context manager, or with :meth:`open` and :meth:`close` where the forward pass is somebody else's.

    Args:
        model: The model whose sub-modules are tapped.
        paths: Dotted paths of the modules.
        where: Which model this is, for error messages (``'student'`` or ``'teacher'``).

    Attributes:
        calls: The recorded calls by path, in order.
        attention: The attention modules whose probabilities are tapped, by the tap's path (``'...attn.attn_drop'``).
        image_size: ``(H, W)`` in pixels of the batch that the model was given, or None when unknown.
    """

    def __init__(self, model: nn.Module, paths: Iterable[str], where: str) -> None:
        self.where = where
        self.modules: dict[str, nn.Module] = {path: find_module(model, path, where) for path in dict.fromkeys(paths)}
        self.attention = {
            path: find_module(model, path.removesuffix(f'.{_ATTENTION}'), where)
            for path in self.modules
            if path.endswith(f'.{_ATTENTION}')
        }
        self.calls: dict[str, list[Call]] = {}
        self.image_size: tuple[int, int] | None = None
        self._saved: list[tuple[nn.Module, str, Any]] = []
        self._elsewhere: dict[str, nn.Module] = {}
        self._recorders: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {}

    def open(self) -> Capture:
        """Start recording; forgets what was recorded before."""
        self.close()
        self.calls = {path: [] for path in self.modules}
        for path, module in self.modules.items():
            # Activation checkpointing also sets `forward` on the instance: keep what was there.
            inner = module.forward
            known = self._recorders.get(path)
            if known is None or known[0] != inner:
                # The same function from one iteration to the next: to a compiled model another would be other code.
                known = self._recorders[path] = inner, self._recorder(path, module, inner)
            self._override(module, 'forward', known[1])
        for module in self.attention.values():
            if hasattr(module, 'fused_attn'):
                self._override(module, 'fused_attn', False)
        return self

    def _override(self, module: nn.Module, name: str, value: Any) -> None:
        self._saved.append((module, name, module.__dict__.get(name, _ABSENT)))
        setattr(module, name, value)

    def close(self) -> None:
        """Stop recording and leave every module exactly as it was found."""
        for module, name, value in reversed(self._saved):
            if value is _ABSENT:
                module.__dict__.pop(name, None)
            else:
                setattr(module, name, value)
        self._saved.clear()

    __enter__ = open

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _recorder(self, path: str, module: nn.Module, inner: Callable[..., Any]) -> Callable[..., Any]:
        given = path in self.attention

        def forward(*args: Any, **kwargs: Any) -> Any:
            output = inner(*args, **kwargs)
            recorded = map_tensors(args if given else output, Tensor.clone)
            self.calls[path].append(Call(recorded, module.training))
            return output

        return torch.compiler.disable(forward, recursive=False)

    @property
    def device(self) -> str:
        """Type of the device of what was recorded."""
        recorded = (t for calls in self.calls.values() for call in calls for t in tensors_in(call.output))
        return next(recorded).device.type

    def put(self, path: str, output: Any, training: bool, module: nn.Module | None = None) -> None:
        """Record what somebody else saw a module return.

        Args:
            path: The module, which need not be tapped here.
            output: What it returned.
            training: Its mode in that call.
            module: The module itself; None: it is tapped here.
        """
        self.calls[path] = [Call(output, training)]
        if module is not None:
            self._elsewhere[path] = module

    def module(self, path: str) -> nn.Module:
        """The module of a path that is tapped here, or that was put here."""
        return self.modules[path] if path in self.modules else self._elsewhere[path]

    def call(self, path: str, repeated: bool = False) -> Call:
        """The only call of a module.

        Args:
            path: The module.
            repeated: Whether it may run more than once; the first call counts.

        Raises:
            DistillError: The module was not called, or more than once.
        """
        calls = self._fired(path)
        if len(calls) > 1 and not repeated:
            raise DistillError(
                f'{self.where} module {path!r} ran {len(calls)} times in one forward pass; tap the module around it.'
            )
        return calls[0]

    def maps(self, tap: Tap) -> list[Tensor]:
        """The tensors at a tap: all outputs of all calls in order, or the indexed one.

        Raises:
            DistillError: The module did not run, returned no tensor, or the index is out of range.
        """
        calls = (call for path in tap.modules for call in self._fired(path))
        found = [t for call in calls for t in tensors_in(call.output)]
        if not found:
            raise DistillError(f'{self.where} module {tap.module!r} returned no tensor; tap another module.')
        if tap.index is None:
            return found
        if not -len(found) <= tap.index < len(found):
            raise DistillError(
                f'{self.where} tap {str(tap)!r} is out of range: {tap.module!r} returned {len(found)} tensors '
                f'(0 to {len(found) - 1}).'
            )
        return [found[tap.index]]

    def _fired(self, path: str) -> list[Call]:
        calls = self.calls.get(path)
        if not calls:
            raise DistillError(
                f'{self.where} module {path!r} exists but did not run in the forward pass, so nothing can be distilled '
                'from it; tap a module that takes part in it.'
            )
        return calls
