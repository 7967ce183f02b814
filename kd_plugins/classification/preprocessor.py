"""From uint8 pixels to the batch a classifier takes: normalised as timm does, erased and mixed while training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.model import BaseDataPreprocessor
from torch import Tensor

from kd_plugins.classification.sample import ClassSample
from kd_plugins.errors import DistillError, check_keys
from kd_plugins.registry import MODELS
from kd_plugins.teachers import PixelFormat

MIXUP_KEYS = ('mixup_alpha', 'cutmix_alpha', 'cutmix_minmax', 'prob', 'switch_prob', 'mode', 'correct_lam')
ERASING_KEYS = (
    'probability', 'min_area', 'max_area', 'min_aspect', 'max_aspect', 'mode', 'min_count', 'max_count',
)  # fmt: skip


@MODELS.register_module()
class ClassifierPreprocessor(BaseDataPreprocessor):
    """Makes a classifier's batches.

    `TimmClassifier` builds it from the network's ``pretrained_cfg``; written out it is ``data_preprocessor=dict(
    type='kd_plugins.ClassifierPreprocessor', mean=..., std=..., size=...)``. Normalising here, and not in the data
    set, is what lets a teacher with other statistics see the same pixels.

    Args:
        mean: Means of the channels in pixels (0 to 255), RGB or grey.
        std: Standard deviations in pixels.
        size: ``(height, width)`` of the images, or None to take any.
        num_classes: Labels must be below it.
        mixup: Options of ``timm.data.Mixup`` without ``num_classes`` and ``label_smoothing``, or None.
        label_smoothing: Of mixed labels; without Mixup the loss smoothes.
        random_erasing: Options of timm's ``RandomErasing`` without ``device``, or None.
        multi_label: Whether labels are ``(C,)`` vectors of 0 and 1.

    Raises:
        DistillError: An option is unknown or cannot be right.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        size: tuple[int, int] | None = None,
        num_classes: int | None = None,
        mixup: Mapping[str, Any] | None = None,
        label_smoothing: float = 0.0,
        random_erasing: Mapping[str, Any] | None = None,
        multi_label: bool = False,
    ) -> None:
        super().__init__(non_blocking=True)
        _check_statistics(mean, std)
        self.register_buffer('mean', torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer('std', torch.tensor(std).view(-1, 1, 1), persistent=False)
        self.size = None if size is None else (int(size[0]), int(size[1]))
        self.num_classes, self.multi_label = num_classes, multi_label
        self.mixup = None if mixup is None else self._mixup(mixup, label_smoothing)
        self.erase = None if random_erasing is None else _erasing(random_erasing)

    @property
    def pixel_format(self) -> PixelFormat:
        """What its batches look like, for a teacher that expects other ones."""
        mean, std = (tuple(v.flatten().tolist()) for v in (self.mean, self.std))
        return PixelFormat(mean, std, rgb=True, size=self.size)

    def forward(self, data: Mapping[str, Any], training: bool = False) -> dict[str, Any]:
        """Make a batch.

        Args:
            data: ``inputs``, B uint8 images ``(C, H, W)``, and ``data_samples``, B `ClassSample` or None.
            training: Whether to erase and mix.

        Returns:
            ``inputs`` ``(B, C, H, W)`` float32 on the model's device, and ``data_samples``, with ``gt_score``
            ``(C,)`` where labels were mixed.

        Raises:
            DistillError: Images or labels do not fit the model.
        """
        images, samples = data['inputs'], data.get('data_samples')
        self._check_images(images, samples)
        if not isinstance(images, Tensor):
            images = torch.stack(list(images))
        inputs = images.to(self.device, non_blocking=True).float()
        inputs = (inputs - self.mean) / self.std
        if samples is None:
            return dict(inputs=inputs, data_samples=None)
        labels = self._labels(samples)
        if training and self.erase is not None:
            # Noise is drawn where the images are.
            self.erase.device = inputs.device
            inputs = self.erase(inputs)
        if training and self.mixup is not None:
            inputs, scores = self._mix(inputs, labels)
            for sample, score in zip(samples, scores, strict=True):
                sample.gt_score = score
        return dict(inputs=inputs, data_samples=list(samples))

    def _mix(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        # timm mixes image i with image B - 1 - i. Of an odd batch the last one has no partner and stays as it is.
        from timm.data.mixup import mixup_target

        paired = len(inputs) // 2 * 2
        mixed, scores = self.mixup(inputs[:paired], labels[:paired]) if paired else (inputs[:0], None)
        if paired == len(inputs):
            return mixed, scores
        options = (self.num_classes, 1.0, self.mixup.label_smoothing, self.multi_label)
        alone = mixup_target(labels[paired:], *options)
        return torch.cat([mixed, inputs[paired:]]), alone if scores is None else torch.cat([scores, alone])

    def _labels(self, samples: Sequence[ClassSample]) -> Tensor:
        """``(B,)`` or ``(B, C)`` labels on the model's device, moved at once; the samples get views of them."""
        labels = torch.stack([sample.gt_label for sample in samples])
        expected = 2 if self.multi_label else 1
        if labels.dim() != expected:
            raise DistillError(
                f'Labels of the data set are {"vectors" if labels.dim() == 2 else "class numbers"}, but the model has '
                f'multi_label={self.multi_label}; write multi_label={labels.dim() == 2} in the model.'
            )
        if self.num_classes is not None:
            # On the CPU, before a GPU fails with an assertion that names nothing.
            count = labels.shape[1] if self.multi_label else int(labels.max()) + 1
            if count > self.num_classes or (self.multi_label and count != self.num_classes):
                raise DistillError(
                    f'The data set has at least {count} classes but the model num_classes={self.num_classes}; write '
                    'the number of classes of the data set.'
                )
        labels = labels.to(self.device, non_blocking=True)
        for sample, label in zip(samples, labels, strict=True):
            sample.gt_label = label
        return labels

    def _check_images(self, images: Any, samples: Any) -> None:
        channels = len(self.mean)
        for i, image in enumerate(images):
            if image.dtype != torch.uint8:
                raise DistillError(
                    f'Images must come as uint8 pixels, got {str(image.dtype).split(".")[-1]}: leave normalising to '
                    "the model (no ToTensor, no Normalize in the data set's transform)."
                )
            size = tuple(image.shape[-2:])
            if image.shape[0] != channels:
                raise DistillError(
                    f'An image has {image.shape[0]} channels but the model takes {channels}; write '
                    f'in_chans={image.shape[0]} in the model, or in_chans={channels} in the data set.'
                )
            if size != (self.size or tuple(images[0].shape[-2:])):
                name = _name(samples, i)
                if self.size is None:
                    raise DistillError(
                        f'Images of a batch differ in size: {name} is {_x(size)}, the first '
                        f'{_x(images[0].shape[-2:])}; give the data set a transform with input_size.'
                    )
                raise DistillError(
                    f'{name} is {_x(size)} but the model takes {_x(self.size)}; write input_size={_side(self.size)} '
                    f"in the data set's transform, or input_size={_side(size)} in the model."
                )

    def _mixup(self, options: Mapping[str, Any], smoothing: float) -> Any:
        from timm.data import Mixup

        _check_options(options, MIXUP_KEYS, 'model.mixup', 'mixup_alpha=0.8')
        _check_range(options, 'model.mixup', ('mixup_alpha', 'cutmix_alpha'), float('inf'))
        _check_range(options, 'model.mixup', ('prob', 'switch_prob'), 1)
        area = options.get('cutmix_minmax')
        if area is not None and not (_numbers(area, 2) and 0 <= area[0] < area[1] <= 1):
            raise DistillError(
                f'model.mixup.cutmix_minmax must be the least and the greatest share of a side, e.g. (0.2, 0.8), got '
                f'{area!r}.'
            )
        if not (options.get('mixup_alpha', 0) or options.get('cutmix_alpha', 0) or area):
            raise DistillError('model.mixup mixes nothing: give mixup_alpha > 0, cutmix_alpha > 0 or cutmix_minmax.')
        modes = ('batch', 'pair', 'elem')
        if options.get('mode', 'batch') not in modes:
            raise DistillError(f'model.mixup.mode must be one of {modes}, got {options["mode"]!r}.')
        if self.num_classes is None:
            raise DistillError('mixup needs num_classes, the length of the mixed labels.')
        return Mixup(
            **{'mixup_alpha': 0.0, **options},
            label_smoothing=smoothing,
            num_classes=self.num_classes,
            multi_label=self.multi_label,
        )


def _erasing(options: Mapping[str, Any]) -> Any:
    from timm.data.random_erasing import RandomErasing

    _check_options(options, ERASING_KEYS, 'model.random_erasing', 'probability=0.25')
    _check_range(options, 'model.random_erasing', ('probability', 'min_area', 'max_area'), 1)
    modes = ('const', 'rand', 'pixel')
    if options.get('mode', 'const') not in modes:
        raise DistillError(f'model.random_erasing.mode must be one of {modes}, got {options["mode"]!r}.')
    return RandomErasing(**options, device='cpu')


def _check_options(options: Any, keys: Sequence[str], where: str, example: str) -> None:
    if not isinstance(options, Mapping):
        raise DistillError(f'{where} must be dict({example}), got {options!r}.')
    check_keys(options, keys, where)


def _check_range(options: Mapping[str, Any], where: str, keys: Sequence[str], highest: float) -> None:
    for key in keys:
        value = options.get(key, 0)
        if not _numbers([value], 1) or not 0 <= value <= highest:
            kind = 'a number >= 0' if highest == float('inf') else f'a number from 0 to {highest:g}'
            raise DistillError(f'{where}.{key} must be {kind}, got {value!r}.')


def _check_statistics(mean: Any, std: Any) -> None:
    for name, values in (('mean', mean), ('std', std)):
        if not _numbers(values, len(mean) if _numbers(mean) else 0):
            raise DistillError(
                f'model.{name} must be one number for each channel, of pixels from 0 to 255, got mean={mean!r} and '
                f'std={std!r}.'
            )
    # Less than one grey level: these are statistics of pixels in [0, 1], the form in which timm writes them.
    if min(std) < 1:
        raise DistillError(
            f'model.std must be of pixels from 0 to 255, at least 1, got {tuple(std)}; statistics of pixels in [0, 1] '
            '(mean and std) are to be multiplied by 255.'
        )


def _numbers(values: Any, count: int | None = None) -> bool:
    if not isinstance(values, (tuple, list)) or not values or len(values) != (len(values) if count is None else count):
        return False
    return all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)


def _name(samples: Any, index: int) -> str:
    path = samples[index].metainfo.get('img_path') if samples else None
    return f'image {path!r}' if path else f'image {index} of a batch'


def _x(size: Sequence[int]) -> str:
    return 'x'.join(map(str, size))


def _side(size: tuple[int, int]) -> int | tuple[int, int]:
    return size[0] if size[0] == size[1] else size
