"""Which part of a file is the model's: the names in the file are matched against the model's own.

Training scripts store a model under names that begin with where they keep it: ``module.`` (DataParallel, averaged
models), ``_orig_mod.`` (torch.compile), ``model.`` or ``net.`` (Lightning), ``student.`` and ``teacher.`` (mean
teachers), or the entry of a dict of several state dicts. None of these is known here by name: a beginning is taken off
where what follows are the names of the model.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from kd_plugins.errors import DistillError
from kd_plugins.teachers.checkpoints import Weights, cut
from kd_plugins.teachers.loading import is_named

#: torch.compile stores whatever it compiles, a model or a part of one, in an attribute of this name.
_COMPILED = '_orig_mod'

#: Brings foreign names (and layouts) to those of a model of a zoo; may change the mapping that it is given.
Convert = Callable[[nn.Module, dict[str, Tensor]], Mapping[str, Tensor]]


def match_names(
    model: nn.Module,
    weights: Weights,
    source: str,
    where: str = 'teacher.checkpoint',
    ignore: Sequence[str] = (),
    convert: Convert | None = None,
) -> Weights:
    """The weights of a file under the names of a model, as far as the names say.

    What does not fit nevertheless is left as it is, for `load_strictly` to judge.

    Args:
        model: The model.
        weights: What `find_weights` found.
        source: Path of the file, for the message.
        where: The option that it came from, for the message.
        ignore: Keys or module paths of the file that the user said are not the model's.
        convert: Tried where the names do not fit: what the model's zoo reads other people's weights with.

    Returns:
        The weights; what lies beside the part that fits is left out, with a note.

    Raises:
        DistillError: Two parts of the file fit equally well.
    """
    own = {k: v.shape for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    matched = _unwrapped(own, type(model).__name__, weights, source, where, ignore)
    if convert is not None and not own.keys() <= matched.state.keys():
        try:
            state = OrderedDict(convert(model, dict(weights.state)))
        except Exception:
            # Written for the weights that its zoo knows; these are others.
            return matched
        other = _unwrapped(own, type(model).__name__, weights._replace(state=state), source, where, ignore)
        if len(own.keys() & other.state.keys()) > len(own.keys() & matched.state.keys()):
            note = 'names of other code, converted as timm or torchvision convert them'
            return other._replace(notes=(*other.notes, note))
    return matched


def _unwrapped(
    own: Mapping[str, Sequence[int]], model: str, weights: Weights, source: str, where: str, ignore: Sequence[str]
) -> Weights:
    weights = _uncompiled(own, weights)
    fits = _beginnings(own, weights, ignore)
    if len(fits) > 1 and not ('' in fits and weights.chosen):
        parts = ', '.join(repr(p) if p else "'' (as they are)" for p in fits[:4])
        raise DistillError(
            f'{where} {source!r} holds {len(fits)} sets of weights that fit {model}, under names that begin with '
            f'{parts}; say which with {where}_prefix={max(fits)!r}.'
        )
    if fits == [''] or not fits:
        return weights
    if '' in fits:
        # The user chose the names as they are; the others are the sets that were not chosen.
        state = cut(weights.state, '')
        for key in [k for k in state if k.startswith(tuple(p for p in fits if p))]:
            del state[key]
        return weights._replace(state=state)
    prefix = fits[0]
    beside = [k for k in weights.state if not k.startswith(prefix)]
    note = f'names in the file begin with {prefix!r}'
    if beside:
        note += f'; {len(beside)} others are left out ({", ".join(beside[:2])}{", ..." if len(beside) > 2 else ""})'
    return weights._replace(state=cut(weights.state, prefix), notes=(*weights.notes, note))


def _uncompiled(own: Mapping[str, Sequence[int]], weights: Weights) -> Weights:
    def plain(name: str) -> str:
        return '.'.join(part for part in name.split('.') if part != _COMPILED)

    if any(_COMPILED in k.split('.') for k in own) or not any(_COMPILED in k for k in weights.state):
        return weights
    state = OrderedDict((plain(k), v) for k, v in weights.state.items())
    versions = getattr(weights.state, '_metadata', None)
    if versions is not None:
        # The compiled module comes after its wrapper, which has no version of interest.
        state._metadata = OrderedDict((plain(k), v) for k, v in versions.items())
    return weights._replace(state=state)


def _beginnings(own: Mapping[str, Sequence[int]], weights: Weights, ignore: Sequence[str]) -> list[str]:
    """What the names of the parts that fit the model best begin with; several fit equally, none not at all."""
    names: Counter[str] = Counter()
    shapes: Counter[str] = Counter()
    for key, value in weights.state.items():
        start = 0
        while True:
            shape = own.get(key[start:])
            if shape is not None:
                names[key[:start]] += 1
                shapes[key[:start]] += shape == value.shape
            start = key.find('.', start) + 1
            if not start:
                break
    # Single names agree by chance, e.g. `weight`; but what all names of a file begin with is a wrapper.
    scores = {
        # Parts of another width or another number of classes have the names, but not the shapes.
        prefix: (shapes[prefix], number)
        for prefix, number in names.items()
        if (2 * number >= len(own) or all(k.startswith(prefix) for k in weights.state))
        and not is_named(prefix.rstrip('.'), ignore)
    }
    return sorted(p for p, score in scores.items() if score == max(scores.values()))
