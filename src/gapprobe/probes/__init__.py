"""Probes over layers, the folds they are judged on and the controls they must beat. They read stores only."""
