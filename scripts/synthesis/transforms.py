"""Random transforms of patches of training: a synthetic one instead, one contrast alone."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.transforms import RandomizableTransform
from monai.utils import convert_to_dst_type
from tqdm import tqdm

from scripts.errors import require_share
from scripts.synthesis.heads import draw_head, read_head_map
from scripts.synthesis.infants import draw_scan, draw_shape
from scripts.synthesis.label_maps import find_label_maps
from scripts.synthesis.structures import read_structure_map


class RandInfantPatchd(RandomizableTransform):
    """Replace `image` (2, X, Y, Z) and `label` (1, X, Y, Z) by a new synthetic patch of the same size.

    The patch is of a random label map, see `scripts.synthesis.infants`. All maps are read once, about 8 s and 50 MB
    each.

    Args:
        labels_dir: label maps with FreeSurfer's numbers, or of three tissues, see `read_structure_map`.
        names: label maps to use, the setting heads, without suffix; all by default.
        prob: share of patches that are replaced, the setting infant_share.

    Raises:
        InputError: `prob` isn't from 0 to 1, or as `find_label_maps` and `read_structure_map`.
    """

    def __init__(self, labels_dir: str, names: Sequence[str] | None = None, prob: float = 1.0) -> None:
        require_share(infant_share=prob)
        super().__init__(prob)
        paths = find_label_maps(labels_dir, names, option="heads")
        self._maps = [read_structure_map(path) for path in tqdm(paths, desc="label maps")]

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        self.randomize(None)
        if self._do_transform:
            rng = np.random.default_rng(self.R.randint(2**32, dtype=np.uint64))
            source = self._maps[rng.integers(len(self._maps))]
            scan = draw_scan(draw_shape(source, rng, result["label"].shape[1:]), rng)
            result["image"] = convert_to_dst_type(scan.normalized(), result["image"])[0]
            result["label"] = convert_to_dst_type(scan.label[None], result["label"])[0]
        return result


class RandHeadd(RandomizableTransform):
    """Make `image` (1, X, Y, Z), a part of a head of any contrast, and `label` (1, X, Y, Z), the mask of its brain.

    Each is of a random label map, see `scripts.synthesis.heads`. All maps are read once, about 5 s and 17 MB each.

    Args:
        labels_dir: label maps of whole heads with FreeSurfer's numbers.
        size: voxels of 2 mm along each axis.
        names: label maps to use, the setting heads, without suffix; all by default.

    Raises:
        InputError: as `find_label_maps` and `read_head_map`.
    """

    def __init__(self, labels_dir: str, size: Sequence[int], names: Sequence[str] | None = None) -> None:
        super().__init__()
        self.size = tuple(size)
        paths = find_label_maps(labels_dir, names, option="heads")
        self._maps = [read_head_map(path) for path in tqdm(paths, desc="label maps")]

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        rng = np.random.default_rng(self.R.randint(2**32, dtype=np.uint64))
        image, label = draw_head(self._maps[rng.integers(len(self._maps))], rng, self.size)
        return dict(data) | {"image": image, "label": label}


class RandDropContrastd(RandomizableTransform):
    """Set T1 or T2 of a normalized `image` (2, X, Y, Z) to 0 everywhere, as in a subject of one contrast.

    Args:
        prob: share of patches in which one of the two is dropped, each as often; the setting drop_share.

    Raises:
        InputError: `prob` isn't from 0 to 1.
    """

    def __init__(self, prob: float = 0.5) -> None:
        require_share(drop_share=prob)
        super().__init__(prob)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        self.randomize(None)
        dropped = self.R.randint(2)
        if self._do_transform:
            kept = torch.tensor([dropped != 0, dropped != 1])[:, None, None, None]
            result["image"] = result["image"] * kept
        return result
