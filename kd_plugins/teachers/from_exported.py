"""An exported file as a teacher: a ``torch.export`` program (``.pt2``) or TorchScript.

Neither reader runs what is stored in such a file, except that torch falls back to full pickle for a program's
example inputs and for unusual weights. A program for which it would is refused unless ``trusted=True``.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kd_plugins.distiller import untouched_rng
from kd_plugins.distiller.protocol import Teacher
from kd_plugins.errors import DistillError, in_words
from kd_plugins.teachers import PixelFormat, find_file, register_teacher
from kd_plugins.teachers.classifier import (
    activation,
    as_teacher,
    count_classes,
    find_options,
    wanted_classes,
)
from kd_plugins.teachers.network import ClassifierNetwork, data_config, image_size

KEYS = ('exported', 'trusted')

register_teacher('exported', __name__, "dict(exported='x.pt2')")
_NO_LIMIT = 1 << 31


def find(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Check the options and what kind of file it is; the file gets an absolute path.

    ``teacher=dict(exported='x.pt2')``, or ``'x.torchscript'``; what it is is read from the file, not from its name.
    The weights are in it, so there is no ``checkpoint``. The others are those of `find_options`, except that
    ``input_size``, ``in_chans`` and ``num_classes`` are read from the file where it tells. A program that was exported
    for one resolution is given that; otherwise it sees the student's unless ``input_size`` names another. A program
    that was exported for a fixed batch is run in pieces, the last one padded. It keeps its own precision. Normalisation
    is ImageNet's unless ``mean`` and ``std`` say otherwise: ``mean=(0, 0, 0), std=(1, 1, 1)`` for a file that
    normalises by itself. Only its logits can be tapped.

    Raises:
        DistillError: The file is missing or of another kind, or a key is misspelt.
    """
    if cfg.get('checkpoint'):
        raise DistillError('teacher.checkpoint: an exported file has its weights in it; remove the option.')
    found = find_options(cfg, KEYS)
    if not isinstance(cfg.get('trusted', False), bool):
        raise DistillError(f'teacher.trusted must be True or False, got {cfg["trusted"]!r}.')
    found['exported'] = find_file(cfg['exported'], 'teacher.exported')
    if kind_of(found['exported']) == 'program' and not cfg.get('trusted'):
        _refuse_pickled(found['exported'])
    return found


def build(cfg: Mapping[str, Any], student: PixelFormat) -> tuple[Teacher, list[str]]:
    """Load the file.

    Raises:
        DistillError: It cannot be loaded, takes something else than images, or returns something else than logits.
    """
    path = cfg['exported']
    net = ExportedProgram(path) if kind_of(path) == 'program' else TorchScript(path)
    size = image_size(cfg.get('input_size'), 'teacher.input_size')
    if size is not None and any(f not in (None, s) for f, s in zip(net.size, size, strict=True)):
        raise DistillError(
            f'teacher.input_size is {size[0]}x{size[1]}, but {path!r} was exported for '
            f'{"x".join("any" if f is None else str(f) for f in net.size)}; leave the option out.'
        )
    height, width = net.size
    if size is None and height is not None and width is not None:
        size = height, width
    channels = cfg.get('in_chans') or net.channels or 3
    if net.channels not in (None, channels):
        raise DistillError(f'teacher.in_chans is {channels}, but {path!r} was exported for {net.channels}.')
    cfg = {**cfg, 'in_chans': channels}
    classifier = ClassifierNetwork(net, wanted_classes(cfg), activation(cfg))
    data = data_config(net)
    probe = size or (height or data.input_size[0], width or data.input_size[1])
    classifier.logits.num_classes = count_classes(classifier, probe, channels, 'teacher.exported')
    _refuse_training_mode(net, torch.rand(2, channels, *probe, generator=torch.Generator().manual_seed(0)))
    teacher = as_teacher(
        classifier,
        cfg,
        student,
        kind='exported',
        name=net.description,
        source=path,
        data=data,
        size=size,
    )
    return teacher, []


def kind_of(path: str) -> str:
    """``'program'`` or ``'torchscript'``, by what the file holds.

    Raises:
        DistillError: It is something else; the message says which kind of teacher that is.
    """
    names = _members(path)
    if names is not None:
        tails = {n.partition('/')[2] for n in names} | set(names)
        if any(t.startswith('data/aotinductor/') for t in tails):
            raise DistillError(
                f'teacher.exported {path!r} is compiled for one device (AOTInductor); give the torch.export program '
                'that it was compiled from (torch.export.save).'
            )
        if 'serialized_exported_program.json' in tails or any(t.startswith('models/') for t in tails):
            return 'program'
        if 'constants.pkl' in tails and any(t.startswith('code/') for t in tails):
            return 'torchscript'
        if 'data.pkl' in tails:
            raise DistillError(f'teacher.exported {path!r} is a checkpoint, not an exported file; {_advice(path)}')
    raise DistillError(
        f'teacher.exported {path!r} is neither a torch.export program (torch.export.save) nor TorchScript '
        '(torch.jit.save); export the teacher that way.'
    )


class ExportedNetwork(nn.Module):
    """A network that was read from a file, as far as it can be treated like any other.

    It follows the device of the images that it is given and keeps its own precision, whatever ``to``, ``half`` or
    autocast ask for; it has no modes.

    Args:
        path: The file.

    Attributes:
        size: ``(H, W)`` that it was exported for; None: any, or unknown.
        channels: The same for channels.
        batch: Smallest and largest number of images that it takes at once.
        program: What runs.
        description: For the summary.
        opaque: Why its layers cannot be tapped.
    """

    size: tuple[int | None, int | None] = (None, None)
    channels: int | None = None
    batch: tuple[int, int] = (1, _NO_LIMIT)
    program: nn.Module
    description = ''
    opaque = "an exported file has no layers to tap any more; tap 'logits', or give the teacher as timm, torchvision "
    opaque += 'or module'

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.device, self.dtype = torch.device('cpu'), torch.float32

    def forward(self, images: Tensor) -> Tensor:
        """``(B, C, H, W)`` images, of any floating-point type, to ``(B, classes)`` logits."""
        if images.device != self.device:
            self.move_to(images.device)
        images = images.to(self.dtype)
        if torch.is_autocast_enabled(images.device.type):
            with torch.autocast(images.device.type, enabled=False):
                return self._pieces(images)
        return self._pieces(images)

    def move_to(self, device: torch.device) -> None:
        """Move to a device."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> ExportedNetwork:
        """Nothing but the flag: programs refuse to change modes, they were exported in one."""
        self.training = mode
        return self

    def _freeze(self) -> None:
        # One by one: TorchScript refuses `requires_grad_` of the whole.
        for parameter in self.parameters():
            parameter.requires_grad_(False)

    def _apply(self, fn: Any, recurse: bool = True) -> ExportedNetwork:
        return self

    def _pieces(self, images: Tensor) -> Tensor:
        low, high = self.batch
        logits = []
        for piece in images.split(min(high, max(len(images), 1))):
            missing = max(low - len(piece), 0)
            padded = torch.cat([piece, piece[-1:].expand(missing, -1, -1, -1)]) if missing else piece
            output = self.program(padded)
            if not isinstance(output, Tensor) or output.dim() != 2 or len(output) != len(padded):
                shown = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
                raise DistillError(
                    f'{self.path!r} must return class logits (B, C), but returned {shown} for {len(padded)} image(s).'
                )
            logits.append(output[: len(piece)])
        return torch.cat(logits)


class ExportedProgram(ExportedNetwork):
    """A ``torch.export`` program.

    Raises:
        DistillError: It cannot be loaded, or takes something else than one batch of images.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path)
        try:
            self._exported = torch.export.load(path)
            self.program = self._exported.module()
        except Exception as error:
            raise _unreadable(path, error) from error
        names = self._exported.graph_signature.user_inputs
        inputs = [n.meta['val'] for n in self._exported.graph.nodes if n.name in names]
        if len(inputs) != 1 or not isinstance(inputs[0], Tensor) or inputs[0].dim() != 4:
            shown = ', '.join(str(tuple(i.shape)) if isinstance(i, Tensor) else type(i).__name__ for i in inputs)
            raise DistillError(f'teacher.exported {path!r} must take one batch of images, but takes {shown}.')
        batch, *rest = inputs[0].shape
        # Of a dynamic side it has a symbol.
        self.channels, *size = (s if isinstance(s, int) else None for s in rest)
        self.size = size[0], size[1]
        self.batch = self._batches(batch)
        self.device, self.dtype = inputs[0].device, inputs[0].dtype
        fixed = f', {batch} images at once' if isinstance(batch, int) else ''
        self.description = f'torch.export program{fixed}'

    def move_to(self, device: torch.device) -> None:
        """Move to a device, also what the program makes on its own."""
        from torch.export.passes import move_to_device_pass

        self._exported = move_to_device_pass(self._exported, str(device))
        self.program = self._exported.module()
        self._freeze()
        self.device = device

    def _batches(self, batch: Any) -> tuple[int, int]:
        if isinstance(batch, int):
            return batch, batch
        known = self._exported.range_constraints.get(batch.node.expr)
        if known is None:
            return 1, _NO_LIMIT
        return max(1, int(known.lower)), int(min(known.upper, _NO_LIMIT))


class TorchScript(ExportedNetwork):
    """A scripted or traced network, in evaluation mode.

    Raises:
        DistillError: It cannot be loaded.
    """

    description = 'TorchScript'

    def __init__(self, path: str) -> None:
        super().__init__(path)
        try:
            self.move_to(self.device)
        except Exception as error:
            raise _unreadable(path, error) from error
        self.dtype = next((p.dtype for p in self.program.parameters() if p.is_floating_point()), torch.float32)

    def move_to(self, device: torch.device) -> None:
        """Load it anew: ``to`` would leave the constants of a trace where they were."""
        self.program = torch.jit.load(self.path, map_location=device).eval()
        self._freeze()
        self.device = device


def _members(path: str) -> Sequence[str] | None:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, OSError):
        return None


def _advice(path: str) -> str:
    with zipfile.ZipFile(path) as archive:
        name = next(n for n in archive.namelist() if n.endswith('data.pkl'))
        ours = b'ultralytics' in archive.read(name)
    if ours:
        return 'of Ultralytics: write teacher=dict(ultralytics=...).'
    return "name its network: dict(timm='...', checkpoint=...), or torchvision= or module= in place of timm=."


def _refuse_pickled(path: str) -> None:
    """Refuse what torch.export.load would unpickle without restriction: such a file can run any code."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        pickled = {n for n in names if n.endswith('.pt')}
        for name in (n for n in names if n.endswith('_config.json')):
            entries = json.loads(archive.read(name)).get('config', {}).values()
            folder = name.rpartition('/')[0]
            pickled |= {f'{folder}/{e["path_name"]}' for e in entries if e.get('use_pickle')}
        for name in pickled & set(names):
            try:
                content = archive.read(name)
                if content:
                    torch.load(io.BytesIO(content), weights_only=True)
            except Exception as error:
                raise DistillError(
                    f'teacher.exported {path!r} holds pickled objects ({name}), which can run code while it is loaded; '
                    'if you trust the file, set teacher.trusted=True.'
                ) from error


def _refuse_training_mode(net: ExportedNetwork, images: Tensor) -> None:
    """What was exported with dropout and batch statistics switched on keeps them on for good."""
    before = [b.clone() for b in net.buffers()]
    with untouched_rng(), torch.no_grad():
        first, second = net(images), net(images)
    kept = all(torch.equal(b, now) for b, now in zip(before, net.buffers(), strict=True))
    if not kept or not torch.allclose(first, second, equal_nan=True):
        raise DistillError(
            f'teacher.exported {net.path!r} was exported in training mode, so its answers to the same images differ; '
            'call model.eval() before exporting.'
        )


def _unreadable(path: str, error: Exception) -> DistillError:
    return DistillError(
        f'teacher.exported {path!r} cannot be loaded ({in_words(error)}); export it '
        'again, on the CPU and with this version of torch.'
    )
