"""The organs' vectors: centring, drawing, missing organs, an encoder of the model's own; and where their texts come from."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pgsam.errors import UserError
from pgsam.prior import organ_texts
from pgsam.prior.organ_reports import builtin_reports
from pgsam.prior.organ_texts import NO_REPORTS, OrganTexts, gather_wordings, open_encoder
from pgsam.prior.text_embeddings import builtin_embeddings
from pgsam.prior.text_encoder import BUILTIN_ENCODER

DIM = 4


def wordings(seed: int = 0) -> list[Tensor]:
    """Of three classes, 3, 1 and 2 of them, far apart."""
    generator = torch.Generator().manual_seed(seed)
    return [10 * torch.randn(count, DIM, generator=generator) for count in (3, 1, 2)]


def texts(given: Sequence[Tensor | None] | None = None, *, centre: bool = False, missing: Sequence[int] = ()) -> OrganTexts:
    torch.manual_seed(0)
    built = OrganTexts(3 if given is None else len(given), DIM, missing)
    built.set_vectors(wordings() if given is None else given, centre=centre)
    return built


@pytest.fixture
def no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(organ_texts, "WORDING_NOISE", 0.0)


# --- vectors ------------------------------------------------------------------------------------------------------------------------------


def test_in_evaluation_the_report_in_use_relative_to_the_mean_of_the_organs() -> None:
    """Every organ counts once in the mean, however many wordings it has."""
    given = wordings()
    first = torch.stack([v[0] for v in given])
    torch.testing.assert_close(texts().eval()(), first)
    mean = (given[0].sum(dim=0) / 3 + given[1][0] + given[2].sum(dim=0) / 2) / 3
    torch.testing.assert_close(texts(centre=True).eval()(), first - mean)


def test_the_origin_stays_when_reports_are_replaced() -> None:
    built = texts(centre=True).eval()
    origin = built.centre.clone()
    other = wordings(1)
    built.set_vectors(other)
    torch.testing.assert_close(built.centre, origin)
    torch.testing.assert_close(built(), torch.stack([v[0] for v in other]) - origin)


def test_what_is_saved_gives_the_same_vectors_in_evaluation_and_holds_no_wordings() -> None:
    built = texts(centre=True).eval()
    state = built.state_dict()
    assert set(state) == {"centre", "vectors"}
    fresh = OrganTexts(3, DIM)
    fresh.load_state_dict(state)
    assert torch.equal(fresh.eval()(), built())
    assert torch.equal(fresh.train()(), built())  # nothing to draw from


def test_wordings_are_drawn_in_training_only_and_by_torchs_generator() -> None:
    built = texts().train()
    torch.manual_seed(5)
    first, second = built(), built()
    assert (first - second).abs().max() > 0.1
    torch.manual_seed(5)
    assert torch.equal(built(), first)
    built.eval()
    assert torch.equal(built(), built())


@pytest.mark.usefixtures("no_noise")
def test_a_draw_lies_between_two_wordings_of_its_own_organ() -> None:
    given, built = wordings(), texts().train()
    a, b, c = given[0]
    torch.manual_seed(0)
    drawn = torch.stack([built() for _ in range(600)])  # (draws, 3, DIM)
    torch.testing.assert_close(drawn[:, 1], given[1].expand(600, -1))  # one wording: always that
    start, end = given[2]
    share = (drawn[:, 2] - start) @ (end - start) / (end - start).square().sum()
    torch.testing.assert_close(drawn[:, 2], start + share[:, None] * (end - start), rtol=0, atol=1e-4)
    assert share.min() >= -1e-5
    assert share.max() <= 1 + 1e-5
    # Padding repeats wordings: 2 become (start, end, start), so a pair is (start, start) in 4 cases of 9, (end, end) in 1, mixed in 4.
    for value, expected in ((0, 4 / 9), (1, 1 / 9)):
        found = ((share - value).abs() < 1e-5).float().mean().item()
        assert abs(found - expected) < 5 * (expected * (1 - expected) / 600) ** 0.5
    middle = share[(share > 1e-5) & (share < 1 - 1e-5)]
    assert abs(middle.mean().item() - 0.5) < 5 * (1 / 12 / len(middle)) ** 0.5
    assert middle.std().item() == pytest.approx(12**-0.5, rel=0.15)  # uniform
    # Three wordings: barycentric coordinates, one of which is 0; every wording and every pair occurs.
    solution = torch.linalg.lstsq(torch.stack([a, b, c]).T, drawn[:, 0].T).solution.T  # (draws, 3)
    torch.testing.assert_close(solution.sum(dim=1), torch.ones(600), rtol=0, atol=1e-3)
    used = solution > 1e-3
    assert (solution > -1e-3).all()
    assert {tuple(row) for row in used.tolist()} == {
        (True, False, False),
        (False, True, False),
        (False, False, True),
        (True, True, False),
        (True, False, True),
        (False, True, True),
    }


def test_noise_has_its_deviation_and_is_new_for_each_organ_and_draw() -> None:
    built = texts([torch.zeros(2, DIM)] * 3).train()
    torch.manual_seed(0)
    drawn = torch.stack([built() for _ in range(800)]).flatten(1)  # (draws, 3 DIM)
    assert drawn.std().item() == pytest.approx(organ_texts.WORDING_NOISE, rel=0.05)
    off_diagonal = torch.corrcoef(drawn.T) - torch.eye(drawn.shape[1])
    assert off_diagonal.abs().max() < 5 / 800**0.5


@pytest.mark.parametrize("mode", [True, False])
def test_organs_without_a_report_share_the_null_vector(mode: bool) -> None:
    given = [wordings()[0], None, None, wordings()[1]]
    built = texts(given, centre=True, missing=(1, 2)).train(mode)
    assert built.null is not None
    found = built()
    torch.testing.assert_close(found[1], built.null)
    torch.testing.assert_close(found[2], built.null)
    means = torch.stack([wordings()[i].mean(dim=0) for i in (0, 1)])
    torch.testing.assert_close(built.centre, means.mean(dim=0))  # the organs without one do not count
    (found[0] + found[3]).sum().backward(retain_graph=True)
    assert built.null.grad is not None
    assert not built.null.grad.any()
    found[1:3].sum().backward()
    torch.testing.assert_close(built.null.grad, torch.full((DIM,), 2.0))


def test_an_organ_that_got_a_report_is_missing_no_longer() -> None:
    built = texts([wordings()[0], None, None], missing=(1, 2)).eval()
    built.vectors[1] = torch.arange(4.0)
    built.rename({1: "a report"})
    assert built.missing == (2,)
    torch.testing.assert_close(built()[1], torch.arange(4.0))
    torch.testing.assert_close(built()[2], built.null)
    built.vectors[2] = 7
    built.rename({2: "another"})
    torch.testing.assert_close(built()[2], torch.full((DIM,), 7.0))


# --- an encoder of the model's own ----------------------------------------------------------------------------------------------------------


class Letters(nn.Module):
    """Counts a, b, c and d in a text, times a weight that training moves; notes what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.asked: list[list[str]] = []

    def forward(self, given: Sequence[str]) -> Tensor:
        self.asked.append(list(given))
        return self.weight * torch.tensor([[float(text.count(letter)) for letter in "abcd"] for text in given])


def with_encoder() -> tuple[OrganTexts, Letters]:
    built, encoder = texts(), Letters()
    built.train_encoder(encoder, [("a", "aa"), ("b",), ("c", "cc", "ccc")])  # type: ignore[arg-type]
    return built, encoder


def test_an_encoder_of_its_own_is_read_once_in_evaluation_and_again_after_training() -> None:
    built, encoder = with_encoder()
    built.eval()
    torch.testing.assert_close(built(), torch.eye(3, 4))
    built()
    assert encoder.asked == [["a", "b", "c"]]
    built.train()
    with torch.no_grad():
        encoder.weight.fill_(3)
    torch.testing.assert_close(built.eval()(), 3 * torch.eye(3, 4))
    state = {name: 2 * value if name == "encoder.weight" else value for name, value in built.state_dict().items()}
    built.load_state_dict(state)
    torch.testing.assert_close(built(), 6 * torch.eye(3, 4))


def test_an_encoder_of_its_own_reads_a_drawn_wording_at_every_step_and_gets_the_gradient() -> None:
    built, encoder = with_encoder()
    built.train()
    torch.manual_seed(0)
    for _ in range(60):
        found = built()
    assert {tuple(asked) for asked in encoder.asked} == {(a, "b", c) for a in ("a", "aa") for c in ("c", "cc", "ccc")}
    found.sum().backward()
    assert encoder.weight.grad is not None
    assert encoder.weight.grad > 0


def test_an_encoder_of_its_own_reads_the_new_report() -> None:
    built, encoder = with_encoder()
    built.eval()()
    built.rename({0: "dd"})
    torch.testing.assert_close(built()[0], torch.tensor([0.0, 0, 0, 2]))
    built.train()()
    assert encoder.asked[-1][0] == "dd"  # and draws from nothing else


# --- where the texts come from ------------------------------------------------------------------------------------------------------------


def report_file(folder: Path, **changes: Any) -> Path:
    provenance = {"generator": "a radiologist", "prompt": "", "created": "2026-11-21", "saw_labels": False}
    content = {
        "format": 1,
        "kind": "organ reports",
        "provenance": provenance,
        "held_out": ["sketch"],
        "organs": {"Right_Kidney": {"short": "B", "long": "A", "sketch": "C"}, "liver": {"short": "L"}},
    } | changes
    path = folder / "reports.json"
    path.write_text(json.dumps(content))
    return path


def test_wordings_come_with_the_long_one_first_and_without_what_is_held_out(tmp_path: Path) -> None:
    found = gather_wordings(report_file(tmp_path), ["liver", "kidney right"])
    assert dict(found.texts) == {"liver": "L", "kidney right": "A"}  # under the names that the classes were given
    assert dict(found.wordings) == {"liver": ("L",), "kidney right": ("A", "B")}
    assert not found.saw_labels


def test_built_in_reports_hold_two_wordings_back() -> None:
    bank = builtin_reports()
    found = gather_wordings(None, ["spleen", "Oesophagus"])
    assert found.texts == {"spleen": bank.text("spleen"), "Oesophagus": bank.text("esophagus")}
    for name, organ in (("spleen", "spleen"), ("Oesophagus", "esophagus")):
        assert len(found.wordings[name]) == len(bank.organs[organ]) - 2
        for held_out in bank.held_out:
            assert bank.text(organ, held_out) not in found.wordings[name]


def test_none_tells_every_organ_the_empty_text() -> None:
    found = gather_wordings(NO_REPORTS, ["liver", "no organ at all"])
    assert dict(found.texts) == {"liver": "", "no organ at all": ""}
    assert dict(found.wordings) == {"liver": ("",), "no organ at all": ("",)}


def test_a_class_without_a_report_is_refused_unless_allowed() -> None:
    classes = ["liver", "tumour", "cyst"]
    with pytest.raises(UserError, match=r"reports given in Python: expected a report of every class, found none of tumour, cyst; .*--reports"):
        gather_wordings({"liver": "L"}, classes)
    found = gather_wordings({"liver": "L"}, classes, allow_missing=True)
    assert dict(found.texts) == {"liver": "L"}
    assert set(found.wordings) == {"liver"}


def test_reports_on_built_in_organs_that_are_no_class_are_left_out_and_on_others_refused() -> None:
    found = gather_wordings({"liver": "L", "aorta": "A"}, ["liver"])
    assert dict(found.texts) == {"liver": "L"}
    with pytest.raises(UserError, match="zebra"):
        gather_wordings({"liver": "L", "zebra": "Z"}, ["liver"])


def test_an_organ_of_which_all_is_held_out_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="liver"):
        gather_wordings(report_file(tmp_path, held_out=["short", "sketch"]), ["liver"])


def test_it_is_said_that_a_report_saw_labels(tmp_path: Path) -> None:
    provenance = {"generator": "x", "prompt": "", "created": "2026-11-21", "saw_labels": True}
    assert gather_wordings(report_file(tmp_path, provenance=provenance), ["liver"]).saw_labels


def test_the_default_encoder_is_known_without_being_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # importing it raises
    encoder, found = open_encoder(BUILTIN_ENCODER)
    assert encoder == BUILTIN_ENCODER
    assert len(found) == 64
    assert found == builtin_embeddings().identity
    with pytest.raises(UserError, match="another/encoder: expected a text encoder"):
        open_encoder("another/encoder")


@pytest.mark.parametrize("mode", [True, False])
def test_what_all_organs_share_is_neither_lost_nor_turned_into_noise(mode: bool) -> None:
    """One organ, or all of them told the same single text: the model reads that text, in training as in evaluation."""
    for count in (1, 3):
        text = torch.arange(1.0, DIM + 1).expand(1, DIM)
        built = texts([text] * count, centre=True).train(mode)
        torch.testing.assert_close(built(), text.expand(count, DIM))


def test_an_organ_that_gets_a_report_needs_no_null_vector_any_more() -> None:
    built = texts([wordings()[0], None], missing=(1,))
    built.rename({1: "a report"})
    assert built.missing == ()
    assert built.null is None
