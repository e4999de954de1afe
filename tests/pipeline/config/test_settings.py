"""Each setting's own declaration: a meaning, a range that is enforced, a place in the identity, a row of the page."""

import dataclasses
import subprocess
import sys
import typing

import pytest

from beitforge.pipeline.cli import main
from beitforge.pipeline.config.fields import Duration, Rule, Size
from beitforge.pipeline.config.identity import differences, identity, is_per_host, shared
from beitforge.pipeline.config.loading import from_dict, to_dict
from beitforge.pipeline.config.reference import markdown, text
from beitforge.pipeline.config.settings import Config
from beitforge.pipeline.errors import ConfigError
from tests.conftest import ROOT

SECTIONS = {name: kind for name, kind in typing.get_type_hints(Config).items() if name != "deepspeed"}
FIELDS = [
    (section, item.name, item.default, item.metadata["rule"])
    for section, kind in SECTIONS.items()
    for item in dataclasses.fields(kind)
]
IDS = [f"{section}.{name}" for section, name, _, _ in FIELDS]

# Written out, so that a changed declaration shows: old run folders hold the identity of these lists.
DATA_PLACES = "images tokens heldout_images heldout_tokens labelled_images labelled_test tokenizer cache cache_gb"
PER_HOST = {"data": set(DATA_PLACES.split()), "loader": {"workers", "prefetch", "decoder"}}
FREE = {
    **PER_HOST,
    "data": PER_HOST["data"] | {"bad_sample_budget"},
    "model": {"kernels"},
    "train": {
        "run",
        "micro_batch",
        "zero_stage",
        "offload_optimizer",
        "activation_checkpointing",
        "compile",
        "compile_mode",
    },
    "finetune": {"run", "micro_batch", "test_every"},
    "tokenizer": {"micro_batch", "precision"},
}


def test_the_identity_of_a_run_is_what_it_was():
    config = from_dict({"deepspeed": {"a": 1}}, "test")
    tree = to_dict(config)
    expected = {s: {n: v for n, v in values.items() if n not in FREE.get(s, set())} for s, values in tree.items()}
    expected["optimizer"]["weight_decay_end"] = expected["finetune"]["weight_decay_end"] = 0.05  # words for numbers
    expected["finetune"]["test_crop"] = 0.875
    found = identity(config, tuple(tree))
    assert found == expected
    assert [list(values) for values in found.values()] == [list(values) for values in expected.values()]
    assert identity(config, ("data.seed",)) == {"data": {"seed": 0}}
    assert {(s, n) for s, n, _, _ in FIELDS if is_per_host(s, n)} == {(s, n) for s in PER_HOST for n in PER_HOST[s]}


def test_a_decoder_of_other_pixels_is_the_whole_runs():
    """Exact ones are each host's own and leave the identity as it was; another is kept, told apart and compared."""
    auto, pillow, other = (
        from_dict({"loader": {"decoder": name}}, "test") for name in ("auto", "pillow", "approximate")
    )
    assert identity(auto, ("loader",)) == identity(pillow, ("loader",))
    assert identity(other, ("loader",))["loader"] == {**identity(auto, ("loader",))["loader"], "decoder": "approximate"}
    assert differences(auto, pillow, ("loader",)) == []
    assert differences(auto, other, ("loader",)) == [("loader.decoder", "auto", "approximate")]
    assert differences(other, pillow, ("loader",)) == [("loader.decoder", "approximate", "pillow")]
    words = [shared("loader", "decoder", name) for name in ("auto", "pillow", "approximate", "gpu")]
    assert words == ["none of approximate, gpu"] * 2 + ["approximate", "gpu"]
    assert shared("loader", "workers", 3) is None and shared("loader", "lanes", 256) == "256"


@pytest.mark.parametrize(("section", "name", "default", "rule"), FIELDS, ids=IDS)
def test_a_setting_has_a_meaning_and_a_range(section: str, name: str, default: object, rule: Rule):
    assert rule.doc[0].isupper()
    assert rule.doc.endswith(".")
    assert len(rule.doc.split()) >= 2
    if isinstance(default, int | float | Size | Duration) and not isinstance(default, bool):
        assert rule.range(), "a number without a range"


def _outside(default: object, rule: Rule) -> list[object]:
    """Values just beyond each end of the range, as YAML writes them, and one that is no choice."""
    if rule.choices:
        return [99 if isinstance(rule.choices[0], int) else "nonsense"]
    if rule.place:
        return ["s3://bucket/x" if rule.place == "folder" else "s3:/bucket"]
    tiny: float = 1 if isinstance(default, int | Size) and not isinstance(default, bool) else 1e-6
    ends = [
        *([rule.at_least - tiny] if rule.at_least is not None else []),
        *([rule.more_than] if rule.more_than is not None else []),
        *([rule.at_most + tiny] if rule.at_most is not None else []),
        *([rule.less_than] if rule.less_than is not None else []),
    ]
    if isinstance(default, Size):
        return [f"{end}x{default.width}" for end in ends]
    if isinstance(default, Duration):
        return [f"{end} {default.unit}" for end in ends]
    return [[end, *default[1:]] if isinstance(default, tuple) else end for end in ends]


@pytest.mark.parametrize(("section", "name", "default", "rule"), FIELDS, ids=IDS)
def test_a_value_out_of_range_is_refused(section: str, name: str, default: object, rule: Rule):
    """With the setting, the value and the rule."""
    for value in _outside(default, rule):
        with pytest.raises(ConfigError) as caught:
            from_dict({section: {name: value}}, "test")
        line = str(caught.value)
        assert f"{section}.{name} is " in line
        shown = f"{float(value) if isinstance(default, float) else value}"  # type: ignore[arg-type]
        assert shown.split()[0].strip("[,") in line
        ends = (rule.at_least, rule.more_than, rule.at_most, rule.less_than)
        words = [str(choice) for choice in rule.choices] or [f"{end:g}" for end in ends if end is not None]
        assert rule.place or any(word.replace("9.22337e+18", "2^63") in line.partition("; ")[2] for word in words)
        assert "\n" not in line


def test_the_page_is_the_generators():
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert page == markdown() + "\n", "run `beitforge settings --markdown > docs/settings.md`"
    assert all(f"| `{name}` |" in page for _, name, _, _ in FIELDS)


def test_the_terminal_lists_every_setting_in_100_columns():
    lines = text("").splitlines()
    assert max(map(len, lines)) <= 100
    assert all(any(line.startswith(f"  {name} = ") for line in lines) for name in IDS)
    assert text("train") in text("")


def test_an_unknown_section_is_one_line(capsys):
    assert main(["settings", "trian"]) == 2
    assert capsys.readouterr().err == "error: section 'trian' is unknown; did you mean train?\n"


def test_the_settings_import_nothing_heavy():
    code = "import sys, beitforge.pipeline.config.reference; print(*sorted({'torch', 'numpy'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "src", capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""
