"""The command line and the training loop; nothing imports this package."""
