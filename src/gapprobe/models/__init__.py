"""Vision-language models behind one interface: families as data, loading, checks."""
