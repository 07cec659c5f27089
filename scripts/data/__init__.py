"""From a folder of subjects to the array that the network takes."""
