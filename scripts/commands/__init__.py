"""A file for each `python -m scripts COMMAND`."""
