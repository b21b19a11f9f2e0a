"""``python -m bayesmeta`` is the command ``bayesmeta``."""

from bayesmeta.cli import main

if __name__ == "__main__":
    main()
