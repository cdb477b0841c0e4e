"""Vision-language models: families as data, loading, one traced batch, and the check that a trace is right."""
