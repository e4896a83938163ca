"""`python -m mod_star` is the command `mod-star`."""

from mod_star.cli import main

if __name__ == "__main__":
    main()
