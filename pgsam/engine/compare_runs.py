"""The runs of a comparison: trainings, indices of labelled slices, tests, and what a row of the table says of them.

Every run lies in OUTPUT/runs/<method>-seed<seed>, every test in OUTPUT/tests; what is complete there is not done again.
"""

import contextlib
import io
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from datasets.layout import DataFolder
from datasets.volumes import case_path, read_case
from pgsam.engine.checkpoint import load_model, read_card
from pgsam.engine.compare import Result, mean_or_none
from pgsam.engine.device import pick_device
from pgsam.engine.evaluate import evaluate, refuse_overlap
from pgsam.engine.flags import resolve_ckpt
from pgsam.engine.oneshot import read_backbone
from pgsam.engine.oneshot_slices import P2SAM, fit_p2sam
from pgsam.engine.predict import segment_slices
from pgsam.engine.runs import FINAL, in_parallel, open_trained, read_json, run_program, train_once, trained_parameters, training_minutes, write_json
from pgsam.errors import UserError
from pgsam.models import PROMPTED
from pgsam.models.base import SliceModel
from pgsam.models.pg_sam import PG_SAM
from pgsam.models.samed import SAMED, SAMED_S

TRAINED = {"pg_sam": PG_SAM, "samed": SAMED, "samed_s": SAMED_S, "adapter": "sam_adapter"}  # method -> its --module
RETRIEVAL_PROGRAMS = ("scripts/build_index.py", "scripts/tune_rag.py", "scripts/test_rag.py")


@dataclass(frozen=True)
class Row:
    """One line of the table; `checkpoint` of a trained file, else None."""

    method: str
    checkpoint: Path | None = None
    retrieval: bool = False

    @property
    def name(self) -> str:
        """In the tables."""
        return f"{self.method} + retrieval" if self.retrieval else self.method

    @property
    def is_trained(self) -> bool:
        """Whether it is trained here."""
        return self.checkpoint is None and self.method != P2SAM

    def run(self, seed: int) -> str:
        """Folder of the trained model below `runs`."""
        return f"{self.method}-seed{seed}"

    def test(self, seed: int) -> str:
        """Folder of the results below `tests`."""
        if self.checkpoint is not None:
            return f"file-{self.method}"
        return self.run(seed) + ("-retrieval" if self.retrieval else "")


@dataclass(frozen=True)
class Runs:
    """What the rows of one comparison have alike.

    Args:
        output: folder of all of it.
        root_path: the prepared data.
        lists: folder of the lists that every row is trained and tested with.
        slices: what `lists` has to train on.
        volumes: what it has to test on.
        organs: the classes of the data.
        seeds: of every row that has any.
        training: flags of train.py that every method gets.
        own: method that is trained -> its flags besides.
        ckpt: as in `--ckpt`: a SAM file, `none`, or None for Meta's at its usual place.
        device: as in `--device`.
        val_list: cases that no row is trained on, which choose the weight of retrieval.
        p2sam_ckpt: file of P2SAM's backbone, where it is a row.
        max_minutes: trainings that take longer are marked.
    """

    output: Path
    root_path: Path
    lists: Path
    slices: DataFolder
    volumes: DataFolder
    organs: tuple[str, ...]
    seeds: Sequence[int]
    training: Sequence[str]
    own: Mapping[str, Sequence[str]]
    ckpt: str | None
    device: str
    val_list: Path | None = None
    p2sam_ckpt: Path | None = None
    max_minutes: float | None = None

    def train(self, rows: Sequence[Row], jobs: int) -> None:
        """Trains what is not trained yet, `jobs` at a time, with index and weight where a row has retrieval."""
        retrieving = {row.method for row in rows if row.retrieval}
        trained = [row for row in rows if row.is_trained and not row.retrieval]
        in_parallel(jobs, [partial(self._train, row, seed, row.method in retrieving) for seed in self.seeds for row in trained])

    def _train(self, row: Row, seed: int, retrieval: bool) -> None:
        folder = self.output / "runs" / row.run(seed)
        told = ["--root_path", str(self.root_path), "--list_dir", str(self.lists), "--module", TRAINED[row.method], "--seed", str(seed)]
        train_once(folder, [*told, *self.own[row.method], *self.training], tests=self.output / "tests")
        if retrieval:
            self._index(row, seed)

    def _index(self, row: Row, seed: int) -> None:
        """The index of a run's training slices and its tuned weight, unless both are there."""
        folder = self.output / "runs" / row.run(seed)
        index, done = folder / "index", folder / "retrieval.json"
        if done.is_file():
            return
        shutil.rmtree(index, ignore_errors=True)
        shutil.rmtree(self.output / "tests" / f"{folder.name}-retrieval", ignore_errors=True)
        print(f"index of {folder.name}", flush=True)
        started = time.perf_counter()
        model = ["--checkpoint", str(folder / FINAL), *self._model_flags()]
        data = ["--root_path", str(self.root_path), "--list_dir", str(self.lists)]
        run_program(folder.name, RETRIEVAL_PROGRAMS[0], [*model, *data, "--output", str(index)])
        run_program(folder.name, RETRIEVAL_PROGRAMS[1], [*model, *data, "--index", str(index), "--val_list", str(self.val_list)])
        write_json(done, {"minutes": (time.perf_counter() - started) / 60})

    def _model_flags(self) -> list[str]:
        return [*([] if self.ckpt is None or self.ckpt.lower() == "none" else ["--ckpt", self.ckpt]), "--device", self.device]

    def measure(self, row: Row) -> Result:
        """Tests what is not tested yet, and reads all that a row of the table says."""
        seeds = self.seeds if row.checkpoint is None else self.seeds[:1]
        tables, speeds = [], []
        for seed in seeds:
            folder = self.output / "tests" / row.test(seed)
            if not (folder / "speed.json").is_file():
                shutil.rmtree(folder, ignore_errors=True)
                print(f"testing {folder.name}", flush=True)
                self._test(row, seed, folder)
            tables.append(read_json(folder / "metrics.json", "results of a test", "remove that folder")["cases"])
            speeds.append(read_json(folder / "speed.json", "the speed of a test", "remove that folder")["slices_per_second"])
        if not row.is_trained:
            parameters, minutes = (0, 0.0) if row.checkpoint is None else (None, None)
            return Result(row.name, tuple(tables), parameters, minutes, mean_or_none(speeds))
        folders = [self.output / "runs" / row.run(seed) for seed in seeds]
        took = [training_minutes(folder) for folder in folders]
        late = self.max_minutes is not None and max(took) > self.max_minutes
        if row.retrieval:
            more = [read_json(folder / "retrieval.json", "how long the index took", "remove that file")["minutes"] for folder in folders]
            took = [first + second for first, second in zip(took, more, strict=True)]
        return Result(row.name, tuple(tables), trained_parameters(folders[0]), mean_or_none(took), mean_or_none(speeds), late)

    def _test(self, row: Row, seed: int, folder: Path) -> None:
        """Writes results and speed of one test; the speed last, so that a folder that has it is complete."""
        said: dict[str, Any] = {"row": row.name, "seed": seed}
        if row.method == P2SAM:
            model, examples = self._fit_p2sam(seed)
            said["examples"] = examples
        else:
            model = self._open(row, seed)
        if model.card.class_names != self.organs:
            raise UserError(f"{row.name}: expected a model of {', '.join(self.organs)}, as the data, found {', '.join(model.card.class_names)}")
        refuse_overlap(model.card, self.volumes, False)
        respond = None
        if row.retrieval:
            run = self.output / "runs" / row.run(seed)
            model_and_data = ["--checkpoint", str(run / FINAL), *self._model_flags(), "--index", str(run / "index"), "--list_dir", str(self.lists)]
            run_program(folder.name, RETRIEVAL_PROGRAMS[2], [*model_and_data, "--data_dir", str(self.root_path), "--output_dir", str(folder)])
            respond = retrieval_of(model, run, self.volumes.patient_of(self.volumes.names[0]))
        else:
            with contextlib.redirect_stdout(io.StringIO()):  # test_log/log.txt has it
                evaluate(model, model.card, self.volumes, folder, settings={"comparison": said})
        write_json(folder / "speed.json", {"slices_per_second": slices_per_second(model, self.volumes, respond)})

    def _open(self, row: Row, seed: int) -> SliceModel:
        """The trained model of a row."""
        if row.checkpoint is None:
            return open_trained(self.output / "runs" / row.run(seed))
        card = read_card(row.checkpoint)
        if card.module in PROMPTED:
            raise UserError(f"{row.checkpoint}: segments what a prompt points at, not classes; it can be --p2sam_ckpt")
        needed = row.checkpoint.suffix != ".safetensors" or card.sam_sha256
        ckpt = resolve_ckpt(self.ckpt, card.vit_name) if needed else None
        return load_model(row.checkpoint, ckpt=ckpt, device=str(pick_device(self.device)), verbose=False)

    def _fit_p2sam(self, seed: int) -> tuple[SliceModel, dict[str, str]]:
        assert self.p2sam_ckpt is not None
        backbone = read_backbone(self.p2sam_ckpt, device=str(pick_device(self.device)), verbose=False)
        if backbone.card is not None:
            refuse_overlap(backbone.card, self.volumes, False)
        return fit_p2sam(backbone, self.slices, self.organs, seed=seed)


def retrieval_of(model: SliceModel, run: Path, patient: str) -> Any:
    """What `segment_slices` takes as `respond`: the model with the index of its run and the weight that was tuned."""
    from pgsam.engine.retrieval import TUNED, RagSettings, Retriever, open_extractor, read_tuned
    from pgsam.retrieval.index import SliceIndex

    index = SliceIndex.open(run / "index")
    settings = RagSettings(**read_tuned(run / "index" / TUNED)["chosen"])
    return Retriever(model, index, open_extractor(None, index, model), settings).respond_for(patient)


def slices_per_second(model: SliceModel, volumes: DataFolder, respond: Any = None) -> float:
    """How many slices a second a model segments, from the stored slice to its labels: the first test volume, after two slices to warm up."""
    name = volumes.names[0]
    image = read_case(case_path(volumes, name), name, model.card.num_classes).image
    options = {"input_size": model.card.input_size, **({} if respond is None else {"respond": respond})}
    segment_slices(model, image[:2], **options)
    started = time.perf_counter()
    segment_slices(model, image, **options)
    return len(image) / (time.perf_counter() - started)
