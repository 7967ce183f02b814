"""Where the trainable parts of a distillation live: in the student, but in none of its state dicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kd_plugins.errors import DistillError


class AdapterBank(nn.Module):
    """The trainable parts of a distillation: real sub-modules, but absent from every state dict.

    They sit in the student so that the optimizer, DDP and EMA see them, while the student's checkpoints keep exactly
    the keys of the plain model. Their state travels under a checkpoint key of its own (:meth:`export_state`).
    """

    def __init__(self) -> None:
        super().__init__()
        self._register_state_dict_hook(_drop_own_keys)
        self._register_load_state_dict_pre_hook(_keep_own_values, with_module=True)

    def export_state(self) -> dict[str, Tensor]:
        """Adapter weights on the CPU by name, for the checkpoint's own entry."""
        return {k: v.detach().cpu().clone() for k, v in _own_tensors(self, '').items()}

    def import_state(self, state: Mapping[str, Tensor], source: str) -> None:
        """Restore what :meth:`export_state` returned.

        Raises:
            DistillError: The state belongs to other adapters.
        """
        own = _own_tensors(self, '')
        wrong = sorted(set(own) ^ set(state)) + [k for k in own if k in state and own[k].shape != state[k].shape]
        if wrong:
            raise DistillError(
                f'The adapters saved in {source} are not those of this config ({", ".join(wrong[:3])}); resume with '
                'the terms the run was started with, or start anew from load_from.'
            )
        with torch.no_grad():
            for key, value in own.items():
                value.copy_(state[key])


def _own_tensors(bank: nn.Module, prefix: str) -> dict[str, Tensor]:
    persistent = {}
    for path, module in bank.named_modules():
        start = f'{prefix}{path}.' if path else prefix
        for key, value in module._parameters.items():
            if value is not None:
                persistent[start + key] = value
        for key, value in module._buffers.items():
            if value is not None and key not in module._non_persistent_buffers_set:
                persistent[start + key] = value
    return persistent


# Module-level functions, so that the EMA's deep copy of the bank carries hooks that act on the copy.
def _drop_own_keys(bank: nn.Module, state: dict[str, Tensor], prefix: str, local_metadata: Any) -> None:
    for key in _own_tensors(bank, prefix):
        state.pop(key, None)


def _keep_own_values(bank: nn.Module, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    # A load finds the bank's current values, so it is complete without them being in the file.
    for key, value in _own_tensors(bank, prefix).items():
        state.setdefault(key, value.detach())
