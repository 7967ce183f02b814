"""A timm network as a model of MMEngine's Runner, whose checkpoints are timm checkpoints."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.logging import print_log
from mmengine.model import BaseModel
from mmengine.registry import MODELS as ROOT_MODELS
from torch import Tensor, nn

from kd_plugins.classification.criterion import build_criterion, check_labels
from kd_plugins.classification.preprocessor import ClassifierPreprocessor
from kd_plugins.classification.sample import ClassSample, class_labels
from kd_plugins.classification.token import find_token, returning_both
from kd_plugins.classification.weights import classifier_modules, load_start, with_prefix, without_prefix
from kd_plugins.distiller import find_module
from kd_plugins.errors import DistillError
from kd_plugins.predictions import ClassLogits
from kd_plugins.registry import MODELS
from kd_plugins.teachers import check_prefix, find_weights, load_checkpoint, match_names
from kd_plugins.teachers.network import create_network, data_config, timm_names


@MODELS.register_module()
class TimmClassifier(BaseModel):
    """Any classifier of timm in MMEngine's Runner.

    .. code-block:: python

        model = dict(type='kd_plugins.TimmClassifier', model='deit_tiny_distilled_patch16_224', num_classes=100,
                     drop_path_rate=0.1, label_smoothing=0.1, mixup=dict(mixup_alpha=0.8, cutmix_alpha=1.0))

    Its state dict has exactly the keys of the timm model: ``checkpoint=`` takes files of timm, and timm's model takes
    the ``state_dict`` in a run's checkpoint. ``default_hooks=dict(checkpoint=dict(published_keys=['state_dict']))``
    makes MMEngine write it to a file of its own, which ``timm.create_model(name, checkpoint_path=...)`` opens; a
    distilled run writes such a file by itself, ``kd_student.pth``.

    Students with a distillation token (``deit_*_distilled_*``, ``levit_*``, ``pit_*_distilled_*``, ...) train the mean
    of both heads on the labels, as timm does, until a KD term taps ``'dist_logits'``: then the class head learns from
    the labels and the other one from the teacher (Touvron et al., arXiv 2012.12877, section 4). Predictions are the
    mean of both heads in either case; the scores of each head alone stand in the samples too.

    Args:
        model: Name of a timm model, ``dict(type=...)`` of a module from the ``MODELS`` registry, or a module. It maps
            ``(B, in_chans, H, W)`` to ``(B, num_classes)`` logits.
        num_classes: Number of classes. Default: what the model has.
        in_chans: Channels of the images: 3 (RGB) or 1 (grey).
        input_size: Side of the images in pixels, or ``(height, width)``. Default: the model's ``pretrained_cfg``.
            Models that are made for one resolution are built for it.
        checkpoint: Weights to start from. Where the number of classes differs, the classifier starts anew.
        checkpoint_prefix: What the names of the weights begin with, in a file of several models.
        pretrained: Start from timm's own weights (from the internet), if no checkpoint is given.
        loss: ``'ce'``, ``'bce'``, or ``dict(type=...)`` of a loss of timm, torch or the ``MODELS`` registry. ``'ce'``
            is cross-entropy, with Mixup or CutMix timm's for soft labels; of multi-label data it is binary.
            Class weights (``weight``, ``pos_weight``) are lists.
        label_smoothing: In [0, 1). A loss that is written as a dict has its own option.
        multi_label: Whether an image has any number of classes: a sigmoid each.
        mixup: Mixup and CutMix, see `ClassifierPreprocessor`.
        random_erasing: See `ClassifierPreprocessor`.
        freeze: Modules of the network that are not trained, e.g. ``['stem', 'layer1']``; ``'classifier'`` is its head.
        mean: Means in pixels (0 to 255). Default: the model's ``pretrained_cfg``.
        std: Standard deviations in pixels. Default: the model's ``pretrained_cfg``.
        data_preprocessor: Instead of the one that the options above describe.
        **options: What the network's constructor takes, e.g. ``drop_rate``, ``drop_path_rate``.

    Raises:
        DistillError: The model is unknown, or an option does not suit it.
    """

    def __init__(
        self,
        model: str | Mapping[str, Any] | nn.Module,
        num_classes: int | None = None,
        in_chans: int = 3,
        input_size: int | tuple[int, int] | None = None,
        checkpoint: str | None = None,
        checkpoint_prefix: str | None = None,
        pretrained: bool = False,
        loss: str | Mapping[str, Any] = 'ce',
        label_smoothing: float = 0.0,
        multi_label: bool = False,
        mixup: Mapping[str, Any] | None = None,
        random_erasing: Mapping[str, Any] | None = None,
        freeze: Sequence[str] = (),
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        data_preprocessor: Mapping[str, Any] | nn.Module | None = None,
        **options: Any,
    ) -> None:
        _check_labelling(label_smoothing, multi_label)
        check_prefix(checkpoint_prefix, 'model.checkpoint')
        fixed = dict(num_classes=num_classes, in_chans=in_chans, input_size=input_size)
        net, self.model_name = _network(model, fixed, pretrained, options)
        data = data_config(net)
        if isinstance(model, str):
            # Of modules nobody knows how many channels they take.
            _check_per_channel(len(data.mean), mean=mean, std=std)
        number = num_classes if num_classes is not None else getattr(net, 'num_classes', None)
        if data_preprocessor is None:
            data_preprocessor = ClassifierPreprocessor(
                mean=data.mean if mean is None else mean,
                std=data.std if std is None else std,
                size=data.input_size,
                num_classes=number,
                mixup=mixup,
                label_smoothing=label_smoothing,
                random_erasing=random_erasing,
                multi_label=multi_label,
            )
        super().__init__(data_preprocessor)
        self.net = net
        #: Path in the network of the module that returns both heads' logits, or None without a token.
        self.token_path = token = find_token(net)
        activation = 'sigmoid' if multi_label else 'either' if loss == 'bce' else 'softmax'
        self.logits = ClassLogits(number, activation)
        if token is not None:
            self.dist_logits = ClassLogits(number, activation)
        self.multi_label = multi_label
        self.checkpoint, self.checkpoint_prefix = checkpoint, checkpoint_prefix
        #: Whether the heads learn from different teachers in the next forward; set by `DistillHook`.
        self.separate_heads = False
        self.criterion = build_criterion(loss, label_smoothing, multi_label, mixup is not None)
        _refuse_trainable(self.criterion)
        check_labels(self.criterion, number, multi_label, mixup is not None)
        self._frozen = self._freeze(freeze)
        self._register_state_dict_hook(without_prefix)
        self._register_load_state_dict_pre_hook(with_prefix, with_module=True)

    @property
    def weights_of(self) -> nn.Module:
        """What its checkpoints hold: the network under timm's names."""
        return self.net

    # ------------------------------------------------------------------ MMEngine
    def forward(self, inputs: Tensor, data_samples: Sequence[ClassSample] | None = None, mode: str = 'tensor') -> Any:
        """Run the network.

        Args:
            inputs: ``(B, C, H, W)`` from the data preprocessor.
            data_samples: B `ClassSample`; needed for ``'loss'``.
            mode: ``'tensor'``, ``'loss'`` or ``'predict'``.

        Returns:
            ``(B, num_classes)`` logits, a dict with ``loss_cls``, or the samples with their scores.
        """
        if mode not in ('tensor', 'loss', 'predict'):
            raise DistillError(f"mode must be 'tensor', 'loss' or 'predict', got {mode!r}.")
        logits, heads = self._logits(inputs)
        if mode == 'tensor':
            return logits
        if mode == 'loss':
            return dict(loss_cls=self.criterion(logits, class_labels(data_samples).to(inputs.device)))
        samples = [ClassSample() for _ in inputs] if data_samples is None else data_samples
        scores = dict(pred_score=logits)
        if heads is not None:
            scores.update(pred_score_class=heads[0], pred_score_distillation=heads[1])
        for name, values in scores.items():
            for sample, score in zip(samples, self._probabilities(values), strict=True):
                # A copy: a view would be pickled with the whole batch, once for every image.
                setattr(sample, name, score.clone())
        return samples

    def _logits(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """What predicts (or learns from the labels), and both heads of a model with a token."""
        if self.token_path is None:
            return self.logits(self.net(images)), None
        with returning_both(self.net.get_submodule(self.token_path)):
            by_class, by_token = self.net(images)
        by_token = self.dist_logits(by_token)
        return self.logits(by_class if self.separate_heads else (by_class + by_token) / 2), (by_class, by_token)

    def _probabilities(self, logits: Tensor) -> Tensor:
        logits = logits.float()
        return logits.sigmoid() if self.multi_label else logits.softmax(-1)

    def init_weights(self) -> None:
        """Load ``checkpoint``. The network has initialised itself; MMEngine's way would overwrite loaded weights."""
        if self.checkpoint is None:
            return
        where, content = 'model.checkpoint', load_checkpoint(self.checkpoint, 'model.checkpoint')
        path = os.fspath(self.checkpoint)
        weights = find_weights(content, path, where, self.checkpoint_prefix)
        weights = match_names(self.net, weights, path, where, convert=timm_names)
        anew = load_start(self.net, weights.state, path)
        notes = [f'the classifier ({", ".join(anew)}) starts anew'] if anew else []
        print_log('; '.join([f'student starts from {path}', *weights.notes, *notes]), logger='current')

    def train(self, mode: bool = True) -> TimmClassifier:
        """Switch the mode; frozen modules stay in evaluation."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def _freeze(self, paths: Sequence[str]) -> list[nn.Module]:
        if isinstance(paths, str):
            paths = [paths]
        if not isinstance(paths, (list, tuple)) or not all(isinstance(path, str) for path in paths):
            raise DistillError(f"model.freeze must be a list of modules, e.g. ['stem', 'layer1'], got {paths!r}.")
        modules: list[nn.Module] = []
        for path in paths:
            found = classifier_modules(self.net) if path == 'classifier' else [find_module(self.net, path, 'freeze')]
            modules += found
        for module in modules:
            module.requires_grad_(False)
        if not any(p.requires_grad for p in self.net.parameters()):
            raise DistillError(f'freeze={list(paths)!r} leaves nothing to train.')
        return modules


def _check_labelling(label_smoothing: Any, multi_label: Any) -> None:
    if not isinstance(label_smoothing, (int, float)) or not 0 <= label_smoothing < 1:
        raise DistillError(f'model.label_smoothing must be a number in [0, 1), got {label_smoothing!r}.')
    if not isinstance(multi_label, bool):
        raise DistillError(f'model.multi_label must be True or False, got {multi_label!r}.')


def _check_per_channel(channels: int, **options: Any) -> None:
    for key, values in options.items():
        if isinstance(values, (tuple, list)) and len(values) != channels:
            raise DistillError(
                f'model.{key} must be {channels} number(s), one for each channel of the images, got {values!r}.'
            )


def _refuse_trainable(criterion: nn.Module) -> None:
    if any(True for _ in criterion.parameters()):
        raise DistillError(
            f'model.loss {type(criterion).__name__} has trainable parameters, which have no place in a timm '
            'checkpoint; take a loss without.'
        )


def _network(
    model: Any, fixed: Mapping[str, Any], pretrained: bool, options: Mapping[str, Any]
) -> tuple[nn.Module, str]:
    if isinstance(model, str):
        own = inspect.signature(TimmClassifier).parameters
        return create_network(model, pretrained=pretrained, where='model.model', beside=own, **fixed, **options), model
    net = ROOT_MODELS.build(dict(model)) if isinstance(model, Mapping) else model
    if not isinstance(net, nn.Module):
        raise DistillError(f'model.model must be the name of a timm model, dict(type=...) or a module, got {model!r}.')
    if options:
        raise DistillError(
            f'{next(iter(options))!r} is an option of timm models; write it in the dict of {type(net).__name__}.'
        )
    size = fixed['input_size']
    if size is not None:
        size = (size, size) if isinstance(size, int) else tuple(size)
        cfg = dict(getattr(net, 'pretrained_cfg', None) or {})
        net.pretrained_cfg = {**cfg, 'input_size': (fixed['in_chans'], *size)}
    return net, type(net).__name__
