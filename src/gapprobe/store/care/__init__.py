"""Looking after stores: what is wrong with one, and what is done about it."""
