"""Data: from tar shards to batches, and from drawings to tar shards."""
