"""`python -m scripts brain_masks`: how well the brain is found in heads that the network didn't train on."""

from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import binary_dilation, label
from tqdm import tqdm

from scripts.errors import InputError, require_whole_numbers
from scripts.files import whole_files
from scripts.preparation.brain import find_brain
from scripts.results.tables import markdown_table, write_csv
from scripts.synthesis.heads import CONTRASTS, draw_whole_head, read_head_map
from scripts.synthesis.label_maps import find_label_maps

# voxels of 1 mm around the true brain that don't count as something else in the mask
RIM = 4


def brain_masks(
    heads_dir: str,
    output_dir: str = "eval/brain-masks",
    heads: str | list[str] | None = None,
    draws: int = 5,
    seed: int = 0,
) -> None:
    """Find the brain in synthetic heads of each contrast, and compare the mask with the true one.

    Prints the Dice of the mask in percent, median and worst, and the largest piece in it that isn't brain, in ml.
    Writes that to `brain_masks.md`, and the figures of each head to `brain_masks.csv`.

    Args:
        heads_dir: label maps of whole heads with FreeSurfer's numbers, that the network didn't train on.
        output_dir: the folder to write to.
        heads: label maps to use, without suffix; all by default.
        draws: heads of each map and contrast, with voxels of 1 mm.
        seed: selects the heads.

    Raises:
        InputError: a number is out of range, or as `find_label_maps` and `read_head_map`.
    """
    require_whole_numbers(1, draws=draws)
    require_whole_numbers(0, seed=seed)
    rows = []
    maps = [read_head_map(path) for path in find_label_maps(heads_dir, heads, option="heads")]
    trials = [(head, contrast, draw) for head in maps for contrast in CONTRASTS for draw in range(draws)]
    for head, contrast, draw in tqdm(trials, desc="heads"):
        rng = np.random.default_rng([seed, draw, *contrast.encode(), *head.name.encode()])
        image, mask = (volume[0].numpy() for volume in draw_whole_head(head, rng, contrast))
        rows.append({"head": head.name, "contrast": contrast, "draw": draw} | _compared(image, mask > 0))
    write_csv(Path(output_dir) / "brain_masks.csv", rows)
    table = markdown_table([_summary(contrast, rows) for contrast in CONTRASTS])
    with whole_files(output_dir) as temporary:
        (temporary / "brain_masks.md").write_text(table + "\n")
    print(f"brain masks:\n{table}\nin {output_dir}: brain_masks.md, brain_masks.csv")


def _compared(image: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    """Dice of the mask and the largest piece of something else in ml; 0 and nothing if the scan is refused."""
    try:
        found = find_brain(image, np.eye(4), "")
    except InputError:
        return {"dice": 0.0, "other_ml": 0.0}
    mask = image > 0 if found is None else found.mask
    pieces, _ = label(mask & ~binary_dilation(truth, iterations=RIM))
    other = np.bincount(pieces[pieces > 0], minlength=2).max() / 1000
    return {"dice": 2 * np.count_nonzero(mask & truth) / (mask.sum() + truth.sum()), "other_ml": other}


def _summary(contrast: str, rows: list[dict[str, Any]]) -> dict[str, str]:
    group = [row for row in rows if row["contrast"] == contrast]
    scores = [100 * row["dice"] for row in group]
    return {
        "contrast": contrast,
        "heads": str(len(group)),
        "median": f"{np.median(scores):.1f}",
        "worst": f"{min(scores):.1f}",
        "refused": str(sum(score == 0 for score in scores)),
        "largest other piece in ml": f"{max(row['other_ml'] for row in group):.1f}",
    }
