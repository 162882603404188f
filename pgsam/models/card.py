"""The card of a model: all that is needed, beside its tensors, to use it on a scan."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from pgsam.errors import UserError
from pgsam.volume import BTCV_ORIENTATION, CT_WINDOW

FORMAT = 1


@dataclass(frozen=True)
class ModelCard:
    """What a release file says of its model, beside the tensors.

    `training_cases` and `training_patients` are None where they are not known. `window` is (lo, hi) in HU for `image_kind` `ct_window`.
    `rank` is None where there is no LoRA. `reports` (organ -> text) and what stands beside it are None where the model reads no text.
    """

    module: str
    vit_name: str
    img_size: int
    input_size: int
    class_names: tuple[str, ...]
    rank: int | None = 4
    orientation: str = BTCV_ORIENTATION
    image_kind: str = "ct_window"
    window: tuple[float, float] | None = CT_WINDOW
    class_tokens: str = "learned"
    text_encoder: str | None = None
    text_encoder_sha256: str | None = None
    reports: dict[str, str] | None = None
    reports_hash: str | None = None
    reports_saw_labels: bool = False
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    dataset: str | None = None
    training_cases: tuple[str, ...] | None = None
    training_patients: tuple[str, ...] | None = None
    sam_sha256: str | None = None
    git_commit: str | None = None
    format: int = FORMAT

    @property
    def num_classes(self) -> int:
        """Foreground classes."""
        return len(self.class_names)

    def to_json(self) -> str:
        """The card as JSON text."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str, source: str) -> "ModelCard":
        """Reads `to_json`'s text; a UserError if it is of a newer format or lacks a field."""
        try:
            fields = json.loads(text)
            if fields.get("format", 0) > FORMAT:
                raise UserError(f"{source}: written in format {fields['format']}, this version reads up to {FORMAT}; update PG-SAM")
            known = {f.name for f in dataclasses.fields(cls)}
            fields = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items() if name in known}
            return cls(**fields)
        except (json.JSONDecodeError, TypeError, AttributeError) as error:
            raise UserError(
                f"{source}: expected a PG-SAM model card in the metadata, found another or a damaged one ({error}); copy the file again"
            ) from error
