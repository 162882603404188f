import pytest
import torch
from torch import nn

from pgsam.models import build_model
from pgsam.models.samed import SAMED, SAMED_S
from pgsam.sam.build import build_image_encoder
from pgsam.tuning.lora import add_encoder_lora, lora_disabled, lora_layers, lora_merged, lora_query_value, merge_lora, unmerge_lora

MODULES = (SAMED, SAMED_S)


def tiny(module: str = SAMED, **options) -> nn.Module:
    torch.manual_seed(0)
    return build_model(module, vit_name="vit_tiny", img_size=64, num_classes=3, verbose=False, **options).eval()


def randomise_lora(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            nn.init.normal_(parameter, std=0.3)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def test_query_and_value_get_their_updates_and_key_none() -> None:
    torch.manual_seed(0)
    layer = lora_query_value(nn.Linear(6, 18), rank=2)
    randomise_lora(nn.ModuleDict({"layer": layer}))
    x = torch.randn(5, 6)
    expected = nn.functional.linear(x, layer.weight, layer.bias)
    expected[:, :6] += x @ layer.lora_a["q"].T @ layer.lora_b["q"].T
    expected[:, 12:] += x @ layer.lora_a["v"].T @ layer.lora_b["v"].T
    torch.testing.assert_close(layer(x), expected)
    delta = layer.delta()
    assert not delta[6:12].any()
    assert delta[:6].any()
    assert delta[12:].any()


@pytest.mark.parametrize("module", MODULES)
def test_start_is_the_base_model_bit_for_bit(module: str, images: torch.Tensor) -> None:
    model = tiny(module)
    with torch.no_grad(), lora_disabled(model):
        base = model(images)["low_res_logits"]
    assert torch.equal(model(images)["low_res_logits"], base)
    randomise_lora(model)
    assert not torch.allclose(model(images)["low_res_logits"], base, atol=1e-3)
    with lora_disabled(model):
        assert torch.equal(model(images)["low_res_logits"], base)


@pytest.mark.parametrize("module", MODULES)
def test_one_step_moves_lora_prompt_encoder_and_decoder_only(module: str, images: torch.Tensor) -> None:
    model = tiny(module).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1, eps=1e-30)  # moves whatever has a gradient
    for _ in range(2):  # the factor A has no gradient while B is zero
        optimizer.zero_grad()
        model(images)["low_res_logits"].square().mean().backward()
        optimizer.step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name for name in moved if name.startswith("image_encoder.")} == {n for n in before if n.startswith("image_encoder.") and ".lora_" in n}
    assert "prompt_encoder.no_mask_embed.weight" in moved
    assert "mask_decoder.mask_tokens.weight" in moved
    in_transformer = {name for name in moved if name.startswith("mask_decoder.transformer.")}
    assert in_transformer
    if module == SAMED_S:
        assert all(".lora_" in name for name in in_transformer)
    assert all(not p.requires_grad and p.grad is None for n, p in model.named_parameters() if n.endswith("qkv.weight"))


@pytest.mark.parametrize("module", MODULES)
def test_merged_equals_unmerged_and_unmerging_is_exact(module: str, images: torch.Tensor) -> None:
    model = tiny(module)
    randomise_lora(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        apart = model(images)["low_res_logits"]
        merge_lora(model)
        merge_lora(model)  # a second merge must not add the update again
        torch.testing.assert_close(model(images)["low_res_logits"], apart, rtol=0, atol=1e-5)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items()), "a checkpoint must not hold a merged update"
        with lora_disabled(model):
            base = model(images)["low_res_logits"]
            merge_lora(model)
            assert torch.equal(model(images)["low_res_logits"], base), "what is disabled stays so"
        assert not torch.allclose(base, apart, atol=1e-3)
        torch.testing.assert_close(model(images)["low_res_logits"], apart, rtol=0, atol=1e-5)
        unmerge_lora(model)
        assert torch.equal(model(images)["low_res_logits"], apart)


def test_training_a_merged_model_unmerges_it(images: torch.Tensor) -> None:
    model = tiny()
    randomise_lora(model)
    merge_lora(model)
    model.train()
    model(images)["low_res_logits"].mean().backward()
    assert all(layer.lora_a["q"].grad is not None and layer.lora_a["q"].grad.any() for layer in lora_layers(model).values())


@pytest.mark.parametrize("rank", [1, 7])
def test_rank_and_blocks_are_what_was_asked(rank: int) -> None:
    model = tiny(rank=rank, lora_blocks=(1, 3))
    layers = lora_layers(model)
    assert list(layers) == ["image_encoder.blocks.1.attn.qkv", "image_encoder.blocks.3.attn.qkv"]
    assert all(layer.lora_a["q"].shape == (rank, 160) and layer.lora_b["v"].shape == (160, rank) for layer in layers.values())


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="rank must lie"):
        lora_query_value(nn.Linear(4, 12), rank=5)
    with pytest.raises(ValueError, match=r"blocks 0 to 5, not \[6\]"):
        add_encoder_lora(build_image_encoder("vit_tiny", 64), 2, blocks=[6])


def test_3d_encoder_takes_the_same_lora() -> None:
    encoder = build_image_encoder("vit_tiny", 32, ndim=3, patch_size=8, depth=2, window_size=3, global_attn_indexes=(1,))
    base = encoder(torch.ones(1, 1, 32, 32, 32))
    add_encoder_lora(encoder, 4)
    assert torch.equal(encoder(torch.ones(1, 1, 32, 32, 32)), base)


def test_merging_for_a_while_leaves_an_ordinary_model(images: torch.Tensor) -> None:
    """A prediction in inference mode must not leave weights behind that autograd refuses, nor a stale sum after loading."""
    model = tiny()
    randomise_lora(model)
    apart = model(images)["low_res_logits"]
    with torch.inference_mode(), lora_merged(model):
        assert all(layer.merged is not None for layer in lora_layers(model).values())
        torch.testing.assert_close(model(images)["low_res_logits"], apart, rtol=0, atol=1e-5)
    assert torch.equal(model(images)["low_res_logits"], apart)
    merge_lora(model)
    model(images)["low_res_logits"].sum().backward()
    model.load_state_dict({name: torch.zeros_like(value) if ".lora_b" in name else value for name, value in model.state_dict().items()})
    with lora_disabled(model):
        base = model(images)["low_res_logits"]
    assert torch.equal(model(images)["low_res_logits"], base)
