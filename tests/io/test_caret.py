"""The label table in XML, sound and hostile."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medseg.io import caret
from medseg.volume import Labels


def table(*rows: str) -> bytes:
    return (
        f"<CaretExtension><VolumeInformation><LabelTable>{''.join(rows)}</LabelTable></VolumeInformation>".encode()
        + (b"</CaretExtension>")
    )


def test_the_table_as_workbench_reads_it() -> None:
    labels = Labels(values={"b <&> \x00": -3, "ä": 1}, colours={"ä": (255, 51, 0)}, regions={"all": (1, -3)}, ignore=9)
    root = ElementTree.fromstring(caret.to_xml(labels))
    assert root.tag == "CaretExtension"
    rows = root.findall("VolumeInformation[@Index='0']/LabelTable/Label")
    assert [(row.get("Key"), row.text) for row in rows] == [("-3", "b <&>  "), ("1", "ä")]
    assert [rows[1].get(name) for name in ("Red", "Green", "Blue", "Alpha")] == ["1", "0.2", "0", "1"]
    assert root.findtext("VolumeInformation/VolumeType") == "Label"


@given(
    st.dictionaries(
        st.text("ab &<>]\"'é日", min_size=1).map(str.strip).filter(bool), st.integers(1, 2**31 - 1), min_size=1
    )
)
def test_names_values_and_colours_come_back(values: dict[str, int]) -> None:
    if len(set(values.values())) < len(values):
        return
    labels = Labels(values=values)
    read = caret.from_xml(caret.to_xml(labels))
    assert read == labels.model_copy(update={"colours": {name: labels.colour(name) for name in labels.names}})


def test_what_is_not_said_is_not_made_up() -> None:
    read = caret.from_xml(table('<Label Key="4"> </Label>', '<Label Key="5" Red="2" Green="0" Blue="0">a</Label>'))
    assert read == Labels(values={"label_4": 4, "a": 5})


BOMB = '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>'


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no XML at all",
        b"<LabelTable>",
        table(),
        table('<Label Key="0">background</Label>'),
        table('<Label Key="one">a</Label>'),
        table('<Label Key="1">a</Label>', "<Label>b</Label>"),
        table('<Label Key="1">a</Label>', '<Label Key="2">a</Label>'),
        table('<Label Key="1">a</Label>', '<Label Key="1">b</Label>'),
        table('<Label Key="9999999999">a</Label>'),
        table(*(f'<Label Key="{n}">{n}</Label>' for n in range(1, 256))),
        BOMB.encode() + table('<Label Key="1">&b;</Label>'),
        table('<Label Key="1">&a;</Label>'),
        table('<Label Key="1">a</Label>').decode().encode("utf-16"),
        b"<a>" * 50_000 + b"<LabelTable>",
    ],
)
def test_no_sound_table_is_none(content: bytes) -> None:
    assert caret.from_xml(content) is None
