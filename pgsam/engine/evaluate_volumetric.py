"""Testing a volumetric model: a simulated user clicks on its errors, and every answer is scored on the scan's own grid, in millimetres.

Neither M-SAM nor its paper's code has a protocol, so it is said here. Two things are decided by the reference and by no user, and stand in every
result: where the crop lies, and where the clicks do.

* Crop `reference`: one crop around the lesion's bounding box, as published evaluations have it; whatever lies outside it is missed. The user
  clicks on the crop's voxels, in the dialogue that the model is trained with. Crop `prompt`: nothing is known but the clicks; they are set on the
  scan's own voxels and told to an `InteractiveSession`, whose crops move and grow.
* Clicks: the policies of `pgsam.volumetric.refine`, each seeded by seed and case.

Scores are given after each click 1..N, never the best of them. Where nothing is wrong any more the user is silent and the answer stays.
"""

import csv
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.ndimage import find_objects, label

from datasets.lesions import LesionCase, case_number, read_label, read_lesion
from pgsam.clicks import Click
from pgsam.engine.log import Log
from pgsam.engine.results import results_folder
from pgsam.engine.volumetric import recipe_of
from pgsam.errors import UserError
from pgsam.metrics import dice, hd95, iou, nsd
from pgsam.models.card import ModelCard
from pgsam.volume import Volume
from pgsam.volume_io import write_volume
from pgsam.volumetric.crop import Canonical, CropGrid, VolumeRecipe
from pgsam.volumetric.lesion_crop import grid_on
from pgsam.volumetric.model import VolumetricSam
from pgsam.volumetric.refine import VolumeClicks, next_click
from pgsam.volumetric.session import InteractiveSession

CROPS = ("reference", "prompt")
METRICS = ("dice", "nsd", "hd95_mm", "iou")
COLUMNS = ("case", "lesion", "click", "positive", "lps_mm", *METRICS, "n_pred", "n_ref", "reason")
_TOUCHING = np.ones((3, 3, 3), dtype=bool)  # voxels of one lesion meet at a face, an edge or a corner


@dataclass(frozen=True)
class Protocol:
    """How the user behaves and what is measured.

    Args:
        clicks: how many the user sets, each with an answer.
        policy: where, see `pgsam.volumetric.refine.next_click`.
        crop: one of `CROPS`.
        memory: `last`, the model is told the newest click only, or `all`.
        tolerance_mm: of the normalised surface distance.
        per_lesion: every connected lesion is an object of its own; without, all lesions of a scan are one.
        seed: of the clicks.
    """

    clicks: int = 10
    policy: str = "uniform"
    crop: str = "reference"
    memory: str = "last"
    tolerance_mm: float = 1.0
    per_lesion: bool = False
    seed: int = 2024

    def __post_init__(self) -> None:
        if self.crop not in CROPS:
            raise ValueError(f"crop is one of {', '.join(CROPS)}, not {self.crop!r}")
        if self.clicks < 1 or not 0 <= self.tolerance_mm < math.inf:
            raise ValueError(f"there is one click at least and a tolerance of 0 mm or more, not {self.clicks} and {self.tolerance_mm}")


@dataclass(frozen=True, eq=False)
class Answer:
    """What the model says after a click.

    Args:
        mask: bool [D, H, W].
        positive, lps_mm: of the click; None where nothing was wrong.
        crops: that the model has seen so far.
        warnings: of the session, in whole sentences.
    """

    mask: np.ndarray
    positive: bool | None
    lps_mm: tuple[float, float, float] | None
    crops: int = 1
    warnings: tuple[str, ...] = ()


def evaluate_volumetric(
    model: VolumetricSam,
    card: ModelCard,
    cases: Sequence[LesionCase],
    output_dir: str | Path,
    protocol: Protocol,
    *,
    recipe: Callable[[LesionCase], VolumeRecipe],
    settings: Mapping[str, Any],
    save_nifti: bool = False,
) -> dict[str, Any]:
    """Tests `model` on labelled scans and writes `metrics.json`, `metrics.csv`, `test_log/log.txt` and, if asked for, `predictions/`.

    A case without a lesion has a `reason` and no score; it is counted as undefined.

    Args:
        model: in evaluation mode.
        card: the model's.
        cases: the scans.
        output_dir: see `pgsam.engine.results.results_folder`.
        protocol: of the test.
        recipe: how the crops of a case are made, as `recipe_for`.
        settings: goes into `metrics.json` as it is.
        save_nifti: also write `predictions/<case>_{pred,gt}.nii.gz`, the answer to the last click, on the scan's grid.

    Returns:
        The content of `metrics.json`: `settings`, `cases` (case -> lesion -> `clicks`, a list of scores, `reason`, and `crops` and `warnings` after
        the last click) and `summary` (metric -> a list of click, mean, n, n_undefined); undefined values are None.
    """
    with results_folder(output_dir) as staging:
        log = Log(staging / "test_log" / "log.txt")
        log(describe(protocol))
        started = time.perf_counter()
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for case in cases:
            found[case.name] = _test_case(model, recipe(case), case, protocol, staging if save_nifti else None)
            for name, lesion in found[case.name].items():
                scores = " ".join("-" if row["dice"] is None else f"{row['dice']:.3f}" for row in lesion["clicks"])
                log(f"{_title(case.name, name)}: {lesion['reason'] or f'Dice {scores}'}")
        summary = summarise_clicks([lesion for lesions in found.values() for lesion in lesions.values()], protocol.clicks)
        log(format_clicks(summary, protocol))
        results = {
            "settings": {
                **settings,
                "protocol": asdict(protocol),
                "description": describe(protocol),
                "model": asdict(card),
                "seconds": round(time.perf_counter() - started, 3),
                "finished": datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
            },
            "cases": found,
            "summary": summary,
        }
        (staging / "metrics.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        _write_csv(staging / "metrics.csv", found)
    return results


def describe(protocol: Protocol) -> str:
    """One line that says what the scores depend on."""
    crop = {
        "reference": "crop: reference (around the lesion's bounding box: the model is told where it is)",
        "prompt": "crop: prompt (around the clicks, moving and growing)",
    }[protocol.crop]
    objects = "each connected lesion an object" if protocol.per_lesion else "all lesions of a scan one object"
    told = {"last": "the newest one told", "all": "all of them told"}[protocol.memory]
    return f"{crop}; clicks: {protocol.policy}, on the model's errors, {told}, seed {protocol.seed}; {objects}"


def recipe_for(card: ModelCard, case: LesionCase, modality: str | None) -> VolumeRecipe:
    """How the crops of a case are made: by `modality`, else by what its folder says, else by what the model was trained on."""
    told = case.modality == "ct" or case.modality in (card.options.get("modalities") or ())
    return recipe_of(card, modality or (case.modality if told else None))


# --- one case -----------------------------------------------------------------------------------------------------------------------------


def lesions_of(mask: np.ndarray, *, apart: bool) -> dict[str, np.ndarray]:
    """The objects of a reference: `all` of it or, `apart`, its connected lesions `1`, `2`, ... from the largest to the smallest."""
    if not apart or not mask.any():
        return {"all": mask}
    pieces, count = label(mask, _TOUCHING)
    order = np.argsort(-np.bincount(pieces.ravel())[1:], kind="stable")
    return {str(place): pieces == number + 1 for place, number in enumerate(order[:count], start=1)}


def _title(case: str, lesion: str) -> str:
    return case if lesion == "all" else f"{case}, lesion {lesion}"


def _test_case(model: VolumetricSam, recipe: VolumeRecipe, case: LesionCase, protocol: Protocol, staging: Path | None) -> dict[str, dict[str, Any]]:
    """The scores of every object of a case."""
    if not read_label(case).array.any():
        return {"all": {"reason": "the reference is empty: there is nothing to click on", "clicks": [], "recipe": asdict(recipe), "n_ref": 0}}
    image, reference = read_lesion(case)
    results = {}
    for name, lesion in lesions_of(reference.array, apart=protocol.per_lesion).items():
        generator = np.random.default_rng((protocol.seed, case_number(case.name), 0 if name == "all" else int(name)))
        started = time.perf_counter()
        answers = reference_answers if protocol.crop == "reference" else prompted_answers
        rows: list[dict[str, Any]] = []
        last = Answer(np.zeros_like(lesion), None, None)
        try:
            for last in answers(model, recipe, image, lesion, protocol, generator):
                rows.append(_scores(last, lesion, image.spacing_mm, protocol.tolerance_mm, len(rows) + 1))
        except ValueError as error:
            raise UserError(f"{case.image}: cannot be segmented ({error}); check the checkpoint and the scan") from error
        seconds = round(time.perf_counter() - started, 3)
        about = {"recipe": asdict(recipe), "n_ref": int(lesion.sum()), "seconds": seconds}
        results[name] = {"reason": None, "clicks": rows, "crops": last.crops, "warnings": list(last.warnings), **about}
        if staging is not None:
            stem = case.name if name == "all" else f"{case.name}_lesion{name}"
            for kind, mask in (("pred", last.mask), ("gt", lesion)):
                write_volume(staging / "predictions" / f"{stem}_{kind}.nii.gz", mask, image.affine)
    return results


def _scores(answer: Answer, reference: np.ndarray, spacing_mm: Sequence[float], tolerance_mm: float, number: int) -> dict[str, Any]:
    """A row of `metrics.csv`; None where a metric is undefined."""
    mask = answer.mask
    values = {
        "dice": dice(mask, reference),
        "nsd": nsd(mask, reference, tolerance_mm, spacing_mm),
        "hd95_mm": hd95(mask, reference, spacing_mm),
        "iou": iou(mask, reference),
    }
    scores = {name: None if math.isnan(value) else float(value) for name, value in values.items()}
    place = None if answer.lps_mm is None else [round(value, 3) for value in answer.lps_mm]
    return {"click": number, "positive": answer.positive, "lps_mm": place, **scores, "n_pred": int(mask.sum()), "n_ref": int(reference.sum())}


# --- two users ----------------------------------------------------------------------------------------------------------------------------


def reference_answers(
    model: VolumetricSam, recipe: VolumeRecipe, image: Volume, lesion: np.ndarray, protocol: Protocol, generator: np.random.Generator
) -> Iterator[Answer]:
    """The answers in one crop around a lesion, bool [D, H, W] on the image's grid."""
    canonical, wanted = Canonical.of(image), Canonical.of(Volume(lesion, image.affine)).array
    grid = reference_grid(canonical, wanted, model.img_size, recipe.spacing_mm)
    target = grid.labels(wanted)
    crop = torch.from_numpy(recipe.crop(canonical, grid))[None, None].to(next(model.parameters()).device)
    spacing = (canonical.spacing_mm * grid.step).tolist()
    dialogue = VolumeClicks(
        target[None], [generator], steps=protocol.clicks, policy=protocol.policy, memory=protocol.memory, detach=True, spacings=[spacing]
    )
    with torch.inference_mode():
        rounds = model(crop, dialogue=dialogue)["rounds"]
    mask, content = np.zeros(lesion.shape, dtype=bool), False
    for step in rounds:
        content = content or step["clicks"][0] is None  # the dialogue goes on without a point; a user does not
        click = None if content else step["clicks"][0]
        if click is not None:
            logits = step["masks"][0, 0].float().cpu().numpy()
            if not np.isfinite(logits).all():
                raise ValueError("the model's answer is not a number")
            whole = np.zeros(wanted.shape, dtype=bool)
            whole[grid.window(wanted.shape)] = grid.paste(logits, wanted.shape) > 0
            mask = canonical.back(whole)
        yield Answer(mask, click and click.positive, click and _triple(canonical.mm_of(grid.to_volume(click.place))))


def reference_grid(canonical: Canonical, mask: np.ndarray, size: int, spacing_mm: float | None) -> CropGrid:
    """The crop around the bounding box of the largest connected lesion; `grid_on` its voxel next to there, where that crop would show none of it.

    Args:
        canonical: the scan.
        mask: bool, on its grid, not empty.
        size, spacing_mm: of the crop.
    """
    pieces, _ = label(mask, _TOUCHING)
    largest = int(np.bincount(pieces.ravel())[1:].argmax())
    box = find_objects(pieces)[largest]
    middle = np.array([(axis.start + axis.stop - 1) / 2 for axis in box])
    grid = CropGrid.around(canonical, middle, size, spacing_mm)
    if grid.labels(pieces == largest + 1).any():
        return grid
    own = np.argwhere(pieces == largest + 1)
    nearest = own[np.square((own - middle) * canonical.spacing_mm).sum(axis=1).argmin()]
    return grid_on(canonical, nearest, size, spacing_mm)


def prompted_answers(
    model: VolumetricSam, recipe: VolumeRecipe, image: Volume, lesion: np.ndarray, protocol: Protocol, generator: np.random.Generator
) -> Iterator[Answer]:
    """The answers of a session that is told clicks and nothing else."""
    session = InteractiveSession(model, recipe, image, point_memory=protocol.memory)
    mask = np.zeros(lesion.shape, dtype=bool)
    for own in generator.spawn(protocol.clicks):
        click = click_on_error(protocol.policy, mask, lesion, own, image.spacing_mm)
        if click is None:
            yield Answer(mask, None, None, len(session.crops), tuple(session.warnings))
            continue
        mask = session.click(click.place[::-1], click.positive, frame="voxel").copy()
        place = _triple(image.affine[:3, :3] @ click.place + image.affine[:3, 3])
        yield Answer(mask, click.positive, place, len(session.crops), tuple(session.warnings))


def click_on_error(
    policy: str, prediction: np.ndarray, reference: np.ndarray, generator: np.random.Generator, spacing_mm: Sequence[float]
) -> Click | None:
    """`next_click` on a whole scan, of which the box around the errors is looked at only: the same click, sooner."""
    wrong = prediction != reference
    if not wrong.any():
        return None
    box = find_objects(wrong.astype(np.uint8))[0]
    click = next_click(policy, prediction[box], reference[box], generator, spacing_mm)
    return click and Click(tuple(place + axis.start for place, axis in zip(click.place, box, strict=True)), click.positive)


def _triple(values: np.ndarray) -> tuple[float, float, float]:
    x, y, z = values.tolist()
    return x, y, z


# --- tables -------------------------------------------------------------------------------------------------------------------------------


def summarise_clicks(lesions: Sequence[Mapping[str, Any]], clicks: int) -> dict[str, list[dict[str, Any]]]:
    """For every metric and click the mean over the lesions where it is defined, how many these are, and how many are left out.

    HD95 is undefined where the answer is empty, everything where there was nothing to click on.
    """
    summary: dict[str, list[dict[str, Any]]] = {}
    for metric in METRICS:
        rows = []
        for number in range(clicks):
            values = [lesion["clicks"][number][metric] for lesion in lesions if lesion["clicks"]]
            defined = [value for value in values if value is not None]
            mean = float(np.mean(defined)) if defined else None
            rows.append({"click": number + 1, "mean": mean, "n": len(defined), "n_undefined": len(lesions) - len(defined)})
        summary[metric] = rows
    return summary


def format_clicks(summary: Mapping[str, Sequence[Mapping[str, Any]]], protocol: Protocol) -> str:
    """The summary as a table, a row a click; `n` stands behind a mean that is not over all lesions."""
    heads = ("click", "Dice", f"NSD {protocol.tolerance_mm:g} mm", "HD95 mm", "IoU")
    lines = [f"{heads[0]:>5s} " + " ".join(f"{head:>16s}" for head in heads[1:])]
    for number in range(protocol.clicks):
        cells = []
        for metric in METRICS:
            row = summary[metric][number]
            short = f" (n={row['n']})" if row["n_undefined"] else ""
            cells.append(f"{'-' if row['mean'] is None else format(row['mean'], '.2f' if metric == 'hd95_mm' else '.4f')}{short}")
        lines.append(f"{number + 1:>5d} " + " ".join(f"{cell:>16s}" for cell in cells))
    total = summary["dice"][0]["n"] + summary["dice"][0]["n_undefined"]
    return "\n".join([f"means over {total} lesion{'s' if total != 1 else ''}; {describe(protocol)}", *lines])


def _write_csv(path: Path, found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """A row a case, lesion and click; a lesion without scores has one row with its reason."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for case, lesions in found.items():
            for name, lesion in lesions.items():
                about = {"case": case, "lesion": name, "n_ref": lesion["n_ref"], "reason": lesion["reason"]}
                for row in lesion["clicks"] or [{}]:
                    place = row.get("lps_mm")
                    writer.writerow({**about, **row, "lps_mm": " ".join(map(str, place)) if place else None})
