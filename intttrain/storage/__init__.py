"""Files and folders that appear whole or not at all, writers that die, and trying again."""
