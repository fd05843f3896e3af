"""Volumes within one series: echoes, time points, b-values and kinds of image told apart by what their headers say."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from medseg.io.dicom import stack
from medseg.io.dicom.frames import ATTRIBUTES, Frame
from medseg.io.dicom.stack import Plane

_PHASES = ("TriggerTime", "NominalCardiacTriggerDelayTime")
"""Attributes that differ a little from slice to slice: their rank at a position counts, not their value."""
_CODED = ("ImageType", "FrameType", "ComplexImageComponent")
_Groups = Mapping[float | str, list[Frame]]


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
    """The volumes in a series.

    Stacks that the headers name are tried first. Where positions repeat, the first attribute of ``ATTRIBUTES`` counts
    whose values give groups that have every position once, or several attributes together. Frames that have position
    and content of another are left out where nothing tells them apart.

    Args:
        frames: all with a plane.
        content: digest of a frame's pixels.

    Returns:
        One part for each volume; one of all the frames where nothing parts them.
    """
    if not stack.stack(planes_of(frames)).reason:
        return [Part("", frames)]
    stacks = _grouped(frames, "StackID")
    if len(stacks) > 1 and all(len(group) > 1 for group in stacks.values()):
        found = [part for label, group in _labelled("StackID", stacks) for part in _within(label, group, content)]
        if not any(part.reason or stack.stack(planes_of(part.frames)).reason for part in found):
            return found
    return _within("", frames, content)


def _within(label: str, frames: list[Frame], content: Callable[[Frame], bytes]) -> list[Part]:
    """The volumes among the frames of one stack."""
    planes = planes_of(frames)
    if stack.differing(planes) or not stack.repeated(planes):
        return [Part(label, frames)]
    places = dict(zip(frames, stack.places(planes).tolist(), strict=True))
    if len(set(places.values())) > 1:
        names = [name for name in ATTRIBUTES if name != "StackID"]
        if found := _split(frames, places, names) or _incomplete(frames, places, names):
            return [Part(",".join(filter(None, (label, part.label))), part.frames, part.reason) for part in found]
    return [_without_twins(label, frames, places, content)]


def _split(frames: list[Frame], places: Mapping[Frame, int], names: Sequence[str]) -> list[Part]:
    """Groups that have every position once; none where that cannot be done."""
    for name in names:
        groups = _grouped(frames, name)
        if len(groups) > 1 and all(_covering(group, places, frames) == 1 for group in groups.values()):
            return [Part(*group) for group in _labelled(name, groups)]
    for name in _PHASES:
        if name in names and (ranked := _ranked(frames, places, name)):
            return ranked
    for index, name in enumerate(names):
        groups = _grouped(frames, name)
        even = len(groups) > 1 and all(_covering(group, places, frames) for group in groups.values())
        if even and (found := _nested(_labelled(name, groups), places, names[index + 1 :])):
            return found
    return []


def _nested(groups: list[tuple[str, list[Frame]]], places: Mapping[Frame, int], names: Sequence[str]) -> list[Part]:
    """Groups parted further; none where one of them cannot be."""
    found = []
    for label, group in groups:
        once = _covering(group, places, group) == 1
        inner = [Part("", group)] if once else _split(group, places, names)
        if not inner:
            return []
        found += [Part(",".join(filter(None, (label, part.label))), part.frames) for part in inner]
    return found


def _incomplete(frames: list[Frame], places: Mapping[Frame, int], names: Sequence[str]) -> list[Part]:
    """Groups by the first attribute by which none repeats a position and half of them at the least have them all."""
    count = len(set(places.values()))
    for name in names:
        groups = _grouped(frames, name)
        once = all(len({places[frame] for frame in group}) == len(group) for group in groups.values())
        whole = sum(len(group) == count for group in groups.values())
        if len(groups) > 1 and once and 2 * whole >= len(groups):
            return [
                Part(label, group, "" if len(group) == count else f"has {len(group)} of its series' {count} positions")
                for label, group in _labelled(name, groups)
            ]
    return []


def _without_twins(
    label: str, frames: list[Frame], places: Mapping[Frame, int], content: Callable[[Frame], bytes]
) -> Part:
    """Frames without those that have the position and content of another; all of them where others repeat one."""
    if any(frame.encoding.frames > 1 for frame in frames):
        return Part(label, frames)
    counts = Counter(places.values())
    kept: dict[tuple[int, bytes], Frame] = {}
    for frame in frames:
        kept.setdefault((places[frame], content(frame) if counts[places[frame]] > 1 else b""), frame)
    if len(kept) > len(counts):
        return Part(label, frames)
    count = len(frames) - len(kept)
    return Part(label, list(kept.values()), note=f"{count} slices repeat the position and pixels of others: left out")


def _covering(group: list[Frame], places: Mapping[Frame, int], frames: list[Frame]) -> int:
    """How often a group has every position of some frames; 0 where not equally often."""
    counts = Counter(places[frame] for frame in group)
    every = {places[frame] for frame in frames}
    return counts[places[group[0]]] if len(counts) == len(every) and len(set(counts.values())) == 1 else 0


def _ranked(frames: list[Frame], places: Mapping[Frame, int], name: str) -> list[Part]:
    """Groups by the rank of a number among those at its position, where every position has equally many."""
    at: dict[int, list[tuple[float, Frame]]] = defaultdict(list)
    for frame in frames:
        value = frame.attributes.get(name)
        if not isinstance(value, float):
            return []
        at[places[frame]].append((value, frame))
    for group in at.values():
        group.sort(key=lambda item: item[0])
    if any(len({value for value, _ in group}) < len(group) for group in at.values()):
        return []
    if len({len(group) for group in at.values()}) > 1:
        return []
    ranks = zip(*at.values(), strict=True)
    return [Part(f"{name}=#{n + 1}", [frame for _, frame in group]) for n, group in enumerate(ranks)]


def _grouped(frames: Sequence[Frame], name: str) -> dict[float | str, list[Frame]]:
    groups: dict[float | str, list[Frame]] = defaultdict(list)
    for frame in frames:
        groups[frame.attributes.get(name, "")].append(frame)
    return groups


def _labelled(name: str, groups: _Groups) -> list[tuple[str, list[Frame]]]:
    """Groups in their order, each with a label: a number, the coded words that differ, or else its rank.

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
    words = [word for word in value.split("\\") if word not in common]
    return "+".join(words) if coded and all(word.replace("_", "").isalnum() for word in words) else ""
