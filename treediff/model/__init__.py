"""The backbone: its shape and names, checkpoint files, forward passes, LoRA."""
