"""What of a sample may be how large: the same for what packs samples and what reads them.

It imports no torch, as packing's processes do not.
"""

LARGEST_FILE = 2**28  # bytes

# Pillow refuses files that announce more than 179 Mpx; this bounds what is really decoded.
MAX_PIXELS = 2**26
