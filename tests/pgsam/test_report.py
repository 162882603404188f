"""report.html read back with the standard library's HTML parser: every number of metrics.json, nothing from outside, names as text."""

import base64
import copy
import hashlib
import io
import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from pgsam.errors import UserError
from pgsam.report import report_html, write_report

Read = Callable[[str], list[Any]]


@pytest.fixture(scope="module")
def page(example: SimpleNamespace) -> str:
    return report_html(example.results, colours=example.colours, pictures=example.pictures)


@pytest.fixture(scope="module")
def elements(page: str, read: Read) -> list[Any]:
    return read(page)


def value_of(element: Any) -> float | None:
    """The exact number of an element; empty is undefined."""
    text = element.attributes["data-value"]
    return None if text == "" else float(text)


def where(elements: list[Any], **attributes: object) -> list[Any]:
    """Elements whose `data-` attributes have these values; None: that they do not have."""
    wanted = {f"data-{name.replace('_', '-')}": value for name, value in attributes.items()}
    return [e for e in elements if all(e.attributes.get(name) == (None if value is None else str(value)) for name, value in wanted.items())]


def cells(elements: list[Any], **attributes: object) -> list[Any]:
    return [e for e in where(elements, **attributes) if e.tag == "td"]


def columns(page: str, read: Read, title: str) -> list[list[str]]:
    """The cells of the table that follows a heading, as text, row by row."""
    part = page[page.index(f"<h2>{title}</h2>") :]
    part = part[part.index("<table>") : part.index("</table>") + len("</table>")]
    return [[e.text for e in read(f"<table>{row}</table>") if e.tag in ("th", "td")] for row in re.findall(r"<tr.*?</tr>", part, re.DOTALL)]


# --- numbers ------------------------------------------------------------------------------------------------------------------------------

FACTORS = {"dsc": 100}


def shown(value: float | None, metric: str) -> str:
    """What a reader should see first in a cell."""
    if value is None:
        return "undefined"
    return str(value) if metric.startswith("n_") else f"{FACTORS.get(metric, 1) * value:.2f}"


@pytest.mark.parametrize("protocol", ["strict", "transunet"])
def test_every_mean_with_its_interval(protocol: str, example: SimpleNamespace, elements: list[Any]) -> None:
    summary = example.results["summary"][protocol]
    rows = [(organ, summary["organs"][organ], "cases") for organ in summary["organs"]] + [(None, summary["mean"], "organs")]
    seen = 0
    for organ, row, mean in rows:
        for metric in summary["mean"]:
            (cell,) = cells(elements, protocol=protocol, case=None, organ=organ, metric=metric, mean=mean)
            found = row[metric]
            assert value_of(cell) == found["mean"]
            interval = [cell.attributes.get("data-lo"), cell.attributes.get("data-hi")]
            assert interval == (["", ""] if found["ci95"] is None else [repr(end) for end in found["ci95"]])
            assert (cell.attributes["data-n"], cell.attributes["data-n-undefined"]) == (str(found["n"]), str(found["n_undefined"]))
            assert cell.text.startswith(shown(found["mean"], metric))
            spread = found["ci95"] is not None and found["ci95"][0] < found["ci95"][1]
            ends = [f"{FACTORS.get(metric, 1) * end:.2f}" for end in found["ci95"]] if spread else []
            assert re.findall(r"\[(.*?), (.*?)\]", cell.text) == ([tuple(ends)] if spread else [])
            assert (f"n {found['n']} of {found['n'] + found['n_undefined']}" in cell.text) == (found["n_undefined"] > 0)
            seen += 1
    assert seen == {"strict": 25, "transunet": 10}[protocol]
    for count in ("n_missed", "n_false_positive"):
        for organ, row in summary["organs"].items():
            (cell,) = cells(elements, protocol=protocol, organ=organ, metric=count)
            assert (value_of(cell), cell.text) == (row[count], str(row[count]))
        (total,) = cells(elements, protocol=protocol, organ=None, metric=count)
        assert value_of(total) == sum(row[count] for row in summary["organs"].values())


def test_the_means_over_organs_stand_at_the_top(example: SimpleNamespace, elements: list[Any]) -> None:
    summary = example.results["summary"]
    found = {(e.attributes["data-protocol"], e.attributes["data-metric"]): (value_of(e), e.text) for e in elements if e.tag == "b" and e.attributes}
    for (protocol, metric), (value, text) in found.items():
        assert value == summary[protocol]["mean"][metric]["mean"]
        assert text == shown(value, metric)
    assert set(found) == {("strict", "dsc"), ("strict", "hd95_mm"), ("transunet", "dsc"), ("transunet", "hd95_vox")}


def test_every_number_of_every_case(example: SimpleNamespace, elements: list[Any]) -> None:
    for case, organs in example.results["cases"].items():
        for organ, row in organs.items():
            for metric, value in row.items():
                found = cells(elements, protocol="strict", case=case, organ=organ, metric=metric)
                assert len(found) == (2 if metric == "dsc" else 1)  # DSC also stands in the table of all cases
                for cell in found:
                    assert value_of(cell) == value
                    assert cell.text.startswith(shown(value, metric))


def test_no_number_is_not_a_number(page: str, elements: list[Any]) -> None:
    for element in elements:
        if element.tag == "td":
            assert not re.search(r"\b(nan|inf|none|null)\b", element.text, re.IGNORECASE), element
    assert 'data-value="nan"' not in page
    assert 'data-value="None"' not in page


def test_undefined_says_why(example: SimpleNamespace, page: str, elements: list[Any]) -> None:
    """The mark of a cell by hand, from the words of the protocol."""

    def mark(case: str, organ: str, metric: str) -> str:
        marks = {re.sub(r"^(undefined|[0-9.]+)", "", cell.text) for cell in cells(elements, case=case, organ=organ, metric=metric)}
        assert len(marks) == 1
        return marks.pop()

    assert [mark("empty", "liver", metric) for metric in ("dsc", "hd95_vox", "hd95_mm", "hd95_mm_penalised", "assd_mm")] == ["a"] * 5
    assert [mark("missed", "aorta", metric) for metric in ("dsc", "hd95_vox", "hd95_mm", "assd_mm")] == ["b"] * 4
    assert [mark("false positive", example.organ, metric) for metric in ("dsc", "hd95_vox", "hd95_mm", "assd_mm")] == ["c"] * 4
    assert mark("missed", "aorta", "hd95_mm_penalised") == ""  # the diagonal
    assert [mark("no spacing", "liver", metric) for metric in ("hd95_mm", "hd95_mm_penalised", "assd_mm")] == ["d"] * 3
    assert [mark("no spacing", "liver", metric) for metric in ("dsc", "hd95_vox", "n_ref")] == [""] * 3
    assert [mark("no spacing, missed", "aorta", metric) for metric in ("dsc", "hd95_mm", "hd95_mm_penalised")] == ["b", "b", "d"]
    assert mark("good", "never", "n_pred") == ""
    (never,) = cells(elements, protocol="strict", organ="never", metric="dsc", mean="cases")
    assert never.text == "undefineden 0 of 7"
    part = page[page.index('id="marks"') :]
    for letter in "abcde":
        assert f"<dt>{letter}</dt><dd>" in part


def test_cases_stand_in_the_order_of_their_mean_worst_first(example: SimpleNamespace, elements: list[Any], page: str, read: Read) -> None:
    means = {}
    for case, organs in example.results["cases"].items():
        values = [row["dsc"] for row in organs.values() if row["dsc"] is not None]
        means[case] = sum(values) / len(values) if values else None
        (cell,) = cells(elements, protocol="strict", case=case, organ=None, metric="dsc", mean="organs")
        assert value_of(cell) == pytest.approx(means[case], abs=1e-15)
        assert cell.text == shown(means[case], "dsc")
        assert (cell.attributes["data-n"], cell.attributes["data-n-undefined"]) == (str(len(values)), str(4 - len(values)))
    rows = columns(page, read, "Cases, worst first")[1:]
    order = [row[0] for row in rows]
    assert order[-1] == "empty"
    assert sorted(order) == sorted(means)
    assert [means[case] for case in order[:-1]] == sorted(means[case] for case in order[:-1])
    assert order.index("no spacing, missed") - order.index("missed") in (1, -1)  # equal means
    assert "cases without any stand last" in page
    titles = [e.text for e in elements if e.tag == "summary" and ": mean DSC " in e.text]
    assert [title.split(": mean DSC ")[0] for title in titles] == order
    assert titles[-1] == "empty: mean DSC undefined"
    missed = next(title for title in titles if title.startswith("missed"))
    assert missed.endswith(", worst aorta 0.00 [0-100]")


def test_the_worst_organ_of_a_case_is_bold(elements: list[Any]) -> None:
    bold = [e.text for e in elements if e.tag == "b" and e.inside[-1:] == ["td"]]
    assert bold.count("0.00b") == 2
    assert bold.count("0.00c") == 1
    assert len(bold) >= 6


def test_tables_name_their_units(page: str, read: Read) -> None:
    strict = columns(page, read, "Organs, protocol strict")[0]
    assert [head.replace(" ", "") for head in strict[1:6]] == ["DSC[0-100]", "HD95[mm]", "HD95penalised[mm]", "HD95[voxels]", "ASSD[mm]"]
    transunet = columns(page, read, "Organs, protocol transunet")[0]
    assert [head.replace(" ", "") for head in transunet[1:3]] == ["DSC[0-100]", "HD95[voxels]"]
    assert [head.replace(" ", "") for head in transunet[3:]] == ["n[DSC]", "missed[cases]", "falsepositive[cases]"]
    assert [row[6] for row in columns(page, read, "Organs, protocol strict")[1:]] == ["6", "6", "6", "0", "18"]  # defined Dice, counted by hand


# --- box plots ----------------------------------------------------------------------------------------------------------------------------


def test_box_plots_show_every_defined_value(example: SimpleNamespace, elements: list[Any]) -> None:
    plots = [e for e in elements if e.tag == "svg" and e.attributes.get("class") == "boxes"]
    assert [plot.attributes["data-metric"] for plot in plots] == ["dsc", "hd95_mm"]
    assert (plots[0].attributes["data-from"], plots[0].attributes["data-to"]) == ("0.0", "1.0")
    dots = [e for e in elements if e.tag == "circle"]
    wanted = [
        (case, row[metric])
        for metric in ("dsc", "hd95_mm")
        for organ in example.results["summary"]["strict"]["organs"]
        for case, row in ((case, organs[organ]) for case, organs in example.results["cases"].items())
        if row[metric] is not None
    ]
    assert [(dot.attributes["data-case"], value_of(dot)) for dot in dots] == wanted
    counts = [e.text for e in elements if e.tag == "text" and e.attributes.get("class") == "count"]
    assert counts.count("n 0, 7 undefined") == counts.count("undefined in every case") == 2
    assert "n 3, 4 undefined" in counts  # aorta in mm: missed twice, without spacing, and nowhere


def test_distances_are_drawn_in_voxels_where_no_spacing_is_known(example: SimpleNamespace, read: Read) -> None:
    results = copy.deepcopy(example.results)
    for organs in results["cases"].values():
        for row in organs.values():
            row["hd95_mm"] = None
    results["summary"]["strict"]["mean"]["hd95_mm"] = {"mean": None, "ci95": None, "n": 0, "n_undefined": 28}
    elements = read(report_html(results))
    assert [e.attributes["data-metric"] for e in elements if e.attributes.get("class") == "boxes"] == ["dsc", "hd95_vox"]
    assert [e.text for e in elements if e.tag == "strong"] == ["DSC [0-100]", "HD95 [voxels]"]
    top = [e.attributes["data-metric"] for e in elements if e.tag == "b" and "data-protocol" in e.attributes]
    assert top == ["dsc", "hd95_vox", "dsc", "hd95_vox"]


# --- worst slices -------------------------------------------------------------------------------------------------------------------------


def test_slices_with_their_numbers(example: SimpleNamespace, elements: list[Any]) -> None:
    figures = [e for e in elements if e.tag == "figure" and "data-slice" in e.attributes]
    assert len(figures) == len(example.pictures) == 12
    for figure, picture in zip(figures, example.pictures, strict=True):
        assert (figure.attributes["data-case"], figure.attributes["data-slice"]) == (picture.case, str(picture.number))
        assert value_of(figure) == picture.loss
        assert figure.text.strip().startswith(f"{picture.case}, slice {picture.number} of 0 to 8, loss {picture.loss:.2f}")
        reference, prediction = (volume[picture.number] for volume in example.volumes[picture.case][:2])
        listed = where(elements, case=picture.case, slice=picture.number, metric="dsc")
        present = {
            organ: (int((reference == i).sum()), int((prediction == i).sum()), int(((reference == i) & (prediction == i)).sum()))
            for i, organ in enumerate(example.colours, start=1)
            if (reference == i).any() or (prediction == i).any()
        }
        assert {item.attributes["data-organ"] for item in listed} == set(present)
        for item in listed:
            n_ref, n_pred, n_both = present[item.attributes["data-organ"]]
            dsc = 2 * n_both / (n_ref + n_pred)
            assert value_of(item) == pytest.approx(dsc, abs=1e-15)
            side = "" if n_ref and n_pred else " not predicted" if n_ref else " not in reference"
            assert item.text == f"{item.attributes['data-organ']} {100 * dsc:.2f}{side}"
    pictures = [e for e in elements if e.tag == "img"]
    for element, picture in zip(pictures, example.pictures, strict=True):
        head, encoded = element.attributes["src"].split(",")
        assert head == "data:image/jpeg;base64"
        assert base64.b64decode(encoded) == picture.jpeg
        with Image.open(io.BytesIO(picture.jpeg)) as image:
            assert image.size == (int(element.attributes["width"]), int(element.attributes["height"])) == picture.size
        assert element.attributes["alt"].startswith(f"{picture.case}, slice {picture.number} of")


def test_slices_that_are_not_axial_are_named(example: SimpleNamespace) -> None:
    axial, other = (SimpleNamespace(**{**vars(example.pictures[0]), "orientation": code}) for code in ("RPI", "PIR"))
    page = report_html(example.results, pictures=[axial, other])
    assert page.count("not axial") == 1
    assert "not axial (stored PIR)" in page


def test_a_page_of_numbers_alone(example: SimpleNamespace, elements: list[Any], read: Read) -> None:
    page = report_html(json.loads(json.dumps(example.results)))
    assert "No pictures" in page
    alone = read(page)
    assert not [e for e in alone if e.tag == "img"]
    numbers = [(e.tag, e.attributes, e.text) for e in elements if "data-value" in e.attributes and "data-slice" not in e.attributes and e.tag == "td"]
    assert [(e.tag, e.attributes, e.text) for e in alone if "data-value" in e.attributes and e.tag == "td"] == numbers
    assert {e.attributes["fill"] for e in alone if e.tag == "rect"} == {"rgb(128, 128, 128)"}


# --- what the page is made of -------------------------------------------------------------------------------------------------------------


def test_nothing_comes_from_outside(page: str, elements: list[Any]) -> None:
    assert not re.search(r"https?:|//\w|url\(|@import", re.sub(r"base64,[^\"]+", "", page))
    assert {e.tag for e in elements}.isdisjoint({"script", "link", "iframe", "object", "embed", "form", "base"})
    for element in elements:
        assert "style" not in element.attributes, element
        assert not [name for name in element.attributes if name.startswith("on")], element
        for name in ("src", "href"):
            assert element.attributes.get(name, "#").startswith(("data:image/jpeg;base64,", "#")), element
    (policy,) = (e.attributes["content"] for e in elements if e.attributes.get("http-equiv") == "Content-Security-Policy")
    (style,) = (e.text for e in elements if e.tag == "style")
    allowed = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules == {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": f"'sha256-{allowed}'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }


def test_names_are_text(example: SimpleNamespace, page: str, elements: list[Any]) -> None:
    for text in (example.organ, example.case, "<b>x</b>", "<u>read</u>", "<i>report</i>"):
        assert text not in page
        assert any(text in e.text for e in elements)
    assert not [e for e in elements if e.tag in ("script", "u", "i")]
    assert len([e for e in elements if e.tag == "img"]) == 12
    heads = [e.text for e in elements if e.tag == "th"]
    assert heads.count(example.case) == 1
    assert heads.count(example.organ) == 2 + 7  # both protocols, and each case's own table
    assert heads.count(f"{example.organ} [0-100]") == 1


def test_it_says_what_was_tested(example: SimpleNamespace, page: str, elements: list[Any]) -> None:
    facts = {}
    for first, second in pairwise(elements):
        if first.tag == "dt" and second.tag == "dd":
            facts.setdefault(first.text, second.text)
    assert facts["Checkpoint"] == "runs/<b>x</b>/final.safetensors"
    assert facts["Module"] == "pg_sam, vit_b, 224 px"
    assert (facts["Data"], facts["List"]) == ("data/test_vol_h5", "data/lists/test_vol.txt")
    assert (facts["Cases"], facts["Organs"], facts["Finished"]) == ("7", "4", "2031-02-03 04:05:06+00:00")
    assert facts["Duration"] == "12.3 s on cpu"
    assert "Commit" not in facts
    assert [e.text for e in elements if e.attributes.get("class") == "note"] == example.results["settings"]["notes"]
    assert [e.text for e in elements if e.tag == "h1" or (e.tag == "title" and "head" in e.inside)] == ["Test of final.safetensors on 7 cases"] * 2
    settings = [e for e in elements if e.tag in ("th", "td") and "details" in e.inside and not e.attributes.get("data-metric")]
    pairs = dict(zip([e.text for e in settings], [e.text for e in settings[1:]], strict=False))
    assert (pairs["batch_size"], pairs["is_savenii"], pairs["seed"]) == ("not set", "no", "1234")
    assert pairs["reports.liver"] == "A <i>report</i>."
    assert pairs["packages.torch"] == "2.11"
    for words in ("Values as measured", "The convention of TransUNet's", "95 % interval: 2.5 to 97.5 percentile of 1000 bootstrap resamples"):
        assert any(words in e.text for e in elements)


def test_a_page_without_settings(example: SimpleNamespace) -> None:
    page = report_html({**example.results, "settings": {}})
    assert "<h1>Test of a model on 7 cases</h1>" in page


def test_it_is_written_whole_or_not_at_all(example: SimpleNamespace, page: str, tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", example.results, colours=example.colours, pictures=example.pictures)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page
    broken = copy.deepcopy(example.results)
    del broken["cases"]["good"]["liver"]["dsc"]
    with pytest.raises(KeyError):
        write_report(tmp_path / "other.html", broken)
    with pytest.raises(UserError, match=r"report\.html: cannot be written"):
        write_report(tmp_path / "nowhere" / "report.html", example.results)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
