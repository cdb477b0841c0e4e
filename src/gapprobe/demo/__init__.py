"""Data only: two trained toy models, images of digits, true facts and the study configurations that use them."""

from pathlib import Path

FOLDER = Path(__file__).parent
