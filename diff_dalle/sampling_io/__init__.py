"""What sampling reads and writes: its flags, prompts, checkpoint paths and output files."""
