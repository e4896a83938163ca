"""`python -m experiments.quiet_star_smollm2`."""

from experiments.quiet_star_smollm2.run import main

if __name__ == "__main__":
    main()
