"""Image transforms written as configs: timm's recipe, torchvision's by name, or none."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kd_plugins.errors import DistillError, check_keys, nearest
from kd_plugins.teachers.network import check_name, image_size, import_timm
from kd_plugins.type_names import type_name

# Options of timm's create_transform that act in one mode only; in the other they would be ignored without a word.
_TRAINING = {
    'no_aug', 'train_crop_mode', 'scale', 'ratio', 'hflip', 'vflip', 'color_jitter', 'color_jitter_prob',
    'grayscale_prob', 'gaussian_blur_prob', 'auto_augment',
}  # fmt: skip
_TESTING = {'crop_pct', 'crop_mode', 'crop_border_pixels'}
_CHOICES = {
    'interpolation': ('nearest', 'bilinear', 'bicubic', 'lanczos', 'random'),
    'train_crop_mode': ('rrc', 'rkrc', 'rkrr'),
    'crop_mode': ('center', 'border', 'squash'),
}
_OPTIONS = {'model', 'input_size', 'training', 'interpolation'} | _TRAINING | _TESTING

_ERASING = 'random erasing needs normalised pixels, so it belongs to the model: random_erasing=dict(...)'
_NORMALISATION = 'data sets give uint8 pixels, and the model normalises them: leave it out'
_MIXING = 'mixing needs a whole batch, so it belongs to the model: mixup=dict(mixup_alpha=..., cutmix_alpha=...)'
_ELSEWHERE = {
    **dict.fromkeys(['re_prob', 're_mode', 're_count', 're_num_splits', 'RandomErasing'], _ERASING),
    **dict.fromkeys(
        ['normalize', 'mean', 'std', 'Normalize', 'ToTensor', 'ToDtype', 'ConvertImageDtype'], _NORMALISATION
    ),
    **dict.fromkeys(['mixup', 'cutmix', 'mixup_alpha', 'cutmix_alpha', 'MixUp', 'CutMix'], _MIXING),
}
_ENUMS = {'interpolation': 'InterpolationMode', 'policy': 'AutoAugmentPolicy'}  # what a config writes as a string


class Transform:
    """PIL image -> uint8 tensor ``(C, H, W)``; made by `build_transform`.

    Args:
        apply: From PIL image to PIL image or uint8 tensor; None changes nothing.
    """

    def __init__(self, apply: Any = None) -> None:
        self.apply = apply

    def __call__(self, image: Image.Image) -> Tensor:
        """Transform one image.

        Raises:
            DistillError: The result is no uint8 image.
        """
        result = image if self.apply is None else self.apply(image)
        if isinstance(result, Image.Image):
            pixels = np.array(result)
            return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1).contiguous()
        if not isinstance(result, Tensor) or result.dtype != torch.uint8 or result.dim() != 3:
            given = f'{result.dtype} {tuple(result.shape)}' if isinstance(result, Tensor) else type(result).__name__
            raise DistillError(f'transform must give a uint8 tensor (C, H, W), not {given}: {_NORMALISATION}.')
        return result.as_subclass(Tensor)

    def __repr__(self) -> str:
        return f'{type(self).__name__}({self.apply!r})'


def build_transform(cfg: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None, in_chans: int = 3) -> Transform:
    """Build an image transform from a config.

    Normalisation, random erasing, Mixup and CutMix are the model's, which sees whole batches; what comes out here are
    plain pixels. Random transforms draw from Python's, NumPy's and torch's global generators, which MMEngine seeds in
    every worker.

    Args:
        cfg: One of

            - a dict of options of ``timm.data.create_transform``: ``dict(model='deit_tiny_patch16_224', training=True,
              auto_augment='rand-m9-mstd0.5-inc1')``. ``model`` gives the defaults of ``input_size``, ``interpolation``,
              ``crop_pct``, ``crop_mode`` and of the colour that rotated images are filled with; ``training`` (default
              False) chooses between random crops and the centre crop. As in timm, ``auto_augment`` switches
              ``color_jitter`` off (except ``'3a'``), and a ``crop_pct`` below 1 cuts the border off small images too;
            - a list of transforms of ``torchvision.transforms.v2`` by name: ``[dict(type='RandomCrop', size=32,
              padding=4), dict(type='RandomHorizontalFlip')]``; interpolation modes are strings;
            - None: pixels as they are. All images must then have one size.
        in_chans: 3 or 1; of the images that it will be given.

    Returns:
        A picklable callable, PIL image -> uint8 tensor ``(C, H, W)``.

    Raises:
        DistillError: An unknown name or option (the nearest is named), one that belongs to the model, one that has no
            effect in this mode, or a value that timm or torchvision refuses.
    """
    if cfg is None:
        return Transform()
    if isinstance(cfg, Mapping) and 'type' not in cfg:
        return Transform(_from_timm(dict(cfg), in_chans))
    if isinstance(cfg, Sequence) and not isinstance(cfg, str):
        return Transform(_from_torchvision(cfg))
    raise DistillError(
        f"transform must be options of timm's create_transform, dict(input_size=32, training=True), or a list of "
        f"torchvision transforms, [dict(type='RandomHorizontalFlip')], not {cfg!r}."
    )


def _from_timm(cfg: dict[str, Any], in_chans: int) -> Any:
    _refuse_elsewhere(cfg)
    check_keys(cfg, sorted(_OPTIONS), 'transform')
    timm = import_timm('transform')
    from timm.data import create_transform, resolve_data_config

    training = cfg.pop('training', False)
    if not isinstance(training, bool):
        raise DistillError(f'transform.training must be True or False, got {training!r}.')
    idle = sorted(cfg.keys() & (_TESTING if training else _TRAINING))
    if idle:
        raise DistillError(f'transform.{idle[0]} acts only with training={not training}; leave it out here.')
    for key, choices in _CHOICES.items():
        if cfg.get(key, choices[0]) not in choices or (cfg.get(key) == 'random' and not training):
            raise DistillError(f'transform.{key} cannot be {cfg[key]!r}: {nearest(cfg[key], choices)}')

    model = cfg.pop('model', None)
    size = image_size(cfg.pop('input_size', None), 'transform.input_size')
    known: dict[str, Any] = {}
    if model is not None:
        check_name(model, 'transform.model')
        pretrained = None if ':' in model else timm.get_pretrained_cfg(model)
        if pretrained is None:
            raise DistillError(
                f'transform.model: timm keeps no transform for {model!r}; write input_size, interpolation and crop_pct '
                'instead.'
            )
        known = resolve_data_config({}, pretrained_cfg=pretrained.to_dict())
        size = size or tuple(known['input_size'][-2:])
    if size is None:
        raise DistillError("transform needs input_size (pixels, or (height, width)), or model='<a name of timm>'.")
    keys = ('interpolation',) if training else ('interpolation', 'crop_pct', 'crop_mode')
    options = {k: known[k] for k in keys if k in known} | cfg
    # timm fills with 255 x mean what rotations and shears uncover; PIL wants one number per channel.
    mean = tuple(known.get('mean') or timm.data.IMAGENET_DEFAULT_MEAN)
    mean = mean if len(mean) == in_chans else (sum(mean) / len(mean),) * in_chans
    try:
        compose = create_transform(size, is_training=training, normalize=False, mean=mean, **options)
    except Exception as error:  # assertions without a text, KeyError, TypeError: timm checks little
        written = ', '.join(f'{k}={v!r}' for k, v in cfg.items())
        raise DistillError(
            f'timm refuses transform=dict({written}): {type(error).__name__} {error}'.rstrip()
        ) from error
    for op in _augmentations(compose):
        if op.aug_fn is timm.data.auto_augment.posterize:
            op.aug_fn = _posterize
    return compose


def _augmentations(compose: Any) -> Iterator[Any]:
    """Every operation of timm's RandAugment, AugMix and AutoAugment in a pipeline."""
    for step in compose.transforms:
        yield from getattr(step, 'ops', ())
        for policy in getattr(step, 'policy', ()):
            yield from policy


def _posterize(image: Image.Image, bits_to_keep: int, **options: Any) -> Image.Image:
    """timm (1.0.31) asks for 0 bits at full magnitude: black in older Pillow, a ValueError since Pillow 13."""
    from timm.data.auto_augment import posterize

    return Image.new(image.mode, image.size) if bits_to_keep < 1 else posterize(image, bits_to_keep, **options)


def _from_torchvision(cfgs: Sequence[Mapping[str, Any]]) -> Any:
    try:
        from torchvision.transforms import v2
    except ImportError as error:
        raise DistillError(f'transform needs torchvision, which cannot be imported ({error}).') from error
    names = [
        n for n, c in vars(v2).items() if inspect.isclass(c) and issubclass(c, torch.nn.Module) and n != 'Transform'
    ]
    return v2.Compose([_one(v2, names, cfg, f'transform[{i}]') for i, cfg in enumerate(cfgs)] or [v2.Identity()])


def _one(v2: Any, names: list[str], cfg: Mapping[str, Any], where: str) -> Any:
    if not isinstance(cfg, Mapping) or not (isinstance(cfg.get('type'), str) or inspect.isclass(cfg.get('type'))):
        raise DistillError(f"{where} must be a dict(type='<a transform of torchvision>', ...), not {cfg!r}.")
    options = dict(cfg)
    name = type_name(options.pop('type'))
    _refuse_elsewhere([name])
    if name not in names:
        raise DistillError(f'{where}: torchvision has no transform {name!r}: {nearest(name, names)}')
    cls = getattr(v2, name)
    check_keys(options, [p for p in inspect.signature(cls).parameters if p != 'kwargs'], f'{where} ({name})')
    if 'transforms' in options:  # RandomApply and its like
        options['transforms'] = [
            _one(v2, names, c, f'{where}.transforms[{i}]') for i, c in enumerate(cfg['transforms'])
        ]
    try:
        for key in options.keys() & _ENUMS.keys():
            if isinstance(options[key], str):
                options[key] = getattr(v2, _ENUMS[key])(options[key])
        return cls(**options)
    except (TypeError, ValueError) as error:
        raise DistillError(f'{where}: torchvision refuses {dict(cfg)!r}: {error}') from error


def _refuse_elsewhere(names: Any) -> None:
    for name in names:
        if name in _ELSEWHERE:
            raise DistillError(f'transform: {name!r} cannot be used here: {_ELSEWHERE[name]}.')
