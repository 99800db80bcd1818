"""Data: from tar shards to batches, and from drawings to tar shards.

Reading, in the order of use: `shards` finds tar files, `shard_index` lists their samples (with
`tar_members`), `dataset` reads samples by number, `order` says which comes when, `caption_fields`
and `images` make text and pixels of bytes, `visits` makes batches, `loader` runs all of it in
`workers`.
"""
