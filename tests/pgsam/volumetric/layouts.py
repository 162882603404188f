"""Published layouts of 3-D checkpoints, written from their description."""

from collections.abc import Mapping

from torch import Tensor


def m_sam_layout(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """M-SAM's names, by the description of its files (spec m_sam 1.7)."""
    renamed = {}
    for name, value in state.items():
        if name.startswith("adapter."):
            renamed[f"bidatt.{name[len('adapter.') :]}"] = value
            continue
        stem, _, leaf = name.rpartition(".attn.qkv.")
        words = {"weight": "qkv.weight", "bias": "qkv.bias"} | {f"lora_{f}.{p}": f"linear_{f}_{p}.weight" for f in "ab" for p in "qv"}
        renamed[f"lora_sam.sam.{stem}.attn.qkv.{words[leaf]}" if stem else f"lora_sam.sam.{name}"] = value
    return renamed
