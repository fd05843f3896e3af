"""What is segmented and what comes out: Volume, Mask, and the Labels that give a mask's integers their names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import SerializerFunctionWrapHandler, model_serializer, model_validator

from medseg.errors import GeometryMismatch, InputError
from medseg.geometry import Geometry
from medseg.records import Record
from medseg.terminology import Coding, Colour, coding_of, colour_of


class Labels(Record):
    """Names of the integers in a mask.

    Attributes:
        values: name -> integer, background left out. Any integers of 32 bits but 0, which is background; 254 at most.
        regions: name -> the integers it unites, scored beside the classes (as "whole tumour").
        ignore: the integer of voxels that no one labelled: left out of loss, sampling and scores.
        codings: name -> what it stands for in SNOMED CT; of some or none of the labels.
        colours: name -> the colour to show it in; of some or none of the labels.
    """

    values: dict[str, int]
    regions: dict[str, tuple[int, ...]] = {}
    ignore: int | None = None
    codings: dict[str, Coding] = {}
    colours: dict[str, Colour] = {}

    @model_validator(mode="after")
    def _consistent(self) -> Labels:
        numbers = list(self.values.values())
        if not numbers:
            raise ValueError("at least one label besides the background is needed")
        if 0 in numbers or self.ignore == 0:
            raise ValueError("0 is background and needs no name")
        if len(numbers) > 254 or any(abs(n) >= 2**31 for n in (*numbers, self.ignore or 0)):
            raise ValueError("at most 254 labels, each an integer of 32 bits, can be handled")
        if len(set(numbers)) != len(numbers) or self.ignore in numbers:
            raise ValueError(f"each label needs an integer of its own; got {self.values}, ignore {self.ignore}")
        self._require_sound_regions()
        for what, named in (("codings", self.codings), ("colours", self.colours)):
            if strange := sorted(set(named) - set(self.values)):
                raise ValueError(f"{what} are of {strange[:5]}, which are no labels")
        if any(not 0 <= part <= 255 for colour in self.colours.values() for part in colour):
            raise ValueError("a colour is three numbers from 0 to 255")
        return self

    def _require_sound_regions(self) -> None:
        unknown = {v for members in self.regions.values() for v in members} - set(self.values.values())
        if unknown:
            raise ValueError(f"regions use integers {sorted(unknown)} that no label has")
        if hollow := sorted(name for name, members in self.regions.items() if not members):
            raise ValueError(f"regions {hollow} unite no labels")

    @model_serializer(mode="wrap")
    def _as_plain_data(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without codings and colours where there are none: digests are those of labels from before there were any."""
        body: dict[str, Any] = dump(self)
        return {name: value for name, value in body.items() if value or name not in ("codings", "colours")}

    @classmethod
    def numbered(cls, values: Iterable[int], where: object) -> Labels:
        """Labels for the values of a mask that nobody named, ``label_<value>`` each.

        Raises:
            InputError: there is none, 0 is among them, or they are more than 254; with ``where``.
        """
        return cls.checked({"values": {f"label_{value}": value for value in sorted(values)}}, where)

    @property
    def names(self) -> tuple[str, ...]:
        """Class names in the order of their integers: the order of the network's channels 1 to n."""
        return tuple(sorted(self.values, key=lambda name: self.values[name]))

    @property
    def count(self) -> int:
        """Number of classes with the background: the network's output channels."""
        return len(self.values) + 1

    @property
    def ignore_index(self) -> int | None:
        """The index that stands for ``ignore`` in arrays from ``to_indices``, one past the last class."""
        return None if self.ignore is None else self.count

    def coding(self, name: str, dataset: str = "") -> Coding | None:
        """What a label stands for: as ``codings`` has it, or else by its name (``terminology.coding_of``)."""
        return self.codings.get(name) or coding_of(name, dataset)

    def coded(self, dataset: str) -> Labels:
        """With every coding that the names have in a dataset, so that whoever has a mask need not know of it."""
        codings = {name: coding for name in self.names if (coding := self.coding(name, dataset))}
        return self.model_copy(update={"codings": codings})

    def colour(self, name: str) -> Colour:
        """The colour of a label: as ``colours`` has it, or else by its place (``terminology.colour_of``)."""
        return self.colours.get(name) or colour_of(self.names.index(name))

    def like(self, name: str) -> tuple[str, ...]:
        """The labels of a name: the one that is spelled so, else those of the same words, in any order and capitals."""
        if name in self.values:
            return (name,)
        return tuple(own for own in self.names if _words(own) == _words(name))

    def completed(self, other: Labels) -> Labels:
        """With the codings and colours that other labels have for the same names (see ``like``), where it has none."""
        same = {name: found[0] for name in self.names if len(found := other.like(name)) == 1}
        codings = {name: other.codings[found] for name, found in same.items() if found in other.codings}
        colours = {name: other.colours[found] for name, found in same.items() if found in other.colours}
        return self.model_copy(update={"codings": codings | self.codings, "colours": colours | self.colours})

    @property
    def _table(self) -> NDArray[np.int64]:
        listed = [0, *(self.values[name] for name in self.names)]
        return np.array(listed if self.ignore is None else [*listed, self.ignore], dtype=np.int64)

    def unknown(self, array: NDArray[Any]) -> list[int]:
        """The integers of an array that neither a label nor the background has."""
        return sorted({int(v) for v in np.unique(array)} - {int(v) for v in self._table})

    def to_indices(self, array: NDArray[Any], where: object = "mask") -> NDArray[np.uint8]:
        """Replace label integers by indices 0..n (0 background), any shape; the array itself where it holds these.

        Raises:
            InputError: the array holds an integer without a name.
        """
        if self.are_indices(array):
            return array
        quick = self._looked_up(array)
        if quick is not None:
            return quick
        if unknown := self.unknown(array):
            raise self._unnamed(unknown, np.unique(array).tolist(), where)
        table = self._table
        order = np.argsort(table)
        return order[np.searchsorted(table[order], array)].astype(np.uint8)

    def are_indices(self, array: NDArray[Any]) -> bool:
        """Whether an array holds the integers of labels that are 1 to n, and background, as bytes."""
        dense = self.ignore is None and set(self.values.values()) == set(range(1, self.count))
        return bool(array.dtype == np.uint8 and dense and array.size and array.max() <= len(self.values))

    def naming(self, values: Iterable[int]) -> str:
        """What to do about a mask of these values, some of which have no name."""
        if set(values) != {0, 255}:
            return "name them in dataset.json or the file given with --labels, or correct the mask"
        body = f'{{"{self.names[0]}": 255}}'
        return f'it is black and white: write "labels": {body} in dataset.json, or divide the mask by 255'

    def _unnamed(self, unknown: list[int], values: Iterable[int], where: object) -> InputError:
        """The error over values without a name among those of a mask."""
        found = f"label values {unknown[:10]} have no name"
        return InputError(where, found, f"0 (background) and {dict(self.values)}", self.naming(values))

    def _looked_up(self, array: NDArray[Any]) -> NDArray[np.uint8] | None:
        """As ``to_indices``, eight times faster; None where values are large, negative or without a name."""
        values = self._table
        if not array.size or array.dtype.kind not in "iu" or len(values) > 255:
            return None
        low, high = int(array.min()), int(array.max())
        if low < 0 or high > 65535:
            return None
        table = np.full(high + 1, 255, dtype=np.uint8)
        known = (values >= 0) & (values <= high)
        table[values[known]] = np.flatnonzero(known)
        indices: NDArray[np.uint8] = table[array]
        return None if indices.max() == 255 else indices

    def to_values(self, indices: NDArray[Any]) -> NDArray[Any]:
        """Replace indices 0..n by label integers; uint8 where they fit, else uint16, else int32."""
        table = self._table
        kind = np.result_type(np.min_scalar_type(int(table.min())), np.min_scalar_type(int(table.max())))
        if kind not in (np.uint8, np.uint16):
            kind = np.dtype(np.int32)
        values: NDArray[Any] = table.astype(kind)[indices]
        return values


@dataclass(frozen=True)
class Volume:
    """An image: array (C, I, J, K), geometry, and where it came from.

    Attributes:
        array: channels first; a 2D picture has K = 1.
        geometry: of the last three axes.
        paths: the files it was read from.
        header: the format's own header, given back when a mask of this volume is written.
        warnings: what was odd about the file but could be read all the same.
    """

    array: NDArray[Any]
    geometry: Geometry
    paths: tuple[Path, ...] = ()
    header: Any = field(default=None, compare=False)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Mask:
    """An integer array (I, J, K) of label values with its geometry.

    Attributes are as in ``Volume``; ``labels`` is None for a mask read without knowing its names.
    """

    array: NDArray[Any]
    geometry: Geometry
    labels: Labels | None = None
    paths: tuple[Path, ...] = ()
    header: Any = field(default=None, compare=False)
    warnings: tuple[str, ...] = ()

    def placed(self, geometry: Geometry) -> Mask:
        """The mask on another grid of the same lattice: turned, flipped, cropped and padded, never resampled.

        Raises:
            GeometryMismatch: the voxels of the two grids do not lie on each other, or labelled ones lie outside.
        """
        if self.geometry.close_to(geometry):
            return replace(self, geometry=geometry)
        where = self._where
        place = self.geometry.placed(geometry)
        if place is None:
            found = "its voxels do not lie on those of the image, however turned, flipped or cropped"
            raise GeometryMismatch(where, found, "the lattice of the image", "resample the mask to the image first")
        array, start = place[0].apply(self.array), np.array(place[1])
        low, high = np.clip(start, 0, geometry.shape), np.clip(start + array.shape, 0, geometry.shape)
        inside = array[tuple(slice(a, b) for a, b in zip(low - start, high - start, strict=True))]
        if lost := int(np.count_nonzero(array)) - int(np.count_nonzero(inside)):
            found = f"{lost:,} labelled voxels of the mask lie outside of the image"
            raise GeometryMismatch(where, found, "a mask within the image", "is it the mask of this image?")
        result = np.zeros(geometry.shape[::-1], dtype=array.dtype).T  # slice after slice, as it is read
        result[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = inside
        return replace(self, array=result, geometry=geometry)

    def named(self, labels: Labels) -> Mask:
        """The mask with labels as someone gives them, and with their values.

        What the mask itself names is known by its names (see ``Labels.like``), whatever its values. Values that it does
        not name, which are all those of a mask without labels, stay as they are; in a mask that names others, only if
        these keep theirs too. Codings and colours that ``labels`` has none of are those of the mask.

        Raises:
            InputError: it has a name that ``labels`` has not, names of the same words, or values that
                neither names. Labels of which there is no voxel do not matter.
        """
        if self.labels is None and labels.are_indices(self.array):
            return replace(self, labels=labels)
        there = sorted({0, *self.counts()})
        new = self._values_in(labels, there)
        if unknown := sorted({new[value] for value in there} - {0, labels.ignore, *labels.values.values()}):
            raise labels._unnamed(unknown, there, self._where)
        known = labels if self.labels is None else labels.completed(self.labels)
        if all(new[value] == value for value in there):
            return replace(self, labels=known)
        table = np.array([new[value] for value in there])
        table = table.astype(np.result_type(np.min_scalar_type(table.min()), np.min_scalar_type(table.max())))
        array = np.empty_like(self.array, dtype=table.dtype)
        for plane, renamed in zip(self.array, array, strict=True):  # places in a table take eight bytes a voxel
            renamed[...] = table[np.searchsorted(there, plane)]
        return replace(self, array=array, labels=known)

    def without(self, names: Collection[str]) -> Mask:
        """The mask with background in place of some of its labels."""
        if self.labels is None or not names:
            return self
        array = self.array.copy(order="K")
        array[np.isin(array, [self.labels.values[name] for name in names])] = 0
        return replace(self, array=array)

    @property
    def _where(self) -> Path | str:
        return self.paths[0] if self.paths else "mask"

    def _values_in(self, labels: Labels, there: list[int]) -> dict[int, int]:
        """The value that each value of the mask has in ``labels``; errors as ``named``, but over unknown values."""
        own = {} if self.labels is None else self.labels.values
        found = {value: labels.like(name) for name, value in own.items() if value in there}
        expected = ", ".join(labels.names)
        if strange := sorted(value for value, names in found.items() if not names):
            found_there = f"has labels of unknown names (values {strange[:10]})"
            remedy = "give these names to labels too (in the file given with --labels, dataset.json), or rename them"
            raise InputError(self._where, found_there, expected, remedy)
        times = Counter(name for names in found.values() for name in names)
        if alike := sorted(v for v, names in found.items() if len(names) > 1 or times[names[0]] > 1):
            found_there = f"has labels whose names are the same words (values {alike[:10]})"
            raise InputError(self._where, found_there, expected, "spell each as the label that is meant")
        new = {value: labels.values[name] for value, (name,) in found.items()}
        nameless = set(there) - set(new) - {0}
        if nameless and any(value != given for value, given in new.items()):
            found_there = f"does not name its label values {sorted(nameless)[:10]}"
            remedy = "name them in the mask: the values of those that it names are not those of the labels"
            raise InputError(self._where, found_there, expected, remedy)
        return {value: value for value in there} | new

    def volumes_ml(self) -> dict[str, float]:
        """Volume of each class, and of each region, in millilitres, by name.

        Raises:
            ValueError: the mask has no labels.
        """
        if self.labels is None:
            raise ValueError("a mask without labels has no named volumes")
        voxel = self.geometry.voxel_volume_ml
        groups = {name: (value,) for name, value in self.labels.values.items()} | self.labels.regions
        counts = self.counts()
        return {name: sum(counts[value] for value in values) * voxel for name, values in groups.items()}

    def counts(self) -> Counter[int]:
        """How often each integer occurs, plane by plane: no second array of the mask's size."""
        counts: Counter[int] = Counter()
        for plane in self.array.T if self.array.flags.f_contiguous else self.array:  # as they lie in memory
            if plane.dtype in (np.uint8, np.uint16):
                found = np.bincount(plane.ravel())
                counts.update({int(value): int(found[value]) for value in np.flatnonzero(found)})
            else:
                values, numbers = np.unique(plane, return_counts=True)
                counts.update(dict(zip(values.tolist(), numbers.tolist(), strict=True)))
        return counts


def _words(name: str) -> list[str]:
    """The words of a name, whatever their order and capitals and what stands between them."""
    return sorted(re.split(r"[\s_-]+", name.strip().casefold()))
