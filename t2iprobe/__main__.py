"""``python -m t2iprobe``: the same as the command."""

from t2iprobe.cli import main

if __name__ == "__main__":
    main()
