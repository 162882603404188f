"""What is written comes back, from the right files only; damage is named; the training state survives a crash while it is written."""

import dataclasses
import json
import os
import pickle
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pgsam import build_model, load_model
from pgsam.engine.checkpoint import load_training_state, read_card, save_release, save_training_state, start_from
from pgsam.errors import UserError
from pgsam.models.base import SliceModel
from pgsam.models.card import FORMAT, ModelCard
from pgsam.models.samed import SAMED, SAMED_S, to_samed_state
from pgsam.sam.weights import sha256_of

SIZE, SAM_SIZE = 64, 128  # the files in Meta's layout are for a larger image, as the real ones
NAMES = ("liver", "spleen", "aorta", "left kidney")
CARD = ModelCard(SAMED, "vit_tiny", SIZE, 56, NAMES)


def build(module: str = SAMED, *, seed: int = 0, img_size: int = SIZE, num_classes: int = len(NAMES), **options: Any) -> SliceModel:
    torch.manual_seed(seed)
    return build_model(module, vit_name="vit_tiny", img_size=img_size, num_classes=num_classes, verbose=False, **options)


def stir(model: SliceModel) -> SliceModel:
    """Moves every trained parameter, as training would."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def outputs(model: SliceModel) -> dict[str, Tensor]:
    torch.manual_seed(5)
    with torch.no_grad():
        return model(torch.rand(2, 3, model.img_size, model.img_size))


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def load(path: Path, **flags: Any) -> SliceModel:
    return load_model(path, device="cpu", verbose=False, **flags)


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def sam_file(folder: Path, seed: int) -> Path:
    """A file in the layout of Meta's: three masks and the "whole" token, image of 128 px."""
    path = folder / f"sam_{seed}.pth"
    torch.save(build(seed=seed, img_size=SAM_SIZE, num_classes=3, tune="full").state_dict(), path)
    return path


@pytest.fixture(scope="module")
def sam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sam_file(tmp_path_factory.mktemp("sam"), 100)


@pytest.fixture(scope="module")
def other_sam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sam_file(tmp_path_factory.mktemp("sam"), 101)


@pytest.fixture(scope="module", params=[SAMED, SAMED_S])
def trained(request: pytest.FixtureRequest, sam: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SliceModel]:
    """A release file of a model that started from a SAM file, and the model."""
    model = stir(build(request.param, ckpt=sam))
    path = tmp_path_factory.mktemp("run") / "final.safetensors"
    save_release(path, model, dataclasses.replace(CARD, module=request.param, sam_sha256=sha256_of(sam)))
    return path, model


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("complete") / "model.safetensors"
    save_release(path, stir(build()), CARD)
    return path


@pytest.fixture
def release(complete: Path, tmp_path: Path) -> Path:
    """A release file, to be damaged, of a model that started from random numbers; its tensors are all in it."""
    return Path(shutil.copy(complete, tmp_path / "model.safetensors"))


# --- release files ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("module", "options"), [(SAMED, {}), (SAMED_S, {}), (SAMED, {"tune": "full"}), (SAMED, {"lora_blocks": [0, 5]})])
def test_without_a_sam_file_every_tensor_is_saved(tmp_path: Path, module: str, options: dict) -> None:
    model = stir(build(module, **options))
    save_release(tmp_path / "a.safetensors", model, dataclasses.replace(CARD, module=module, options=options))
    assert load_file(tmp_path / "a.safetensors").keys() == model.state_dict().keys()
    back = load(tmp_path / "a.safetensors")
    assert same(back.state_dict(), model.state_dict())
    assert same(outputs(back), outputs(model))
    assert not back.training
    assert [name for name, p in back.named_parameters() if p.requires_grad] == [name for name, p in model.named_parameters() if p.requires_grad]


def test_with_a_sam_file_only_what_was_trained_is_saved(trained: tuple[Path, SliceModel], sam: Path) -> None:
    path, model = trained
    saved = load_file(path)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen
    assert saved.keys() == model.state_dict().keys() - frozen
    assert not any(name.startswith("image_encoder.") and ".lora_" not in name for name in saved)
    back = load(path, ckpt=sam)
    assert same(back.state_dict(), model.state_dict())
    assert same(outputs(back), outputs(model))


def test_the_sam_file_of_the_training_is_needed(trained: tuple[Path, SliceModel], sam: Path, other_sam: Path, tmp_path: Path) -> None:
    path = trained[0]
    with pytest.raises(UserError, match=rf"needs the SAM file .*{sha256_of(sam)}.*--ckpt") as error:
        load(path)
    assert str(error.value).startswith(f"{path}: holds the trained tensors only")
    with pytest.raises(UserError, match=rf"expected .*{sha256_of(sam)}.*found sha256 {sha256_of(other_sam)}.*--allow_other_base") as error:
        load(path, ckpt=other_sam)
    assert str(error.value).startswith(f"{other_sam}: ")
    with pytest.raises(UserError, match=r"nowhere\.pth: expected .*found no such file"):
        load(path, ckpt=tmp_path / "nowhere.pth")


def test_another_sam_file_can_be_allowed(trained: tuple[Path, SliceModel], other_sam: Path) -> None:
    path, model = trained
    back = load(path, ckpt=other_sam, allow_other_base=True)
    assert not same(outputs(back), outputs(model))
    state, base = back.state_dict(), torch.load(other_sam, weights_only=True)
    assert torch.equal(state["image_encoder.blocks.0.mlp.lin1.weight"], base["image_encoder.blocks.0.mlp.lin1.weight"])
    assert all(torch.equal(state[name], value) for name, value in load_file(path).items())


def test_a_larger_image_takes_the_positions_of_the_sam_file(trained: tuple[Path, SliceModel], sam: Path) -> None:
    back = load(trained[0], ckpt=sam, img_size=SAM_SIZE)
    base, state = torch.load(sam, weights_only=True), back.state_dict()
    for name, value in base.items():
        if name.endswith("pos_embed") or ".rel_pos_" in name:  # nothing was resized twice
            assert torch.equal(state[name], value), name
    assert outputs(back)["masks"].shape == (2, 5, SAM_SIZE, SAM_SIZE)
    assert back.img_size == back.card.img_size == SAM_SIZE


def test_another_image_size_resizes_the_positions(release: Path) -> None:
    before, back = load_file(release), load(release, img_size=96, input_size=80)
    state = back.state_dict()
    resized = F.interpolate(before["image_encoder.pos_embed"].permute(0, 3, 1, 2), (6, 6), mode="bilinear", align_corners=False)
    torch.testing.assert_close(state["image_encoder.pos_embed"], resized.permute(0, 2, 3, 1))
    for block in (2, 5):  # global attention: 2 * 4 - 1 = 7 positions become 2 * 6 - 1 = 11
        name = f"image_encoder.blocks.{block}.attn.rel_pos_w"
        torch.testing.assert_close(state[name], F.interpolate(before[name].T[None], 11, mode="linear", align_corners=False)[0].T)
    changed = {name for name in state if state[name].shape != before[name].shape}
    assert changed == {"image_encoder.pos_embed", *(f"image_encoder.blocks.{b}.attn.rel_pos_{a}" for b in (2, 5) for a in "hw")}
    assert all(torch.equal(state[name], before[name]) for name in state if name not in changed)
    assert (back.img_size, back.card.img_size, back.card.input_size) == (96, 96, 80)
    assert outputs(back)["masks"].shape == (2, 5, 96, 96)


# --- the card -----------------------------------------------------------------------------------------------------------------------------

FULL_CARD = ModelCard(
    SAMED,
    "vit_tiny",
    SIZE,
    56,
    NAMES,
    rank=3,
    orientation="RPI",
    image_kind="percentile",
    window=None,
    class_tokens="learned",
    text_encoder="an encoder",
    reports_hash="0123",
    options={"lora_blocks": [1, 2], "tune": "lora"},
    dataset="Synapse",
    training_cases=("case0005", "case0006"),
    training_patients=(),
    sam_sha256=None,
)


@pytest.mark.parametrize("card", [CARD, FULL_CARD, dataclasses.replace(CARD, window=(-160.0, 240.0), training_cases=("é",), sam_sha256="ab")])
def test_every_field_of_a_card_comes_back(card: ModelCard) -> None:
    assert ModelCard.from_json(card.to_json(), "file") == card
    assert card.num_classes == 4


def test_the_card_is_in_the_file_and_on_the_model(tmp_path: Path) -> None:
    model = build(rank=3, lora_blocks=[1, 2])
    save_release(tmp_path / "a.safetensors", model, FULL_CARD)
    card = read_card(tmp_path / "a.safetensors")
    assert dataclasses.replace(card, git_commit=None) == FULL_CARD
    back = load(tmp_path / "a.safetensors")
    assert back.card == card
    assert back.class_names == NAMES
    assert json.loads(metadata_of(tmp_path / "a.safetensors")["pgsam"])["orientation"] == "RPI"  # plain JSON, for other programs


def test_fields_of_a_later_version_of_the_same_format_are_passed_over() -> None:
    fields = {**json.loads(CARD.to_json()), "a_new_field": 1}
    assert ModelCard.from_json(json.dumps(fields), "file") == CARD


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": FORMAT + 1}, rf"written in format {FORMAT + 1}, this version reads up to {FORMAT}; update PG-SAM"),
        ({"module": "of_next_year"}, r"expected a module .*found of_next_year"),
        ({"vit_name": "vit_x"}, r"expected .*ViT .*found .*vit_x"),
        ({"format": "two"}, r"expected a PG-SAM model card"),
        ({"class_names": None}, r"expected a PG-SAM model card"),
    ],
)
def test_cards_that_are_refused(release: Path, change: dict, words: str) -> None:
    fields = {**json.loads(metadata_of(release)["pgsam"]), **change}
    fields = {key: value for key, value in fields.items() if value is not None}
    save_file(load_file(release), release, metadata={"pgsam": json.dumps(fields)})
    for read in (read_card, load):
        with pytest.raises(UserError, match=words) as error:
            read(release)
        assert str(error.value).startswith(f"{release}: ")


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "3", "null", '{"module": "sam_lora_image_encoder"}'])
def test_damaged_cards(release: Path, text: str) -> None:
    save_file(load_file(release), release, metadata={"pgsam": text})
    with pytest.raises(UserError, match="expected a PG-SAM model card"):
        load(release)


# --- damaged release files ----------------------------------------------------------------------------------------------------------------


def test_a_file_without_a_card(release: Path) -> None:
    for metadata in (None, {"format": "pt"}):
        save_file(load_file(release), release, metadata=metadata)
        with pytest.raises(UserError, match=r"expected a checkpoint written by PG-SAM, found a \.safetensors without a model card"):
            load(release)


def test_a_truncated_file(release: Path) -> None:
    raw = release.read_bytes()
    for length in (1, 7, 8, 100, 2000, len(raw) // 2, len(raw) - 1):
        release.write_bytes(raw[:length])
        for read in (read_card, load):
            with pytest.raises(UserError, match="damaged or truncated") as error:
                read(release)
            assert str(error.value).startswith(f"{release}: ")


def test_a_pickle_by_that_name(release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    release.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UserError, match="damaged or truncated"):
        load(release)
    assert not Path("trap").exists()


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    metadata = metadata_of(path)
    save_file(change(load_file(path)), path, metadata=metadata)


@pytest.mark.parametrize("number", [1, 7])
def test_unknown_missing_and_misshapen_tensors_are_named(release: Path, number: int) -> None:
    """The first five, in order; the number of them says whether there are more."""
    names = sorted(load_file(release))[10 : 10 + number]
    original = release.read_bytes()

    def message() -> str:
        with pytest.raises(UserError) as error:
            load(release)
        release.write_bytes(original)
        assert str(error.value).startswith(f"{release}: ")
        return str(error.value)

    rewrite(release, lambda state: {name: value for name, value in state.items() if name not in names})
    assert f"{number} are absent: {', '.join(names[:5])};" in message()
    rewrite(release, lambda state: {name: torch.cat([v, v]) if name in names else v for name, v in state.items()})
    assert f"{number} are of another shape: {', '.join(names[:5])};" in message()
    rewrite(release, lambda state: state | {f"{name}.extra": state[name].clone() for name in names})
    assert f"{number} are unknown: {', '.join(f'{name}.extra' for name in names[:5])};" in message()


def test_a_trained_tensor_is_never_taken_from_the_sam_file(trained: tuple[Path, SliceModel], sam: Path, tmp_path: Path) -> None:
    """The SAM file holds tensors of the same names and shapes, which would fit."""
    in_both = sorted(load_file(trained[0]).keys() & torch.load(sam, weights_only=True).keys())
    lost = [name for name in in_both if name.startswith(("mask_decoder.output_upscaling", "prompt_encoder.no_mask"))]
    assert len(lost) > 4
    path = tmp_path / "a.safetensors"
    path.write_bytes(trained[0].read_bytes())
    rewrite(path, lambda state: {name: value for name, value in state.items() if name not in lost})
    with pytest.raises(UserError, match=rf"{len(lost)} are absent: {', '.join(lost[:5])}"):
        load(path, ckpt=sam)


def test_a_sam_file_that_lacks_a_frozen_tensor(trained: tuple[Path, SliceModel], sam: Path, tmp_path: Path) -> None:
    state = torch.load(sam, weights_only=True)
    del state["image_encoder.blocks.3.attn.proj.bias"]
    torch.save(state, tmp_path / "sam.pth")
    with pytest.raises(UserError, match=r"image_encoder\.blocks\.3\.attn\.proj\.bias"):
        load(trained[0], ckpt=tmp_path / "sam.pth", allow_other_base=True)


def test_a_full_disk_is_one_line_and_leaves_no_half_a_file(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = release.read_bytes()
    model = build(seed=3)
    with full_disk(100_000), pytest.raises(UserError, match="cannot be written"):
        save_release(release, model, CARD)
    assert release.read_bytes() == before
    assert list(release.parent.iterdir()) == [release]


# --- SAMed's files ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [SAMED, SAMED_S])
def test_samed_files_are_recognised(tmp_path: Path, sam: Path, module: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = stir(build(module, ckpt=sam, rank=2))
    torch.save(to_samed_state(model), tmp_path / "epoch_159.pth")
    card = read_card(tmp_path / "epoch_159.pth")
    assert (card.module, card.vit_name, card.rank, card.num_classes) == (module, "vit_tiny", 2, 4)
    assert (card.img_size, card.input_size, card.window, card.orientation) == (512, 224, (-125.0, 275.0), "LAS")  # what they do not say
    back = load_model(tmp_path / "epoch_159.pth", ckpt=sam, img_size=SIZE, device="cpu")
    assert same(outputs(back), outputs(model))
    told = capsys.readouterr().out
    for words in ("img_size 64", "input_size 224", "(-125.0, 275.0) HU", "LAS"):
        assert words in told
    with pytest.raises(UserError, match="needs the SAM file"):
        load(tmp_path / "epoch_159.pth", img_size=SIZE)


def test_a_sam_file_is_no_checkpoint(sam: Path) -> None:
    with pytest.raises(UserError, match=r"expected SAMed's \.pth .*found an official SAM file \(vit_tiny\); give it as --ckpt"):
        load(sam)


# --- training on --------------------------------------------------------------------------------------------------------------------------


def test_training_goes_on_from_trained_tensors(trained: tuple[Path, SliceModel], sam: Path) -> None:
    path, model = trained
    card = read_card(path)
    fresh = build(card.module, seed=9, ckpt=sam)
    start_from(fresh, path, card)
    assert same(fresh.state_dict(), model.state_dict())


def test_frozen_tensors_stay_those_of_the_runs_sam_file(release: Path, sam: Path) -> None:
    """A checkpoint from a random start holds an encoder of its own, which the new run's checkpoint would not hold."""
    fresh = build(seed=9, ckpt=sam)
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    start_from(fresh, release, dataclasses.replace(CARD, sam_sha256=sha256_of(sam)))
    saved = load_file(release)
    frozen = {name for name, parameter in fresh.named_parameters() if not parameter.requires_grad}
    assert any(not torch.equal(before[name], saved[name]) for name in frozen)
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, before[name] if name in frozen else saved[name]), name


def test_a_random_start_takes_every_tensor(release: Path, trained: tuple[Path, SliceModel]) -> None:
    fresh = build(seed=9)
    start_from(fresh, release, CARD)
    assert same(fresh.state_dict(), load_file(release))
    module = read_card(trained[0]).module  # a file without the frozen tensors leaves the encoder at random: senseless
    with pytest.raises(UserError, match=r"does not fit this run, \d+ tensors are absent: image_encoder"):
        start_from(build(module), trained[0], dataclasses.replace(CARD, module=module))


def test_training_goes_on_from_a_samed_file_and_at_another_size(tmp_path: Path, sam: Path, trained: tuple[Path, SliceModel]) -> None:
    path, model = trained
    card = dataclasses.replace(read_card(path), img_size=96)
    torch.save(to_samed_state(model), tmp_path / "epoch_159.pth")
    for file in (path, tmp_path / "epoch_159.pth"):
        fresh = build(card.module, seed=9, ckpt=sam, img_size=96)
        start_from(fresh, file, card)
        state = fresh.state_dict()
        assert all(torch.equal(state[name], value) for name, value in load_file(path).items())


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        ({"module": SAMED_S}, {"module": SAMED_S}, f"expected module {SAMED_S} as in this run, found {SAMED}"),
        ({"rank": 2}, {"rank": 2}, "expected rank 2 as in this run, found 4"),
        ({"class_names": ("liver",)}, {"num_classes": 1}, "expected num_classes 1 as in this run, found 4"),
        ({}, {"lora_blocks": [0]}, r"tensors are unknown: image_encoder\.blocks\.1\.attn\.qkv\.lora_a"),
        ({}, {"tune": "full"}, r"tensors are unknown: image_encoder\.blocks\.0\.attn\.qkv\.lora_a"),
    ],
)
def test_other_runs_are_refused(release: Path, change: dict, options: dict, words: str) -> None:
    model = build(**{"module": SAMED, **options})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=words) as error:
        start_from(model, release, dataclasses.replace(CARD, **change))
    assert str(error.value).startswith(f"{release}: ")
    assert same(model.state_dict(), before)


@pytest.mark.parametrize(
    ("module", "one", "other", "words"),
    [
        ("sam_adapter", {}, {"depth_slices": 1}, None),
        ("sam_adapter", {"adapter_start": "published"}, {}, None),
        ("sam_adapter", {"adapter_start": "zero"}, {"adapter_start": "published", "depth_slices": None}, None),
        ("sam_promptable", {"tune": "lora", "prompt": "click", "channels": ["cup"]}, {"prompt": "none", "channels": ("cup",)}, None),
        (SAMED, {"tune": "full"}, {}, "expected tune lora as in this run, found full"),
        ("sam_promptable", {"channels": ["cup"]}, {}, r"expected channels None as in this run, found \['cup'\]"),
        ("pg_sam", {"aligner": "none", "refine_steps": 2}, {"aligner": "none"}, "expected refine_steps 3 as in this run, found 2"),
        ("pg_sam", {"aligner": "none", "text_lora": 0, "slice_text": False}, {"aligner": "none", "fusion": "gated"}, None),
    ],
)
def test_options_that_mean_the_same_are_the_same(tmp_path: Path, module: str, one: dict, other: dict, words: str | None) -> None:
    """What a card leaves out is the default; how adapters started and how a model was asked say nothing of its tensors."""
    path, rank = tmp_path / "model.safetensors", None if module == "sam_adapter" else 4
    settings = {name: value for name, value in one.items() if name not in ("prompt", "text_lora")}
    model = build(module, **settings)
    base = dataclasses.replace(CARD, module=module, rank=rank)
    save_release(path, model, dataclasses.replace(base, options=one))
    card = dataclasses.replace(base, options=other)
    if words is None:
        start_from(model, path, card)
        return
    with pytest.raises(UserError, match=words):
        start_from(model, path, card)


def test_a_misshapen_tensor_to_start_from(release: Path) -> None:
    rewrite(release, lambda state: state | {"mask_decoder.iou_token.weight": torch.zeros(2, 128)})
    with pytest.raises(UserError, match=r"1 tensors are of another shape: mask_decoder\.iou_token\.weight"):
        start_from(build(), release, CARD)


# --- the training state -------------------------------------------------------------------------------------------------------------------


class Trap:
    """Unpickling it makes a file in the working folder."""

    def __reduce__(self) -> tuple:
        return open, ("trap", "w")


class full_disk:
    """No file may grow beyond so many bytes: what a full disk does to a writer."""

    def __init__(self, free: int) -> None:
        self.free = free

    def __enter__(self) -> None:
        self.limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        self.handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.free, self.limits[1]))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.limits)
        signal.signal(signal.SIGXFSZ, self.handler)


def state(epoch: int) -> dict:
    return {"epochs_done": epoch, "model": {"weight": torch.full((4,), float(epoch))}, "card": "{}", "nested": [1, (2.0, None, "x")]}


def epochs_in(folder: Path) -> dict[str, int]:
    return {path.name: load_training_state(path)["epochs_done"] for path in sorted(folder.iterdir())}


def test_the_state_before_is_kept(tmp_path: Path) -> None:
    save_training_state(tmp_path, state(1))
    assert epochs_in(tmp_path) == {"last.pt": 1}
    save_training_state(tmp_path, state(2))
    assert epochs_in(tmp_path) == {"last.pt": 2, "prev.pt": 1}
    save_training_state(str(tmp_path), state(3))
    assert epochs_in(tmp_path) == {"last.pt": 3, "prev.pt": 2}
    back = load_training_state(tmp_path / "last.pt")
    assert back.keys() == state(3).keys()
    assert torch.equal(back["model"]["weight"], torch.full((4,), 3.0))
    assert back["nested"] == [1, (2.0, None, "x")]


def test_a_new_state_takes_the_old_ones_place_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever a name changes hands, one whole state can be read, and what is written to is neither."""
    save_training_state(tmp_path, state(1))
    save_training_state(tmp_path, state(2))
    seen = []
    replace, save = os.replace, torch.save

    def watched_replace(source: object, target: object) -> None:
        replace(source, target)
        whole = [load_training_state(tmp_path / name)["epochs_done"] for name in ("last.pt", "prev.pt") if (tmp_path / name).exists()]
        seen.append(max(whole))

    def watched_save(content: object, path: Path) -> None:
        assert Path(path).name not in ("last.pt", "prev.pt")
        assert Path(path).parent == tmp_path
        save(content, path)

    monkeypatch.setattr(os, "replace", watched_replace)
    monkeypatch.setattr(torch, "save", watched_save)
    save_training_state(tmp_path, state(3))
    assert seen
    assert min(seen) >= 2


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("enforce fail"), KeyboardInterrupt()], ids=repr)
def test_a_failure_while_writing_leaves_the_old_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    save_training_state(tmp_path, state(1))
    save_training_state(tmp_path, state(2))

    def half(content: object, path: Path) -> None:
        Path(path).write_bytes((tmp_path / "last.pt").read_bytes()[:500])
        raise error

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else UserError) as caught:
        save_training_state(tmp_path, state(3))
    if isinstance(caught.value, UserError):
        assert str(caught.value).startswith(f"{tmp_path / 'last.pt'}: cannot be written")
    assert epochs_in(tmp_path) == {"last.pt": 2, "prev.pt": 1}


def test_a_full_disk_leaves_the_old_state(tmp_path: Path) -> None:
    save_training_state(tmp_path, state(1))
    with full_disk(50_000), pytest.raises(UserError, match=r"last\.pt: cannot be written"):
        save_training_state(tmp_path, {"epochs_done": 2, "model": torch.zeros(100_000)})
    assert epochs_in(tmp_path) == {"last.pt": 1}


def test_code_in_a_state_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"epochs_done": 1, "model": Trap()}, tmp_path / "last.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Trap()))
    for name in ("last.pt", "raw.pt"):
        with pytest.raises(UserError, match=f"{name}: expected a training state"):
            load_training_state(tmp_path / name)
    assert not Path("trap").exists()


def test_damaged_states(tmp_path: Path) -> None:
    save_training_state(tmp_path, state(1))
    raw = (tmp_path / "last.pt").read_bytes()
    for content in (raw[: len(raw) // 2], raw[:-30], b"garbage" * 9, b""):
        (tmp_path / "last.pt").write_bytes(content)
        with pytest.raises(UserError, match=r"last\.pt: expected a training state, found"):
            load_training_state(tmp_path / "last.pt")
    with pytest.raises(UserError, match="no such file"):
        load_training_state(tmp_path / "nowhere.pt")


def test_a_start_from_another_sam_file_is_refused(trained: tuple[Path, SliceModel]) -> None:
    """LoRA factors are differences to the weights they were trained on."""
    path, model = trained
    card = read_card(path)
    start_from(model, path, card)
    with pytest.raises(UserError, match=rf"was trained on the SAM file with sha256 {card.sam_sha256}, this run's --ckpt has 0"):
        start_from(model, path, dataclasses.replace(card, sam_sha256="0" * 64))
