"""``python -m intttrain``: the same as the ``intttrain`` program."""

from intttrain.app.cli import main

if __name__ == "__main__":
    main()
