"""Runs batches: load and decode, compute, encode and store, overlapped; reports each item's outcome."""
