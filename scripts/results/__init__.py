"""What a run writes, per subject and for all subjects."""
