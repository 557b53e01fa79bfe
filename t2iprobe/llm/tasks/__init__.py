"""Tasks for lm-evaluation-harness (`--include_path`): see suites.py."""
