"""How a student's features are brought to the teacher's shape. Needs torch only.

An adapter is an ``nn.Module`` with ``forward(student, teacher) -> adapted student``: it is given the teacher's
features so that it can follow their grid, which changes from batch to batch in multi-scale training. One that also has
to know how large the images were says so with an attribute ``needs_image_size = True`` and is called
``forward(student, teacher, image_size=(H, W))``. All of ours inherit from `Adapter`, which has a default for what an
adapter may say of itself; one's own need not. Adapters with parameters (`ConvAdapter`, `LinearAdapter`) are trained
with the student and need the model form; the others have none. Adapters are thrown away after training. A term's
``adapter='auto'`` is `auto_adapter` on the shapes of a dry run::

    from kd_plugins.adapters import adapt, auto_adapter, describe_adapter

    adapter = auto_adapter(student.shape, teacher.shape)       # None for tokens and vectors of equal shapes
    print(describe_adapter(adapter, student.shape, teacher.shape))
    adapted = student if adapter is None else adapt(adapter, student, teacher)

Transformers return ``(B, N, C)`` tokens, or maps with the channels last. `as_map` brings either to ``(B, C, H, W)``
before that, from the size of the images::

    from kd_plugins.adapters import as_map

    student, teacher = as_map(student, (256, 512)), as_map(teacher, (256, 512))

and `attention_map` does the same with their attention. Where features of two architectures have too little in common,
`LogitProjector` makes class logits of the student's, for losses on logits. It does not know the sizes beforehand: an
adapter with ``for_shapes(student_shape, teacher_shape) -> adapter`` is replaced by what that returns in the dry run.
"""

from kd_plugins.adapters.attention import attention_map
from kd_plugins.adapters.auto import auto_adapter
from kd_plugins.adapters.base import Adapter as Adapter
from kd_plugins.adapters.base import adapt, describe_adapter, traits_of
from kd_plugins.adapters.chain import AdapterChain
from kd_plugins.adapters.channel_norm import ChannelNorm
from kd_plugins.adapters.conv import ConvAdapter
from kd_plugins.adapters.linear import LinearAdapter
from kd_plugins.adapters.projector import LogitProjector
from kd_plugins.adapters.resize import ResizeAdapter
from kd_plugins.adapters.tokens import MapToTokens, TokensToMap, as_map, as_tokens, find_grid

__all__ = [
    'AdapterChain',
    'ChannelNorm',
    'ConvAdapter',
    'LinearAdapter',
    'LogitProjector',
    'MapToTokens',
    'ResizeAdapter',
    'TokensToMap',
    'adapt',
    'as_map',
    'as_tokens',
    'attention_map',
    'auto_adapter',
    'describe_adapter',
    'find_grid',
    'traits_of',
]
