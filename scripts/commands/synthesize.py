"""`python -m scripts synthesize`: subjects with T1, T2 and label, made from tissue label maps of real brains."""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import nibabel as nib
import numpy as np
from tqdm import tqdm

from scripts.errors import InputError, require_whole_numbers
from scripts.files import already_written, whole_files
from scripts.results.tables import markdown_table
from scripts.synthesis.contrast import APPEARANCES, histogram_overlap, six_month_subject
from scripts.synthesis.infants import infant_subject
from scripts.synthesis.label_maps import find_label_maps, label_map_name, read_label_map, require_different_names
from scripts.synthesis.structures import read_structure_map
from scripts.tissues import Tissue

# the contrast that is drawn from structures, shape and all
INFANT = "infant"


def synthesize(
    labels_dir: str,
    output_dir: str,
    contrast: str = "nominal",
    draws: int = 1,
    seed: int = 0,
    names: str | Sequence[str] | None = None,
) -> None:
    """Write subjects with T1, T2 and label from label maps: 6-month contrast on the shape of each brain.

    A subject depends only on the seed, its name and its draw. It has the name of its label map, with `-2` and so on for
    further draws. Existing files are kept. The command prints the histogram overlaps of new subjects.

    Args:
        labels_dir: label maps of skull-stripped brains (0 background, 1 CSF, 2 GM, 3 WM, or iSeg's values), with voxels
            of about 1 mm and brains of about the size at 6 months. For 'infant', of brains or whole heads of any age,
            with FreeSurfer's numbers or these.
        output_dir: the folder to write to.
        contrast: 'nominal', 'varied' or 'patchwork', see `scripts.synthesis.contrast`, which keep the shape; or
            'infant', see `scripts.synthesis.infants`, which draws the shape as well.
        draws: number of subjects per label map.
        seed: selects the images.
        names: label maps to use, without suffix; all by default.

    Raises:
        InputError: a setting is out of range; as `find_label_maps`, `read_label_map` and `read_structure_map`; or a
            file with one of the names exists and isn't the same subject.
    """
    require_whole_numbers(1, draws=draws)
    require_whole_numbers(0, seed=seed)
    if contrast not in (*APPEARANCES, INFANT):
        raise InputError(f"--contrast {contrast}: must be {', '.join((*APPEARANCES, INFANT))}")
    wanted = [(path, draw) for path in find_label_maps(labels_dir, names) for draw in range(draws)]
    subjects = [label_map_name(path) + (f"-{draw + 1}" if draw else "") for path, draw in wanted]
    require_different_names([path for path, _ in wanted], subjects)
    rows = []
    read = lru_cache(maxsize=1)(read_structure_map if contrast == INFANT else read_label_map)
    for (path, draw), subject in tqdm(list(zip(wanted, subjects, strict=True)), desc="synthetic subjects"):
        files = {kind: Path(output_dir) / f"subject-{subject}-{kind}.nii.gz" for kind in ("T1", "T2", "label")}
        brain = read(path)
        arrays = (brain.nearest, brain.outer) if contrast == INFANT else (brain.label,)
        content = hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()[:12]
        description = f"synthetic {contrast} seed {seed} draw {draw + 1} of label map {content}"
        if already_written(files.values(), description):
            continue
        rng = np.random.default_rng([seed, draw, *brain.name.encode()])
        if contrast == INFANT:
            volumes, affine = infant_subject(brain, rng), np.eye(4)
        else:
            volumes = six_month_subject(brain.label, APPEARANCES[contrast](brain.label, rng), rng)
            volumes, affine = volumes | {"label": brain.label}, brain.affine
        with whole_files(output_dir) as temporary:
            for kind, values in volumes.items():
                image = nib.Nifti1Image(values, affine)
                image.header.set_xyzt_units("mm")
                image.header["descrip"] = description.encode()
                nib.save(image, temporary / files[kind].name)
        rows.append({"subject": subject} | _overlaps(volumes))
    if rows:
        print(markdown_table(rows))
    print(f"synthetic subjects: {len(wanted)} in {output_dir}, {len(rows)} of them new")


def _overlaps(volumes: dict[str, np.ndarray]) -> dict[str, float]:
    """Histogram overlaps of each pair of tissues in T1 and T2."""
    label = volumes["label"]
    return {
        f"{kind} {first.name}/{second.name}": histogram_overlap(values[label == first], values[label == second])
        for kind, values in volumes.items()
        if kind != "label"
        for first, second in ((Tissue.GM, Tissue.WM), (Tissue.CSF, Tissue.GM), (Tissue.CSF, Tissue.WM))
    }
