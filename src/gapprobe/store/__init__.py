"""The activation store: `store.writer.StoreWriter` writes it, `store.reader.open_store` reads it."""
