"""T1 and T2 made from label maps."""
