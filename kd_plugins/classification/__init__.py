"""Classification in MMEngine's Runner: classifiers, data sets, metrics."""
