"""Other people's data sets, turned once into the one form that a study reads; nothing downstream knows their own."""
