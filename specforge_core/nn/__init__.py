"""Layers and fused losses that methods share; the core itself never imports them."""
