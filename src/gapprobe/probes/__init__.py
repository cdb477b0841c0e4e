"""Probes over layers: splits, controls, sweeps."""
