"""Packing: a user's captioned pictures into webdataset shards.

In the order of use: `pack` has the settings and the entry, `tables`, `folders` and `columnar`
read sources as `records`, `prepare` (with `encode`) makes members of a record in processes of
their own, `assembly` writes them in order through `shard_writer`, and `out_folder` keeps what a
run needs to go on after an interruption.
"""
