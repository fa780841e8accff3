"""Everything that puts jobs in."""
