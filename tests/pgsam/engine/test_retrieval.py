"""Retrieval in the forward pass: nothing changes at weight 0, a planted copy is reproduced, and a patient never meets his own slices."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.layout import case_of
from pgsam.engine.predict import segment_slices
from pgsam.engine.retrieval import RagSettings, Retriever, caught_embedding, choose_settings, notes_on_retrieval, open_extractor
from pgsam.errors import UserError
from pgsam.metrics import dice
from pgsam.models.base import SliceModel
from pgsam.retrieval.build import Source, build_index
from pgsam.retrieval.extractor import EncoderExtractor, Extractor
from pgsam.retrieval.index import SliceIndex
from pgsam.retrieval.memory import MemoryAttention
from pgsam.retrieval.prior import EPS
from pgsam.sam.weights import sha256_of
from tests.retrieval_data import CLASSES, PG_SAM, SAMED, SIZE, TRAIN, make_case, make_model, save_model

TOKEN = 16  # pixels


class Slices:
    """Slices in memory, as `build_index` takes them; `patients` by name."""

    def __init__(self, cases: Sequence[str] = tuple(TRAIN)) -> None:
        self.names: list[str] = []
        self.items: list[tuple[np.ndarray, np.ndarray]] = []
        self.patients: dict[str, str] = {}
        for case in cases:
            for z, (image, labels) in enumerate(zip(*make_case(case), strict=True)):
                self.add(f"{case}_slice{z:03d}", TRAIN[case], image, labels)

    def add(self, name: str, patient: str, image: np.ndarray, labels: np.ndarray) -> None:
        self.names.append(name)
        self.items.append((image, labels))
        self.patients[name] = patient

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        image, labels = self.items[key[1]]
        return {"image": torch.from_numpy(image)[None], "label": torch.from_numpy(labels)}

    def index(self, folder: Path, model: SliceModel, extractor: Extractor | None = None) -> SliceIndex:
        source = Source(tuple(self.names), tuple(map(case_of, self.names)), tuple(self.patients[name] for name in self.names))
        return build_index(folder, self, source, extractor or EncoderExtractor(model.image_encoder), model.card, batch_size=3)


def retriever(model: SliceModel, index: SliceIndex, extractor: Extractor | None = None, **settings: Any) -> Retriever:
    chosen = RagSettings(**{"weight": 0.5, "temperature": 0.05, "top_k": 2, **settings})
    return Retriever(model, index, extractor or EncoderExtractor(model.image_encoder), chosen)


def query(case: str = "case0005") -> Tensor:
    return torch.from_numpy(make_case(case)[0])[:, None].expand(-1, 3, -1, -1)


@pytest.mark.parametrize("module", [SAMED, PG_SAM])
@torch.inference_mode()
def test_weight_0_is_the_model_alone_bit_for_bit(tmp_path: Path, module: str) -> None:
    model = make_model(module)
    found = retriever(model, Slices().index(tmp_path / "index", model), weight=0.0).respond_for(None, compare=True)
    own = model(query())
    assert torch.equal(found(model, query(), {}), own["masks"])
    assert np.array_equal(found.own[0], own["masks"].argmax(dim=1).numpy())


@torch.inference_mode()
def test_without_retrieval_is_told_apart_in_the_same_pass(tmp_path: Path) -> None:
    model = make_model()
    responder = retriever(model, Slices().index(tmp_path / "index", model), weight=5.0).respond_for(None, compare=True)
    fused, own = responder(model, query(), {}), model(query())["masks"]
    assert np.array_equal(responder.own[0], own.argmax(dim=1).numpy())
    assert not torch.equal(fused.argmax(dim=1), own.argmax(dim=1))


def test_the_encoder_runs_once_for_a_slice(tmp_path: Path) -> None:
    model = make_model()
    respond = retriever(model, Slices().index(tmp_path / "index", model)).respond_for("ann", compare=True, watch=[0])
    seen: list[int] = []
    model.image_encoder.register_forward_hook(lambda _module, inputs, _output: seen.append(len(inputs[0])))
    segment_slices(model, make_case("case0005", 5)[0], input_size=SIZE, batch_size=2, respond=respond)
    assert seen == [2, 2, 1]


@pytest.mark.parametrize("spatial", [None, 1.5])
@torch.inference_mode()
def test_logits_are_what_the_formula_says(tmp_path: Path, spatial: float | None) -> None:
    """The whole way by loops in float64: neighbours, class prior, sum, upsampling."""
    model, slices = make_model(), Slices()
    responder = retriever(model, slices.index(tmp_path / "index", model), weight=0.7, temperature=0.2, spatial=spatial).respond_for("bob", watch=[1])
    images = query()[:2]
    found = responder(model, images, {})
    stored = model.image_encoder(torch.from_numpy(np.stack([image for image, _ in slices.items]))[:, None].expand(-1, 3, -1, -1)).double().numpy()
    outputs, tokens = model(images), model.image_encoder(images).double().numpy()

    def unit(vector: np.ndarray) -> np.ndarray:
        return vector / np.linalg.norm(vector)

    means = [unit(one.mean(axis=(1, 2))) for one in stored]
    cosines = [unit(tokens[1].mean(axis=(1, 2))) @ mean for mean in means]
    allowed = [i for i, name in enumerate(slices.names) if slices.patients[name] != "bob"]
    nearest = sorted(allowed, key=lambda i: -cosines[i])[:2]
    assert responder.found[1].indices == nearest
    np.testing.assert_allclose(responder.found[1].similarities, [cosines[i] for i in nearest], atol=1e-5)

    side = SIZE // TOKEN
    prior = np.zeros((len(CLASSES) + 1, 4 * side, 4 * side))
    for r in range(side):
        for c in range(side):
            weights, blocks = [], []
            for i in nearest:
                for u in range(side):
                    for v in range(side):
                        score = unit(tokens[1][:, r, c]) @ unit(stored[i][:, u, v]) / 0.2
                        weights.append(score - (0 if spatial is None else ((r - u) ** 2 + (c - v) ** 2) / (2 * spatial**2)))
                        part = slices.items[i][1][TOKEN * u : TOKEN * (u + 1), TOKEN * v : TOKEN * (v + 1)].reshape(4, 4, 4, 4)
                        blocks.append([(part == value).mean(axis=(1, 3)) for value in range(len(CLASSES) + 1)])
            share = np.exp(np.array(weights) - max(weights))
            prior[:, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4] = np.tensordot(share / share.sum(), np.array(blocks), axes=1)
    np.testing.assert_allclose(responder.found[1].prior.numpy(), prior, atol=2e-3)  # tokens are kept in half precision
    fused = outputs["low_res_logits"][1:].double() + 0.7 * torch.log(torch.from_numpy(prior) + EPS)
    expected = F.interpolate(fused, (SIZE, SIZE), mode="bilinear", align_corners=False)
    np.testing.assert_allclose(found[1:].numpy(), expected.numpy(), atol=2e-2)


def ceiling(labels: np.ndarray) -> np.ndarray:
    """What labels [H, W] are after averaging to a quarter, bilinear upsampling and arg-max."""
    shares = F.one_hot(torch.from_numpy(labels).long(), len(CLASSES) + 1).permute(2, 0, 1)[None].float()
    back = F.interpolate(F.avg_pool2d(shares, 4), labels.shape, mode="bilinear", align_corners=False)
    return back.argmax(dim=1)[0].numpy()


def mean_dice(labels: np.ndarray, truth: np.ndarray) -> float:
    return float(np.mean([dice(labels == value, truth == value) for value in range(1, len(CLASSES) + 1)]))


@pytest.mark.parametrize("module", [SAMED, PG_SAM])
def test_a_planted_copy_of_another_patient_is_reproduced(tmp_path: Path, module: str) -> None:
    """RAG-SAM's promise at its simplest: the very slice, labelled, in the index, so that a model that knows nothing draws its labels."""
    model, slices = make_model(module), Slices()
    image, labels = make_case("case0005")
    slices.add("copy_slice000", "someone else", image[2], labels[2])
    index = slices.index(tmp_path / "index", model)
    respond = retriever(model, index, weight=100.0, temperature=1e-3, top_k=1).respond_for("dan", compare=True, watch=[2])
    found = segment_slices(model, image, input_size=SIZE, batch_size=3, respond=respond)
    assert index.names[respond.found[2].indices[0]] == "copy_slice000"
    best, reached = mean_dice(ceiling(labels[2]), labels[2]), mean_dice(found[2], labels[2])
    alone = mean_dice(np.concatenate(respond.own)[2], labels[2])
    print(f"{module}: DSC {alone:.4f} alone, {reached:.4f} with the planted copy, ceiling {best:.4f}")
    assert reached > best - 0.02
    assert alone < 0.5 < best


def test_a_copy_of_the_own_patient_changes_nothing(tmp_path: Path) -> None:
    model, slices = make_model(), Slices()
    image, labels = make_case("case0005")
    settings = {"weight": 100.0, "temperature": 1e-3, "top_k": 1}

    def logits(index: SliceIndex) -> Tensor:
        with torch.inference_mode():
            return retriever(model, index, **settings).respond_for("dan")(model, query(), {})

    without = logits(slices.index(tmp_path / "without", model))
    slices.add("copy_slice000", "dan", image[2], labels[2])
    own = slices.index(tmp_path / "own", model)
    assert torch.equal(logits(own), without)
    slices.patients["copy_slice000"] = "someone else"
    assert not torch.equal(logits(slices.index(tmp_path / "other", model)), without)


@pytest.mark.parametrize("query_case", ["copy", "copy2"])
def test_a_copy_of_the_own_patient_under_another_key_changes_nothing(tmp_path: Path, query_case: str) -> None:
    """The index has another manifest: the patient has another key there, and the same cases, of which the other one stays out too."""
    model, slices = make_model(), Slices()
    image, labels = make_case("case0005")
    settings = {"weight": 100.0, "temperature": 1e-3, "top_k": 1}

    def logits(index: SliceIndex) -> Tensor:
        with torch.inference_mode():
            return retriever(model, index, **settings).respond_for("dan", query_case)(model, query(), {})

    without = logits(slices.index(tmp_path / "without", model))
    slices.add("copy_slice000", "P-0001", image[2], labels[2])
    slices.add("copy2_slice000", "P-0001", image[1], labels[1])
    assert torch.equal(logits(slices.index(tmp_path / "own", model)), without)


def test_watched_slices_are_found_by_their_number_in_the_volume(tmp_path: Path) -> None:
    model, slices = make_model(), Slices(["case0003"])
    respond = retriever(model, slices.index(tmp_path / "index", model), top_k=1).respond_for(None, watch=[1, 3])
    segment_slices(model, make_case("case0003")[0], input_size=SIZE, batch_size=2, respond=respond)
    assert {number: found.indices for number, found in respond.found.items()} == {1: [1], 3: [3]}


@torch.inference_mode()
def test_too_few_slices_of_others(tmp_path: Path) -> None:
    model = make_model()
    respond = retriever(model, Slices(["case0003"]).index(tmp_path / "index", model)).respond_for("bob")
    with pytest.raises(UserError, match=r"--top_k 2: expected at most 0.*own patient bob"):
        respond(model, query(), {})


def test_an_index_of_another_model_is_refused(tmp_path: Path) -> None:
    index = Slices().index(tmp_path / "index", make_model(seed=0))
    with pytest.raises(UserError, match=r"expected an index made with this checkpoint"):
        retriever(make_model(seed=1), index)


class MeanColour:
    """Tokens of two channels that a test can see through: mean and greatest brightness of each patch."""

    name, identity, dim, grid = "dinov2", "by rule", 2, SIZE // TOKEN

    def __call__(self, images: Tensor) -> Tensor:
        grey = images[:, :1]
        return torch.cat([F.avg_pool2d(grey, TOKEN), F.max_pool2d(grey, TOKEN)], dim=1)


@torch.inference_mode()
def test_another_extractor_reads_the_images(tmp_path: Path) -> None:
    model, slices = make_model(), Slices()
    index = slices.index(tmp_path / "index", model, MeanColour())
    responder = retriever(model, index, MeanColour(), top_k=1).respond_for(None, watch=range(4))
    responder(model, query("case0003"), {})
    assert [index.names[responder.found[z].indices[0]] for z in range(4)] == [f"case0003_slice{z:03d}" for z in range(4)]
    with pytest.raises(UserError, match="--dino"):
        open_extractor(None, index, model)
    with pytest.raises(UserError, match="leave it out"):
        open_extractor(tmp_path, Slices().index(tmp_path / "own", model), model)


@torch.inference_mode()
def test_a_trained_memory_recalls_the_same_neighbours(tmp_path: Path) -> None:
    model = make_model()
    index = Slices().index(tmp_path / "index", model)
    alone = model(query())["masks"]
    with torch.inference_mode(False):
        model.rag = MemoryAttention(EncoderExtractor(model.image_encoder).dim, len(CLASSES)).eval()
        for parameter in model.rag.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    responder = retriever(model, index, weight=0.0).respond_for("bob", compare=True, watch=[0])
    found = responder(model, query(), {})
    assert model.rag is not None
    assert np.array_equal(responder.own[0], alone.argmax(dim=1).numpy())
    hits = index.nearest(torch.nn.functional.normalize(model.image_encoder(query()).mean(dim=(2, 3)), dim=-1), 2, "bob")
    expected = model(query(), recall=lambda _embedding: index.memories(hits.indices))["masks"]
    assert torch.equal(found, expected)
    assert not torch.equal(found, alone)
    assert responder.found[0].indices == hits.indices[0].tolist()


def test_the_hook_is_gone_afterwards() -> None:
    model = make_model()
    with caught_embedding(model) as caught:
        embedding = model.image_encoder(query()[:1])
    assert torch.equal(caught[0], embedding)
    model.image_encoder(query()[:1])
    assert len(caught) == 1


# --- settings ---------------------------------------------------------------------------------------------------------------------------------


IDENTITY = "index by rule"


def flags(checkpoint: Path, index: Path, **given: Any) -> argparse.Namespace:
    nothing = dict.fromkeys(("rag_weight", "rag_temperature", "top_k", "rag_spatial"))
    return argparse.Namespace(**{**nothing, "checkpoint": checkpoint, "index": index, **given})


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    """A checkpoint, and an index folder with what tune_rag.py writes."""
    checkpoint = save_model(tmp_path / "model.safetensors")
    chosen = {"weight": 0.3, "temperature": 0.02, "top_k": 7, "spatial": 2.0}
    said = {"format": 1, "checkpoint_sha256": sha256_of(checkpoint), "how": "val_list", "biased": False, "patients": ["zoe"], "chosen": chosen}
    said.update(cases=["case0009"], index_identity=IDENTITY)
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "tuned.json").write_text(json.dumps(said))
    return checkpoint


def test_tuned_settings_are_taken_and_flags_go_before_them(tuned: Path) -> None:
    index, model = tuned.parent / "index", make_model()
    settings, source = choose_settings(flags(tuned, index), model, IDENTITY)
    assert settings == RagSettings(0.3, 0.02, 7, 2.0)
    assert source["tuned"] == {"how": "val_list", "biased": False, "patients": ["zoe"], "cases": ["case0009"]}
    settings, source = choose_settings(flags(tuned, index, rag_weight=1.0), model, IDENTITY)
    assert settings == RagSettings(1.0, 0.02, 7, 2.0)
    assert source["given"] == ["weight"]


def test_weight_and_temperature_need_no_tuning(tmp_path: Path) -> None:
    settings, _ = choose_settings(flags(tmp_path / "absent", tmp_path, rag_weight=0.0, rag_temperature=0.1), make_model(), IDENTITY)
    assert settings == RagSettings(0.0, 0.1, 5, None)


def test_a_trained_memory_has_its_own_settings(tmp_path: Path) -> None:
    model = make_model(options={"rag": {"top_k": 3}})
    model.rag = MemoryAttention(EncoderExtractor(model.image_encoder).dim, len(CLASSES))
    alone, _ = choose_settings(flags(tmp_path / "m", tmp_path), model, IDENTITY)
    assert (alone.weight, alone.top_k) == (0.0, 3)
    assert choose_settings(flags(tmp_path / "m", tmp_path, top_k=2), model, IDENTITY)[0].top_k == 2
    assert choose_settings(flags(tmp_path / "m", tmp_path, rag_weight=1.0, rag_temperature=0.1), model, IDENTITY)[0] == RagSettings(1.0, 0.1, 3)
    with pytest.raises(UserError, match="takes both --rag_weight and --rag_temperature"):
        choose_settings(flags(tmp_path / "m", tmp_path, rag_weight=1.0), model, IDENTITY)


def test_settings_that_nobody_chose_are_refused(tuned: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tune_rag\.py"):
        choose_settings(flags(tuned, tmp_path / "elsewhere", rag_weight=1.0), make_model(), IDENTITY)
    other = save_model(tmp_path / "other.safetensors", seed=1)
    with pytest.raises(UserError, match=r"was tuned for the checkpoint with sha256"):
        choose_settings(flags(other, tuned.parent / "index"), make_model(), IDENTITY)


@pytest.mark.parametrize("text", ["{", "{}", "[]", "1", '{"format": 2}', '{"format": 1, "chosen": {"weight": 1}}', '{"format": 1, "chosen": [1]}'])
def test_damaged_tuning_is_refused(tuned: Path, text: str) -> None:
    (tuned.parent / "index" / "tuned.json").write_text(text)
    with pytest.raises(UserError, match=r"tuned\.json: expected what scripts/tune_rag\.py writes"):
        choose_settings(flags(tuned, tuned.parent / "index"), make_model(), IDENTITY)


@pytest.mark.parametrize(
    "changed",
    [
        {"weight": -1},
        {"weight": 1e9},
        {"weight": True},
        {"weight": "2"},
        {"weight": float("nan")},
        {"temperature": 0},
        {"temperature": 1e-9},
        {"top_k": 2.0},
        {"top_k": 0},
        {"top_k": True},
        {"spatial": 0},
        {"spatial": "none"},
    ],
)
def test_tuned_values_of_another_kind_are_refused(tuned: Path, changed: dict[str, Any]) -> None:
    path = tuned.parent / "index" / "tuned.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps({**said, "chosen": {**said["chosen"], **changed}}))
    with pytest.raises(UserError, match=r"tuned\.json: expected what scripts/tune_rag\.py writes"):
        choose_settings(flags(tuned, tuned.parent / "index"), make_model(), IDENTITY)


def test_settings_tuned_on_another_index_are_refused(tuned: Path) -> None:
    index = tuned.parent / "index"
    with pytest.raises(UserError, match=r"was tuned for the index with sha256 index by rul.* has another ind"):
        choose_settings(flags(tuned, index), make_model(), "another index")
    by_hand = flags(tuned, index, rag_weight=1.0, rag_temperature=0.1)
    assert choose_settings(by_hand, make_model(), "another index")[0] == RagSettings(1.0, 0.1, 5, None)


def test_what_is_not_given_is_as_tuned(tuned: Path) -> None:
    """Of weight and temperature both by hand too; `none` is given."""
    index, both = tuned.parent / "index", {"rag_weight": 1.0, "rag_temperature": 0.1}
    settings, source = choose_settings(flags(tuned, index, **both), make_model(), IDENTITY)
    assert settings == RagSettings(1.0, 0.1, 7, 2.0)
    assert source["given"] == ["temperature", "weight"]
    assert choose_settings(flags(tuned, index, **both, rag_spatial="none"), make_model(), IDENTITY)[0] == RagSettings(1.0, 0.1, 7, None)
    assert choose_settings(flags(tuned, index, rag_spatial="none"), make_model(), IDENTITY)[0] == RagSettings(0.3, 0.02, 7, None)


def test_no_weight_needs_no_tuning(tmp_path: Path) -> None:
    """Nor is it an error of a checkpoint with a memory, which then recalls as in training."""
    model = make_model(options={"rag": {"top_k": 3}})
    assert choose_settings(flags(tmp_path / "absent", tmp_path, rag_weight=0.0), model, IDENTITY)[0].weight == 0
    model.rag = MemoryAttention(EncoderExtractor(model.image_encoder).dim, len(CLASSES))
    settings, _ = choose_settings(flags(tmp_path / "absent", tmp_path, rag_weight=0.0), model, IDENTITY)
    assert (settings.weight, settings.top_k) == (0, 3)


@torch.inference_mode()
def test_no_weight_needs_no_neighbours(tmp_path: Path) -> None:
    """bob's own slices are all there is; of anybody else's query all four are drawn."""
    model = make_model()
    found = retriever(model, Slices(["case0003"]).index(tmp_path / "index", model), weight=0.0, top_k=99)
    own = found.respond_for("bob", watch=[0])
    assert torch.equal(own(model, query(), {}), model(query())["masks"])
    assert own.found == {}
    other = found.respond_for("dan", watch=[0])
    other(model, query(), {})
    assert len(other.found[0].indices) == 4


def test_what_is_by_hand_is_said() -> None:
    said = {"top_k": 5, "slices": 10, "patients": 2, "weight": 0.1, "temperature": 0.1, "spatial": None, "settings_from": "tuned.json"}
    notes = notes_on_retrieval({**said, "tuned": {"biased": True}, "given": ["top_k", "weight"]})
    assert notes[0].endswith("(tuned.json; by hand: top_k, weight)")
    assert not any("biased" in note for note in notes)
    assert any("biased" in note for note in notes_on_retrieval({**said, "tuned": {"biased": True}, "given": ["top_k"]}))


def test_results_say_that_a_weight_is_biased() -> None:
    said = {"top_k": 5, "slices": 10, "patients": 2, "weight": 0.1, "temperature": 0.1, "spatial": None, "settings_from": "tuned.json"}
    assert not any("biased" in note for note in notes_on_retrieval({**said, "tuned": {"biased": False}}))
    assert any("biased to 0" in note for note in notes_on_retrieval({**said, "tuned": {"biased": True}}))
    assert notes_on_retrieval(None) == []
