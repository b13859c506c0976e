"""Where arrays lie: mesh axes, what is cut along them, the order of rows, chips and their compiler options."""
