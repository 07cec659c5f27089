"""`python -m scripts synthesize`: subjects with T1, T2 and label, made from tissue label maps of real brains."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from tqdm import tqdm

from scripts.errors import InputError, require_whole_numbers
from scripts.files import made_already, whole_files
from scripts.results.tables import markdown_table
from scripts.synthesis.contrast import APPEARANCES, histogram_overlap, six_month_subject
from scripts.synthesis.label_maps import _name, find_label_maps, read_label_map, require_different_names
from scripts.tissues import Tissue


def synthesize(
    labels_dir: str,
    output_dir: str,
    contrast: str = "nominal",
    draws: int = 1,
    seed: int = 0,
    names: str | Sequence[str] | None = None,
) -> None:
    """Write a subject, T1, T2 and label, for each label map: 6-month contrast on the shape of that brain.

    A subject depends on the seed, its own name and draw only, and is called as the label map, with `-2` and so on added
    to further draws. Files that are there already are kept. The overlaps of histograms that came out are printed.

    Args:
        labels_dir: label maps of skull-stripped brains (0 background, 1 CSF, 2 GM, 3 WM, or as iSeg has them) of about
            1 mm and the size of a 6-month-old's brain.
        output_dir: the folder to write to.
        contrast: 'nominal', 'varied' or 'patchwork', see `scripts.synthesis.contrast`.
        draws: subjects that are made of each label map.
        seed: for other images.
        names: of the label maps to take, without suffix; all of them if not given.

    Raises:
        InputError: a setting can't be, as `find_label_maps` and `read_label_map`, or a file of that name is there that
            isn't the same subject.
    """
    require_whole_numbers(1, draws=draws)
    require_whole_numbers(0, seed=seed)
    if contrast not in APPEARANCES:
        raise InputError(f"--contrast {contrast}: must be {', '.join(APPEARANCES)}")
    wanted = [(path, draw) for path in find_label_maps(labels_dir, names) for draw in range(draws)]
    subjects = [_name(path) + (f"-{draw + 1}" if draw else "") for path, draw in wanted]
    require_different_names([path for path, _ in wanted], subjects)
    rows = []
    for (path, draw), subject in tqdm(list(zip(wanted, subjects, strict=True)), desc="synthetic subjects"):
        brain = read_label_map(path)
        files = {kind: Path(output_dir) / f"subject-{subject}-{kind}.nii.gz" for kind in ("T1", "T2", "label")}
        content = hashlib.sha256(brain.label.tobytes()).hexdigest()[:12]
        description = f"synthetic {contrast} seed {seed} draw {draw + 1} of label map {content}"
        if made_already(files.values(), description):
            continue
        rng = np.random.default_rng([seed, draw, *brain.name.encode()])
        volumes = six_month_subject(brain.label, APPEARANCES[contrast](brain.label, rng), rng)
        with whole_files(output_dir) as temporary:
            for kind, values in (volumes | {"label": brain.label}).items():
                image = nib.Nifti1Image(values, brain.affine)
                image.header.set_xyzt_units("mm")
                image.header["descrip"] = description.encode()
                nib.save(image, temporary / files[kind].name)
        rows.append({"subject": subject} | _overlaps(volumes, brain.label))
    if rows:
        print(markdown_table(rows))
    print(f"synthetic subjects: {len(wanted)} in {output_dir}, {len(rows)} of them new")


def _overlaps(volumes: dict[str, np.ndarray], label: np.ndarray) -> dict[str, float]:
    """Overlaps of the histograms of two tissues each in T1 and T2."""
    return {
        f"{kind} {first.name}/{second.name}": histogram_overlap(values[label == first], values[label == second])
        for kind, values in volumes.items()
        for first, second in ((Tissue.GM, Tissue.WM), (Tissue.CSF, Tissue.GM), (Tissue.CSF, Tissue.WM))
    }
