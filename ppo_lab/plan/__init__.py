"""What a run costs, before it runs and while it does: work, memory, seconds."""
