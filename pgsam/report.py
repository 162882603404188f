"""`report.html` of a test: one page that holds everything it shows, with no scripts and nothing from outside, made from `metrics.json`.

A Content-Security-Policy in the page forbids scripts and every address outside; the one style sheet (report.css) is allowed by its hash, so
there are no style attributes, and names of organs and cases, which are the user's, are escaped wherever they stand.

Each number can be read back: its element has `data-metric` and `data-value`, the value as in metrics.json (Dice in [0, 1], full precision) or
nothing where it is undefined, and as far as they apply `data-protocol`, `data-organ`, `data-case`, `data-slice`; means have `data-mean` (over
`cases` or `organs`), `data-lo` and `data-hi` (95 % interval), `data-n` and `data-n-undefined`.
"""

import base64
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from pgsam.box_plot import Group, box_plot, ticks_up_to
from pgsam.overlay import Colour, SlicePicture
from pgsam.protocols import SHOWN, Shown
from pgsam.volume_io import replacing

_UNKNOWN_COLOUR = (128, 128, 128)


_METRICS = {
    **SHOWN,
    "n_pred": Shown("predicted", "voxels", decimals=0),
    "n_ref": Shown("reference", "voxels", decimals=0),
    "n_missed": Shown("missed", "cases", decimals=0),
    "n_false_positive": Shown("false positive", "cases", decimals=0),
}
_PROTOCOLS = {
    "strict": "Values as measured. An organ in neither the reference nor the prediction of a case is undefined there; with one of the two empty "
    "its DSC is 0 and its distances are undefined, except the penalised HD95, which is then the diagonal of the volume. Undefined values stay out "
    "of the means and are counted.",
    "transunet": "The convention of TransUNet's and SAMed's released test code, kept because published tables use it: an organ that is predicted "
    "and not in the reference counts as DSC 100 and HD95 0, an organ that is not predicted as DSC 0 and HD95 0. HD95 is in voxels.",
}
_WORDS = (
    ("DSC", "Dice coefficient 2|A and B| / (|A| + |B|) in points of 100."),
    ("HD95", "95th percentile of the distances between the two surfaces, in mm or in voxels."),
    ("ASSD", "mean of the distances between the two surfaces, in mm."),
    ("mean over organs", "mean of the organs' means over cases."),
    ("[low, high]", "95 % interval: 2.5 to 97.5 percentile of 1000 bootstrap resamples of the cases; of equal values none is shown."),
    (
        "n",
        "number of values behind a mean: cases, and pairs of case and organ in the row of the mean over organs; the column's is that of DSC, "
        '"n 3 of 4" in a cell says that 1 of 4 is undefined.',
    ),
    ("missed, false positive", "cases with the organ in the reference and not in the prediction, and the reverse."),
)
_REASONS = {
    "a": "the organ is in neither the reference nor the prediction of the case",
    "b": "missed: in the reference, not predicted, so there is no distance and DSC is 0",
    "c": "false positive: predicted, not in the reference, so there is no distance and DSC is 0",
    "d": "the voxel spacing of the case is not known, so there is no distance in mm",
    "e": "no case has a defined value",
}


def write_report(
    path: str | Path, results: Mapping[str, Any], *, colours: Mapping[str, Colour] | None = None, pictures: Sequence[SlicePicture] = ()
) -> None:
    """Writes the page of a test; it appears complete or not at all.

    Args:
        path: of the HTML file.
        results: the content of metrics.json (design section 3), as `evaluate` returns it or as it is read back.
        colours: organ -> RGB; organs without are grey.
        pictures: the worst slices, worst first; without any the page says that it was written from the numbers alone.

    Raises:
        UserError: the file cannot be written.
    """
    page = report_html(results, colours=colours, pictures=pictures)
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def report_html(results: Mapping[str, Any], *, colours: Mapping[str, Colour] | None = None, pictures: Sequence[SlicePicture] = ()) -> str:
    """The page of `write_report` as text."""
    colours = colours or {}
    settings, cases, summary = results["settings"], results["cases"], results["summary"]
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    allowed = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{allowed}'; base-uri 'none'; form-action 'none'"
    title = _title(settings, len(cases))
    body = [
        f"<h1>{escape(title)}</h1>",
        *_what_was_tested(settings, cases),
        *_headline(summary),
        *(f'<p class="note">{escape(str(note))}</p>' for note in settings.get("notes", ())),
    ]
    for protocol, definition in _PROTOCOLS.items():
        body += [f"<h2>Organs, protocol {protocol}</h2>", f"<p>{escape(definition)}</p>", *_summary_table(summary[protocol], protocol, colours)]
    body += ["<h2>Distribution over cases</h2>", *_box_plots(cases, list(summary["strict"]["organs"]), colours)]
    body += ["<h2>Cases, worst first</h2>", *_cases(cases, colours)]
    body += ["<h2>Worst slices</h2>", *_worst_slices(pictures, colours)]
    body += ["<h2>Settings</h2>", *_settings(settings)]
    body += ["<h2>Words</h2>", "<dl>", *(f"<dt>{escape(word)}</dt><dd>{escape(text)}</dd>" for word, text in _WORDS), "</dl>"]
    body += ['<h2 id="marks">Marks of undefined values and of DSC 0</h2>', "<dl>"]
    body += [*(f"<dt>{mark}</dt><dd>{escape(text)}</dd>" for mark, text in _REASONS.items()), "</dl>"]
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>",
            f"<style>{style}</style>",
            "</head>",
            "<body>",
            *body,
            "</body>",
            "</html>",
            "",
        ]
    )


# --- parts of a number --------------------------------------------------------------------------------------------------------------------


def _data(**attributes: object) -> str:
    """`data-` attributes; those that are None are left out."""
    return "".join(f' data-{name.replace("_", "-")}="{escape(str(value))}"' for name, value in attributes.items() if value is not None)


def _exact(value: float | None) -> str:
    """A value with all its digits; nothing where it is undefined."""
    return "" if value is None else repr(value)


def _shown(value: float | None, metric: str, mark: str | None = None) -> str:
    """A value as it is read; `mark` is a key of `_REASONS`."""
    kind = _METRICS[metric]
    text = '<span class="undefined">undefined</span>' if value is None else f"{kind.factor * value:.{kind.decimals}f}"
    return text if mark is None else f'{text}<sup><a href="#marks" title="{escape(_REASONS[mark])}">{mark}</a></sup>'


def _mark(row: Mapping[str, float | None], metric: str) -> str | None:
    """Why a value of one case and organ is undefined, or its DSC 0."""
    if row[metric] is not None and metric != "dsc":
        return None
    if not row["n_pred"] and not row["n_ref"]:
        return "a"
    if not (row["n_pred"] and row["n_ref"]) and metric != "hd95_mm_penalised":
        return "c" if row["n_pred"] else "b"
    return "d" if row[metric] is None else None


def _heads(metrics: Iterable[str]) -> str:
    return "".join(f'<th scope="col">{_METRICS[metric].title} <small>[{_METRICS[metric].unit}]</small></th>' for metric in metrics)


def _swatch(organ: str, colours: Mapping[str, Colour]) -> str:
    red, green, blue = colours.get(organ, _UNKNOWN_COLOUR)
    square = f'<rect width="11" height="11" rx="2" fill="rgb({red}, {green}, {blue})"/>'
    swatch = f'<svg class="swatch" width="11" height="11" viewBox="0 0 11 11" aria-hidden="true">{square}</svg>'
    return f'<span class="organ">{swatch}<span>{escape(organ)}</span></span>'


def _table(head: str, rows: Iterable[str], label: str) -> list[str]:
    """A table in a box of its own, which scrolls where the page is narrower; it can be reached and scrolled with the keyboard."""
    open_box = f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}">'
    return [open_box, "<table>", f"<thead><tr>{head}</tr></thead>", "<tbody>", *rows, "</tbody>", "</table>", "</div>"]


# --- sections -----------------------------------------------------------------------------------------------------------------------------


def _title(settings: Mapping[str, Any], n_cases: int) -> str:
    model, flags = settings.get("model", {}), settings.get("flags", {})
    what = Path(str(flags["checkpoint"])).name if flags.get("checkpoint") else model.get("module", "a model")
    return f"Test of {what} on {n_cases} case{'s' if n_cases != 1 else ''}"


def _what_was_tested(settings: Mapping[str, Any], cases: Mapping[str, Any]) -> list[str]:
    """The facts that a reader asks for first, as far as the settings have them."""
    flags, model, data, run = (settings.get(name, {}) for name in ("flags", "model", "data", "run"))
    sizes = f", {model['vit_name']}, {model['img_size']} px" if {"vit_name", "img_size"} <= set(model) else ""
    seconds = run.get("seconds")
    facts = (
        ("Checkpoint", flags.get("checkpoint")),
        ("Module", f"{model['module']}{sizes}" if "module" in model else None),
        ("Data", data.get("files", flags.get("volume_path"))),
        ("List", data.get("list")),
        ("Cases", len(cases)),
        ("Organs", len(next(iter(cases.values())))),
        ("Finished", run.get("finished")),
        ("Duration", None if seconds is None else f"{seconds:.1f} s on {run.get('device', 'an unknown device')}"),
        ("Commit", run.get("git_commit")),
    )
    return ["<dl>", *(f"<dt>{label}</dt><dd>{escape(str(value))}</dd>" for label, value in facts if value is not None), "</dl>"]


def _headline(summary: Mapping[str, Any]) -> list[str]:
    """The means over organs that papers print, one line a protocol."""
    lines = []
    for protocol in _PROTOCOLS:
        mean = summary[protocol]["mean"]
        distance = "hd95_mm" if mean.get("hd95_mm", {}).get("mean") is not None else "hd95_vox"
        cells = (
            f"{_METRICS[metric].title} <b{_data(protocol=protocol, metric=metric, value=_exact(mean[metric]['mean']), mean='organs')}>"
            f"{_shown(mean[metric]['mean'], metric)}</b> [{_METRICS[metric].unit}]"
            for metric in ("dsc", distance)
        )
        lines.append(f"<dt>Mean over organs, {protocol}</dt><dd>{', '.join(cells)}</dd>")
    return ["<dl>", *lines, "</dl>"]


def _summary_table(summary: Mapping[str, Any], protocol: str, colours: Mapping[str, Colour]) -> list[str]:
    """Means over cases of each organ, and their mean over organs."""
    metrics = [metric for metric in _METRICS if metric in summary["mean"]]
    counts = ("n_missed", "n_false_positive")

    def cell(values: Mapping[str, Any], metric: str, **where: object) -> str:
        low, high = values["ci95"] or (None, None)
        attributes = _data(
            protocol=protocol, metric=metric, value=_exact(values["mean"]), lo=_exact(low), hi=_exact(high), n=values["n"], **where
        ) + _data(n_undefined=values["n_undefined"])
        kind = _METRICS[metric]
        below = ""
        if low is not None and high is not None and low < high:
            below = f"<small>[{kind.factor * low:.{kind.decimals}f}, {kind.factor * high:.{kind.decimals}f}]</small>"
        if values["n_undefined"]:
            below += f"<small>n {values['n']} of {values['n'] + values['n_undefined']}</small>"
        return f"<td{attributes}>{_shown(values['mean'], metric, None if values['n'] else 'e')}{below}</td>"

    n_head = '<th scope="col">n <small>[DSC]</small></th>'
    rows = []
    for organ, cells in summary["organs"].items():
        row = "".join(cell(cells[metric], metric, organ=organ, mean="cases") for metric in metrics)
        row += f"<td>{cells['dsc']['n']}</td>"
        row += "".join(f"<td{_data(protocol=protocol, organ=organ, metric=name, value=cells[name])}>{cells[name]}</td>" for name in counts)
        rows.append(f'<tr><th scope="row">{_swatch(organ, colours)}</th>{row}</tr>')
    row = "".join(cell(summary["mean"][metric], metric, mean="organs") for metric in metrics)
    row += f"<td>{summary['mean']['dsc']['n']}</td>"
    for name in counts:
        total = sum(cells[name] for cells in summary["organs"].values())
        row += f"<td{_data(protocol=protocol, metric=name, value=total, mean='sum')}>{total}</td>"
    rows.append(f'<tr class="overall"><th scope="row">mean over organs</th>{row}</tr>')
    return _table(f'<th scope="col">Organ</th>{_heads(metrics)}{n_head}{_heads(counts)}', rows, f"organs, protocol {protocol}")


def _box_plots(cases: Mapping[str, Any], organs: Sequence[str], colours: Mapping[str, Colour]) -> list[str]:
    """DSC and HD95 of every case, by organ."""
    in_mm = any(case[organ]["hd95_mm"] is not None for case in cases.values() for organ in organs)
    parts = [
        "<p>Protocol strict. Box: quartiles and median; whiskers: the furthest values within 1.5 times the box's length; a dot a case. "
        "Undefined values are not drawn.</p>",
        '<div class="plots">',
    ]
    for metric in ("dsc", "hd95_mm" if in_mm else "hd95_vox"):
        kind = _METRICS[metric]
        groups = []
        for organ in organs:
            values = {name: case[organ][metric] for name, case in cases.items() if case[organ][metric] is not None}
            groups.append(Group(organ, colours.get(organ, _UNKNOWN_COLOUR), values, len(cases) - len(values)))
        ticks = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0] if metric == "dsc" else ticks_up_to(max((v for g in groups for v in g.values.values()), default=0))
        plot = box_plot(groups, metric=metric, title=f"{kind.head} of every case, by organ", ticks=ticks, factor=kind.factor, decimals=kind.decimals)
        parts.append(f"<figure><figcaption><strong>{kind.head}</strong></figcaption>\n{plot}\n</figure>")
    return [*parts, "</div>"]


def _mean_dsc(case: Mapping[str, Mapping[str, float | None]]) -> tuple[float | None, int]:
    """Mean strict DSC over the organs of a case that have one, and how many those are."""
    values = [row["dsc"] for row in case.values() if row["dsc"] is not None]
    return (math.fsum(values) / len(values) if values else None), len(values)


def _cases(cases: Mapping[str, Any], colours: Mapping[str, Colour]) -> list[str]:
    """A table of the DSC of every case and organ, and all metrics of each case to unfold."""
    organs = list(next(iter(cases.values())))
    means = {name: _mean_dsc(case) for name, case in cases.items()}
    order = sorted(cases, key=lambda name: (means[name][0] is None, means[name][0] or 0.0, name))
    rows, unfold = [], []
    for name in order:
        case, (mean, n) = cases[name], means[name]
        worst = min((row["dsc"] for row in case.values() if row["dsc"] is not None), default=None)
        attributes = _data(protocol="strict", case=name, metric="dsc", value=_exact(mean), mean="organs", n=n, n_undefined=len(case) - n)
        row = f"<td{attributes}>{_shown(mean, 'dsc')}</td>"
        for organ in organs:
            value = case[organ]["dsc"]
            text = _shown(value, "dsc", _mark(case[organ], "dsc"))
            text = f"<b>{text}</b>" if value is not None and value == worst else text
            row += f"<td{_data(protocol='strict', case=name, organ=organ, metric='dsc', value=_exact(value))}>{text}</td>"
        rows.append(f'<tr><th scope="row"><span class="case">{escape(name)}</span></th>{row}</tr>')
        unfold += _case_details(name, case, mean, worst, colours)
    heads = "".join(f'<th scope="col">{_swatch(organ, colours)} <small>[0-100]</small></th>' for organ in organs)
    return [
        "<p>DSC, protocol strict, in the order of the mean over the organs that have one; cases without any stand last. "
        "Bold: a case's worst organ.</p>",
        *_table(f'<th scope="col">Case</th><th scope="col">mean DSC <small>[0-100]</small></th>{heads}', rows, "DSC of every case"),
        '<p class="quiet">All metrics of each case, in the same order:</p>',
        *unfold,
    ]


def _case_details(name: str, case: Mapping[str, Any], mean: float | None, worst: float | None, colours: Mapping[str, Colour]) -> list[str]:
    """One case, folded: every number that metrics.json has of it."""
    metrics = [metric for metric in _METRICS if metric in next(iter(case.values()))]
    rows = []
    for organ, values in case.items():
        row = "".join(
            f"<td{_data(protocol='strict', case=name, organ=organ, metric=metric, value=_exact(values[metric]))}>"
            f"{_shown(values[metric], metric, _mark(values, metric))}</td>"
            for metric in metrics
        )
        rows.append(f'<tr><th scope="row">{_swatch(organ, colours)}</th>{row}</tr>')
    lowest = [organ for organ, values in case.items() if values["dsc"] is not None and values["dsc"] == worst]
    title = f"{escape(name)}: mean DSC {_shown(mean, 'dsc')}"
    if worst is not None:
        title += f", worst {escape(', '.join(lowest))} {_shown(worst, 'dsc')} [0-100]"
    table = _table(f'<th scope="col">Organ</th>{_heads(metrics)}', rows, f"all metrics of {name}")
    return ["<details>", f"<summary>{title}</summary>", *table, "</details>"]


def _worst_slices(pictures: Sequence[SlicePicture], colours: Mapping[str, Colour]) -> list[str]:
    if not pictures:
        return ["<p>No pictures: no slice differs from its reference, or the page was written from metrics.json alone.</p>"]
    line = '<svg class="lines" width="46" height="10" viewBox="0 0 46 10" aria-hidden="true"><line class="{}" x1="0" x2="46" y1="5" y2="5"/></svg>'
    return [
        f"<p>{line.format('solid')} reference &nbsp; {line.format('dashed')} prediction, in a lighter tint of the organ's colour.</p>",
        "<p>The slices with the largest loss, few of one case and no neighbours. Numbers behind organs are their DSC [0-100] in the slice, the "
        "organs that cost most first; slices count from 0 in the stored order. Where slices are axial, anterior is on top and the patient's left "
        "on the right.</p>",
        "<details><summary>How the loss of a slice is counted</summary><p>It is the sum over the organs of (1 - DSC) a / (a + a0), with the DSC "
        "[0-1] of the organ in the slice, a the pixels of the larger of its two masks and a0 one thousandth of the slice's pixels: an organ of "
        "that size weighs a half, a large one nearly 1, a few stray pixels next to nothing.</p></details>",
        '<div class="slices">',
        *(_figure(picture, colours) for picture in pictures),
        "</div>",
    ]


def _figure(picture: SlicePicture, colours: Mapping[str, Colour]) -> str:
    """One slice and what is to be said of it."""
    where = f"slice {picture.number} of 0 to {picture.depth - 1}"
    alternative = f"{picture.case}, {where}: outlines of reference and prediction"
    axial = picture.orientation[0] in "LR" and picture.orientation[1] in "AP"
    turned = "" if axial else f", not axial (stored {escape(picture.orientation)})"
    organs = ""
    for organ, found in picture.organs.items():
        attributes = _data(case=picture.case, slice=picture.number, organ=organ, metric="dsc", value=_exact(found.dsc))
        side = "" if found.n_pred and found.n_ref else " not predicted" if found.n_ref else " not in reference"
        organs += f"<li{attributes}>{_swatch(organ, colours)} {_shown(found.dsc, 'dsc')}{side}</li>"
    return "\n".join(
        [
            f"<figure{_data(case=picture.case, slice=picture.number, metric='loss', value=_exact(picture.loss))}>",
            f'<img src="data:image/jpeg;base64,{base64.b64encode(picture.jpeg).decode()}"'
            f' width="{picture.size[0]}" height="{picture.size[1]}" alt="{escape(alternative)}">',
            f"<figcaption><strong>{escape(picture.case)}</strong>, {where}{turned}, loss {picture.loss:.2f}",
            f'<ul class="organs">{organs}</ul></figcaption>',
            "</figure>",
        ]
    )


def _settings(settings: Mapping[str, Any]) -> list[str]:
    """Everything else that metrics.json says of the run, folded by topic."""
    parts = []
    for topic, content in settings.items():
        if topic == "notes":
            continue
        rows = [f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>' for name, value in _flat("", content)]
        head = '<th scope="col">Setting</th><th scope="col">Value</th>'
        table = _table(head, rows, topic)
        parts += ['<details class="settings">', f"<summary>{escape(topic)}</summary>", *table, "</details>"]
    return parts or ["<p>metrics.json holds none.</p>"]


def _flat(name: str, value: Any) -> list[tuple[str, str]]:
    """Names with dots, and values as text."""
    if isinstance(value, Mapping) and value:
        return [row for key, inner in value.items() for row in _flat(f"{name}.{key}" if name else str(key), inner)]
    if value is None:
        return [(name, "not set")]
    if isinstance(value, bool):
        return [(name, "yes" if value else "no")]
    if isinstance(value, str):
        return [(name, value)]
    if isinstance(value, Mapping | Sequence):
        return [(name, ", ".join(map(str, value)) or "none")]
    return [(name, str(value))]
