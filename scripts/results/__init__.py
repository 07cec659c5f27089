"""What a run leaves behind for each subject and for all."""
