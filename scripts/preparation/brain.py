"""The network that finds the brain in a scan of a head, of any contrast."""

from scripts.network import SkipDenseSeg


def brain_network() -> SkipDenseSeg:
    """Return the network, with random weights: logits of background and brain, from one scan with voxels of 2 mm."""
    return SkipDenseSeg(
        in_channels=1,
        out_channels=2,
        init_features=16,
        growth_rate=8,
        block_config=(4, 4, 4),
        dropout_prob=0.0,
        grouped_upsampling=True,
    )
