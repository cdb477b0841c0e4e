"""From a model and examples to a store: tracing, generation, batching, resuming."""
