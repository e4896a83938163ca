"""`python -m experiments.cot_decoding_qwen`."""

from experiments.cot_decoding_qwen.run import main

if __name__ == "__main__":
    main()
