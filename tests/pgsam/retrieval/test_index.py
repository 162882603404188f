"""The index on disk: what goes in comes out, a patient's own slices never do, and what is damaged or does not fit is refused."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from pgsam.errors import UserError
from pgsam.models.card import ModelCard
from pgsam.retrieval.build import Source, build_index, class_counts, write_index
from pgsam.retrieval.extractor import EncoderExtractor, global_vectors
from pgsam.retrieval.index import IndexFacts, SliceIndex
from pgsam.retrieval.stream import StreamedTensors
from pgsam.sam.build import build_image_encoder
from pgsam.tuning.lora import add_encoder_lora, lora_layers

SIZE, WIDTH, GRID = 64, 12, 4
CLASSES = ("liver", "spleen")
CARD = ModelCard("sam_lora_image_encoder", "vit_tiny", SIZE, 56, CLASSES)
FACTS = IndexFacts("encoder", "f" * 64, WIDTH, GRID, CARD.module, CARD.vit_name, SIZE, 56, CLASSES, CARD.orientation, "ct_window", (-125.0, 275.0))
EXTRACTOR: Any = SimpleNamespace(name="encoder", identity="f" * 64, dim=WIDTH, grid=GRID)
PER_PATIENT, PATIENTS = 5, ("ann", "bob", "cid")


def source(count: int) -> Source:
    """`count` slices, five a case; each case is one patient."""
    cases = tuple(f"case{i // PER_PATIENT:04d}" for i in range(count))
    return Source(tuple(f"{case}_slice{i % PER_PATIENT:03d}" for i, case in enumerate(cases)), cases, tuple(PATIENTS[int(c[4:])] for c in cases))


@pytest.fixture(scope="module")
def made() -> SimpleNamespace:
    """Tokens and labels of fifteen slices; the first is empty."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, (15, SIZE, SIZE), dtype=np.uint8)
    labels[0] = 0
    return SimpleNamespace(tokens=torch.from_numpy(rng.normal(size=(15, WIDTH, GRID, GRID)).astype(np.float32)), labels=labels, source=source(15))


@pytest.fixture(scope="module")
def stored(made: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The index of them, written in uneven batches; not to be written in."""
    folder = tmp_path_factory.mktemp("made") / "index"
    write_index(folder, FACTS, made.source, batches(made, (4, 1, 10)), git_commit="abc")
    return folder


@pytest.fixture
def folder(stored: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(stored, tmp_path / "index")
    return tmp_path / "index"


def batches(made: SimpleNamespace, sizes: tuple[int, ...]) -> Iterator[tuple[torch.Tensor, np.ndarray]]:
    start = 0
    for size in sizes:
        yield made.tokens[start : start + size], made.labels[start : start + size]
        start += size


# --- what goes in comes out ---------------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_back(made: SimpleNamespace, stored: Path) -> None:
    index = SliceIndex.open(stored)
    assert len(index) == 15
    assert (index.names, index.cases, index.patients) == (made.source.names, made.source.cases, made.source.patients)
    assert (index.class_names, index.labelled, index.facts) == (CLASSES, 14, FACTS)
    torch.testing.assert_close(index.vectors, global_vectors(made.tokens), rtol=0, atol=0)
    chosen = torch.tensor([[14, 0], [3, 3], [0, 7]])
    memories = index.memories(chosen)
    torch.testing.assert_close(memories.tokens, made.tokens.half().float()[chosen], rtol=0, atol=0)
    assert memories.fractions.shape == (3, 2, 3, SIZE // 4, SIZE // 4)
    for row, column in np.ndindex(3, 2):
        for cell in ((0, 0), (5, 11), (15, 15)):
            patch = made.labels[chosen[row, column]][4 * cell[0] : 4 * cell[0] + 4, 4 * cell[1] : 4 * cell[1] + 4]
            for value in range(3):
                assert float(memories.fractions[row, column, value, *cell]) == (patch == value).sum() / 16
    torch.testing.assert_close(index.memories(torch.tensor([3])).tokens[0], memories.tokens[1, 0], rtol=0, atol=0)


def test_the_files_are_plain_safetensors_and_the_manifest_says_what_they_hold(made: SimpleNamespace, stored: Path) -> None:
    with safe_open(stored / "tokens.safetensors", framework="np") as file:
        assert np.array_equal(file.get_tensor("tokens"), made.tokens.numpy().astype(np.float16))
    with safe_open(stored / "slices.safetensors", framework="np") as file:
        counts = file.get_tensor("counts")
    assert counts.dtype == np.uint8
    assert (counts.sum(axis=1) == 16).all()
    manifest = json.loads((stored / "manifest.json").read_text())
    assert manifest["count"] == 15
    assert manifest["git_commit"] == "abc"
    import hashlib

    assert manifest["sha256"]["tokens"] == hashlib.sha256(made.tokens.half().numpy().tobytes()).hexdigest()
    assert manifest["sha256"]["counts"] == hashlib.sha256(counts.tobytes()).hexdigest()


def test_the_size_of_a_batch_changes_nothing_on_disk(made: SimpleNamespace, stored: Path, tmp_path: Path) -> None:
    write_index(tmp_path / "other", FACTS, made.source, batches(made, (15,)), git_commit="abc")
    for path in stored.iterdir():
        assert (tmp_path / "other" / path.name).read_bytes() == path.read_bytes(), path.name
    assert SliceIndex.open(tmp_path / "other").identity == SliceIndex.open(stored).identity


def test_counts_are_those_of_every_cell() -> None:
    labels = np.random.default_rng(0).integers(0, 4, (2, 16, 24), dtype=np.uint8)
    counts = class_counts(labels, 3)
    assert counts.shape == (2, 4, 4, 6)
    for b, value, row, column in np.ndindex(*counts.shape):
        assert counts[b, value, row, column] == (labels[b, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] == value).sum()


def test_only_what_is_asked_for_is_read(made: SimpleNamespace, folder: Path) -> None:
    """A damaged slice is noticed when it is retrieved, and no sooner."""
    path = folder / "tokens.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # the last number of the last slice
    path.write_bytes(content)
    index = SliceIndex.open(folder)
    index.memories(torch.arange(14))
    with pytest.raises(UserError, match=r"what was stored of case0002_slice004, found damaged tensors"):
        index.memories(torch.tensor([13, 14]))


# --- search -------------------------------------------------------------------------------------------------------------------------------


def test_the_nearest_slices_are_never_of_the_querys_own_patient(made: SimpleNamespace, stored: Path) -> None:
    index = SliceIndex.open(stored)
    queries = global_vectors(made.tokens)
    for i in range(15):
        everyone = index.nearest(queries[i], 3, None)
        assert int(everyone.indices[0]) == i
        assert float(everyone.similarities[0]) == pytest.approx(1, abs=1e-6)
        others = index.nearest(queries[i], 10, index.patients[i])
        assert others.indices.shape == others.similarities.shape == (10,)
        assert sorted(others.indices.tolist()) == [j for j in range(15) if index.patients[j] != index.patients[i]]
        cosines = queries.double() @ queries[i].double()
        assert others.indices.tolist() == sorted(others.indices.tolist(), key=lambda j: -float(cosines[j]))
        torch.testing.assert_close(others.similarities, cosines[others.indices].float(), rtol=0, atol=1e-6)


def test_a_batch_of_queries_may_have_a_patient_each(made: SimpleNamespace, stored: Path) -> None:
    index = SliceIndex.open(stored)
    queries, patients = global_vectors(made.tokens)[[0, 6, 12, 1]], ["ann", None, "cid", "dora"]
    together = index.nearest(queries, 4, patients)
    assert together.indices.shape == (4, 4)
    for row, patient in enumerate(patients):
        assert together.indices[row].tolist() == index.nearest(queries[row], 4, patient).indices.tolist()
    assert index.nearest(queries, 4, "ann").indices.min() >= PER_PATIENT


def test_a_patient_may_have_another_key_in_the_index(made: SimpleNamespace, stored: Path) -> None:
    """Then the query's case tells who it is, and all slices of that patient stay out; by brute force."""
    index = SliceIndex.open(stored)
    queries, pairs = global_vectors(made.tokens)[:4], [("x", index.cases[0]), (None, index.cases[7]), ("ann", index.cases[14]), ("x", "y")]
    together = index.nearest(queries, 3, *zip(*pairs, strict=True))
    for row, (patient, case) in enumerate(pairs):
        own = {patient, *(index.patients[i] for i in range(15) if index.cases[i] == case)}
        left = [i for i in range(15) if index.patients[i] not in own]
        assert sorted(index.nearest(queries[row], len(left), patient, case).indices.tolist()) == left
        assert set(together.indices[row].tolist()) <= set(left)
        with pytest.raises(UserError, match=f"expected at most {len(left)}"):
            index.nearest(queries[row], len(left) + 1, patient, case)


@pytest.mark.parametrize(
    ("k", "patient", "words"),
    [
        (16, None, ("--top_k 16", "at most 15", "give --top_k 15 or less")),
        (11, "bob", ("--top_k 11", "at most 10", "holds 15 slices, 5 of them of the query's own patient bob")),
        (0, None, ("--top_k 0", "at least 1")),
    ],
)
def test_more_neighbours_than_there_are_is_one_line(made: SimpleNamespace, stored: Path, k: int, patient: str | None, words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as raised:
        SliceIndex.open(stored).nearest(global_vectors(made.tokens)[0], k, patient)
    for word in words:
        assert word in str(raised.value)


def test_queries_that_are_no_numbers_or_of_another_width_are_refused(stored: Path) -> None:
    index = SliceIndex.open(stored)
    with pytest.raises(UserError, match="NaN or infinity"):
        index.nearest(torch.full((WIDTH,), float("nan")), 1, None)
    with pytest.raises(ValueError, match="width 12, not 13"):
        index.nearest(torch.ones(13), 1, None)


# --- what does not fit --------------------------------------------------------------------------------------------------------------------


def test_an_index_fits_the_card_and_the_extractor_it_was_made_with(stored: Path) -> None:
    SliceIndex.open(stored).require_fit(CARD, EXTRACTOR)
    other_method = replace(CARD, module="pg_sam", training_patients=("zoe",), sam_sha256="1")
    SliceIndex.open(stored).require_fit(other_method, EXTRACTOR)


@pytest.mark.parametrize(
    ("card", "extractor", "words"),
    [
        ({}, {"identity": "e" * 64}, ("this checkpoint (eeeeeeeeeeee)", "another one (sam_lora_image_encoder, vit_tiny, ffffffffffff)")),
        ({}, {"name": "dinov2"}, ("the extractor dinov2", "found encoder")),
        ({}, {"dim": 256, "identity": "e" * 64}, ("tokens of width 256", "found 12")),
        ({"img_size": 224}, {"grid": 14, "identity": "e" * 64}, ("tokens along a side: 14", "found 4")),
        ({"img_size": 224}, {}, ("img_size 224", "found 64")),
        ({"input_size": 224}, {}, ("input_size 224", "found 56")),
        ({"class_names": ("spleen", "liver")}, {}, ("the classes spleen, liver", "found liver, spleen")),
        ({"class_names": ("liver", "spleen", "aorta")}, {}, ("the classes liver, spleen, aorta",)),
        ({"orientation": "RAS"}, {}, ("orientation RAS",)),
        ({"image_kind": "percentile", "window": None}, {}, ("image kind percentile", "found ct_window")),
        ({"window": (-175.0, 250.0)}, {}, ("window -175.0, 250.0", "found -125.0, 275.0")),
    ],
)
def test_another_model_is_refused_by_the_first_thing_that_differs(
    stored: Path, card: dict[str, Any], extractor: dict[str, Any], words: tuple[str, ...]
) -> None:
    with pytest.raises(UserError) as raised:
        SliceIndex.open(stored).require_fit(replace(CARD, **card), SimpleNamespace(**{**vars(EXTRACTOR), **extractor}))
    for word in (str(stored), *words, "scripts/build_index.py"):
        assert word in str(raised.value)


def test_another_dino_is_not_called_another_checkpoint(made: SimpleNamespace, tmp_path: Path) -> None:
    write_index(tmp_path / "index", replace(FACTS, extractor="dinov2"), made.source, batches(made, (15,)))
    other: Any = SimpleNamespace(**{**vars(EXTRACTOR), "name": "dinov2", "identity": "e" * 64})
    with pytest.raises(UserError, match=r"made with this dinov2 model \(eeeeeeeeeeee\)"):
        SliceIndex.open(tmp_path / "index").require_fit(CARD, other)


# --- what is damaged ----------------------------------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def rewrite(path: Path, **changed: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (shutil.rmtree, ("expected an index of slices", "found no manifest.json")),
        (lambda f: (f / "tokens.safetensors").unlink(), ("tokens.safetensors", "damaged or truncated")),
        (lambda f: cut(f / "tokens.safetensors"), ("tokens.safetensors", "damaged or truncated")),
        (lambda f: cut(f / "slices.safetensors"), ("slices.safetensors", "damaged or truncated")),
        (lambda f: cut(f / "manifest.json") or cut(f / "manifest.json"), ("manifest.json", "a damaged one")),
        (lambda f: (f / "manifest.json").write_text("[]"), ("manifest.json", "found another")),
        (lambda f: rewrite(f / "manifest.json", kind="phantoms"), ("manifest.json", "found another")),
        (lambda f: rewrite(f / "manifest.json", format=2), ("written in format 2", "this version reads 1")),
        (lambda f: rewrite(f / "manifest.json", names=["a"]), ("manifest.json", "a damaged one", "15 slices")),
        (lambda f: rewrite(f / "manifest.json", facts={}), ("manifest.json", "a damaged one")),
        (lambda f: rewrite(f / "manifest.json", names="abcdefghijklmno"), ("a damaged one", "names: a list of texts")),
        (lambda f: rewrite(f / "manifest.json", patients=list(range(15))), ("a damaged one", "patients: a list of texts")),
        (lambda f: rewrite(f / "manifest.json", patients=[["ann"]] * 15), ("a damaged one", "patients: a list of texts")),
        (lambda f: rewrite(f / "manifest.json", count=15.0), ("a damaged one", "count: a whole number")),
        (lambda f: rewrite(f / "manifest.json", patients=["ann"] * 14 + ["zoe"]), ("a damaged one", "cases and patients: others were written")),
    ],
)
def test_damage_is_one_line_that_says_what_to_do(folder: Path, damage: Any, words: tuple[str, ...]) -> None:
    damage(folder)
    with pytest.raises(UserError) as raised:
        SliceIndex.open(folder)
    for word in words:
        assert word in str(raised.value)
    assert "again" in str(raised.value) or "scripts/build_index.py" in str(raised.value)


def test_tensors_of_another_index_are_refused(made: SimpleNamespace, folder: Path, tmp_path: Path) -> None:
    fewer = SimpleNamespace(tokens=made.tokens[:10], labels=made.labels[:10])
    write_index(tmp_path / "fewer", FACTS, source(10), batches(fewer, (10,)))
    shutil.copy(tmp_path / "fewer" / "tokens.safetensors", folder)
    with pytest.raises(UserError, match=r"tokens.safetensors: expected .*\(15, 12, 4, 4\).*, found .*\(10, 12, 4, 4\)"):
        SliceIndex.open(folder)
    moved = SimpleNamespace(tokens=made.tokens + 1, labels=made.labels)
    write_index(tmp_path / "moved", FACTS, made.source, batches(moved, (15,)))
    for name in ("tokens.safetensors", "slices.safetensors"):
        shutil.copy(tmp_path / "moved" / name, folder)
    with pytest.raises(UserError, match=r"expected the vectors that manifest.json was written for"):
        SliceIndex.open(folder)


# --- building -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.labels.fill(0), r"expected labelled slices to remember, found none in 15 \(liver, spleen\)"),
        (lambda m: m.tokens[7, 0, 0].fill_(float("inf")), "case0001_slice002: expected finite tokens"),
        (lambda m: m.tokens[7, 0, 0].fill_(7e4), "case0001_slice002: expected finite tokens"),  # above float16's largest number
    ],
)
def test_what_cannot_be_remembered_leaves_nothing_behind(made: SimpleNamespace, tmp_path: Path, change: Any, message: str) -> None:
    broken = SimpleNamespace(tokens=made.tokens.clone(), labels=made.labels.copy())
    change(broken)
    with pytest.raises(UserError, match=message):
        write_index(tmp_path / "new" / "index", FACTS, made.source, batches(broken, (4, 11)))
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_build_leaves_nothing_behind(made: SimpleNamespace, tmp_path: Path) -> None:
    def interrupted() -> Iterator[Any]:
        yield from batches(made, (4,))
        raise KeyboardInterrupt

    (tmp_path / "index").mkdir()
    with pytest.raises(KeyboardInterrupt):
        write_index(tmp_path / "index", FACTS, made.source, interrupted())
    assert [path.name for path in tmp_path.iterdir()] == ["index"]
    assert list((tmp_path / "index").iterdir()) == []
    write_index(tmp_path / "index", FACTS, made.source, batches(made, (15,)))  # an empty folder is as good as none
    assert len(SliceIndex.open(tmp_path / "index")) == 15


@pytest.mark.parametrize("way", ["working folder", "link to a folder", "link to nothing"])
def test_a_folder_by_another_name(made: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """The folder stays the one it was, and a link a link; after an error both are as before."""
    real, output = tmp_path / "real", tmp_path / "link"
    if way != "link to nothing":
        real.mkdir()
    if way == "working folder":
        monkeypatch.chdir(real)
        output = Path(".")
    else:
        output.symlink_to("real")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    broken = SimpleNamespace(tokens=made.tokens * float("nan"), labels=made.labels)
    with pytest.raises(UserError, match="expected finite tokens"):
        write_index(output, FACTS, made.source, batches(broken, (15,)))
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    write_index(output, FACTS, made.source, batches(made, (15,)))
    assert len(SliceIndex.open(output)) == len(SliceIndex.open(real)) == 15
    assert len(list(real.iterdir())) == 3
    assert output.is_symlink() == (way != "working folder")


def test_a_folder_that_links_to_itself_is_one_line(made: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match="loop"):
        write_index(tmp_path / "loop", FACTS, made.source, batches(made, (15,)))


def test_a_failure_at_the_last_move_leaves_an_empty_folder(made: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "index").mkdir()
    moves, rename = [], Path.rename

    def fails_at_the_manifest(path: Path, target: Path) -> Path:
        moves.append(path.name)
        if path.name == "manifest.json":
            raise OSError("no")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails_at_the_manifest)
    with pytest.raises(UserError, match="cannot be written"):
        write_index(tmp_path / "index", FACTS, made.source, batches(made, (15,)))
    assert (len(moves), moves[-1]) == (3, "manifest.json")
    assert list((tmp_path / "index").iterdir()) == []


def test_a_folder_that_holds_something_is_refused_and_stays_as_it_is(made: SimpleNamespace, folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match="expected a new folder for the index"):
        write_index(folder, FACTS, made.source, batches(made, (15,)))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_writer_refuses_rows_that_do_not_fit_and_files_that_are_not_full(tmp_path: Path) -> None:
    with StreamedTensors(tmp_path / "a", {"x": ("float32", (3, 2))}) as file:
        for rows in (np.zeros((1, 2)), np.zeros((1, 3), np.float32), np.zeros((4, 2), np.float32)):
            with pytest.raises(ValueError, match="do not fit"):
                file.append("x", rows)
        file.append("x", np.zeros((2, 2), np.float32))
        with pytest.raises(ValueError, match="x: 2 of 3 rows"):
            file.finish()


class Slices:
    """Six grey slices by number."""

    names = source(6).names

    def __getitem__(self, key: tuple[int, int]) -> dict[str, torch.Tensor]:
        assert key[0] == 0
        image = torch.from_numpy(np.random.default_rng(key[1]).random((1, SIZE, SIZE), dtype=np.float32))
        return {"image": image, "label": torch.full((SIZE, SIZE), key[1] % 3, dtype=torch.uint8)}


def test_slices_go_through_the_encoder_with_lora_merged_and_come_back_as_it_was(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = build_image_encoder("vit_tiny", SIZE)
    add_encoder_lora(encoder, 2)
    with torch.no_grad():
        for layer in lora_layers(encoder).values():
            for factor in layer.lora_b.values():
                factor.normal_(std=0.2)
    encoder.train()
    merged: list[bool] = []

    def watch(*_: object) -> None:
        merged.append(not encoder.training and all(layer.merged is not None for layer in lora_layers(encoder).values()))

    encoder.register_forward_pre_hook(watch)
    done: list[int] = []
    index = build_index(tmp_path / "index", Slices(), source(6), EncoderExtractor(encoder), CARD, batch_size=4, progress=done.append)
    assert done == [4, 2]
    assert merged == [True, True]
    assert encoder.training
    assert all(layer.merged is None for layer in lora_layers(encoder).values())
    with torch.inference_mode():
        plain = encoder.eval()(torch.stack([Slices()[0, i]["image"] for i in range(6)]).expand(-1, 3, -1, -1))
    memories = index.memories(torch.arange(6))
    torch.testing.assert_close(memories.tokens, plain, rtol=2e-3, atol=2e-3)  # half precision
    assert memories.fractions[:, :, 0, 0].argmax(dim=1).tolist() == [0, 1, 2, 0, 1, 2]
    index.require_fit(CARD, EncoderExtractor(encoder))
    with torch.no_grad():
        next(encoder.parameters())[0] += 1
    with pytest.raises(UserError, match="made with this checkpoint"):
        index.require_fit(CARD, EncoderExtractor(encoder))
