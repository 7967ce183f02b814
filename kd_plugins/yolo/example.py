"""A batch as the run will feed it, for the check before the first iteration, without touching the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

#: Of a picture that is no real one: what Ultralytics pads with, and the range of the noise that keeps the maps from
#: being constant.
GREY, NOISE = 114 / 255, 20 / 255


def example_batch(trainer: Any, channels: int, images: int) -> tuple[Tensor, Mapping[str, Any] | None]:
    """The first pictures of the validation set, at the size of the training.

    Of the validation set, because getting an item of a training set changes it: its mosaics are made of the items that
    it gave before. Random generators are left to the caller.

    Args:
        trainer: One whose training is about to start.
        channels: That the student takes.
        images: How many, unless the run's own batches are smaller. They are of one size, so that each costs its share.

    Returns:
        ``(images, batch)``: ``(B, channels, imgsz, imgsz)`` as the trainer prepares them, and what the loss is given
        with them. Where there is no such item (on all processes but the first), grey noise of that size and None.
    """
    like = next(trainer.model.parameters())
    size = trainer.args.imgsz
    number = min(images, getattr(trainer.train_loader, 'batch_size', None) or max(int(trainer.args.batch), 1))
    batch = _real_batch(trainer, number)
    pictures = batch['img'] if batch is not None else None
    if pictures is None or pictures.dim() != 4 or pictures.shape[1] != channels:
        noise = torch.rand(number, channels, size, size, device=like.device, dtype=like.dtype)
        return GREY + NOISE * (noise - 0.5), None
    pictures = pictures.to(like)
    if pictures.shape[-2:] != (size, size):
        pictures = interpolate(pictures, size=(size, size), mode='bilinear', align_corners=False)
    return pictures, batch


def _real_batch(trainer: Any, number: int) -> dict[str, Any] | None:
    dataset = getattr(getattr(trainer, 'test_loader', None), 'dataset', None)
    if dataset is None:
        return None
    try:
        items = [dataset[i % len(dataset)] for i in range(number)]
        collate = trainer.test_loader.collate_fn or torch.utils.data.default_collate
        return trainer.preprocess_batch(collate(items))
    except Exception:
        # Whatever it is, the run meets it by itself, and says it in its own words.
        return None
