"""The recipe of the demo's two models: from MNIST images and a file of true facts to Hugging Face folders.

Nothing here is imported by the library; `python -m examples.digits.train --help` is the way in.
"""
