"""Preparation on many machines: each encodes its share of a manifest's audio by itself, and one joins them."""
