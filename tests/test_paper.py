"""The paper's study: its graph, published numbers beside ours, and what a profile changes."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
from pathlib import Path

import pytest
from conftest import environment, execute
from test_cli_report import record, write

from rbkit.tools.published import NEEDED, answers, changes, compared, training_records, verdict

ROOT = Path(__file__).parent.parent
DATA = ("cifar10", "small-imagenet-150")
TABLES = ("accuracy", "curves", "completeness", "inversion", "distance", "fid")
FIGURES = ("curves", "attack", "ig", "shap", "inversion", "classes")


def make(*words: str, dry: bool = True, file: str = "paper.mk") -> subprocess.CompletedProcess[str]:
    """make as a user calls it, whatever make these tests run under."""
    env = {name: value for name, value in environment().items() if not name.startswith(("MAKE", "MFLAGS"))}
    flags = ["-n"] if dry else []
    return subprocess.run(
        ["make", *flags, "-f", file, *words], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )


# ------------------------------------------------------------------------------------------ the graph


@pytest.mark.parametrize(("data", "scale"), list(itertools.product(DATA, ("cpu", "full"))))
def test_the_graph_stands_without_data(data: str, scale: str, tmp_path: Path) -> None:
    """All of it, for each profile: models, attacks, maps, inversions from three sources, class images, scores, a page."""
    whole = make("paper", f"DATA={data}", f"SCALE={scale}", f"OUT={tmp_path}")
    assert whole.returncode == 0 and not whole.stderr and not any(tmp_path.iterdir())
    commands = re.findall(r"^(rb-\w+) (.*)$", whole.stdout, flags=re.M)
    counts = {name: sum(command == name for command, _ in commands) for name, _ in commands}
    assert counts["rb-train"] == 5 and counts["rb-attack"] == 12 and counts["rb-saliency"] == 8
    assert counts["rb-invert"] == 16 and counts["rb-score"] == 12 and counts["rb-report"] == 1
    page = next(line for command, line in commands if command == "rb-report")
    assert f"results/paper/{data}.jsonl" in page and ("SCALE=cpu" in page) == (scale == "cpu")
    for profile in ("paper", "sound"):
        one = make("paper", f"DATA={data}", f"SCALE={scale}", f"OUT={tmp_path}", f"PROFILE={profile}").stdout
        assert one.count("rb-train ") == 3 and set(one.splitlines()) <= {
            *whole.stdout.splitlines(),
            *one.splitlines()[-2:],
        }


def test_more_options_of_training_and_attacks_go_through(tmp_path: Path) -> None:
    """The study and the link take them, and remake what they change; nothing else is remade."""
    words = (f"OUT={tmp_path}", "LINK_SEEDS=0", "CONTROLS=")
    for target in ("study", "link"):
        plain = make(target, *words, file="Makefile").stdout
        more = make(target, *words, "TRAIN_ARGS=--smoothing 0.1", "ATTACK_ARGS=--sprint 2", file="Makefile").stdout
        trained = [line for line in more.splitlines() if "rb-train " in line and "/control/" not in line]
        attacked = [line for line in more.splitlines() if "rb-attack " in line]
        assert trained and all(" --smoothing 0.1 " in line for line in trained)
        assert attacked and all(" --sprint 2 " in line for line in attacked)
        assert more.replace(" --smoothing 0.1", "").replace(" --sprint 2", "").split() == plain.split()
    for knob, values in {"train": ("", "--ema 0.9"), "attack": ("", "--sprint 2")}.items():
        stamp = f"{tmp_path}/shapes/.knobs/{knob}"
        for value in values:
            make(stamp, *words, f"{knob.upper()}_ARGS={value}", file="Makefile", dry=False)
            assert Path(stamp).read_text().rstrip("\n").endswith(value or ("crop" if knob == "train" else " 1"))


@pytest.mark.parametrize(("target", "file"), [("study", "Makefile"), ("link", "Makefile"), ("paper", "paper.mk")])
def test_cifar10_may_be_a_folder_of_pictures(target: str, file: str, tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / "pictures" / split / "cat").mkdir(parents=True)
    for root, source in (("pictures", f"folder {tmp_path}/pictures --size 32"), ("none", "cifar10 --root")):
        words = ("DATA=cifar10", f"ROOT={tmp_path / root}", f"OUT={tmp_path / 'out'}")
        drawn = re.findall(r"^rb-data (.*)$", make(target, *words, file=file).stdout, flags=re.M)
        assert drawn and all(line.startswith(source) for line in drawn)


def test_the_makefile_leads_to_it() -> None:
    """DATA is cifar10 unless it is said; knobs go through."""
    found = make("paper", "SCALE=cpu", "EPS=0.25", file="Makefile")
    assert found.returncode == 0 and "results/paper/cifar10.jsonl" in found.stdout and "--eps 0.25 " in found.stdout
    figure = make("paper-figure-shap", "DATA=small-imagenet-150", file="Makefile").stdout
    assert "--method shap" in figure and "rb-data imagenet-subset" in figure and "rb-attack" not in figure


def test_the_defects_are_those_of_the_paper_and_none_is_sound() -> None:
    defects = (
        "--attack-bn train",
        "--attack-keep batch",
        "--last-iterate unjudged",
        "--schedule-epochs 200",
        "--keep batch",
    )
    lines = {p: make("paper", f"PROFILE={p}").stdout for p in ("paper", "sound")}
    for option in (
        *defects,
        "--val out/paper/cifar10-full/test.safetensors",
        "--seeds-from out/paper/cifar10-full/test",
    ):
        assert option in lines["paper"] and option not in lines["sound"], option
    assert (
        "--ema" in lines["sound"]
        and "--val 0.1 --select robust" in lines["sound"]
        and "--ig-tolerance" in lines["sound"]
    )


def test_figures_and_tables_are_targets_of_their_own() -> None:
    for name in (*(f"paper-figure-{f}" for f in FIGURES), *(f"paper-table-{t}" for t in TABLES)):
        found = make(name, "PROFILE=sound")
        assert found.returncode == 0, found.stderr
        last = [line for line in found.stdout.splitlines() if line.startswith("rb-")][-1]
        assert last.startswith("rb-view" if "figure" in name else "rb-report"), name
    figure = make("paper-figure-ig", "PROFILE=sound").stdout
    assert "rb-attack" not in figure and "rb-score" not in figure and "rb-invert" not in figure


@pytest.mark.parametrize("data", DATA)
def test_what_is_missing_is_said_in_one_line(data: str, tmp_path: Path) -> None:
    result = make("paper", f"DATA={data}", f"OUT={tmp_path}", dry=False)
    told = [line for line in result.stderr.splitlines() if not line.startswith("make: ***")]
    assert result.returncode == 2 and len(told) == 1 and "no images; give ROOT=DIR" in told[0], result.stderr
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("word", "told"), [("PROFILE=fast", "paper, sound"), ("DATA=shapes", "cifar10"), ("SCALE=1", "cpu")]
)
def test_knobs_that_do_not_exist_are_refused(word: str, told: str) -> None:
    result = make("paper", word)
    assert result.returncode == 2 and told in result.stderr and result.stderr.count("\n") == 1


# ------------------------------------------------------------------------------------------ published numbers


def published(data: str) -> list[dict]:
    return [json.loads(line) for line in (ROOT / "results" / "paper" / f"{data}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("data", DATA)
def test_published_numbers_have_a_source_and_a_way_to_be_measured_or_a_reason(data: str) -> None:
    lines = published(data)
    assert {line["table"] for line in lines} <= set(TABLES)
    assert len({line["id"] for line in lines}) == len(lines) > 20
    for line in lines:
        assert all(name in line for name in NEEDED) and line["source"] and line["what"], line
        assert (line["match"] is None) == ("reason" in line), line["id"]
        assert "instead" not in line or line["extractor"], line["id"]


def test_the_main_numbers_are_those_of_the_paper() -> None:
    values = {line["id"]: line["value"] for data in DATA for line in published(data)}
    told = {"E1 clean": 0.932, "E1 pgd l2": 0.0036, "E2 clean": 0.85, "E2 pgd l2": 0.646, "E3 clean": 0.701,
            "E3 pgd l2": 0.0088, "E4 clean": 0.558, "E4 pgd l2": 0.354, "E1 fid": 152.48, "E2 fid": 86.36}  # fmt: skip
    assert told.items() <= values.items()


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.6, 0.7, "inside"),
        (0.646, 0.7, "inside"),
        (0.65, 0.7, "above"),
        (0.5, 0.64, "below"),
        (None, None, "no interval"),
    ],
)
def test_verdicts(low: float | None, high: float | None, expected: str) -> None:
    assert verdict(0.646, {"value": 0.65, "low": low, "high": high}) == expected
    assert (
        verdict(0.646, None) == "not measured"
        and verdict(None, {"value": 1.0, "low": 0.0, "high": 2.0}) == "not published"
    )


def about(attack: str = "pgd") -> dict:
    return {"attack": attack, "norm": "l2", "eps": 0.5}


def study(tag: str, *, robust: float) -> list[dict]:
    """Records of a standard and a robust model (model 2 is trained at 0.5)."""
    kind = {"kind": "adversarial", "tag": tag}
    return [
        record(0, "clean_accuracy", 0.93, **kind, **about()),
        record(0, "robust_accuracy", 0.004, **kind, **about()),
        record(2, "clean_accuracy", 0.85, **kind, **about()),
        record(2, "robust_accuracy", robust - 0.1, **kind, **about("auto")),
        record(2, "robust_accuracy", robust, **kind, **about()),
        record(2, "frechet_distance", 4.0, kind="inversions", params={"mode": "class"}, tag=tag),
    ]


def test_each_number_is_answered_by_its_own_record() -> None:
    rows = {row["id"]: row for row in compared(published("cifar10"), study("paper", robust=0.65))}
    assert rows["E2 pgd l2"]["ours"]["value"] == 0.65 and rows["E2 pgd l2"]["verdict"] == "inside"
    assert rows["yardstick auto"]["ours"]["value"] == 0.55 and rows["yardstick auto"]["verdict"] == "below"
    assert rows["E1 clean"]["ours"]["train_eps"] == 0 and rows["E2 clean"]["ours"]["train_eps"] == 0.5
    assert rows["E2 fid"]["ours"] is None and rows["E2 fid"]["verdict"] == "not measured"
    assert rows["E2 fid"]["other"]["value"] == 4.0 and rows["E1 fid"]["other"] is None
    assert rows["E2 pgd linf"]["verdict"] == "not measured"
    assert not answers({"params": None, "kind": "inversions"}, {"params.mode": "class"})


def test_a_difference_counts_where_intervals_do_not_touch() -> None:
    numbers = published("cifar10")
    one, two = (compared(numbers, study(tag, robust=value)) for tag, value in (("paper", 0.60), ("sound", 0.66)))
    rows = {row["id"]: row for row in changes(one, two)}
    assert rows["E2 pgd l2"]["verdict"] == "higher" and rows["E2 pgd l2"]["difference"] == pytest.approx(0.06)
    assert rows["E2 clean"]["verdict"] == "open" and rows["E2 fid"]["difference"] == 0 and "E1 fid" not in rows
    bare = [{**row, "ours": {**row["ours"], "low": None}} if row["ours"] else row for row in two]
    assert {row["id"]: row["verdict"] for row in changes(one, bare)}["E2 pgd l2"] == "no interval"
    assert {row["id"]: row["verdict"] for row in changes(two, one)}["E2 pgd l2"] == "lower"


def test_curves_are_numbers_too() -> None:
    epochs = [{"epoch": e, "val_accuracy": a, "train_loss": 1.0} for e, a in ((1, 0.5), (2, 0.7), (3, 0.6))]
    records = training_records({"epochs": epochs, "recipe": {"eps": 0.5}})
    assert {r["statistic"]: r["value"] for r in records} == {"best": 0.7, "best_epoch": 2, "last": 0.6}
    numbers = [line for line in published("cifar10") if line["id"] in ("E2 last clean", "E1 best clean")]
    rows = {row["id"]: row for row in compared(numbers, records)}
    assert rows["E2 last clean"]["ours"]["value"] == 0.6 and rows["E1 best clean"]["verdict"] == "not measured"
    assert rows["E2 last clean"]["verdict"] == "no interval"


# ------------------------------------------------------------------------------------------ the page


@pytest.fixture
def records(tmp_path: Path) -> list[Path]:
    return [
        write(tmp_path / f"{tag}.jsonl", study(tag, robust=value)) for tag, value in (("paper", 0.6), ("sound", 0.66))
    ]


def test_the_page_says_published_ours_interval_verdict_for_each_profile(records: list[Path], tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    result = execute(
        "rb-report", *records, "--published", ROOT / "results/paper/cifar10.jsonl", "--note", "Scaled <down>.", "--ours",
        "ours (SCALE=cpu)", "-o", page,
    )  # fmt: skip
    assert result.status == 0, result.err
    text = page.read_text()
    assert text.count("<h2>Published and ours: ") == 2 and text.count("<th>ours (SCALE=cpu)</th>") == 12
    row = re.search(r"<tr><td[^>]*>trained in L2 0.5, accuracy under PGD-20, L2 0.5</td>(.*?)</tr>", text)
    assert row is not None
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", row[1])
    assert cells[:4] == ["64.6 %", "60.0 %", "59.0 % to 61.0 % (n 200)", "below"]
    assert (
        text.count("Scaled &lt;down&gt;.") == 4 and "Inception weights" in text
    )  # below the title and with each table
    assert "Frechet distance in the features of the judge model: 4 (n 200)" in text
    changed = text[text.index("What changes from paper to sound") :]
    assert re.search(
        r"PGD-20, L2 0.5</td><td>60.0 % \(59.0 % to 61.0 %\)</td><td>66.0 % [^<]*</td><td>\+6.0 points", changed
    )
    assert "The two models: paper" in text and "The two models: sound" in text and text.count("<h1>") == 1


def test_one_table_stands_alone(records: list[Path], tmp_path: Path) -> None:
    numbers, page = ROOT / "results/paper/cifar10.jsonl", tmp_path / "t.html"
    assert execute("rb-report", *records, "--published", numbers, "--table", "fid", "-o", page).status == 0
    text = page.read_text()
    assert "FID of class images" in text and "clean accuracy" not in text and "Interpretability" not in text
    result = execute("rb-report", *records, "--published", numbers, "--table", "no", "-o", page)
    assert result.status == 3 and "it has accuracy, curves" in result.err and result.err.count("\n") == 1
    assert execute("rb-report", *records, "--table", "fid", "-o", page).status == 2
    (tmp_path / "bad.jsonl").write_text('{"id":"x"}\n')
    result = execute("rb-report", *records, "--published", tmp_path / "bad.jsonl", "-o", page)
    assert result.status == 3 and "number 1 has no table" in result.err and result.err.count("\n") == 1
