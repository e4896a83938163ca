"""`python -m experiments.quiet_star_length`."""

from experiments.quiet_star_length.run import main

if __name__ == "__main__":
    main()
