"""What a raw scan was made into before it was segmented, written on request."""

from typing import Any

import numpy as np
import SimpleITK as sitk

from scripts.files import whole_files
from scripts.preparation.registration import TO_LPS
from scripts.results.label_images import write_label, write_map
from scripts.results.paths import result_path
from scripts.results.sidecars import write_sidecar
from scripts.results.writers import BackgroundWriter


class PreparedSaver(BackgroundWriter):
    """Handler that writes the brain mask of each subject and, if T2 was registered, T2 on T1's grid and the transform.

    The files are `subject-<id>-brain-mask.nii.gz`, `subject-<id>-T2-registered.nii.gz` and
    `subject-<id>-T2-to-T1.txt`, a transform of ITK that moves a T2 to its T1 when it is applied to the image.
    """

    what = "brain masks, registered T2 and transforms"

    def write(self, item: dict[str, Any]) -> None:
        t1, t2 = item["t1"], item.get("t2")
        source = t1.meta["filename_or_obj"]
        path = result_path(self.output_dir, item, "brain-mask", ".nii.gz")
        write_label(path, (t1[0] > 0).numpy().astype(np.uint8), source)
        write_sidecar(path, item, "brain-mask")
        if t2 is None or not t2.meta.get("registered"):
            return
        path = result_path(self.output_dir, item, "T2-registered", ".nii.gz")
        write_map(path, t2[0].numpy(), source)
        write_sidecar(path, item, "T2-registered")
        matrix = TO_LPS @ np.asarray(t2.meta["to_t2"]) @ TO_LPS
        transform = sitk.AffineTransform(matrix[:3, :3].ravel().tolist(), matrix[:3, 3].tolist())
        path = result_path(self.output_dir, item, "T2-to-T1", ".txt")
        with whole_files(path.parent) as temporary:
            sitk.WriteTransform(transform, str(temporary / path.name))
