"""Timings, each against the physical limit or the peer of its operation. Not part of the installed package."""
