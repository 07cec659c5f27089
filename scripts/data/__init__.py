"""Data: from a folder of subjects to the input of the network."""
