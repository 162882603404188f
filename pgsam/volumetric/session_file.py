"""A session on disk: one safetensors file with the crops' embeddings and answers, and all else as JSON in its metadata.

The scan and the model are not in it; their hashes are, and another scan or model is refused.
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pgsam.clicks import Click
from pgsam.errors import UserError
from pgsam.volume import Volume
from pgsam.volume_io import replacing
from pgsam.volumetric.crop import CropGrid, VolumeRecipe
from pgsam.volumetric.model import VolumetricSam

if TYPE_CHECKING:
    from pgsam.volumetric.session import InteractiveSession

FORMAT = 1
_KEY = "pgsam_session"


def write_session(path: str | Path, session: "InteractiveSession") -> None:
    """Writes a session; the file appears complete or not at all.

    Raises:
        UserError: it cannot be written.
    """
    tensors: dict[str, torch.Tensor] = {}
    for number, crop in enumerate(session.crops):
        tensors[f"crops.{number}.embedding"] = crop.embedding.detach().cpu().contiguous()
        tensors[f"crops.{number}.logits"] = crop.logits.detach().cpu().contiguous()
    content = {
        "format": FORMAT,
        "scan_sha256": hash_of_volume(session.volume),
        "model_sha256": hash_of_model(session.model),
        "recipe": asdict(session.recipe),
        "point_memory": session.point_memory,
        "max_crops": session.max_crops,
        "crops": [
            {
                "origin": crop.grid.origin.tolist(),
                "step": crop.grid.step.tolist(),
                "bounded": crop.bounded,
                "points": [[*click.place, int(click.positive)] for click in crop.points],
            }
            for crop in session.crops
        ],
        "prompts": [asdict(prompt) for prompt in session.prompts],
        "warnings": session.warnings,
    }
    try:
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata={_KEY: json.dumps(content, allow_nan=False)})
    except SafetensorError as error:
        raise UserError(f"{path}: cannot be written ({error}); check the folder, its rights and the free space") from error


def read_session(path: str | Path, model: VolumetricSam, volume: Volume, *, device: torch.device | str | None = None) -> "InteractiveSession":
    """Reads what `write_session` wrote.

    Raises:
        UserError: the file is absent, damaged, none of ours or of a newer format, or was made with another model or of another scan.
    """
    from pgsam.volumetric.session import Crop, InteractiveSession, Prompt

    content, tensors = _read(Path(path))
    try:
        if content["scan_sha256"] != hash_of_volume(volume):
            raise UserError(f"{path}: expected a session about this scan, found one about another; give that scan, or another file for the session")
        if content["model_sha256"] != hash_of_model(model):
            raise UserError(f"{path}: expected a session with this model, found one with another; give that model, or another file for the session")
        recipe = VolumeRecipe.from_dict(content["recipe"])
        session = InteractiveSession(model, recipe, volume, device=device, point_memory=content["point_memory"], max_crops=content["max_crops"])
        for number, crop in enumerate(content["crops"]):
            grid = CropGrid(np.array(crop["origin"], dtype=np.float64), np.array(crop["step"], dtype=np.float64), model.img_size)
            points = [Click((x, y, z), bool(positive)) for x, y, z, positive in crop["points"]]
            embedding, logits = (tensors[f"crops.{number}.{name}"].to(session.device) for name in ("embedding", "logits"))
            session.crops.append(Crop(grid, embedding, logits, points, bool(crop["bounded"])))
        session.prompts = [Prompt(**prompt) for prompt in content["prompts"]]
        session.warnings = list(content["warnings"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: expected a session of ours, found a damaged one ({error!r}); give another file") from error
    session.put_together()
    return session


def _read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        content = json.loads(metadata[_KEY])
        version = int(content["format"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: expected a session of ours, found another file or a damaged one ({error!r}); give another file") from error
    if version > FORMAT:
        raise UserError(f"{path}: written in format {version}, this version reads up to {FORMAT}; update PG-SAM")
    return content, tensors


def hash_of_volume(volume: Volume) -> str:
    """sha256 of a volume's number type, shape, values and place."""
    digest = hashlib.sha256(f"{volume.array.dtype.str} {volume.array.shape} {volume.affine.tolist()}".encode())
    for plane in volume.array:
        digest.update(np.ascontiguousarray(plane).data)
    return digest.hexdigest()


def hash_of_model(model: VolumetricSam) -> str:
    """sha256 of a model's tensors with their names, and of the settings that change its answers without showing in a tensor."""
    settings = [model.img_size, model.low_res_size, model.update_embedding, model.prompt_encoder.pe_layer.compat]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
