"""The raw material: 1,797 real 8 x 8 scans of handwritten digits, and their split."""

from __future__ import annotations

import numpy as np

from kd_plugins.errors import DistillError
from kd_plugins.extras import how_to_install

CLASSES = tuple('0123456789')
"""Class names in label order. Numerals, so that an image folder, which sorts by name, keeps the same order."""

VAL_FRACTION = 0.3


def load_scans() -> tuple[np.ndarray, np.ndarray]:
    """Load the scans that come inside scikit-learn.

    Returns:
        ``scans (1797, 8, 8)`` float32 ink in [0, 1] and ``labels (1797,)`` int64 digits 0..9.

    Raises:
        DistillError: scikit-learn is not installed.

    Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI repository (1998), test part.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DistillError(
            f'the digit scans come with scikit-learn, which cannot be imported ({error}); {how_to_install("demo")}.'
        ) from error
    digits = load_digits()
    return (digits.images / 16.0).astype(np.float32), digits.target.astype(np.int64)


def split_scans(labels: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Give every scan to exactly one split, class by class.

    Args:
        labels: ``(N,)`` digits.
        seed: Non-negative seed.

    Returns:
        Sorted scan indices of ``'train'`` and ``'val'``: disjoint, together all N, each class split 70 : 30.
    """
    rng = np.random.default_rng([seed, 0])
    parts: dict[str, list[np.ndarray]] = {'train': [], 'val': []}
    for digit in range(len(CLASSES)):
        indices = rng.permutation(np.flatnonzero(labels == digit))
        cut = round(len(indices) * VAL_FRACTION)
        parts['val'].append(indices[:cut])
        parts['train'].append(indices[cut:])
    return {split: np.sort(np.concatenate(chunks)) for split, chunks in parts.items()}
