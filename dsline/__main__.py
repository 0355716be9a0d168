"""``python -m dsline``: the command line of `dsline.cli`."""

from dsline.cli import main

if __name__ == "__main__":
    main()
