"""Reports on slices on the command line: the flags, and from a store of reports to what a model reads."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pgsam.errors import UserError
from pgsam.models.base import SliceModel
from pgsam.models.card import ModelCard
from pgsam.models.pg_sam import PGSam, require_encoder, text_dim
from pgsam.prior.provenance import refuse_label_reports
from pgsam.prior.slice_reports import SliceReports, read_slice_reports, read_text_folder
from pgsam.prior.text_embeddings import embed_texts
from pgsam.prior.text_encoder import TextEncoder, load_text_encoder


def add_slice_report_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that `read_store` reads, and `--allow_missing_text`."""
    add = parser.add_argument
    add("--slice_reports", type=Path, metavar="FILE.jsonl", help="a report on each slice (scripts/generate_reports.py)")
    add("--text_dir", type=Path, help="PG-SAM's text_{idx}.txt, one a line of --text_list")
    add("--text_list", type=Path, help="the list file that --text_dir was made with")
    add("--text_saw_labels", action="store_true", help="the texts of --text_dir were made from labels (its files cannot say so)")
    add("--allow_missing_text", action="store_true", help="a learned null text stands for reports that are not there; they are counted")


def read_store(args: argparse.Namespace) -> SliceReports | None:
    """The reports on slices that the flags name, if any.

    Raises:
        UserError: flags that contradict each other, or as the readers.
    """
    if (args.text_dir is None) != (args.text_list is None):
        raise UserError("--text_dir and --text_list belong together: the texts are numbered by the lines of the list they were made with")
    if args.slice_reports is not None and args.text_dir is not None:
        raise UserError("--slice_reports and --text_dir both name reports on slices; give one of them")
    if args.text_saw_labels and args.text_dir is None:
        raise UserError("--text_saw_labels: is about --text_dir, which is not given; leave it out (a .jsonl says it itself)")
    if args.slice_reports is not None:
        return read_slice_reports(args.slice_reports)
    return read_text_folder(args.text_dir, args.text_list, saw_labels=args.text_saw_labels) if args.text_dir is not None else None


class SliceTextReader:
    """From a slice's name to what a model reads of it: a vector, or the words themselves where the model has an encoder of its own.

    Args:
        store: the reports, or None where every slice gets the null text.
        encoder: the text encoder, or the name or folder of one that is loaded at every `read`; None hands out words.
        dim: width of a vector.
        allow_missing: whether a slice may have no report.
    """

    def __init__(self, store: SliceReports | None, *, encoder: str | TextEncoder | None, dim: int, allow_missing: bool) -> None:
        self.store, self.encoder, self.dim, self.allow_missing = store, encoder, dim, allow_missing
        self.missing: Tensor | str = "" if encoder is None else torch.full((dim,), torch.nan)
        self.asked = self.absent = 0

    def read(self, keys: Sequence[str]) -> dict[str, Any]:
        """What stands for each of `keys`, a vector (D,) or a text.

        Raises:
            UserError: a slice has no report and none may be missing; or the encoder has another width than the model was built for.
        """
        texts = {key: self.store.text(key) if self.store is not None else None for key in keys}
        absent = self.store.missing(keys) if self.store is not None else list(keys)
        if absent and not self.allow_missing:
            source = self.store.source if self.store is not None else "--slice_reports"
            raise UserError(
                f"{source}: expected a report on every slice, {len(absent)} of {len(keys)} have none ({', '.join(absent[:3])}); write them "
                "(scripts/generate_reports.py) and give them as --slice_reports, or give --allow_missing_text for the learned null text"
            )
        self.asked, self.absent = self.asked + len(keys), self.absent + len(absent)
        present = {key: text for key, text in texts.items() if text is not None}
        if self.encoder is None:
            return {**dict.fromkeys(absent, ""), **present}
        vectors = embed_texts(list(present.values()), self.encoder) if present else torch.empty(0, self.dim)
        if vectors.shape[1] != self.dim:
            name = self.encoder.name if isinstance(self.encoder, TextEncoder) else self.encoder
            raise UserError(f"{name}: gives vectors of width {vectors.shape[1]}, the model was built for {self.dim}; give its own encoder")
        return {**dict.fromkeys(absent, self.missing), **dict(zip(present, vectors, strict=True))}

    def read_case(self, case: str, slices: int) -> Tensor | list[str]:
        """The same for the slices `<case>_slice000`, `_slice001`, ... of a volume, in their order: `(slices, D)` or a list of texts.

        A report on the case as a whole, as PG-SAM's test folder has them, stands for each of its slices.
        """
        keys = [f"{case}_slice{i:03d}" for i in range(slices)]
        if self.store is not None and self.store.text(case) is not None and len(self.store.missing(keys)) == slices:
            keys = [case] * slices
        read = self.read(keys)
        return [read[key] for key in keys] if self.encoder is None else torch.stack([read[key] for key in keys])

    def summary(self) -> str:
        """How many reports were asked for and how many were not there."""
        return f"reports on slices: {self.asked - self.absent} read, {self.absent} missing (null text)"


def open_slice_texts(args: argparse.Namespace, model: SliceModel) -> SliceTextReader | None:
    """What reads the reports on the slices of a test volume or scan; None for a model that reads none.

    Raises:
        UserError: reports for a model that reads none, none for one that does (without `--allow_missing_text`), reports made from labels (without
            `--allow_label_reports`), or another text encoder than in training.
    """
    store = read_store(args)
    if not isinstance(model, PGSam) or model.null_text is None or model.texts is None or model.told is None:
        if store is not None:
            raise UserError(f"{store.source}: the checkpoint was trained without reports on slices and reads none; leave them out")
        if args.allow_missing_text:
            raise UserError("--allow_missing_text: the checkpoint was trained without reports on slices, so none can be missing; leave it out")
        return None
    if store is None and not args.allow_missing_text:
        raise UserError(
            f"{args.checkpoint}: reads a report on each slice; give them (--slice_reports), or --allow_missing_text for the learned null text"
        )
    if store is not None:
        refuse_label_reports(store, args.allow_label_reports)
    encoder: str | TextEncoder | None = None
    if model.texts.encoder is None:
        encoder = args.text_encoder or model.told.encoder
        if store is not None:
            encoder = load_text_encoder(encoder)  # once, for all volumes
            require_encoder(encoder.name, encoder.identity, model.told)
    return SliceTextReader(store, encoder=encoder, dim=text_dim(model), allow_missing=args.allow_missing_text)


def notes_on_texts(card: ModelCard, reader: SliceTextReader | None) -> list[str]:
    """What results must say of the texts behind them."""
    notes = []
    if card.reports_saw_labels or (reader is not None and reader.store is not None and reader.store.saw_labels):
        notes.append("NOTE: some reports were made from labels; these scores are no evidence of what the model can do without them")
    if reader is not None:
        notes.append(reader.summary())
    return notes
