"""A batch as the run will feed it, for the check before the first iteration, without touching the run."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.logging import MessageHub
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from kd_plugins.distiller import untouched_rng
from kd_plugins.errors import DistillError
from kd_plugins.mm.copies import private_copy
from kd_plugins.mm.data import pipelines
from kd_plugins.mm.inputs import network_channels, student_format
from kd_plugins.mm.measure import picture_size

#: Images that are batched at least: two, because that pads them to one size, unless the run has one at a time.
IMAGES = 2
#: Of a picture that is no real one: its mean, and the range of the noise that keeps the maps from being constant. Not
#: white noise: detectors that were trained on pictures answer it with logits in the hundreds, and boxes decoded from
#: those are infinite. Flat grey is what they are padded with.
GREY, NOISE = 114.0, 20.0
#: ``(height, width)`` of such a picture where nothing else is known: every pyramid up to stride 128 has a cell.
SIZE = (256, 256)


def example_batch(runner: Any, model: nn.Module, images: int = 1) -> tuple[Tensor, Any]:
    """The first images of the running data set, as the model will be given them.

    They go through copies of the data set, its transforms and the data preprocessor: caches (mosaic), sizes that
    change with the iterations, random generators and MMEngine's message hub stay as they were.

    Args:
        runner: A Runner whose training is about to start.
        model: Its model, unwrapped.
        images: How many, unless the run's own batches are smaller.

    Returns:
        ``(inputs, data_samples)`` as ``forward`` gets them; inputs ``(B, C, H, W)``. Where the data set has no item to
        give (a stream, or one that fails on its first images), a grey picture with some noise, of the size and channels
        of the pipeline, and None.

    Raises:
        DistillError: Images or labels do not fit the model, or it is not given images.
    """
    loader = runner.train_loop.dataloader
    like = next(model.parameters())
    with untouched_rng(), untouched_messages():
        batch = _real_batch(loader, model, images)
        if batch is None:
            batch = grey_batch(model, getattr(loader, 'dataset', None), like.device, images), None
    inputs, samples = batch
    if not isinstance(inputs, Tensor) or inputs.dim() != 4:
        kind = tuple(inputs.shape) if isinstance(inputs, Tensor) else type(inputs).__name__
        raise DistillError(
            f'Distillation needs batches of images (B, C, H, W), but {type(model).__name__} is given {kind}.'
        )
    return inputs.to(like.dtype) if inputs.is_floating_point() else inputs, samples


def _real_batch(loader: Any, model: nn.Module, images: int) -> tuple[Any, Any] | None:
    dataset = getattr(loader, 'dataset', None)
    if dataset is None or isinstance(dataset, IterableDataset):
        return None
    try:
        own = private_copy(dataset)
        size = loader.batch_size or getattr(loader.batch_sampler, 'batch_size', None) or 1
        items = [own[i] for i in range(min(max(images, IMAGES), size, len(own)))]
        preprocess = copy.deepcopy(model.data_preprocessor)
        data = preprocess(loader.collate_fn(items), True)
    except DistillError:
        raise
    except Exception:
        # Whatever it is, the run meets it by itself, and says it in its own words.
        return None
    if isinstance(data, Mapping):
        data = data['inputs'], data.get('data_samples')
    return tuple(_first(part, images) for part in data) if isinstance(data, tuple) and len(data) == 2 else None


def _first(batch: Any, number: int) -> Any:
    """That many images of a batch, or what belongs to them."""
    return batch[:number] if isinstance(batch, (list, tuple, Tensor)) else batch


def grey_batch(model: nn.Module, dataset: Any, device: torch.device, images: int) -> Tensor:
    found = pipelines(dataset)
    preprocessor = getattr(model, 'data_preprocessor', None)
    size = getattr(preprocessor, 'size', None)
    size = size if isinstance(size, (tuple, list)) else picture_size(found[0]) or SIZE
    channels = network_channels(model, [3, 1])
    known = student_format(model, found, torch.zeros(1, channels, 1, 1) if channels else None)
    size = [-(-side // known.divisor) * known.divisor for side in size]
    pixels = GREY + NOISE * (torch.rand(images, channels or len(known.mean), *size, device=device) - 0.5)
    mean, std = (pixels.new_tensor(v).view(1, -1, 1, 1) for v in (known.mean, known.std))
    return (pixels - mean) / std


@contextmanager
def untouched_messages() -> Iterator[None]:
    """Leave what is known of the run in MMEngine's message hub as it was found."""
    information = MessageHub.get_current_instance().runtime_info
    before = dict(information)
    try:
        yield
    finally:
        information.clear()
        information.update(before)
