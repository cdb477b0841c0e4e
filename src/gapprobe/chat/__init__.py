"""Models that are asked and answer, and nothing more: behind a server. What happens inside them is not seen."""
