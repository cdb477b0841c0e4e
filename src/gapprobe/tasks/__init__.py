"""What is asked: entities, questions, images, the five settings, prompts and judging. No model is known here."""
