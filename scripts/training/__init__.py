"""What a training adds to MONAI's trainer."""
