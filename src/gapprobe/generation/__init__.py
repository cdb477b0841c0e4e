"""Questions written by a language model from encyclopaedia pages, and the filters that they pass."""
