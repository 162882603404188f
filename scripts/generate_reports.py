"""Reports for PG-SAM's text prior, written by a language model: one an organ and wording, or one a slice.

    export MY_KEY=...
    python scripts/generate_reports.py --dataset Synapse --wordings long short --output organs.json \\
        --base_url https://host/v1 --model NAME --api_key_env MY_KEY
    python scripts/generate_reports.py --root_path data/Synapse --output slices.jsonl --base_url http://127.0.0.1:8000/v1 --model NAME
    python scripts/generate_reports.py --volume_path data/Synapse --output slices.jsonl --local_model FOLDER

Organ reports (`--organs`, `--dataset`) come from the model's general knowledge and become the JSON that `train.py --reports` reads. Slice
reports (`--root_path`: training slices, `--volume_path`: every slice of the test volumes, `-i`: every slice of a scan) describe one picture each;
they are appended to a .jsonl under the keys `<case>_slice<ddd>`, and one file may hold training and test slices. Labels are never sent.

The endpoint is any server that speaks OpenAI's chat completions; `--base_url` is what precedes /chat/completions. Pictures leave this machine
for that server: see that your data may. A slice is sent as the radiologist sees it, in the window the data were prepared with.

Run the same command again to go on: what is in the output is not asked for again. Exit code 0: all done; 2: an error, or reports that failed
after all retries, which are never written; 130: interrupted.
"""

import argparse
import datetime
import functools
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from pgsam.errors import Parser, UserError, reports_user_errors

PROMPTS = Path(__file__).resolve().parent / "prompts"
MODALITY = "contrast-enhanced abdominal CT"
_ORGANS, _SLICES, _ENDPOINT = ("organs", "dataset"), ("root_path", "volume_path", "input"), ("base_url",)
_ONLY_WITH = {  # flag -> the flags of which it needs one
    "wordings": _ORGANS,
    "list_dir": ("root_path", "volume_path"),
    "orientation": _SLICES,
    "window": ("input",),
    "model": _ENDPOINT,
    "api_key_env": _ENDPOINT,
    "token_limit_name": _ENDPOINT,
    "requests_per_minute": _ENDPOINT,
    "timeout": _ENDPOINT,
    "device": ("local_model",),
}
_MOST_UNAVAILABLE = 3  # reports in a row for which the server gave no answer at all; after them it is taken for gone


def build_parser() -> argparse.ArgumentParser:
    """The flags of this program."""
    from datasets.labels import DATASETS
    from pgsam.engine.device import DEVICES
    from pgsam.prior.generate import WORDINGS
    from pgsam.volume import BTCV_ORIENTATION, CT_WINDOW

    parser = Parser(__doc__)
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    add("--organs", nargs="+", metavar="ORGAN", help="organ reports of these")
    add("--dataset", choices=list(DATASETS), help="organ reports of this dataset's classes")
    add("--root_path", type=Path, help="reports of the training slices of a prepared folder")
    add("--volume_path", type=Path, help="reports of all slices of its test volumes")
    add("-i", "--input", type=Path, help="reports of all axial slices of a scan, .nii or .nii.gz")
    add = parser.add_argument
    add("--output", type=Path, required=True, help=".json for organ reports, .jsonl for slice reports; added to if it exists")
    add("--wordings", nargs="+", choices=list(WORDINGS), help="of each organ (default: long short)")
    add("--list_dir", type=Path, help="folder of the lists (default: as in train.py and test.py)")
    add("--orientation", help=f"axis codes of the slices, where the data do not tell; with -i those to turn to (default {BTCV_ORIENTATION})")
    add("--window", type=float, nargs=2, metavar=("LO", "HI"), help="of -i: HU shown black and white (default {:g} {:g})".format(*CT_WINDOW))
    add("--modality", default=MODALITY, help="what the prompt calls the images (default %(default)s)")
    add("--prompt_file", type=Path, help="text with {modality}, for organ reports also {organ} and {wording} (default: scripts/prompts/)")
    add("--base_url", help="what precedes /chat/completions, as http://127.0.0.1:8000/v1; http or https")
    add("--model", help="the model's name on that server")
    add("--api_key_env", metavar="VARIABLE", help="environment variable that holds the key (never the key itself)")
    add("--token_limit_name", choices=("max_tokens", "max_completion_tokens"), help="how the server calls the limit (default max_tokens)")
    add("--requests_per_minute", type=float, help="at most so many, repeated ones included (default: no limit)")
    add("--timeout", type=float, help="seconds to wait for an answer (default 120)")
    add("--local_model", metavar="NAME", help="transformers model, a folder or a name in the local cache, instead of --base_url")
    add("--device", choices=DEVICES, help="of the local model (default auto)")
    add("--retries", type=int, default=5, help="further attempts at a report (default %(default)s)")
    add("--max_tokens", type=int, default=512, help="longest answer (default %(default)s)")
    add("--min_words", type=int, default=5, help="shortest report (default %(default)s)")
    add("--max_words", type=int, default=200, help="longest report (default %(default)s)")
    add("--limit", type=int, help="make at most so many reports now")
    add("--dry_run", action="store_true", help="check everything, print the first prompt and what is to do, send and write nothing")
    return parser


@dataclass(frozen=True)
class Job:
    """One report to make: its key, the prompt, and what reads the slice [H, W] in [0, 1] as it is to be seen (None for organ reports)."""

    key: str
    prompt: str
    picture: Callable[[], np.ndarray] | None = None


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; 0 on success, 2 after an error of the user's or failed reports, 130 after Ctrl-C."""
    args = build_parser().parse_args(argv)
    check_flags(args)
    key = api_key(args)
    of_organs = args.organs is not None or args.dataset is not None
    jobs, template = organ_jobs(args) if of_organs else slice_jobs(args)
    store: OrganStore | SliceStore = OrganStore(args.output, template) if of_organs else SliceStore(args.output)
    done = store.keys()
    todo = [job for job in jobs if job.key not in done][: args.limit]
    to = f"{args.model} at {args.base_url}" if args.base_url else args.local_model
    print(f"{args.output}: {len(jobs)} reports, {sum(job.key in done for job in jobs)} there, {len(todo)} to make now with {to}", flush=True)
    if args.dry_run or not todo:
        return show_first(todo)
    try:
        failed, stopped = make_reports(todo, make_writer(args, key, images=not of_organs), store.save)
    except KeyboardInterrupt:
        print(f"interrupted; what is done is in {args.output}: run the same command again to go on", file=sys.stderr)
        return 130
    for name, reason in failed.items():
        print(f"failed: {name}: {reason}")
    if failed:
        rest = f"{len(failed)} of {len(todo)} reports failed" + (f", then the server was given up ({stopped} not tried)" if stopped else "")
        raise UserError(f"{args.output}: {rest}; the others are kept, run the same command again for the rest")
    print(f"{args.output}: {len(todo)} reports made")
    return 0


# --- checks -----------------------------------------------------------------------------------------------------------------------------


def check_flags(args: argparse.Namespace) -> None:
    """Everything about the flags that needs no data.

    Raises:
        UserError: flags that contradict each other or change nothing, numbers out of range, an output that cannot be written.
    """
    from pgsam.engine.flags import require_at_least
    from pgsam.prior.generate import check_base_url

    if (args.base_url is None) == (args.local_model is None):
        raise UserError("expected one of --base_url (with --model) and --local_model; see --help")
    if args.base_url is not None:
        check_base_url(args.base_url)
        if not args.model:
            raise UserError("--base_url: expected --model with it, the model's name on that server")
    for flag, partners in _ONLY_WITH.items():
        if getattr(args, flag) is not None and all(getattr(args, partner) is None for partner in partners):
            raise UserError(f"--{flag}: expected only with {' or '.join('--' + partner for partner in partners)}; leave it out")
    require_at_least(args, retries=0, max_tokens=1, min_words=1, max_words=args.min_words, limit=1)
    for flag in ("requests_per_minute", "timeout"):
        value = getattr(args, flag)
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"--{flag} {value:g}: expected a positive number")
    check_output(args.output, ".json" if args.organs is not None or args.dataset is not None else ".jsonl")


def check_output(path: Path, suffix: str) -> None:
    """Raises a UserError unless reports can be written to `path`."""
    if path.suffix != suffix:
        raise UserError(f"{path}: expected a name that ends in {suffix} for these reports; rename --output")
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: expected a file to write to, found a folder; give another --output")
    if not path.parent.is_dir():
        raise UserError(f"{path}: expected its folder to exist; make {path.parent} first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"{path}: cannot be written; check the rights")


def api_key(args: argparse.Namespace) -> str | None:
    """The key in the environment variable that --api_key_env names; None without that flag."""
    from pgsam.prior.generate import check_key

    return None if args.api_key_env is None else check_key(os.environ.get(args.api_key_env, ""), args.api_key_env)


# --- what is to be asked ----------------------------------------------------------------------------------------------------------------


def organ_jobs(args: argparse.Namespace) -> tuple[list[Job], str]:
    """A job for every organ and wording (key `liver/long`), and the prompt before anything is put in."""
    from datasets.labels import DATASETS
    from pgsam.prior.generate import WORDINGS, fill_prompt, read_prompt
    from pgsam.prior.organ_reports import normalise_name

    template = read_prompt(args.prompt_file or PROMPTS / "organ_report.txt", ("organ", "modality", "wording"))
    names = args.organs if args.organs is not None else DATASETS[args.dataset].class_names
    organs = list(dict.fromkeys(normalise_name(name) for name in names))
    if not all(organs):
        raise UserError("--organs: expected names, found an empty one")
    wordings = list(dict.fromkeys(args.wordings or ("long", "short")))
    values = [(organ, wording) for organ in organs for wording in wordings]
    jobs = [Job(f"{o}/{w}", fill_prompt(template, {"organ": o, "modality": args.modality, "wording": WORDINGS[w]})) for o, w in values]
    return jobs, template


def slice_jobs(args: argparse.Namespace) -> tuple[list[Job], str]:
    """A job for every slice, its file known to be readable, and the prompt before anything is put in."""
    from pgsam.prior.generate import fill_prompt, read_prompt

    template = read_prompt(args.prompt_file or PROMPTS / "slice_report.txt", ("modality",))
    prompt = fill_prompt(template, {"modality": args.modality})
    pictures = training_pictures(args) if args.root_path else volume_pictures(args) if args.volume_path else scan_pictures(args)
    return [Job(key, prompt, picture) for key, picture in pictures.items()], template


def training_pictures(args: argparse.Namespace) -> dict[str, Callable[[], np.ndarray]]:
    """The training slices of the list by their names."""
    from datasets.layout import case_of
    from datasets.slices import check_slice_header, read_slice
    from preprocess.raw import find_prepared

    folder = find_prepared(args.root_path, "train", list_dir=args.list_dir)
    orientation = orientations_of(folder, args.orientation)

    def read(name: str) -> np.ndarray:
        image, _ = read_slice(folder.files / f"{name}.npz", name, _ANY_LABEL)
        return upright(image, orientation[case_of(name)])

    for name in folder.names:
        path = folder.files / f"{name}.npz"
        if check_slice_header(path, name) != 1:
            raise UserError(f"{path} ({name}): expected a grey slice of a scan to report on, found colour; give a folder of scans")
    return {name: functools.partial(read, name) for name in folder.names}


def volume_pictures(args: argparse.Namespace) -> dict[str, Callable[[], np.ndarray]]:
    """All slices of the test volumes of the list, as `<case>_slice<ddd>`."""
    from datasets.volumes import case_path, check_case_header, read_case
    from preprocess.raw import find_prepared

    folder = find_prepared(args.volume_path, "test", list_dir=args.list_dir)
    orientation = orientations_of(folder, args.orientation)

    @functools.lru_cache(maxsize=1)
    def volume(name: str) -> np.ndarray:
        return read_case(case_path(folder, name), name, _ANY_LABEL).image

    def read(name: str, index: int) -> np.ndarray:
        return upright(volume(name)[index], orientation[name])

    depths = {name: check_case_header(case_path(folder, name), name)[0] for name in folder.names}
    return {f"{name}_slice{i:03d}": functools.partial(read, name, i) for name, depth in depths.items() for i in range(depth)}


def scan_pictures(args: argparse.Namespace) -> dict[str, Callable[[], np.ndarray]]:
    """All axial slices of a scan in Hounsfield units, as `<name>_slice<ddd>`, counted along the axis that the orientation puts first."""
    from pgsam.volume import BTCV_ORIENTATION, reorient, scale_intensity
    from pgsam.volume_io import read_volume, stem_of

    orientation = axial(args.orientation or BTCV_ORIENTATION)
    image = scale_intensity(reorient(read_volume(args.input), orientation).array, "ct_window", tuple(args.window) if args.window else None)
    name = stem_of(args.input)
    return {f"{name}_slice{i:03d}": functools.partial(upright, image[i], orientation) for i in range(len(image))}


_ANY_LABEL = 255  # the readers check labels; these are then dropped unseen, so any dataset's will do


def orientations_of(folder: Any, given: str | None) -> dict[str, str]:
    """The axis codes of each case's slices: what the manifest says, else --orientation, else BTCV's.

    Raises:
        UserError: --orientation contradicts the manifest, or the slices are not axial.
    """
    from pgsam.volume import BTCV_ORIENTATION

    codes = {}
    for case in folder.cases():
        stored = (folder.manifest or {}).get("cases", {}).get(case, {}).get("orientation")
        if stored and given and stored != given:
            raise UserError(f"--orientation {given}: {folder.files} was prepared as {stored} ({case}); leave the flag out")
        codes[case] = axial(stored or given or BTCV_ORIENTATION)
    return codes


def axial(code: str) -> str:
    """The code; a UserError unless slices [H, W] in that orientation are axial."""
    from pgsam.volume import check_orientation

    if check_orientation(code)[0] not in "LR" or code[1] not in "AP":
        raise UserError(f"orientation {code}: expected axial slices, such as LAS; preprocess/nifti.py turns other data")
    return code


def upright(image: np.ndarray, orientation: str) -> np.ndarray:
    """The slice as radiologists look at it, which is how models have seen them: anterior on top, the patient's left on the right."""
    from pgsam.overlay import for_display

    return np.ascontiguousarray(for_display(image, orientation))


# --- what is there and what is made -----------------------------------------------------------------------------------------------------


class OrganStore:
    """The JSON file of organ reports; it is written anew, whole, after every report."""

    def __init__(self, path: Path, template: str) -> None:
        from pgsam.prior.organ_reports import read_organ_reports

        self._path, self._template = path, template
        self._held_out: tuple[str, ...] = ()
        self._organs: dict[str, dict[str, Any]] = {}
        if path.exists():
            there = read_organ_reports(path)
            self._held_out = there.held_out
            self._organs = {organ: dict(wordings) for organ, wordings in there.organs.items()}

    def keys(self) -> set[str]:
        """What need not be asked again, as `liver/long`."""
        return {f"{organ}/{wording}" for organ, wordings in self._organs.items() for wording in wordings}

    def save(self, job: Job, generator: str, text: str) -> None:
        """Adds a report."""
        from pgsam.prior.organ_reports import OrganReports, write_organ_reports
        from pgsam.prior.provenance import Provenance, Report

        organ, _, wording = job.key.rpartition("/")
        self._organs.setdefault(organ, {})[wording] = Report(text, Provenance(generator, job.prompt, today(), False))
        reports = OrganReports(str(self._path), self._organs, self._held_out)
        write_organ_reports(self._path, reports, Provenance(generator, self._template, today(), False))


class SliceStore:
    """The .jsonl file of slice reports; one line is appended after every report."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def keys(self) -> set[str]:
        """What need not be asked again."""
        from pgsam.prior.slice_reports import read_slice_reports

        return set(read_slice_reports(self._path).reports) if self._path.exists() else set()

    def save(self, job: Job, generator: str, text: str) -> None:
        """Adds a report."""
        from pgsam.prior.provenance import Provenance, Report
        from pgsam.prior.slice_reports import append_slice_report

        append_slice_report(self._path, job.key, Report(text, Provenance(generator, job.prompt, today(), False)))


def today() -> str:
    """The date of a report, UTC."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def make_writer(args: argparse.Namespace, key: str | None, *, images: bool) -> Any:
    """The `Writer` that the flags describe."""
    from pgsam.engine.device import pick_device
    from pgsam.prior.generate import ChatEndpoint, Generator, LocalModel, Writer

    generator: Generator
    if args.base_url is not None:
        generator = ChatEndpoint(
            args.base_url,
            args.model,
            key=key,
            timeout_s=args.timeout or 120.0,
            max_tokens=args.max_tokens,
            token_limit_name=args.token_limit_name or "max_tokens",
        )
    else:
        generator = LocalModel(args.local_model, images=images, device=str(pick_device(args.device or "auto")), max_tokens=args.max_tokens)
    interval_s = 60 / args.requests_per_minute if args.requests_per_minute else 0.0
    return Writer(generator, args.retries, interval_s, args.min_words, args.max_words)


def show_first(todo: Sequence[Job]) -> int:
    """Prints the first prompt of a dry run; 0."""
    if todo:
        picture = todo[0].picture
        size = " with a picture of {} x {}".format(*picture().shape) if picture else ""
        print(f"first: {todo[0].key}{size}\n\n{todo[0].prompt}")
    return 0


def make_reports(todo: Sequence[Job], writer: Any, save: Callable[[Job, str, str], None]) -> tuple[dict[str, str], int]:
    """Makes and saves one report after the other.

    Returns:
        The keys that failed, with the reason, and how many were not tried because the server no longer answers.
    """
    from tqdm import tqdm

    from pgsam.prior.generate import Unavailable, Unusable

    failed: dict[str, str] = {}
    in_a_row = 0
    with tqdm(todo, desc="reports", unit="report", disable=None) as progress:
        for tried, job in enumerate(progress, start=1):
            try:
                text = writer.report(job.prompt, job.picture() if job.picture else None)
            except (Unavailable, Unusable) as error:
                failed[job.key] = str(error)
                progress.set_postfix(failed=len(failed))
                in_a_row = in_a_row + 1 if isinstance(error, Unavailable) else 0
                if in_a_row == _MOST_UNAVAILABLE:
                    return failed, len(todo) - tried
            else:
                in_a_row = 0
                save(job, writer.generator.label, text)
    return failed, 0


if __name__ == "__main__":
    sys.exit(main())
