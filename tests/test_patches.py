"""Prepared cases that are found again only when sound, and batches that are functions of seed and iteration."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
import pytest
import torch
from dicoms import write_series
from numpy.typing import NDArray

from medseg import io, patches
from medseg.dataset import Case, Dataset
from medseg.errors import DatasetError, InputError
from medseg.patches import Batch, PreparedCase, batches, draw_batch, draw_patch, prepare_case, prepare_cases
from medseg.plan import Configuration, NetworkPlan, Normalisation, Plan, TrainingPlan
from medseg.records import TEMPORARY_PREFIX
from medseg.volume import Labels, Mask

LABELS = Labels(values={"organ": 1, "lesion": 5}, ignore=9)
Level = Literal["none", "light", "full"]


def configuration(
    patch: tuple[int, ...] = (4, 6, 6),
    *,
    spacing: tuple[float | None, float, float] = (1, 1, 1),
    augmentation: Level = "none",
    batch: int = 2,
    foreground: float = 0.5,
) -> Configuration:
    dims = len(patch)
    return Configuration(
        spatial_dims=2 if dims == 2 else 3,
        spacing_mm=spacing,
        median_shape=(8, 8, 8),
        patch_size=patch,
        batch_size=batch,
        batch_dice=False,
        mirror_axes=(0,) if augmentation != "none" else (),
        network=NetworkPlan(features=(2, 2), kernel_sizes=((3,) * dims,) * 2, strides=((1,) * dims, (1,) * dims)),
        training=TrainingPlan(augmentation=augmentation, foreground=foreground),
        estimated_memory_mb=1,
    )


def plan_of(setup: Configuration, scheme: Literal["zscore", "none"] = "zscore") -> Plan:
    return Plan(
        dataset="test",
        fingerprint_digest="",
        device="cpu",
        memory_budget_mb=1,
        axes=(2, 1, 0),
        channels=("MR",),
        normalisation=(Normalisation(scheme=scheme),),
        labels=LABELS,
        configurations={"3d_fullres": setup},
    )


def write_case(folder: Path, name: str, image: NDArray[Any], mask: NDArray[Any] | None) -> Case:
    paths = [folder / f"{name}.nii.gz", folder / f"{name}_mask.nii.gz"]
    nib.save(nib.Nifti1Image(image.astype(np.float32), np.eye(4)), paths[0])  # type: ignore[no-untyped-call]
    if mask is None:
        return Case(name, (paths[0],), None)
    nib.save(nib.Nifti1Image(mask.astype(np.uint8), np.eye(4)), paths[1])  # type: ignore[no-untyped-call]
    return Case(name, (paths[0],), paths[1])


def image_of(shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).uniform(1, 2, shape).astype(np.float32)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    """A case of 12 x 10 x 8 voxels: a large organ, a lesion of one voxel, some voxels to ignore."""
    mask = np.zeros((12, 10, 8), dtype=np.uint8)
    mask[:, :, 3:] = 1
    mask[1, 8, 0] = 5
    mask[:, 0, 0] = 9
    return write_case(tmp_path, "case", image_of(mask.shape, 0), mask)


@pytest.fixture
def two_cases(case: Case, tmp_path: Path) -> list[PreparedCase]:
    empty = write_case(tmp_path, "empty", image_of((5, 7, 3), 1), np.zeros((5, 7, 3)))
    return [prepared(each, tmp_path / "cache") for each in (case, empty)]


def prepared(case: Case, folder: Path, setup: Configuration | None = None, **more: Any) -> PreparedCase:
    folder.mkdir(exist_ok=True)
    return prepare_case(case, plan_of(setup or configuration(), **more), "3d_fullres", folder)


def equal(first: Batch, second: Batch) -> bool:
    return torch.equal(first.images, second.images) and torch.equal(first.labels, second.labels)


# The cache


def test_what_is_stored(case: Case, tmp_path: Path) -> None:
    ready = prepared(case, tmp_path / "cache")
    assert ready.id == ready.record.case == "case"
    assert ready.image.shape == (1, 8, 10, 12)
    assert ready.image.dtype == np.float16
    assert ready.indices.dtype == np.uint8
    assert set(np.unique(ready.indices)) == {0, 1, 2, 3}  # 3 stands for the voxels to ignore
    assert sorted(ready.coordinates) == [1, 2]  # which are no class to draw
    assert ready.coordinates[2].tolist() == [[0, 8, 1]]
    assert len(ready.coordinates[1]) == 12 * 10 * 5
    assert isinstance(ready.image, np.memmap)


def test_a_case_of_dicom_is_prepared_as_that_of_nifti(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(1, 99, (12, 10, 8)).astype(np.int16)
    write_series(tmp_path / "series", image, modality="MR")
    volume = io.read_volume(tmp_path / "series")
    mask = np.zeros(image.shape, np.uint8)
    mask[3:5, 2, 4], mask[6, 7, 5] = 1, 5  # in two slices: no other is stored in a segmentation
    labels = Labels(values={"organ": 1, "lesion": 5})
    marked = Mask(mask, volume.geometry, labels, header=volume.header)
    io.write_mask(marked, tmp_path / "mask.dcm", allow_uncoded=True)
    io.write_mask(marked, tmp_path / "mask.nii.gz")
    nib.save(nib.Nifti1Image(image, volume.geometry.affine), tmp_path / "image.nii.gz")  # type: ignore[no-untyped-call]
    one, other = (
        prepared(Case("case", (tmp_path / source,), tmp_path / label), tmp_path / f"cache_{source}")
        for source, label in (("series", "mask.dcm"), ("image.nii.gz", "mask.nii.gz"))
    )
    np.testing.assert_array_equal(one.image, other.image)
    np.testing.assert_array_equal(one.indices, other.indices)
    assert np.bincount(one.indices.ravel()).tolist() == [12 * 10 * 8 - 3, 2, 1]


def test_a_class_has_a_limited_number_of_places(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patches, "MAX_COORDINATES", 20)
    places = prepared(case, tmp_path / "cache").coordinates[1]
    assert places.shape == (20, 3)
    assert len({tuple(p) for p in places.tolist()}) == 20
    assert len(set(places[:, 0])) > 2  # from all over, not the first ones
    assert (prepared(case, tmp_path / "other").coordinates[1] == places).all()


def test_a_case_without_any_class_can_be_stored(two_cases: list[PreparedCase]) -> None:
    assert two_cases[1].coordinates == {}
    assert two_cases[1].image.shape == (1, 3, 7, 5)


def stamps(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_a_sound_case_is_kept(case: Case, tmp_path: Path) -> None:
    first = prepared(case, tmp_path / "cache")
    before = stamps(tmp_path / "cache")
    assert len(before) == 4
    again = prepared(case, tmp_path / "cache")
    assert stamps(tmp_path / "cache") == before
    assert (again.stem, again.record) == (first.stem, first.record)


@pytest.mark.parametrize("part", ["image", "indices", "coordinates"])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_a_harmed_array_is_made_again(case: Case, tmp_path: Path, part: str, harm: str) -> None:
    first = prepared(case, tmp_path / "cache")
    path = first.stem.with_name(f"{first.stem.name}.{part}.npy")
    good = path.read_bytes()
    if harm == "remove":
        path.unlink()
    else:
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]) if harm == "flip" else good[:-1])
    assert prepared(case, tmp_path / "cache").record == first.record
    assert path.read_bytes() == good


@pytest.mark.parametrize("text", ["", '{"schema_version": 1, "case": "ca', "{}", '{"schema_version": 1, "files": {}}'])
def test_a_harmed_record_is_made_again(case: Case, tmp_path: Path, text: str) -> None:
    first = prepared(case, tmp_path / "cache")
    path = first.stem.with_name(f"{first.stem.name}.json")
    good = path.read_bytes()
    path.write_text(text)
    assert prepared(case, tmp_path / "cache").record == first.record
    assert path.read_bytes() == good


@pytest.mark.parametrize("arrays", [0, 1, 2, 3])
def test_a_kill_before_the_record_leaves_nothing_that_counts(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arrays: int
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    real, calls = patches.digest_file, itertools.count()

    def counted(path: Path) -> str:
        if path.suffix == ".npy" and next(calls) == arrays:
            raise KeyboardInterrupt
        return real(path)

    with monkeypatch.context() as context:
        context.setattr(patches, "digest_file", counted)
        context.setattr(patches.PreparedRecord, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            prepared(case, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.json"))
    assert not list((tmp_path / "cache").glob(f"{TEMPORARY_PREFIX}*"))
    assert prepared(case, tmp_path / "cache").image.shape == (1, 8, 10, 12)


def test_another_input_or_plan_has_another_key(case: Case, tmp_path: Path) -> None:
    stems = {prepared(case, tmp_path / "cache").stem}
    stems.add(prepared(case, tmp_path / "cache", configuration(spacing=(2, 1, 1))).stem)
    stems.add(prepared(case, tmp_path / "cache", scheme="none").stem)
    write_case(tmp_path, "case", image_of((12, 10, 8), 5), np.zeros((12, 10, 8)))
    stems.add(prepared(case, tmp_path / "cache").stem)
    assert len(stems) == 4
    # what does not change the arrays does not change the key
    assert prepared(case, tmp_path / "cache", configuration((8, 8, 8), batch=5)).stem in stems


@pytest.mark.parametrize(
    ("scale", "kind"),
    [
        (1.0, np.float16),
        (30_000.0, np.float16),
        (1e5, np.float32),  # beyond the largest half
        (1e-6, np.float32),  # where halves are too coarse
        (0.0, np.float16),
    ],
)
def test_half_precision_only_where_it_holds(tmp_path: Path, scale: float, kind: type) -> None:
    image = image_of((4, 4, 4), 0) * np.float32(scale)
    ready = prepared(write_case(tmp_path, "case", image, np.zeros((4, 4, 4))), tmp_path / "cache", scheme="none")
    assert ready.image.dtype == kind
    np.testing.assert_allclose(ready.image[0], image.transpose(2, 1, 0), rtol=1e-3)


def test_every_case_that_cannot_be_prepared_is_listed(case: Case, tmp_path: Path) -> None:
    bare = write_case(tmp_path, "bare", image_of((4, 4, 4), 0), None)
    other = write_case(tmp_path, "other", image_of((4, 4, 4), 0), np.full((4, 4, 4), 3))
    dataset = Dataset("test", tmp_path, ("MR",), LABELS, (bare, case, other))
    with pytest.raises(DatasetError, match=r"(?s)bare: .*no label file.*\n.*other: .*\[3\] have no name") as caught:
        prepare_cases(dataset, plan_of(configuration()), "3d_fullres", tmp_path / "cache")
    assert "case:" not in str(caught.value).replace("bare", "")
    with pytest.raises(InputError, match="no label file"):
        prepared(bare, tmp_path / "cache")


def test_progress_is_told(case: Case, tmp_path: Path) -> None:
    told: list[tuple[str, float]] = []
    dataset = Dataset("test", tmp_path, ("MR",), LABELS, (case, case))
    plan = plan_of(configuration())
    done = prepare_cases(dataset, plan, "3d_fullres", tmp_path / "new" / "cache", lambda w, f, _: told.append((w, f)))
    assert [each.id for each in done] == ["case", "case"]
    assert told == [("preparing for 3d_fullres", 0.5), ("preparing for 3d_fullres", 1.0)]


def test_what_was_prepared_from_other_data_goes(case: Case, tmp_path: Path) -> None:
    dataset = Dataset("test", tmp_path, ("MR",), LABELS, (case,))
    folder = tmp_path / "cache"
    prepare_cases(dataset, plan_of(configuration()), "3d_fullres", folder)
    old = {path.name for path in folder.iterdir()}
    prepare_cases(dataset, plan_of(configuration(), "none"), "3d_fullres", folder)
    new = {path.name for path in folder.iterdir()}
    assert len(old) == len(new) == 4  # a record and three arrays
    assert not old & new


# Patches


def drawn(case: PreparedCase, setup: Configuration, count: int, *, foreground: bool) -> Sequence[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [draw_patch(case, setup, rng, foreground=foreground) for _ in range(count)]


def found_at(case: PreparedCase, patch: dict[str, Any]) -> list[tuple[int, ...]]:
    """Where in the case the patch lies (its image values are all different)."""
    first = float(patch["image"].flatten()[0])
    return [tuple(int(n) for n in place) for place in np.argwhere(np.asarray(case.image[0], dtype=np.float32) == first)]


def test_patches_are_cut_from_the_case_everywhere(two_cases: list[PreparedCase]) -> None:
    case, setup = two_cases[0], configuration((4, 6, 6))
    corners = set()
    for patch in drawn(case, setup, 60, foreground=False):
        assert patch["image"].dtype == torch.float32
        matches = []
        for d, h, w in found_at(case, patch):
            cut = (slice(d, d + 4), slice(h, h + 6), slice(w, w + 6))
            if np.array_equal(case.image[0][cut], patch["image"][0]):
                np.testing.assert_array_equal(case.indices[cut], patch["labels"][0])
                matches.append((d, h, w))
        assert len(matches) == 1
        corners.add(matches[0])
    assert {c[0] for c in corners} == set(range(5))
    assert {c[2] for c in corners} == set(range(7))


def test_foreground_is_drawn_from_all_classes_alike(two_cases: list[PreparedCase]) -> None:
    """The lesion is one voxel of 600, in a corner: half of the forced patches hold it, of the others fewer."""
    case, setup = two_cases[0], configuration((2, 2, 2))
    forced = drawn(case, setup, 100, foreground=True)
    assert all((patch["labels"] == 1).any() or (patch["labels"] == 2).any() for patch in forced)
    assert 35 < sum((patch["labels"] == 2).any() for patch in forced) < 65
    assert sum((patch["labels"] == 2).any() for patch in drawn(case, setup, 100, foreground=False)) < 10


def test_a_drawn_voxel_lies_in_the_middle_of_its_patch(tmp_path: Path) -> None:
    mask = np.zeros((11, 11, 11))
    mask[5, 4, 6] = 1
    case = prepared(write_case(tmp_path, "case", image_of(mask.shape, 0), mask), tmp_path / "cache")
    (patch,) = drawn(case, configuration((5, 5, 5)), 1, foreground=True)
    assert np.argwhere(patch["labels"][0].numpy()).tolist() == [[2, 2, 2]]


def test_a_case_without_class_gives_patches_all_the_same(two_cases: list[PreparedCase]) -> None:
    (patch,) = drawn(two_cases[1], configuration((2, 2, 2)), 1, foreground=True)
    assert not patch["labels"].any()


def test_a_patch_larger_than_the_case_has_zeros_around_it(two_cases: list[PreparedCase]) -> None:
    case = two_cases[1]  # 3 x 7 x 5
    (patch,) = drawn(case, configuration((6, 7, 8)), 1, foreground=True)
    expected = np.zeros((6, 7, 8), dtype=np.float32)
    expected[2:5, :, 2:7] = case.image[0]  # room of -3 begins at -2
    np.testing.assert_array_equal(patch["image"][0], expected)


def test_a_margin_is_read_around_a_patch_that_will_be_turned(two_cases: list[PreparedCase]) -> None:
    case = two_cases[0]  # 8 x 10 x 12
    (patch,) = drawn(case, configuration((8, 10, 12), augmentation="light"), 1, foreground=False)
    assert patch["image"].shape == (1, 10, 12, 16)
    np.testing.assert_array_equal(patch["image"][0, 1:-1, 1:-1, 2:-2], case.image[0].astype(np.float32))
    assert not patch["image"][0, 0].any()


def test_slices_for_a_2d_network(two_cases: list[PreparedCase]) -> None:
    case, setup = two_cases[0], configuration((10, 12), spacing=(None, 1, 1))
    seen = set()
    for patch in drawn(case, setup, 60, foreground=False):
        assert patch["image"].shape == (1, 10, 12)
        assert patch["labels"].shape == (1, 10, 12)
        (index,) = [n for n in range(8) if np.array_equal(case.image[0, n], patch["image"][0])]
        np.testing.assert_array_equal(case.indices[index], patch["labels"][0])
        seen.add(index)
    assert seen == set(range(8))
    assert all((p["labels"] == 1).any() or (p["labels"] == 2).any() for p in drawn(case, setup, 30, foreground=True))


# Batches


@pytest.mark.parametrize("patch", [(4, 6, 6), (6, 6)])
@pytest.mark.parametrize("augmentation", ["none", "light", "full"])
def test_a_batch_is_a_function_of_seed_and_iteration(
    two_cases: list[PreparedCase], augmentation: Level, patch: tuple[int, ...]
) -> None:
    setup, cases = configuration(patch, augmentation=augmentation), two_cases[:1]
    seven = draw_batch(cases, setup, 0, 7)
    assert seven.images.shape == (2, 1, *patch)
    assert seven.labels.shape == (2, 1, *patch)
    assert (seven.images.dtype, seven.labels.dtype) == (torch.float32, torch.uint8)
    assert type(seven.images) is torch.Tensor
    draw_batch(cases, setup, 3, 4)
    assert equal(seven, draw_batch(cases, setup, 0, 7))
    assert not equal(seven, draw_batch(cases, setup, 0, 8))
    assert not equal(seven, draw_batch(cases, setup, 1, 7))


@pytest.mark.parametrize("workers", [0, 2])
def test_what_the_loss_wants_is_made_of_the_labels(two_cases: list[PreparedCase], workers: int) -> None:
    setup = configuration()
    plain = itertools.islice(batches(two_cases, setup, 5, 0, workers=0), 4)
    source = batches(two_cases, setup, 5, 0, workers, lambda labels: torch.cat([labels, 2 * labels], dim=1))
    for alone, batch in zip(plain, source, strict=False):
        assert torch.equal(batch.images, alone.images)
        assert torch.equal(batch.labels, torch.cat([alone.labels, 2 * alone.labels], dim=1))
    source.close()


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_draws_the_same(two_cases: list[PreparedCase], workers: int) -> None:
    setup = configuration(augmentation="full")
    alone = list(itertools.islice(batches(two_cases, setup, 5, 0, workers=0), 12))
    assert all(equal(batch, draw_batch(two_cases, setup, 5, n)) for n, batch in enumerate(alone))
    ahead = batches(two_cases, setup, 5, 0, workers=workers)
    assert all(equal(next(ahead), batch) for batch in alone)
    ahead.close()  # type: ignore[attr-defined]
    later = batches(two_cases, setup, 5, 8, workers=workers)
    assert all(equal(next(later), batch) for batch in alone[8:])
    later.close()  # type: ignore[attr-defined]


def test_a_fault_of_a_worker_reaches_the_trainer(two_cases: list[PreparedCase]) -> None:
    two_cases[0].stem.with_name(f"{two_cases[0].stem.name}.image.npy").unlink()
    fresh = [PreparedCase(two_cases[0].stem, two_cases[0].record)]
    with pytest.raises(FileNotFoundError):
        next(batches(fresh, configuration(), 0, 0, workers=2))


@pytest.mark.parametrize(
    ("size", "foreground", "forced"),
    [(2, 0.33, 1), (4, 0.33, 1), (5, 0.33, 2), (12, 0.33, 4), (2, 0.0, 0), (3, 1.0, 3)],
)
def test_how_many_patches_are_forced(
    two_cases: list[PreparedCase], monkeypatch: pytest.MonkeyPatch, size: int, foreground: float, forced: int
) -> None:
    """As in nnU-Net, the last of a batch: all from round(size * (1 - 0.33)) on."""
    asked = []
    real = patches.draw_patch

    def noted(*args: Any, foreground: bool) -> Any:
        asked.append(foreground)
        return real(*args, foreground=foreground)

    monkeypatch.setattr(patches, "draw_patch", noted)
    draw_batch(two_cases, configuration(batch=size, foreground=foreground), 0, 0)
    assert asked == [False] * (size - forced) + [True] * forced
