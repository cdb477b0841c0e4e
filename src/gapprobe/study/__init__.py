"""The study step by step: configuration, resumable steps, results."""
