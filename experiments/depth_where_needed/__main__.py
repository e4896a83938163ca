"""`python -m experiments.depth_where_needed`."""

from experiments.depth_where_needed.run import main

if __name__ == "__main__":
    main()
