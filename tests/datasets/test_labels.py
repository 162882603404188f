"""Organ tables against the published ones (specs/samed_rag_adapter.md sections 4 and 5.3), and what a lookup table must refuse."""

import json

import numpy as np
import pytest

from datasets.labels import BTCV_NAMES, DATASETS, LABEL_MAPS, LabelMap, colour_of, identity_label_map, load_label_map
from pgsam.errors import UserError

# Transcribed from the published preprocessing, source value -> target value.
SYNAPSE8 = {0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 5: 0, 6: 5, 7: 6, 8: 7, 9: 0, 10: 0, 11: 8, 12: 0, 13: 0}
SYNAPSE12 = {**{i: i for i in range(13)}, 13: 12}
FLARE22 = {0: 0, 1: 5, 2: 2, 3: 1, 4: 8, 5: 7, 6: 0, 7: 0, 8: 0, 9: 4, 10: 0, 11: 6, 12: 0, 13: 3}


@pytest.mark.parametrize(
    ("name", "table"), [("btcv13", {i: i for i in range(14)}), ("synapse8", SYNAPSE8), ("synapse12", SYNAPSE12), ("flare22", FLARE22)]
)
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float64])
def test_registered_maps_are_the_published_tables(name, table, dtype):
    labels = np.array([list(table)] * 2, dtype)
    target = LABEL_MAPS[name].apply(labels)
    assert target.dtype == np.uint8
    np.testing.assert_array_equal(target, [list(table.values())] * 2)
    np.testing.assert_array_equal(labels, np.array([list(table)] * 2))  # the input is left alone


@pytest.mark.parametrize("dtype", ["u1", "i2", ">i2", "i8", "f4", ">f8"])
@pytest.mark.parametrize("default", [None, 0])
def test_each_voxel_is_looked_up(dtype, default, monkeypatch):
    """Also those beyond a byte, of arrays that lie otherwise in memory, and of as many classes as there are bytes."""
    monkeypatch.setattr("datasets.labels._BLOCK", 1000)
    rng = np.random.default_rng(0)
    wide = {3: 1, 200: 2, 300: 3, 30000: 2}
    for table, classes in ((wide, 3), ({i: i for i in range(256)}, 255)):
        sources = sorted({0, *table} if dtype != "u1" else {i for i in (0, *table) if i < 256})
        if default is not None and dtype != "u1":
            sources += [299, 29999]
        labels = rng.choice(np.array(sources), (4, 101, 7)).astype(dtype).transpose(2, 0, 1)
        target = LabelMap("wide", tuple(map(str, range(classes))), table, {}, default).apply(labels)
        np.testing.assert_array_equal(target, np.vectorize(lambda value, table=table: {0: 0, **table}.get(value, 0))(labels))
        target[0] = 0  # it is the caller's


def test_flare_organs_survive_where_the_published_in_place_remap_destroys_them():
    labels = np.arange(14)
    in_place = labels.copy()
    for source in range(14):  # sorted order
        in_place[in_place == source] = FLARE22[source]
    expected = np.array([FLARE22[source] for source in range(14)])
    destroyed = set(np.flatnonzero(in_place != expected).tolist())
    assert destroyed >= {1, 4, 5}  # liver, pancreas and aorta: the pitfall is real
    np.testing.assert_array_equal(LABEL_MAPS["flare22"].apply(labels), expected)


def test_a_class_means_the_same_organ_in_synapse_and_flare():
    assert LABEL_MAPS["synapse8"].class_names == LABEL_MAPS["flare22"].class_names
    assert LABEL_MAPS["synapse8"].class_names == (
        "spleen",
        "right kidney",
        "left kidney",
        "gallbladder",
        "liver",
        "stomach",
        "aorta",
        "pancreas",
    )
    for name in ("btcv13", "synapse8", "flare22"):
        label_map = LABEL_MAPS[name]
        for source, target in label_map.source_to_target.items():
            if target:
                assert label_map.class_names[target - 1] == label_map.source_names[source]


def test_datasets_give_the_number_of_foreground_classes():
    counts = {name: label_map.num_classes for name, label_map in DATASETS.items()}
    assert counts == {"Synapse": 8, "Synapse_12": 12, "BTCV": 13, "FLARE": 8, "FLARE22": 8}


@pytest.mark.parametrize(
    ("labels", "value"),
    [
        (np.array([0, 14], np.uint8), "14"),
        (np.array([0, -1], np.int16), "-1"),
        (np.array([0, 65535], np.uint16), "65535"),
        (np.array([2**63 + 5], np.uint64), "9.22337e\\+18"),
        (np.array([1.0, 2.5]), "2.5"),
        (np.array([1.0, np.nan]), "nan"),
        (np.array([1.0, np.inf]), "inf"),
        (np.array([1e30]), "1e\\+30"),
    ],
)
def test_unexpected_values_are_refused_by_name(labels, value):
    with pytest.raises(UserError, match=f"{value}.*synapse8"):
        LABEL_MAPS["synapse8"].apply(labels)


def test_json_map(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"class_names": ["liver", "tumor"], "map": {"6": 1, "200": 2, "7": 2}}))
    label_map = load_label_map(path)
    assert label_map.class_names == ("liver", "tumor")
    np.testing.assert_array_equal(label_map.apply(np.array([0, 6, 200, 7, 6])), [0, 1, 2, 2, 1])
    with pytest.raises(UserError, match=r"8.*mine\.json"):
        label_map.apply(np.array([8]))
    path.write_text(json.dumps({"class_names": ["liver"], "map": {"6": 1}, "default": 0}))
    np.testing.assert_array_equal(load_label_map(str(path)).apply(np.array([0.0, 6.0, 8.0, -3.0, 70000.0])), [0, 1, 0, 0, 0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "valid JSON, found none"),
        ("[1]", "expected a label map of the form"),
        ('{"class_names": ["a"]}', "expected a label map of the form"),
        ('{"class_names": ["a"], "map": {"1": 1}, "defualt": 0}', "defualt"),
        ('{"class_names": [], "map": {}}', "class_names"),
        ('{"class_names": ["a", "a"], "map": {"1": 1, "2": 2}}', "twice"),
        ('{"class_names": ["a"], "map": {"1": 2}}', "0 to 1"),
        ('{"class_names": ["a"], "map": {"1": -1}}', "0 to 1"),
        ('{"class_names": ["a"], "map": {"1": true}}', "0 to 1"),
        ('{"class_names": ["a"], "map": {"x": 1}}', '"x"'),
        ('{"class_names": ["a"], "map": {"0": 1}}', "background"),
        ('{"class_names": ["a", "b"], "map": {"1": 1}}', "class b"),
        ('{"class_names": ["a", "b"], "map": {"1": 1, "1": 2}}', "twice"),
        ('{"class_names": ["a"], "map": {"1": 1}, "default": 1}', "default"),
    ],
)
def test_faulty_json_is_refused_with_the_file(tmp_path, content, message):
    path = tmp_path / "map.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        load_label_map(path)
    assert str(path) in str(caught.value)


def test_unknown_map_lists_the_names():
    with pytest.raises(UserError, match=r"synapse9.*synapse8.*flare22"):
        load_label_map("synapse9")
    with pytest.raises(UserError, match=r"nowhere/x\.json.*not found"):
        load_label_map("nowhere/x.json")
    assert load_label_map("synapse12") is LABEL_MAPS["synapse12"]


def test_identity_of_names():
    label_map = identity_label_map(["tumor", "edema"])
    assert label_map.num_classes == 2
    np.testing.assert_array_equal(label_map.apply(np.array([2, 0, 1])), [2, 0, 1])


def test_colours_follow_the_organ_and_differ():
    assert colour_of("liver", 1) == colour_of("liver", 6)
    assert colour_of("Right_Kidney", 1) == colour_of("right kidney", 2)
    assert colour_of("oesophagus", 3) == colour_of("esophagus", 5)
    colours = np.array([colour_of(name, i) for i, name in enumerate(BTCV_NAMES)], float)
    fallback = np.array([colour_of(f"thing {i}", i) for i in range(1, 13)], float)
    for palette in (colours, fallback):
        distance = np.linalg.norm(palette[:, None] - palette[None], axis=-1) + 1e9 * np.eye(len(palette))
        assert distance.min() > 25
        assert palette.min() >= 0
        assert palette.max() <= 255
    assert np.ptp(colours, axis=1).min() > 60  # never grey, on a grey CT


def test_models_know_synapses_names_by_the_same_words() -> None:
    """pgsam.models must not import datasets, so the eight names stand in both."""
    from datasets.labels import SYNAPSE8_NAMES
    from pgsam.models import SYNAPSE_CLASSES

    assert SYNAPSE_CLASSES == SYNAPSE8_NAMES
