from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pgsam import build_model
from pgsam.engine.predict import segment_slices
from pgsam.losses import SegmentationLoss
from pgsam.models.pg_sam import PGSam, expected_iou, replace_reports
from pgsam.models.samed import SAMED
from pgsam.prior.organ_reports import builtin_reports
from pgsam.tuning.trainable import trainable_count

ORGANS = ("spleen", "right kidney", "left kidney", "gallbladder", "liver", "stomach", "aorta", "pancreas")
GATES = ("aligner_gate", "fusion.gate", "refiner.step_size")


def build(img_size: int = 64, **options: object) -> PGSam:
    torch.manual_seed(0)
    model = build_model("pg_sam", vit_name="vit_tiny", img_size=img_size, verbose=False, **options)  # type: ignore[arg-type]
    assert isinstance(model, PGSam)
    return model


def opened(model: PGSam) -> PGSam:
    """The model with its gates open, as training opens them: what the parts say reaches the logits."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in GATES:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            if name.startswith("fusion.align.offsets"):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def images(count: int = 2, size: int = 64) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(2))


def run(model: nn.Module, *inputs: object) -> dict:
    with torch.no_grad():
        return model.eval()(*inputs)


def count_calls(module: nn.Module) -> list[int]:
    calls: list[int] = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


# --- equal to SAMed at the start ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [64, 96])
def test_with_gates_at_their_start_it_is_samed(size: int) -> None:
    samed = build_model(SAMED, vit_name="vit_tiny", img_size=size, verbose=False).eval()
    model = build(size).eval()
    shared = {name: value for name, value in samed.state_dict().items()}
    result = model.load_state_dict(shared, strict=False)
    assert not result.unexpected_keys
    assert all(name.split(".")[0] in ("texts", "aligner", "aligner_gate", "fusion", "refiner") for name in result.missing_keys)
    x = images(2, size)
    expected, found = run(samed, x), run(model, x)
    for key in ("low_res_logits", "masks", "iou_predictions"):
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_with_gates_at_their_start_it_is_samed_on_vit_b(sam_vit_b_file: Path) -> None:
    samed = build_model(SAMED, ckpt=sam_vit_b_file, verbose=False).eval()
    model = build_model("pg_sam", ckpt=sam_vit_b_file, verbose=False).eval()
    model.load_state_dict(samed.state_dict(), strict=False)
    x = images(1, 224)
    torch.testing.assert_close(run(model, x)["low_res_logits"], run(samed, x)["low_res_logits"], rtol=0, atol=1e-5)


def test_every_gate_opens_something() -> None:
    """Opened one at a time, each part changes the logits: the equality above is not because the parts are dead."""
    model, x = build(), images()
    start = run(model, x)["low_res_logits"]
    for name, parameter in model.named_parameters():
        if name in GATES:
            with torch.no_grad():
                parameter.fill_(1)
            assert (run(model, x)["low_res_logits"] - start).abs().max() > 1e-3, name
            with torch.no_grad():
                parameter.zero_()


# --- gradients ----------------------------------------------------------------------------------------------------------------------------

SETTINGS = [
    {"class_tokens": "learned"},
    {"class_tokens": "text"},
    {"class_tokens": "text", "tune": "full"},
    {"class_tokens": "learned", "slice_text": True},
    {"class_tokens": "learned", "aligner": "paper", "slice_text": True},
    {"class_tokens": "learned", "aligner": "paper"},
    {"class_tokens": "text", "fusion": "replace", "refine_steps": 1},
    {"class_tokens": "learned", "aligner": "none", "fusion": "none", "refine_steps": 0},
    {"class_tokens": "text", "aligner": "none", "tune": "full"},
    {"class_names": (*ORGANS[:7], "thymus"), "allow_missing_text": True},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: ",".join(map(str, settings.values())))
def test_every_trained_tensor_gets_a_gradient_within_five_steps_and_no_frozen_one(settings: dict) -> None:
    model = build(**settings).train()
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    criterion = SegmentationLoss(0.8, "both", alignment_weight=0.5, deep_weight=0.5)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    x, label = images(4), torch.arange(9).repeat_interleave(8)[:64].expand(4, 64, 64).contiguous()
    told = {}
    if settings.get("slice_text"):  # a batch that exercises every enabled input: some slices with a report, one without
        told["text"] = torch.randn(4, 384)
        told["text"][1] = torch.nan
    moved: set[str] = set()
    for _ in range(5):
        loss, _ = criterion(model(x, **told), label[:, ::4, ::4].contiguous(), label)
        optimizer.zero_grad()
        loss.backward()
        moved |= {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.abs().max() > 0)}
        optimizer.step()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    exempt = {name for name in trained if name.endswith("k_proj.bias")}  # soft-max does not see what is added to every key
    assert trained - moved - exempt == set()
    assert moved <= trained
    for name, p in model.named_parameters():
        if name in frozen:
            assert p.grad is None, name
            assert torch.equal(p, frozen[name]), name


def test_what_a_mode_does_not_use_is_absent_or_frozen() -> None:
    learned, text = build(), build(class_tokens="text")
    trained = {name for name, p in learned.named_parameters() if p.requires_grad}
    assert not [name for name in trained if "iou_prediction_head" in name or "point_embeddings" in name or "mask_downscaling" in name]
    assert not [name for name, _ in text.named_parameters() if "iou_prediction_head" in name]
    assert not [name for name, _ in learned.named_parameters() if "null" in name or "slice_reader" in name]


# --- reports ------------------------------------------------------------------------------------------------------------------------------


def exchanged(model: PGSam, first: str, second: str) -> None:
    replace_reports(model, {first: model.reports[second], second: model.reports[first]})


@pytest.mark.parametrize("pair", [("liver", "aorta"), ("right kidney", "left kidney")])
def test_text_tokens_follow_the_report_and_leave_the_others_alone(pair: tuple[str, str]) -> None:
    model, x = opened(build(class_tokens="text")).eval(), images()
    before = run(model, x)
    exchanged(model, *pair)
    after = run(model, x)
    order = [0, *(ORGANS.index({pair[0]: pair[1], pair[1]: pair[0]}.get(name, name)) + 1 for name in ORGANS)]
    for key in ("low_res_logits", "masks", "iou_predictions"):
        torch.testing.assert_close(after[key], before[key][:, order], rtol=0, atol=1e-4)
    assert (before["low_res_logits"] - after["low_res_logits"]).abs().max() > 1e-2


def test_in_text_mode_no_parameter_belongs_to_an_organ() -> None:
    """The same parameters serve any number of organs."""
    one = {name: p.shape for name, p in build(class_tokens="text", num_classes=1, class_names=["liver"]).named_parameters()}
    eight = {name: p.shape for name, p in build(class_tokens="text").named_parameters()}
    assert one == eight


@pytest.mark.parametrize("class_tokens", ["learned", "text"])
def test_reports_change_the_guide_and_the_logits(class_tokens: str) -> None:
    model, x = opened(build(class_tokens=class_tokens)), images()
    before = run(model, x)
    replace_reports(model, {"liver": builtin_reports().text("aorta"), "spleen": builtin_reports().text("pancreas", "sketch")})
    after = run(model, x)
    for key in ("similarity", "guide", "low_res_logits"):
        assert (before[key] - after[key]).abs().max() > 1e-3, key


def test_papers_equations_take_the_text_away_again() -> None:
    """Spec section 0: normalising after the gate leaves the text hardly any way to matter; ours is told apart by ten times as much."""
    change = {}
    for aligner in ("gated", "paper"):
        model, x = build(aligner=aligner), images()
        before = run(model, x)["guide"]
        replace_reports(model, "none")
        after = run(model, x)["guide"]
        change[aligner] = 1 - torch.corrcoef(torch.stack([before.flatten(), after.flatten()]))[0, 1].abs().item()
    assert change["paper"] < 0.01
    assert change["gated"] > 10 * change["paper"]


def test_wordings_are_drawn_in_training_only() -> None:
    model = build(class_tokens="text")
    assert model.texts is not None
    first, second = model.texts.train()(), model.texts()
    assert not torch.equal(first, second)
    assert torch.equal(model.texts.eval()(), model.texts())
    assert model.texts.wordings is not None
    assert model.texts.wordings.shape[1] == 8  # ten wordings, two held out
    bank = builtin_reports()
    assert model.reports == {name: bank.text(name) for name in ORGANS}


def test_a_slice_report_matters_and_nan_is_the_null_text() -> None:
    model, x = opened(build(slice_text=True)), images()
    text = torch.randn(2, 384, generator=torch.Generator().manual_seed(3))
    with_text, without = run(model, x, text), run(model, x)
    assert (with_text["low_res_logits"] - without["low_res_logits"]).abs().max() > 1e-3
    text[1] = torch.nan
    half = run(model, x, text)
    torch.testing.assert_close(half["low_res_logits"][0], with_text["low_res_logits"][0], rtol=0, atol=1e-5)
    torch.testing.assert_close(half["low_res_logits"][1], without["low_res_logits"][1], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="slice_text=False"):
        build()(x, text)


# --- cost and contract --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", ["gated", "none"])
def test_image_encoder_runs_once_a_forward(fusion: str) -> None:
    model = build(class_tokens="text", slice_text=True, fusion=fusion)
    calls = count_calls(model.image_encoder)
    run(model, images())
    assert len(calls) == 1


@pytest.mark.parametrize(("size", "batch", "classes"), [(64, 1, 8), (96, 3, 8), (80, 2, 3)])
def test_output_contract_and_batching(size: int, batch: int, classes: int) -> None:
    model = opened(build(size, num_classes=classes, class_names=ORGANS[:classes], refine_steps=2)).eval()
    x = images(batch, size)
    out = run(model, x)
    grid, k = size // 16, classes
    shapes = {key: tuple(value.shape) for key, value in out.items() if isinstance(value, Tensor)}
    assert shapes == {
        "low_res_logits": (batch, k + 1, size // 4, size // 4),
        "masks": (batch, k + 1, size, size),
        "iou_predictions": (batch, k + 1),
        "similarity": (batch, k, grid, grid),
        "guide": (batch, 128, grid, grid),
        "alignment_logits": (batch, k + 1, grid, grid),
    }
    assert [tuple(step.shape) for step in out["step_logits"]] == [shapes["low_res_logits"]] * 3
    assert torch.equal(out["step_logits"][-1], out["low_res_logits"])
    assert out["similarity"].abs().max() <= 1 + 1e-6
    for i in range(batch):  # a batch equals its images one by one
        torch.testing.assert_close(run(model, x[i : i + 1])["masks"][0], out["masks"][i], rtol=0, atol=1e-5)
    with torch.no_grad():
        small = model(x, upscale=False)
    assert "masks" not in small
    assert torch.equal(small["low_res_logits"], out["low_res_logits"])


@pytest.mark.parametrize(("vit_name", "img_size"), [("vit_b", 224), ("vit_l", 224), ("vit_h", 224), ("vit_b", 512), ("vit_tiny", 224)])
@pytest.mark.parametrize("class_tokens", ["learned", "text"])
def test_trainable_parameters_stay_under_ten_million(vit_name: str, img_size: int, class_tokens: str) -> None:
    from pgsam.models.pg_sam import build_pg_sam

    with torch.device("meta"):
        model = build_pg_sam(vit_name, img_size, ORGANS, class_tokens=class_tokens, slice_text=True)
    assert 1e5 < trainable_count(model) < 10e6


def test_tiny_model_stays_tiny() -> None:
    assert sum(p.numel() for p in build(224, class_tokens="text").parameters()) <= 4_500_000


def test_expected_iou_closed_form() -> None:
    """Two pixels, probabilities (0.8, 0.2) and (0.3, 0.7): class 0 has mask {0}, intersection 0.8, union 0.8 + 0.3 + 1 - 0.8."""
    shares = torch.tensor([[0.8, 0.3], [0.2, 0.7]]).view(1, 2, 1, 2)
    found = expected_iou(shares.log())
    torch.testing.assert_close(found, torch.tensor([[0.8 / 1.3, 0.7 / 1.2]]), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"class_tokens": "both"}, "class_tokens is one of"),
        ({"aligner": "ours"}, "aligner is one of"),
        ({"fusion": "add"}, "fusion is one of"),
        ({"tune": "none"}, "tune is one of"),
        ({"aligner": "none", "slice_text": True}, "slice_text needs one"),
        ({"aligner": "none", "text_lora": 4}, "no part of this model reads text"),
        ({"refine_steps": -1}, "at least one step"),
    ],
)
def test_settings_that_cannot_be(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**settings)


def test_predictions_pass_slice_texts_in_their_order() -> None:
    """A volume in batches of two equals one batch of all its slices with the same texts."""
    model = opened(build(slice_text=True)).eval()
    volume = torch.rand(5, 64, 64, generator=torch.Generator().manual_seed(5)).numpy()
    texts = torch.randn(5, 384, generator=torch.Generator().manual_seed(6)) * 5
    found = segment_slices(model, volume, input_size=64, batch_size=2, texts=texts)
    whole = segment_slices(model, volume, input_size=64, batch_size=5, texts=texts)
    turned = segment_slices(model, volume, input_size=64, batch_size=5, texts=texts.flip(0))
    assert (found == whole).mean() > 0.999
    assert (found != turned).any()
