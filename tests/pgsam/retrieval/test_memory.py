"""The memory against a loop in float64, its start against no memory at all, and what it can see."""

import math

import pytest
import torch

from pgsam import build_model
from pgsam.errors import UserError
from pgsam.models.base import without_memory
from pgsam.retrieval.index import Hits, Memories
from pgsam.retrieval.memory import MemoryAttention, recall_from

DIM, CLASSES, GRID, HEADS = 8, 2, 3, 2


def memories(batch=2, k=3, *, dim=DIM, classes=CLASSES, grid=GRID, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(batch, k, dim, grid, grid, generator=generator)
    fractions = torch.randn(batch, k, classes + 1, 4 * grid, 4 * grid, generator=generator).softmax(dim=2)
    return Memories(tokens, fractions)


def embedding(batch=2, *, dim=DIM, grid=GRID, seed=1):
    return torch.randn(batch, dim, grid, grid, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def trained():
    """A memory that is no longer at its start."""
    torch.manual_seed(3)
    memory = MemoryAttention(DIM, CLASSES, heads=HEADS)
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return memory


def by_loops(memory, query, found):
    """The equations of the docstring, a place and a head at a time, in float64; of one image."""
    double = {name: value.double() for name, value in memory.state_dict().items()}

    def norm(x, name):
        x = x.double()
        x = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()
        return x * double[f"{name}.weight"] + double[f"{name}.bias"]

    def mask_feature(cells):  # (K + 1, 4, 4) -> (dim,)
        first = torch.empty(DIM // 4, 2, 2, dtype=torch.float64)
        for row in range(2):
            for column in range(2):
                block = cells[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
                out = (double["mask_features.0.weight"] * block).sum(dim=(1, 2, 3)) + double["mask_features.0.bias"]
                out = (out - out.mean()) / (out.var(unbiased=False) + 1e-6).sqrt()
                first[:, row, column] = out * double["mask_features.1.weight"] + double["mask_features.1.bias"]
        first = torch.tensor([[[x * 0.5 * (1 + math.erf(x / math.sqrt(2))) for x in r] for r in c] for c in first.tolist()], dtype=torch.float64)
        return (double["mask_features.3.weight"] * first).sum(dim=(1, 2, 3)) + double["mask_features.3.bias"]

    places = [(i, j) for i in range(GRID) for j in range(GRID)]
    seen = []  # place, key, value of each retrieved token
    for slice_tokens, slice_fractions in zip(found.tokens, found.fractions.double(), strict=True):
        for i, j in places:
            token = norm(slice_tokens[:, i, j], "memory_norm")
            mask = mask_feature(slice_fractions[:, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4])
            seen.append(((i, j), double["key.weight"] @ token, double["value.weight"] @ mask))
    result, size = query.double().clone(), DIM // HEADS
    for i, j in places:
        own = norm(query[:, i, j], "query_norm")
        asked, answers = double["query.weight"] @ own, []
        for head in range(HEADS):
            part = slice(head * size, (head + 1) * size)
            reach, scale = double["log_reach"][head].exp(), double["log_scale"][head].exp()
            scores = torch.stack(
                [
                    scale * torch.cosine_similarity(asked[part], key[part], dim=0) - ((i - a) ** 2 + (j - b) ** 2) / GRID**2 / (2 * reach**2)
                    for (a, b), key, _ in seen
                ]
            )
            answers.append((scores.softmax(dim=0)[:, None] * torch.stack([value[part] for _, _, value in seen])).sum(dim=0))
        hidden = double["out.0.weight"] @ torch.cat(answers) + double["out.0.bias"]
        hidden = torch.tensor([x * 0.5 * (1 + math.erf(x / math.sqrt(2))) for x in hidden.tolist()], dtype=torch.float64)
        result[:, i, j] += double["out.2.weight"] @ hidden + double["out.2.bias"]
    return result


def test_the_memory_is_what_its_docstring_says(trained):
    queries, found = embedding(), memories()
    with torch.no_grad():
        given = trained(queries, found)
    for query, tokens, fractions, answer in zip(queries, found.tokens, found.fractions, given, strict=True):
        torch.testing.assert_close(answer.double(), by_loops(trained, query, Memories(tokens, fractions)), atol=1e-5, rtol=1e-5)


def test_a_new_memory_changes_nothing_and_can_learn():
    torch.manual_seed(0)
    memory, query = MemoryAttention(DIM, CLASSES, heads=HEADS), embedding()
    given = memory(query, memories())
    assert torch.equal(given, query)
    given.square().sum().backward()
    assert all(parameter.grad is not None for parameter in memory.parameters())
    assert memory.out[-1].weight.grad.abs().sum() > 0


def test_an_untrained_memory_looks_where_tokens_are_alike():
    """With one head of wide reach each token of a slice finds itself among those of another slice: it finds the mask of its own place."""
    torch.manual_seed(0)
    memory, query = MemoryAttention(DIM, 8, heads=1), embedding(1)
    other = embedding(1, seed=5)
    cells = torch.zeros(1, 2, 9, GRID, GRID)
    cells[0, 0] = torch.eye(9).view(9, GRID, GRID)  # of the copy: the class of a place is its number
    cells[0, 1, 0] = 1
    found = Memories(torch.stack([query.flip(-1, -2), other], dim=1), cells.flip(-1, -2).repeat_interleave(4, -1).repeat_interleave(4, -2))
    with torch.no_grad():
        memory.value.weight.copy_(torch.eye(DIM))
        memory.out[0].weight.copy_(torch.eye(DIM))
        memory.log_reach.fill_(5.0)
        memory.log_scale.fill_(6.0)
        memory.out[2].weight.copy_(torch.eye(DIM))
        memory.out[0].bias.fill_(50.0)  # far above 0 the perceptron is the identity
        memory.out[2].bias.fill_(-50.0)
        seen = memory(query, found) - query
        features = memory.mask_features(torch.eye(9).view(1, 9, GRID, GRID).repeat_interleave(4, -1).repeat_interleave(4, -2))
    torch.testing.assert_close(seen, features, atol=1e-3, rtol=1e-3)


def test_each_image_of_a_batch_sees_its_own_memories_and_their_order_is_nothing(trained):
    queries, found = embedding(), memories()
    with torch.no_grad():
        given = trained(queries, found)
        other = trained(queries, Memories(found.tokens.flip(1), found.fractions.flip(1)))
        alone = [trained(queries[[i]], Memories(found.tokens[[i]], found.fractions[[i]])) for i in range(2)]
        labelled_otherwise = trained(queries, Memories(found.tokens, found.fractions.flip(2)))
    torch.testing.assert_close(other, given)
    torch.testing.assert_close(torch.cat(alone), given)
    assert (labelled_otherwise - given).abs().amax(dim=(1, 2, 3)).min() > 1e-3


def test_only_labels_are_added(trained):
    """Neighbours that all show the same say the same, whatever they look like: the memory is no adapter of the embedding."""
    found = memories()
    uniform = torch.zeros_like(found.fractions)
    uniform[:, :, 1] = 1
    with torch.no_grad():
        first, second = (
            trained(embedding(seed=seed), Memories(tokens, uniform)) - embedding(seed=seed)
            for seed, tokens in ((1, found.tokens), (7, found.tokens.flip(1, 2)))
        )
    torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(first, first[:1, :, :1, :1].expand_as(first), atol=1e-5, rtol=1e-5)


def test_the_reach_is_a_share_of_the_grid():
    """The same reach on a finer grid: the scores of places that lie alike are the same."""
    memory = MemoryAttention(DIM, CLASSES, heads=HEADS)
    coarse, fine = (memory._closeness((side, side)).view(HEADS, side, side, side, side) for side in (3, 6))
    torch.testing.assert_close(fine[:, ::2, ::2, ::2, ::2], coarse)
    assert (memory.log_reach.diff() < 0).all()


@pytest.mark.parametrize(("dim", "heads"), [(8, 3), (6, 2)])
def test_sizes_that_do_not_divide(dim, heads):
    with pytest.raises(ValueError, match="expected a multiple"):
        MemoryAttention(dim, 2, heads=heads)


# --- on a model -------------------------------------------------------------------------------------------------------------------------------


class StoredSlices:
    """An index of N slices in memory; the nearest of a query are the first of other patients."""

    def __init__(self, patients, dim=128, classes=2, grid=4):
        self.patients = patients
        self.stored = memories(1, len(patients), dim=dim, classes=classes, grid=grid)
        self.asked = []

    def nearest(self, vectors, k, patient, case=None):
        self.asked.append((vectors, tuple(patient)))
        own = [[i for i, name in enumerate(self.patients) if name != who][:k] for who in patient]
        return Hits(torch.tensor(own), torch.ones(len(own), k))

    def memories(self, indices):
        return Memories(self.stored.tokens[0][indices], self.stored.fractions[0][indices])


MODULES = ["sam_lora_image_encoder", "sam_lora_image_encoder_mask_decoder", "pg_sam", "sam_adapter"]


@pytest.fixture(scope="module", params=MODULES)
def model(request):
    torch.manual_seed(0)
    options = {"aligner": "none"} if request.param == "pg_sam" else {}
    model = build_model(request.param, vit_name="vit_tiny", img_size=64, num_classes=2, verbose=False, **options)
    return model.eval()


@pytest.fixture
def with_memory(model):
    torch.manual_seed(1)
    model.rag = MemoryAttention(128, 2)
    yield model
    model.rag = None


@torch.inference_mode()
def test_models_with_a_new_memory_give_what_they_gave_bit_for_bit(with_memory):
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    recalled = with_memory(images, recall=recall_from(StoredSlices("abc"), 2, ["a", None]))
    with without_memory(with_memory):
        plain = with_memory(images)
        asks_for_nothing = with_memory(images, recall=pytest.fail)
    assert with_memory.rag is not None
    for name in ("low_res_logits", "masks", "iou_predictions"):
        assert torch.equal(recalled[name], plain[name])
        assert torch.equal(asks_for_nothing[name], plain[name])


@torch.inference_mode()
def test_a_model_recalls_by_the_output_of_its_encoder_and_sees_what_it_recalls(with_memory):
    torch.nn.init.normal_(with_memory.rag.out[-1].weight)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    caught = []
    handle = with_memory.image_encoder.register_forward_hook(lambda _module, _inputs, output: caught.append(output))
    index = StoredSlices("aabc")
    first = with_memory(images, recall=recall_from(index, 2, ["a", "b"]))["masks"]
    second = with_memory(images, recall=recall_from(index, 2, ["c", "b"]))["masks"]
    handle.remove()
    vectors, patients = index.asked[0]
    assert patients == ("a", "b")
    output = caught[0] if isinstance(caught[0], torch.Tensor) else caught[0][0]
    expected = output.mean(dim=(2, 3))
    torch.testing.assert_close(vectors, expected / expected.norm(dim=1, keepdim=True))
    assert len(caught) == 2  # one pass of the encoder a forward
    assert not torch.allclose(first[0], second[0], atol=1e-3)  # of other patients
    torch.testing.assert_close(first[1], second[1])


def test_a_model_with_a_memory_and_nothing_to_recall_from(with_memory):
    with pytest.raises(UserError, match="--index") as error:
        with_memory(torch.zeros(1, 3, 64, 64))
    assert "\n" not in str(error.value)
