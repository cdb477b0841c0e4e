"""Likeness of residual streams: of rows that belong together (`cosine`), and of whole layers (`cka`)."""

from gapprobe.similarity.cka import CkaResult as CkaResult
from gapprobe.similarity.cka import cka as cka
from gapprobe.similarity.cosines import cosine as cosine
from gapprobe.similarity.result import CosineResult as CosineResult
