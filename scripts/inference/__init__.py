"""Inference: from the input of the network to its logits."""
