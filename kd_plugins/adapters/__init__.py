"""How a student's features are brought to the teacher's shape. Needs torch only.

An adapter is an ``nn.Module`` with ``forward(student, teacher) -> adapted student``: it is given the teacher's
features so that it can follow their grid, which changes from batch to batch in multi-scale training. Those with
parameters (`ConvAdapter`) are trained with the student and need the model form; `ResizeAdapter` has none. Adapters are
thrown away after training. A term's ``adapter='auto'`` is `auto_adapter` on the shapes of a dry run::

    from kd_plugins.adapters import auto_adapter, describe_adapter

    adapter = auto_adapter(student.shape, teacher.shape)       # None when the shapes are equal
    print(describe_adapter(adapter, student.shape, teacher.shape))
    adapted = student if adapter is None else adapter(student, teacher)
"""

from kd_plugins.adapters.auto import auto_adapter, describe_adapter
from kd_plugins.adapters.conv import ConvAdapter
from kd_plugins.adapters.resize import ResizeAdapter

__all__ = ['ConvAdapter', 'ResizeAdapter', 'auto_adapter', 'describe_adapter']
