"""A draft's life: built, loaded, started from, exported."""
