"""Writes the outcomes of the results topic to the lake, and keeps the lake in order."""
