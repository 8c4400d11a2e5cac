"""`python -m secateur` is the command line."""

from secateur.tools.cli import main

if __name__ == "__main__":
    main()
