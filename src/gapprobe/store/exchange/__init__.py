"""Other people's arrays and tables into a store, and a store into other people's formats."""
