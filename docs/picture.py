"""Draw docs/picture.png, the picture of the README, from what ``medseg demo`` wrote.

medseg demo -o medseg-demo && python docs/picture.py medseg-demo docs/picture.png
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np

from medseg import io
from medseg.dataset import Dataset

COLOURS = ("#e69f00", "#56b4e9", "#d55e00")  # told apart by colour-blind readers too


def draw(demo: Path, target: Path) -> None:
    """Three planes of a held-out phantom: filled reference, and the prediction as lines."""
    mpl.use("Agg")
    dataset = Dataset.open(demo / "dataset")
    path = sorted((demo / "run" / "predictions" / "fold_0").glob("*.nii.gz"))[0]
    case = dataset.case(io.name_of(path))
    volume, prediction = io.read_volume(case.images), io.read_mask(path)
    reference = io.read_mask(case.label)
    turn = volume.geometry.to("RAS")
    spacing = volume.geometry.reoriented(turn).spacing
    image = turn.apply(volume.array[0])
    marked, predicted = turn.apply(reference.array), turn.apply(prediction.array)
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.2), facecolor="black", layout="constrained")
    for axis, (panel, name) in enumerate(zip(axes, ("sagittal", "coronal", "axial"), strict=True)):
        others = tuple(a for a in range(3) if a != axis)
        slice_index = int(np.argmax((marked > 0).sum(axis=others)))
        cut = [np.take(array, slice_index, axis=axis).T for array in (image, marked, predicted)]
        panel.imshow(cut[0], cmap="gray", origin="lower", aspect=spacing[others[1]] / spacing[others[0]])
        for (label, value), colour in zip(dataset.labels.values.items(), COLOURS, strict=True):
            panel.contourf(cut[1] == value, [0.5, 1.5], colors=[colour], alpha=0.35)
            if (cut[2] == value).any():
                panel.contour(cut[2] == value, [0.5], colors=[colour], linewidths=1.5)
            panel.plot([], [], color=colour, label=label)
        panel.set_title(name, color="white", fontsize=9)
        panel.axis("off")
    axes[2].legend(loc="lower right", fontsize=7, framealpha=0.6)
    figure.savefig(target, dpi=110, facecolor="black")


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
