"""Kinds of probes, one a file, found by themselves."""
