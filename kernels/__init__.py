"""Tensors in, tensors out: the operations that gapprobe is built on. Nothing here knows of gapprobe."""
