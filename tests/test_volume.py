"""Volume, Mask and Labels: names, integers and millilitres."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError
from scipy.spatial.transform import Rotation

from medseg.errors import GeometryMismatch, InputError
from medseg.geometry import Box, Geometry
from medseg.terminology import Code, Coding, colour_of
from medseg.volume import Labels, Mask

ORIENTATIONS = ("RAS", "LPS", "LAS", "RPI", "PSR", "SLA", "AIL", "IPR")
GRID = Geometry((2, 2, 1), np.diag([2.0, 2.0, 2.5, 1.0]))  # a voxel is 10 mm3


def test_names_follow_the_integers() -> None:
    labels = Labels(values={"kidney": 7, "liver": 2}, regions={"organs": (2, 7)}, ignore=255)
    assert labels.names == ("liver", "kidney")
    assert labels.count == 3
    assert labels.ignore_index == 3
    assert Labels(values={"liver": 2}).ignore_index is None


LIVER = Coding(type=Code(value="10200004", meaning="Liver"))


def test_codings_and_colours_are_of_labels() -> None:
    Labels(values={"liver": 2}, codings={"liver": LIVER}, colours={"liver": (0, 128, 255)})
    for wrong in (
        {"codings": {"lever": LIVER}},
        {"colours": {"lever": (1, 2, 3)}},
        {"colours": {"liver": (0, 0, 256)}},
        {"colours": {"liver": (-1, 0, 0)}},
        {"colours": {"liver": (0, 0)}},
    ):
        with pytest.raises(ValidationError):
            Labels.model_validate({"values": {"liver": 2}, **wrong})


def test_labels_without_codings_are_kept_as_they_were_before_there_were_any() -> None:
    old = {"values": {"liver": 2}, "regions": {}, "ignore": None}
    assert Labels(values={"liver": 2}).model_dump(mode="json") == old
    assert Labels.model_validate(old) == Labels(values={"liver": 2})
    coded = Labels(values={"liver": 2}, codings={"liver": LIVER}, colours={"liver": (1, 2, 3)})
    assert Labels.model_validate(coded.model_dump(mode="json")) == coded
    assert coded.model_dump(exclude={"codings", "colours"}) == old


def test_what_is_not_given_comes_from_the_name_and_the_place() -> None:
    labels = Labels(values={"organ": 9, "spleen": 4}, codings={"organ": LIVER}, colours={"spleen": (0, 0, 0)})
    assert labels.coding("organ") == LIVER
    assert labels.coding("spleen") == Coding(type=Code(value="78961009", meaning="Spleen"))
    assert Labels(values={"label_1": 1}).coding("label_1") is None
    anterior = Labels(values={"anterior": 1}).coding("anterior", "Hippocampus")
    assert anterior is not None
    assert anterior.type.meaning == "Hippocampus"
    assert labels.colour("spleen") == (0, 0, 0)
    assert labels.colour("organ") == colour_of(1)  # the second by their integers


def test_integers_become_indices_and_come_back() -> None:
    labels = Labels(values={"kidney": 700, "liver": 2}, ignore=-1)
    array = np.array([[0, 700], [2, -1]])
    indices = labels.to_indices(array)
    assert indices.tolist() == [[0, 2], [1, 3]]
    assert indices.dtype == np.uint8
    assert labels.to_values(indices).tolist() == array.tolist()
    assert labels.to_values(indices).dtype == np.int32


@pytest.mark.parametrize(("largest", "kind"), [(255, np.uint8), (256, np.uint16), (65536, np.int32)])
def test_values_take_the_smallest_fitting_type(largest: int, kind: type) -> None:
    assert Labels(values={"a": largest}).to_values(np.array([0, 1])).dtype == kind


integers = st.integers(-(2**31) + 1, 2**31 - 1).filter(bool)


@given(st.lists(integers, min_size=1, max_size=30, unique=True), st.data())
def test_any_integers_make_the_round_trip(values: list[int], data: st.DataObject) -> None:
    ignore = data.draw(st.none() | integers.filter(lambda n: n not in values))
    labels = Labels(values={f"class {v}": v for v in values}, ignore=ignore)
    allowed = [0, *values] + ([] if ignore is None else [ignore])
    array = np.array(data.draw(st.lists(st.sampled_from(allowed), max_size=50)), dtype=np.int64)
    indices = labels.to_indices(array)
    assert indices.max(initial=0) < labels.count + (ignore is not None)
    np.testing.assert_array_equal(labels.to_values(indices), array)


def test_an_integer_without_a_name_is_refused_and_named() -> None:
    with pytest.raises(InputError, match=r"case 7: label values \[3, 9\]"):
        Labels(values={"a": 1}).to_indices(np.array([0, 1, 9, 3]), "case 7")
    assert Labels(values={"a": 1}, ignore=9).unknown(np.array([0, 1, 9, 3])) == [3]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"values": {}}, "at least one label"),
        ({"values": {"a": 0}}, "0 is background"),
        ({"values": {"a": 1}, "ignore": 0}, "0 is background"),
        ({"values": {"a": 1, "b": 1}}, "an integer of its own"),
        ({"values": {"a": 1}, "ignore": 1}, "an integer of its own"),
        ({"values": {"a": 1}, "regions": {"r": (1, 2)}}, r"\[2\] that no label has"),
        ({"values": {str(n): n for n in range(1, 256)}}, "at most 254"),
        ({"values": {"a": 2**31}}, "32 bits"),
        ({"values": {"a": 1.5}}, "integer"),
    ],
)
def test_contradictory_labels_are_refused(body: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Labels.model_validate(body)


def test_volumes_in_millilitres() -> None:
    mask = Mask(np.array([[[1], [1]], [[4], [0]]]), GRID, Labels(values={"a": 1, "b": 4, "c": 5}))
    assert mask.volumes_ml() == pytest.approx({"a": 0.02, "b": 0.01, "c": 0.0})


def test_a_mask_without_labels_has_no_volumes() -> None:
    with pytest.raises(ValueError, match="without labels"):
        Mask(np.zeros((2, 2, 1), np.uint8), GRID).volumes_ml()


def named(own: dict[str, int] | None, values: list[int], labels: Labels) -> list[int]:
    mask = Mask(np.array(values, np.uint8).reshape(-1, 1, 1), Geometry((len(values), 1, 1), np.eye(4)))
    found = replace(mask, labels=Labels(values=own) if own else None).named(labels)
    assert found.labels == labels
    return [int(value) for value in found.array.ravel()]


def test_names_decide_and_values_stand_in_for_none_of_them() -> None:
    labels = Labels(values={"liver": 1, "tumor": 2, "spleen": 300}, ignore=9)
    assert named(None, [0, 2, 1, 9], labels) == [0, 2, 1, 9]
    assert named({"tumor": 1, "Liver": 2}, [0, 1, 2], labels) == [0, 2, 1]
    assert named({"liver": 1, "tumor": 2, "SPLEEN": 3}, [0, 1, 3], labels) == [0, 1, 300]
    assert named({"liver": 1, "heart": 7}, [0, 1], labels) == [0, 1]  # no voxel of a heart
    assert named({"liver": 1}, [0, 1, 2, 9], labels) == [0, 1, 2, 9]  # names and values agree
    for own, values, fault in (
        ({"spleen": 1, "heart": 2}, [1, 2], r"unknown names \(values \[2\]\) \(expected liver, tumor, spleen\)"),
        ({"heart": 1}, [1], r"unknown names \(values \[1\]\)"),  # which is the liver's value
        ({"liver": 2}, [1, 2], r"does not name its label values \[1\]"),  # the liver's value, but the liver is 2
        ({"spleen": 3}, [3, 9], r"does not name its label values \[9\]"),
        ({"liver": 1}, [1, 5], r"label values \[5\] have no name"),
        (None, [5], r"label values \[5\] have no name .*--labels"),
    ):
        with pytest.raises(InputError, match=f"^mask: .*{fault}"):
            named(own, values, labels)


def test_capitals_alone_tell_no_labels_apart_unless_both_are_spelled_so() -> None:
    both = Labels(values={"Liver": 4, "liver": 5})
    assert named({"Liver": 1, "liver": 2}, [1, 2], both) == [4, 5]
    assert named({"liver": 1}, [1], both) == [5]
    one = Labels(values={"liver": 1})
    assert named({"Liver": 1, "liver": 2}, [1, 1], one) == [1, 1]
    for own, values, labels in (({"LIVER": 1}, [1], both), ({"Liver": 1, "liver": 2}, [1, 2], one)):
        with pytest.raises(InputError, match="names are the same words"):
            named(own, values, labels)


@given(st.permutations(range(1, 6)), st.integers(0, 99))
def test_names_find_their_values_whatever_these_are(values: list[int], seed: int) -> None:
    names = ["a", "b", "c", "d", "e"]
    own, other = (
        Labels(values=dict(zip(names, values, strict=True))),
        Labels(values={name: 100 * n for n, name in enumerate(names, start=1)}),
    )
    indices = np.random.default_rng(seed).integers(0, 6, (3, 4, 5)).astype(np.uint8)
    grid = Geometry((3, 4, 5), np.eye(4))
    drawn = np.choose(indices, [0, *values]).astype(np.uint8)
    found = Mask(drawn, grid, own).named(other)
    np.testing.assert_array_equal(found.array, indices.astype(int) * 100)
    np.testing.assert_array_equal(replace(found, labels=other).named(own).array, drawn)


def test_codings_and_colours_are_the_masks_where_none_are_given() -> None:
    own = Labels(
        values={"Liver": 1, "heart": 2}, codings={"Liver": LIVER}, colours={"Liver": (1, 2, 3), "heart": (0, 0, 9)}
    )
    mask = Mask(np.ones((2, 2, 1), np.uint8), GRID, own)
    given_values = Labels(values={"liver": 5, "tumor": 6}, colours={"tumor": (7, 7, 7)})
    assert mask.named(given_values).labels == given_values.model_copy(
        update={"codings": {"liver": LIVER}, "colours": {"liver": (1, 2, 3), "tumor": (7, 7, 7)}}
    )
    coloured = Labels(values={"liver": 1}, colours={"liver": (0, 0, 0)})
    assert mask.named(coloured).labels == coloured.model_copy(update={"codings": {"liver": LIVER}})


def test_labels_can_be_left_out() -> None:
    array = np.array([[[1], [2]], [[5], [0]]])
    mask = Mask(array, GRID, Labels(values={"a": 1, "b": 2}))
    assert mask.without(["b"]).array.ravel().tolist() == [1, 0, 5, 0]
    assert array.ravel().tolist() == [1, 2, 5, 0]
    assert mask.without([]) is mask


def test_a_mask_is_cropped_and_padded_where_nothing_is_lost() -> None:
    geometry = Geometry((4, 3, 2), np.diag([2.0, 3.0, 4.0, 1.0]))
    array = np.zeros((4, 3, 2), dtype=np.uint8)
    array[1, 1, 1] = 5
    mask = Mask(array, geometry)
    smaller = mask.placed(geometry.cropped(Box((1, 0, 1), (3, 2, 2))))
    assert smaller.array.shape == (2, 2, 1)
    assert np.argwhere(smaller.array).tolist() == [[0, 1, 0]]
    larger = mask.placed(geometry.cropped(Box((-1, -2, 0), (5, 3, 6))))
    assert larger.array.shape == (6, 5, 6)
    assert np.argwhere(larger.array).tolist() == [[2, 3, 1]]
    with pytest.raises(GeometryMismatch, match="1 labelled voxels of the mask lie outside"):
        mask.placed(geometry.cropped(Box((2, 0, 0), (4, 3, 2))))
    with pytest.raises(GeometryMismatch, match="1 labelled voxels of the mask lie outside"):
        mask.placed(geometry.cropped(Box((20, 0, 0), (24, 3, 2))))


@pytest.mark.parametrize(
    "affine",
    [np.diag([2.0, 3.0, 4.5, 1.0]), np.diag([2.0, 3.0, 8.0, 1.0]), np.diag([1.0, 3.0, 4.0, 1.0])],
    ids=["other distance", "twice the distance", "half the distance"],
)
def test_other_lattices_are_refused(affine: NDArray[np.float64]) -> None:
    mask = Mask(np.ones((4, 3, 6), dtype=np.uint8), Geometry((4, 3, 6), np.diag([2.0, 3.0, 4.0, 1.0])))
    with pytest.raises(GeometryMismatch, match="do not lie on those of the image"):
        mask.placed(Geometry((4, 3, 6), affine))


@given(orientation=st.sampled_from(ORIENTATIONS), back=st.sampled_from(ORIENTATIONS), seed=st.integers(0, 99))
def test_a_turned_mask_comes_back(orientation: str, back: str, seed: int) -> None:
    array = np.random.default_rng(seed).integers(0, 4, (3, 4, 5)).astype(np.uint8)
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", [20, -35, 15], degrees=True).as_matrix() * [0.7, 1.1, 3.0]
    affine[:3, 3] = [-40.0, 25.5, 103.0]
    geometry = Geometry((3, 4, 5), affine)
    first, second = geometry.to(orientation), geometry.to(back)
    mask = Mask(first.apply(array), geometry.reoriented(first))
    found = mask.placed(geometry.reoriented(second))
    assert np.array_equal(found.array, second.apply(array))


def test_a_name_of_the_same_words_is_the_same_label() -> None:
    labels = Labels(values={"left kidney": 2, "Liver": 5, "kidney": 7})
    assert labels.like("kidney_left") == ("left kidney",)
    assert labels.like("LIVER") == ("Liver",)
    assert labels.like("right kidney") == ()
    assert Labels(values={"liver": 1, "Liver": 2}).like("LIVER") == ("liver", "Liver")


def test_values_that_nobody_named_have_their_numbers_as_names() -> None:
    assert Labels.numbered({300, 7}, "mask.nii").values == {"label_7": 7, "label_300": 300}
    assert Labels.numbered({300, 7}, "mask.nii").names == ("label_7", "label_300")
    with pytest.raises(InputError, match=r"mask\.nii: Labels: .*at most 254 labels"):
        Labels.numbered(range(1, 256), "mask.nii")
