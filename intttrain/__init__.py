"""In-Place Test-Time Training: pretraining language models that keep learning while they read. See README.md."""
