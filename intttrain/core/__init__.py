"""Configuration, errors, metrics and progress: what every other package may import."""
