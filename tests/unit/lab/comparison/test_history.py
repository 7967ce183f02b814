"""An empty history is no error."""

import math

from kd_plugins.lab.comparison.history import History


def test_nothing_logged():
    assert math.isnan(History().seconds_per_iteration())
    assert History().curve('loss') == ([], [])
