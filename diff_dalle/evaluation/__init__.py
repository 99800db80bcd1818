"""Measures: do pictures say what their captions say, and does an upsampler earn its place."""
