"""From stored or captured samples to the batches one rank trains on."""
