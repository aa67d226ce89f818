"""What a target is: info, tokenizer, weights, layers; and the engine that runs it here."""
