"""From the network's array to its logits."""
