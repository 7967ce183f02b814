"""What scores of a teacher say about it, whatever framework measured them."""

import pytest
import torch

from kd_plugins.distiller.scoring import (
    IMAGES,
    Measured,
    best_of,
    box_confusion,
    images_wanted,
    label_confusion,
    permutation,
    score_teachers,
    spread,
)
from kd_plugins.errors import DistillError
from kd_plugins.teachers.run import RunOptions

NAMES = [f'c{i}' for i in range(5)]
RIGHT = torch.eye(5, dtype=torch.long) * 6


class Given:
    """A scorer that found what it is told."""

    images, total = 30, 100

    def __init__(self, teacher, student=None, before=lambda: None):
        self.found, self.before = {'': teacher, None: student or Measured({'acc': 0.2})}, before

    def measure(self, teachers, student):
        self.before()
        return {k: v for k, v in self.found.items() if student or k is not None}


def scored(confusion=RIGHT, value=0.9, start=0.2, classes=None, samples=30, greater=True):
    """The score of a teacher."""
    measured = Measured({'acc': value}, greater, confusion, samples)
    scores, notes = score_teachers(Given(measured, Measured({'acc': start})), {'': classes}, NAMES)
    assert not notes
    return scores['']


def test_a_good_teacher_gives_no_warning():
    score = scored()
    assert not score.warnings() and str(score) == 'acc 0.9 on 30 of 100 validation images; the student starts at 0.2'
    assert score.confirms_order and not score.warnings(assumed=True)


@pytest.mark.parametrize('turn', (1, 2, 4))
def test_permuted_classes_are_named(turn):
    (sentence,) = scored(RIGHT.roll(turn, 1), value=0.0).warnings(assumed=True)
    assert 'looks permuted' in sentence and f"'c0' for 'c{turn}'" in sentence and len(sentence) < 400


def test_two_rare_classes_that_are_exchanged_are_seen_beside_a_common_one():
    confusion = torch.tensor([[90, 0, 0], [0, 0, 6], [0, 7, 0]])
    assert permutation(confusion) == {1: 2, 2: 1}


@pytest.mark.parametrize('classes', (2, 5, 10, 100, 1000))
def test_guessing_is_no_permutation_and_is_called_chance(classes):
    generator = torch.Generator().manual_seed(0)
    said = []
    for _ in range(50):
        labels, taken = torch.randint(classes, (2, IMAGES), generator=generator)
        score = scored(label_confusion(labels, taken, classes), samples=IMAGES)
        said.append(score.warnings())
        assert not score.confirms_order
    assert not any('permuted' in s for found in said for s in found)
    assert sum(any('chance' in s for s in found) for found in said) >= 40


def test_one_class_for_everything_is_chance_and_no_permutation():
    confusion = torch.zeros(5, 5, dtype=torch.long)
    confusion[:, 3] = torch.tensor([2, 20, 5, 1, 2])
    (sentence,) = scored(confusion).warnings()
    assert 'chance' in sentence


def test_a_class_that_is_wrong_throughout_in_a_good_teacher_is_no_permutation():
    confusion = RIGHT.clone()
    confusion[0] = torch.tensor([0, 6, 0, 0, 0])
    assert not scored(confusion).warnings()


def test_a_single_class_is_neither():
    assert not scored(torch.tensor([[30]])).warnings()


def test_a_teacher_behind_the_student():
    (sentence,) = scored(value=0.3, start=0.5).warnings()
    assert 'not better than the student starts' in sentence
    assert 'not better' in scored(value=0.5, start=0.3, greater=False).warnings()[0]
    assert not scored(value=0.5, start=0.5).warnings(), 'a student that starts from its teacher'
    assert 'not better' in scored(value=0.0, start=0.0).warnings()[0]


def test_what_was_missed_counts_only_among_classes_that_the_teacher_knows():
    missed = torch.cat([torch.zeros(5, 5, dtype=torch.long), torch.tensor([[0], [0], [4], [4], [4]])], 1)
    assert 'none of the objects' in scored(missed, value=0.0).warnings()[0]
    score = scored(missed, value=0.4, classes=([0, 1], [1, 0]))
    assert not score.warnings() and list(score.names) == NAMES[:2]


def test_an_assumed_order_is_warned_of_until_predictions_confirm_it():
    assert 'assumed to be in the same order' in scored(None).warnings(assumed=True)[0]
    assert not scored(None).warnings()


def test_nothing_detected_is_measured_as_nothing():
    scores, _ = score_teachers(Given(Measured({}), Measured({'acc': 0.1})), {'': None}, NAMES)
    assert (scores[''].metric, scores[''].value, scores[''].student) == ('acc', 0.0, 0.1)


def test_what_fails_is_a_note_and_draws_no_number():
    def fail():
        torch.rand(3)
        raise RuntimeError('no such file')

    state = torch.get_rng_state()
    scores, notes = score_teachers(Given(Measured({'acc': 1.0}), before=fail), {'': None}, NAMES)
    assert not scores and notes == ['the teacher was not scored: RuntimeError: no such file']
    assert torch.equal(state, torch.get_rng_state())
    assert score_teachers(None, {'': None}, NAMES)[1] == ['the teacher was not scored: the run has no validation']


def test_images_are_few_in_short_runs_and_lie_all_over_the_set():
    assert [images_wanted(None, n) for n in (0, 159, 160, 400, 10**6)] == [0, 0, 8, 20, IMAGES]
    assert [images_wanted(option, 10) for option in (False, True, 64, 0)] == [0, IMAGES, 64, 0]
    assert spread(10, 4) == [0, 2, 5, 7] and spread(3, 8) == [0, 1, 2]


def test_boxes_are_counted_by_the_surest_that_overlaps():
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30], [50, 50, 60, 60]])
    found = torch.tensor([[0.0, 0, 10, 9], [1, 1, 10, 10], [20, 20, 30, 30]])
    counted = box_confusion(
        boxes, torch.tensor([0, 1, 1]), found, torch.tensor([0.3, 0.8, 0.9]), torch.tensor([0, 2, 1]), 3
    )
    expected = torch.zeros(3, 4, dtype=torch.long)
    expected[0, 2] = expected[1, 1] = expected[1, 3] = 1
    assert torch.equal(counted, expected)
    none = torch.zeros(0, 4)
    assert box_confusion(none, torch.zeros(0), none, torch.zeros(0), torch.zeros(0), 3).sum() == 0


def test_the_best_of_several_stands_at_the_end():
    assert best_of([scored(value=0.3), scored(value=0.6)]) == (0.6, 'on 30 of 100 validation images')
    assert best_of([]) == (None, '')


@pytest.mark.parametrize('value', (-1, 0.5, 'all', [3]))
def test_the_option_is_checked(value):
    with pytest.raises(DistillError, match='score_teacher must be'):
        RunOptions.read(dict(teacher={}, terms={}, score_teacher=value))
