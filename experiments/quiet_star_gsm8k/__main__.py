"""`python -m experiments.quiet_star_gsm8k`."""

from experiments.quiet_star_gsm8k.run import main

if __name__ == "__main__":
    main()
