"""From files of conversations to tokenized prompts, and from captures to batches."""
