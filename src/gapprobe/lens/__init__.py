"""What each layer would say: the logit lens."""
