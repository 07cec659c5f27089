"""Label maps, and T1 and T2 synthesized from them."""
