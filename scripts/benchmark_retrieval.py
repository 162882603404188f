"""What retrieval costs: an index as large as Synapse's training set, the share of a slice's test time, and the search alone in larger ones.

    python scripts/benchmark_retrieval.py --json retrieval.json
    python scripts/benchmark_retrieval.py --slices 300 --sizes 1000 2000 4000 --vit_name vit_tiny

An index of `--slices` slices with synthetic embeddings is written to a temporary folder, opened and asked: search, reading of the hits and class
prior are measured in batches, as at test time, against the model's forward in the same process. Its files are in the page cache by then, as they are
at test time after the first volumes. The search over global vectors alone is measured at `--sizes`, by one matrix product and by FAISS where that is
installed; how large the token maps of such an index would be is computed, not written.

Times are CPU seconds of the whole process, medians of `--rounds`; of writing and opening also the seconds on the wall, which are the disk's. Times
mean little on shared machines: quote the shares and ratios.
"""

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pgsam.errors import Parser, UserError, reports_user_errors

if TYPE_CHECKING:
    from pgsam.retrieval.build import Batch
    from pgsam.retrieval.index import IndexFacts

CLASSES = 8
TOP_K = 5
TEMPERATURE = 0.1
SLICES_A_CASE = 123  # Synapse's 18 training cases have 2,211 slices


def build_parser() -> argparse.ArgumentParser:
    """The flags of this program."""
    from pgsam.sam.build import VITS

    parser = Parser(__doc__)
    add = parser.add_argument
    add("--slices", type=int, default=2211, help="of the index that is written (default %(default)s, Synapse's training set)")
    add(
        "--sizes",
        type=int,
        nargs="+",
        default=[12_500, 25_000, 50_000, 100_000, 200_000],
        help="of the indices that are searched (default %(default)s)",
    )
    add("--img_size", type=int, default=224, help="(default %(default)s)")
    add("--vit_name", choices=list(VITS), default="vit_b", help="of the forward that is compared, with random weights (default %(default)s)")
    add("--batch_size", type=int, help="slices at a time (default: as test.py on a CPU)")
    add("--rounds", type=int, default=5, help="of every measurement (default %(default)s)")
    add("--json", type=Path, help="also write the figures to this file")
    return parser


def now() -> np.ndarray:
    """Seconds on the wall, and of CPU of this process."""
    return np.array([time.perf_counter(), time.process_time()])


def median_cpu_seconds(program: Callable[[], Any], rounds: int) -> float:
    """Process CPU time of a call, the median of `rounds` after one to warm up."""
    program()
    seconds = []
    for _ in range(rounds):
        started = time.process_time()
        program()
        seconds.append(time.process_time() - started)
    return float(np.median(seconds))


class SyntheticSlices:
    """Tokens and labels of slices from random numbers, and the seconds that making them took.

    Neighbouring slices have much in common, as in a scan: each is the case's own token map plus half of its own.
    """

    def __init__(self, facts: "IndexFacts", count: int, batch_size: int) -> None:
        self.facts, self.count, self.batch_size = facts, count, batch_size
        self.seconds = np.zeros(2)  # on the wall, of the process
        self.last: Batch | None = None

    def __iter__(self) -> Iterator["Batch"]:
        import torch

        rng, facts = np.random.default_rng(0), self.facts
        shape = (facts.width, facts.grid, facts.grid)
        for start in range(0, self.count, self.batch_size):
            started = now()
            size = min(self.batch_size, self.count - start)
            bases = [np.random.default_rng(case).standard_normal(shape, dtype=np.float32) for case in self._cases(start, size)]
            tokens = np.stack(bases) + 0.5 * rng.standard_normal((size, *shape), dtype=np.float32)
            coarse = rng.integers(0, CLASSES + 1, (size, facts.grid, facts.grid), dtype=np.uint8)
            batch = torch.from_numpy(tokens), coarse.repeat(16, axis=1).repeat(16, axis=2)
            self.last = batch
            self.seconds += now() - started
            yield batch

    @staticmethod
    def _cases(start: int, size: int) -> list[int]:
        return [index // SLICES_A_CASE for index in range(start, start + size)]


def index_stage(args: argparse.Namespace) -> dict[str, Any]:
    """Writes, opens and asks an index, beside the model's forward."""
    import torch

    from pgsam.engine.predict import default_batch_size
    from pgsam.models import SYNAPSE_CLASSES, build_model
    from pgsam.models.card import ModelCard
    from pgsam.retrieval.build import Source, write_index
    from pgsam.retrieval.extractor import EncoderExtractor, global_vectors
    from pgsam.retrieval.index import IndexFacts, SliceIndex
    from pgsam.retrieval.prior import class_prior, fuse
    from pgsam.tuning.lora import lora_merged

    model = build_model("sam_lora_image_encoder", vit_name=args.vit_name, img_size=args.img_size, num_classes=CLASSES, verbose=False).eval()
    card = ModelCard("sam_lora_image_encoder", args.vit_name, args.img_size, args.img_size, SYNAPSE_CLASSES)
    facts = IndexFacts.of(EncoderExtractor(model.image_encoder), card)
    batch_size = args.batch_size or default_batch_size(args.img_size, torch.device("cpu"))
    names = tuple(f"case{i // SLICES_A_CASE:04d}_slice{i % SLICES_A_CASE:03d}" for i in range(args.slices))
    cases = tuple(name[:8] for name in names)
    with tempfile.TemporaryDirectory() as temporary, torch.inference_mode():
        slices, folder = SyntheticSlices(facts, args.slices, batch_size), Path(temporary) / "index"
        started = now()
        write_index(folder, facts, Source(names, cases, cases), slices)
        build = now() - started - slices.seconds
        size = sum(path.stat().st_size for path in folder.iterdir())
        started = now()
        index = SliceIndex.open(folder)
        opened = now() - started
        assert slices.last is not None
        tokens, patient = slices.last[0], cases[-1]
        vectors = global_vectors(tokens)
        hits = index.nearest(vectors, TOP_K, patient)
        memories = index.memories(hits.indices)
        logits = torch.zeros(len(tokens), CLASSES + 1, args.img_size // 4, args.img_size // 4)
        steps: dict[str, Callable[[], Any]] = {
            "search": lambda: index.nearest(global_vectors(tokens), TOP_K, patient),
            "reading": lambda: index.memories(hits.indices),
            "prior": lambda: fuse(logits, class_prior(tokens, memories, TEMPERATURE), 1.0),
        }
        seconds = {name: median_cpu_seconds(step, args.rounds) / len(tokens) for name, step in steps.items()}
        images = torch.rand(len(tokens), 3, args.img_size, args.img_size)
        with lora_merged(model):
            forward = median_cpu_seconds(lambda: model(images), args.rounds) / len(tokens)
    query = sum(seconds.values())
    share = query / (query + forward)
    parts = ", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in seconds.items())
    print(f"index of {args.slices} slices at {args.img_size} px, {facts.width} x {facts.grid} x {facts.grid} tokens: {size / 2**20:.0f} MiB")
    print(f"  written in {build[0]:.1f} s ({build[1]:.1f} s of CPU), opened in {1e3 * opened[0]:.0f} ms")
    print(f"  a query: {1e3 * query:.1f} ms of a slice ({parts}), top_k {TOP_K}")
    print(f"  {args.vit_name}'s forward: {1e3 * forward:.0f} ms; retrieval is {100 * share:.1f} % of both")
    return {
        "slices": args.slices,
        "batch_size": len(tokens),
        "bytes": size,
        "build_s": {"wall": round(build[0], 3), "cpu": round(build[1], 3)},
        "open_s": {"wall": round(opened[0], 4), "cpu": round(opened[1], 4)},
        "query_ms": {**{name: round(1e3 * value, 3) for name, value in seconds.items()}, "all": round(1e3 * query, 3)},
        "forward_ms": round(1e3 * forward, 1),
        "share_of_test_time": round(share, 4),
    }


def search_stage(args: argparse.Namespace) -> dict[str, Any]:
    """The search over global vectors alone, which must give the same by both ways, at several sizes."""
    from pgsam.retrieval.search import NearestVectors
    from pgsam.sam.build import vit_sizes

    width, grid = vit_sizes(args.vit_name).out_chans, args.img_size // 16
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((max(args.sizes), width), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    ways = ["product"] + (["faiss"] if importlib.util.find_spec("faiss") is not None else [])
    rows: list[dict[str, Any]] = []
    for count in sorted(args.sizes):
        searches = {way: NearestVectors(vectors[:count], faiss=way == "faiss") for way in ways}
        row: dict[str, Any] = {"slices": count}
        for batch in (1, 8):
            queries = vectors[rng.integers(0, count, batch)]
            left_out = [np.arange(SLICES_A_CASE)] * batch
            found = [searches[way].find(queries, TOP_K, left_out)[0] for way in ways]
            if any(not np.array_equal(found[0], other) for other in found):
                raise AssertionError(f"{count} slices: the two ways find other neighbours")
            for way in ways:
                seconds = median_cpu_seconds(lambda s=searches[way], q=queries, o=left_out: s.find(q, TOP_K, o), args.rounds) / batch  # type: ignore[misc]
                row[f"{way}_ms_batch_{batch}"] = round(1e3 * seconds, 3)
        row["vectors_bytes"] = count * width * 4
        row["token_maps_bytes"] = count * width * grid**2 * 2
        row["counts_bytes"] = count * (CLASSES + 1) * (4 * grid) ** 2
        rows.append(row)
        words = ", ".join(f"{name.replace('_ms_batch_', ' by ')} {value:.1f} ms" for name, value in row.items() if "_ms_" in name)
        print(
            f"search in {count} vectors, a query: {words}; vectors {row['vectors_bytes'] / 2**20:.0f} MiB, token maps would be "
            f"{row['token_maps_bytes'] / 2**30:.2f} GiB, class counts {row['counts_bytes'] / 2**30:.2f} GiB"
        )
    slopes = {}
    if len(rows) > 1:
        sizes = np.log([row["slices"] for row in rows])
        slopes = {key: round(float(np.polyfit(sizes, np.log([row[key] for row in rows]), 1)[0]), 2) for key in rows[0] if "_ms_" in key}
        print(f"log-log slopes over the number of slices: {', '.join(f'{key} {value:.2f}' for key, value in slopes.items())}")
    return {"sizes": rows, "log_log_slopes": slopes}


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; 0 on success, 2 after an error of the user's."""
    from pgsam.engine.flags import check_img_size, require_at_least

    args = build_parser().parse_args(argv)
    check_img_size(args.img_size)
    require_at_least(args, slices=SLICES_A_CASE + TOP_K, rounds=1, batch_size=1)
    if min(args.sizes) < SLICES_A_CASE + TOP_K:
        raise UserError(f"--sizes {min(args.sizes)}: expected at least {SLICES_A_CASE + TOP_K}, a case and {TOP_K} neighbours of others")
    figures = {"index": index_stage(args), "search": search_stage(args), "machine": {"cores": os.cpu_count()}}
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
