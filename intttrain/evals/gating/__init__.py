"""Which chunks are worth writing: gate rules beside controls and oracles."""
