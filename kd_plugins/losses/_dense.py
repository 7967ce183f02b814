"""What the losses on whole detection heads ask of their predictions."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class Dense(Protocol):
    """The part of ``kd_plugins.predictions.DensePredictions`` that is asked for here, which see for the meaning.

    Losses know nothing of where predictions come from: anything that has these will do.
    """

    @property
    def cls(self) -> Tensor: ...

    @property
    def activation(self) -> str: ...

    @property
    def obj(self) -> Tensor | None: ...

    @property
    def obj_coding(self) -> str: ...

    @property
    def ltrb(self) -> Tensor | None: ...

    @property
    def dist(self) -> Tensor | None: ...

    @property
    def box(self) -> Tensor | None: ...

    @property
    def box_coding(self) -> str | None: ...

    def class_logits(self) -> Tensor: ...

    def binary_logits(self) -> Tensor: ...

    def confidence(self) -> Tensor: ...

    def float(self) -> Dense: ...

    def replace(self, **changes: Any) -> Dense: ...
