"""What a run writes and says beside its checkpoints, and the folder that belongs to one start of it at a time."""
