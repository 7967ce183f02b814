"""Classifiers as plain networks: timm models by name, and the wrapper that makes any network's logits tappable."""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

from torch import Tensor, nn

from kd_plugins.errors import DistillError, in_words, nearest, shown
from kd_plugins.extras import how_to_install
from kd_plugins.predictions.classes import ClassLogits

#: ImageNet's statistics, of pixels in [0, 1]: what a network without any of its own is taken to expect.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_UNEXPECTED = re.compile(r"(?:(\w+)\.__init__|(\w+))\(\) got an unexpected keyword argument '(\w+)'")


class ClassifierNetwork(nn.Module):
    """A classifier whose logits pass through a module of their own, so that they are tapped as ``'logits'``.

    Args:
        net: Maps images to class logits.
        num_classes: How many there are. Default: what the network says of itself.
        activation: ``'softmax'`` (classes exclude each other) or ``'sigmoid'`` (every class is a yes or no).

    Attributes:
        net: The network, whose layers are tapped as ``'net.<path>'``.
        logits: The `ClassLogits` that they pass.
    """

    def __init__(self, net: nn.Module, num_classes: int | None = None, activation: str = 'softmax') -> None:
        super().__init__()
        self.net = net
        if num_classes is None:
            number = getattr(net, 'num_classes', None)
            num_classes = number if isinstance(number, int) else None
        self.logits = ClassLogits(num_classes, activation)

    def forward(self, images: Tensor) -> Tensor:
        """``(B, channels, H, W)`` normalised images to ``(B, C)`` logits.

        Raises:
            DistillError: The network returns something else, or another number of classes.
        """
        logits = self.net(images)
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            kind = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise DistillError(
                f'{type(self.net).__name__} must return class logits (B, C), but returned {kind}; use a plain '
                'classifier.'
            )
        known = self.logits.num_classes
        if known is not None and logits.shape[1] != known:
            raise DistillError(
                f'{type(self.net).__name__} predicts {logits.shape[1]} classes, but {known} were expected; check '
                'num_classes and classes.'
            )
        return self.logits(logits)


@dataclass(frozen=True)
class DataConfig:
    """How images are brought to a network.

    Attributes:
        mean: Per channel, of RGB pixels 0 to 255.
        std: Per channel, of RGB pixels 0 to 255.
        input_size: ``(H, W)`` in pixels.
        interpolation: For resizing, e.g. ``'bicubic'``.
        crop_pct: Which part of the shorter side a test image's centre crop keeps.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    input_size: tuple[int, int]
    interpolation: str
    crop_pct: float


class _Configured(Protocol):
    """A network of timm, which says how it was trained."""

    pretrained_cfg: Mapping[str, Any]


def image_size(value: Any, where: str) -> tuple[int, int] | None:
    """``(H, W)`` from what a user writes: a whole number of pixels, or two; None stays.

    Args:
        value: What was written.
        where: The option, for the message.

    Raises:
        DistillError: It is neither.
    """
    if value is None:
        return None
    sides = [value, value] if not isinstance(value, (tuple, list)) else list(value)
    if len(sides) != 2 or any(isinstance(s, bool) or not isinstance(s, int) or s < 1 for s in sides):
        raise DistillError(f'{where} must be a whole number >= 1 of pixels, or (height, width), got {value!r}.')
    return sides[0], sides[1]


def whole_number(value: Any, where: str) -> None:
    """Refuse what is no count.

    Raises:
        DistillError: It is no whole number >= 1.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise DistillError(f'{where} must be a whole number >= 1, got {value!r}.')


def import_timm(where: str) -> Any:
    """The package, when it is there.

    Raises:
        DistillError: It is not installed.
    """
    try:
        import timm
    except ImportError as error:
        if error.name != 'timm':
            raise
        raise DistillError(f"{where} needs 'timm', which is not installed; {how_to_install('timm')}.") from error
    return timm


def check_name(name: Any, where: str) -> None:
    """Refuse names that timm does not know, without building or downloading anything.

    Raises:
        DistillError: There is no such model; the nearest names are given.
    """
    timm = import_timm(where)
    if not isinstance(name, str):
        raise DistillError(f"{where} must be the name of a model of timm, e.g. 'resnet50', got {shown(name)}.")
    place, model = _parsed(timm, name, where)
    if place is not None:
        # What it is only its own config knows.
        if place == 'local-dir' and not os.path.isfile(os.path.join(os.path.expanduser(model), 'config.json')):
            raise DistillError(f'{where}: there is no {os.path.join(model, "config.json")!r}, which {name!r} needs.')
        return
    if not timm.is_model(name):
        raise DistillError(f'{where}: timm has no model {name!r}; {nearest(name, timm.list_models())}')
    _, _, tag = name.partition('.')
    if tag and tag not in _tags(timm, name):
        choices = [name.replace(tag, t) for t in _tags(timm, name)]
        raise DistillError(f'{where}: timm has no weights {name!r}; {nearest(name, choices)}')


def absolute_name(name: str) -> str:
    """A name that means the same from any folder: a model's own folder gets its absolute path."""
    timm = import_timm('timm')
    place, model = _parsed(timm, name, 'timm')
    return f'{place}:{os.path.abspath(os.path.expanduser(model))}' if place == 'local-dir' else name


def _parsed(timm: Any, name: str, where: str) -> tuple[str | None, str]:
    """Where timm looks for a model (None: in itself), and its name there."""
    try:
        place, model = timm.models.parse_model_name(name)
    except Exception as error:
        raise DistillError(
            f'{where}: timm cannot read the name {name!r}; models from elsewhere are written '
            f"'hf-hub:owner/name' or 'local-dir:folder' ({in_words(error)})."
        ) from error
    return None if place == 'timm' else place, model  # timm 1.0.15 calls itself so, later ones None


def timm_names(net: nn.Module, state: dict[str, Tensor]) -> Mapping[str, Tensor]:
    """Weights under the names of a timm model, by what timm reads other people's weights of its kind with."""
    import timm

    return sys.modules[type(net).__module__].checkpoint_filter_fn(timm.models.clean_state_dict(state), net)


def create_network(
    name: str,
    *,
    num_classes: int | None = None,
    in_chans: int = 3,
    input_size: int | tuple[int, int] | None = None,
    pretrained: bool = False,
    where: str = 'model',
    beside: Iterable[str] = (),
    **options: Any,
) -> nn.Module:
    """A classifier of timm, by name.

    Args:
        name: As for ``timm.create_model``: ``'resnet50'``, ``'vit_small_patch16_224.augreg_in1k'``,
            ``'hf-hub:owner/name'`` (also ``'hf_hub:...'``) or ``'local-dir:folder'``.
        num_classes: How many classes it predicts. Default: as its pretrained weights, mostly 1000.
        in_chans: Channels of the images.
        input_size: Pixels, or ``(height, width)``. Networks that are built for one resolution (vision transformers)
            are built for this one; those that take any are left as they are. ``net.pretrained_cfg['input_size']``
            holds it in both cases.
        pretrained: Load timm's own weights, from the internet.
        where: What names the model in the config, for error messages.
        beside: Options that the config takes besides, to be suggested for misspelt ones.
        **options: What the network's constructor takes besides, e.g. ``drop_path_rate``.

    Returns:
        The network in training mode, with timm's own names in its state dict.

    Raises:
        DistillError: timm is missing or has no such model, or the model refuses an option.
    """
    timm = import_timm(where)
    check_name(name, where)
    for key, value in (('num_classes', num_classes), ('in_chans', in_chans)):
        if value is not None:
            whole_number(value, f'{where}: {key}')
    size = image_size(input_size, f'{where}: input_size')
    if num_classes is not None:
        options['num_classes'] = num_classes
    if in_chans != 3:
        options['in_chans'] = in_chans

    def create(**extra: Any) -> nn.Module:
        return timm.create_model(name, pretrained=pretrained, **options, **extra)

    try:
        if size is None or 'img_size' in options:
            net = create()
        else:
            try:
                net = create(img_size=size)
            except TypeError as error:
                # Convolutional networks take any resolution, and so no such option.
                if "unexpected keyword argument 'img_size'" not in str(error):
                    raise
                net = create()
    except Exception as error:
        raise _refused(name, options, pretrained, error, where, beside) from error
    if size is not None:
        _check_patches(net, name, size, where)
    cfg = getattr(net, 'pretrained_cfg', None) or {}
    if size is not None or in_chans != 3:
        sides = size or cfg.get('input_size', (3, 224, 224))[-2:]
        cast(_Configured, net).pretrained_cfg = {**cfg, 'input_size': (in_chans, *sides)}
    return net


def data_config(net: nn.Module) -> DataConfig:
    """Normalisation and resolution of a network: from timm's ``pretrained_cfg``; of others, ImageNet's at 224.

    A network for one channel is given the average of the statistics of three.
    """
    cfg = getattr(net, 'pretrained_cfg', None)
    if not isinstance(cfg, Mapping):
        mean, std = (tuple(255 * v for v in values) for values in (IMAGENET_MEAN, IMAGENET_STD))
        return DataConfig(mean, std, (224, 224), 'bicubic', 0.875)
    from timm.data import resolve_data_config

    data = resolve_data_config({}, pretrained_cfg=cfg)
    channels, height, width = data['input_size']
    mean, std = (per_channel([255 * float(v) for v in data[key]], channels) for key in ('mean', 'std'))
    return DataConfig(mean, std, (height, width), data['interpolation'], float(data['crop_pct']))


def per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Statistics of three channels for any number of them: those of others are the average."""
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels


def _tags(timm: Any, name: str) -> list[str]:
    architecture = name.partition('.')[0]
    return [n.partition('.')[2] for n in timm.list_pretrained(f'{architecture}.*')]


def _check_patches(net: nn.Module, name: str, size: tuple[int, int], where: str) -> None:
    """Such a network is built, but fails at its first image, or has no patch at all."""
    embed = getattr(net, 'patch_embed', None)
    patch = getattr(embed, 'patch_size', None)
    if not isinstance(patch, tuple) or getattr(embed, 'dynamic_img_pad', False):
        return
    if any(side % p for side, p in zip(size, patch, strict=True)):
        fits = 'x'.join(str(max(1, round(side / p)) * p) for side, p in zip(size, patch, strict=True))
        raise DistillError(
            f'{where}: images of {size[0]}x{size[1]} do not divide into the {patch[0]}x{patch[1]} patches of {name!r}; '
            f'take an input_size of {fits}.'
        )


def _refused(
    name: str, options: Mapping[str, Any], pretrained: bool, error: Exception, where: str, beside: Iterable[str]
) -> DistillError:
    unexpected = _UNEXPECTED.search(str(error)) if isinstance(error, TypeError) else None
    if unexpected and unexpected[3] in options:
        choices = _option_names(name, unexpected[1] or unexpected[2]).union(beside) - {'options', 'model'}
        return DistillError(f'{where}: {name!r} has no option {unexpected[3]!r}: {nearest(unexpected[3], choices)}')
    reason = in_words(error)
    if pretrained:
        return DistillError(f'{where}: {name!r} with its pretrained weights cannot be had ({reason}); give a file.')
    given = ', '.join(f'{k}={v!r}' for k, v in options.items()) or 'no options'
    return DistillError(f'{where}: {name!r} cannot be created with {given} ({reason}).')


def _option_names(name: str, owner: str) -> set[str]:
    """What the constructor takes: of the class that refused an option, and of the classifiers beside it."""
    import timm

    architecture = name.partition('.')[0]
    if not timm.is_model(architecture):
        return set()  # only its own config says which it is
    module = sys.modules[timm.models.model_entrypoint(architecture).__module__]
    classes = [
        c for c in vars(module).values() if inspect.isclass(c) and (c.__name__ == owner or hasattr(c, 'get_classifier'))
    ]
    names = {p for c in classes for p in inspect.signature(c).parameters}
    return names - {'args', 'kwargs', 'cfg', 'in_chans', 'img_size', 'num_classes'}
