"""Lenses: what a decoder would say at each layer. They read a store and an unembedding, never a model's activations."""
