"""The verbs of the console command `diff-dalle`; each is also a script of its own."""
