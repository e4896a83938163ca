"""`python -m experiments.quiet_star_composition`."""

from experiments.quiet_star_composition.run import main

if __name__ == "__main__":
    main()
