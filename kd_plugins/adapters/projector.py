"""From a feature to class logits, where architectures differ too much for their features to be compared."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import gelu

from kd_plugins.adapters._common import check_integers, count
from kd_plugins.adapters.base import Adapter
from kd_plugins.adapters.tokens import as_tokens
from kd_plugins.errors import DistillError


class LogitProjector(Adapter):
    """A small classifier on a feature of the student: its logits are compared with the teacher's.

    Hao et al., "One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge Distillation"
    (NeurIPS 2023, arXiv 2310.19444), section 3.2: in the space of logits a ViT and a CNN speak of the same things, in
    that of features they do not. For any loss on logits, with a feature as the student's tap and the logits as the
    teacher's; the paper's own is ``OFALoss``.

    Per position a layer norm, a linear layer and a GELU, then the mean over all positions (of tokens also those in
    front of the patches) and a linear layer. The paper's projectors are larger and depend on the architecture: strided
    separable convolutions for CNNs, patch merging and transformer blocks for ViTs. Here one form serves both; the
    hidden layer is there because a feature from the middle of a network cannot be read linearly.

    Args:
        in_features: Channels of the feature. Default: those found by `for_shapes`.
        classes: Logits to make. Default: as many as the teacher has, found by `for_shapes`.
        hidden: Width of the hidden layer. Default: ``in_features``.

    Raises:
        DistillError: A number is not a positive integer.
    """

    def __init__(self, in_features: int | None = None, classes: int | None = None, hidden: int | None = None) -> None:
        super().__init__()
        numbers = dict(in_features=in_features, classes=classes, hidden=hidden)
        check_integers('LogitProjector', 1, **{k: v for k, v in numbers.items() if v is not None})
        self._numbers = numbers
        self.built = False
        if in_features is not None and classes is not None:
            self.built = True
            hidden = in_features if hidden is None else hidden
            self.norm = nn.LayerNorm(in_features)
            self.hidden = nn.Linear(in_features, hidden)
            self.head = nn.Linear(hidden, classes)

    def for_shapes(self, student_shape: Sequence[int], teacher_shape: Sequence[int]) -> LogitProjector:
        """A new projector for these shapes; numbers that were given stay.

        Args:
            student_shape: ``(B, C, H, W)``, ``(B, N, C)`` or ``(B, C)`` of the feature.
            teacher_shape: ``(B, classes)`` of the teacher's logits.

        Raises:
            DistillError: One of the two has other dimensions.
        """
        if len(student_shape) not in (2, 3, 4):
            raise DistillError(f'LogitProjector takes maps, tokens or vectors, got {tuple(student_shape)}.')
        if len(teacher_shape) != 2:
            raise DistillError(
                f"LogitProjector needs the teacher's (B, classes) logits, got {tuple(teacher_shape)}; tap its 'logits'."
            )
        found = dict(in_features=student_shape[1 if len(student_shape) == 4 else -1], classes=teacher_shape[1])
        return LogitProjector(**{**self._numbers, **{k: v for k, v in found.items() if self._numbers[k] is None}})

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Classify.

        Args:
            student: ``(B, C, H, W)`` map, ``(B, N, C)`` tokens or ``(B, C)`` vectors.
            teacher: Not used.

        Returns:
            ``(B, classes)`` logits.

        Raises:
            DistillError: The numbers are not known yet, or the feature has other dimensions.
        """
        if not self.built:
            raise DistillError('LogitProjector is not built: give it in_features and classes, or call for_shapes.')
        features = student.unsqueeze(1) if student.dim() == 2 else as_tokens(student)
        # As in ConvAdapter: captured under autocast, perhaps adapted outside of it.
        features = gelu(self.hidden(self.norm(features.to(self.head.weight.dtype))))
        return self.head(features.mean(1))

    def describe(self, student_shape: Sequence[int], teacher_shape: Sequence[int]) -> str:
        """In words, e.g. ``'projector 256->256->10 logits (68.9k params)'``."""
        return (
            f'projector {self.hidden.in_features}->{self.hidden.out_features}->{self.head.out_features} logits '
            f'({count(self)} params)'
        )
