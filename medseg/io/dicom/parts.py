"""Volumes within one series: echoes, time points, b-values and kinds of image told apart by what their headers say.

The rules, in their order; the first that applies counts:

1. Slices of several contrasts (echo, b-value, flip angle ...) that lie between one another are a volume a contrast.
2. Even slices are one volume, whatever else differs among them.
3. Stacks that the headers name, where every one of them is a volume.
4. Of slices of several orientations or sizes one or two odd ones are left out, where the others are volumes;
   stacks at small angles to one another (a spine) are looked at one by one.
5. Slices whose gaps alternate as an attribute does are a volume a value: no grid is made across acquisitions.
6. Where positions repeat: an attribute whose values have every position once; or up to four of them together; or the
   rank of a trigger time, where the phases of all positions agree.
7. ... an attribute that tells whole volumes from unfinished ones, which are refused alone.
8. ... frames with position and content of another are left out, where that leaves every position once.
9. ... an attribute whose values repeat no position, although none has them all: ``stack`` judges each alone.

What no rule parts stays together, and ``stack`` says why it is no volume.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from statistics import median_low

import numpy as np

from medseg.io.dicom import stack
from medseg.io.dicom.frames import ATTRIBUTES, Frame
from medseg.io.dicom.stack import Plane

_NAMES = tuple(name for name in ATTRIBUTES if name != "StackID")
_TIMES = ("EchoTime", "EffectiveEchoTime", "InversionTime")
_CONTRASTS = (*_TIMES, "EchoNumbers", "DiffusionBValue", "ComplexImageComponent", "FlipAngle")
"""Attributes that no single volume has several values of."""
_MEASURED = (*_TIMES, "DiffusionBValue", "FlipAngle")
"""Attributes that jitter from slice to slice: values as near as ``_NEAR`` of them, or ``_NEAREST``, are one."""
_NEAR, _NEAREST = 0.01, 0.01
_PHASES = ("TriggerTime", "NominalCardiacTriggerDelayTime")
"""Attributes that differ a little from slice to slice: their rank at a position counts, not their value."""
_AGREE = 0.25
"""Phases of one rank may differ by this part of the step between two of them."""
_DEPTH = 4
"""Attributes that are tried together."""
_FEWEST = 3
"""Slices of the smallest group that may be a volume where nothing else speaks for it."""
_STRAYS, _REST = 2, 5
"""Odd slices that may be left out, and how many others there must be."""
_KINDS = 16
"""Orientations and sizes of one series that are told apart."""
_ANGLE = 45.0
"""Degrees between stacks of one series; those that cross at more are a localizer."""
_CODED = ("ImageType", "FrameType", "ComplexImageComponent")
_WORDS = {
    *("ORIGINAL", "DERIVED", "PRIMARY", "SECONDARY", "MIXED", "NONE", "M", "P", "R"),
    *("I", "MAGNITUDE", "PHASE", "REAL", "IMAGINARY", "W", "F", "IP", "OP"),
    *("IN", "OUT", "OPP", "WATER", "FAT", "IN_PHASE", "OUT_PHASE", "OPP_PHASE", "OUTPHASE"),
    *("INPHASE", "FAT_FRACTION", "WATER_FRACTION", "DIXON", "ADC", "EADC", "TRACE", "TRACEW", "FA"),
    *("B0", "BVALUE", "DIFFUSION", "ISOTROPIC", "ANISO", "PERFUSION", "CBF", "CBV", "MTT"),
    *("TTP", "TMAX", "T1", "T2", "T2_STAR", "R2", "R2_STAR", "PROTON_DENSITY", "M_FFE"),
    *("P_FFE", "R_FFE", "I_FFE", "M_SE", "M_IR", "PHASE_MAP", "FIELD_MAP", "VELOCITY", "MPR"),
    *("MIP", "MINIP", "AVERAGE", "MEAN", "SUBTRACTION", "AXIAL", "HELICAL", "ND", "NORM"),
    *("DIS2D", "DIS3D", "MONO", "VIRTUAL_MONO", "IODINE", "CALCIUM", "NO_IODINE"),
}
"""Words of Image Type that are shown; any other may be a name."""
_Groups = Mapping[float | str, list[Frame]]
_Content = Callable[[Frame], bytes]


@dataclass(frozen=True, eq=False)
class Part:
    """Frames that may be a volume.

    Attributes:
        label: what tells them from the rest of their series, as ``EchoTime=4.92``; empty where they are all of it.
        frames: in any order.
        reason: why they are no volume, where that is known.
        note: what was left out.
    """

    label: str
    frames: list[Frame]
    reason: str = ""
    note: str = ""


def planes_of(frames: Sequence[Frame]) -> list[Plane]:
    """Where frames lie; all of them must have a place."""
    return [frame.plane for frame in frames if frame.plane is not None]


def parts_of(frames: list[Frame], content: Callable[[Frame], bytes]) -> list[Part]:
    """The volumes in a series, by the rules of this module.

    Args:
        frames: all with a plane.
        content: digest of a frame's pixels.

    Returns:
        One part for each volume; one of all the frames where nothing parts them.
    """
    return _even(frames) or _named(frames, content) or _parallel(frames, content) or _within(frames, content)


def _within(frames: list[Frame], content: _Content) -> list[Part]:
    """The volumes among frames of one stack, or of one orientation and size."""
    return _even(frames) or _alternating(frames) or _repeated(frames, content) or [Part("", frames)]


def _even(frames: list[Frame]) -> list[Part]:
    """Rules 1 and 2. Slices that are even but for rounding may be those of two acquisitions."""
    planes = planes_of(frames)
    if stack.differing(planes) or stack.repeated(planes):
        return []
    if mingled := _mingled(frames, _CONTRASTS):
        return mingled
    whole = stack.stack(planes)
    if whole.reason:
        return []
    return (_alternating(frames) if whole.warning else []) or [Part("", frames)]


def _named(frames: list[Frame], content: _Content) -> list[Part]:
    """Rule 3."""
    stacks = _grouped(frames, "StackID")
    if len(stacks) < 2 or any(len(group) < 2 for group in stacks.values()):
        return []
    found = [_prefixed(label, _within(group, content)) for label, group in _labelled("StackID", stacks)]
    return _all_good([part for parts in found for part in parts])


def _parallel(frames: list[Frame], content: _Content) -> list[Part]:
    """Rule 4."""
    if not stack.differing(planes_of(frames)):
        return []
    kinds = sorted(_kinds(frames), key=len)
    strays = sum(len(kind) for kind in kinds[:-1])
    if kinds and strays <= _STRAYS and len(kinds[-1]) >= _REST:
        note = f"{strays} of {len(frames)} slices have another orientation or size: left out"
        return _all_good([replace(part, note=_joined(note, part.note, "; ")) for part in _within(kinds[-1], content)])
    if len(kinds) < 2 or len(kinds[0]) < _FEWEST or not _turned(kinds):
        return []
    kinds.sort(key=lambda kind: planes_of(kind)[0].orientation)
    found = [_prefixed(f"Orientation=#{n + 1}", _within(kind, content)) for n, kind in enumerate(kinds)]
    return [part for parts in found for part in parts]


def _kinds(frames: list[Frame]) -> list[list[Frame]]:
    """Frames by orientation and size; none where there are too many of them."""
    kinds: list[list[Frame]] = []
    known: dict[Plane, list[Frame]] = {}
    for frame, plane in zip(frames, planes_of(frames), strict=True):
        key = replace(plane, position=(0.0, 0.0, 0.0))
        if key not in known:
            like = [kind for kind in kinds if not stack.differing([planes_of(kind[:1])[0], plane])]
            known[key] = like[0] if like else []
            kinds += [] if like else [known[key]]
        known[key].append(frame)
        if len(kinds) > _KINDS:
            return []
    return kinds


def _turned(kinds: list[list[Frame]]) -> bool:
    """Whether the orientations of all kinds differ, by small angles."""
    pairs = combinations([planes_of(kind[:1])[0] for kind in kinds], 2)
    return all(
        np.ptp([one.orientation, other.orientation], axis=0).max() > stack.PARALLEL
        and abs(one.normal @ other.normal) > math.cos(math.radians(_ANGLE))
        for one, other in pairs
    )


def _alternating(frames: list[Frame]) -> list[Part]:
    """Rule 5: a single gap is no alternation, but a slice that is missing."""
    planes = planes_of(frames)
    if len(planes) < 2 * _FEWEST or stack.differing(planes) or stack.repeated(planes):
        return []
    gaps = np.diff(np.sort([plane.position @ planes[0].normal for plane in planes]))
    usual = np.median(gaps)
    if np.mean(np.abs(gaps - usual) > stack.EVEN * usual) < 0.25:
        return []
    return _mingled(frames, _NAMES, rounded=False)


def _mingled(frames: list[Frame], names: Sequence[str], rounded: bool = True) -> list[Part]:
    """Groups by an attribute, each an even stack, that lie between one another; ``rounded``: even but for rounding."""
    numbers = dict(zip(frames, stack.places(planes_of(frames)).tolist(), strict=True))
    for name in names:
        groups = _grouped(frames, name)
        if len(groups) < 2 or any(len(group) < _FEWEST for group in groups.values()):
            continue
        spans = sorted((min(at), max(at)) for at in ([numbers[f] for f in group] for group in groups.values()))
        if all(after[0] > before[1] for before, after in pairwise(spans)):
            continue
        laid = (stack.stack(planes_of(group)) for group in groups.values())
        if not any(one.reason or (one.warning and not rounded) for one in laid):
            return [Part(*group) for group in _labelled(name, groups)]
    return []


def _repeated(frames: list[Frame], content: _Content) -> list[Part]:
    """Rules 6 to 9."""
    planes = planes_of(frames)
    if stack.differing(planes) or not stack.repeated(planes):
        return []
    places = dict(zip(frames, stack.places(planes).tolist(), strict=True))
    if len(set(places.values())) == 1:
        return _without_twins(frames, places, content)
    if not _told_apart(frames, places):
        return _without_twins(frames, places, content)
    found = _split(frames, places, _NAMES) or _split(frames, places, _NAMES, ranks=True) or _incomplete(frames, places)
    return found or _without_twins(frames, places, content) or _fragments(frames, places)


def _told_apart(frames: list[Frame], places: Mapping[Frame, int]) -> bool:
    """Whether all the attributes together tell apart the frames of every position: if not, no search is needed."""
    return len({(places[frame], *(frame.attributes.get(name) for name in _NAMES)) for frame in frames}) == len(frames)


def _split(
    frames: list[Frame], places: Mapping[Frame, int], names: Sequence[str], depth: int = _DEPTH, ranks: bool = False
) -> list[Part]:
    """Groups that have every position once; none where that cannot be done."""
    images = max(Counter(places[frame] for frame in frames).values())
    values = {name: len({frame.attributes.get(name) for frame in frames}) for name in names}
    for name in (name for name in names if values[name] >= images):
        for groups in _groupings(frames, name):
            if all(_covering(group, places, frames) == 1 for group in groups.values()):
                return [Part(*group) for group in _labelled(name, groups)]
    if depth > 1 and math.prod(sorted(values.values())[-depth:]) >= images:
        for index, name in enumerate(names):
            for groups in _groupings(frames, name):
                even = all(_covering(group, places, frames) for group in groups.values())
                if even and (found := _nested(_labelled(name, groups), places, names[index + 1 :], depth - 1, ranks)):
                    return found
    for name in _PHASES:
        if ranks and name in names and (found := _ranked(frames, places, name)):
            return found
    return []


def _nested(
    groups: list[tuple[str, list[Frame]]], places: Mapping[Frame, int], names: Sequence[str], depth: int, ranks: bool
) -> list[Part]:
    """Groups parted further; none where one of them cannot be."""
    found = []
    for label, group in groups:
        once = _covering(group, places, group) == 1
        inner = [Part("", group)] if once else _split(group, places, names, depth, ranks)
        if not inner:
            return []
        found += _prefixed(label, inner)
    return found


def _ranked(frames: list[Frame], places: Mapping[Frame, int], name: str) -> list[Part]:
    """Groups by the rank of a time among those at its position.

    Any numbers have ranks. They are phases of one cycle where every position has as many, three at the least, at the
    same parts of the way from the first to the last; and where one contrast has one rank.
    """
    at: dict[int, list[Frame]] = defaultdict(list)
    for frame in frames:
        if not isinstance(frame.attributes.get(name), float):
            return []
        at[places[frame]].append(frame)
    count = len(next(iter(at.values())))
    if count < _FEWEST or any(len(group) != count for group in at.values()):
        return []
    for group in at.values():
        group.sort(key=lambda frame: frame.attributes[name])
    times = np.array([[frame.attributes[name] for frame in group] for group in at.values()], dtype=np.float64)
    if not np.diff(times, axis=1).all():
        return []
    phases = (times - times[:, :1]) / (times[:, -1:] - times[:, :1])
    ranks = [list(rank) for rank in zip(*at.values(), strict=True)]
    one = all(len(_grouped(rank, other)) == 1 for rank in ranks for other in (*_CONTRASTS, *_CODED))
    if not one or np.ptp(phases, axis=0).max() > _AGREE / (count - 1):
        return []
    return [Part(f"{name}=#{n + 1}", rank) for n, rank in enumerate(ranks)]


def _incomplete(frames: list[Frame], places: Mapping[Frame, int]) -> list[Part]:
    """Rule 7: the first attribute by which none repeats a position and half of them at the least have them all."""
    count = len(set(places.values()))
    for name in _NAMES:
        groups = _grouped(frames, name)
        whole = sum(len(group) == count for group in groups.values())
        if len(groups) > 1 and 2 * whole >= len(groups) and _once(groups, places):
            return [
                Part(label, group, "" if len(group) == count else f"has {len(group)} of its series' {count} positions")
                for label, group in _labelled(name, groups)
            ]
    return []


def _fragments(frames: list[Frame], places: Mapping[Frame, int]) -> list[Part]:
    """Rule 9. Groups that skip every second position are half of an acquisition, and no volume."""
    count = len(set(places.values()))
    for name in _NAMES:
        groups = _grouped(frames, name)
        if len(groups) < 2 or not _once(groups, places):
            continue
        if all(len(group) >= _FEWEST and 3 * len(group) > 2 * _span(group, places) for group in groups.values()):
            return [
                Part(label, group, note=f"has {len(group)} of its series' {count} positions")
                for label, group in _labelled(name, groups)
            ]
    return []


def _once(groups: _Groups, places: Mapping[Frame, int]) -> bool:
    return all(len({places[frame] for frame in group}) == len(group) for group in groups.values())


def _span(group: list[Frame], places: Mapping[Frame, int]) -> int:
    """Positions of the series from the first to the last of a group."""
    at = [places[frame] for frame in group]
    return max(at) - min(at) + 1


def _without_twins(frames: list[Frame], places: Mapping[Frame, int], content: _Content) -> list[Part]:
    """Rule 8."""
    if any(frame.encoding.frames > 1 for frame in frames):
        return []
    counts = Counter(places.values())
    kept: dict[tuple[int, bytes], Frame] = {}
    for frame in frames:
        kept.setdefault((places[frame], content(frame) if counts[places[frame]] > 1 else b""), frame)
    if len(kept) > len(counts):
        return []
    note = f"{len(frames) - len(kept)} slices repeat the position and pixels of others: left out"
    return [Part("", list(kept.values()), note=note)]


def _covering(group: list[Frame], places: Mapping[Frame, int], frames: list[Frame]) -> int:
    """How often a group has every position of some frames; 0 where not equally often."""
    counts = Counter(places[frame] for frame in group)
    every = {places[frame] for frame in frames}
    return counts[places[group[0]]] if len(counts) == len(every) and len(set(counts.values())) == 1 else 0


def _all_good(parts: list[Part]) -> list[Part]:
    """The parts, if every one of them is a volume."""
    return [] if any(part.reason or stack.stack(planes_of(part.frames)).reason for part in parts) else parts


def _groupings(frames: Sequence[Frame], name: str) -> Iterator[_Groups]:
    """Two or more groups by the values of an attribute as they are; then, where others, by those that are near."""
    exact, near = _exact(frames, name), _grouped(frames, name)
    if len(exact) > 1:
        yield exact
    if 1 < len(near) < len(exact):
        yield near


def _grouped(frames: Sequence[Frame], name: str) -> _Groups:
    """Groups by the values of an attribute; near ones of what is measured are one."""
    groups = _exact(frames, name)
    return _clustered(groups) if name in _MEASURED else groups


def _exact(frames: Sequence[Frame], name: str) -> _Groups:
    groups: dict[float | str, list[Frame]] = defaultdict(list)
    for frame in frames:
        groups[frame.attributes.get(name, "")].append(frame)
    return groups


def _clustered(groups: _Groups) -> _Groups:
    """Groups of numbers that follow one another closely put together, under their median."""
    found: dict[float | str, list[Frame]] = {value: group for value, group in groups.items() if isinstance(value, str)}
    numbers = sorted(value for value in groups if isinstance(value, float))
    steps = [b - a > max(_NEAREST, _NEAR * abs(b)) for a, b in pairwise(numbers)]
    ends = [0, *(n + 1 for n, step in enumerate(steps) if step), len(numbers)]
    for start, end in pairwise(ends):
        if near := numbers[start:end]:
            found[median_low(near)] = [frame for value in near for frame in groups[value]]
    return found


def _prefixed(label: str, parts: Sequence[Part]) -> list[Part]:
    return [replace(part, label=_joined(label, part.label, ",")) for part in parts]


def _joined(one: str, other: str, mark: str) -> str:
    return mark.join(filter(None, (one, other)))


def _labelled(name: str, groups: _Groups) -> list[tuple[str, list[Frame]]]:
    """Groups in their order, each with a label: a number, the known words that differ, or else its rank.

    Other text is not shown, as it may hold anything; times of day neither.
    """
    ordered = sorted(groups, key=lambda value: (isinstance(value, str), value))
    labels = [_label(value, ordered, name in _CODED) for value in ordered]
    if "" in labels or len(set(labels)) < len(labels):
        labels = [f"#{n + 1}" for n in range(len(ordered))]
    return [(f"{name}={label}", groups[value]) for label, value in zip(labels, ordered, strict=True)]


def _label(value: float | str, values: Sequence[float | str], coded: bool) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if not value:
        return "none"
    common = set.intersection(*(set(str(other).split("\\")) for other in values))
    words = [word for word in value.split("\\") if word not in common and word in _WORDS]
    return "+".join(words) if coded else ""
