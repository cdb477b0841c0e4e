"""Capture: a model run over examples, its answers and residual streams written to a store that can be resumed."""
