"""Prompts, generation, measures, judges."""
