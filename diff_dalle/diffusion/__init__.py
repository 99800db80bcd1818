"""The noise process, its losses and its samplers. They see callables, never a network class."""
