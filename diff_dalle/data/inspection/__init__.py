"""What a user should know of shards before a run is paid for.

Reading, in the order of use: `run` takes the flags, `look` says what one sample is (in worker
processes) with the help of `picture`, `tally` counts, `advice` and `table` put the counts into
words, `sheet` shows some pictures. `show_order` prints which keys a run will read.
"""
