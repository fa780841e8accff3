"""Runnable examples: recipes for the demo's models."""
