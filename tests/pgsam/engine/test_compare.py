"""The numbers of a comparison, against closed forms, worked-out values and `summarise`; and what its tables say of them."""

import csv
import io
import itertools
import math
import re
from collections.abc import Mapping

import numpy as np
import pytest

from pgsam.engine.compare import MEAN, Difference, Result, compare, mean_or_none, paired_difference, seed_means
from pgsam.engine.compare_tables import blocks_of, draw, format_csv, format_latex, format_markdown, format_text, notes_of, show_difference
from pgsam.errors import UserError
from pgsam.protocols import bootstrap_weights, summarise

ORGANS = ("liver", "aorta")
Table = dict[str, dict[str, dict[str, float | None]]]


def row(dsc: float | None, hd95: float | None = 5.0, *, n_pred: int = 1, n_ref: int = 1) -> dict[str, float | None]:
    """A row of `class_metrics`, as it is in metrics.json."""
    return {"dsc": dsc, "hd95_vox": hd95, "hd95_mm": hd95, "hd95_mm_penalised": hd95, "assd_mm": hd95, "n_pred": n_pred, "n_ref": n_ref}


MISSED = row(0.0, None, n_pred=0) | {"hd95_mm_penalised": 100.0}
IN_NEITHER = row(None, None, n_pred=0, n_ref=0)


def table(*cases: tuple[Mapping, Mapping]) -> Table:
    """Cases `c0`, `c1`, ... of liver and aorta."""
    return {f"c{i}": {organ: dict(one) for organ, one in zip(ORGANS, pair, strict=True)} for i, pair in enumerate(cases)}


def random_table(seed: int, cases: int = 7) -> Table:
    rng = np.random.default_rng(seed)
    return table(*[(row(*rng.uniform(0.2, 0.9, 2)), MISSED if i == 3 else row(*rng.uniform(0.2, 0.9, 2))) for i in range(cases)])


def shifted(source: Table, by: float) -> Table:
    return {case: {organ: {**one, "dsc": one["dsc"] + by} for organ, one in organs.items()} for case, organs in source.items()}  # type: ignore[operator]


def lines_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


# --- numbers ------------------------------------------------------------------------------------------------------------------------------


def test_one_seed_gives_the_numbers_of_summarise() -> None:
    """The numbers that test.py prints of the same cases, organ by organ, intervals too."""
    source = random_table(0)
    compared = compare([Result("a", (source,))], ORGANS)
    for protocol, metrics in compared.metrics.items():
        expected = summarise(source, ORGANS, protocol)
        for metric in metrics:
            for organ in (*ORGANS, MEAN):
                wanted = expected["mean"][metric] if organ == MEAN else expected["organs"][organ][metric]
                cell = compared.cells["a"][protocol][metric][organ]
                assert (cell.mean, list(cell.ci95 or ()), cell.n, cell.n_undefined) == (
                    wanted["mean"], list(wanted["ci95"] or ()), wanted["n"], wanted["n_undefined"]
                )  # fmt: skip


@pytest.mark.parametrize("by", [0.05, -0.05, 0.0])
def test_a_constant_difference_is_that_difference(by: float) -> None:
    """Whatever the cases are like: they are paired, so there is no spread, and the sign is as sure as it can be (or not at all, of 0)."""
    source = random_table(1)
    found = compare([Result("a", (source,)), Result("b", (shifted(source, by),))], ORGANS).cells["b"]["strict"]["dsc"][MEAN].difference
    assert found is not None
    assert found.ci95 is not None
    assert (found.mean, *found.ci95) == pytest.approx((by, by, by), abs=1e-12)
    assert found.share == (0.0 if by else 1.0)
    assert found.n == 14


def test_every_row_is_compared_with_the_first() -> None:
    """And not with the one before: the third is as good as the first."""
    source = random_table(4)
    rows = compare([Result("a", (source,)), Result("b", (shifted(source, 0.1),)), Result("c", (source,))], ORGANS).cells
    found = [rows[name]["strict"]["dsc"]["liver"].difference for name in "abc"]
    assert found[0] is None
    assert [d and d.mean for d in found[1:]] == pytest.approx([0.1, 0.0])


def test_the_interval_of_a_difference_against_every_resample() -> None:
    """Three cases have 27 resamples, as likely as one another; 200,000 drawn ones have their percentiles and their share."""
    difference = np.array([[-0.1], [0.02], [0.3]])
    means = np.array([np.mean([difference[i, 0] for i in drawn]) for drawn in itertools.product(range(3), repeat=3)])
    found = paired_difference(difference, np.zeros((3, 1)), bootstrap_weights(3, 200_000, 1))
    assert found.mean == pytest.approx(0.22 / 3)
    assert found.ci95 == pytest.approx((means.min(), means.max()))  # 1 in 27 is more than 2.5 %
    assert found.share == pytest.approx(2 * np.mean(means <= 0), abs=0.01)


def test_the_mean_over_organs_is_a_mean_of_means() -> None:
    """Two cases; aorta is defined in one of them for both methods: (0.1 + 0.3) / 2 for the liver, 0.5 for the aorta, 0.35 for both."""
    first = table((row(0.5), row(0.4)), (row(0.5), IN_NEITHER))
    second = table((row(0.6), row(0.9)), (row(0.8), row(0.0, None, n_ref=0) | {"hd95_mm_penalised": 9.0}))
    cells = compare([Result("a", (first,)), Result("b", (second,))], ORGANS).cells["b"]["strict"]["dsc"]
    found = [cells[organ].difference for organ in (*ORGANS, MEAN)]
    assert [d and d.mean for d in found] == pytest.approx([0.2, 0.5, 0.35])
    assert [d and d.n for d in found] == [2, 1, 3]
    assert cells["aorta"].mean == pytest.approx(0.45)  # of its own, both cases count


def test_seeds_are_averaged_by_case_before_cases_are_drawn() -> None:
    """Two seeds that differ by +0.2 and -0.2 from a third method's: as one seed with that mean, and not as twice the cases."""
    middle = random_table(2)
    compared = compare([Result("one", (middle,)), Result("two", (shifted(middle, 0.2), shifted(middle, -0.2)))], ORGANS)
    one, two = (compared.cells[name]["strict"]["dsc"][MEAN] for name in ("one", "two"))
    assert two.n == one.n == 14
    assert two.ci95 == pytest.approx(one.ci95)
    assert two.difference is not None
    assert two.difference.ci95 == pytest.approx((0.0, 0.0), abs=1e-12)


def test_a_seed_in_which_a_value_is_undefined_is_left_out_of_that_value() -> None:
    tables = (table((row(0.5, 4.0), row(0.5, 4.0))), table((MISSED, row(0.5, 6.0))), table((MISSED, MISSED)))
    result = Result("a", tables)
    np.testing.assert_allclose(seed_means(result, ["c0"], ORGANS, "strict", "hd95_mm"), [[4.0, 5.0]])
    np.testing.assert_allclose(seed_means(result, ["c0"], ORGANS, "strict", "dsc"), [[0.5 / 3, 1 / 3]])
    np.testing.assert_allclose(seed_means(result, ["c0"], ORGANS, "strict", "hd95_mm_penalised"), [[204 / 3, 110 / 3]])
    nowhere = Result("b", (table((MISSED, MISSED)),))
    assert np.isnan(seed_means(nowhere, ["c0"], ORGANS, "strict", "hd95_mm")).all()
    found = compare([result, nowhere], ORGANS).cells["b"]["strict"]["hd95_mm"][MEAN]
    assert found.mean is None
    assert found.difference == Difference(None, None, None, 0)


def test_volumes_without_a_spacing_are_measured_in_voxels() -> None:
    plain = {**row(0.5), "hd95_mm": None, "hd95_mm_penalised": None, "assd_mm": None}
    compared = compare([Result("a", (table((plain, plain), (IN_NEITHER, plain)),))], ORGANS)
    assert compared.metrics == {"strict": ("dsc", "hd95_vox"), "transunet": ("dsc", "hd95_vox")}
    assert compare([Result("a", (table((IN_NEITHER, row(0.5))),))], ORGANS).metrics["strict"][1] == "hd95_mm"


def test_other_cases_or_organs_are_refused() -> None:
    whole = random_table(3)
    fewer = {case: organs for case, organs in whole.items() if case != "c0"}
    without = {case: {"liver": organs["liver"]} for case, organs in whole.items()}
    for other, said in ((fewer, "7 cases"), ({**fewer, "x": whole["c0"]}, "7 cases"), (without, "aorta")):
        with pytest.raises(UserError, match=said):
            compare([Result("a", (whole,)), Result("b", (whole, other))], ORGANS)


def test_one_case_says_nothing_of_others() -> None:
    """Its difference is known; an interval of no width, or a sign that is sure, would claim more."""
    results = [Result("a", (table((row(0.5), row(0.5))),)), Result("b", (table((row(0.6), row(0.7))),))]
    compared = compare(results, ORGANS)
    found = compared.cells["b"]["strict"]["dsc"][MEAN].difference
    assert found is not None
    assert (found.mean, found.ci95, found.share, found.n) == (pytest.approx(0.15), None, None, 2)
    line = next(line for line in format_text(blocks_of(compared), []).split("Difference from a")[1].splitlines() if line.startswith("b "))
    assert line.split()[:2] == ["b", "+15.00"]
    assert "p" not in line
    assert "[" not in line


def test_a_mean_of_what_is_known() -> None:
    assert mean_or_none([1.0, 2.0]) == 1.5
    assert mean_or_none([1.0, None]) is None
    assert mean_or_none([]) is None


# --- tables -------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def results() -> list[Result]:
    source = table((row(0.5, 4.0), row(0.7, 8.0)), (row(0.6, 6.0), MISSED))
    better = table((row(0.6, 3.0), row(0.8, 7.0)), (row(0.7, 5.0), row(0.2, 20.0)))
    return [Result("samed_s", (source,), 1234567, 2.04, 31.26), Result("mine & yours", (better,), None, None, 8.0, late=True)]


def test_numbers_worked_out_by_hand(results: list[Result]) -> None:
    """Means over organs: DSC (0.55 + 0.35) / 2 and (0.65 + 0.5) / 2; HD95 of what is defined (5 + 8) / 2, penalised (5 + 54) / 2."""
    text = format_text(blocks_of(compare(results, ORGANS)), [])
    first, second = (next(line for line in text.splitlines() if line.startswith(result.name)) for result in results)
    for cell in (" 45.00 [", " 6.50 [", "(3 of 4)", " 29.50 [", "1,234,567", " 2.0 ", "31.3"):
        assert cell in f"{first} "
    for cell in (" 57.50 [", " 8.75 [", "-*", " 8.0 "):
        assert cell in f"{second} "
    differences = text.split("Difference from samed_s")[1].split("\n\n")[0]
    assert "+12.50 [+10.00, +15.00] p < 0.002" in differences  # +0.1 for both organs in one case, +0.1 and +0.2 in the other
    assert "-1.00 p < 0.002" in differences  # on the three pairs that both define
    by_organ = next(line for line in text.split("DSC [0-100] by organ, protocol strict")[1].splitlines() if line.startswith("mine"))
    assert [cell in by_organ for cell in ("65.00 [60.00, 70.00]", "50.00 [20.00, 80.00]", "57.50")] == [True] * 3


def test_every_column_has_a_head_and_every_table_every_row(results: list[Result]) -> None:
    blocks = blocks_of(compare(results, ORGANS))
    assert len(blocks) == 2 + 3 + 2  # at a glance, differences, strict (three metrics), transunet (two)
    for block in blocks:
        assert {len(line) for line in block.lines} == {len(block.head)}
        assert [line[0] for line in block.lines] == [result.name for result in results][-len(block.lines) :]
    assert len(blocks[1].lines) == 1
    assert len(blocks_of(compare(results[:1], ORGANS))) == 1 + 3 + 2
    assert {"liver", "aorta", "mean"} <= set(blocks[2].head)


def test_markdown_and_latex_hold_the_same_cells(results: list[Result]) -> None:
    compared = compare(results, ORGANS)
    blocks = blocks_of(compared)
    markdown, latex = (write(blocks, ["50 % of _it_"]) for write in (format_markdown, format_latex))
    rows = [line for line in markdown.splitlines() if line.startswith("| ")]
    cells = [tuple(line.strip("| ").split(" | ")) for line in rows]
    assert cells == [line for block in blocks for line in (block.head, *block.lines)]
    tex_rows = [line.removesuffix(r" \\") for line in latex.splitlines() if line.endswith(r"\\")]
    assert len(tex_rows) == len(rows)
    assert all(line.count(" & ") == len(cell) - 1 for line, cell in zip(tex_rows, cells, strict=True))
    assert r"mine \& yours" in latex
    assert r"samed\_s" in latex
    assert re.search(r"\[\$-\$\d", latex)
    assert "[0-100]" in latex
    assert latex.count(r"\begin{table}") == latex.count(r"\end{table}") == latex.count(r"\toprule") == len(blocks)
    assert "% 50 % of _it_" in latex
    assert "- 50 % of _it_" in markdown


def test_the_csv_has_a_line_for_every_number(results: list[Result]) -> None:
    compared = compare(results, ORGANS)
    lines = lines_of(format_csv(compared))
    assert len(lines) == 2 * 5 * 3
    first = {(line["row"], line["protocol"], line["metric"], line["organ"]): line for line in lines}
    assert len(first) == len(lines)
    cell = first["mine & yours", "strict", "dsc", "mean"]
    assert float(cell["mean"]) == pytest.approx(0.575)
    assert [float(cell[name]) for name in ("difference", "difference_low", "difference_high")] == pytest.approx([0.125, 0.1, 0.15])
    assert (cell["n"], cell["pairs"], cell["share_beyond_0"], cell["trainable_parameters"]) == ("4", "4", "0.0", "")
    assert first["samed_s", "strict", "dsc", "mean"]["difference"] == ""
    assert first["samed_s", "strict", "hd95_mm", "aorta"]["n_undefined"] == "1"
    assert first["samed_s", "transunet", "hd95_vox", "aorta"]["n_undefined"] == "0"


def test_what_is_late_is_said(results: list[Result]) -> None:
    assert any("mine & yours" in line and "limit" in line for line in notes_of(compare(results, ORGANS)))
    assert not any("limit" in line for line in notes_of(compare(results[:1], ORGANS)))


def test_shares_in_words() -> None:
    assert show_difference(Difference(-0.5, (-1.0, 0.25), 0.25, 9), "dsc") == "-50.00 [-100.00, +25.00] p 0.250"
    assert show_difference(Difference(None, None, None, 0), "dsc") == "-"
    assert show_difference(Difference(2.0, None, None, 1), "hd95_mm") == "+2.00"


def test_the_picture_shows_rows_that_have_nothing_too(results: list[Result], tmp_path) -> None:
    nothing = Result("nothing", (table((MISSED, MISSED), (MISSED, MISSED)),), parameters=0)
    draw(compare([*results, nothing], ORGANS), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000
    assert math.isclose(compare([nothing], ORGANS).cells["nothing"]["strict"]["dsc"][MEAN].mean or 0.0, 0.0)
