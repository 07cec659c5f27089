"""Python of the infant brain MRI SkipDenseSeg bundle that MONAI itself doesn't have."""
