"""Every error that gapprobe raises on purpose, and nothing else.

Each message names the input, says what is wrong with it, and what to do. Catch `GapprobeError` to catch them all.
"""


class GapprobeError(Exception):
    """Base of all errors raised on purpose by gapprobe."""


class ConfigError(GapprobeError):
    """A study configuration, question file or prompt file that cannot be used as written."""


class DataError(GapprobeError):
    """An image, question or label that cannot be read or does not make sense."""


class ModelError(GapprobeError):
    """A model folder, processor or architecture that gapprobe cannot trace."""


class StoreError(GapprobeError):
    """An activation store that is damaged, of another format version, or made by another model."""


class OutputError(GapprobeError):
    """An output folder that belongs to another study, cannot be written, or has no room left."""
