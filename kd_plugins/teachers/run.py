"""From the options of a distilled run, which are the same in every zoo, to its session."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from kd_plugins.distiller import Host, Session, Teacher, Window, build_terms, build_window
from kd_plugins.distiller.scoring import UNNAMED, Scorer, TeacherScore, check_score_teacher, score_teachers
from kd_plugins.distiller.stages import Stage, build_stages
from kd_plugins.distiller.summary import ASSUMED, classes_text
from kd_plugins.distiller.terms import Lookup, Resolver, loss_parameters, resolver_of
from kd_plugins.errors import DistillError, check_keys, nearest, shown
from kd_plugins.predictions import Classes, match_classes
from kd_plugins.recipes.options import apply_options, complete, load_recipes
from kd_plugins.teachers.pixels import PixelFormat
from kd_plugins.teachers.pseudo import PseudoLabels
from kd_plugins.teachers.sources import build_source, find_source

#: What a run is told, whatever the zoo.
KEYS: tuple[str, ...] = ('teacher', 'teachers', 'terms', 'recipe', 'options', 'start', 'stop', 'alpha')
KEYS += ('class_map', 'imports', 'pseudo_labels', 'score_teacher', 'stages')


@dataclass(frozen=True)
class RunOptions:
    """What is taught by whom, and when.

    Attributes:
        teachers: ``teacher`` mappings by name, see `kd_plugins.teachers.sources`; the only one is named ``''``.
        terms: See `kd_plugins.distiller.Term`.
        window: In which epochs (iterations in an iteration-based run) KD is on.
        alpha: Balance in [0, 1]: while KD is on, ``alpha`` times the KD losses and ``1 - alpha`` times the student's
            own. None: the student's own losses stay as they are, and the terms' weights say it all.
        class_map: The teacher's name for a class of the student, ``{student name: teacher name}``, where they differ.
        imports: Modules of the user's own losses, adapters, forms, schedules, weightings and kinds of teachers.
        pseudo_labels: Which detections of the teachers become labels; None: none.
        score_teacher: Validation images that the teachers are scored on before the first iteration, True for 32, False
            for none. None: as many as cost little.
        stages: Parts of the run, see `kd_plugins.distiller.stages.Stage`.
    """

    teachers: Mapping[str, Any]
    terms: Mapping[str, Any]
    window: Window = field(default_factory=Window)
    alpha: float | None = None
    class_map: Mapping[str, str] | None = None
    imports: Sequence[str] = ()
    pseudo_labels: PseudoLabels | None = None
    score_teacher: bool | int | None = None
    stages: Sequence[Stage] = ()

    @classmethod
    def read(cls, options: Any, task: str = '', where: str = 'distill', more: Lookup | None = None) -> RunOptions:
        """Read the options of a config.

        Args:
            options: Mapping with keys among `KEYS`; ``recipe`` names one of `kd_plugins.recipes`, or several in a list,
                whose terms are completed (or replaced, name by name) by ``terms``. ``options`` are applied to all of
                it last, see `kd_plugins.recipes.options`.
            task: What the student does, for recipes that differ between tasks.
            where: What the mapping is, for messages.
            more: Finds losses that are in no module of ``imports``.

        Raises:
            DistillError: A key is unknown or missing, or a value cannot be right.
        """
        if not isinstance(options, Mapping):
            raise DistillError(f'{where} must be dict(teacher=..., terms=...), got {options!r}.')
        check_keys(options, KEYS, where)
        options = {k: v for k, v in options.items() if v is not None}
        # First: whatever is looked up from here on may be one of these modules'.
        resolver_of(options.get('imports'))
        if options.get('recipe'):
            changed = options.get('options')
            given = {*options, *(changed if isinstance(changed, Mapping) else ())}
            recipe = load_recipes(options.pop('recipe'), task, f'{where}.recipe', given)
            terms = complete(recipe.pop('terms'), options.get('terms', {}))
            options = {**recipe, **options, 'terms': terms}
        if 'teacher' in options and 'teachers' in options:
            raise DistillError(f'{where} has both teacher and teachers; write all of them in teachers=dict(name=...).')
        if not ('teacher' in options or 'teachers' in options) or 'terms' not in options:
            missing = 'terms' if 'teacher' in options or 'teachers' in options else 'teacher'
            raise DistillError(f"{where} needs 'teacher' and 'terms'; {missing!r} is missing.")
        teachers = {'': options['teacher']} if 'teacher' in options else options['teachers']
        if (
            not isinstance(teachers, Mapping)
            or not teachers
            or not all(str(n).isidentifier() or not n for n in teachers)
        ):
            raise DistillError(f'{where}.teachers must be dict(name=dict(...), ...), got {teachers!r}.')
        if options.get('options'):
            options = _with_options(options, resolver_of(options.get('imports'), more), where)
            teachers = {'': options['teacher']} if set(teachers) == {''} else teachers
        return cls(
            teachers=teachers,
            terms=options['terms'],
            window=build_window(options.get('start'), options.get('stop')),
            alpha=check_alpha(options.get('alpha')),
            class_map=check_class_map(options.get('class_map')),
            imports=options.get('imports', ()),
            pseudo_labels=PseudoLabels.read(options.get('pseudo_labels')),
            score_teacher=check_score_teacher(options.get('score_teacher')),
            stages=build_stages(options.get('stages'), check_alpha),
        )

    def to_dict(self) -> dict[str, Any]:
        """The options as plain data, such that ``read`` of it is equal."""
        found: dict[str, Any] = dict(self.teachers)
        one = {'teacher': found['']} if set(found) == {''} else {'teachers': found}
        return {
            **one,
            'terms': self.terms,
            'start': self.window.start,
            'stop': self.window.stop,
            'alpha': self.alpha,
            'class_map': self.class_map,
            'imports': list(self.imports),
            'pseudo_labels': None if self.pseudo_labels is None else self.pseudo_labels.to_dict(),
            'score_teacher': self.score_teacher,
            'stages': [stage.to_dict() for stage in self.stages] or None,
        }


def _with_options(options: dict[str, Any], resolve: Resolver, where: str) -> dict[str, Any]:
    changes, place = options['options'], f'{where}.options'
    if not isinstance(changes, Mapping):
        raise DistillError(f'{place} must be a mapping such as dict(weight=3.0, alpha=0.7), got {changes!r}.')
    if not isinstance(options['terms'], Mapping):
        raise DistillError(f'{place} changes terms, which must be a dict; got {shown(options["terms"])}.')
    one = next(iter(options['teachers'].values())) if set(options.get('teachers', ())) == {''} else None
    body = {**options, 'teacher': options.get('teacher', one)}
    return apply_options(body, changes, loss_parameters(resolve), place)


def load_teachers(
    sources: Mapping[str, Any], student: nn.Module, host: Host, pixels: PixelFormat
) -> tuple[dict[str, Teacher], list[str]]:
    """Load the teachers of a run.

    Args:
        sources: ``teacher`` mappings by name.
        student: The plain student.
        host: The framework.
        pixels: What the student's batches look like.

    Returns:
        The teachers by name, and notes for the summary.

    Raises:
        DistillError: One is missing, misspelt or damaged.
    """
    teachers: dict[str, Teacher] = {}
    notes: list[str] = []
    for name, cfg in sources.items():
        try:
            teachers[name], more = build_source(find_source(cfg), pixels)
        except DistillError as error:
            raise DistillError(f'teacher {name!r}: {error}' if name else str(error)) from error
        teachers[name].begin(student, host)
        notes += more
    return teachers, notes


def open_session(
    student: nn.Module,
    teachers: Mapping[str, Teacher],
    options: RunOptions,
    host: Host,
    more: Lookup | None = None,
) -> Session:
    """The session of a run; classes are paired by :func:`pair_classes` afterwards.

    Args:
        student: The plain student.
        teachers: The loaded teachers.
        options: What the run is told.
        host: The framework.
        more: Finds losses and adapters that are in no module of ``imports``.

    Raises:
        DistillError: A term is misspelt, or names what does not exist.
    """
    resolve = resolver_of(options.imports, more)
    terms = build_terms(options.terms, resolve)
    return Session(
        student,
        teachers,
        terms,
        host,
        window=options.window,
        alpha=options.alpha,
        resolve=resolve,
        pseudo=options.pseudo_labels,
        stages=options.stages,
    )


def match_teachers(
    session: Session,
    names: Sequence[str] | None,
    options: RunOptions,
    count: int | None,
    taught: int | Sequence[int] | None = None,
) -> dict[str, str]:
    """Tell a session which of the student's classes each teacher knows, where they are compared.

    Args:
        session: The session, whose heads were checked.
        names: Names of the student's classes.
        options: What the run is told.
        count: Classes the student's head predicts.
        taught: See :func:`pair_classes`.

    Returns:
        For the summary, by name of the teacher: how the classes correspond.

    Raises:
        DistillError: See :func:`pair_classes`.
    """
    compared = {n for n, t in session.teachers.items() if session.by_class(n)}
    found = {
        name: pair_classes(
            names,
            teacher.classes,
            options.class_map,
            student_count=count,
            teacher_count=teacher.num_classes,
            taught=taught,
        )
        for name, teacher in session.teachers.items()
        if name in compared and teacher.own_classes
    }
    session.set_classes(found)
    return {n: classes_text(names, t.classes, found.get(n), n in compared) for n, t in session.teachers.items()}


def score_session(
    session: Session,
    scorer: Scorer | None,
    names: Sequence[str] | None,
    options: RunOptions,
    count: int | None,
    started: bool = False,
) -> tuple[dict[str, TeacherScore], list[str]]:
    """Score the teachers of a session that have something of their own to teach.

    Args:
        session: The checked session, whose classes are matched.
        scorer: The host's, None where the run has no validation.
        names: Names of the student's classes.
        options: What the run is told.
        count: Classes the student's head predicts.
        started: Whether the student is in the middle of its training, and no measure of its teacher.

    Returns:
        The scores by name of the teacher, and notes for the summary.
    """
    classes: dict[str, Classes] = {}
    notes = []
    for name, teacher in session.teachers.items():
        if not teacher.own_classes:
            # It is made from the student.
            continue
        if session.by_class(name):
            classes[name] = session.classes[name]
            continue
        try:
            classes[name] = pair_classes(
                names, teacher.classes, options.class_map, student_count=count, teacher_count=teacher.num_classes
            )
        except DistillError:
            notes.append('the teacher was not scored: it predicts other classes than the student')
    if not classes:
        return {}, notes
    scores, more = score_teachers(scorer, classes, names, student=not started)
    return scores, [*notes, *more]


def score_warnings(session: Session, scores: Mapping[str, TeacherScore], classes: Mapping[str, str]) -> list[str]:
    """What is to be warned of before the first iteration, each in a sentence.

    Args:
        session: The session.
        scores: Of its teachers, as far as they were scored.
        classes: How classes were matched, by teacher, see `match_teachers`.
    """
    found = []
    for name, teacher in session.teachers.items():
        assumed = classes[name] == ASSUMED and teacher.own_classes and teacher.num_classes != 1
        said = scores[name].warnings(assumed) if name in scores else [UNNAMED] if assumed else []
        found += [f'teacher {name!r}: {sentence}' if name else sentence for sentence in said]
    return found


def pair_classes(
    student: Sequence[str] | None,
    teacher: Sequence[str] | None,
    class_map: Mapping[str, str] | None = None,
    *,
    student_count: int | None = None,
    teacher_count: int | None = None,
    taught: int | Sequence[int] | None = None,
) -> Classes:
    """Which class of the student is which of the teacher, by name; None when the sets are equal.

    Args:
        student: Names of the student's classes.
        teacher: Names of the teacher's classes.
        class_map: ``{student name: teacher name}`` where the names differ.
        student_count: Classes the student's head predicts.
        teacher_count: Classes the teacher's head predicts.
        taught: The student's classes (or the only one) that this run trains; None: all.

    Raises:
        DistillError: The map names classes that do not exist, or no class is common to both.
    """
    mapped = student
    if class_map:
        for side, known, given in (('student', student, class_map), ('teacher', teacher, class_map.values())):
            for name in given:
                if name not in (known or ()):
                    raise DistillError(f'class_map: the {side} has no class {name!r}; {nearest(name, known or ())}')
        mapped = [class_map.get(n, n) for n in student or ()]
        twice = next((n for n in mapped if mapped.count(n) > 1), None)
        if twice is not None:
            both = [s for s, m in zip(student or (), mapped, strict=True) if m == twice]
            raise DistillError(
                f"class_map: {' and '.join(map(repr, both))} of the student would both be the teacher's {twice!r}; map "
                'one of them only, or give the other another name.'
            )
    try:
        found = match_classes(mapped, teacher, student_count=student_count, teacher_count=teacher_count)
    except DistillError as error:
        raise DistillError(
            f'{error} If they mean the same under other names, write class_map={{student name: teacher name}}, or '
            "classes=[...] with the names of the teacher's outputs."
        ) from error
    if taught is None:
        return found
    number = student_count if student_count is not None else len(student or ())
    pairs = zip(*found, strict=True) if found is not None else ((i, i) for i in range(number))
    chosen = {taught} if isinstance(taught, int) else set(taught)
    kept = [(ours, theirs) for ours, theirs in pairs if ours in chosen]
    if not kept:
        raise DistillError('The teacher knows none of the classes that classes=[...] of this run trains.')
    return [ours for ours, _ in kept], [theirs for _, theirs in kept]


def check_alpha(value: Any) -> float | None:
    """A balance in [0, 1], or None.

    Raises:
        DistillError: It is neither.
    """
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1):
        raise DistillError(
            f"alpha must be a number in [0, 1] (alpha x distillation + (1 - alpha) x the student's own loss), "
            f'got {value!r}.'
        )
    return value


def check_class_map(value: Any) -> Mapping[str, str] | None:
    """``{student name: teacher name}``, or None.

    Raises:
        DistillError: It is neither.
    """
    if value is not None and (
        not isinstance(value, Mapping) or not all(isinstance(k, str) and isinstance(v, str) for k, v in value.items())
    ):
        raise DistillError(f'class_map must be {{student name: teacher name}}, got {value!r}.')
    return value
