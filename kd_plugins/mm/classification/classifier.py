"""A timm network as a model of MMEngine's Runner, whose checkpoints are timm checkpoints."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModel
from mmengine.registry import MODELS as ROOT_MODELS
from torch import Tensor, nn

from kd_plugins.classifiers.network import create_network, data_config
from kd_plugins.distiller import find_module, find_weights, load_checkpoint, untouched_rng
from kd_plugins.errors import DistillError, check_keys, nearest
from kd_plugins.mm.classification.preprocessor import ClassifierPreprocessor
from kd_plugins.mm.classification.sample import ClassSample
from kd_plugins.mm.classification.token import find_token, returning_both
from kd_plugins.mm.targets import class_labels
from kd_plugins.predictions import ClassLogits
from kd_plugins.registry import MODELS

NET = 'net.'


@MODELS.register_module()
class TimmClassifier(BaseModel):
    """Any classifier of timm in MMEngine's Runner.

    .. code-block:: python

        model = dict(type='kd_plugins.TimmClassifier', model='deit_tiny_distilled_patch16_224', num_classes=100,
                     drop_path_rate=0.1, label_smoothing=0.1, mixup=dict(mixup_alpha=0.8, cutmix_alpha=1.0))

    Its state dict has exactly the keys of the timm model: ``checkpoint=`` takes files of timm, and timm's model takes
    the ``state_dict`` in a run's checkpoint. ``default_hooks=dict(checkpoint=dict(published_keys=['state_dict']))``
    makes MMEngine write it to a file of its own, which ``timm.create_model(name, checkpoint_path=...)`` opens.

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
        if not isinstance(label_smoothing, (int, float)) or not 0 <= label_smoothing < 1:
            raise DistillError(f'model.label_smoothing must be a number in [0, 1), got {label_smoothing!r}.')
        if not isinstance(multi_label, bool):
            raise DistillError(f'model.multi_label must be True or False, got {multi_label!r}.')
        fixed = dict(num_classes=num_classes, in_chans=in_chans, input_size=input_size)
        net, self.model_name = _network(model, fixed, pretrained, options)
        data = data_config(net)
        for key, values in (('mean', mean), ('std', std)):
            # Of modules nobody knows how many channels they take.
            if isinstance(model, str) and isinstance(values, (tuple, list)) and len(values) != len(data.mean):
                raise DistillError(
                    f'model.{key} must be {len(data.mean)} number(s), one for each channel of the images, got '
                    f'{values!r}.'
                )
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
        self.multi_label, self.checkpoint = multi_label, checkpoint
        #: Whether the heads learn from different teachers in the next forward; set by `DistillHook`.
        self.separate_heads = False
        self.criterion = _criterion(loss, label_smoothing, multi_label, mixup is not None)
        if any(True for _ in self.criterion.parameters()):
            raise DistillError(
                f'model.loss {type(self.criterion).__name__} has trainable parameters, which have no place in a timm '
                'checkpoint; take a loss without.'
            )
        _check_labels(self.criterion, number, multi_label, mixup is not None)
        self._frozen = self._freeze(freeze)
        self._register_state_dict_hook(_without_prefix)
        self._register_load_state_dict_pre_hook(_with_prefix, with_module=True)

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
            return dict(loss_cls=self.criterion(logits, class_labels(inputs, data_samples)))
        samples = [ClassSample() for _ in inputs] if data_samples is None else data_samples
        scores = dict(pred_score=logits)
        if heads is not None:
            scores.update(pred_score_class=heads[0], pred_score_distillation=heads[1])
        for name, values in scores.items():
            for sample, score in zip(samples, self._probabilities(values), strict=True):
                setattr(sample, name, score)
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
        path = self.checkpoint
        state, _ = find_weights(load_checkpoint(path, 'model.checkpoint'), os.fspath(path))
        anew = load_start(self.net, state, path)
        note = f'; the classifier ({", ".join(anew)}) starts anew' if anew else ''
        print_log(f'student starts from {path}{note}', logger='current')

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


def classifier_modules(net: nn.Module) -> list[nn.Module]:
    """The module, or the two of a model with a distillation token, that make logits of features."""
    found = net.get_classifier() if hasattr(net, 'get_classifier') else None
    modules = [m for m in (found if isinstance(found, (tuple, list)) else [found]) if isinstance(m, nn.Module)]
    if not any(True for m in modules for _ in m.parameters()):
        raise DistillError(f'{type(net).__name__} names no classifier; write the path of its last layer instead.')
    return modules


def load_start(net: nn.Module, state: Mapping[str, Tensor], source: str) -> list[str]:
    """Load weights to start from; a classifier with another number of classes stays as it is.

    Args:
        net: The network.
        state: The weights.
        source: Where they come from.

    Returns:
        Keys of the classifier that were left out.

    Raises:
        DistillError: Anything else does not fit.
    """
    own = net.state_dict()
    anew: list[str] = []
    if hasattr(net, 'get_classifier'):
        heads = {id(p) for m in classifier_modules(net) for p in m.parameters()}
        names = [k for k, p in net.named_parameters() if id(p) in heads]
        anew = [k for k in names if k not in state or state[k].shape != own[k].shape]
    wrong = [k for k in own if k not in anew and (k not in state or state[k].shape != own[k].shape)]
    wrong = [k for k in wrong if not k.endswith('num_batches_tracked')]
    extra = [k for k in state if k not in own]
    if wrong or extra:
        raise DistillError(
            f'model.checkpoint {source!r} does not fit {type(net).__name__}: {len(wrong)} keys missing or of another '
            f'shape, {len(extra)} unexpected ({", ".join([*wrong, *extra][:3])}); check model and its options.'
        )
    net.load_state_dict({k: v for k, v in state.items() if k not in anew}, strict=False)
    return anew


def _network(
    model: Any, fixed: Mapping[str, Any], pretrained: bool, options: Mapping[str, Any]
) -> tuple[nn.Module, str]:
    if isinstance(model, str):
        own = inspect.signature(TimmClassifier).parameters
        return create_network(model, pretrained=pretrained, where='model.model', beside=own, **fixed, **options), model
    given = [*options, *(k for k, v in dict(fixed, in_chans=None).items() if v is not None and k == 'num_classes')]
    if isinstance(model, Mapping):
        net = ROOT_MODELS.build(dict(model))
    else:
        net = model
    if not isinstance(net, nn.Module):
        raise DistillError(f'model.model must be the name of a timm model, dict(type=...) or a module, got {model!r}.')
    if options:
        raise DistillError(f'{given[0]!r} is an option of timm models; write it in the dict of {type(net).__name__}.')
    size = fixed['input_size']
    if size is not None:
        size = (size, size) if isinstance(size, int) else tuple(size)
        cfg = dict(getattr(net, 'pretrained_cfg', None) or {})
        net.pretrained_cfg = {**cfg, 'input_size': (fixed['in_chans'], *size)}
    return net, type(net).__name__


def _criterion(loss: Any, smoothing: float, multi_label: bool, mixes: bool) -> nn.Module:
    """timm's own losses, chosen as its training script does."""
    import timm.loss

    if isinstance(loss, Mapping):
        if smoothing and not mixes:
            raise DistillError(
                f'model.label_smoothing={smoothing} does not reach a loss that is written as dict(type=...); write it '
                'in that dict, or leave loss out.'
            )
        options = {
            k: torch.tensor(v) if k in ('weight', 'pos_weight') and isinstance(v, (list, tuple)) else v
            for k, v in loss.items()
        }
        name = options.pop('type', None)
        factory = getattr(timm.loss, str(name), None) or getattr(nn, str(name), None) if isinstance(name, str) else name
        if isinstance(name, str) and factory is None:
            with ROOT_MODELS.switch_scope_and_registry(None) as registry:
                factory = registry.get(name)
        if factory is None:
            known = [n for m in (timm.loss, nn) for n, c in vars(m).items() if inspect.isclass(c) and _is_loss(m, n)]
            raise DistillError(f'model.loss: there is no loss {name!r}; {nearest(str(name), known)}')
        if mixes and name == 'LabelSmoothingCrossEntropy':
            raise DistillError(
                'model.loss LabelSmoothingCrossEntropy takes class numbers, but mixup makes soft labels; leave loss '
                'out and write label_smoothing in the model.'
            )
        if name == 'JsdCrossEntropy':
            raise DistillError(
                'model.loss JsdCrossEntropy compares several augmentations of each image (the splits of AugMix), which '
                'the data sets here do not make; leave loss out.'
            )
        taken = inspect.signature(factory).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
            check_keys(options, taken, f'model.loss ({name})')
        try:
            return factory(**options)
        except Exception as error:  # assertions without a text: timm checks little
            given = ', '.join(f'{k}={v!r}' for k, v in options.items())
            raise DistillError(f'model.loss: {name}({given}) is refused: {_in_words(error)}.') from error
    if loss not in ('ce', 'bce'):
        raise DistillError(f"model.loss must be 'ce', 'bce' or dict(type=...), got {loss!r}.")
    if multi_label or loss == 'bce':
        # Mixed labels are smoothed where they are mixed.
        amount = 0.0 if mixes else smoothing
        return timm.loss.BinaryCrossEntropy(smoothing=amount, smooth_dense=multi_label and bool(amount))
    if mixes:
        return timm.loss.SoftTargetCrossEntropy()
    if smoothing:
        return timm.loss.LabelSmoothingCrossEntropy(smoothing)
    return nn.CrossEntropyLoss()


def _is_loss(module: Any, name: str) -> bool:
    return module is not nn or name.endswith('Loss')


def _check_labels(criterion: nn.Module, count: int | None, multi_label: bool, mixes: bool) -> None:
    """Refuse a loss on other labels than these; some would even broadcast them."""
    if count is None:
        return
    batch = 3 if count == 2 else 2
    logits = torch.zeros(batch, count)
    if multi_label or mixes:
        kind = 'zeros and ones (B, C), as multi_label=True says' if multi_label else 'soft ones (B, C), as mixup makes'
        target = torch.zeros(batch, count).index_fill_(1, torch.tensor([0]), 1)
    else:
        kind, target = 'class numbers (B,)', torch.zeros(batch, dtype=torch.long)
    try:
        with untouched_rng(), torch.no_grad():
            copy.deepcopy(criterion)(logits, target)
    except Exception as error:
        raise DistillError(
            f'model.loss {type(criterion).__name__} fails on {count} logits (B, C) and labels that are {kind}: '
            f'{_in_words(error)}; leave loss out for one that suits.'
        ) from error


def _in_words(error: Exception) -> str:
    lines = str(error).strip().splitlines() or ['no details']
    return f'{type(error).__name__}: {lines[0][:200].rstrip(".")}'


# Functions of this module, so that the EMA's deep copy of the model carries hooks that act on the copy.
def _without_prefix(model: nn.Module, state: dict[str, Tensor], prefix: str, local_metadata: Any) -> None:
    for key in [k for k in state if k.startswith(prefix)]:
        # All keys again, so that they keep their order; what is not of the network (a loss's class weights) is config.
        value, name = state.pop(key), key[len(prefix) :]
        if name.startswith(NET):
            state[prefix + name[len(NET) :]] = value


def _with_prefix(model: nn.Module, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    _refuse_strangers(model, {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)})
    for key in [k for k in state if k.startswith(prefix)]:
        state[f'{prefix}{NET}{key[len(prefix) :]}'] = state.pop(key)
    for name, value in model.criterion.state_dict(prefix=f'{prefix}criterion.').items():
        state[name] = value


def _refuse_strangers(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """MMEngine's ``load_from`` only warns of what does not fit, and trains on from random weights."""
    # Counters and other scalars look alike everywhere.
    own = {k: v.shape for k, v in model.net.state_dict().items() if v.dim()}
    if state and not any(own[k] == getattr(v, 'shape', None) for k, v in state.items() if k in own):
        raise DistillError(
            f'The checkpoint to load does not fit {model.model_name} at all: it holds {", ".join(list(state)[:3])}, '
            f'... where {", ".join(list(own)[:3])}, ... are expected; check load_from, the model and its options.'
        )
