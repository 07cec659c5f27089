"""A module for each `python -m scripts COMMAND`, and what they share."""
