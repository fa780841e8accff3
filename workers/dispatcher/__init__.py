"""The single writer of outcomes: admits jobs, forms batches, leases them to workers, records what became of them."""
