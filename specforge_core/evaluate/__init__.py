"""Lossless speculative decoding with a draft: the loop, its counts, and the report of a run."""
