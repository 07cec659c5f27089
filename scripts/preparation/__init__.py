"""What raw scans need before they are segmented: the brain found, T2 registered to T1."""
