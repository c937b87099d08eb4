"""Training: the same plain model on one process or on the ranks of a Ray Train run."""
