"""From conversations to stored hidden states: engines, shards, manifest, verification."""
