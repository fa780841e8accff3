"""The words of headrace: jobs, payloads, models, batches, results, errors, topics. Pure: no I/O."""
