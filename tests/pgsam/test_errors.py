"""A user's error is one line and exit code 2, a bug keeps its traceback; the command line and its config file raise such errors too."""

import argparse
import json
import pickle
from collections.abc import Sequence
from pathlib import Path

import pytest

from pgsam.engine.flags import add_deterministic, check_img_size, jsonable, parse, require_at_least, resolve_ckpt
from pgsam.errors import Parser, UserError, reports_user_errors


def test_a_message_is_one_line() -> None:
    assert str(UserError("a.npz: damaged\n  Traceback:\r\n\tline 1\n")) == "a.npz: damaged Traceback: line 1"
    assert str(UserError("as it is")) == "as it is"


def test_it_survives_a_process() -> None:
    """Workers hand their errors over as pickles."""
    back = pickle.loads(pickle.dumps(UserError("a.npz: damaged")))
    assert isinstance(back, UserError)
    assert str(back) == "a.npz: damaged"


@reports_user_errors
def program(argv: Sequence[str] | None = None) -> int:
    """What the program is for."""
    if argv is not None and argv[0] == "user":
        raise UserError("scan.nii.gz: truncated\nat byte 7; copy it again")
    if argv is not None and argv[0] == "bug":
        raise ValueError("ours")
    return 0 if argv is None else int(argv[0])


def test_programs_report_errors_of_users(capsys: pytest.CaptureFixture[str]) -> None:
    assert program(["user"]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "error: scan.nii.gz: truncated at byte 7; copy it again\n")


def test_programs_otherwise_do_as_they_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert program() == 0
    assert program(["5"]) == 5
    with pytest.raises(ValueError, match="ours"):
        program(["bug"])
    assert capsys.readouterr() == ("", "")
    assert program.__doc__ == "What the program is for."


# --- the command line ---------------------------------------------------------------------------------------------------------------------


def parser() -> Parser:
    made = Parser("The manual.\n\n    as it stands")
    made.add_argument("--config")
    made.add_argument("--root_path", required=True)
    made.add_argument("--checkpoint", "--lora_ckpt", type=Path)
    made.add_argument("--batch_size", type=int, default=12)
    made.add_argument("--base_lr", type=float)
    made.add_argument("--vit_name", default="vit_b", choices=("vit_b", "vit_l"))
    made.add_argument("--is_savenii", action="store_true")
    made.add_argument("--warmup", action=argparse.BooleanOptionalAction, default=None)
    add_deterministic(made)
    return made


def config(folder: Path, content: object) -> str:
    path = folder / "flags.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "--root_path"),
        (["--root_path", "x", "--unknown", "1"], "--unknown"),
        (["--root_path", "x", "--batch_size", "many"], "--batch_size: invalid int value: 'many'"),
        (["--root_path", "x", "--batch_size"], "--batch_size: expected one argument"),
        (["--root_path", "x", "--vit_name", "vit_x"], "--vit_name: invalid choice: 'vit_x'"),
        (["--root_path", "x", "--batch", "3"], "--batch"),  # abbreviations are not guessed
        (["--root_path", "x", "--is_savenii", "False"], "False"),  # a switch takes no value
        (["--root_path", "x", "--deterministic", "2"], "--deterministic"),
        (["--root_path", "x", "--config"], "--config: expected one argument"),
    ],
)
def test_what_cannot_be_parsed_is_one_line(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"\(see --help\)$") as error:
        parse(parser(), argv)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_is_the_programs(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        parse(parser(), [flag])
    assert leaving.value.code == 0
    text = capsys.readouterr().out
    assert "The manual.\n\n    as it stands" in text
    assert "--vit_name" in text


def test_deterministic() -> None:
    def value(*argv: str) -> int:
        return parse(parser(), ["--root_path", "x", *argv]).deterministic

    assert [value(), value("--deterministic"), value("--deterministic", "0"), value("--deterministic", "1")] == [1, 1, 0, 1]


FLAGS = {"root_path": "data", "batch_size": 3, "base_lr": 1, "vit_name": "vit_l", "is_savenii": True, "warmup": False, "deterministic": 0}


def test_a_config_lies_under_the_command_line(tmp_path: Path) -> None:
    path = config(tmp_path, FLAGS | {"lora_ckpt": "a.pth"})
    alone = vars(parse(parser(), ["--config", path]))
    assert alone == FLAGS | {"config": path, "checkpoint": Path("a.pth")}  # every alias of a flag will do, and required ones may stand there
    assert isinstance(alone["base_lr"], float)
    above = vars(parse(parser(), ["--batch_size", "5", f"--config={path}", "--warmup", "--root_path", "elsewhere", "--checkpoint", "b.pth"]))
    assert above == alone | {"batch_size": 5, "warmup": True, "root_path": "elsewhere", "checkpoint": Path("b.pth")}
    assert parse(parser(), ["--root_path", "x"]).batch_size == 12  # nothing is left over


def test_the_flags_of_a_run_can_be_given_again(tmp_path: Path) -> None:
    """As `config.json` of a run folder has them: what was not given is null."""
    args = parse(parser(), ["--root_path", "data", "--batch_size", "4", "--is_savenii", "--lora_ckpt", "a.pth"])
    saved = {name: value for name, value in jsonable(args).items() if name not in ("config", "warmup")}
    assert saved["base_lr"] is None
    again = parse(parser(), ["--config", config(tmp_path, json.loads(json.dumps(saved)))])
    assert jsonable(again) == jsonable(args) | {"config": again.config}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"root_path": "x", "batch": 1, "lr": 2}, "expected flags of this program, found batch, lr"),
        ({"root_path": "x", "--batch_size": 1}, "expected flags of this program, found --batch_size"),
        ({"root_path": "x", "help": True}, "found help"),
        ({"root_path": "x", "config": "y.json"}, "found config"),
        ({"root_path": "x", "no-warmup": True}, "found no-warmup"),
        ({"root_path": "x", "batch_size": "many"}, "batch_size: invalid int value: 'many'"),
        ({"root_path": "x", "batch_size": 2.5}, "batch_size: invalid int value: '2.5'"),
        ({"root_path": "x", "batch_size": True}, "batch_size: expected text or a number, found True"),
        ({"root_path": "x", "batch_size": None}, "batch_size: expected text or a number, found None"),
        ({"root_path": ["x"]}, "root_path: expected text or a number, found ['x']"),
        ({"root_path": None}, "root_path: expected text or a number, found None"),
        ({"root_path": "x", "is_savenii": "False"}, "is_savenii: expected true or false, found 'False'"),
        ({"root_path": "x", "warmup": 1}, "warmup: expected true or false, found 1"),
        ({"root_path": "x", "vit_name": "vit_x"}, "vit_name: expected one of vit_b, vit_l, found 'vit_x'"),
        ({"root_path": "x", "deterministic": 2}, "deterministic: expected one of 0, 1, found 2"),
        ([1], "expected flags of this program, found (not an object)"),
        ("{'root_path': 1}", "expected a JSON object of flags for --config"),
        ("", "expected a JSON object of flags for --config"),
    ],
)
def test_a_config_that_does_not_fit(tmp_path: Path, content: object, words: str) -> None:
    path = config(tmp_path, content)
    with pytest.raises(UserError) as error:
        parse(parser(), ["--config", path])
    assert str(error.value).startswith(f"{path}: ")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_no_such_config(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.json", tmp_path):
        with pytest.raises(UserError, match="expected a JSON object of flags for --config") as error:
            parse(parser(), ["--config", str(path)])
        assert str(error.value).startswith(f"{path}: ")


# --- values -------------------------------------------------------------------------------------------------------------------------------


def test_minima() -> None:
    args = argparse.Namespace(rank=1, batch_size=None, base_lr=float("nan"))
    require_at_least(args, rank=1, batch_size=1)
    with pytest.raises(UserError, match="--rank 1: expected at least 2"):
        require_at_least(args, batch_size=1, rank=2)
    with pytest.raises(UserError, match="--base_lr nan"):
        require_at_least(args, base_lr=0)


@pytest.mark.parametrize(("size", "near"), [(500, "496 or 512"), (15, "16 or 32"), (0, "16 or 32"), (-16, "16 or 32"), (225, "224 or 240")])
def test_image_sizes_are_multiples_of_the_patch(size: int, near: str) -> None:
    with pytest.raises(UserError, match=rf"^--img_size {size}: expected a multiple of 16 \(the patch side\), such as {near}$"):
        check_img_size(size)
    check_img_size(224)
    check_img_size(512)


def test_the_sam_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--ckpt, else Meta's name in checkpoints/ of the working folder, else of the checkout."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pgsam.engine.flags.REPOSITORY", tmp_path / "checkout")
    assert resolve_ckpt("none", "vit_b") is resolve_ckpt("None", "vit_tiny") is None
    assert resolve_ckpt("my/sam.pth", "vit_tiny") == Path("my/sam.pth")
    default = Path("checkpoints/sam_vit_b_01ec64.pth")
    assert resolve_ckpt(None, "vit_b") == default
    assert resolve_ckpt(None, "vit_h") == Path("checkpoints/sam_vit_h_4b8939.pth")
    (tmp_path / "checkout" / "checkpoints").mkdir(parents=True)
    (tmp_path / "checkout" / default).write_bytes(b"x")
    assert resolve_ckpt(None, "vit_b") == tmp_path / "checkout" / default
    (tmp_path / "checkpoints").mkdir()
    default.write_bytes(b"x")
    assert resolve_ckpt(None, "vit_b") == default
    with pytest.raises(UserError, match=r"--vit_name vit_tiny: there is no SAM file of it; give --ckpt none"):
        resolve_ckpt(None, "vit_tiny")
