"""`python -m dl7cli` is `dl7`."""

from dl7cli.cli import main

if __name__ == "__main__":
    main()
